"""What the clients of one block recorded: one row per attempt, answers included."""

from typing import Any, Final

import numpy as np
import polars as pl

from invariants.fates import ROLLBACK_PREFIX
from invariants.history import FINAL_RETRY, HUNG_UP, SCHEMA
from ledgerproof.synth import book
from ledgerproof.synth.block import Block, wallet_starts
from ledgerproof.synth.book import Fate
from ledgerproof.synth.shape import APIS, LOAD_FROM_S, OUTCOMES, Flags, Floats, Ints, Texts, hashes

ATTEMPT: Final[dict[str, pl.DataType]] = {
    **{name: kind for name, kind in SCHEMA.items() if name not in {"run", "record", "attempt", "t"}},
    "t_invoke": pl.Float64(),
    "t_return": pl.Float64(),
    "cls": pl.String(),
    "answer_bet": pl.String(),
}
"""An attempt before it is cut into its two records."""

BEYOND_FUNDS_MINOR: Final = 900_000_000
TIMEOUT_S: Final = 2.5
PATIENCE_S: Final = 0.012
SESSIONS: Final = 1_000
"""Clients of a block."""
STALE_SHARE: Final = 0.01
STRONG_SHARE: Final = 0.1

SIDES: Final = np.array(["LAY", "BACK"])
SELECTIONS: Final = np.array(OUTCOMES)


def texts(values: Texts, index: Ints) -> pl.Series:
    """Return the texts at these indices, null where one is below zero."""
    picked = pl.Series("text", values[np.maximum(index, 0)]).cast(pl.String).to_frame()
    return picked.select(pl.when(pl.Series(index >= 0)).then(pl.col("text")).alias("text")).to_series()


def keys(block: Block, letter: str, index: Ints) -> pl.Series:
    """Return the keys of a kind of command by their indices."""
    frame = pl.DataFrame({"index": index})
    return frame.select(pl.format(f"s{block.number}-{letter}{{}}", "index").alias("key")).to_series()


def head_at(block: Block, user: Ints, at_s: Floats) -> Ints:
    """Return the seq each wallet had reached at each time."""
    entries = block.entries
    starts = wallet_starts(entries.user)
    scale = block.shape.final_s + 1_000.0
    moments = entries.user * scale + entries.at_s
    return np.searchsorted(moments, user * scale + at_s, side="right") - starts[user]


def attempts(block: Block) -> pl.DataFrame:
    """Return all attempts of a block, as many as its shape says, in no order."""
    seqs = _Answers(block)
    parts = [
        *_bets(block, seqs),
        *_transfers(block, seqs),
        *_refused(block),
        *_cancels(block),
        *_match_commands(block),
        _final_bets(block, seqs),
    ]
    wanted = block.shape.attempts_of(block.number)
    reads = wanted - sum(part.height for part in parts)
    listed = min(block.amount_of("entries"), reads)
    parts += [_balances(block, reads - listed), _listings(block, listed)]
    return pl.concat(parts)


class _Answers:
    """Seq and balance of the entry of each bet and transfer, and a hash of what each asked for."""

    def __init__(self, block: Block) -> None:
        entries = block.entries
        self.bet_seq = np.zeros(len(block.bets.user), dtype=np.int64)
        self.bet_balance = self.bet_seq.copy()
        stakes = (entries.bet >= 0) & (entries.payment < 0)
        self.bet_seq[entries.bet[stakes]] = entries.seq[stakes]
        self.bet_balance[entries.bet[stakes]] = entries.balance[stakes]
        self.transfer_seq = np.zeros(len(block.transfers.user), dtype=np.int64)
        self.transfer_balance = self.transfer_seq.copy()
        moved = entries.transfer >= 0
        self.transfer_seq[entries.transfer[moved]] = entries.seq[moved]
        self.transfer_balance[entries.transfer[moved]] = entries.balance[moved]
        self.bet_hash = hashes(block.rng, len(self.bet_seq))
        self.transfer_hash = hashes(block.rng, len(self.transfer_seq))


