"""Every SQL statement of the service, in files with named blocks (`-- name: block`)."""

import re
from functools import cache
from pathlib import Path

_BLOCK = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


def load_sql(file: str) -> dict[str, str]:
    """Return the named blocks of `reference/sql/<file>.sql`, text untouched.

    Raises FileNotFoundError for an unknown file and ValueError for a block named twice.
    """
    return named_blocks(Path(__file__).parent / f"{file}.sql")


@cache
def named_blocks(path: Path) -> dict[str, str]:
    """Return the named blocks of a file, text untouched. Raises OSError, and ValueError for a block named twice."""
    parts = _BLOCK.split(path.read_text(encoding="utf-8"))
    names = parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{path.name} names a block twice")
    return {name: text.strip() for name, text in zip(names, parts[2::2], strict=True)}
