"""Scores forecasts against measurements that the calibration has not seen, beside two simple baselines.

The baselines know the same calibration: M/M/c takes the CPU of one request at the lowest rates as its service time and
the cores as servers; linear lets throughput be the cores divided by it, and latencies be those measured at the lowest
rates.
"""

import math
from pathlib import Path
from typing import Any, Final

import msgspec

from sim.calibration import used_cores
from sim.cases import Measured, Window
from sim.costs import Calibration
from sim.outages import OutageScore
from sim.prediction import BUSY, Forecast, bottleneck
from sim.queueing import erlang_c

RHO_MAX: Final = 0.8
"""Latencies are scored up to this share of the measured saturation."""
RHO_SLACK: Final = 0.03
GOALS: Final = {"throughput": 0.10, "throughput_median": 0.05, "p50": 0.15, "p99": 0.25, "bottlenecks": 10}


class Score(msgspec.Struct, kw_only=True):
    """One configuration. Errors are (forecast − measured) / measured; None where nothing was scored."""

    name: str
    why: str
    rho: list[float]
    """Offered rates as shares of the measured saturation."""
    throughput: float
    throughput_forecast: float
    throughput_error: float
    p50_ms: list[float]
    p50_forecast_ms: list[float]
    p50_errors: list[float]
    p99_ms: list[float]
    p99_forecast_ms: list[float]
    p99_errors: list[float]
    p50_error: float | None
    """The largest in absolute value up to RHO_MAX."""
    p99_error: float | None
    bottleneck: str
    """By what was measured."""
    bottleneck_forecast: str
    bottleneck_right: bool
    utilisation: dict[str, float]
    utilisation_forecast: dict[str, float]
    baselines: dict[str, dict[str, Any]]


class Fidelity(msgspec.Struct, kw_only=True):
    """The table: cases, and what was made of them."""

    commit: str
    machine: dict[str, Any]
    measured_at: str
    calibration: str
    cases: list[Score]
    outages: list[OutageScore] = []
    summary: dict[str, Any] = {}


def read_fidelity(path: Path) -> Fidelity:
    """Read a table of scores. Raises OSError, or msgspec.MsgspecError if the file is none."""
    return msgspec.json.decode(path.read_bytes(), type=Fidelity)


def measured_utilisation(measured: Measured) -> dict[str, float]:
    """Return how busy each resource was at saturation: by CPU of processes, and by time in the writers' lanes."""
    window = measured.saturation
    if window is None:
        raise ValueError(f"{measured.shape.name}: saturation was not measured")
    lanes = 2 * measured.shape.servers * measured.shape.apis
    seconds = window.duration_s
    return {
        "cores": used_cores(window) / measured.cores,
        "api": max(value for name, value in window.cpu_s.items() if name.startswith("api")) / seconds,
        "writer": window.post_s / seconds / lanes,
        "redis": window.cpu_s.get("redis", 0.0) / seconds,
        "generator": window.cpu_s.get("generator", 0.0) / seconds,
    }


