"""What every row works with: the stack, the workload that was opened on it, and what was measured so far."""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

import asyncpg
import msgspec

from compose.stack import Stack
from ledgerproof.bench import usage
from ledgerproof.bench.drive import play
from ledgerproof.bench.options import BenchOptions, Sizes
from ledgerproof.bench.plan import Kind, Plan, Window
from ledgerproof.bench.requests import OUTCOMES
from ledgerproof.bench.row import Row
from ledgerproof.collect import drain
from ledgerproof.progress import Progress
from ledgerproof.wire import Wire, post
from reference.config import ServerConfig, ServiceConfig

FIRST_USER: Final = 1_000_000
MATCH_OPEN_MS: Final = 24 * 3600 * 1000
DRAIN_TIMEOUT_S: Final = 240.0
SETUP_TIMEOUT_S: Final = 10.0
SORTS: Final = ("api", "relay", "matcher", "settler", "projector")
"""Processes that say in their metrics what waits for them."""


class BenchFailed(Exception):
    """The benchmark cannot go on; the message says why."""


@dataclass
class Bench:
    """One run of the benchmark."""

    options: BenchOptions
    stack: Stack
    config: ServiceConfig
    progress: Progress
    commit: str
    machine: str
    run: str = field(default_factory=lambda: f"bench-{secrets.token_hex(4)}")
    rows: list[Row] = field(default_factory=list)
    peak: usage.PeakMemory = field(default_factory=usage.PeakMemory)
    matches: list[str] = field(default_factory=list)
    windows: int = 0
    opened: bool = False
    token: str = ""
    """For the API; may do everything."""
    acknowledged: int = 0
    """Bets that were answered as accepted: all of them have to be in the ledger."""

    @property
    def sizes(self) -> Sizes:
        """How long and how much."""
        return self.options.sizes

    @property
    def api_ports(self) -> list[int]:
        """Ports of the API processes."""
        return [self.stack.port(name) for name in self.stack.nodes_of("api")]

    @property
    def grpc_ports(self) -> list[int]:
        """Ports of the API processes for gRPC."""
        return [self.stack.grpc_port(name) for name in self.stack.nodes_of("api")]

    def __post_init__(self) -> None:
        """Take a token for the API."""
        self.token = self.stack.token()

    def metrics_ports(self) -> dict[str, int]:
        """Port of every process of the service."""
        return {name: self.stack.port(name) for sort in SORTS for name in self.stack.nodes_of(sort)}

    def show(self, text: str) -> None:
        """Say how far the row is."""
        self.progress.show(text)

    def plan(self, kind: Kind, **fields: Any) -> Plan:
        """Return a window's plan with keys and a seed of its own."""
        self.windows += 1
        plan = Plan(
            ports=self.api_ports,
            kind=kind,
            loop=fields.pop("loop"),
            duration_s=fields.pop("duration_s"),
            seed=self.windows,
            run=f"{self.run}-{self.windows}",
            first_user=FIRST_USER,
            users=self.sizes.wallets,
            matches=self.matches,
            token=self.token,
        )
        return msgspec.structs.replace(plan, **fields)

    def measured(self, plan: Plan, before: Callable[[], object] | None = None) -> tuple[Window, dict[str, float]]:
        """Play a window; return it and the CPU seconds of each group, the generator's among them."""
        readings: list[dict[str, float]] = []

        def begin() -> None:
            if before is not None:
                before()
            readings.append(usage.cpu_seconds(self.stack))

        window = play(plan, begin, lambda: readings.append(usage.cpu_seconds(self.stack)))
        used = usage.spent(*readings)
        used["generator"] = window.cpu_s
        if plan.kind in ("bets", "grpc_bets"):
            self.acknowledged += window.accepted
        elif plan.kind == "mixed":
            self.acknowledged += window.accepted_of.get("bets", 0)
        elif plan.kind == "bulk":
            self.acknowledged += window.counted
        return window, used

    def open_workload(self) -> None:
        """Open the wallets and the matches, once, through the API, and wait until that is consumed."""
        if self.opened:
            return
        users = self.sizes.wallets
        self.show(f"opening {users} wallets")
        self.matches = self.create_matches(self.sizes.matches)
        plan = self.plan("deposits", loop="closed", duration_s=120.0, requests_max=users, run="bench")
        window = play(plan)
        if window.accepted != users:
            raise BenchFailed(
                f"only {window.accepted} of {users} wallets could be opened: {window.statuses} {window.first_problem}"
            )
        self.drain()
        self.opened = True

    def create_matches(self, count: int) -> list[str]:
        """Create matches that stay open for a day and return their ids."""
        ids = [str(uuid4()) for _ in range(count)]
        closes_at_ms = int(time.time() * 1000) + MATCH_OPEN_MS

        async def create() -> None:
            wire = Wire("127.0.0.1", self.api_ports[0], timeout_s=SETUP_TIMEOUT_S)
            try:
                for match_id in ids:
                    body = {"match_id": match_id, "closes_at_ms": closes_at_ms, "outcomes": OUTCOMES}
                    await self.command(wire, "/v1/matches", f"open-{match_id}", body)
            finally:
                wire.close()

        asyncio.run(create())
        return ids

    async def command(self, wire: Wire, path: str, key: str, body: object) -> None:
        """Send one command that has to be accepted. Raises BenchFailed."""
        request = post(path, key, msgspec.json.encode(body), self.token)
        answer = await wire.exchange(request)
        if answer.status != 202:
            raise BenchFailed(f"POST {path} answered {answer.status}: {answer.body[:300].decode(errors='replace')}")

    def drain(self) -> None:
        """Wait until every event is published and consumed. Raises NotDrained."""
        asyncio.run(drain(self.config, DRAIN_TIMEOUT_S, lambda text: self.show(f"draining: {text}")))

    def entries(self) -> int:
        """Return how many entries the ledger holds on all servers."""

        async def count() -> int:
            total = 0
            for server in self.config.servers:
                connection = await self.superuser(server)
                try:
                    total += int(await connection.fetchval("SELECT count(*) FROM wallet_ledger"))
                finally:
                    await connection.close()
            return total

        return asyncio.run(count())

    async def superuser(self, server: ServerConfig, database: str | None = None) -> asyncpg.Connection:
        """Open a superuser's connection to one server."""
        user, password = self.stack.superuser
        return await asyncpg.connect(
            host=server.host, port=server.port, user=user, password=password, database=database or server.database
        )

    def row(self, name: str, **fields: Any) -> Row:
        """Return a row of this run; add it with `add`."""
        return Row(name=name, commit=self.commit, machine=self.machine, **fields)

    def add(self, row: Row) -> None:
        """Keep a row and say what it is."""
        self.rows.append(row)
        rate = "-" if row.rate is None else f"{row.rate:,.0f} {row.unit}"
        p99 = "" if row.p99_ms is None else f", p99 {row.p99_ms:,.1f} ms"
        self.progress.say(f"  {row.title}: {rate}{p99}{'' if row.valid else '  INVALID'}{_because(row)}")

    def best(self, name: str) -> float | None:
        """Return the highest valid rate among the rows of a name."""
        rates = [row.rate for row in self.rows if row.name == name and row.valid and row.rate]
        return max(rates, default=None)


def _because(row: Row) -> str:
    return f" ({row.reason})" if row.reason else ""
