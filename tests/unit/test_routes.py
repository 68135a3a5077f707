"""Where a process thinks a shard is: news by epoch, waiting while a shard is between servers, and its bounds."""

import asyncio
from collections.abc import Callable
from uuid import UUID

import asyncpg
import pytest

from ledgerproof.shard_move import plan_move
from ledgerproof.shards_command import _ranges
from reference import store as store_module
from reference.config import ROLES, ServerConfig, ServiceConfig
from reference.errors import NotAdmitted, ShardNotHere
from reference.routing import SHARD_NOT_HERE, even_routing
from reference.store import Routes, Store, meaning_of

CONFIG = ServiceConfig(
    servers=[ServerConfig("pg0", "127.0.0.1", 1), ServerConfig("pg1", "127.0.0.1", 1)],
    routing=even_routing(2),
    passwords=dict.fromkeys(ROLES, "secret"),
    kafka_bootstrap="127.0.0.1:2",
    redis_host="127.0.0.1",
    redis_port=3,
    command_deadline_ms=200,
)


def test_of_two_claims_the_later_move_counts_whatever_order_they_come_in() -> None:
    routes = Routes(CONFIG)
    assert routes.table[7] == 0
    assert routes.learn(7, "pg1", 2)
    assert not routes.learn(7, "pg0", 1)
    assert not routes.learn(7, "pg0", 2)
    assert routes.table[7] == 1
    assert routes.learn(7, "pg0", 3)
    assert (routes.table[7], routes.epoch(7)) == (0, 3)


def test_a_server_that_the_process_does_not_know_changes_nothing() -> None:
    routes = Routes(CONFIG)
    assert not routes.learn(7, "pg9", 5)
    assert routes.table == CONFIG.routing


def test_moving_wallets_moves_no_match() -> None:
    store = Store(CONFIG, "ledger_api")
    match_id = UUID(int=7)
    before = store.home_of(match_id)
    store.routes.learn(7, "pg1", 1)
    assert store.server_of(107) == 1
    assert store.home_of(match_id) == before == 0


def test_the_servers_error_becomes_a_definite_one() -> None:
    error = asyncpg.PostgresError.new({"C": SHARD_NOT_HERE, "M": "shard 7 is not on this server", "S": "ERROR"})
    meaning = meaning_of(error)
    assert isinstance(meaning, ShardNotHere)
    assert isinstance(meaning, NotAdmitted)
    assert meaning.definite


def scenario(action_of: Callable[[Store], Callable[[int], object]]) -> object:
    async def run() -> object:
        store = Store(CONFIG, "ledger_api")
        try:
            return await store.at_wallet(107, action_of(store))  # type: ignore[arg-type]
        finally:
            await store.close()

    return asyncio.run(run())


def test_a_call_waits_for_its_shard_and_then_goes_to_the_new_server() -> None:
    asked: list[int] = []

    def action_of(store: Store) -> Callable[[int], object]:
        async def action(server: int) -> str:
            asked.append(server)
            if len(asked) == 2:
                store.routes.learn(7, "pg1", 1)
            if server == 0:
                raise ShardNotHere("moving")
            return "done"

        return action

    assert scenario(action_of) == "done"
    assert asked == [0, 0, 1]


def test_a_call_that_waits_too_long_is_refused_as_not_admitted() -> None:
    def action_of(_: Store) -> Callable[[int], object]:
        async def action(_: int) -> str:
            raise ShardNotHere("moving")

        return action

    with pytest.raises(ShardNotHere):
        scenario(action_of)


def test_no_more_calls_wait_than_the_bound_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MOVING_WAITERS_MAX", 0)
    asked: list[int] = []

    def action_of(_: Store) -> Callable[[int], object]:
        async def action(server: int) -> str:
            asked.append(server)
            raise ShardNotHere("moving")

        return action

    with pytest.raises(ShardNotHere):
        scenario(action_of)
    assert asked == [0]


@pytest.mark.parametrize("seed", range(50))
def test_the_planned_move_goes_to_another_server_during_the_load(seed: int) -> None:
    routing = even_routing(4)
    planned = plan_move(seed, 30, routing, 4)
    assert planned is not None
    assert planned == plan_move(seed, 30, routing, 4)
    assert planned.target != routing[planned.shard]
    assert 0 <= planned.target < 4
    assert 0 < planned.at_s < 30


def test_one_server_has_nowhere_to_move_a_shard() -> None:
    assert plan_move(1, 30, even_routing(1), 1) is None


def test_shards_are_listed_in_ranges() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert _ranges([]) == ""
