"""What every command prints with: tables for people, JSON for programs, and files that can be written at the end."""

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from ledgerproof.options import EnvironmentProblem


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
