"""Random damage to the rows of an honest world: what no author of a planted bug would think of."""

from collections.abc import Callable
from typing import Any

from honest_world import World, small_world

Draw = Callable[[int], int]
"""Return a number from 0 up to, not including, the argument."""

TABLES = (
    "ledger",
    "bets",
    "refusals",
    "outbox",
    "kafka",
    "projection",
    "redis",
    "matches",
    "transitions",
    "orders",
    "fills",
    "routes",
    "cancels",
    "settlements",
    "history",
    "history",
    "history",
)
ACTIONS = ("remove", "repeat", "swap", "nudge", "borrow", "borrow", "clear")

NULLABLE = {
    "ledger": ("match_id", "bet_id", "settlement_version"),
    "outbox": ("user_id", "seq"),
    "kafka": ("key", "user_id", "seq", "balance"),
    "settlements": ("result",),
    "transitions": ("from_state", "result"),
    "orders": ("cancel_reason",),
    "history": ("seq", "balance", "source", "stale", "replayed", "outcome", "payload_hash", "min_seq", "amount", "tag"),
}
"""Columns that may hold nothing, by table."""

IDENTITY = {("history", "record"), ("history", "attempt"), ("history", "op"), ("kafka", "offset")}
"""Columns whose change makes evidence that no recorder or snapshot writes; that is V05 and V06, judged apart."""


def rows_of(world: World, table: str) -> list[dict[str, Any]]:
    return world.history if table == "history" else world.tables[table]


def mutate(world: World, draw: Draw) -> str:
    """Do one random thing to one row and return what it was."""
    table = TABLES[draw(len(TABLES))]
    rows = rows_of(world, table)
    if not rows:
        return f"nothing: {table} is empty"
    at = draw(len(rows))
    row = rows[at]
    action = ACTIONS[draw(len(ACTIONS))]
    if action == "remove":
        del rows[at]
        return f"remove row {at} of {table}"
    if action == "repeat":
        rows.insert(draw(len(rows) + 1), dict(row))
        return f"repeat row {at} of {table}"
    if action == "swap":
        other = draw(len(rows))
        rows[at], rows[other] = rows[other], rows[at]
        return f"swap rows {at} and {other} of {table}"
    if action == "clear":
        names = [name for name in NULLABLE.get(table, ()) if row.get(name) is not None]
        name = names[draw(len(names))] if names else ""
        if name:
            row[name] = None
        return f"clear {name or 'nothing'} of row {at} of {table}"
    names = [name for name, value in row.items() if value is not None and (table, name) not in IDENTITY]
    name = names[draw(len(names))]
    before = row[name]
    if action == "nudge" and isinstance(before, (int, float)) and not isinstance(before, bool):
        row[name] = before + (-1, 1, 100)[draw(3)]
    else:
        values = [r[name] for r in rows if r.get(name) is not None and type(r[name]) is type(before)]
        row[name] = values[draw(len(values))]
    return f"{name} of row {at} of {table} from {before!r} to {row[name]!r}"


def mutated(draw: Draw, most: int = 3) -> tuple[World, list[str]]:
    """Return an honest world after one to `most` mutations, sometimes with everything downstream following."""
    world = small_world()
    if draw(2):
        world.snapshot_again()
    done = [mutate(world, draw) for _ in range(1 + draw(most))]
    if draw(3) == 0:
        world.derive()
        done.append("derive")
    return world, done
