"""Failures: each timeline agrees with what can be worked out by hand, and the lag of a copy with a fluid queue's."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from sim import failures as model
from sim.failures import FAILURES_TOML, Draw, Failures, lag_over_time, region_lag, simulate, timelines
from sim.tables import TableError, read_toml

FILE = read_toml(FAILURES_TOML, Failures)
NUMBER = 20_000


def sure(seconds: float) -> Draw:
    return Draw("chosen", fixed=seconds)


def random() -> np.random.Generator:
    return np.random.default_rng(5)


def with_changes(**tables: dict[str, object]) -> Failures:
    changed = {name: msgspec.structs.replace(getattr(FILE, name), **change) for name, change in tables.items()}
    return msgspec.structs.replace(FILE, **changed)


def by_name(failures: Failures) -> dict[str, model.Recovery]:
    return {recovery.name: recovery for recovery in simulate(failures).recoveries}


def test_a_draw_has_the_form_it_is_told_by() -> None:
    assert set(sure(3).draw(random(), 5)) == {3.0}
    even = Draw("chosen", between=(2, 4)).draw(random(), NUMBER)
    assert (even.min(), even.max(), even.mean()) == pytest.approx((2, 4, 3), rel=0.01)
    long = Draw("chosen", median=10, p95=30).draw(random(), NUMBER)
    assert np.percentile(long, [50, 95]) == pytest.approx([10, 30], rel=0.04)


@pytest.mark.parametrize(
    "wrong", [{}, {"fixed": 1, "between": (1, 2)}, {"median": 2}, {"median": 2, "p95": 1}, {"between": (3, 2)}]
)
def test_a_draw_of_no_or_of_two_forms_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"give one of|smaller value|not be below"):
        Draw("chosen", **wrong)  # type: ignore[arg-type]


def test_a_hang_is_noticed_after_its_probes_and_uses_up_its_grace() -> None:
    table = msgspec.structs.replace(FILE.api, start=sure(4), probe_period_s=10, probe_failures=3, grace_s=30)
    total = model.api_hang(table, random(), NUMBER).total_s
    # 20 s of two further probes, 30 s of grace, 4 s of start, and two waits of 0 to 10 s.
    assert total.min() >= 54
    assert total.max() <= 74
    assert total.mean() == pytest.approx(64, abs=0.2)


def test_a_crash_keeps_the_seeds_minute_and_a_hang_does_not_with_kubernetes_defaults() -> None:
    found = by_name(FILE)
    assert found["API crash"].holds
    assert not found["API hang"].holds
    shorter = by_name(with_changes(api={"grace_s": 10.0, "probe_period_s": 5.0}))["API hang"]
    assert shorter.holds, "a probe each 5 s and 10 s of grace keep it"


def test_a_workers_backlog_drains_as_its_formula_says() -> None:
    table = msgspec.structs.replace(
        FILE.worker, session_s=6.0, heartbeat_s=1e-9, rebalance=sure(4), members=20, utilisation=sure(0.7)
    )
    steps = model.worker_crash(table, random(), 1).steps
    # 10 s of λ/20 wait; 19 members can take 19μ − 14μ = 5μ more, λ/20 is 0.7μ: 1.4 s.
    assert steps["drain"][0] == pytest.approx(10 * 0.7 / 5)


def test_a_group_without_a_surplus_drains_once_its_member_is_back() -> None:
    table = msgspec.structs.replace(
        FILE.worker, session_s=6.0, heartbeat_s=1e-9, rebalance=sure(4), members=2, utilisation=sure(0.6)
    )
    # One member of two cannot carry 1.2: both have a surplus of 0.8.
    assert model.worker_crash(table, random(), 1).steps["drain"][0] == pytest.approx(10 * 0.6 / 0.8)


def test_kafkas_default_session_takes_longer_and_still_keeps_the_promise() -> None:
    found = by_name(with_changes(worker={"session_s": 45.0, "heartbeat_s": 3.0}))["worker crash"]
    assert found.dominates == "session"
    assert found.rto_s["p50"] > 45
    assert found.holds


def test_patroni_with_the_measured_settings_promotes_when_it_was_measured_to() -> None:
    table = msgspec.structs.replace(FILE.database, ttl_s=10.0, loop_wait_s=2.0)
    steps = model.database_crash(table, random(), NUMBER).steps
    promoted = steps["key expires"] + steps["promotion"]
    assert steps["key expires"].min() >= 8
    assert steps["key expires"].max() <= 10
    low, middle, high = np.percentile(promoted, [5, 50, 95])
    assert low < 19 < high, "19 s were measured"
    assert middle == pytest.approx(19, rel=0.1)


def test_commands_that_come_back_take_longer_the_busier_the_server() -> None:
    def drain(load: float) -> float:
        table = msgspec.structs.replace(
            FILE.database, promotion=sure(5), reconnect=sure(5), utilisation=sure(load), retried_share=1.0
        )
        steps = model.database_crash(table, random(), NUMBER).steps
        away = steps["key expires"] + 10
        assert steps["drain"] == pytest.approx(away * load / (1 - load))
        return float(steps["drain"].mean())

    assert drain(0.8) == pytest.approx(4 * drain(0.5))


def test_only_an_asynchronous_standby_loses_what_was_acknowledged() -> None:
    found = by_name(FILE)
    assert found["single DB crash"].rpo_s == {"p50": 0.0, "p95": 0.0, "p99": 0.0}
    lost = found["single DB crash, asynchronous standby"].rpo_s
    assert lost["p50"] == pytest.approx(1, rel=0.1)
    assert lost["p95"] == pytest.approx(10, rel=0.15)


def test_a_region_waits_for_its_slowest_server_or_its_pods() -> None:
    table = msgspec.structs.replace(
        FILE.region, promote=Draw("chosen", between=(0, 10)), servers=9, pods=sure(5.0), decide=sure(100), dns=sure(0)
    )
    steps = model.region_down(table, np.zeros(1), random(), NUMBER).steps
    # The largest of nine even draws is 9 on average, and rarely below 5.
    assert steps["servers and pods"].mean() == pytest.approx(9, abs=0.05)
    assert steps["servers and pods"].min() >= 5


def test_a_region_loses_the_lag_of_its_copy() -> None:
    lag = np.array([1.0, 1.0, 1.0, 50.0])
    lost = model.region_down(FILE.region, lag, random(), NUMBER).lost_s
    assert set(lost) == {1.0, 50.0}
    assert lost.mean() == pytest.approx(13.25, rel=0.05)


def test_the_persons_decision_dominates_a_lost_region() -> None:
    assert by_name(FILE)["region down"].dominates == "decision"
    assert by_name(with_changes(region={"decide": sure(60)}))["region down"].holds


def test_restoring_takes_bytes_over_rates() -> None:
    table = msgspec.structs.replace(
        FILE.corruption,
        data_gb=100,
        fetch_mb_per_s=250,
        mean_share=0.5,
        wal_replay_mb_per_s=50,
        reconcile_rows_per_s=1e6,
        rows=1e8,
    )
    steps = model.corruption(table, 10.0, random(), NUMBER, found_every_s=60, name="x").steps
    assert set(steps["restore"]) == {400.0}
    assert set(steps["reconcile"]) == {100.0}
    # Half of the four hours at a tenth of the rate.
    assert steps["log replay"].mean() == pytest.approx(7200 * 0.1, rel=0.02)
    assert steps["found"].max() <= 60


def test_a_daily_reconciliation_cannot_keep_an_hour() -> None:
    found = by_name(FILE)["data corruption, found once a day"]
    assert not found.holds
    assert found.dominates == "found"
    # Found within the hour is one damage in 24 at most.
    assert found.kept_share < 1 / 24


def test_lag_of_a_link_that_keeps_up_is_half_a_round_trip() -> None:
    lag = lag_over_time(np.full(100, 5.0), np.full(100, 10.0), 0.08)
    assert lag == pytest.approx(np.full(100, 0.04))


def test_lag_through_an_outage_grows_by_a_second_a_second_and_drains_at_the_surplus() -> None:
    carried = np.full(60, 20.0)
    carried[10:20] = 0.0
    lag = lag_over_time(np.full(60, 10.0), carried, 0.0)
    assert lag[9] == pytest.approx(0)
    assert lag[19] == pytest.approx(10)
    # 100 bytes wait; 10 more than come can go each second: after 5 s 50 wait, which are 5 s old.
    assert lag[24] == pytest.approx(5)
    assert lag[29] == pytest.approx(0, abs=1e-9)


def test_backlog_of_the_sums_is_lindleys_recursion() -> None:
    produced = random().exponential(10, 500)
    carried = random().uniform(5, 20, 500)
    lag = lag_over_time(produced, carried, 0.0)
    waiting, written, gone_at = 0.0, np.cumsum(produced), []
    for index in range(500):
        waiting = max(waiting + produced[index] - carried[index], 0.0)
        gone_at.append(np.interp(written[index] - waiting, np.append(0, written), np.arange(501)))
    assert lag == pytest.approx(np.arange(1, 501) - np.array(gone_at), abs=1e-6)


def test_a_link_that_carries_less_than_is_written_falls_behind_for_ever() -> None:
    slow = msgspec.structs.replace(FILE.lag, link_mbit_per_s=100.0, days=1, outages_per_day=0.0)
    found, _ = region_lag(slow, random())
    assert found.utilisation > 1
    # Behind by the share that does not fit, of a day.
    assert found.lag_s["max"] == pytest.approx(86_400 * (1 - 1 / found.utilisation), rel=0.05)
    assert found.within_promise < 0.1


def test_a_long_way_with_a_small_window_is_the_link() -> None:
    far = msgspec.structs.replace(FILE.lag, window_mb=1.0, rtt_ms=200.0)
    assert far.link_bytes_per_s == pytest.approx(5e6)


def test_pages_written_whole_add_what_a_period_has_of_them() -> None:
    table = msgspec.structs.replace(FILE.lag, noise=0.0, bets_per_s=1000.0, wal_bytes_per_bet=1000.0, days=1)
    produced = model.produced_bytes(table, random())
    assert produced.mean() == pytest.approx(1e6 + 480e6 / 300, rel=1e-3)
    assert produced[0] > produced[150] > produced[299]


def test_a_change_in_one_failure_moves_no_other() -> None:
    one, _ = timelines(FILE)
    other, _ = timelines(with_changes(worker={"session_s": 30.0}))
    for before, after in zip(one, other, strict=True):
        assert (before.name == "worker crash") != np.array_equal(before.total_s, after.total_s)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("heartbeat_s = 1.0", "heartbeat_s = 7.0", "worker.heartbeat_s"),
        ("loop_wait_s = 10.0", "loop_wait_s = 30.0", "database.loop_wait_s"),
        (
            'median = 3.0, p95 = 8.0, source = "chosen", note = "interp',
            'median = 3.0, source = "chosen", note = "interp',
            "api.start",
        ),
        ('source = "measured"', 'source = "guessed"', "database.promotion.source"),
    ],
)
def test_a_wrong_value_is_refused_with_line_and_field(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = FAILURES_TOML.read_text()
    assert old in text
    file = tmp_path / "own.toml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(TableError, match=rf"own\.toml:\d+: {words}"):
        read_toml(file, Failures)


def test_the_log_of_a_bet_is_the_measured_one() -> None:
    from sim.demands import read_demands

    assert FILE.lag.wal_bytes_per_bet == read_demands().demand["wal_bytes_per_bet"].value
