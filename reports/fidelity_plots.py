"""Draws forecasts beside what was measured: the table of `ledgerproof sim fidelity` as figures."""

from typing import Final

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from reports.sheets import COLOURS, DASHES, INK, MUTED, TEXT_PT, Key, Plot, css_dashes, make_plot, panels
from reports.tables import Cell, Column, Table, make_table
from reports.words import NONE, number
from sim.fidelity import GOALS, RHO_MAX, Fidelity, Score

ROW_PT: Final = 16.0
LABEL_PT: Final = 118.0
"""Room for the names of the cases."""
ERROR_MAX: Final = 1.0
"""Errors beyond are drawn at the border."""


def draw_errors(table: Fidelity) -> Plot:
    """Draw each case's error of saturation, p50 and p99, beside those of M/M/c, with the goals as a band."""
    titles = ["Saturation, error", "p50, worst error", "p99, worst error"]
    goals = [GOALS["throughput"], GOALS["p50"], GOALS["p99"]]
    names = [case.name.replace("_", " ") for case in table.cases]

    def draw(narrow: bool) -> Figure:
        height_pt = ROW_PT * len(names) + 8
        figure, three, _ = panels(titles, narrow=narrow, height_pt=[height_pt] * len(titles), left_pt=LABEL_PT)
        for axes, goal, kind in zip(three, goals, ("throughput", "p50", "p99"), strict=True):
            axes.axvspan(-goal, goal, color=MUTED, alpha=0.18, linewidth=0)
            axes.axvline(0, color=INK, linewidth=0.8)
            for row, case in enumerate(table.cases):
                for value, marker, colour in (
                    (_mmc(case, kind), "x", COLOURS[1]),
                    (_ours(case, kind), "o", COLOURS[0]),
                ):
                    if value is not None:
                        shown = max(-ERROR_MAX, min(ERROR_MAX, value))
                        axes.plot(shown, row, marker=marker, color=colour, markersize=5, linestyle="none")
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_yticks(range(len(names)), names, fontsize=TEXT_PT)
            axes.set_xlim(-ERROR_MAX * 1.05, ERROR_MAX * 1.05)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
        return figure

    legend = [
        Key("dot", "--c1", "this model"),
        Key("dot", "--c2", "M/M/c (cross)"),
        Key("bar", "--muted", "goal"),
    ]
    made = table.summary
    told = (
        f"Errors of {made['cases']} cases: saturation within 10 % in {made['throughput_within']}, p50 within 15 % in "
        f"{made['p50_within']}, p99 within 25 % in {made['p99_within']}"
    )
    return make_plot("fidelity-errors", draw, legend, told + ".")


def draw_latencies(table: Fidelity, percent: str) -> Plot:
    """Draw measured and forecast latency of each case over the share of its saturation; `percent` is p50 or p99."""

    def draw(narrow: bool) -> Figure:
        figure, [axes], _ = panels([f"{percent}, ms"], narrow=narrow, height_pt=[230.0])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for index, case in enumerate(table.cases):
            measured, said = _curves(case, percent)
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(case.rho, measured, color=colour, linewidth=1.1, marker="o", markersize=3.5)
            axes.plot(case.rho, said, color=colour, linewidth=1.0, linestyle=DASHES[2])
        axes.axvline(RHO_MAX, color=INK, linewidth=0.8)
        axes.set_xlim(0, 1)
        axes.set_xlabel("offered rate as share of the measured saturation", fontsize=TEXT_PT)
        return figure

    legend = [
        Key("line", "--ink", "measured"),
        Key("line", "--ink", "forecast", css_dashes(2)),
    ]
    worst = max(
        (abs(error) for case in table.cases for error in (case.p50_errors if percent == "p50" else case.p99_errors)),
        default=0.0,
    )
    return make_plot(
        f"fidelity-{percent}", draw, legend, f"{percent} of every case over its load; largest error {worst:.0%}."
    )


def fidelity_table(table: Fidelity) -> Table | None:
    """Return the cases as a table."""
    columns = [
        Column("Case"),
        Column("Saturation, /s", "num"),
        Column("Error", "num"),
        Column("p50, worst error", "num"),
        Column("p99, worst error", "num"),
        Column("Bottleneck"),
        Column("M/M/c", "num"),
        Column("Linear", "num"),
    ]
    rows: list[list[str | Cell]] = [
        [
            Cell(case.name.replace("_", " "), "strong"),
            number(case.throughput, 0),
            _within(case.throughput_error, GOALS["throughput"]),
            _within(case.p50_error, GOALS["p50"]),
            _within(case.p99_error, GOALS["p99"]),
            Cell(
                case.bottleneck if case.bottleneck_right else f"{case.bottleneck}, not {case.bottleneck_forecast}",
                "" if case.bottleneck_right else "bad",
            ),
            _signed(case.baselines["mmc"]["throughput_error"]),
            _signed(case.baselines["linear"]["throughput_error"]),
        ]
        for case in table.cases
    ]
    return make_table("forecasts sealed before each measurement", columns, rows)


def outage_table(table: Fidelity) -> Table | None:
    """Return the outages as a table."""
    columns = [
        Column("Outage"),
        Column("Recovered, s", "num"),
        Column("Forecast, s", "num"),
        Column("Most waited"),
        Column("Events", "num"),
        Column("Forecast", "num"),
    ]
    rows: list[list[str | Cell]] = [
        [
            Cell(one.name, "strong"),
            number(one.recovered_s, 1),
            Cell(number(one.recovered_forecast_s, 1), "good" if one.recovered_right else "bad"),
            one.stage,
            number(one.peak, 0),
            Cell(number(one.peak_forecast, 0), "good" if one.peak_right else "bad"),
        ]
        for one in table.outages
    ]
    return make_table("seconds from the moment a part was taken away until nothing waited any more", columns, rows)


def _ours(case: Score, kind: str) -> float | None:
    return {"throughput": case.throughput_error, "p50": case.p50_error, "p99": case.p99_error}[kind]


def _mmc(case: Score, kind: str) -> float | None:
    value = case.baselines["mmc"][f"{kind}_error"]
    return None if value is None else float(value)


def _curves(case: Score, percent: str) -> tuple[list[float], list[float]]:
    return (case.p50_ms, case.p50_forecast_ms) if percent == "p50" else (case.p99_ms, case.p99_forecast_ms)


def _within(error: float | None, goal: float) -> Cell:
    return Cell(NONE) if error is None else Cell(_signed(error), "good" if abs(error) <= goal else "bad")


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.0%}"
