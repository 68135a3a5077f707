"""`ledgerproof sim scaling` and `sim failures` print tables or JSON, take changes, and refuse wrong files and names."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ledgerproof import cli
from sim.scaling_world import SCALING_TOML

SHORT = ("--set", "replications=2", "--shape", "steady")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["sim", *arguments])


def ended(*arguments: str) -> tuple[object, str]:
    """Exit code and output of a command that ended well; the group returns its code to `main`, which exits with it."""
    result = CliRunner().invoke(cli.cli, ["sim", *arguments], standalone_mode=False)
    assert result.exception is None
    return result.return_value, result.stdout


def test_the_table_has_every_policy_of_both_parts_and_the_verdict() -> None:
    result = run("scaling", *SHORT)
    assert result.exit_code == 0, result.stderr
    for text in ("consumers: ", "API: ", "seed", "keda", "hpa", "best minus seed, consumers", "better", "NO"):
        assert text in result.stdout


def test_json_has_lines_differences_and_the_whole_world() -> None:
    answer = json.loads(
        run("scaling", *SHORT, "--role", "consumers", "--policy", "seed", "--policy", "best", "--json").stdout
    )
    lines = answer["comparison"]["lines"]
    assert [line["policy"] for line in lines] == ["seed", "best"]
    assert lines[0]["settles"] is False
    assert answer["world"]["replications"] == 2
    assert answer["comparison"]["differences"][0]["policy"] == "best"


def test_the_same_seed_gives_the_same_answer_and_a_change_another() -> None:
    one = run("scaling", *SHORT, "--policy", "seed", "--json").stdout
    assert one == run("scaling", *SHORT, "--policy", "seed", "--json").stdout
    other = json.loads(
        run("scaling", *SHORT, "--policy", "seed", "--set", "consumers.base_per_s=30000", "--json").stdout
    )
    assert other["comparison"]["lines"][0]["peak"] != json.loads(one)["comparison"]["lines"][0]["peak"]


def test_a_search_prints_its_finalists() -> None:
    result = run(
        "scaling",
        "--search",
        "--role",
        "api",
        "--set",
        "replications=2",
        "--set",
        "search.cpu=[0.7]",
        "--set",
        "search.down_stabilisation_s=[300.0]",
        "--set",
        "search.announced_replicas=[0]",
    )
    assert result.exit_code == 0, result.stderr
    assert "cpu 0.7, down_stabilisation_s 300" in result.stdout


def test_failures_are_told_with_their_verdicts_and_exit_10_where_a_promise_breaks() -> None:
    code, out = ended("failures", "--set", "replications=500")
    assert code == 10
    for text in (
        "API crash",
        "worker crash",
        "single DB crash",
        "region down",
        "data corruption",
        "decision",
        "copy in",
    ):
        assert text in out


def test_failures_exit_0_once_every_promise_holds() -> None:
    code, out = ended(
        "failures",
        "--set",
        "replications=500",
        "--set",
        "region.decide.median=60",
        "--set",
        "region.decide.p95=120",
        "--set",
        "corruption.wal_replay_mb_per_s=200",
        "--json",
    )
    assert code == 0
    found = json.loads(out)["found"]
    assert {recovery["name"]: recovery["holds"] for recovery in found["recoveries"]}["region down"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("scaling", "--policy", "none"), "there is no 'none'"),
        (("scaling", "--shape", "none"), "steady"),
        (("scaling", "--set", "pods.scrape=1"), "scrape_s"),
        (("scaling", "--set", "replications=1"), "replications"),
        (("scaling", "--file", "no/such.toml"), "does not exist"),
        (("failures", "--set", "lag.days=99"), "lag.days"),
        (("failures", "--set", "api.start"), "NAME=VALUE"),
    ],
)
def test_wrong_arguments_exit_2_with_a_message(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(SCALING_TOML.read_text().replace("partitions = 100", "partitions = 0"))
    line = 1 + file.read_text().split("partitions = 0")[0].count("\n")
    result = run("scaling", "--file", str(file))
    assert result.exit_code == 2
    assert f"own.toml:{line}: consumers.partitions" in result.stderr
