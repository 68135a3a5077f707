"""Compares two load runs: ratios of throughput and latency with intervals, and a verdict for each.

The interval of a percentile comes from order statistics, which suppose that samples are independent. Answers of one
second are not: a slow moment makes many slow at once. How much more the seconds of a run differ than independent
samples would (`dispersion`) is measured on its per-second series, and so many fewer samples count.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

import msgspec
import numpy as np

from ledgerproof.output import print_json
from load.histograms import interval_ranks
from load.result import Cell, Result, Second

PERCENTS: Final = (50.0, 90.0, 99.0)
KNEE_FILE: Final = "knee.json"
"""What a search for the knee leaves in its run folder."""
RATES_APART: Final = 6.0
"""Two draws of one rate differ by more standard deviations than this next to never."""
ERRORS_OPEN: Final = 0.005
"""Half an interval of the difference of two shares of errors; with a wider one, no difference was not shown."""
NOTICED: Final = 0.03
"""A ratio closer to one than this is no difference that anyone would act on, however certain it is."""
SAME_WITHIN: Final = 1.25
"""No difference is said of an interval that lies within this factor of one."""
RESAMPLES: Final = 2_000
BLOCK_S: Final = 5
"""Throughput is resampled in blocks of this many seconds, so that slow stretches stay together."""
LEAST_SECONDS: Final = 10
"""Fewer seconds than this say nothing of how seconds differ."""
LOAD_FILE: Final = "load.json"
"""The result of a load in its run folder."""


class NotComparable(Exception):
    """The two cannot be compared; the message says why and what to do."""


class Said(StrEnum):
    """What a ratio of B to A says."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "no difference"
    OPEN = "not decided"


class Line(msgspec.Struct, frozen=True):
    """One measure of both runs; ratios are B / A."""

    phase: str
    op: str
    measure: str
    a: float | None
    b: float | None
    unit: str
    ratio: float | None
    low: float | None
    """Bounds of the ratio with 95 % confidence."""
    high: float | None
    said: Said
    why: str = ""
    less_is_better: bool = True
    difference: float | None = None
    """B - A, where that and not the ratio is judged; `half` is half of its interval."""
    half: float | None = None

    def at(self, wider: float) -> Said:
        """Return what is said if the interval is so many times as wide (on the scale of ratios)."""
        if self.difference is not None and self.half is not None:
            return _said_of_difference(self.difference, self.half * wider)
        if self.ratio is None or self.low is None or self.high is None:
            return self.said
        low, high = (self.ratio * (bound / self.ratio) ** wider for bound in (self.low, self.high))
        return _said(low, high, less_is_better=self.less_is_better)


class Comparison(msgspec.Struct, frozen=True):
    """Two runs beside each other."""

    a: str
    b: str
    profile: str
    lines: list[Line]
    notes: list[str]
    unproven: list[str]
    """Why one of the runs proves nothing."""

    @property
    def said(self) -> Said:
        """Return the verdict of the whole: worse if anything surely is, else better if anything surely is.

        Of many measures some differ by chance, one in twenty at 95 %. For the whole each interval is therefore widened
        to what all of them together keep with 95 % (Bonferroni).
        """
        wider = NormalDist().inv_cdf(1 - 0.025 / max(1, len(self.lines))) / NormalDist().inv_cdf(0.975)
        kinds = {line.at(wider) for line in self.lines}
        return next((kind for kind in (Said.WORSE, Said.BETTER, Said.SAME) if kind in kinds), Said.OPEN)

    @property
    def undecided(self) -> int:
        """How many measures are not decided."""
        return sum(line.said is Said.OPEN for line in self.lines)


def read_result(place: Path) -> Result:
    """Read the result in a run folder or in a file. Raises NotComparable."""
    if (place / KNEE_FILE).exists():
        raise NotComparable(
            f"{place} is a search for the knee: compare its windows, {place}/windowNN.json, of one rate"
        )
    path = place / LOAD_FILE if place.is_dir() else place
    try:
        return Result.from_json(path.read_bytes())
    except OSError as error:
        raise NotComparable(f"cannot read {path}: {error.strerror}; name a run folder of `ledgerproof load`") from error
    except msgspec.DecodeError as error:
        raise NotComparable(f"{path} is no result of a load: {error}") from error


