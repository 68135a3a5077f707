"""The queries as plain functions: what a caller may see of wallets, bets and matches, and how fresh it is.

Every query has a bounded cost: a page has a limit, a count says over how many rows it was made.
"""

import asyncio
import time
from collections.abc import Sequence
from uuid import UUID

import asyncpg

from reference import exchange
from reference.answers import (
    AdvancesView,
    AdvanceView,
    BalanceView,
    BetsView,
    BetView,
    BookView,
    EntriesView,
    EntryView,
    Level,
    MatchesView,
    MatchView,
    OutcomeBook,
    StatsView,
)
from reference.balance_reader import BalanceReader
from reference.cache import Cache
from reference.commands import BetState, Side
from reference.cursor import encode_cursor
from reference.errors import InvalidCommand, LedgerError
from reference.store import Store

ENTRIES_PAGE_MAX = 1000
BETS_PAGE_MAX = 200
MATCHES_PAGE_MAX = 200
BOOK_DEPTH_MAX = 50
BOOK_FRESH_MS = 200
BOOKS_MAX = 1000
"""Books kept at most; the oldest goes first."""
STATS_ENTRIES_MAX = 20_000
"""Entries that one question for statistics adds up at most."""
OPEN_BETS_MAX = 500
"""Newest bets among which the open ones are counted."""

ENTRIES, TRANSACTIONS, BETS, MATCHES = "entries", "transactions", "bets", "matches"
"""Kinds of cursors."""
LAST_UUID = UUID(int=2**128 - 1)
MatchPosition = tuple[int, UUID]
"""Where a page of matches begins: before this creation time (Unix microseconds) and id."""
LAST_MATCH: MatchPosition = (2**53, LAST_UUID)
"""Before everything there can be: the year 2255."""

_OPEN = frozenset({BetState.PENDING, BetState.PART_MATCHED, BetState.MATCHED})


