"""Streams repeat themselves and stay apart; laws have the mean, the variation and the tail they say."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from sim.streams import (
    Deterministic,
    Empirical,
    Erlang,
    Exponential,
    Hyperexponential,
    Law,
    Lognormal,
    law_of,
    stream,
)

HEAVY = Empirical((0.001, 0.002, 0.004, 0.010), 0.1, 0.2, 0.005)
LIGHT = Empirical((0.001, 0.003, 0.010), 0.05, 0.0, 0.004)
LAWS: list[Law] = [
    Deterministic(0.01),
    Exponential(0.01),
    Erlang(0.01, 4),
    Hyperexponential(0.01, 3.0),
    Lognormal(0.01, 0.5),
    HEAVY,
    LIGHT,
]


def test_a_stream_is_the_same_in_every_process_and_release() -> None:
    assert stream(1, 2, "service").integers(0, 10**6, 3).tolist() == [954711, 625856, 676767]


def test_streams_of_other_seeds_replications_and_purposes_differ() -> None:
    first = stream(1, 0, "service").random(1_000)
    for other in (stream(2, 0, "service"), stream(1, 1, "service"), stream(1, 0, "arrivals")):
        assert abs(float(np.corrcoef(first, other.random(1_000))[0, 1])) < 0.1


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        stream(-1, 0, "service")


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__class__.__name__)
def test_draws_have_the_mean_and_the_variation_of_their_law(law: Law) -> None:
    drawn = law.draw(stream(3, 0, "service"), 400_000)
    assert float(drawn.mean()) == pytest.approx(law.mean_s, rel=0.01)
    assert float(drawn.var() / drawn.mean() ** 2) == pytest.approx(law.scv, rel=0.06, abs=1e-9)
    assert (drawn >= 0).all()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__class__.__name__)
def test_laws_survive_json_by_their_tag(law: Law) -> None:
    assert msgspec.json.decode(msgspec.json.encode(law), type=Law) == law


def test_a_law_by_mean_and_variation() -> None:
    assert law_of(0.01, 0) == Deterministic(0.01)
    assert law_of(0.01, 1) == Exponential(0.01)
    assert law_of(0.01, 0.4) == Lognormal(0.01, 0.4)


def test_a_fitted_law_has_the_percentiles_of_what_was_measured() -> None:
    rng = stream(4, 0, "measured")
    measured = np.where(
        rng.random(20_000) < 0.9, rng.normal(0.004, 0.0005, 20_000), 0.006 + rng.pareto(4, 20_000) / 200
    )
    law = Empirical.fitted(np.abs(measured))
    drawn = law.draw(stream(4, 1, "drawn"), 400_000)
    for percent, close in ((10, 0.02), (50, 0.02), (85, 0.03), (99, 0.08), (99.9, 0.25)):
        assert np.percentile(drawn, percent) == pytest.approx(np.percentile(measured, percent), rel=close), percent
    assert law.mean_s == pytest.approx(float(measured.mean()), rel=0.02)
    assert 0.1 < law.tail_shape < 0.45


def test_the_tail_of_exponential_times_is_exponential() -> None:
    law = Empirical.fitted(Exponential(0.01).draw(stream(5, 0, "measured"), 50_000))
    assert abs(law.tail_shape) < 0.1
    assert law.tail_scale_s == pytest.approx(0.01, rel=0.1)


def test_a_tail_without_variance_is_cut_at_one_that_has_some() -> None:
    law = Empirical.fitted(stream(6, 0, "measured").pareto(1.2, 5_000) + 1)
    assert law.tail_shape == pytest.approx(0.45)
    assert np.isfinite(law.scv)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Exponential(0.0), "above 0"),
        (lambda: Exponential(float("nan")), "above 0"),
        (lambda: Deterministic(float("inf")), "above 0"),
        (lambda: Erlang(0.01, 0), "above 0"),
        (lambda: Hyperexponential(0.01, 0.9), "1 or more"),
        (lambda: Lognormal(0.01, -1), "above 0"),
        (lambda: Empirical((0.1,), 0.1, 0.1, 0.1), "body"),
        (lambda: Empirical((0.2, 0.1), 0.1, 0.1, 0.1), "ascending"),
        (lambda: Empirical((0.1, 0.2), 0.1, 0.5, 0.1), "tail"),
        (lambda: Empirical.fitted(np.ones(199)), "200 samples"),
        (lambda: Empirical.fitted(np.ones(1_000)), "all the same"),
        (lambda: Empirical.fitted(np.full(1_000, np.nan)), "finite"),
    ],
)
def test_laws_that_cannot_be_are_refused(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong()