def _frame(block: Block, columns: dict[str, Any]) -> pl.DataFrame:
    """Return attempts with these columns: arrays, series, or one value for all; the others are null."""
    count = len(columns["t_invoke"])
    api = block.rng.integers(0, APIS, count)
    columns = {"api": np.where(api == 0, "api0", "api1"), "intended": columns["t_invoke"]} | columns
    if "client" not in columns:
        columns["client"] = block.number * SESSIONS + block.rng.integers(0, SESSIONS, count)
    made = []
    for name, kind in ATTEMPT.items():
        value = columns.get(name)
        if isinstance(value, pl.Series):
            made.append(value.cast(kind).alias(name))
        elif isinstance(value, np.ndarray):
            made.append(pl.Series(name, value).cast(kind))
        else:
            made.append(pl.repeat(value, count, dtype=kind, eager=True).alias(name))
    return pl.DataFrame(made)


def _where(condition: Flags, values: pl.Series) -> pl.Series:
    """Return the values, null where the condition does not hold."""
    frame = pl.DataFrame({"value": values, "holds": condition})
    return frame.select(pl.when("holds").then("value").alias("value")).to_series()


def _answered(fate: Ints, impatient: Flags, invoke_s: Floats, latency_s: Floats) -> dict[str, Any]:
    """Return the columns that the fate of a command decides."""
    lost = (fate == Fate.LOST) | (fate == Fate.GONE)
    away = fate == Fate.TURNED_AWAY
    waited_s = np.where(impatient, PATIENCE_S, TIMEOUT_S)
    return {
        "t_invoke": invoke_s,
        "t_return": invoke_s + np.where(lost, waited_s, latency_s),
        "cls": np.where(lost, "info", np.where(away, "fail", "ok")),
        "status": _where(~(lost & impatient), pl.Series(np.where(lost, 504, np.where(away, 503, 202)))),
        "outcome": _where(fate == Fate.DONE, pl.repeat("ACCEPTED", len(fate), eager=True)),
        "replayed": _where(fate == Fate.DONE, pl.repeat(False, len(fate), eager=True)),
        "error": _where(away, pl.repeat("x-admitted: 0", len(fate), eager=True)),
        "tag": _where(impatient, pl.repeat(HUNG_UP, len(fate), eager=True)),
    }


def _replays(block: Block, count: int, index: Ints) -> Ints:
    """Return commands of `index` that are sent again under their key, at most `count`."""
    return block.rng.permutation(index)[:count]


def _bet_columns(block: Block, seqs: _Answers, index: Ints) -> dict[str, Any]:
    bets = block.bets
    return {
        "op": "bet",
        "key": keys(block, "b", index),
        "payload_hash": pl.Series(seqs.bet_hash[index]).cast(pl.String),
        "user": block.user_ids[bets.user[index]],
        "match_id": texts(block.matches.text, bets.match[index]),
        "selection": SELECTIONS[bets.selection[index]],
        "side": SIDES[bets.back[index].astype(np.int64)],
        "odds": bets.odds[index],
        "amount": bets.stake[index],
    }


def _bet_answer(block: Block, seqs: _Answers, index: Ints) -> dict[str, Any]:
    done = block.bets.fate[index] == Fate.DONE
    return {
        "seq": _where(done, pl.Series(seqs.bet_seq[index])),
        "balance": _where(done, pl.Series(seqs.bet_balance[index])),
        "answer_bet": texts(block.bet_text, np.where(done, index, -1)),
    }


def _accepted(replayed: bool) -> dict[str, Any]:
    return {"cls": "ok", "status": 202, "outcome": "ACCEPTED", "replayed": replayed}


