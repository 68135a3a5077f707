"""When requests are due: a schedule that is drawn before the window and never looks at the answers."""

import numpy as np
import numpy.typing as npt


def poisson(rate: float, duration_s: float, seed: int) -> npt.NDArray[np.float64]:
    """Return the arrival times, in seconds from the start, of a Poisson process, ascending and below `duration_s`.

    Given their number the arrivals of a Poisson process are independent and uniform, which is how they are drawn.
    Raises ValueError unless rate and duration are above zero.
    """
    if rate <= 0 or duration_s <= 0:
        raise ValueError(f"rate and duration must be above zero, not {rate:g}/s and {duration_s:g} s")
    draw = np.random.default_rng(seed)
    return np.sort(draw.random(int(draw.poisson(rate * duration_s))) * duration_s)
