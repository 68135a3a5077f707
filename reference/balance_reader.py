"""The read path of a balance: Redis, then the projection, then the ledger, and the truth about its age.

A balance is *stale* when it may lack an entry that was committed more than `projection_stale_after_ms` ago, or when
it is behind a `seq` that the session knows of. How old it may be does not depend on when its wallet was last used:
the projector keeps account of the moment up to which the read model is complete (decision 0014).
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

from reference import metrics
from reference.cache import Balance, Cache
from reference.errors import LedgerError, ShardNotHere
from reference.failpoints import hit_async
from reference.routing import shard_of
from reference.store import Store

FILLS_MAX = 256
"""Writes into the cache under way at the same time; further ones are left to the next read."""


@dataclass(slots=True, frozen=True)
class Reading:
    """A balance and what is known of its age."""

    balance: Balance
    source: str
    """redis, projection or ledger."""
    stale: bool
    as_of_ms: int
    """Nothing that was committed before this is missing, Unix milliseconds by the database's clock."""


class BalanceReader:
    """Reads balances for one process."""

    def __init__(self, store: Store, cache: Cache) -> None:
        self._store = store
        self._cache = cache
        self._stale_after_ms = store.config.projection_stale_after_ms
        self._fills: set[asyncio.Task[None]] = set()
        self._reads = {source: metrics.CACHE_READS.labels(source) for source in ("redis", "projection", "ledger")}

    async def read(self, user_id: int, *, min_seq: int = 0, strong: bool = False) -> Reading | None:
        """Return the balance of a wallet, None if it has no entry.

        `strong` reads the ledger. Otherwise the first source that is fresh and has seen `min_seq` answers; if none
        is fresh, the newest that has seen it, flagged stale. Raises LedgerError if what has to be asked does not
        answer and nothing else was found.
        """
        reading = None if strong else await self._cheapest(user_id, min_seq)
        if reading is None or reading.balance.seq < min_seq:
            reading = await self._from_ledger(user_id, min_seq, reading)
        if reading is not None:
            self._reads[reading.source].inc()
        return reading

    async def _cheapest(self, user_id: int, min_seq: int) -> Reading | None:
        server = self._store.server_of(user_id)
        name = self._store.config.servers[server].name
        since = time.monotonic()
        cached = await self._cache.get(name, user_id)
        reading = None
        if cached.balance is not None:
            reading = self._reading(cached.balance, "redis", cached.complete_at_ms, int(time.time() * 1000), min_seq)
            if not reading.stale:
                return reading
        try:
            row = await self._store.fetchrow(server, "projected", shard_of(user_id), user_id)
        except ShardNotHere:
            # What the cache has of it was written before the wallet moved: its new server decides.
            return None
        except LedgerError:
            return reading
        if row is None:
            return reading
        found = Balance(user_id, row["balance"], row["seq"], row["updated_at_ms"])
        if cached.epoch is not None and len(self._fills) < FILLS_MAX:
            fill = asyncio.create_task(self._fill(name, cached.epoch, found, since))
            self._fills.add(fill)
            fill.add_done_callback(self._fills.discard)
        projected = self._reading(found, "projection", row["complete_at_ms"] or 0, row["now_ms"], min_seq)
        if reading is not None and (reading.balance.seq, reading.as_of_ms) > (found.seq, projected.as_of_ms):
            return reading
        return projected

    async def _fill(self, server: str, epoch: str, found: Balance, since: float) -> None:
        with suppress(OSError):  # a fill that fails leaves the cache as it was
            await hit_async("reads.before_fill")
            await self._cache.put(server, epoch, [found], since)

    def _reading(self, found: Balance, source: str, complete_at_ms: int, now_ms: int, min_seq: int) -> Reading:
        # When its newest entry was written, nothing was missing from it.
        as_of_ms = max(complete_at_ms, found.updated_at_ms)
        stale = found.seq < min_seq or now_ms - as_of_ms > self._stale_after_ms
        return Reading(found, source, stale, as_of_ms)

    async def _from_ledger(self, user_id: int, min_seq: int, otherwise: Reading | None) -> Reading | None:
        try:
            row = await self._store.wallet_row(user_id, "head")
        except LedgerError:
            if otherwise is None:
                raise
            return otherwise
        if row is None:
            return None
        found = Balance(user_id, row["balance"], row["seq"], row["updated_at_ms"])
        return Reading(found, "ledger", found.seq < min_seq, row["now_ms"])

    async def close(self) -> None:
        """Wait for the writes into the cache that are under way."""
        await asyncio.gather(*self._fills, return_exceptions=True)
