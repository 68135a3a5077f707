"""What may be said about simulated numbers: intervals over replications, warm-up cut, batch means, percentiles.

An interval is a 95 % confidence interval unless a function says otherwise. A value that the samples do not support is
None, never a guess.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# The quantiles come from scipy.special: scipy.stats has the same ones and takes ten times as long to import.
from scipy.special import bdtrik, stdtrit

CONFIDENCE: Final = 0.95
MIN_REPLICATIONS: Final = 2
MAX_REPLICATIONS: Final = 10_000
SAMPLES_BEYOND: Final = 10
"""A percentile of one replication is stated only if at least so many samples lie beyond it."""
MSER_BATCH: Final = 5
"""Samples that MSER-5 averages before it looks: single ones vary too much."""
MAX_BATCH_COUNT: Final = 1_000

Samples = Sequence[float] | NDArray[Any]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its confidence interval."""

    mean: float
    low: float
    high: float


def student(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return the two-sided quantile of Student's t. Raises ValueError for no degree of freedom or a bad confidence."""
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom and 0 < confidence < 1, not {confidence}")
    return float(stdtrit(degrees, (1 + confidence) / 2))


def estimate(
    values: Sequence[float | None],
    upper: float = math.inf,
    *,
    lower: float = 0.0,
    confidence: float = CONFIDENCE,
) -> Estimate | None:
    """Return mean and confidence interval of independent values (Student's t), None if one is missing.

    No value is below `lower` or above `upper`, so the interval is cut there. Raises ValueError unless there are
    MIN_REPLICATIONS to MAX_REPLICATIONS values, all finite.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if not MIN_REPLICATIONS <= len(known) <= MAX_REPLICATIONS:
        raise ValueError(f"an interval needs {MIN_REPLICATIONS} to {MAX_REPLICATIONS:,} replications, not {len(known)}")
    if not np.isfinite(known).all():
        raise ValueError("an interval needs finite values")
    mean = float(np.mean(known))
    half = student(len(known) - 1, confidence) * float(np.std(known, ddof=1)) / math.sqrt(len(known))
    return Estimate(mean, max(mean - half, lower), min(mean + half, upper))


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Return the interval of second − first, where both have one value per replication, on the same random streams.

    Common random numbers make the two vary together, and what they share cancels. Source: Law, "Simulation Modeling
    and Analysis" (5th edition, 2015), sections 10.2 and 11.2. Raises ValueError unless both have as many values.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} replications cannot be paired")
    found = estimate([b - a for a, b in zip(first, second, strict=True)], lower=-math.inf, confidence=confidence)
    assert found is not None
    return found


def mser5_cut(samples: Samples) -> int | None:
    """Return how many first samples to drop as warm-up (a multiple of 5), None if the run never settles.

    MSER-5 cuts where the standard error of the rest, as if it were independent, is smallest: d minimises
    Σ_{i>d} (Y_i − mean of the rest)² / (k − d)² over the k means Y of five samples each. Only the first half of the run
    is searched, since few samples at its end agree with each other by chance; where the error still falls there,
    the answer is None. The cut prefers quiet stretches, so that the mean after it is a little low in a short run.
    Sources: White, "An effective truncation heuristic for bias reduction in simulation output", Simulation 69 (1997);
    White, Cobb and Spratt, "A comparison of five steady-state truncation heuristics for simulation", Winter
    Simulation Conference (2000). Raises ValueError for fewer than 10 means.
    """
    means = _group_means(np.asarray(samples, dtype=float), MSER_BATCH)
    count = len(means)
    if count < 2 * MSER_BATCH:
        raise ValueError(f"MSER-5 needs at least {2 * MSER_BATCH * MSER_BATCH} samples, not {len(samples)}")
    # Centred, so that the difference of squares below does not cancel; suffix sums give every cut at once.
    centred = means - means.mean()
    left = np.arange(count, 0, -1)
    total = np.cumsum(centred[::-1])[::-1]
    squares = np.cumsum((centred**2)[::-1])[::-1]
    error = np.maximum(squares - total**2 / left, 0.0) / left.astype(float) ** 2
    half = count // 2
    best = int(np.argmin(error[: half + 1]))
    return best * MSER_BATCH if best < half else None


def steady(samples: NDArray[Any]) -> NDArray[Any]:
    """Return the samples without the warm-up that MSER-5 finds. Raises ValueError if there is no steady part."""
    cut = mser5_cut(samples)
    if cut is None:
        raise ValueError("the run is too short to tell its warm-up from its steady state: simulate longer")
    return samples[cut:]


def batch_means(samples: Samples, batches: int = 20, confidence: float = CONFIDENCE) -> Estimate:
    """Return mean and interval of the mean of one long run, whose samples depend on their neighbours.

    The run is cut into `batches` equal parts whose means are taken for independent, which holds if a part is much
    longer than the dependence; up to `batches` − 1 first samples are left out. Source: Schmeiser, "Batch size effects
    in the analysis of simulation output", Operations Research 30 (1982): 10 to 30 parts. Raises ValueError for fewer
    than 2 parts or fewer samples than parts.
    """
    values = np.asarray(samples, dtype=float)
    if not MIN_REPLICATIONS <= batches <= min(MAX_BATCH_COUNT, len(values)):
        raise ValueError(f"{len(values)} samples cannot be cut into {batches} batches")
    length = len(values) // batches
    found = estimate(
        _group_means(values[len(values) - length * batches :], length).tolist(),
        lower=-math.inf,
        confidence=confidence,
    )
    assert found is not None
    return found


def percentile(samples: Samples, percent: float, confidence: float = CONFIDENCE) -> Estimate | None:
    """Return a percentile of independent samples and its interval by order statistics, None if they are too few.

    The number of samples below the true percentile is binomial, whatever their distribution; the ranks at which it
    leaves (1 − confidence)/2 on each side bound the percentile. Where the upper rank does not exist, or fewer than
    SAMPLES_BEYOND samples lie beyond, nothing can be said. Neighbours in a queue depend on each other: give one
    sample per replication, or expect an interval that is too narrow. Source: David and Nagaraja, "Order Statistics"
    (3rd edition, 2003), section 7.1. Raises ValueError unless 0 < percent < 100.
    """
    if not 0 < percent < 100:
        raise ValueError(f"a percentile is above 0 and below 100, not {percent}")
    values = np.sort(np.asarray(samples, dtype=float))
    count, share = len(values), percent / 100
    if not enough_beyond(count, percent):
        return None
    beyond = (1 - confidence) / 2
    # Ranks count from 1. P(rank `low` is above the percentile) ≤ beyond, and likewise for `high`.
    low = math.floor(float(bdtrik(beyond, count, share))) + 1
    high = math.ceil(float(bdtrik(1 - beyond, count, share))) + 1
    if low < 1 or high > count:
        return None
    return Estimate(float(np.percentile(values, percent)), float(values[low - 1]), float(values[high - 1]))


def enough_beyond(count: int, percent: float) -> bool:
    """Say whether at least SAMPLES_BEYOND of `count` samples lie beyond a percentile, and before it."""
    return min(count * (100 - percent), count * percent) >= 100 * SAMPLES_BEYOND


def replication_percentile(samples: NDArray[Any], percent: float) -> float | None:
    """Return a percentile of one replication, None if too few samples lie beyond it.

    Its interval comes from `estimate` over replications, which owes nothing to the dependence of neighbours.
    """
    return float(np.percentile(samples, percent)) if enough_beyond(len(samples), percent) else None


def _group_means(values: NDArray[Any], length: int) -> NDArray[Any]:
    """Return the means of successive groups of `length`; an incomplete last group is left out."""
    whole = len(values) // length * length
    means: NDArray[Any] = values[:whole].reshape(-1, length).mean(axis=1)
    return means
