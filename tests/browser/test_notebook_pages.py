"""Every notebook runs to its end without a warning, shows what it has, and is a page that fits and loads nothing."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from ledgerproof.notebooks import Executed, NotebookFailed, execute, names, write_page
from tests.report_runs import write_run

WIDTHS = (400, 720, 1280)
DISPLAYS = {"autoscaling": 5, "capacity": 3, "chaos_timeline": 3, "cost": 2, "failures": 1, "load_against_model": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder, "pass", rate_per_s=100)
    return folder


@pytest.fixture(scope="module")
def executed(runs: Path) -> dict[str, Executed]:
    """Notebooks that were executed already: once is enough for all tests of one."""
    return {}


def _executed(name: str, runs: Path, executed: dict[str, Executed]) -> Executed:
    if name not in executed:
        values = {"run": str(next(runs.iterdir()))} if name == "chaos_timeline" else {}
        executed[name] = execute(name, values, runs)
    return executed[name]


@pytest.mark.parametrize("name", names())
def test_a_notebook_runs_and_its_page_fits(
    browser: Browser, runs: Path, executed: dict[str, Executed], name: str, tmp_path: Path
) -> None:
    done = _executed(name, runs, executed)
    assert done.displays == DISPLAYS[name]
    page_path = write_page(done, tmp_path / f"{name}.html")
    context = browser.new_context()
    try:
        page = context.new_page()
        noise: list[str] = []
        requested: list[str] = []
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(page_path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.title() == done.title
        assert page.locator("h1").count() == 1
        assert page.locator(".shown").count() == done.displays
        assert noise == []
        assert set(requested) <= {page_path.as_uri(), "data:,"}
    finally:
        context.close()


def test_a_notebook_without_its_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NotebookFailed, match=r"chaos_timeline: NotARun: .*ledgerproof prove"):
        execute("chaos_timeline", {}, tmp_path)


def test_a_cell_that_warns_fails_its_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat

    cells = [nbformat.v4.new_code_cell("import warnings\nwarnings.warn('look here')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "warns.ipynb")
    monkeypatch.setattr("ledgerproof.notebooks.NOTEBOOKS", tmp_path)
    with pytest.raises(NotebookFailed, match=r"cell 0 wrote to standard error.*look here"):
        execute("warns", {}, tmp_path)
