"""What the live auditor reads of one server: everything new since its last look, as of one moment, nothing twice.

`id > last` skips what commits late, and so does any cursor over numbers that are given out before the commit. So what
is new is told by the transaction that wrote it: at or above the `xmin` of the last snapshot (sql/live.sql says why that
is complete). Where a table is too large to be looked through each time:

- entries: the end of every partition is looked at (rows are added at the end), and *completeness is proved by seq*: a
  wallet's rows are numbered without gap, so what was missed there shows with its wallet's next row, with its event, or
  when the wallet's turn to be verified as a whole comes. An UPDATE or DELETE is counted by Postgres itself.
- outbox rows: by id, and the ids that were not there yet are asked for again until their transaction must be over.
- changed outbox and projection rows: in stretches, the whole table once a round.
"""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import asyncpg

from invariants.live.ledger import Sums
from invariants.live.rows import Bet, Entry, Event, Told
from ledgerproof.collect import AUDITOR
from ledgerproof.live.sql import load_live_sql
from reference.config import ServerConfig, ServiceConfig
from reference.store import connect

STATEMENT_TIMEOUT_MS: Final = 5_000
BASELINE_TIMEOUT_MS: Final = 120_000
"""For what is read once: a partition as a whole."""
TAIL_BLOCKS: Final = 3
"""Blocks before the last known end of a partition that are looked at again: several sessions fill blocks at once."""
EVENTS_MAX: Final = 20_000
"""Outbox rows of one look; more wait for the next."""
HOLES_MAX: Final = 20_000
"""Ids that were given out and not seen yet."""
ROUND_POLLS: Final = 4
"""A table of changing rows is looked through once in so many polls, unless it is too large for that."""
REUSED_MAX: Final = 10_000
"""After a lost connection the horizon goes back by this many transactions: a server that crashed may give out numbers
again that it had given to transactions which left no trace."""
STRETCH_BLOCKS: Final = 4_000
"""Blocks (32 MB) of one such table that one poll looks through."""
FIRST_XID: Final = 3
"""The first number that a transaction can have."""
ROWS_MAX: Final = 50_000
"""Rows of one answer."""


class Partition(NamedTuple):
    """One partition of the ledger on a server."""

    shard: int
    file: int
    blocks: int
    here: bool
    rewrites: int


