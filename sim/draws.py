"""Random times and factors that models of slow things share: a lognormal told by two of its values, a slow factor."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Z_95: Final = 1.6448536269514722
"""95 % point of the standard normal distribution (any statistical table)."""


def lognormal(random: np.random.Generator, number: int, median: float, p95: float) -> Floats:
    """Return so many lognormal draws, of which half lie below `median` and one in twenty above `p95`."""
    sigma = np.log(p95 / median) / Z_95
    return np.asarray(median * np.exp(sigma * random.standard_normal(number)))


def slow_factor(random: np.random.Generator, steps: int, spread: float, memory_s: float, step_s: float = 1.0) -> Floats:
    """Return a positive random factor with the mean 1 for each step, which forgets itself in `memory_s`.

    Its logarithm is a first-order autoregression with the standard deviation `spread`, stationary from the first step.
    """
    keep = float(np.exp(-step_s / memory_s))
    shocks = random.standard_normal(steps) * spread * np.sqrt(1 - keep**2)
    value = spread * float(random.standard_normal())
    walk = np.empty(steps)
    for index, shock in enumerate(shocks.tolist()):
        value = keep * value + shock
        walk[index] = value
    return np.asarray(np.exp(walk - spread**2 / 2))
