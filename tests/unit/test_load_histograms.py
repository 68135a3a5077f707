"""Latencies: exact counts, lossless merges, honest intervals, and refusal where there are too few samples."""

import numpy as np
import pytest

from load.histograms import HIGHEST_US, Estimate, Latencies, interval_ranks, samples_needed


def filled(values_us: np.ndarray) -> Latencies:  # type: ignore[type-arg]
    latencies = Latencies()
    for value in values_us.tolist():
        latencies.record_us(int(value))
    return latencies


def lognormal(seed: int, count: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.maximum(np.random.default_rng(seed).lognormal(8, 1.5, count), 1).astype(np.int64)


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9])
def test_a_percentile_is_the_order_statistic_within_a_thousandth(percent: float) -> None:
    values = np.sort(lognormal(1, 5000))
    estimate = filled(values).percentile(percent)
    exact_ms = values[int(np.ceil(5000 * percent / 100)) - 1] / 1000
    assert estimate.ms is not None
    assert exact_ms <= estimate.ms <= exact_ms * 1.001 + 0.001
    assert estimate.low_ms is not None
    assert estimate.high_ms is not None
    assert estimate.low_ms <= estimate.ms <= estimate.high_ms


def test_workers_are_merged_without_loss() -> None:
    values = lognormal(2, 6000)
    parts = [filled(values[k::3]) for k in range(3)]
    merged = Latencies()
    for part in parts:
        merged.add(Latencies.decode(part.encode()))
    assert (merged.counts() == filled(values).counts()).all()
    assert merged.max_us() == pytest.approx(values.max(), rel=0.001)
    assert len(merged) == 6000


def test_text_is_read_back_as_it_was() -> None:
    latencies = filled(lognormal(3, 100))
    again = Latencies.decode(latencies.encode())
    assert (again.counts() == latencies.counts()).all()
    assert len(Latencies.decode(Latencies().encode())) == 0


@pytest.mark.parametrize("text", ["", "nonsense", "HISTFAAAAAB42pNpmSzMwMDAwgABAAAA"])
def test_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HDR histogram"):
        Latencies.decode(text)


def test_extremes_are_kept_within_the_range() -> None:
    latencies = Latencies()
    latencies.record_us(0)
    latencies.record_us(10 * HIGHEST_US)
    assert len(latencies) == 2
    assert latencies.max_us() >= HIGHEST_US


@pytest.mark.parametrize(("percent", "need"), [(50.0, 6), (95.0, 72), (99.0, 368), (99.9, 3688)])
def test_a_percentile_of_too_few_samples_is_refused_with_their_number(percent: float, need: int) -> None:
    assert samples_needed(percent / 100) == need
    assert filled(np.full(need, 1000)).percentile(percent).refused is None
    refused = filled(np.full(need - 1, 1000)).percentile(percent)
    assert refused.ms is None
    assert refused.refused == f"p{percent:g} needs {need:,} samples, there are {need - 1:,}"


def test_p99_9_of_500_is_refused() -> None:
    assert filled(np.full(500, 1)).percentile(99.9).refused is not None


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("samples", [400, 2000, 100_000])
def test_ranks_hold_the_quantile_in_95_of_100_samples(quantile: float, samples: int) -> None:
    ranks = interval_ranks(samples, quantile)
    assert ranks is not None
    lower, upper = ranks
    below = np.random.default_rng(4).binomial(samples, quantile, 20_000)
    covered = ((below >= lower) & (below < upper)).mean()
    assert 0.945 < covered < 0.99


def test_what_has_no_answer_is_infinitely_late() -> None:
    latencies = filled(np.full(1000, 5000))
    assert latencies.percentile(95.0, unanswered=10).ms == pytest.approx(5.0, rel=0.001)
    late = latencies.percentile(95.0, unanswered=100)
    assert (late.ms, late.refused, late.samples) == (None, None, 1100)
    bounded = latencies.percentile(95.0, unanswered=50)
    assert bounded.ms is not None
    assert bounded.high_ms is None
    assert "∞" in late.text()
    assert Estimate(99.0, 1, refused="too few").text() == "–"
