"""`ledgerproof load`: comparing runs, searching for the knee, and taking in what workers record."""

import socket
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from invariants import history
from invariants.history import Recorder
from ledgerproof.cli import cli
from ledgerproof.loading import compare, knee
from ledgerproof.loading.compare import NotComparable, Said, dispersion
from ledgerproof.loading.intake import Intake, command_of
from ledgerproof.loading.knee import Window, search
from load import requests
from load.histograms import Latencies
from load.profiles import Knee
from load.records import Complete, End, Hello, Invoke, frame
from load.result import COARSE_MS, Cell, Phase, Result, Second
from load.schedule import Arrival


def result_of(per_second_ms: list[list[float]], *, unanswered: int = 0, profile: str = "steady") -> Result:
    """One operation in one phase; each list holds the latencies of one second."""
    latencies, seconds = Latencies(), []
    for number, each in enumerate(per_second_ms):
        classes = np.bincount(np.searchsorted(COARSE_MS, each, side="left"), minlength=len(COARSE_MS) + 1)
        seconds.append(Second(number, sent=len(each), ok=len(each), latencies=classes.tolist()))
        for latency in each:
            latencies.record_us(round(latency * 1000))
    count = len(latencies)
    cell = Cell(
        "bet", "steady", count=count + unanswered, ok=count, unanswered=unanswered, histogram=latencies.encode()
    )
    return Result(
        profile=profile,
        seed=1,
        started_at="",
        sent=count,
        scheduled=count,
        cells=[cell],
        seconds=seconds,
        phases=[Phase("steady", 0.0, float(len(per_second_ms)))],
    )


def exponential(mean_ms: float, seed: int, seconds: int = 30, per_s: int = 200) -> list[list[float]]:
    draw = np.random.default_rng(seed)
    return [draw.exponential(mean_ms, per_s).tolist() for _ in range(seconds)]


def test_two_runs_of_one_service_do_not_differ_and_a_slower_one_is_worse() -> None:
    a, b = result_of(exponential(10, 1)), result_of(exponential(10, 2))
    same = compare.compare(a, b, ("A", "B"))
    assert same.said is Said.SAME
    slower = compare.compare(a, result_of(exponential(13, 3)), ("A", "B"))
    assert slower.said is Said.WORSE
    p50 = next(line for line in slower.lines if line.measure == "p50")
    assert p50.said is Said.WORSE
    assert p50.low is not None
    assert p50.high is not None
    assert p50.low < 1.3 < p50.high
    faster = compare.compare(result_of(exponential(13, 3)), a, ("A", "B"))
    assert faster.said is Said.BETTER


def test_interval_of_a_ratio_covers_the_truth_in_about_95_of_100_comparisons() -> None:
    covered = 0
    for seed in range(60):
        a, b = (result_of(exponential(10, 2 * seed + own, per_s=60)) for own in (0, 1))
        lines = compare.compare(a, b, ("A", "B")).lines
        p90 = next(line for line in lines if line.measure == "p90")
        assert p90.low is not None
        assert p90.high is not None
        covered += p90.low <= 1 <= p90.high
    assert covered >= 53  # 60 tries of 95 % are below this once in 200 times


def test_bursts_of_slow_seconds_widen_the_interval() -> None:
    """A run in which every tenth second is slow has few independent slow moments, however many samples."""
    calm, bursts = exponential(10, 1), exponential(10, 2)
    for second in range(0, 30, 10):
        bursts[second] = [latency + 200 for latency in bursts[second]]
    assert dispersion(result_of(calm).seconds, 90.0) < 2
    assert dispersion(result_of(bursts).seconds, 90.0) > 50
    line = next(
        line
        for line in compare.compare(result_of(bursts), result_of(bursts), ("A", "B")).lines
        if line.measure == "p99"
    )
    assert line.said is Said.OPEN
    assert "independent" in line.why


def test_unanswered_arrivals_make_a_percentile_infinite_and_not_absent() -> None:
    broken = result_of(exponential(10, 1), unanswered=2_000)
    line = next(
        line for line in compare.compare(broken, broken, ("A", "B")).lines if (line.op, line.measure) == ("bet", "p90")
    )
    assert line.said is Said.OPEN
    assert "without an answer" in line.why


