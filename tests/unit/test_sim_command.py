"""`ledgerproof sim writer` prints a table or JSON, says what it does not know, and refuses what cannot be simulated."""

import inspect
import json

import pytest
from click.testing import CliRunner, Result

from ledgerproof import cli
from ledgerproof.modelling.writer_command import writer_command
from sim.writer_model import Parameters

SHORT = ("--duration", "2", "--replications", "3")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["sim", "writer", *arguments])


def test_the_table_states_latency_saturation_and_what_was_not_measured() -> None:
    result = run(*SHORT)
    assert result.exit_code == 0
    for text in ("latency p99, ms", "refused, %", "saturation: 58,050 commands/s", "not measured", "upper bound"):
        assert text in result.stdout
    assert "SATURATED" not in result.stdout


def test_json_holds_the_estimates_and_the_parameters() -> None:
    result = run(*SHORT, "--json")
    answer = json.loads(result.stdout)
    assert answer["parameters"]["rate_per_s"] == 540
    assert answer["p50_ms"]["low"] <= answer["p50_ms"]["mean"] <= answer["p50_ms"]["high"]
    assert len(answer["replications"]) == 3
    assert "not measured" in answer["notes"][0]


def test_json_of_a_seed_is_the_same_twice() -> None:
    assert run(*SHORT, "--seed", "5", "--json").stdout == run(*SHORT, "--seed", "5", "--json").stdout


def test_saturation_is_said() -> None:
    result = run(*SHORT, "--servers", "1", "--apis", "1", "--batch", "1")
    assert "SATURATED" in result.stdout


def test_help_says_that_parameters_are_typed_and_not_calibrated() -> None:
    text = " ".join(run("--help").stdout.split())
    assert "parameters that YOU type" in text
    assert "Calibration from measured runs comes with the full capacity model" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "nan"],
        ["--rate", "0"],
        ["--servers", "0"],
        ["--rate", "1e6"],
        ["--replications", "1"],
        ["--batch", "x"],
    ],
)
def test_wrong_arguments_exit_2_with_a_message(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert "Traceback" not in result.output


def test_defaults_of_the_command_are_those_of_the_model() -> None:
    typed = {option.name: option.default for option in writer_command.params}
    model = inspect.signature(Parameters).parameters
    for name, parameter in model.items():
        if parameter.default is not parameter.empty:
            assert typed[name] == parameter.default, name
