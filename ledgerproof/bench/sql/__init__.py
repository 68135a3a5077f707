"""Statements of the benchmark, in files with named blocks."""

import re
from pathlib import Path


def load(file: str) -> dict[str, str]:
    """Return the named blocks of `<file>.sql`."""
    text = (Path(__file__).parent / f"{file}.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return {name: block.strip() for name, block in zip(parts[1::2], parts[2::2], strict=True)}
