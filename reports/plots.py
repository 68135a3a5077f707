"""Draws the figures of the page as inline SVG: one wide and one narrow drawing of each.

Colours are drawn as sentinel values and then replaced by CSS variables, so that one drawing serves light,
dark and paper. Text stays text (the reader's own font, selectable, readable by a screen reader); it is laid
out with DejaVu Sans, which is wider than what most readers have, so it never collides where this does not.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, NullLocator

from reports.folder import Fault, RunFolder
from reports.tallies import (
    Clock,
    availability,
    kinds_over_time,
    largest,
    latency,
    moments_of,
    samples,
    throughput,
    under_load,
)
from reports.words import NBSP, integer, number, seconds

INK, MUTED, GRID, AXIS, PAPER = "#01a001", "#01a002", "#01a003", "#01a004", "#01a009"
FAULT, FAULT_SOFT, FAULT_INK = "#01a005", "#01a006", "#01a007"
COLOURS = ("#01a011", "#01a012", "#01a013", "#01a014", "#01a015", "#01a016")
FAULT_BAR = "#01a008"
AREAS = ("#01a021", "#01a022", "#01a023", "#01a024", "#01a025", "#01a026")
BAD, WARN = "#01a031", "#01a032"
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


def _css(index: int) -> str:
    """Return the dashes of a line as CSS, in units of its width."""
    dashes = DASHES[index]
    return "" if isinstance(dashes, str) else " ".join(f"{2 * length:g}" for length in dashes[1])


WIDE_PT, NARROW_PT = 720.0, 276.0
"""Widths of the two drawings: 960 and 368 CSS pixels, the widths of the text column they stand in."""
LEFT_PT, RIGHT_PT, TITLE_PT, LANE_PT = 38.0, 9.0, 21.0, 11.5
LABELS_PT, BOTTOM_PT = 15.0, 25.0
"""Room below the last row of panels, for its time axis, and below the rows above it."""
TEXT_PT, SMALL_PT = 9.0, 8.25
GLYPH_EM = 0.6
"""Mean width of a glyph of DejaVu Sans in its own size, a little generous."""
TICK_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
MAX_FAULT_ROWS = 24
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


def _svg(name: str, figure: Figure) -> str:
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


def _plot(name: str, draw: Callable[[bool], Figure], legend: list[Key], description: str) -> Plot:
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
        wide = _svg(f"{name}-w", draw(False))
        narrow = _svg(f"{name}-n", draw(True))
    return Plot(name, wide, narrow, legend, description)


def _pack(labels: Sequence[tuple[float, str]], plot_pt: float, *, centred: bool) -> list[tuple[float, int, str]]:
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


def _window(fault: Fault, clock: Clock) -> tuple[float, float, float] | None:
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


def _sheet(
    clock: Clock,
    titles: Sequence[str],
    *,
    narrow: bool,
    columns: int = 1,
    height_pt: float = 120.0,
    named_faults: bool = True,
    shade: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels on the common time axis, phases and fault windows already marked."""
    columns = 1 if narrow else columns
    rows = math.ceil(len(titles) / columns)
    width = NARROW_PT if narrow else WIDE_PT
    gutter = 14.0 if columns > 1 else 0.0
    plot = (width - gutter * (columns - 1)) / columns - LEFT_PT - RIGHT_PT
    span = clock.end - clock.start
    windows = [(fault, window) for fault in clock.faults if (window := _window(fault, clock))]
    phase_labels = _pack(
        [((phase.start - clock.start) / span * plot, phase.name) for phase in clock.phases], plot, centred=False
    )
    fault_labels = _pack(
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
    height = rows * (TITLE_PT + height_pt + BOTTOM_PT) - BOTTOM_PT + LABELS_PT + lanes
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    panels = []
    for index, title in enumerate(titles):
        row, column = divmod(index, columns)
        left = column * (plot + LEFT_PT + RIGHT_PT + gutter) + LEFT_PT
        bottom = height - lanes - (row + 1) * (TITLE_PT + height_pt) - row * BOTTOM_PT
        axes = figure.add_axes((left / width, bottom / height, plot / width, height_pt / height), facecolor="none")
        _dress(axes, clock, narrow=narrow or columns > 1)
        top = bottom + height_pt + (lanes if row == 0 else 0)
        figure.text((left - LEFT_PT) / width, (top + 9) / height, title, color=INK, size=TEXT_PT, weight="bold")
        if row == 0:
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
        panels.append(axes)
    return figure, panels


def _dress(axes: Axes, clock: Clock, *, narrow: bool) -> None:
    axes.set_xlim(clock.start, clock.end)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.spines["bottom"].set_linewidth(0.8)
    axes.tick_params(axis="x", color=AXIS, labelcolor=MUTED, labelsize=SMALL_PT, length=3, width=0.8, pad=2)
    axes.tick_params(axis="y", length=0, labelcolor=MUTED, labelsize=SMALL_PT, pad=3)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    span = clock.end - clock.start
    step = next((size for size in TICK_SECONDS if span / size <= (5 if narrow else 10)), span)
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(_clock_label(clock)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(float(value))))


