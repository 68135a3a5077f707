"""`ledgerproof judge` as a process: exit codes, clear errors, JSON, and progress on standard error only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CORPUS = Path(__file__).parents[1] / "corpus"
DOCS = Path(__file__).parents[2] / "docs" / "foreign-histories.md"


def judge(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "ledgerproof", "judge", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=DOCS.parents[1],
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "code", "first"),
    [
        ("bank/good-crowd", 0, "PASS  bank, 7 calls, 4 reads"),
        ("list-append/bad-g1c-circular-information", 20, "INVARIANT_VIOLATED  list-append, 2 calls, 2 reads"),
        ("bank/open-no-read", 30, "INVALID  bank, 2 calls, 0 reads"),
    ],
)
def test_exit_code_and_first_line_are_the_verdict(name: str, code: int, first: str) -> None:
    ended, out, errors = judge(f"tests/corpus/{name}.edn", "--format", name.split("/", maxsplit=1)[0])
    assert (ended, out.splitlines()[0]) == (code, first)
    assert "Judging it" in errors


def test_damaged_file_is_a_usage_error_that_names_the_place() -> None:
    code, out, errors = judge("tests/corpus/bank/damaged-token.edn", "--format", "bank")
    assert (code, out) == (2, "")
    assert "error: tests/corpus/bank/damaged-token.edn cannot be judged as bank: line 4, column 50" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tests/corpus/none.edn", "--format", "bank"], "does not exist"),
        (["tests/corpus/bank/good-crowd.edn"], "Missing option '--format'"),
        (["tests/corpus/bank/good-crowd.edn", "--format", "register"], "is not one of 'bank', 'list-append'"),
        (["tests/corpus/list-append/good-serial.edn", "--format", "list-append", "--total", "3"], "belong to"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: list[str], said: str) -> None:
    code, out, errors = judge(*arguments)
    assert (code, out) == (2, "")
    assert said in errors


def test_binary_file_is_no_history(tmp_path: Path) -> None:
    path = tmp_path / "history.edn"
    path.write_bytes(b"{:type :invoke}\n\xff\xfe")
    code, _, errors = judge(str(path), "--format", "bank")
    assert code == 2
    assert "line 2: the file is not UTF-8 text" in errors


def test_json_is_all_that_standard_output_holds() -> None:
    code, out, errors = judge("tests/corpus/bank/bad-half-a-transfer.edn", "--format", "bank", "--json")
    said = json.loads(out)
    assert code == said["exit_code"] == 20
    assert said["counts"] == {"wrong-total": 1}
    assert said["anomalies"][0]["code"] == "A12"
    assert "Reading" in errors


def test_the_page_shows_what_the_command_prints() -> None:
    page = DOCS.read_text()
    command, rest = page.split("```console\n$ ledgerproof judge ", 1)[1].split("\n", 1)
    _, out, _ = judge(*command.split())
    assert out == rest.split("```", 1)[0]


def test_the_page_has_every_name() -> None:
    from invariants.foreign.report import CODES

    page = DOCS.read_text()
    for name, code in CODES.items():
        plain = name.removesuffix("-realtime")
        rows = [line for line in page.splitlines() if line.startswith("|") and plain in line]
        assert rows, name
        if plain == name:
            assert rows[0].rstrip(" |").endswith(code), name


def test_group_help_lists_the_command_and_its_exit_codes() -> None:
    code, out, _ = judge("--help")
    assert code == 0
    for verdict in ("PASS", "usage", "INVARIANT_VIOLATED", "INVALID"):
        assert verdict in out
