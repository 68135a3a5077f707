"""`ledgerproof sim measure` and `sim calibrate` refuse what they cannot use, before anything is started."""

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from ledgerproof import cli
from ledgerproof.modelling import measuring
from ledgerproof.options import EnvironmentProblem
from sim.cases import Measured, Shape, read_cases


@pytest.fixture(autouse=True)
def no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a measurement was begun")

    monkeypatch.setattr(measuring, "measure", refuse)


def sim(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["sim", *arguments])


def test_a_case_that_there_is_not_is_refused_with_those_that_are(tmp_path: Path) -> None:
    result = sim("measure", "nothing", "--out", str(tmp_path / "out.json"))
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert "there is no case 'nothing'" in text
    for shape in read_cases().cases:
        assert shape.name in text
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("measure", "calibration"), "--out"),
        (("measure",), "CASE"),
        (("measure", "calibration", "--out", "out.json", "--rate", "0"), "--rate"),
        (("measure", "calibration", "--out", "out.json", "--rate", "much"), "--rate"),
        (("calibrate", "absent.json"), "absent.json"),
    ],
)
def test_options_that_cannot_be_are_refused(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sim(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_found_before_the_measurement(tmp_path: Path) -> None:
    result = sim("measure", "calibration", "--out", str(tmp_path / "absent" / "out.json"))
    # The command line itself turns this into its message and its exit code.
    assert isinstance(result.exception, EnvironmentProblem)
    assert "cannot write" in str(result.exception)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"shape": 1}'])
def test_a_file_that_is_no_measurement_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "measured.json").write_text(text)
    result = sim("calibrate", str(tmp_path / "measured.json"))
    assert result.exit_code == 2
    assert "measured.json" in result.output


def test_a_measurement_that_is_not_enough_says_what_to_measure(tmp_path: Path) -> None:
    empty = Measured(
        shape=Shape(name="calibration", why=""),
        commit="f1932bd0c4f5",
        machine={},
        started_at="2026-01-01T00:00:00+00:00",
        cores=2,
        connections=128,
        idle=None,
        windows=[],
        saturation=None,
    )
    (tmp_path / "measured.json").write_bytes(msgspec.json.encode(empty))
    result = sim("calibrate", str(tmp_path / "measured.json"), "--out", str(tmp_path / "found.json"))
    assert result.exit_code == 2
    assert "measure the case `calibration`" in " ".join(result.output.split())
    assert not (tmp_path / "found.json").exists()


def test_a_wrong_ledger_ends_a_measurement_with_its_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise measuring.LedgerWrong("after the load the ledger is wrong: {'chain': 3}")

    monkeypatch.setattr(measuring, "measure", wrong)
    done = CliRunner().invoke(
        cli.cli, ["sim", "measure", "one_server", "--out", str(tmp_path / "out.json")], standalone_mode=False
    )
    assert done.return_value == 20
    assert "chain" in done.stderr
