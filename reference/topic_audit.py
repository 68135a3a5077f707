"""Compares the outbox with the topics, both ways, in memory that does not grow with either.

The records of the topics are put into a table on disk first; every event then takes its own record out. What an
event does not find there is missing from its topic, and what no event took out is something no ledger wrote.
"""

import hashlib
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from confluent_kafka import Consumer as KafkaConsumer
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka import admin as kafka_admin

from reference.commands import TOPIC_OF, EventType
from reference.config import ServiceConfig

TOPICS = tuple(
    sorted(
        {
            TOPIC_OF[event]
            for event in (
                EventType.BET_CREATED,
                EventType.BET_MATCHED,
                EventType.BET_CANCELLED,
                EventType.MATCH_SETTLED,
                EventType.ENTRY_POSTED,
            )
        }
    )
)
"""Topics whose every record is an event of an outbox."""
KAFKA_TIMEOUT_S = 10.0
READ_BATCH = 5_000
READ_AHEAD_KB = 4_096
STALLED_S = 20.0
"""Reading gives up when nothing has come for this long although there is more."""
SQLITE_CACHE_KB = 16_384

Partition = tuple[str, int]


class TopicsUnreadable(Exception):
    """Kafka does not answer, or not with everything: nothing can be said of the topics."""


class Known(NamedTuple):
    """An event of an outbox: where it must be, and the digest of what must be there."""

    event_id: str
    topic: str
    key: str
    digest: str
    published: bool
    judged: bool
    """Whether its absence counts: its record may be older than what was read."""


class Record(NamedTuple):
    """A record of a topic that is not as it should be; `partition` is -1 if it is not there."""

    event_id: str
    topic: str
    partition: int
    offset: int
    key: str
    digest: str


class Offsets:
    """Asks the broker for ends, beginnings and offsets by time, all partitions at once."""

    def __init__(self, config: ServiceConfig) -> None:
        self._admin = kafka_admin.AdminClient({"bootstrap.servers": config.kafka_bootstrap, "log_level": 2})
        self._partitions = [(topic, number) for topic in TOPICS for number in range(config.partitions_of(topic))]

    def ends(self) -> dict[Partition, int]:
        """Return the offset after the newest record of each partition. Raises TopicsUnreadable."""
        return self._list(kafka_admin.OffsetSpec.latest())  # type: ignore[attr-defined, no-untyped-call]

    def beginnings(self) -> dict[Partition, int]:
        """Return the offset of the oldest record that each partition still has. Raises TopicsUnreadable."""
        return self._list(kafka_admin.OffsetSpec.earliest())  # type: ignore[attr-defined, no-untyped-call]

    def since(self, unix_s: float) -> dict[Partition, int]:
        """Return the offset of the first record stamped at or after a time; -1 if there is none."""
        spec = kafka_admin.OffsetSpec.for_timestamp(max(0, int(unix_s * 1000)))  # type: ignore[attr-defined]
        return self._list(spec)

    def _list(self, spec: Any) -> dict[Partition, int]:
        try:
            asked = self._admin.list_offsets(
                {TopicPartition(*partition): spec for partition in self._partitions}, request_timeout=KAFKA_TIMEOUT_S
            )
            return {
                (partition.topic, partition.partition): int(answer.result(KAFKA_TIMEOUT_S).offset)
                for partition, answer in asked.items()
            }
        except (KafkaException, TimeoutError) as error:
            raise TopicsUnreadable(f"the topics' offsets cannot be read: {error}") from error


