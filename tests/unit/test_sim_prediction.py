"""Forecasts are sealed, say what limits, and are the same for the same seed."""

import msgspec
import numpy as np
import pytest

from sim.cases import OutageCase, Shape
from sim.costs import Costs, Interval, Linear
from sim.knee import find_knee, holds
from sim.prediction import (
    Prediction,
    bottleneck,
    calibration_digest,
    digest,
    forecast,
    intact,
    predict,
    saturation,
    sealed,
)
from sim.system import Play, System
from tests.model_costs import BUSY, calibration_of

PLAIN = Shape(name="plain", why="")
SLOW = msgspec.structs.replace(BUSY, post=Linear(2.0, 2.0))
"""Two milliseconds of CPU for every bet: under a thousand a second on two cores."""


@pytest.fixture(scope="module")
def said() -> Prediction:
    asked: list[tuple[Shape, float | None, float]] = [(PLAIN, 80.0, 3.0), (PLAIN, None, 3.0)]
    return predict(calibration_of(), asked, made_at="2026-01-01T00:00:00+00:00", commit="f1932bd0c4f5", connections=8)


# --- the seal ---------------------------------------------------------------------------------------------------------


def test_a_prediction_is_intact_as_it_was_sealed_also_when_read_again(said: Prediction) -> None:
    assert intact(said)
    assert len(said.digest) == 64
    again = msgspec.json.decode(msgspec.json.format(msgspec.json.encode(said), indent=1), type=Prediction)
    assert again == said
    assert intact(again)


@pytest.mark.parametrize(
    "change",
    [
        {"made_at": "2026-01-01T00:00:01+00:00"},
        {"commit": "0"},
        {"calibration": "0"},
        {"seed": 2},
        {"forecasts": []},
        {"digest": "0" * 64},
        {"digest": ""},
    ],
)
def test_whatever_is_changed_breaks_the_seal(said: Prediction, change: dict[str, object]) -> None:
    assert not intact(msgspec.structs.replace(said, **change))


def test_a_changed_figure_breaks_the_seal_until_it_is_sealed_again(said: Prediction) -> None:
    first = msgspec.structs.replace(said.forecasts[0], throughput_per_s=Interval(79.0, 78.0, 80.0))
    other = msgspec.structs.replace(said, forecasts=[first, *said.forecasts[1:]])
    assert not intact(other)
    assert intact(sealed(other))
    assert sealed(other).digest != said.digest


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1, "b": 2}) != digest({"a": 1, "b": 3})


def test_the_calibration_is_named_by_all_it_holds(said: Prediction) -> None:
    assert said.calibration == calibration_digest(calibration_of())
    assert said.calibration != calibration_digest(calibration_of(SLOW))


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_forecasts_and_another_others(said: Prediction) -> None:
    same, other = (
        forecast(BUSY, PLAIN, 80.0, duration_s=3.0, connections=8, seed=seed) for seed in (said.seed, said.seed + 1)
    )
    assert same == said.forecasts[0]
    assert other.latency_ms != same.latency_ms


def test_a_forecast_is_the_mean_of_its_replications(said: Prediction) -> None:
    runs = [
        System(Play(shape=PLAIN, costs=BUSY, rate_per_s=80.0, duration_s=3.0, connections=8, replication=n)).run()
        for n in range(5)
    ]
    one = said.forecasts[0]
    medians = [float(np.quantile(run.latency_s["bets"], 0.5)) * 1000 for run in runs]
    assert one.latency_ms["bets"]["p50"].value == pytest.approx(np.mean(medians))
    # Student's 95 % for five values is 2.776 standard errors.
    half = 2.776 * np.std(medians, ddof=1) / 5**0.5
    assert one.latency_ms["bets"]["p50"].high == pytest.approx(np.mean(medians) + half, rel=1e-3)
    assert one.throughput_per_s.value == pytest.approx(np.mean([run.throughput_per_s for run in runs]))
    assert "reads" not in one.latency_ms


def test_saturation_is_a_forecast_without_a_rate(said: Prediction) -> None:
    found = saturation(BUSY, PLAIN, duration_s=3.0, connections=8)
    assert found == said.forecasts[1]
    assert found.rate_per_s is None
    assert found.throughput_per_s.value > 400