def _bets(block: Block, seqs: _Answers) -> list[pl.DataFrame]:
    """Every bet, some of them raced or sent again, and some keys with another body."""
    bets = block.bets
    every = np.arange(len(bets.user))
    first = _bet_columns(block, seqs, every) | _answered(bets.fate, bets.impatient, bets.invoke_s, bets.latency_s)
    found = [_frame(block, first | _bet_answer(block, seqs, every))]
    done = np.flatnonzero((bets.fate == Fate.DONE) & ~bets.late)
    raced = _replays(block, block.amount_of("race"), done)
    again = _replays(block, block.amount_of("retry"), done)
    for index, wait_s, tag in ((raced, np.full(len(raced), 0.0001), "race"), (again, _later(block, again), "retry")):
        invoke_s = bets.invoke_s[index] + wait_s
        columns = _bet_columns(block, seqs, index) | _bet_answer(block, seqs, index) | _accepted(replayed=True)
        found.append(
            _frame(
                block,
                columns | {"t_invoke": invoke_s, "t_return": invoke_s + bets.latency_s[index] + 0.001, "tag": tag},
            )
        )
    other = _replays(block, block.amount_of("other_body"), done)
    invoke_s = bets.invoke_s[other] + _later(block, other)
    columns = _bet_columns(block, seqs, other) | {
        "amount": bets.stake[other] + 10,
        "payload_hash": pl.Series(hashes(block.rng, len(other))).cast(pl.String),
        "t_invoke": invoke_s,
        "t_return": invoke_s + book.latencies(block.rng, len(other)),
        "cls": "fail",
        "status": 409,
        "outcome": "REPLAYED_DIFFERENTLY",
        "tag": "other_body",
    }
    return [*found, _frame(block, columns)]


def _later(block: Block, index: Ints) -> Floats:
    """Return how long after the first attempt of a bet its key is sent again: the load is not over by then."""
    left_s = block.shape.load_to_s - block.bets.invoke_s[index]
    return np.minimum(block.rng.uniform(0.7, 8.0, len(index)), 0.9 * left_s)


def _final_bets(block: Block, seqs: _Answers) -> pl.DataFrame:
    """Unknown bets sent again at the end: replayed where they were applied, refused where their match is over."""
    index, at_s = block.retries.bets, block.retries.bets_at_s
    applied = block.bets.fate[index] == Fate.LOST
    refused = pl.repeat("MATCH_CLOSED", len(index), eager=True)
    columns = _bet_columns(block, seqs, index) | {
        "t_invoke": at_s,
        "t_return": at_s + 0.01,
        "cls": np.where(applied, "ok", "fail"),
        "status": np.where(applied, 202, 422),
        "outcome": pl.Series(np.where(applied, "ACCEPTED", refused.to_numpy())),
        "replayed": pl.Series(applied),
        "seq": _where(applied, pl.Series(seqs.bet_seq[index])),
        "balance": _where(applied, pl.Series(seqs.bet_balance[index])),
        "answer_bet": texts(block.bet_text, np.where(applied, index, -1)),
        "tag": FINAL_RETRY,
    }
    return _frame(block, columns)


def _transfers(block: Block, seqs: _Answers) -> list[pl.DataFrame]:
    transfers, retries = block.transfers, block.retries

    def asked(index: Ints) -> dict[str, Any]:
        return {
            "op": np.where(transfers.amount[index] > 0, "deposit", "withdraw"),
            "key": keys(block, "t", index),
            "payload_hash": pl.Series(seqs.transfer_hash[index]).cast(pl.String),
            "user": block.user_ids[transfers.user[index]],
            "amount": np.abs(transfers.amount[index]),
        }

    every = np.arange(len(transfers.user))
    fated = _answered(transfers.fate, transfers.impatient, transfers.invoke_s, transfers.latency_s)
    done = transfers.fate == Fate.DONE
    fated["seq"] = _where(done, pl.Series(seqs.transfer_seq))
    fated["balance"] = _where(done, pl.Series(seqs.transfer_balance))
    fated["tag"] = pl.Series(
        np.where(every < transfers.seeds, "seed", np.where(transfers.impatient, HUNG_UP, ""))
    ).replace("", None)
    index, at_s = retries.transfers, retries.transfers_at_s
    final = asked(index) | _accepted(replayed=True)
    final |= {
        "replayed": pl.Series(transfers.fate[index] == Fate.LOST),
        "seq": seqs.transfer_seq[index],
        "balance": seqs.transfer_balance[index],
        "t_invoke": at_s,
        "t_return": at_s + 0.01,
        "tag": FINAL_RETRY,
    }
    return [_frame(block, asked(every) | fated), _frame(block, final)]


