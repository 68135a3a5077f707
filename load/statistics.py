"""The Kolmogorov–Smirnov test of gaps between arrivals against a Poisson process of known intensity."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def exponential_ks(gaps: Floats) -> tuple[float, float]:
    """Return the distance of gaps, in units of their expectation, from the unit exponential, and its p-value.

    The p-value is that of the limiting Kolmogorov distribution with Stephens' correction for finite samples, which
    holds from about 40 gaps on. Raises ValueError if there is no gap.
    """
    count = len(gaps)
    if count == 0:
        raise ValueError("no gaps, no test")
    expected = -np.expm1(-np.sort(gaps))
    above = np.arange(1, count + 1) / count - expected
    below = expected - np.arange(count) / count
    distance = float(max(above.max(), below.max()))
    root = np.sqrt(count)
    scaled = distance * (root + 0.12 + 0.11 / root)
    terms = np.arange(1, 101)
    p_value = 2 * float(np.sum((-1.0) ** (terms - 1) * np.exp(-2 * terms**2 * scaled**2)))
    return distance, float(np.clip(p_value, 0.0, 1.0))
