"""Waits until the service has finished its work, then copies what it holds into the run folder, read-only.

A snapshot is one REPEATABLE READ READ ONLY transaction per server under the role that may only read, the whole
of every topic up to a recorded watermark, and the cached balances. Nothing here writes to the service.
"""

import asyncio
import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import asyncpg
import msgspec
import polars as pl
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka import admin as kafka_admin
from redis import Redis
from redis.exceptions import RedisError

from invariants.files import publish
from invariants.snapshot import SERVERS_READ
from reference import matcher, projector, settler
from reference.bus import topics
from reference.cache import KEY_PREFIX
from reference.config import ServerConfig, ServiceConfig
from reference.sql import named_blocks
from reference.store import DRIVER_ERRORS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AUDITOR: Final = "ledger_auditor"
CONNECT_TIMEOUT_S: Final = 5.0
COPY_TIMEOUT_S: Final = 120.0
KAFKA_TIMEOUT_S: Final = 10.0
KAFKA_READ_TIMEOUT_S: Final = 120.0
"""Reading all topics from their beginning takes no longer than this, or the snapshot is incomplete."""
POLL_S: Final = 0.25
PROJECTION_GRACE_S: Final = 5.0
REDIS_PAGE: Final = 1_000
QUIET: Final = {"log_level": 2}
"""librdkafka prints to standard error by itself; what matters reaches us as an error."""

GROUPS: Final[dict[str, tuple[str, ...]]] = {
    matcher.GROUP: tuple(matcher.TOPICS),
    settler.GROUP: tuple(settler.TOPICS),
    projector.GROUP: tuple(projector.TOPICS),
}
"""Consumer groups of the service and what each of them reads."""

_TEXT, _INT, _SECONDS, _BOOL = pl.String(), pl.Int64(), pl.Float64(), pl.Boolean()
TABLES: Final[dict[str, dict[str, pl.DataType]]] = {
    "ledger": {
        "shard": _INT,
        "user_id": _INT,
        "seq": _INT,
        "type": _TEXT,
        "amount": _INT,
        "contra": _TEXT,
        "match_id": _TEXT,
        "bet_id": _TEXT,
        "settlement_version": _INT,
        "balance_snapshot": _INT,
        "idempotent_key": _TEXT,
        "reference_id": _TEXT,
        "created_by": _TEXT,
        "created_at": _SECONDS,
        "xact": _INT,
    },
    "bets": {
        "shard": _INT,
        "user_id": _INT,
        "bet_id": _TEXT,
        "seq": _INT,
        "match_id": _TEXT,
        "outcome": _TEXT,
        "side": _TEXT,
        "odds": _INT,
        "stake": _INT,
        "reserve": _INT,
        "placed_at": _SECONDS,
    },
    "refusals": {
        "shard": _INT,
        "user_id": _INT,
        "idempotent_key": _TEXT,
        "outcome": _TEXT,
        "command": _TEXT,
        "created_at": _SECONDS,
    },
    "outbox": {
        "id": _INT,
        "event_id": _TEXT,
        "aggregate_type": _TEXT,
        "aggregate_id": _TEXT,
        "event_type": _TEXT,
        "partition_key": _TEXT,
        "payload": _TEXT,
        "user_id": _INT,
        "seq": _INT,
        "amount": _INT,
        "balance": _INT,
        "published_to_kafka": _BOOL,
        "created_at": _SECONDS,
        "published_at": _SECONDS,
    },
    "projection": {
        "shard": _INT,
        "user_id": _INT,
        "balance": _INT,
        "seq": _INT,
        "updated_at": _SECONDS,
    },
    "matches": {
        "match_id": _TEXT,
        "outcomes": _TEXT,
        "closes_at": _SECONDS,
        "state": _TEXT,
        "settlement_version": _INT,
        "result": _TEXT,
        "book_version": _INT,
        "arrivals": _INT,
        "fills": _INT,
        "created_at": _SECONDS,
    },
    "transitions": {
        "match_id": _TEXT,
        "transition_no": _INT,
        "from_state": _TEXT,
        "to_state": _TEXT,
        "settlement_version": _INT,
        "result": _TEXT,
        "at": _SECONDS,
    },
    "orders": {
        "bet_id": _TEXT,
        "match_id": _TEXT,
        "user_id": _INT,
        "outcome": _TEXT,
        "side": _TEXT,
        "odds": _INT,
        "stake": _INT,
        "reserve": _INT,
        "arrival": _INT,
        "state": _TEXT,
        "matched_stake": _INT,
        "matched_liability": _INT,
        "winnings": _INT,
        "cancelled_stake": _INT,
        "cancel_refund": _INT,
        "cancel_reason": _TEXT,
        "event_id": _TEXT,
        "arrived_at": _SECONDS,
    },
    "fills": {
        "match_id": _TEXT,
        "fill_no": _INT,
        "outcome": _TEXT,
        "back_bet_id": _TEXT,
        "back_user": _INT,
        "lay_bet_id": _TEXT,
        "lay_user": _INT,
        "odds": _INT,
        "stake": _INT,
        "liability": _INT,
        "winnings": _INT,
        "filled_at": _SECONDS,
    },
    "routes": {
        "shard": _INT,
        "server_name": _TEXT,
        "epoch": _INT,
        "here": _BOOL,
        "changed_at": _SECONDS,
    },
    "cancels": {
        "user_id": _INT,
        "idempotent_key": _TEXT,
        "bet_id": _TEXT,
        "match_id": _TEXT,
        "outcome": _TEXT,
        "cancelled_stake": _INT,
        "refund": _INT,
        "waiting": _BOOL,
        "created_at": _SECONDS,
    },
    "settlements": {
        "match_id": _TEXT,
        "settlement_version": _INT,
        "kind": _TEXT,
        "result": _TEXT,
        "state": _TEXT,
        "last_arrival": _INT,
        "started_at": _SECONDS,
        "finished_at": _SECONDS,
    },
    "reconciliations": {
        "run_id": _TEXT,
        "kind": _TEXT,
        "requested_by": _TEXT,
        "state": _TEXT,
        "started_at": _SECONDS,
        "finished_at": _SECONDS,
        "code": _TEXT,
        "user_id": _INT,
        "seq": _INT,
        "match_id": _TEXT,
        "event_id": _TEXT,
        "expected": _TEXT,
        "found": _TEXT,
    },
}
"""Columns of each table as `sql/audit.sql` selects them; a snapshot adds `server`."""

