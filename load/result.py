"""What a load run found: one worker's share, the whole, and whether the whole may be believed.

A result is JSON. The latencies in it are HDR histograms as text, so results of several workers, or of several runs,
can be added up later and any percentile read from the sum. Times are seconds since the start of the load, latencies
count from the intended time of an arrival.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec

from load.histograms import Estimate, Latencies

FORMAT: Final = 1
COARSE_MS: Final = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 2000, 5000, 10000)
"""Upper bounds of the latency classes of the per-second series; one more class holds what is slower."""
LAG_P99_MS: Final = 5.0
"""A generator whose arrivals leave later than this at p99 measures itself."""
SCHEDULED_TOLERANCE: Final = 0.001
"""Share of the scheduled arrivals that may be missing among those handled."""


class Cell(msgspec.Struct):
    """What became of the arrivals of one operation in one phase."""

    op: str
    phase: str
    count: int = 0
    """Arrivals that were due: sent, dropped or skipped."""
    ok: int = 0
    fail: int = 0
    """Certainly without effect: refused, rejected or never sent."""
    info: int = 0
    """Sent, and nobody knows what became of it."""
    dropped: int = 0
    """Not sent, because too many were under way."""
    skipped: int = 0
    """Not sent, because there was nothing for it to act on (a cancel while no bet is open)."""
    unanswered: int = 0
    """Without a complete answer, dropped ones included: these count as infinitely late."""
    histogram: str = ""
    """Latencies of the answered ones, HdrHistogram V2 in base64."""
    statuses: dict[str, int] = {}
    """Number of answers by status, and of failures by kind where there was no answer."""

    def latencies(self) -> Latencies:
        """Return the latencies of the answered arrivals. Raises ValueError if the text is damaged."""
        return Latencies.decode(self.histogram) if self.histogram else Latencies()

    def percentile(self, percent: float) -> Estimate:
        """Return a percentile over all arrivals but the skipped ones; those without an answer are infinitely late."""
        return self.latencies().percentile(percent, self.unanswered)

    @property
    def error_share(self) -> float:
        """Share of the arrivals that were not skipped and that did not end with a success or a refusal by rule."""
        due = self.count - self.skipped
        refused = self.statuses.get("422", 0) + self.statuses.get("409", 0)
        return (due - self.ok - refused) / due if due else 0.0


class Second(msgspec.Struct):
    """The arrivals that were due in one second of the load."""

    second: int
    sent: int = 0
    ok: int = 0
    fail: int = 0
    info: int = 0
    dropped: int = 0
    latencies: list[int] = []
    """Answers per class of COARSE_MS, and one class more."""


class Phase(msgspec.Struct, frozen=True):
    """When a phase was, in seconds since the start of the load."""

    name: str
    start_s: float
    end_s: float


class Lag(msgspec.Struct):
    """How much later than intended arrivals were really sent: the generator's own fault."""

    histogram: str = ""

    def at_ms(self, percent: float) -> float:
        """Return the lag at a percentile of the arrivals sent, in milliseconds; 0 if none was."""
        lags = Latencies.decode(self.histogram) if self.histogram else Latencies()
        if percent >= 100:
            return lags.max_us() / 1000
        cumulated = lags.counts().cumsum()
        total = int(cumulated[-1])
        return lags.upper_us(int(cumulated.searchsorted(max(1, round(total * percent / 100))))) / 1000 if total else 0.0


class WorkerResult(msgspec.Struct):
    """What one worker did with its share of the schedule."""

    index: int
    scheduled: int = 0
    sent: int = 0
    late: int = 0
    """Sent later than `LATE_AFTER_MS` after their time."""
    dropped: int = 0
    skipped: int = 0
    unresolved: int = 0
    """Sent and without a complete answer when the run ended."""
    finished: bool = False
    """The whole share was played; False if the run was stopped before."""
    cpu_s: float = 0.0
    """CPU time of the worker from the first arrival to the last answer."""
    real_time: bool = False
    """The worker was scheduled before ordinary processes."""
    span_s: float = 0.0
    """Time from the start of the load to the last answer."""
    lag: Lag = msgspec.field(default_factory=Lag)
    cells: list[Cell] = []
    seconds: list[Second] = []
    problems: list[str] = []
    """What went wrong in the worker itself."""


