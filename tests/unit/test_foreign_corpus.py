"""Every history of the corpus is judged as its first line says, through the command a user types."""

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from invariants.foreign.report import CODES
from invariants.verdict import Verdict
from ledgerproof import cli
from ledgerproof.options import EnvironmentProblem

CORPUS = Path(__file__).parents[1] / "corpus"
FILES = sorted(CORPUS.glob("*/*.edn"))
NEEDED = 24


def header(path: Path, name: str) -> str:
    lines = [line for line in path.read_text().splitlines() if line.startswith(f"; {name}: ")]
    return lines[0].removeprefix(f"; {name}: ") if lines else ""


def arguments(path: Path) -> list[str]:
    return ["judge", str(path), "--format", path.parent.name, "--json", *shlex.split(header(path, "options"))]


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES])
def test_history_is_judged_as_its_header_says(path: Path) -> None:
    verdict, _, rest = header(path, "expect").partition(" ")
    result = CliRunner().invoke(cli.cli, arguments(path), standalone_mode=False)
    if verdict == "USAGE":
        assert isinstance(result.exception, EnvironmentProblem)
        assert rest in str(result.exception)
        return
    assert result.exception is None
    said = json.loads(result.stdout)
    assert (said["verdict"], sorted(said["counts"])) == (verdict, sorted(rest.split()))
    assert result.return_value == said["exit_code"] == Verdict[verdict]
    lines = path.read_text().count("\n")
    for found in said["anomalies"]:
        assert found["code"] == CODES[found["name"]]
        assert found["text"]
        assert found["lines"]
        assert all(1 <= line <= lines for line in found["lines"])
    assert bool(said["undecided"]) == (verdict == "INVALID")


def test_corpus_is_large_enough_and_shows_every_name() -> None:
    assert len(FILES) >= NEEDED
    shown = {name for path in FILES for name in header(path, "expect").partition(" ")[2].split()}
    assert set(CODES) <= shown


def test_the_names_of_the_files_say_what_they_are() -> None:
    kinds = {"good": "PASS", "bad": "INVARIANT_VIOLATED", "open": "INVALID", "damaged": "USAGE"}
    for path in FILES:
        assert header(path, "expect").partition(" ")[0] == kinds[path.stem.partition("-")[0]]