def _refused(block: Block) -> list[pl.DataFrame]:
    """Bets that no wallet can pay, and bets whose key was rolled back before they came."""
    asked = refusals(block)
    count = asked.height
    bet: dict[str, Any] = {
        "op": "bet",
        "key": asked["key"],
        "payload_hash": pl.Series(hashes(block.rng, count)).cast(pl.String),
        "user": asked["user_id"],
        "match_id": asked["match_id"],
        "selection": "HOME",
        "side": "BACK",
        "odds": 200,
        "amount": BEYOND_FUNDS_MINOR,
        "t_invoke": asked["at_s"].to_numpy(),
        "t_return": asked["at_s"].to_numpy() + 0.008,
        "cls": "fail",
        "status": 422,
        "outcome": asked["outcome"],
        "replayed": False,
        "tag": asked["tag"],
    }
    first = asked.filter(pl.col("outcome") == "ROLLED_BACK")
    back = {
        "op": "rollback",
        "key": first["key"],
        "payload_hash": pl.Series(hashes(block.rng, first.height)).cast(pl.String),
        "user": first["user_id"],
        "t_invoke": first["at_s"].to_numpy() - 0.05,
        "t_return": first["at_s"].to_numpy() - 0.04,
        "tag": "rollback",
        **_accepted(replayed=False),
    }
    return [_frame(block, bet), _frame(block, back)]


def refusals(block: Block) -> pl.DataFrame:
    """Return the bets that were refused from the first: key, user_id, match_id, at_s, outcome and tag."""
    cached = block.drawn.get("refusals")
    if cached is not None:
        return cached
    beyond, back = block.amount_of("beyond"), block.amount_of("rolled_back")
    count = beyond + back
    rng = block.rng
    user = block.pick_users(count)
    match = rng.integers(0, len(block.matches.round), count)
    at_s = book.within(rng, block.edges, block.matches.round[match], book.BETS)
    rolled = np.arange(count) >= beyond
    block.drawn["refusals"] = pl.DataFrame(
        {
            "key": keys(block, "r", np.arange(count)),
            "user_id": block.user_ids[user],
            "match_id": texts(block.matches.text, match),
            "at_s": at_s,
            "outcome": np.where(rolled, "ROLLED_BACK", "INSUFFICIENT_FUNDS"),
            "tag": np.where(rolled, "rollback", "beyond_funds"),
        }
    )
    return block.drawn["refusals"]


def _cancels(block: Block) -> list[pl.DataFrame]:
    cancels, bets = block.cancels, block.bets
    found = []
    for rollback in (False, True):
        mine = np.flatnonzero(cancels.rollback == rollback)
        bet = cancels.bet[mine]
        denied = cancels.denied[mine]
        columns = {
            "op": "rollback" if rollback else "cancel",
            "key": keys(block, "b", bet) if rollback else keys(block, "c", mine),
            "payload_hash": pl.Series(hashes(block.rng, len(mine))).cast(pl.String),
            "user": block.user_ids[bets.user[bet]],
            "t_invoke": cancels.invoke_s[mine],
            "t_return": cancels.invoke_s[mine] + cancels.latency_s[mine],
            "cls": np.where(denied, "fail", "ok"),
            "status": np.where(denied, 422, 202),
            "outcome": np.where(denied, "NOTHING_TO_CANCEL", "ACCEPTED"),
            "replayed": False,
            "tag": "rollback" if rollback else None,
        }
        if not rollback:
            columns |= {
                "match_id": texts(block.matches.text, bets.match[bet]),
                "bet_id": texts(block.bet_text, bet),
                "answer_bet": texts(block.bet_text, np.where(denied, -1, bet)),
            }
        found.append(_frame(block, columns))
    return found


