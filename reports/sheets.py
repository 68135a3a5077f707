"""What all figures share: colours, panels on a time axis, and inline SVG in two drawings, a wide and a narrow one.

Colours are drawn as sentinel values and then replaced by CSS variables, so that one drawing serves light,
dark and paper. Text stays text (the reader's own font, selectable, readable by a screen reader); it is laid
out with DejaVu Sans, which is wider than what most readers have, so it never collides where this does not.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from reports.folder import Fault
from reports.tallies import (
    Clock,
    largest,
)
from reports.words import NBSP, number

INK, MUTED, GRID, AXIS, PAPER = "#01a001", "#01a002", "#01a003", "#01a004", "#01a009"
FAULT, FAULT_SOFT, FAULT_INK = "#01a005", "#01a006", "#01a007"
COLOURS = ("#01a011", "#01a012", "#01a013", "#01a014", "#01a015", "#01a016")
FAULT_BAR = "#01a008"
AREAS = ("#01a021", "#01a022", "#01a023", "#01a024", "#01a025", "#01a026")
BAD, WARN = "#01a031", "#01a032"
HEAT = ("#01a041", "#01a042", "#01a043", "#01a044", "#01a045", "#01a046", "#01a047")
"""From few to many: each differs from the one before in lightness, so the order survives a grey print."""
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    AXIS: "--axis",
    PAPER: "--paper",
    FAULT: "--fault",
    FAULT_SOFT: "--fault-soft",
    FAULT_INK: "--fault-ink",
    FAULT_BAR: "--fault-bar",
    BAD: "--bad",
    WARN: "--warn",
    **{colour: f"--c{index}" for index, colour in enumerate(COLOURS, 1)},
    **{colour: f"--a{index}" for index, colour in enumerate(AREAS, 1)},
    **{colour: f"--h{index}" for index, colour in enumerate(HEAT, 1)},
}
"""Which CSS variable stands in for which sentinel."""

DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "solid",
    (0, (5, 1.6)),
    (0, (1.4, 1.4)),
    (0, (7, 1.6, 1.4, 1.6)),
    (0, (3, 1)),
    (0, (9, 2)),
)
"""Lines differ in their dashes as well as in their colour, for readers who cannot tell the colours apart."""


def css_dashes(index: int) -> str:
    """Return the dashes of a line as CSS, in units of its width."""
    dashes = DASHES[index]
    return "" if isinstance(dashes, str) else " ".join(f"{2 * length:g}" for length in dashes[1])


WIDE_PT, NARROW_PT = 720.0, 276.0
"""Widths of the two drawings: 960 and 368 CSS pixels, the widths of the text column they stand in."""
LEFT_PT, RIGHT_PT, TITLE_PT, LANE_PT, GUTTER_PT = 38.0, 9.0, 21.0, 11.5, 14.0
LABELS_PT, BOTTOM_PT = 15.0, 25.0
"""Room below the last row of panels, for its time axis, and below the rows above it."""
TEXT_PT, SMALL_PT = 9.0, 8.25
GLYPH_EM = 0.6
"""Mean width of a glyph of DejaVu Sans in its own size, a little generous."""
TICK_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
MAX_LANES = 4


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a swatch (line, area or mark) in a CSS variable, and its words."""

    shape: str
    variable: str
    text: str
    dashes: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure of the page: its two drawings, its legend, and in words what it shows."""

    name: str
    wide: str
    narrow: str
    legend: list[Key]
    description: str


FAULT_KEYS = [
    Key("area", "--fault", "fault, as measured"),
    Key("area", "--fault-soft", "healed or released, not yet recovered"),
]


_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def svg_of(name: str, figure: Figure) -> str:
    """Return the figure as an <svg> element without ids, dates or fonts of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib's own style element would apply to the whole page: the page's CSS has the same rules.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*</defs>", "", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg))
    referenced = {first or second for first, second in used}

    def own_id(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in referenced else ""

    svg = re.sub(r'\sid="([^"]+)"', own_id, svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    for sentinel, variable in VARIABLES.items():
        svg = svg.replace(sentinel, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"(font-size: [\d.]+px);\s*font-family:[^;\"]*", r"\1", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: _NUMBER.sub(_rounded, tag[0]).replace("\n", ""), svg)
    svg = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true" focusable="false">', svg)
    return re.sub(r">\s+<", "><", svg).strip()


def make_plot(name: str, draw: Callable[[bool], Figure], legend: list[Key], description: str) -> Plot:
    """Return a plot of both drawings; `draw` is told whether the narrow one is wanted."""
    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "text.parse_math": False,
            "font.family": ["DejaVu Sans"],
            "font.size": TEXT_PT,
            "path.simplify": True,
        }
    ):
        wide = svg_of(f"{name}-w", draw(False))
        narrow = svg_of(f"{name}-n", draw(True))
    return Plot(name, wide, narrow, legend, description)


