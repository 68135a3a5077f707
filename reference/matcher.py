"""The matcher: takes every bet that was paid for into its match's order book, exactly once.

The order book lives in Postgres on the match's home server; what this process keeps in memory is a copy
that counts only while `matches.book_version` says that nobody else changed the book. Bets of one home
server are applied by one transaction under the row locks of their matches: orders, fills, progress of
resting orders and outbox events commit together. A bet that is already in `orders` was delivered again and
changes nothing, whichever process stored it.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import msgspec

from reference.bus import Consumer, Message, Poison
from reference.commands import MAX_ODDS, MAX_USER_ID, MIN_ODDS, TOPIC_OF, EventType, MatchState, Side
from reference.config import ServiceConfig
from reference.orderbook import Book, Fill, Order
from reference.service import always_ready, run_worker
from reference.sql import load_sql
from reference.store import Store, columns

log = logging.getLogger("ledgerproof.matcher")

GROUP = "matcher"
TOPICS = (TOPIC_OF[EventType.BET_CREATED],)
CACHED_BOOKS_MAX = 1_000
CACHED_ORDERS_MAX = 300_000
"""Open orders in all cached books together, at roughly 600 bytes each."""

_BIGINT_MAX = 2**63 - 1


class BetCreated(msgspec.Struct, frozen=True):
    """What the matcher reads of a BetCreated event. Amounts are minor units, odds hundredths."""

    bet_id: UUID
    user_id: Annotated[int, msgspec.Meta(ge=1, le=MAX_USER_ID)]
    match_id: UUID
    outcome: str
    side: Side
    odds: Annotated[int, msgspec.Meta(ge=MIN_ODDS, le=MAX_ODDS)]
    stake: Annotated[int, msgspec.Meta(ge=1, le=_BIGINT_MAX)]
    reserve: Annotated[int, msgspec.Meta(ge=1, le=_BIGINT_MAX)]


@dataclass(slots=True, frozen=True)
class Arrival:
    """A bet as it reaches the matcher, with the message that brought it."""

    bet: BetCreated
    event_id: UUID
    traceparent: str | None
    message: Message | None = None


@dataclass(slots=True)
class MatcherResult:
    """What one transaction did with its arrivals."""

    placed: int = 0
    redelivered: int = 0
    late: int = 0
    cancelled: int = 0
    """Bets whose owner asked to cancel them before they arrived."""
    fills: int = 0
    unknown: list[Arrival] = field(default_factory=list)
    """Bets whose match, or whose outcome in the match, does not exist; nothing was stored for them."""


class BookCache:
    """Copies of order books, least recently used first out. A book that is taken is gone until it is put
    back.

    So whoever fails between taking and putting back leaves nothing behind that could be wrong.
    """

    def __init__(self, books_max: int = CACHED_BOOKS_MAX, orders_max: int = CACHED_ORDERS_MAX) -> None:
        self._books_max = books_max
        self._orders_max = orders_max
        self._books: OrderedDict[UUID, tuple[int, Book]] = OrderedDict()
        self._orders = 0

    def __len__(self) -> int:
        return len(self._books)

    def take(self, match_id: UUID, version: int) -> Book | None:
        """Take the book out if it is the one of this version; any other version is dropped."""
        cached = self._books.pop(match_id, None)
        if cached is None:
            return None
        self._orders -= len(cached[1])
        return cached[1] if cached[0] == version else None

    def put(self, version: int, book: Book) -> None:
        """Keep a book whose changes up to `version` are committed."""
        self.take(book.match_id, version)
        self._books[book.match_id] = (version, book)
        self._orders += len(book)
        while len(self._books) > self._books_max or self._orders > self._orders_max:
            _, (_, dropped) = self._books.popitem(last=False)
            self._orders -= len(dropped)


@dataclass(slots=True)
class _Match:
    """A locked row of `matches` and its book while a batch is applied."""

    outcomes: Collection[str]
    accepts_bets: bool
    version: int
    arrivals: int
    book: Book
    changed: bool = False


class _Events:
    """Outbox rows in the order they are to be published."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str, str, UUID, str | None]] = []

    def matched(self, fill: Fill, cause: Arrival) -> None:
        match_id = str(fill.back.match_id)
        payload = {
            "match_id": match_id,
            "fill_no": fill.fill_no,
            "outcome": fill.back.outcome,
            "odds": fill.odds,
            "stake": fill.stake,
            "liability": fill.liability,
            "winnings": fill.winnings,
            "back_bet_id": fill.back.bet_id,
            "back_user": fill.back.user_id,
            "lay_bet_id": fill.lay.bet_id,
            "lay_user": fill.lay.user_id,
        }
        self._add("Match", match_id, EventType.BET_MATCHED, match_id, payload, cause)

    def cancelled(self, order: Order, cause: Arrival) -> None:
        payload = {
            "match_id": order.match_id,
            "bet_id": order.bet_id,
            "user_id": order.user_id,
            "refund": order.cancel_refund,
            "cancelled_stake": order.cancelled_stake,
            "reason": order.cancel_reason,
        }
        bet_id, wallet = str(order.bet_id), str(order.user_id)
        self._add("Bet", bet_id, EventType.BET_CANCELLED, wallet, payload, cause)

    def _add(
        self, aggregate: str, aggregate_id: str, event: EventType, key: str, payload: object, cause: Arrival
    ) -> None:
        body = msgspec.json.encode(payload).decode()
        self.rows.append((aggregate, aggregate_id, event.value, key, body, cause.bet.bet_id, cause.traceparent))