KAFKA_COLUMNS: Final[dict[str, pl.DataType]] = {
    "topic": _TEXT,
    "partition": _INT,
    "offset": _INT,
    "key": _TEXT,
    "event_id": _TEXT,
    "event_type": _TEXT,
    "timestamp": _SECONDS,
    "user_id": _INT,
    "seq": _INT,
    "amount": _INT,
    "balance": _INT,
    "payload": _TEXT,
}
REDIS_COLUMNS: Final[dict[str, pl.DataType]] = {"user_id": _INT, "balance": _INT, "seq": _INT}


class NotCollected(Exception):
    """Something the service holds could not be read whole; the message says what."""


class NotDrained(Exception):
    """The service did not finish its work in time; the message says what was left."""


def load_audit_sql() -> dict[str, str]:
    """Return the named blocks of sql/audit.sql."""
    return named_blocks(Path(__file__).parent / "sql" / "audit.sql")


@asynccontextmanager
async def auditor(config: ServiceConfig, server: ServerConfig) -> "AsyncIterator[asyncpg.Connection]":
    """Open a connection of the read-only role. Raises NotCollected if that is not possible."""
    try:
        connection = await asyncpg.connect(
            host=server.host,
            port=server.port,
            user=AUDITOR,
            password=config.passwords[AUDITOR],
            database=server.database,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COPY_TIMEOUT_S,
        )
    except DRIVER_ERRORS as error:
        raise NotCollected(f"cannot read {server.name}: {error}") from error
    try:
        yield connection
    except DRIVER_ERRORS as error:
        raise NotCollected(f"reading {server.name} failed: {error}") from error
    finally:
        connection.terminate()


