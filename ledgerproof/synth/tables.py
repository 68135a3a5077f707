"""What the service holds of one block: every table of a snapshot, the topics and the cache.

Three more columns say where a row goes: `_bucket` (which piece of the file), `_at` (seconds, its place in there) and
`_final` (only the second snapshot has it).
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from ledgerproof.synth import book
from ledgerproof.synth.block import Block, wallet_starts
from ledgerproof.synth.book import Fate
from ledgerproof.synth.shape import (
    ORIGIN_UNIX_S,
    OUTCOMES,
    PARTITIONS,
    SERVER_NAMES,
    Flags,
    Floats,
    Ints,
    Shape,
    Texts,
    low_bits,
    server_of_match,
    server_of_user,
    uuids,
)
from ledgerproof.synth.told import SELECTIONS, SIDES, cancel_keys, keys, refusals, texts
from reference.commands import BALANCE_TOPIC, TOPIC_OF
from reference.routing import SHARDS

TOPICS: Final = (*sorted(set(TOPIC_OF.values())), BALANCE_TOPIC)
SHARDS_PER_BUCKET: Final = 10
DUPLICATE_SHARE: Final = 0.0005
"""Of the events: sent twice, because the relay died between send and mark."""
CACHED_SHARE: Final = 0.8
GATHER_S: Final = 0.2
"""The projector tells of a wallet's newest balance at most this often."""

EVENT: Final[dict[str, pl.DataType]] = {
    "server": pl.String(),
    "event_id": pl.String(),
    "aggregate_type": pl.String(),
    "aggregate_id": pl.String(),
    "event_type": pl.String(),
    "partition_key": pl.String(),
    "payload": pl.String(),
    "user_id": pl.Int64(),
    "seq": pl.Int64(),
    "amount": pl.Int64(),
    "balance": pl.Int64(),
    "_at": pl.Float64(),
    "_final": pl.Boolean(),
}


