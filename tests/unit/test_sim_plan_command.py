"""`ledgerproof sim plan` prints every assumption, shows what a change does, and refuses bad files by line and field."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ledgerproof import cli
from sim.plan import PLANS, PRICES, Assumptions

FEW = ("--samples", "50")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["sim", "plan", *FEW, *arguments])


def test_the_plan_states_needs_intervals_what_binds_and_the_seeds_figures() -> None:
    result = run()
    assert result.exit_code == 0
    for text in ("API pods", "90 % interval", "bound by", "times too high", "confirmed", "with one of 3 zones lost",
                 "Level 1", "holds to, users", "elasticity", "prices: version", "assumptions, edit them",
                 "refused: usl_coherency", "it is an extrapolation"):  # fmt: skip
        assert text in result.stdout, text


def test_every_assumption_is_printed_with_its_source() -> None:
    lines = run().stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("assumptions"))
    printed = {line.split()[0]: line for line in lines[start + 2 :] if line.strip()}
    for name in Assumptions.__struct_fields__:
        assert any(kind in printed[name] for kind in ("seed", "measured", "chosen")), name


def answer(*arguments: str) -> dict[str, float]:
    result = run("--json", *arguments)
    assert result.exit_code == 0, result.output
    numbers: dict[str, float] = json.loads(result.stdout)["figures"]["numbers"]
    return numbers


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--users", "2e6"), "api_pods"),
        (("--set", "users=2e6"), "servers"),
        (("--set", "replication_factor=4"), "kafka_copies_gb"),
        (("--set", "retention_days=14"), "brokers"),
        (("--set", "drain_s=60"), "settlers"),
        (("--set", "peak_factor=3", "--set", "mean_share=0.3"), "cores"),
    ],
)
def test_a_changed_assumption_changes_the_answer_and_is_named(arguments: tuple[str, ...], name: str) -> None:
    assert answer(*arguments)[name] > answer()[name]
    assert "command line" in run(*arguments).stdout


def test_other_prices_change_the_cost_alone(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(
        PRICES.read_text().replace("value = 30.0\nlow = 18.0\nhigh = 40.0", "value = 60.0\nlow = 60.0\nhigh = 60.0")
    )
    before, after = answer(), answer("--prices", str(path))
    assert after["cost"] > before["cost"]
    assert after["cores"] == before["cores"]


def test_json_can_be_written_to_a_file_beside_the_tables(tmp_path: Path) -> None:
    result = run("--json", str(tmp_path / "plan.json"))
    assert "API pods" in result.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert {row["name"] for row in written["assumptions"]} == set(Assumptions.__struct_fields__)
    assert len(written["needs"]) > 15


def test_a_plan_that_does_not_work_says_so_and_ends_with_10() -> None:
    arguments = ["sim", "plan", *FEW, "--set", "max_connections=20"]
    result = CliRunner().invoke(cli.cli, arguments, standalone_mode=False)
    assert result.return_value == 10
    assert "PROBLEM: workers alone hold" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "zones"), "--set zones: write NAME=VALUE"),
        (("--set", "zoness=3"), "there is no such field; did you mean zones"),
        (("--set", "zones=none"), "--set zones=none: zones: 'none' is not allowed, it must be int"),
        (("--users", "0.5"), "--set users=0.5: users: 0.5 is not allowed"),
        (("--samples", "1"), "samples must be 2 to"),
        (("--file", "absent.toml"), "absent.toml: cannot be read"),
    ],
)
def test_what_is_wrong_is_said_with_2(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize("option", ["--file", "--prices", "--demands"])
def test_a_bad_file_is_named_with_line_and_field(tmp_path: Path, option: str) -> None:
    source = {"--file": PLANS / "million.toml", "--prices": PRICES, "--demands": PRICES.with_name("demands.toml")}[
        option
    ]
    lines = source.read_text().splitlines()
    number = next(at for at, line in enumerate(lines) if " = " in line and not line.startswith("#"))
    field = lines[number].split(" = ")[0]
    path = tmp_path / "bad.toml"
    path.write_text("\n".join([*lines[:number], f"{field} = [7]", *lines[number + 1 :]]))
    result = run(option, str(path))
    assert result.exit_code == 2
    assert f"bad.toml:{number + 1}: {field}: an array of 1 is not allowed" in " ".join(result.output.split())


def test_the_page_is_written_and_holds_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    result = run("--html", str(path), "--set", "zones=4")
    assert result.exit_code == 0
    text = path.read_text()
    for name in Assumptions.__struct_fields__:
        assert name in text
    for words in ("command line", "With one of 4 zones lost", "fig-cost", "fig-tornado", "usl_coherency"):
        assert words in text
