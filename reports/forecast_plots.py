"""Draws what a run showed over the band of its forecast: latency, answers per second, and what waited in each stage."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.folder import RunFolder
from reports.forecast_tallies import SERIES, Band, Seen, band, seen
from reports.load_plots import on_latency_axis
from reports.sheets import COLOURS, Key, Plot, fault_keys, from_zero, latency_label, make_plot, sheet
from reports.tallies import Clock, largest
from reports.words import NBSP, integer

if TYPE_CHECKING:
    from sim.run_forecast import RunForecast

BAND_ALPHA = 0.28
BAND_TEXT = "forecast: lowest to highest of its replications"
STAGE_WORDS = {"outbox": "the outboxes", "matcher": "the matcher", "projector": "the projector"}


def forecast_plots(run: RunFolder, clock: Clock | None) -> dict[str, Plot]:
    """Return every figure of a forecast that the run has data for, by name."""
    if run.forecast is None or clock is None:
        return {}
    found = seen(run, run.forecast, clock.bin_s)
    if found is None:
        return {}
    plots = [
        draw_latency(run.forecast, found, clock),
        draw_answered(run.forecast, found, clock),
        draw_backlogs(run.forecast, found, clock),
    ]
    return {plot.name: plot for plot in plots if plot is not None}


def draw_latency(forecast: "RunForecast", found: Seen, clock: Clock) -> Plot | None:
    """Draw p50 and p99 of everything that was answered on one logarithmic scale; None if nothing was."""
    if found.bins is None or found.bins.is_empty():
        return None
    t, p50, p99 = (found.bins[name].to_list() for name in ("t", "p50", "p99"))
    bands = [
        band([second.p99_ms for second in forecast.seconds], found.start_s, clock.bin_s),
        band([second.p50_ms for second in forecast.seconds], found.start_s, clock.bin_s),
    ]
    values = [value for each in bands for value in (*each.low, *each.high) if value is not None]

    def draw(narrow: bool) -> Figure:
        figure, [axes] = sheet(clock, ["Latency of all requests"], narrow=narrow, height_pt=130 if narrow else 160)
        on_latency_axis(axes, [*values, *p50, *p99])
        for each, measured, colour in zip(bands, (p99, p50), (COLOURS[1], COLOURS[0]), strict=True):
            _fill(axes, each, colour)
            axes.plot(t, measured, color=colour, linewidth=1.4, zorder=3)
        return figure

    legend = [
        Key("line", "--c2", "p99, measured"),
        Key("band", "--c2", "p99, forecast"),
        Key("line", "--c1", "p50, measured"),
        Key("band", "--c1", "p50, forecast"),
        *fault_keys(clock),
    ]
    tops = latency_label(largest(bands[0].high) or 0.0), latency_label(largest(p99) or 0.0)
    text = (
        f"Latency over time beside its forecast. Highest p99 of one interval: forecast {tops[0]}, measured {tops[1]}."
    )
    return make_plot("forecast-latency", draw, legend, text)


def draw_answered(forecast: "RunForecast", found: Seen, clock: Clock) -> Plot | None:
    """Draw the requests per second that were answered, by the time they were due; None without a history."""
    if found.bins is None or found.bins.is_empty():
        return None
    t, rates = found.bins["t"].to_list(), found.bins["answered"].to_list()
    said = band([second.answered for second in forecast.seconds], found.start_s, clock.bin_s)

    def draw(narrow: bool) -> Figure:
        figure, [axes] = sheet(clock, ["Answered, requests per second"], narrow=narrow, height_pt=110)
        _fill(axes, said, COLOURS[0])
        axes.plot(t, rates, color=COLOURS[0], linewidth=1.4, zorder=3)
        from_zero(axes, rates, said.high)
        return figure

    text = (
        f"Answered requests per second beside their forecast. Least in one interval: forecast "
        f"{integer(min((value for value in said.low if value is not None), default=None))}, "
        f"measured {integer(min(rates))}."
    )
    legend = [Key("line", "--c1", "measured"), Key("band", "--c1", BAND_TEXT), *fault_keys(clock)]
    return make_plot("forecast-answered", draw, legend, text)


def draw_backlogs(forecast: "RunForecast", found: Seen, clock: Clock) -> Plot | None:
    """Draw what waited in each stage, one panel each; None if nothing was sampled."""
    stages = [stage for stage in SERIES if stage in found.waiting]
    if not stages:
        return None
    bands = {
        stage: band([second.backlog.get(stage) for second in forecast.seconds], found.start_s, clock.bin_s, peaks=True)
        for stage in stages
    }

    def draw(narrow: bool) -> Figure:
        figure, panels = sheet(
            clock, [f"Waiting for {STAGE_WORDS[stage]}" for stage in stages], narrow=narrow, height_pt=72
        )
        for axes, stage in zip(panels, stages, strict=True):
            frame, said = found.waiting[stage], bands[stage]
            _fill(axes, said, COLOURS[2])
            axes.plot(frame["t"].to_list(), frame["value"].to_list(), color=COLOURS[2], linewidth=1.4, zorder=3)
            from_zero(axes, frame["value"].to_list(), said.high, [10.0])
        return figure

    peaks = "; ".join(
        f"{stage}: forecast {integer(largest(bands[stage].high))}, measured {integer(found.backlog_peak[stage])}"
        for stage in stages
    )
    legend = [Key("line", "--c3", "measured"), Key("band", "--c3", BAND_TEXT), *fault_keys(clock)]
    return make_plot("forecast-backlogs", draw, legend, f"What waited beside its forecast. Most,{NBSP}{peaks}.")


def _fill(axes: Axes, said: Band, colour: str) -> None:
    axes.stairs(
        _with_holes(said.high),
        said.edges,
        baseline=_with_holes(said.low),
        fill=True,
        facecolor=colour,
        edgecolor=colour,
        alpha=BAND_ALPHA,
        # Its edge keeps a band in sight that is lower than a pixel.
        linewidth=0.8,
        zorder=2,
    )


def _with_holes(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
