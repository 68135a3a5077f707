"""The page of a benchmark, from the contents of its bench.json: one page that loads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from reports.page import TEMPLATES, KeyFigure
from reports.render import write_whole
from reports.tables import Cell, Column, Table, make_table
from reports.words import NONE, integer, number, plural, seconds

FIGURES = (
    ("http_single_bets_accepted", "Single bets accepted"),
    ("http_single_bets_sustained", "Single bets sustained"),
    ("http_bulk_bets", "Bets in bulk"),
    ("grpc_single_bets", "Single bets over gRPC"),
    ("sql_function", "Posting function alone"),
    ("reads_redis", "Reads from the cache"),
    ("relay_events", "Relay"),
    ("matcher_bets", "Matcher"),
    ("settler_bets", "Settler"),
)
"""Rows that get a large number, and what it is called."""
FLOORS = ("floor_unnest", "floor_pgbench", "generator_ceiling")
CPU_SHOWN_MIN_MS = 0.0005


@dataclass(frozen=True)
class Bar:
    """One bar; `width` of 1000."""

    title: str
    text: str
    width: int
    variable: str


@dataclass(frozen=True)
class Bars:
    """Bars of one unit."""

    unit: str
    bars: list[Bar]


@dataclass(frozen=True)
class BenchPage:
    """Everything the template prints."""

    commit: str
    version: str
    started_at: str
    title: str
    tone: str
    meaning: str
    facts: list[tuple[str, str]]
    problems: list[str]
    figures: list[KeyFigure]
    bars: list[Bars]
    rows: Table | None
    cpu: Table | None
    searches: list[Table]
    bytes: Table | None
    machine: list[tuple[str, str]]
    memory: list[tuple[str, str]]
    checks: list[tuple[str, str]]
    css: str


def render_bench(result: dict[str, Any], path: Path) -> Path:
    """Write the page of a benchmark to `path` and return it. Raises OSError if it cannot be written."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return write_whole(path, environment.get_template("bench.html.j2").render(page=build_bench(result)))


def build_bench(result: dict[str, Any]) -> BenchPage:
    """Return the contents of the page."""
    rows: list[dict[str, Any]] = result["rows"]
    invalid = [row for row in rows if not row["valid"]]
    broken = {rule: count for rule, count in result["checks"].items() if count}
    if broken:
        title, tone = "LEDGER WRONG", "bad"
        meaning = "The ledger that this load left breaks its rules: no rate on this page counts."
    elif not rows:
        title, tone, meaning = "NOTHING MEASURED", "doubt", "No row was asked for, so nothing is claimed."
    elif invalid or result["unchecked"]:
        title, tone = "PARTLY VALID", "doubt"
        meaning = "Some rows say nothing; those that are not named below stand."
    else:
        title, tone = "VALID", "good"
        meaning = "Every row is valid" + (
            ", and the ledger that the load left is consistent." if result["checked"] else "."
        )
    problems = [f"{_title(row)}: {row['reason']}" for row in invalid]
    problems += [f"rule {rule}: {plural(count, 'violation')}" for rule, count in broken.items()]
    if result["unchecked"]:
        problems.append(f"the ledger was not checked: {result['unchecked']}")
    machine = result["machine"]
    return BenchPage(
        commit=result["commit"],
        version=result["version"],
        started_at=result["started_at"],
        title=title,
        tone=tone,
        meaning=meaning,
        facts=[
            ("commit", result["commit"]),
            ("machine", f"{machine['cpu']}, {machine['cores']} cores"),
            ("stack", f"{result['servers']} Postgres, {result['apis']} API"),
            ("kind", "quick" if result["quick"] else "full"),
            ("took", seconds(result["duration_s"], 0)),
        ],
        problems=problems,
        figures=_figures(rows, result),
        bars=_bars(rows),
        rows=_rows(rows),
        cpu=_cpu(rows),
        searches=_searches(rows),
        bytes=_bytes(rows),
        machine=[
            ("CPU", str(machine["cpu"])),
            ("Cores", str(machine["cores"])),
            ("Memory", f"{number(machine['memory_gb'])} GB"),
            ("OS", str(machine["os"])),
            ("Python", str(machine["python"])),
            ("Commit", str(result["commit"])),
            ("Flushed to disk", rows[0]["fsync"] if rows else NONE),
        ],
        memory=[(name, number(value, 0)) for name, value in sorted(result["peak_rss_mb"].items())],
        checks=[(rule.replace("_", " "), integer(count)) for rule, count in result["checks"].items()],
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def _title(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['variant']})" if row["variant"] else str(row["name"])


