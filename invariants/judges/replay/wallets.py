"""A06, A07, A09, A10, A12, A30, A31, A33: wallets walked row by row, and where the money of all of them is."""

from collections import defaultdict
from collections.abc import Iterator

from invariants.judges.replay.case import Case, Entry, Finding, rows_of, walk
from reference.routing import SHARDS


def _at(code: str, entry: Entry, text: str) -> Finding:
    place = {"user": entry.user, "seq": entry.seq, "key": entry.key}
    return Finding(code, f"seq {entry.seq} of user {entry.user} (key {entry.key}) {text}", place)


def a06_overdraft(case: Case) -> Iterator[Finding]:
    """A06: a client's debit takes more than the rows before it sum to."""
    for entry in case.client_entries:
        if entry.amount < 0 and entry.held + entry.amount < 0:
            yield _at("A06", entry, f"takes {-entry.amount} from a wallet that held {entry.held}")


def a07_negative(case: Case) -> Iterator[Finding]:
    """A07: a balance below zero after a row, as it says or as the rows sum."""
    for entry in case.entries:
        if entry.snapshot < 0 or entry.replayed < 0:
            yield _at("A07", entry, f"leaves {entry.snapshot} by its own word and {entry.replayed} by the sum")


def a09_broken_chain(case: Case) -> Iterator[Finding]:
    """A09: the balance a row says is not that of the row just before it plus its amount."""
    for entry in case.entries:
        follows = entry.seq == entry.before_seq + 1
        if follows and entry.snapshot != entry.before_snapshot + entry.amount:
            yield _at("A09", entry, f"says {entry.snapshot} and moves {entry.amount} from {entry.before_snapshot}")


def a10_seq(case: Case) -> Iterator[Finding]:
    """A10: the seqs of a wallet are not 1, 2, 3 and so on."""
    for entry in case.entries:
        if entry.seq != entry.before_seq + 1:
            yield _at("A10", entry, f"comes after seq {entry.before_seq}")


def escrow_of(case: Case) -> dict[str | None, int]:
    """Return what each match that ever had an entry against escrow holds there."""
    escrow: dict[str | None, int] = defaultdict(int)
    for entry in case.entries:
        if entry.contra == "ESCROW":
            escrow[entry.match_id] -= entry.amount
    return dict(escrow)


def final_matches(case: Case) -> set[str]:
    """Return the matches that are settled or void and of which no settlement is under way."""
    over = {row["match_id"] for row in case.table("matches") if row["state"] in ("SETTLED", "VOID")}
    over |= {row["match_id"] for row in case.table("settlements") if row["state"] == "DONE"}
    return over - {row["match_id"] for row in case.table("settlements") if row["state"] != "DONE"}


def a12_money(case: Case) -> Iterator[Finding]:
    """A12: wallets, house and escrow do not hold what came from outside; or one match's escrow is not its bets'."""
    yield from _whole(case.wallets, "at the end")
    if case.run.second is not None:
        yield from _whole(walk(rows_of(case.run.first, "ledger")), "in the first snapshot")
    yield from _escrow_of_matches(case)


def _whole(wallets: dict[int, list[Entry]], when: str) -> Iterator[Finding]:
    held = sum(wallet[-1].snapshot for wallet in wallets.values())
    accounts = {"HOUSE": 0, "ESCROW": 0, "EXTERNAL": 0}
    for wallet in wallets.values():
        for entry in wallet:
            if entry.contra in accounts:
                accounts[entry.contra] -= entry.amount
    off = held + sum(accounts.values())
    if off:
        yield Finding(
            "A12",
            f"{when} wallets hold {held}, house {accounts['HOUSE']}, escrow {accounts['ESCROW']}, and"
            f" {-accounts['EXTERNAL']} came from outside: {off:+d}",
            {},
        )