# -- drain ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backlog:
    """Work the service has not finished."""

    unpublished: dict[str, int] = field(default_factory=dict)
    """Outbox rows not in Kafka yet, by server."""
    unsettled: int = 0
    """Settlements still running."""
    lag: dict[str, int] = field(default_factory=dict)
    """Records not consumed yet, by consumer group."""
    unprojected: int = 0
    """Wallets whose projection is not at the ledger's head; counted once nothing else is left."""
    newest_events: tuple[int, ...] = ()

    @property
    def at_rest(self) -> bool:
        """Return whether nothing is on its way any more, so that what is missing now stays missing."""
        return not (any(self.unpublished.values()) or self.unsettled or any(self.lag.values()))

    def text(self) -> str:
        """Return what is left, for people."""
        parts = [f"{name}: {count} events to publish" for name, count in self.unpublished.items() if count]
        parts += [f"{group}: {count} records to consume" for group, count in self.lag.items() if count]
        if self.unsettled:
            parts.append(f"{self.unsettled} settlements running")
        if self.unprojected:
            parts.append(f"{self.unprojected} balances to project")
        return ", ".join(parts) or "nothing left"


async def backlog(config: ServiceConfig, admin: kafka_admin.AdminClient) -> Backlog:
    """Return what the service has still to do. Raises NotCollected if it cannot be read."""
    sql = load_audit_sql()

    async def of_server(server: ServerConfig) -> asyncpg.Record:
        async with auditor(config, server) as connection:
            row = await connection.fetchrow(sql["progress"])
            if row is None:
                raise NotCollected(f"{server.name} did not say how far it is")
            return row

    rows = await asyncio.gather(*(of_server(server) for server in config.servers))
    lag = await asyncio.to_thread(consumer_lag, config, admin)
    found = Backlog(
        unpublished={server.name: int(row["unpublished"]) for server, row in zip(config.servers, rows, strict=True)},
        unsettled=sum(int(row["unsettled"]) for row in rows),
        lag=lag,
        newest_events=tuple(int(row["newest_event"]) for row in rows),
    )
    if not found.at_rest:
        return found

    async def unprojected(server: ServerConfig) -> int:
        async with auditor(config, server) as connection:
            return int(await connection.fetchval(sql["unprojected"]))

    counts = await asyncio.gather(*(unprojected(server) for server in config.servers))
    return Backlog(found.unpublished, 0, found.lag, sum(counts), found.newest_events)


def kafka_client(config: ServiceConfig) -> kafka_admin.AdminClient:
    """Return a client that asks Kafka about itself and keeps its own log to itself."""
    return kafka_admin.AdminClient({"bootstrap.servers": config.kafka_bootstrap, **QUIET})


def consumer_lag(config: ServiceConfig, admin: kafka_admin.AdminClient) -> dict[str, int]:
    """Return the records between committed offset and high watermark, by group. Raises NotCollected."""
    try:
        high = _high_watermarks(admin, config, sorted({topic for read in GROUPS.values() for topic in read}))
        asked = {
            group: admin.list_consumer_group_offsets(
                [ConsumerGroupTopicPartitions(group)], request_timeout=KAFKA_TIMEOUT_S
            )[group]
            for group in GROUPS
        }
        lag: dict[str, int] = {}
        for group, reads in GROUPS.items():
            committed = {
                (item.topic, item.partition): item.offset
                for item in (asked[group].result(KAFKA_TIMEOUT_S).topic_partitions or [])
            }
            lag[group] = sum(
                top - max(0, committed.get(partition, 0)) for partition, top in high.items() if partition[0] in reads
            )
    except (KafkaException, TimeoutError) as error:
        raise NotCollected(f"Kafka does not say how far its consumers are: {error}") from error
    return lag


def _high_watermarks(
    admin: kafka_admin.AdminClient, config: ServiceConfig, wanted: Sequence[str]
) -> dict[tuple[str, int], int]:
    asked = admin.list_offsets(
        {
            TopicPartition(topic, number): kafka_admin.OffsetSpec.latest()  # type: ignore[attr-defined, no-untyped-call]
            for topic in wanted
            for number in range(config.partitions_of(topic))
        },
        request_timeout=KAFKA_TIMEOUT_S,
    )
    return {
        (partition.topic, partition.partition): int(answer.result(KAFKA_TIMEOUT_S).offset)
        for partition, answer in asked.items()
    }


