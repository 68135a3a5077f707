"""Plans on a real stack: what fails where it is told to, and what the proof says of it."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from compose import failpoints
from compose.errors import NoFailpoints
from compose.stack import Stack
from compose.state import StackSpec
from invariants.run import load_run
from ledgerproof.plan import format as plans
from ledgerproof.plan.runner import PlanOptions, run_plan
from ledgerproof.progress import Progress
from reference.failpoints import Arm

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "tests" / "plans"
ROOT_FOLDER = ROOT / ".ledgerproof" / "tests"


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder on the checkout's disk, for fsync must be real."""
    folder = ROOT_FOLDER / f"plans-{os.getpid()}"
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def stack(place: Path) -> Iterator[Stack]:
    with Stack.start(plans.StackShape(servers=2).spec(), place) as started:
        yield started
    assert started.residue == []


def played(stack: Stack, place: Path, name: str) -> tuple[Path, dict[str, Any]]:
    options = PlanOptions(out=place / "runs", stack=stack, report=False)
    return run_plan(plans.load(PLANS / name), options, Progress())


@pytest.mark.timeout(600)
def test_an_answer_lost_between_commit_and_ack_resolves_as_applied(stack: Stack, place: Path) -> None:
    folder, verdict = played(stack, place, "api_dies_before_answer.toml")
    assert verdict["verdict"] == "PASS", verdict["reasons"]
    assert verdict["sometimes"]["an info resolved as applied"] == 1
    assert verdict["sometimes"]["commit succeeded and the answer was lost"] == 1
    run = load_run(folder)
    (row,) = run.first_resolution.select("key", "resolution").rows()
    assert row[0].endswith("lost")
    assert row[1] == "applied"
    entries = run.entries.filter(pl.col("idempotent_key") == row[0])
    assert entries["amount"].to_list() == [1234]
    told = json.loads((folder / "failpoints.json").read_text())
    assert [(each["node"], each["point"], each["action"]) for each in told["fired"]] == [
        ("api0", "api.after_commit_before_ack", "exit")
    ]
    cells = json.loads((folder / "cells.json").read_text())
    assert {"fault": "exit api.after_commit_before_ack", "operation": "deposit", "phase": "before"}.items() <= next(
        cell for cell in cells["cells"] if cell["unknown"]
    ).items()


@pytest.mark.timeout(600)
def test_a_relay_that_dies_before_it_marks_sends_twice_and_nothing_happens_twice(stack: Stack, place: Path) -> None:
    _, verdict = played(stack, place, "relay_dies_before_mark.toml")
    assert verdict["verdict"] == "PASS", verdict["reasons"]
    assert verdict["raw_duplicates"] >= 1
    assert verdict["anomalies"]["A22"] == 0
    assert verdict["sometimes"]["relay died between send and mark"] >= 1
    assert "V01" not in verdict["anomalies"], "this plan is not held to it"
    assert verdict["plan"]["waived"] == ["V01"]
    assert verdict["sla"] == []


@pytest.mark.timeout(600)
def test_a_plan_of_every_step_runs_as_planned(stack: Stack, place: Path) -> None:
    folder, verdict = played(stack, place, "every_step.json")
    assert verdict["verdict"] == "PASS", verdict["reasons"]
    assert sum(verdict["anomalies"].values()) == 0
    assert {(fault["kind"], fault["target"]) for fault in verdict["faults"]} == {
        ("kill", "matcher0"),
        ("pause", "redis"),
    }
    fired = {each["point"] for each in json.loads((folder / "failpoints.json").read_text())["fired"]}
    assert fired == {
        "api.after_commit_before_ack",
        "projector.after_apply_before_cache",
        "settler.after_pay_before_mark",
    }
    # Runs before this one have left wallets on the stack: none of them is in this run's evidence.
    assert load_run(folder).table("ledger")["user_id"].n_unique() == 3


