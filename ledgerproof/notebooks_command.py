"""`ledgerproof notebooks`: list them, execute them, and write them as pages."""

from pathlib import Path
from typing import Final

import click

from ledgerproof.attach import json_flag
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import print_json, print_table
from ledgerproof.progress import Progress

EXIT_CODES: Final = """\b
Exit codes: 0 every notebook ran, 2 there is no such notebook or folder, 10 one failed.
"""
FAILED_EXIT: Final = 10


@click.group("notebooks")
def notebooks_group() -> None:
    """Execute the notebooks: capacity, cost, autoscaling, failures, and the time line of a run."""


@notebooks_group.command("list")
@json_flag
def list_command(*, as_json: bool) -> int:
    """List the notebooks."""
    from ledgerproof.notebooks import NOTEBOOKS, names  # noqa: PLC0415 - slow to import

    found = [{"name": name, "path": str(NOTEBOOKS / f"{name}.ipynb")} for name in names()]
    if as_json:
        print_json(found)
    else:
        for each in found:
            click.echo(each["name"])
    return 0


@notebooks_group.command("run", epilog=EXIT_CODES)
@click.argument("chosen", metavar="[NAME]...", nargs=-1)
@click.option(
    "--html", "html", type=click.Path(file_okay=False, path_type=Path), default=None, help="Write pages into DIR."
)
@click.option(
    "--set", "values", multiple=True, metavar="NAME=TEXT", help="Set a parameter, e.g. run=20261126-204659-s616-9246."
)
@json_flag
def run_command(*, chosen: tuple[str, ...], html: Path | None, values: tuple[str, ...], as_json: bool) -> int:
    """Execute the notebooks NAME (all if left out) in a kernel of this Python; the committed files stay as they are.

    `chaos_timeline` shows a run of `ledgerproof prove`: the newest, or that of --set run=PATH. Where all are executed
    and there is no run, it is left out and said so.
    """
    from ledgerproof.notebooks import NotebookFailed, execute, names, write_page  # noqa: PLC0415 - slow to import

    known = names()
    if not known:
        raise EnvironmentProblem("there are no notebooks here: they are in a clone of the project, not in its wheel")
    for name in chosen:
        if name not in known:
            raise click.UsageError(f"there is no notebook {name!r}; there are {', '.join(known)}")
    given = dict(_pair(value) for value in values)
    if given and len(chosen) != 1:
        raise click.UsageError("--set is for one notebook: name it")
    if html is not None:
        try:
            html.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"cannot make {html}: {error.strerror}") from error
    progress = Progress(quiet=as_json)
    rows: list[dict[str, object]] = []
    failed = False
    for name in chosen or known:
        row: dict[str, object] = {"name": name}
        try:
            with progress.step(name):
                executed = execute(name, given, Path.cwd())
            row |= {"ran": True, "took_s": round(executed.took_s, 1), "displays": executed.displays}
            if html is not None:
                row["page"] = str(write_page(executed, html / f"{name}.html"))
        except NotebookFailed as error:
            left_out = not chosen and "NotARun" in str(error)
            failed = failed or not left_out
            row |= {"ran": False, "left_out": left_out, "why": str(error)}
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {html}: {error.strerror}") from error
        rows.append(row)
    if as_json:
        print_json(rows)
    else:
        print_table(
            "",
            ["notebook", "", "s", "displays", ""],
            [
                [
                    str(row["name"]),
                    "ran" if row["ran"] else "left out" if row["left_out"] else "FAILED",
                    str(row.get("took_s", "-")),
                    str(row.get("displays", "-")),
                    str(row.get("page", row.get("why", ""))),
                ]
                for row in rows
            ],
        )
    return FAILED_EXIT if failed else 0


def _pair(value: str) -> tuple[str, str]:
    name, equals, text = value.partition("=")
    if not equals or not name.strip():
        raise click.UsageError(f"--set {value}: write NAME=TEXT")
    return name.strip(), text.strip()