async def drain(config: ServiceConfig, timeout_s: float, show: Callable[[str], None]) -> Backlog:
    """Wait until nothing is left to publish, consume, settle or project, and return what is left then.

    Twice in a row, with no event written in between, so that work which makes other work is seen to its
    end. A projection that stays behind although everything was consumed is not waited for beyond
    PROJECTION_GRACE_S: it is a finding, and the checker's to report. `show` is told what is left. Raises
    NotDrained after `timeout_s`.
    """
    admin = kafka_client(config)
    started = time.monotonic()
    previous: Backlog | None = None
    rest_since = started
    problem = "nothing could be read"
    while time.monotonic() - started < timeout_s:
        try:
            now = await backlog(config, admin)
        except NotCollected as error:
            # A server that was just restarted may need a moment; the bound above ends this.
            problem, previous = str(error), None
        else:
            problem = now.text()
            unchanged = previous is not None and previous.newest_events == now.newest_events
            if not (now.at_rest and unchanged):
                rest_since = time.monotonic()
            elif now.unprojected == 0 or time.monotonic() - rest_since > PROJECTION_GRACE_S:
                return now
            previous = now if now.at_rest else None
        show(problem)
        await asyncio.sleep(POLL_S)
    raise NotDrained(f"not drained within {timeout_s:.0f} s: {problem}")


# -- snapshot ------------------------------------------------------------------------------------------


async def snapshot(
    config: ServiceConfig, folder: Path, show: Callable[[str], None], earlier: Path | None = None
) -> dict[str, int]:
    """Copy everything into the existing `folder` as Parquet and return the rows of each table.

    `earlier` is the folder of an earlier snapshot: records of its topics are taken from there, for a broker
    only ever appends; the tables are always read whole, since whether they were rewritten is the question.
    Raises NotCollected if anything could not be read whole, OSError if it could not be written.
    """
    sizes: dict[str, int] = {}
    show("servers")
    per_server = await asyncio.gather(*(_copy_server(config, server) for server in config.servers))
    for table, columns in TABLES.items():
        frames = [frames[table] for frames in per_server]
        frame = pl.concat(frames) if frames else pl.DataFrame(schema={"server": _TEXT, **columns})
        sizes[table] = _write(folder, table, frame)
    show("topics")
    known = None if earlier is None else pl.read_parquet(earlier / "kafka.parquet")
    sizes["kafka"] = _write(folder, "kafka", await asyncio.to_thread(read_topics, config, known))
    show("cache")
    sizes["redis"] = _write(folder, "redis", await asyncio.to_thread(read_cache, config))
    names = [server.name for server in config.servers]
    (folder / SERVERS_READ).write_bytes(msgspec.json.encode(names))
    return sizes


def _write(folder: Path, table: str, frame: pl.DataFrame) -> int:
    temporary = folder / f"{table}.parquet.tmp"
    frame.write_parquet(temporary, compression="zstd")
    publish(temporary, folder / f"{table}.parquet")
    return frame.height


