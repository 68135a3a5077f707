"""What every command prints with: tables for people, JSON for programs, and files that can be written at the end."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from ledgerproof.options import RUNS_FOLDER, EnvironmentProblem

if TYPE_CHECKING:
    from collections.abc import Callable


out_option: Final = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RUNS_FOLDER,
    show_default=True,
    help="Folder that gets the run's folder.",
)


def json_path_option(text: str) -> "Callable[[Callable[..., int]], Callable[..., int]]":
    """Return the option `--json [PATH]`, as `json_path`: a path, "-" for standard output, or None."""
    return click.option("--json", "json_path", is_flag=False, flag_value="-", default=None, metavar="[PATH]", help=text)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print rows under column names; in full width where the output is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        # A narrow default width would cut what a log file has room for.
        console = Console(highlight=False, width=140)
    if title:
        console.print(title, markup=False)
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_json(value: object) -> None:
    """Print a value as JSON on standard output."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON that people can read and compare line by line. Raises OSError."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def check_writable(path: Path) -> None:
    """Find out before a long run whether its result can be written. Raises EnvironmentProblem."""
    try:
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror}") from error
