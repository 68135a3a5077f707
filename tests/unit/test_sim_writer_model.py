"""The simulated writer agrees with queueing theory, refuses above saturation, and repeats itself by its seed."""

import inspect
import math
from dataclasses import replace

import msgspec
import pytest

from reference import writer
from reference.config import ServiceConfig
from sim import queueing, writer_model
from sim.statistics import Estimate, estimate
from sim.writer_model import Parameters, predict, simulate

SINGLE = Parameters(
    rate_per_s=70, fixed_ms=10, per_command_ms=0, servers=1, apis=1, batch_max=1, duration_s=100, replications=8
)
"""One writer, one command a transaction, constant service: M/D/1 at a load of 0.7."""
BATCHING = Parameters(
    rate_per_s=1000, fixed_ms=4, per_command_ms=0.4, servers=1, apis=1, duration_s=5, replications=6, seed=3
)
SMALL = Parameters(
    rate_per_s=600,
    fixed_ms=10,
    per_command_ms=1,
    servers=1,
    apis=1,
    batch_max=4,
    queue_max=50,
    duration_s=6,
    replications=3,
)
"""Saturates at 4 / 14 ms = 286/s: offered more than twice that."""


def known(value: Estimate | None) -> Estimate:
    assert value is not None
    return value


def test_single_commits_wait_and_keep_the_writer_busy_as_md1_says() -> None:
    prediction = predict(SINGLE)
    latency = known(prediction.mean_ms)
    wait_ms = queueing.md1_mean_wait_s(70, 0.01) * 1000
    assert latency.low - 10 <= wait_ms <= latency.high - 10
    assert latency.high - latency.low < 0.2 * wait_ms, "an interval this wide would agree with anything"
    busy = known(prediction.utilisation)
    assert busy.low <= queueing.utilisation(70, 0.01) <= busy.high


def test_gated_batches_take_as_long_as_their_markov_chain_says() -> None:
    latency = known(predict(BATCHING).mean_ms)
    expected_ms = queueing.gated_batch_mean_latency_s(1000, 0.004, 0.0004) * 1000
    assert latency.low <= expected_ms <= latency.high
    assert latency.high - latency.low < 0.05 * expected_ms


def test_littles_law_holds_on_every_run() -> None:
    for parameters in (replace(BATCHING, duration_s=2), SMALL):
        for run in predict(parameters).replications:
            assert run.littles_law_gap < 1e-9


def test_saturated_writer_posts_its_saturation_rate_in_full_batches() -> None:
    prediction = predict(SMALL)
    assert prediction.saturated
    assert prediction.saturation_per_s == pytest.approx(4 / 0.014)
    assert known(prediction.throughput_per_s).mean == pytest.approx(prediction.saturation_per_s, rel=0.01)
    assert known(prediction.mean_batch).mean == pytest.approx(4)
    assert known(prediction.utilisation).mean > 0.98


def test_what_a_saturated_writer_cannot_post_is_refused_and_nothing_is_lost() -> None:
    prediction = predict(SMALL)
    assert known(prediction.refused_share).mean == pytest.approx(1 - 4 / 0.014 / 600, abs=0.03)
    for run in prediction.replications:
        assert run.refused_full > 0
        assert run.posted + run.refused_full + run.refused_late == run.arrived


def test_a_long_queue_refuses_by_deadline_and_bounds_the_latency() -> None:
    late = replace(SMALL, queue_max=100_000, deadline_ms=500)
    for run in predict(late).replications:
        assert run.refused_full == 0
        assert run.refused_late > 0
        assert run.p99_ms is not None
        # Between two sweeps a command may still be taken that is past its deadline.
        assert run.p99_ms <= 500 + writer_model.SWEEP_EVERY_S * 1000 + late.service_s(4) * 1000


def test_nothing_is_refused_below_saturation() -> None:
    prediction = predict(replace(SMALL, rate_per_s=150))
    assert not prediction.saturated
    assert prediction.refused_share == Estimate(0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_prediction() -> None:
    short = replace(BATCHING, duration_s=1, replications=3, servers=3, apis=2)
    assert predict(short) == predict(short)
    assert predict(short).mean_ms != predict(replace(short, seed=4, replications=2)).mean_ms


def test_replications_differ_and_share_their_arrivals_between_configurations() -> None:
    short = replace(BATCHING, duration_s=2)
    assert simulate(short, 0).mean_ms != simulate(short, 1).mean_ms
    slower = replace(short, fixed_ms=6)
    assert simulate(short, 0).arrived == simulate(slower, 0).arrived
    assert (simulate(short, 0).mean_ms or 0) < (simulate(slower, 0).mean_ms or 0)


def test_the_busiest_of_uneven_servers_sets_the_saturation() -> None:
    uneven = replace(SMALL, servers=3, apis=2)
    assert uneven.saturation_per_s == pytest.approx(4 / 0.014 * 2 / 0.34)
    assert replace(SMALL, servers=4, apis=2).saturation_per_s == pytest.approx(8 * 4 / 0.014)


def test_more_servers_carry_more() -> None:
    wide = predict(replace(SMALL, servers=4, duration_s=4))
    assert not wide.saturated
    assert known(wide.throughput_per_s).mean == pytest.approx(600, rel=0.08)


def test_percentiles_of_too_few_commands_are_not_stated() -> None:
    few = predict(replace(SMALL, rate_per_s=50, duration_s=5))
    assert few.p50_ms is not None
    assert few.p99_ms is None


def test_a_run_without_a_command_states_nothing() -> None:
    empty = predict(replace(SMALL, rate_per_s=0.001, duration_s=0.1))
    assert empty.mean_ms is None
    assert empty.mean_batch is None
    assert known(empty.throughput_per_s).mean == 0


def test_the_interval_is_students() -> None:
    three = known(estimate([11.0, 12.0, 13.0]))
    assert three.mean == 12.0
    assert three.high == pytest.approx(12 + 4.30265 / math.sqrt(3))
    assert three.low == pytest.approx(12 - 4.30265 / math.sqrt(3))
    assert estimate([1.0, None]) is None
    assert estimate([0.0, 1.0], upper=1.0) == Estimate(0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="replications"):
        estimate([1.0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate_per_s": math.nan},
        {"rate_per_s": math.inf},
        {"rate_per_s": 0},
        {"fixed_ms": -1},
        {"fixed_ms": 0, "per_command_ms": 0},
        {"servers": 0},
        {"servers": 101},
        {"batch_max": 0},
        {"deadline_ms": math.nan},
        {"replications": 1},
        {"rate_per_s": 1e6},
        {"rate_per_s": 0.01, "duration_s": 86_400, "servers": 100},
    ],
)
def test_parameters_that_cannot_be_simulated_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|at most|too long"):
        replace(SMALL, **wrong)  # type: ignore[arg-type]


def test_the_model_has_the_bounds_of_the_service() -> None:
    service = {field.name: field.default for field in msgspec.structs.fields(ServiceConfig)}
    model = inspect.signature(Parameters).parameters
    assert model["batch_max"].default == service["writer_batch"]
    assert model["queue_max"].default == service["writer_queue"]
    assert model["deadline_ms"].default == service["command_deadline_ms"]
    assert writer_model.SWEEP_EVERY_S == writer.SWEEP_EVERY_S
