"""The one door to Kafka: publish and be told what was acknowledged; consume without losing or skipping.

Consumption is by *lanes*: messages are handled in order within a lane (a lane is a physical server), and each lane
is a task of its own, so that a server that is down or hangs holds up nothing but its lane. An offset is committed
only when every message before it had its effect, so a killed worker repeats messages but never skips one.
"""

import asyncio
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any

import asyncpg
import msgspec
from confluent_kafka import Consumer as KafkaConsumer
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as KafkaMessage
from confluent_kafka import Producer as KafkaProducer
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]
from confluent_kafka.cimpl import NewTopic
from opentelemetry.trace import SpanKind

from reference import metrics
from reference.commands import BALANCE_TOPIC, DLQ_TOPIC, TOPIC_OF
from reference.config import ServiceConfig
from reference.errors import LedgerError, NotPosted
from reference.failpoints import hit, hit_async
from reference.service import Fatal
from reference.tracing import Tracing, is_sampled

log = logging.getLogger("ledgerproof.bus")

Headers = list[tuple[str, str | bytes | None]]
Record = tuple[str, str | bytes | None, bytes, Headers]
"""Topic, key, value, headers."""
Place = tuple[str, int]
"""A partition: topic and number."""

HELD_MAX = 20_000
"""Messages in memory at most, give or take one poll; beyond it the partitions are paused until half is done."""
FETCHED_MAX_KB = 16_384
"""What the client library may fetch ahead, in kilobytes."""
FETCHED_MIN = 10_000
"""Messages that the client library tries to hold ready."""
RETRY_AFTER_S = 0.5
BROKEN_RETRY_AFTER_S = 0.1
POISON_ATTEMPTS = 3
COMMIT_EVERY_S = 0.25
REPORT_EVERY_S = 1.0
DELIVERY_TIMEOUT_MS = 30_000
SESSION_TIMEOUT_MS = 6_000
METADATA_REFRESH_MS = 5_000
"""A topic that was missing is noticed this long after it appears."""
REBALANCE_ANSWER_S = 10.0
KAFKA_QUESTION_S = 5.0
READ_TIMEOUT_S = 120.0
TAIL_BATCH = 2_000
LANES_END_S = 2.0
"""A batch under way gets this long to finish when the process is to stop."""
BALANCE_RETENTION_MS = 3_600_000
"""Balance updates are a stream for those who listen now; what they missed they read from the ledger."""
UNREADABLE_LANE = -2
"""The lane of messages that cannot be read at all; all that happens there is their way to events.dlq."""

_BY_THE_MESSAGE = ("22", "23", "P0")
"""Classes of SQL states that a message's own content can cause: data, integrity, raised by a function of ours.

Everything else a server answers with (no space, no privilege, a time-out, a dead lock, a standby) would be the same
for any other message: the lane waits, and nothing is thrown away.
"""
_BAD_CONTENT = (KeyError, ValueError, TypeError, OverflowError, msgspec.DecodeError)


class Poison(Exception):
    """A message that can never have its effect; it goes to events.dlq with its cause."""

    def __init__(self, message: "Message", cause: str) -> None:
        super().__init__(cause)
        self.message = message
        self.cause = cause


class ConsumerLost(Fatal):
    """The client cannot consume any more, for another process took its name: end this one."""


class Message(msgspec.Struct, frozen=True, eq=False, gc=False):
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
    headers: Sequence[tuple[str, str | bytes | None]] = ()
    """As they came, for events.dlq."""
    unreadable: str | None = None
    """Why it could not be decoded; None if it could."""


def topics() -> list[str]:
    """Return every topic the service uses."""
    return [*sorted(set(TOPIC_OF.values())), BALANCE_TOPIC, DLQ_TOPIC]


_TOPIC_SETTINGS = {
    BALANCE_TOPIC: {"retention.ms": str(BALANCE_RETENTION_MS)},
    # A dead letter waits for people.
    DLQ_TOPIC: {"retention.ms": "-1"},
}


