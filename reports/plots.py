"""Draws what a run did over time: faults, throughput, latency, availability, backlogs, generator and machine."""

import math

import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter, NullLocator

from reports.folder import RunFolder
from reports.sheets import (
    AREAS,
    AXIS,
    BAD,
    COLOURS,
    DASHES,
    FAULT_BAR,
    GLYPH_EM,
    INK,
    LEFT_PT,
    MUTED,
    NARROW_PT,
    PAPER,
    RIGHT_PT,
    TEXT_PT,
    WARN,
    WIDE_PT,
    Key,
    Plot,
    css_dashes,
    fault_keys,
    from_zero,
    latency_label,
    make_plot,
    sheet,
    window_of,
)
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

MAX_FAULT_ROWS = 24


def draw_faults(clock: Clock) -> Plot | None:
    """Draw one row a fault: asked for, effect measured, healed, recovered."""
    faults = [fault for fault in clock.faults if moments_of(fault)][:MAX_FAULT_ROWS]
    if not faults:
        return None

    def draw(narrow: bool) -> Figure:
        row_pt = 23.0
        figure, [axes] = sheet(
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
            window = window_of(fault, clock)
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
        + (f"{seconds(w[0])} to {seconds(w[1])}" if (w := window_of(fault, clock)) else "no effect measured")
        for fault in faults
    )
    return make_plot("faults", draw, legend, f"Time line of the faults. {told}.")


def draw_throughput(attempts: pl.DataFrame, clock: Clock) -> Plot:
    """Draw attempts due, answers and acknowledged bets per second."""
    frame = throughput(attempts, clock)
    t = frame["t"].to_list()

    def draw(narrow: bool) -> Figure:
        figure, [axes] = sheet(clock, ["Per second"], narrow=narrow, height_pt=130 if narrow else 160)
        axes.plot(t, frame["due"].to_list(), color=MUTED, linewidth=0.9, drawstyle="steps-mid", linestyle=DASHES[2])
        axes.plot(t, frame["ok"].to_list(), color=COLOURS[0], linewidth=1.4)
        axes.plot(t, frame["bets"].to_list(), color=COLOURS[1], linewidth=1.4)
        from_zero(axes, frame["due"].to_list(), frame["ok"].to_list())
        return figure

    loaded = frame.filter(pl.col("due") > 0)["bets"]
    text = f"Throughput over time. Acknowledged bets per second under load: median {integer(_median(loaded))}."
    legend = [
        Key("line", "--muted", "attempts due", css_dashes(2)),
        Key("line", "--c1", "attempts that succeeded"),
        Key("line", "--c2", "of these, acknowledged bets"),
        *fault_keys(clock),
    ]
    return make_plot("throughput", draw, legend, text)


def _median(values: pl.Series) -> float | None:
    median = values.median()
    return float(median) if isinstance(median, int | float) else None