def _clock_label(clock: Clock) -> Callable[[float, int | None], str]:
    """Return the form of the time axis: seconds of a short run, minutes:seconds or hours:minutes of a long."""

    def label(value: float, _: int | None) -> str:
        whole = round(value)
        if clock.end - clock.start <= 300:
            return f"{whole}{NBSP}s"
        if clock.end - clock.start <= 7200:
            return f"{whole // 60}:{whole % 60:02d}"
        return f"{whole // 3600}:{whole // 60 % 60:02d}{NBSP}h"

    return label


def _from_zero(axes: Axes, *columns: Sequence[float | None], room: float = 1.06) -> None:
    top = largest(value for column in columns for value in column)
    axes.set_ylim(0, (top or 1.0) * room)


def draw_faults(clock: Clock) -> Plot | None:
    """Draw one row a fault: asked for, effect measured, healed, recovered."""
    faults = [fault for fault in clock.faults if moments_of(fault)][:MAX_FAULT_ROWS]
    if not faults:
        return None

    def draw(narrow: bool) -> Figure:
        row_pt = 23.0
        figure, [axes] = _sheet(
            clock,
            ["What was broken, and when"],
            narrow=narrow,
            height_pt=row_pt * len(faults) + 6,
            named_faults=False,
            shade=False,
        )
        axes.grid(visible=False)
        axes.set_ylim(len(faults) - 0.35, -0.65)
        axes.yaxis.set_major_locator(NullLocator())
        plot_pt = (NARROW_PT if narrow else WIDE_PT) - LEFT_PT - RIGHT_PT
        second_pt = plot_pt / (clock.end - clock.start)
        for row, fault in enumerate(faults):
            known = moments_of(fault)
            first, last = min(known), max(known)
            axes.plot([first, last], [row, row], color=AXIS, linewidth=1, zorder=2)
            window = _window(fault, clock)
            if window:
                axes.barh(row, window[1] - window[0], left=window[0], height=0.46, color=FAULT_BAR, zorder=3)
            if fault.requested_at is not None:
                axes.plot([fault.requested_at] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1, zorder=4)
            if fault.healed_at is not None:
                axes.plot(fault.healed_at, row, marker="D", markersize=4.5, color=INK, zorder=5, clip_on=False)
            if fault.recovered_at is not None:
                axes.plot(
                    fault.recovered_at, row, marker="o", markersize=5.5, color=COLOURS[2], zorder=5, clip_on=False
                )
            text = fault.label if window else f"{fault.label}: no effect measured"
            width = len(text) * TEXT_PT * GLYPH_EM
            left = (first - clock.start) * second_pt > width + 8
            right = (clock.end - last) * second_pt > width + 8
            place = (first, -6, "right") if left or not right else (last, 8, "left")
            axes.annotate(
                text,
                (place[0], row),
                xytext=(place[1], 0),
                textcoords="offset points",
                ha=place[2],
                va="center_baseline",
                color=INK if window else BAD,
                size=TEXT_PT,
            )
        return figure

    legend = [
        Key("tick", "--ink", "asked for"),
        Key("bar", "--fault-bar", "effect measured"),
        Key("diamond", "--ink", "heal asked for"),
        Key("dot", "--c3", "recovered"),
    ]
    told = "; ".join(
        f"{fault.label}: "
        + (f"{seconds(w[0])} to {seconds(w[1])}" if (w := _window(fault, clock)) else "no effect measured")
        for fault in faults
    )
    return _plot("faults", draw, legend, f"Time line of the faults. {told}.")