def pack(labels: Sequence[tuple[float, str]], plot_pt: float, *, centred: bool) -> list[tuple[float, int, str]]:
    """Place labels (position in points, text) in rows so that none overlaps: (left edge, row, text).

    A label that would not fit into the last allowed row is left out; the tables name it anyway.
    """
    ends: list[float] = []
    placed = []
    for position, text in labels:
        width = len(text) * SMALL_PT * GLYPH_EM
        left = position - width / 2 if centred else position + 3
        left = min(max(left, 0.0), plot_pt - width)
        row = next((index for index, end in enumerate(ends) if end + 4 <= left), len(ends))
        if row >= MAX_LANES:
            continue
        if row == len(ends):
            ends.append(0.0)
        ends[row] = left + width
        placed.append((left, row, text))
    return placed


def window_of(fault: Fault, clock: Clock) -> tuple[float, float, float] | None:
    """Return start, end and recovery of the measured effect, cut to the time axis; None if not measured."""
    if fault.measured_start is None:
        return None
    end = fault.measured_end
    recovered = fault.recovered_at
    if end is None:
        # An effect with no measured end is drawn as lasting: that is what is known about it.
        end = recovered if recovered is not None else clock.end
    after = end if recovered is None else max(end, recovered)
    return fault.measured_start, min(end, clock.end), min(after, clock.end)


def panels(
    titles: Sequence[str],
    *,
    narrow: bool,
    columns: int = 1,
    height_pt: float | Sequence[float] = 120.0,
    lanes_pt: float = 3.0,
    left_pt: float = LEFT_PT,
    right_pt: float = RIGHT_PT,
    labels_pt: float = LABELS_PT,
) -> tuple[Figure, list[Axes], float]:
    """Return a figure of titled panels, their axes and the width of a panel in points.

    `height_pt` is that of all panels, or of each row of them; `lanes_pt` is kept free between the titles of the first
    row and its panels, `labels_pt` below every panel for what stands under its axis.
    """
    columns = 1 if narrow else columns
    rows = math.ceil(len(titles) / columns)
    width = NARROW_PT if narrow else WIDE_PT
    plot = (width - GUTTER_PT * (columns - 1)) / columns - left_pt - right_pt
    heights = [height_pt] * rows if isinstance(height_pt, int | float) else list(height_pt)
    between = BOTTOM_PT - LABELS_PT + labels_pt
    height = sum(heights) + rows * TITLE_PT + (rows - 1) * between + labels_pt + lanes_pt
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    made = []
    for index, title in enumerate(titles):
        row, column = divmod(index, columns)
        left = column * (plot + left_pt + right_pt + GUTTER_PT) + left_pt
        bottom = height - lanes_pt - (row + 1) * TITLE_PT - sum(heights[: row + 1]) - row * between
        axes = figure.add_axes((left / width, bottom / height, plot / width, heights[row] / height), facecolor="none")
        dress(axes)
        top = bottom + heights[row] + (lanes_pt if row == 0 else 0)
        figure.text((left - left_pt) / width, (top + 9) / height, title, color=INK, size=TEXT_PT, weight="bold")
        made.append(axes)
    return figure, made, plot


