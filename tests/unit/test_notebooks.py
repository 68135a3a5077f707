"""Notebooks call packages and hold nothing else: no logic, no typed numbers, no outputs. They run in tests/browser."""

import ast
import json
import tomllib
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner, Result

from ledgerproof import cli, notebooks
from ledgerproof.notebooks import NOTEBOOKS, Executed, NotebookFailed, chosen_run, names, write_page
from ledgerproof.options import EnvironmentProblem, NotARun

FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
LOGIC = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.If,
    ast.IfExp,
    ast.Match,
    ast.Try,
    ast.With,
    ast.comprehension,
    ast.BoolOp,
    ast.Compare,
    ast.AugAssign,
)


def faults_of(source: str) -> list[str]:
    """What a code cell holds that belongs into a package."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, LOGIC):
            found.append(f"logic: {type(node).__name__}")
        elif isinstance(node, ast.BinOp) and not _is_path(node):
            found.append(f"arithmetic: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and type(node.value) in {int, float, complex}:
            found.append(f"a typed number: {node.value}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_number(node.value):
            found.append(f"a number in quotes: {node.value}")
    return found


def _is_path(node: ast.BinOp) -> bool:
    """`folder / "file"` is no arithmetic."""
    return isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant) and isinstance(node.right.value, str)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_notebook_holds_no_logic_and_no_numbers(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert {cell.cell_type for cell in notebook.cells} == {"markdown", "code"}
    found = [fault for cell in notebook.cells if cell.cell_type == "code" for fault in faults_of(cell.source)]
    assert found == []


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_without_traces_of_a_machine(file: Path) -> None:
    raw = json.loads(file.read_text())
    for cell in raw["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert set(cell["metadata"]) <= {"tags"}
    assert raw["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def f():\n    pass", "logic"),
        ("x = [y for y in z]", "logic"),
        ("for y in z:\n    show(y)", "logic"),
        ("f = lambda: z", "logic"),
        ("x = a if b else c", "logic"),
        ("x = a + b", "arithmetic"),
        ("x = a / b", "arithmetic"),
        ("plan(users=1_000_000)", "a typed number"),
        ("x = -0.5", "a typed number"),
        ("x = float('1e6')", "a number in quotes"),
    ],
)
def test_the_check_finds(source: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in faults_of(source))


def test_the_check_allows_calls_names_paths_and_switches() -> None:
    assert faults_of('x = read(PLANS / "million.toml", quiet=True, run=None)\nshow(x.a["b"], *x.parts)') == []


def test_the_notebooks_of_the_review_are_there() -> None:
    assert set(names()) >= {"autoscaling", "capacity", "chaos_timeline", "cost", "failures"}


def test_notebooks_are_part_of_what_is_linted() -> None:
    project = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text())
    assert "*.ipynb" not in str(project["tool"]["ruff"])


def test_a_run_is_the_one_that_was_named_or_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert chosen_run(str(tmp_path)) == tmp_path
    with pytest.raises(NotARun, match="ledgerproof prove"):
        chosen_run(None)


def test_values_are_set_behind_their_cell_and_only_known_ones() -> None:
    notebook = nbformat.read(NOTEBOOKS / "chaos_timeline.ipynb", as_version=4)
    notebooks._set(notebook, "chaos_timeline", {"run": 'a "b"'})
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    assert notebook.cells[place + 1].source == 'run = "a \\"b\\""'
    with pytest.raises(NotebookFailed, match="has no speed; it takes run"):
        notebooks._set(notebook, "chaos_timeline", {"speed": "1"})
    with pytest.raises(NotebookFailed, match="takes no values"):
        notebooks._set(nbformat.read(NOTEBOOKS / "cost.ipynb", as_version=4), "cost", {"run": "x"})


def test_a_page_has_text_code_and_outputs_and_loads_nothing(tmp_path: Path) -> None:
    shown = nbformat.v4.new_output("execute_result", {"text/html": "<style>.x{}</style><b>seven</b>"})
    plain = nbformat.v4.new_output("display_data", {"text/plain": "eight"})
    cells = [
        nbformat.v4.new_markdown_cell("# A title\n\nwords"),
        nbformat.v4.new_code_cell("show(a < b)", outputs=[shown, plain]),
    ]
    executed = Executed("x", "A title", 2, 2, 3.2, nbformat.v4.new_notebook(cells=cells))
    text = write_page(executed, tmp_path / "x.html").read_text()
    assert "<title>A title</title>" in text
    assert "show(a &lt; b)" in text
    assert "<b>seven</b>" in text
    assert "<pre>eight</pre>" in text
    assert ".x{}" not in text, "the page has the style sheet once"
    assert "http" not in text.replace("http://www.w3.org", "")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["notebooks", *arguments], standalone_mode=False)


def test_the_list_names_every_notebook() -> None:
    assert [each["name"] for each in json.loads(run("list", "--json").stdout)] == names()
    assert run("list").stdout.split() == names()


def _ended(monkeypatch: pytest.MonkeyPatch, failing: dict[str, str]) -> None:
    def execute(name: str, values: dict[str, str], folder: Path) -> Executed:
        if name in failing:
            raise NotebookFailed(f"{name}: {failing[name]}")
        return Executed(name, name, 1, 1, 0.1, nbformat.v4.new_notebook())

    monkeypatch.setattr("ledgerproof.notebooks.execute", execute)


def test_a_failed_notebook_is_named_and_exits_10(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _ended(monkeypatch, {"cost": "ValueError: no"})
    result = run("run", "--html", str(tmp_path / "pages"))
    assert result.return_value == 10
    assert "cost: ValueError: no" in result.stdout
    assert {path.stem for path in (tmp_path / "pages").iterdir()} == set(names()) - {"cost"}


def test_without_a_run_the_time_line_is_left_out_of_all_but_fails_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _ended(monkeypatch, {"chaos_timeline": "NotARun: there is no run"})
    result = run("run", "--json")
    assert result.return_value == 0
    assert {row["name"]: row["ran"] for row in json.loads(result.stdout)}["chaos_timeline"] is False
    assert run("run", "chaos_timeline", "--json").return_value == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "none"), "there is no notebook 'none'"),
        (("run", "--set", "run=x"), "name it"),
        (("run", "cost", "--set", "x"), "NAME=TEXT"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(cli.cli, ["notebooks", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr


def test_where_there_are_no_notebooks_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ledgerproof.notebooks.NOTEBOOKS", tmp_path)
    result = run("run")
    assert isinstance(result.exception, EnvironmentProblem)
    assert "clone" in str(result.exception)
