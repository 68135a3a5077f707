"""Shows what a long command is doing: a spinner with live text on a terminal, plain lines elsewhere.

Everything goes to standard error, so that standard output carries results only.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Final

import click
from rich.console import Console
from rich.status import Status

PLAIN_EVERY_S: Final = 5.0
"""Without a terminal, a step that goes on says so this often."""


class Step:
    """One step under way; `show` replaces its text."""

    def __init__(self, title: str, console: Console, status: Status | None) -> None:
        self.title = title
        self.detail = ""
        self.started = time.monotonic()
        self._console = console
        self._status = status
        self._printed = self.started

    def show(self, detail: str) -> None:
        """Say how far the step is."""
        self.detail = detail
        now = time.monotonic()
        text = f"{self.title}: {detail}" if detail else self.title
        if self._status is not None:
            self._status.update(f"{_escaped(text)} [dim]{now - self.started:.0f} s[/dim]")
        elif now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            self._console.print(f"  {text} ({now - self.started:.0f} s)", markup=False, highlight=False)


class Progress:
    """The steps of one command, one after another."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal and not quiet
        self._step: Step | None = None

    def show(self, detail: str) -> None:
        """Say how far the step under way is, for callers that outlive a step."""
        if self._step is not None:
            self._step.show(detail)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show a step while the block runs, and how long it took when it ended well."""
        status = self.console.status(_escaped(title), spinner="dots") if self._live else None
        if status is None:
            self.console.print(f"{title} ...", markup=False)
        self._step = step = Step(title, self.console, status)
        try:
            with status or contextlib.nullcontext():
                yield step
        finally:
            self._step = None
        took = time.monotonic() - step.started
        detail = f" ({step.detail})" if step.detail else ""
        mark = "[green]✓[/green]" if self._live else "done:"
        self.console.print(f"{mark} {_escaped(title)}{_escaped(detail)} [dim]{took:.1f} s[/dim]")

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print one line that asks for attention."""
        self.console.print(f"[yellow]{_escaped(text)}[/yellow]")


def _escaped(text: str) -> str:
    """Keep brackets of the text from being read as markup."""
    return text.replace("[", "\\[")


def print_error(message: str) -> None:
    """Print what went wrong, on standard error, in one paragraph."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(f"[bold red]error:[/bold red] {_escaped(message)}")
    else:
        click.echo(f"error: {message}", err=True)
