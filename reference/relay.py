"""The event dispatcher: moves committed outbox rows to Kafka, in commit order per wallet, at least once.

Rows are found by their flag, never by a cursor: a transaction that commits late is found late, not skipped. Rows
of one wallet were numbered under its lock, so their order of id is their order of commit. A row is marked only
after the broker acknowledged it.

While one batch is on its way to the broker, the one before it is marked and the one behind it is read. With the
marks the relay writes down how far it is: before which moment everything that was committed is in Kafka, and at
which offsets. From that the projector knows how old its read model is (decision 0014).
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
import msgspec
from confluent_kafka import KafkaException
from opentelemetry.trace import SpanKind

from reference import metrics
from reference.bus import Headers, Publisher, Record, create_topics, end_offsets
from reference.commands import TOPIC_OF
from reference.config import ServiceConfig
from reference.errors import LedgerError
from reference.failpoints import hit_async
from reference.service import STOP_WITHIN_S, always_ready, run_worker
from reference.store import DRIVER_ERRORS, LEADER_CLASS, Store
from reference.tracing import Tracing, is_sampled

log = logging.getLogger("ledgerproof.relay")

RELAY_LEADER = 1
RETRY_AFTER_S = 0.5
BROKER_CHECK_EVERY_S = 10.0
BACKLOG_COUNTED_MAX = 100_000
BACKLOG_EVERY_BATCHES = 20
"""A backlog is counted once in so many full batches: counting reads all of it."""

Offsets = dict[str, dict[str, int]]
"""By topic and partition number (as text, for it is stored as JSON) the newest acknowledged offset."""


@dataclass(slots=True)
class Batch:
    """Rows on their way, and what may be said once all of them are in Kafka."""

    rows: Sequence[asyncpg.Record]
    read_at_ms: int
    """A moment before the rows were read, by the database's clock."""
    whole: bool
    """There was nothing else to publish."""

    @property
    def ids(self) -> list[int]:
        """Return the outbox ids of the rows."""
        return [row["id"] for row in self.rows]


