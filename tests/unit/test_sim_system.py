"""The model of the whole service: its parts do what the service's do, and in simple cases it agrees with theory."""

import msgspec
import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import cache, writer
from reference.config import ServiceConfig
from sim import batching, system
from sim.cases import Shape
from sim.cores import REAL_TIME, Cores, Process
from sim.costs import Costs, Linear
from sim.event_loop import quantile
from sim.faults import Fault
from sim.queueing import batch_saturation_per_s, gated_batch_mean_latency_s, md1_mean_wait_s
from sim.system import Play, Run, Stage, System, arrivals
from tests.model_costs import BUSY, FREE

PLAIN = Shape(name="plain", why="")


def run(costs: Costs, rate: float | None, seconds: float, shape: Shape = PLAIN, **more: object) -> Run:
    asked = {"shape": shape, "costs": costs, "rate_per_s": rate, "duration_s": seconds, **more}
    return System(Play(**asked)).run()  # type: ignore[arg-type]


def test_the_constants_are_those_of_the_service() -> None:
    for name in (
        "SWEEP_EVERY_S",
        "LANES",
        "CROWDED",
        "LINGER_FROM",
        "LINGER_BATCH",
        "HOT_COMMANDS",
        "HOT_BATCH",
        "HOT_REST",
        "HOT_REST_MAX_S",
        "HOT_WAITS_S",
    ):
        assert getattr(batching, name) == getattr(writer, name), name
    assert (system.CACHE_TIMEOUT_S, system.CACHE_REST_S) == (cache.TIMEOUT_S, cache.OPEN_CIRCUIT_S)
    defaults = {field.name: field.default for field in msgspec.structs.fields(ServiceConfig)}
    assert {name: defaults[name] for name in system.DEFAULTS} == system.DEFAULTS


# --- cores -----------------------------------------------------------------------------------------------------------


def finished(cores: int, asked: list[tuple[float, float]]) -> list[float]:
    """When each of some processes (weight, seconds of work) is done, all begun at once."""
    env = simpy.Environment()
    machine = Cores(env, cores)
    ends = [0.0] * len(asked)

    def ended(index: int) -> None:
        ends[index] = env.now

    for index, (weight, seconds) in enumerate(asked):
        event = machine.work(Process(str(index), weight), seconds)
        event.callbacks.append(lambda _, index=index: ended(index))  # type: ignore[union-attr]
    env.run()
    return ends


def test_alone_a_process_has_a_core_and_never_more() -> None:
    assert finished(4, [(1.0, 2.0)]) == pytest.approx([2.0])


def shares(cores: int, weights: list[float], seconds: float = 20.0) -> list[float]:
    """The CPU that processes get in a time, which all have work without end."""
    env = simpy.Environment()
    machine = Cores(env, cores)
    processes = [Process(str(index), weight) for index, weight in enumerate(weights)]
    for process in processes:
        machine.work(process, 1e9)
    env.run(until=seconds)
    machine.settle()
    return [process.busy_s / seconds for process in processes]


def test_processes_share_a_core_by_weight() -> None:
    assert shares(1, [3.0, 1.0]) == pytest.approx([0.75, 0.25], abs=0.01)
    assert shares(2, [1.0, 1.0, 1.0]) == pytest.approx([2 / 3] * 3, abs=0.01)


def test_a_process_in_real_time_has_a_core_and_leaves_the_other() -> None:
    assert shares(2, [REAL_TIME, 1.0, 1.0]) == pytest.approx([1.0, 0.5, 0.5], abs=0.01)


def test_who_wakes_waits_for_the_slice_of_who_runs_unless_in_real_time() -> None:
    def latency_s(weight: float, after_s: float) -> float:
        env = simpy.Environment()
        machine = Cores(env, 1, slice_s=0.002, tick_s=0.004)
        machine.work(Process("hog", 1024.0), 10.0)
        env.run(until=after_s)
        env.run(until=machine.work(Process("waker", weight), 0.0001))
        return float(env.now) - after_s - 0.0001

    assert latency_s(REAL_TIME, 0.001) == pytest.approx(0.0, abs=1e-9)
    # In its first slice the hog is left alone until the next tick; afterwards who wakes is behind it and comes at once.
    assert latency_s(1024.0, 0.001) == pytest.approx(0.003, abs=1e-6)
    assert latency_s(1024.0, 0.003) == pytest.approx(0.0, abs=1e-6)