def draw_throughput(attempts: pl.DataFrame, clock: Clock) -> Plot:
    """Draw attempts due, answers and acknowledged bets per second."""
    frame = throughput(attempts, clock)
    t = frame["t"].to_list()

    def draw(narrow: bool) -> Figure:
        figure, [axes] = _sheet(clock, ["Per second"], narrow=narrow, height_pt=130 if narrow else 160)
        axes.plot(t, frame["due"].to_list(), color=MUTED, linewidth=0.9, drawstyle="steps-mid", linestyle=DASHES[2])
        axes.plot(t, frame["ok"].to_list(), color=COLOURS[0], linewidth=1.4)
        axes.plot(t, frame["bets"].to_list(), color=COLOURS[1], linewidth=1.4)
        _from_zero(axes, frame["due"].to_list(), frame["ok"].to_list())
        return figure

    loaded = frame.filter(pl.col("due") > 0)["bets"]
    text = f"Throughput over time. Acknowledged bets per second under load: median {integer(_median(loaded))}."
    legend = [
        Key("line", "--muted", "attempts due", _css(2)),
        Key("line", "--c1", "attempts that succeeded"),
        Key("line", "--c2", "of these, acknowledged bets"),
        *_fault_keys(clock),
    ]
    return _plot("throughput", draw, legend, text)


def _median(values: pl.Series) -> float | None:
    median = values.median()
    return float(median) if isinstance(median, int | float) else None


def _fault_keys(clock: Clock) -> list[Key]:
    return FAULT_KEYS if any(_window(fault, clock) for fault in clock.faults) else []


def _latency_label(value: float, _: int | None = None) -> str:
    return f"{number(value / 1000)}{NBSP}s" if value >= 1000 else f"{number(value)}{NBSP}ms"


def draw_latency(attempts: pl.DataFrame, clock: Clock) -> Plot | None:
    """Draw p50 and p99 of each class of operations on one logarithmic scale."""
    classes = latency(attempts, clock)
    if not classes:
        return None
    everything = [value for frame in classes.values() for column in ("p50", "p99") for value in frame[column] if value]
    low = 10 ** math.floor(math.log10(max(min(everything, default=1.0), 0.1)))
    high = 10 ** math.ceil(math.log10(max(max(everything, default=10.0), low * 10)))

    def draw(narrow: bool) -> Figure:
        figure, panels = _sheet(
            clock, list(classes), narrow=narrow, columns=2 if len(classes) > 1 else 1, height_pt=108
        )
        for axes, frame in zip(panels, classes.values(), strict=True):
            t = frame["t"].to_list()
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            axes.yaxis.set_major_locator(LogLocator(base=10, numticks=6))
            axes.yaxis.set_major_formatter(FuncFormatter(_latency_label))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_minor_locator(NullLocator())
            axes.plot(t, _with_holes(frame["p99"]), color=COLOURS[1], linewidth=1.4)
            axes.plot(t, _with_holes(frame["p50"]), color=COLOURS[0], linewidth=1.4)
        return figure

    worst = ", ".join(
        f"{name} {_latency_label(top)}" for name, frame in classes.items() if (top := largest(frame["p99"]))
    )
    legend = [
        Key("line", "--c2", "p99: 99 of 100 answers were faster"),
        Key("line", "--c1", "p50: half were faster"),
        *_fault_keys(clock),
    ]
    return _plot("latency", draw, legend, f"Latency over time. Highest p99 of one interval: {worst}.")