def compare(a: Result, b: Result, names: tuple[str, str]) -> Comparison:
    """Compare two results of one profile. Raises NotComparable for two profiles or phases of other lengths."""
    if a.profile != b.profile:
        raise NotComparable(f"{names[0]} played {a.profile} and {names[1]} played {b.profile}: compare like with like")
    if [(p.name, p.start_s, p.end_s) for p in a.phases] != [(p.name, p.start_s, p.end_s) for p in b.phases]:
        raise NotComparable("the phases of the two runs differ: play both with the same profile and factors")
    for phase in dict.fromkeys(phase.name for phase in a.phases):
        due = [result.total(phase=phase).count for result in (a, b)]
        if abs(due[0] - due[1]) > RATES_APART * math.sqrt(sum(due) + 1):
            raise NotComparable(
                f"{due[0]:,} arrivals were due in {phase} of {names[0]} and {due[1]:,} in {names[1]}: play both at the "
                "same rates"
            )
    notes = []
    if a.schedule_digest != b.schedule_digest:
        notes.append("the two runs played different arrivals (other seeds): their difference is in the interval")
    lines: list[Line] = []
    for phase in dict.fromkeys(phase.name for phase in a.phases):
        spans = [(part.start_s, part.end_s) for part in a.phases if part.name == phase]
        seconds = [_within(result.seconds, spans) for result in (a, b)]
        lines.append(_throughput(phase, *seconds))
        lines.append(_errors(phase, (a.total(phase=phase), b.total(phase=phase)), seconds))
        alone = [
            (name, cell.op)
            for name, result, other in (("A", a, b), ("B", b, a))
            for cell in result.cells
            if cell.phase == phase and other.cell(cell.op, phase) is None
        ]
        lines += [
            Line(phase, op, "any", None, None, "", None, None, None, Said.OPEN, f"only {name} has it")
            for name, op in alone
        ]
        ops = [cell.op for cell in a.cells if cell.phase == phase and b.cell(cell.op, phase) is not None]
        for op in ops:
            cells = a.cell(op, phase), b.cell(op, phase)
            assert cells[0] is not None, "it was just found"
            assert cells[1] is not None, "it was just found"
            for percent in PERCENTS:
                spread = [
                    dispersion(own if len(own) >= LEAST_SECONDS else result.seconds, percent)
                    for own, result in zip(seconds, (a, b), strict=True)
                ]
                lines.append(_latency(phase, op, percent, (cells[0], cells[1]), spread))
    unproven = [f"{name}: {why}" for name, result in zip(names, (a, b), strict=True) for why in result.invalid]
    return Comparison(names[0], names[1], a.profile, lines, notes, unproven)


def _within(seconds: Sequence[Second], spans: Sequence[tuple[float, float]]) -> list[Second]:
    """Return the seconds that lie wholly inside one of the spans."""
    return [each for each in seconds if any(start <= each.second and each.second + 1 <= end for start, end in spans)]


def dispersion(seconds: Sequence[Second], percent: float) -> float:
    """Return how many times as much the share of slow answers varies between seconds as for independent samples.

    Slow is what lies above the class bound that comes closest to the percentile. At least 1; 1 where seconds say
    nothing (fewer than two with answers, or none or all slow).
    """
    counts = np.array([each.latencies for each in seconds if sum(each.latencies)], dtype=np.float64)
    if len(counts) < 2:
        return 1.0
    above = counts.sum(axis=0)[::-1].cumsum()[::-1] / counts.sum()
    # Class number i begins above bound i - 1, so `above[i]` is the share slower than that bound.
    telling = np.flatnonzero((above > 0) & (above < 1))
    if not len(telling):
        return 1.0
    bound = int(telling[np.abs(np.log(above[telling] / (1 - percent / 100))).argmin()])
    slow = counts[:, bound:].sum(axis=1)
    return _dispersion_of(slow.astype(int).tolist(), counts.sum(axis=1).astype(int).tolist())


