"""A sweep computes every combination once, goes on after a kill, and names file, line and field of what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import polars as pl
import psutil
import pytest
from click.testing import CliRunner, Result

from ledgerproof import cli
from sim import sweep as sweeping
from sim.command_path import Configuration
from sim.sweep import Answers, Range, Row, Sweep, digest_of, here, run, stored_rows, with_values
from sim.tables import TableError, parse_toml

TEXT = """\
customers = 1000
replications = 2
[grid]
rate_per_s = {from = 100, to = 1000, steps = 2, scale = "log"}
batch_max = [1, 16]
fixed_ms = 3
"""
SLOW = ("--grid", "rate_per_s=200:2000:200", "--workers", "1")
STARTS_S = 120.0
ENDS_S = 60.0


def sweep_of(text: str = TEXT) -> Sweep:
    return parse_toml(text, Sweep, "grid.toml")


def command(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["sim", "sweep", *arguments])


def test_the_grid_is_every_combination_and_the_rest_has_its_defaults() -> None:
    found = sweep_of().configurations()
    assert [(each.rate_per_s, each.batch_max) for each in found] == [(100, 1), (100, 16), (1000, 1), (1000, 16)]
    assert {each.fixed_ms for each in found} == {3}
    assert {each.linger_ms for each in found} == {Configuration().linger_ms}


def test_ranges_of_whole_parameters_are_rounded_and_doubles_left_out() -> None:
    assert sweep_of("[grid]\napis = {from = 1, to = 3, steps = 5}").axes == {"apis": [1, 2, 3]}
    assert Range(1, 100, 3, "log").values() == [1, 10, 100]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[grid]\nrate_per_s = 5\nbatch = 3", "grid.toml:3: grid.batch: there is no such field; did you mean"),
        ("[grid]\n\nbatch_max = 0", "grid.toml:3: grid.batch_max: must be 1 to 1e+06, not 0"),
        ("[grid]\nbatch_max = [1, 2.5]", "grid.toml:2: grid.batch_max: must be a whole number, not 2.5"),
        ("[grid]\nlinger_ms = []", "grid.toml:2: grid.linger_ms: must have a value"),
        ("[grid]\nrate_per_s = 'fast'", "grid.toml:2: grid.rate_per_s: 'fast' is not allowed"),
        ("[grid]\nrate_per_s = {from = 5, to = 1, steps = 3}", "grid.toml:2: grid.rate_per_s.to: must be above"),
        ("[grid]\nrate_per_s = {from = 5, to = 9}", "grid.toml:2: grid.rate_per_s.steps: is missing"),
        ("customers = 10\n[grid]\n", "grid.toml:1: customers: 10 is not allowed"),
        (
            "[grid]\nrate_per_s = {from = 1, to = 9, steps = 9999}\nfixed_ms = {from = 1, to = 9, steps = 999}",
            "at most",
        ),
        (
            "customers = 5000000\nreplications = 1000\n[grid]\nrate_per_s={from=1,to=9,steps=99}",
            "grid.toml:1: customers",
        ),
        ("customers = 1000", "grid.toml:1: grid: is missing"),
        ("[grid]\nrate_per_s = nan", "grid.toml:2: grid.rate_per_s"),
    ],
)
def test_a_bad_grid_is_refused_with_file_line_and_field(text: str, says: str) -> None:
    with pytest.raises(TableError) as refused:
        sweep_of(text)
    assert says in str(refused.value)


def test_values_of_the_command_line_go_before_those_of_the_file() -> None:
    changed = with_values(sweep_of(), ("batch_max=2,4", "linger_ms=0:4:3", "fixed_ms=1"))
    assert changed.axes == {"rate_per_s": [100, 1000], "batch_max": [2, 4], "linger_ms": [0, 2, 4], "fixed_ms": [1]}


@pytest.mark.parametrize(
    "wrong",
    ["batches=1", "batch_max", "batch_max=many", "batch_max=0", "linger_ms=4:0:3", "linger_ms=1:2:3:4", "apis=1:2:1"],
)
def test_bad_values_of_the_command_line_exit_2_and_are_named(wrong: str) -> None:
    result = command("--grid", wrong)
    assert result.exit_code == 2
    assert f"--grid {wrong}: {wrong.partition('=')[0]}" in " ".join(result.stderr.split())


def test_results_are_found_again_and_a_wider_grid_computes_only_what_is_new(tmp_path: Path) -> None:
    first = run(sweep_of(), tmp_path, here)
    computed: list[str] = []

    def counting(sweep: Sweep, missing: dict[str, Configuration]) -> Answers:
        for digest, outcome in here(sweep, missing):
            computed.append(digest)
            yield digest, outcome

    assert run(sweep_of(), tmp_path, counting) == first
    assert computed == []
    wider = with_values(sweep_of(), ("batch_max=1,16,64",))
    rows = run(wider, tmp_path, counting)
    assert len(computed) == 2
    assert [row.configuration for row in rows] == wider.configurations()
    assert [row for row in rows if row.configuration.batch_max != 64] == first


def test_another_seed_or_length_is_another_result() -> None:
    sweep = sweep_of()
    configuration = sweep.configurations()[0]
    others = [msgspec.structs.replace(sweep, **change) for change in ({"seed": 2}, {"customers": 2000})]
    assert len({digest_of(each, configuration) for each in [sweep, *others]}) == 3
    assert digest_of(sweep, configuration) == digest_of(sweep_of(), configuration)


def test_a_line_that_a_kill_cut_short_is_computed_again(tmp_path: Path) -> None:
    first = run(sweep_of(), tmp_path, here)
    file = tmp_path / sweeping.RESULTS
    file.write_bytes(file.read_bytes()[:-100])
    assert len(stored_rows(tmp_path)) == 3
    assert run(sweep_of(), tmp_path, here) == first
    assert len(stored_rows(tmp_path)) == 4


def test_an_interrupted_sweep_keeps_what_was_done(tmp_path: Path) -> None:
    def interrupted(sweep: Sweep, missing: dict[str, Configuration]) -> Answers:
        yield next(here(sweep, missing))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sweep_of(), tmp_path, interrupted)
    assert len(stored_rows(tmp_path)) == 1


def test_the_table_holds_parameters_and_intervals(tmp_path: Path) -> None:
    rows = run(sweep_of(), tmp_path, here)
    sweeping.write_parquet(rows, tmp_path / sweeping.PARQUET)
    table = pl.read_parquet(tmp_path / sweeping.PARQUET)
    assert table["batch_max"].to_list() == [1, 16, 1, 16]
    assert (table["mean_ms_low"] <= table["mean_ms"]).all()
    # A thousand commands of a replication, less a warm-up, have no p99.
    assert table["p99_ms"].null_count() == 4


def test_dask_computes_what_this_process_computes_and_the_same_command_finds_it(tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(TEXT)
    # A program of its own, as the user starts it: the workers are its children.
    done = finished_sweep(str(grid), "--workers", "1", "--out", str(tmp_path / "out"), "--json")
    rows = [msgspec.convert(row, Row) for row in json.loads(done.stdout)["rows"]]
    assert rows == run(sweep_of(), tmp_path / "here", here)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock") == [
        sweeping.RESULTS,
        sweeping.PARQUET,
    ]
    again = finished_sweep(str(grid), "--out", str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:9", "--json")
    assert json.loads(again.stdout)["rows"] == json.loads(done.stdout)["rows"], "nothing was left to compute"


def finished_sweep(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "ledgerproof", "sim", "sweep", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=STARTS_S,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_leaves_no_process_and_keeps_its_results(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "out"
    started = subprocess.Popen(
        [sys.executable, "-m", "ledgerproof", "sim", "sweep", *SLOW, "--out", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert started.stderr is not None
    family: list[psutil.Process] = []
    try:
        until(lambda: len(stored_rows(folder)) >= 2, STARTS_S)
        family = psutil.Process(started.pid).children(recursive=True)
        assert family, "the work is done by other processes"
        # Ctrl-C of a terminal reaches the whole group; a kill reaches one process.
        (os.killpg if number == signal.SIGINT else os.kill)(started.pid, number)
        code = started.wait(ENDS_S)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 40)
        until(lambda: not any(process.is_running() for process in family), ENDS_S)
    finally:
        for process in family:
            if process.is_running():
                process.kill()
        started.kill()
        started.wait()
        told = started.stderr.read().decode()
        started.stderr.close()
    assert "Traceback" not in told
    kept = stored_rows(folder)
    wanted = with_values(Sweep(grid=sweeping.Grid()), (SLOW[1],))
    assert 2 <= len(kept) < 200
    assert set(kept) <= {digest_of(wanted, each) for each in wanted.configurations()}


def until(true: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_two_sweeps_do_not_write_to_one_folder(tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"):
        result = command("--grid", "apis=1", "--out", str(tmp_path))
    assert isinstance(result.exception, cli.EnvironmentProblem)
    assert "another sweep" in str(result.exception)


def test_an_address_without_a_scheduler_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "CLOSE_S", 1.0)
    for address in ("tcp://127.0.0.1:9", "nonsense://here"):
        result = command("--grid", "apis=1", "--scheduler", address, "--out", str(tmp_path))
        assert isinstance(result.exception, cli.EnvironmentProblem)
        assert f"no scheduler at {address}" in str(result.exception)


def test_help_names_every_parameter() -> None:
    text = command("--help").stdout
    for name in Configuration.__struct_fields__:
        assert name in text, name


def test_a_sweep_of_nothing_is_refused() -> None:
    result = command()
    assert result.exit_code == 2
    assert "--grid" in result.stderr