async def apply_orders(
    connection: asyncpg.Connection, books: BookCache, arrivals: Sequence[Arrival], timeout_s: float
) -> MatcherResult:
    """Take bets of matches that live on this server into their books, in the given order, in one transaction.

    Returns when it is committed. Driver errors and TimeoutError (`timeout_s` for all of it) pass through;
    the connection is then to be thrown away, for its transaction may still be open.
    """
    async with asyncio.timeout(timeout_s):
        await connection.execute("BEGIN")
        result, used = await _apply(connection, books, arrivals)
        await connection.execute("COMMIT")
    for match in used:
        books.put(match.version, match.book)
    return result


async def _apply(
    connection: asyncpg.Connection, books: BookCache, arrivals: Sequence[Arrival]
) -> tuple[MatcherResult, Iterable[_Match]]:
    sql = load_sql("matcher")
    match_ids = sorted({arrival.bet.match_id for arrival in arrivals})
    rows = await connection.fetch(sql["lock_matches"], match_ids)
    marks = await connection.fetchrow(
        sql["read_marks"],
        [arrival.bet.bet_id for arrival in arrivals],
        [arrival.bet.user_id for arrival in arrivals],
    )
    assert marks is not None, "a SELECT without FROM has one row"
    matches = await _with_books(connection, books, rows, marks["at"])
    stored: set[UUID] = set(marks["stored"])
    to_cancel: set[UUID] = set(marks["cancelled"])

    result = MatcherResult()
    events = _Events()
    new: dict[UUID, tuple[Order, Arrival]] = {}
    touched: dict[UUID, Order] = {}
    fills: list[Fill] = []
    for arrival in arrivals:
        bet = arrival.bet
        match = matches.get(bet.match_id)
        if match is None or bet.outcome not in match.outcomes:
            result.unknown.append(arrival)
            continue
        if bet.bet_id in stored or bet.bet_id in new:
            result.redelivered += 1
            continue
        match.arrivals += 1
        match.changed = True
        order = Order(
            bet.bet_id,
            bet.match_id,
            bet.user_id,
            bet.outcome,
            bet.side,
            bet.odds,
            bet.stake,
            bet.reserve,
            match.arrivals,
        )
        new[bet.bet_id] = (order, arrival)
        if bet.bet_id in to_cancel:
            order.cancel_rest("REQUESTED")
            events.cancelled(order, arrival)
            result.cancelled += 1
        elif not match.accepts_bets:
            order.cancel_rest("LATE")
            events.cancelled(order, arrival)
            result.late += 1
        else:
            result.placed += 1
            for fill in match.book.place(order):
                fills.append(fill)
                touched[fill.back.bet_id] = fill.back
                touched[fill.lay.bet_id] = fill.lay
                events.matched(fill, arrival)
    result.fills = len(fills)

    if new:
        await connection.execute(sql["insert_orders"], *columns([_order_row(*pair) for pair in new.values()], 18))
        resting = sorted(touched.keys() - new.keys())
        if resting:
            progress = [_progress_row(touched[bet_id]) for bet_id in resting]
            await connection.execute(sql["update_orders"], *columns(progress, 6))
        if fills:
            await connection.execute(sql["insert_fills"], *columns([_fill_row(fill) for fill in fills], 11))
        if events.rows:
            await connection.execute(sql["insert_events"], *columns(events.rows, 7))
        if to_cancel:
            await connection.execute(sql["finish_cancels"], list(to_cancel))
        changed = [match for match in matches.values() if match.changed]
        for match in changed:
            match.version += 1
        heads = [(match.book.match_id, match.version, match.arrivals, match.book.fill_count) for match in changed]
        await connection.execute(sql["update_matches"], *columns(heads, 4))
    return result, matches.values()


