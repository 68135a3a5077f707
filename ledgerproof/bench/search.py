"""The search for the highest rate that holds: up in steps, then halving, then a longer window that confirms it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

UP: Final = 1.4
"""Factor from a rate that held to the next one."""
CLOSE_ENOUGH: Final = 1.06
"""The search ends when the lowest rate that failed is within this factor of the highest that held."""
STEPS_MAX: Final = 14
CONFIRM_TRIES: Final = 5
BACK_OFF: Final = 0.85
"""Factor to the next rate when the longer window did not confirm one."""
FIRST_TRIES: Final = 4
"""Halvings of the first rate when not even that holds."""


class Held(StrEnum):
    """What one window said about its rate."""

    YES = "held"
    NO = "not held"
    INVALID = "invalid"
    """The window says nothing about the service: the generator was late."""


@dataclass(frozen=True)
class Step:
    """One window of a search."""

    rate: float
    held: Held
    why: str
    hint: float | None = None
    """What the service did instead, where that is a good next guess."""
    confirming: bool = False


@dataclass
class Found:
    """The outcome: `rate` is None if no rate was confirmed."""

    rate: float | None = None
    steps: list[Step] = field(default_factory=list)
    limit: str = ""
    """What ended the search from above: why the next higher rate did not hold."""


def highest_rate(
    attempt: Callable[[float], Step],
    confirm: Callable[[float], Step],
    first: float,
    *,
    deadline: float,
    confirm_until: float,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Search from `first` (per second, above 0) until `deadline` of `clock`, and confirm what was found.

    The first confirming window is always played, further ones begin only before `confirm_until`.
    Every window is bounded, and so is their number; an INVALID one bounds the search from above like one that did
    not hold, and its reason is kept.
    """
    found = Found()
    low, high = _bracket(attempt, first, deadline, clock, found)
    if low == 0.0:
        return found
    while high is not None and high / low > CLOSE_ENOUGH and len(found.steps) < STEPS_MAX and clock() < deadline:
        step = attempt(_between(low, high, found.steps[-1]))
        found.steps.append(step)
        if step.held is Held.YES:
            low = step.rate
        else:
            high = step.rate
            found.limit = step.why
    if high is None:
        found.limit = "time or steps ran out before any rate failed: higher ones may hold"
    rate = low
    for turn in range(CONFIRM_TRIES):
        if turn and clock() >= confirm_until:
            break
        step = confirm(rate)
        found.steps.append(step)
        if step.held is Held.YES:
            found.rate = rate
            break
        found.limit = step.why
        # Step by step, whatever it says it did instead: in a window that met a hiccup that may be next to nothing.
        rate *= BACK_OFF
    return found


def _bracket(
    attempt: Callable[[float], Step], first: float, deadline: float, clock: Callable[[], float], found: Found
) -> tuple[float, float | None]:
    """Go up from the first rate, or down if it does not hold; return what held (0.0: nothing) and what did not."""
    low, high, rate = 0.0, None, first
    downs = 0
    while len(found.steps) < STEPS_MAX and clock() < deadline:
        step = attempt(rate)
        found.steps.append(step)
        if step.held is Held.YES:
            low = rate
            if high is not None:
                break
            rate *= UP
        else:
            high = rate
            found.limit = step.why
            if low > 0.0:
                break
            downs += 1
            if downs > FIRST_TRIES:
                break
            rate = rate / 2 if step.hint is None else min(0.9 * rate, max(step.hint, rate / 4))
    return low, high


def _between(low: float, high: float, last: Step) -> float:
    """Return the next rate to try: the hint of a window that did not hold if it lies inside, else the middle."""
    middle = math.sqrt(low * high)
    hint = last.hint
    if hint is not None and last.held is Held.NO and low * 1.02 < hint < high / 1.02:
        return hint
    return middle
