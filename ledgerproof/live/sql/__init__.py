"""What the live auditor reads from a server, in a file with named blocks."""

import re
from functools import cache
from pathlib import Path

_BLOCK = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


@cache
def load_live_sql() -> dict[str, str]:
    """Return the named blocks of live.sql, text untouched."""
    parts = _BLOCK.split((Path(__file__).parent / "live.sql").read_text(encoding="utf-8"))
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}