def test_a_lighter_process_is_interrupted_by_a_heavier_one_after_its_slice() -> None:
    env = simpy.Environment()
    machine = Cores(env, 1)
    light, heavy = Process("light", 110.0), Process("heavy", 1024.0)
    machine.work(light, 10.0)
    waits = []
    for _ in range(200):
        env.run(until=env.now + 0.00531)
        before = env.now
        env.run(until=machine.work(heavy, 0.001))
        waits.append(env.now - before - 0.001)
    assert float(np.mean(waits)) < 0.0005


@given(
    st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.01, 10)), min_size=1, max_size=8),
    st.integers(1, 4),
)
@settings(max_examples=30)
def test_no_core_idles_while_there_is_work_for_it(asked: list[tuple[float, float]], cores: int) -> None:
    ends = finished(cores, asked)
    total = sum(seconds for _, seconds in asked)
    longest = max(seconds for _, seconds in asked)
    # The last is done no earlier than all cores together, or the longest alone, could be; nor later than one core.
    assert max(total / cores, longest) - 1e-6 <= max(ends) <= total + 1e-6
    for (_, seconds), end in zip(asked, ends, strict=True):
        assert end >= seconds - 1e-6


def test_a_paused_process_keeps_its_work() -> None:
    env = simpy.Environment()
    machine = Cores(env, 1)
    process = Process("one", 1.0)
    done = machine.work(process, 1.0)
    env.run(until=0.25)
    machine.pause(process)
    env.run(until=5.0)
    assert not done.triggered
    machine.resume(process)
    env.run(until=done)
    assert env.now == pytest.approx(5.75)


def test_work_on_cores_that_never_rest_takes_the_share_that_was_measured() -> None:
    def used_s(pause_s: float) -> float:
        env = simpy.Environment()
        machine = Cores(env, 1, warm=0.8, cold_at=0.2)
        process = Process("one", 1024.0)
        for _ in range(400):
            env.run(until=machine.work(process, 0.005))
            if pause_s:
                env.run(until=env.now + pause_s)
        machine.settle()
        return process.busy_s

    # 2 s of work. Without a rest it takes four fifths, but for the first moments; where a fifth of the time is busy it
    # is as it was measured.
    assert used_s(0.0) < 1.65
    assert used_s(0.02) == pytest.approx(2.0, rel=0.03)


# --- against theory --------------------------------------------------------------------------------------------------


def test_one_command_a_batch_is_a_queue_with_constant_service() -> None:
    alone = Shape(name="alone", why="", settings={"writer_batch": 1, "writer_linger_ms": 0})
    waits = [
        float(np.mean(run(FREE, 500, 30, alone, replication=number).latency_s["bets"])) - 0.001 for number in range(2)
    ]
    # A tick of the generator is a microsecond here.
    assert np.mean(waits) == pytest.approx(md1_mean_wait_s(500, 0.001), rel=0.05)


def test_batches_without_bound_are_gated_batch_service() -> None:
    many = Shape(name="many", why="", settings={"writer_linger_ms": 0})
    costs = msgspec.structs.replace(FREE, post=Linear(2.0, 0.1), commit_ms=[0.0, 0.0])
    # Below CROWDED no second lane works, so this is one server.
    waits = [float(np.mean(run(costs, 1500, 10, many, replication=number).latency_s["bets"])) for number in range(3)]
    assert np.mean(waits) == pytest.approx(gated_batch_mean_latency_s(1500, 0.002, 0.0001), rel=0.02)


def test_a_single_lane_saturates_where_full_batches_do() -> None:
    eight = Shape(name="eight", why="", settings={"writer_batch": 8, "writer_linger_ms": 0})
    costs = msgspec.structs.replace(FREE, post=Linear(1.0, 0.1), commit_ms=[0.0, 0.0])
    # 32 connections never make a crowd, so the first lane is alone.
    found = run(costs, None, 6, eight, connections=32)
    assert found.throughput_per_s == pytest.approx(batch_saturation_per_s(0.001, 0.0001, 8), rel=0.02)


