"""What notebooks show: figures and tables of the reports, inline, and the page that an executed notebook becomes.

`show(part, …)` returns something that a notebook displays; `render_notebook` writes an executed notebook as one page
that loads nothing.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from reports.page import TEMPLATES
from reports.render import write_whole
from reports.sheets import Plot
from reports.tables import Table

Part = Plot | Table | str | None
SHEET: Final = re.compile(r":root \{(?P<variables>[^}]*)\}")
STYLE: Final = re.compile(r"<style>.*?</style>\s*", re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """Figures, tables and sentences that a notebook displays."""

    html: str
    told: str
    """The same in words, for a place that shows no HTML."""

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.told


def show(*parts: Part) -> Shown:
    """Return the parts as one display, in the colours of the reports; a part that is None is passed."""
    shown = [part for part in parts if part is not None]
    match = SHEET.search((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    assert match is not None, "the style sheet of the reports begins with its variables"
    html = (
        _environment()
        .get_template("shown.html.j2")
        .render(
            parts=shown,
            variables=match["variables"],
            css=(TEMPLATES / "shown.css").read_text(encoding="utf-8"),
        )
    )
    return Shown(html, "\n".join(_told(part) for part in shown))


def _told(part: Plot | Table | str) -> str:
    if isinstance(part, Plot):
        return part.description
    return part.caption if isinstance(part, Table) else part


def render_notebook(title: str, cells: Iterable[Mapping[str, Any]], foot: str, path: Path) -> Path:
    """Write the page of an executed notebook and return its path. Raises OSError if it cannot be written.

    A cell is {"kind": "text", "html": …} or {"kind": "code", "source": …, "outputs": [html, …]}. The page has the whole
    style sheet of the reports, so what each display carried for itself is left out.
    """
    plain = [
        {**cell, "outputs": [STYLE.sub("", output) for output in cell["outputs"]]} if cell["kind"] == "code" else cell
        for cell in cells
    ]
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    page = _environment().get_template("notebook.html.j2").render(title=title, cells=plain, foot=foot, css=css)
    return write_whole(path, page)


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
