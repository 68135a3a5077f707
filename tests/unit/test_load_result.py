"""Results of workers add up to the whole, survive JSON, and say when they prove nothing."""

from pathlib import Path

import msgspec
import pytest

from load.histograms import Latencies
from load.profiles import Limit
from load.result import Cell, Phase, Plan, Result, WorkerResult, merge
from load.schedule import Arrival
from load.tally import Tally

PLAN = Plan("p", 1, "run", "2026-01-01T00:00:00+00:00", "digest", 1000, 2, [Phase("a", 0.0, 10.0)])


def arrival(number: int, op: str = "bet") -> Arrival:
    return Arrival(number, number / 100, op, "a", 0, 0, "HOME", "BACK", 200, 100, 0)


def worker(index: int, *, count: int = 500, lag_s: float = 0.0002) -> WorkerResult:
    result = WorkerResult(index, scheduled=count, finished=True)
    tally = Tally(result)
    for number in range(index, 2 * count, 2):
        tally.sent(arrival(number), lag_s)
        tally.answered(arrival(number), "ok", 202, 0.001 * (number % 100 + 1))
    return tally.fill()


def test_the_whole_is_the_sum_of_its_workers() -> None:
    result = merge(PLAN, [worker(0), worker(1)])
    assert result.valid, result.invalid
    assert (result.scheduled, result.sent, result.late, result.dropped) == (1000, 1000, 0, 0)
    (cell,) = result.cells
    assert (cell.count, cell.ok, cell.statuses) == (1000, 1000, {"202": 1000})
    assert len(cell.latencies()) == 1000
    # 100 different latencies, odd ones with one worker and even ones with the other: an average would be wrong.
    assert cell.percentile(90.0).ms == pytest.approx(90, rel=0.001)
    assert [second.sent for second in result.seconds] == [100] * 10
    assert sum(result.seconds[0].latencies) == 100
    assert result.lag_p99_ms == pytest.approx(0.2, abs=0.002)


def test_json_gives_the_result_back(tmp_path: Path) -> None:
    result = merge(PLAN, [worker(0), worker(1)])
    result.write(tmp_path / "result.json")
    again = Result.from_json((tmp_path / "result.json").read_bytes())
    assert again == result
    assert again.cells[0].percentile(50.0) == result.cells[0].percentile(50.0)
    with pytest.raises(msgspec.ValidationError):
        Result.from_json(b"{}")


def test_a_late_generator_makes_the_run_invalid() -> None:
    result = merge(PLAN, [worker(0, lag_s=0.009), worker(1)])
    assert len(result.invalid) == 1
    assert "measured itself" in result.invalid[0]
    assert merge(PLAN, [worker(0, lag_s=0.009), worker(1)], lag_p99_ms=20.0).valid


def test_a_missing_worker_makes_the_run_invalid() -> None:
    reasons = merge(PLAN, [worker(0)]).invalid
    assert any("1 of 2 workers" in reason for reason in reasons)
    assert any("500 arrivals were handled, 1,000 were scheduled" in reason for reason in reasons)


def test_a_worker_that_was_stopped_makes_the_run_invalid() -> None:
    stopped = worker(1)
    stopped.finished = False
    assert any("worker 1 was stopped" in reason for reason in merge(PLAN, [worker(0), stopped]).invalid)


def test_dropped_arrivals_make_the_run_invalid_and_count_as_infinitely_late() -> None:
    part = WorkerResult(0, scheduled=500, finished=True)
    tally = Tally(part)
    for number in range(450):
        tally.sent(arrival(number), 0.0)
        tally.answered(arrival(number), "ok", 202, 0.001)
    for number in range(450, 500):
        tally.dropped(arrival(number))
    result = merge(PLAN, [tally.fill(), worker(1)])
    assert any("50 arrivals were dropped" in reason for reason in result.invalid)
    cell = result.cell("bet", "a")
    assert cell is not None
    assert (cell.dropped, cell.unanswered) == (50, 50)
    assert cell.percentile(99.0).ms is None


def test_what_a_worker_says_went_wrong_is_a_reason() -> None:
    part = worker(0)
    part.problems.append("the history's writer is gone")
    assert merge(PLAN, [part, worker(1)]).invalid == ["worker 0: the history's writer is gone"]


def test_unresolved_and_skipped_arrivals_are_counted_apart() -> None:
    part = WorkerResult(0, finished=True)
    tally = Tally(part)
    tally.sent(arrival(0), 0.0)
    tally.unanswered(arrival(0), "info", "timeout")
    tally.sent(arrival(1), 0.2)
    tally.unanswered(arrival(1), "fail", "no connection")
    tally.skipped(arrival(2, "cancel"))
    tally.fill()
    assert (part.sent, part.unresolved, part.skipped, part.late) == (2, 1, 1, 1)
    bet, cancel = part.cells
    assert (bet.unanswered, bet.info, bet.fail, bet.statuses) == (2, 1, 1, {"timeout": 1, "no connection": 1})
    assert bet.error_share == 1.0
    assert (cancel.count, cancel.skipped, cancel.error_share) == (1, 1, 0.0)


def test_limits_say_what_was_missed() -> None:
    latencies = Latencies()
    for _ in range(400):
        latencies.record_us(20_000)
    cell = Cell("bet", "a", count=410, ok=400, info=10, unanswered=10, histogram=latencies.encode())
    missed = Limit(p50_ms=30, p99_ms=30, error_share=0.01).missed(cell)
    assert len(missed) == 2
    assert "p99 is ∞" in missed[0]
    assert "2.439% errors" in missed[1]
    assert Limit(p99_ms=30).missed(Cell("bet", "a")) == ["bet in a: p99 needs 368 samples, there are 0"]


def test_a_refusal_by_rule_is_no_error() -> None:
    cell = Cell("bet", "a", count=10, ok=7, fail=3, statuses={"202": 7, "422": 2, "409": 1})
    assert cell.error_share == 0.0