async def _copy_server(config: ServiceConfig, server: ServerConfig) -> dict[str, pl.DataFrame]:
    """Copy every table of one server, all as of one moment."""
    sql = load_audit_sql()
    frames: dict[str, pl.DataFrame] = {}
    async with (
        auditor(config, server) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        for table, columns in TABLES.items():
            text = io.BytesIO()
            await connection.copy_from_query(sql[table], output=text, format="csv", header=True, timeout=COPY_TIMEOUT_S)
            frames[table] = await asyncio.to_thread(_parse, text, columns, server.name)
    return frames


def _parse(text: io.BytesIO, columns: Mapping[str, pl.DataType], server: str) -> pl.DataFrame:
    text.seek(0)
    frame = pl.read_csv(text, schema=dict(columns), infer_schema=False)
    return frame.select(pl.lit(server).alias("server"), *columns)


_BigInt = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Payload(msgspec.Struct):
    """The fields of an event that identify an entry. A number that no BIGINT holds is none of the service's."""

    user_id: _BigInt | None = None
    seq: _BigInt | None = None
    amount: _BigInt | None = None
    balance: _BigInt | None = None


def read_topics(config: ServiceConfig, known: pl.DataFrame | None = None) -> pl.DataFrame:
    """Read every topic to its present end, from its beginning or from where `known` ends.

    Raises NotCollected if a part is missing.
    """
    known = pl.DataFrame(schema=KAFKA_COLUMNS) if known is None else known
    begin = {
        (topic, number): int(offset) + 1
        for topic, number, offset in known.group_by("topic", "partition").agg(pl.col("offset").max()).iter_rows()
    }
    reader = Consumer(
        {
            "bootstrap.servers": config.kafka_bootstrap,
            "group.id": "ledgerproof-snapshot",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": False,
            "fetch.wait.max.ms": 20,
            "queued.max.messages.kbytes": 65_536,
            **QUIET,
        }
    )
    try:
        admin = kafka_client(config)
        high = _high_watermarks(admin, config, topics())
        left = {partition: top for partition, top in high.items() if top > begin.get(partition, 0)}
        reader.assign([TopicPartition(*partition, begin.get(partition, 0)) for partition in left])
        rows: list[tuple[Any, ...]] = []
        decode = msgspec.json.Decoder(_Payload).decode
        deadline = time.monotonic() + KAFKA_READ_TIMEOUT_S
        while left:
            if time.monotonic() > deadline:
                raise NotCollected(f"{len(left)} Kafka partitions could not be read to their end in time")
            for message in reader.consume(5_000, timeout=0.2):
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._ALL_BROKERS_DOWN:
                        raise NotCollected(f"Kafka went away while its topics were read: {error.str()}")
                    continue
                partition = (str(message.topic()), int(message.partition() or 0))
                offset = int(message.offset() or 0)
                top = high[partition]
                if offset < top:
                    rows.append(_row_of(message, decode))
                if offset + 1 >= top:
                    left.pop(partition, None)
    except (KafkaException, TimeoutError) as error:
        raise NotCollected(f"the topics could not be read: {error}") from error
    finally:
        reader.close()
    return pl.concat([known, pl.DataFrame(rows, schema=KAFKA_COLUMNS, orient="row")])


def _row_of(message: Any, decode: Callable[[bytes], _Payload]) -> tuple[Any, ...]:
    headers = dict(message.headers() or [])
    value: bytes = message.value() or b""
    try:
        payload = decode(value)
    except msgspec.DecodeError:
        payload = _Payload()
    return (
        message.topic(),
        message.partition(),
        message.offset(),
        (message.key() or b"").decode(errors="replace"),
        headers.get("event-id", b"").decode(errors="replace"),
        headers.get("event-type", b"").decode(errors="replace"),
        message.timestamp()[1] / 1000,
        payload.user_id,
        payload.seq,
        payload.amount,
        payload.balance,
        value.decode(errors="replace"),
    )


def read_cache(config: ServiceConfig) -> pl.DataFrame:
    """Read every cached balance. Raises NotCollected if Redis does not answer or a value is malformed."""
    rows: list[tuple[int, int, int]] = []
    client = Redis(
        host=config.redis_host,
        port=config.redis_port,
        password=config.redis_password,
        socket_timeout=5.0,
        decode_responses=True,
    )
    try:
        keys = sorted(set(client.scan_iter(match=f"{KEY_PREFIX}*", count=REDIS_PAGE)))
        for start in range(0, len(keys), REDIS_PAGE):
            page = keys[start : start + REDIS_PAGE]
            for key, value in zip(page, client.mget(page), strict=True):
                if value is not None:
                    seq, balance, *_ = str(value).split(" ")
                    rows.append((int(key.removeprefix(KEY_PREFIX)), int(balance), int(seq)))
    except (RedisError, OSError) as error:
        raise NotCollected(f"the cache could not be read: {error}") from error
    except ValueError as error:
        raise NotCollected(f"the cache holds a value of another form: {error}") from error
    finally:
        client.close()
    return pl.DataFrame(rows, schema=REDIS_COLUMNS, orient="row")
