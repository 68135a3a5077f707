"""One real Postgres server does what the model of the exchange says: the machine of the pure rules, in SQL."""

from collections.abc import Iterator

import pytest
from hypothesis.stateful import run_state_machine_as_test
from sql_exchange import DATABASE, Server, SqlExchange

from compose.stack import Stack
from reference.config import ServerConfig
from tests.depth import depth
from tests.machine.exchange_machine import ExchangeMachine


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[Server]:
    """A database of its own on the first server of the stack, installed as the service installs it."""
    place = ServerConfig("pg0", "127.0.0.1", stack.port("pg0"), DATABASE)
    # Nobody ever connects to it: it is where the shards are that this server does not hold.
    elsewhere = ServerConfig("pg1", "127.0.0.1", 1, DATABASE)
    opened = Server(place, elsewhere, stack.config.passwords, stack.superuser)
    opened.open()
    yield opened
    opened.close()


@pytest.mark.timeout(1800)
def test_whatever_is_asked_of_a_real_server_its_ledger_is_the_models(server: Server) -> None:
    class OnPostgres(ExchangeMachine):
        def open_system(self, commission_bps: int) -> SqlExchange:
            return SqlExchange(server, commission_bps)

    run_state_machine_as_test(OnPostgres, settings=depth(ci=25, nightly=150))