class Infinite(str):
    """Why a percentile has no value: so many arrivals got no answer that even its lower bound is infinite."""

    __slots__ = ()


def _bounds(cell: Cell, percent: float, spread: float) -> tuple[float, float, float] | str:
    """Return a percentile with its interval in milliseconds, all above zero and finite, or why there is none."""
    latencies = cell.latencies()
    samples = len(latencies) + cell.unanswered
    ranks = interval_ranks(int(samples / spread), percent / 100)
    if ranks is None:
        counted = "" if spread < 1.05 else f", worth {samples / spread:,.0f} independent ones"
        return f"too few samples for p{percent:g}: {samples:,}{counted}"
    cumulated = latencies.counts().cumsum()
    answered = int(cumulated[-1])
    places = (samples * percent / 100, ranks[0] * spread, min(float(samples), ranks[1] * spread))
    wanted = [max(1, math.ceil(place - 1e-9)) for place in places]
    if min(wanted) > answered:
        return Infinite(f"p{percent:g} lies among the arrivals without an answer, and so does its interval")
    if max(wanted) > answered:
        return f"p{percent:g} or its interval lies among the arrivals without an answer"
    value, low, high = (latencies.upper_us(int(cumulated.searchsorted(rank))) / 1000 for rank in wanted)
    return value, low, high


def _latency(phase: str, op: str, percent: float, cells: tuple[Cell, Cell], spread: Sequence[float]) -> Line:
    measure = f"p{percent:g}"
    first, second = (_bounds(cell, percent, each) for cell, each in zip(cells, spread, strict=True))
    if isinstance(second, Infinite) and not isinstance(first, str):
        return Line(phase, op, measure, first[0], None, "ms", None, None, None, Said.WORSE, f"B: {second}")
    if isinstance(first, Infinite) and not isinstance(second, str):
        return Line(phase, op, measure, None, second[0], "ms", None, None, None, Said.BETTER, f"A: {first}")
    if isinstance(first, str) or isinstance(second, str):
        why = "; ".join(f"{name}: {each}" for name, each in (("A", first), ("B", second)) if isinstance(each, str))
        values = [None if isinstance(each, str) else each[0] for each in (first, second)]
        return Line(phase, op, measure, values[0], values[1], "ms", None, None, None, Said.OPEN, why)
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    ratio = b / a
    # Two independent errors add up in squares, on the scale on which a ratio is a difference.
    down = math.hypot(math.log(b / b_low), math.log(a_high / a))
    up = math.hypot(math.log(b_high / b), math.log(a / a_low))
    low, high = ratio * math.exp(-down), ratio * math.exp(up)
    return Line(phase, op, measure, a, b, "ms", ratio, low, high, _said(low, high, less_is_better=True))


def _said(low: float, high: float, *, less_is_better: bool) -> Said:
    if high < 1 - NOTICED:
        return Said.BETTER if less_is_better else Said.WORSE
    if low > 1 + NOTICED:
        return Said.WORSE if less_is_better else Said.BETTER
    # An interval that reaches far to one side may hide a difference.
    return Said.SAME if low > 1 / SAME_WITHIN and high < SAME_WITHIN else Said.OPEN


def _throughput(phase: str, a: Sequence[Second], b: Sequence[Second]) -> Line:
    per_s = [np.array([each.ok for each in seconds], dtype=np.float64) for seconds in (a, b)]
    if any(len(each) < 2 * BLOCK_S or not each.sum() for each in per_s):
        means = [float(each.mean()) if len(each) else None for each in per_s]
        why = f"a phase of {2 * BLOCK_S} whole seconds with answers is needed"
        return Line(phase, "all", "answered well", means[0], means[1], "/s", None, None, None, Said.OPEN, why)
    draw = np.random.default_rng(0)
    means_a, means_b = (_resampled(each, draw) for each in per_s)
    ratio = float(per_s[1].mean() / per_s[0].mean())
    low, high = (float(each) for each in np.quantile(means_b / means_a, (0.025, 0.975)))
    said = _said(low, high, less_is_better=False)
    means = [float(each.mean()) for each in per_s]
    return Line(phase, "all", "answered well", means[0], means[1], "/s", ratio, low, high, said, less_is_better=False)


