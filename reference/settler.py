"""The settler: pays every bet of a settled or void match, and refunds what is cancelled, each at most once.

What is to be done stands in the `settlements` row that the command wrote with its event, so nothing depends
on the event's arrival: MatchSettled only says that it is worth looking now. A settlement goes through the
orders of its match page by page. First the entries of the page are posted to the wallets' servers, under
keys that make a repetition a replay; then the page is marked on the match's home server. Killed in between,
the next settler repeats one page and adds nothing. One server that is down holds up the matches that have
bets of its wallets, and no others.

A settlement that corrects an earlier one posts differences. What a wallet lacks to give back depends on its balance,
so those entries are decided under the wallet's lock and posted by the same transaction.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self, TypeVar
from uuid import UUID

import asyncpg
import msgspec

from reference import metrics
from reference.bus import Consumer, Message, Poison
from reference.commands import MAX_USER_ID, TOPIC_OF, EventType, Outcome
from reference.config import ServiceConfig
from reference.errors import LedgerError, ShardNotHere
from reference.failpoints import hit_async
from reference.matcher import RESERVE_MAX, order_of
from reference.orderbook import Order
from reference.routing import NOT_HERE
from reference.service import STOP_WITHIN_S, always_ready, run_worker
from reference.settlement import (
    Correction,
    Entry,
    Ruling,
    SettlementKind,
    cancel_entries,
    correction_entries,
    correction_of,
    entries_of,
)
from reference.sql import load_sql
from reference.store import DRIVER_ERRORS, Store, meaning_of
from reference.tracing import Tracing
from reference.writer import Posting, post_entries

log = logging.getLogger("ledgerproof.settler")

GROUP = "settler"
TOPICS = (TOPIC_OF[EventType.BET_CANCELLED], TOPIC_OF[EventType.MATCH_SETTLED])
CREATED_BY = "Settler"
NO_EFFECT_LANE = -1
"""The lane of events that need no database: trades, which are settled later, and the hints to look."""
PAGE_ORDERS = 1_000
SETTLEMENTS_AT_ONCE = 4
"""Matches that one process settles at the same time; each holds a connection to its home server."""
LOOK_EVERY_S = 1.0
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 3.0
ACTIVE_MAX = 256
"""Settlements that one process works on or waits to repeat."""
SETTLEMENT_CLASS = 8
"""First half of the two-part advisory lock keys of settlements."""

NO_TRACES: Mapping[UUID, str] = {}
_Item = TypeVar("_Item", Entry, Correction)


class BetCancelled(msgspec.Struct, frozen=True):
    """What the settler reads of a BetCancelled event; `refund` in minor units, 0 if rounding left nothing."""

    match_id: UUID
    bet_id: UUID
    user_id: Annotated[int, msgspec.Meta(ge=1, le=MAX_USER_ID)]
    refund: Annotated[int, msgspec.Meta(ge=0, le=RESERVE_MAX)]


class PaymentRefused(LedgerError):
    """The ledger refused an entry that a settlement needs. It never does; if it did, people have to look."""


class SettlementTaken(LedgerError):
    """Another settler moved this settlement on; this one leaves it."""


async def pay(store: Store, entries: Sequence[Entry], traces: Mapping[UUID, str] = NO_TRACES) -> int:
    """Post entries to the servers of their wallets, all servers at once; return how many were new.

    The entries of one wallet keep their order and are posted by one transaction. `traces` has the traceparent
    by bet. Raises LedgerError if any server could not do it; the others have done theirs by then, and
    repeating all of it is harmless.
    """

    async def pay_server(connection: asyncpg.Connection, entries: list[Entry]) -> int:
        # One key comes twice when an event was delivered twice into one batch.
        once = {entry.key: entry for entry in entries}
        return await _post(connection, store.sql["post"], list(once.values()), traces)

    return await _on_each_server(store, entries, pay_server)


async def correct(store: Store, corrections: Sequence[Correction]) -> int:
    """Make corrections of one settlement version on the servers of their wallets; return how many entries were new.

    Raises LedgerError as `pay` does; a correction that was made already is left alone.
    """
    sql = load_sql("settler")

    async def correct_server(connection: asyncpg.Connection, corrections: list[Correction]) -> int:
        async with connection.transaction():
            users, bets = [each.user_id for each in corrections], [each.bet_id for each in corrections]
            decided = await connection.fetch(sql["lock"], users, bets, corrections[0].version)
            balances: dict[int, int] = {}
            entries: list[Entry] = []
            for correction, row in zip(corrections, decided, strict=True):
                if row["posted"]:
                    continue
                balance = balances.setdefault(correction.user_id, row["balance"])
                for entry in correction_entries(correction, balance, row["owed"]):
                    entries.append(entry)
                    balances[entry.user_id] += entry.amount
            return await _post(connection, store.sql["post"], entries, NO_TRACES) if entries else 0

    return await _on_each_server(store, corrections, correct_server)


async def _on_each_server(
    store: Store, items: Sequence[_Item], work: Callable[[asyncpg.Connection, list[_Item]], Awaitable[int]]
) -> int:
    """Do `work` with the items of each server's wallets, all servers at once, and add up what it returns."""
    by_server: dict[int, list[_Item]] = defaultdict(list)
    for item in items:
        by_server[store.server_of(item.user_id)].append(item)

    async def on_server(server: int, mine: list[_Item]) -> int:
        async with store.connection(server) as connection, asyncio.timeout(_timeout_s(store)):
            done = await work(connection, mine)
        await hit_async("settler.between_bets")
        return done

    results = await asyncio.gather(
        *(on_server(server, mine) for server, mine in by_server.items()), return_exceptions=True
    )
    for result in results:
        if isinstance(result, ShardNotHere):
            store.learn_routes()
        if isinstance(result, BaseException):
            raise result
    return sum(result for result in results if isinstance(result, int))


