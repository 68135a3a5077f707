"""One pass of reconciliation: compares every store of the service with every other, names drift, pauses payouts.

A pass is FULL (everything, daily) or INCREMENTAL (what is new since the last one, each minute). It reads committed
data only, each server at one moment, and never its own results. What is merely late is no mismatch:

- Within a server, ledger, bets, outbox and projection are read in one snapshot, and the ledger is written first.
- Redis and the topics are written after the ledger: they are read first, or what they have more is looked up again.
- Whether a match is settled is read, on all servers, before the snapshots that its entries are read in.

What cannot be seen (a server, Redis or Kafka is down) makes a pass INCOMPLETE, never a finding.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from reference import metrics
from reference.cache import KEY_PREFIX
from reference.commands import MAX_USER_ID, TOPIC_OF
from reference.config import ServiceConfig
from reference.errors import LedgerError, ServerUnavailable
from reference.failpoints import hit_async
from reference.routing import SHARDS, shard_of, shard_of_match
from reference.sql import load_sql
from reference.store import DRIVER_ERRORS, LEADER_CLASS, connect, hang_up, meaning_of
from reference.topic_audit import TOPICS, Known, Offsets, Partition, Record, Records, TopicsUnreadable
from reference.uuid7 import uuid7

log = logging.getLogger("ledgerproof.reconciliation")

ROLE = "ledger_reconciler"
RECONCILER_LEADER = 2
STATEMENT_TIMEOUT_MS = 3_600_000
"""A full pass reads everything a server has in one statement."""
WORK_MEM = "32MB"
FETCH_ROWS = 5_000
KEPT_PER_CODE_MAX = 100
"""Findings of one code that one pass stores and logs; all are counted."""
SUSPECTS_MAX = 10_000
"""Rows that are looked up elsewhere together."""
RUNS_KEPT = 1_500
EVENTS_MAX = 500_000
"""Events that one incremental pass looks at; what is beyond waits for the next."""
RECORDS_MAX = 2_000_000
"""Records that one incremental pass reads; beyond it the topics wait for the full pass."""
CATCH_UP_BLOCKS = 8_192
"""Blocks (64 MB) of partitions never seen before that one incremental pass reads."""
TAIL_BLOCKS = 128
"""Blocks at a partition's end that are read again: Postgres fills blocks it has added in any order."""
ESCROW_BETS_MAX = 50_000
"""Bets of newly settled matches that one incremental pass looks at."""
SETTLEMENTS_MAX = 1_000
REDIS_PAGE = 1_000
REDIS_KEYS_MAX = 20_000
"""Cached balances that one incremental pass looks at."""
REDIS_TIMEOUT_S = 2.0
NEVER = datetime(1970, 1, 1, tzinfo=UTC)
"""When a partition was verified that has not been looked through to its end yet."""


class Kind(StrEnum):
    """How much a pass looks at."""

    FULL = "FULL"
    INCREMENTAL = "INCREMENTAL"


PASS_TIMEOUT_S = {Kind.FULL: 6 * 3600.0, Kind.INCREMENTAL: 300.0}
"""A pass that takes longer is given up as incomplete."""
ANSWER_TIMEOUT_S = 15.0
"""For statements that take milliseconds unless their server hangs."""

