"""Plays a trace (`load.trace`) as a schedule: streamed from the file again by every worker, never held as a whole.

What is held grows with the number of wallets, matches and cancelled bets of the trace, not with its rows. All arrivals
of a wallet are played by one worker, so that it knows the bet which a later row cancels.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import NAMESPACE_OID, UUID, uuid5

import numpy as np
from numpy.typing import NDArray

from load import trace
from load.schedule import Arrival, Traced
from reference.commands import DEFAULT_OUTCOMES

PHASE: Final = "trace"
PLAYED_AT_ONCE: Final = 64
"""Rows that are read while arrivals are played: half a millisecond's work. More of them make the arrivals late."""
PLAYED: Final = {
    "create_match": "create",
    "close_match": "close",
    "settle_match": "settle",
    "void_match": "void",
}
"""What a schedule calls the operations of a trace, where it has another name."""
OTHER: Final = ("OTHER", "NONE")
"""Outcomes added to a match of which the trace names fewer than two."""


@dataclass
class Contents:
    """What the first reading of a trace found, beside its rows."""

    digest: str
    users: Counter[int] = field(default_factory=Counter)
    """Rows of each wallet."""
    matches: dict[str, int] = field(default_factory=dict)
    """Name of each match → its place among them."""
    match_rows: Counter[int] = field(default_factory=Counter)
    """Rows of each match that name no wallet."""
    outcomes: dict[str, set[str]] = field(default_factory=dict)
    created: set[str] = field(default_factory=set)
    """Matches that the trace creates itself."""
    cancelled: set[tuple[int, str]] = field(default_factory=set)
    """(user, key) of the bets that a later row cancels."""


class TraceSchedule:
    """A trace, or one worker's share of it, with what a player asks of a `load.schedule.Schedule`."""

    def __init__(self, source: trace.Trace, contents: Contents, index: int = 0, count: int = 1) -> None:
        self._source, self._contents = source, contents
        self._index, self._count = index, count

    def __len__(self) -> int:
        """Return how many rows are this share's."""
        contents = self._contents
        wallets = sum(rows for user, rows in contents.users.items() if user % self._count == self._index)
        return wallets + sum(rows for match, rows in contents.match_rows.items() if match % self._count == self._index)

    @property
    def wallet(self) -> NDArray[np.int64]:
        """The wallets of the whole trace."""
        return np.array(sorted(self._contents.users), dtype=np.int64)

    @property
    def cancelled(self) -> set[tuple[int, str]]:
        """(user, key) of the bets whose ids a player must remember."""
        return self._contents.cancelled

    @property
    def created(self) -> set[int]:
        """Places of the matches that rows create, so that nobody needs to do so before."""
        return {self._contents.matches[name] for name in self._contents.created}

    @property
    def outcomes(self) -> list[list[str] | None]:
        """Outcomes of each match in turn; None: the usual ones."""
        found: list[list[str] | None] = []
        for name in self._contents.matches:
            named = self._contents.outcomes.get(name, set())
            usual = named <= set(DEFAULT_OUTCOMES)
            found.append(None if usual else [*sorted(named), *OTHER[: max(0, 2 - len(named))]])
        return found

    def share(self, index: int, count: int) -> "TraceSchedule":
        """Return what worker `index` (from 0) of `count` plays. Raises ValueError if there is no such worker."""
        if not 0 <= index < count:
            raise ValueError(f"there is no worker {index} of {count}")
        return TraceSchedule(self._source, self._contents, index, count)

    def digest(self) -> str:
        """Return a hash of the file and the speed: equal digests mean equal schedules."""
        return self._contents.digest

    def count_of(self, op: str) -> int:
        """Return how many rows of the whole trace do this operation."""
        return sum(rows for name, rows in self._source.operations.items() if PLAYED.get(name, name) == op)

    def operations(self) -> set[str]:
        """Return what the arrivals do."""
        return {PLAYED.get(name, name) for name in self._source.operations}

    def spans(self) -> list[tuple[str, float, float]]:
        """Return the only phase; a trace has none of its own. It is a second long at least."""
        return [(PHASE, 0.0, max(1.0, self._source.span_s))]

    def match_ids(self, world: str) -> list[str]:
        """Return the ids of the matches: a name that is a UUID is one, another stands for one of this world."""
        return [_id_of(name, world) for name in self._contents.matches]

    def arrivals(self) -> Iterator[Arrival]:
        """Yield this share's arrivals by time, read from the file. Raises TraceError if it has changed."""
        number = -1
        for batch in self._source.batches(PLAYED_AT_ONCE):
            for row in batch:
                number += 1
                match = 0 if row.match is None else self._contents.matches[row.match]
                owner = match if row.user is None else row.user
                if owner % self._count != self._index:
                    continue
                yield Arrival(
                    number,
                    row.at_s,
                    PLAYED.get(row.operation, row.operation),
                    PHASE,
                    row.user or 0,
                    match,
                    row.selection or "",
                    row.side or "",
                    row.odds or 0,
                    row.stake_minor or row.amount_minor or 0,
                    # Which API process it asks follows from the place in the trace.
                    zlib.crc32(b"%d" % number) >> 1,
                    Traced(row.key, row.bet),
                )


def read_trace(
    path: Path, *, time_factor: float = 1.0, on_bad: trace.OnBad = "refuse", breathe: Callable[[], None] = lambda: None
) -> TraceSchedule:
    """Check a trace and return it as a schedule, its times multiplied. Raises TraceError, or ValueError.

    `breathe` is called every few thousand rows: who reads a long trace may have others to let go on meanwhile.
    """
    source = trace.read_trace(path, speed=1 / time_factor, on_bad=on_bad, show=lambda _: breathe())
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    contents = Contents(f"{digest} {time_factor!r} {on_bad}")
    rows = 0
    for batch in source.batches():
        for row in batch:
            rows += 1
            if rows % trace.SHOW_ROWS == 0:
                breathe()
            if row.match is not None:
                place = contents.matches.setdefault(row.match, len(contents.matches))
                if row.selection is not None:
                    contents.outcomes.setdefault(row.match, set()).add(row.selection)
                if row.operation == "create_match":
                    contents.created.add(row.match)
                if row.user is None:
                    contents.match_rows[place] += 1
            if row.user is not None:
                contents.users[row.user] += 1
            if row.bet is not None and row.user is not None:
                contents.cancelled.add((row.user, row.bet))
    return TraceSchedule(source, contents)


def _id_of(name: str, world: str) -> str:
    try:
        return str(UUID(name))
    except ValueError:
        return str(UUID(bytes=uuid5(NAMESPACE_OID, f"{world}/{name}").bytes, version=4))
