"""The tables of the page: what a run recorded, in rows and words.

Each function returns None (or an empty list) where the run recorded nothing of the kind.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports import tallies
from reports.folder import Operation, RunFolder, Verdict, Witness
from reports.words import (
    CODES,
    NONE,
    OPERATIONS,
    PHASES,
    bound,
    integer,
    number,
    plural,
    quantity,
    seconds,
    sentence,
    size,
)

MAX_WITNESSES = 12
"""Witnesses shown of one code; verdict.json has the others."""
MAX_FAULTS = 100
MAX_INTERRUPTIONS = 30


@dataclass(frozen=True)
class Cell:
    """One cell of a table; the tone (good, bad, warn, doubt, soft, strong) is a CSS class."""

    text: str
    tone: str = ""
    href: str = ""

    @property
    def blank(self) -> bool:
        """Whether a stacked table can leave the cell out."""
        return self.text in ("", NONE)


@dataclass(frozen=True)
class Column:
    """A heading and the CSS class of its cells: num, code, keep (one line) or nothing."""

    label: str
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """A row; `opens` draws a stronger line above it."""

    cells: list[Cell]
    opens: bool = False


@dataclass(frozen=True)
class Table:
    """A table and how it fits a narrow page.

    "stack" turns each row into a block, "sticky" scrolls inside its box and keeps its first column in sight,
    "codes" is the list of anomalies.
    """

    caption: str
    columns: list[Column]
    rows: list[Row]
    layout: str = "stack"
    fit: bool = False
    """Whether the table stays narrow where the page is wide, so that a row can be followed by eye."""


@dataclass(frozen=True)
class WitnessGroup:
    """The witnesses of one code."""

    code: str
    title: str
    table: Table
    more: str


def make_table(
    caption: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[str | Cell]],
    *,
    layout: str = "stack",
    fit: bool = False,
    opens: Sequence[bool] = (),
) -> Table | None:
    """Return a table, or None if it would have no row."""
    made = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    if not made:
        return None
    starts = [*opens, *([False] * (len(made) - len(opens)))]
    return Table(caption, list(columns), [Row(*pair) for pair in zip(made, starts, strict=True)], layout, fit)


def sla(verdict: Verdict) -> Table | None:
    """Return the service levels: target, measured value, interval, met or missed, method."""

    def result(met: bool | None) -> Cell:
        if met is None:
            return Cell("informational", "soft")
        return Cell("met", "good") if met else Cell("missed", "bad")

    return make_table(
        "Service levels: target, measured value and its interval",
        [
            Column("Metric"),
            Column("Target", "num"),
            Column("Measured", "num"),
            Column("Interval", "num"),
            Column("Result", "keep"),
            Column("Method"),
        ],
        (
            [
                Cell(row.metric, "strong"),
                bound(row.target, row.unit),
                Cell(quantity(row.measured, row.unit), "strong"),
                " to ".join(number(value) for value in row.interval) if row.interval else NONE,
                result(row.met),
                Cell(row.method or NONE, "soft"),
            ]
            for row in verdict.sla
        ),
    )


def faults(verdict: Verdict) -> Table | None:
    """Return the faults as requested and as measured."""

    def lasted(start: float | None, end: float | None) -> str:
        return NONE if start is None or end is None else seconds(end - start)

    rows = [
        [
            Cell(fault.label, "strong"),
            seconds(fault.requested_at),
            Cell("not measured", "bad") if fault.measured_start is None else seconds(fault.measured_start),
            seconds(fault.measured_end),
            lasted(fault.measured_start, fault.measured_end),
            seconds(fault.healed_at),
            seconds(fault.recovered_at),
            lasted(fault.measured_start, fault.recovered_at),
        ]
        for fault in verdict.faults[:MAX_FAULTS]
    ]
    more = len(verdict.faults) - len(rows)
    return make_table(
        "Faults as requested and as measured" + (f"; {more} more in verdict.json" if more else ""),
        [
            Column("Fault", "keep"),
            Column("Requested", "num"),
            Column("Effect from", "num"),
            Column("Effect until", "num"),
            Column("Effect lasted", "num"),
            Column("Heal requested", "num"),
            Column("Recovered", "num"),
            Column("Start to recovered", "num"),
        ],
        rows,
    )


def shard_moves(verdict: Verdict) -> Table | None:
    """Return the shards that were moved during the load, and how long their wallets waited."""
    return make_table(
        "Shards moved to another server under load",
        [
            Column("Shard", "keep"),
            Column("From", "keep"),
            Column("To", "keep"),
            Column("Began", "num"),
            Column("Took ms", "num"),
            Column("Frozen ms", "num"),
            Column("Entries", "num"),
            Column("Bets", "num"),
            Column("Rows copied while frozen", "num"),
        ],
        (
            [
                Cell(str(move.shard), "strong"),
                move.source or NONE,
                move.target or NONE,
                seconds(move.began_at),
                number(move.total_ms, 0),
                number(move.freeze_ms, 0),
                number(move.entries, 0),
                number(move.bets, 0),
                number(move.frozen_rows, 0),
            ]
            for move in verdict.shard_moves[:MAX_FAULTS]
        ),
    )


def interruptions(run: RunFolder) -> Table | None:
    """Return the processes that did not answer although no fault was aimed at them."""
    found = tallies.interruptions(run)
    more = f"; {len(found) - MAX_INTERRUPTIONS} more in timeline.parquet" if len(found) > MAX_INTERRUPTIONS else ""
    return make_table(
        f"Processes that did not answer although no fault was aimed at them{more}",
        [
            Column("Process", "keep"),
            Column("From", "num"),
            Column("Until", "num"),
            Column("Lasted", "num"),
            Column("What was seen"),
        ],
        (
            [
                Cell(item.node, "strong"),
                seconds(item.start),
                seconds(item.until),
                NONE if item.until is None else seconds(item.until - item.start),
                Cell(item.detail or NONE, "soft"),
            ]
            for item in found[:MAX_INTERRUPTIONS]
        ),
        layout="sticky",
    )


def phases(clock: tallies.Clock | None) -> Table | None:
    """Return the phases that the figures name."""
    if clock is None:
        return None
    return make_table(
        "Phases of the run, as named on the figures",
        [Column("Phase", "keep"), Column("From", "num"), Column("Until", "num"), Column("What happens")],
        (
            [phase.name, seconds(phase.start, 1), seconds(phase.end, 1), Cell(PHASES.get(phase.name, NONE), "soft")]
            for phase in clock.phases
        ),
        layout="sticky",
    )


def anomalies(verdict: Verdict) -> Table | None:
    """Return every checked code with its meaning and count, those that fired first."""
    witnessed = {witness.code for witness in verdict.witnesses}
    rows: list[list[str | Cell]] = []
    for code, count in sorted(verdict.anomalies.items(), key=lambda item: (item[1] == 0, item[0])):
        name, meaning = CODES.get(code, (code, "a code this version of the report does not know"))
        rows.append(
            [
                Cell(code, "strong", f"#witness-{code}" if code in witnessed else ""),
                name,
                Cell(meaning, "soft"),
                Cell(integer(count), "bad") if count else Cell("0"),
            ]
        )
    return make_table(
        "Every code that was checked and how often it fired",
        [Column("Code", "keep"), Column("Name", "keep"), Column("What it would mean"), Column("Count", "num")],
        rows,
        layout="codes",
    )


def undecided(verdict: Verdict) -> Table | None:
    """Return the codes whose check was tried and failed, which proves as little as no check."""
    return make_table(
        "Codes whose check could not be carried out, and why",
        [Column("Code", "keep"), Column("Why")],
        ([Cell(code, "strong"), why] for code, why in sorted(verdict.unchecked.items())),
    )


def judges(verdict: Verdict) -> Table | None:
    """Return who judged: what each decided, of how many codes it said something else, and how long it took."""
    rows: list[list[str | Cell]] = []
    for judge in verdict.judges:
        others = sum(judge.name in item.judges for item in verdict.disagreements)
        asked = judge.skipped is None
        rows.append(
            [
                Cell(judge.name, "strong"),
                integer(len(judge.codes)) if asked else NONE,
                (Cell(integer(others), "bad") if others else Cell("0")) if asked else Cell(NONE),
                NONE if judge.seconds is None else seconds(judge.seconds, 1),
                Cell(judge.skipped or "", "soft"),
            ]
        )
    return make_table(
        "The judges of this run; they share no code, and must agree",
        [
            Column("Judge", "keep"),
            Column("Codes", "num"),
            Column("Disagreements", "num"),
            Column("Took", "num"),
            Column("Not asked because"),
        ],
        rows,
    )


def witnesses(verdict: Verdict) -> list[WitnessGroup]:
    """Return the witnesses of each code that has any."""
    by_code: dict[str, list[Witness]] = {}
    for witness in verdict.witnesses:
        by_code.setdefault(witness.code, []).append(witness)
    groups = []
    for code in sorted(by_code):
        found = by_code[code]
        name, meaning = CODES.get(code, ("", "a code this version of the report does not know"))
        count = verdict.anomalies.get(code, len(found))
        table = make_table(
            f"{code}: {meaning}",
            [
                Column("Key", "code"),
                Column("Wallet", "num"),
                Column("Seq", "num"),
                Column("Witness"),
            ],
            (
                [
                    witness.key or NONE,
                    NONE if witness.user is None else str(witness.user),
                    NONE if witness.seq is None else str(witness.seq),
                    witness.text,
                ]
                for witness in found[:MAX_WITNESSES]
            ),
        )
        if table is None:
            continue
        shown = min(len(found), MAX_WITNESSES)
        more = f"{shown} of {integer(count)} shown; verdict.json keeps {plural(len(found), 'witness', 'witnesses')}."
        groups.append(
            WitnessGroup(
                code, f"{code} {name}: {integer(count)}", table, more if shown < max(count, len(found)) else ""
            )
        )
    return groups


def fates(run: RunFolder) -> Table | None:
    """Return what became of the unknown outcomes."""
    return make_table(
        "What became of the unknown outcomes",
        [Column("Fate", "keep"), Column("Attempts", "num"), Column("Meaning")],
        ([Cell(fate.name, "strong"), integer(fate.count), Cell(fate.meaning, "soft")] for fate in tallies.fates(run)),
        layout="sticky",
    )


def sometimes(verdict: Verdict) -> Table | None:
    """Return the situations a proof has to have met, those not seen last."""
    return make_table(
        "Situations and how often this run met them",
        [Column("Situation"), Column("Times", "num")],
        (
            [sentence(name), integer(count) if count else Cell("not seen", "warn")]
            for name, count in sorted(verdict.sometimes.items(), key=lambda item: (item[1] == 0, item[0]))
        ),
        layout="sticky",
        fit=True,
    )


def operations(counted: list[Operation]) -> Table | None:
    """Return counts and latencies (ms) of each operation in each phase."""
    ops, phases = list(OPERATIONS), list(PHASES)

    def place(row: Operation) -> tuple[int, str, int, str]:
        phase = row.phase or ""
        return (
            ops.index(row.op) if row.op in ops else len(ops),
            row.op,
            phases.index(phase) if phase in phases else len(phases),
            phase,
        )

    ordered = sorted(counted, key=place)
    opens = [not index or ordered[index - 1].op != row.op for index, row in enumerate(ordered)]
    return make_table(
        "Attempts and latencies (milliseconds) by operation and phase",
        [
            Column("Operation", "keep"),
            Column("Phase", "keep"),
            *(Column(label, "num") for label in ("Attempts", "Done", "Not done", "Unknown", "p50", "p99", "Max")),
        ],
        (
            [
                Cell(OPERATIONS.get(row.op, sentence(row.op)), "strong" if first else "soft"),
                row.phase or NONE,
                *(integer(value) for value in (row.count, row.ok, row.fail)),
                Cell(integer(row.info), "strong" if row.info else ""),
                *(number(value, 1) for value in (row.p50_ms, row.p99_ms, row.max_ms)),
            ]
            for row, first in zip(ordered, opens, strict=True)
        ),
        layout="sticky",
        opens=opens,
    )


def usage(run: RunFolder) -> Table | None:
    """Return memory (MB) and processor use of each process."""
    if run.series is None:
        return None
    return make_table(
        "Memory and processor use of each process",
        [
            Column("Process", "keep"),
            Column("Peak MB", "num"),
            Column("Mean MB", "num"),
            Column("CPU s", "num"),
            Column("Mean cores", "num"),
        ],
        (
            [
                Cell(item.node, "strong"),
                number(item.rss_peak_mb, 0),
                number(item.rss_mean_mb, 0),
                number(item.cpu_seconds, 1),
                number(item.cpu_mean_cores, 2),
            ]
            for item in tallies.usage(run.series)
        ),
        layout="sticky",
        fit=True,
    )


def files(run: RunFolder) -> Table | None:
    """Return the files of the run folder by group."""
    return make_table(
        f"In {run.path.name}/",
        [Column("Name", "code"), Column("Files", "num"), Column("Size", "num")],
        ([group.name, integer(group.files), size(group.size_bytes)] for group in run.files),
        layout="sticky",
        fit=True,
    )
