"""The part of the page about a load: whether it may be believed, its limits, its counts and percentiles, the knee."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from reports.folder import RunFolder
from reports.load_tallies import merged_phases
from reports.loads import MOST, Counts, Estimate, Knee, Load, Window
from reports.tables import Cell, Column, Table, make_table
from reports.words import LOAD_OPERATIONS, NBSP, NONE, integer, load_operation, number, plural, quantity, seconds

LAG_LIMIT_MS = 5.0
"""The limit of the generator's lag at p99 where the run does not name another."""
SCHEDULED_TOLERANCE = 0.001
"""Share of the scheduled arrivals that may be missing among those handled."""
PERCENTS = (50.0, 95.0, 99.0, 99.9)
MAX_ROWS = 120
MAX_REASONS = 20
MAX_ANSWERS = 12


@dataclass(frozen=True)
class KneePart:
    """The search for the knee in words and as a table."""

    text: str
    windows: Table | None


@dataclass(frozen=True)
class LoadPart:
    """Everything that the part about a load prints beside its figures."""

    lead: str
    belief: str = ""
    """Whether the load may be believed; empty if there is no account of it."""
    tone: str = ""
    invalid: list[str] = field(default_factory=list)
    limits: str = ""
    limits_tone: str = ""
    missed: list[str] = field(default_factory=list)
    checks: Table | None = None
    arrivals_note: str = ""
    no_latencies: str = ""
    heat_note: str = ""
    counts: Table | None = None
    other_answers: str = ""
    latencies: Table | None = None
    workers: Table | None = None
    knee: KneePart | None = None


def lag_limit_ms(run: RunFolder) -> float:
    """Return the limit of the generator's lag that held for a run."""
    value = run.verdict.config.get("lag_limit_ms")
    return float(value) if isinstance(value, int | float) and 0 < value <= MOST else LAG_LIMIT_MS


def load_part(run: RunFolder, heat_bin_s: int | None) -> LoadPart | None:
    """Return what the page says about the load of a run; None if the run left nothing of the kind."""
    knee = _knee(run.knee)
    if run.load is None:
        if knee is None:
            return None
        return LoadPart(_lead(None, knee), knee=knee)
    load = run.load
    belief, tone = _belief(load)
    limits, limits_tone = _limits(load, knee)
    return LoadPart(
        lead=_lead(load, knee),
        belief=belief,
        tone=tone,
        invalid=_cut(load.told.invalid or []),
        limits=limits,
        limits_tone=limits_tone,
        missed=_cut(load.told.missed),
        checks=_checks(load, lag_limit_ms(run)),
        arrivals_note=_arrivals_note(load),
        no_latencies="" if load.answered else "No latency was recorded, so there is no heat map and no curve.",
        heat_note=f" One column is {plural(heat_bin_s, 'second')}." if heat_bin_s else "",
        counts=_counts(load),
        other_answers=_other_answers(load),
        latencies=_latencies(load),
        workers=_workers(load, lag_limit_ms(run)),
        knee=knee,
    )