def several(seed: int) -> Result:
    """Six phases with four operations each, all of one distribution: 84 measures."""
    draw = np.random.default_rng(seed)
    cells, seconds, phases = [], [], []
    for phase in range(6):
        name = f"phase {phase}"
        phases.append(Phase(name, 20.0 * phase, 20.0 * phase + 20))
        for op in range(4):
            latencies = Latencies()
            for latency in draw.exponential(10, 1_000):
                latencies.record_us(round(latency * 1000))
            cells.append(Cell(f"op {op}", name, count=1_000, ok=1_000, histogram=latencies.encode()))
        for second in range(20):
            classes = np.bincount(np.searchsorted(COARSE_MS, draw.exponential(10, 200)), minlength=len(COARSE_MS) + 1)
            seconds.append(Second(20 * phase + second, sent=200, ok=200, latencies=classes.tolist()))
    return Result(profile="many", seed=1, started_at="", cells=cells, seconds=seconds, phases=phases)


def test_of_many_measures_a_few_that_differ_by_chance_decide_nothing() -> None:
    said = [compare.compare(several(seed), several(seed + 100), ("A", "B")).said for seed in range(10)]
    assert sum(each in {Said.WORSE, Said.BETTER} for each in said) <= 1
    slower = several(7)
    for cell in slower.cells[:4]:
        latencies = Latencies()
        for latency in np.random.default_rng(3).exponential(16, 1_000):
            latencies.record_us(round(latency * 1000))
        cell.histogram = latencies.encode()
    assert compare.compare(several(1), slower, ("A", "B")).said is Said.WORSE


def test_few_errors_of_few_arrivals_are_not_called_no_difference() -> None:
    a, b = result_of(exponential(10, 1, per_s=1)), result_of(exponential(10, 2, per_s=1))
    b.cells[0].ok -= 3
    line = next(line for line in compare.compare(a, b, ("A", "B")).lines if line.measure == "errors")
    assert line.said is Said.OPEN


def test_a_percentile_that_only_one_run_has_is_worse_and_not_undecided() -> None:
    whole, broken = result_of(exponential(10, 1)), result_of(exponential(10, 1), unanswered=0)
    broken.cells[0].unanswered = broken.cells[0].count = 6_000
    broken.cells[0].count = 12_000
    whole.cells[0].count = 12_000
    lines = compare.compare(whole, broken, ("A", "B")).lines
    assert next(line for line in lines if line.measure == "p90").said is Said.WORSE
    assert compare.compare(broken, whole, ("A", "B")).said is Said.BETTER


def test_unlike_runs_are_refused(tmp_path: Path) -> None:
    a, other = result_of(exponential(10, 1)), result_of(exponential(10, 1), profile="soak")
    with pytest.raises(NotComparable, match="like with like"):
        compare.compare(a, other, ("A", "B"))
    with pytest.raises(NotComparable, match="phases"):
        compare.compare(a, result_of(exponential(10, 1, seconds=10)), ("A", "B"))
    with pytest.raises(NotComparable, match="same rates"):
        compare.compare(a, result_of(exponential(10, 1, per_s=300)), ("A", "B"))
    (tmp_path / "load.json").write_text("{")
    with pytest.raises(NotComparable, match="no result of a load"):
        compare.read_result(tmp_path)
    with pytest.raises(NotComparable, match="cannot read"):
        compare.read_result(tmp_path / "nowhere")


def test_compare_command_tells_its_verdict_by_exit_code(tmp_path: Path) -> None:
    good, bad, invalid = (tmp_path / name for name in ("good.json", "bad.json", "invalid.json"))
    result_of(exponential(10, 1)).write(good)
    result_of(exponential(20, 2)).write(bad)
    doubtful = result_of(exponential(10, 3))
    doubtful.invalid = ["it measured itself"]
    doubtful.write(invalid)
    run = lambda *names: CliRunner().invoke(cli, ["load", "compare", *map(str, names)], standalone_mode=False)  # noqa: E731
    assert run(good, good).return_value == 0
    worse = run(good, bad)
    assert worse.return_value == 10
    assert "B is worse" in worse.output
    assert run(good, invalid).return_value == 30
    told = msgspec.json.decode(run(good, bad, "--json").output)
    assert told["said"] == "worse"


# -- the knee


def service(limit: float, *, late_above: float = 1e9):
    """A service that holds every rate up to `limit`; beyond `late_above` the generator itself is late."""

    def attempt(rate: float, _number: int) -> Window:
        held = None if rate > late_above else rate <= limit
        return Window(rate, held, "", 1.0, 1.0, 1.0, 1.0)

    return attempt


BOUNDS = Knee(low_rate=100, high_rate=4000, window_s=1, tolerance=0.1, p99_ms=250)


