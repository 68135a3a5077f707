"""The command line without a stack: arguments, exit codes, messages, and no traceback whatever happens."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compose.errors import PortTaken
from invariants.verdict import Verdict
from ledgerproof import __version__, cli
from ledgerproof.options import EnvironmentProblem, Options
from ledgerproof.progress import Progress


def run(*arguments: str) -> tuple[int, str, str]:
    """Run the command line as its main does, in this process; return exit code, output and errors."""
    runner = CliRunner()

    def main(**_: Any) -> Any:
        return cli.cli.main(args=list(arguments), standalone_mode=False)

    with runner.isolation() as (out, err, _):
        with pytest.raises(SystemExit) as ended:
            cli.main(main)
        code = ended.value.code
        return int(code or 0), out.getvalue().decode(), err.getvalue().decode()


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Options]]:
    """Replace the main job by one that ends as told; return the options it was given."""
    monkeypatch.chdir(tmp_path)

    def ending(outcome: Verdict | BaseException) -> list[Options]:
        given: list[Options] = []

        def prove(options: Options, _: Progress) -> tuple[Path, dict[str, Any]]:
            given.append(options)
            if isinstance(outcome, BaseException):
                raise outcome
            return tmp_path, verdict_of(outcome)

        monkeypatch.setattr("ledgerproof.prove.prove", prove)
        return given

    return ending


def verdict_of(verdict: Verdict) -> dict[str, Any]:
    witness = {"code": "A01", "text": "key w4-1 has no entry"}
    return {
        "verdict": verdict.name,
        "exit_code": int(verdict),
        "seed": 4,
        "commit": "abc",
        "reasons": [] if verdict is Verdict.PASS else ["because [so]"],
        "witnesses": [witness] if verdict is Verdict.INVARIANT_VIOLATED else [],
        "duration_s": 60.0,
        "acknowledged_bets": 30_100,
        "bets_per_s": 501.7,
        "anomalies": {"A01": 0},
        "unresolved": 0,
        "faults": [
            {"kind": "kill", "target": "pg1", "measured_start": 20.0, "measured_end": 25.5, "recovered_at": 27.0},
            {"kind": "pause", "target": "redis", "measured_start": None, "measured_end": None, "recovered_at": None},
        ],
        "sla": [{"metric": "Availability", "target": ">= 99.99", "measured": 100.0, "unit": "%", "met": True}],
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["prove", "--duration", "0"],
        ["prove", "--duration", "nan"],
        ["prove", "--duration", "14", "--faults", "standard"],
        ["prove", "--rate", "-3"],
        ["prove", "--rate", "inf"],
        ["prove", "--rate", "fast"],
        ["prove", "--servers", "0"],
        ["prove", "--servers", "1000"],
        ["prove", "--faults", "all"],
        ["prove", "--seed", "-1"],
        ["prove", "--base-port", "80"],
        ["prove", "--rate", "100000", "--duration", "3600"],
        ["prove", "--nonsense"],
        ["prove", "extra"],
        ["up", "--apis", "0"],
        ["nonsense"],
        ["check", "no/such/run"],
        ["report", "no/such/run"],
    ],
)
def test_wrong_arguments_exit_2_with_a_message(arguments: list[str], no_run: Callable[..., list[Options]]) -> None:
    given = no_run(Verdict.PASS)
    code, _, errors = run(*arguments)
    assert code == 2
    assert errors.strip()
    assert "Traceback" not in errors
    assert given == []


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_exit_code_is_that_of_the_verdict(verdict: Verdict, no_run: Callable[..., list[Options]]) -> None:
    no_run(verdict)
    code, out, _ = run("prove", "--seed", "4")
    assert code == int(verdict)
    assert verdict.name in out


def test_the_summary_names_reasons_witnesses_and_faults(no_run: Callable[..., list[Options]]) -> None:
    no_run(Verdict.INVARIANT_VIOLATED)
    _, out, _ = run("prove", "--seed", "4")
    assert "because [so]" in out
    assert "A01: key w4-1 has no entry" in out
    assert "kill pg1: down 5.5 s, recovered after 7.0 s" in out
    assert "pause redis: its effect was not measured" in out
    assert "\x1b[" not in out, "no colours where there is no terminal"


def test_options_reach_the_run(no_run: Callable[..., list[Options]], tmp_path: Path) -> None:
    (given,) = [no_run(Verdict.PASS)]
    run(
        "prove", "--seed", "9", "--rate", "12.5", "--duration", "20", "--servers", "2", "--faults", "none", "--out", "x"
    )
    assert given == [Options(seed=9, rate=12.5, duration_s=20.0, servers=2, faults="none", out=Path("x"))]


def test_a_seed_is_drawn_and_printed_if_none_is_given(no_run: Callable[..., list[Options]]) -> None:
    given = no_run(Verdict.PASS)
    _, _, errors = run("prove")
    assert f"seed {given[0].seed}" in errors


def test_json_goes_to_standard_output_alone(no_run: Callable[..., list[Options]]) -> None:
    no_run(Verdict.SLA_MISSED)
    code, out, _ = run("prove", "--json")
    assert code == 10
    assert json.loads(out)["verdict"] == "SLA_MISSED"


def test_json_goes_to_a_file(no_run: Callable[..., list[Options]], tmp_path: Path) -> None:
    no_run(Verdict.PASS)
    code, out, _ = run("prove", "--json", str(tmp_path / "verdict.json"))
    assert code == 0
    assert "PASS" in out
    assert json.loads((tmp_path / "verdict.json").read_text())["exit_code"] == 0


def test_a_json_path_that_cannot_be_written_is_found_before_the_run(no_run: Callable[..., list[Options]]) -> None:
    given = no_run(Verdict.PASS)
    code, _, errors = run("prove", "--json", "/nonexistent/verdict.json")
    assert code == 2
    assert "/nonexistent/verdict.json" in errors
    assert given == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EnvironmentProblem("port 5000 is in use by pid 7: free it"), 2),
        (PortTaken("port 5000 is in use by pid 7: free it"), 2),
        (OSError(28, "No space left on device", "reports"), 2),
        (KeyboardInterrupt(), 40),
        (RuntimeError("a bug"), 30),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    error: BaseException, code: int, no_run: Callable[..., list[Options]]
) -> None:
    no_run(error)
    ended, out, errors = run("prove")
    assert ended == code
    assert "Traceback" not in errors
    assert "error:" in errors
    assert not out


def test_a_bug_leaves_its_traceback_in_a_file_that_the_message_names(no_run: Callable[..., list[Options]]) -> None:
    no_run(RuntimeError("a bug"))
    _, _, errors = run("prove")
    path = Path(errors.rsplit(" ", 1)[-1].strip())
    assert "RuntimeError: a bug" in path.read_text()
    path.unlink()


def test_commands_without_a_stack_say_so(no_run: Callable[..., list[Options]]) -> None:
    code, out, _ = run("status")
    assert code == 0
    assert "ledgerproof up" in out
    code, out, _ = run("status", "--json")
    assert json.loads(out) == []
    code, _, _ = run("down")
    assert code == 0


@pytest.mark.parametrize("command", ["report", "check"])
def test_without_any_run_the_message_says_how_to_make_one(command: str, no_run: Callable[..., list[Options]]) -> None:
    code, _, errors = run(command)
    assert code == 2
    assert "ledgerproof prove" in errors


def test_a_folder_that_is_no_run_cannot_be_checked(no_run: Callable[..., list[Options]], tmp_path: Path) -> None:
    code, _, errors = run("check", str(tmp_path))
    assert code == 2
    assert "not a run folder" in errors


@pytest.mark.parametrize("command", [[], ["prove"], ["up"], ["down"], ["status"], ["report"], ["check"]])
def test_help_documents_the_exit_codes(command: list[str]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    for verdict in Verdict:
        assert f"{int(verdict):3d}  {verdict.name}" in out


def test_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ledgerproof", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert __version__ in done.stdout
