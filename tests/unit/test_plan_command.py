"""replay-plan and failpoints on the command line: what needs no stack, and mistakes that end before one is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ledgerproof.failpoints_command import failpoints_group
from ledgerproof.plan_command import replay_plan_command
from reference.failpoints import CATALOGUE

ROOT = Path(__file__).parents[2]


def told(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ledgerproof", *arguments],
        cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_file_that_is_no_plan_ends_with_its_mistake_and_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(
        'title = "x"\n[[clients]]\nname = "a"\nsteps = [{do = "kill", node = "moon"}]\n'
    )
    done = told(tmp_path, "replay-plan", "plan.toml")
    assert done.returncode == 2
    assert "plan.toml: $.clients[0].steps[0].node: 'moon' is not in the plan" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.toml"]


def test_a_lent_stack_must_be_there(tmp_path: Path) -> None:
    plan = ROOT / "tests/plans/api_dies_before_answer.toml"
    done = told(tmp_path, "replay-plan", str(plan), "--lent")
    assert done.returncode == 2
    assert "start one with `ledgerproof up`" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_check_only_says_what_the_plan_is() -> None:
    plan = ROOT / "tests/plans/relay_dies_before_mark.toml"
    done = CliRunner().invoke(replay_plan_command, [str(plan), "--check-only"], standalone_mode=False)
    assert done.output == f"{plan}: the relay dies between send and mark\n"


def test_the_catalogue_needs_no_stack() -> None:
    said = CliRunner().invoke(failpoints_group, ["list", "--catalogue", "--json"], standalone_mode=False)
    assert json.loads(said.output) == CATALOGUE
    table = CliRunner().invoke(failpoints_group, ["list", "--catalogue"], standalone_mode=False).output
    assert all(name in table for name in CATALOGUE)


@pytest.mark.parametrize(
    "arguments",
    [
        ["arm", "--node", "api0", "nowhere", "exit"],
        ["arm", "--node", "api0", "cache.before_set", "explode"],
        ["arm", "--node", "api0", "cache.before_set", "delay"],
        ["arm", "cache.before_set", "exit"],
        ["disarm", "--node", "api0", "nowhere"],
    ],
)
def test_orders_that_make_no_sense_are_refused_before_a_stack_is_looked_for(arguments: list[str]) -> None:
    assert CliRunner().invoke(failpoints_group, arguments).exit_code == 2
