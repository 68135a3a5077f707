"""Draws what the models say: policies over time, recovery times against promises, cost over users; and tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter, NullLocator

from reports.plan_page import PARTS
from reports.sheets import (
    BAD,
    COLOURS,
    DASHES,
    GLYPH_EM,
    INK,
    MUTED,
    RIGHT_PT,
    SMALL_PT,
    TEXT_PT,
    Key,
    Plot,
    css_dashes,
    make_plot,
    panels,
)
from reports.tables import Cell, Column, Table, make_table
from reports.words import NBSP, NONE, integer, number
from sim.draws import Floats
from sim.failures import Recovery
from sim.plan import COST_PARTS, Figures
from sim.scaling import Comparison, Role
from sim.scaling_loops import Trace
from sim.scaling_world import STEP_S, World
from sim.statistics import Estimate

POINTS_MAX: Final = 500
"""Points of one line; more cannot be told apart on a page."""
LAG_FLOOR: Final = 1_000.0
"""A lag below this is drawn at the lower border of its logarithmic scale."""
ROW_PT: Final = 20.0
LABEL_PT: Final = 62.0
"""Room for the labels of a vertical axis that reaches to millions."""


def draw_policies(world: World, role: Role, shape_name: str, traces: Mapping[str, Trace]) -> Plot:
    """Draw one replication of each policy: what is offered, what waits, and how many replicas are asked for."""
    consumers = role == "consumers"
    limit = world.consumers.alert_lag if consumers else world.api.target_wait_s
    titles = [
        "Offered, thousands a second",
        "Lag, events" if consumers else "Longest wait, s",
        "Replicas asked for",
    ]

    def draw(narrow: bool) -> Figure:
        figure, (load, queue, replicas), _ = panels(
            titles, narrow=narrow, height_pt=[70.0, 140.0, 110.0], left_pt=LABEL_PT
        )
        for axes in (load, queue, replicas):
            _on_minutes(axes, world.shapes[shape_name].duration_s, narrow=narrow)
        any_trace = next(iter(traces.values()))
        load.plot(*_thinned(any_trace.offered_per_s / 1000, np.mean), color=MUTED, linewidth=1.2)
        load.set_ylim(bottom=0)
        for index, trace in enumerate(traces.values()):
            look: dict[str, Any] = {
                "color": COLOURS[index % len(COLOURS)],
                "linestyle": DASHES[index % len(DASHES)],
                "linewidth": 1.3,
            }
            at, waiting = _thinned(trace.queue, np.max)
            queue.plot(at, np.maximum(waiting, LAG_FLOOR) if consumers else waiting, **look)
            replicas.plot(*_thinned(trace.wanted, np.max), drawstyle="steps-post", **look)
        if consumers:
            queue.set_yscale("log")
            queue.yaxis.set_major_locator(LogLocator(numticks=8))
            queue.yaxis.set_minor_formatter(NullFormatter())
            queue.yaxis.set_minor_locator(NullLocator())
            queue.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            queue.set_ylim(bottom=LAG_FLOOR)
        else:
            queue.set_ylim(0, max(limit * 1.2, *(float(trace.queue.max()) * 1.06 for trace in traces.values())))
        queue.axhline(limit, color=BAD, linewidth=0.9, dashes=(4, 2))
        replicas.set_ylim(bottom=0)
        return figure

    legend = [
        *(
            Key("line", f"--c{index % len(COLOURS) + 1}", name, css_dashes(index % len(DASHES)))
            for index, name in enumerate(traces)
        ),
        Key(
            "line", "--bad", f"alert at {integer(limit)} events" if consumers else f"target of {limit:g}{NBSP}s", "8 4"
        ),
    ]
    told = "; ".join(f"{name} peaks at {number(trace.outcome.peak)}" for name, trace in traces.items())
    about = world.shapes[shape_name].about
    return make_plot(f"{role}-{shape_name}", draw, legend, f"{role} under {shape_name} ({about}) over time. {told}.")


def policy_table(world: World, comparison: Comparison) -> Table | None:
    """Return the table of a comparison: one row for each load and policy."""
    columns = [
        Column("Load"),
        Column("Policy"),
        Column("Beyond target, s", "num"),
        Column("Beyond alert, s", "num"),
        Column("Peak", "num"),
        Column("Recovery, s", "num"),
        Column("Turns an hour", "num"),
        Column("Pod-hours", "num"),
        Column("Rests"),
    ]
    rows: list[list[str | Cell]] = []
    before = None
    for line in comparison.lines:
        rows.append(
            [
                Cell(line.shape if line.shape != before else "", "strong"),
                line.policy,
                _estimate(line.beyond_target_s),
                _estimate(line.beyond_alert_s),
                _estimate(line.peak),
                NONE if line.recovery_s is None else _estimate(line.recovery_s),
                number(line.reversals_per_h.mean, 1),
                number(line.pod_hours.mean, 0),
                _verdict(line.settles),
            ]
        )
        before = line.shape
    return make_table(f"{world.replications} replications, 95 % intervals", columns, rows)


def _verdict(rests: bool | None) -> Cell:
    return Cell(NONE) if rests is None else Cell("yes", "good") if rests else Cell("no", "bad")


def draw_recoveries(recoveries: Sequence[Recovery]) -> Plot:
    """Draw each failure's recovery time as a share of what is promised: p50 to p99, on a logarithmic scale."""
    names = [recovery.name for recovery in recoveries]

    def draw(narrow: bool) -> Figure:
        figure, [axes], _ = panels(
            ["Recovery time as a share of the promise"],
            narrow=narrow,
            height_pt=ROW_PT * len(names) * (2 if narrow else 1),
            left_pt=6.0 if narrow else max(map(len, names)) * TEXT_PT * GLYPH_EM,
            right_pt=RIGHT_PT + 8,
        )
        axes.set_xscale("log")
        axes.grid(visible=False)
        axes.yaxis.set_major_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{number(value)}×"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(len(names) - 0.4, -0.75 if narrow else -0.6)
        for row, recovery in enumerate(recoveries):
            low, high = (recovery.rto_s[name] / recovery.promise_s for name in ("p50", "p99"))
            colour = COLOURS[0] if recovery.holds else COLOURS[1]
            axes.barh(row, high - low, left=low, height=0.4, color=colour)
            axes.plot(recovery.rto_s["p95"] / recovery.promise_s, row, marker="|", markersize=11, color=INK)
            at = (0.0, row - 0.38) if narrow else (0.0, row)
            axes.annotate(
                recovery.name,
                at,
                xycoords=("axes fraction", "data"),
                xytext=(0 if narrow else -6, 0),
                textcoords="offset points",
                ha="left" if narrow else "right",
                va="center_baseline",
                color=INK,
                size=SMALL_PT,
            )
        axes.axvline(1.0, color=BAD, linewidth=0.9, dashes=(4, 2))
        return figure

    legend = [
        Key("bar", "--c1", "p50 to p99, kept in 99 of 100"),
        Key("bar", "--c2", "not kept"),
        Key("tick", "--ink", "p95"),
        Key("line", "--bad", "the promise", "8 4"),
    ]
    told = "; ".join(f"{each.name} {number(each.rto_s['p99'], 0)} s of {number(each.promise_s)}" for each in recoveries)
    return make_plot("recoveries", draw, legend, f"Recovery times at p99 against their promises. {told}.")