@dataclass
class Stretch:
    """How far a round over a table of changing rows is."""

    at: int = 0
    since: str = ""
    """xmin when the round before this one began: what changed since then is new to this round."""
    began: str = ""
    """xmin when this round began."""
    rounds: int = 0
    began_s: float = 0.0
    lasted_s: float = 0.0
    """Of the last whole round."""

    def next(self, blocks: int, xmin: str) -> tuple[int, int]:
        """Return the blocks to look at now, first and behind the last, and go on."""
        if self.at == 0:
            self.since, self.began = self.began or xmin, xmin
            now_s = time.monotonic()
            self.lasted_s = now_s - self.began_s if self.began_s else 0.0
            self.began_s = now_s
        size = min(STRETCH_BLOCKS, max(1, -(-blocks // ROUND_POLLS)))
        first, end = self.at, self.at + size
        if end >= blocks:
            self.at, self.rounds = 0, self.rounds + 1
            return first, 2**31  # Blocks that were added meanwhile belong to the last stretch.
        self.at = end
        return first, end


@dataclass
class Delta:
    """What one look at a server brought."""

    partitions: list[Partition] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    changed: dict[int, int] = field(default_factory=dict)
    """Outbox id → digest of rows that were written again."""
    projection: list[Told] = field(default_factory=list)
    settlements: dict[str, bool] = field(default_factory=dict)
    """Match → whether its newest settlement is done."""
    all_events: bool = False
    """Whether no event was left for the next look."""


class Server:
    """One server as the auditor knows it; every look is one read-only snapshot."""

    def __init__(self, config: ServiceConfig, server: ServerConfig) -> None:
        self.name = server.name
        self.connection: asyncpg.Connection | None = None
        self.partitions: dict[int, Partition] = {}
        """As of the last look, by shard."""
        self.horizon = ""
        """xmin of the last whole look."""
        self.started = False
        self.first_event = 0
        """Outbox rows up to this id were there, and published, before the auditor."""
        self.newest_before = 0
        """Outbox rows up to this id may have been sent before the auditor began to read the topics."""
        self.event_id = 0
        self.events_by_poll: list[int] = []
        """Newest outbox id of the last looks: where to search for what was just written."""
        self.outbox, self.projection = Stretch(), Stretch()
        self._holes: dict[int, str] = {}
        """Missing outbox id → xmax of the snapshot that missed it."""
        self._config, self._server = config, server
        self._tail: tuple[asyncpg.Connection, list[int], Any] | None = None
        """The look at the ends of these shards, prepared on this connection."""
        sql = load_live_sql()
        self.sql = {
            name: text.replace("{entry_columns}", sql["entry_columns"]).replace("{event_columns}", sql["event_columns"])
            for name, text in sql.items()
        }
        self._xmin = self._xmax = ""

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[asyncpg.Connection]:
        """Open one read-only snapshot; whatever breaks ends the connection. Raises LedgerError and driver errors."""
        if self.connection is None or self.connection.is_closed():
            self.connection = await connect(
                self._server, AUDITOR, self._config.passwords[AUDITOR], statement_timeout_ms=STATEMENT_TIMEOUT_MS
            )
            if self.started:
                self.horizon = str(max(FIRST_XID, int(self.horizon) - REUSED_MAX))
        try:
            async with self.connection.transaction(isolation="repeatable_read", readonly=True):
                row = await self.fetchrow("moment")
                self._xmin, self._xmax = row["xmin"], row["xmax"]
                yield self.connection
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up the connection."""
        if self.connection is not None:
            self.connection.terminate()
            self.connection = None

    async def fetch(self, name: str, *args: object) -> list[asyncpg.Record]:
        """Run a named statement in the open snapshot."""
        assert self.connection is not None, "a snapshot is open"
        rows: list[asyncpg.Record] = await self.connection.fetch(
            self.sql[name], *args, timeout=STATEMENT_TIMEOUT_MS / 1000 + 1
        )
        return rows

    async def fetchrow(self, name: str, *args: object) -> asyncpg.Record:
        """Return the only row of a named statement."""
        (row,) = await self.fetch(name, *args)
        return row

    # -- the beginning

    async def beginning(self) -> tuple[list[Partition], asyncpg.Record]:
        """Return where to go on from, for `begin`; call it in the snapshot of the baseline."""
        return await self._partitions(), await self.fetchrow("first_event")

    def begin(self, partitions: Sequence[Partition], first: asyncpg.Record) -> None:
        """Go on from there; call it in the same snapshot, once all of the baseline was read."""
        self.partitions = {part.shard: part for part in partitions}
        self.first_event = self.event_id = int(first["first"])
        self.newest_before = int(first["newest"])
        self.horizon = self._xmin
        self.outbox, self.projection = Stretch(began=self._xmin), Stretch(began=str(FIRST_XID))
        self.started = True

    async def long(self, name: str, *args: object) -> list[asyncpg.Record]:
        """Run a statement that reads a whole partition."""
        assert self.connection is not None, "a snapshot is open"
        await self.connection.execute(f"SET LOCAL statement_timeout = {BASELINE_TIMEOUT_MS}")
        rows: list[asyncpg.Record] = await self.connection.fetch(
            self.sql[name], *args, timeout=BASELINE_TIMEOUT_MS / 1000 + 1
        )
        await self.connection.execute(f"SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}")
        return rows

    # -- one look

    async def look(self) -> Delta:
        """Read what is new; call it in a snapshot, and `done` when the snapshot was judged."""
        delta = Delta(partitions=await self._partitions())
        delta.entries = await self._new_entries(delta.partitions)
        delta.events, delta.all_events = await self._new_events()
        sizes = await self.fetchrow("sizes")
        delta.changed = await self._changed_events(int(sizes["events"]))
        here = [part.shard for part in delta.partitions if part.here]
        delta.projection = await self._changed_projection(int(sizes["projection"]), here)
        newest: dict[str, tuple[int, bool]] = {}
        for row in await self.fetch("settlements"):
            known = newest.get(row["match_id"], (0, True))
            newest[row["match_id"]] = max(known, (row["version"], row["state"] == "DONE"))
        delta.settlements = {match_id: done for match_id, (_, done) in newest.items()}
        return delta

    def done(self, delta: Delta) -> None:
        """Go on from here the next time: what this look showed has been judged."""
        self.partitions = {part.shard: part for part in delta.partitions}
        self.horizon = self._xmin
        self.events_by_poll = [*self.events_by_poll[-2 * ROUND_POLLS :], self.event_id]

    async def _partitions(self) -> list[Partition]:
        return [Partition(*row) for row in await self.fetch("partitions")]

    async def _new_entries(self, partitions: Sequence[Partition]) -> list[Entry]:
        begin = []
        for part in partitions:
            known = self.partitions.get(part.shard)
            # A file that was not looked at before is verified as a whole; from then on only its end is.
            start = part.blocks if known is None or known.file != part.file else known.blocks - TAIL_BLOCKS
            begin.append(f"({max(0, start)},0)")
        if not begin:
            return []
        assert self.connection is not None, "a snapshot is open"
        shards = [part.shard for part in partitions]
        if self._tail is None or self._tail[:2] != (self.connection, shards):
            branches = "\nUNION ALL\n".join(
                self.sql["tail_branch"].replace("{shard}", str(shard)).replace("{no}", str(no))
                for no, shard in enumerate(shards, start=1)
            )
            # Planning it takes ten times as long as running it, and the driver does not keep texts of this length.
            prepared = await self.connection.prepare(self.sql["tail"].replace("{branches}", branches))
            self._tail = (self.connection, shards, prepared)
        rows = await self._tail[2].fetch(self.horizon, begin, timeout=STATEMENT_TIMEOUT_MS / 1000 + 1)
        return [entry_of(self.name, row) for row in rows]

    async def entries_between(self, spans: Sequence[tuple[int, int, int]]) -> list[Entry]:
        """Return the entries of wallets between two seqs each (user, first, last), ROWS_MAX at most."""
        users, low, high = ([span[place] for span in spans] for place in range(3))
        rows = await self.fetch("entries_between", users, low, high, ROWS_MAX)
        return [entry_of(self.name, row) for row in rows]

    async def balances_at(self, told: Sequence[Told]) -> dict[tuple[int, int], int]:
        """Return the ledger's balances at these places, by (user, seq), where there is such an entry."""
        limit = 2**63
        asked = [row for row in told if 0 < row.user < limit and 0 < row.seq < limit]
        rows = await self.fetch("balances_at", [row.user for row in asked], [row.seq for row in asked])
        return {(row["user_id"], row["seq"]): row["balance"] for row in rows}

    async def _new_events(self) -> tuple[list[Event], bool]:
        rows = await self.fetch("new_events", self.event_id, EVENTS_MAX)
        events = [Event(self.name, *row) for row in rows]
        if self._holes:
            late = [Event(self.name, *row) for row in await self.fetch("late_events", list(self._holes))]
            for event in late:
                del self._holes[event.id]
            events = late + events
            # Its transaction had its number before the snapshot that missed the row; now all those are over.
            xmin = int(self._xmin)
            self._holes = {number: xmax for number, xmax in self._holes.items() if int(xmax) > xmin}
        if rows:
            newest = rows[-1][0]
            if newest - self.event_id > len(rows):
                present = {row[0] for row in rows}
                missing = (number for number in range(self.event_id + 1, newest) if number not in present)
                for number, _ in zip(missing, range(max(0, HOLES_MAX - len(self._holes))), strict=False):
                    self._holes[number] = self._xmax
            self.event_id = newest
        return events, len(rows) < EVENTS_MAX

    async def _changed_events(self, blocks: int) -> dict[int, int]:
        first, end = self.outbox.next(blocks, self._xmin)
        since = self.outbox.since
        row = await self.fetchrow("changed_events", since, f"({first},0)", f"({end},0)", self.event_id)
        return dict(zip(row["ids"] or (), row["digests"] or (), strict=True))

    async def _changed_projection(self, blocks: int, shards: list[int]) -> list[Told]:
        first, end = self.projection.next(blocks, self._xmin)
        row = await self.fetchrow("changed_projection", self.projection.since, f"({first},0)", f"({end},0)", shards)
        return [Told(*told) for told in zip(row["users"] or (), row["seqs"] or (), row["balances"] or (), strict=True)]


def entry_of(server: str, row: asyncpg.Record) -> Entry:
    """Return the entry of a row with the columns of `entry_columns`."""
    values: tuple[Any, ...] = tuple(row)
    return Entry._make((server, *values[:12], None if values[12] is None else Bet._make(values[12:])))


def sums_of(row: asyncpg.Record) -> Sums:
    """Return the sums of a row; sums of many numbers come as text, for they may be larger than a BIGINT."""
    user, rows, seq, balance, total, digest, broken = row
    return Sums(user, rows, seq, balance, int(total), int(digest), broken)
