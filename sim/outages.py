"""Forecasts of outages and their scores: how long a part is gone, what waits meanwhile, when nothing waits any more."""

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from sim.cases import Outage, OutageCase, Shape
from sim.costs import Costs
from sim.faults import Fault
from sim.system import BACKLOGS, Play, replicated

BEFORE_S: Final = 4.0
"""The load is on for so long before the part is taken away."""
AFTER_S: Final = 16.0
"""And so long after it was asked to come back; longer than any of them takes."""
STAGES: Final = BACKLOGS
REPLICATIONS: Final = 3
TIME_GOAL: Final = 0.30
TIME_GOAL_S: Final = 2.0
"""A recovery is forecast rightly within this share, or within so many seconds."""
PEAK_GOAL: Final = 0.30
PEAK_LEAST: Final = 200.0
"""A backlog below this, forecast and measured, is none: less than a second's work at some hundred bets a second."""


class OutageForecast(msgspec.Struct, kw_only=True):
    """What the model says of one outage."""

    case: OutageCase
    gone_s: float
    recovered_s: float
    backlog_peak: dict[str, float]
    refused: float


class OutageScore(msgspec.Struct, kw_only=True):
    """A forecast beside what was measured. `stage` is where most waits by the forecast."""

    name: str
    recovered_s: float
    recovered_forecast_s: float
    recovered_right: bool
    stage: str
    peak: float
    peak_forecast: float
    peak_right: bool
    refused: int
    refused_forecast: float


def forecast_outage(costs: Costs, case: OutageCase, seed: int = 1) -> OutageForecast:
    """Return the forecast of an outage. Raises ValueError if it is not known how long the part needs to come back."""
    if case.sort not in costs.returns_s:
        raise ValueError(f"the calibration does not say how long {case.sort} needs to come back")
    gone_s = case.lasts_s + costs.returns_s[case.sort]
    recovered, peaks, refused = [], [], []
    play = Play(
        shape=Shape(name=case.name, why="", servers=case.servers),
        costs=costs,
        rate_per_s=case.rate_per_s,
        duration_s=BEFORE_S + case.lasts_s + AFTER_S,
        seed=seed,
        faults=(Fault(case.kind, case.part, BEFORE_S, gone_s),),
    )
    for run in replicated(play, REPLICATIONS):
        at = run.sampled_s - BEFORE_S
        rows = {stage: list(zip(at.tolist(), run.backlog[stage].tolist(), strict=True)) for stage in STAGES}
        recovered.append(max(gone_s, *(recovered_s(rows[stage]) for stage in STAGES)))
        peaks.append({stage: float(run.backlog[stage][at >= 0].max()) for stage in STAGES})
        refused.append(run.refused)
    return OutageForecast(
        case=case,
        gone_s=gone_s,
        recovered_s=float(np.mean(recovered)),
        backlog_peak={stage: float(np.mean([peak[stage] for peak in peaks])) for stage in STAGES},
        refused=float(np.mean(refused)),
    )


def recovered_s(samples: Sequence[tuple[float, float | None]]) -> float:
    """Return when a backlog was, for good, no higher than it had been before: seconds after the part was taken away.

    Samples are (seconds, what waits); None where it could not be read. "Before" leaves room for the moment's chance.
    """
    before = [value for at, value in samples if at < 0 and value is not None]
    limit = 2.0 * max(before, default=0.0) + 50.0
    return max((at for at, value in samples if at >= 0 and value is not None and value > limit), default=0.0)


def score_outage(said: OutageForecast, seen: Outage) -> OutageScore:
    """Return how an outage compares with its forecast."""
    stage = max(STAGES, key=lambda name: said.backlog_peak[name])
    forecast, peak = said.backlog_peak[stage], seen.backlog_peak[stage]
    late_s = abs(said.recovered_s - seen.recovered_s)
    return OutageScore(
        name=seen.case.name,
        recovered_s=seen.recovered_s,
        recovered_forecast_s=said.recovered_s,
        recovered_right=late_s <= max(TIME_GOAL * seen.recovered_s, TIME_GOAL_S),
        stage=stage,
        peak=peak,
        peak_forecast=forecast,
        peak_right=max(forecast, peak) < PEAK_LEAST or abs(forecast - peak) <= PEAK_GOAL * peak,
        refused=seen.refused,
        refused_forecast=said.refused,
    )
