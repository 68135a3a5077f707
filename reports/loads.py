"""Reads what `ledgerproof load` leaves in a run folder: load.json and, of a search for the knee, knee.json.

As with the rest of a run folder, nothing here raises for a file that is torn or odd: what cannot be used becomes a
`Gap`. The structs are the report's own, so that a page can be made of a file of any version. Times are seconds since
the start of the load; latencies are milliseconds and count from the moment an arrival was due.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from reports.gaps import Gap, read_json

LOAD_FILE: Final = "load.json"
KNEE_FILE: Final = "knee.json"
HIGHEST_US: Final = 3_600_000_000
DIGITS_MAX: Final = 3
"""A histogram of a longer range or of more digits is not ours, and would fill the memory."""
LONGEST_S: Final = 10**8
MOST: Final = 10**12
"""A load that is longer, or a count that is larger, is an error of the file."""
MAX_GAPS: Final = 6
"""Gaps named one by one; of more, only how many there are."""
REFUSAL_STATUSES: Final = ("409", "422")
"""Answers by which the service says that a rule forbids a command."""

Numbers = NDArray[np.int64]


class Estimate(msgspec.Struct):
    """A percentile with its 95 % interval, or why there is none; None for `ms` or a bound is infinitely late."""

    percentile: float = 0.0
    samples: int = 0
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    refused: str | None = None


class Percentiles(msgspec.Struct):
    """The percentiles of one operation in one phase."""

    op: str = ""
    phase: str = ""
    estimates: list[Estimate] = []


class Counts(msgspec.Struct):
    """What became of the arrivals of one operation in one phase."""

    op: str = ""
    phase: str = ""
    count: int = 0
    ok: int = 0
    fail: int = 0
    info: int = 0
    dropped: int = 0
    skipped: int = 0
    unanswered: int = 0
    histogram: str = ""
    statuses: dict[str, int] = {}

    @property
    def counts(self) -> list[int]:
        """Every count of it, those by status too."""
        own = (self.count, self.ok, self.fail, self.info, self.dropped, self.skipped, self.unanswered)
        return [*own, *self.statuses.values()]

    @property
    def refused(self) -> int:
        """Arrivals that a rule forbade; the other failed ones were turned away or never reached the service."""
        return min(self.fail, sum(self.statuses.get(status, 0) for status in REFUSAL_STATUSES))


class Second(msgspec.Struct):
    """The arrivals that were due in one second."""

    second: int = 0
    sent: int = 0
    ok: int = 0
    dropped: int = 0
    latencies: list[int] = []

    @property
    def due(self) -> int:
        """Arrivals that were to be sent."""
        return self.sent + self.dropped

    @property
    def answered(self) -> int:
        """Arrivals of this second that got a complete answer, whenever it came."""
        return sum(self.latencies)


class LoadPhase(msgspec.Struct):
    """When a phase was."""

    name: str = ""
    start_s: float = 0.0
    end_s: float = 0.0


class Worker(msgspec.Struct):
    """One worker of the generator."""

    index: int = 0
    scheduled: int | None = None
    sent: int | None = None
    cpu_s: float | None = None
    span_s: float | None = None
    lag_p99_ms: float | None = None


class LagPart(msgspec.Struct):
    """How much later than due arrivals were sent."""

    histogram: str = ""


class Told(msgspec.Struct):
    """The fields of load.json; what is absent keeps its default."""

    profile: str | None = None
    seed: int | None = None
    started_at: str | None = None
    start_monotonic_s: float | None = None
    history_origin_s: float | None = None
    scheduled: int | None = None
    sent: int | None = None
    late: int | None = None
    dropped: int | None = None
    skipped: int | None = None
    unresolved: int | None = None
    lag: LagPart = msgspec.field(default_factory=LagPart)
    lag_p50_ms: float | None = None
    lag_p99_ms: float | None = None
    lag_max_ms: float | None = None
    phases: list[LoadPhase] = []
    cells: list[Counts] = []
    percentiles: list[Percentiles] = []
    seconds: list[Second] = []
    coarse_ms: list[int] = []
    workers: list[Worker] = []
    invalid: list[str] | None = None
    """None if the file does not say whether the load may be believed."""
    missed: list[str] = []


class Window(msgspec.Struct):
    """One window of the search for the knee; `held` is None where it proves nothing."""

    rate: float = 0.0
    held: bool | None = None
    why: str = ""
    p99_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    lag_p99_ms: float | None = None


class Knee(msgspec.Struct):
    """What the search found: the knee lies between `holds` and `fails`."""

    p99_ms: float | None = None
    """The limit."""
    windows: list[Window] = []
    holds: float | None = None
    fails: float | None = None
    knee: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Spread:
    """Latencies as counts: so many (`counts`) took so long (`us`, rising, microseconds)."""

    us: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def total(self) -> int:
        """How many latencies there are."""
        return int(self.counts.sum())

    @classmethod
    def decode(cls, text: str) -> "Spread":
        """Read an HdrHistogram (V2, base64) of microseconds. Raises ValueError if it is none of a usual range."""
        if not text:
            return cls()
        try:
            read = HdrHistogram.decode(text.encode())
            usual = read.highest_trackable_value <= HIGHEST_US and read.significant_figures <= DIGITS_MAX
        except Exception as error:  # the library raises its own kinds, zlib's, binascii's and ctypes'
            raise ValueError("not a whole HDR histogram") from error
        if not usual:
            raise ValueError("an HDR histogram of another range")
        every = np.frombuffer(read.counts, dtype=np.int64)
        filled = np.flatnonzero(every > 0)
        us = [read.get_highest_equivalent_value(read.get_value_from_index(int(place))) for place in filled]
        return cls(np.array(us, np.int64), every[filled].copy())

    @classmethod
    def sum(cls, parts: Sequence["Spread"]) -> "Spread":
        """Add up counts: percentiles of a sum are read from it, never averaged."""
        if not parts:
            return cls()
        us, places = np.unique(np.concatenate([part.us for part in parts]), return_inverse=True)
        counts = np.zeros(len(us), np.int64)
        np.add.at(counts, places, np.concatenate([part.counts for part in parts]))
        return cls(us, counts)

    def at_ms(self, rank: int) -> float | None:
        """Return the latency of a rank (1 is the shortest); None beyond the last one, which is infinitely late."""
        return float(self.at_ranks_ms([rank])[0]) if rank <= self.total else None

    def at_ranks_ms(self, ranks: Sequence[int]) -> NDArray[np.float64]:
        """Return the latencies of ranks that are all between 1 and the number of latencies."""
        return self.us[self.counts.cumsum().searchsorted(ranks)] / 1000


@dataclass(frozen=True)
class Load:
    """A load as far as its file tells; every number in it is finite, every list has the agreed form."""

    told: Told
    spreads: dict[tuple[str, str], Spread]
    """Latencies by operation and phase, of those cells whose histogram is whole."""
    lags: Spread

    @property
    def end_s(self) -> float:
        """When the load ended: with its last phase or its last second, at least a second after its start."""
        ends = [phase.end_s for phase in self.told.phases]
        return max([1.0, *(ends or [second.second + 1.0 for second in self.told.seconds])])

    @property
    def offset_s(self) -> float | None:
        """When the load began, in seconds since the origin of the run; None if the file does not tell."""
        start, origin = self.told.start_monotonic_s, self.told.history_origin_s
        return start - origin if start and origin else None

    @property
    def answered(self) -> int:
        """How many arrivals got a complete answer."""
        return sum(spread.total for spread in self.spreads.values())


def read_load(path: Path, gaps: list[Gap]) -> Load | None:
    """Read a load.json; None if there is nothing to be had of it, with a gap that says why."""
    raw = read_json(path, "there is no part about the load: no heat map, no percentile curves", gaps)
    if not raw:
        return None
    found: list[Gap] = []
    told = Told()
    _fill(path.name, raw, told, found)
    _repair(path.name, told, found)
    spreads: dict[tuple[str, str], Spread] = {}
    for cell in told.cells:
        try:
            spreads[cell.op, cell.phase] = Spread.decode(cell.histogram)
        except ValueError as error:
            found.append(Gap(f"{path.name}: {cell.op} in {cell.phase}", f"{error}: it has no curve"))
    try:
        lags = Spread.decode(told.lag.histogram)
    except ValueError as error:
        found.append(Gap(f"{path.name}: lag", f"{error}: the lag of the generator has no curve"))
        lags = Spread()
    gaps += found[:MAX_GAPS]
    if len(found) > MAX_GAPS:
        gaps.append(Gap(path.name, f"{len(found) - MAX_GAPS} more parts of it could not be used"))
    return Load(told, spreads, lags)


def read_knee(path: Path, gaps: list[Gap]) -> Knee | None:
    """Read a knee.json; None if there is nothing to be had of it, with a gap that says why."""
    raw = read_json(path, "what the search for the knee found is not on this page", gaps)
    if not raw:
        return None
    knee = Knee()
    _fill(path.name, raw, knee, gaps)
    kept = [window for window in knee.windows if 0 < window.rate <= MOST]
    if len(kept) < len(knee.windows):
        gaps.append(Gap(path.name, "some windows have no rate and are left out"))
    for window in kept:
        for name in ("p99_ms", "low_ms", "high_ms", "lag_p99_ms"):
            if not _sane(getattr(window, name)):
                setattr(window, name, None)
    knee.windows = kept
    for name in ("p99_ms", "holds", "fails", "knee"):
        value = getattr(knee, name)
        if not _sane(value) or (value is not None and value <= 0):
            setattr(knee, name, None)
    return knee


def _fill(file: str, raw: dict[str, Any], empty: Told | Knee, gaps: list[Gap]) -> None:
    """Fill a struct field by field, so that one odd field does not take the others with it."""
    for item in msgspec.structs.fields(type(empty)):
        if raw.get(item.name) is None:
            continue
        try:
            setattr(empty, item.name, msgspec.convert(raw[item.name], item.type, strict=False))
        except msgspec.ValidationError as error:
            gaps.append(Gap(f"{file}: {item.name}", f"left out, it does not have the agreed form ({error})"))


def _sane(value: float | None) -> bool:
    """Return whether an amount is one: not negative, and of a size that a load can have. None is no amount."""
    return value is None or 0 <= value <= MOST


def _repair(file: str, told: Told, gaps: list[Gap]) -> None:
    """Take out what would mislead or cannot be drawn: numbers that are none, lists of another length."""
    for item in msgspec.structs.fields(Told):
        value = getattr(told, item.name)
        if isinstance(value, int | float) and not _sane(value):
            setattr(told, item.name, None)
    phases = [phase for phase in told.phases if 0 <= phase.start_s < phase.end_s <= LONGEST_S]
    if len(phases) < len(told.phases):
        gaps.append(Gap(f"{file}: phases", "some have no beginning or end and are left out"))
    told.phases = phases
    bounds = told.coarse_ms
    if any(low >= high or high > MOST for low, high in zip([0, *bounds], bounds, strict=False)):
        gaps.append(Gap(f"{file}: coarse_ms", "the latency classes do not rise: there is no heat map"))
        bounds = told.coarse_ms = []
    seconds = [
        second
        for second in told.seconds
        if 0 <= second.second < LONGEST_S
        and all(0 <= count <= MOST for count in (second.sent, second.ok, second.dropped, *second.latencies))
        and (not bounds or len(second.latencies) == len(bounds) + 1)
    ]
    if len(seconds) < len(told.seconds):
        gaps.append(Gap(f"{file}: seconds", f"{len(told.seconds) - len(seconds)} do not fit their classes, left out"))
    told.seconds = seconds
    cells = [cell for cell in told.cells if all(map(_sane, cell.counts))]
    if len(cells) < len(told.cells):
        gaps.append(Gap(f"{file}: cells", "some hold counts that cannot be and are left out"))
    told.cells = cells
    for row in told.percentiles:
        row.estimates = [
            each
            for each in row.estimates
            if 0 < each.percentile < 100 and all(map(_sane, (each.samples, each.ms, each.low_ms, each.high_ms)))
        ]
    for worker in told.workers:
        for name in ("scheduled", "sent", "cpu_s", "span_s", "lag_p99_ms"):
            if not _sane(getattr(worker, name)):
                setattr(worker, name, None)