def test_cores_are_used_as_the_utilisation_law_says() -> None:
    found = run(BUSY, 200, 20)
    assert found.batch is not None
    batches = 200 / found.batch
    per_bet = BUSY.generator.each_ms + BUSY.api_bet_ms + BUSY.post.each_ms
    per_bet += BUSY.relay.process.each_ms + BUSY.relay.session.each_ms + BUSY.kafka.each_ms
    per_bet += BUSY.matcher.process.each_ms + BUSY.matcher.session.each_ms
    per_bet += BUSY.projector.process.each_ms + BUSY.projector.session.each_ms + BUSY.projector_redis.each_ms
    least = 200 * per_bet + batches * (BUSY.post.fixed_ms + BUSY.api_batch_ms) + 100
    rounds = 20 * (0.3 + 0.3 + 0.3) + 10 * 0.3 + 20 * (0.3 + 0.5) * 2
    wakes = (200 + 2 * batches) * BUSY.api_wake_ms
    assert found.utilisation["cores"] * 2000 == pytest.approx(least + rounds + wakes, rel=0.1)


def test_everything_that_arrives_is_answered() -> None:
    found = run(BUSY, 800, 8, msgspec.structs.replace(PLAIN, read_share=0.5), warm_s=0.0)
    answered = sum(map(len, found.latency_s.values()))
    assert answered == pytest.approx(6_400, rel=0.05)
    assert found.refused == 0
    assert found.throughput_per_s == pytest.approx(answered / 8, rel=0.01)


def test_the_same_seed_is_the_same_run_and_another_replication_is_another() -> None:
    one, same, other = (run(BUSY, 300, 3, replication=number) for number in (1, 1, 2))
    assert np.array_equal(one.latency_s["bets"], same.latency_s["bets"])
    assert not np.array_equal(one.latency_s["bets"], other.latency_s["bets"])


# --- what the service does -------------------------------------------------------------------------------------------


def test_batches_linger_only_where_more_than_a_few_come() -> None:
    slow, fast = (np.median(run(FREE, rate, 20).latency_s["bets"]) for rate in (100, 400))
    assert slow < 0.0015
    assert fast > 0.004


def test_more_than_the_lanes_can_post_is_refused_by_its_deadline() -> None:
    one = Shape(name="one", why="", settings={"writer_batch": 1, "writer_linger_ms": 0})
    found = run(FREE, 3000, 9, one)
    assert found.refused > 5000
    assert found.latency_s["bets"].max() < 2.0 + batching.SWEEP_EVERY_S + 0.1


def test_a_hot_wallet_does_not_slow_the_others() -> None:
    cool = np.quantile(run(BUSY, 600, 20).latency_s["bets"], 0.5)
    hot = np.quantile(run(BUSY, 600, 20, Shape(name="hot", why="", hot_share=0.1)).latency_s["bets"], 0.5)
    assert hot < 1.5 * cool


@pytest.mark.parametrize(
    ("target", "stage"), [("redis", "projector"), ("relay", "outbox"), ("matcher", "matcher"), ("kafka", "outbox")]
)
def test_what_is_away_leaves_a_backlog_of_rate_times_time_that_goes_again(target: str, stage: str) -> None:
    fault = Fault("pause", target, 5.0, 4.0)
    found = run(BUSY, 500, 20, faults=(fault,))
    backlog = found.backlog[stage]
    # A batch that was under way then is part of it.
    assert backlog.max() == pytest.approx(500 * 4.0, rel=0.15)
    assert backlog[found.sampled_s > 14].max() < 200
    assert found.refused == 0


def test_reads_do_without_a_redis_that_is_away() -> None:
    reads = msgspec.structs.replace(PLAIN, read_share=1.0)
    found = run(BUSY, 200, 10, reads, faults=(Fault("pause", "redis", 3.0, 4.0),))
    took, due = found.latency_s["reads"], found.due_s["reads"]
    away = took[(due >= 3.0) & (due < 7.0)]
    # Of every 1.1 s the first 0.1 s waits for Redis in vain; the others are answered by Postgres at once.
    assert (away > 0.005).mean() == pytest.approx(0.1 / 1.1, abs=0.03)
    assert away.max() < 0.11
    assert took[due > 8.2].max() < 0.02
    assert len(took) == pytest.approx(200 * (10 - 2), rel=0.1)


