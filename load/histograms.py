"""Latencies in microseconds, kept as HDR histograms: exact counts, merged without loss, told with their uncertainty.

A histogram holds 1 µs to 10 min with three significant digits (a reported value is at most 0.1 % above the true one).
Percentiles are never averaged: counts of several workers are added, then the percentile is read. What has no answer
counts as infinitely late: it is in no histogram, and `percentile` is told how many there were.
"""

from typing import Final

import msgspec
import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

LOWEST_US: Final = 1
HIGHEST_US: Final = 600_000_000
DIGITS: Final = 3
CONFIDENCE: Final = 0.95

Counts = NDArray[np.int64]


class Estimate(msgspec.Struct, frozen=True):
    """A percentile of a sample with its 95 % confidence interval, or why there is none. Times are milliseconds."""

    percentile: float
    samples: int
    """Answered or not."""
    ms: float | None = None
    """None beside no `refused`: among those without an answer, so infinitely late."""
    low_ms: float | None = None
    high_ms: float | None = None
    """None: unbounded, for the upper rank falls among those without an answer."""
    refused: str | None = None

    def text(self) -> str:
        """Return the estimate in words: value and interval, or the reason for its lack."""
        if self.refused is not None:
            return "–"
        value = "∞" if self.ms is None else f"{self.ms:.4g}"
        low = "∞" if self.low_ms is None else f"{self.low_ms:.4g}"
        high = "∞" if self.high_ms is None else f"{self.high_ms:.4g}"
        return f"{value} [{low}, {high}]"


class Latencies:
    """The latencies of one kind of arrival."""

    def __init__(self) -> None:
        self._histogram = HdrHistogram(LOWEST_US, HIGHEST_US, DIGITS)

    def __len__(self) -> int:
        return int(self._histogram.total_count)

    def record_us(self, latency_us: int) -> None:
        """Count one latency; less than 1 µs counts as 1 µs, more than 10 min as 10 min."""
        self._histogram.record_value(min(max(latency_us, LOWEST_US), HIGHEST_US))

    def add(self, other: "Latencies") -> None:
        """Add the counts of another histogram."""
        self._histogram.add(other._histogram)

    def encode(self) -> str:
        """Return the histogram in HdrHistogram's own base64 form (V2, compressed)."""
        encoded: bytes = self._histogram.encode()
        return encoded.decode()

    @classmethod
    def decode(cls, text: str) -> "Latencies":
        """Read what `encode` wrote. Raises ValueError if it is not a histogram of our range and precision."""
        decoded = cls()
        try:
            read = HdrHistogram.decode(text.encode())
        except Exception as error:  # the library raises its own kinds, zlib's, binascii's and ctypes'
            raise ValueError(f"not an HDR histogram: {error}") from error
        if (read.lowest_trackable_value, read.highest_trackable_value, read.significant_figures) != (
            LOWEST_US,
            HIGHEST_US,
            DIGITS,
        ):
            raise ValueError("an HDR histogram of another range or precision")
        decoded._histogram.add(read)
        return decoded

    def counts(self) -> Counts:
        """Return how many latencies fell into each bucket of the histogram; `upper_us` tells what a bucket is."""
        return np.frombuffer(self._histogram.counts, dtype=np.int64).copy()

    def upper_us(self, bucket: int) -> int:
        """Return the highest latency that falls into a bucket."""
        histogram = self._histogram
        return int(histogram.get_highest_equivalent_value(histogram.get_value_from_index(bucket)))

    def max_us(self) -> int:
        """Return the longest latency, or 0 if there is none."""
        return int(self._histogram.get_max_value()) if len(self) else 0

    def percentile(self, percent: float, unanswered: int = 0) -> Estimate:
        """Return the percentile (0 < percent < 100) of these latencies and of `unanswered` infinite ones.

        The interval is between two order statistics, chosen by the binomial distribution of how many samples lie
        below the true percentile; it assumes nothing of the distribution, only that samples are independent. Where
        there are too few samples for the upper rank to exist, the answer is refused.
        """
        samples = len(self) + unanswered
        ranks = interval_ranks(samples, percent / 100)
        if ranks is None:
            need = samples_needed(percent / 100)
            return Estimate(percent, samples, refused=f"p{percent:g} needs {need:,} samples, there are {samples:,}")
        lower, upper = ranks
        # Ranks are exact decimals of the percentile, so that p99 of 1,000 is the 990th and not the 991st.
        rank = max(1, int(np.ceil(samples * percent / 100 - 1e-9)))
        cumulated = np.cumsum(self.counts())
        return Estimate(
            percent,
            samples,
            ms=self._at(cumulated, rank),
            low_ms=self._at(cumulated, lower),
            high_ms=self._at(cumulated, upper),
        )

    def _at(self, cumulated: Counts, rank: int) -> float | None:
        if rank > int(cumulated[-1]):
            return None
        return self.upper_us(int(np.searchsorted(cumulated, rank))) / 1000


def samples_needed(quantile: float) -> int:
    """Return the least number of samples that bound a quantile from both sides with 95 % confidence."""
    tail = (1 - CONFIDENCE) / 2
    need = np.log(tail) / np.log(max(quantile, 1 - quantile))
    return int(np.ceil(need))


def interval_ranks(samples: int, quantile: float) -> tuple[int, int] | None:
    """Return the ranks (1 is the smallest) of the two samples that bound a quantile with 95 % confidence.

    None if there are too few samples. Raises ValueError unless 0 < quantile < 1.
    """
    if not 0 < quantile < 1:
        raise ValueError("a quantile lies between 0 and 1")
    if samples < samples_needed(quantile):
        return None
    tail = (1 - CONFIDENCE) / 2
    first, cumulated = _binomial(samples, quantile)
    # P(fewer than l samples lie below) <= tail, and P(u or more lie below) <= tail.
    lower = first + int(np.searchsorted(cumulated, tail, side="right"))
    upper = first + int(np.searchsorted(cumulated, 1 - tail, side="left")) + 1
    if lower < 1 or upper > samples:
        return None
    return lower, upper


def _binomial(samples: int, quantile: float) -> tuple[int, NDArray[np.float64]]:
    """Return a value k0 and P(X <= k) for k0, k0 + 1, …; what lies outside has less than 1e-12 of the weight."""
    mode = min(int((samples + 1) * quantile), samples)
    reach = int(8 * np.sqrt(samples * quantile * (1 - quantile))) + 40
    up = np.arange(mode, min(samples, mode + reach))
    down = np.arange(mode, max(0, mode - reach), -1)
    odds = quantile / (1 - quantile)
    # Ratios of neighbours, from the mode outwards: no factorials, so exact for any number of samples.
    above = np.cumprod((samples - up) / (up + 1) * odds)
    below = np.cumprod(down / (samples - down + 1) / odds)
    weights = np.concatenate([below[::-1], [1.0], above])
    return mode - len(below), np.cumsum(weights / weights.sum())
