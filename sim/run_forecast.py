"""The forecast of one main job, second by second: written and sealed before the run, drawn beside it afterwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from sim.cases import Shape
from sim.costs import Calibration, Interval
from sim.faults import Fault
from sim.outages import STAGES
from sim.prediction import as_read, calibration_digest, digest, interval, latency_ms
from sim.system import Play, Run, replicated

FILE: Final = "prediction.json"
"""In the run folder."""
REPLICATIONS: Final = 3
PERCENTS: Final = (50.0, 95.0, 99.0)


class Second(msgspec.Struct, kw_only=True):
    """What one second of the load is forecast to show: lowest and highest of the replications."""

    t: int
    """Seconds since the load began."""
    answered: list[float]
    """Requests that are due in this second and are answered."""
    p50_ms: list[float] | None
    p99_ms: list[float] | None
    """None: too little is answered."""
    backlog: dict[str, list[float]]
    """Most that waits, by stage."""


class RunForecast(msgspec.Struct, kw_only=True):
    """The forecast of a run. `digest` is over everything else."""

    made_at: str
    commit: str
    calibration: str
    calibrated_on: str
    """Processor and cores of the machine that was calibrated."""
    shape: Shape
    rate_per_s: float
    duration_s: float
    faults: list[Fault]
    answered_per_s: Interval
    latency_ms: dict[str, dict[str, Interval]]
    """Of `bets` (everything that writes) and `reads`: by percentile (`p50`), over the whole load."""
    refused_share: Interval
    """Requests that are not admitted: what the faults take from the error budget."""
    backlog_peak: dict[str, Interval]
    seconds: list[Second]
    notes: list[str]
    digest: str = ""


def forecast_run(
    calibration: Calibration,
    shape: Shape,
    rate_per_s: float,
    duration_s: float,
    faults: Sequence[Fault],
    *,
    made_at: str,
    commit: str,
    seed: int,
    notes: Sequence[str] = (),
) -> RunForecast:
    """Return the sealed forecast of a run."""
    runs = replicated(
        Play(
            shape=shape,
            costs=calibration.costs,
            rate_per_s=rate_per_s,
            duration_s=duration_s,
            seed=seed,
            warm_s=0.0,
            faults=tuple(faults),
        ),
        REPLICATIONS,
    )
    machine = calibration.machine
    found = as_read(
        RunForecast(
            made_at=made_at,
            commit=commit,
            calibration=calibration_digest(calibration),
            calibrated_on=f"{machine.get('cpu')}, {machine.get('cores')} cores",
            shape=shape,
            rate_per_s=rate_per_s,
            duration_s=duration_s,
            faults=list(faults),
            answered_per_s=interval([run.throughput_per_s for run in runs]),
            latency_ms=latency_ms(runs, PERCENTS),
            refused_share=interval([run.refused_share for run in runs]),
            backlog_peak={stage: interval([float(run.backlog[stage].max()) for run in runs]) for stage in STAGES},
            seconds=[_second(runs, second) for second in range(int(duration_s))],
            notes=list(notes),
        )
    )
    return msgspec.structs.replace(found, digest=digest(found))


def read_run_forecast(path: Path) -> RunForecast:
    """Read a forecast. Raises OSError, msgspec.MsgspecError, or ValueError if it was changed since it was sealed."""
    found = msgspec.json.decode(path.read_bytes(), type=RunForecast)
    if digest(msgspec.structs.replace(found, digest="")) != found.digest:
        raise ValueError(f"{path.name} was changed after it was sealed")
    return found


def _second(runs: Sequence[Run], second: int) -> Second:
    answered: list[float] = []
    p50: list[float] = []
    p99: list[float] = []
    backlog: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for run in runs:
        took = np.concatenate(
            [
                run.latency_s[name][(run.due_s[name] >= second) & (run.due_s[name] < second + 1)]
                for name in run.latency_s
            ]
        )
        answered.append(float(len(took)))
        if len(took):
            p50.append(float(np.quantile(took, 0.5)) * 1000)
            p99.append(float(np.quantile(took, 0.99)) * 1000)
        now = (run.sampled_s >= second) & (run.sampled_s < second + 1)
        for stage in STAGES:
            backlog[stage].append(float(run.backlog[stage][now].max(initial=0.0)))
    return Second(
        t=second,
        answered=[min(answered), max(answered)],
        p50_ms=[min(p50), max(p50)] if len(p50) == len(runs) else None,
        p99_ms=[min(p99), max(p99)] if len(p99) == len(runs) else None,
        backlog={stage: [min(values), max(values)] for stage, values in backlog.items()},
    )
