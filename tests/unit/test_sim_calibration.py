"""Calibration finds the costs that a made-up service was given, and refuses what does not tell them."""

from collections import Counter
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import simpy

from sim import calibration
from sim.calibration import NotCalibrated, calibrate, fitted, groups_per_s, relay_rounds_per_s, utilisation
from sim.cases import Measured, Outage, OutageCase, Shape, Window
from sim.cores import Process
from sim.costs import Calibration, Costs, Fit
from sim.system import Play, Run, System
from tests.model_costs import BUSY

PERCENTS = [10.0, 50.0, 75.0, 90.0, 95.0, 99.0]
SECONDS = 8.0
SHAPE = Shape(name="calibration", why="")
TRUE = msgspec.structs.replace(
    BUSY,
    generator=msgspec.structs.replace(BUSY.generator, fixed_ms=0.02),
    tick_ms=1.25,
    commit_ms=[0.3, 0.5, 0.7, 1.0, 2.0],
    commit_each_ms=0.004,
    linger_slack_ms=0.12,
    unseen_bet_ms=0.02,
)


def window_of(rate: float, *, reads: bool = False, burst: int = 1, number: int = 0, costs: Costs = TRUE) -> Window:
    """What a window of the made-up service shows, with exact CPU seconds: those of the model with the true costs."""
    shape = msgspec.structs.replace(SHAPE, read_share=float(reads))
    system = System(
        Play(shape=shape, costs=costs, rate_per_s=rate, duration_s=SECONDS, burst=burst, replication=number, warm_s=0.0)
    )
    calls: Counter[str] = Counter()
    work = system.cores.work

    def counted(process: Process, seconds: float) -> simpy.Event:
        calls[process.name] += 1
        return work(process, seconds)

    system.cores.work = counted  # type: ignore[method-assign]
    found = system.run()
    took = {name: values * 1000 for name, values in found.latency_s.items() if len(values)}
    answered = {name: len(values) for name, values in took.items()}
    sessions = {who: system.sessions[f"{who} pg0"].busy_s for who in ("relay",)} | {
        who: system.sessions[f"{who} pg0"].busy_s if f"{who} pg0" in system.sessions else 0.0
        for who in ("matcher", "projector")
    }
    posting = sum(lane.session.busy_s for lane in system.writers[0][0].lanes)
    jobs = {name: system.entries - system.waiting(name) - system.outbox[0] for name in ("matcher", "projector")}
    return Window(
        offered_per_s=rate,
        read_share=shape.read_share,
        burst=burst,
        duration_s=SECONDS,
        due=sum(answered.values()),
        accepted=sum(answered.values()),
        statuses={},
        curves_ms={name: np.quantile(values, np.array(PERCENTS) / 100).tolist() for name, values in took.items()},
        accepted_of=answered,
        percents=PERCENTS,
        lag_p99_ms=0.99 * TRUE.tick_ms,
        cpu_s={
            "generator": system.generator.busy_s,
            "api0": system.apis[0].busy_s,
            "relay0": system.relay.busy_s,
            "kafka": system.kafka.busy_s,
            "matcher0": system.matcher.busy_s,
            "projector0": system.projector.busy_s,
            "redis": system.redis.busy_s,
            "settler0": system.background.busy_s,
            "pg0": posting + sum(sessions.values()),
            "pg0 ledger_api": posting,
            **{f"pg0 ledger_{who}": seconds for who, seconds in sessions.items()},
        },
        busy_s=found.utilisation["cores"] * SECONDS * TRUE.cores,
        steal_s=0.0,
        posts=system.batches,
        post_s=system.post_s,
        post_buckets={},
        posted=system.entries,
        work={
            "relay jobs": float(system.entries - system.outbox[0]),
            **{f"{name} jobs": float(done) for name, done in jobs.items()},
            **{f"{name} batches": float(calls[name]) for name in jobs},
        },
    )


def measured_of(windows: list[Window], idle: Window | None) -> Measured:
    return Measured(
        shape=SHAPE,
        commit="f1932bd0c4f5",
        machine={"cpu": "made up", "cores": 2},
        started_at="2026-01-01T00:00:00+00:00",
        cores=TRUE.cores,
        connections=128,
        idle=idle,
        windows=windows,
        saturation=None,
        timer_late_ms=TRUE.linger_slack_ms,
    )


