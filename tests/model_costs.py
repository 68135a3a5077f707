"""Costs for the tests of the system model, and forecasts and calibrations made of them: round figures of no machine."""

from collections.abc import Sequence

import msgspec

from sim.cases import Shape
from sim.costs import Calibration, Costs, Linear, Stage
from sim.faults import Fault
from sim.run_forecast import RunForecast, forecast_run

NOTHING = Linear()
FREE = Costs(
    cores=8,
    generator=NOTHING,
    tick_ms=0.001,
    api_wake_ms=0.0,
    api_bet_ms=0.0,
    api_batch_ms=0.0,
    api_read_ms=0.0,
    api_question_ms=0.0,
    received_share=0.4,
    handed_share=0.25,
    post=NOTHING,
    commit_ms=[1.0, 1.0],
    commit_each_ms=0.0,
    linger_slack_ms=0.0,
    redis_read=NOTHING,
    relay=Stage(NOTHING, NOTHING),
    kafka=NOTHING,
    matcher=Stage(NOTHING, NOTHING),
    projector=Stage(NOTHING, NOTHING),
    projector_redis=NOTHING,
    idle_cores=0.0,
    unseen_bet_ms=0.0,
)
BUSY = msgspec.structs.replace(
    FREE,
    cores=2,
    generator=Linear(0.0, 0.01),
    tick_ms=1.0,
    api_wake_ms=0.03,
    api_bet_ms=0.05,
    api_batch_ms=0.1,
    api_read_ms=0.05,
    api_question_ms=0.1,
    post=Linear(0.4, 0.05),
    redis_read=Linear(0.01, 0.005),
    relay=Stage(Linear(0.3, 0.02), Linear(0.3, 0.02)),
    kafka=Linear(0.3, 0.02),
    matcher=Stage(Linear(0.3, 0.03), Linear(0.5, 0.03)),
    projector=Stage(Linear(0.3, 0.02), Linear(0.5, 0.01)),
    projector_redis=Linear(0.0, 0.004),
    idle_cores=0.1,
)


def calibration_of(costs: Costs = BUSY) -> Calibration:
    """Return a calibration that says it found these costs."""
    return Calibration(
        commit="f1932bd0c4f5",
        machine={"cpu": "of a test", "cores": costs.cores},
        measured_at="2026-01-01T00:00:00+00:00",
        command="none",
        utilisation_max=0.3,
        costs=costs,
        fits=[],
        refused=[],
    )


def made_forecast(
    rate_per_s: float = 40.0, duration_s: float = 6.0, *, faults: Sequence[Fault] = (), servers: int = 2, seed: int = 1
) -> RunForecast:
    """Return the sealed forecast of a run with a fifth of reads."""
    return forecast_run(
        calibration_of(),
        Shape(name="main job", why="", servers=servers, apis=2, read_share=0.235),
        rate_per_s,
        duration_s,
        faults,
        made_at="2026-01-01T00:00:05+00:00",
        commit="f1932bd0c4f5a1e2",
        seed=seed,
        notes=["Every command that writes is modelled as a bet; retries of clients are not modelled."],
    )