def recovery_table(recoveries: Sequence[Recovery]) -> Table | None:
    """Return recovery times, losses and verdicts as a table."""
    columns = [
        Column("Failure"),
        Column("Promised, s", "num"),
        Column("p50, s", "num"),
        Column("p95, s", "num"),
        Column("p99, s", "num"),
        Column("Kept", "num"),
        Column("Holds"),
        Column("Mostly"),
        Column("Lost at p99, s", "num"),
    ]
    rows: list[list[str | Cell]] = [
        [
            Cell(each.name, "strong"),
            integer(each.promise_s),
            *(integer(value) for value in each.rto_s.values()),
            f"{number(each.kept_share * 100, 1)}{NBSP}%",
            _verdict(each.holds),
            each.dominates,
            number(each.rpo_s["p99"], 1),
        ]
        for each in recoveries
    ]
    return make_table("Recovery times and losses", columns, rows)


def draw_growth(curve: Sequence[tuple[int, Figures]], currency: str) -> Plot:
    """Draw the monthly cost over the number of users: the whole, its parts, and what one user costs."""
    users = [number for number, _ in curve]
    whole = [figures.numbers["cost"] for _, figures in curve]
    # The largest parts at the end have lines of their own, for there are six looks of a line.
    ranked = sorted(COST_PARTS, key=lambda part: curve[-1][1].numbers[f"{part}_cost"], reverse=True)[: len(COLOURS)]

    def draw(narrow: bool) -> Figure:
        figure, (parts, each), _ = panels(
            [f"{currency} a month", f"{currency} a month for 1,000 users"],
            narrow=narrow,
            height_pt=[190.0, 100.0],
            left_pt=LABEL_PT,
        )
        for axes in (parts, each):
            axes.set_xscale("log")
            axes.set_xlim(users[0], users[-1])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            axes.xaxis.set_minor_locator(NullLocator())
        parts.set_yscale("log")
        parts.yaxis.set_minor_locator(NullLocator())
        parts.yaxis.set_major_locator(LogLocator(numticks=8))
        parts.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        parts.plot(users, whole, color=INK, linewidth=1.8)
        for index, part in enumerate(ranked):
            values = [figures.numbers[f"{part}_cost"] for _, figures in curve]
            parts.plot(users, values, color=COLOURS[index], linestyle=DASHES[index], linewidth=1.2)
        each.plot(users, [1000 * cost / number for cost, number in zip(whole, users, strict=True)], color=INK)
        each.set_ylim(bottom=0)
        return figure

    legend = [
        Key("line", "--ink", "all"),
        *(Key("line", f"--c{index + 1}", PARTS[part], css_dashes(index)) for index, part in enumerate(ranked)),
    ]
    told = f"from {integer(whole[0])} for {integer(users[0])} users to {integer(whole[-1])} for {integer(users[-1])}"
    return make_plot("growth", draw, legend, f"Cost of a month in {currency} over users: {told}.")


