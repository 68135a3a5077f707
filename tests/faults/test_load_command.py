"""`ledgerproof load` as a user runs it: a verdict with everything checked, and nothing left when it is ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ledgerproof.loading.compare import LOAD_FILE
from load.result import Result

ROOT = Path(__file__).parents[2]
LOAD = [sys.executable, "-m", "ledgerproof", "load"]
DOWN = [sys.executable, "-m", "ledgerproof", "down", "--json"]
WITHIN_S = 240.0
# The machine of a test run is busy; that a generator may be late is what other tests are about.
PATIENT = ("--lag-limit-ms", "500")


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty working folder on the checkout's disk: temporary folders may be memory, and fsync must be real."""
    folder = ROOT / ".ledgerproof" / "tests" / f"load-{os.getpid()}-{request.node.name[:30]}"
    folder.mkdir(parents=True)
    yield folder
    subprocess.run(DOWN, cwd=folder, env=environment(), capture_output=True, timeout=120, check=False)
    shutil.rmtree(folder)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    with (place / "out").open("w") as out, (place / "err").open("w") as err:
        return subprocess.Popen([*LOAD, *arguments], cwd=place, env=environment(), stdout=out, stderr=err, text=True)


def wait_for(condition: Callable[[], bool], place: Path, what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}; {(place / 'err').read_text()[-2000:]}"
        time.sleep(0.1)


def generators_of(process: psutil.Process) -> list[psutil.Process]:
    return [each for each in process.children(recursive=True) if "locust" in " ".join(each.cmdline())]


def playing(place: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A load under way, with its Locust processes: a master and two workers."""
    process = start(place, "steady", "--seed", "2", *PATIENT, *arguments)
    inside = psutil.Process(process.pid)
    wait_for(lambda: "bets acknowledged" in (place / "err").read_text(), place, "the load plays")
    generators = generators_of(inside)
    assert len(generators) == 3
    return process, generators


def test_a_small_profile_is_played_recorded_and_proved(place: Path) -> None:
    process = start(place, "smoke", "--seed", "1", "--json", *PATIENT)
    assert process.wait(WITHIN_S) == 0, (place / "err").read_text()[-2000:]
    verdict = json.loads((place / "out").read_text())
    assert verdict["verdict"] == "PASS", verdict["reasons"]
    assert sum(verdict["anomalies"].values()) == 0
    assert len(verdict["judges"]) == 3
    (folder,) = (place / "reports" / "runs").iterdir()
    result = Result.from_json((folder / LOAD_FILE).read_bytes())
    assert result.valid
    assert result.sent + result.skipped == result.scheduled
    played = {row["op"] for row in verdict["operations"] if row["ok"]}
    assert played >= {"bet", "deposit", "withdraw", "balance", "entries", "cancel", "close_match", "settle_match"}
    # Bets over gRPC are bets of the history too.
    bets = sum(row["ok"] for row in verdict["operations"] if row["op"] == "bet")
    assert bets == result.total(op="bet").ok + result.total(op="grpc_bet").ok
    assert verdict["sizes"]["history_rows"] > 2 * result.sent
    assert (folder / "report.html").exists()


def test_a_load_that_is_stopped_says_so_and_leaves_nothing(place: Path) -> None:
    process, generators = playing(place)
    process.send_signal(signal.SIGINT)
    assert process.wait(WITHIN_S) == 40
    assert not any(each.is_running() for each in generators)
    (folder,) = (place / "reports" / "runs").iterdir()
    assert json.loads((folder / "verdict.json").read_text())["verdict"] == "ABORTED"


def test_generators_do_not_outlive_a_load_that_is_killed(place: Path) -> None:
    process, generators = playing(place)
    process.kill()
    process.wait(10)
    wait_for(lambda: not any(each.is_running() for each in generators), place, "the generators end")


def test_what_cannot_be_played_is_refused_before_anything_starts(place: Path) -> None:
    process = start(place, "nothing_of_the_kind")
    assert process.wait(60) == 2
    said = (place / "err").read_text()
    assert "nothing_of_the_kind" in said
    assert "smoke" in said, "it names the profiles that there are"
    assert not (place / "reports").exists()
