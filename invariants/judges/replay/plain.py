"""Small helpers over rows that several themes of the replay judge share."""

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