async def _post(
    connection: asyncpg.Connection, post_sql: str, entries: Sequence[Entry], traces: Mapping[UUID, str]
) -> int:
    """Post entries of wallets of one server and return how many were new. Raises PaymentRefused."""
    postings = [
        Posting(
            user_id=entry.user_id,
            key=entry.key,
            type=entry.type,
            amount=entry.amount,
            contra=entry.contra,
            match_id=entry.match_id,
            bet_id=entry.bet_id,
            settlement_version=entry.settlement_version,
            traceparent=traces.get(entry.bet_id),
        )
        for entry in entries
    ]
    rows = await post_entries(connection, post_sql, CREATED_BY, postings)
    for posting, row in zip(postings, rows, strict=True):
        if row["status"] == NOT_HERE:
            raise ShardNotHere(f"the shard of wallet {posting.user_id} is being moved, or was")
        if row["status"] not in (Outcome.ACCEPTED, Outcome.REPLAYED):
            raise PaymentRefused(f"{posting.key}: {row['status']}")
    return sum(row["status"] == Outcome.ACCEPTED for row in rows)


def _timeout_s(store: Store) -> float:
    """Return how long to wait for a statement that the server should have ended itself."""
    return store.config.statement_timeout_ms / 1000 + 1


class _Terms(NamedTuple):
    """What a settlement version is to do."""

    version: int
    ruling: Ruling
    corrected: Ruling | None
    """The ruling of the version before; None for the first settlement of a match."""
    commission_bps: int

    @classmethod
    def of_row(cls, row: asyncpg.Record) -> Self:
        """Return the terms of a row of `settlement`."""
        before = row["corrected_kind"]
        return cls(
            row["settlement_version"],
            Ruling(SettlementKind(row["kind"]), row["result"]),
            None if before is None else Ruling(SettlementKind(before), row["corrected_result"]),
            row["commission_bps"],
        )