def _thinned(values: Floats, kind: Callable[..., Any]) -> tuple[Floats, Floats]:
    """Return minutes and values of at most POINTS_MAX points, each the extreme or the mean of its steps."""
    each = -(-len(values) // POINTS_MAX)
    whole = len(values) // each * each
    grouped = values[:whole].reshape(-1, each)
    return np.arange(len(grouped)) * each * STEP_S / 60, np.asarray(kind(grouped, axis=1))


def _on_minutes(axes: Axes, duration_s: float, *, narrow: bool) -> None:
    minutes = duration_s / 60
    axes.set_xlim(0, minutes)
    step = next(size for size in (10, 20, 30, 60, 120, 240, 480) if minutes / size <= (5 if narrow else 10))
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}{NBSP}min"))


def _short(value: float) -> str:
    """Return a number of any size in at most four signs."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{number(value / size)}{NBSP}{unit}"
    return number(value)


def _estimate(value: Estimate) -> str:
    half = (value.high - value.low) / 2
    if abs(value.mean) >= 1e6:
        return f"{number(value.mean / 1e6, 2)}{NBSP}M ±{NBSP}{number(half / 1e6, 2)}{NBSP}M"
    digits = 0 if abs(value.mean) >= 10 or value.mean == 0 else 1
    return f"{number(value.mean, digits)} ±{NBSP}{number(half, digits)}"