async def _with_books(
    connection: asyncpg.Connection, books: BookCache, rows: Iterable[asyncpg.Record], at: datetime
) -> dict[UUID, _Match]:
    """Pair locked rows with their books: from the cache where its version still holds, else from `orders`."""
    matches: dict[UUID, _Match] = {}
    stale: dict[UUID, list[Order]] = {}
    fill_counts: dict[UUID, int] = {}
    for row in rows:
        match_id = UUID(int=row["match_id"].int)
        accepts_bets = row["state"] == MatchState.OPEN and at < row["closes_at"]
        # A closed match takes no more orders into its book, so the book need not be known.
        book = books.take(match_id, row["book_version"])
        if book is None:
            book = Book(match_id, row["fills"])
            if accepts_bets:
                stale[match_id] = []
        fill_counts[match_id] = row["fills"]
        matches[match_id] = _Match(row["outcomes"], accepts_bets, row["book_version"], row["arrivals"], book)
    if stale:
        for row in await connection.fetch(load_sql("matcher")["open_orders"], list(stale)):
            order = order_of(row)
            stale[order.match_id].append(order)
        for match_id, orders in stale.items():
            matches[match_id].book = Book(match_id, fill_counts[match_id], orders)
    return matches


def order_of(row: asyncpg.Record) -> Order:
    """Return the order of a row of `orders` whose columns are named as the fields of Order."""
    fields: dict[str, Any] = dict(row)
    fields["side"] = Side(fields["side"])
    return Order(**fields)


def _order_row(order: Order, arrival: Arrival) -> tuple[object, ...]:
    return (
        order.bet_id,
        order.match_id,
        order.user_id,
        order.outcome,
        order.side.value,
        order.odds,
        order.stake,
        order.reserve,
        order.arrival,
        order.state.value,
        order.matched_stake,
        order.matched_liability,
        order.winnings,
        order.liability_hundredths,
        order.cancelled_stake,
        order.cancel_refund,
        order.cancel_reason,
        arrival.event_id,
    )


def _progress_row(order: Order) -> tuple[object, ...]:
    return (
        order.bet_id,
        order.state.value,
        order.matched_stake,
        order.matched_liability,
        order.winnings,
        order.liability_hundredths,
    )


def _fill_row(fill: Fill) -> tuple[object, ...]:
    return (
        fill.back.match_id,
        fill.fill_no,
        fill.back.outcome,
        fill.back.bet_id,
        fill.back.user_id,
        fill.lay.bet_id,
        fill.lay.user_id,
        fill.odds,
        fill.stake,
        fill.liability,
        fill.winnings,
    )


def arrival_of(message: Message) -> Arrival:
    """Read a BetCreated message. Raises Poison if it is anything else or does not make sense."""
    if message.event_type != EventType.BET_CREATED:
        raise Poison(message, f"a {message.event_type} on {message.topic}")
    try:
        bet = msgspec.convert(message.payload, BetCreated)
        return Arrival(bet, UUID(message.event_id), message.traceparent, message)
    except (msgspec.ValidationError, ValueError) as error:
        raise Poison(message, f"not a bet: {error}") from error


class Matcher:
    """Applies the bets of every home server, each server in its own lane."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._books = BookCache()

    def lane_of(self, message: Message) -> int:
        """Return the home server of the bet's match. Raises KeyError or ValueError if it names none."""
        return self._store.home_of(UUID(message.payload["match_id"]))

    async def handle(self, server: int, messages: list[Message]) -> None:
        """Apply the bets of one home server; returns when they are committed.

        Raises LedgerError if the server cannot do it now, and Poison for a bet that can never be applied:
        the others of the batch are committed by then and count as delivered again.
        """
        arrivals = [arrival_of(message) for message in messages]
        timeout_s = self._store.config.statement_timeout_ms / 1000 + 1
        async with self._store.connection(server) as connection:
            result = await apply_orders(connection, self._books, arrivals, timeout_s)
        if result.unknown:
            bet, message = result.unknown[0].bet, result.unknown[0].message
            assert message is not None, "arrival_of keeps the message"
            raise Poison(message, f"no outcome {bet.outcome!r} in a match {bet.match_id}")


async def run(config: ServiceConfig, name: str, port: int, stopping: asyncio.Event) -> None:
    """Match until `stopping`."""
    store = Store(config, "ledger_matcher")
    matcher = Matcher(store)
    consumer = Consumer(config, GROUP, TOPICS, name, matcher.lane_of)
    try:
        await run_worker(port, lambda: consumer.run_once(matcher.handle), always_ready, stopping)
    finally:
        await consumer.close()
        await store.close()
