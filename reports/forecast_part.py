"""The part of the page about a forecast: what the capacity model said before the run, beside what the run did."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reports.folder import RunFolder
from reports.forecast_tallies import PERCENTS, seen
from reports.load_part import milliseconds
from reports.tables import Cell, Column, Table, make_table
from reports.words import NBSP, NONE, integer, number, plural, seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from sim.costs import Interval
    from sim.run_forecast import RunForecast

CLASSES = {"bets": "Commands that write", "reads": "Reads"}
STAGES = {"outbox": "outbox", "matcher": "matcher", "projector": "projector"}
SLACK = 1e-9
"""A measured value that differs from a bound by rounding is within it."""


@dataclass(frozen=True)
class ForecastPart:
    """Everything that the part about a forecast prints beside its figures."""

    lead: str
    scores: Table | None
    absent: str
    """Why there are no figures; empty if there are."""
    notes: list[str] = field(default_factory=list)
    origin: list[tuple[str, str]] = field(default_factory=list)


def forecast_part(run: RunFolder, *, drawn: bool) -> ForecastPart | None:
    """Return what the page says about the forecast of a run; None if it has none. `drawn`: there are figures."""
    said = run.forecast
    if said is None:
        return None
    rows = _rows(run, said)
    judged = [inside for *_, inside in rows if inside is not None]
    lead = (
        f"Before the run began, the capacity model was given its rate, its mix and its planned faults: "
        f"{number(said.rate_per_s, 0)}{NBSP}requests/s for {seconds(said.duration_s, 0)}. What it forecast was sealed, "
        f"and the verdict holds the seal. "
    )
    lead += (
        f"Inside the interval: {integer(sum(judged))} of {plural(len(judged), 'figure')} that were measured. It is "
        "the interval of the model's mean by chance alone, and knows no error of the model."
        if judged
        else "Nothing of it was measured in this run."
    )
    return ForecastPart(
        lead,
        _table(rows),
        "" if drawn else "Neither a history nor samples say what the run did over time, so nothing is drawn.",
        [*said.notes, *_unnamed(run)],
        _origin(said),
    )


Row = tuple[str, str, str, str, bool | None]


def _rows(run: RunFolder, said: "RunForecast") -> list[Row]:
    found = seen(run, said, 1)
    rows = [
        _row("Answered requests per second", said.answered_per_s, found.answered_per_s if found else None, _rate),
    ]
    for name, title in CLASSES.items():
        for percent in (f"p{percent:g}" for percent in PERCENTS):
            interval = said.latency_ms.get(name, {}).get(percent)
            measured = found.latency_ms.get(name, {}).get(percent) if found else None
            if interval is not None:
                rows.append(_row(f"{title}: {percent}, ms", interval, measured, milliseconds))
    rows.append(
        _row("Not answered (error budget), %", said.refused_share, found.lost_share if found else None, _percent)
    )
    for stage, title in STAGES.items():
        interval = said.backlog_peak.get(stage)
        if interval is not None:
            measured = found.backlog_peak.get(stage) if found else None
            rows.append(_row(f"Most that waited: {title}", interval, measured, integer))
    return rows


def _row(what: str, said: "Interval", measured: float | None, text: "Callable[[float], str]") -> Row:
    low = max(0.0, said.low)
    forecast = f"{text(said.value)} ({text(low)} to {text(said.high)})"
    if measured is None:
        return what, forecast, NONE, NONE, None
    error = NONE
    if measured:
        # An error relative to nothing has no size.
        error = f"{'+' if said.value >= measured else ''}{number(100 * (said.value / measured - 1), 0)}{NBSP}%"
    inside = low - SLACK <= measured <= said.high + SLACK
    return what, forecast, text(measured), error, inside


def _rate(value: float) -> str:
    return number(value, 0 if value >= 100 else 1)


def _percent(share: float) -> str:
    return number(100 * share, 2)


def _table(rows: list[Row]) -> Table | None:
    def result(inside: bool | None) -> Cell:
        if inside is None:
            return Cell("not measured", "soft")
        return Cell("inside", "good") if inside else Cell("outside", "warn")

    return make_table(
        "Forecast with its 95 % interval, and what was measured",
        [
            Column("What", "keep"),
            Column("Forecast", "num"),
            Column("Measured", "num"),
            Column("Error", "num"),
            Column("Result", "keep"),
        ],
        (
            [Cell(what, "strong"), forecast, Cell(measured, "strong"), error, result(inside)]
            for what, forecast, measured, error, inside in rows
        ),
    )


def _unnamed(run: RunFolder) -> list[str]:
    if run.verdict.config.get("prediction_digest"):
        return []
    return ["The verdict does not name this forecast: nothing but its own word says that it was made before the run."]


def _origin(said: "RunForecast") -> list[tuple[str, str]]:
    shape = said.shape
    return [
        ("Made at", said.made_at),
        ("By commit", said.commit[:12]),
        ("Seal (SHA-256)", said.digest),
        ("Calibration (SHA-256)", said.calibration),
        ("Calibrated on", said.calibrated_on),
        ("Servers, API processes", f"{integer(shape.servers)}, {integer(shape.apis)}"),
        ("Share of reads", f"{number(100 * shape.read_share)}{NBSP}%"),
        (
            "Faults",
            ", ".join(f"{each.kind} {each.target} at {seconds(each.at_s, 1)}" for each in said.faults) or "none",
        ),
    ]
