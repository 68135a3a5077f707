"""The page of a comparison of two loads: what is better or worse, by how much, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from reports.compare_plots import Line, draw_pair, draw_ratios
from reports.gaps import Gap
from reports.load_part import milliseconds
from reports.loads import LOAD_FILE, Load, read_load
from reports.page import TEMPLATES, KeyFigure
from reports.render import write_whole
from reports.sheets import Plot
from reports.tables import Cell, Column, Table, make_table
from reports.words import LOAD_OPERATIONS, NBSP, NONE, integer, load_operation, number, plural

MAX_PHASES = 12
MAX_NAMED = 12
WORDS = {
    "worse": ("B IS WORSE", "bad", "In at least one measure B is worse than A, by more than chance explains."),
    "better": ("B IS BETTER", "good", "In at least one measure B is better than A, and in none it is worse."),
    "no difference": (
        "NO DIFFERENCE",
        "good",
        "Where the samples are enough to tell, A and B differ by less than chance does, or than anyone would act on.",
    ),
    "not decided": ("NOT DECIDED", "doubt", "There are too few samples to tell A and B apart, or to call them equal."),
}
UNPROVEN = (
    "NOTHING PROVEN",
    "doubt",
    "At least one of the two loads proves nothing, so neither does a comparison with it. What follows shows what was "
    "recorded, not what is true.",
)
TONES = {"better": "good", "worse": "bad", "not decided": "soft"}


class Comparison(msgspec.Struct):
    """A comparison as `ledgerproof load compare` tells it."""

    a: str
    b: str
    profile: str
    lines: list[Line]
    said: str
    notes: list[str] = []
    unproven: list[str] = []


@dataclass(frozen=True)
class PhasePart:
    """One phase of the comparison."""

    anchor: str
    name: str
    ratios: Plot | None
    table: Table | None
    open: Table | None
    curves: Plot | None


@dataclass(frozen=True)
class ComparePage:
    """Everything the template prints."""

    title: str
    tone: str
    meaning: str
    profile: str
    facts: list[tuple[str, str]]
    unproven: list[str]
    worse: list[str]
    better: list[str]
    notes: list[str]
    figures: list[KeyFigure]
    runs: Table | None
    parts: list[PhasePart]
    more_phases: int
    gaps: list[Gap]
    noticed_percent: str
    css: str


def render_comparison(told: dict[str, Any], places: tuple[Path, Path], noticed: float, path: Path) -> Path:
    """Write the page of a comparison to `path` and return it.

    `told` is the comparison as its JSON has it, `places` are the two run folders or load.json files, whose curves are
    drawn over each other; `noticed` is the share below which a difference is none. Raises msgspec.ValidationError for
    a comparison of another form and OSError if the page cannot be written.
    """
    page = build_comparison(msgspec.convert(told, Comparison), places, noticed)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return write_whole(path, environment.get_template("compare.html.j2").render(page=page))


def build_comparison(found: Comparison, places: tuple[Path, Path], noticed: float) -> ComparePage:
    """Return the contents of the page."""
    gaps: list[Gap] = []
    a, b = (_read(name, place, gaps) for name, place in zip("AB", places, strict=True))
    title, tone, meaning = UNPROVEN if found.unproven else WORDS.get(found.said, WORDS["not decided"])
    phases = list(dict.fromkeys(line.phase for line in found.lines))
    parts = []
    for index, phase in enumerate(phases[:MAX_PHASES]):
        lines = sorted((line for line in found.lines if line.phase == phase), key=_order)
        parts.append(
            PhasePart(
                anchor=f"phase-{index}",
                name=phase,
                ratios=draw_ratios(f"ratios-{index}", phase, lines, noticed),
                table=_table(phase, lines),
                open=_open(phase, lines),
                curves=None if a is None or b is None else draw_pair(f"curves-{index}", phase, a, b),
            )
        )
    return ComparePage(
        title=title,
        tone=tone,
        meaning=meaning,
        profile=found.profile,
        facts=[("Profile", found.profile), ("A", found.a), ("B", found.b)],
        unproven=_cut(found.unproven),
        worse=_named(found.lines, "worse"),
        better=_named(found.lines, "better"),
        notes=found.notes,
        figures=[
            KeyFigure(
                said.capitalize(),
                integer(sum(line.said == said for line in found.lines)),
                f"of {plural(len(found.lines), 'measure')}",
                # Of two loads that prove nothing, no number is good or bad news.
                TONES[said] if said in {"better", "worse"} and _any(found, said) and not found.unproven else "",
            )
            for said in ("worse", "better", "no difference", "not decided")
        ],
        runs=_runs(a, b),
        parts=parts,
        more_phases=len(phases) - len(parts),
        gaps=gaps,
        noticed_percent=f"{number(100 * noticed)}{NBSP}%",
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def _order(line: Line) -> int:
    """Return the place of an operation: the sum of all first, then as everywhere on our pages."""
    ops = ["all", *LOAD_OPERATIONS]
    return ops.index(line.op) if line.op in ops else len(ops)


def _read(name: str, place: Path, gaps: list[Gap]) -> Load | None:
    own: list[Gap] = []
    load = read_load(place / LOAD_FILE if place.is_dir() else place, own)
    gaps += [Gap(f"{name}: {gap.part}", gap.consequence) for gap in own]
    return load


def _any(found: Comparison, said: str) -> bool:
    return any(line.said == said for line in found.lines)


def _cut(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MAX_NAMED
    return [*lines[:MAX_NAMED], f"and {integer(more)} more"] if more > 0 else list(lines)


def _named(lines: Sequence[Line], said: str) -> list[str]:
    """Name the measures with a verdict, those that differ most first."""

    def weight(line: Line) -> float:
        return -abs(line.ratio - 1) if line.ratio is not None else 0.0

    mine = sorted((line for line in lines if line.said == said), key=weight)
    return _cut(
        [
            f"{load_operation(line.op)} in {line.phase}: {line.measure} {_value(line.a, line.unit)} → "
            f"{_value(line.b, line.unit)}"
            + (
                f", {number(line.ratio, 2)} times ({number(line.low, 2)} to {number(line.high, 2)})"
                if line.drawn
                else f" ({line.why})"
                if line.why
                else ""
            )
            for line in mine
        ]
    )


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return NONE
    return f"{milliseconds(value)}{'' if unit.startswith('/') else NBSP}{unit}"


def _table(phase: str, lines: Sequence[Line]) -> Table | None:
    """Return the measures that have a verdict, or a ratio that leaves it open."""
    lines = [line for line in lines if not _without(line)]
    opens = [not index or lines[index - 1].op != line.op for index, line in enumerate(lines)]
    return make_table(
        f"Measures of {phase}; ratios are B / A",
        [
            Column("Operation", "keep"),
            Column("Measure", "keep"),
            Column("Verdict", "keep"),
            Column("B / A", "num"),
            Column("95 % interval", "num"),
            Column("A", "num"),
            Column("B", "num"),
        ],
        (
            [
                Cell(load_operation(line.op), "strong" if first else "soft"),
                line.measure,
                Cell(line.said, TONES.get(line.said, "")),
                Cell(number(line.ratio, 2), "strong"),
                # Errors have a difference instead: a ratio of two zeros says nothing.
                f"{number(line.low, 2)} to {number(line.high, 2)}" if line.drawn else line.why or NONE,
                _value(line.a, line.unit),
                _value(line.b, line.unit),
            ]
            for line, first in zip(lines, opens, strict=True)
        ),
        layout="sticky",
        opens=opens,
    )


def _without(line: Line) -> bool:
    return line.said == "not decided" and not line.drawn


def _open(phase: str, lines: Sequence[Line]) -> Table | None:
    """Return the measures that say nothing, and why."""
    return make_table(
        f"Measures of {phase} that cannot be compared, and why",
        [
            Column("Operation", "keep"),
            Column("Measure", "keep"),
            Column("A", "num"),
            Column("B", "num"),
            Column("Why"),
        ],
        (
            [
                Cell(load_operation(line.op), "strong"),
                line.measure,
                _value(line.a, line.unit),
                _value(line.b, line.unit),
                Cell(line.why or NONE, "soft"),
            ]
            for line in lines
            if _without(line)
        ),
    )


def _runs(a: Load | None, b: Load | None) -> Table | None:
    return make_table(
        "The two loads",
        [
            Column("Load", "keep"),
            Column("Started", "keep"),
            *(Column(label, "num") for label in ("Seed", "Scheduled", "Sent", "Dropped", "Unresolved", "Lag p99")),
            Column("Valid", "keep"),
        ],
        (
            [
                Cell(name, "strong"),
                (load.told.started_at or NONE)[:19].replace("T", " "),
                NONE if load.told.seed is None else str(load.told.seed),
                integer(load.told.scheduled),
                integer(load.told.sent),
                integer(load.told.dropped),
                integer(load.told.unresolved),
                NONE if load.told.lag_p99_ms is None else f"{milliseconds(load.told.lag_p99_ms)}{NBSP}ms",
                Cell("yes", "good") if load.told.invalid == [] else Cell("no: proves nothing", "doubt"),
            ]
            for name, load in (("A", a), ("B", b))
            if load is not None
        ),
    )