CODES: dict[str, str] = {
    "LEDGER_GAP": "an entry's number does not follow the one before it",
    "LEDGER_CHAIN": "a balance is not the one before it plus the amount",
    "LEDGER_NEGATIVE": "a balance is below zero",
    "LEDGER_SUM": "a wallet's entries do not add up to its newest balance",
    "LEDGER_DUPLICATE": "a bet was charged or paid more than once for the same reason",
    "BET_MISSING": "an entry pays for a bet that does not exist",
    "BET_WITHOUT_ENTRY": "a bet exists that no entry pays for",
    "BET_DIFFERS": "a bet and its entry say different things",
    "ESCROW_NOT_ZERO": "a settled match still holds money, or has paid more than it held",
    "ESCROW_WITHOUT_MATCH": "entries stand against a match that no server knows",
    "MONEY_NOT_CONSERVED": "users, house and escrow do not hold what came in and did not go out",
    "PROJECTION_AHEAD": "the projection knows an entry that the ledger does not have",
    "PROJECTION_DIFFERS": "the projection and the ledger disagree at the same entry",
    "REDIS_AHEAD": "Redis knows an entry that the ledger does not have",
    "REDIS_DIFFERS": "Redis and the ledger disagree at the same entry",
    "REDIS_MALFORMED": "Redis holds a balance that cannot be read",
    "EVENT_MISSING": "an entry has no event in the outbox",
    "ENTRY_MISSING": "an event tells of an entry that no ledger has",
    "EVENT_DIFFERS": "an event and its entry say different things",
    "EVENT_DUPLICATE": "an entry has more than one event",
    "TOPIC_MISSING": "an event is marked as published and is not in its topic",
    "TOPIC_DIFFERS": "a record of a topic is not what its event says",
    "TOPIC_UNKNOWN": "a record of a topic is of no event of any server",
}
"""Everything a pass can find."""


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One mismatch: what it is, where, what should be there and what is. Amounts in minor units."""

    code: str
    server: str
    expected: str
    found: str
    user_id: int | None = None
    seq: int | None = None
    match_id: str | None = None
    event_id: str | None = None
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None


class ServerReport(msgspec.Struct):
    """What a pass found on one server. `findings` is cut to a bound per code; `total` counts them all."""

    server: str
    state: str = "CLEAN"
    total: int = 0
    duplicates: int = 0
    entries: int = 0
    events: int = 0
    records: int = 0
    findings: list[Finding] = []
    problems: list[str] = []
    paused: bool = False
    """Whether this pass closed the gate for payouts."""


class Report(msgspec.Struct):
    """What a pass found on all its servers."""

    run_id: str
    kind: str
    requested_by: str
    started_at: str
    seconds: float
    servers: list[ServerReport]

    @property
    def findings(self) -> int:
        """How many mismatches there are, also those that were not kept."""
        return sum(server.total for server in self.servers)

    @property
    def problems(self) -> list[str]:
        """What could not be seen."""
        return [f"{server.server}: {problem}" for server in self.servers for problem in server.problems]


@dataclass
class _Server:
    """One server in one pass."""

    index: int
    name: str
    report: ServerReport
    chosen: bool
    """Whether it is to be checked, or only to be asked."""
    fresh: asyncpg.Connection | None = None
    matches: asyncpg.Connection | None = None
    snapshot: asyncpg.Connection | None = None
    at: datetime = NEVER
    held: list[asyncpg.Record] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    new_marks: dict[str, int] = field(default_factory=dict)
    new_positions: list[tuple[int, int, int, datetime]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    gate_closed: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lets the checks of several servers share the connection `fresh`."""

    @property
    def up(self) -> bool:
        return self.snapshot is not None

    @property
    def shards(self) -> list[int]:
        return [row["shard"] for row in self.held]


Suspects = list[tuple[_Server, Finding]]


class _Stretch(NamedTuple):
    """What a pass reads of the topics, by partition, and of the outboxes."""

    begin: dict[Partition, int]
    ends: dict[Partition, int]
    beginnings: dict[Partition, int]
    """The oldest records there still are."""
    judged_from: dict[Partition, int]
    """Records before these were judged by an earlier pass and are read for their events only."""
    events_from: dict[int, int]
    """Events of each server after this id."""
    since: datetime


