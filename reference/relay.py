"""The event dispatcher: moves committed outbox rows to Kafka, in commit order per wallet, at least once.

Rows are found by their flag, never by a cursor: a transaction that commits late is found late, not skipped. Rows
of one wallet were numbered under its lock, so their order of id is their order of commit. A row is marked only
after the broker acknowledged it.
"""

import asyncio
import logging
from collections.abc import Sequence

import asyncpg

from reference import metrics
from reference.bus import Headers, Publisher
from reference.commands import TOPIC_OF
from reference.config import ServiceConfig
from reference.errors import LedgerError
from reference.service import always_ready, run_worker
from reference.store import LEADER_CLASS, Store, meaning_of

log = logging.getLogger("ledgerproof.relay")

RELAY_LEADER = 1
RETRY_AFTER_S = 0.5
BACKLOG_COUNTED_MAX = 1_000_000


class Relay:
    """Publishes the outbox of one server while it holds that server's leader lock."""

    def __init__(self, store: Store, publisher: Publisher, server: int) -> None:
        self._store = store
        self._publisher = publisher
        self._server = server
        self._name = store.config.servers[server].name
        self._connection: asyncpg.Connection | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """Relay until `stopping`; a broken connection or broker is retried for ever."""
        while not stopping.is_set():
            try:
                moved = await self.run_once()
            except (
                LedgerError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                OSError,
                TimeoutError,
            ) as error:
                log.warning("relay of %s: %s", self._name, meaning_of(error))
                self._drop()
                await _pause(stopping, RETRY_AFTER_S)
                continue
            if moved == 0:
                await _pause(stopping, self._store.config.relay_poll_ms / 1000)
        self._drop()

    async def run_once(self) -> int:
        """Publish up to one batch and mark what was acknowledged. Returns how many rows were marked."""
        connection = await self._lead()
        if connection is None:
            return 0
        timeout = self._store.config.statement_timeout_ms / 1000 + 1
        rows = await connection.fetch(self._store.sql["unpublished"], self._store.config.relay_batch, timeout=timeout)
        if len(rows) == self._store.config.relay_batch:
            backlog = await connection.fetchval(
                self._store.sql["count_unpublished"], BACKLOG_COUNTED_MAX, timeout=timeout
            )
        else:
            backlog = len(rows)
        metrics.OUTBOX_UNPUBLISHED.labels(self._name).set(backlog)
        if not rows:
            return 0
        acknowledged = await self._publisher.publish([record_of(row) for row in rows])
        marked = publishable(rows, acknowledged)
        await connection.execute(self._store.sql["mark_published"], marked, timeout=timeout)
        metrics.EVENTS_PUBLISHED.labels(self._name).inc(len(marked))
        return len(marked)

    async def _lead(self) -> asyncpg.Connection | None:
        """Return a connection that holds the leader lock, or None while another relay holds it."""
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        connection = await self._store.connect(self._server)
        if not await connection.fetchval(self._store.sql["lead"], LEADER_CLASS, RELAY_LEADER):
            await connection.close()
            return None
        log.info("leading the relay of %s", self._name)
        self._connection = connection
        return connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


def record_of(row: asyncpg.Record) -> tuple[str, str, bytes, Headers]:
    """Return the Kafka record (topic, key, value, headers) of an outbox row."""
    headers: Headers = [
        ("event-id", row["event_id"].encode()),
        ("event-type", row["event_type"].encode()),
        ("timestamp", row["created_at"].isoformat().encode()),
    ]
    if row["traceparent"]:
        headers.append(("traceparent", row["traceparent"].encode()))
    return TOPIC_OF[row["event_type"]], row["partition_key"], row["payload"].encode(), headers


def publishable(rows: Sequence[asyncpg.Record], acknowledged: Sequence[bool]) -> list[int]:
    """Return the ids to mark: acknowledged rows, but none behind an unacknowledged row of the same key.

    The row behind is sent again after the one it must follow.
    """
    held: set[str] = set()
    marked = []
    for row, done in zip(rows, acknowledged, strict=True):
        if not done:
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
    relays = [Relay(store, publisher, index) for index, publisher in enumerate(publishers)]

    async def all_relays() -> None:
        await asyncio.gather(*(relay.run(stopping) for relay in relays))

    try:
        await run_worker(port, all_relays, always_ready, stopping)
    finally:
        for publisher in publishers:
            publisher.close()
        await store.close()
