"""Plans are arithmetic: figures worked out by hand, what binds, what users do to them, intervals, and bad files."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.demands import Demand, Demands, read_demands
from sim.plan import (
    COST_PARTS,
    PLANS,
    PRICES,
    TOPICS,
    Assumptions,
    PriceTable,
    batch_of,
    calculate,
    rates_of,
    read_plan,
    read_prices,
    spread,
)
from sim.plan_answer import Missing, answer, moved, postgres_ms_per_bet
from sim.plan_levels import levels, single_postgres_cores
from sim.plan_seed import CONFIRMED, SeedFigure, judge
from sim.tables import TableError

MILLION = PLANS / "million.toml"
PLAN = read_plan(MILLION)
STORED = read_demands()
PRICED = read_prices()
PRICE = {name: getattr(PRICED.price, name).value for name in PriceTable.__struct_fields__}
VALUES = {name: each.value for name, each in STORED.demand.items()}

# Round demands for arithmetic by hand: nothing costs anything but what a test sets.
ROUND: dict[str, float] = {
    **dict.fromkeys(VALUES, 0.0),
    **dict.fromkeys(("projector_per_s", "matcher_per_s", "settler_per_s", "relay_per_s"), 1e12),
    "aging_factor": 1.0,
    "post_batch_ms": 1.0,
    "api_mb": 100.0,
}


def assume(**changes: Any) -> Assumptions:
    """A million users with one request a second, half of them bets, in one zone, with room for all connections."""
    base = {
        "requests_per_user_per_s": 1.0, "read_share": 0.5, "cache_hit_share": 1.0, "strong_read_share": 0.0,
        "bet_share": 1.0, "zones": 1, "outbox_days": 0.0, "max_connections": 1_000_000, "overhead_share": 0.0,
    }  # fmt: skip
    return msgspec.structs.replace(PLAN.assume, **{**base, **changes})


def numbers(assumed: Assumptions, **demand: float) -> dict[str, float]:
    return calculate(assumed, {**ROUND, **demand}, PRICE).numbers


# --- by hand ----------------------------------------------------------------------------------------------


def test_rates_are_users_times_requests_and_a_deposit_is_one_event() -> None:
    rates = rates_of(assume(bet_share=0.8, peak_factor=2.0))
    assert rates.requests == 2_000_000
    assert (rates.reads, rates.writes, rates.bets) == (1_000_000, 1_000_000, 800_000)
    assert rates.events == pytest.approx(800_000 * 3 + 200_000)


def test_api_pods_by_hand() -> None:
    # 500,000 writes × 0.1 ms + 500,000 reads × 0.05 ms = 75 cores; ÷ (4 × 0.7) = 26.8.
    found = calculate(assume(), {**ROUND, "bet_api_ms": 0.1, "read_redis_api_ms": 0.05}, PRICE)
    assert found.numbers["api_busy_cores"] == pytest.approx(75)
    assert found.numbers["api_pods"] == 27
    assert found.binding["api_pods"] == "CPU: load"
    assert found.numbers["api_processes"] == 108
    # 27 pods × (4 × 30 + 2 × 3.5).
    assert found.numbers["api_cost"] == pytest.approx(27 * (4 * PRICE["core_month"] + 2 * PRICE["memory_gb_month"]))


def test_losing_a_zone_adds_pods_in_whole_zones() -> None:
    # With two of three zones left at 0.9: 75 ÷ (4 × 0.9) × 3/2 = 31.25, and the next multiple of three is 33.
    found = calculate(assume(zones=3), {**ROUND, "bet_api_ms": 0.1, "read_redis_api_ms": 0.05}, PRICE)
    assert found.numbers["api_pods"] == 33
    assert found.binding["api_pods"] == "CPU: a zone lost"
    # 22 pods of 4 processes remain.
    assert found.numbers["api_use_zone_lost"] == pytest.approx(75 / 88)


def test_memory_binds_a_pod_that_cannot_hold_a_process_for_each_core() -> None:
    found = calculate(assume(pod_memory_gb=2.0), {**ROUND, "bet_api_ms": 0.1, "api_mb": 900.0}, PRICE)
    # 2 processes fit instead of 4: 50 cores ÷ (2 × 0.7).
    assert found.numbers["api_pods"] == 36
    assert found.binding["api_pods"] == "memory: load"


def test_reads_are_mixed_by_where_they_are_answered() -> None:
    mixed = assume(cache_hit_share=0.8, strong_read_share=0.1)
    cost = {"read_redis_api_ms": 0.1, "read_projection_api_ms": 1.0, "read_ledger_api_ms": 2.0}
    # 0.9 × (0.8 × 0.1 + 0.2 × 1) + 0.1 × 2 = 0.452 ms.
    assert numbers(mixed, **cost)["api_busy_cores"] == pytest.approx(500_000 * 0.452 / 1000)


def test_consumers_by_hand_and_by_the_drain_after_an_outage() -> None:
    # 1,500,000 events/s ÷ (10,000 × 0.7) = 214.3; 300 s of outage drained in 600 s: × 1.5 ÷ 10,000 = 225.
    found = calculate(assume(), {**ROUND, "projector_per_s": 10_000.0}, PRICE)
    assert found.constraints["projectors"]["load"] == pytest.approx(214.2857, rel=1e-6)
    assert (found.numbers["projectors"], found.binding["projectors"]) == (225, "rate: drain")
    calm = calculate(assume(outage_s=60.0), {**ROUND, "projector_per_s": 10_000.0}, PRICE)
    assert (calm.numbers["projectors"], calm.binding["projectors"]) == (215, "rate: load")
    assert calm.numbers["partitions_per_topic"] == 430
    assert calm.numbers["partitions"] == 430 * TOPICS


def test_servers_by_the_cores_that_single_commands_cost() -> None:
    # 500,000 × 0.1 ms = 50 cores ÷ (4 × 0.7) = 17.86.
    found = calculate(assume(), {**ROUND, "post_cpu_entry_ms": 0.1}, PRICE)
    assert (found.numbers["servers"], found.binding["servers"]) == (18, "CPU")
    assert found.numbers["database_servers"] == 54
    aged = calculate(assume(), {**ROUND, "post_cpu_entry_ms": 0.1, "aging_factor": 1.4}, PRICE)
    assert aged.numbers["servers"] == 25


def test_fuller_batches_need_fewer_servers_than_single_commands() -> None:
    # One API process: batches of b = λF/(1−λP) share the fixed cost. Single commands: 5,000 × 0.6 ms ÷ 2.8 = 1.07.
    one = assume(users=10_000, pod_cores=1)
    demand = {**ROUND, "post_cpu_batch_ms": 0.6, "post_batch_ms": 1.0, "post_entry_ms": 0.1}
    found = calculate(one, demand, PRICE)
    assert found.numbers["servers"] == 1
    assert found.numbers["mean_batch"] == pytest.approx(5 * 1.0 / (1 - 5 * 0.1))
    assert found.numbers["postgres_busy_cores"] == pytest.approx(5000 * 0.6 / 10 / 1000)
    many = calculate(msgspec.structs.replace(one, pod_cores=64), {**demand, "api_mb": 1.0}, PRICE)
    assert many.numbers["mean_batch"] == 1
    assert many.numbers["servers"] == 2


@given(st.floats(0.1, 9_000), st.floats(0.01, 5), st.floats(0.001, 0.1))
def test_a_batch_is_what_arrives_while_it_is_posted(rate_per_s: float, batch_ms: float, entry_ms: float) -> None:
    batch = batch_of(rate_per_s, batch_ms, entry_ms)
    if 1 < batch < 256:
        assert batch == pytest.approx(rate_per_s / 1000 * (batch_ms + entry_ms * batch))
    assert 1 <= batch <= 256


def test_storage_binds_servers_that_have_cores_to_spare() -> None:
    # 10⁹ entries × 300 B = 300 GB; of 10 GB at most 0.7 is used: 42.9 servers.
    found = calculate(assume(server_disk_gb=10.0), {**ROUND, "ledger_bytes_per_entry": 300.0}, PRICE)
    assert found.numbers["ledger_gb"] == 300
    assert (found.numbers["servers"], found.binding["servers"]) == (43, "storage")
    assert found.numbers["database_copies_gb"] == 900
    assert found.numbers["backup_gb"] == 9000


def test_connections_make_groups_and_groups_make_servers() -> None:
    # 27 pods × 4 processes × 7 connections do not fit into 100, less 2 × (3 workers + 1 reconciler + 2 relays) = 12.
    # 88 // 7 = 12 processes: 108 ÷ 12 = 9 groups.
    found = calculate(assume(max_connections=100), {**ROUND, "bet_api_ms": 0.1, "read_redis_api_ms": 0.05}, PRICE)
    assert found.numbers["cells"] == 9
    assert found.numbers["connections_per_server"] == 12 * 7 + 12
    assert (found.numbers["servers"], found.binding["servers"]) == (9, "cells")


def test_more_servers_than_shards_is_a_problem() -> None:
    found = calculate(assume(users=10_000_000), {**ROUND, "post_cpu_entry_ms": 0.1}, PRICE)
    assert found.numbers["servers"] == 179
    assert any("100 logical shards" in problem for problem in found.problems)


def test_brokers_by_hand() -> None:
    # 1,500,000 events/s × 100 B × a day × 3 copies = 38.88 TB; 0.7 of 10 TB each: 5.55, in three zones 6.
    found = calculate(
        assume(zones=3, retention_days=1.0, broker_network_mb_per_s=1e6),
        {**ROUND, "outbox_bytes_per_event": 100.0}, PRICE,
    )  # fmt: skip
    assert found.numbers["kafka_copies_gb"] == pytest.approx(38_880)
    assert (found.numbers["brokers"], found.binding["brokers"]) == (6, "storage")
    # In once, to and from two copies, out to three groups: 150 MB/s × 8.
    assert found.numbers["kafka_network_mb_per_s"] == pytest.approx(1200)


def test_redis_and_traffic_by_hand() -> None:
    found = numbers(assume(zones=3), redis_bytes_per_wallet=500.0, wal_bytes_per_bet=1000.0)
    assert found["redis_gb"] == 0.5
    assert found["redis_nodes"] == 3
    # 500,000 bets/s × 1 kB to each of two standbys: 1 GB/s for 30 days.
    assert found["zone_gb_month"] == pytest.approx(2_592_000)
    assert found["traffic_cost"] == pytest.approx(2_592_000 * PRICE["zone_gb"])


def test_the_cost_is_the_sum_of_its_parts() -> None:
    found = calculate(PLAN.assume, VALUES, PRICE).numbers
    assert found["cost"] == pytest.approx(sum(found[f"{part}_cost"] for part in COST_PARTS))
    assert found["overhead_cost"] == pytest.approx(found["cost"] * 0.2 / 1.2)


def test_a_whole_number_is_not_one_more_for_its_binary_dust() -> None:
    # 0.1 × 3 ÷ 0.3 is a little more than 1 in binary.
    assert spread(0.1 * 3, 0.3 / 0.7, assume())[0] == 1


# --- monotone ---------------------------------------------------------------------------------------------

GROWING = ("api_pods", "projectors", "matchers", "settlers", "reconcilers", "brokers", "partitions", "database_gb",
           "kafka_gb", "redis_gb", "zone_gb_month", "servers", "cost")  # fmt: skip


@settings(max_examples=200)
@given(st.integers(1, 20_000_000), st.integers(1, 20_000_000), st.sampled_from((100, 300, 1000, 100_000)))
def test_more_users_never_need_less(one: int, other: int, connections: int) -> None:
    fewer, more = (
        calculate(msgspec.structs.replace(PLAN.assume, users=users, max_connections=connections), VALUES, PRICE).numbers
        for users in sorted((one, other))
    )
    for name in GROWING:
        assert fewer[name] <= more[name] * (1 + 1e-9), name


@given(st.sampled_from(("bet_api_ms", "settler_ms", "post_cpu_entry_ms", "outbox_bytes_per_event", "redis_mb")),
       st.floats(1, 5))  # fmt: skip
def test_dearer_work_never_costs_less(name: str, factor: float) -> None:
    before = calculate(PLAN.assume, VALUES, PRICE).numbers["cost"]
    after = calculate(PLAN.assume, {**VALUES, name: VALUES[name] * factor}, PRICE).numbers["cost"]
    assert after >= before * (1 - 1e-9)


# --- assumptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Assumptions.__struct_fields__)
def test_every_assumption_changes_the_answer(name: str) -> None:
    def outcome(assumed: Assumptions) -> list[Any]:
        found = calculate(assumed, VALUES, PRICE)
        return [found.numbers, found.constraints, levels(assumed, VALUES, PRICE)]

    before = outcome(PLAN.assume)
    assert any(outcome(moved(PLAN.assume, name, factor)) != before for factor in (0.8, 1.2))


def test_a_moved_assumption_stays_within_its_range() -> None:
    for name in Assumptions.__struct_fields__:
        for factor in (0.8, 1.2):
            msgspec.convert(msgspec.structs.asdict(moved(PLAN.assume, name, factor)), Assumptions)
    assert moved(PLAN.assume, "cache_hit_share", 1.2).cache_hit_share == 1
    assert moved(PLAN.assume, "zones", 1.2).zones == 4
    assert moved(PLAN.assume, "peak_factor", 0.8).peak_factor == 1


RANGES = {
    name: (low, high)
    for name, low, high in (
        ("users", 1, 10**9), ("read_share", 0, 1), ("bet_share", 0.01, 1), ("zones", 1, 9), ("standbys", 0, 9),
        ("replication_factor", 1, 9), ("max_connections", 1, 10**6), ("pod_memory_gb", 0.01, 100.0),
        ("mean_share", 1e-9, 1), ("requests_per_user_per_s", 1e-9, 10.0), ("entries_per_user", 1e-3, 1e6),
        ("outage_s", 0, 1e6), ("drain_s", 1e-3, 1e6), ("server_cores", 1, 256), ("target_utilisation", 0.05, 0.99),
    )
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_assumptions_within_their_ranges_are_answered(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(sorted(RANGES)), unique=True, max_size=5))
    changes = {
        name: data.draw(st.integers(*RANGES[name]) if isinstance(getattr(PLAN.assume, name), int) else
                        st.one_of(st.sampled_from([float(bound) for bound in RANGES[name]]), st.floats(*RANGES[name])))
        for name in chosen
    }  # fmt: skip
    plan = msgspec.structs.replace(PLAN, assume=msgspec.structs.replace(PLAN.assume, **changes))
    found = answer(plan, STORED, PRICED, samples=3)
    for name in GROWING:
        assert math.isfinite(found.figures.numbers[name]), name
        assert found.figures.numbers[name] >= 0, name
    used = found.figures.numbers.get("consumer_use_zone_lost", 0.0)
    assert used <= plan.assume.zone_lost_utilisation + 1e-9, "a lost zone must leave the headroom that was asked for"


# --- intervals --------------------------------------------------------------------------------------------


def exact(**wide: tuple[float, float, float]) -> Demands:
    """The stored demands with every interval closed but these."""
    demand = {}
    for name, each in STORED.demand.items():
        low, value, high = wide.get(name, (each.value,) * 3)
        demand[name] = Demand(of=each.of, value=value, low=low, high=high, unit=each.unit, source=each.source)
    return msgspec.structs.replace(STORED, demand=demand)


CLOSED_PRICES = msgspec.structs.replace(
    PRICED,
    price=PriceTable(
        **{
            name: msgspec.structs.replace(each, low=each.value, high=each.value)
            for name in PriceTable.__struct_fields__
            for each in [getattr(PRICED.price, name)]
        }
    ),
)


def test_closed_intervals_give_closed_intervals() -> None:
    found = answer(PLAN, exact(), CLOSED_PRICES, samples=5)
    for name, (low, high) in found.intervals.items():
        assert low == high == pytest.approx(found.figures.numbers[name]), name


def test_an_interval_is_carried_to_what_it_concerns_and_to_nothing_else() -> None:
    value = VALUES["bet_kafka_ms"]
    found = answer(PLAN, exact(bet_kafka_ms=(0.5 * value, value, 1.5 * value)), CLOSED_PRICES, samples=4_000)
    low, high = (bound / found.figures.numbers["kafka_busy_cores"] for bound in found.intervals["kafka_busy_cores"])
    # 5 % of a symmetric triangle from 0.5 to 1.5 lie below 0.5 + √(0.05 × 0.5).
    assert low == pytest.approx(0.5 + math.sqrt(0.05 * 0.5), abs=0.01)
    assert high == pytest.approx(1.5 - math.sqrt(0.05 * 0.5), abs=0.01)
    assert found.intervals["api_busy_cores"][0] == found.intervals["api_busy_cores"][1]


def test_the_same_seed_draws_the_same_intervals_and_another_does_not() -> None:
    first, again, other = (answer(PLAN, STORED, PRICED, samples=200, seed=seed).intervals for seed in (1, 1, 2))
    assert first == again
    assert first["cost"] != other["cost"]
    assert first["cost"][0] < first["cost"][1]


def test_the_elasticity_of_a_proportional_cost_is_one() -> None:
    found = answer(PLAN, exact(), PRICED, samples=2)
    moves = {move.name: move for move in found.moves}
    # Everything but the counts that are rounded up is proportional to the users, and all of it to no price.
    assert moves["users"].elasticity == pytest.approx(1.0, abs=0.1)
    assert moves["overhead_share"].elasticity == pytest.approx(0.2 / 1.2, rel=1e-6)
    assert [move.swing for move in found.moves] == sorted((move.swing for move in found.moves), reverse=True)


def test_demands_that_are_missing_are_named_with_why() -> None:
    demand = {name: each for name, each in STORED.demand.items() if name != "settler_per_s"}
    with pytest.raises(Missing, match="no settler_per_s"):
        answer(PLAN, msgspec.structs.replace(STORED, demand=demand), PRICED)
    with pytest.raises(ValueError, match="samples must be 2 to"):
        answer(PLAN, STORED, PRICED, samples=1)


# --- the seed and the levels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "verdict"),
    [
        (100.0, CONFIRMED),
        (80.0, CONFIRMED),
        (55.0, CONFIRMED),
        (200.0, "2 times too high"),
        (40.0, "2.5 times too low"),
    ],
)
def test_a_figure_of_the_seed_is_judged_by_our_interval(seed: float, verdict: str) -> None:
    figure = SeedFigure("x", str(seed), seed, seed, "x", "")
    assert judge({"x": 100.0}, {"x": (60.0, 120.0)}, (figure,))[0].verdict == verdict


def test_one_postgres_by_hand() -> None:
    demand = {**ROUND, "post_cpu_batch_ms": 0.5, "post_cpu_entry_ms": 0.1, "read_ledger_postgres_ms": 0.2,
              "matcher_postgres_ms": 0.03, "settler_postgres_ms": 0.07, "relay_postgres_ms": 0.04,
              "read_projection_postgres_ms": 0.3, "bet_api_ms": 0.001, "read_ledger_api_ms": 0.001}  # fmt: skip
    # 500,000 × (0.6 + 0.1) ms + 500,000 × 0.2 ms.
    assert single_postgres_cores(assume(), demand, events=False) == pytest.approx(450)
    # With events the reads come from the cache, and 1,500,000 events cost 0.04 ms each.
    assert single_postgres_cores(assume(), demand, events=True) == pytest.approx(410)
    first = levels(assume(), demand, PRICE)[0]
    # 32 cores × 0.7 of 450 for a million.
    assert first.limits["CPU of Postgres"] == pytest.approx(32 * 0.7 / 450 * 1e6)
    assert first.binding == "CPU of Postgres"
    assert first.costs[1_000_000] is None
    assert first.costs[10_000] is not None


def test_level_three_ends_where_its_shards_do() -> None:
    third = levels(PLAN.assume, VALUES, PRICE)[2]
    at, beyond = (
        calculate(msgspec.structs.replace(PLAN.assume, users=users), VALUES, PRICE).numbers["servers"]
        for users in (int(third.users_max), int(third.users_max) + 1)
    )
    assert at <= 100 < beyond


def test_the_parts_of_a_bet_add_up_to_what_was_measured_of_the_whole() -> None:
    # The parts were measured one by one, the whole at another rate: within its interval and a third they must agree.
    whole = STORED.demand["bet_postgres_ms"]
    assert whole.low / 1.34 < postgres_ms_per_bet(VALUES, PLAN.assume.events_per_bet) < whole.high * 1.34


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("zones = 3", "zones = 0", "assume.zones: 0 is not allowed, it must be int >= 1"),
        ("read_share = 0.667", "read_share = 1.5", "assume.read_share: 1.5 is not allowed, it must be float <= 1"),
        ("users = 1_000_000", 'users = "many"', "assume.users: 'many' is not allowed, it must be int"),
        ("backups = 30", "backup = 30", "assume.backup: there is no such field; did you mean backups"),
        ('zones = "chosen', 'zones = "guessed', "source: of zones must begin with seed, measured, chosen"),
        ('broker_cores = "chosen"\n', "", "source: must say where broker_cores comes from"),
    ],
)
def test_a_bad_plan_names_line_and_field(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = MILLION.read_text()
    assert text.count(old) == 1
    line = 1 + text[: text.index(old)].count("\n")
    if "source:" in words:
        line = 1 + text[: text.index("[source]")].count("\n")
    path = tmp_path / "plan.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(TableError) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}:{line}: {words}")


def test_a_bad_price_names_line_and_field(tmp_path: Path) -> None:
    text = PRICES.read_text()
    line = 1 + text[: text.index("value = 0.023")].count("\n")
    path = tmp_path / "prices.toml"
    path.write_text(text.replace("value = 0.023", "value = 23.0"))
    with pytest.raises(TableError, match=rf"prices\.toml:{line}: price\.object_gb_month\.value: must be from low"):
        read_prices(path)


def test_a_change_is_told_as_such() -> None:
    changed = read_plan(MILLION, ("users=2e6", "zones=4"))
    assert (changed.assume.users, changed.assume.zones) == (2_000_000, 4)
    assert changed.source["users"] == changed.source["zones"] == "command line"
    assert changed.source["backups"] == PLAN.source["backups"]
    with pytest.raises(TableError, match=r"--set zones=0: zones: 0 is not allowed"):
        read_plan(MILLION, ("zones=0",))
