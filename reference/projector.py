"""The projection builder: keeps each wallet's balance in the read model and in Redis, fenced by `seq`.

Every entry's event carries the balance after it, so only the newest event of a wallet matters: repeated, late or
reordered events lose against a higher `seq` and change nothing.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable

from reference.bus import Consumer, Message
from reference.cache import Balance, Cache
from reference.commands import TOPIC_OF, EventType
from reference.config import ServiceConfig
from reference.errors import ShardNotHere
from reference.service import always_ready, run_worker
from reference.store import Store

GROUP = "projector"
TOPICS = (TOPIC_OF[EventType.BET_CREATED], TOPIC_OF[EventType.ENTRY_POSTED])
UNCACHED_MAX = 100_000
"""Balances remembered for Redis while it is down; beyond it they are left to expire there."""


def newest(messages: Iterable[Message]) -> dict[int, Balance]:
    """Return for each wallet the balance by its newest event.

    `updated_at_ms` is when the entry was written, not when it got here: a reader must see how old the value is,
    and a projection that is catching up would otherwise look fresh.
    """
    heads: dict[int, Balance] = {}
    for message in messages:
        user_id, seq = int(message.payload["user_id"]), int(message.payload["seq"])
        known = heads.get(user_id)
        if known is None or seq > known.seq:
            heads[user_id] = Balance(user_id, int(message.payload["balance"]), seq, message.committed_at_ms)
    return heads


class Projector:
    """Applies events to the projection and then to Redis."""

    def __init__(self, store: Store, cache: Cache) -> None:
        self._store = store
        self._cache = cache
        self._uncached: dict[int, Balance] = {}

    def lane_of(self, message: Message) -> int:
        """Return the server whose projection the event belongs to."""
        return self._store.server_of(int(message.payload["user_id"]))

    async def handle(self, server: int, messages: list[Message]) -> None:
        """Apply the events of one server: projection first, then the cache."""
        heads = newest(messages)
        # Almost always one server: a shard that was moved since the messages came goes to its new one.
        by_server: dict[int, list[Balance]] = defaultdict(list)
        for head in heads.values():
            by_server[self._store.server_of(head.user_id)].append(head)
        changed: list[Balance] = []
        for holder, part in by_server.items():
            try:
                rows = await self._store.fetch(
                    holder,
                    "project",
                    [head.user_id for head in part],
                    [head.balance for head in part],
                    [head.seq for head in part],
                    [head.updated_at_ms for head in part],
                )
            except ShardNotHere:
                self._store.learn_routes()
                raise
            changed += [heads[row["user_id"]] for row in rows]
        if not await self._cache.put(changed):
            for item in changed:
                if len(self._uncached) < UNCACHED_MAX or item.user_id in self._uncached:
                    self._uncached[item.user_id] = item

    async def catch_up(self) -> None:
        """Write to Redis what it missed while it was down."""
        if self._uncached and self._cache.available:
            batch = dict(list(self._uncached.items())[:1000])
            if await self._cache.put(list(batch.values())):
                for user_id, item in batch.items():
                    if self._uncached.get(user_id) is item:
                        del self._uncached[user_id]


async def run(config: ServiceConfig, name: str, port: int, stopping: asyncio.Event) -> None:
    """Project until `stopping`."""
    store = Store(config, "ledger_projector")
    cache = Cache(config)
    projector = Projector(store, cache)
    consumer = Consumer(config, GROUP, TOPICS, name, projector.lane_of)

    async def run_once() -> None:
        await consumer.run_once(projector.handle)
        await projector.catch_up()

    try:
        await run_worker(port, run_once, always_ready, stopping)
    finally:
        await consumer.close()
        await cache.close()
        await store.close()