def score(measured: Measured, forecasts: list[Forecast], calibration: Calibration, lowest: Window) -> Score:
    """Score one configuration. `lowest` is the window of the lowest rate of the calibration. Raises ValueError."""
    saturated = next((one for one in forecasts if one.rate_per_s is None), None)
    if saturated is None or measured.saturation is None:
        raise ValueError(f"{measured.shape.name}: there is no forecast or no measurement of saturation")
    truth = measured.saturation.accepted_per_s
    used = measured_utilisation(measured)
    hot = measured.shape.hot_share > 0
    service_ms = _service_ms(measured, calibration)
    found: dict[str, list[float]] = {
        name: [] for name in ("rho", "p50", "p50f", "p99", "p99f", "mmc50", "mmc99", "lin50", "lin99")
    }
    scored: list[bool] = []
    for window in measured.windows:
        said = next((one for one in forecasts if one.rate_per_s == window.offered_per_s), None)
        if said is None or not window.proven:
            continue
        kind = "bets" if "bets" in window.curves_ms else "reads"
        p50, p99 = (window.curves_ms[kind][window.percents.index(percent)] for percent in (50.0, 99.0))
        if p50 is None or p99 is None or window.offered_per_s is None:
            continue
        rho = window.offered_per_s / truth
        mmc50, mmc99 = (mmc_ms(window.offered_per_s, service_ms, measured.cores, share) for share in (0.5, 0.99))
        lin50, lin99 = (_at(lowest, percent) for percent in (50.0, 99.0))
        for name, value in zip(
            found,
            (
                rho,
                p50,
                said.latency_ms[kind]["p50"].value,
                p99,
                said.latency_ms[kind]["p99"].value,
                mmc50,
                mmc99,
                lin50,
                lin99,
            ),
            strict=True,
        ):
            found[name].append(value)
        scored.append(rho <= RHO_MAX + RHO_SLACK)

    def errors(forecast: str, truth_of: str) -> list[float]:
        return [f / t - 1 for f, t in zip(found[forecast], found[truth_of], strict=True)]

    def worst(values: list[float]) -> float | None:
        return max((value for value, counts in zip(values, scored, strict=True) if counts), key=abs, default=None)

    capacity = measured.cores / service_ms * 1000
    baselines = {
        name: {
            "throughput_error": capacity / truth - 1,
            "p50_error": worst(errors(f"{short}50", "p50")),
            "p99_error": worst(errors(f"{short}99", "p99")),
        }
        for name, short in (("mmc", "mmc"), ("linear", "lin"))
    }
    named = bottleneck(used, hot=hot)
    return Score(
        name=measured.shape.name,
        why=measured.shape.why,
        rho=found["rho"],
        throughput=truth,
        throughput_forecast=saturated.throughput_per_s.value,
        throughput_error=saturated.throughput_per_s.value / truth - 1,
        p50_ms=found["p50"],
        p50_forecast_ms=found["p50f"],
        p50_errors=errors("p50f", "p50"),
        p99_ms=found["p99"],
        p99_forecast_ms=found["p99f"],
        p99_errors=errors("p99f", "p99"),
        p50_error=worst(errors("p50f", "p50")),
        p99_error=worst(errors("p99f", "p99")),
        bottleneck=named,
        bottleneck_forecast=saturated.bottleneck,
        bottleneck_right=named == saturated.bottleneck,
        utilisation=used,
        utilisation_forecast=saturated.utilisation,
        baselines=baselines,
    )


def summarised(cases: list[Score], outages: list[OutageScore]) -> dict[str, Any]:
    """Return how the cases stand against the goals."""
    errors = sorted(abs(case.throughput_error) for case in cases)
    p50 = [abs(case.p50_error) for case in cases if case.p50_error is not None]
    p99 = [abs(case.p99_error) for case in cases if case.p99_error is not None]
    return {
        "cases": len(cases),
        "throughput_within": sum(error <= GOALS["throughput"] for error in errors),
        "throughput_median": errors[len(errors) // 2] if errors else None,
        "p50_within": sum(error <= GOALS["p50"] for error in p50),
        "p99_within": sum(error <= GOALS["p99"] for error in p99),
        "bottlenecks_right": sum(case.bottleneck_right for case in cases),
        "recoveries_right": sum(outage.recovered_right for outage in outages),
        "peaks_right": sum(outage.peak_right for outage in outages),
        "outages": len(outages),
        "goals": dict(GOALS),
        "busy": BUSY,
    }


def _service_ms(measured: Measured, calibration: Calibration) -> float:
    """Return the CPU of one request where each comes alone, by the calibration."""
    costs, shape = calibration.costs, measured.shape
    stages = (costs.relay, costs.matcher, costs.projector)
    bet = costs.api_wake_ms * 2 + costs.api_bet_ms + costs.api_batch_ms + costs.post.fixed_ms + costs.post.each_ms
    bet += sum(stage.process.each_ms + stage.session.each_ms for stage in stages)
    bet += costs.kafka.each_ms + costs.unseen_bet_ms
    read = costs.api_wake_ms * 2 + costs.api_read_ms + costs.api_question_ms + costs.redis_read.each_ms
    generator = costs.generator.fixed_ms + costs.generator.each_ms
    return generator + shape.read_share * read + (1 - shape.read_share) * bet


def mmc_ms(rate_per_s: float, service_ms: float, servers: int, share: float) -> float:
    """Return a quantile of the latency of M/M/c by its mean service and the waiting time's exponential tail.

    The quantile of the sum is taken as the service's plus the wait's where that is positive. Infinite without a steady
    state.
    """
    offered = rate_per_s * service_ms / 1000
    if offered >= servers:
        return math.inf
    waits = erlang_c(offered, servers)
    wait = 0.0 if waits <= 1 - share else math.log(waits / (1 - share)) * service_ms / (servers - offered)
    return -math.log(1 - share) * service_ms + wait


def _at(window: Window, percent: float) -> float:
    kind = "bets" if "bets" in window.curves_ms else "reads"
    value = window.curves_ms[kind][window.percents.index(percent)]
    return math.inf if value is None else value