def _with_holes(values: pl.Series) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def draw_availability(attempts: pl.DataFrame, clock: Clock) -> Plot:
    """Draw the answered share of the attempts, and below it what the others got."""
    frame = availability(attempts, clock)
    t = frame["t"].to_list()
    edges = [clock.start + index * clock.bin_s for index in range(frame.height + 1)]
    unavailable, unknown = frame["unavailable"].to_list(), frame["unknown"].to_list()
    both = [first + second for first, second in zip(unavailable, unknown, strict=True)]
    lowest = min((value for value in frame["percent"] if value is not None), default=100.0)

    def draw(narrow: bool) -> Figure:
        figure, [share, errors] = _sheet(
            clock,
            ["Answered, percent", "Not answered, attempts per second"],
            narrow=narrow,
            height_pt=84,
        )
        # A scale that begins at zero would hide the difference between 99 and 99.9 per cent.
        step = next(size for size in (0.25, 0.5, 1, 2, 5, 10, 20, 25) if 100 - 4 * size <= lowest)
        share.set_ylim(100 - 4 * step, 100 + step * 0.12)
        share.yaxis.set_major_locator(MultipleLocator(step))
        share.plot(t, _with_holes(frame["percent"]), color=COLOURS[0], linewidth=1.4)
        errors.stairs(both, edges, baseline=unavailable, fill=True, facecolor=BAD, linewidth=0, zorder=2)
        errors.stairs(unavailable, edges, fill=True, facecolor=WARN, linewidth=0, zorder=2)
        _from_zero(errors, both, [4.0])
        return figure

    legend = [
        Key("line", "--c1", "answered"),
        Key("area", "--warn", "unavailable: certainly not done"),
        Key("area", "--bad", "unknown: may have been done"),
        *_fault_keys(clock),
    ]
    text = f"Availability over time. Lowest share of one interval: {number(lowest)}{NBSP}%."
    return _plot("availability", draw, legend, text)


def draw_lag(series: pl.DataFrame, clock: Clock) -> list[Plot]:
    """Draw the backlog of each outbox and the lag of each consumer group, one figure each."""
    plots = []
    for name, slug, title, who in (
        ("outbox_unpublished", "outbox", "Rows not yet in Kafka, per server", "outbox"),
        ("kafka_consumer_lag", "consumers", "Events not yet consumed, per group", "consumer group"),
    ):
        lines = samples(series, name, clock)
        if not lines:
            continue

        def draw(narrow: bool, lines: dict[str, pl.DataFrame] = lines, title: str = title) -> Figure:
            figure, [axes] = _sheet(clock, [title], narrow=narrow, height_pt=110)
            for index, frame in enumerate(lines.values()):
                axes.plot(
                    frame["t"].to_list(),
                    frame["value"].to_list(),
                    color=COLOURS[index],
                    linewidth=1.4,
                    linestyle=DASHES[index],
                )
            _from_zero(axes, *(frame["value"].to_list() for frame in lines.values()), [10.0])
            return figure

        peaks = ", ".join(f"{node or 'all'} {integer(largest(frame['value']))}" for node, frame in lines.items())
        legend = [
            *(Key("line", f"--c{index + 1}", node or "all", _css(index)) for index, node in enumerate(lines)),
            *_fault_keys(clock),
        ]
        plots.append(_plot(slug, draw, legend, f"{title}. Highest backlog by {who}: {peaks}."))
    return plots


