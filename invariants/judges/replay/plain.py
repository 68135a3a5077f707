"""Small helpers over rows that several themes of the replay judge share."""

import json
from collections.abc import Iterable

from invariants.judges.replay.case import Row


def distinct(rows: Iterable[Row], names: tuple[str, ...]) -> list[Row]:
    """Return the first row of each combination of these columns."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), row)
    return list(found.values())


def up(numerator: int, denominator: int) -> int:
    """Return numerator / denominator rounded up; the denominator is above zero."""
    quotient, rest = divmod(numerator, denominator)
    return quotient + (1 if rest else 0)


def fields_of(payload: str | None) -> Row:
    """Return the fields of a JSON payload; none for text that is no JSON object."""
    try:
        value = json.loads(payload or "")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
