"""Every SQL statement of the service, in files with named blocks (`-- name: block`)."""

import re
from functools import cache
from pathlib import Path

_BLOCK = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


@cache
def load_sql(file: str) -> dict[str, str]:
    """Return the named blocks of `reference/sql/<file>.sql`, text untouched.

    Raises FileNotFoundError for an unknown file and ValueError for a block named twice.
    """
    parts = _BLOCK.split((Path(__file__).parent / f"{file}.sql").read_text())
    names = parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{file}.sql names a block twice")
    return {name: text.strip() for name, text in zip(names, parts[2::2], strict=True)}