def cancel_keys(block: Block) -> pl.Series:
    """Return the key of the stored row of each cancel."""
    rows = pl.DataFrame(
        {"own": keys(block, "c", np.arange(len(block.cancels.bet))), "bet": keys(block, "b", block.cancels.bet)}
    )
    rollback = pl.Series(block.cancels.rollback)
    return rows.select(
        pl.when(rollback).then(ROLLBACK_PREFIX + pl.col("bet")).otherwise("own").alias("key")
    ).to_series()


def _match_commands(block: Block) -> list[pl.DataFrame]:
    matches, rulings = block.matches, block.rulings
    every = np.arange(len(matches.round))
    closed = np.flatnonzero(np.isfinite(matches.closed_s))
    first = rulings.version == 1
    steps: list[tuple[str, Ints, Floats, Ints]] = [
        ("create_match", every, matches.created_s, np.full(len(every), -1)),
        ("close_match", closed, matches.closed_s[closed], np.full(len(closed), -1)),
    ]
    for op, chosen in (
        ("settle_match", first & ~rulings.void),
        ("void_match", first & rulings.void),
        ("resettle_match", ~first),
    ):
        result = np.where(rulings.void, -1, rulings.result)
        steps.append((op, rulings.match[chosen], rulings.at_s[chosen], result[chosen]))
    found = []
    for op, match, at_s, result in steps:
        numbers = pl.DataFrame({"match": match, "t": at_s})
        columns = {
            "op": op,
            "key": numbers.select(pl.format(f"s{block.number}-m{{}}-{op}-{{}}", "match", pl.int_range(pl.len())))
            .to_series()
            .alias("key"),
            "payload_hash": pl.Series(hashes(block.rng, len(match))).cast(pl.String),
            "match_id": texts(matches.text, match),
            "selection": _where(result >= 0, pl.Series(SELECTIONS[np.maximum(result, 0)])),
            "t_invoke": at_s - 0.004,
            "t_return": at_s + 0.004,
            **_accepted(replayed=False),
        }
        found.append(_frame(block, columns))
    return found


def _balances(block: Block, count: int) -> pl.DataFrame:
    """Return reads of balances: what the ledger held while the read was under way; a few are stale and say so."""
    rng, entries = block.rng, block.entries
    user = block.pick_users(count)
    invoke_s = rng.uniform(LOAD_FROM_S, block.shape.load_to_s, count)
    latency_s = book.latencies(rng, count)
    seq = head_at(block, user, invoke_s + latency_s / 2)
    stale = (rng.random(count) < STALE_SHARE) & (seq > 2)
    seq -= np.where(stale, 2, 0)
    place = wallet_starts(entries.user)[user] + seq - 1
    strong = ~stale & (rng.random(count) < STRONG_SHARE)
    seen = head_at(block, user, invoke_s - 0.1)
    asks = ~stale & (rng.random(count) < 0.5) & (seen > 0)
    return _frame(
        block,
        {
            "op": "balance",
            "client": block.number * SESSIONS + (user * 7 + rng.integers(0, 2, count)) % SESSIONS,
            "user": block.user_ids[user],
            "min_seq": _where(asks, pl.Series(seen)),
            "t_invoke": invoke_s,
            "t_return": invoke_s + latency_s,
            "cls": "ok",
            "status": 200,
            "seq": seq,
            "balance": entries.balance[place],
            "source": np.where(strong, "ledger", np.where(rng.random(count) < 0.1, "projection", "redis")),
            "stale": pl.Series(stale),
        },
    )


def _listings(block: Block, count: int) -> pl.DataFrame:
    """Return reads of pages of a wallet's history."""
    rng = block.rng
    invoke_s = rng.uniform(LOAD_FROM_S, block.shape.load_to_s, count)
    return _frame(
        block,
        {
            "op": "entries",
            "user": block.user_ids[block.pick_users(count)],
            "t_invoke": invoke_s,
            "t_return": invoke_s + book.latencies(rng, count),
            "cls": "ok",
            "status": 200,
        },
    )
