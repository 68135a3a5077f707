"""The main path: commands that arrive together are posted to their server by one transaction.

One `Writer` per server in each process. It promises that every command gets exactly one answer or one error
whose `definite` says whether the command certainly did not happen; nothing is answered before COMMIT.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
from opentelemetry.trace import SpanKind

from reference import metrics
from reference.commands import Contra, EntryType, Outcome
from reference.errors import (
    DeadlineExceeded,
    LedgerError,
    QueueFull,
    ServerUnavailable,
    ShardNotHere,
    UnknownOutcome,
)
from reference.failpoints import hit_async
from reference.routing import NOT_HERE
from reference.store import DRIVER_ERRORS, Store, meaning_of, text_array
from reference.tracing import Tracing, is_sampled

RECONNECT_AFTER_S = 0.1
"""After a failed connection attempt commands are refused at once for this long."""
SWEEP_EVERY_S = 0.1
HOT_COMMANDS = 8
"""A wallet with more commands than this in one batch is hot: it is posted to by a lane of its own."""
HOT_BATCH = 8
"""Commands of hot wallets posted by one transaction at most while other wallets are posted to: few, so that no batch
of theirs waits long for the processor or for the log."""
HOT_REST = 15.0
"""After such a batch the lane rests this many times as long as it took: the others have the rest of the server."""
HOT_REST_MAX_S = 0.5
HOT_WAITS_S = 0.05
"""The lane waits this long at most for a moment in which no batch of other wallets is posted."""
LANES = 2
"""Batches under way at once: with one, Postgres waits for this process, and then this process for Postgres."""
CROWDED = 64
"""Commands that must wait before a second batch is begun beside the first: two small ones cost more than one."""
LINGER_FROM = 20
"""Commands in one sweep from which a small batch waits `writer_linger_ms` for company: fewer would wait in vain."""
LINGER_BATCH = 64
"""A batch of this many does not wait: a commit shared by more costs hardly less for each."""


class Posting(msgspec.Struct, frozen=True):
    """One entry to post: who, how much, against which account, under which key."""

    user_id: int
    key: str
    type: EntryType
    amount: int
    """Signed minor units: DEBIT is negative."""
    contra: Contra
    match_id: UUID | None = None
    bet_id: UUID | None = None
    settlement_version: int | None = None
    outcome: str | None = None
    side: str | None = None
    odds: int | None = None
    stake: int | None = None
    refusal: str | None = None
    """An Outcome decided before posting (match closed): stored as the answer unless the key was answered before."""
    traceparent: str | None = None

    @property
    def command(self) -> dict[str, Any]:
        """The command with its `op`, as the ledger keeps it: what another one under the same key is compared with."""
        if self.side is not None:
            return {
                "op": "bet",
                "match_id": str(self.match_id),
                "outcome": self.outcome,
                "side": self.side,
                "odds": self.odds,
                "stake_minor": self.stake,
            }
        op = {EntryType.CREDIT: "deposit", EntryType.DEBIT: "withdraw"}.get(self.type, self.type.lower())
        return {"op": op, "amount_minor": abs(self.amount)}


class Posted(msgspec.Struct, frozen=True):
    """The answer to a posting. `outcome` is the original answer when `replayed`."""

    outcome: str
    replayed: bool
    seq: int | None
    balance: int | None
    bet_id: UUID | None
    differs: str | None = None
    """Set with REPLAYED_DIFFERENTLY: the first field that differs from the original command."""


class _Waiting(msgspec.Struct):
    posting: Posting
    future: asyncio.Future[Posted]
    deadline: float


class _Lane:
    """One of the loops that post ordinary wallets, with its connection."""

    __slots__ = ("began_s", "connection", "wanted", "works")

    def __init__(self) -> None:
        self.connection: asyncpg.Connection | None = None
        self.wanted = asyncio.Event()
        self.works = False
        self.began_s: float | None = None
        """When the batch under way was begun."""


def arguments(created_by: str, postings: Sequence[Posting]) -> list[object]:
    """Return the parallel arrays that the statement `post` takes."""
    # One comprehension a column: this runs for every command of every batch.
    return [
        created_by,
        [p.user_id for p in postings],
        text_array([p.key for p in postings]),
        text_array([p.type for p in postings]),
        [p.amount for p in postings],
        text_array([p.contra for p in postings]),
        [p.match_id for p in postings],
        [p.bet_id for p in postings],
        [p.settlement_version for p in postings],
        text_array([p.outcome for p in postings]),
        text_array([p.side for p in postings]),
        [p.odds for p in postings],
        [p.stake for p in postings],
        text_array([p.refusal for p in postings]),
        text_array([p.traceparent for p in postings]),
    ]


async def post_entries(
    connection: asyncpg.Connection, post_sql: str, created_by: str, postings: Sequence[Posting]
) -> list[asyncpg.Record]:
    """Post one batch in one transaction and return one row a posting, in order.

    Rows carry `status` (ACCEPTED, REPLAYED, a refusal or NOT_HERE), `entry_seq`, `entry_balance`. Driver errors
    pass through.
    """
    rows = await connection.fetch(post_sql, *arguments(created_by, postings))
    metrics.LEDGER_ENTRIES.inc(sum(row["status"] == "ACCEPTED" for row in rows))
    return sorted(rows, key=lambda row: int(row["command_no"]))


def difference(first: dict[str, Any], stored: str | bytes) -> str | None:
    """Return the first field in which a command and the stored one under its key (JSON) differ, or None."""
    second: dict[str, Any] = msgspec.json.decode(stored)
    if second.get("op") == "rollback":
        # A tombstone: whatever comes under this key is answered that it was rolled back.
        return None
    for name in sorted(first.keys() | second.keys(), key=lambda name: (name != "op", name)):
        if first.get(name) != second.get(name):
            return name
    return None


class Writer:
    """Batches the commands of one process for one server."""

    def __init__(self, store: Store, server: int, created_by: str, tracing: Tracing) -> None:
        self._store = store
        self._server = server
        self._name = store.config.servers[server].name
        self._post_seconds = metrics.DB_QUERY_SECONDS.labels("post", self._name)
        self._created_by = created_by
        self._tracing = tracing
        self._queue: deque[_Waiting] = deque()
        self._hot: deque[_Waiting] = deque()
        self._hot_commands: Counter[int] = Counter()
        """Commands in the hot lane by wallet, those being posted included; a wallet that is here stays in its lane."""
        self._hot_arrived = asyncio.Event()
        self._hot_connection: asyncpg.Connection | None = None
        self._others_posted = False
        """Whether a batch of other wallets was posted since the newest one of hot wallets."""
        self._gap = asyncio.Event()
        """Set while the first lane posts nothing: nothing waits, or what does waits for company."""
        self._lanes = [_Lane() for _ in range(LANES)]
        self._in_lanes: set[int] = set()
        """Wallets whose commands the lanes are posting now."""
        self._down_until = 0.0
        self._idle = asyncio.Event()
        self._draining = False
        self._hot_began_s: float | None = None
        self._arrivals = 0
        self._lingers = False
        self._tasks: list[asyncio.Task[None]] = []
        self._singles: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the batching loops."""
        loops = [*(self._run(lane) for lane in self._lanes), self._run_hot(), self._sweep()]
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    @property
    def batch_age_s(self) -> float:
        """How long the oldest batch under way has been in the database; 0 without one."""
        now = time.monotonic()
        begun = (self._hot_began_s, *(lane.began_s for lane in self._lanes))
        return max((now - began for began in begun if began is not None), default=0.0)

    @property
    def _busy(self) -> bool:
        return any(lane.works for lane in self._lanes)

    async def stop(self) -> None:
        """Post what was admitted, refuse what comes later, then close the connections."""
        self._draining = True
        while self._queue or self._busy or self._hot_commands:
            self._idle.clear()
            await self._idle.wait()
        await asyncio.gather(*self._singles, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_queue(ServerUnavailable("this process is stopping"))
        for connection in (self._hot_connection, *(lane.connection for lane in self._lanes)):
            if connection is not None:
                connection.terminate()

    async def post(self, posting: Posting) -> Posted:
        """Post one command and return its answer.

        Raises NotAdmitted (QueueFull, DeadlineExceeded, ServerUnavailable) or NotPosted when it certainly was not
        posted, and UnknownOutcome when it may have been.
        """
        return await self.submit(posting)

    def submit(self, posting: Posting) -> asyncio.Future[Posted]:
        """Admit one command and return its answer to come; commands of one wallet are posted in order of admission.

        Raises NotAdmitted at once when it cannot be admitted; the future fails as `post` raises.
        """
        now = time.monotonic()
        if self._draining or now < self._down_until:
            raise ServerUnavailable(f"{self._name} is not available; try again")
        waiting = len(self._queue) + len(self._hot)
        if waiting >= self._store.config.writer_queue:
            raise QueueFull(f"{waiting} commands are waiting for {self._name}")
        future: asyncio.Future[Posted] = asyncio.get_running_loop().create_future()
        admitted = _Waiting(posting, future, now + self._store.config.command_deadline_ms / 1000)
        if posting.user_id in self._hot_commands:
            self._enter_hot_lane(admitted)
            return future
        self._arrivals += 1
        self._queue.append(admitted)
        self._lanes[0].wanted.set()
        if len(self._queue) >= CROWDED:
            self._lanes[1].wanted.set()
        return future

    async def _sweep(self) -> None:
        """Refuse commands whose deadline passed, also while a batch hangs in the database."""
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            now = time.monotonic()
            for queue in (self._queue, self._hot):
                while queue and queue[0].deadline < now:
                    waiting = queue.popleft()
                    if queue is self._hot:
                        self._left_hot_lane([waiting])
                    _fail(waiting, DeadlineExceeded(f"waited too long for {self._name}"))
                    self._idle.set()
            self._lingers = self._arrivals >= LINGER_FROM
            self._arrivals = 0
            metrics.WRITER_QUEUE.labels(self._name).set(len(self._queue))

    async def _run(self, lane: _Lane) -> None:
        """Post what waits. The first lane works for any command, the others where a crowd waits.

        While an answer of Postgres waits for this loop, or a batch for Postgres, another lane's batch goes on.
        """
        first = lane is self._lanes[0]
        while True:
            await lane.wanted.wait()
            lane.wanted.clear()
            lane.works = True
            while self._queue if first else len(self._queue) >= CROWDED:
                if first and self._lingers and len(self._queue) < LINGER_BATCH and not self._draining:
                    self._gap.set()
                    await asyncio.sleep(self._store.config.writer_linger_ms / 1000)
                self._gap.clear()
                batch = self._take_batch()
                if not batch and not self._in_lanes:
                    continue  # What was taken went to the lane of hot wallets: on to what is behind it.
                if not batch:
                    break  # What was taken is of wallets in the other lane, which says when it is done.
                users = {waiting.posting.user_id for waiting in batch}
                self._in_lanes |= users
                await self._post_batch(lane, batch)
                self._in_lanes -= users
                lane.began_s = None
                self._others_posted = True
                if self._queue:
                    self._lanes[0].wanted.set()
            lane.works = False
            if not self._busy:
                self._gap.set()
            self._idle.set()

    async def _run_hot(self) -> None:
        """Post the commands of hot wallets over a connection of their own, between the batches of the others.

        Two processes that post to one wallet wait for each other's commits. Only these batches do: all other
        wallets are posted by batches that hold no hot one.
        """
        while True:
            await self._hot_arrived.wait()
            self._hot_arrived.clear()
            while self._hot:
                started = time.monotonic()
                alone = not (self._others_posted or self._busy)
                self._others_posted = False
                batch = self._take_hot_batch(self._store.config.writer_batch if alone else HOT_BATCH)
                self._hot_began_s = started
                await self._post_hot_batch(batch)
                self._hot_began_s = None
                self._left_hot_lane(batch)
                if self._hot and (self._others_posted or self._busy) and not self._draining:
                    await asyncio.sleep(min(HOT_REST_MAX_S, HOT_REST * (time.monotonic() - started)))
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._gap.wait(), HOT_WAITS_S)
            self._idle.set()

    def _take_hot_batch(self, size: int) -> list[_Waiting]:
        """Take the oldest commands of the lane up to the second one of a (user, key)."""
        batch: dict[tuple[int, str], _Waiting] = {}
        while self._hot and len(batch) < size:
            identity = (self._hot[0].posting.user_id, self._hot[0].posting.key)
            if identity in batch:
                break
            batch[identity] = self._hot.popleft()
        return list(batch.values())

    async def _post_hot_batch(self, batch: list[_Waiting]) -> None:
        try:
            if self._hot_connection is None or self._hot_connection.is_closed():
                self._hot_connection = await self._store.connect(self._server)
        except ServerUnavailable as error:
            _fail_all(batch, error)
            return
        if not await self._post_over(self._hot_connection, batch):
            self._hot_connection = None

    def _left_hot_lane(self, batch: Sequence[_Waiting]) -> None:
        for waiting in batch:
            self._hot_commands[waiting.posting.user_id] -= 1
            if not self._hot_commands[waiting.posting.user_id]:
                del self._hot_commands[waiting.posting.user_id]

    def _enter_hot_lane(self, waiting: _Waiting) -> None:
        self._hot.append(waiting)
        self._hot_commands[waiting.posting.user_id] += 1
        self._hot_arrived.set()

    def _take_batch(self) -> list[_Waiting]:
        """Take the oldest commands, at most one of each (user, key): a second one waits for the next batch.

        Those of a wallet that has many of them, or that is in the hot lane, all go there. Those of a wallet that is
        being posted to wait. So the order of each wallet is kept.
        """
        taken = [self._queue.popleft() for _ in range(min(len(self._queue), self._store.config.writer_batch))]
        shares = Counter([waiting.posting.user_id for waiting in taken])
        batch: list[_Waiting] = []
        seen: set[tuple[int, str]] = set()
        later: list[_Waiting] = []
        behind: set[int] = set()
        """Wallets one of whose commands stays in the queue: those after it stay behind it."""
        heated: set[int] = set()
        for waiting in taken:
            user_id = waiting.posting.user_id
            identity = (user_id, waiting.posting.key)
            if user_id in self._in_lanes or user_id in behind:
                later.append(waiting)
            elif shares[user_id] > HOT_COMMANDS or user_id in self._hot_commands:
                if user_id not in self._hot_commands:
                    heated.add(user_id)
                self._move_to_hot_lane(waiting)
            elif identity in seen:
                behind.add(user_id)
                later.append(waiting)
            else:
                seen.add(identity)
                batch.append(waiting)
        if heated:
            # What is still behind in the queue goes along, before anything newer enters the lane directly.
            rest = [*self._queue]
            self._queue.clear()
            for waiting in rest:
                if waiting.posting.user_id in heated:
                    self._move_to_hot_lane(waiting)
                else:
                    self._queue.append(waiting)
        self._queue.extendleft(reversed(later))
        return batch

    def _move_to_hot_lane(self, waiting: _Waiting) -> None:
        self._enter_hot_lane(waiting)
        # Whether the others linger for company is their own matter.
        self._arrivals = max(0, self._arrivals - 1)

    async def _post_batch(self, lane: _Lane, batch: list[_Waiting]) -> None:
        lane.began_s = time.monotonic()
        try:
            if lane.connection is None or lane.connection.is_closed():
                lane.connection = await self._store.connect(self._server)
        except ServerUnavailable as error:
            self._down_until = time.monotonic() + RECONNECT_AFTER_S
            _fail_all(batch, error)
            self._fail_queue(error)
            return
        if not await self._post_over(lane.connection, batch):
            lane.connection = None

    async def _post_over(self, connection: asyncpg.Connection, batch: list[_Waiting]) -> bool:
        """Post a batch and answer its commands; return whether the connection can still be used."""
        started = time.monotonic()
        try:
            await hit_async("writer.before_post")
            rows = await asyncio.wait_for(
                post_entries(
                    connection,
                    self._store.sql["post"],
                    self._created_by,
                    [waiting.posting for waiting in batch],
                ),
                self._store.config.statement_timeout_ms / 1000 + 0.5,
            )
            await hit_async("writer.after_commit_before_deliver")
        except DRIVER_ERRORS as error:
            meaning = meaning_of(error)
            if isinstance(meaning, UnknownOutcome):
                connection.terminate()
                _fail_all(batch, meaning)
                return False
            self._split(batch, meaning)
            return True
        took_s = time.monotonic() - started
        self._post_seconds.observe(took_s)
        self._trace(batch, took_s)
        await self._deliver(connection, batch, rows)
        return True

    def _trace(self, batch: Sequence[_Waiting], took_s: float) -> None:
        """Record the committed batch in the trace of every command in it that has one."""
        ended_ns = 0
        for waiting in batch:
            traceparent = waiting.posting.traceparent
            if is_sampled(traceparent):
                ended_ns = ended_ns or time.time_ns()
                self._tracing.record(
                    "ledger_post",
                    traceparent,
                    kind=SpanKind.CLIENT,
                    started_ns=ended_ns - int(took_s * 1e9),
                    ended_ns=ended_ns,
                    attributes={
                        "db.system.name": "postgresql",
                        "server.address": self._name,
                        "db.operation.batch.size": len(batch),
                    },
                )

    async def _deliver(
        self, connection: asyncpg.Connection, batch: Sequence[_Waiting], rows: Sequence[asyncpg.Record]
    ) -> None:
        """Answer the commands of a committed batch."""
        replays: list[_Waiting] = []
        for waiting, row in zip(batch, rows, strict=True):
            if row["status"] == Outcome.REPLAYED:
                replays.append(waiting)
            elif row["status"] == NOT_HERE:
                _fail(waiting, ShardNotHere(f"the shard of wallet {waiting.posting.user_id} is not on {self._name}"))
            elif not waiting.future.done():
                waiting.future.set_result(
                    Posted(
                        row["status"],
                        replayed=False,
                        seq=row["entry_seq"],
                        balance=row["entry_balance"],
                        bet_id=waiting.posting.bet_id if row["status"] == Outcome.ACCEPTED else None,
                    )
                )
        if replays:
            await self._answer_replays(connection, replays)

    def _split(self, batch: list[_Waiting], error: LedgerError) -> None:
        """Try a batch that the server refused as a whole again one by one, to find the culprit."""
        if len(batch) == 1:
            _fail_all(batch, error)
            return
        task = asyncio.create_task(self._post_singly(batch))
        self._singles.add(task)
        task.add_done_callback(self._singles.discard)

    async def _post_singly(self, batch: list[_Waiting]) -> None:
        for waiting in batch:
            try:
                async with self._store.connection(self._server) as connection:
                    await hit_async("writer.between_singles")
                    rows = await post_entries(connection, self._store.sql["post"], self._created_by, [waiting.posting])
                    await self._deliver(connection, [waiting], rows)
            except LedgerError as error:
                _fail(waiting, error)

    async def _answer_replays(self, connection: asyncpg.Connection, replays: list[_Waiting]) -> None:
        try:
            await hit_async("writer.before_replay_answers")
            rows = await connection.fetch(
                self._store.sql["answers"],
                [waiting.posting.user_id for waiting in replays],
                [waiting.posting.key for waiting in replays],
            )
        except DRIVER_ERRORS as error:
            # The original command was decided long ago, only its answer cannot be read now.
            _fail_all(replays, UnknownOutcome(f"the original answer could not be read: {error}"))
            return
        for row in rows:
            waiting = replays[row["answer_no"] - 1]
            if row["outcome"] == NOT_HERE:
                _fail(waiting, ShardNotHere(f"the shard of wallet {waiting.posting.user_id} has left {self._name}"))
                continue
            differs = difference(waiting.posting.command, row["command"])
            if not waiting.future.done():
                waiting.future.set_result(
                    Posted(
                        Outcome.REPLAYED_DIFFERENTLY if differs else row["outcome"],
                        replayed=True,
                        seq=row["entry_seq"],
                        balance=row["entry_balance"],
                        bet_id=row["bet"],
                        differs=differs,
                    )
                )

    def _fail_queue(self, error: LedgerError) -> None:
        for queue in (self._queue, self._hot):
            while queue:
                waiting = queue.popleft()
                if queue is self._hot:
                    self._left_hot_lane([waiting])
                _fail(waiting, error)


def _fail(waiting: _Waiting, error: LedgerError) -> None:
    if not waiting.future.done():
        waiting.future.set_exception(error)


def _fail_all(batch: Sequence[_Waiting], error: LedgerError) -> None:
    for waiting in batch:
        _fail(waiting, error)
