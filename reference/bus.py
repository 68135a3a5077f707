"""The one door to Kafka: publish and be told what was acknowledged; consume without losing or skipping.

Consumption is by *lanes*: messages are handled in order within a lane (a lane is a physical server), and a lane
whose server is down is parked while the others go on. An offset is committed only when every message before it
had its effect, so a killed worker repeats messages but never skips one.
"""

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec
from confluent_kafka import Consumer as KafkaConsumer
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as KafkaMessage
from confluent_kafka import Producer as KafkaProducer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from reference import metrics
from reference.commands import DLQ_TOPIC, TOPIC_OF
from reference.config import ServiceConfig
from reference.errors import LedgerError, NotPosted

log = logging.getLogger("ledgerproof.bus")

Headers = list[tuple[str, str | bytes | None]]

PARKED_MAX = 20_000
"""Messages parked for down servers at most; beyond it consumption of new ones waits."""
RETRY_AFTER_S = 0.5
POISON_ATTEMPTS = 3
COMMIT_EVERY_S = 0.25
DELIVERY_TIMEOUT_MS = 30_000
SESSION_TIMEOUT_MS = 6_000


class Poison(Exception):
    """A message that can never have its effect; it goes to events.dlq with its cause."""

    def __init__(self, message: "Message", cause: str) -> None:
        super().__init__(cause)
        self.message = message
        self.cause = cause


@dataclass(slots=True, frozen=True)
class Message:
    """One event as consumed."""

    topic: str
    partition: int
    offset: int
    key: str
    event_id: str
    event_type: str
    traceparent: str | None
    committed_at_ms: int
    """When the event's row was written, Unix milliseconds by the database's clock."""
    payload: dict[str, Any]
    raw: bytes


def topics() -> list[str]:
    """Return every topic the service uses."""
    return [*sorted(set(TOPIC_OF.values())), DLQ_TOPIC]


def create_topics(config: ServiceConfig, timeout_s: float = 30.0) -> None:
    """Create the topics that do not exist yet. Raises KafkaException if the broker refuses."""
    admin = AdminClient({"bootstrap.servers": config.kafka_bootstrap})
    wanted = [NewTopic(topic, config.partitions_of(topic), config.replication_factor) for topic in topics()]
    for creation in admin.create_topics(wanted, request_timeout=timeout_s).values():
        try:
            creation.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise


