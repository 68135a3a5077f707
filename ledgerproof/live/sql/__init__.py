"""What the live auditor reads from a server, in a file with named blocks."""

from pathlib import Path

from reference.sql import named_blocks


def load_live_sql() -> dict[str, str]:
    """Return the named blocks of live.sql, text untouched."""
    return named_blocks(Path(__file__).parent / "live.sql")
