"""One real Postgres server does what the model of the exchange says: the machine of the pure rules, in SQL."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sql_exchange import DATABASE, Server, SqlExchange

from compose.stack import Stack
from reference.config import ServerConfig
from reference.errors import LedgerError
from reference.sql import load_sql
from tests.depth import depth
from tests.machine.exchange_machine import ExchangeMachine
from tests.machine.steps import TAKEN


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


def machine_on(server: Server) -> type[ExchangeMachine]:
    """The machine with this server as its system."""

    class OnPostgres(ExchangeMachine):
        def open_system(self, commission_bps: int) -> SqlExchange:
            return SqlExchange(server, commission_bps)

    return OnPostgres


def test_whatever_is_asked_of_a_real_server_its_ledger_is_the_models(server: Server) -> None:
    run_state_machine_as_test(machine_on(server), settings=depth(ci=12, nightly=300))


@contextmanager
def planted(server: Server, function: str, sound: str, broken: str) -> Iterator[None]:
    """Replace a function of the ledger by one with a bug, and put the sound one back."""
    text = load_sql("functions")["functions"]
    found = re.search(rf"CREATE FUNCTION {function}\(.*?\nEND \$\$;", text, re.DOTALL)
    assert found is not None
    assert found.group().count(sound) == 1, "the bug no longer applies"
    original = found.group().replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
    server.run(server.owner.execute(original.replace(sound, broken)))
    try:
        yield
    finally:
        server.run(server.owner.execute(original))


@pytest.mark.parametrize(
    ("function", "sound", "broken"),
    [
        ("ledger_post", "p_amount[i] < 0 THEN 'INSUFFICIENT_FUNDS'", "p_amount[i] <= 0 THEN 'INSUFFICIENT_FUNDS'"),
        (
            "ledger_post",
            "IF EXISTS (SELECT FROM unnest(p_user, p_key)",
            "IF false AND EXISTS (SELECT FROM unnest(p_user, p_key)",
        ),
    ],
    ids=["the last cent cannot be spent", "a stored refusal is forgotten"],
)
def test_a_bug_planted_in_the_ledgers_functions_is_noticed(
    server: Server, function: str, sound: str, broken: str
) -> None:
    taken = TAKEN.copy()
    quick = settings(depth(ci=60, nightly=60), phases=[Phase.generate], report_multiple_bugs=False)
    with planted(server, function, sound, broken), pytest.raises((AssertionError, LedgerError)):
        run_state_machine_as_test(machine_on(server), settings=quick)
    # Steps count what a sound build was put through.
    TAKEN.clear()
    TAKEN.update(taken)
