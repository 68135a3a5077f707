"""Errors in the seed's capacity table: its own figures against each other, and against what the plan needs."""

import math

from sim.demands import read_demands
from sim.plan import PLANS, read_plan, read_prices
from sim.plan_answer import Answer, answer
from sim.plan_seed import CONFIRMED

SHARDS, PODS = 100, 50
FOUND: Answer = answer(read_plan(PLANS / "million.toml"), read_demands(), read_prices())
NUMBERS, INTERVALS = FOUND.figures.numbers, FOUND.intervals


def verdict(what: str) -> str:
    return next(each.verdict for each in FOUND.verdicts if each.figure.what == what)


def test_seed_has_three_sizes_for_one_table() -> None:
    one_server, shards_times_one, total = 100 + 50, SHARDS * 1, 400
    assert len({one_server, shards_times_one, total}) == 3
    low, _ = INTERVALS["ledger_gb"]
    assert low > one_server > shards_times_one, "ten bytes of hundred are indexes and row headers that it leaves out"
    assert verdict("10M ledger rows").endswith("times too low")


def test_seed_partitions_do_not_add_up() -> None:
    assert 10 * 1 != 100
    assert {10, 5, math.ceil(100 / 9)} != {10}
    largest = max(NUMBERS[f"{group}s"] for group in ("projector", "matcher", "settler"))
    assert NUMBERS["partitions_per_topic"] >= largest, "a consumer without a partition does nothing"


def test_seed_cores_of_the_shards_do_not_add_up() -> None:
    assert SHARDS * 4 == 400 != 100
    assert SHARDS * 8 == 800, "and their memory, 800 GB, is in no total"


def test_seed_ledger_is_full_within_hours() -> None:
    entries, events_per_s = 1e9, 1e5
    assert entries / events_per_s / 3600 < 3
    assert NUMBERS["ledger_days"] < 1


def test_seed_pods_have_many_times_the_cores_they_need() -> None:
    cpu_ms = 4 / 2_000 * 1000
    busy_ms = NUMBERS["api_busy_cores"] / NUMBERS["requests_per_s"] * 1000
    assert cpu_ms == 2 > 5 * busy_ms
    assert INTERVALS["api_pods"][1] < PODS
    assert verdict("API pods").endswith("times too high")


def test_seed_consumers_are_slower_than_ours() -> None:
    assert INTERVALS["slowest_worker_per_s"][0] > 1_000
    assert INTERVALS["consumers"][1] < 100


def test_seed_servers_are_more_than_cores_or_storage_need() -> None:
    assert INTERVALS["servers"][1] < SHARDS
    wants = FOUND.figures.constraints["servers"]
    assert max(wants["CPU"], wants["storage"], wants["posting"], wants["relay"]) < SHARDS


def test_seed_database_leaves_out_the_outbox() -> None:
    assert NUMBERS["outbox_gb"] > NUMBERS["ledger_gb"] > 0, "a day of events outweighs all entries that are kept"
    assert INTERVALS["database_gb"][0] > 400


def test_seed_brokers_are_too_few_for_their_storage() -> None:
    wants = FOUND.figures.constraints["brokers"]
    assert wants["storage"] > 5
    assert FOUND.figures.binding["brokers"] == "storage"


def test_seed_cache_is_larger_than_its_balances() -> None:
    assert INTERVALS["redis_gb"][1] < 5
    assert verdict("Redis nodes") == CONFIRMED


def test_seed_cost_has_no_traffic_between_zones() -> None:
    others = ("api", "worker", "database", "kafka", "redis")
    assert NUMBERS["traffic_cost"] > max(NUMBERS[f"{part}_cost"] for part in others)
    assert verdict("cost of a month") == CONFIRMED, "the seed's total is right, though its parts are not"


def test_seed_levels_one_and_two_end_far_later() -> None:
    first, second, third = FOUND.levels
    assert first.users_max > 10 * 2_000
    assert second.users_max > 10 * 10_000
    assert third.users_max > 1_000_000
    assert first.costs[2_000] is not None
    assert first.costs[2_000] < 5_000
