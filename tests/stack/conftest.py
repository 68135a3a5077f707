"""One real stack for all tests of this folder: two servers, Kafka, Redis, two API processes, every worker."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import pytest
from exchange_floor import Floor

from compose.stack import Stack
from compose.state import StackSpec
from reference.config import ServiceConfig
from reference.store import Store

SERVERS = 2


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The session's stack; the end of each node's log is printed when it does not start."""
    # Below the checkout and not in the system's temporary folder, which may be memory: fsync must be real.
    root = Path(__file__).parents[2] / ".ledgerproof" / "tests"
    # No reconciler: these tests write to the stores by hand, and it would pause the payouts for that.
    with Stack.start(StackSpec(servers=SERVERS, reconcilers=0), root=root) as started:
        yield started
    assert started.residue == []


@pytest.fixture(scope="session")
def service_config(stack: Stack) -> ServiceConfig:
    """The configuration that the stack's processes read."""
    return stack.config


@pytest.fixture(scope="session")
def superuser_dsn(stack: Stack) -> list[str]:
    """DSN of each server's ledger database for its superuser."""
    user, password = stack.superuser
    return [f"postgresql://{user}:{password}@127.0.0.1:{stack.port(f'pg{index}')}/ledger" for index in range(SERVERS)]


@pytest.fixture(scope="session")
def pg_dsn(superuser_dsn: list[str]) -> str:
    """Superuser's DSN of one server, for tests that try SQL of their own in schemas of their own."""
    return superuser_dsn[0]


@pytest.fixture(scope="session")
def api_bases(stack: Stack) -> list[str]:
    """Base address of each API process."""
    return [f"http://127.0.0.1:{stack.port(name)}" for name in stack.nodes_of("api")]


@pytest.fixture(scope="session")
def operator(stack: Stack) -> dict[str, str]:
    """Headers of a caller that may act for every wallet and command matches."""
    return {"authorization": f"Bearer {stack.token()}"}


@pytest.fixture
async def floor(service_config: ServiceConfig, superuser_dsn: list[str]) -> AsyncIterator[Floor]:
    """The API's and the matcher's connections, and a superuser's to every server."""
    async with AsyncExitStack() as stack:
        owner = []
        for dsn in superuser_dsn:
            connection = await asyncpg.connect(dsn)
            stack.push_async_callback(connection.close)
            owner.append(connection)
        api, matching = Store(service_config, "ledger_api"), Store(service_config, "ledger_matcher")
        stack.push_async_callback(api.close)
        stack.push_async_callback(matching.close)
        yield Floor(api, matching, owner)


@pytest.fixture(autouse=True)
def _logs_on_failure(request: pytest.FixtureRequest, stack: Stack) -> Iterator[None]:
    """Show what every node logged last when a test of the stack fails."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        for node in stack.status(memory=False):
            print(f"--- {node.name}\n{stack.logs_tail(node.name, 10)}")
