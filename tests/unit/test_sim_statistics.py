"""Intervals cover what they say, warm-ups are cut, and what samples do not support is not stated."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings

from sim import paths, queueing, statistics
from sim.statistics import batch_means, estimate, mser5_cut, paired_difference, percentile, steady, student
from sim.streams import Exponential, stream
from tests.depth import NIGHTLY

DEEP = settings.get_current_profile_name() == NIGHTLY
EXPERIMENTS = 1_000 if DEEP else 200
"""Intervals that are built to see how many cover; `--hypothesis-profile nightly` builds 1,000."""
COVERED = (0.93, 0.97) if DEEP else (0.905, 0.985)
"""Of 200 intervals the share varies by three times 1.5 %."""


def wait_s(seed: int, replication: int, customers: int, rate_per_s: float = 70.0, service_s: float = 0.01) -> float:
    """Mean wait of one replication of M/M/1, from an empty queue, without its warm-up by MSER-5."""
    arrived = np.cumsum(Exponential(1 / rate_per_s).draw(stream(seed, replication, "arrivals"), customers))
    service = Exponential(service_s).draw(stream(seed, replication, "service"), customers)
    return float(steady(paths.lindley(arrived, service) - arrived - service).mean())


def test_intervals_of_the_mean_wait_cover_it_as_often_as_they_say(
    record_property: Callable[[str, object], None],
) -> None:
    truth = queueing.mm1_mean_wait_s(70, 0.01)
    covered = 0
    for seed in range(EXPERIMENTS):
        found = estimate([wait_s(seed, replication, 100_000) for replication in range(5)])
        assert found is not None
        covered += found.low <= truth <= found.high
    share = covered / EXPERIMENTS
    record_property("coverage", share)
    print(f"{covered} of {EXPERIMENTS} intervals cover the mean wait: {share:.1%}")
    assert COVERED[0] <= share <= COVERED[1]


def test_intervals_are_students() -> None:
    assert student(9) == pytest.approx(2.262, abs=5e-4)
    assert student(30) == pytest.approx(2.042, abs=5e-4)
    assert student(9, 0.99) == pytest.approx(3.250, abs=5e-4)
    for degrees, confidence in ((0, 0.95), (9, 1.0)):
        with pytest.raises(ValueError, match="Student"):
            student(degrees, confidence)


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [1.0, math.inf]])
def test_values_without_an_interval_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"replications|finite"):
        estimate(values)


def test_common_random_numbers_make_a_difference_visible() -> None:
    slow = [wait_s(1, number, 5_000, service_s=0.0101) for number in range(10)]
    same = [wait_s(1, number, 5_000) for number in range(10)]
    other = [wait_s(2, number, 5_000) for number in range(10)]
    common, independent = paired_difference(same, slow), paired_difference(other, slow)
    assert common.low > 0, "one percent more service is noticed"
    assert common.high - common.low < (independent.high - independent.low) / 5
    assert independent.low < 0 < independent.high
    with pytest.raises(ValueError, match="paired"):
        paired_difference([1.0, 2.0], [1.0])


def test_a_warm_up_is_cut_about_where_it_ends() -> None:
    noise = stream(5, 0, "noise").standard_normal(5_000)
    noise[:600] += 8 * np.exp(-np.arange(600) / 100)
    cut = mser5_cut(noise)
    assert cut is not None
    assert 200 <= cut <= 700
    assert cut % 5 == 0
    assert abs(float(steady(noise).mean())) < abs(float(noise.mean()))


def test_a_run_without_warm_up_loses_little() -> None:
    cut = mser5_cut(stream(6, 0, "noise").standard_normal(5_000))
    assert cut is not None
    assert cut < 1_000


def test_a_run_that_never_settles_is_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        wait_s(1, 0, 20_000, rate_per_s=130.0)
    with pytest.raises(ValueError, match="at least"):
        mser5_cut(np.arange(49.0))


def test_mser_equals_its_definition() -> None:
    samples = stream(7, 0, "noise").exponential(size=400)
    means = samples.reshape(-1, 5).mean(axis=1)
    errors = [float(((means[d:] - means[d:].mean()) ** 2).sum()) / (80 - d) ** 2 for d in range(41)]
    assert mser5_cut(samples) == 5 * int(np.argmin(errors))


def test_batch_means_know_that_neighbours_depend() -> None:
    rng = stream(8, 0, "noise")
    samples = np.empty(40_000)
    value = 0.0
    for number, shock in enumerate(rng.standard_normal(len(samples)).tolist()):
        samples[number] = value = 0.95 * value + shock
    found = batch_means(samples)
    naive = 2 * 1.96 * float(samples.std()) / math.sqrt(len(samples))
    assert found.low <= 0 <= found.high
    assert found.high - found.low > 3 * naive
    with pytest.raises(ValueError, match="batches"):
        batch_means(samples[:10], 20)


def test_percentile_intervals_cover_as_often_as_they_say() -> None:
    rng, covered = stream(9, 0, "noise"), 0
    for _ in range(600):
        found = percentile(rng.standard_exponential(500), 95)
        assert found is not None
        covered += found.low <= -math.log(0.05) <= found.high
    assert 0.93 <= covered / 600 <= 0.98


def test_a_percentile_of_too_few_samples_is_not_stated() -> None:
    samples = np.arange(1_000.0)
    assert percentile(samples, 99) is not None
    assert percentile(samples[:999], 99) is None
    assert percentile(samples, 99.9) is None
    assert percentile(samples[:19], 50) is None
    assert statistics.replication_percentile(samples, 99) == pytest.approx(989.01)
    assert statistics.replication_percentile(samples[:999], 99) is None
    with pytest.raises(ValueError, match="percentile"):
        percentile(samples, 100)


def test_ranks_of_a_median_are_those_of_the_table() -> None:
    # For 25 samples the tabled ranks at 95 % are 8 and 18.
    found = percentile(np.arange(1.0, 26.0), 50)
    assert found is not None
    assert (found.low, found.high) == (8, 18)
