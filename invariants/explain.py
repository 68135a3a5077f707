"""A proof that a person can follow: for one witness of a code the rows, the attempts, the order, and the contradiction.

What is wrong says the check itself; the sections (`invariants.evidence`) show where to see it. Which sections the
proof of a code has is one line of `PROOFS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from invariants import evidence
from invariants.anomalies import CHECKS, Witness
from invariants.evidence import Line, Section
from invariants.run import Run
from invariants.snapshot import MissingEvidence


class NoWitness(Exception):
    """The code has no witness of that number in this run; the message says how many there are."""


@dataclass(frozen=True)
class Explanation:
    """The proof of one witness."""

    code: str
    name: str
    number: int
    """Which of the code's witnesses this is, from 1."""
    witnesses: int
    count: int
    """Violations in all; of many only the first are witnesses."""
    rule: str
    contradiction: str
    witness: Witness
    sections: list[Section]


Proof = Callable[[Run, Witness], Section | None]


def explain(run: Run, code: str, number: int = 1) -> Explanation:
    """Run the check of `code` and prove its witness `number` (from 1).

    Raises KeyError for a code there is not, NoWitness for a number beyond the witnesses, and MissingEvidence where the
    run does not hold what the code needs.
    """
    check = CHECKS[code]
    found = check.find(run)
    if not 1 <= number <= len(found.witnesses):
        raise NoWitness(
            f"{code} {check.name}: nothing was found in this run"
            if not found.witnesses
            else f"{code} {check.name} has {len(found.witnesses)} witnesses here; there is no number {number}"
        )
    witness = found.witnesses[number - 1]
    sections = [section for proof in PROOFS[code] if (section := _shown(proof, run, witness)) is not None]
    moments = [line.at_s for section in sections for line in section.lines if line.at_s is not None]
    sections.append(evidence.show_timeline(run, moments))
    return Explanation(
        code=code,
        name=check.name,
        number=number,
        witnesses=len(found.witnesses),
        count=found.count,
        rule=rule_of(code),
        contradiction=witness.text,
        witness=witness,
        sections=sections,
    )


def rule_of(code: str) -> str:
    """Return the first sentence of a code's specification, without its name. Raises KeyError."""
    check = CHECKS[code]
    text = " ".join((check.find.__doc__ or "").split("\n\n")[0].split())
    return text.removeprefix(f"{check.code} {check.name}: ")


def _shown(proof: Proof, run: Run, witness: Witness) -> Section | None:
    try:
        return proof(run, witness)
    except MissingEvidence as error:
        return Section("Not in this run", [Line(str(error))])


PROOFS: Final[dict[str, tuple[Proof, ...]]] = {
    "A01": (evidence.show_attempts, evidence.show_ledger, evidence.show_bet, evidence.show_match),
    "A02": (evidence.show_ledger, evidence.show_attempts, evidence.show_bet, evidence.show_match),
    "A03": (evidence.show_ledger, evidence.show_attempts, evidence.show_bet, evidence.show_match),
    "A04": (evidence.show_attempts, evidence.show_ledger, evidence.show_match),
    "A05": (evidence.show_attempts, evidence.show_ledger),
    "A06": (evidence.show_ledger, evidence.show_attempts),
    "A07": (evidence.show_ledger, evidence.show_attempts, evidence.show_bet),
    "A08": (evidence.show_attempts, evidence.show_ledger, evidence.show_around, evidence.show_bet, evidence.show_match),
    "A09": (evidence.show_ledger, evidence.show_attempts),
    "A10": (evidence.show_ledger, evidence.show_attempts),
    "A11": (evidence.show_stores, evidence.show_ledger, evidence.show_event),
    "A12": (evidence.show_money, evidence.show_match),
    "A13": (evidence.show_bet, evidence.show_ledger, evidence.show_match),
    "A14": (evidence.show_attempts, evidence.show_around, evidence.show_ledger),
    "A15": (evidence.show_around, evidence.show_ledger),
    "A16": (evidence.show_around, evidence.show_ledger),
    "A17": (evidence.show_around, evidence.show_ledger),
    "A18": (evidence.show_around, evidence.show_ledger),
    "A19": (evidence.show_around, evidence.show_ledger),
    "A20": (evidence.show_around, evidence.show_transaction, evidence.show_ledger),
    "A21": (evidence.show_event, evidence.show_ledger),
    "A22": (evidence.show_event, evidence.show_bet, evidence.show_match),
    "A23": (evidence.show_event, evidence.show_ledger),
    "A24": (evidence.show_event, evidence.show_ledger),
    "A25": (evidence.show_event, evidence.show_ledger, evidence.show_bet),
    "A26": (evidence.show_event, evidence.show_stores, evidence.show_bet),
    "A27": (evidence.show_bet, evidence.show_ledger, evidence.show_match),
    "A28": (evidence.show_bet, evidence.show_ledger, evidence.show_match),
    "A29": (evidence.show_match, evidence.show_bet),
    "A30": (evidence.show_match,),
    "A31": (evidence.show_routes, evidence.show_ledger, evidence.show_match),
    "A32": (evidence.show_routes, evidence.show_event, evidence.show_ledger, evidence.show_primaries),
    "A33": (evidence.show_both_snapshots, evidence.show_ledger),
    "A34": (evidence.show_faults, evidence.show_curves),
    "A35": (evidence.show_drift, evidence.show_stores),
    "V01": (evidence.show_operations,),
    "V02": (evidence.show_faults, evidence.show_operations),
    "V03": (evidence.show_faults,),
    "V04": (evidence.show_shown_sometimes,),
    "V05": (evidence.show_recorded,),
    "V06": (evidence.show_recorded,),
}
"""Code → the sections of its proof, in order; the timeline around them comes last."""
