"""What the checks look at: one stack, its interfaces, and wallets that belong to the checklist alone."""

import asyncio
import http.client
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from compose.stack import Stack
from ledgerproof.checklist.item import Failed
from ledgerproof.collect import GROUPS, auditor
from ledgerproof.wire import Reply, Wire, get, post
from reference.config import ServerConfig, ServiceConfig
from reference.routing import SHARDS
from reference.sql import named_blocks
from reference.store import connect

ANSWER_TIMEOUT_S: Final = 10.0
SQL_TIMEOUT_MS: Final = 30_000
SCRAPE_TIMEOUT_S: Final = 5.0
JOIN_TIMEOUT_S: Final = 120.0
POLL_S: Final = 0.25
AMOUNT_MINOR: Final = 100
"""What a check deposits."""
WALLETS_FROM: Final = 7_000_000_000_000_000
"""Wallets of the checklist begin here: no user of ours has such a number."""


@dataclass
class Site:
    """One stack under inspection."""

    stack: Stack
    breakable: bool
    """Whether processes may be killed: of a stack of our own, or when its owner allowed it."""
    show: Callable[[str], None]
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))
    """Begins every idempotency key, so that no two runs share one."""
    first_wallet: int = field(default_factory=lambda: WALLETS_FROM + SHARDS * random.SystemRandom().randrange(10**12))
    sql: dict[str, str] = field(default_factory=lambda: named_blocks(Path(__file__).parent / "sql" / "checklist.sql"))

    def __post_init__(self) -> None:
        """Read what does not change while the checks run."""
        self.config: ServiceConfig = self.stack.config
        self.token = self.stack.token()
        self.apis = self.stack.nodes_of("api")
        self.wires = {name: Wire("127.0.0.1", self.stack.port(name), timeout_s=ANSWER_TIMEOUT_S) for name in self.apis}

    @property
    def wallets(self) -> list[int]:
        """One wallet in each logical shard."""
        return [self.first_wallet + shard for shard in range(SHARDS)]

    def wallet_on(self, server: int) -> int:
        """Return a wallet whose shard was installed on a server (an index)."""
        return self.first_wallet + self.config.routing.index(server)

    def service_nodes(self) -> list[str]:
        """Return the names of the service's processes."""
        return [node.name for node in self.stack.state.nodes if node.kind == "service"]

    def close(self) -> None:
        """Drop the connections."""
        for wire in self.wires.values():
            wire.close()

    async def joined(self) -> None:
        """Wait until every consumer has joined its group.

        Asking for the offsets of a group whose coordinator is not there yet ends this process: librdkafka 2.x follows
        a null pointer when an admin client's OffsetFetch is answered NOT_COORDINATOR. Raises Failed after a bound.
        """
        consumers = [node for group in GROUPS for node in self.stack.nodes_of(group)]
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while True:
            told = await self.samples(consumers, "kafka_assignments_total")
            absent = [group for group in GROUPS if not any(n and row["group"] == group for row, n in told)]
            if not absent:
                return
            if time.monotonic() > deadline:
                raise Failed(f"no consumer of {', '.join(absent)} joined its group within {JOIN_TIMEOUT_S:g} s")
            self.show(f"waiting for {', '.join(absent)}")
            await asyncio.sleep(POLL_S)

    # -- interfaces --------------------------------------------------------------------------------------

    async def deposit(self, user: int, key: str, amount_minor: int = AMOUNT_MINOR, api: str | None = None) -> Reply:
        """Send a deposit and return its answer. Raises WireError."""
        body = msgspec.json.encode({"amount_minor": amount_minor})
        wire = self.wires[api or self.apis[0]]
        return await wire.exchange(post(f"/v1/wallets/{user}/deposits", f"{self.run_id}-{key}", body, self.token))

    async def deposits(self, users: Sequence[int], key: str, api: str | None = None) -> list[Reply]:
        """Deposit into many wallets at once. Raises WireError."""
        return await asyncio.gather(*(self.deposit(user, key, api=api) for user in users))

    async def read(self, path: str, api: str | None = None, token: str | None = None) -> Reply:
        """Send a GET. Raises WireError."""
        return await self.wires[api or self.apis[0]].exchange(get(path, self.token if token is None else token))

    def scrape(self, node: str) -> str:
        """Return the metrics of a process. Raises Failed if it does not give any."""
        connection = http.client.HTTPConnection("127.0.0.1", self.stack.port(node), timeout=SCRAPE_TIMEOUT_S)
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            raise Failed(f"{node} gives no metrics: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise Failed(f"{node} answers /metrics with {answer.status}")
        return text

    async def samples(self, nodes: Sequence[str], metric: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of every sample of a name, over several processes. Raises Failed."""
        texts = await asyncio.gather(*(asyncio.to_thread(self.scrape, node) for node in nodes))
        return [sample for text in texts for sample in samples_of(text, metric)]

    # -- servers -----------------------------------------------------------------------------------------

    async def as_owner(self, server: ServerConfig, query: str, *args: object) -> list[asyncpg.Record]:
        """Run a block of checklist.sql as the server's superuser. Raises LedgerError or a driver's error."""
        connection = await connect(server, *self.stack.superuser, statement_timeout_ms=SQL_TIMEOUT_MS)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(self.sql[query], *args)
        finally:
            connection.terminate()
        return rows

    async def as_auditor(self, server: ServerConfig, query: str, *args: object) -> asyncpg.Record:
        """Return the one row of a block, read by the role that only reads. Raises NotCollected."""
        async with auditor(self.config, server) as connection:
            row = await connection.fetchrow(self.sql[query], *args)
            assert row is not None, "each of these blocks returns one row"
            return row


def samples_of(text: str, metric: str) -> Iterator[tuple[dict[str, str], float]]:
    """Yield labels and value of every sample with this name. Raises ValueError for a text that is no exposition."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == metric:
                yield dict(sample.labels), float(sample.value)


def quantile_bound(buckets: Sequence[tuple[dict[str, str], float]], q: float) -> tuple[float, int]:
    """Return the upper edge of the bucket that holds the q-quantile, and how many observations there are.

    `buckets` are samples of a histogram's `_bucket` series, of any number of processes and routes.
    """
    upto: dict[float, float] = {}
    for labels, value in buckets:
        edge = float(labels["le"])
        upto[edge] = upto.get(edge, 0.0) + value
    total = upto.get(float("inf"), 0.0)
    if not total:
        return float("nan"), 0
    return next(edge for edge in sorted(upto) if upto[edge] >= q * total), int(total)


def answered(reply: Reply) -> dict[str, Any]:
    """Return the JSON of an answer. Raises Failed if it is none."""
    try:
        return msgspec.json.decode(reply.body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise Failed(f"an answer of status {reply.status} is not JSON: {error}") from error