def _resampled(
    per_s: "np.ndarray[tuple[int], np.dtype[np.float64]]", draw: np.random.Generator
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return RESAMPLES means of blocks drawn with replacement, as many as the series has."""
    starts = len(per_s) - BLOCK_S + 1
    sums = np.convolve(per_s, np.ones(BLOCK_S), mode="valid")
    chosen = draw.integers(0, starts, size=(RESAMPLES, max(1, len(per_s) // BLOCK_S)))
    means: np.ndarray[tuple[int], np.dtype[np.float64]] = sums[chosen].mean(axis=1) / BLOCK_S
    return np.maximum(means, 1e-9)


def _errors(phase: str, cells: tuple[Cell, Cell], seconds: Sequence[Sequence[Second]]) -> Line:
    """Compare the shares of errors by the difference of two proportions: a ratio of zeros says nothing."""
    shares, halves = [], []
    for cell, own in zip(cells, seconds, strict=True):
        due = max(1, cell.count - cell.skipped)
        # One bad second is not as many errors as it holds requests.
        worth = due / _dispersion_of([each.fail + each.info for each in own], [each.sent for each in own])
        share = cell.error_share
        # Agresti and Coull: two successes and two failures more, so that no error is not taken for certainty.
        centre = (share * worth + 2) / (worth + 4)
        shares.append(share)
        halves.append(1.96 * math.sqrt(centre * (1 - centre) / (worth + 4)))
    difference, half = shares[1] - shares[0], math.hypot(*halves)
    why = f"difference {difference:+.3%} ± {half:.3%}"
    said = _said_of_difference(difference, half)
    values = [100 * share for share in shares]
    return Line(
        phase, "all", "errors", values[0], values[1], "%", None, None, None, said, why, difference=difference, half=half
    )


def _said_of_difference(difference: float, half: float) -> Said:
    if abs(difference) > half:
        return Said.WORSE if difference > 0 else Said.BETTER
    return Said.SAME if half <= ERRORS_OPEN else Said.OPEN


def _dispersion_of(slow: Sequence[int], answers: Sequence[int]) -> float:
    """Return how many times as much a share varies between seconds as it would by chance; at least 1."""
    counts = np.array([answers, slow], dtype=np.float64)
    counts = counts[:, counts[0] > 0]
    if counts.shape[1] < 2:
        return 1.0
    share = counts[1].sum() / counts[0].sum()
    if not 0 < share < 1:
        return 1.0
    excess = (counts[1] - counts[0] * share) ** 2 / (counts[0] * share * (1 - share))
    return max(1.0, float(excess.sum() / (counts.shape[1] - 1)))


HEADINGS: Final = ("phase", "operation", "measure", "A", "B", "B / A", "95 %", "verdict")


def table(found: Comparison) -> list[list[str]]:
    """Return the lines for a terminal."""
    return [
        [
            line.phase,
            line.op,
            line.measure,
            _number(line.a, line.unit),
            _number(line.b, line.unit),
            "–" if line.ratio is None else f"{line.ratio:.3f}",
            line.why if line.low is None or line.high is None else f"{line.low:.3f} – {line.high:.3f}",
            line.said.value,
        ]
        for line in found.lines
    ]


def _number(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.4g} {unit}"


def told(found: Comparison) -> dict[str, Any]:
    """Return a comparison as its JSON has it, with the verdict of the whole."""
    return {**msgspec.to_builtins(found), "said": found.said.value}


def write(found: Comparison, path: str) -> None:
    """Write a comparison as JSON, `-` for standard output. Raises OSError."""
    if path == "-":
        print_json(told(found))
    else:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(told(found)), indent=2) + b"\n")
