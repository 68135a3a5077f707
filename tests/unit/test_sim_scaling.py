"""Closed loops: what is conserved, what the partition cap does, and that the seed's policy swings where others rest."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from sim import scaling_loops
from sim.autoscaler import KedaObject, StepRule
from sim.scaling import compare, policies_of, price, run_once, search
from sim.scaling_loops import Fleet, api_run, consumer_run
from sim.scaling_world import (
    SCALING_TOML,
    Announced,
    HpaPolicy,
    KedaPolicy,
    Shape,
    Spread,
    StepPolicy,
    World,
    noisy,
)
from sim.streams import stream
from sim.tables import TableError, read_toml

WORLD = read_toml(SCALING_TOML, World)
QUIET = msgspec.structs.replace(
    WORLD,
    replications=4,
    pods=msgspec.structs.replace(WORLD.pods, start=Spread(20, 20), node_share=0.0, noise=0.0),
    consumers=msgspec.structs.replace(WORLD.consumers, pod_spread=0.0, skew=0.0, commit_s=0.0, rebalance=Spread(3, 3)),
    api=msgspec.structs.replace(WORLD.api, pod_spread=0.0),
)
"""The same world without chance: what happens can be worked out by hand."""
FIXED = StepPolicy(StepRule(add_above_lag=10**12, remove_below_lag=0))
"""Never changes anything."""
HOUR = Shape("an hour", 3600, ((0, 1),), ((0, 1),))


def fixed(members: int, *, base: float, shape: Shape = HOUR, partitions: int = 100) -> scaling_loops.Trace:
    group = msgspec.structs.replace(QUIET.consumers, initial=members, base_per_s=base, partitions=partitions)
    policy = StepPolicy(StepRule(add_above_lag=10**12, remove_below_lag=0, max_replicas=1000))
    return consumer_run(msgspec.structs.replace(QUIET, consumers=group), policy, shape, 0)


def test_a_group_with_too_few_members_falls_behind_by_the_difference() -> None:
    trace = fixed(10, base=12_000)
    assert trace.queue[-1] == pytest.approx(3600 * (12_000 - 10 * 1000), rel=1e-9)


def test_a_group_that_keeps_up_has_no_lag() -> None:
    assert fixed(20, base=14_000).queue.max() == pytest.approx(0, abs=1e-6)


def test_members_beyond_the_partitions_idle() -> None:
    assert fixed(100, base=105_000).queue[-1] == pytest.approx(3600 * 5_000)
    assert fixed(140, base=105_000).queue[-1] == pytest.approx(3600 * 5_000)


def test_a_count_that_does_not_divide_the_partitions_is_as_good_as_the_next_lower_that_does() -> None:
    # 60 members, 100 partitions: 40 of them have two, which bring 2 × 560 = 1,120/s to a member of 1,000/s.
    behind = fixed(60, base=56_000).queue[-1]
    assert behind == pytest.approx(3600 * 40 * (1120 - 1000))
    assert fixed(50, base=50_000).queue[-1] == pytest.approx(0, abs=1e-3)


def test_a_burst_drains_at_the_surplus_rate() -> None:
    shape = Shape("burst", 3600, ((0, 1), (600, 1), (600.001, 3), (659, 3), (659.001, 1)), ((0, 1),), 600)
    trace = fixed(20, base=10_000, shape=shape)
    # 59 s at 30,000/s against 20,000/s: 590,000 wait; they drain at 10,000/s, 58 s to the target of 10,000.
    assert trace.outcome.peak == pytest.approx(590_000, rel=0.02)
    assert trace.outcome.recovery_s == pytest.approx(59 + 58, abs=2)
    assert trace.outcome.recovered


def test_whoever_never_comes_back_is_said_not_to_have_recovered() -> None:
    shape = Shape("for good", 3600, ((0, 1), (600, 1), (601, 3)), ((0, 1),), 600)
    trace = fixed(20, base=10_000, shape=shape)
    assert not trace.outcome.recovered
    assert trace.outcome.recovery_s == 3000


def test_without_a_disturbance_there_is_no_recovery() -> None:
    assert fixed(20, base=10_000).outcome.recovery_s is None


@pytest.mark.parametrize(("cooperative", "waiting"), [(False, 3 * 10_000), (True, 3 * 10_000 / 2)])
def test_a_rebalance_stops_all_or_only_what_moves(cooperative: bool, waiting: float) -> None:
    # From 20 to 40 members half of the partitions move; the pause is 3 s of 10,000/s.
    group = msgspec.structs.replace(QUIET.consumers, base_per_s=10_000.0, cooperative=cooperative)
    world = msgspec.structs.replace(QUIET, consumers=group)
    doubled = KedaPolicy(KedaObject(min_replicas=40, max_replicas=40))
    trace = consumer_run(world, doubled, HOUR, 0)
    assert trace.queue.max() == pytest.approx(waiting, rel=0.01)


def test_the_seeds_cycle_has_the_length_that_arithmetic_gives() -> None:
    # 13,500/s. 14 members keep up and 13 fall behind by 500/s. At 100 k of lag removing stops, at 1 M adding begins.
    group = msgspec.structs.replace(QUIET.consumers, base_per_s=13_500.0, initial=14)
    long = msgspec.structs.replace(HOUR, duration_s=14_400.0)
    trace = consumer_run(msgspec.structs.replace(QUIET, consumers=group), StepPolicy(), long, 0)
    first = int(np.argmax(trace.queue > 1_000_000))
    # Members leave each 15 s while lag is below 100 k: 13, 12, … behind by 500, 1500, … /s: lag after k intervals is
    # 7,500·k², 120,000 after four; the sample that the fifth look sees is 15 s old, so five left: 9 are left, and
    # 1 M comes about 200 to 300 s after.
    assert trace.wanted[first] == 9
    assert 200 <= first <= 300
    assert trace.outcome.peak > 1_000_000
    assert trace.outcome.reversals_per_h > 3


def test_the_seeds_consumer_policy_swings_under_a_steady_load_and_the_best_rests() -> None:
    found = compare(msgspec.structs.replace(WORLD, replications=5), roles=["consumers"], shapes=["steady"])
    seed, best = (next(line for line in found.lines if line.policy == name) for name in ("seed", "best"))
    assert seed.settles is False
    assert seed.beyond_alert_s.low > 600, "ten minutes of two hours beyond the alert, under a load that never changes"
    assert seed.peak.low > 1_000_000
    assert seed.reversals_per_h.low > 4
    assert best.settles is True
    assert best.beyond_alert_s.high == 0
    assert best.peak.high < WORLD.consumers.alert_lag


def test_the_best_policy_beats_the_seeds_under_every_load_beyond_doubt() -> None:
    found = compare(msgspec.structs.replace(WORLD, replications=5), roles=["consumers"], policies=["seed", "best"])
    assert len(found.differences) == len(WORLD.shapes)
    for gap in found.differences:
        assert gap.score.high < 0, gap


def test_fifty_consumers_cannot_hold_what_the_seed_plans_for() -> None:
    # The seed's 100,000 events a second with its own cap of 50: half of them are never handled.
    trace = fixed(50, base=100_000)
    assert trace.queue[-1] == pytest.approx(3600 * 50_000)


def test_keda_by_default_runs_as_many_consumers_as_there_are_partitions() -> None:
    trace = consumer_run(WORLD, policies_of(WORLD, "consumers")["keda"], WORLD.shapes["steady"], 0)
    assert trace.outcome.pod_hours == pytest.approx(2 * 100, rel=0.01)


def test_memory_keeps_the_seeds_api_pods_from_going() -> None:
    found = compare(msgspec.structs.replace(WORLD, replications=3), roles=["api"], shapes=["steady"])
    by = {line.policy: line for line in found.lines}
    assert by["seed"].pod_hours.mean == pytest.approx(2 * WORLD.api.initial, rel=0.02)
    assert by["hpa"].pod_hours.high < 0.85 * by["seed"].pod_hours.low, "the same CPU target without memory"


def test_the_apis_queue_is_bounded_by_its_deadline_and_refuses_the_rest() -> None:
    world = msgspec.structs.replace(QUIET, api=msgspec.structs.replace(QUIET.api, base_per_s=30_000.0, initial=10))
    policy = HpaPolicy(msgspec.structs.replace(HpaPolicy().behaviour, max_replicas=10))
    trace = api_run(world, policy, HOUR, 0)
    assert trace.outcome.peak == pytest.approx(2.0)
    # 20,000/s are served, and 2 s of that wait at the end.
    assert trace.outcome.refused_share == pytest.approx(1 / 3 - 2 * 20_000 / (3600 * 30_000), rel=1e-3)


def test_an_announced_load_finds_its_pods_ready() -> None:
    shape = Shape("whistle", 1800, ((0, 1), (900, 1), (901, 4)), ((0, 1),), 900, ((900, 1800),))
    waiting = KedaPolicy(KedaObject(min_replicas=20), rate_per_replica_per_s=1000.0)
    known = msgspec.structs.replace(waiting, announced=Announced(80, 120))
    late, ready = (consumer_run(QUIET, policy, shape, 0) for policy in (waiting, known))
    assert ready.outcome.peak < late.outcome.peak / 5
    assert ready.ready[899] == 80
    assert late.ready[899] == 20


def test_a_fleet_stops_first_what_does_not_work_yet() -> None:
    fleet = Fleet(2, [10.0, 20.0, 30.0])
    assert fleet.ask(0, 5) == 0
    assert fleet.wanted == 5
    assert fleet.arrived(10) == 1
    assert fleet.ask(10, 2) == 1
    assert (fleet.ready, fleet.starting) == (2, [])


def test_the_same_replication_has_the_same_load_under_every_policy() -> None:
    shape = WORLD.shapes["steady"]
    runs = [run_once(WORLD, "consumers", policy, shape, 3) for policy in policies_of(WORLD, "consumers").values()]
    assert all(np.array_equal(run.offered_per_s, runs[0].offered_per_s) for run in runs)
    other = run_once(WORLD, "consumers", FIXED, shape, 4)
    assert not np.array_equal(other.offered_per_s, runs[0].offered_per_s)


def test_noise_has_the_mean_and_spread_it_is_said_to_have() -> None:
    pods = msgspec.structs.replace(WORLD.pods, noise=0.2, noise_s=5.0)
    drawn = noisy(pods, stream(1, 0, "noise"), np.ones(100_000))
    assert drawn.mean() == pytest.approx(1, abs=0.01)
    assert np.log(drawn).std() == pytest.approx(0.2, abs=0.01)


def test_a_spread_has_the_median_and_95_percent_that_name_it() -> None:
    drawn = Spread(15, 40).draw(np.random.default_rng(1), 100_000)
    assert np.median(drawn) == pytest.approx(15, rel=0.02)
    assert np.percentile(drawn, 95) == pytest.approx(40, rel=0.02)


def test_a_search_tries_the_grid_and_returns_the_best_first() -> None:
    grid = msgspec.structs.replace(
        WORLD.search,
        rate_per_replica_per_s=(400.0, 800.0),
        lag_threshold=(2000,),
        announced_replicas=(0,),
        finalists=2,
        down_stabilisation_s=(300.0,),
        cpu=(0.4, 0.7),
    )
    small = msgspec.structs.replace(WORLD, search=grid, replications=2, shapes={"steady": WORLD.shapes["steady"]})
    for role, key, best in (("consumers", "rate_per_replica_per_s", 800), ("api", "cpu", 0.7)):
        found = search(small, role)  # type: ignore[arg-type]
        assert found[0].settings[key] == best
        assert found[0].score.mean < found[1].score.mean


def test_a_grid_that_is_too_large_is_refused() -> None:
    grid = msgspec.structs.replace(WORLD.search, rate_per_replica_per_s=tuple(range(1, 400)))
    with pytest.raises(ValueError, match="too many"):
        search(msgspec.structs.replace(WORLD, search=grid), "consumers")


def test_a_price_adds_up() -> None:
    outcome = consumer_run(QUIET, FIXED, HOUR, 0).outcome
    assert price(WORLD.score, outcome) == pytest.approx(outcome.pod_hours)
    late = msgspec.structs.replace(WORLD.score, target_minute=2.0)
    behind = fixed(10, base=12_000).outcome
    assert price(late, behind) - behind.pod_hours == pytest.approx(
        2 * behind.beyond_target_s / 60 + late.alert_minute * behind.beyond_alert_s / 60
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("scrape_s = 15.0", "scrape_s = 0.0", "pods.scrape_s"),
        ("node_share = 0.2", "node_share = 2", "pods.node_share"),
        ("partitions = 100", "partition = 100", "partition"),
        ('kind = "step"', 'kind = "steps"', "kind"),
        ("cpu = 0.7\n", "cpu = 7\n", "cpu"),
    ],
)
def test_a_wrong_value_is_refused_with_line_and_field(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = SCALING_TOML.read_text()
    assert old in text
    file = tmp_path / "own.toml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(TableError, match=rf"own\.toml:\d+: .*{words}"):
        read_toml(file, World)
