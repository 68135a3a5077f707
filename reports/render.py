"""Writes report.html from a run folder: one page that loads nothing and hides nothing.

`render(run_folder)` always leaves a page: a part that is missing or cannot be drawn is named on it.
"""

import tempfile
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from reports.folder import read_run
from reports.forecast_plots import forecast_plots
from reports.load_part import lag_limit_ms
from reports.load_plots import load_plots
from reports.page import TEMPLATES, build
from reports.plots import draw_all
from reports.tallies import clock_of


def render(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises NotADirectoryError if there is no such folder and OSError if the page cannot be written; a folder
    that is incomplete or damaged gives a page that says so.
    """
    run = read_run(run_folder)
    clock = clock_of(run)
    plots = {**draw_all(run, clock), **load_plots(run, lag_limit_ms(run)), **forecast_plots(run, clock)}
    page = build(run, clock, plots)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    text = environment.get_template("report.html.j2").render(page=page)
    return write_whole(run_folder / "report.html", text)


def write_whole(path: Path, text: str) -> Path:
    """Replace the file at once, so that a reader never sees half a page."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".report-", suffix=".html", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
        except OSError:
            temporary.unlink()
            raise
    temporary.chmod(0o644)
    return temporary.replace(path)
