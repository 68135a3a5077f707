"""Turns what a load found into what its figures draw: bins of seconds, curves over percentiles, steps of colour.

Pure functions. Times are seconds since the start of the load, latencies milliseconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from reports.folder import Fault
from reports.loads import Estimate, Load, Spread
from reports.tallies import BIN_SECONDS, Clock, Phase
from reports.words import load_operation

CURVES_MAX = 6
"""Curves of one panel; past that, the operations with the fewest answers are added up."""
PANELS_MAX = 8
CURVE_POINTS = 140
TICKS = (50.0, 90.0, 99.0, 99.9, 99.99, 99.999)
TAIL = 0.025
"""What may lie on one side of an interval with 95 % confidence."""
STEP_SERIES = ((1, 2, 5), (1, 3), (1,))
"""Where the steps of a colour scale begin within a factor of ten, from fine to coarse."""

Grid = NDArray[np.float64]


@dataclass(frozen=True)
class Bins:
    """The seconds of a load in bins; the last may be shorter than the others."""

    bin_s: int
    edges: list[float]
    due: Grid
    sent: Grid
    answered: Grid
    ok: Grid
    dropped: Grid
    latencies: Grid
    """Answers by bin and latency class."""

    @property
    def unanswered(self) -> Grid:
        """Arrivals that were sent and got no complete answer."""
        return np.maximum(self.sent - self.answered, 0.0)

    def per_second(self, counts: Grid) -> list[float]:
        """Return counts as rates."""
        return [float(rate) for rate in counts / np.diff(self.edges)]


@dataclass(frozen=True)
class Curve:
    """Latency over percentile: `at` is the place on the axis (see `place`), `ms` the latency there."""

    name: str
    at: list[float]
    ms: list[float]
    sure: int
    """So many of the points lie where the samples are enough to bound the percentile from both sides."""
    lost_at: float | None
    """Where the curve leaves for infinity: what comes later has no answer. None if all were answered."""
    samples: int
    estimates: list[Estimate]


def merged_phases(load: Load) -> list[Phase]:
    """Return the phases; neighbours of one name are one phase (a ramp and what follows it)."""
    phases: list[Phase] = []
    for phase in sorted(load.told.phases, key=lambda phase: phase.start_s):
        if phases and phases[-1].name == phase.name and phase.start_s - phases[-1].end < 0.001:
            phases[-1] = replace(phases[-1], end=phase.end_s)
        else:
            phases.append(Phase(phase.name, phase.start_s, phase.end_s))
    return phases


def load_clock(load: Load, faults: Sequence[Fault], max_bins: int) -> Clock:
    """Return the time axis of the load's own figures: zero is its start, faults are where they were."""
    span = load.end_s
    bin_s = next((size for size in BIN_SECONDS if span / size <= max_bins), math.ceil(span / max_bins))
    moved = [_moved(fault, load.offset_s) for fault in faults] if load.offset_s is not None else []
    return Clock(0.0, span, bin_s, merged_phases(load), moved)


def _moved(fault: Fault, by_s: float) -> Fault:
    names = ("requested_at", "measured_start", "measured_end", "healed_at", "recovered_at")
    times = {name: None if (t := getattr(fault, name)) is None else t - by_s for name in names}
    return Fault(fault.id, fault.kind, fault.target, **times)


def bins_of(load: Load, clock: Clock) -> Bins:
    """Add up the seconds of a load by the bins of its clock; seconds outside it are left out."""
    count = clock.bins
    classes = len(load.told.coarse_ms) + 1
    edges = [min(clock.end, float(index * clock.bin_s)) for index in range(count + 1)]
    rows = {name: np.zeros(count) for name in ("due", "sent", "answered", "ok", "dropped")}
    latencies = np.zeros((count, classes))
    for second in load.told.seconds:
        index = second.second // clock.bin_s
        if index >= count:
            continue
        for name, row in rows.items():
            row[index] += float(getattr(second, name))
        if load.told.coarse_ms:
            latencies[index] += np.array(second.latencies, np.float64)
    return Bins(clock.bin_s, edges, latencies=latencies, **rows)


def steps_of(largest: float, most: int) -> list[int]:
    """Return where the steps of a colour scale for the counts 1 … `largest` begin: round numbers, at most `most`."""
    for series in STEP_SERIES:
        steps = [part * 10**power for power in range(20) for part in series if part * 10**power <= max(1, largest)]
        if len(steps) <= most:
            return steps
    return steps[:: math.ceil(len(steps) / most)]


def place(percent: float) -> float:
    """Return where a percentile stands on the axis of the curves: each further nine is one unit away."""
    return -math.log10(1 - percent / 100)


def curve_of(name: str, spread: Spread, unanswered: int, estimates: Sequence[Estimate] = ()) -> Curve | None:
    """Return the curve of some latencies and of `unanswered` infinite ones; None if nothing was answered."""
    answered = spread.total
    if not answered:
        return None
    samples = answered + max(0, unanswered)
    # The longest latency of n is the percentile 1 - 1/n: beyond it, these samples say nothing.
    last = math.log10(samples)
    lost = 1 - answered / samples
    end = last if not lost else min(last, -math.log10(lost))
    at = [float(x) for x in np.linspace(0, end, CURVE_POINTS)]
    # A hair less than the exact share, so that the rank of p50 of 1,000 is the 500th and not the 501st.
    ranks = [min(answered, max(1, math.ceil(samples * (1 - 10**-x) - 1e-6))) for x in at]
    ms = [max(0.001, float(value)) for value in spread.at_ranks_ms(ranks)]
    # n samples bound a percentile from above if it is unlikely (2.5 %) that all of them lie below it.
    sure_share = TAIL ** (1 / samples)
    sure_at = -math.log10(1 - sure_share) if sure_share < 1 else last
    sure = sum(x <= sure_at for x in at)
    return Curve(name, at, ms, sure, end if lost else None, samples, [each for each in estimates if each.ms])


def curves(load: Load) -> list[tuple[str, list[Curve]]]:
    """Return for each phase the curves of its operations, those with the most answers first and at most CURVES_MAX.

    An operation keeps its place in every phase, so that a colour means the same in all panels.
    """
    weight: dict[str, int] = {}
    for (op, _), spread in load.spreads.items():
        weight[op] = weight.get(op, 0) + spread.total
    order = sorted(weight, key=lambda op: (-weight[op], op))
    single = order if len(order) <= CURVES_MAX else order[: CURVES_MAX - 1]
    rest = [op for op in order if op not in single]
    estimates = {(row.op, row.phase): row.estimates for row in load.told.percentiles}
    lost = {(cell.op, cell.phase): cell.unanswered for cell in load.told.cells}
    names = list(dict.fromkeys([*(phase.name for phase in merged_phases(load)), *(phase for _, phase in load.spreads)]))
    found = []
    for phase in names[:PANELS_MAX]:
        made = [
            curve_of(load_operation(op), load.spreads[op, phase], lost[op, phase], estimates.get((op, phase), ()))
            for op in single
            if (op, phase) in load.spreads
        ]
        others = [op for op in rest if (op, phase) in load.spreads]
        if others:
            summed = Spread.sum([load.spreads[op, phase] for op in others])
            made.append(curve_of("the others", summed, sum(lost[op, phase] for op in others)))
        whole = [curve for curve in made if curve is not None]
        if whole:
            found.append((phase, whole))
    return found