class Pass:
    """One pass; `run` does it once."""

    def __init__(
        self,
        config: ServiceConfig,
        kind: Kind,
        requested_by: str,
        only: Sequence[str] | None = None,
        show: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare a pass over the servers named in `only` (all if None). Raises ValueError for an unknown name."""
        unknown = set(only or ()) - {server.name for server in config.servers}
        if unknown:
            raise ValueError(f"there is no server {', '.join(sorted(unknown))}")
        self._config = config
        self._kind = kind
        self._requested_by = requested_by[:200] or "unknown"
        self._show = show or (lambda _: None)
        self._sql = load_sql("reconciler")
        self._run_id = uuid7()
        self._servers = [
            _Server(index, server.name, ServerReport(server.name), only is None or server.name in only)
            for index, server in enumerate(config.servers)
        ]
        self._stopping = threading.Event()

    async def run(self, *, wait: bool = True) -> Report | None:
        """Do the pass and store what it found.

        With `wait=False` it returns None at once when another pass is at work on one of its servers.
        """
        started, began = datetime.now(UTC), time.monotonic()
        async with AsyncExitStack() as stack:
            for server in self._servers:
                await self._open(server, stack)
            if not await self._locked(wait=wait):
                return None
            try:
                # A server that hangs (it takes connections and does not answer) must not hold up every later pass.
                async with asyncio.timeout(PASS_TIMEOUT_S[self._kind]):
                    await self._take_snapshots(stack)
                    await hit_async("reconciler.after_snapshot_before_check")
                    await self._check()
            except TimeoutError:
                for server in self._chosen:
                    self._problem(server, f"given up after {PASS_TIMEOUT_S[self._kind]:.0f} s")
            finally:
                self._stopping.set()
            for server in self._chosen:
                await self._store(server, started)
        seconds = time.monotonic() - began
        metrics.RECONCILIATION_SECONDS.labels(self._kind.value).observe(seconds)
        reports = [server.report for server in self._servers if server.chosen]
        if any(report.problems for report in reports):
            metrics.RECONCILIATION_INCOMPLETE.labels(self._kind.value).inc()
        return Report(
            str(self._run_id), self._kind.value, self._requested_by, started.isoformat(), round(seconds, 3), reports
        )

    # -- servers and snapshots

    @property
    def _up(self) -> list[_Server]:
        return [server for server in self._servers if server.up]

    @property
    def _chosen(self) -> list[_Server]:
        return [server for server in self._servers if server.up and server.chosen]

    @property
    def _all_up(self) -> bool:
        return all(server.up for server in self._servers)

    async def _connect(self, server: _Server, stack: AsyncExitStack) -> asyncpg.Connection:
        connection = await connect(
            self._config.servers[server.index],
            ROLE,
            self._config.passwords[ROLE],
            statement_timeout_ms=STATEMENT_TIMEOUT_MS,
        )
        stack.push_async_callback(hang_up, connection)
        await connection.execute(f"SET work_mem = '{WORK_MEM}'", timeout=ANSWER_TIMEOUT_S)
        return connection

    async def _open(self, server: _Server, stack: AsyncExitStack) -> None:
        try:
            server.fresh = await self._connect(server, stack)
        except (ServerUnavailable, *DRIVER_ERRORS) as error:
            self._problem(server, f"cannot be reached: {error}")

    async def _locked(self, *, wait: bool) -> bool:
        """Keep other passes away from the chosen servers; in the order of servers, so that none waits in a circle."""
        for server in self._servers:
            if server.fresh is None or not server.chosen:
                continue
            try:
                if wait:
                    await server.fresh.execute(
                        "SELECT pg_advisory_lock($1, $2)",
                        LEADER_CLASS,
                        RECONCILER_LEADER,
                        timeout=PASS_TIMEOUT_S[Kind.FULL],
                    )
                elif not await server.fresh.fetchval(
                    "SELECT pg_try_advisory_lock($1, $2)", LEADER_CLASS, RECONCILER_LEADER, timeout=ANSWER_TIMEOUT_S
                ):
                    return False
            except DRIVER_ERRORS as error:
                server.fresh = None
                self._problem(server, f"went away: {error}")
        return True

    async def _take_snapshots(self, stack: AsyncExitStack) -> None:
        """First of all servers what tells which matches are settled, then of all what holds their entries."""
        for name in ("matches", "snapshot"):
            for server in self._servers:
                if server.fresh is None or (name == "snapshot" and server.matches is None):
                    continue
                try:
                    connection = await self._connect(server, stack)
                    await connection.transaction(isolation="repeatable_read", readonly=True).start()
                    # The snapshot is taken by the first statement, not by the beginning of the transaction.
                    at = await connection.fetchval(self._sql["clock"])
                    if name == "snapshot":
                        server.held = await connection.fetch(self._sql["partitions"])
                        marks = await connection.fetch(self._sql["marks"])
                        server.marks = {row["name"]: row["position"] for row in marks}
                        server.at = at
                    setattr(server, name, connection)
                except (LedgerError, *DRIVER_ERRORS) as error:
                    self._problem(server, f"went away: {error}")

    async def _check(self) -> None:
        await asyncio.gather(*(self._guarded(server, self._check_server) for server in self._chosen))
        await self._over_all("escrow", self._check_escrow)
        await self._over_all("cache", self._check_redis)
        await self._over_all("topics", self._check_topics)

    async def _guarded(self, server: _Server, check: Callable[[_Server], Awaitable[None]]) -> None:
        """Run the checks of one server; what cannot be read is a problem of that server only."""
        try:
            await check(server)
        except (LedgerError, *DRIVER_ERRORS) as error:
            self._problem(server, f"not read to its end: {meaning_of(error)}")

    async def _over_all(self, name: str, check: Callable[[], Awaitable[None]]) -> None:
        """Run a check that needs all servers; what cannot be read leaves all of them incomplete."""
        self._show(name)
        try:
            await check()
        except (
            LedgerError,
            TopicsUnreadable,
            RedisError,
            *DRIVER_ERRORS,
        ) as error:
            for server in self._chosen:
                self._problem(server, f"{name} not read: {type(error).__name__}: {error}")

    def _problem(self, server: _Server, text: str) -> None:
        if text not in server.report.problems:
            server.report.problems.append(text)
        if server.chosen:
            log.warning("reconciliation of %s is incomplete: %s", server.name, text)

    async def _found(self, server: _Server, finding: Finding) -> None:
        """Count a mismatch, keep and log it within the bound, and close the gate at the first one."""
        if not server.chosen:
            return
        server.report.total += 1
        if finding.code == "LEDGER_DUPLICATE":
            server.report.duplicates += 1
        server.counts[finding.code] += 1
        if server.counts[finding.code] <= KEPT_PER_CODE_MAX:
            server.report.findings.append(finding)
            log.error(
                "reconciliation: %s on %s: %s",
                finding.code,
                finding.server,
                CODES[finding.code],
                extra={"ledgerproof": {"finding": msgspec.to_builtins(finding), "run": str(self._run_id)}},
            )
        concerned = self._chosen if finding.code.startswith("ESCROW") else [server]
        for one in concerned:
            await self._close_gate(one, finding)

    async def _close_gate(self, server: _Server, finding: Finding) -> None:
        """Pause the payouts of a server at once; the pass goes on to see what else there is."""
        if server.gate_closed or server.fresh is None:
            return
        reason = f"{finding.code}: {CODES[finding.code]} (wallet {finding.user_id or '-'}, seq {finding.seq or '-'})"
        try:
            await hit_async("reconciler.before_close_gate")
            async with server.lock:
                changed = await server.fresh.fetchval(self._sql["pause"], "reconciler", reason, self._run_id)
        except DRIVER_ERRORS as error:
            self._problem(server, f"payouts could not be paused: {error}")
            return
        server.gate_closed = True
        server.report.paused = bool(changed)
        if changed:
            log.error("payouts of %s are paused: %s", server.name, reason)

    # -- one server

    async def _check_server(self, server: _Server) -> None:
        if self._kind is Kind.FULL:
            await self._check_whole_server(server)
        else:
            await self._check_new_entries(server)

    async def _check_whole_server(self, server: _Server) -> None:
        connection = _there(server.snapshot)
        money = dict.fromkeys(("users", "external", "escrow", "house"), 0)
        for shard in server.shards:
            self._show(f"{server.name} shard {shard}")
            for query in ("full_chain", "full_sums", "full_duplicates", "full_bets", "full_projection"):
                await self._judge(server, self._sql[query].replace("{shard}", str(shard)))
            row = await _one(connection, self._sql["full_money"].replace("{shard}", str(shard)))
            for account in money:
                money[account] += int(row[account])
            server.report.entries += row["entries"]
        if money["users"] + money["house"] + money["escrow"] != money["external"]:
            await self._found(
                server,
                Finding(
                    "MONEY_NOT_CONSERVED",
                    server.name,
                    f"{money['external']} = deposits - withdrawals",
                    f"{money['users']} users + {money['house']} house + {money['escrow']} escrow",
                ),
            )
        self._show(f"{server.name} outbox")
        for query in ("full_events", "full_bet_events", "full_event_duplicates"):
            await self._judge(server, self._filled(self._sql[query]))
        # The next incremental pass goes on from here.
        server.new_positions = [
            (row["shard"], row["file"], max(0, row["blocks"] - TAIL_BLOCKS), server.at) for row in server.held
        ]
        newest = await connection.fetchval(self._sql["newest_event"])
        await self._mark_events(server, max(0, newest - EVENTS_MAX))
        server.new_marks["settlements"] = _microseconds(server.at - self._overlap)

    async def _check_new_entries(self, server: _Server) -> None:
        connection = _there(server.snapshot)
        known = {row["shard"]: row for row in await connection.fetch(self._sql["positions"])}
        branches: list[str] = []
        budget = CATCH_UP_BLOCKS
        for row in server.held:
            shard, size, old = row["shard"], row["blocks"], known.get(row["shard"])
            begin, verified_at = (
                (old["blocks"], old["verified_at"]) if old and old["file"] == row["file"] else (0, NEVER)
            )
            end, position = size + 1, (shard, row["file"], max(0, size - TAIL_BLOCKS), server.at)
            if verified_at == NEVER and size - begin > budget:
                # Never seen before and much: as far as the budget goes, the rest in the next passes.
                end = begin + budget
                position = (shard, row["file"], end, NEVER)
            if verified_at == NEVER:
                budget -= min(budget, size - begin)
            since = "-infinity" if verified_at == NEVER else (verified_at - self._overlap).isoformat()
            branches.append(
                self._sql["fresh_branch"]
                .replace("{shard}", str(shard))
                .replace("{from_block}", str(begin))
                .replace("{to_block}", str(end))
                .replace("{since}", since)
            )
            server.new_positions.append(position)
        after = server.marks.get("events")
        if after is None:
            after = max(0, await connection.fetchval(self._sql["newest_event"]) - EVENTS_MAX)
        window = await _one(connection, self._sql["events_window"], after, EVENTS_MAX)
        # Entries this new must have their event in the window; of older ones it may lie before it.
        must_have = server.at
        if window["events"] < EVENTS_MAX:
            verified = [row["verified_at"] for row in known.values() if row["verified_at"] != NEVER]
            must_have = max(verified) - self._overlap if verified else server.at
            if after > 0 and window["since"] is not None:
                must_have = max(must_have, window["since"] + self._overlap)
        fresh = "\nUNION ALL\n".join(branches)
        if branches:
            server.report.entries = await connection.fetchval(self._sql["count_fresh"].replace("{fresh}", fresh))
            query = self._filled(self._sql["new_entries"]).replace("{fresh}", fresh)
            await self._judge(server, query, after, EVENTS_MAX, must_have)
        await self._mark_events(server, after)

    async def _mark_events(self, server: _Server, after: int) -> None:
        """Note up to where all events are verified for good: published, and none may still commit before it."""
        connection = _there(server.snapshot)
        settled = server.at - 2 * self._overlap
        last = await connection.fetchval(self._sql["last_event_before"], after, EVENTS_MAX, settled)
        first_unpublished = await connection.fetchval(self._sql["first_unpublished"])
        reached = after if last is None else max(after, last)
        if first_unpublished is not None:
            reached = min(reached, max(after, first_unpublished - 1))
        server.new_marks["events"] = reached

    async def _judge(self, server: _Server, query: str, *args: object) -> None:
        """Run a query for mismatches. What may lie on another server is looked for there before it counts."""
        suspects: Suspects = []
        async for row in _rows(_there(server.snapshot), query, *args):
            finding = Finding(
                code=row["code"],
                server=server.name,
                expected=row["expected"],
                found=row["found"],
                user_id=row["user_id"],
                seq=row["seq"],
                match_id=row["match_id"],
                event_id=row["event_id"],
            )
            if finding.code in ("EVENT_MISSING", "ENTRY_MISSING"):
                suspects.append((server, finding))
                if len(suspects) >= SUSPECTS_MAX:
                    await self._look_elsewhere(suspects)
                    suspects = []
            else:
                await self._found(server, finding)
        await self._look_elsewhere(suspects)

    async def _look_elsewhere(self, suspects: Suspects) -> None:
        """Ask every server, since a moved shard has left its events behind: what is nowhere is a finding."""
        for code, query in (("EVENT_MISSING", "events_of_entries"), ("ENTRY_MISSING", "entries_of")):
            left = [pair for pair in suspects if pair[1].code == code]
            keys = [(finding.user_id, finding.seq) for _, finding in left if finding.user_id and finding.seq]
            seen: set[tuple[int, int]] = set()
            if keys:
                users, seqs = [user for user, _ in keys], [seq for _, seq in keys]
                for row in await self._ask_all(query, users, seqs):
                    seen.add((row["user_id"], row["seq"]))
            for server, finding in left:
                if (finding.user_id, finding.seq) in seen:
                    continue
                if self._all_up:
                    await self._found(server, finding)
                else:
                    self._problem(server, f"a server is away, and {code} cannot be told from a moved shard")

    async def _ask_all(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Run a query outside of the snapshots on every server that is up; one at a time a server."""
        answers = await asyncio.gather(*(self._ask(server, query, *args) for server in self._up))
        return [row for rows in answers for row in rows]

    async def _ask(self, server: _Server, query: str, *args: object) -> list[asyncpg.Record]:
        async with server.lock:
            rows: list[asyncpg.Record] = await _there(server.fresh).fetch(self._sql[query], *args)
            return rows

    # -- escrow

    async def _check_escrow(self) -> None:
        if not self._all_up:
            for server in self._chosen:
                self._problem(server, "a server is away: the escrow of matches is spread over all of them")
            return
        if sorted(shard for server in self._up for shard in server.shards) != list(range(SHARDS)):
            for server in self._chosen:
                self._problem(server, "a shard is on no server or on two: one is being moved, try again")
            return
        if self._kind is Kind.INCREMENTAL:
            for server in self._chosen:
                await self._check_new_settlements(server)
            return
        batch: dict[str, tuple[int, int]] = {}
        async for match_id, total, user_id in self._escrow_of_all():
            if total == 0:
                continue
            batch[match_id] = (total, user_id)
            if len(batch) >= SETTLEMENTS_MAX:
                await self._judge_escrow(batch)
                batch = {}
        await self._judge_escrow(batch)

    async def _escrow_of_all(self) -> AsyncIterator[tuple[str, int, int]]:
        """Merge the sums by match of all servers, which each sends in the order of matches."""
        streams = [_rows(_there(server.snapshot), self._sql["escrow_totals"], server.shards) for server in self._up]
        heads = [await anext(stream, None) for stream in streams]
        while any(head is not None for head in heads):
            match_id = min(head["match_id"] for head in heads if head is not None)
            total, user_id = 0, 0
            for number, head in enumerate(heads):
                if head is not None and head["match_id"] == match_id:
                    total += int(head["total"])
                    user_id = head["user_id"]
                    heads[number] = await anext(streams[number], None)
            yield match_id, total, user_id

    async def _judge_escrow(self, batch: dict[str, tuple[int, int]]) -> None:
        if not batch:
            return
        ids = [UUID(match_id) for match_id in batch]
        before: dict[str, asyncpg.Record] = {}
        for server in self._up:
            rows = await _there(server.matches).fetch(self._sql["settled"], ids)
            before.update({row["match_id"]: row for row in rows})
        now = {row["match_id"]: row for row in await self._ask_all("settled", ids)}
        for match_id, (total, user_id) in batch.items():
            home = self._servers[self._config.routing[shard_of_match(UUID(match_id))]]
            old, new = before.get(match_id), now.get(match_id)
            if new is None:
                finding = Finding(
                    "ESCROW_WITHOUT_MATCH", home.name, "a match", f"{-total} in escrow", user_id, match_id=match_id
                )
                await self._found(home, finding)
            elif old is not None and old["settled"] and new["settled"] and old["version"] == new["version"]:
                late = await self._too_late(match_id)
                if -total != late:
                    text = f"{late} (bets that came too late)" if late else "0"
                    finding = Finding("ESCROW_NOT_ZERO", home.name, text, f"{-total}", match_id=match_id)
                    await self._found(home, finding)

    async def _too_late(self, match_id: str) -> int:
        """Return the money of bets that the settlement did not see, whose refunds are under way; minor units."""
        held = 0
        for server in self._up:
            batch: dict[str, int] = {}

            async def in_flight(bets: dict[str, int]) -> int:
                if not bets:
                    return 0
                rows = await self._ask_all("orders_in_time", [UUID(bet) for bet in bets])
                return sum(bets.values()) - sum(bets[row["bet_id"]] for row in rows)

            async for row in _rows(
                _there(server.snapshot), self._sql["unrefunded_bets"], UUID(match_id), server.shards
            ):
                batch[row["bet_id"]] = row["reserve"]
                if len(batch) >= FETCH_ROWS:
                    held += await in_flight(batch)
                    batch = {}
            held += await in_flight(batch)
        return held

    async def _check_new_settlements(self, home: _Server) -> None:
        """Add up what the bets of newly settled matches put in and took out, by the indexes on bets."""
        since = home.marks.get("settlements", _microseconds(home.at - self._overlap))
        rows = await _there(home.matches).fetch(self._sql["settled_since"], since, SETTLEMENTS_MAX)
        seen = 0
        reached = _microseconds(home.at - self._overlap)
        for row in rows:
            if seen >= ESCROW_BETS_MAX:
                reached = row["finished_us"]
                break
            held = 0
            match_id = row["match_id"]
            async for bets in _batches(_rows(_there(home.matches), self._sql["orders_of"], UUID(match_id))):
                seen += len(bets)
                users = [bet["user_id"] for bet in bets]
                ids = [UUID(bet["bet_id"]) for bet in bets]
                for server in self._up:
                    query = self._sql["escrow_of_bets"]
                    part = await _there(server.snapshot).fetchval(query, users, ids, server.shards)
                    held += int(part)
            if held == 0:
                continue
            states = [*await _there(home.matches).fetch(self._sql["settled"], [UUID(match_id)])]
            states += await self._ask_all("settled", [UUID(match_id)])
            if len({state["version"] for state in states}) == 1 and all(state["settled"] for state in states):
                await self._found(home, Finding("ESCROW_NOT_ZERO", home.name, "0", f"{held}", match_id=match_id))
        else:
            if len(rows) == SETTLEMENTS_MAX:
                reached = rows[-1]["finished_us"]
        home.new_marks["settlements"] = reached

    # -- Redis

    async def _check_redis(self) -> None:
        client = Redis(
            host=self._config.redis_host,
            port=self._config.redis_port,
            password=self._config.redis_password,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            decode_responses=True,
        )
        bound = REDIS_KEYS_MAX if self._kind is Kind.INCREMENTAL else None
        seen = 0
        try:
            page: list[str] = []
            async for key in client.scan_iter(match=f"{KEY_PREFIX}*", count=REDIS_PAGE):
                page.append(key)
                seen += 1
                if len(page) >= REDIS_PAGE:
                    await self._judge_cached(page, await client.mget(page))
                    page = []
                if bound is not None and seen >= bound:
                    break
            if page:
                await self._judge_cached(page, await client.mget(page))
        finally:
            await client.aclose()

    async def _judge_cached(self, keys: Sequence[str], values: Sequence[Any]) -> None:
        """Compare cached balances with the entries they name; the ledger is read after the cache."""
        cached: dict[int, tuple[int, int]] = {}
        for key, value in zip(keys, values, strict=True):
            if value is None:
                continue
            parts = str(value).split(" ")
            name = key.removeprefix(KEY_PREFIX)
            numbers = [part.lstrip("-") for part in (name, *parts[:3])]  # the fourth is the cache's epoch, a word
            if len(parts) < 3 or not all(part.isdigit() for part in numbers) or not 0 < int(name) <= MAX_USER_ID:
                server = self._holder(int(name)) if name.isdigit() else self._chosen[0]
                finding = Finding("REDIS_MALFORMED", server.name, "seq balance time", f"{key}: {value}"[:200])
                await self._found(server, finding)
                continue
            seq, balance = int(parts[0]), int(parts[1])
            cached[int(name)] = (seq, balance)
        readable = {user: pair for user, pair in cached.items() if -(2**63) <= pair[0] < 2**63}
        users, seqs = list(readable), [seq for seq, _ in readable.values()]
        ledger = {row["user_id"]: row["balance"] for row in await self._ask_all("entries_of", users, seqs)}
        wrong = [user for user, (_, balance) in cached.items() if ledger.get(user) != balance]
        if not wrong:
            return
        heads: dict[int, int] = defaultdict(int)
        for row in await self._ask_all("heads_of", wrong):
            heads[row["user_id"]] = max(heads[row["user_id"]], row["seq"])
        for user in wrong:
            seq, balance = cached[user]
            server = self._holder(user)
            if user not in ledger and not self._all_up:
                self._problem(server, "a server is away, and its wallets in Redis cannot be compared")
                continue
            ahead = seq > heads[user]
            expected = f"seq {heads[user]} at most" if ahead else f"balance {ledger.get(user, 'of no entry')}"
            code = "REDIS_AHEAD" if ahead else "REDIS_DIFFERS"
            await self._found(server, Finding(code, server.name, expected, f"seq {seq}, balance {balance}", user, seq))

    # -- topics

    async def _check_topics(self) -> None:
        if not self._all_up:
            for server in self._chosen:
                self._problem(server, "a server is away: what is in the topics may be its")
            return
        begin, ends, beginnings, judged_from, events_from, since = await self._stretch()
        amount = sum(ends[partition] - begin[partition] for partition in ends)
        if self._kind is Kind.INCREMENTAL and amount > RECORDS_MAX:
            for server in self._chosen:
                self._problem(server, f"{amount} records to read are left to the full pass")
            return
        lost = [partition for partition, low in beginnings.items() if low > 0 and begin[partition] == low]
        with Records() as records:
            await self._in_thread(records.read, self._config, begin, ends, lost, self._stopping)
            for server in self._chosen:
                server.report.records = records.count
            floor = datetime.fromtimestamp(records.floor_s, UTC) + self._overlap
            for server in self._up:
                await self._compare_with_topics(server, records, events_from[server.index], since, floor)
            await self._judge_unknown(records, events_from, judged_from)
        for server in self._chosen:
            server.new_marks.update({f"{topic}/{number}": end for (topic, number), end in ends.items()})

    async def _stretch(self) -> _Stretch:
        """Return what is to be read of the topics and the outboxes; the ends are read after the snapshots."""
        offsets = Offsets(self._config)
        ends = await asyncio.to_thread(offsets.ends)
        beginnings = await asyncio.to_thread(offsets.beginnings)
        events_from: dict[int, int] = {}
        since = datetime.now(UTC)
        if self._kind is Kind.FULL:
            since -= timedelta(seconds=self._config.reconcile_topics_s)
            events_from = dict.fromkeys((server.index for server in self._up), 0)
        else:
            for server in self._up:
                after = server.marks.get("events")
                if after is None:
                    after = max(0, await _there(server.snapshot).fetchval(self._sql["newest_event"]) - EVENTS_MAX)
                events_from[server.index] = after
                window = await _one(_there(server.snapshot), self._sql["events_window"], after, EVENTS_MAX)
                if window["since"] is not None:
                    since = min(since, window["since"])
        by_time = await asyncio.to_thread(offsets.since, (since - self._overlap).timestamp())
        begin: dict[Partition, int] = {}
        judged_from: dict[Partition, int] = {}
        for partition, end in ends.items():
            first = end if by_time[partition] < 0 else by_time[partition]
            # A record's time is what its sender says, so that what no pass has read yet is read in any case.
            marks = [server.marks.get(f"{partition[0]}/{partition[1]}", first) for server in self._chosen]
            begin[partition] = min(max(min(first, *marks), beginnings[partition]), end)
            # Records that an earlier pass has judged are read again only for the events that are not verified yet.
            judged_from[partition] = begin[partition] if self._kind is Kind.FULL else min(marks)
        return _Stretch(begin, ends, beginnings, judged_from, events_from, since)

    async def _compare_with_topics(
        self, server: _Server, records: Records, after: int, since: datetime, floor: datetime
    ) -> None:
        oldest = since if self._kind is Kind.FULL else datetime.fromtimestamp(0, UTC)
        limit = EVENTS_MAX if self._kind is Kind.INCREMENTAL else 2**62
        stream = _rows(_there(server.snapshot), self._sql["events_after"], after, oldest, limit)
        async for rows in _batches(stream):
            server.report.events += len(rows)
            wanted = [row for row in rows if TOPIC_OF.get(row["event_type"], TOPICS[0]) in TOPICS]
            events = [_known_of(row, judged=row["created_at"] > floor) for row in wanted]
            for event, record in await self._in_thread(records.compare, events):
                await self._found_record(server, event, record)

    async def _judge_unknown(
        self, records: Records, events_from: Mapping[int, int], judged_from: Mapping[Partition, int]
    ) -> None:
        """Look up what no event took out: its event is newer or older than those that were read, or there is none."""
        place = ("", 0, 0)
        while True:
            page = await self._in_thread(records.unknown, place, SUSPECTS_MAX)
            if not page:
                return
            place = (page[-1].topic, page[-1].partition, page[-1].offset)
            page = [record for record in page if record.offset >= judged_from[(record.topic, record.partition)]]
            known: dict[str, tuple[_Server, Known]] = {}
            for thorough in (False, True):
                for server in self._up:
                    left = sorted({record.event_id for record in page} - set(known))
                    if left:
                        after = 0 if thorough else events_from[server.index]
                        rows = await self._ask(server, "events_known", left, after)
                        known.update({row["event_id"]: (server, _known_of(row, judged=False)) for row in rows})
            for record in page:
                if record.event_id not in known:
                    await self._found_unknown(record)
                    continue
                server, event = known[record.event_id]
                if (record.topic, record.key, record.digest) != (event.topic, event.key, event.digest):
                    await self._found_record(server, event, record)

    async def _found_record(self, server: _Server, event: Known, record: Record) -> None:
        missing = record.partition < 0
        finding = Finding(
            code="TOPIC_MISSING" if missing else "TOPIC_DIFFERS",
            server=server.name,
            expected=f"{event.topic}, key {event.key}, payload {event.digest}",
            found="no record" if missing else f"key {record.key}, payload {record.digest}"[:300],
            user_id=_user_of(event.key),
            event_id=event.event_id,
            topic=record.topic,
            partition=None if missing else record.partition,
            offset=None if missing else record.offset,
        )
        await self._found(server, finding)

    async def _found_unknown(self, record: Record) -> None:
        server = self._server_of_key(record.key)
        finding = Finding(
            code="TOPIC_UNKNOWN",
            server=server.name,
            expected="an event of an outbox",
            found=f"key {record.key}, payload {record.digest}"[:300],
            user_id=_user_of(record.key),
            event_id=record.event_id[:100],
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
        )
        await self._found(server, finding)

    def _server_of_key(self, key: str) -> _Server:
        """Return the server that would have written a record under this key, or any if the key makes no sense."""
        user = _user_of(key)
        if user is not None:
            return self._holder(user)
        try:
            return self._servers[self._config.routing[shard_of_match(UUID(key))]]
        except ValueError:
            return self._chosen[0]

    def _holder(self, user_id: int) -> _Server:
        """Return the server that holds a wallet's shard now; the configured one if nobody does."""
        shard = shard_of(user_id)
        held = [server for server in self._up if shard in server.shards]
        return held[0] if held else self._servers[self._config.routing[shard]]

    async def _in_thread(self, work: Callable[..., Any], *args: object) -> Any:
        """Run blocking work in a thread and wait for its end even when cancelled: it uses what is closed after it."""
        task = asyncio.ensure_future(asyncio.to_thread(work, *args))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._stopping.set()
            await asyncio.wait([task])
            raise

    # -- results

    async def _store(self, server: _Server, started: datetime) -> None:
        report = server.report
        report.state = "FINDINGS" if report.total else "INCOMPLETE" if report.problems else "CLEAN"
        connection = _there(server.fresh)
        try:
            await hit_async("reconciler.before_store")
            async with asyncio.timeout(ANSWER_TIMEOUT_S), connection.transaction():
                run_no = await connection.fetchval(
                    self._sql["store_run"],
                    self._run_id,
                    self._kind.value,
                    self._requested_by,
                    report.state,
                    report.total,
                    report.duplicates,
                    report.entries,
                    report.events,
                    report.records,
                    [problem[:500] for problem in report.problems],
                    started,
                )
                fields = ("code", "user_id", "seq", "match_id", "event_id", "topic", "partition", "offset")
                columns = [[getattr(item, name) for item in report.findings] for name in (*fields, "expected", "found")]
                await connection.execute(
                    self._sql["store_findings"], run_no, list(range(1, len(report.findings) + 1)), *columns
                )
                if not report.problems:
                    # What was not seen to its end is looked at again.
                    positions = list(zip(*server.new_positions, strict=True)) or [(), (), (), ()]
                    await connection.execute(self._sql["save_positions"], *positions)
                    await connection.execute(self._sql["drop_positions"], server.shards)
                    marks = server.new_marks
                    await connection.execute(self._sql["save_marks"], list(marks), list(marks.values()))
                await connection.execute(self._sql["forget_runs"], RUNS_KEPT)
        except DRIVER_ERRORS as error:
            report.state = "FINDINGS" if report.total else "INCOMPLETE"
            self._problem(server, f"the result could not be stored: {error}")

    def _filled(self, query: str) -> str:
        for block in ("entry_event_differs", "entry_text"):
            text = self._sql[block]
            query = query.replace("{" + block + "}", f"({text})" if block == "entry_event_differs" else text)
        return query

    @property
    def _overlap(self) -> timedelta:
        return timedelta(seconds=self._config.reconcile_overlap_s)


def _there(connection: asyncpg.Connection | None) -> asyncpg.Connection:
    assert connection is not None, "only servers that are up are asked"
    return connection


async def _one(connection: asyncpg.Connection, query: str, *args: object) -> asyncpg.Record:
    """Return the only row of a query that always has one."""
    (row,) = await connection.fetch(query, *args)
    return row


async def _rows(connection: asyncpg.Connection, query: str, *args: object) -> AsyncIterator[asyncpg.Record]:
    """Stream the rows of a query through a cursor of the open transaction."""
    cursor = await connection.cursor(query, *args)
    while rows := await cursor.fetch(FETCH_ROWS):
        for row in rows:
            yield row


async def _batches(rows: AsyncIterator[asyncpg.Record]) -> AsyncIterator[list[asyncpg.Record]]:
    batch: list[asyncpg.Record] = []
    async for row in rows:
        batch.append(row)
        if len(batch) >= FETCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _known_of(row: asyncpg.Record, *, judged: bool) -> Known:
    """Return an event as the topics must have it; one that was looked up for its record is published."""
    topic = TOPIC_OF.get(row["event_type"], "no topic")
    return Known(row["event_id"], topic, row["partition_key"], row["digest"], row.get("published", True), judged)


def _microseconds(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000)


def _user_of(key: str) -> int | None:
    """Return the wallet that a record's key names, None if it names none."""
    return int(key) if key.isascii() and key.isdigit() and len(key) <= 19 and 0 < int(key) <= MAX_USER_ID else None
