"""Executes the notebooks of `notebooks/` in a kernel of their own and turns them into pages.

A notebook calls packages and holds no logic, so what it shows is tested where it is made; here it only has to run. It
fails if a cell raises or writes to standard error: a warning is a failure.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets.config import Config

from ledgerproof.options import run_folder

NOTEBOOKS: Final = Path(__file__).parents[1] / "notebooks"
CELL_TIMEOUT_S: Final = 300
"""A cell that takes longer is ended, and with it the notebook."""
STARTUP_TIMEOUT_S: Final = 120
PARAMETERS: Final = "parameters"
"""Tag of the cell behind which values from the command line are set."""


class NotebookFailed(Exception):
    """A notebook that could not be executed to its end; the message names the cell and what it said."""


@dataclass(frozen=True)
class Executed:
    """One notebook that ran."""

    name: str
    title: str
    cells: int
    displays: int
    took_s: float
    notebook: Any


def names() -> list[str]:
    """Return the names of all notebooks, without their suffix."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def chosen_run(run: str | None) -> Path:
    """Return the run folder that a notebook was told, by path or id, or the newest. Raises NotARun."""
    return run_folder(Path(run) if run is not None else None)


def execute(name: str, values: Mapping[str, str], folder: Path) -> Executed:
    """Execute a notebook with `folder` as its working directory. Raises NotebookFailed.

    `values` are set behind the cell tagged `parameters`, as texts; a notebook without one takes none.
    """
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    _set(notebook, name, values)
    began = time.monotonic()
    try:
        # Sockets in a folder that only its owner enters: ports of the machine would be open to everybody on it.
        with tempfile.TemporaryDirectory(prefix="lp-") as sockets:
            client = NotebookClient(
                notebook,
                timeout=CELL_TIMEOUT_S,
                startup_timeout=STARTUP_TIMEOUT_S,
                kernel_name="python3",
                resources={"metadata": {"path": str(folder)}},
                config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/k"}),
            )
            client.execute()
    except CellExecutionError as error:
        raise NotebookFailed(f"{name}: {error.ename}: {error.evalue}") from error
    except (CellTimeoutError, DeadKernelError) as error:
        raise NotebookFailed(f"{name}: {error}") from error
    displays = 0
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise NotebookFailed(f"{name}: cell {number} wrote to standard error: {output.text.strip()}")
            displays += output.output_type in {"display_data", "execute_result"}
    title = next((cell.source.splitlines()[0].lstrip("# ") for cell in notebook.cells if cell.source), name)
    return Executed(name, title, len(notebook.cells), displays, time.monotonic() - began, notebook)


def _set(notebook: Any, name: str, values: Mapping[str, str]) -> None:
    if not values:
        return
    for index, cell in enumerate(notebook.cells):
        if PARAMETERS in cell.metadata.get("tags", []):
            known = {line.partition("=")[0].strip() for line in cell.source.splitlines() if "=" in line}
            if unknown := set(values) - known:
                raise NotebookFailed(f"{name} has no {', '.join(sorted(unknown))}; it takes {', '.join(sorted(known))}")
            source = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
            notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(source))
            return
    raise NotebookFailed(f"{name} takes no values: leave --set out")


def write_page(executed: Executed, path: Path) -> Path:
    """Write an executed notebook as a page and return its path. Raises OSError if it cannot be written."""
    from nbconvert.filters import markdown2html  # noqa: PLC0415 - slow to import

    from reports.notebook import render_notebook  # noqa: PLC0415 - loads matplotlib

    cells: list[dict[str, Any]] = []
    for cell in executed.notebook.cells:
        if cell.cell_type == "markdown":
            cells.append({"kind": "text", "html": markdown2html(cell.source)})
        elif cell.cell_type == "code" and cell.source:
            outputs = [
                output.data.get("text/html") or f"<pre>{output.data.get('text/plain', '')}</pre>"
                for output in cell.outputs
                if output.output_type in {"display_data", "execute_result"}
            ]
            cells.append({"kind": "code", "source": cell.source, "outputs": outputs})
    foot = f"notebooks/{executed.name}.ipynb, executed in {executed.took_s:.0f} s"
    return render_notebook(executed.title, cells, foot, path)
