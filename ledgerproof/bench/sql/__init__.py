"""Statements of the benchmark, in files with named blocks."""

from pathlib import Path

from reference.sql import named_blocks


def load(file: str) -> dict[str, str]:
    """Return the named blocks of `<file>.sql`."""
    return named_blocks(Path(__file__).parent / f"{file}.sql")
