"""Markers follow folders, so that no test can forget its own."""

from pathlib import Path

import pytest

from tests.depth import register_profiles
from tests.machine.steps import TAKEN

register_profiles()

MARKED_FOLDERS = {"unit", "machine", "stack", "faults", "browser", "mutants"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the name of its folder below tests/."""
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many steps the machines took."""
    for machine, steps in sorted(TAKEN.items()):
        terminalreporter.write_line(f"{machine}: {steps:,} machine steps")
