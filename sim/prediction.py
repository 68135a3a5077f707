"""Forecasts by the model, written and hashed before the run that they forecast.

Percentiles are means over replications with Student's 95 % interval. The band of a forecast also holds what a single
measured window may differ by chance: each window of the measurement is one replication.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgspec
import numpy as np

from sim.cases import OutageCase, Shape
from sim.costs import Calibration, Costs, Interval
from sim.faults import Fault
from sim.outages import OutageForecast, forecast_outage
from sim.statistics import estimate
from sim.system import Play, Run, replicated

PERCENTS: Final = (50.0, 90.0, 95.0, 99.0)
REPLICATIONS: Final = 5
BUSY: Final = 0.85
"""A resource that is busier than this is a bottleneck."""
FORMAT: Final = 1
Struct = TypeVar("Struct", bound=msgspec.Struct)


class Forecast(msgspec.Struct, kw_only=True):
    """What the model says of one configuration at one rate; `rate_per_s` is None for saturation."""

    shape: Shape
    rate_per_s: float | None
    duration_s: float
    throughput_per_s: Interval
    latency_ms: dict[str, dict[str, Interval]]
    """Of `bets` and `reads`: by percentile (`p50`)."""
    utilisation: dict[str, float]
    bottleneck: str
    backlog_peak: dict[str, Interval]
    """Most that waits at any time, by stage."""
    refused_share: float


class Prediction(msgspec.Struct, kw_only=True):
    """Forecasts with what they rest on. `digest` is over everything else."""

    format: int = FORMAT
    made_at: str
    commit: str
    calibration: str
    """Digest of the calibration."""
    seed: int
    forecasts: list[Forecast]
    outages: list[OutageForecast] = []
    digest: str = ""


def digest(value: object) -> str:
    """Return the SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


def as_read(value: Struct) -> Struct:
    """Return a value as it is when it is read again: an int where a float belongs has become one, for a digest sees it.

    Raises msgspec.ValidationError if it cannot be read again.
    """
    return msgspec.json.decode(msgspec.json.encode(value), type=type(value))


def sealed(prediction: Prediction) -> Prediction:
    """Return the prediction, as it is read again, with its digest."""
    prediction = as_read(prediction)
    return msgspec.structs.replace(prediction, digest=digest(msgspec.structs.replace(prediction, digest="")))


def intact(prediction: Prediction) -> bool:
    """Return whether a prediction is as it was when it was sealed."""
    return sealed(prediction).digest == prediction.digest


def calibration_digest(calibration: Calibration) -> str:
    """Return what names a calibration in a prediction."""
    return digest(calibration)


def forecast(
    costs: Costs,
    shape: Shape,
    rate_per_s: float | None,
    *,
    duration_s: float,
    connections: int = 128,
    seed: int = 1,
    replications: int = REPLICATIONS,
    faults: Sequence[Fault] = (),
    drain_s: float = 0.0,
) -> Forecast:
    """Return the forecast of a configuration at a rate, or of its saturation by `connections` in a closed loop."""
    runs = replicated(
        Play(
            shape=shape,
            costs=costs,
            rate_per_s=rate_per_s,
            duration_s=duration_s,
            connections=connections,
            seed=seed,
            faults=tuple(faults),
            drain_s=drain_s,
        ),
        replications,
    )
    used = {name: float(np.mean([run.utilisation[name] for run in runs])) for name in runs[0].utilisation}
    return Forecast(
        shape=shape,
        rate_per_s=rate_per_s,
        duration_s=duration_s,
        throughput_per_s=interval([run.throughput_per_s for run in runs]),
        latency_ms=latency_ms(runs, PERCENTS),
        utilisation=used,
        bottleneck=bottleneck(used, hot=shape.hot_share > 0),
        backlog_peak={name: interval([float(run.backlog[name].max()) for run in runs]) for name in runs[0].backlog},
        refused_share=float(np.mean([run.refused_share for run in runs])),
    )


def saturation(costs: Costs, shape: Shape, *, duration_s: float, connections: int, seed: int = 1) -> Forecast:
    """Return the forecast of what a configuration gets through."""
    return forecast(costs, shape, None, duration_s=duration_s, connections=connections, seed=seed)


def predict(
    calibration: Calibration,
    asked: Sequence[tuple[Shape, float | None, float]],
    *,
    made_at: str,
    commit: str,
    connections: int = 128,
    outages: Sequence[OutageCase] = (),
    seed: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> Prediction:
    """Return sealed forecasts of outages, and of configurations at rates (None: saturation) for some seconds each."""
    forecasts = []
    for shape, rate, duration_s in asked:
        progress(f"{shape.name} at {'saturation' if rate is None else f'{rate:,.0f}/s'}")
        forecasts.append(
            forecast(calibration.costs, shape, rate, duration_s=duration_s, connections=connections, seed=seed)
        )
    return sealed(
        Prediction(
            made_at=made_at,
            commit=commit,
            calibration=calibration_digest(calibration),
            seed=seed,
            forecasts=forecasts,
            outages=[forecast_outage(calibration.costs, case, seed) for case in outages],
        )
    )


def bottleneck(utilisation: dict[str, float], *, hot: bool) -> str:
    """Name what limits the throughput: the busiest resource, if one is busy; else what waits without being busy.

    Single resources come before the cores they use, for with one of them at its limit the cores cannot be.
    """
    busiest = max(utilisation, key=lambda name: utilisation[name])
    if utilisation[busiest] >= BUSY:
        return busiest
    return "hot wallet" if hot else busiest


def latency_ms(runs: Sequence[Run], percents: Sequence[float]) -> dict[str, dict[str, Interval]]:
    """Return percentiles (`p50`) of the latencies of each class of which every run answered some, in milliseconds."""
    return {
        name: {
            f"p{percent:g}": interval([float(np.quantile(run.latency_s[name], percent / 100)) * 1000 for run in runs])
            for percent in percents
        }
        for name in runs[0].latency_s
        if all(len(run.latency_s[name]) for run in runs)
    }


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of replications with its 95 % interval."""
    found = estimate(list(values))
    assert found is not None, "no value is None"
    return Interval(found.mean, found.low, found.high)
