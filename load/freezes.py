"""Freeze patterns of the test server, and the latencies that an open load must report of them.

The model has no queue: an arrival within a freeze waits for its end, and every arrival then takes the service time of
the moment it came. So the true latency of each arrival follows from the schedule alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BASE_SERVICE_S: Final = 0.002
STOCK_RATE_A_USER: Final = 10.0
"""Requests per second that each user of stock pacing tries to keep up."""


def _constant(t: Floats, duration_s: float) -> Floats:
    return np.full_like(t, BASE_SERVICE_S)


def _ramp(t: Floats, duration_s: float) -> Floats:
    return np.asarray(BASE_SERVICE_S + 0.1 * np.clip(t / duration_s, 0, 1))


def _saw(t: Floats, duration_s: float) -> Floats:
    return np.asarray(BASE_SERVICE_S + 0.05 * (np.maximum(t, 0) % (duration_s / 5)) / (duration_s / 5))


def _step(t: Floats, duration_s: float) -> Floats:
    return np.asarray(np.where((t > duration_s / 3) & (t < duration_s * 2 / 3), 0.03, BASE_SERVICE_S))


@dataclass(frozen=True)
class Pattern:
    """What the server does over a run of some length."""

    freezes: tuple[tuple[float, float], ...] = ()
    """(start, length) as shares of the run."""
    service: Callable[[Floats, float], Floats] = _constant
    """Service time at seconds since the start, for a run of so many seconds."""

    def windows(self, duration_s: float) -> list[tuple[float, float]]:
        """Return the freezes as (start_s, end_s)."""
        return [(start * duration_s, (start + length) * duration_s) for start, length in self.freezes]


PATTERNS: Final[dict[str, Pattern]] = {
    "none": Pattern(),
    "one_long": Pattern(((1 / 3, 1 / 6),)),
    "one_short": Pattern(((1 / 2, 1 / 60),)),
    "two_long": Pattern(((1 / 6, 1 / 10), (2 / 3, 1 / 10))),
    "several_short": Pattern(tuple((0.1 + 0.16 * n, 0.01) for n in range(5))),
    "periodic": Pattern(tuple((n / 30, 1 / 150) for n in range(1, 30))),
    "at_start": Pattern(((0.0, 0.07),)),
    "at_end": Pattern(((0.93, 0.07),)),
    "ramp": Pattern(service=_ramp),
    "saw": Pattern(service=_saw),
    "step": Pattern(service=_step),
    "ramp_and_freeze": Pattern(((1 / 2, 0.08),), _ramp),
}
"""For a run of 30 s, `one_long` is a freeze of 5 s. No freeze is a tenth or a twentieth of the run: a percentile at its
very edge depends on which of two neighbours happened to come first."""


def true_latencies_s(
    times: Floats, windows: Sequence[tuple[float, float]], service: Callable[[Floats, float], Floats], duration_s: float
) -> Floats:
    """Return the latency of an arrival at each time (seconds since the server's start of the pattern)."""
    waits = np.zeros_like(times)
    for start_s, end_s in windows:
        within = (times >= start_s) & (times < end_s)
        waits[within] = end_s - times[within]
    return np.asarray(waits + service(times, duration_s))


def quantile_ms(latencies_s: Floats, percent: float) -> float:
    """Return the order statistic that `histograms` reports for a percentile, in milliseconds."""
    rank = max(1, int(np.ceil(len(latencies_s) * percent / 100 - 1e-9)))
    return float(np.sort(latencies_s)[rank - 1]) * 1000
