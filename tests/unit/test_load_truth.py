"""Real Locust against a server whose latencies are known: what is reported is what was, and stock pacing is not.

`python -m load.truth` plays all patterns; here are the ones that differ most, short. A noisy machine is given a second
and a third try, and at the last one the noise that the generator measured of itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from invariants.history import attempts, load
from load.freezes import BASE_SERVICE_S, PATTERNS, quantile_ms, true_latencies_s
from load.launch import command
from load.result import Result
from load.truth import Comparison, compare, server

TRIES = 3


def judged(pattern: str, *, workers: int, stock: bool = False) -> Comparison:
    """Play a pattern until it agrees with the truth; fail if it never does."""
    for tried in range(1, TRIES + 1):
        found = compare(pattern, seed=3, duration_s=6.0, rate=120.0, workers=workers, stock=stock)
        if not found.wrong():
            return found
        if tried == TRIES and found.noisy:
            assert found.wrong(slack_ms=5 * found.lag_p99_ms + 5.0) == []
            return found
    pytest.fail("\n".join(found.wrong()))


@pytest.mark.parametrize(("pattern", "workers"), [("several_short", 1), ("ramp_and_freeze", 2)])
def test_percentiles_are_those_of_the_schedule(pattern: str, workers: int) -> None:
    found = judged(pattern, workers=workers)
    assert found.sent == found.scheduled
    # 720 arrivals are too few for p99.9, and nothing else is refused.
    assert [value is None for value in found.reported_ms] == [False, False, False, False, True]


def test_stock_pacing_hides_the_freeze_that_ours_shows() -> None:
    found = judged("one_long", workers=1, stock=True)
    ours_p95, stock_p95 = found.reported_ms[2], found.stock_ms[2]
    assert ours_p95 is not None
    assert stock_p95 is not None
    assert ours_p95 > 500
    assert stock_p95 < ours_p95 / 2
    assert found.stock_sent < 0.95 * found.scheduled


def test_the_true_latency_waits_for_the_end_of_the_freeze() -> None:
    pattern = PATTERNS["one_long"]
    times = np.array([0.0, 9.999, 10.0, 12.0, 14.999, 15.0])
    latencies = true_latencies_s(times, pattern.windows(30.0), pattern.service, 30.0)
    assert latencies - BASE_SERVICE_S == pytest.approx([0, 0, 5, 3, 0.001, 0])
    assert quantile_ms(np.arange(1, 101) / 1000, 99.0) == 99.0
    assert len(PATTERNS) == 12


# --- the run itself ---------------------------------------------------------------------------------------


def locust(port: int, folder: Path, *options: str, workers: int = 2) -> list[str]:
    """A command that plays 6 s of the profile `truth` and keeps result, history and Locust's own tables."""
    usual = ["--targets", f"127.0.0.1:{port}", "--load-profile", "truth", "--time-factor", "0.2"]
    usual += ["--lag-limit-ms", "1000", "--result", str(folder / "result.json"), "--history", str(folder)]
    return command([*usual, *options], workers=workers)


def left_of(folder: Path) -> list[str]:
    """The processes that name the folder."""
    listed = subprocess.run(["ps", "ax", "-o", "args="], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if str(folder) in line]


def test_two_workers_tell_one_result_one_history_and_locusts_tables(tmp_path: Path) -> None:
    with server("none", 6.0, []) as port:
        arguments = locust(port, tmp_path, "--csv", str(tmp_path / "t"), "--prepare")
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = Result.from_json((tmp_path / "result.json").read_bytes())
    assert result.valid, result.invalid
    assert result.sent == result.scheduled > 500
    assert [worker.scheduled for worker in result.workers] == [-(-result.sent // 2), result.sent // 2]
    report = load(tmp_path)
    assert report.problems() == []
    history = attempts(report.frame)
    played = history.filter(history["key"].str.contains(f"^{result.run}-[0-9]+$"))
    assert len(played) == result.sent
    assert set(played["cls"]) == {"ok"}
    assert (played["t_invoke"] >= played["intended"]).all()
    rows = (tmp_path / "t_stats.csv").read_text().splitlines()
    aggregated = next(row for row in rows if "Aggregated" in row).split(",")
    assert int(aggregated[2]) == result.sent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    with server("none", 6.0, []) as port:
        process = subprocess.Popen(
            locust(port, tmp_path, "--time-factor", "4"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob("history/part-*.parquet")) and time.monotonic() < deadline:
                time.sleep(0.2)
            if number is signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                process.send_signal(number)
            process.wait(60)
            while left_of(tmp_path) and time.monotonic() < deadline + 60:
                time.sleep(0.2)
            assert left_of(tmp_path) == []
        finally:
            process.kill()
            process.wait(60)
    if number is signal.SIGINT:
        assert process.returncode == 30
        result = json.loads((tmp_path / "result.json").read_bytes())
        assert result["sent"] > 0
        assert any("was stopped" in reason for reason in result["invalid"])
        assert load(tmp_path).problems() == []
    else:
        assert any("never closed" in problem for problem in load(tmp_path).problems())


def test_a_trace_is_played_by_all_workers_together(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [
        f"{number / 100},{number + 1}," + ("bet,final,HOME,BACK,200,50" if number % 2 else "balance,,,,,")
        for number in range(100)
    ]
    trace.write_text("\n".join(["time,user,operation,match,selection,side,odds,stake", *lines]))
    with server("none", 2.0, []) as port:
        arguments = locust(port, tmp_path, "--trace", str(trace), "--time-factor", "1", "--first-wallet", "0")
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = Result.from_json((tmp_path / "result.json").read_bytes())
    assert {(cell.op, cell.phase, cell.ok) for cell in result.cells} == {("bet", "trace", 50), ("balance", "trace", 50)}
    assert sorted(attempts(load(tmp_path).frame)["user"]) == list(range(1, 101))


def test_no_module_that_cannot_live_with_gevent_enters_the_process() -> None:
    code = "import sys, load.locustfile, load.grpc_door; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert {"asyncpg", "aiokafka", "confluent_kafka", "uvloop", "polars"} & set(done.stdout.split()) == set()


def test_wrong_options_are_told_before_anything_begins(tmp_path: Path) -> None:
    arguments = locust(1, tmp_path, "--load-profile", "nothing", workers=1)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no profile 'nothing'" in done.stderr
    assert not (tmp_path / "result.json").exists()