def draw_latency(attempts: pl.DataFrame, clock: Clock) -> Plot | None:
    """Draw p50 and p99 of each class of operations on one logarithmic scale."""
    classes = latency(attempts, clock)
    if not classes:
        return None
    everything = [value for frame in classes.values() for column in ("p50", "p99") for value in frame[column] if value]
    low = 10 ** math.floor(math.log10(max(min(everything, default=1.0), 0.1)))
    high = 10 ** math.ceil(math.log10(max(max(everything, default=10.0), low * 10)))

    def draw(narrow: bool) -> Figure:
        figure, panels = sheet(clock, list(classes), narrow=narrow, columns=2 if len(classes) > 1 else 1, height_pt=108)
        for axes, frame in zip(panels, classes.values(), strict=True):
            t = frame["t"].to_list()
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            axes.yaxis.set_major_locator(LogLocator(base=10, numticks=6))
            axes.yaxis.set_major_formatter(FuncFormatter(latency_label))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_minor_locator(NullLocator())
            axes.plot(t, _with_holes(frame["p99"]), color=COLOURS[1], linewidth=1.4)
            axes.plot(t, _with_holes(frame["p50"]), color=COLOURS[0], linewidth=1.4)
        return figure

    worst = ", ".join(
        f"{name} {latency_label(top)}" for name, frame in classes.items() if (top := largest(frame["p99"]))
    )
    legend = [
        Key("line", "--c2", "p99: 99 of 100 answers were faster"),
        Key("line", "--c1", "p50: half were faster"),
        *fault_keys(clock),
    ]
    return make_plot("latency", draw, legend, f"Latency over time. Highest p99 of one interval: {worst}.")


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
        figure, [share, errors] = sheet(
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
        from_zero(errors, both, [4.0])
        return figure

    legend = [
        Key("line", "--c1", "answered"),
        Key("area", "--warn", "unavailable: certainly not done"),
        Key("area", "--bad", "unknown: may have been done"),
        *fault_keys(clock),
    ]
    text = f"Availability over time. Lowest share of one interval: {number(lowest)}{NBSP}%."
    return make_plot("availability", draw, legend, text)


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
            figure, [axes] = sheet(clock, [title], narrow=narrow, height_pt=110)
            for index, frame in enumerate(lines.values()):
                axes.plot(
                    frame["t"].to_list(),
                    frame["value"].to_list(),
                    color=COLOURS[index],
                    linewidth=1.4,
                    linestyle=DASHES[index],
                )
            from_zero(axes, *(frame["value"].to_list() for frame in lines.values()), [10.0])
            return figure

        peaks = ", ".join(f"{node or 'all'} {integer(largest(frame['value']))}" for node, frame in lines.items())
        legend = [
            *(Key("line", f"--c{index + 1}", node or "all", css_dashes(index)) for index, node in enumerate(lines)),
            *fault_keys(clock),
        ]
        plots.append(make_plot(slug, draw, legend, f"{title}. Highest backlog by {who}: {peaks}."))
    return plots


def draw_generator(series: pl.DataFrame, clock: Clock) -> Plot | None:
    """Draw how late the load generator was and how many requests were under way."""
    lag = samples(series, "generator_lag_ms", clock, limit=2)
    flight = samples(series, "in_flight", clock, limit=2)
    parts = [(title, lines) for title, lines in (("Generator lag, ms", lag), ("Requests under way", flight)) if lines]
    if not parts:
        return None

    def draw(narrow: bool) -> Figure:
        figure, panels = sheet(clock, [title for title, _ in parts], narrow=narrow, columns=len(parts), height_pt=84)
        for axes, (_, lines) in zip(panels, parts, strict=True):
            for index, frame in enumerate(lines.values()):
                axes.plot(frame["t"].to_list(), frame["value"].to_list(), color=COLOURS[index], linewidth=1.2)
            from_zero(axes, *(frame["value"].to_list() for frame in lines.values()), [1.0])
        return figure

    peaks = "; ".join(
        f"{title}: highest {number(largest(value for frame in lines.values() for value in frame['value']))}"
        for title, lines in parts
    )
    return make_plot("generator", draw, fault_keys(clock), f"Load generator over time. {peaks}.")


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
        figure, panels = sheet(clock, [title for title, _ in parts], narrow=narrow, columns=len(parts), height_pt=110)
        for axes, (_, kinds) in zip(panels, parts, strict=True):
            axes.stackplot(t, *layers(kinds), colors=AREAS, edgecolor=PAPER, linewidth=0.5, zorder=2)
            from_zero(axes, [sum(column) for column in zip(*layers(kinds), strict=True)])
        return figure

    peaks = "; ".join(
        f"{title}: highest sum {number(largest(sum(column) for column in zip(*kinds.values(), strict=True)), 2)}"
        for title, kinds in parts
    )
    legend = [Key("area", f"--a{index}", name) for index, name in enumerate(names, 1)]
    return make_plot("resources", draw, [*legend, *fault_keys(clock)], f"Use of the machine over time. {peaks}.")


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
