"""What the live auditor reads beside Postgres: records of the topics since it began, and cached balances in turn."""

import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import admin as kafka_admin
from redis import Redis
from redis.exceptions import RedisError

from invariants.live.rows import Record, Told
from ledgerproof.collect import KAFKA_TIMEOUT_S, QUIET, REDIS_PAGE, kafka_client
from reference.cache import KEY_PREFIX
from reference.commands import BALANCE_TOPIC, TOPIC_OF
from reference.config import ServiceConfig

RECORDS_MAX: Final = 20_000
"""Records of one poll; more wait for the next."""
READ_AHEAD_KB: Final = 16_384
CAUGHT_UP_WITHIN_S: Final = 5.0
KEYS_MAX: Final = 10_000
"""Cached balances of one poll."""
KEYS_MIN: Final = 500
REDIS_TIMEOUT_S: Final = 2.0
_AWAY: Final = (KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTO_OFFSET_RESET, KafkaError._TRANSPORT)


class Unseen(Exception):
    """A store does not answer, or not with everything; the message says which and why."""


class _Update(msgspec.Struct):
    user_id: int
    seq: int
    balance: int


class Topics:
    """Reads every topic from its end of the moment of `begin` on. Blocking; used by one thread at a time."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._names = sorted({*TOPIC_OF.values(), BALANCE_TOPIC})
        self._reader: Consumer | None = None
        self._admin: kafka_admin.AdminClient | None = None
        self._lock = threading.Lock()
        self.next: dict[tuple[str, int], int] = {}
        """Where to go on, by topic and partition."""

    def begin(self) -> None:
        """Note where every topic ends now. Raises Unseen."""
        with self._lock:
            self.next = self._ends()
            self._reader = Consumer(
                {
                    "bootstrap.servers": self._config.kafka_bootstrap,
                    "group.id": "ledgerproof-live-audit",
                    "enable.auto.commit": False,
                    "auto.offset.reset": "error",
                    # A look comes about once a second: what the broker gathers until then costs both of us less.
                    "fetch.min.bytes": 65_536,
                    "fetch.wait.max.ms": 400,
                    "queued.max.messages.kbytes": READ_AHEAD_KB,
                    **QUIET,
                }
            )
            self._reader.assign([TopicPartition(*place, offset) for place, offset in self.next.items()])

    def read(self) -> tuple[list[Record], list[Told], bool]:
        """Return the records that have come, the balances of the stream of updates, and whether that was all so far.

        Raises Unseen if the broker is away or has lost what it had.
        """
        with self._lock:
            return self._read(0.0)

    def read_on(self) -> tuple[list[Record], list[Told]]:
        """Return what there is up to the present end of every topic. Raises Unseen if that is not read in time."""
        with self._lock:
            ends = self._ends()
            records: list[Record] = []
            told: list[Told] = []
            deadline = time.monotonic() + CAUGHT_UP_WITHIN_S
            while any(self.next[place] < end for place, end in ends.items()):
                if time.monotonic() > deadline:
                    raise Unseen("Kafka: the topics could not be read to their end in time")
                more, updates, _ = self._read(0.2)
                records += more
                told += updates
            return records, told

    def close(self) -> None:
        """Give up the connection."""
        with self._lock:
            if self._reader is not None:
                self._reader.close()
                self._reader = None

    def _read(self, timeout_s: float) -> tuple[list[Record], list[Told], bool]:
        if self._reader is None:
            raise Unseen("Kafka: not read from yet")
        records: list[Record] = []
        told: list[Told] = []
        try:
            messages = self._reader.consume(RECORDS_MAX, timeout=timeout_s)
        except KafkaException as error:
            raise Unseen(f"Kafka: {error}") from error
        for message in messages:
            trouble = message.error()
            if trouble is not None:
                if trouble.code() in _AWAY:
                    raise Unseen(f"Kafka: {trouble.str()}")
                continue
            self._take(message, records, told)
        return records, told, len(messages) < RECORDS_MAX

    def _take(self, message: Any, records: list[Record], told: list[Told]) -> None:
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        self.next[(topic, partition)] = offset + 1
        value: bytes = message.value() or b""
        if topic == BALANCE_TOPIC:
            try:
                update = _decode_update(value)
            except msgspec.DecodeError:
                update = _Update(0, -1, 0)  # No ledger has that: it is reported as what it is.
            told.append(Told(update.user_id, update.seq, update.balance))
            return
        event_id = next((text for name, text in message.headers() or () if name == "event-id"), b"")
        key: bytes = message.key() or b""
        records.append(
            Record(
                topic,
                partition,
                offset,
                event_id.decode(),
                key.decode(errors="replace"),
                value.decode(errors="replace"),
            )
        )

    def _ends(self) -> dict[tuple[str, int], int]:
        places = [(name, number) for name in self._names for number in range(self._config.partitions_of(name))]
        try:
            if self._admin is None:
                self._admin = kafka_client(self._config)
            asked = self._admin.list_offsets(
                {TopicPartition(*place): kafka_admin.OffsetSpec.latest() for place in places},  # type: ignore[attr-defined, no-untyped-call]
                request_timeout=KAFKA_TIMEOUT_S,
            )
            return {
                (place.topic, place.partition): int(answer.result(KAFKA_TIMEOUT_S).offset)
                for place, answer in asked.items()
            }
        except (KafkaException, TimeoutError) as error:
            raise Unseen(f"Kafka: the ends of the topics cannot be read: {error}") from error


_decode_update = msgspec.json.Decoder(_Update).decode


class Cached:
    """Reads the cached balances, some at a time, all of them once a round. Blocking; used by one thread at a time."""

    def __init__(self, config: ServiceConfig, round_polls: int) -> None:
        self._redis = Redis(
            host=config.redis_host,
            port=config.redis_port,
            password=config.redis_password,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            decode_responses=True,
        )
        self._round_polls = round_polls
        self._cursor = 0
        self._began_s = time.monotonic()
        self.lasted_s = 0.0
        """Length of the last whole round."""
        self.rounds = 0
        self.malformed: list[str] = []
        """Values that are no balance, since the caller last took them away."""

    def read(self) -> list[Told]:
        """Return the next cached balances. Raises Unseen."""
        try:
            wanted = min(KEYS_MAX, max(KEYS_MIN, -(-int(self._redis.dbsize()) // self._round_polls)))
            told: list[Told] = []
            for keys in self._pages(wanted):
                for key, value in zip(keys, self._redis.mget(keys), strict=True):
                    if value is not None:
                        self._take(key, str(value), told)
        except (RedisError, OSError) as error:
            raise Unseen(f"Redis: {error}") from error
        return told

    def _pages(self, wanted: int) -> Iterator[list[str]]:
        seen = 0
        while seen < wanted:
            self._cursor, keys = self._redis.scan(self._cursor, match=f"{KEY_PREFIX}*", count=REDIS_PAGE)
            seen += REDIS_PAGE
            if keys:
                yield [str(key) for key in keys]
            if self._cursor == 0:
                now_s = time.monotonic()
                self.lasted_s, self._began_s = now_s - self._began_s, now_s
                self.rounds += 1
                return

    def _take(self, key: str, value: str, told: list[Told]) -> None:
        try:
            seq, balance, *_ = value.split(" ")
            told.append(Told(int(key[len(KEY_PREFIX) :]), int(seq), int(balance)))
        except ValueError:
            self.malformed.append(f"{key}: {value}"[:200])

    def close(self) -> None:
        """Give up the connection."""
        self._redis.close()