@pytest.mark.parametrize("limit", [100, 137, 900, 3_800])
def test_search_brackets_the_knee_within_its_tolerance(limit: float) -> None:
    found = search(BOUNDS, service(limit))
    assert found.holds is not None
    assert found.fails is not None
    assert found.holds <= limit < found.fails
    assert found.fails / found.holds <= 1.1
    assert found.holds <= found.knee <= found.fails
    assert len(found.windows) <= knee.WINDOWS_MAX


def test_search_tells_no_knee_that_it_has_not_bracketed() -> None:
    above = search(BOUNDS, service(10_000))
    assert (above.holds, above.fails, above.knee) == (4000, None, None)
    assert "do not bracket" in above.text
    below = search(BOUNDS, service(50))
    assert (below.holds, below.knee, len(below.windows)) == (None, None, 1)


def test_windows_that_prove_nothing_are_played_again_and_then_bound_the_search_but_not_the_knee() -> None:
    found = search(BOUNDS, service(10_000, late_above=500))
    assert found.holds is not None
    assert found.holds <= 500 < (found.unproven or 0) <= 550
    assert sum(window.held is None for window in found.windows) >= 2
    assert (found.fails, found.knee) == (None, None), "the generator's limit is no knee of the service"
    assert "lies higher" in found.text


# -- the intake


def invoke(number: int, op: str, key: str, **more: object) -> Invoke:
    fields = dict.fromkeys(Invoke.__struct_fields__) | {"attempt": number, "client": 1000, "op": op, "key": key}
    return Invoke(**(fields | {"api": "api0", "intended": 1.0, "t": 1.0 + number} | more))


def sent(address: str, *records: object) -> None:
    encode = msgspec.msgpack.Encoder().encode
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.connect(address)
        stream.sendall(b"".join(frame(encode(record)) for record in records))


def test_records_of_two_workers_become_one_history_and_unknown_commands_are_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "run")
    intake = Intake(recorder)
    address = intake.start()
    bet = {"user": 7, "match_id": "m", "selection": "HOME", "side": "BACK", "odds": 210, "amount": 50}
    sent(
        address,
        Hello(0),
        invoke(1, "bet", "a", **bet),
        Complete("info", 1, 1000, 3.0),
        invoke(2, "bet", "b", **bet),
        Complete("ok", 2, 1000, 3.0, 202),
        End(2),
    )
    sent(address, Hello(1), invoke(1, "deposit", "c", user=8, amount=5), Complete("ok", 1, 1000, 2.0, 202), End(1))
    intake.stop(2)
    recorder.close()
    loaded = history.load(tmp_path)
    assert loaded.problems() == []
    assert sorted(history.attempts(loaded.frame)["attempt"]) == [1, 2, 3]
    assert intake.problems == []
    assert (intake.sent, intake.acknowledged_bets, intake.unknown_count) == (3, 1, 1)
    assert intake.last_unknown_sent_s == 2.0
    assert list(intake.unknown) == [("ledger", 7, "a")]
    assert intake.numbers.last == 3


def test_a_worker_that_breaks_off_is_a_gap_that_is_said(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "run")
    intake = Intake(recorder)
    sent(intake.start(), Hello(0), invoke(1, "deposit", "c", user=8, amount=5))
    intake.stop(1)
    recorder.close()
    assert any("broke off" in problem for problem in intake.problems)
    assert any("1 of 1 workers" in problem for problem in intake.problems)


def test_a_command_sent_again_has_the_body_it_was_sent_with() -> None:
    """Another body under the same key would be refused, or taken for another command by the checker."""
    arrival = Arrival(1, 0.0, "bet", "p", 6, 0, "HOME", "BACK", 210, 50, 0)
    names = requests.Names("r", "w", 1, ["018bcfe5-939a-7739-8840-5642cd670379"])
    for op in ("bet", "deposit", "withdraw"):
        drawn = names.command(replace(arrival, op=op))
        begun = invoke(
            1,
            drawn.op,
            str(drawn.key),
            **{
                name: getattr(drawn, name)
                for name in ("user", "match_id", "bet_id", "selection", "side", "odds", "amount")
            },
        )
        again = command_of(begun)
        assert again is not None
        assert (again.path, again.body, again.payload_hash) == (drawn.path, drawn.body, drawn.payload_hash())
    drawn = requests.cancel(7, "m", "b", "key")
    again = command_of(invoke(1, "cancel", "key", user=7, match_id="m", bet_id="b"))
    assert again is not None
    assert (again.path, again.body) == (drawn.path, drawn.body)
    read = msgspec.structs.replace(invoke(1, "balance", "key", user=7), key=None)
    assert command_of(read) is None
