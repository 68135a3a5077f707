"""Markers follow folders, so that no test can forget its own."""

from pathlib import Path

import pytest
from hypothesis import settings

# A machine that does other things at the same time must not fail a property.
settings.register_profile("house", deadline=None)
settings.load_profile("house")

MARKED_FOLDERS = {"unit", "machine", "stack", "faults", "browser", "mutants"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the name of its folder below tests/."""
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)
