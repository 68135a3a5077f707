"""Made-up loads for the tests of the report: written by its own types, so the report reads what a load writes."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from load.result import Phase, Plan, Result, WorkerResult, merge
from load.schedule import Arrival
from load.tally import Tally

MEDIAN_MS = {
    "bet": 9.0,
    "grpc_bet": 8.0,
    "deposit": 8.0,
    "withdraw": 8.5,
    "cancel": 7.0,
    "balance": 1.4,
    "strong_balance": 2.2,
    "entries": 4.0,
}
MIX = {
    "bet": 0.6,
    "balance": 0.2,
    "deposit": 0.06,
    "withdraw": 0.06,
    "entries": 0.03,
    "cancel": 0.03,
    "strong_balance": 0.01,
    "grpc_bet": 0.01,
}


@dataclass(frozen=True)
class Part:
    """A phase of a made-up load."""

    name: str
    duration_s: float
    rate: float
    slower: float = 1.0
    mix: tuple[tuple[str, float], ...] = tuple(MIX.items())


MATCH_DAY = (
    Part("quiet", 20, 40),
    Part("deposits", 5, 200, 1.4, (("deposit", 0.8), ("balance", 0.15), ("bet", 0.05))),
    Part("deposits", 15, 300, 1.6, (("deposit", 0.8), ("balance", 0.15), ("bet", 0.05))),
    Part("during", 40, 250, 1.2, (("bet", 0.1), ("balance", 0.8), ("entries", 0.1))),
    Part("payouts", 20, 250, 2.5, (("withdraw", 0.4), ("balance", 0.5), ("entries", 0.1))),
    Part("quiet_again", 20, 40),
)
STEADY = (Part("warm_up", 5, 100), Part("steady", 30, 300))


def made_load(
    parts: Sequence[Part] = STEADY,
    *,
    profile: str = "steady",
    seed: int = 5,
    slower: float = 1.0,
    freeze_s: tuple[float, float] | None = None,
    lost: Callable[[float], bool] = lambda _: False,
    dropped: Callable[[float], bool] = lambda _: False,
    lag_ms: float = 0.3,
) -> Result:
    """Return a load of two workers; `lost` and `dropped` say by the time due what gets no answer or is not sent."""
    rng = np.random.default_rng(seed)
    workers = [WorkerResult(index, finished=True) for index in range(2)]
    tallies = [Tally(worker) for worker in workers]
    phases, start, number = [], 0.0, 0
    for part in parts:
        phases.append(Phase(part.name, start, start + part.duration_s))
        count = int(rng.poisson(part.rate * part.duration_s))
        ops, weights = zip(*part.mix, strict=True)
        chosen = rng.choice(ops, count, p=np.array(weights) / sum(weights))
        due_s = np.sort(rng.uniform(start, start + part.duration_s, count))
        noise = rng.lognormal(0, 0.5, count)
        lags = rng.exponential(lag_ms / 1000, count)
        for op, due, times, lag in zip(chosen, due_s, noise, lags, strict=True):
            number += 1
            tally, worker = tallies[number % 2], workers[number % 2]
            worker.scheduled += 1
            arrival = Arrival(number, float(due), str(op), part.name, 0, 0, "HOME", "BACK", 200, 100, 0)
            if dropped(due):
                tally.dropped(arrival)
                continue
            if op == "cancel" and number % 7 == 0:
                tally.skipped(arrival)
                continue
            tally.sent(arrival, float(lag))
            if lost(due):
                tally.unanswered(arrival, "info", "timeout")
                continue
            took = MEDIAN_MS[str(op)] / 1000 * times * part.slower * slower + lag
            if freeze_s is not None and freeze_s[0] <= due < freeze_s[1]:
                took += freeze_s[1] - due
            if op == "cancel" and number % 3 == 0:
                tally.answered(arrival, "fail", 422, took)
            elif number % 997 == 0:
                tally.answered(arrival, "fail", 503, took)
            else:
                tally.answered(arrival, "ok", 202, took)
        start += part.duration_s
    for worker, tally in zip(workers, tallies, strict=True):
        tally.fill()
        worker.cpu_s, worker.span_s = 1.5, start + 0.02
    plan = Plan(profile, seed, f"load-{seed}", "2026-01-01T00:00:00+00:00", f"digest-{seed}", number, 2, phases)
    result = merge(plan, workers)
    result.start_monotonic_s, result.history_origin_s = 1080.0, 1000.0
    return result


def write_load_run(folder: Path, result: Result, **config: Any) -> Path:
    """Write a run folder that has only a verdict and the load."""
    folder.mkdir(parents=True, exist_ok=True)
    result.write(folder / "load.json")
    missed = bool(result.missed)
    verdict = {
        "verdict": "INVALID" if result.invalid else "SLA_MISSED" if missed else "PASS",
        "exit_code": 30 if result.invalid else 10 if missed else 0,
        "run": folder.name,
        "seed": result.seed,
        "commit": "f1932bd0c4f5",
        "duration_s": math.ceil(max((phase.end_s for phase in result.phases), default=0)),
        "config": {
            "profile": result.profile,
            "servers": 2,
            "apis": 2,
            "workers": 2,
            "rate_factor": 1.0,
            "time_factor": 0.5,
            "lag_limit_ms": 5.0,
            **config,
        },
        "anomalies": {"A01": 0, "A02": 0},
        "reasons": [f"load: {why}" for why in result.invalid] + [f"limit missed: {why}" for why in result.missed],
    }
    (folder / "verdict.json").write_text(json.dumps(verdict))
    return folder


def knee_of(limit_ms: float = 250.0) -> dict[str, Any]:
    """Return the knee.json of a search that found its bracket, one of whose windows proved nothing."""
    windows: list[dict[str, Any]] = []
    for rate, p99, held in (
        (200.0, 22.0, True),
        (300.0, 31.0, True),
        (450.0, 58.0, True),
        (675.0, 96.0, None),
        (675.0, 104.0, True),
        (1012.5, None, False),
        (826.7, 411.0, False),
        (747.0, 214.0, True),
    ):
        windows.append(
            {
                "rate": rate,
                "held": held,
                "why": f"p99 is {p99} ms" if held is not None else "the generator sent its arrivals 9.1 ms late",
                "p99_ms": p99,
                "low_ms": 1900.0 if p99 is None else p99 * 0.8,
                "high_ms": None if p99 is None else p99 * 1.4,
                "lag_p99_ms": 9.1 if held is None else 0.9,
            }
        )
    return {
        "p99_ms": limit_ms,
        "windows": windows,
        "holds": 747.0,
        "fails": 826.7,
        "knee": 785.8,
        "text": "the knee is at 786/s: 747/s holds, 827/s does not",
    }
