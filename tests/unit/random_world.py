"""Small honest worlds drawn at random, and one wound at random: what judges must see alike."""

from random import Random
from typing import Any

from honest_world import Row, World, open_stake, uuid_of

USERS = (7, 62, 8, 99)
MATCHES = tuple(uuid_of(number) for number in (1001, 1051))
SELECTIONS = ("HOME", "DRAW", "AWAY")
STEPS = (3, 25)
"""How many things happen in a world, at least and at most."""


def random_world(random: Random) -> World:
    """Return the evidence of an afternoon in which everybody was honest and some answers were lost."""
    world = World()
    if random.random() < 0.5:
        world.timeline += [
            {"t": 0.5, "kind": "fault_requested", "node": "pg0", "fault": "kill", "fault_id": 1},
            {"t": 0.6, "kind": "fault_start", "node": "pg0", "fault": "kill", "fault_id": 1},
            {"t": 0.9, "kind": "fault_end", "node": "pg0", "fault": "kill", "fault_id": 1},
        ]
    for user in USERS:
        world.deposit(user, random.randint(200, 5_000), f"seed-{user}")
    for match_id in MATCHES:
        world.create_match(match_id)
    for number in range(random.randint(*STEPS)):
        random.choice(ACTIONS)(world, random, f"key-{number}")
    world.derive()
    if random.random() < 0.5:
        world.snapshot_again()
    return world


def _deposit(world: World, random: Random, key: str) -> None:
    world.deposit(random.choice(USERS), random.randint(1, 999), key, record=random.choice(("ok", "ok", "info")))


def _withdraw(world: World, random: Random, key: str) -> None:
    user, amount = random.choice(USERS), random.randint(1, 2_000)
    if world.balance(user)[1] >= amount:
        world.withdraw(user, amount, key)
    else:
        world.refuse("withdraw", user, amount, key)


def _bet(world: World, random: Random, key: str) -> None:
    user, match_id = random.choice(USERS), random.choice(MATCHES)
    state = _state(world, match_id)
    side, odds, stake = random.choice(("BACK", "LAY")), random.choice((150, 233, 251, 300)), random.randint(1, 300)
    if state not in ("OPEN", "CLOSED") or world.balance(user)[1] < max(stake, stake * (odds - 100) // 100 + 1):
        world.refuse("bet", user, stake, key, "MATCH_CLOSED")
        return
    selection = random.choice(SELECTIONS)
    record = random.choice(("ok", "ok", "ok", "info"))
    world.bet(user, match_id, selection, side, odds, stake, key, record=record, late=state == "CLOSED")


def _cancel(world: World, random: Random, key: str) -> None:
    able = [o for o in world.tables["orders"] if open_stake(o) and _state(world, o["match_id"]) == "OPEN"]
    if able:
        order = random.choice(able)
        world.cancel(order["user_id"], order["bet_id"], key, record=random.choice(("ok", "info")))


def _end(world: World, random: Random, _: str) -> None:
    """Take a match one step on: close it, settle it or make it void, or settle it again."""
    match_id = random.choice(MATCHES)
    state = _state(world, match_id)
    settlements = [s for s in world.tables["settlements"] if s["match_id"] == match_id]
    if state == "OPEN" and random.random() < 0.7:
        world.close(match_id)
    elif state == "OPEN":
        world.settle(match_id, None)
    elif state == "CLOSED":
        world.settle(match_id, random.choice((*SELECTIONS, None)))
    elif len(settlements) < 3:
        others = [result for result in (*SELECTIONS, None) if result != settlements[-1]["result"]]
        world.resettle(match_id, random.choice(others))


def _read(world: World, random: Random, _: str) -> None:
    user = random.choice(USERS)
    extra: dict[str, Any] = {"min_seq": world.balance(user)[0]} if random.random() < 0.3 else {}
    world.t += random.choice((0.0, 0.7))
    world.read(user, source=random.choice(("redis", "ledger")), client=random.randint(1, 2), **extra)


def _again(world: World, random: Random, _: str) -> None:
    """Send a command of before again, as it was or with another amount."""
    keys = [r["key"] for r in world.history if r["record"] == "invoke" and r["op"] in ("deposit", "withdraw", "bet")]
    key = random.choice(keys)
    rows = [r for r in world.tables["ledger"] if r["idempotent_key"] == key]
    if rows and random.random() < 0.7:
        world.replay(key)
    elif rows:
        world.other_body(rows[0]["user_id"], 12_345, key)


def _lost(world: World, random: Random, key: str) -> None:
    attempt = world.invoke("deposit", user=random.choice(USERS), amount=5, key=key)
    if random.random() < 0.7:
        world.complete(attempt, "info", status=504)


def _roll_back(world: World, random: Random, key: str) -> None:
    world.roll_back_unknown(random.choice(USERS), key)


ACTIONS = (_deposit, _withdraw, _bet, _bet, _bet, _bet, _cancel, _end, _read, _read, _again, _lost, _roll_back)


def _state(world: World, match_id: str) -> str:
    return next(str(m["state"]) for m in world.tables["matches"] if m["match_id"] == match_id)


def wound(world: World, random: Random) -> str:
    """Change one row or one cell of the evidence and say which."""
    tables = {f"{name} (second)": rows for name, rows in (world.second or {}).items()} | world.tables
    tables |= {"history": world.history, "timeline": world.timeline}
    name = random.choice(sorted(name for name, rows in tables.items() if rows))
    rows = tables[name]
    row = random.choice(rows)
    how = random.choice(("lose", "double", "change", "change", "change", "change"))
    if how == "lose":
        rows.remove(row)
        return f"{name}: lost {row}"
    if how == "double":
        rows.insert(random.randrange(len(rows) + 1), dict(row))
        return f"{name}: doubled {row}"
    # Columns that some row of the table leaves empty may be emptied; of the others an empty cell is V05.
    column = random.choice(sorted({column for r in rows for column in r}))
    before = row.get(column)
    row[column] = _other(random, column, before, rows)
    return f"{name}: {column} of {row} was {before}"


def _other(random: Random, column: str, value: object, rows: list[Row]) -> object:
    """Return another value for a cell: its neighbour, that of another row, or nothing where that may be."""
    elsewhere = sorted({r.get(column) for r in rows if r.get(column) is not None and r.get(column) != value}, key=str)
    choices: list[object] = [*elsewhere[:3], random.choice(elsewhere)] if elsewhere else []
    if value is not None and any(r.get(column) is None for r in rows):
        choices.append(None)
    if isinstance(value, bool):
        choices.append(not value)
    elif isinstance(value, int):
        choices += [value + 1, value - 1]
    elif isinstance(value, float):
        choices += [value + 0.6, value - 0.6]
    elif isinstance(value, str):
        choices.append("odd")
    return random.choice(choices) if choices else "odd" if isinstance(value, str) else None