def _escrow_of_matches(case: Case) -> Iterator[Finding]:
    escrow = escrow_of(case)
    reserved: dict[str | None, int] = defaultdict(int)
    returned: dict[str | None, int] = defaultdict(int)
    for bet in case.table("bets"):
        reserved[bet["match_id"]] += bet["reserve"]
    for order in case.table("orders"):
        returned[order["match_id"]] += order["cancel_refund"]
    final = final_matches(case)
    for match_id in {**escrow, **reserved}:
        holds = escrow.get(match_id, 0)
        due = reserved.get(match_id, 0) - returned.get(match_id, 0)
        rulings = case.rulings.get(match_id, []) if match_id is not None else []
        if match_id in final:
            continue  # What is left in its escrow is A30.
        if not rulings and holds != due:
            text = f"match {match_id} holds {holds} in escrow; its bets and cancels leave {due}"
            yield Finding("A12", text, {"match_id": match_id})
        elif holds < 0 and all(row["settlement_version"] <= 1 for row in rulings):
            yield Finding("A12", f"match {match_id} has paid {-holds} more than came in", {"match_id": match_id})


def a30_escrow_leak(case: Case) -> Iterator[Finding]:
    """A30: a settled or void match still has something in escrow, or owes it."""
    escrow = escrow_of(case)
    for match_id in sorted(final_matches(case)):
        if escrow.get(match_id, 0) != 0:
            yield Finding("A30", f"match {match_id} is over and {escrow[match_id]} is left", {"match_id": match_id})


def a31_wrong_shard(case: Case) -> Iterator[Finding]:
    """A31: rows that are not on their one server, or a shard that not exactly the right server holds."""
    newest: dict[int, tuple[int, bool, str]] = {}
    holders: dict[int, list[str]] = defaultdict(list)
    for row in case.table("routes"):
        rank = (row["epoch"], row["here"], row["server_name"])
        if row["shard"] not in newest or rank[:2] >= newest[row["shard"]][:2]:
            newest[row["shard"]] = rank
        if row["here"]:
            holders[row["shard"]].append(row["server"])
    for shard in range(SHARDS):
        named = newest[shard][2] if shard in newest else None
        if holders[shard] != [named]:
            text = f"shard {shard} is held by {holders[shard]}, and the newest route names {named}"
            yield Finding("A31", text, {"shard": shard})
    for name in ("ledger", "bets", "refusals", "projection"):
        for row in case.table(name):
            user = row["user_id"]
            right = (case.server_of_shard.get(user % SHARDS), user % SHARDS)
            if (row["server"], row["shard"]) != right:
                text = f"a row of user {user} in {name} is on {row['server']} shard {row['shard']}, not on {right}"
                yield Finding("A31", text, {"user": user})
    for name in ("matches", "orders", "fills"):
        for row in case.table(name):
            home = case.home_of_match(row["match_id"])
            if row["server"] != home:
                text = f"a row of match {row['match_id']} in {name} is on {row['server']}, its home is {home}"
                yield Finding("A31", text, {"match_id": row["match_id"]})


def a33_rewritten(case: Case) -> Iterator[Finding]:
    """A33: a row of the first snapshot is gone or differs in the second, or one appeared below what was there."""
    if case.run.second is None:
        return
    before, after = rows_of(case.run.first, "ledger"), rows_of(case.run.second, "ledger")
    kept = {tuple(row.items()) for row in after}
    known = {(row["user_id"], row["seq"], row["idempotent_key"]) for row in before}
    seen: dict[int, int] = {}
    changed: set[tuple[int, int]] = set()
    for row in before:
        user, seq = row["user_id"], row["seq"]
        seen[user] = max(seq, seen.get(user, 0))
        if tuple(row.items()) not in kept:
            changed.add((user, seq))
            text = f"seq {seq} of user {user} (key {row['idempotent_key']}) is gone or another in the second snapshot"
            yield Finding("A33", text, {"user": user, "seq": seq, "key": row["idempotent_key"]})
    for row in after:
        user, seq = row["user_id"], row["seq"]
        new = (user, seq, row["idempotent_key"]) not in known
        if new and seq <= seen.get(user, 0) and (user, seq) not in changed:
            text = f"seq {seq} of user {user} (key {row['idempotent_key']}) appeared below seq {seen[user]}"
            yield Finding("A33", text, {"user": user, "seq": seq, "key": row["idempotent_key"]})
