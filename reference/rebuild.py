"""Rebuilds the projection from the ledger, and sends events of the past to Kafka again, while the service runs.

A page of wallets is rebuilt in one transaction, so readers see each row as it was or as it is, never none and never
an older one. How far a rebuild is stands in `projection_rebuilds`: killed at any point, the next one goes on there.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from reference.bus import Publisher, Record
from reference.cache import Cache
from reference.commands import TOPIC_OF
from reference.config import ServiceConfig
from reference.errors import LedgerError, NotPosted, ShardNotHere
from reference.relay import record_of
from reference.store import Store

PAGE_WALLETS = 1_000
PAGE_TRIES = 5
"""A page may be chosen as the victim of a deadlock with the projector."""
REPLAY_BATCH = 1_000
REDIS_WAIT_S = 15.0
"""A Redis that is restarting or hangs is waited for: it may hold copies of what was wrong."""
SEND_TRIES = 3
OUT_OF_ORDER = timedelta(seconds=60)
"""No two events whose order of id and of time differ are further apart: a posting takes far less."""

Show = Callable[[str], None]


@dataclass
class Rebuilt:
    """What a rebuild did on one server."""

    server: str
    wallets: int = 0
    wrong: int = 0
    """Rows that were not what the ledger says at their seq, or of wallets that it does not have."""
    resumed: bool = False
    """It went on where an earlier one was ended."""
    seconds: float = 0.0


async def rebuild(
    config: ServiceConfig, servers: Collection[int], *, from_zero: bool, restart: bool = False, show: Show
) -> list[Rebuilt]:
    """Rebuild the projection of some servers (indexes), one after the other, and say what was done.

    Without `from_zero`, rows that agree with the ledger stay as they are. With it, every row is thrown away and
    written anew. `restart` forgets an unfinished rebuild. Raises LedgerError if a server cannot be reached.
    """
    store, cache = Store(config, "ledger_projector"), Cache(config)
    try:
        return [
            await _rebuild_server(store, cache, server, from_zero=from_zero, restart=restart, show=show)
            for server in servers
        ]
    finally:
        await cache.close()
        await store.close()


async def _rebuild_server(
    store: Store, cache: Cache, server: int, *, from_zero: bool, restart: bool, show: Show
) -> Rebuilt:
    done = Rebuilt(store.config.servers[server].name)
    began = time.monotonic()
    held = await store.fetch(server, "routes")
    shards = [row["shard"] for row in held if row["here"]]
    await store.fetch(server, "begin_rebuild", shards, from_zero, restart)
    unfinished = await store.fetch(server, "rebuilds", shards)
    done.resumed = len(unfinished) < len(shards) or any(row["after_user"] for row in unfinished)
    first = True
    for row in unfinished:
        last = False
        while not last:
            try:
                page = await _page(store, server, row["shard"])
            except ShardNotHere:
                # It has moved meanwhile, with its projection: it is its new server's to rebuild.
                break
            last = page["last"]
            done.wallets += page["rebuilt"]
            done.wrong += page["wrong_rows"]
            # An earlier rebuild may have been ended between its last page and this; then nothing is wrong any more
            # but in Redis.
            doubtful, first = bool(page["wrong_rows"]) or first, False
            if doubtful:
                # What Redis holds may be a copy of it, and a seq alone does not give it away.
                name = store.config.servers[server].name
                fenced = await cache.fence(name, REDIS_WAIT_S)
                if not fenced and (page["wrong_rows"] or done.resumed):
                    raise RebuildUnfinished(
                        f"Redis does not answer for {REDIS_WAIT_S:g} s, and it may hold what was wrong of {name}: "
                        "start it and repeat the command"
                    )
            show(f"{done.server}: {done.wallets} wallets, shard {row['shard']}")
    done.seconds = time.monotonic() - began
    return done


async def _page(store: Store, server: int, shard: int) -> dict[str, Any]:
    for _ in range(PAGE_TRIES - 1):
        try:
            return dict((await store.fetch(server, "rebuild_page", shard, PAGE_WALLETS))[0])
        except NotPosted:
            continue
    return dict((await store.fetch(server, "rebuild_page", shard, PAGE_WALLETS))[0])


@dataclass
class Replayed:
    """What a replay of events did."""

    events: Counter[str] = field(default_factory=Counter)
    """Events sent, by topic."""
    last_ids: dict[str, int] = field(default_factory=dict)
    """The newest outbox id that was sent, by server."""
    seconds: float = 0.0


class RebuildUnfinished(LedgerError):
    """The projection is right so far, and Redis could not be told; repeating the command goes on."""


class NotAcknowledged(LedgerError):
    """The broker does not take the events; those before are sent, and sending them again does no harm."""


async def replay(config: ServiceConfig, since: datetime, topics: Collection[str], *, show: Show) -> Replayed:
    """Send every published event of the outboxes since a time to Kafka again, in order, under its own event id.

    Consumers have the effect of an event once however often it comes; unpublished events are the relay's. Raises
    LedgerError if a server cannot be read, NotAcknowledged if the broker does not take the events.
    """
    types = [event_type for event_type, topic in TOPIC_OF.items() if topic in topics]
    store = Store(config, "ledger_relay")
    publisher = Publisher(config, "events-replay")
    done = Replayed()
    began = time.monotonic()
    try:
        for server, settings in enumerate(config.servers):
            newest = (await store.fetch(server, "newest_event"))[0][0]
            after = await first_id(store, server, since - OUT_OF_ORDER, newest) - 1
            while rows := await store.fetch(server, "published", after, newest, since, types, REPLAY_BATCH):
                await _send(publisher, [record_of(row) for row in rows])
                done.events.update(TOPIC_OF[row["event_type"]] for row in rows)
                after = done.last_ids[settings.name] = rows[-1]["id"]
                show(f"{settings.name}: {done.events.total()} events, up to {rows[-1]['created_at']:%H:%M:%S}")
    finally:
        publisher.close()
        await store.close()
    done.seconds = time.monotonic() - began
    return done


async def first_id(store: Store, server: int, since: datetime, newest: int) -> int:
    """Return an outbox id before which no event is younger than `since`, by bisection along the primary key."""
    low, high = 1, newest + 1
    while low < high:
        middle = (low + high) // 2
        row = await store.fetchrow(server, "event_from", middle)
        if row is None or row["created_at"] >= since:
            high = middle
        else:
            low = row["id"] + 1
    return low


async def _send(publisher: Publisher, records: list[Record]) -> None:
    """Send records; what was not acknowledged is sent again together with all behind it."""
    for _ in range(SEND_TRIES):
        places = await publisher.publish(records)
        if None not in places:
            return
        records = records[places.index(None) :]
    raise NotAcknowledged(f"the broker did not acknowledge {len(records)} events: is it up, and do the topics exist?")
