"""A stack of its own for the reconciler's tests, with wallets, bets and matches that went through the service."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from exchange_floor import OUTCOMES, Floor, crowd, wallets

from compose.stack import Stack
from compose.state import StackSpec
from ledgerproof.collect import drain
from reference.commands import MatchState
from reference.config import ServiceConfig
from reference.reconciliation import Finding, Kind, Pass, Report
from reference.store import Store

DRAIN_TIMEOUT_S = 60.0


@dataclass
class World:
    """The stack, and what is in it."""

    stack: Stack
    config: ServiceConfig
    users: list[int]
    settled: list[UUID]

    def dsn(self, index: int) -> str:
        """The superuser's DSN of a server."""
        user, password = self.stack.superuser
        return f"postgresql://{user}:{password}@127.0.0.1:{self.stack.port(f'pg{index}')}/ledger"

    async def owner(self, user_id: int) -> asyncpg.Connection:
        """A superuser's connection to a wallet's server on which triggers are off."""
        return await self.owner_of(self.config.routing[user_id % 100])

    async def owner_of(self, index: int) -> asyncpg.Connection:
        connection = await asyncpg.connect(self.dsn(index))
        await connection.execute("SET session_replication_role = replica")
        return connection

    async def run(self, kind: Kind = Kind.FULL, only: Sequence[str] | None = None) -> Report:
        report = await Pass(self.config, kind, "test", only).run()
        assert report is not None
        return report

    def role(self, name: str) -> Store:
        return Store(self.config, name)


def found(report: Report) -> list[Finding]:
    """All findings of a pass that saw everything."""
    assert report.problems == []
    return [finding for server in report.servers for finding in server.findings]


async def play(world_config: ServiceConfig, dsn: Sequence[str], users: Sequence[int], bets: int, seed: int) -> UUID:
    """Open a match, place bets of these wallets, wait until they are matched, and settle it; all by the service."""
    floor = Floor(Store(world_config, "ledger_api"), Store(world_config, "ledger_matcher"), [])
    try:
        match_id = await floor.open_match(home=seed % len(dsn))
        arrivals = crowd(seed, [match_id], users, bets)
        await floor.pay(arrivals)
        home = floor.api.home_of(match_id)
        connection = await asyncpg.connect(dsn[home])
        arrived = "SELECT count(*) >= $2 FROM orders WHERE match_id = $1"
        try:
            await until(lambda: connection.fetchval(arrived, match_id, bets), DRAIN_TIMEOUT_S)
        finally:
            await connection.close()
        await floor.move(match_id, MatchState.CLOSED)
        await floor.move(match_id, MatchState.SETTLING, OUTCOMES[seed % 3])
        return match_id
    finally:
        await floor.api.close()
        await floor.matcher.close()


async def filled(stack: Stack) -> World:
    """Give the stack wallets on every server and two settled matches, one at home on each."""
    world = World(stack, stack.config, wallets(40), [])
    dsn = [world.dsn(index) for index in range(len(world.config.servers))]
    floor = Floor(Store(world.config, "ledger_api"), Store(world.config, "ledger_matcher"), [])
    await floor.fund(world.users)
    await floor.api.close()
    for seed in (2, 3):
        world.settled.append(await play(world.config, dsn, world.users, 120, seed))
    await drain(world.config, DRAIN_TIMEOUT_S, lambda _: None)
    return world


@contextmanager
def reconciled_stack() -> Iterator[Stack]:
    """Start a stack whose reconciler passes over nothing by itself: the tests say when."""
    root = Path(__file__).parents[2] / ".ledgerproof" / "tests" / "reconciler" / ".ledgerproof"
    spec = StackSpec(servers=2, apis=1, settings={"reconcile_every_s": 0.0, "reconcile_full_at": ""})
    with Stack.start(spec, root=root) as started:
        yield started
    assert started.residue == []


def fresh_wallet(config: ServiceConfig, server: int) -> int:
    """A wallet nobody has used, on this server."""
    while True:
        user = uuid4().int % 10**14 + 1
        if config.routing[user % 100] == server:
            return user


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 30.0) -> None:
    """Wait until the awaited condition gives something true."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        await asyncio.sleep(0.05)
