"""The queries as plain functions: what a caller may see of wallets, bets and matches, and how fresh it is.

Every query has a bounded cost: a page has a limit, a count says over how many rows it was made.
"""

import asyncio
import time
from uuid import UUID

from reference import metrics
from reference.answers import BalanceView, BetView, EntriesView, EntryView, MatchView
from reference.cache import Balance, Cache
from reference.commands import BetState
from reference.errors import LedgerError
from reference.routing import shard_of
from reference.store import Store

ENTRIES_PAGE_MAX = 1000


class Reads:
    """The read side of one API process."""

    def __init__(self, store: Store, cache: Cache, stale_after_ms: int) -> None:
        self._store = store
        self._cache = cache
        self._stale_after_ms = stale_after_ms
        self._fills: set[asyncio.Task[bool]] = set()
        self._counted = {source: metrics.CACHE_READS.labels(source) for source in ("redis", "projection", "ledger")}

    async def balance(self, user_id: int, *, strong: bool, min_seq: int) -> BalanceView | None:
        """Return a balance from Redis, the projection or the ledger; None if the wallet has no entry.

        `stale` is set when the answer is behind `min_seq`, or older than the limit and not from the ledger.
        """
        found, source = None, "ledger"
        if not strong:
            found, source = await self._cache.get(user_id), "redis"
            if found is None or found.seq < min_seq:
                found, source = await self._projected(user_id) or found, "projection"
        if found is None:
            row = await self._store.fetchrow(self._store.server_of(user_id), "head", shard_of(user_id), user_id)
            if row is None:
                return None
            found, source = Balance(user_id, row["balance"], row["seq"], row["updated_at_ms"]), "ledger"
        self._counted[source].inc()
        age_ms = int(time.time() * 1000) - found.updated_at_ms
        stale = found.seq < min_seq or (source != "ledger" and age_ms > self._stale_after_ms)
        return BalanceView(user_id, found.balance, found.seq, source, stale, found.updated_at_ms)

    async def _projected(self, user_id: int) -> Balance | None:
        """Read the projection and fill the cache behind the answer; None if it has no row or is unreachable."""
        try:
            row = await self._store.fetchrow(self._store.server_of(user_id), "projected", shard_of(user_id), user_id)
        except LedgerError:
            return None
        if row is None:
            return None
        found = Balance(user_id, row["balance"], row["seq"], row["updated_at_ms"])
        fill = asyncio.create_task(self._cache.put([found]))
        self._fills.add(fill)
        fill.add_done_callback(self._fills.discard)
        return found

    async def entries(self, user_id: int, after_seq: int, limit: int) -> EntriesView:
        """Return a page of a wallet's entries in order of `seq`."""
        rows = await self._store.fetch(
            self._store.server_of(user_id), "entries", shard_of(user_id), user_id, after_seq, limit
        )
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
            for row in rows
        ]
        return EntriesView(entries, entries[-1].seq if len(entries) == limit else None)

    async def bet(self, user_id: int, bet_id: UUID) -> BetView | None:
        """Return a bet with its state in the order book; None if the wallet has no such bet."""
        row = await self._store.fetchrow(self._store.server_of(user_id), "bet", shard_of(user_id), user_id, bet_id)
        if row is None:
            return None
        order = await self._store.fetchrow(self._store.home_of(row["match_id"]), "order", bet_id)
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
        )

    async def match(self, match_id: UUID) -> MatchView | None:
        """Return a match as its home server knows it, or None."""
        row = await self._store.fetchrow(self._store.home_of(match_id), "match", match_id)
        if row is None:
            return None
        return MatchView(
            match_id,
            row["state"],
            row["outcomes"],
            row["closes_at_ms"],
            row["settlement_version"],
            row["result"],
            row["settled"],
        )