class Records:
    """The records of a stretch of the topics, on disk; a context manager, used by one thread at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ledger-reconcile-")
        self._table = sqlite3.connect(
            Path(self._folder.name) / "records", isolation_level=None, check_same_thread=False
        )
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{SQLITE_CACHE_KB}"):
            self._table.execute(f"PRAGMA {pragma}")
        # Ids are made in the order of time, so that the tree grows at its end.
        self._table.execute(
            "CREATE TABLE records (event_id TEXT, topic TEXT, partition INT, offset INT, key TEXT, digest TEXT, "
            "known INT, PRIMARY KEY (event_id, topic, partition, offset)) WITHOUT ROWID"
        )
        self.count = 0
        self.floor_s = 0.0
        """Records older than this may have been deleted by the broker."""

    def __enter__(self) -> Self:
        """Return the empty table."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self._table.close()
        self._folder.cleanup()

    def read(
        self,
        config: ServiceConfig,
        begin: Mapping[Partition, int],
        end: Mapping[Partition, int],
        lost: Iterable[Partition],
        stopping: threading.Event,
    ) -> None:
        """Read every partition from `begin` to `end`; of those in `lost` the beginning is gone.

        Raises TopicsUnreadable if anything is missing, or when `stopping` is set.
        """
        left = {partition: top for partition, top in end.items() if top > begin[partition]}
        unseen = set(lost) & set(left)
        reader = KafkaConsumer(
            {
                "bootstrap.servers": config.kafka_bootstrap,
                "group.id": "ledger-reconciler",
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 20,
                # Read ahead a little: by default it would be 100,000 records of each partition, and a record in the
                # queue takes several times its size.
                "queued.min.messages": READ_BATCH,
                "queued.max.messages.kbytes": READ_AHEAD_KB,
                "fetch.max.bytes": READ_AHEAD_KB * 1024,
                "log_level": 2,
            }
        )
        try:
            reader.assign([TopicPartition(*partition, begin[partition]) for partition in left])
            came_at = time.monotonic()
            while left:
                if stopping.is_set():
                    raise TopicsUnreadable("stopped while the topics were read")
                if time.monotonic() - came_at > STALLED_S:
                    raise TopicsUnreadable(f"{len(left)} partitions cannot be read to their end")
                messages = reader.consume(READ_BATCH, timeout=0.2)
                rows = []
                for message in messages:
                    error = message.error()
                    if error is not None:
                        if error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTO_OFFSET_RESET):
                            raise TopicsUnreadable(f"Kafka: {error.str()}")
                        continue
                    came_at = time.monotonic()
                    partition = (str(message.topic()), int(message.partition() or 0))
                    offset = int(message.offset() or 0)
                    if partition in unseen:
                        unseen.discard(partition)
                        self.floor_s = max(self.floor_s, message.timestamp()[1] / 1000)
                    if offset < end[partition]:
                        rows.append(_row_of(message, partition, offset))
                    if offset + 1 >= end[partition]:
                        left.pop(partition, None)
                self._table.execute("BEGIN")
                self._table.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, 0)", rows)
                self._table.execute("COMMIT")
                self.count += len(rows)
        except KafkaException as error:
            raise TopicsUnreadable(f"the topics cannot be read: {error}") from error
        finally:
            reader.close()

    def compare(self, events: Sequence[Known]) -> list[tuple[Known, Record]]:
        """Take the records of these events out; return the events whose record is missing (partition -1) or differs."""
        wrong: list[tuple[Known, Record]] = []
        found = self._table.execute
        self._table.execute("BEGIN")
        for event in events:
            rows = found(
                "SELECT event_id, topic, partition, offset, key, digest FROM records WHERE event_id = ?",
                (event.event_id,),
            ).fetchall()
            if not rows:
                if event.published and event.judged:
                    wrong.append((event, Record(event.event_id, event.topic, -1, -1, "", "not there")))
                continue
            # Sent again after a crash, an event is there twice: every copy must be the same.
            for row in rows:
                record = Record(*row)
                if (record.topic, record.key, record.digest) != (event.topic, event.key, event.digest):
                    wrong.append((event, record))
            found("UPDATE records SET known = 1 WHERE event_id = ?", (event.event_id,))
        self._table.execute("COMMIT")
        return wrong

    def unknown(self, after: tuple[str, int, int], limit: int) -> list[Record]:
        """Return up to `limit` records that no event took out, behind the place `after` (topic, partition, offset)."""
        rows = self._table.execute(
            "SELECT event_id, topic, partition, offset, key, digest FROM records WHERE known = 0 "
            "AND (topic, partition, offset) > (?, ?, ?) ORDER BY topic, partition, offset LIMIT ?",
            (*after, limit),
        )
        return [Record(*row) for row in rows]


def _row_of(message: Any, partition: Partition, offset: int) -> tuple[object, ...]:
    headers = dict(message.headers() or [])
    value: bytes = message.value() or b""
    key: bytes = message.key() or b""
    name: bytes = headers.get("event-id") or b""
    return (
        name.decode(errors="replace"),
        *partition,
        offset,
        key.decode(errors="replace"),
        hashlib.md5(value, usedforsecurity=False).hexdigest(),
    )
