"""The projection builder: keeps each wallet's balance in the read model and in Redis, and says how fresh they are.

Every entry's event carries the balance after it, so only the newest event of a wallet matters: repeated, late or
reordered events lose against a higher `seq` and change nothing. After a change is committed it is put into Redis and
told to `user.balance.updated`; only then does the event count as done.

Readers must know how old a balance may be, also that of a wallet to which nothing happens. So the projector compares
what it has applied with what the relay says it has sent, and writes down up to which moment the read model is
complete (decision 0014).
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import asyncpg
import msgspec
from confluent_kafka import KafkaError, KafkaException

from reference import metrics
from reference.bus import Consumer, Headers, Message, Place, Poison, Publisher
from reference.cache import Balance, Cache
from reference.commands import BALANCE_TOPIC, TOPIC_OF, EventType
from reference.config import ServiceConfig
from reference.errors import LedgerError, ShardNotHere
from reference.failpoints import hit_async
from reference.service import always_ready, run_worker
from reference.store import Store
from reference.tracing import Tracing
from reference.uuid7 import uuid7

log = logging.getLogger("ledgerproof.projector")

GROUP = "projector"
TOPICS = (TOPIC_OF[EventType.BET_CREATED], TOPIC_OF[EventType.ENTRY_POSTED])
PUT_TRIES = 3
"""Other members may begin new epochs of the cache while a batch is written; beyond this we begin one ourselves."""
BIGINT_MAX = 2**63 - 1
BALANCE_UPDATED = b"BalanceUpdated"

_encode = msgspec.json.Encoder().encode


class BalanceUpdate(msgspec.Struct, frozen=True):
    """The payload of `user.balance.updated`: a wallet's balance after its entry `seq`; later ones have a higher seq."""

    user_id: int
    balance: int
    seq: int
    updated_at: int
    """When the entry was written, Unix milliseconds."""


def newest(messages: Iterable[Message]) -> dict[int, Balance]:
    """Return for each wallet the balance by its newest event.

    `updated_at_ms` is when the entry was written, not when it got here: a reader must see how old the value is,
    and a projection that is catching up would otherwise look fresh. Raises Poison for a message that names no
    possible balance, also where another one would have won.
    """
    heads: dict[int, Balance] = {}
    for message in messages:
        payload = message.payload
        user_id, seq, balance = payload.get("user_id"), payload.get("seq"), payload.get("balance")
        if not (
            type(user_id) is type(seq) is type(balance) is int
            and 0 < user_id <= BIGINT_MAX
            and 0 < seq <= BIGINT_MAX
            and 0 <= balance <= BIGINT_MAX
        ):
            raise Poison(message, f"no balance of a wallet: user_id {user_id!r}, seq {seq!r}, balance {balance!r}")
        known = heads.get(user_id)
        if known is None or seq > known.seq:
            heads[user_id] = Balance(user_id, balance, seq, message.committed_at_ms)
    return heads


def claims(sent: Mapping[str, Mapping[str, int]], complete_at_ms: int, applied: Mapping[Place, int]) -> dict[str, int]:
    """Return up to when each partition is complete, for those that hold nothing sent before and not applied.

    `sent` has the newest offset that a relay sent to a partition by `complete_at_ms`, `applied` the offset up to
    which everything is applied.
    """
    complete = {}
    for (topic, number), upto in applied.items():
        newest_sent = sent.get(topic, {}).get(str(number))
        if newest_sent is None or upto > newest_sent:
            complete[f"{topic}/{number}"] = complete_at_ms
    return complete


@dataclass(slots=True)
class _Side:
    """The cache of one server as this process knows it."""

    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a batch is applied: in between, epochs are begun."""
    epoch: str | None = None
    vouched_assignments: int = -1
    """The consumer's assignments when the epoch was begun; with others come what a predecessor left behind."""
    broken: bool = True
    """The cache may hold a value that should have been replaced: it needs a new epoch."""
    held: frozenset[int] = frozenset()
    """Shards that the server held at the last report."""
    broker_losses: int = 0
    settling: dict[Place, int] = field(default_factory=dict)
    """After a shard has moved: the positions up to which its events may wait in the lane of another server."""


