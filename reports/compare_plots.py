"""Draws two loads beside each other: ratios with their intervals, and percentile curves over each other."""

import math
from collections.abc import Sequence

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from reports.load_plots import curve_keys, curve_values, draw_curve, on_latency_axis, on_percentile_axis
from reports.load_tallies import Curve, curve_of
from reports.loads import Load, Spread
from reports.sheets import (
    AXIS,
    BAD,
    COLOURS,
    GRID,
    INK,
    MUTED,
    SMALL_PT,
    Key,
    Plot,
    css_dashes,
    latency_label,
    make_plot,
    panels,
)
from reports.words import load_operation, number

ROW_PT = 14.0
LABEL_PT, VERDICT_PT = 72.0, 76.0
"""Room left of the dots for the measure, and right of them for the verdict in words."""
WIDEST = 8.0
"""A ratio beyond this, or its inverse, is drawn as an arrow at the edge."""
SCALES = ((1.3, (0.8, 0.9, 1.0, 1.1, 1.25)), (2.2, (0.5, 0.7, 1.0, 1.4, 2.0)), (4.4, (0.25, 0.5, 1.0, 2.0, 4.0)))
WIDE_SCALE = (0.125, 0.35, 1.0, 2.8, 8.0)
PANELS_MAX = 9


class Line(msgspec.Struct):
    """One measure of both runs; ratios are B / A."""

    phase: str = ""
    op: str = ""
    measure: str = ""
    a: float | None = None
    b: float | None = None
    unit: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    said: str = ""
    why: str = ""

    @property
    def drawn(self) -> bool:
        """Whether there is a ratio with an interval, all of it on a logarithmic scale."""
        values = (self.ratio, self.low, self.high)
        return all(value is not None and 0 < value < math.inf for value in values)


TONES = {"better": (COLOURS[2], "o"), "worse": (BAD, "X"), "no difference": (MUTED, "s"), "not decided": (MUTED, "D")}
"""Colour and shape of a dot by its verdict, which also stands beside it in words."""


def draw_ratios(name: str, phase: str, lines: Sequence[Line], noticed: float) -> Plot | None:
    """Draw a dot with its 95 % bar for every measure of a phase that has a ratio."""
    shown = [line for line in lines if line.drawn]
    if not shown:
        return None
    # A heading of its own for each operation, then its measures.
    rows: list[str | Line] = []
    for index, line in enumerate(shown):
        if not index or shown[index - 1].op != line.op:
            rows.append(load_operation(line.op))
        rows.append(line)
    reach = max(abs(math.log(value)) for line in shown for value in (line.low or 1, line.high or 1))
    edge = min(max(math.exp(reach) * 1.05, 1.3), WIDEST * 1.1)
    ticks = next((scale for widest, scale in SCALES if edge <= widest), WIDE_SCALE)

    def draw(narrow: bool) -> Figure:
        figure, [axes], _ = panels(
            [f"{phase}: B divided by A"],
            narrow=narrow,
            height_pt=ROW_PT * len(rows) + 6,
            left_pt=LABEL_PT,
            right_pt=VERDICT_PT,
        )
        axes.set_xscale("log")
        axes.set_xlim(1 / edge, edge)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: number(ratio)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(NullLocator())
        axes.grid(visible=True, axis="x", color=GRID, linewidth=0.6)
        axes.set_ylim(len(rows) - 0.3, -0.7)
        axes.axvspan(1 - noticed, 1 + noticed, color=GRID, linewidth=0, zorder=0)
        axes.axvline(1, color=AXIS, linewidth=0.9, zorder=1)
        for row, line in enumerate(rows):
            if isinstance(line, str):
                _beside(axes, row, -LABEL_PT, line, INK)
            else:
                _beside(axes, row, -LABEL_PT + 8, line.measure, MUTED)
                _draw_line(axes, row, line, edge)
        return figure

    met = [said for said in TONES if any(line.said == said for line in shown)]
    shapes = {"better": "dot", "worse": "cross", "no difference": "square", "not decided": "hollow"}
    variables = {"better": "--c3", "worse": "--bad"}
    legend = [Key(shapes[said], variables.get(said, "--muted"), said) for said in met]
    legend.append(Key("area", "--grid", f"within {number(100 * noticed)} %: too little to act on"))
    told = ", ".join(f"{load_operation(line.op)} {line.measure} {number(line.ratio, 2)} {line.said}" for line in shown)
    return make_plot(name, draw, legend, f"Ratios of B to A in phase {phase}: {told}.")