class Publisher:
    """Sends records and reports which of them the broker acknowledged (acks=all, idempotent)."""

    def __init__(self, config: ServiceConfig, name: str) -> None:
        self._producer = KafkaProducer(
            {
                "bootstrap.servers": config.kafka_bootstrap,
                "client.id": name,
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": 2,
                "delivery.timeout.ms": DELIVERY_TIMEOUT_MS,
                "queue.buffering.max.messages": 200_000,
                "reconnect.backoff.max.ms": 1000,
            }
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")

    async def publish(self, records: Sequence[tuple[str, str, bytes, Headers]]) -> list[bool]:
        """Send (topic, key, value, headers) records in order; return for each whether it was acknowledged.

        Returns after every record was acknowledged or given up (DELIVERY_TIMEOUT_MS).
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._publish, records)

    def _publish(self, records: Sequence[tuple[str, str, bytes, Headers]]) -> list[bool]:
        acknowledged = [False] * len(records)

        def delivered(index: int) -> Callable[[KafkaError | None, KafkaMessage], None]:
            def callback(error: KafkaError | None, message: KafkaMessage) -> None:
                if error is None:
                    acknowledged[index] = True
                else:
                    metrics.KAFKA_PRODUCE_ERRORS.labels(message.topic()).inc()

            return callback

        for index, (topic, key, value, headers) in enumerate(records):
            self._producer.produce(topic, value, key, headers=headers, on_delivery=delivered(index))
        self._producer.flush(DELIVERY_TIMEOUT_MS / 1000 + 5)
        return acknowledged

    def close(self) -> None:
        """Wait briefly for what is under way and give the thread back."""
        self._producer.flush(2)
        self._thread.shutdown(wait=True)


@dataclass(slots=True)
class _Partition:
    """Offsets of one assigned partition that were handed out and are not finished yet."""

    next_offset: int = -1
    unfinished: set[int] = field(default_factory=set)
    committed: int = -1

    def watermark(self) -> int:
        """Return the offset up to which everything had its effect."""
        return min(self.unfinished) if self.unfinished else self.next_offset


@dataclass(slots=True)
class _Lane:
    waiting: deque[Message] = field(default_factory=deque)
    retry_at: float = 0.0
    size: int = 0
    """Messages to try together; halved while they fail, so that one bad message is found in few steps."""
    attempts: int = 0
    """Failures of the first message on its own."""


class Consumer:
    """A member of a consumer group that hands out messages by lane and commits behind their effects."""

    def __init__(
        self,
        config: ServiceConfig,
        group: str,
        topics: Sequence[str],
        name: str,
        lane_of: Callable[[Message], int],
    ) -> None:
        self.group = group
        self._batch = config.consumer_batch
        self._lane_of = lane_of
        self._lanes: dict[int, _Lane] = defaultdict(_Lane)
        self._partitions: dict[tuple[str, int], _Partition] = {}
        self._committed_at = 0.0
        self._dead_letters = Publisher(config, f"{name}-dlq")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"consumer-{group}")
        self._kafka = KafkaConsumer(
            {
                "bootstrap.servers": config.kafka_bootstrap,
                "group.id": group,
                "client.id": name,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "session.timeout.ms": SESSION_TIMEOUT_MS,
                "heartbeat.interval.ms": 1000,
                "max.poll.interval.ms": 300_000,
                "partition.assignment.strategy": "cooperative-sticky",
                # One fetch for many records: a fetch a record costs the broker more than the records do.
                "fetch.min.bytes": 16_384,
                "fetch.wait.max.ms": 50,
                "reconnect.backoff.max.ms": 1000,
            }
        )
        self._kafka.subscribe(list(topics), on_revoke=self._on_revoke, on_lost=self._on_revoke)

    def _on_revoke(self, _: KafkaConsumer, partitions: list[TopicPartition]) -> None:
        """Another member repeats what was not finished: forget it here."""
        self._commit(asynchronous=False)
        gone = {(partition.topic, partition.partition) for partition in partitions}
        for key in gone:
            self._partitions.pop(key, None)
        for lane in self._lanes.values():
            lane.waiting = deque(message for message in lane.waiting if (message.topic, message.partition) not in gone)

    async def run_once(self, handle: Callable[[int, list[Message]], Awaitable[None]], wait_s: float = 0.1) -> int:
        """Consume once: hand each lane its messages in order, commit behind what succeeded.

        `handle(lane, messages)` returns when the effects are committed. A LedgerError from it parks the lane and
        retries it later; `Poison` sends one message to events.dlq. Returns the number of messages finished.
        """
        loop = asyncio.get_running_loop()
        parked = sum(len(lane.waiting) for lane in self._lanes.values())
        if parked < PARKED_MAX:
            polled = await loop.run_in_executor(
                self._thread, self._kafka.consume, self._batch, 0.0 if self._due() else wait_s
            )
            await self._admit(polled)
        else:
            await asyncio.sleep(wait_s)
        due = self._due()
        finished = sum(await asyncio.gather(*(self._serve(number, lane, handle) for number, lane in due)))
        if time.monotonic() - self._committed_at > COMMIT_EVERY_S:
            await loop.run_in_executor(self._thread, self._commit)
            self._report_lag()
        return finished

    def _due(self) -> list[tuple[int, _Lane]]:
        now = time.monotonic()
        return [(number, lane) for number, lane in self._lanes.items() if lane.waiting and lane.retry_at <= now]

    async def _admit(self, polled: Sequence[KafkaMessage]) -> None:
        for record in polled:
            error = record.error()
            if error is not None:
                if error.code() not in (KafkaError._PARTITION_EOF, KafkaError.UNKNOWN_TOPIC_OR_PART):
                    log.warning("kafka: %s", error.str())
                continue
            topic, number, offset = record.topic(), record.partition(), record.offset()
            if topic is None or number is None or offset is None:
                continue
            partition = self._partitions.setdefault((topic, number), _Partition())
            partition.next_offset = offset + 1
            partition.unfinished.add(offset)
            metrics.KAFKA_CONSUMED.labels(self.group, topic).inc()
            try:
                message = _decode(record)
                lane = self._lane_of(message)
            except (msgspec.DecodeError, KeyError, ValueError, TypeError) as cause:
                await self._bury(_undecodable(record), f"not decodable: {cause!r}")
                continue
            self._lanes[lane].waiting.append(message)

    async def _serve(self, number: int, lane: _Lane, handle: Callable[[int, list[Message]], Awaitable[None]]) -> int:
        lane.size = lane.size or self._batch
        messages = [lane.waiting[index] for index in range(min(lane.size, len(lane.waiting)))]
        started = time.monotonic()
        try:
            await handle(number, messages)
        except Poison as poison:
            await self._bury(poison.message, poison.cause)
            lane.waiting.remove(poison.message)
            return 1
        except NotPosted as error:
            # The database answered with an error: it may be this message's fault.
            metrics.WORKER_ERRORS.labels(self.group).inc()
            if len(messages) > 1:
                lane.size = len(messages) // 2
            else:
                lane.attempts += 1
                if lane.attempts > POISON_ATTEMPTS:
                    await self._bury(messages[0], str(error))
                    lane.waiting.popleft()
                    lane.attempts = 0
                    return 1
            lane.retry_at = time.monotonic() + RETRY_AFTER_S / 5
            log.warning("%s: lane %d: %s", self.group, number, error)
            return 0
        except LedgerError as error:
            metrics.WORKER_ERRORS.labels(self.group).inc()
            lane.retry_at = time.monotonic() + RETRY_AFTER_S
            log.warning("%s: lane %d parked: %s", self.group, number, error)
            return 0
        metrics.WORKER_SECONDS.labels(self.group).observe(time.monotonic() - started)
        metrics.WORKER_JOBS.labels(self.group).inc(len(messages))
        lane.attempts = 0
        lane.size = min(self._batch, lane.size * 2)
        for message in messages:
            # A rebalance in between may have taken messages of this lane away.
            if lane.waiting and lane.waiting[0] is message:
                lane.waiting.popleft()
            self._finish(message)
        return len(messages)

    def _finish(self, message: Message) -> None:
        partition = self._partitions.get((message.topic, message.partition))
        if partition is not None:
            partition.unfinished.discard(message.offset)

    async def _bury(self, message: Message, cause: str) -> None:
        headers: Headers = [
            ("event-id", message.event_id.encode()),
            ("event-type", message.event_type.encode()),
            ("cause", cause[:1000].encode()),
            ("group", self.group.encode()),
            ("origin", f"{message.topic}/{message.partition}/{message.offset}".encode()),
        ]
        log.error("%s: %s to %s: %s", self.group, message.event_id, DLQ_TOPIC, cause)
        (acknowledged,) = await self._dead_letters.publish([(DLQ_TOPIC, message.key, message.raw, headers)])
        if not acknowledged:
            raise KafkaException(KafkaError(KafkaError._MSG_TIMED_OUT))
        metrics.DEAD_LETTERS.labels(self.group).inc()
        self._finish(message)

    def _commit(self, *, asynchronous: bool = True) -> None:
        self._committed_at = time.monotonic()
        offsets = []
        for (topic, number), partition in self._partitions.items():
            watermark = partition.watermark()
            if watermark > partition.committed:
                partition.committed = watermark
                offsets.append(TopicPartition(topic, number, watermark))
        if offsets:
            try:
                if asynchronous:
                    self._kafka.commit(offsets=offsets, asynchronous=True)
                else:
                    self._kafka.commit(offsets=offsets, asynchronous=False)
            except KafkaException as error:
                log.warning("%s: offsets not committed: %s", self.group, error)
                for offset in offsets:
                    self._partitions[(offset.topic, offset.partition)].committed = -1

    def _report_lag(self) -> None:
        lag: dict[str, int] = defaultdict(int)
        for (topic, number), partition in self._partitions.items():
            _, high = self._kafka.get_watermark_offsets(TopicPartition(topic, number), cached=True)
            lag[topic] += max(0, high - partition.watermark()) if high >= 0 else 0
        for topic, value in lag.items():
            metrics.KAFKA_LAG.labels(self.group, topic).set(value)

    async def close(self) -> None:
        """Commit what had its effect and leave the group."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, lambda: self._commit(asynchronous=False))
        await loop.run_in_executor(self._thread, self._kafka.close)
        self._thread.shutdown(wait=False)
        self._dead_letters.close()


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else (value or "")


def _decode(record: KafkaMessage) -> Message:
    headers = dict(record.headers() or [])
    value = record.value() or b""
    raw = value.encode() if isinstance(value, str) else value
    return Message(
        topic=record.topic() or "",
        partition=record.partition() or 0,
        offset=record.offset() or 0,
        key=_text(record.key()),
        event_id=_text(headers["event-id"]),
        event_type=_text(headers["event-type"]),
        traceparent=_text(headers.get("traceparent")) or None,
        committed_at_ms=int(datetime.fromisoformat(_text(headers["timestamp"])).timestamp() * 1000),
        payload=msgspec.json.decode(raw, type=dict[str, Any]),
        raw=raw,
    )


def _undecodable(record: KafkaMessage) -> Message:
    value = record.value() or b""
    return Message(
        topic=record.topic() or "",
        partition=record.partition() or 0,
        offset=record.offset() or 0,
        key=_text(record.key()),
        event_id="",
        event_type="",
        traceparent=None,
        committed_at_ms=0,
        payload={},
        raw=value.encode() if isinstance(value, str) else value,
    )