@pytest.mark.timeout(600)
def test_a_run_that_did_not_go_as_planned_is_invalid(stack: Stack, place: Path) -> None:
    plan = plans.decode(
        json.dumps(
            {
                "title": "nothing goes as planned",
                "stack": {"servers": 2},
                "requires": {"operations": ["withdraw"], "waive": ["V01"]},
                "wallets": [{"name": "anna"}],
                "clients": [
                    {
                        "name": "a",
                        "steps": [
                            {"do": "arm", "node": "settler0", "point": "settler.before_page", "action": "exit"},
                            {"do": "deposit", "wallet": "anna", "amount_minor": 1, "expect": "refused"},
                            {"do": "wait", "until": "dead", "node": "relay0", "timeout_s": 0.5},
                            {"do": "withdraw", "wallet": "anna", "amount_minor": 1},
                        ],
                    }
                ],
            }
        )
    )
    _, verdict = run_plan(plan, PlanOptions(out=place / "runs", stack=stack, report=False), Progress())
    assert verdict["verdict"] == "INVALID"
    assert verdict["exit_code"] == 30
    text = "\n".join(verdict["reasons"])
    assert "a, step 1 (deposit): refused was expected, it was ACCEPTED/ok" in text
    assert "a, step 2 (wait): not dead relay0 within 0.5 s" in text
    assert "failpoint settler.before_page of settler0 was armed and never did anything" in text
    assert "operation withdraw never succeeded, and the plan requires it" in text


def test_sockets_are_their_owners_and_dead_nodes_still_say_what_they_counted(stack: Stack) -> None:
    nodes = failpoints.armed_nodes(stack)
    assert {"api0", "api1", "relay0", "matcher0", "settler0", "projector0", "reconciler0"} == set(nodes)
    for node in nodes:
        path = stack.folder / node / "failpoints.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert failpoints.states(stack, node)
    failpoints.arm(stack, "relay0", Arm("relay.after_send_before_mark", "raise"))
    stack.kill("relay0")
    with pytest.raises(NoFailpoints, match=r"relay0 do not answer.*it is dead"):
        failpoints.states(stack, "relay0")
    assert failpoints.counts(stack, "relay0")["relay.after_lead_before_progress"][0] > 0
    stack.start_node("relay0")
    states = {point.name: point for point in failpoints.states(stack, "relay0")}
    assert states["relay.after_send_before_mark"].armed is None, "arms end with the process"


def test_the_command_line_arms_lists_and_disarms(stack: Stack) -> None:
    def told(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ledgerproof", "failpoints", *arguments, "--stack", str(stack.folder)],
            cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    armed = told("arm", "--node", "api1", "cache.before_set", "delay", "--delay-ms", "5", "--every")
    assert armed.returncode == 0, armed.stderr
    assert armed.stdout.startswith("cache.before_set: delay 5 ms every hit")
    listed = json.loads(told("list", "--json").stdout)
    (point,) = [each for each in listed["api1"] if each["name"] == "cache.before_set"]
    assert point["armed"] == {"name": "cache.before_set", "action": "delay", "times": None, "delay_ms": 5}
    assert "cache.before_set" in told("list").stdout
    assert "not armed" in told("disarm", "--node", "api1", "cache.before_set").stdout
    wrong = told("arm", "--node", "pg0", "cache.before_set", "exit")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_a_stack_that_nobody_asked_to_fail_has_no_socket(place: Path) -> None:
    spec = StackSpec(servers=1, apis=1, relays=0, matchers=0, settlers=0, projectors=0, reconcilers=0)
    with Stack.start(spec, place) as plain:
        assert plain.config.failpoint_folder is None
        assert list(plain.folder.glob("*/failpoints.*")) == []
        assert failpoints.armed_nodes(plain) == []
        with pytest.raises(NoFailpoints, match="started without failpoints"):
            failpoints.arm(plain, "api0", Arm("cache.before_set", "exit"))