def draw_generator(series: pl.DataFrame, clock: Clock) -> Plot | None:
    """Draw how late the load generator was and how many requests were under way."""
    lag = samples(series, "generator_lag_ms", clock, limit=2)
    flight = samples(series, "in_flight", clock, limit=2)
    parts = [(title, lines) for title, lines in (("Generator lag, ms", lag), ("Requests under way", flight)) if lines]
    if not parts:
        return None

    def draw(narrow: bool) -> Figure:
        figure, panels = _sheet(clock, [title for title, _ in parts], narrow=narrow, columns=len(parts), height_pt=84)
        for axes, (_, lines) in zip(panels, parts, strict=True):
            for index, frame in enumerate(lines.values()):
                axes.plot(frame["t"].to_list(), frame["value"].to_list(), color=COLOURS[index], linewidth=1.2)
            _from_zero(axes, *(frame["value"].to_list() for frame in lines.values()), [1.0])
        return figure

    peaks = "; ".join(
        f"{title}: highest {number(largest(value for frame in lines.values() for value in frame['value']))}"
        for title, lines in parts
    )
    return _plot("generator", draw, _fault_keys(clock), f"Load generator over time. {peaks}.")


def draw_resources(series: pl.DataFrame, clock: Clock) -> Plot | None:
    """Draw memory and processor use, stacked by kind of process."""
    parts = [
        (title, kinds)
        for title, name in (("Memory, MB", "rss_mb"), ("Processor, cores", "cpu_seconds"))
        if (kinds := kinds_over_time(series, name, clock))
    ]
    if not parts:
        return None
    weight: dict[str, float] = {}
    for _, kinds in parts:
        whole = sum(map(sum, kinds.values())) or 1.0
        for kind, values in kinds.items():
            weight[kind] = weight.get(kind, 0.0) + sum(values) / whole
    order = sorted(weight, key=lambda kind: -weight[kind])
    shown = order if len(order) <= len(AREAS) else order[: len(AREAS) - 1]
    names = shown if len(shown) == len(order) else [*shown, "the other processes"]
    t = [clock.start + (index + 0.5) * clock.bin_s for index in range(clock.bins)]

    def layers(kinds: dict[str, list[float]]) -> list[list[float]]:
        zero = [0.0] * clock.bins
        rest = [values for kind, values in kinds.items() if kind not in shown]
        result = [kinds.get(kind, zero) for kind in shown]
        if len(names) > len(shown):
            result.append([sum(column) for column in zip(zero, *rest, strict=True)])
        return result

    def draw(narrow: bool) -> Figure:
        figure, panels = _sheet(clock, [title for title, _ in parts], narrow=narrow, columns=len(parts), height_pt=110)
        for axes, (_, kinds) in zip(panels, parts, strict=True):
            axes.stackplot(t, *layers(kinds), colors=AREAS, edgecolor=PAPER, linewidth=0.5, zorder=2)
            _from_zero(axes, [sum(column) for column in zip(*layers(kinds), strict=True)])
        return figure

    peaks = "; ".join(
        f"{title}: highest sum {number(largest(sum(column) for column in zip(*kinds.values(), strict=True)), 2)}"
        for title, kinds in parts
    )
    legend = [Key("area", f"--a{index}", name) for index, name in enumerate(names, 1)]
    return _plot("resources", draw, [*legend, *_fault_keys(clock)], f"Use of the machine over time. {peaks}.")


def draw_all(run: RunFolder, clock: Clock | None) -> dict[str, Plot]:
    """Return every figure that the run has data for, by name."""
    if clock is None:
        return {}
    plots: list[Plot | None] = [draw_faults(clock)]
    if run.attempts is not None:
        attempts = under_load(run.attempts)
        plots += [
            draw_throughput(attempts, clock),
            draw_latency(attempts, clock),
            draw_availability(attempts, clock),
        ]
    if run.series is not None:
        plots += [
            *draw_lag(run.series, clock),
            draw_generator(run.series, clock),
            draw_resources(run.series, clock),
        ]
    return {plot.name: plot for plot in plots if plot is not None}