class Reads:
    """The read side of one API process."""

    def __init__(self, store: Store, cache: Cache) -> None:
        self._store = store
        self._balances = BalanceReader(store, cache)
        self._books: dict[tuple[UUID, int], BookView] = {}

    async def balance(self, user_id: int, *, strong: bool, min_seq: int) -> BalanceView | None:
        """Return a balance from Redis, the projection or the ledger; None if the wallet has no entry."""
        reading = await self._balances.read(user_id, min_seq=min_seq, strong=strong)
        if reading is None:
            return None
        found = reading.balance
        return BalanceView(
            user_id, found.balance, found.seq, reading.source, reading.stale, found.updated_at_ms, reading.as_of_ms
        )

    async def close(self) -> None:
        """Wait for what the reads left under way."""
        await self._balances.close()

    async def balance_as_of(self, user_id: int, at_ms: int) -> BalanceView | None:
        """Return the balance after the last entry whose `created_at_ms` is at most `at_ms` (Unix milliseconds).

        A wallet had balance 0 at seq 0 before its first entry. None: the wallet has no entry at all. Raises
        InvalidCommand for a time that has not come yet by the wallet's server: its answer would still change.
        """
        row = await self._store.wallet_row(user_id, "as_of", at_ms)
        if row is None:
            raise LedgerError("as_of returned no row")
        if at_ms > row["now_ms"]:
            raise InvalidCommand("as_of", f"{at_ms} is in the future; it is {row['now_ms']} on the wallet's server")
        if row["first_seq"] is None:
            return None
        return BalanceView(
            user_id,
            row["balance"],
            row["seq"],
            "ledger",
            stale=False,
            updated_at_ms=row["updated_at_ms"] or 0,
            as_of_ms=at_ms,
        )

    async def entries(self, user_id: int, after_seq: int, limit: int) -> EntriesView:
        """Return a page of a wallet's entries in order of `seq`."""
        rows = await self._of_wallet(user_id, "entries", after_seq, limit + 1)
        return _entries(rows, limit, ENTRIES)

    async def transactions(self, user_id: int, before_seq: int, limit: int) -> EntriesView:
        """Return a page of a wallet's entries, newest first."""
        rows = await self._of_wallet(user_id, "newest_entries", before_seq, limit + 1)
        return _entries(rows, limit, TRANSACTIONS)

    async def bet(self, user_id: int, bet_id: UUID) -> BetView | None:
        """Return a bet with its state in the order book; None if the wallet has no such bet."""
        row = await self._store.wallet_row(user_id, "bet", bet_id)
        if row is None:
            return None
        orders = await self._orders({bet_id: row["match_id"]})
        return _bet(bet_id, row, orders.get(bet_id))

    async def bets(self, user_id: int, before: UUID, limit: int) -> BetsView:
        """Return a page of a wallet's bets, newest first, with their states in the order books."""
        rows = await self._of_wallet(user_id, "bets_page", before, limit + 1)
        page = rows[:limit]
        orders = await self._orders({row["bet_id"]: row["match_id"] for row in page})
        bets = [_bet(row["bet_id"], row, orders.get(row["bet_id"])) for row in page]
        return BetsView(bets, encode_cursor(BETS, bets[-1].bet_id) if len(rows) > limit else None)

    async def _orders(self, match_of: dict[UUID, UUID]) -> dict[UUID, asyncpg.Record]:
        """Return the orders of bets (bet → match) from the home servers of their matches."""
        by_server: dict[int, list[UUID]] = {}
        for bet_id, match_id in match_of.items():
            by_server.setdefault(self._store.home_of(match_id), []).append(bet_id)
        pages = await asyncio.gather(
            *(self._store.fetch(server, "orders_of_bets", bets) for server, bets in by_server.items())
        )
        return {row["bet_id"]: row for rows in pages for row in rows}

    async def advances(self, user_id: int) -> AdvancesView:
        """Return what the house advanced on a wallet's bets and has not got back."""
        rows = await exchange.advances(self._store, user_id)
        bets = [AdvanceView(row["match_id"], row["bet_id"], row["owed"]) for row in rows]
        return AdvancesView(sum(bet.owed_minor for bet in bets), bets)

    async def stats(self, user_id: int) -> StatsView | None:
        """Return sums over a wallet's entries, STATS_ENTRIES_MAX new ones a call at most; None if it has none."""
        row = await self._store.at_wallet(
            user_id, lambda server: self._store.fetchrow(server, "statistics", user_id, STATS_ENTRIES_MAX)
        )
        if row is None or row["seq"] == 0:
            return None
        newest = await self._of_wallet(user_id, "bets_page", LAST_UUID, OPEN_BETS_MAX)
        orders = await self._orders({bet["bet_id"]: bet["match_id"] for bet in newest})
        states = [orders[bet["bet_id"]]["state"] if bet["bet_id"] in orders else BetState.PENDING for bet in newest]
        return StatsView(
            user_id,
            row["seq"],
            row["complete"],
            row["deposits"],
            row["deposited"],
            row["withdrawals"],
            row["withdrawn"],
            row["bets"],
            row["staked"],
            row["payouts"],
            row["won"],
            row["refunds"],
            row["refunded"],
            row["commission"],
            open_bets=sum(state in _OPEN for state in states),
            open_bets_of=len(newest),
        )

    async def match(self, match_id: UUID) -> MatchView | None:
        """Return a match as its home server knows it, or None."""
        row = await self._store.fetchrow(self._store.home_of(match_id), "match", match_id)
        return None if row is None else _match(row)

    async def matches(self, state: str | None, before: MatchPosition, limit: int) -> MatchesView:
        """Return a page of matches, newest first, merged from all servers."""
        query, more = ("matches_page", []) if state is None else ("matches_page_of_state", [state])
        pages = await asyncio.gather(
            *(
                self._store.fetch(server, query, before[0], before[1], limit + 1, *more)
                for server in range(len(self._store.config.servers))
            )
        )
        rows = sorted(
            (row for page in pages for row in page),
            key=lambda row: (row["created_at_us"], row["match_id"]),
            reverse=True,
        )
        page = rows[:limit]
        cursor = (
            encode_cursor(MATCHES, (page[-1]["created_at_us"], page[-1]["match_id"])) if len(rows) > limit else None
        )
        return MatchesView([_match(row) for row in page], cursor)

    async def book(self, match_id: UUID, depth: int) -> BookView | None:
        """Return the best `depth` price levels of each side of a match; None if there is no such match.

        A book is kept for BOOK_FRESH_MS, so that many readers of a busy match cost one query.
        """
        now_ms = int(time.time() * 1000)
        known = self._books.get((match_id, depth))
        if known is not None and now_ms - known.as_of_ms < BOOK_FRESH_MS:
            return known
        server = self._store.home_of(match_id)
        match, levels = await asyncio.gather(
            self._store.fetchrow(server, "match", match_id), self._store.fetch(server, "book", match_id, depth)
        )
        if match is None:
            return None
        sides: dict[tuple[str, str], list[Level]] = {}
        for row in levels:
            level = Level(row["odds"], row["stake"], row["bets"])
            sides.setdefault((row["outcome"], row["side"]), []).append(level)
        outcomes = [
            OutcomeBook(name, sides.get((name, Side.BACK), []), sides.get((name, Side.LAY), []))
            for name in match["outcomes"]
        ]
        view = BookView(match_id, now_ms, outcomes)
        self._books.pop((match_id, depth), None)
        while len(self._books) >= BOOKS_MAX:
            self._books.pop(next(iter(self._books)))
        self._books[match_id, depth] = view
        return view

    async def _of_wallet(self, user_id: int, query: str, *args: object) -> list[asyncpg.Record]:
        return await self._store.wallet_rows(user_id, query, *args)


def _entries(rows: Sequence[asyncpg.Record], limit: int, kind: str) -> EntriesView:
    entries = [
        EntryView(
            row["seq"],
            row["type"],
            row["amount"],
            row["balance_snapshot"],
            row["contra"],
            row["match_id"],
            row["bet_id"],
            row["idempotent_key"],
            row["created_at_ms"],
        )
        for row in rows[:limit]
    ]
    return EntriesView(entries, encode_cursor(kind, entries[-1].seq) if len(rows) > limit else None)


def _bet(bet_id: UUID, row: asyncpg.Record, order: asyncpg.Record | None) -> BetView:
    return BetView(
        bet_id,
        row["match_id"],
        row["outcome"],
        row["side"],
        row["odds"],
        row["stake"],
        row["reserve"],
        order["state"] if order else BetState.PENDING,
        order["matched_stake"] if order else 0,
        order["cancelled_stake"] if order else 0,
        row["placed_at_ms"],
    )


def _match(row: asyncpg.Record) -> MatchView:
    return MatchView(
        row["match_id"],
        row["state"],
        row["outcomes"],
        row["closes_at_ms"],
        row["settlement_version"],
        row["result"],
        row["settled"],
    )