class Projector:
    """Applies events to the projection, to Redis and to the stream of balance updates."""

    def __init__(self, store: Store, cache: Cache, updates: Publisher | None = None) -> None:
        self._store = store
        self._cache = cache
        self._updates = updates
        self._servers = [server.name for server in store.config.servers]
        self._sides = [_Side() for _ in self._servers]
        self._partitions = sum(store.config.partitions_of(topic) for topic in TOPICS)
        self._ages = [metrics.PROJECTION_AGE.labels(name) for name in self._servers]

    def lane_of(self, message: Message) -> int:
        """Return the server whose projection the event belongs to."""
        return self._store.server_of(int(message.payload["user_id"]))

    async def handle(self, server: int, messages: list[Message]) -> None:
        """Apply the events of one server: projection first, then the cache, then the stream of updates.

        Raises LedgerError if the projection cannot be written, KafkaException if the updates are not acknowledged;
        a failure of the cache is no failure.
        """
        # One server, but for shards that were moved since the messages came: they go to their new one.
        by_server: dict[int, dict[int, Balance]] = {}
        for user_id, head in newest(messages).items():
            by_server.setdefault(self._store.server_of(user_id), {})[user_id] = head
        for holder, heads in by_server.items():
            try:
                await self._apply(holder, heads)
            except ShardNotHere:
                self._store.learn_routes()
                raise

    async def _apply(self, server: int, heads: Mapping[int, Balance]) -> None:
        async with self._sides[server].busy:
            since = time.monotonic()
            epoch = await self._epoch(server)
            changed = await self._store.fetch(
                server,
                "project",
                list(heads),
                [head.balance for head in heads.values()],
                [head.seq for head in heads.values()],
                [head.updated_at_ms for head in heads.values()],
            )
            await hit_async("projector.after_apply_before_cache")
            rows = list(heads.values())
            if len(changed) < len(heads):
                metrics.EVENTS_REPEATED.labels(GROUP).inc(len(heads) - len(changed))
                # Delivered again, or overtaken: what the projection holds by now is what has to be told.
                rows = await self._projections(server, heads)
            await self._cache_rows(server, epoch, rows, since)
        await hit_async("projector.after_cache_before_tell")
        await self._tell(rows)

    async def _projections(self, server: int, users: Iterable[int]) -> list[Balance]:
        found = await self._store.fetch(server, "projections", list(users))
        return [Balance(row["user_id"], row["balance"], row["seq"], row["updated_at_ms"]) for row in found]

    async def _epoch(self, server: int) -> str | None:
        """Return the epoch to write in, a new one if the cache cannot be vouched for; None while Redis is down."""
        side = self._sides[server]
        if side.broken:
            begun = await self._cache.begin(self._servers[server])
            if begun is not None:
                side.epoch, side.broken = begun, False
        return None if side.broken else side.epoch

    async def _cache_rows(self, server: int, epoch: str | None, rows: list[Balance], since: float) -> None:
        """Put rows into Redis that were read after `epoch` was learnt; without success the cache is broken."""
        side = self._sides[server]
        for _ in range(PUT_TRIES):
            if epoch is None:
                break
            now = await self._cache.put(self._servers[server], epoch, rows, since)
            if now == epoch:
                return
            if now is None:
                break
            epoch = side.epoch = now or None
            if epoch is not None:
                since = time.monotonic()
                rows = await self._projections(server, [row.user_id for row in rows])
        side.broken = True

    async def _tell(self, rows: Sequence[Balance]) -> None:
        if self._updates is None:
            return
        records = []
        for row in rows:
            update = BalanceUpdate(row.user_id, row.balance, row.seq, row.updated_at_ms)
            headers: Headers = [("event-id", str(uuid7()).encode()), ("event-type", BALANCE_UPDATED)]
            records.append((BALANCE_TOPIC, str(row.user_id), _encode(update), headers))
        if None in await self._updates.publish(records):
            raise KafkaException(KafkaError(KafkaError._MSG_TIMED_OUT, f"{BALANCE_TOPIC} is not acknowledged"))

    async def report(self, server: int, consumer: Consumer) -> None:
        """Write down once up to when this member's partitions are complete for a server, and tell Redis.

        Raises LedgerError if the server cannot be asked.
        """
        side, name = self._sides[server], self._servers[server]
        if side.vouched_assignments != consumer.assignments:
            # Whoever had these partitions before may have died between the projection and the cache.
            side.vouched_assignments = consumer.assignments
            side.broken = True
        if side.broken and not side.busy.locked():
            async with side.busy:
                await self._epoch(server)
        relay = await self._store.fetchrow(server, "relay_progress")
        assert relay is not None, "the schema makes this row"
        await hit_async("projector.before_report")
        if side.broker_losses != relay["broker_losses"]:
            # Positions that were ahead of a broker that begins anew say nothing about what it holds now.
            await consumer.check_positions()
            side.broker_losses = relay["broker_losses"]
        held = frozenset(relay["held"])
        if side.held - held:
            # A shard has moved away, and its mover may have died before it said so to Redis: what Redis keeps of it is
            # old, and readers that have not heard of the move would believe it.
            side.broken = True
        side.held = held
        if relay["held"] != self._store.routes.shards_of(server):
            # Events of a shard that has moved here may wait in another lane, where they went before that was known.
            side.settling = consumer.positions()
            await self._store.refresh_routes()
        # No await from here to the claims: what is applied, and whether its writes to Redis succeeded, belong together.
        applied = consumer.applied(server)
        if side.settling:
            everywhere = consumer.applied(None)
            if all(everywhere.get(place, upto) >= upto for place, upto in side.settling.items()):
                side.settling = {}
            else:
                applied = everywhere
        epoch = None if side.broken or side.vouched_assignments != consumer.assignments else side.epoch
        complete = claims(msgspec.json.decode(relay["offsets"]), relay["complete_at_ms"], applied)
        text = _encode(complete).decode()
        said = await self._store.fetchrow(
            server, "report_projected", text, "{}" if epoch is None else text, self._partitions
        )
        assert said is not None, "the schema makes this row"
        self._ages[server].set((said["now_ms"] - said["complete_at_ms"]) / 1000)
        if epoch is not None:
            now = await self._cache.vouch(name, epoch, said["cached_at_ms"])
            unchanged = side.epoch == epoch and not side.broken and not side.busy.locked()
            if now is not None and now != epoch and unchanged:
                # Redis lost the epoch, or another member began one, and no write of ours failed meanwhile.
                side.epoch, side.broken = now or None, not now

    async def keep_reporting(self, server: int, consumer: Consumer, stopping: asyncio.Event) -> None:
        """Report again and again until `stopping`; a server that cannot be asked is left to look stale."""
        every_s = self._store.config.progress_every_ms / 1000
        quiet_until = 0.0
        while not stopping.is_set():
            try:
                await self.report(server, consumer)
            except (LedgerError, KafkaException, asyncpg.PostgresError, OSError, TimeoutError) as error:
                if time.monotonic() > quiet_until:
                    quiet_until = time.monotonic() + 10
                    log.warning("how fresh %s is cannot be said: %s", self._servers[server], error)
            waiter = asyncio.ensure_future(stopping.wait())
            await asyncio.wait([waiter], timeout=every_s)
            waiter.cancel()


async def run(config: ServiceConfig, name: str, port: int, stopping: asyncio.Event) -> None:
    """Project until `stopping`."""
    store = Store(config, "ledger_projector")
    cache = Cache(config)
    updates = Publisher(config, f"{name}-updates")
    projector = Projector(store, cache, updates)
    tracing = Tracing(config, name)
    consumer = Consumer(config, GROUP, TOPICS, name, projector.lane_of, tracing=tracing)
    reporting = [
        asyncio.create_task(projector.keep_reporting(index, consumer, stopping), name=f"reports of {server.name}")
        for index, server in enumerate(config.servers)
    ]
    try:
        await run_worker(port, lambda: consumer.run_once(projector.handle), always_ready, stopping, reporting)
    finally:
        for task in reporting:
            task.cancel()
        await asyncio.gather(*reporting, return_exceptions=True)
        await consumer.close()
        updates.close()
        await cache.close()
        await store.close()
        tracing.close()