def create_topics(config: ServiceConfig, timeout_s: float = 30.0) -> list[str]:
    """Create the topics that do not exist yet and return those. Raises KafkaException if the broker refuses."""
    admin = AdminClient({"bootstrap.servers": config.kafka_bootstrap})
    wanted = [
        NewTopic(topic, config.partitions_of(topic), config.replication_factor, config=_TOPIC_SETTINGS.get(topic, {}))
        for topic in topics()
    ]
    created = []
    for topic, creation in admin.create_topics(wanted, request_timeout=timeout_s).items():
        try:
            creation.result()
            created.append(topic)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
    return created


class Publisher:
    """Sends records and reports which of them the broker acknowledged (acks=all, idempotent)."""

    def __init__(self, config: ServiceConfig, name: str) -> None:
        self._settings: dict[str, str | int | float | bool] = {
            "bootstrap.servers": config.kafka_bootstrap,
            "client.id": name,
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": 2,
            "delivery.timeout.ms": DELIVERY_TIMEOUT_MS,
            "queue.buffering.max.messages": 200_000,
            "reconnect.backoff.max.ms": 1000,
            "topic.metadata.refresh.interval.ms": METADATA_REFRESH_MS,
        }
        self._producer = KafkaProducer(self._settings)
        self._ended = False
        """The client gave itself up, as it does when a broker comes back that does not know its numbering."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._closing = False
        self.missing_topic = False
        """The last failure was that a topic does not exist; cleared by whoever creates it."""

    async def publish(self, records: Sequence[Record]) -> list[tuple[int, int] | None]:
        """Send records in order; return for each its partition and offset, None if it was not acknowledged.

        Returns after every record was acknowledged or given up (DELIVERY_TIMEOUT_MS).
        """
        if not records:
            return []
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._publish, records)

    def _publish(self, records: Sequence[Record]) -> list[tuple[int, int] | None]:
        places: list[tuple[int, int] | None] = [None] * len(records)
        if self._ended:
            self._producer, self._ended = KafkaProducer(self._settings), False

        def delivered(index: int, error: KafkaError | None, message: KafkaMessage) -> None:
            offset = message.offset()
            if error is None and offset is not None and offset >= 0:
                places[index] = (message.partition() or 0, offset)
            elif error is not None:
                self.missing_topic = self.missing_topic or error.code() in _MISSING_TOPIC
                self._ended = self._ended or error.fatal() or error.code() == KafkaError._FATAL
                metrics.KAFKA_PRODUCE_ERRORS.labels(message.topic()).inc()

        hit("publisher.before_send")
        produce = self._producer.produce
        for index, (topic, key, value, headers) in enumerate(records):
            try:
                produce(topic, value, key, headers=headers, on_delivery=partial(delivered, index))
            except KafkaException as error:
                # Refused at once: the topic is known to be missing, or this client has ended itself.
                self.missing_topic = self.missing_topic or error.args[0].code() in _MISSING_TOPIC
                self._ended = self._ended or error.args[0].code() in (KafkaError._FATAL, KafkaError._STATE)
                metrics.KAFKA_PRODUCE_ERRORS.labels(topic).inc()
        hit("publisher.after_send_before_ack")
        if not self._closing:
            try:
                self._producer.flush(DELIVERY_TIMEOUT_MS / 1000 + 5)
            except SystemError as error:
                # The client ended itself, and its binding called us back with that error still pending: the answers
                # behind it are lost. What has no place counts as not acknowledged and is sent again.
                log.warning("the producer ended itself: %s", error)
                self._ended = True
        return places

    def close(self) -> None:
        """Give up what is not acknowledged and give the thread back; who sent it will send it again."""
        self._closing = True
        self._producer.purge()
        self._thread.shutdown(wait=True)
        self._producer.flush(1)


_MISSING_TOPIC = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
)


@dataclass(slots=True)
class _Partition:
    """Offsets of one assigned partition that were handed out and are not finished yet, by lane."""

    next_offset: int = -1
    """-1 until it is known where the group stands."""
    unfinished: dict[int, set[int]] = field(default_factory=dict)
    committed: int = -1

    def go_back(self, offset: int) -> None:
        """Begin anew at an earlier offset, which is committed like any other."""
        self.next_offset = offset
        self.committed = -1

    def finish(self, lane: int, offset: int) -> None:
        """Strike out a message that had its effect."""
        offsets = self.unfinished.get(lane)
        if offsets is not None:
            offsets.discard(offset)

    def watermark(self) -> int:
        """Return the offset up to which everything had its effect."""
        return min((min(offsets) for offsets in self.unfinished.values() if offsets), default=self.next_offset)

    def watermark_of(self, lane: int) -> int:
        """Return the offset up to which everything of a lane had its effect."""
        waiting = (self.unfinished.get(number) for number in (lane, UNREADABLE_LANE))
        return min((min(offsets) for offsets in waiting if offsets), default=self.next_offset)


@dataclass(slots=True)
class _Lane:
    waiting: deque[Message] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None
    size: int = 0
    """Messages to try together; halved while they fail, so that one bad message is found in few steps."""
    attempts: int = 0
    """Failures of the first message on its own."""


Handle = Callable[[int, list[Message]], Awaitable[None]]


class Consumer:
    """A member of a consumer group that hands out messages by lane and commits behind their effects.

    `name` must be this process's own: it is the member's identity in the group, so that a process that is started
    again takes its partitions back at once, and one that hung while another took its name ends itself.
    """

    def __init__(
        self,
        config: ServiceConfig,
        group: str,
        topics: Sequence[str],
        name: str,
        lane_of: Callable[[Message], int],
        *,
        held_max: int = HELD_MAX,
        tracing: Tracing | None = None,
    ) -> None:
        self.group = group
        self._tracing = tracing
        self.assignments = 0
        """How often partitions were given to this member: what a predecessor left behind is unknown after each."""
        self._batch = config.consumer_batch
        self._held_max = held_max
        self._lane_of = lane_of
        self._lanes: dict[int, _Lane] = defaultdict(_Lane)
        self._partitions: dict[Place, _Partition] = {}
        self._handle: Handle | None = None
        self._finished = 0
        self._paused = False
        self._committed_at = self._reported_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broken: BaseException | None = None
        self._closing = False
        self._consumed = {topic: metrics.KAFKA_CONSUMED.labels(group, topic) for topic in topics}
        self._jobs = metrics.WORKER_JOBS.labels(group)
        self._seconds = metrics.WORKER_SECONDS.labels(group)
        self._errors = metrics.WORKER_ERRORS.labels(group)
        self._dead_letters = Publisher(config, f"{name}-dlq")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"consumer-{group}")
        self._kafka = KafkaConsumer(
            {
                "bootstrap.servers": config.kafka_bootstrap,
                "group.id": group,
                "group.instance.id": name,
                "client.id": name,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "session.timeout.ms": SESSION_TIMEOUT_MS,
                "heartbeat.interval.ms": 1000,
                "max.poll.interval.ms": 300_000,
                "partition.assignment.strategy": "cooperative-sticky",
                # One fetch for many records: a fetch a record costs the broker more than the records do.
                "fetch.min.bytes": 65_536,
                "fetch.wait.max.ms": 50,
                "queued.min.messages": FETCHED_MIN,
                "queued.max.messages.kbytes": FETCHED_MAX_KB,
                "reconnect.backoff.max.ms": 1000,
                "topic.metadata.refresh.interval.ms": METADATA_REFRESH_MS,
            }
        )
        self._topics = list(topics)
        self._kafka.subscribe(self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    # --- rebalances: called by the client library in the consumer's thread, inside poll or close -----------

    def _on_assign(self, _: KafkaConsumer, partitions: list[TopicPartition]) -> None:
        starts = self._starts(partitions)
        self._in_loop(lambda: self._begin(starts))

    def _on_revoke(self, _: KafkaConsumer, partitions: list[TopicPartition]) -> None:
        """Another member repeats what was not finished: forget it here."""
        gone = {(partition.topic, partition.partition) for partition in partitions}
        self._send_commit(self._in_loop(lambda: self._forget(gone)), asynchronous=False)

    def _on_lost(self, _: KafkaConsumer, partitions: list[TopicPartition]) -> None:
        """Forget without a commit: the partitions are somebody else's already."""
        gone = {(partition.topic, partition.partition) for partition in partitions}
        self._in_loop(lambda: self._forget(gone))

    def _in_loop(self, action: Callable[[], Any]) -> Any:
        """Run an action in the event loop, which owns lanes and partitions, and wait for it.

        If it cannot be done, what this member believes to hold is not what it holds: it must not go on.
        """
        assert self._loop is not None, "callbacks come from poll, and run_once has set the loop by then"

        async def act() -> Any:
            return action()

        try:
            return asyncio.run_coroutine_threadsafe(act(), self._loop).result(REBALANCE_ANSWER_S)
        except BaseException as error:
            self._broken = error
            raise

    def _starts(self, partitions: list[TopicPartition]) -> dict[Place, int]:
        """Return where consumption begins, -1 where Kafka does not say."""
        starts: dict[Place, int] = {}
        try:
            for partition in self._kafka.committed(partitions, timeout=KAFKA_QUESTION_S):
                start = partition.offset
                if start < 0:
                    start, _ = self._kafka.get_watermark_offsets(partition, timeout=KAFKA_QUESTION_S)
                starts[partition.topic, partition.partition] = start
        except (KafkaException, TypeError) as error:
            log.warning("%s: where to begin is not known yet: %s", self.group, error)
        return {(p.topic, p.partition): starts.get((p.topic, p.partition), -1) for p in partitions}

    def _begin(self, starts: Mapping[Place, int]) -> None:
        self.assignments += 1
        hit("consumer.after_rebalance")
        metrics.KAFKA_ASSIGNMENTS.labels(self.group).inc()
        for place, start in starts.items():
            self._partitions[place] = _Partition(next_offset=start, committed=start)

    def _forget(self, gone: set[Place]) -> list[TopicPartition]:
        """Drop what is waiting from partitions; return the offsets to commit for them and all others."""
        offsets = self._to_commit()
        for place in gone:
            self._partitions.pop(place, None)
        for lane in self._lanes.values():
            lane.waiting = deque(message for message in lane.waiting if (message.topic, message.partition) not in gone)
        return offsets

    # --- consuming -----------------------------------------------------------------------------------------

    async def run_once(self, handle: Handle, wait_s: float = 0.1) -> int:
        """Poll once, see to it that every lane with messages is at work, and commit behind what they finished.

        `handle(lane, messages)` returns when the effects are committed. A LedgerError from it parks the lane and
        retries it later; `Poison`, or an error that the content of one message causes, sends that message to
        events.dlq. Returns the number of messages finished since the last call. Raises ConsumerLost when this
        member cannot go on.
        """
        self._loop = loop = asyncio.get_running_loop()
        self._handle = handle
        held = sum(len(lane.waiting) for lane in self._lanes.values())
        pause = held >= (self._held_max // 2 if self._paused else self._held_max)
        try:
            polled = await loop.run_in_executor(self._thread, self._poll, wait_s, pause)
        except Exception as error:
            if self._broken is not None:
                raise ConsumerLost(f"{self.group}: a rebalance failed: {self._broken!r}") from error
            raise
        self._admit(polled)
        for number, lane in self._lanes.items():
            if lane.waiting and lane.task is None:
                lane.task = asyncio.create_task(self._work(number, lane), name=f"{self.group} lane {number}")
        now = time.monotonic()
        if now - self._committed_at > COMMIT_EVERY_S:
            self._committed_at = now
            await loop.run_in_executor(self._thread, self._send_commit, self._to_commit())
            await hit_async("consumer.after_commit_before_poll")
        if now - self._reported_at > REPORT_EVERY_S:
            self._reported_at = now
            self._report_lag()
        finished, self._finished = self._finished, 0
        return finished

    def applied(self, lane: int | None) -> dict[Place, int]:
        """Return for each partition of this member the offset up to which everything of a lane had its effect.

        Of every lane if `lane` is None. -1 for a partition whose position is not known yet.
        """
        if lane is None:
            return {place: partition.watermark() for place, partition in self._partitions.items()}
        return {place: partition.watermark_of(lane) for place, partition in self._partitions.items()}

    def positions(self) -> dict[Place, int]:
        """Return for each partition of this member the next offset to come."""
        return {place: partition.next_offset for place, partition in self._partitions.items()}

    async def check_positions(self) -> None:
        """Correct positions beyond the end of their partition: the broker begins anew. Harmless to repeat.

        Raises KafkaException if the broker does not answer.
        """
        loop = asyncio.get_running_loop()

        def ranges() -> dict[Place, tuple[int, int]]:
            return {
                place: self._kafka.get_watermark_offsets(TopicPartition(*place), timeout=KAFKA_QUESTION_S)
                for place in list(self._partitions)
            }

        for place, (low, high) in (await loop.run_in_executor(self._thread, ranges)).items():
            partition = self._partitions.get(place)
            if partition is not None and partition.next_offset > high:
                partition.go_back(low)

    def _poll(self, wait_s: float, pause: bool) -> list[KafkaMessage]:
        if pause or self._paused:
            # Polling goes on, which keeps the membership; partitions that were just assigned are paused as well.
            assigned = self._kafka.assignment()
            (self._kafka.pause if pause else self._kafka.resume)(assigned)
            self._paused = pause
        # `consume` would wait for a whole batch: wait for one message and take what else is there.
        first = self._kafka.poll(wait_s)
        if first is None:
            return []
        return [first, *self._kafka.consume(self._batch - 1, 0)]

    def _admit(self, polled: Iterable[KafkaMessage]) -> None:
        counts: Counter[str] = Counter()
        lane_of, lanes = self._lane_of, self._lanes
        for record in polled:
            error = record.error()
            if error is not None:
                if error.fatal() or error.code() == KafkaError._FATAL:
                    raise ConsumerLost(f"{self.group}: {error.str()}")
                if error.code() not in (KafkaError._PARTITION_EOF, KafkaError.UNKNOWN_TOPIC_OR_PART):
                    log.warning("kafka: %s", error.str())
                continue
            try:
                message = _decode(record)
                number = lane_of(message)
            except _BAD_CONTENT as cause:
                message, number = _unreadable(record, f"not decodable: {cause!r}"), UNREADABLE_LANE
            place = (message.topic, message.partition)
            partition = self._partitions.get(place)
            if partition is None:
                continue  # revoked while it was on its way
            if message.offset < partition.next_offset - 1 and message.offset < partition.committed:
                partition.go_back(message.offset)
            partition.next_offset = message.offset + 1
            partition.unfinished.setdefault(number, set()).add(message.offset)
            counts[message.topic] += 1
            lanes[number].waiting.append(message)
        for topic, count in counts.items():
            self._consumed[topic].inc(count)

    async def _work(self, number: int, lane: _Lane) -> None:
        """Serve a lane until nothing waits in it."""
        try:
            while lane.waiting and not self._closing:
                pause_s = await self._serve(number, lane)
                if pause_s:
                    await asyncio.sleep(pause_s)
        finally:
            lane.task = None

    async def _serve(self, number: int, lane: _Lane) -> float:
        """Try the next messages of a lane; return how long to wait before the next try, in seconds."""
        assert self._handle is not None, "run_once starts the lanes"
        lane.size = lane.size or self._batch
        messages = list(islice(lane.waiting, lane.size))
        started = time.monotonic()
        try:
            if number == UNREADABLE_LANE:
                await self._bury(messages[0], messages[0].unreadable or "")
                self._done(number, lane, messages[:1])
                return 0.0
            await hit_async("consumer.before_effect")
            await self._handle(number, messages)
            await hit_async("consumer.after_effect_before_offset")
        except Poison as poison:
            return await self._poisoned(number, lane, poison.message, poison.cause)
        except KafkaException as error:
            self._errors.inc()
            log.warning("%s: lane %d parked: %s", self.group, number, error)
            return RETRY_AFTER_S
        except Exception as error:
            self._errors.inc()
            if not _may_be_the_message(error):
                # What is not one of ours is a bug or a fault of the machine, and is logged in full.
                log.warning(
                    "%s: lane %d parked: %r", self.group, number, error, exc_info=not isinstance(error, LedgerError)
                )
                return RETRY_AFTER_S
            log.warning("%s: lane %d, %d messages: %r", self.group, number, len(messages), error)
            if len(messages) > 1:
                lane.size = len(messages) // 2
                return 0.0
            lane.attempts += 1
            if lane.attempts <= POISON_ATTEMPTS:
                return BROKEN_RETRY_AFTER_S
            return await self._poisoned(number, lane, messages[0], str(error) or repr(error))
        took_s = time.monotonic() - started
        self._seconds.observe(took_s)
        self._jobs.inc(len(messages))
        self._trace(messages, took_s)
        lane.attempts = 0
        lane.size = min(self._batch, lane.size * 2)
        self._done(number, lane, messages)
        return 0.0

    def _trace(self, messages: Sequence[Message], took_s: float) -> None:
        """Record the batch in the trace of every message in it that has one."""
        if self._tracing is None:
            return
        for message in messages:
            if is_sampled(message.traceparent):
                ended_ns = time.time_ns()
                self._tracing.record(
                    f"{self.group} {message.event_type}",
                    message.traceparent,
                    kind=SpanKind.CONSUMER,
                    started_ns=ended_ns - int(took_s * 1e9),
                    ended_ns=ended_ns,
                    attributes={
                        "messaging.system": "kafka",
                        "messaging.destination.name": message.topic,
                        "messaging.consumer.group.name": self.group,
                        "messaging.batch.message_count": len(messages),
                        "messaging.message.id": message.event_id,
                    },
                )

    async def _poisoned(self, number: int, lane: _Lane, message: Message, cause: str) -> float:
        try:
            await self._bury(message, cause)
        except KafkaException as error:
            log.warning("%s: lane %d parked: %s: %s", self.group, number, DLQ_TOPIC, error)
            return RETRY_AFTER_S
        lane.attempts = 0
        lane.waiting = deque(other for other in lane.waiting if other is not message)
        self._finish(number, message)
        return 0.0

    def _done(self, number: int, lane: _Lane, messages: Sequence[Message]) -> None:
        waiting = lane.waiting
        for message in messages:
            # A rebalance in between may have taken messages of this lane away.
            if waiting and waiting[0] is message:
                waiting.popleft()
            self._finish(number, message)

    def _finish(self, lane: int, message: Message) -> None:
        self._finished += 1
        partition = self._partitions.get((message.topic, message.partition))
        if partition is not None:
            partition.finish(lane, message.offset)

    async def _bury(self, message: Message, cause: str) -> None:
        """Send a message to events.dlq with all it came with. Raises KafkaException if that is not acknowledged."""
        headers: Headers = [
            ("cause", cause[:1000].encode()),
            ("group", self.group.encode()),
            ("origin", f"{message.topic}/{message.partition}/{message.offset}".encode()),
            *message.headers,
        ]
        await hit_async("consumer.before_dead_letter")
        log.error("%s: %s to %s: %s", self.group, message.event_id or "a message", DLQ_TOPIC, cause)
        key = message.key.encode(errors="surrogateescape") or None
        (place,) = await self._dead_letters.publish([(DLQ_TOPIC, key, message.raw, headers)])
        if place is None:
            raise KafkaException(KafkaError(KafkaError._MSG_TIMED_OUT))
        metrics.DEAD_LETTERS.labels(self.group).inc()

    # --- offsets -------------------------------------------------------------------------------------------

    def _to_commit(self) -> list[TopicPartition]:
        offsets = []
        for (topic, number), partition in self._partitions.items():
            watermark = partition.watermark()
            if watermark > partition.committed:
                partition.committed = watermark
                offsets.append(TopicPartition(topic, number, watermark))
        return offsets

    def _send_commit(self, offsets: list[TopicPartition], *, asynchronous: bool = True) -> None:
        """Commit; an offset that is not stored is repeated by whoever comes next, so a failure costs little."""
        if not offsets:
            return
        try:
            if asynchronous:
                self._kafka.commit(offsets=offsets, asynchronous=True)
            else:
                self._kafka.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            log.warning("%s: offsets not committed: %s", self.group, error)

    def _report_lag(self) -> None:
        lag: dict[str, int] = dict.fromkeys(self._topics, 0)
        for (topic, number), partition in self._partitions.items():
            _, high = self._kafka.get_watermark_offsets(TopicPartition(topic, number), cached=True)
            lag[topic] += max(0, high - max(0, partition.watermark())) if high >= 0 else 0
        for topic, value in lag.items():
            metrics.KAFKA_LAG.labels(self.group, topic).set(value)

    async def close(self) -> None:
        """Commit what had its effect and give the client back; a lane that hangs is not waited for long."""
        self._closing = True
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=LANES_END_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        loop = self._loop = asyncio.get_running_loop()
        offsets = self._to_commit()
        await loop.run_in_executor(self._thread, lambda: self._send_commit(offsets, asynchronous=False))
        await loop.run_in_executor(self._thread, self._kafka.close)
        self._thread.shutdown(wait=False)
        self._dead_letters.close()


def end_offsets(config: ServiceConfig, names: Iterable[str], *, first: bool = False) -> dict[Place, int]:
    """Return for each partition of some topics the offset that its next record will get (`first`: its oldest record).

    Raises KafkaException if the broker does not say, as for a topic that does not exist.
    """
    admin = AdminClient({"bootstrap.servers": config.kafka_bootstrap, "log_level": 2})
    spec = OffsetSpec.earliest() if first else OffsetSpec.latest()  # type: ignore[no-untyped-call]
    asked = admin.list_offsets(
        {TopicPartition(topic, number): spec for topic in names for number in range(config.partitions_of(topic))},
        request_timeout=KAFKA_QUESTION_S,
    )
    return {
        (partition.topic, partition.partition): int(answer.result(2 * KAFKA_QUESTION_S).offset)
        for partition, answer in asked.items()
    }


def read_to_end(config: ServiceConfig, topic: str, timeout_s: float = READ_TIMEOUT_S) -> Iterator[KafkaMessage]:
    """Yield every record of a topic up to its present end, in order within each partition.

    Raises KafkaException if the broker does not answer, TimeoutError if the end is not reached in time.
    """
    first, end = end_offsets(config, [topic], first=True), end_offsets(config, [topic])
    left = {place: offset for place, offset in end.items() if offset > first[place]}
    reader = KafkaConsumer(
        {
            "bootstrap.servers": config.kafka_bootstrap,
            "group.id": "ledgerproof-reader",
            "enable.auto.commit": False,
            "queued.max.messages.kbytes": FETCHED_MAX_KB,
            "fetch.wait.max.ms": 20,
            "log_level": 2,
        }
    )
    deadline = time.monotonic() + timeout_s
    try:
        reader.assign([TopicPartition(*place, first[place]) for place in left])
        while left:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{topic} could not be read to its end within {timeout_s:g} s")
            for record in reader.consume(1_000, timeout=0.2):
                error = record.error()
                if error is not None:
                    if error.code() == KafkaError._ALL_BROKERS_DOWN:
                        raise KafkaException(error)
                    continue
                place, offset = (record.topic() or "", record.partition() or 0), record.offset() or 0
                if offset < end[place]:
                    yield record
                if offset + 1 >= end[place]:
                    left.pop(place, None)
    finally:
        reader.close()


class Tail:
    """Reads what is appended to a topic from now on, in no group; one thread at a time."""

    def __init__(self, config: ServiceConfig, topic: str, name: str) -> None:
        """Begin at the present end of every partition. Raises KafkaException if the broker does not answer."""
        ends = end_offsets(config, [topic])
        self._kafka = KafkaConsumer(
            {
                "bootstrap.servers": config.kafka_bootstrap,
                # The library wants a name of a group; none is joined and nothing is committed.
                "group.id": f"{name}-tail",
                "client.id": name,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                # After a topic was made anew its old offsets mean nothing.
                "auto.offset.reset": "earliest",
                "queued.min.messages": FETCHED_MIN,
                "queued.max.messages.kbytes": FETCHED_MAX_KB // 4,
                "fetch.wait.max.ms": 50,
                "reconnect.backoff.max.ms": 1000,
                "topic.metadata.refresh.interval.ms": METADATA_REFRESH_MS,
            }
        )
        self._kafka.assign([TopicPartition(*place, offset) for place, offset in ends.items()])

    def poll(self, wait_s: float) -> list[KafkaMessage]:
        """Return what has come; waits up to `wait_s` for the first record."""
        first = self._kafka.poll(wait_s)
        if first is None:
            return []
        return [record for record in (first, *self._kafka.consume(TAIL_BATCH, 0)) if record.error() is None]

    def close(self) -> None:
        """Give the client back."""
        self._kafka.close()


def _may_be_the_message(error: Exception) -> bool:
    """Return whether the content of a message can be what failed, and not the server or the way to it."""
    if isinstance(error, NotPosted):
        cause = error.__cause__
        if isinstance(cause, asyncpg.PostgresError):
            return str(cause.sqlstate)[:2] in _BY_THE_MESSAGE
        return True
    return isinstance(error, _BAD_CONTENT) and not isinstance(error, OSError)


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else (value or "")


_decode_payload = msgspec.json.Decoder(dict[str, Any]).decode


def _decode(record: KafkaMessage) -> Message:
    headers: Any = record.headers() or ()
    named = dict(headers)
    raw = record.value()
    if not isinstance(raw, bytes):
        raise TypeError("no value")
    traceparent = named.get("traceparent")
    return Message(
        record.topic() or "",
        record.partition() or 0,
        record.offset() or 0,
        _text(record.key()),
        named["event-id"].decode(),
        named["event-type"].decode(),
        traceparent.decode() if traceparent else None,
        int(datetime.fromisoformat(named["timestamp"].decode()).timestamp() * 1000),
        _decode_payload(raw),
        raw,
        headers,
    )


def _unreadable(record: KafkaMessage, why: str) -> Message:
    value: Any = record.value() or b""
    key: Any = record.key() or b""
    headers: Any = record.headers() or ()
    named = dict(headers)
    return Message(
        topic=record.topic() or "",
        partition=record.partition() or 0,
        offset=record.offset() or 0,
        key=key.decode(errors="surrogateescape") if isinstance(key, bytes) else key,
        event_id=(named.get("event-id") or b"").decode(errors="replace"),
        event_type=(named.get("event-type") or b"").decode(errors="replace"),
        traceparent=None,
        committed_at_ms=0,
        payload={},
        raw=value.encode() if isinstance(value, str) else value,
        headers=headers,
        unreadable=why,
    )
