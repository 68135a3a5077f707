"""Draws what a load found: arrivals, a heat map of latencies, percentile curves, the generator's lag, the knee."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from reports.folder import RunFolder
from reports.load_tallies import TICKS, Curve, bins_of, curve_of, curves, load_clock, place, steps_of
from reports.loads import Knee, Load, Window
from reports.sheets import (
    AXIS,
    BAD,
    COLOURS,
    DASHES,
    GRID,
    HEAT,
    INK,
    MUTED,
    SMALL_PT,
    WARN,
    Key,
    Plot,
    css_dashes,
    fault_keys,
    from_zero,
    latency_label,
    make_plot,
    panels,
    sheet,
)
from reports.tallies import MAX_BINS, Clock
from reports.words import integer, plural

HEAT_BINS = 150
"""Columns of the heat map: each is still wider than a pixel on a phone."""
HEAT_ROW_PT = 9.0
RATE_TICKS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
LIMIT_DASHES = (0, (4, 2))


def load_plots(run: RunFolder, lag_limit_ms: float) -> dict[str, Plot]:
    """Return every figure of a load that the run has data for, by name."""
    found: list[Plot | None] = [draw_knee(run.knee)] if run.knee is not None else []
    if run.load is not None:
        faults = run.verdict.faults
        found += [
            draw_arrivals(run.load, load_clock(run.load, faults, MAX_BINS)),
            draw_heat(run.load, load_clock(run.load, faults, HEAT_BINS)),
            draw_percentiles(run.load),
            draw_lag_curve(run.load, lag_limit_ms),
        ]
    return {plot.name: plot for plot in found if plot is not None}


def draw_arrivals(load: Load, clock: Clock) -> Plot | None:
    """Draw the arrivals due, sent and answered per second, and those that were not."""
    if not load.told.seconds:
        return None
    bins = bins_of(load, clock)
    lost = bins.dropped + bins.unanswered
    titles = ["Arrivals due in each second", *(["Of these dropped or without an answer"] if lost.any() else [])]

    def draw(narrow: bool) -> Figure:
        figure, made = sheet(clock, titles, narrow=narrow, height_pt=[130 if narrow else 160, 60][: len(titles)])
        rates = made[0]
        due = bins.per_second(bins.due)
        rates.stairs(due, bins.edges, baseline=None, color=MUTED, linewidth=0.9, linestyle=DASHES[2])
        rates.stairs(bins.per_second(bins.sent), bins.edges, baseline=None, color=COLOURS[1], linewidth=1.2)
        rates.stairs(
            bins.per_second(bins.answered), bins.edges, baseline=None, color=COLOURS[0], linewidth=1.2, zorder=3
        )
        from_zero(rates, due)
        if len(made) > 1:
            dropped, both = bins.per_second(bins.dropped), bins.per_second(lost)
            made[1].stairs(both, bins.edges, baseline=dropped, fill=True, facecolor=BAD, linewidth=0, zorder=2)
            made[1].stairs(dropped, bins.edges, fill=True, facecolor=WARN, linewidth=0, zorder=2)
            from_zero(made[1], both, [1.0])
        return figure

    legend = [
        Key("line", "--muted", "due", css_dashes(2)),
        Key("line", "--c2", "sent (hidden where all were answered)"),
        Key("line", "--c1", "answered, whenever the answer came"),
    ]
    if lost.any():
        legend += [Key("area", "--warn", "dropped: never sent"), Key("area", "--bad", "sent, without an answer")]
    text = (
        f"Arrivals by the second in which they were due: {integer(bins.due.sum())} due, {integer(bins.sent.sum())} "
        f"sent, {integer(bins.answered.sum())} answered."
    )
    return make_plot("load-arrivals", draw, [*legend, *fault_keys(clock)], text)


def draw_heat(load: Load, clock: Clock) -> Plot | None:
    """Draw how many answers took how long, by the time at which their arrivals were due."""
    bins = bins_of(load, clock)
    bounds = load.told.coarse_ms
    filled = np.flatnonzero(bins.latencies.sum(axis=0))
    if not bounds or not len(filled):
        return None
    # A row of room on either side shows that there is nothing beyond.
    first, last = max(0, int(filled[0]) - 1), min(len(bounds), int(filled[-1]) + 1)
    steps = steps_of(float(bins.latencies.max()), len(HEAT))
    shades = [round(index * (len(HEAT) - 1) / max(1, len(steps) - 1)) for index in range(len(steps))]
    step = np.searchsorted(steps, bins.latencies, side="right") - 1

    def draw(narrow: bool) -> Figure:
        figure, [axes] = sheet(
            clock, ["Answers by latency"], narrow=narrow, height_pt=max(5, last - first + 1) * HEAT_ROW_PT
        )
        for index, shade in enumerate(shades):
            boxes = _boxes(step[:, first : last + 1] == index, bins.edges, first)
            if boxes:
                outline = Outline.make_compound_path_from_polys(np.array(boxes))
                axes.add_patch(PathPatch(outline, facecolor=HEAT[shade], linewidth=0, antialiased=False, zorder=2))
        axes.set_ylim(first, last + 1)
        axes.yaxis.set_major_locator(FixedLocator([index + 1 for index in _labelled(bounds, first, last)]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda at, _: latency_label(bounds[round(at) - 1])))
        for phase in clock.phases:
            if phase.start > clock.start:
                # Over the cells: a border of phases has to be seen where answers are dense.
                axes.axvline(phase.start, color=INK, linewidth=0.7, dashes=(2, 2), zorder=4)
        return figure

    ends = [*(start - 1 for start in steps[1:]), None]
    legend = [
        Key("area", f"--h{shade + 1}", _range(start, end))
        for shade, start, end in zip(shades, steps, ends, strict=True)
    ]
    first_range = legend[0].text
    legend[0] = replace(legend[0], text=f"{first_range} {'answer' if first_range == '1' else 'answers'}")
    slowest = f"more than {latency_label(bounds[-1])}" if filled[-1] >= len(bounds) else _class(bounds, int(filled[-1]))
    text = (
        f"Heat map of latencies over time, {plural(int(bins.latencies.sum()), 'answer')}. "
        f"Fastest class with answers: {_class(bounds, int(filled[0]))}; slowest: {slowest}."
    )
    return make_plot("load-heat", draw, [*legend, *fault_keys(clock)], text)


def _boxes(
    wanted: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]", edges: list[float], first: int
) -> list[list[tuple[float, float]]]:
    """Return the corners of the cells that are wanted; neighbours in a row become one box."""
    found = []
    for row in range(wanted.shape[1]):
        padded = np.concatenate([[0], wanted[:, row].astype(np.int8), [0]])
        change = np.flatnonzero(np.diff(padded))
        # A little less than its class in height: thin lines between the rows guide the eye.
        low, high = first + row + 0.04, first + row + 0.96
        for start, end in zip(change[::2], change[1::2], strict=True):
            left, right = edges[int(start)], edges[int(end)]
            found.append([(left, low), (right, low), (right, high), (left, high)])
    return found


def _labelled(bounds: Sequence[int], first: int, last: int) -> list[int]:
    """Return which class bounds get a label: 1, 3, 10, 30 … if the classes have enough of them, else every third."""
    inside = [index for index in range(len(bounds)) if first <= index < last]
    round_ones = [index for index in inside if str(bounds[index]).rstrip("0") in {"1", "3"}]
    return round_ones if len(round_ones) > 1 else inside[::3]


def _class(bounds: Sequence[int], index: int) -> str:
    if index >= len(bounds):
        return f"more than {latency_label(bounds[-1])}"
    return f"up to {latency_label(bounds[index])}"


def _range(start: int, end: int | None) -> str:
    if end is None:
        return f"{integer(start)} or more"
    return integer(start) if start == end else f"{integer(start)} to {integer(end)}"


def on_percentile_axis(axes: Axes, last: float) -> None:
    """Let the horizontal axis be that of percentiles, each further nine as wide as the one before."""
    axes.set_xlim(0, max(last, place(99.0)) * 1.02)
    shown = [tick for tick in TICKS if place(tick) <= max(last, place(99.0)) + 0.01]
    axes.xaxis.set_major_locator(FixedLocator([place(tick) for tick in shown]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"p{100 * (1 - 10**-at):.5g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, axis="x", color=GRID, linewidth=0.6)


def on_latency_axis(axes: Axes, values: Sequence[float]) -> None:
    """Let the vertical axis be a logarithmic one of latencies that holds the values, between two of 1, 3, 10, 30 …."""
    known = [value for value in values if value > 0]
    low, high = _rounded(min(known, default=1.0), math.floor), _rounded(max(known, default=10.0), math.ceil)
    axes.set_yscale("log")
    axes.set_ylim(low, max(high, 10 * low))
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(latency_label))
    axes.yaxis.set_minor_locator(NullLocator())


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """Return the next of 0.01, 0.03, 0.1, 0.3, 1 … below or above a value."""
    half = towards(2 * math.log10(max(value, 0.001)))
    return float(10 ** (half // 2) * (3 if half % 2 else 1))


def draw_curve(axes: Axes, curve: Curve, index: int, *, dodge: float = 0.0) -> None:
    """Draw one curve; where samples are too few to bound a percentile it is thin, where answers lack it goes up."""
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    sure = max(1, curve.sure)
    axes.plot(curve.at[:sure], curve.ms[:sure], color=colour, linewidth=1.5, linestyle=dashes, zorder=3)
    axes.plot(curve.at[sure - 1 :], curve.ms[sure - 1 :], color=colour, linewidth=0.6, zorder=3)
    top = axes.get_ylim()[1]
    if curve.lost_at is not None:
        axes.plot([curve.lost_at] * 2, [curve.ms[-1], top], color=colour, linewidth=0.9, linestyle=(0, (1, 1)))
        axes.plot(curve.lost_at, top, marker="^", markersize=5, color=colour, clip_on=False, zorder=5)
    for each in curve.estimates:
        if each.low_ms is not None:
            at = place(each.percentile) + dodge
            high = top if each.high_ms is None else each.high_ms
            axes.plot([at, at], [each.low_ms, high], color=colour, linewidth=3, alpha=0.35, zorder=2)


def curve_values(found: Sequence[Curve]) -> list[float]:
    """Return every latency that an axis for some curves has to hold."""
    bounds = [b for c in found for e in c.estimates for b in (e.low_ms, e.high_ms) if b is not None]
    return [*bounds, *(value for curve in found for value in curve.ms)]


def draw_percentiles(load: Load) -> Plot | None:
    """Draw latency over percentile, a panel for each phase and a curve for each operation."""
    found = curves(load)
    if not found:
        return None
    names = list(dict.fromkeys(curve.name for _, made in found for curve in made))
    every = [curve for _, made in found for curve in made]
    last = max(curve.at[-1] for curve in every)

    def draw(narrow: bool) -> Figure:
        columns = 2 if len(found) > 1 else 1
        figure, made, _ = panels(
            [f"{name}: latency over percentile" for name, _ in found],
            narrow=narrow,
            columns=columns,
            height_pt=190 if narrow or columns > 1 else 220,
        )
        for axes, (_, own) in zip(made, found, strict=True):
            on_percentile_axis(axes, last)
            on_latency_axis(axes, curve_values(every))
            for curve in own:
                index = names.index(curve.name)
                draw_curve(axes, curve, index, dodge=(index - (len(names) - 1) / 2) * 0.007 * last)
        return figure

    legend = [Key("line", f"--c{index + 1}", name, css_dashes(index)) for index, name in enumerate(names)]
    legend += curve_keys(every)
    text = "Percentile curves. " + "; ".join(
        f"{phase}: " + ", ".join(f"{curve.name} reach {latency_label(curve.ms[-1])}" for curve in made)
        for phase, made in found
    )
    return make_plot("load-percentiles", draw, legend, text + ".")


def curve_keys(found: Sequence[Curve]) -> list[Key]:
    """Return what the marks of some curves mean, as far as they occur."""
    keys = []
    if any(each.low_ms is not None for curve in found for each in curve.estimates):
        keys.append(Key("bar-upright", "--muted", "95 % interval of p50, p90, p95, p99, p99.9"))
    if any(curve.sure < len(curve.at) for curve in found):
        keys.append(Key("thin", "--muted", "thin: too few samples to bound it"))
    if any(curve.lost_at is not None for curve in found):
        keys.append(Key("up", "--muted", "the rest has no answer"))
    return keys


def draw_lag_curve(load: Load, limit_ms: float) -> Plot | None:
    """Draw how late the generator was over percentile, and the gate at p99."""
    curve = curve_of("lag", load.lags, 0)
    if curve is None:
        return None
    p99 = load.lags.at_ms(max(1, round(load.lags.total * 0.99))) or 0.001
    kept = p99 <= limit_ms

    def draw(narrow: bool) -> Figure:
        figure, [axes], _ = panels(
            ["How late arrivals were sent, over percentile"], narrow=narrow, height_pt=130 if narrow else 150
        )
        on_percentile_axis(axes, curve.at[-1])
        on_latency_axis(axes, [*curve.ms, limit_ms])
        draw_curve(axes, curve, 0)
        # The gate is a corner: only the lag at p99 is judged.
        axes.plot([0, place(99.0)], [limit_ms] * 2, color=BAD, linewidth=1.2, linestyle=LIMIT_DASHES, zorder=2)
        axes.plot([place(99.0)] * 2, [limit_ms, axes.get_ylim()[1]], color=BAD, linewidth=1.2, linestyle=LIMIT_DASHES)
        axes.plot(place(99.0), p99, marker="o" if kept else "X", markersize=6, color=INK if kept else BAD, zorder=6)
        axes.annotate(
            f"limit {latency_label(limit_ms)} at p99",
            (0, limit_ms),
            xytext=(4, 4),
            textcoords="offset points",
            color=BAD,
            size=SMALL_PT,
        )
        return figure

    legend = [
        Key("line", "--c1", "lag of the arrivals sent"),
        Key("line", "--bad", "the gate: the curve must pass below its corner", "8 4"),
        Key("dot", "--ink", f"lag at p99: {latency_label(p99)}")
        if kept
        else Key("cross", "--bad", f"lag at p99: {latency_label(p99)}, too late"),
        *curve_keys([curve]),
    ]
    text = f"Lag of the generator over percentile: {latency_label(p99)} at p99, the limit is {latency_label(limit_ms)}."
    return make_plot("load-lag", draw, legend, text)


def draw_knee(knee: Knee) -> Plot | None:
    """Draw p99 with its interval against the rate of each window, the limit and the bracket of the knee."""
    known = [window for window in knee.windows if window.p99_ms is not None or window.held is False]
    if not any(window.p99_ms is not None for window in known):
        return None
    bounds = [b for w in known for b in (w.p99_ms, w.low_ms, w.high_ms, knee.p99_ms) if b is not None]
    rates = [window.rate for window in known]

    def draw(narrow: bool) -> Figure:
        figure, [axes], width = panels(
            ["p99 of each window over its rate, arrivals per second"],
            narrow=narrow,
            height_pt=150 if narrow else 190,
            lanes_pt=15,
        )
        axes.set_xscale("log")
        axes.set_xlim(min(rates) / 1.12, max(rates) * 1.12)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=RATE_TICKS[::2] if narrow else RATE_TICKS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{integer(rate)}/s"))
        axes.xaxis.set_minor_locator(NullLocator())
        on_latency_axis(axes, bounds)
        if knee.p99_ms is not None:
            axes.axhline(knee.p99_ms, color=BAD, linewidth=1.2, linestyle=LIMIT_DASHES, zorder=2)
        if knee.holds is not None and knee.fails is not None:
            axes.axvspan(knee.holds, knee.fails, color=GRID, linewidth=0, zorder=0)
            for edge in (knee.holds, knee.fails):
                axes.axvline(edge, color=AXIS, linewidth=0.8, zorder=1)
            if knee.knee is not None:
                _above(axes, knee.knee, f"knee {integer(knee.knee)}/s", width)
        for window in known:
            _draw_window(axes, window)
        return figure

    shapes = {True: Key("dot", "--c3", "held"), False: Key("cross", "--bad", "did not hold")}
    legend = [key for held, key in shapes.items() if any(window.held is held for window in known)]
    if any(window.p99_ms is None for window in known):
        legend.append(Key("cross", "--bad", "at the upper edge: p99 lies among those without an answer"))
    if any(window.held is None for window in known):
        legend.append(Key("hollow", "--muted", "proves nothing"))
    if knee.p99_ms is not None:
        legend.append(Key("line", "--bad", f"limit of p99: {latency_label(knee.p99_ms)}", "8 4"))
    if knee.knee is not None:
        legend.append(Key("area", "--grid", "between the highest rate that held and the lowest that did not"))
    legend.append(Key("bar-upright", "--muted", "95 % interval"))
    return make_plot("load-knee", draw, legend, f"Search for the knee: {knee.text or 'no words were recorded'}.")


def _above(axes: Axes, at: float, text: str, width_pt: float) -> None:
    """Write a text over the panel at a place of its logarithmic axis, kept within the panel."""
    low, high = (math.log(edge) for edge in axes.get_xlim())
    half = len(text) * SMALL_PT * 0.3 / width_pt
    share = min(max((math.log(at) - low) / (high - low), half), 1 - half)
    axes.annotate(
        text,
        (share, 1),
        xycoords="axes fraction",
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        color=INK,
        size=SMALL_PT,
    )


def _draw_window(axes: Axes, window: Window) -> None:
    top = axes.get_ylim()[1]
    colour = {True: COLOURS[2], False: BAD, None: MUTED}[window.held]
    if window.low_ms is not None:
        high = top if window.high_ms is None else window.high_ms
        axes.plot([window.rate] * 2, [window.low_ms, high], color=colour, linewidth=3, alpha=0.35, zorder=2)
    # A p99 among those without an answer is beyond every scale.
    at = top if window.p99_ms is None else window.p99_ms
    marker = {True: "o", False: "X", None: "D"}[window.held]
    fill = "none" if window.held is None else "full"
    axes.plot(window.rate, at, marker=marker, fillstyle=fill, markersize=6, color=colour, zorder=5, clip_on=False)
