"""The page of a capacity plan, from what `ledgerproof sim plan --json` holds: one page that loads nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from reports.page import TEMPLATES, KeyFigure
from reports.render import write_whole
from reports.sheets import (
    AXIS,
    COLOURS,
    GLYPH_EM,
    INK,
    MUTED,
    RIGHT_PT,
    SMALL_PT,
    TEXT_PT,
    Key,
    Plot,
    make_plot,
    panels,
)
from reports.tables import Cell, Column, Table, make_table
from reports.words import NBSP, NONE, integer, number

PARTS: Final = {
    "api": "API pods",
    "worker": "workers",
    "database": "Postgres",
    "kafka": "Kafka",
    "redis": "Redis",
    "archive": "backups and WAL",
    "traffic": "traffic between zones",
    "overhead": "overhead",
}
"""Parts of the cost, and their words."""
FIGURES: Final = ("api_pods", "servers", "brokers", "cost")
MOVES_MAX: Final = 14
"""Bars of the tornado."""
ROW_PT: Final = 17.0
SWING_MIN: Final = 0.001
"""A value that moves the cost by less than this share is no bar."""


@dataclass(frozen=True)
class PlanPage:
    """Everything the template prints."""

    title: str
    tone: str
    meaning: str
    facts: list[tuple[str, str]]
    problems: list[str]
    figures: list[KeyFigure]
    needs: Table | None
    headroom: str
    cost: Plot
    tornado: Plot | None
    seed: Table | None
    levels: Table | None
    assumptions: Table | None
    demands: Table | None
    prices: Table | None
    prices_of: str
    notes: list[str]
    refusals: list[tuple[str, str]]
    intervals: str
    css: str


def render_plan(answer: Mapping[str, Any], path: Path) -> Path:
    """Write the page to `path` and return it. Raises OSError if it cannot be written."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return write_whole(path, environment.get_template("plan.html.j2").render(page=build_plan(answer)))


