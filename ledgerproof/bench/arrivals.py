"""When requests are due: a schedule that is drawn before the window and never looks at the answers."""

import numpy as np
import numpy.typing as npt


def poisson(rate: float, duration_s: float, seed: int, burst: int = 1) -> npt.NDArray[np.float64]:
    """Return the arrival times, in seconds from the start, of a Poisson process, ascending and below `duration_s`.

    Given their number the arrivals of a Poisson process are independent and uniform, which is how they are drawn.
    With `burst` that many come at each of the moments, and as many in all. Raises ValueError unless all are above zero.
    """
    if rate <= 0 or duration_s <= 0 or burst < 1:
        raise ValueError(f"rate, duration and burst must be above zero, not {rate:g}/s, {duration_s:g} s and {burst}")
    draw = np.random.default_rng(seed)
    times = np.sort(draw.random(int(draw.poisson(rate * duration_s / burst))) * duration_s)
    return np.repeat(times, burst)