@pytest.fixture(scope="module")
def measured() -> Measured:
    bets = [window_of(rate, number=number) for number, rate in enumerate((100, 140, 300, 600))]
    bursts = [window_of(rate, burst=size) for rate, size in ((640, 16), (800, 64), (1000, 128))]
    reads = [window_of(300, reads=True), window_of(1200, reads=True), window_of(1500, reads=True, burst=32)]
    return measured_of([*bets, *bursts, *reads], window_of(0.0))


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "MATCH_S", 10.0)
        patch.setattr(calibration, "MATCH_ROUNDS", 4)
        patch.setattr(calibration, "RESAMPLES", 100)
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU alone: what a commit waits for is not looked for."""
    monkeypatch.setattr(calibration, "RESAMPLES", 20)
    monkeypatch.setattr(calibration, "_matched", lambda measured, costs, *_: costs)


@pytest.fixture(scope="module")
def found(measured: Measured, short: None) -> Calibration:
    return calibrate(measured)


# --- what it finds ----------------------------------------------------------------------------------------------------


def coefficients(found: Calibration, name: str) -> dict[str, float]:
    fit = next(fit for fit in found.fits if fit.name == name)
    return {column: interval.value for column, interval in fit.coefficients.items()}


def test_costs_that_follow_from_cpu_alone_are_found_within_a_few_percent(found: Calibration) -> None:
    costs = found.costs
    for name in ("generator", "post"):
        for part in ("fixed_ms", "each_ms"):
            assert getattr(getattr(costs, name), part) == pytest.approx(getattr(getattr(TRUE, name), part), rel=0.03)
    for name in ("matcher", "projector"):
        for place in ("process", "session"):
            one, true = getattr(getattr(costs, name), place), getattr(getattr(TRUE, name), place)
            assert (one.fixed_ms, one.each_ms) == pytest.approx((true.fixed_ms, true.each_ms), rel=0.01)
    assert costs.api_bet_ms == pytest.approx(TRUE.api_bet_ms, rel=0.03)
    assert costs.projector_redis.each_ms == pytest.approx(TRUE.projector_redis.each_ms, rel=0.03)
    assert costs.tick_ms == pytest.approx(TRUE.tick_ms)
    assert (costs.idle_cores, costs.unseen_bet_ms) == pytest.approx((TRUE.idle_cores, TRUE.unseen_bet_ms), rel=0.1)


def test_costs_of_rounds_that_are_counted_by_a_formula_are_found_within_a_tenth(found: Calibration) -> None:
    for one, true in ((found.costs.relay.process, TRUE.relay.process), (found.costs.kafka, TRUE.kafka)):
        assert (one.fixed_ms, one.each_ms) == pytest.approx((true.fixed_ms, true.each_ms), rel=0.1)
    assert found.costs.relay.session.each_ms == pytest.approx(TRUE.relay.session.each_ms, rel=0.1)
    # A wake cannot be told from a batch where each wake has one; what they cost together is found.
    for one, true in (
        (2 * found.costs.api_wake_ms + found.costs.api_batch_ms, 2 * TRUE.api_wake_ms + TRUE.api_batch_ms),
        (2 * found.costs.api_wake_ms + found.costs.api_question_ms, 2 * TRUE.api_wake_ms + TRUE.api_question_ms),
    ):
        assert one == pytest.approx(true, rel=0.1)


def test_the_model_uses_the_cpu_of_the_windows_it_was_calibrated_from(measured: Measured, found: Calibration) -> None:
    for index, reads in ((1, False), (3, False), (5, False), (8, True)):
        window = measured.windows[index]
        assert window.offered_per_s is not None
        again = window_of(window.offered_per_s, reads=reads, burst=window.burst, number=3, costs=found.costs)
        for name in ("generator", "api0", "pg0 ledger_api", "kafka", "matcher0", "projector0", "redis"):
            if window.cpu_s[name] > 0.01:
                assert again.cpu_s[name] == pytest.approx(window.cpu_s[name], rel=0.12), (index, name)


def test_what_a_commit_waits_for_is_found_percentile_by_percentile(found: Calibration) -> None:
    shares = [0.1, 0.25, 0.5, 0.75, 0.9]
    true = np.quantile(TRUE.commit_ms, shares)
    assert np.quantile(found.costs.commit_ms, shares) == pytest.approx(true, rel=0.25)
    assert found.costs.commit_ms == sorted(found.costs.commit_ms)


def shown(costs: Costs, rate: float | None, servers: int, apis: int) -> Run:
    """What the model shows of a configuration that was not calibrated: batches wait for company in it."""
    shape = Shape(name="other", why="", servers=servers, apis=apis)
    return System(Play(shape=shape, costs=costs, rate_per_s=rate, duration_s=4.0, seed=7)).run()


@pytest.mark.parametrize(("servers", "apis"), [(1, 1), (2, 2)])
def test_the_model_with_the_costs_found_saturates_as_with_the_true_ones(
    found: Calibration, servers: int, apis: int
) -> None:
    true, again = (shown(costs, None, servers, apis) for costs in (TRUE, found.costs))
    assert again.throughput_per_s == pytest.approx(true.throughput_per_s, rel=0.05)
    assert np.median(again.latency_s["bets"]) == pytest.approx(np.median(true.latency_s["bets"]), rel=0.1)


def test_above_every_rate_that_was_fitted_latencies_are_those_of_the_true_costs(found: Calibration) -> None:
    true, again = (shown(costs, 1500, 2, 1) for costs in (TRUE, found.costs))
    for share, within in ((0.5, 0.05), (0.99, 0.1)):
        expected = np.quantile(true.latency_s["bets"], share)
        assert np.quantile(again.latency_s["bets"], share) == pytest.approx(expected, rel=within)
    assert again.utilisation["cores"] == pytest.approx(true.utilisation["cores"], rel=0.05)


def test_intervals_hold_their_value(found: Calibration) -> None:
    intervals = [interval for fit in found.fits for interval in fit.coefficients.values()]
    assert len(intervals) > 15
    assert all(0 <= one.low <= one.value <= one.high for one in intervals)


def test_no_window_above_the_limit_was_fitted(found: Calibration) -> None:
    assert 0 < found.utilisation_max <= calibration.UTILISATION_MAX
    assert found.costs.returns_s == {}
    assert "returns" in {one.what for one in found.refused}


def test_the_same_measurement_gives_the_same_calibration(measured: Measured, found: Calibration, short: None) -> None:
    assert calibrate(measured) == found


def test_how_long_a_part_needs_to_come_back_is_taken_from_outages(measured: Measured, quick: None) -> None:
    def outage(node: str, gone_s: float) -> Outage:
        case = OutageCase(name=node, kind="kill", node=node, rate_per_s=100, lasts_s=1.0)
        return Outage(case=case, gone_s=gone_s, recovered_s=gone_s, backlog_peak={}, refused=0)

    with_outages = msgspec.structs.replace(measured, outages=[outage("pg0", 3.5), outage("redis", 0.8)])
    found = calibrate(with_outages)
    assert found.costs.returns_s == pytest.approx({"pg": 2.5, "redis": 0.0})
    assert "returns" not in {one.what for one in found.refused}


# --- what it refuses --------------------------------------------------------------------------------------------------


def changed(measured: Measured, index: int, **fields: object) -> Measured:
    windows = [
        msgspec.structs.replace(window, **fields) if number == index else window
        for number, window in enumerate(measured.windows)
    ]
    return msgspec.structs.replace(measured, windows=windows)


def test_a_window_that_kept_the_machine_too_busy_is_refused_by_name(measured: Measured, quick: None) -> None:
    busy = {**measured.windows[2].cpu_s, "kafka": SECONDS}
    found = calibrate(changed(measured, 2, cpu_s=busy))
    reasons = {one.what: one.reason for one in found.refused}
    assert "40% is the limit" in reasons["300/s, bursts of 1, 0% reads"]
    assert all(fit.windows == 6 for fit in found.fits if fit.name == "posting session")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"accepted": 1}, "were not accepted"), ({"lag_p99_ms": 9.0}, "the generator was 9.0 ms late")],
)
def test_a_window_that_proves_nothing_is_refused(
    measured: Measured, fields: dict[str, float], reason: str, quick: None
) -> None:
    assert any(reason in one.reason for one in calibrate(changed(measured, 3, **fields)).refused)


def test_without_an_idle_window_nothing_is_calibrated(measured: Measured) -> None:
    with pytest.raises(NotCalibrated, match="the idle window is missing"):
        calibrate(msgspec.structs.replace(measured, idle=None))


def test_with_too_few_windows_nothing_is_calibrated(measured: Measured) -> None:
    few = [window for window in measured.windows if window.read_share == 1][:2] + measured.windows[3:5]
    with pytest.raises(NotCalibrated, match=r"2 windows of bets .* bursts among them: True"):
        calibrate(msgspec.structs.replace(measured, windows=few))


def test_without_bursts_nothing_is_calibrated(measured: Measured) -> None:
    singles = [window for window in measured.windows if window.burst == 1]
    with pytest.raises(NotCalibrated, match="bursts among them: False"):
        calibrate(msgspec.structs.replace(measured, windows=singles))


def test_with_too_few_windows_of_single_bets_no_wait_is_told(measured: Measured) -> None:
    few = [measured.windows[0], *(window for window in measured.windows if window.burst > 1)]
    with pytest.raises(NotCalibrated, match="3 windows of single bets are needed, of 500 requests or more"):
        calibrate(msgspec.structs.replace(measured, windows=few))


def test_how_late_timers_are_is_taken_as_it_was_measured(found: Calibration) -> None:
    assert found.costs.linger_slack_ms == TRUE.linger_slack_ms


def test_what_the_generator_uses_for_looking_is_part_of_what_is_used_idle(
    measured: Measured, found: Calibration, quick: None
) -> None:
    windows = [
        msgspec.structs.replace(
            window, cpu_s={**window.cpu_s, "generator": window.cpu_s["generator"] + 0.05 * window.duration_s}
        )
        for window in measured.windows
    ]
    again = calibrate(msgspec.structs.replace(measured, windows=windows))
    assert again.costs.idle_cores - found.costs.idle_cores == pytest.approx(0.05, rel=0.1)


def test_where_no_batch_gathers_anything_the_cost_of_a_wake_is_named_as_unknown(
    measured: Measured, found: Calibration, quick: None
) -> None:
    alone = [
        msgspec.structs.replace(window, posts=round(groups_per_s(window, TRUE.tick_ms) * SECONDS))
        if window.read_share == 0
        else window
        for window in measured.windows
    ]
    again = calibrate(msgspec.structs.replace(measured, windows=alone))
    assert "wakes" in {one.what for one in again.refused}
    assert "wakes" not in {one.what for one in found.refused}


def test_without_reads_their_cost_is_named_as_unknown(measured: Measured, quick: None) -> None:
    bets = [window for window in measured.windows if window.read_share == 0]
    found = calibrate(msgspec.structs.replace(measured, windows=bets))
    assert "reads" in {one.what for one in found.refused}


# --- its parts --------------------------------------------------------------------------------------------------------


def test_groups_are_ticks_in_which_something_arrives(measured: Measured) -> None:
    window = msgspec.structs.replace(measured.windows[0], due=800, duration_s=8.0, burst=1)
    # 100/s and a tick of 10 ms: one arrival a tick on average, so 1 − 1/e of the 100 ticks a second.
    assert groups_per_s(window, 10.0) == pytest.approx(100 * (1 - np.exp(-1)))
    assert groups_per_s(msgspec.structs.replace(window, burst=100), 0.001) == pytest.approx(1.0, rel=0.01)


def test_the_relay_sends_at_most_as_often_as_it_rests(measured: Measured) -> None:
    fast = msgspec.structs.replace(measured.windows[0], due=80_000, duration_s=8.0, burst=1)
    assert relay_rounds_per_s(fast) == pytest.approx(20.0)
    assert relay_rounds_per_s(msgspec.structs.replace(fast, due=8)) < 10


def test_a_fit_without_noise_is_exact_and_one_with_noise_has_an_interval(measured: Measured) -> None:
    def fit(noise: float) -> Fit:
        draw = np.random.default_rng(5)
        told = {id(window): 0.002 * window.due + noise * draw.normal() for window in measured.windows}
        return fitted("it", measured.windows, lambda window: told[id(window)], {"each": lambda window: window.due})

    exact, rough = fit(0.0), fit(1.0)
    assert exact.coefficients["each"].value == pytest.approx(2.0)
    assert exact.r_squared == pytest.approx(1.0)
    assert rough.coefficients["each"].high - rough.coefficients["each"].low > 0.01
    assert rough.r_squared < exact.r_squared


def test_sessions_are_not_counted_beside_their_server(measured: Measured) -> None:
    window = measured.windows[0]
    alone = {name: seconds for name, seconds in window.cpu_s.items() if not name.startswith("pg0 ")}
    assert utilisation(window, 2) == pytest.approx(sum(alone.values()) / SECONDS / 2)
