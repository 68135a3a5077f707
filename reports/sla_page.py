"""The page of the service levels, from what `ledgerproof sla --json` holds: one page that loads nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from reports.page import TEMPLATES, KeyFigure
from reports.render import write_whole
from reports.tables import Cell, Column, Table, make_table
from reports.words import NONE, number, plural

FIGURES = (
    ("Availability", "Availability"),
    ("API latency p99", "API latency p99"),
    ("Consumer lag", "Largest consumer lag"),
    ("Duplicate entries", "Duplicate entries"),
)
"""Levels that get a large number: the first measured line of each."""
TONES = {"met": "good", "MISSED": "bad", "measured": "", "extrapolated": "warn", "not measured here": "soft"}


@dataclass(frozen=True)
class Explained:
    """How one line came about."""

    title: str
    result: str
    tone: str
    method: str


@dataclass(frozen=True)
class SlaPage:
    """Everything the template prints."""

    version: str
    made_at: str
    title: str
    tone: str
    meaning: str
    facts: list[tuple[str, str]]
    problems: list[str]
    figures: list[KeyFigure]
    levels: Table | None
    methods: list[Explained]
    machine: list[tuple[str, str]]
    css: str


def render_sla(result: Mapping[str, Any], path: Path) -> Path:
    """Write the page to `path` and return it. Raises OSError if it cannot be written."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return write_whole(path, environment.get_template("sla.html.j2").render(page=build_sla(result)))


def build_sla(result: Mapping[str, Any]) -> SlaPage:
    """Return the contents of the page."""
    lines: Sequence[Mapping[str, Any]] = result["lines"]
    source = result["source"]
    missed, unproven = result["missed"], result["unproven"]
    measured = [line for line in lines if line["met"] is not None]
    if unproven:
        title, tone = "NOT PROVEN", "doubt"
        meaning = "The figures below do not show that the service levels are met."
    elif missed:
        title, tone = "SLA MISSED", "warn"
        meaning = f"Of {plural(len(measured), 'level')} that could be measured here, not all are met."
    else:
        title, tone = "MET", "good"
        meaning = (
            f"All {plural(len(measured), 'level')} that could be measured here are met. What is extrapolated or not "
            "measured is not among them."
        )
    machine = source["machine"]
    return SlaPage(
        version=source["version"],
        made_at=result["made_at"],
        title=title,
        tone=tone,
        meaning=meaning,
        facts=[
            ("run", source["run"]),
            ("verdict", source["verdict"].replace("_", " ")),
            ("commit", source["commit"]),
            ("load", source["scale"]),
            *([("rates", source["bench"])] if source["bench"] else []),
        ],
        problems=[*(f"missed: {name}" for name in missed), *unproven],
        figures=_figures(lines),
        levels=_levels(lines),
        methods=[Explained(_title(line), line["result"], TONES[line["result"]], line["method"]) for line in lines],
        machine=[
            ("CPU", str(machine.get("cpu", NONE))),
            ("Cores", str(machine.get("cores", NONE))),
            ("Memory", f"{number(machine['memory_gb'])} GB" if "memory_gb" in machine else NONE),
            ("OS", str(machine.get("os", NONE))),
            ("Python", str(machine.get("python", NONE))),
        ],
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def _title(line: Mapping[str, Any]) -> str:
    return f"{line['level']}, {line['of']}" if line["of"] else str(line["level"])


def _figures(lines: Sequence[Mapping[str, Any]]) -> list[KeyFigure]:
    figures = []
    for level, label in FIGURES:
        line = next((line for line in lines if line["level"] == level and line["measured"] is not None), None)
        if line is not None:
            said = str(line["says"]).split(" (", 1)[0]
            figures.append(KeyFigure(label, said, f"target {line['target']}", TONES[line["result"]]))
    return figures


def _levels(lines: Sequence[Mapping[str, Any]]) -> Table | None:
    rows: list[list[Cell]] = []
    opens: list[bool] = []
    before = ""
    for line in lines:
        opens.append(line["level"] != before)
        # A first cell without words would leave a card of the narrow layout without a title.
        name = Cell(line["level"], "strong" if opens[-1] else "soft")
        tone = TONES[line["result"]]
        words = (line["of"], line["target"], line["alert"], line["says"])
        rows.append([name, *(Cell(word or NONE) for word in words), Cell(line["result"], tone)])
        before = line["level"]
    columns = [Column(name) for name in ("Service level", "Of what", "Target", "Alert", "Here", "Result")]
    return make_table("Service levels of the architecture, and what was seen here of each", columns, rows, opens=opens)