LATE_AFTER_MS: Final = 100.0


class WorkerSummary(msgspec.Struct, frozen=True):
    """One worker in the result of the whole."""

    index: int
    scheduled: int
    sent: int
    cpu_s: float
    span_s: float
    lag_p99_ms: float
    real_time: bool = False


class Percentiles(msgspec.Struct, frozen=True):
    """The percentiles of one cell, written out for readers of the file; the histogram says the same and more."""

    op: str
    phase: str
    estimates: list[Estimate]


class Result(msgspec.Struct):
    """A whole run."""

    profile: str
    seed: int
    started_at: str
    """UTC, ISO 8601."""
    start_monotonic_s: float = 0.0
    """The start of the load as a reading of the machine's monotonic clock."""
    history_origin_s: float = 0.0
    """What the history's clock calls 0, as a reading of the monotonic clock."""
    schedule_digest: str = ""
    run: str = ""
    """Begins the key of every command of this run."""
    scheduled: int = 0
    sent: int = 0
    late: int = 0
    dropped: int = 0
    skipped: int = 0
    unresolved: int = 0
    lag: Lag = msgspec.field(default_factory=Lag)
    lag_p50_ms: float = 0.0
    lag_p99_ms: float = 0.0
    lag_max_ms: float = 0.0
    phases: list[Phase] = []
    cells: list[Cell] = []
    percentiles: list[Percentiles] = []
    seconds: list[Second] = []
    coarse_ms: list[int] = msgspec.field(default_factory=lambda: list(COARSE_MS))
    workers: list[WorkerSummary] = []
    invalid: list[str] = []
    """Why the run proves nothing; empty if it may be believed."""
    missed: list[str] = []
    """The limits of the profile that were not kept."""
    format: int = FORMAT

    @property
    def valid(self) -> bool:
        """Return whether the run may be believed."""
        return not self.invalid

    def to_json(self) -> bytes:
        """Return the result as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read a result. Raises msgspec.ValidationError."""
        return msgspec.json.decode(data, type=cls)

    def write(self, path: Path) -> None:
        """Write the result; what was there before stays whole until the new one is. Raises OSError."""
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(self.to_json())
        temporary.replace(path)

    def cell(self, op: str, phase: str) -> Cell | None:
        """Return one cell, or None if nothing of the kind was due."""
        return next((cell for cell in self.cells if (cell.op, cell.phase) == (op, phase)), None)

    def total(self, op: str | None = None, phase: str | None = None) -> Cell:
        """Return the sum of all cells, or of those of one operation or one phase."""
        return sum_cells(
            [c for c in self.cells if op in {None, c.op} and phase in {None, c.phase}], op or "all", phase or "all"
        )


PERCENTS: Final = (50.0, 90.0, 95.0, 99.0, 99.9)


