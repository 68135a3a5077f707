"""The replay judge: plain Python over plain rows, slow and meant to be obviously right, for small runs.

Its rules are written from the specification of each code, not from the folds of `invariants.anomalies`, and share
nothing with them except the raw evidence.
"""

from collections.abc import Callable, Iterator
from typing import Final

from invariants.judges.opinion import Opinion
from invariants.judges.replay import book, events, keys, money, recovery, refusals, sessions, wallets
from invariants.judges.replay.case import Case, Finding
from invariants.run import Run
from invariants.snapshot import MissingEvidence, NotRecorded
from invariants.subjects import kept, subject_of

NAME: Final = "replay"

MAX_RECORDS: Final = 40_000
"""History records of the largest run it judges: some rules look at every pair of moments of a wallet."""

Rule = Callable[[Case], Iterator[Finding]]

RULES: Final[dict[str, Rule]] = {
    "A01": keys.a01_lost,
    "A02": keys.a02_duplicate,
    "A03": keys.a03_phantom,
    "A04": keys.a04_failed_but_applied,
    "A05": keys.a05_replay_diverges,
    "A06": wallets.a06_overdraft,
    "A07": wallets.a07_negative,
    "A08": refusals.a08_wrong_refusal,
    "A09": wallets.a09_broken_chain,
    "A10": wallets.a10_seq,
    "A11": events.a11_projection,
    "A12": wallets.a12_money,
    "A13": money.a13_torn,
    "A14": sessions.a14_real_time_order,
    "A15": sessions.a15_session,
    "A16": sessions.a16_own_writes,
    "A17": sessions.a17_too_stale,
    "A18": sessions.a18_dishonest_flag,
    "A19": sessions.a19_impossible_read,
    "A20": sessions.a20_fractured,
    "A21": events.a21_event_lost,
    "A22": events.a22_effect_repeated,
    "A23": events.a23_event_order,
    "A24": events.a24_phantom_event,
    "A25": events.a25_event_differs,
    "A26": events.a26_skipped,
    "A27": money.a27_paid_twice,
    "A28": money.a28_paid_wrong,
    "A29": book.a29_illegal_transition,
    "A30": wallets.a30_escrow_leak,
    "A31": wallets.a31_wrong_shard,
    "A32": recovery.a32_zombie_write,
    "A33": wallets.a33_rewritten,
    "A34": recovery.a34_no_recovery,
    "A35": recovery.a35_blind_reconciliation,
}
"""Code → its rule: every anomaly, but not V01–V06, which are about the evidence and not about the service."""


def findings(run: Run, code: str) -> list[Finding]:
    """Return every violation of one code. Raises KeyError for an unknown code, MissingEvidence without its tables."""
    return list(RULES[code](Case(run)))


def judge(run: Run) -> Opinion:
    """Decide every code of `RULES`; one whose tables are missing, or whose rule raises, is undecided."""
    case = Case(run)
    found: dict[str, frozenset[str]] = {}
    undecided: dict[str, str] = {}
    for code, rule in RULES.items():
        try:
            found[code] = kept(subject_of(code, finding.place) for finding in rule(case))
        except NotRecorded:
            continue  # The run is older than what this code needs: no judge decides it.
        except MissingEvidence as error:
            undecided[code] = str(error)
        except Exception as error:  # noqa: BLE001 - a rule that raises has decided nothing, and must say so
            undecided[code] = f"{rule.__name__} raised {type(error).__name__}: {error}"
    return Opinion(found, undecided)