def test_outages_are_forecast_with_the_time_a_part_needs() -> None:
    case = OutageCase(name="kill it", kind="kill", node="matcher0", rate_per_s=40, lasts_s=1.0)
    costs = msgspec.structs.replace(BUSY, returns_s={"matcher": 0.5})
    found = predict(calibration_of(costs), [], made_at="", commit="", outages=[case])
    assert found.outages[0].gone_s == 1.5
    assert found.outages[0].backlog_peak["matcher"] == pytest.approx(60, abs=20)
    with pytest.raises(ValueError, match="how long matcher needs to come back"):
        predict(calibration_of(), [], made_at="", commit="", outages=[case])


# --- what limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "hot", "named"),
    [
        ({"cores": 0.97, "api": 0.6, "writer": 0.5}, False, "cores"),
        ({"cores": 0.7, "api": 0.99, "writer": 0.5}, False, "api"),
        ({"cores": 0.9, "api": 0.95, "writer": 0.5}, True, "api"),
        ({"cores": 0.5, "api": 0.4, "writer": 0.6}, True, "hot wallet"),
        ({"cores": 0.5, "api": 0.4, "writer": 0.6}, False, "writer"),
        ({"cores": 0.2, "redis": 0.85}, True, "redis"),
    ],
)
def test_the_bottleneck_is_what_is_busy_or_else_what_is_waited_for(
    used: dict[str, float], hot: bool, named: str
) -> None:
    assert bottleneck(used, hot=hot) == named


@pytest.mark.parametrize(
    ("costs", "named"),
    [
        (msgspec.structs.replace(BUSY, cores=8, api_bet_ms=2.0), "api"),
        (SLOW, "cores"),
        (msgspec.structs.replace(BUSY, cores=8, commit_ms=[20.0, 20.0]), "writer"),
    ],
)
def test_saturation_names_the_part_that_was_made_slow(costs: Costs, named: str) -> None:
    assert saturation(costs, PLAIN, duration_s=3.0, connections=128).bottleneck == named


# --- the knee ---------------------------------------------------------------------------------------------------------

KNEE = {"tolerance": 0.3, "p99_ms": 100.0, "refused_share": 0.01, "window_s": 3.0}


def test_the_knee_is_bracketed_by_a_rate_that_holds_and_one_that_does_not() -> None:
    best, worst = find_knee(SLOW, PLAIN, low_per_s=200, high_per_s=4000, **KNEE)
    assert best is not None and worst is not None
    assert best.rate_per_s is not None and worst.rate_per_s is not None
    assert best.rate_per_s < worst.rate_per_s <= best.rate_per_s * 1.3
    assert holds(best, p99_ms=100.0, refused_share=0.01)
    assert not holds(worst, p99_ms=100.0, refused_share=0.01)
    # No more than the processors can do: 2 ms and more of two cores each.
    assert best.rate_per_s < 1000


def test_bounds_that_do_not_bracket_the_knee_tell_no_knee() -> None:
    best, worst = find_knee(SLOW, PLAIN, low_per_s=3000, high_per_s=4000, **KNEE)
    assert best is None
    assert worst is not None and worst.rate_per_s == 3000
    best, worst = find_knee(SLOW, PLAIN, low_per_s=20, high_per_s=40, **KNEE)
    assert worst is None
    assert best is not None and best.rate_per_s == 40


def test_bounds_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="between two rates"):
        find_knee(SLOW, PLAIN, low_per_s=40, high_per_s=40, **KNEE)


def test_every_class_and_the_refused_share_count() -> None:
    def of(bets: float, reads: float, refused: float) -> bool:
        found = msgspec.structs.replace(
            forecast(BUSY, PLAIN, 20.0, duration_s=2.0, replications=2),
            latency_ms={
                "bets": {"p99": Interval(bets, bets, bets)},
                "reads": {"p99": Interval(reads, reads, reads)},
            },
            refused_share=refused,
        )
        return holds(found, p99_ms=100.0, refused_share=0.01)

    assert of(99, 50, 0.01)
    assert not of(101, 50, 0.0)
    assert not of(50, 101, 0.0)
    assert not of(50, 50, 0.02)
