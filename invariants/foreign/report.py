"""What a judge of a foreign history says: named anomalies with witnesses, and what it could not decide."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from invariants.verdict import Verdict

MAX_WITNESSES: Final = 20
"""Witnesses kept per name: enough to see a pattern, few enough to read. All are counted."""

CODES: Final = {
    "wrong-total": "A12",
    "negative-balance": "A07",
    "wrong-accounts": "A19",
    "nil-balance": "A19",
    "unexplained-read": "A19",
    "stale-read": "A14",
    "fractured-reads": "A20",
    "lost-transfer": "A01",
    "repeated-transfer": "A02",
    "failed-transfer-seen": "A04",
    "internal": "A16",
    "garbage-read": "A03",
    "duplicate-append": "A02",
    "incompatible-order": "A20",
    "lost-append": "A01",
    "G1a": "A04",
    "dirty-update": "A04",
    "G1b": "A20",
    "G0": "A20",
    "G1c": "A20",
    "G-single": "A20",
    "G2": "A20",
    "G0-realtime": "A14",
    "G1c-realtime": "A14",
    "G-single-realtime": "A14",
    "G2-realtime": "A14",
}
"""Name of an anomaly of a foreign history → the code of this project that is nearest to it."""


@dataclass(frozen=True)
class Anomaly:
    """One anomaly, proved in words."""

    name: str
    """A key of `CODES`."""
    text: str
    lines: tuple[int, ...] = ()
    """The lines of the file that prove it."""

    @property
    def code(self) -> str:
        """The nearest code of this project."""
        return CODES[self.name]


@dataclass
class Report:
    """What a judge says of one history."""

    format: str
    calls: int
    reads: int
    """Reads that were answered: without any, nothing was judged."""
    counts: Counter[str] = field(default_factory=Counter)
    anomalies: list[Anomaly] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    """What could not be decided, one sentence each. Not empty: the history is at best not proven."""

    def add(self, anomaly: Anomaly) -> None:
        """Count an anomaly, and keep it while there are few of its name."""
        self.counts[anomaly.name] += 1
        if self.counts[anomaly.name] <= MAX_WITNESSES:
            self.anomalies.append(anomaly)

    @property
    def verdict(self) -> Verdict:
        """A proved anomaly is a fact; without one, whatever was left undecided proves nothing."""
        if self.counts:
            return Verdict.INVARIANT_VIOLATED
        return Verdict.INVALID if self.undecided or not self.reads else Verdict.PASS