def build_plan(answer: Mapping[str, Any]) -> PlanPage:
    """Return the contents of the page."""
    numbers = answer["figures"]["numbers"]
    problems = answer["figures"]["problems"]
    assume = answer["plan"]["assume"]
    wrong = [each for each in answer["verdicts"] if each["verdict"] != "confirmed"]
    currency = answer["prices"]["currency"]
    low, high = answer["intervals"]["cost"]
    return PlanPage(
        title=f"{integer(assume['users'])} users",
        tone="warn" if problems else "",
        meaning=(
            f"{integer(numbers['requests_per_s'])} requests a second need {integer(numbers['cores'])} cores and about "
            f"{_rounded(numbers['cost'])} {currency} a month ({_rounded(low)} to {_rounded(high)}). "
            f"{len(wrong)} of {len(answer['verdicts'])} figures of the seed's table do not agree."
        ),
        facts=[
            ("plan", answer["plan"]["name"]),
            ("demands of", answer["demands"]["commit"]),
            ("measured on", answer["demands"]["machine"]),
            ("prices", f"version {answer['prices']['version']} of {answer['prices']['date']}"),
        ],
        problems=problems,
        figures=_figures(answer),
        needs=_needs(answer),
        headroom=_headroom(answer),
        cost=draw_cost(numbers, currency),
        tornado=draw_tornado(answer["moves"], numbers["cost"], currency),
        seed=_seed(answer["verdicts"]),
        levels=_levels(answer["levels"]),
        assumptions=_assumptions(answer["assumptions"]),
        demands=_demands(answer["demands"]["demand"]),
        prices=_prices(answer["prices"]["price"]),
        prices_of=f"version {answer['prices']['version']} of {answer['prices']['date']}",
        notes=answer["notes"],
        refusals=[(each["what"], each["reason"]) for each in answer["demands"]["refusal"]],
        intervals=f"{integer(answer['samples'])} draws of demands and prices, seed {answer['seed']}",
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def _rounded(value: float) -> str:
    """Return a large number in two or three digits: what the plan knows of it."""
    digits = 10 ** max(0, len(str(int(abs(value)))) - 2)
    return integer(round(value / digits) * digits)


def _amount(value: float) -> str:
    """Return a number in three digits, and a whole one below ten thousand in all of its own."""
    if abs(value) >= 10_000:
        digits = 10 ** (len(str(int(abs(value)))) - 3)
        return integer(round(value / digits) * digits)
    return integer(value) if abs(value) >= 100 or value == int(value) else number(value)


def _measured(value: float) -> str:
    return integer(value) if value >= 1_000 else f"{value:.4g}"


def _between(low: float, high: float) -> str:
    return _amount(low) if low == high else f"{_amount(low)} to {_amount(high)}"


def _figures(answer: Mapping[str, Any]) -> list[KeyFigure]:
    rows = {row["name"]: row for row in answer["needs"]}
    figures = []
    for name in FIGURES:
        row = rows[name]
        about = f"{_between(row['low'], row['high'])}"
        if row["seed"]:
            about += f"; the seed: {row['seed']}"
        what = row["what"][0].upper() + row["what"][1:]
        figures.append(KeyFigure(what, _amount(row["value"]), about))
    return figures


def _needs(answer: Mapping[str, Any]) -> Table | None:
    rows = []
    for row in answer["needs"]:
        unit = f"{NBSP}{row['unit']}" if row["unit"] else ""
        verdict = row["verdict"]
        tone = "good" if verdict == "confirmed" else "warn"
        rows.append(
            [
                Cell(row["what"], "strong"),
                Cell(f"{_amount(row['value'])}{unit}"),
                Cell(_between(row["low"], row["high"])),
                Cell(row["binding"] or NONE),
                Cell(row["seed"] or NONE),
                Cell(verdict or NONE, tone if verdict else ""),
            ]
        )
    columns = [
        Column("What"),
        Column("Needed", "num"),
        Column("90 % interval", "num"),
        Column("Bound by"),
        Column("The seed says"),
        Column("Which is"),
    ]
    return make_table("What the plan needs, and what binds it", columns, rows)


def _headroom(answer: Mapping[str, Any]) -> str:
    numbers, zones = answer["figures"]["numbers"], answer["plan"]["assume"]["zones"]
    if zones == 1:
        return "There is one zone: when it is lost, all is lost."
    said = ", ".join(
        f"{words} to {numbers[name] * 100:.0f}{NBSP}%"
        for words, name in (
            ("API processes", "api_use_zone_lost"),
            ("the busiest consumers", "consumer_use_zone_lost"),
            ("brokers", "kafka_use_zone_lost"),
        )
    )
    return f"With one of {zones} zones lost, the rest is used: {said}."


def _seed(verdicts: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = []
    for each in verdicts:
        figure = each["figure"]
        tone = "good" if each["verdict"] == "confirmed" else "warn"
        rows.append(
            [
                Cell(figure["what"], "strong"),
                Cell(figure["says"]),
                Cell(f"{_amount(each['value'])}{NBSP}{figure['unit']}"),
                Cell(_between(each["low"], each["high"])),
                Cell(each["verdict"], tone),
                Cell(figure["why"] or NONE),
            ]
        )
    columns = [
        Column("Figure"),
        Column("The seed says"),
        Column("Ours", "num"),
        Column("90 % interval", "num"),
        Column("The seed's is"),
        Column("Note"),
    ]
    return make_table("The seed's capacity table beside ours", columns, rows)


def _levels(levels: Sequence[Mapping[str, Any]]) -> Table | None:
    counts = list(levels[0]["costs"])
    rows = [
        [
            Cell(level["name"].replace(" ", NBSP), "strong"),
            Cell(level["pattern"]),
            Cell(_rounded(level["users_max"])),
            Cell(level["binding"]),
            Cell(level["seed_users"]),
            *(Cell(NONE if (cost := level["costs"][count]) is None else _rounded(cost)) for count in counts),
            Cell(level["seed_cost"]),
        ]
        for level in levels
    ]
    columns = [
        Column("Level"),
        Column("What it is"),
        Column("Holds to, users", "num"),
        Column("Then binds"),
        Column("The seed's users"),
        *(Column(f"Cost at {integer(int(count))}", "num") for count in counts),
        Column("The seed's cost"),
    ]
    return make_table("The seed's three levels on the same demands", columns, rows)


def _assumptions(assumptions: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = [[Cell(each["name"], "strong"), Cell(f"{each['value']:,}"), Cell(each["source"])] for each in assumptions]
    return make_table("Assumptions", [Column("Name", "code keep"), Column("Value", "num"), Column("Source")], rows)


def _demands(demands: Mapping[str, Mapping[str, Any]]) -> Table | None:
    rows = [
        [
            Cell(name, "strong"),
            Cell(_measured(each["value"])),
            Cell(f"{_measured(each['low'])} to {_measured(each['high'])}"),
            Cell(each["unit"]),
            Cell(each["of"]),
            Cell(each["source"]),
        ]
        for name, each in demands.items()
    ]
    columns = [
        Column("Name", "code keep"),
        Column("Value", "num"),
        Column("Interval", "num"),
        Column("Unit"),
        Column("Of"),
        Column("Source"),
    ]
    return make_table("Demands: what one unit of work costs", columns, rows)


def _prices(prices: Mapping[str, Mapping[str, Any]]) -> Table | None:
    rows = [
        [
            Cell(name, "strong"),
            Cell(f"{each['value']:g}"),
            Cell(f"{each['low']:g} to {each['high']:g}"),
            Cell(each["unit"]),
            Cell(each["source"]),
        ]
        for name, each in prices.items()
    ]
    columns = [
        Column("Name", "code keep"),
        Column("Value", "num"),
        Column("Interval", "num"),
        Column("Unit"),
        Column("Source"),
    ]
    return make_table("Prices", columns, rows)


def draw_cost(numbers: Mapping[str, float], currency: str) -> Plot:
    """Draw a bar for each part of the monthly cost, the largest first."""
    parts = sorted(((numbers[f"{part}_cost"], words) for part, words in PARTS.items()), reverse=True)

    def draw(narrow: bool) -> Figure:
        left = _label_pt([words for _, words in parts])
        figure, [axes], _ = panels(
            [f"{currency} a month, {_rounded(numbers['cost'])} in all"],
            narrow=narrow,
            height_pt=ROW_PT * len(parts),
            left_pt=left,
            right_pt=RIGHT_PT + 8,
        )
        axes.barh(range(len(parts)), [cost for cost, _ in parts], height=0.62, color=COLOURS[0])
        axes.set_xlim(0, max(cost for cost, _ in parts) * 1.18)
        for row, (cost, _) in enumerate(parts):
            axes.annotate(
                _rounded(cost), (cost, row), xytext=(4, 0), textcoords="offset points",
                va="center_baseline", color=MUTED, size=SMALL_PT,
            )  # fmt: skip
        _rows(axes, [words for _, words in parts], narrow=narrow)
        return figure

    told = ", ".join(f"{words} {_rounded(cost)}" for cost, words in parts)
    return make_plot("cost", draw, [], f"Parts of the monthly cost in {currency}: {told}.")


def draw_tornado(moves: Sequence[Mapping[str, Any]], cost: float, currency: str) -> Plot | None:
    """Draw how far each value moves the cost, from the lower to the higher of it; None if nothing does."""
    shown = [move for move in moves if move["swing"] > SWING_MIN * cost][:MOVES_MAX]
    if not shown:
        return None
    names = [str(move["name"]) for move in shown]

    def draw(narrow: bool) -> Figure:
        figure, [axes], _ = panels(
            [f"Cost of a month, {currency}"],
            narrow=narrow,
            height_pt=ROW_PT * len(shown),
            left_pt=_label_pt(names),
            right_pt=RIGHT_PT + 8,
        )
        for row, move in enumerate(shown):
            for end, colour in zip(move["cost"], (COLOURS[1], COLOURS[0]), strict=True):
                axes.barh(row, end - cost, left=cost, height=0.62, color=colour)
        axes.axvline(cost, color=AXIS, linewidth=0.8)
        ends = [end for move in shown for end in move["cost"]] + [cost]
        room = (max(ends) - min(ends)) * 0.04
        axes.set_xlim(min(ends) - room, max(ends) + room)
        _rows(axes, names, narrow=narrow)
        return figure

    legend = [Key("area", "--c2", "at the lower value"), Key("area", "--c1", "at the higher value")]
    told = "; ".join(f"{move['name']} {_rounded(move['cost'][0])} to {_rounded(move['cost'][1])}" for move in shown[:5])
    return make_plot("tornado", draw, legend, f"What moves the monthly cost most. {told}.")


def _label_pt(names: Sequence[str]) -> float:
    return max(len(name) for name in names) * TEXT_PT * GLYPH_EM + 6


def _rows(axes: Any, names: Sequence[str], *, narrow: bool) -> None:
    """Let the vertical axis hold one named row a bar, from the top, and the horizontal one amounts of money."""
    axes.grid(visible=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.yaxis.set_major_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3 if narrow else 6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: integer(value)))
    for row, name in enumerate(names):
        axes.annotate(
            name, (0, row), xycoords=("axes fraction", "data"), xytext=(-5, 0), textcoords="offset points",
            ha="right", va="center_baseline", color=INK, size=SMALL_PT,
        )  # fmt: skip
