"""Whether a backlog stays bounded: by its slope over the whole window, not by its last value alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

SETTLING_SHARE: Final = 0.2
"""The first part of the window is left out: batches and caches come to speed in it."""
SLOPE_MAX_SHARE: Final = 0.02
"""A backlog that grows by more than this share of the rate is not bounded."""
END_MAX_S: Final = 3.0
"""Nor is one that ends above what arrives in this time."""
SAMPLES_MIN: Final = 6


@dataclass(frozen=True)
class Trend:
    """How one backlog went over a window."""

    name: str
    slope_per_s: float
    """Median of the slopes between all pairs of samples (Theil and Sen), which outliers do not move."""
    first: float
    last: float
    """Medians of the first and the last quarter, the settling time left out."""
    bounded: bool
    why: str


def trend(name: str, times_s: Sequence[float], values: Sequence[float], rate: float, duration_s: float) -> Trend:
    """Judge a backlog sampled at `times_s` (seconds since the window began) under a load of `rate` per second."""
    kept = [(t, v) for t, v in zip(times_s, values, strict=True) if SETTLING_SHARE * duration_s <= t <= duration_s]
    if len(kept) < SAMPLES_MIN:
        return Trend(name, 0.0, 0.0, 0.0, bounded=False, why=f"{name}: only {len(kept)} samples")
    t, v = np.array(kept).T
    earlier, later = np.triu_indices(len(t), k=1)
    slope = float(np.median((v[later] - v[earlier]) / (t[later] - t[earlier])))
    quarter = max(1, len(v) // 4)
    first, last = float(np.median(v[:quarter])), float(np.median(v[-quarter:]))
    if slope > SLOPE_MAX_SHARE * rate:
        return Trend(name, slope, first, last, bounded=False, why=f"{name} grows by {slope:,.0f}/s")
    if last > END_MAX_S * rate:
        return Trend(name, slope, first, last, bounded=False, why=f"{name} ends at {last:,.0f}")
    return Trend(name, slope, first, last, bounded=True, why="")