def _beside(axes: Axes, row: int, left_pt: float, text: str, colour: str) -> None:
    axes.annotate(
        text,
        (0, row),
        xycoords=axes.get_yaxis_transform(),
        xytext=(left_pt, 0),
        textcoords="offset points",
        va="center_baseline",
        color=colour,
        size=SMALL_PT,
        annotation_clip=False,
    )


def _draw_line(axes: Axes, row: int, line: Line, edge: float) -> None:
    assert line.ratio is not None, "only lines with a ratio are drawn"
    assert line.low is not None, "and with an interval"
    assert line.high is not None, "on both sides"
    colour, marker = TONES.get(line.said, (MUTED, "D"))
    low, high = max(line.low, 1 / edge), min(line.high, edge)
    if low < high:
        axes.plot([low, high], [row, row], color=colour, linewidth=3, alpha=0.45, solid_capstyle="butt", zorder=2)
    at = min(max(line.ratio, 1 / edge), edge)
    if at != line.ratio:
        marker = ">" if line.ratio > 1 else "<"
    fill = "none" if line.said == "not decided" else "full"
    axes.plot(at, row, marker=marker, fillstyle=fill, markersize=5, color=colour, zorder=4, clip_on=False)
    axes.annotate(
        line.said,
        (1, row),
        xycoords=axes.get_yaxis_transform(),
        xytext=(8, 0),
        textcoords="offset points",
        va="center_baseline",
        color=colour,
        size=SMALL_PT,
        annotation_clip=False,
    )


def pair_curves(phase: str, a: Load, b: Load) -> list[tuple[str, list[Curve]]]:
    """Return the curves of A and B for all operations together and for each, those with the most answers first."""
    ops = {op for op, name in {*a.spreads, *b.spreads} if name == phase}
    weight = {op: sum(load.spreads.get((op, phase), Spread()).total for load in (a, b)) for op in ops}
    order = sorted(ops, key=lambda op: (-weight[op], op))
    groups = [("All operations", order)] if len(order) > 1 else []
    groups += [(load_operation(op), [op]) for op in order]
    found = []
    for title, members in groups[:PANELS_MAX]:
        made = []
        for name, load in (("A", a), ("B", b)):
            spread = Spread.sum([load.spreads[op, phase] for op in members if (op, phase) in load.spreads])
            lost = sum(c.unanswered for c in load.told.cells if c.phase == phase and c.op in members)
            estimates = [
                each
                for row in load.told.percentiles
                if len(members) == 1 and (row.op, row.phase) == (members[0], phase)
                for each in row.estimates
            ]
            curve = curve_of(name, spread, lost, estimates)
            if curve is not None:
                made.append(curve)
        if made:
            found.append((title, made))
    return found


def draw_pair(name: str, phase: str, a: Load, b: Load) -> Plot | None:
    """Draw the percentile curves of both runs over each other, a panel for each operation."""
    found = pair_curves(phase, a, b)
    if not found:
        return None
    every = [curve for _, made in found for curve in made]
    last = max(curve.at[-1] for curve in every)

    def draw(narrow: bool) -> Figure:
        figure, made, _ = panels(
            [f"{phase}: {title}" for title, _ in found],
            narrow=narrow,
            columns=2 if len(found) > 1 else 1,
            height_pt=120 if len(found) > 2 else 180,
        )
        for axes, (_, own) in zip(made, found, strict=True):
            on_percentile_axis(axes, last)
            on_latency_axis(axes, curve_values(every))
            for curve in own:
                index = 0 if curve.name == "A" else 1
                draw_curve(axes, curve, index, dodge=(index - 0.5) * 0.012 * last)
        return figure

    legend = [
        Key("line", "--c1", "A", css_dashes(0)),
        Key("line", "--c2", "B", css_dashes(1)),
        *curve_keys(every),
    ]
    told = "; ".join(
        f"{title}: " + ", ".join(f"{curve.name} reaches {latency_label(curve.ms[-1])}" for curve in made)
        for title, made in found
    )
    return make_plot(name, draw, legend, f"Percentile curves of A and B in phase {phase}. {told}.")
