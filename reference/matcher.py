"""The matcher: takes every bet that was paid for into its match's order book, exactly once.

The order book lives in Postgres on the match's home server; what this process keeps in memory is a copy that counts
only if it can be brought to the `matches.book_version` of the locked row, and only as long as the connection over
which it was read. Bets of one home server are applied by one transaction under the row locks of their matches:
orders, fills, progress of resting orders and outbox events commit together. A bet that is already in `orders` was
delivered again and changes nothing, whichever process stored it.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated
from uuid import UUID

import asyncpg
import msgspec

from reference import metrics
from reference.bus import Consumer, Message, Poison
from reference.commands import MAX_AMOUNT_MINOR, MAX_ODDS, MAX_USER_ID, MIN_ODDS, TOPIC_OF, EventType, MatchState, Side
from reference.config import ServiceConfig
from reference.failpoints import hit_async
from reference.orderbook import Book, Fill, Order
from reference.service import always_ready, run_worker
from reference.sql import load_sql
from reference.store import DRIVER_ERRORS, Store, columns, meaning_of, table
from reference.tracing import Tracing, is_sampled

log = logging.getLogger("ledgerproof.matcher")

GROUP = "matcher"
TOPICS = (TOPIC_OF[EventType.BET_CREATED],)
CACHED_BOOKS_MAX = 1_000
CACHED_ORDERS_MAX = 250_000
"""Open orders in all cached books of a server together, at roughly 500 bytes each."""
REFRESH_VERSIONS_MAX = 100
REFRESH_ORDERS_MAX = 10_000
"""A cached book that is behind by more versions, or by as many changed orders, is read anew."""
# Which columns of the statements that write are text: the letters of `store.table`.
ORDER_KINDS = "...tt....t......t..t"
PROGRESS_KINDS = ".t....."
FILL_KINDS = "..t........"
EVENT_KINDS = "ttttt.t"
RESERVE_MAX = MAX_AMOUNT_MINOR * MAX_ODDS // 100


_uuid: Callable[[object], UUID] = partial(msgspec.convert, type=UUID)
"""A quarter of what UUID() takes, and there are two in each message."""


class BetCreated(msgspec.Struct, frozen=True):
    """What the matcher reads of a BetCreated event. Amounts are minor units, odds hundredths."""

    bet_id: UUID
    user_id: Annotated[int, msgspec.Meta(ge=1, le=MAX_USER_ID)]
    match_id: UUID
    outcome: str
    side: Side
    odds: Annotated[int, msgspec.Meta(ge=MIN_ODDS, le=MAX_ODDS)]
    stake: Annotated[int, msgspec.Meta(ge=1, le=MAX_AMOUNT_MINOR)]
    reserve: Annotated[int, msgspec.Meta(ge=1, le=RESERVE_MAX)]


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
    """Copies of order books, least recently used first out.

    A book that is taken is gone until it is put back, so whoever fails in between leaves nothing behind that
    could be wrong.
    """

    def __init__(self, books_max: int = CACHED_BOOKS_MAX, orders_max: int = CACHED_ORDERS_MAX) -> None:
        self._books_max = books_max
        self._orders_max = orders_max
        self._books: OrderedDict[UUID, tuple[int, Book]] = OrderedDict()
        self._orders = 0

    def __len__(self) -> int:
        return len(self._books)

    def take(self, match_id: UUID) -> tuple[int, Book] | None:
        """Take a book out, with the version it has; None if there is none."""
        cached = self._books.pop(match_id, None)
        if cached is not None:
            self._orders -= len(cached[1])
        return cached

    def put(self, version: int, book: Book) -> None:
        """Keep a book whose changes up to `version` are committed."""
        self.take(book.match_id)
        self._books[book.match_id] = (version, book)
        self._orders += len(book)
        while len(self._books) > self._books_max or self._orders > self._orders_max:
            _, (_, dropped) = self._books.popitem(last=False)
            self._orders -= len(dropped)


@dataclass(slots=True)
class _Match:
    """A locked row of `matches` while a batch is applied."""

    outcomes: Collection[str]
    version: int
    arrivals: int
    book: Book | None
    """None when the match takes no more bets: then its book is not needed."""
    changed: bool = False


EventRow = tuple[str, str, str, str, str, UUID, str | None]
"""Aggregate type and id, event type, partition key, payload as JSON, cause (the arriving bet), traceparent."""


def _matched_row(fill: Fill, cause: Arrival) -> EventRow:
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
    body = msgspec.json.encode(payload).decode()
    kind = EventType.BET_MATCHED.value
    return "Match", match_id, kind, match_id, body, cause.bet.bet_id, cause.traceparent


def _cancelled_row(order: Order, cause: Arrival) -> EventRow:
    payload = {
        "match_id": order.match_id,
        "bet_id": order.bet_id,
        "user_id": order.user_id,
        "refund": order.cancel_refund,
        "cancelled_stake": order.cancelled_stake,
        "reason": order.cancel_reason,
    }
    body = msgspec.json.encode(payload).decode()
    kind = EventType.BET_CANCELLED.value
    return "Bet", str(order.bet_id), kind, str(order.user_id), body, order.bet_id, cause.traceparent


@dataclass(slots=True)
class _Changes:
    """What a batch writes."""

    result: MatcherResult = field(default_factory=MatcherResult)
    new: dict[UUID, tuple[Order, Arrival]] = field(default_factory=dict)
    resting: dict[UUID, Order] = field(default_factory=dict)
    """Orders of earlier batches that traded."""
    fills: list[Fill] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)
    cancels_done: list[UUID] = field(default_factory=list)

    def admit(self, arrival: Arrival, match: _Match, *, cancel_waits: bool) -> None:
        """Give a new bet its place in the queue of its match, and trade it unless it is cancelled or late."""
        bet = arrival.bet
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
        self.new[bet.bet_id] = (order, arrival)
        if cancel_waits:
            self.result.cancelled += 1
            self.cancels_done.append(bet.bet_id)
            order.cancel_rest("REQUESTED")
            self.events.append(_cancelled_row(order, arrival))
        elif match.book is None:
            self.result.late += 1
            order.cancel_rest("LATE")
            self.events.append(_cancelled_row(order, arrival))
        else:
            self.result.placed += 1
            for fill in match.book.place(order):
                self.result.fills += 1
                self.fills.append(fill)
                self.events.append(_matched_row(fill, arrival))
                resting = fill.lay if fill.back is order else fill.back
                if resting.bet_id not in self.new:
                    self.resting[resting.bet_id] = resting


async def apply_orders(
    connection: asyncpg.Connection, books: BookCache, arrivals: Sequence[Arrival], timeout_s: float
) -> MatcherResult:
    """Take bets of matches that live on this server into their books, in order, in one transaction.

    Returns when it is committed. Driver errors and TimeoutError (`timeout_s` for all of it) pass through; the
    connection is then to be thrown away, for its transaction may still be open.
    """
    async with asyncio.timeout(timeout_s):
        await connection.execute("BEGIN")
        matches, stored, cancelled = await _lock(connection, books, arrivals)
        await hit_async("matcher.after_lock_before_write")
        changes = _Changes()
        for arrival in arrivals:
            bet = arrival.bet
            match = matches.get(bet.match_id)
            if match is None or bet.outcome not in match.outcomes:
                changes.result.unknown.append(arrival)
            elif bet.bet_id in stored or bet.bet_id in changes.new:
                changes.result.redelivered += 1
            else:
                changes.admit(arrival, match, cancel_waits=bet.bet_id in cancelled)
        await _write(connection, matches, changes)
        await hit_async("matcher.before_commit")
        await connection.execute("COMMIT")
        await hit_async("matcher.after_commit_before_cache")
    for match in matches.values():
        if match.book is not None:
            books.put(match.version, match.book)
    return changes.result


async def _lock(
    connection: asyncpg.Connection, books: BookCache, arrivals: Sequence[Arrival]
) -> tuple[dict[UUID, _Match], set[UUID], set[UUID]]:
    """Lock the matches and return them with their books, the bets already stored, and those to cancel."""
    sql = load_sql("matcher")
    rows = await connection.fetch(sql["lock_matches"], sorted({arrival.bet.match_id for arrival in arrivals}))
    marks = await connection.fetchrow(
        sql["read_marks"],
        [arrival.bet.bet_id for arrival in arrivals],
        [arrival.bet.user_id for arrival in arrivals],
    )
    assert marks is not None, "a SELECT without FROM has one row"
    taking = [row for row in rows if row["state"] == MatchState.OPEN and marks["at"] < row["closes_at"]]
    current = await _current_books(connection, books, taking)
    matches = {
        row["match_id"]: _Match(row["outcomes"], row["book_version"], row["arrivals"], current.get(row["match_id"]))
        for row in rows
    }
    return matches, set(marks["stored"]), set(marks["cancelled"])


async def _current_books(
    connection: asyncpg.Connection, books: BookCache, rows: Sequence[asyncpg.Record]
) -> dict[UUID, Book]:
    """Return the books of locked rows of `matches`, from the cache where it can be brought up to date."""
    sql = load_sql("matcher")
    current: dict[UUID, Book] = {}
    behind: dict[UUID, tuple[int, Book]] = {}
    for row in rows:
        version, book = books.take(row["match_id"]) or (-1, None)
        if book is not None and version == row["book_version"]:
            current[row["match_id"]] = book
        elif book is not None and 0 < row["book_version"] - version <= REFRESH_VERSIONS_MAX:
            behind[row["match_id"]] = (version, book)
    if behind:
        versions = [version for version, _ in behind.values()]
        changed: dict[UUID, list[asyncpg.Record]] = {match_id: [] for match_id in behind}
        for order in await connection.fetch(sql["changed_orders"], list(behind), versions, REFRESH_ORDERS_MAX):
            changed[order["match_id"]].append(order)
        for row in rows:
            version, book = behind.get(row["match_id"], (0, None))
            missed = changed.get(row["match_id"], [])
            # Every version in between must be explained by an order that bears it. One that is not may be
            # a change that another covered up, or one that left no mark: then the whole book is read.
            explained = len({order["book_version"] for order in missed})
            complete = explained == row["book_version"] - version and len(missed) < REFRESH_ORDERS_MAX
            if book is not None and complete:
                book.fill_count = row["fills"]
                for order in missed:
                    book.refresh(order_of(order))
                current[row["match_id"]] = book
    for row in rows:
        match_id = row["match_id"]
        if match_id not in current:
            # One by one: the rows of deep books together would take more memory than all books may.
            waiting = await connection.fetch(sql["open_orders"], match_id)
            current[match_id] = Book(match_id, row["fills"], map(order_of, waiting))
    return current


async def _write(connection: asyncpg.Connection, matches: dict[UUID, _Match], changes: _Changes) -> None:
    """Store what the batch changed, each kind of row by one statement."""
    if not changes.new:
        return
    sql = load_sql("matcher")
    for match in matches.values():
        match.version += match.changed
    new = [_order_row(order, arrival, matches[order.match_id].version) for order, arrival in changes.new.values()]
    await connection.execute(sql["insert_orders"], *table(new, ORDER_KINDS))
    if changes.resting:
        progress = [_progress_row(order, matches[order.match_id].version) for order in changes.resting.values()]
        await connection.execute(sql["update_orders"], *table(progress, PROGRESS_KINDS))
    if changes.fills:
        fills = [_fill_row(fill) for fill in changes.fills]
        await connection.execute(sql["insert_fills"], *table(fills, FILL_KINDS))
    if changes.events:
        await connection.execute(sql["insert_events"], *table(changes.events, EVENT_KINDS))
    if changes.cancels_done:
        await connection.execute(sql["finish_cancels"], changes.cancels_done)
    heads = [
        (match_id, match.version, match.arrivals, None if match.book is None else match.book.fill_count)
        for match_id, match in matches.items()
        if match.changed
    ]
    await connection.execute(sql["update_matches"], *columns(heads, 4))


def order_of(row: asyncpg.Record) -> Order:
    """Return the order of a row whose first 16 columns are the fields of Order in their order."""
    bet_id, match_id, user_id, outcome, side, *progress = row[:16]
    return Order(bet_id, match_id, user_id, outcome, Side(side), *progress)


def _order_row(order: Order, arrival: Arrival, book_version: int) -> tuple[object, ...]:
    return (
        order.bet_id,
        order.match_id,
        order.user_id,
        order.outcome,
        order.side,
        order.odds,
        order.stake,
        order.reserve,
        order.arrival,
        order.state,
        order.matched_stake,
        order.matched_liability,
        order.winnings,
        order.liability_hundredths,
        order.cancelled_stake,
        order.cancel_refund,
        order.cancel_reason,
        arrival.event_id,
        book_version,
        arrival.traceparent if is_sampled(arrival.traceparent) else None,
    )


def _progress_row(order: Order, book_version: int) -> tuple[object, ...]:
    return (
        order.bet_id,
        order.state,
        order.matched_stake,
        order.matched_liability,
        order.winnings,
        order.liability_hundredths,
        book_version,
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
        return Arrival(bet, _uuid(message.event_id), message.traceparent, message)
    except msgspec.ValidationError as error:
        raise Poison(message, f"not a bet: {error}") from error


class _Home:
    """The connection to one home server, and the books read over it.

    They end together: behind a new connection may be a server that was restored or failed over, and its
    versions may count other changes than those that the old books have seen.
    """

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.books = BookCache()


class Matcher:
    """Applies the bets of every home server, each server in its own lane."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._homes: dict[int, _Home] = {}

    def lane_of(self, message: Message) -> int:
        """Return the home server of the bet's match. Raises KeyError or ValidationError if it names none."""
        return self._store.home_of(_uuid(message.payload["match_id"]))

    async def handle(self, server: int, messages: list[Message]) -> None:
        """Apply the bets of one home server; returns when they are committed.

        Raises LedgerError if the server cannot do it now, and Poison for a bet that can never be applied: the
        others of the batch are committed by then and come back as bets delivered again.
        """
        arrivals = [arrival_of(message) for message in messages]
        home = self._homes.get(server)
        if home is None or home.connection.is_closed():
            home = self._homes[server] = _Home(await self._store.connect(server))
        try:
            timeout_s = self._store.config.statement_timeout_ms / 1000 + 1
            result = await apply_orders(home.connection, home.books, arrivals, timeout_s)
        except BaseException as error:
            # The transaction may still be open, and whether it committed may be unknown.
            self._drop(server)
            if isinstance(error, DRIVER_ERRORS):
                raise meaning_of(error) from error
            raise
        metrics.EVENTS_REPEATED.labels(GROUP).inc(result.redelivered)
        if result.unknown:
            bet, message = result.unknown[0].bet, result.unknown[0].message
            assert message is not None, "arrival_of keeps the message"
            raise Poison(message, f"no outcome {bet.outcome!r} in a match {bet.match_id}")

    def close(self) -> None:
        """Give up the connections; what is not committed is delivered again to somebody."""
        for server in list(self._homes):
            self._drop(server)

    def _drop(self, server: int) -> None:
        home = self._homes.pop(server, None)
        if home is not None:
            home.connection.terminate()


async def run(config: ServiceConfig, name: str, port: int, stopping: asyncio.Event) -> None:
    """Match until `stopping`."""
    store = Store(config, "ledger_matcher")
    tracing = Tracing(config, name)
    matcher = Matcher(store)
    consumer = Consumer(config, GROUP, TOPICS, name, matcher.lane_of, tracing=tracing)
    try:
        await run_worker(port, lambda: consumer.run_once(matcher.handle), always_ready, stopping)
    finally:
        await consumer.close()
        matcher.close()
        await store.close()
        tracing.close()