def _cut(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MAX_REASONS
    return [*lines[:MAX_REASONS], f"and {integer(more)} more in load.json"] if more > 0 else list(lines)


def _lead(load: Load | None, knee: KneePart | None) -> str:
    told = load.told if load is not None else None
    what = f"Profile {told.profile}" if told is not None and told.profile else "A profile that was not recorded"
    if load is not None and told is not None:
        what += f", {plural(told.scheduled or 0, 'arrival')} in {seconds(load.end_s, 0)}"
        if told.workers:
            what += f" from {plural(len(told.workers), 'worker')}"
    text = (
        f"{what}. The moment of every arrival was drawn before the run, and nobody waited for an answer before the "
        "next was sent: latency counts from the moment an arrival was due, and one without an answer counts as "
        "infinitely late."
    )
    if knee is not None and load is not None:
        text += " Figures and tables below the search are those of its last window alone."
    return text


def _belief(load: Load) -> tuple[str, str]:
    if load.told.invalid is None:
        return "The load does not say whether its generator kept its schedule, so nothing is proven by it.", "doubt"
    if load.told.invalid:
        return "Nothing below may be quoted: this load measured something else than the service.", "doubt"
    if load.told.sent and not load.answered:
        return "The load was played as drawn, and not one arrival got an answer.", "bad"
    return (
        "The load may be believed: it was played as drawn, by a generator that was not late, and nothing was dropped.",
        "good",
    )


def _limits(load: Load, knee: KneePart | None) -> tuple[str, str]:
    missed = len(load.told.missed)
    if missed:
        # A limit that a run without belief missed says nothing of the service either.
        return f"{plural(missed, 'limit')} of the profile {'was' if missed == 1 else 'were'} not kept:", (
            "bad" if load.told.invalid == [] else "doubt"
        )
    # Where nothing is proven, a limit that was kept is no news; of a search, the windows are what is judged.
    return ("" if load.told.invalid != [] or knee is not None else "No limit of the profile was missed."), ""


def _checks(load: Load, limit_ms: float) -> Table | None:
    told = load.told
    rows: list[list[str | Cell]] = []

    def row(what: str, found: str, limit: str, kept: bool | None, meaning: str) -> None:
        result = Cell("for information", "soft")
        if kept is not None:
            result = Cell("kept", "good") if kept else Cell("not kept", "bad")
        rows.append([Cell(what, "strong"), found, limit, result, Cell(meaning, "soft")])

    if told.lag_p99_ms is not None:
        row(
            "Lag of the generator, p99",
            quantity(round(told.lag_p99_ms, 2), "ms"),
            f"≤{NBSP}{quantity(limit_ms, 'ms')}",
            told.lag_p99_ms <= limit_ms,
            f"how late arrivals left; half of them within {quantity(told.lag_p50_ms, 'ms')}, the latest "
            f"{quantity(told.lag_max_ms, 'ms')}",
        )
    if told.dropped is not None:
        row("Dropped", integer(told.dropped), "0", told.dropped == 0, "never sent: too many requests were under way")
    if told.scheduled is not None and told.sent is not None:
        handled = told.sent + (told.dropped or 0) + (told.skipped or 0)
        row(
            "Handled",
            f"{integer(handled)} of {integer(told.scheduled)}",
            f"±{NBSP}{number(100 * SCHEDULED_TOLERANCE)}{NBSP}%",
            abs(handled - told.scheduled) <= SCHEDULED_TOLERANCE * told.scheduled and told.sent > 0,
            "sent, dropped or skipped; the others would be missing without a trace",
        )
    if told.skipped is not None:
        row("Skipped", integer(told.skipped), NONE, None, "nothing to act on, such as a cancel while no bet is open")
    if told.late is not None:
        row("Sent late", integer(told.late), NONE, None, f"more than 100{NBSP}ms after their time")
    if told.unresolved is not None:
        row(
            "Without an answer",
            integer(told.unresolved),
            NONE,
            None,
            "sent, outcome not told to the client; the checker looks up each of them afterwards",
        )
    return make_table(
        "Did the generator keep its schedule?",
        [
            Column("What", "keep"),
            Column("Found", "num"),
            Column("Limit", "num"),
            Column("Result", "keep"),
            Column("Meaning"),
        ],
        rows,
    )


def _arrivals_note(load: Load) -> str:
    lost = sum(cell.dropped + cell.unanswered for cell in load.told.cells)
    if not load.told.cells:
        return ""
    return "" if lost else " Every arrival that was sent got its answer."


def _ordered(load: Load) -> list[Counts]:
    ops = list(LOAD_OPERATIONS)
    phases = list(dict.fromkeys(phase.name for phase in merged_phases(load)))

    def order(cell: Counts) -> tuple[int, str, int]:
        return (
            ops.index(cell.op) if cell.op in ops else len(ops),
            cell.op,
            phases.index(cell.phase) if cell.phase in phases else len(phases),
        )

    return sorted(load.told.cells, key=order)


def _counts(load: Load) -> Table | None:
    cells = _ordered(load)
    totals = {phase: Counts("all", phase) for phase in dict.fromkeys(cell.phase for cell in load.told.cells)}
    for cell in cells:
        total = totals[cell.phase]
        for name in ("count", "ok", "fail", "info", "dropped", "skipped"):
            setattr(total, name, getattr(total, name) + getattr(cell, name))
        for status, count in cell.statuses.items():
            total.statuses[status] = total.statuses.get(status, 0) + count
    rows = [*cells[:MAX_ROWS], *totals.values()]
    opens = [not index or rows[index - 1].op != row.op for index, row in enumerate(rows)]
    more = f"; {len(cells) - MAX_ROWS} more rows in load.json" if len(cells) > MAX_ROWS else ""
    return make_table(
        f"Arrivals by operation and phase{more}",
        [
            Column("Operation", "keep"),
            Column("Phase", "keep"),
            *(Column(label, "num") for label in ("Due", "Done", "Refused", "Failed", "Unknown", "Dropped", "Skipped")),
        ],
        (
            [
                Cell(load_operation(row.op), "strong" if first else "soft"),
                row.phase or NONE,
                integer(row.count),
                integer(row.ok),
                _some(row.refused),
                _some(row.fail - row.refused, "strong"),
                _some(row.info, "strong"),
                _some(row.dropped, "strong"),
                _some(row.skipped),
            ]
            for row, first in zip(rows, opens, strict=True)
        ),
        layout="sticky",
        opens=opens,
    )


def _some(count: int, tone: str = "") -> Cell:
    return Cell(integer(count), tone) if count else Cell("0", "soft")


def _other_answers(load: Load) -> str:
    """Name the answers that were neither a success nor a refusal by rule, and the failures without one."""
    found: dict[str, int] = {}
    for cell in load.told.cells:
        for status, count in cell.statuses.items():
            if not status.startswith("2") and status not in {"409", "422"}:
                found[status] = found.get(status, 0) + count
    if not found:
        return ""
    most = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    told = ", ".join(f"{status} ({plural(count, 'time')})" for status, count in most[:MAX_ANSWERS])
    more = f" and {len(most) - MAX_ANSWERS} other kinds" if len(most) > MAX_ANSWERS else ""
    return f"What the failed and the unknown ones were told: {told}{more}."


def _latencies(load: Load) -> Table | None:
    estimates = {(row.op, row.phase, each.percentile): each for row in load.told.percentiles for each in row.estimates}
    cells = _ordered(load)[:MAX_ROWS]
    rows = [cell for cell in cells if any((cell.op, cell.phase, percent) in estimates for percent in PERCENTS)]
    opens = [not index or rows[index - 1].op != row.op for index, row in enumerate(rows)]
    return make_table(
        "Latency in milliseconds by operation and phase, with its 95 % interval",
        [
            Column("Operation", "keep"),
            Column("Phase", "keep"),
            Column("Samples", "num"),
            *(Column(f"p{percent:g}", "num") for percent in PERCENTS),
        ],
        (
            [
                Cell(load_operation(row.op), "strong" if first else "soft"),
                row.phase or NONE,
                integer(max((e.samples for e in _of(row, estimates)), default=None)),
                *(_estimate(estimates.get((row.op, row.phase, percent))) for percent in PERCENTS),
            ]
            for row, first in zip(rows, opens, strict=True)
        ),
        layout="sticky",
        opens=opens,
    )


def _of(row: Counts, estimates: dict[tuple[str, str, float], Estimate]) -> list[Estimate]:
    return [found for percent in PERCENTS if (found := estimates.get((row.op, row.phase, percent))) is not None]


def _estimate(each: Estimate | None) -> str | Cell:
    """Return a percentile and its interval, or in words why there is none."""
    if each is None:
        return NONE
    if each.refused is not None:
        # "p99.9 needs 3,688 samples, there are 97": the column and the samples beside it say the rest.
        need = each.refused.partition(" needs ")[2].partition(" samples")[0].replace(",", "")
        return Cell(f"needs {integer(int(need))} samples" if need.isdigit() else each.refused, "soft")
    return with_interval(each.ms, each.low_ms, each.high_ms)


def with_interval(ms: float | None, low_ms: float | None, high_ms: float | None) -> str:
    """Return a latency and its interval; what is None is infinitely late."""
    if low_ms is None:
        return milliseconds(ms)
    bounds = f"from {milliseconds(low_ms)}" if high_ms is None else f"{milliseconds(low_ms)} to {milliseconds(high_ms)}"
    return f"{milliseconds(ms)} ({bounds})"


def milliseconds(value: float | None) -> str:
    """Return a latency without its unit, to three figures; None is infinitely late."""
    if value is None:
        return "no answer"
    return number(value, 0 if value >= 100 else 1 if value >= 10 else 2)


def _workers(load: Load, limit_ms: float) -> Table | None:
    return make_table(
        "Workers of the generator",
        [
            Column("Worker", "keep"),
            *(Column(label, "num") for label in ("Scheduled", "Sent", "Lag p99", "Processor", "Took")),
        ],
        (
            [
                Cell(str(worker.index), "strong"),
                integer(worker.scheduled),
                integer(worker.sent),
                Cell(
                    quantity(worker.lag_p99_ms, "ms"),
                    "bad" if worker.lag_p99_ms is not None and worker.lag_p99_ms > limit_ms else "",
                ),
                seconds(worker.cpu_s, 1),
                seconds(worker.span_s, 1),
            ]
            for worker in load.told.workers[:MAX_ROWS]
        ),
        layout="sticky",
        fit=True,
    )


def _knee(knee: Knee | None) -> KneePart | None:
    if knee is None:
        return None
    text = knee.text or ("The bounds do not bracket a knee." if knee.knee is None else "")
    windows = make_table(
        "The windows of the search, in the order in which they were played",
        [
            Column("Rate", "num"),
            Column("Outcome", "keep"),
            Column("p99, ms", "num"),
            Column("Lag p99", "num"),
            Column("Why"),
        ],
        (
            [
                f"{number(window.rate, 0)}/s",
                _outcome(window),
                _window_p99(window),
                quantity(window.lag_p99_ms, "ms"),
                Cell(window.why or NONE, "soft"),
            ]
            for window in knee.windows[:MAX_ROWS]
        ),
    )
    return KneePart(text[:1].upper() + text[1:] + ("" if text.endswith(".") else "."), windows)


def _outcome(window: Window) -> Cell:
    if window.held is None:
        return Cell("proves nothing", "doubt")
    return Cell("held", "good") if window.held else Cell("did not hold", "bad")


def _window_p99(window: Window) -> str:
    if window.p99_ms is None and window.low_ms is None:
        return NONE
    return with_interval(window.p99_ms, window.low_ms, window.high_ms)
