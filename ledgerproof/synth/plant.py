"""Plants one violation in a block of an honest run, so that one can see whether a judge finds it there."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
import polars as pl

from ledgerproof.synth.block import Block, Entries, ordered
from ledgerproof.synth.book import KINDS, Fate
from ledgerproof.synth.shape import Flags, Ints

OVERDRAWN_MINOR: Final = 1_000
FEWEST_SEQ: Final = 3


@dataclass(frozen=True)
class Planted:
    """What was planted, and what a witness of it names."""

    code: str
    user: int
    key: str | None = None


Frames = dict[str, pl.DataFrame]


def in_entries(code: str, block: Block) -> None:
    """Plant a violation of the ledger; everything that follows from the ledger will follow it."""
    if code in _IN_ENTRIES:
        block.planted = _IN_ENTRIES[code](block)


def in_tables(code: str, block: Block, attempts: pl.DataFrame, frames: Frames) -> tuple[Planted, pl.DataFrame]:
    """Plant a violation in the tables or the history; return what was planted, and the attempts."""
    if code in _IN_TABLES:
        user, attempts = _IN_TABLES[code](attempts, frames)
        return Planted(code, user), attempts
    user_index, key = block.planted
    return Planted(code, int(block.user_ids[user_index]), key), attempts


def _rows(entries: Entries, order: Ints) -> Entries:
    return replace(entries, **{field.name: getattr(entries, field.name)[order] for field in fields(Entries)})


def _reordered(block: Block, rows: Entries) -> None:
    block.entries = ordered(rows, np.arange(len(rows.user)))


def _middle(rows: Flags) -> int:
    """Return one of the places that qualify, the middle one. Raises ValueError if there is none."""
    places = np.flatnonzero(rows)
    if not len(places):
        raise ValueError("no row of this block can carry the violation: use more rows, or another seed")
    return int(places[len(places) // 2])


def _withdrawals(block: Block) -> Flags:
    """Return which entries are acknowledged withdrawals."""
    transfer = np.maximum(block.entries.transfer, 0)
    done: Flags = block.transfers.fate[transfer] == Fate.DONE
    done &= (block.entries.transfer >= 0) & (block.entries.amount < 0) & (block.entries.seq > FEWEST_SEQ)
    return done


def _transfer_key(block: Block, place: int) -> str:
    return f"s{block.number}-t{block.entries.transfer[place]}"


def _lost(block: Block) -> tuple[int, str | None]:
    place = _middle(_withdrawals(block))
    told = int(block.entries.user[place]), _transfer_key(block, place)
    _reordered(block, _rows(block.entries, np.delete(np.arange(len(block.entries.user)), place)))
    return told


def _applied_twice(block: Block) -> tuple[int, str | None]:
    entries = block.entries
    # The wallet must be able to pay it twice: the smallest balance from there to its end says so.
    # Read from the end, each wallet has smaller numbers than the one before, so the minimum begins anew.
    apart = entries.user * 10**12
    lowest = np.minimum.accumulate((entries.balance + apart)[::-1])[::-1] - apart
    place = _middle(_withdrawals(block) & (lowest > -entries.amount))
    told = int(entries.user[place]), _transfer_key(block, place)
    _reordered(block, _rows(entries, np.insert(np.arange(len(entries.user)), place, place)))
    return told


def _overdrawn(block: Block) -> tuple[int, str | None]:
    entries = block.entries
    place = _middle(_withdrawals(block))
    amount = int(entries.balance[place - 1]) + OVERDRAWN_MINOR
    entries.amount[place] = -amount
    block.transfers.amount[entries.transfer[place]] = -amount
    _reordered(block, entries)
    return int(entries.user[place]), _transfer_key(block, place)


def _chain_broken(block: Block) -> tuple[int, str | None]:
    entries = block.entries
    last = np.append(entries.user[1:] != entries.user[:-1], True)
    stake = (entries.bet >= 0) & (entries.payment < 0) & ~last
    place = _middle(stake)
    entries.balance[place] += 1
    return int(entries.user[place]), f"s{block.number}-b{entries.bet[place]}"


def _booked_elsewhere(block: Block) -> tuple[int, str | None]:
    entries = block.entries
    open_matches = np.flatnonzero(np.isinf(block.matches.ends_s))
    stake = (entries.bet >= 0) & (entries.payment < 0) & np.isin(entries.match, open_matches)
    place = _middle(stake)
    entries.match[place] = open_matches[open_matches != entries.match[place]][0]
    return int(entries.user[place]), None


def _out_of_order(block: Block) -> tuple[int, str | None]:
    """Let two stakes of a wallet change places, the second of which was sent after the first was acknowledged."""
    entries, bets = block.entries, block.bets
    bet = np.maximum(entries.bet, 0)
    stake = (entries.bet >= 0) & (entries.payment < 0) & (bets.fate[bet] == Fate.DONE)
    answered_s = bets.invoke_s[bet] + bets.latency_s[bet]
    apart = np.append(answered_s[:-1] < bets.invoke_s[bet][1:], False)
    both = np.append((entries.user[1:] == entries.user[:-1]) & stake[1:] & stake[:-1], False)
    place = _middle(both & apart)
    order = np.arange(len(entries.user))
    order[[place, place + 1]] = place + 1, place
    swapped = _rows(entries, order)
    swapped.at_s = entries.at_s
    _reordered(block, swapped)
    return int(entries.user[place]), f"s{block.number}-b{entries.bet[place + 1]}"


def _payouts(block: Block) -> Flags:
    payment = np.maximum(block.entries.payment, 0)
    paid: Flags = block.payments.kind[payment] == KINDS.index("PAYOUT")
    paid &= (block.entries.payment >= 0) & (block.payments.version[payment] == 1)
    return paid


def _paid_twice(block: Block) -> tuple[int, str | None]:
    place = _middle(_payouts(block))
    told = int(block.entries.user[place])
    _reordered(block, _rows(block.entries, np.insert(np.arange(len(block.entries.user)), place, place)))
    return told, None


def _cent_too_much(block: Block) -> tuple[int, str | None]:
    place = _middle(_payouts(block))
    block.entries.amount[place] += 1
    _reordered(block, block.entries)
    return int(block.entries.user[place]), None


def _changed(frame: pl.DataFrame, rows: pl.Expr, **values: pl.Expr) -> tuple[pl.DataFrame, int]:
    """Change the middle one of these rows and return the table and whose row it was (`user` or `user_id`)."""
    numbers = frame.with_row_index("_row").filter(rows)["_row"]
    if numbers.is_empty():
        raise ValueError("no row of this block can carry the violation: use more rows, or another seed")
    place = int(numbers[numbers.len() // 2])
    chosen = pl.int_range(pl.len()) == place
    changed = frame.with_columns(
        pl.when(chosen).then(value).otherwise(pl.col(name)).alias(name) for name, value in values.items()
    )
    return changed, int(frame["user" if "user" in frame.columns else "user_id"][place])


def _projection_off(attempts: pl.DataFrame, frames: Frames) -> tuple[int, pl.DataFrame]:
    frames["projection"], user = _changed(frames["projection"], pl.col("_final"), balance=pl.col("balance") + 1)
    return user, attempts


def _event_lost(attempts: pl.DataFrame, frames: Frames) -> tuple[int, pl.DataFrame]:
    posted = frames["outbox"].filter((pl.col("event_type") == "EntryPosted") & ~pl.col("_final"))
    event_id, user = posted.select("event_id", "user_id").row(posted.height // 2)
    for name in ("outbox", "kafka"):
        frames[name] = frames[name].filter(pl.col("event_id") != event_id)
    return int(user), attempts


def _event_differs(attempts: pl.DataFrame, frames: Frames) -> tuple[int, pl.DataFrame]:
    frames["kafka"], user = _changed(
        frames["kafka"],
        pl.col("event_type") == "EntryPosted",
        payload=pl.col("payload").str.replace('"amount": ', '"amount": 9'),
    )
    return user, attempts


def _on_another_server(attempts: pl.DataFrame, frames: Frames) -> tuple[int, pl.DataFrame]:
    other = pl.when(pl.col("server") == "pg0").then(pl.lit("pg1")).otherwise(pl.lit("pg0"))
    frames["ledger"], user = _changed(frames["ledger"], pl.col("seq") > FEWEST_SEQ, server=other)
    return user, attempts


def _asked_for_less(attempts: pl.DataFrame, _: Frames) -> tuple[int, pl.DataFrame]:
    asked = (pl.col("op") == "deposit") & (pl.col("cls") == "ok") & pl.col("tag").is_null()
    changed, user = _changed(attempts, asked, amount=pl.col("amount") - 1)
    return user, changed


def _replayed_otherwise(attempts: pl.DataFrame, _: Frames) -> tuple[int, pl.DataFrame]:
    replayed = pl.col("replayed") & (pl.col("op") == "bet")
    changed, user = _changed(attempts, replayed, seq=pl.col("seq") + 1)
    return user, changed


def _read_that_never_was(attempts: pl.DataFrame, _: Frames) -> tuple[int, pl.DataFrame]:
    changed, user = _changed(attempts, pl.col("op") == "balance", balance=pl.col("balance") + 1)
    return user, changed


_IN_ENTRIES: Final[dict[str, Callable[[Block], tuple[int, str | None]]]] = {
    "A01": _lost,
    "A02": _applied_twice,
    "A06": _overdrawn,
    "A09": _chain_broken,
    "A12": _booked_elsewhere,
    "A14": _out_of_order,
    "A27": _paid_twice,
    "A28": _cent_too_much,
}
_IN_TABLES: Final[dict[str, Callable[[pl.DataFrame, Frames], tuple[int, pl.DataFrame]]]] = {
    "A03": _asked_for_less,
    "A05": _replayed_otherwise,
    "A11": _projection_off,
    "A19": _read_that_never_was,
    "A21": _event_lost,
    "A25": _event_differs,
    "A31": _on_another_server,
}
PLANTS: Final = frozenset({*_IN_ENTRIES, *_IN_TABLES})
"""Codes of which a violation can be planted."""
ALSO: Final[dict[str, frozenset[str]]] = {
    "A02": frozenset({"A05"}),
    "A06": frozenset({"A07"}),
    "A14": frozenset({"A18"}),
    "A27": frozenset({"A30"}),
    "A28": frozenset({"A30"}),
}
"""Codes that may fire beside the one that was planted, for what follows from it."""