def test_a_killed_server_refuses_and_comes_back() -> None:
    found = run(BUSY, 400, 20, Shape(name="two", why="", servers=2), faults=(Fault("kill", "pg1", 5.0, 3.0),))
    assert found.refused == pytest.approx(400 / 2 * 3.0, rel=0.1)
    dues = found.due_s["bets"]
    assert ((dues > 9) & (dues < 20)).sum() == pytest.approx(400 * 11, rel=0.05)


def test_quantiles_are_read_between_the_points_of_a_table() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([1.0, 3.0], 0.25) == 1.5
    assert quantile([1.0, 3.0], 1.0) == 3.0


def test_a_run_that_is_over_before_it_is_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="2 s are not counted"):
        run(BUSY, 10, 2.0)


def test_faults_and_shapes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Fault("kill", "pg0", -1.0, 1.0)
    with pytest.raises(ValueError, match="read_share must be 0 to 1"):
        Shape(name="x", why="", read_share=1.5)
    with pytest.raises(ValueError, match="servers must be 1 to 16"):
        Shape(name="x", why="", servers=0)


def test_arrivals_follow_a_rate_that_moves() -> None:
    draw = np.random.default_rng(1)
    times = arrivals((Stage(10.0, 0.0, 2000.0), Stage(5.0, 400.0, 400.0)), 1, draw)
    assert np.all(np.diff(times) >= 0)
    ramp, flat = times[times < 10], times[times >= 10]
    assert len(ramp) == pytest.approx(10_000, rel=0.04)
    # A ramp from nothing has a quarter of its arrivals in its first half.
    assert (ramp < 5).mean() == pytest.approx(0.25, abs=0.02)
    assert len(flat) == pytest.approx(2_000, rel=0.08)
    assert (flat < 12.5).mean() == pytest.approx(0.5, abs=0.04)
    with pytest.raises(ValueError, match="duration_s"):
        Stage(0.0, 1.0, 1.0)


def test_a_match_day_is_played_by_its_stages() -> None:
    found = run(BUSY, 300, 10, warm_s=0.0, stages=(Stage(5.0, 100.0, 100.0), Stage(5.0, 500.0, 500.0)))
    dues = found.due_s["bets"]
    assert (dues < 5).sum() == pytest.approx(500, rel=0.15)
    assert (dues >= 5).sum() == pytest.approx(2500, rel=0.08)


def test_a_standby_adds_its_acknowledgement_to_every_commit() -> None:
    alone = np.mean(run(FREE, 50, 30).latency_s["bets"])
    followed = np.mean(run(msgspec.structs.replace(FREE, standby_ms=[3.0, 3.0]), 50, 30).latency_s["bets"])
    # At 50/s hardly a commit waits for another.
    assert followed - alone == pytest.approx(0.003, rel=0.2)


def test_a_gateway_takes_its_share_of_the_cores_and_of_the_time() -> None:
    costs = msgspec.structs.replace(FREE, gateway=Linear(0.0, 2.0))
    found = run(costs, 100, 20)
    assert found.utilisation["gateway"] == pytest.approx(0.2, rel=0.1)
    assert np.median(found.latency_s["bets"]) - np.median(run(FREE, 100, 20).latency_s["bets"]) == pytest.approx(
        0.002, rel=0.2
    )


def test_clients_who_ask_again_keep_an_overloaded_service_overloaded() -> None:
    """The same three seconds of overload: without retries it is over with them, with retries it stays (metastable)."""
    one = Shape(name="one", why="", settings={"writer_batch": 1, "writer_linger_ms": 0, "writer_queue": 200})
    stages = (Stage(3.0, 500.0, 500.0), Stage(3.0, 1500.0, 1500.0), Stage(5.0, 500.0, 500.0))
    once, thrice = (
        run(FREE, 1000, 11, one, warm_s=0.0, stages=stages, timeout_s=0.15, retries=retries, retry_after_s=0.05)
        for retries in (0, 2)
    )
    assert once.abandoned == once.timed_out + once.refused
    afterwards = [float((found.due_s["bets"] >= 8).sum()) for found in (once, thrice)]
    assert afterwards[0] == pytest.approx(3 * 500, rel=0.1)
    assert afterwards[1] < 100
    assert thrice.timed_out > 2 * once.timed_out


def test_a_client_that_waits_for_ever_never_gives_up() -> None:
    found = run(BUSY, 300, 8)
    assert (found.timed_out, found.abandoned) == (0, 0)