def sum_cells(cells: Sequence[Cell], op: str, phase: str) -> Cell:
    """Return the sum of some cells under new names; histograms are added, never averaged."""
    total = Cell(op, phase)
    latencies = Latencies()
    for cell in cells:
        for name in ("count", "ok", "fail", "info", "dropped", "skipped", "unanswered"):
            setattr(total, name, getattr(total, name) + getattr(cell, name))
        for status, number in cell.statuses.items():
            total.statuses[status] = total.statuses.get(status, 0) + number
        if cell.histogram:
            latencies.add(cell.latencies())
    total.histogram = latencies.encode()
    return total


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it begins."""

    profile: str
    seed: int
    run: str
    started_at: str
    digest: str
    scheduled: int
    workers: int
    phases: Sequence[Phase]


def merge(plan: Plan, parts: Sequence[WorkerResult], *, lag_p99_ms: float = LAG_P99_MS) -> Result:
    """Add up what the workers found and say whether it may be believed.

    `lag_p99_ms` is the limit of the generator's lag. Raises ValueError if a histogram is damaged.
    """
    lags = Latencies()
    for part in parts:
        if part.lag.histogram:
            lags.add(Latencies.decode(part.lag.histogram))
    lag = Lag(lags.encode())
    by_cell: dict[tuple[str, str], list[Cell]] = {}
    for part in parts:
        for cell in part.cells:
            by_cell.setdefault((cell.op, cell.phase), []).append(cell)
    order = {phase.name: number for number, phase in enumerate(plan.phases)}
    keys = sorted(by_cell, key=lambda key: (order.get(key[1], len(order)), key[0]))
    cells = [sum_cells(by_cell[key], *key) for key in keys]
    result = Result(
        profile=plan.profile,
        seed=plan.seed,
        run=plan.run,
        started_at=plan.started_at,
        schedule_digest=plan.digest,
        scheduled=plan.scheduled,
        sent=sum(part.sent for part in parts),
        late=sum(part.late for part in parts),
        dropped=sum(part.dropped for part in parts),
        skipped=sum(part.skipped for part in parts),
        unresolved=sum(part.unresolved for part in parts),
        lag=lag,
        lag_p50_ms=lag.at_ms(50),
        lag_p99_ms=lag.at_ms(99),
        lag_max_ms=lag.at_ms(100),
        phases=list(plan.phases),
        cells=cells,
        percentiles=[Percentiles(c.op, c.phase, [c.percentile(percent) for percent in PERCENTS]) for c in cells],
        seconds=_sum_seconds([second for part in parts for second in part.seconds]),
        workers=[
            WorkerSummary(
                part.index, part.scheduled, part.sent, part.cpu_s, part.span_s, part.lag.at_ms(99), part.real_time
            )
            for part in sorted(parts, key=lambda part: part.index)
        ],
    )
    result.invalid = _reasons(plan, parts, result, lag_p99_ms)
    return result


def _sum_seconds(parts: Sequence[Second]) -> list[Second]:
    found: dict[int, Second] = {}
    for part in parts:
        total = found.setdefault(part.second, Second(part.second, latencies=[0] * (len(COARSE_MS) + 1)))
        for name in ("sent", "ok", "fail", "info", "dropped"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        total.latencies = [a + b for a, b in zip(total.latencies, part.latencies, strict=True)]
    return [found[second] for second in sorted(found)]


def _reasons(plan: Plan, parts: Sequence[WorkerResult], result: Result, lag_p99_ms: float) -> list[str]:
    """Return why a run proves nothing."""
    reasons = [f"worker {part.index}: {problem}" for part in parts for problem in part.problems]
    if len(parts) != plan.workers:
        reasons.append(f"{len(parts)} of {plan.workers} workers gave a result")
    reasons += [
        f"worker {part.index} was stopped before its share of the schedule was played"
        for part in parts
        if not part.finished
    ]
    if result.dropped:
        reasons.append(f"{result.dropped:,} arrivals were dropped: too many requests were under way")
    handled = result.sent + result.dropped + result.skipped
    if abs(handled - plan.scheduled) > SCHEDULED_TOLERANCE * plan.scheduled:
        reasons.append(f"{handled:,} arrivals were handled, {plan.scheduled:,} were scheduled")
    if not result.sent:
        reasons.append("nothing was sent")
    if result.lag_p99_ms > lag_p99_ms:
        reasons.append(
            f"the generator sent its arrivals {result.lag_p99_ms:.1f} ms late at p99 (limit {lag_p99_ms:g} ms): "
            "it measured itself"
        )
    return reasons