def _figures(rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> list[KeyFigure]:
    figures = []
    for name, label in FIGURES:
        mine = [row for row in rows if row["name"] == name and row["valid"] and row["rate"]]
        if mine:
            best = max(mine, key=lambda row: float(row["rate"]))
            about = best["unit"]
            if best["p99_ms"] is not None:
                about += f", p99 {number(best['p99_ms'], 1)} ms"
            figures.append(KeyFigure(label, integer(best["rate"]), about))
    checked = result["checked"]
    figures.append(
        KeyFigure(
            "Ledger after the load",
            {True: "consistent", False: "not shown", None: "not loaded"}[checked],
            f"{plural(len(result['checks']), 'rule')} checked",
            {True: "good", False: "bad", None: ""}[checked],
        )
    )
    return figures


def _bars(rows: Sequence[dict[str, Any]]) -> list[Bars]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["rate"]:
            groups.setdefault(row["unit"], []).append(row)
    found = []
    for unit, mine in groups.items():
        most = max(float(row["rate"]) for row in mine)
        found.append(
            Bars(
                unit,
                [
                    Bar(
                        _title(row),
                        integer(row["rate"]) + ("" if row["valid"] else " (invalid)"),
                        max(2, round(1000 * row["rate"] / most)),
                        "--a6" if row["name"] in FLOORS or not row["valid"] else "--a1",
                    )
                    for row in mine
                ],
            )
        )
    return found


def _rows(rows: Sequence[dict[str, Any]]) -> Table | None:
    def line(row: dict[str, Any]) -> list[str | Cell]:
        ratio = NONE if row["ratio_to_floor"] is None else number(row["ratio_to_floor"], 2)
        if row["floor"] and row["ratio_to_floor"] is not None:
            ratio += f" of {row['floor']}"
        return [
            Cell(_title(row), "strong"),
            Cell(integer(row["rate"]) if row["rate"] is not None else NONE, "strong" if row["valid"] else "bad"),
            row["unit"],
            number(row["p50_ms"], 1),
            number(row["p99_ms"], 1),
            ratio,
            Cell(row["loop"], "soft"),
            integer(row["data_age"]) if row["data_age"] else NONE,
            _samples(row),
            Cell(row["reason"] if row["valid"] else f"invalid: {row['reason']}", "soft" if row["valid"] else "bad"),
        ]

    return make_table(
        "Every row, in the order in which they were measured",
        [
            Column("Row"),
            Column("Rate", "num"),
            Column("Unit"),
            Column("p50, ms", "num"),
            Column("p99, ms", "num"),
            Column("Of floor"),
            Column("Loop"),
            Column("Entries before", "num"),
            Column("Samples"),
            Column("Remarks"),
        ],
        [line(row) for row in rows],
    )


def _samples(row: dict[str, Any]) -> str:
    if not row["samples"]:
        return NONE
    count = integer(row["samples"])
    return f"{count} in {seconds(row['duration_s'], 1)}" if row["duration_s"] else count


def _cpu(rows: Sequence[dict[str, Any]]) -> Table | None:
    groups = sorted({group for row in rows for group in row["cpu_ms_per_op"]})
    lines: list[list[str | Cell]] = []
    for row in rows:
        used = row["cpu_ms_per_op"]
        if used:
            lines.append(
                [
                    Cell(_title(row), "strong"),
                    *(number(used[group], 3) if used.get(group, 0) >= CPU_SHOWN_MIN_MS else NONE for group in groups),
                    Cell(number(sum(used.values()), 3), "strong"),
                ]
            )
    columns = [Column("Row"), *(Column(group, "num") for group in groups), Column("sum", "num")]
    return make_table("CPU milliseconds per operation", columns, lines)


def _searches(rows: Sequence[dict[str, Any]]) -> list[Table]:
    tones = {"held": "good", "not held": "bad", "invalid": "doubt"}
    found = []
    for row in rows:
        steps = row["details"].get("search", [])
        table = make_table(
            row["name"],
            [Column("Offered, bets/s", "num"), Column("Window"), Column("Outcome"), Column("Why")],
            [
                [
                    number(step["rate"], 0),
                    "confirming" if step["confirming"] else "step",
                    Cell(step["held"], tones[step["held"]]),
                    step["why"] or NONE,
                ]
                for step in steps
            ],
        )
        if table is not None:
            found.append(table)
    return found


def _bytes(rows: Sequence[dict[str, Any]]) -> Table | None:
    row = next((row for row in rows if row["name"] == "bytes_per_bet" and row["valid"]), None)
    if row is None:
        return None
    accepted, settled = row["details"]["when_accepted"], row["details"]["when_settled"]
    totals = row["details"]["bytes_per_bet"]
    lines: list[list[str | Cell]] = [
        [name, number(accepted.get(name), 0) if name in accepted else NONE, number(value, 0)]
        for name, value in sorted(settled.items(), key=lambda item: (item[0] == "WAL", item[0]))
    ]
    lines.append(
        [
            Cell("on disk, without WAL", "strong"),
            Cell(number(totals["accepted"], 0), "strong"),
            Cell(number(totals["whole_life"], 0), "strong"),
        ]
    )
    columns = [Column("Table, or index by its columns"), Column("When accepted", "num"), Column("In the end", "num")]
    return make_table("Bytes per bet", columns, lines, fit=True)