class Settlement:
    """The settlement of one match, with the connection to its home server and the lock on it."""

    def __init__(self, store: Store, match_id: UUID) -> None:
        self._store = store
        self._match_id = match_id
        self._sql = load_sql("settler")
        self._connection: asyncpg.Connection | None = None
        self.bets = 0
        self.entries = 0

    async def run(self, page_orders: int = PAGE_ORDERS) -> bool:
        """Settle the match to its end, from the page where the last settler stopped.

        Returns False if there is nothing to do or another settler is at it. Raises LedgerError if a server
        fails; what was done stays done.
        """
        self._connection = await self._store.connect(self._store.home_of(self._match_id))
        try:
            # The lock spares two settlers the double work; what keeps the money right are the entries' keys.
            low = self._match_id.int & 0x7FFF_FFFF
            if not (await self._fetch("try_lock", SETTLEMENT_CLASS, low))[0]["granted"]:
                return False
            rows = await self._fetch("settlement", self._match_id, self._store.config.commission_bps)
            if not rows:
                return False
            terms = _Terms.of_row(rows[0])
            position = rows[0]["last_arrival"]
            page = await self._fetch("page", self._match_id, position, page_orders)
            while page:
                await hit_async("settler.before_page")
                orders = [order_of(row) for row in page]
                traces = {row["bet_id"]: row["traceparent"] for row in page if row["traceparent"] is not None}
                reached = orders[-1].arrival
                # What is read of an order never changes once its match is being settled, so the next page can be
                # read while this one is posted.
                posted, page = await asyncio.gather(
                    self._settle_page(orders, terms, traces), self._fetch("page", self._match_id, reached, page_orders)
                )
                self.entries += posted
                await hit_async("settler.after_pay_before_mark")
                await self._move("mark_page", terms.version, position, reached)
                position = reached
                self.bets += len(orders)
            await hit_async("settler.before_finish")
            await self._move("finish", terms.version, position)
            return True
        finally:
            self._connection.terminate()

    async def _settle_page(self, orders: Sequence[Order], terms: _Terms, traces: Mapping[UUID, str]) -> int:
        """Post what a page of orders gets or gives back; return how many entries were new."""
        entries: list[Entry] = []
        corrections: list[Correction] = []
        for order in orders:
            # The refund of a cancelled bet has its own event, which may still be under way: a match is
            # settled only when every bet of it is paid, so it is paid here if it is not yet.
            entries += cancel_entries(order.user_id, order.match_id, order.bet_id, order.cancel_refund)
            try:
                if terms.corrected is None:
                    entries += entries_of(order, *terms.ruling, terms.version, terms.commission_bps)
                else:
                    correction = correction_of(
                        order, terms.corrected, terms.ruling, terms.version, terms.commission_bps
                    )
                    if correction is not None:
                        corrections.append(correction)
            except ValueError as error:
                raise PaymentRefused(str(error)) from error
        return await pay(self._store, entries, traces) + await correct(self._store, corrections)

    async def _move(self, query: str, *args: object) -> None:
        if not await self._fetch(query, self._match_id, *args):
            raise SettlementTaken(f"the settlement of {self._match_id} was moved on by another settler")

    async def _fetch(self, query: str, *args: object) -> list[Any]:
        assert self._connection is not None, "run() connects first"
        try:
            return await self._connection.fetch(self._sql[query], *args, timeout=_timeout_s(self._store))
        except DRIVER_ERRORS as error:
            raise meaning_of(error) from error


def cancelled_of(message: Message) -> BetCancelled:
    """Read a BetCancelled message. Raises Poison if it makes no sense."""
    try:
        return msgspec.convert(message.payload, BetCancelled)
    except msgspec.ValidationError as error:
        raise Poison(message, f"not a cancelled bet: {error}") from error