@dataclass(frozen=True)
class Pieces:
    """Into how many pieces of time the large tables are cut, so that one fits in memory."""

    shape: Shape

    @property
    def count(self) -> int:
        """Return the pieces of time of one server."""
        return max(1, self.shape.blocks // 8)

    def of(self, server: pl.Expr, at: pl.Expr) -> pl.Expr:
        """Return the bucket of rows that are ordered by server and time."""
        whole_s = self.shape.final_s + 60.0
        piece = (at * self.count / whole_s).cast(pl.Int64).clip(0, self.count - 1)
        return server.replace_strict(list(SERVER_NAMES), list(range(len(SERVER_NAMES)))) * self.count + piece


def tables(block: Block) -> dict[str, pl.DataFrame]:
    """Return every table of the block; the second snapshot has all of its rows."""
    pieces = Pieces(block.shape)
    ledger = _ledger(block)
    created = _event_ids(block, block.bets.commit_s)
    orders = _orders(block, created)
    fills = _fills(block)
    cancels = _cancels(block)
    settlements = _settlements(block)
    outbox = _outbox(block, ledger=ledger, created=created, orders=orders, fills=fills, rulings=settlements)
    by_time = {
        name: frame.with_columns(pieces.of(pl.col("server"), pl.col("_at")).alias("_bucket"))
        for name, frame in {"orders": orders, "fills": fills, "cancels": cancels, "outbox": outbox}.items()
    }
    by_shard = {
        name: frame.with_columns((pl.col("shard") // SHARDS_PER_BUCKET).alias("_bucket"))
        for name, frame in {
            "ledger": ledger.drop("_entry"),
            "bets": _bets(block),
            "refusals": _refusals(block),
            "projection": _projection(block),
        }.items()
    }
    small = {
        name: frame.with_columns(pl.lit(0, dtype=pl.Int64).alias("_bucket"))
        for name, frame in {
            "matches": _matches(block),
            "transitions": _transitions(block),
            "settlements": settlements,
            "redis": _redis(block),
        }.items()
    }
    return by_time | by_shard | small | {"kafka": _kafka(block, outbox)}


def _columns(block: Block, columns: dict[str, Any], at_s: Floats, final: Flags | None = None) -> pl.DataFrame:
    """Return a table of these columns, with the two that place its rows."""
    frame = pl.DataFrame({name: _as_series(values) for name, values in columns.items()})
    return frame.with_columns(
        pl.Series("_at", at_s), pl.Series("_final", np.zeros(len(at_s), dtype=bool) if final is None else final)
    )


def _as_series(values: Any) -> pl.Series:
    series = values if isinstance(values, pl.Series) else pl.Series(values)
    return series.cast(pl.String) if series.dtype == pl.Binary else series


def _null_below(values: Ints, lowest: int = 0) -> pl.Series:
    """Return the values, null where they are below `lowest`."""
    frame = pl.DataFrame({"value": values})
    return frame.select(pl.when(pl.col("value") >= lowest).then("value").alias("value")).to_series()


def _wallet(block: Block, user: Ints) -> dict[str, Any]:
    ids = block.user_ids[user]
    return {"server": server_of_user(ids), "shard": ids % SHARDS, "user_id": ids}


def _home(block: Block, match: Ints) -> Any:
    return server_of_match(block.matches.low[match])


def _event_ids(block: Block, at_s: Floats) -> Texts:
    return uuids(block.rng, low_bits(block.rng, len(at_s)), at_s)


def _ledger(block: Block) -> pl.DataFrame:
    """Return the entries, with `_entry`: 0 for a stake, 1 for a transfer, 2 for a payment."""
    entries, payments = block.entries, block.payments
    paid = np.maximum(entries.payment, 0)
    source = np.where(entries.payment >= 0, 2, np.where(entries.transfer >= 0, 1, 0))
    kind = payments.kind[paid]
    version = np.where(source == 2, payments.version[paid], -1)
    own = np.where(entries.amount > 0, "CREDIT", "DEBIT")
    names = pl.DataFrame(
        {
            "source": source,
            "bet_no": entries.bet,
            "transfer_no": entries.transfer,
            "kind": np.array(book.KINDS)[kind],
            "bet_id": texts(block.bet_text, entries.bet),
            "version": version,
        }
    )
    key = names.select(
        pl.when(pl.col("source") == 2)
        .then(pl.format("ledger:{}:{}:{}", "kind", "bet_id", "version"))
        .when(pl.col("source") == 1)
        .then(pl.format(f"s{block.number}-t{{}}", "transfer_no"))
        .otherwise(pl.format(f"s{block.number}-b{{}}", "bet_no"))
        .alias("key")
    ).to_series()
    return _columns(
        block,
        {
            **_wallet(block, entries.user),
            "seq": entries.seq,
            "type": np.where(source == 2, np.array(book.TYPES)[kind], own),
            "amount": entries.amount,
            "contra": np.where(source == 2, np.array(book.CONTRAS)[kind], np.where(source == 1, "EXTERNAL", "ESCROW")),
            "match_id": texts(block.matches.text, entries.match),
            "bet_id": names["bet_id"],
            "settlement_version": _null_below(version),
            "balance_snapshot": entries.balance,
            "idempotent_key": key,
            "reference_id": pl.repeat(None, len(source), dtype=pl.String, eager=True),
            "created_by": np.where(source == 2, "settler", "api"),
            "created_at": ORIGIN_UNIX_S + entries.at_s,
            "_entry": source,
        },
        entries.at_s,
        entries.final,
    )


def _bets(block: Block) -> pl.DataFrame:
    entries, bets = block.entries, block.bets
    stakes = np.flatnonzero((entries.bet >= 0) & (entries.payment < 0))
    _, firsts = np.unique(entries.bet[stakes], return_index=True)
    stakes = stakes[np.sort(firsts)]
    bet = entries.bet[stakes]
    return _columns(
        block,
        {
            **_wallet(block, bets.user[bet]),
            "bet_id": block.bet_text[bet],
            "seq": entries.seq[stakes],
            "match_id": block.matches.text[bets.match[bet]],
            "outcome": SELECTIONS[bets.selection[bet]],
            "side": SIDES[bets.back[bet].astype(np.int64)],
            "odds": bets.odds[bet],
            "stake": bets.stake[bet],
            "reserve": bets.reserve[bet],
            "placed_at": ORIGIN_UNIX_S + entries.at_s[stakes],
        },
        entries.at_s[stakes],
    )


def _refusals(block: Block) -> pl.DataFrame:
    """Return what was refused during the load, and the bets that came back after their match was over."""
    retries = block.retries
    gone = block.bets.fate[retries.bets] == Fate.GONE
    index, at_s = retries.bets[gone], retries.bets_at_s[gone]
    first = refusals(block)
    late = pl.DataFrame(
        {
            "key": keys(block, "b", index),
            "user_id": block.user_ids[block.bets.user[index]],
            "at_s": at_s + 0.005,
            "outcome": pl.repeat("MATCH_CLOSED", len(index), eager=True),
        }
    )
    rows = pl.concat([first.select(late.columns).with_columns(pl.col("at_s") + 0.004), late])
    user = rows["user_id"].to_numpy()
    return _columns(
        block,
        {
            "server": server_of_user(user),
            "shard": user % SHARDS,
            "user_id": user,
            "idempotent_key": rows["key"],
            "outcome": rows["outcome"],
            "command": pl.repeat('{"op": "bet"}', rows.height, eager=True),
            "created_at": ORIGIN_UNIX_S + rows["at_s"].to_numpy(),
        },
        rows["at_s"].to_numpy(),
        np.arange(rows.height) >= first.height,
    )


def _heads(block: Block, entries_final: bool) -> Ints:
    """Return the place of each wallet's last entry, with or without what the final retries posted."""
    entries = block.entries
    starts = wallet_starts(entries.user)
    last = np.append(starts[1:], len(entries.user)) - 1
    if entries_final:
        return last
    added = np.bincount(entries.user[entries.final], minlength=len(starts))
    return last - added


def _projection(block: Block) -> pl.DataFrame:
    """Rows of the second snapshot, and as `_final` false those of the first."""
    return _twice(block, np.arange(len(block.user_ids)), _wallet(block, np.arange(len(block.user_ids))), "updated_at")


def _redis(block: Block) -> pl.DataFrame:
    cached = np.flatnonzero(block.rng.random(len(block.user_ids)) < CACHED_SHARE)
    return _twice(block, cached, {"user_id": block.user_ids[cached]}, None)


def _twice(block: Block, wallets: Ints, names: dict[str, Any], time_name: str | None) -> pl.DataFrame:
    """Return a row per wallet and snapshot: these tables hold the state of a moment."""
    frames = []
    for final in (False, True):
        head = _heads(block, final)[wallets]
        columns = names | {"balance": block.entries.balance[head], "seq": block.entries.seq[head]}
        if time_name is not None:
            columns[time_name] = ORIGIN_UNIX_S + block.entries.at_s[head] + 0.05
        frames.append(_columns(block, columns, block.entries.at_s[head], np.full(len(wallets), final)))
    return pl.concat(frames)


def _orders(block: Block, created: Texts) -> pl.DataFrame:
    bets = block.bets
    placed = np.flatnonzero(bets.placed)
    placed = placed[np.lexsort([bets.arrived_s[placed], bets.match[placed]])]
    match = bets.match[placed]
    starts = wallet_starts(match)
    arrival = np.arange(len(match)) - np.repeat(starts, np.diff(np.append(starts, len(match)))) + 1
    matched, cancelled, stake = bets.matched[placed], bets.cancelled[placed], bets.stake[placed]
    left = stake - matched - cancelled
    state = np.where(
        left > 0,
        np.where(matched > 0, "PART_MATCHED", "PENDING"),
        np.where(matched > 0, "MATCHED", "CANCELLED"),
    )
    void, ruled = _last_ruling(block)
    state = np.where(ruled[match] & (state != "CANCELLED"), np.where(void[match], "VOID", "SETTLED"), state)
    reason = np.where(bets.late[placed], "LATE", "REQUESTED")
    return _columns(
        block,
        {
            "server": _home(block, match),
            "bet_id": block.bet_text[placed],
            "match_id": block.matches.text[match],
            "user_id": block.user_ids[bets.user[placed]],
            "outcome": SELECTIONS[bets.selection[placed]],
            "side": SIDES[bets.back[placed].astype(np.int64)],
            "odds": bets.odds[placed],
            "stake": stake,
            "reserve": bets.reserve[placed],
            "arrival": arrival,
            "state": state,
            "matched_stake": matched,
            "matched_liability": bets.liability[placed],
            "winnings": bets.winnings[placed],
            "cancelled_stake": cancelled,
            "cancel_refund": bets.refund[placed],
            "cancel_reason": pl.Series(np.where(cancelled > 0, reason, "")).replace("", None),
            "event_id": created[placed],
            "arrived_at": ORIGIN_UNIX_S + bets.arrived_s[placed],
        },
        bets.arrived_s[placed],
    )


def _last_ruling(block: Block) -> tuple[Flags, Flags]:
    """Return per match whether its last ruling was void, and whether there was one."""
    void = np.zeros(len(block.matches.round), dtype=bool)
    ruled = void.copy()
    void[block.rulings.match] = block.rulings.void
    ruled[block.rulings.match] = True
    return void, ruled


def _fills(block: Block) -> pl.DataFrame:
    fills, bets = block.fills, block.bets
    return _columns(
        block,
        {
            "server": _home(block, fills.match),
            "match_id": block.matches.text[fills.match],
            "fill_no": fills.number,
            "outcome": SELECTIONS[bets.selection[fills.back]],
            "back_bet_id": block.bet_text[fills.back],
            "back_user": block.user_ids[bets.user[fills.back]],
            "lay_bet_id": block.bet_text[fills.lay],
            "lay_user": block.user_ids[bets.user[fills.lay]],
            "odds": fills.odds,
            "stake": fills.stake,
            "liability": fills.liability,
            "winnings": fills.winnings,
            "filled_at": ORIGIN_UNIX_S + fills.at_s,
        },
        fills.at_s,
    )


def _cancels(block: Block) -> pl.DataFrame:
    cancels, bets = block.cancels, block.bets
    match = bets.match[cancels.bet]
    return _columns(
        block,
        {
            "server": _home(block, match),
            "user_id": block.user_ids[bets.user[cancels.bet]],
            "idempotent_key": cancel_keys(block),
            "bet_id": block.bet_text[cancels.bet],
            "match_id": block.matches.text[match],
            "outcome": np.where(cancels.denied, "NOTHING_TO_CANCEL", "ACCEPTED"),
            "cancelled_stake": np.where(cancels.denied, 0, bets.cancelled[cancels.bet]),
            "refund": np.where(cancels.denied, 0, bets.refund[cancels.bet]),
            "waiting": np.zeros(len(match), dtype=bool),
            "created_at": ORIGIN_UNIX_S + cancels.commit_s,
        },
        cancels.commit_s,
    )


def _result_text(void: Flags, result: Ints) -> pl.Series:
    return pl.Series(np.where(void, "", SELECTIONS[result])).replace("", None)


def _settlements(block: Block) -> pl.DataFrame:
    rulings, matches = block.rulings, block.matches
    return _columns(
        block,
        {
            "server": _home(block, rulings.match),
            "match_id": matches.text[rulings.match],
            "settlement_version": rulings.version,
            "kind": np.where(rulings.void, "VOID", "SETTLE"),
            "result": _result_text(rulings.void, rulings.result),
            "state": pl.repeat("DONE", len(rulings.match), eager=True),
            "last_arrival": np.zeros(len(rulings.match), dtype=np.int64),
            "started_at": ORIGIN_UNIX_S + rulings.at_s,
            "finished_at": ORIGIN_UNIX_S + rulings.at_s + 0.5,
        },
        rulings.at_s,
    )


def _transitions(block: Block) -> pl.DataFrame:
    """OPEN, CLOSED, and for each ruling SETTLING and then what came of it; a first void goes there at once."""
    matches, rulings = block.matches, block.rulings
    every = np.arange(len(matches.round))
    closed = np.flatnonzero(np.isfinite(matches.closed_s))
    again = rulings.version > 1
    settling = again | ~rulings.void
    null = pl.lit(None, dtype=pl.String)
    result = _result_text(rulings.void, rulings.result)

    def step(match: Ints, to: Any, version: Any, at_s: Floats, outcome: Any = null) -> pl.DataFrame:
        return pl.DataFrame({"match": match, "to_state": to, "settlement_version": version, "at_s": at_s}).with_columns(
            outcome.alias("result")
        )

    steps = pl.concat(
        [
            step(every, ["OPEN"] * len(every), np.zeros_like(every), matches.created_s),
            step(closed, ["CLOSED"] * len(closed), np.zeros_like(closed), matches.closed_s[closed]),
            step(
                rulings.match[settling],
                ["SETTLING"] * int(settling.sum()),
                rulings.version[settling],
                rulings.at_s[settling],
                result.filter(pl.Series(settling)),
            ),
            step(
                rulings.match,
                np.where(rulings.void, "VOID", "SETTLED"),
                rulings.version,
                rulings.at_s + np.where(settling, 0.01, 0.0),
                result,
            ),
        ]
    ).sort("match", "at_s", maintain_order=True)
    same = pl.col("match") == pl.col("match").shift(1)
    steps = steps.with_columns(
        pl.when(same).then(pl.col("to_state").shift(1)).alias("from_state"),
        pl.int_range(1, pl.len() + 1).over("match").alias("transition_no"),
    )
    match = steps["match"].to_numpy()
    return _columns(
        block,
        {
            "server": _home(block, match),
            "match_id": matches.text[match],
            **{
                name: steps[name]
                for name in ("transition_no", "from_state", "to_state", "settlement_version", "result")
            },
            "at": ORIGIN_UNIX_S + steps["at_s"].to_numpy(),
        },
        steps["at_s"].to_numpy(),
    )


def _matches(block: Block) -> pl.DataFrame:
    matches, rulings = block.matches, block.rulings
    every = np.arange(len(matches.round))
    version = np.zeros_like(every)
    result = np.zeros_like(every)
    version[rulings.match] = rulings.version
    result[rulings.match] = rulings.result
    void, ruled = _last_ruling(block)
    closed = np.isfinite(matches.closed_s)
    state = np.where(ruled, np.where(void, "VOID", "SETTLED"), np.where(closed, "CLOSED", "OPEN"))
    zeros = np.zeros_like(every)
    return _columns(
        block,
        {
            "server": _home(block, every),
            "match_id": matches.text,
            "outcomes": pl.repeat(",".join(OUTCOMES), len(every), eager=True),
            "closes_at": ORIGIN_UNIX_S + matches.created_s + 86_400.0,
            "state": state,
            "settlement_version": version,
            "result": _result_text(void | ~ruled, result),
            "book_version": zeros,
            "arrivals": zeros,
            "fills": zeros,
            "created_at": ORIGIN_UNIX_S + matches.created_s,
        },
        matches.created_s,
    )


# -- events --------------------------------------------------------------------------------------------


def _text(name: str) -> pl.Expr:
    """Return a column of text as JSON, null as `null`."""
    return pl.when(pl.col(name).is_null()).then(pl.lit("null")).otherwise('"' + pl.col(name) + '"')


def _number(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.String).fill_null("null")


def _json(**fields: pl.Expr) -> pl.Expr:
    """Return an object as Postgres prints a jsonb: shorter names first, then by the alphabet."""
    names = sorted(fields, key=lambda name: (len(name), name))
    parts: list[pl.Expr] = []
    for name in names:
        parts += [pl.lit(("{" if not parts else ", ") + f'"{name}": '), fields[name]]
    return pl.concat_str([*parts, pl.lit("}")])


def _outbox(
    block: Block,
    *,
    ledger: pl.DataFrame,
    created: Texts,
    orders: pl.DataFrame,
    fills: pl.DataFrame,
    rulings: pl.DataFrame,
) -> pl.DataFrame:
    """Every event: of each entry, fill, cancelled order and settlement."""
    entries = ledger.with_columns(pl.Series("_bet", block.entries.bet))
    stakes = entries.filter(pl.col("_entry") == 0)
    bet = stakes["_bet"].to_numpy()
    bets = block.bets
    stakes = stakes.with_columns(
        texts(created, bet).alias("event_id"),
        texts(block.matches.text, bets.match[bet]).alias("bet_match"),
        pl.Series("outcome", SELECTIONS[bets.selection[bet]]),
        pl.Series("side", SIDES[bets.back[bet].astype(np.int64)]),
        pl.Series("odds", bets.odds[bet]),
        pl.Series("stake", bets.stake[bet]),
        pl.Series("reserve", bets.reserve[bet]),
    ).select(
        "server",
        "event_id",
        pl.lit("Bet").alias("aggregate_type"),
        pl.col("bet_id").alias("aggregate_id"),
        pl.lit("BetCreated").alias("event_type"),
        pl.col("user_id").cast(pl.String).alias("partition_key"),
        _json(
            **{name: _text(name) for name in ("bet_id", "outcome", "side")},
            **{name: _number(name) for name in ("user_id", "seq", "amount", "odds", "stake", "reserve")},
            match_id=_text("bet_match"),
            balance=_number("balance_snapshot"),
        ).alias("payload"),
        *_wallet_fields(),
    )
    others = entries.filter(pl.col("_entry") != 0)
    posted = others.with_columns(_ids(block, others)).select(
        "server",
        "event_id",
        pl.lit("Wallet").alias("aggregate_type"),
        pl.col("user_id").cast(pl.String).alias("aggregate_id"),
        pl.lit("EntryPosted").alias("event_type"),
        pl.col("user_id").cast(pl.String).alias("partition_key"),
        _json(
            **{name: _text(name) for name in ("type", "contra", "match_id", "bet_id")},
            **{name: _number(name) for name in ("user_id", "seq", "amount", "settlement_version")},
            balance=_number("balance_snapshot"),
        ).alias("payload"),
        *_wallet_fields(),
    )
    matched = fills.with_columns(_ids(block, fills)).select(
        *_book_event("Match", "match_id", "BetMatched", "match_id"),
        _json(
            **{name: _text(name) for name in ("match_id", "outcome", "back_bet_id", "lay_bet_id")},
            **{
                name: _number(name)
                for name in ("fill_no", "odds", "stake", "liability", "winnings", "back_user", "lay_user")
            },
        ).alias("payload"),
        "_at",
        "_final",
    )
    gone = orders.filter(pl.col("cancelled_stake") > 0)
    at_s = pl.Series("_at", bets.cancelled_s[np.flatnonzero(bets.cancelled > 0)])
    index = pl.DataFrame({"bet_id": texts(block.bet_text, np.flatnonzero(bets.cancelled > 0)), "_at": at_s})
    gone = gone.drop("_at").join(index, on="bet_id", how="left", maintain_order="left")
    cancelled = gone.with_columns(_ids(block, gone).alias("event_id")).select(
        *_book_event("Bet", "bet_id", "BetCancelled", "user_id"),
        _json(
            **{name: _text(name) for name in ("match_id", "bet_id")},
            **{name: _number(name) for name in ("user_id", "cancelled_stake")},
            refund=_number("cancel_refund"),
            reason=_text("cancel_reason"),
        ).alias("payload"),
        pl.col("user_id"),
        "_at",
        "_final",
    )
    settled = rulings.with_columns(_ids(block, rulings)).select(
        *_book_event("Match", "match_id", "MatchSettled", "match_id"),
        _json(
            **{name: _text(name) for name in ("match_id", "kind", "result")},
            settlement_version=_number("settlement_version"),
        ).alias("payload"),
        "_at",
        "_final",
    )
    parts = [
        frame.with_columns(
            pl.lit(None, dtype=kind).alias(name) for name, kind in EVENT.items() if name not in frame.columns
        ).select(*EVENT)
        for frame in (stakes, posted, matched, cancelled, settled)
    ]
    return pl.concat(parts).with_columns(
        pl.lit(True).alias("published_to_kafka"),
        (pl.col("_at") + ORIGIN_UNIX_S).alias("created_at"),
        (pl.col("_at") + ORIGIN_UNIX_S + 0.02).alias("published_at"),
    )


def _ids(block: Block, rows: pl.DataFrame) -> pl.Series:
    return pl.Series("event_id", _event_ids(block, rows["_at"].to_numpy())).cast(pl.String)


def _wallet_fields() -> list[pl.Expr]:
    return [
        *(pl.col(name) for name in ("user_id", "seq", "amount")),
        pl.col("balance_snapshot").alias("balance"),
        pl.col("_at"),
        pl.col("_final"),
    ]


def _book_event(aggregate: str, aggregate_id: str, event_type: str, key: str) -> list[pl.Expr]:
    return [
        pl.col("server"),
        pl.col("event_id"),
        pl.lit(aggregate).alias("aggregate_type"),
        pl.col(aggregate_id).cast(pl.String).alias("aggregate_id"),
        pl.lit(event_type).alias("event_type"),
        pl.col(key).cast(pl.String).alias("partition_key"),
    ]


def _kafka(block: Block, outbox: pl.DataFrame) -> pl.DataFrame:
    """Return the records of every topic: each event, a few of them twice, and the projector's balances."""
    events = outbox.select(
        pl.col("event_type").replace_strict({str(name): topic for name, topic in TOPIC_OF.items()}).alias("topic"),
        pl.col("partition_key").alias("key"),
        *("event_id", "event_type", "user_id", "seq", "amount", "balance", "payload"),
        pl.col("_at") + 0.02,
        "_final",
    )
    again = events.filter(pl.Series(block.rng.random(events.height) < DUPLICATE_SHARE) & ~pl.col("_final"))
    again = again.with_columns(pl.col("_at") + 0.3)
    entries = block.entries
    following_s = np.append(entries.at_s[1:], np.inf)
    same = np.append(entries.user[1:] == entries.user[:-1], False)
    told = np.flatnonzero(~same | (following_s - entries.at_s > GATHER_S))
    balances = pl.DataFrame(
        {
            "user_id": block.user_ids[entries.user[told]],
            "balance": entries.balance[told],
            "seq": entries.seq[told],
            "_at": entries.at_s[told] + 0.06,
            "_final": entries.final[told],
        }
    )
    balances = balances.with_columns(_ids(block, balances)).select(
        pl.lit(BALANCE_TOPIC).alias("topic"),
        pl.col("user_id").cast(pl.String).alias("key"),
        "event_id",
        pl.lit("BalanceUpdated").alias("event_type"),
        "user_id",
        "seq",
        pl.lit(None, dtype=pl.Int64).alias("amount"),
        "balance",
        _json(
            **{name: _number(name) for name in ("user_id", "balance", "seq")},
            updated_at_ms=((pl.col("_at") + ORIGIN_UNIX_S) * 1000).cast(pl.Int64).cast(pl.String),
        ).alias("payload"),
        "_at",
        "_final",
    )
    partition = (pl.col("key").hash(7) % PARTITIONS).cast(pl.Int64)
    number = pl.col("topic").replace_strict(list(TOPICS), list(range(len(TOPICS))))
    return (
        pl.concat([events, again, balances])
        .with_columns(partition.alias("partition"), (pl.col("_at") + ORIGIN_UNIX_S).alias("timestamp"))
        .with_columns((number * PARTITIONS + pl.col("partition")).alias("_bucket"))
    )
