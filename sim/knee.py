"""Where the model's p99 leaves its limit: rates are tried upwards until one does not hold, then between."""

from collections.abc import Callable
from typing import Final

from sim.cases import Shape
from sim.costs import Costs
from sim.prediction import Forecast, forecast

STEP: Final = 1.5
"""While no rate has failed, the next is so many times the last."""
WINDOWS_MAX: Final = 40
REPLICATIONS: Final = 3


def holds(found: Forecast, *, p99_ms: float, refused_share: float) -> bool:
    """Return whether a forecast keeps the limits: p99 of every class of requests, and the share that is refused."""
    tails = [percentiles["p99"].value for percentiles in found.latency_ms.values()]
    return bool(tails) and max(tails) <= p99_ms and found.refused_share <= refused_share


def find_knee(
    costs: Costs,
    shape: Shape,
    *,
    low_per_s: float,
    high_per_s: float,
    tolerance: float,
    p99_ms: float,
    refused_share: float,
    window_s: float,
    seed: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Forecast | None, Forecast | None]:
    """Return the forecasts of the highest rate that holds and of the lowest that does not, `tolerance` apart.

    The first is None if `low_per_s` does not hold, the second if `high_per_s` does: then the bounds do not bracket a
    knee. Raises ValueError for bounds that are none, or if a window is too long to be computed.
    """
    if not 0 < low_per_s < high_per_s or tolerance <= 0:
        raise ValueError(f"a knee is sought between two rates, and to a tolerance: {low_per_s}, {high_per_s}")
    best: Forecast | None = None
    worst: Forecast | None = None
    rate = low_per_s
    for _ in range(WINDOWS_MAX):
        progress(f"{rate:,.0f}/s")
        found = forecast(costs, shape, round(rate, 1), duration_s=window_s, seed=seed, replications=REPLICATIONS)
        if holds(found, p99_ms=p99_ms, refused_share=refused_share):
            best = found
            if rate >= high_per_s:
                break
        else:
            worst = found
            if best is None:
                break
        if worst is None:
            rate = min(rate * STEP, high_per_s)
            continue
        assert best is not None and best.rate_per_s is not None and worst.rate_per_s is not None, "both have a rate"
        if worst.rate_per_s <= best.rate_per_s * (1 + tolerance):
            break
        rate = (best.rate_per_s * worst.rate_per_s) ** 0.5
    return best, worst