def sheet(
    clock: Clock,
    titles: Sequence[str],
    *,
    narrow: bool,
    columns: int = 1,
    height_pt: float | Sequence[float] = 120.0,
    named_faults: bool = True,
    shade: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels on the common time axis, phases and fault windows already marked."""
    columns = 1 if narrow else columns
    width = NARROW_PT if narrow else WIDE_PT
    plot = (width - GUTTER_PT * (columns - 1)) / columns - LEFT_PT - RIGHT_PT
    span = clock.end - clock.start
    windows = [(fault, window) for fault in clock.faults if (window := window_of(fault, clock))]
    phase_labels = pack(
        [((phase.start - clock.start) / span * plot, phase.name) for phase in clock.phases], plot, centred=False
    )
    fault_labels = pack(
        [
            (((start + end) / 2 - clock.start) / span * plot, fault.label)
            for fault, (start, end, _) in sorted(windows, key=lambda item: item[1][0])
        ]
        if named_faults
        else [],
        plot,
        centred=True,
    )
    phase_rows = max((row for _, row, _ in phase_labels), default=-1) + 1
    fault_rows = max((row for _, row, _ in fault_labels), default=-1) + 1
    lanes = (phase_rows + fault_rows) * LANE_PT + 3
    figure, made, _ = panels(titles, narrow=narrow, columns=columns, height_pt=height_pt, lanes_pt=lanes)
    height = figure.get_figheight() * 72
    for index, axes in enumerate(made):
        on_time_axis(axes, clock, narrow=narrow or columns > 1)
        if index < columns:
            box = axes.get_position()
            left, top = box.x0 * width, box.y1 * height + lanes
            for at, lane, text in phase_labels:
                y = top - (lane + 1) * LANE_PT + 2
                figure.text((left + at) / width, y / height, text, color=MUTED, size=SMALL_PT)
            for at, lane, text in fault_labels:
                y = top - (phase_rows + lane + 1) * LANE_PT + 2
                figure.text((left + at) / width, y / height, text, color=FAULT_INK, size=SMALL_PT)
        for colour, spans in (
            (FAULT, [(start, end - start) for _, (start, end, _) in windows]),
            (FAULT_SOFT, [(end, after - end) for _, (_, end, after) in windows if after > end]),
        ):
            if shade and spans:
                whole_height = axes.get_xaxis_transform()
                axes.broken_barh(spans, (0, 1), transform=whole_height, facecolor=colour, linewidth=0, zorder=0)
        for phase in clock.phases:
            if phase.start > clock.start:
                axes.axvline(phase.start, color=AXIS, linewidth=0.6, dashes=(2, 2), zorder=1)
    return figure, made


def dress(axes: Axes) -> None:
    """Give axes the look of the page: a grid of horizontal lines, one axis line at the bottom."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.spines["bottom"].set_linewidth(0.8)
    axes.tick_params(axis="x", color=AXIS, labelcolor=MUTED, labelsize=SMALL_PT, length=3, width=0.8, pad=2)
    axes.tick_params(axis="y", length=0, labelcolor=MUTED, labelsize=SMALL_PT, pad=3)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(float(value))))


def on_time_axis(axes: Axes, clock: Clock, *, narrow: bool) -> None:
    """Let the horizontal axis be the clock's time."""
    axes.set_xlim(clock.start, clock.end)
    span = clock.end - clock.start
    step = next((size for size in TICK_SECONDS if span / size <= (5 if narrow else 10)), span)
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(clock_label(clock)))


def clock_label(clock: Clock) -> Callable[[float, int | None], str]:
    """Return the form of the time axis: seconds of a short run, minutes:seconds or hours:minutes of a long."""

    def label(value: float, _: int | None) -> str:
        whole = round(value)
        if clock.end - clock.start <= 300:
            return f"{whole}{NBSP}s"
        if clock.end - clock.start <= 7200:
            return f"{whole // 60}:{whole % 60:02d}"
        return f"{whole // 3600}:{whole // 60 % 60:02d}{NBSP}h"

    return label


def from_zero(axes: Axes, *columns: Sequence[float | None], room: float = 1.06) -> None:
    """Let the vertical axis reach from zero to a little above the largest value."""
    top = largest(value for column in columns for value in column)
    axes.set_ylim(0, (top or 1.0) * room)


def fault_keys(clock: Clock) -> list[Key]:
    """Return the legend of the fault windows, if any is on the axis."""
    return FAULT_KEYS if any(window_of(fault, clock) for fault in clock.faults) else []


def latency_label(value: float, _: int | None = None) -> str:
    """Return a latency in milliseconds with its unit, from a second on in seconds."""
    return f"{number(value / 1000)}{NBSP}s" if value >= 1000 else f"{number(value)}{NBSP}ms"
