"""Service levels: measured from the recording, without the fault windows, with honest intervals."""

import math

import numpy as np
import polars as pl
import pytest

from invariants.history import HUNG_UP
from ledgerproof import sla
from ledgerproof.sla import FaultRecord, Window

LOAD = Window(10.0, 70.0)


def attempts_at(
    times: list[float], *, cls: str = "ok", status: int | None = 202, latency_s: float = 0.01, tag: str | None = None
) -> pl.DataFrame:
    count = len(times)
    return pl.DataFrame(
        {
            "op": ["bet"] * count,
            "intended": times,
            "t_invoke": times,
            "t_return": [time_s + latency_s for time_s in times],
            "cls": [cls] * count,
            "status": pl.Series([status] * count, dtype=pl.Int16),
            "tag": pl.Series([tag] * count, dtype=pl.String),
        }
    )


def series_of(rows: list[tuple[float, str, str, float]]) -> pl.DataFrame:
    schema = {"t": pl.Float64, "name": pl.String, "node": pl.String, "value": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def killed(recovered_at: float | None = None) -> FaultRecord:
    return FaultRecord(1, "kill", "pg1", 20.0, 20.1, 25.0, 24.0, recovered_at)


def timeline_of(rows: list[tuple[float, str, str | None, str | None, int | None]]) -> pl.DataFrame:
    schema = {"t": pl.Float64, "kind": pl.String, "node": pl.String, "fault": pl.String, "fault_id": pl.Int32}
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_faults_are_read_from_the_timeline_with_their_measured_edges() -> None:
    found = sla.faults_of(
        timeline_of(
            [
                (1.0, "phase", None, None, None),
                (20.0, "fault_requested", "pg1", "kill", 1),
                (20.1, "fault_start", "pg1", "kill", 1),
                (24.0, "heal_requested", "pg1", "kill", 1),
                (25.0, "fault_end", "pg1", "kill", 1),
                (30.0, "fault_requested", "redis", "pause", 2),
            ]
        )
    )
    assert found[0] == killed()
    assert found[1] == FaultRecord(2, "pause", "redis", 30.0)


def test_errors_end_with_the_last_failed_request_before_a_quiet_second() -> None:
    good = attempts_at([11 + i / 10 for i in range(550)])
    bad = attempts_at([21.0, 25.4, 25.9], cls="fail", status=503)
    prepared = sla.prepared(pl.concat([good, bad]), LOAD)
    fault = killed()
    sla.measure_recovery([fault], prepared, series_of([]), LOAD.end_s)
    assert fault.recovered_at == pytest.approx(25.9)


def test_recovery_waits_for_the_backlog() -> None:
    prepared = sla.prepared(attempts_at([11.0, 60.0]), LOAD)
    samples = [(24.0 + i, "kafka_consumer_lag", "matcher", max(0.0, 5000.0 - 1000 * i)) for i in range(20)]
    fault = killed()
    sla.measure_recovery([fault], prepared, series_of(samples), LOAD.end_s)
    assert fault.recovered_at == pytest.approx(28.0)


def test_a_fault_whose_errors_never_end_is_not_recovered() -> None:
    bad = attempts_at([20 + i / 2 for i in range(100)], cls="info", status=504)
    fault = killed()
    sla.measure_recovery([fault], sla.prepared(bad, LOAD), series_of([]), LOAD.end_s)
    assert fault.recovered_at is None
    assert fault.window(LOAD.end_s).end_s == LOAD.end_s


def test_a_backlog_that_never_falls_is_not_recovered() -> None:
    samples = [(float(t), "outbox_unpublished", "pg1", 90_000.0) for t in range(24, 80)]
    fault = killed()
    sla.measure_recovery([fault], sla.prepared(attempts_at([11.0]), LOAD), series_of(samples), LOAD.end_s)
    assert fault.recovered_at is None


def test_requests_that_hang_into_a_fault_belong_to_it() -> None:
    waiting = attempts_at([19.0], latency_s=3.0)
    phases = sla.phases_of(sla.prepared(waiting, LOAD), [killed(recovered_at=27.0)], LOAD)
    assert phases["phase"].to_list() == ["fault"]


def test_phases_follow_the_measured_edges() -> None:
    rows = attempts_at([15.0, 22.0, 26.0, 30.0])
    phases = sla.phases_of(sla.prepared(rows, LOAD), [killed(recovered_at=27.0)], LOAD)
    assert phases["phase"].to_list() == ["before", "fault", "recovery", "after"]


def test_phase_changes_are_in_order_and_overlaps_count_as_faults() -> None:
    first = killed(recovered_at=27.0)
    second = FaultRecord(2, "pause", "redis", 26.0, 26.25, 30.0, 29.0, 30.0)
    assert sla.phase_changes([first, second], LOAD) == [
        (19.75, "fault"),
        (25.0, "recovery"),
        (25.75, "fault"),
        (30.0, "after"),
    ]
    assert sla.phase_changes([], LOAD) == []


def test_without_faults_everything_is_before() -> None:
    phases = sla.phases_of(sla.prepared(attempts_at([15.0, 60.0]), LOAD), [], LOAD)
    assert phases["phase"].unique().to_list() == ["before"]


def test_clients_that_hang_up_on_purpose_are_no_fault_of_the_service() -> None:
    rows = pl.concat([attempts_at([15.0]), attempts_at([16.0], cls="info", status=None, tag=HUNG_UP)])
    assert sla.prepared(rows, LOAD).height == 1


def test_refusals_are_answers_and_unknown_outcomes_are_not() -> None:
    rows = pl.concat(
        [
            attempts_at([15.0], cls="fail", status=422),
            attempts_at([16.0], cls="fail", status=409),
            attempts_at([17.0], cls="fail", status=503),
            attempts_at([18.0], cls="fail", status=None),
            attempts_at([19.0], cls="info", status=None),
        ]
    )
    assert sla.prepared(rows, LOAD)["bad"].to_list() == [False, False, True, True, True]


def table_of(rows: pl.DataFrame, faults: list[FaultRecord], **changes: object) -> dict[str, dict[str, object]]:
    given: dict[str, object] = {
        "rate": 100.0,
        "acknowledged_bets": 3000,
        "anomalies": {"A02": 0},
        "reconciled": (10, 10),
        "events": 100,
        **changes,
    }
    phased = sla.phases_of(sla.prepared(rows, LOAD), faults, LOAD)
    table = sla.rows(phased, faults, series_of([(12.0, "kafka_consumer_lag", "m", 7.0)]), LOAD, **given)  # type: ignore[arg-type]
    return {row["metric"]: row for row in table}


def test_failures_inside_a_fault_window_do_not_count_against_availability() -> None:
    good = attempts_at([11 + i / 100 for i in range(800)])
    bad = attempts_at([22.0, 23.0], cls="fail", status=503)
    table = table_of(pl.concat([good, bad]), [killed(recovered_at=27.0)])
    assert table["Availability"]["measured"] == 100.0
    assert table["Availability"]["met"] is True
    assert table["Availability during faults"]["measured"] == 0.0
    assert table["Availability during faults"]["met"] is None


def test_failures_outside_the_windows_miss_the_level() -> None:
    good = attempts_at([11 + i / 100 for i in range(800)])
    bad = attempts_at([40.0], cls="fail", status=503)
    assert table_of(pl.concat([good, bad]), [killed(recovered_at=27.0)])["Availability"]["met"] is False


def test_slow_answers_miss_the_latency_level() -> None:
    table = table_of(attempts_at([11.0 + i / 10 for i in range(100)], latency_s=0.6), [])
    assert table["API p99"]["met"] is False
    assert table["API p99"]["measured"] == pytest.approx(600.0)


def test_duplicates_and_unreconciled_wallets_miss_their_levels() -> None:
    rows = attempts_at([11.0])
    assert table_of(rows, [], anomalies={"A27": 2})["Duplicate entries"]["met"] is False
    assert table_of(rows, [], reconciled=(9, 10))["Reconciliation match"]["met"] is False
    assert table_of(rows, [], reconciled=(0, 0))["Reconciliation match"]["met"] is None


def test_recovery_is_judged_by_the_bound_of_its_sort() -> None:
    table = table_of(
        attempts_at([11.0]), [killed(recovered_at=27.1), FaultRecord(2, "pause", "redis", 30.0, 30.0, 33.0)]
    )
    assert table["Recovery: kill pg1"]["measured"] == pytest.approx(7.0)
    assert table["Recovery: kill pg1"]["met"] is True
    assert table["Recovery: pause redis"]["met"] is None
    assert table_of(attempts_at([11.0]), [killed()])["Recovery: kill pg1"]["met"] is False


def test_operations_count_by_phase() -> None:
    rows = pl.concat([attempts_at([15.0, 15.1]), attempts_at([22.0], cls="info", status=504)])
    table = sla.operations(sla.phases_of(sla.prepared(rows, LOAD), [killed(recovered_at=27.0)], LOAD))
    assert [(row["op"], row["phase"], row["count"], row["ok"], row["info"]) for row in table] == [
        ("bet", "before", 2, 2, 0),
        ("bet", "fault", 1, 0, 1),
    ]


def test_wilson_interval_of_a_perfect_sample_is_not_certain() -> None:
    low, high = sla.proportion_interval(1000, 1000)
    assert high == 1.0
    assert low == pytest.approx(1000 / (1000 + sla.Z_95**2))


def test_quantile_interval_covers_the_true_quantile() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    true = -math.log(0.01)
    hits = 0
    for _ in range(300):
        _, low, high = sla.quantile_interval(rng.exponential(size=2000), 0.99)
        hits += low <= true <= high
    assert hits >= 275, "95 % of 300, minus three standard deviations"


def test_empty_samples_have_no_intervals() -> None:
    with pytest.raises(ValueError, match="nothing"):
        sla.proportion_interval(0, 0)
    with pytest.raises(ValueError, match="empty"):
        sla.quantile_interval(np.array([]), 0.99)


def test_reconciliation_compares_balance_and_seq_with_the_head() -> None:
    ledger = pl.DataFrame({"user_id": [1, 1, 2, 3], "seq": [1, 2, 1, 1], "amount": [5, -2, 7, 9]})
    projection = pl.DataFrame({"user_id": [1, 2], "seq": [2, 1], "balance": [3, 8]})
    assert sla.reconciliation(ledger, projection) == (1, 3)