class Relay:
    """Publishes the outbox of one server while it holds that server's leader lock."""

    def __init__(self, store: Store, publisher: Publisher, server: int, tracing: Tracing | None = None) -> None:
        self._store = store
        self._tracing = tracing
        self._publisher = publisher
        self._name = store.config.servers[server].name
        self._server = server
        self._batch = store.config.relay_batch
        self._timeout = store.config.statement_timeout_ms / 1000 + 1
        self._connection: asyncpg.Connection | None = None
        self._clock_ms = 0
        self._sending: tuple[Batch, asyncio.Task[list[tuple[int, int] | None]]] | None = None
        self._complete_at_ms = 0
        self._checkpoint: tuple[int, int] | None = None
        """While there is more than a batch: a moment, and the newest id that was unpublished then."""
        self._offsets: Offsets = {}
        self._losses = 0
        self._lost = False
        """The newest loss is not written down yet."""
        self._checked_at = 0.0
        self._full_batches = 0
        self._unpublished = metrics.OUTBOX_UNPUBLISHED.labels(self._name)
        self._published = metrics.EVENTS_PUBLISHED.labels(self._name)

    async def run(self, stopping: asyncio.Event) -> None:
        """Relay until `stopping`; a broken connection or broker is retried for ever."""
        config = self._store.config
        try:
            while not stopping.is_set():
                try:
                    moved = await self.run_once()
                except (
                    LedgerError,
                    KafkaException,
                    *DRIVER_ERRORS,
                ) as error:
                    log.warning("relay of %s: %s", self._name, error)
                    await self._drop()
                    await _pause(stopping, RETRY_AFTER_S)
                    continue
                if self._sending is not None:
                    continue
                # Where something came, more is coming: gather a little of it instead of moving it one by one.
                await _pause(stopping, (config.relay_gather_ms if moved else config.relay_poll_ms) / 1000)
        finally:
            await self._drop()

    async def run_once(self) -> int:
        """Mark and read one batch while another is sent. Returns how many rows were marked."""
        connection = await self._lead()
        if connection is None:
            return 0
        if self._sending is None:
            await self._check_broker()
            first = await self._read(connection, [])
            if not first.rows:
                self._report(0)
                await self._advance(connection, [], first)
                return 0
            await hit_async("relay.after_read_before_send")
            self._send(first)
        assert self._sending is not None
        batch, sent = self._sending
        behind = None if batch.whole else await self._read(connection, batch.ids)
        places = await sent
        self._sending = None
        marked = publishable(batch.rows, places)
        everything = len(marked) == len(batch.rows)
        if everything and behind is not None and behind.rows:
            self._send(behind)
        elif not everything:
            await self._unacknowledged(len(batch.rows) - len(marked))
        await hit_async("relay.after_send_before_mark")
        self._note(batch.rows, places)
        self._trace(batch.rows, places)
        await self._advance(connection, marked, batch if everything else None)
        self._published.inc(len(marked))
        await hit_async("relay.after_mark_before_next")
        if behind is None or not behind.rows:
            self._report(len(batch.rows) - len(marked))
        return len(marked)

    def _send(self, batch: Batch) -> None:
        """Hand a batch to the broker; only after the one before it was acknowledged, or wallets lose their order."""
        records = [record_of(row) for row in batch.rows]
        self._sending = batch, asyncio.create_task(self._publisher.publish(records))

    async def _read(self, connection: asyncpg.Connection, on_their_way: list[int]) -> Batch:
        """Read the oldest unpublished rows but those on their way."""
        sql = self._store.sql
        # The clock was read by a statement before this one, so all that was committed by then is seen here.
        read_at_ms = self._clock_ms
        rows = await connection.fetch(sql["unpublished"], self._batch, on_their_way, timeout=self._timeout)
        whole = len(rows) < self._batch
        if not whole:
            if self._checkpoint is None:
                newest = await connection.fetchval(sql["newest_unpublished"], timeout=self._timeout)
                self._checkpoint = (read_at_ms, newest or 0)
            if self._full_batches % BACKLOG_EVERY_BATCHES == 0:
                count = await connection.fetchval(sql["count_unpublished"], BACKLOG_COUNTED_MAX, timeout=self._timeout)
                self._report(count)
            self._full_batches += 1
        return Batch(rows, read_at_ms, whole)

    async def _advance(self, connection: asyncpg.Connection, marked: list[int], done: Batch | None) -> None:
        """Mark rows and write down how far the relay is; `done` is a batch that is in Kafka as a whole."""
        if done is not None and done.whole:
            self._complete_at_ms = max(self._complete_at_ms, done.read_at_ms)
            self._checkpoint = None
            self._full_batches = 0
        elif done is not None and self._checkpoint is not None and done.rows[-1]["id"] >= self._checkpoint[1]:
            self._complete_at_ms = max(self._complete_at_ms, self._checkpoint[0])
            self._checkpoint = None
        self._clock_ms = await connection.fetchval(
            self._store.sql["advance_relay"],
            marked,
            self._complete_at_ms,
            msgspec.json.encode(self._offsets).decode() if marked or self._lost else None,
            self._losses,
            timeout=self._timeout,
        )
        self._lost = False

    def _note(self, rows: Sequence[asyncpg.Record], places: Sequence[tuple[int, int] | None]) -> None:
        """Remember where the newest records are; a broker that numbers backwards has lost what it had."""
        for row, place in zip(rows, places, strict=True):
            if place is None:
                continue
            topic, number = TOPIC_OF[row["event_type"]], str(place[0])
            offsets = self._offsets.setdefault(topic, {})
            if place[1] <= offsets.get(number, -1):
                self._broker_lost(topic, number, offsets[number], place[1])
                offsets = self._offsets.setdefault(topic, {})
            offsets[number] = place[1]

    def _trace(self, rows: Sequence[asyncpg.Record], places: Sequence[tuple[int, int] | None]) -> None:
        """Record the time that traced events spent in the outbox, from their commit to the acknowledgement."""
        if self._tracing is None:
            return
        for row, place in zip(rows, places, strict=True):
            if place is not None and is_sampled(row["traceparent"]):
                topic = TOPIC_OF[row["event_type"]]
                self._tracing.record(
                    f"outbox {row['event_type']}",
                    row["traceparent"],
                    kind=SpanKind.PRODUCER,
                    started_ns=int(row["created_at"].timestamp() * 1e9),
                    ended_ns=time.time_ns(),
                    attributes={
                        "messaging.system": "kafka",
                        "messaging.destination.name": topic,
                        "messaging.destination.partition.id": str(place[0]),
                        "messaging.kafka.offset": place[1],
                        "messaging.message.id": row["event_id"],
                    },
                )

    def _broker_lost(self, topic: str, number: str, known: int, now: int) -> None:
        """Say that events are gone, and forget where any of them were."""
        self._losses += 1
        self._lost = True
        self._offsets = {}
        metrics.KAFKA_REGRESSIONS.labels(topic).inc()
        log.critical(
            "%s[%s] went back from offset %d to %d: the broker lost events that it had acknowledged. Run"
            " `ledgerproof events replay --from` with a time before the loss",
            topic,
            number,
            known,
            now,
        )

    async def _check_broker(self) -> None:
        """Compare what the broker has with what it acknowledged, once in a while: an idle relay would not notice."""
        if time.monotonic() - self._checked_at < BROKER_CHECK_EVERY_S or not self._offsets:
            return
        self._checked_at = time.monotonic()
        try:
            ends = await asyncio.to_thread(end_offsets, self._store.config, list(self._offsets))
        except KafkaException as error:
            self._publisher.missing_topic = True
            log.warning("relay of %s: what the broker holds is not known: %s", self._name, error)
            await self._create_topics()
            return
        for (topic, number), end in ends.items():
            known = self._offsets.get(topic, {}).get(str(number), -1)
            if end <= known:
                self._broker_lost(topic, str(number), known, end)
                return

    async def _unacknowledged(self, count: int) -> None:
        log.warning("relay of %s: %d events not acknowledged; they are sent again", self._name, count)
        await self._create_topics()
        await asyncio.sleep(RETRY_AFTER_S)

    async def _create_topics(self) -> None:
        """Create topics that were found missing: an outbox that cannot be emptied would only grow."""
        if not self._publisher.missing_topic:
            return
        try:
            created = await asyncio.to_thread(create_topics, self._store.config)
        except KafkaException as error:
            log.warning("relay of %s: topics cannot be created: %s", self._name, error)
            return
        self._publisher.missing_topic = False
        if created:
            log.critical("Kafka lacked topics that were there before; created %s", ", ".join(created))

    def _report(self, backlog: int) -> None:
        self._unpublished.set(backlog)

    async def _lead(self) -> asyncpg.Connection | None:
        """Return a connection that holds the leader lock, or None while another relay holds it."""
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        sql = self._store.sql
        connection = await self._store.connect(self._server)
        try:
            if not await connection.fetchval(sql["lead"], LEADER_CLASS, RELAY_LEADER, timeout=self._timeout):
                await connection.close(timeout=self._timeout)
                return None
            await hit_async("relay.after_lead_before_progress")
            # A mark that a crash of the server takes back only makes the relay send an event again.
            await connection.execute("SET synchronous_commit = off", timeout=self._timeout)
            row = await connection.fetchrow(sql["relay_progress"], timeout=self._timeout)
            assert row is not None, "the schema makes this row"
            self._complete_at_ms, self._offsets = row["complete_at_ms"], msgspec.json.decode(row["offsets"])
            self._losses = row["broker_losses"]
            self._clock_ms, self._checkpoint = row["now_ms"], None
        except BaseException:
            connection.terminate()
            raise
        log.info("leading the relay of %s", self._name)
        self._connection = connection
        return connection

    async def _drop(self) -> None:
        """Give up the connection; what is on its way is waited for, so that nothing overtakes it later."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
        if self._sending is not None:
            _, sent = self._sending
            self._sending = None
            await asyncio.wait([sent], timeout=STOP_WITHIN_S)


def record_of(row: asyncpg.Record) -> Record:
    """Return the Kafka record of an outbox row."""
    headers: Headers = [
        ("event-id", row["event_id"].encode()),
        ("event-type", row["event_type"].encode()),
        ("timestamp", row["created_at"].isoformat().encode()),
    ]
    if row["traceparent"]:
        headers.append(("traceparent", row["traceparent"].encode()))
    return TOPIC_OF[row["event_type"]], row["partition_key"], row["payload"].encode(), headers


def publishable(rows: Sequence[asyncpg.Record], places: Sequence[tuple[int, int] | None]) -> list[int]:
    """Return the ids to mark: acknowledged rows, but none behind an unacknowledged row of the same key.

    The row behind is sent again after the one it must follow.
    """
    held: set[str] = set()
    marked = []
    for row, place in zip(rows, places, strict=True):
        if place is None:
            held.add(row["partition_key"])
        elif row["partition_key"] not in held:
            marked.append(row["id"])
    return marked


async def _pause(stopping: asyncio.Event, seconds: float) -> None:
    waiter = asyncio.ensure_future(stopping.wait())
    await asyncio.wait([waiter], timeout=seconds)
    waiter.cancel()


async def run(config: ServiceConfig, name: str, port: int, stopping: asyncio.Event) -> None:
    """Relay every server's outbox, each on its own so that one dead server holds up no other."""
    store = Store(config, "ledger_relay")
    publishers = [Publisher(config, f"{name}-{server.name}") for server in config.servers]
    tracing = Tracing(config, name)
    relays = [Relay(store, publisher, index, tracing) for index, publisher in enumerate(publishers)]

    # One that dies takes the process with it: a relay nobody misses would leave its server's events lying.
    running = [
        asyncio.create_task(relay.run(stopping), name=f"relay of {server.name}")
        for relay, server in zip(relays, config.servers, strict=True)
    ]
    try:
        await run_worker(port, stopping.wait, always_ready, stopping, running)
    finally:
        await asyncio.wait(running, timeout=STOP_WITHIN_S)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for publisher in publishers:
            publisher.close()
        await store.close()
        tracing.close()