class Settler:
    """Looks for running settlements on every server, and refunds cancelled bets as their events come."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._look = [asyncio.Event() for _ in store.config.servers]
        self._slots = asyncio.Semaphore(SETTLEMENTS_AT_ONCE)
        self._active: dict[UUID, asyncio.Task[None]] = {}

    def lane_of(self, message: Message) -> int:
        """Return the server of the wallet to refund, or a lane of its own for what refunds nobody."""
        if message.event_type == EventType.BET_CANCELLED:
            return self._store.server_of(int(message.payload["user_id"]))
        return NO_EFFECT_LANE

    async def handle(self, lane: int, messages: list[Message]) -> None:
        """Refund the cancelled bets of one server, or wake the search for settlements.

        Raises LedgerError if the server cannot do it now, and Poison for an event that makes no sense.
        """
        if lane == NO_EFFECT_LANE:
            for message in messages:
                if message.event_type == EventType.MATCH_SETTLED:
                    self._wake(message)
            return
        entries: list[Entry] = []
        traces: dict[UUID, str] = {}
        for message in messages:
            bet = cancelled_of(message)
            entries += cancel_entries(bet.user_id, bet.match_id, bet.bet_id, bet.refund)
            if message.traceparent is not None:
                traces[bet.bet_id] = message.traceparent
        await hit_async("settler.before_refund")
        await pay(self._store, entries, traces)

    def _wake(self, message: Message) -> None:
        try:
            server = self._store.home_of(UUID(message.payload["match_id"]))
        except (KeyError, ValueError, TypeError) as error:
            raise Poison(message, f"no match in it: {error!r}") from error
        self._look[server].set()

    async def settle_all(self, stopping: asyncio.Event) -> None:
        """Settle whatever is running on any server, until `stopping`."""
        try:
            await asyncio.gather(*(self._watch(server, stopping) for server in range(len(self._look))))
        finally:
            tasks = list(self._active.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, server: int, stopping: asyncio.Event) -> None:
        """Start a task for every running settlement of a home server."""
        look = self._look[server]
        while not stopping.is_set():
            look.clear()
            room = min(SETTLEMENTS_AT_ONCE, ACTIVE_MAX - len(self._active))
            if room > 0:
                try:
                    running = await self._running(server, room)
                except LedgerError as error:
                    log.warning("settlements of server %d cannot be read: %s", server, error)
                    running = []
                for match_id in running:
                    self._active[match_id] = asyncio.create_task(self._settle(server, match_id, stopping))
            await _first_of(look, stopping, timeout_s=LOOK_EVERY_S)

    async def _running(self, server: int, limit: int) -> list[UUID]:
        query = load_sql("settler")["running"]
        async with self._store.connection(server) as connection:
            rows = await connection.fetch(query, list(self._active), limit, timeout=_timeout_s(self._store))
        return [row["match_id"] for row in rows]

    async def _settle(self, server: int, match_id: UUID, stopping: asyncio.Event) -> None:
        """Settle one match, however often that takes."""
        pause_s = RETRY_FIRST_S
        try:
            while not stopping.is_set():
                settlement = Settlement(self._store, match_id)
                started = time.monotonic()
                try:
                    async with self._slots:
                        done = await settlement.run()
                except SettlementTaken as error:
                    log.info("%s", error)
                    return
                except Exception as error:
                    metrics.WORKER_ERRORS.labels(GROUP).inc()
                    # What is not one of ours is a bug: it is logged in full, and holds up this match only.
                    log.warning(
                        "settlement of %s: %r; again in %.1f s",
                        match_id,
                        error,
                        pause_s,
                        exc_info=not isinstance(error, LedgerError),
                    )
                    await _first_of(stopping, timeout_s=pause_s)
                    pause_s = min(2 * pause_s, RETRY_MAX_S)
                    continue
                if done:
                    # There may be more than one look could take.
                    self._look[server].set()
                    log.info(
                        "settled %s: %d bets, %d entries in %.2f s",
                        match_id,
                        settlement.bets,
                        settlement.entries,
                        time.monotonic() - started,
                    )
                return
        finally:
            del self._active[match_id]


async def _first_of(*events: asyncio.Event, timeout_s: float) -> None:
    """Return when one of the events is set, or after the time."""
    waiters = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiters, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiters:
            waiter.cancel()


async def run(config: ServiceConfig, name: str, port: int, stopping: asyncio.Event) -> None:
    """Settle and refund until `stopping`."""
    store = Store(config, "ledger_settler")
    tracing = Tracing(config, name)
    settler = Settler(store)
    consumer = Consumer(config, GROUP, TOPICS, name, settler.lane_of, tracing=tracing)
    settling = asyncio.create_task(settler.settle_all(stopping), name="settlements")
    try:
        await run_worker(port, lambda: consumer.run_once(settler.handle), always_ready, stopping, [settling])
    finally:
        await asyncio.wait([settling], timeout=STOP_WITHIN_S)
        settling.cancel()
        await consumer.close()
        await store.close()
        tracing.close()
