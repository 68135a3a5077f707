"""What one run of a trigger showed, and whether that kills a planted bug."""

from typing import Final

import msgspec

from ledgerproof.mutants.patches import Header


class Shown(msgspec.Struct, frozen=True):
    """A witness in brief."""

    code: str
    text: str
    key: str | None = None
    user: int | None = None
    seq: int | None = None


class Outcome(msgspec.Struct):
    """What a run showed; written by the process that ran the trigger."""

    verdict: str
    codes: dict[str, int] = {}
    """Code → violations, for those that fired."""
    unchecked: dict[str, str] = {}
    reasons: list[str] = []
    witnesses: list[Shown] = []
    """The first of each code."""
    disagreements: list[str] = []
    """What the judges say different things of."""
    imports: dict[str, str] = {}
    """Package → the folder it was imported from."""
    seconds: float = 0.0
    error: str | None = None
    """Why the trigger did not run to its end, if it did not."""

    @property
    def silent(self) -> bool:
        """Whether nothing at all was found: what the clean tree must show."""
        return self.verdict == "PASS" and not (self.codes or self.unchecked or self.reasons or self.error)

    @property
    def safe(self) -> bool:
        """Whether the ledger is right: nothing was found, or the service stopped before it did anything wrong."""
        stopped = self.verdict == "INVALID" and any("not drained" in reason for reason in self.reasons)
        return self.silent or (stopped and self.error is None)

    @property
    def text(self) -> str:
        """What was shown, in a few words."""
        if self.error:
            return f"did not run: {self.error}"
        if self.silent:
            return "silent"
        return f"{self.verdict}: {', '.join(sorted(self.codes)) or '; '.join(self.reasons)[:200]}"


class Alone(msgspec.Struct):
    """One safeguard of a pair removed, the other one kept."""

    hunks: list[int]
    shown: str
    safe: bool
    seconds: float


class Row(msgspec.Struct):
    """One planted bug in the matrix."""

    id: str
    layer: str
    title: str
    trigger: str
    tier: str
    killed: bool
    codes: list[str]
    """Those that fired."""
    must: list[str]
    may: list[str]
    owns: str | None
    verdict: str
    seconds: float
    control: str
    """What the clean tree showed under the same trigger."""
    control_seconds: float
    witness: str
    why: str = ""
    """Why it counts as not killed."""
    pair: bool = False
    alone: list[Alone] = []


NOT_RUN: Final = "not run"
LIMIT_S: Final = 60.0
"""A planted bug that takes longer to show counts as not killed."""


def complaint(header: Header, outcome: Outcome, control: Outcome, alone: list[Alone]) -> str:
    """Return why a planted bug counts as not killed, empty if it is.

    Killed means that exactly the right codes fired, each with a witness, that the run was called what the header
    says for the reason it gives, that the judges agree (unless one of them is the bug), and that the clean tree was
    silent under the same trigger.
    """
    if control.error or not control.silent:
        return f"the clean tree is not silent under this trigger: {control.text}"
    if outcome.error:
        return f"the trigger did not run to its end: {outcome.error}"
    missing = [code for code in header.must if code not in outcome.codes]
    if missing:
        return f"{', '.join(missing)} did not fire ({outcome.text})"
    foreign = sorted(set(outcome.codes) - {*header.must, *header.may})
    if foreign:
        return f"{', '.join(foreign)} fired too"
    unseen = [code for code in header.must if not any(shown.code == code for shown in outcome.witnesses)]
    if unseen:
        return f"{', '.join(unseen)} fired without a witness"
    if outcome.verdict != header.verdict:
        return f"the run was called {outcome.verdict} and not {header.verdict}"
    if header.reason and not any(header.reason in reason for reason in outcome.reasons):
        return f"no reason says {header.reason!r}: {'; '.join(outcome.reasons)[:200]}"
    if outcome.disagreements and header.layer != "harness":
        return outcome.disagreements[0]
    unsafe = [one.shown for one in alone if not one.safe]
    if unsafe:
        return f"one safeguard alone does not keep the ledger safe: {unsafe[0]}"
    slow = max([outcome.seconds, *(one.seconds for one in alone)])
    return f"it took {slow:.0f} s, {LIMIT_S:.0f} s are allowed" if slow > LIMIT_S else ""


def row_of(header: Header, outcome: Outcome, control: Outcome, alone: list[Alone]) -> Row:
    """Return the row of a planted bug that was run."""
    why = complaint(header, outcome, control, alone)
    shown = [witness for witness in outcome.witnesses if witness.code in header.must] or outcome.witnesses
    witness = f"{shown[0].code}: {shown[0].text}" if shown else "; ".join(outcome.reasons)[:300]
    return Row(
        id=header.id,
        layer=header.layer,
        title=header.title,
        trigger=header.trigger,
        tier=header.tier,
        killed=not why,
        codes=sorted(outcome.codes),
        must=header.must,
        may=header.may,
        owns=header.owns,
        verdict=outcome.verdict,
        seconds=round(outcome.seconds, 1),
        control=control.text,
        control_seconds=round(control.seconds, 1),
        witness=witness,
        why=why,
        pair=bool(header.halves),
        alone=alone,
    )


def not_run(header: Header, why: str) -> Row:
    """Return the row of a planted bug that was not run: it is not killed."""
    nothing = Outcome(NOT_RUN, error=why)
    row = row_of(header, nothing, nothing, [])
    return msgspec.structs.replace(row, why=why, control=NOT_RUN)
