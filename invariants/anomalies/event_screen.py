"""Looks at every event of a large run by hashes, and says which of them the event checks must read in full.

The text of events is most of a run's evidence, and parsing it most of the work of judging it. But what an event must
say follows from the row it tells of, and so does its text as Postgres prints a jsonb. So the expected text is made
from the rows, and hashes (64 bits) of expected, stored and sent text are compared. Whatever differs in any way is a
suspect, and suspects are judged by the checks themselves (A21, A24, A25, A26) with all that belongs to them; the
screen gives no verdict. Two different texts pass for one with a probability of 2^-64.
"""

import threading
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from invariants.anomalies import events
from invariants.anomalies.common import NOTHING, Found
from invariants.anomalies.events import WALLET_EVENTS, decoded
from invariants.history import SCHEMA, LoadReport
from invariants.run import FIRST_SNAPSHOT, Run
from invariants.snapshot import Snapshot
from reference.commands import TOPIC_OF, EventType

TOLD: Final = "events of wallets"
"""Where a slice keeps what the outbox tells of its wallets: user_id, seq, told (hash of type and text)."""

Hashes = NDArray[np.uint64]
_TOPIC: Final = {str(name): topic for name, topic in TOPIC_OF.items()}
_IS_WALLET: Final = pl.col("event_type").is_in(WALLET_EVENTS)


def _told(payload: pl.Expr) -> pl.Expr:
    return pl.col("event_type").hash(5) ^ payload.hash(3)


def _whole(topic: pl.Expr, key: str) -> pl.Expr:
    """Hash everything in which outbox and topic must agree."""
    return pl.col("event_id").hash(1) ^ topic.hash(2) ^ pl.col(key).hash(4) ^ pl.col("payload").hash(3)


_OF_OUTBOX: Final = _whole(pl.col("event_type").replace_strict(_TOPIC, default=None), "partition_key").alias("whole")
_OF_TOPIC: Final = _whole(pl.col("topic"), "key").alias("whole")
_IN_EVENT_TOPIC: Final = pl.col("topic").is_in(sorted(set(_TOPIC.values())))


class Screen:
    """What was seen so far; the methods may be called by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, list[Hashes]] = {"outbox": [], "kafka": [], "book": [], "expected": []}
        self.users: set[int] = set()
        """Wallets whose entries and events do not fit."""

    def _add(self, name: str, hashes: pl.Series) -> None:
        with self._lock:
            self._seen[name].append(hashes.to_numpy())

    def take_outbox(self, batch: pl.DataFrame) -> pl.DataFrame:
        """Look at rows of the outbox and return what they tell of wallets: user_id, seq, told."""
        seen = batch.select(
            "user_id", "seq", _IS_WALLET.alias("wallet"), _told(pl.col("payload")).alias("told"), _OF_OUTBOX
        )
        self._add("outbox", seen["whole"])
        self._add("book", seen.filter(~pl.col("wallet"))["told"])
        return seen.filter("wallet").select("user_id", "seq", "told")

    def take_kafka(self, batch: pl.DataFrame) -> None:
        """Look at records of the topics."""
        self._add("kafka", batch.lazy().filter(_IN_EVENT_TOPIC).select(_OF_TOPIC).collect().to_series())

    def take_wallets(self, run: Run) -> None:
        """Compare the entries of a slice of wallets with what the outbox tells of them. Raises MissingEvidence."""
        told = run.scratch[TOLD]
        due = _due_of_wallets(run)
        fits = told.join(due, on=["user_id", "seq", "told"], how="semi")
        missed = due.join(told, on=["user_id", "seq", "told"], how="anti")
        users: set[int] = set()
        if fits.height != told.height or missed.height or told.height != due.height:
            strange = told.join(due, on=["user_id", "seq", "told"], how="anti")
            twice = told.filter(pl.struct("user_id", "seq").is_duplicated())
            for rows in (missed, strange, twice):
                users.update(rows["user_id"].drop_nulls().to_list())
        with self._lock:
            self.users |= users

    def take_matches(self, run: Run) -> None:
        """Note what events the book of a slice of matches is due, and who has a bet without an order."""
        self._add("expected", _due_of_matches(run))
        orphans = run.table("bets").join(run.table("orders"), on="bet_id", how="anti")["user_id"]
        with self._lock:
            self.users |= set(orphans.to_list())

    def suspects(self) -> tuple[Hashes, Hashes]:
        """Return the hashes of events that outbox and topics do not agree on, and of those that no row accounts for."""
        seen = {name: _distinct(hashes) for name, hashes in self._seen.items()}
        differ = np.setxor1d(seen["outbox"], seen["kafka"], assume_unique=True)
        unfounded = np.setdiff1d(seen["book"], seen["expected"], assume_unique=True)
        return differ, unfounded


def _distinct(hashes: list[Hashes]) -> Hashes:
    """Return the hashes in order and once each, and forget the pieces."""
    whole: Hashes = np.concatenate(hashes) if hashes else np.zeros(0, dtype=np.uint64)
    hashes.clear()
    whole.sort()
    return whole[np.concatenate([[True], whole[1:] != whole[:-1]])] if len(whole) else whole


def suspicious(whole: Run, screen: Screen) -> Run | None:
    """Return a run of all that is suspicious and what belongs to it, or None if nothing is. Raises MissingEvidence."""
    differ, unfounded = (pl.Series(hashes, dtype=pl.UInt64) for hashes in screen.suspects())
    users = pl.Series(sorted(screen.users), dtype=pl.Int64)
    if not (differ.len() or unfounded.len() or users.len()):
        return None
    final = whole.final
    odd = _OF_OUTBOX.is_in(differ.implode()) | (~_IS_WALLET & _told(pl.col("payload")).is_in(unfounded.implode()))
    odd |= pl.col("user_id").is_in(users.implode())
    outbox = final.scan("outbox").filter(odd.fill_null(False)).collect()
    sent = (_IN_EVENT_TOPIC & _OF_TOPIC.is_in(differ.implode())) | pl.col("user_id").is_in(users.implode())
    sent |= pl.col("event_id").is_in(outbox["event_id"].unique().implode())
    kafka = final.scan("kafka").filter(sent.fill_null(False)).collect()
    # A record may name another wallet or event than its row: bring in the rows of all records found.
    known = kafka["event_id"].unique().implode()
    outbox = final.scan("outbox").filter(odd.fill_null(False) | pl.col("event_id").is_in(known)).collect()
    told = outbox.hstack(decoded(outbox["payload"]).select("bet_id", "match_id"))
    pairs = outbox.select("user_id", "seq").unique().lazy()
    ledger = final.scan("ledger")
    named = ledger.filter(pl.col("user_id").is_in(users.implode()))
    others = ledger.filter(~pl.col("user_id").is_in(users.implode())).join(pairs, on=["user_id", "seq"], how="semi")
    owners = pl.concat([users, outbox["user_id"].drop_nulls()]).unique().implode()
    tables = {
        "outbox": outbox,
        "kafka": kafka,
        "ledger": pl.concat([named, others]).collect(),
        "bets": final.scan("bets").filter(pl.col("user_id").is_in(owners)).collect(),
        "orders": final.scan("orders").filter(pl.col("bet_id").is_in(told["bet_id"].drop_nulls().implode())).collect(),
        "fills": final.scan("fills")
        .filter(pl.col("match_id").is_in(told["match_id"].drop_nulls().implode()))
        .collect(),
        "settlements": final.table("settlements"),
    }
    return _part(whole, tables)


def too_early(whole: Run) -> Found:
    """Find what `events.too_early` finds (A24), holding 16 bytes for each event instead of its row.

    Ids are compared by hashes, and the fold itself reads the rows of those that seem too early.
    """
    final, ident = whole.final, pl.col("event_id").hash(1).alias("ident")
    written = final.scan("outbox").drop_nulls(["event_id", "created_at"]).select(ident, "created_at").collect()
    if written.is_empty():
        return NOTHING
    sent = final.scan("kafka").filter(_IN_EVENT_TOPIC).drop_nulls(["event_id", "timestamp"])
    early = sent.select(ident, "timestamp").collect().join(written, on="ident")
    early = early.filter(pl.col("timestamp") < pl.col("created_at") - whole.clock_slack_s).select("ident").unique()
    if early.is_empty():
        return NOTHING
    among = ident.is_in(early["ident"].implode())
    tables = {name: final.scan(name).filter(among).collect() for name in ("outbox", "kafka")}
    return events.too_early(_part(whole, tables))


def _part(whole: Run, tables: dict[str, pl.DataFrame]) -> Run:
    """Return a run of some rows of some tables, without attempts."""
    return Run(
        config=whole.config,
        recording=LoadReport(frame=pl.DataFrame(schema=SCHEMA)),
        timeline_rows=whole.timeline,
        series_rows=whole.series,
        first=Snapshot(FIRST_SNAPSHOT, None, tables, frozenset(), evidence=whole.config.evidence),
        second=None,
    )


# -- the text that is due --------------------------------------------------------------------------------


def _text(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.String).fill_null("null")


def _quoted(name: str) -> pl.Expr:
    return pl.concat_str(pl.lit('"'), name, pl.lit('"')).fill_null("null")


def _json(texts: dict[str, str], numbers: dict[str, str]) -> pl.Expr:
    """Return objects as Postgres prints a jsonb: shorter names first, then by the alphabet.

    `texts` and `numbers`: name in the payload → column. Texts that need an escape are ids of nothing and come out
    different from what is stored, which makes them suspects and no more.
    """
    fields: dict[str, Any] = {name: _quoted(column) for name, column in texts.items()}
    fields |= {name: _text(column) for name, column in numbers.items()}
    parts: list[pl.Expr] = []
    for name in sorted(fields, key=lambda name: (len(name), name)):
        parts += [pl.lit(("{" if not parts else ", ") + f'"{name}": '), fields[name]]
    return pl.concat_str([*parts, pl.lit("}")])


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _due(event_type: EventType, payload: pl.Expr) -> pl.Expr:
    return (pl.lit(event_type.value).hash(5) ^ payload.hash(3)).alias("told")


def _due_of_wallets(run: Run) -> pl.DataFrame:
    """Return user_id, seq, told of the one event that each entry of a slice is due."""
    entries = run.entries.select(
        *("user_id", "seq", "type", "contra", "amount", "match_id", "bet_id", "settlement_version", "balance_snapshot")
    )
    names = ["user_id", "bet_id", "seq"]
    bets = run.table("bets").select(
        *names, pl.col("match_id").alias("bet_match"), "outcome", "side", "odds", "stake", "reserve"
    )
    created = entries.join(bets, on=names, how="inner")
    posted = entries.join(bets, on=names, how="anti")
    return pl.concat(
        [
            created.select(
                "user_id",
                "seq",
                _due(
                    EventType.BET_CREATED,
                    _json(
                        _same("bet_id", "outcome", "side") | {"match_id": "bet_match"},
                        _same("user_id", "seq", "amount", "odds", "stake", "reserve") | {"balance": "balance_snapshot"},
                    ),
                ),
            ),
            posted.select(
                "user_id",
                "seq",
                _due(
                    EventType.ENTRY_POSTED,
                    _json(
                        _same("type", "contra", "match_id", "bet_id"),
                        _same("user_id", "seq", "amount", "settlement_version") | {"balance": "balance_snapshot"},
                    ),
                ),
            ),
        ]
    )


def _due_of_matches(run: Run) -> pl.Series:
    """Return told of every event that the book and the settlements of a slice are due."""
    fills = run.table("fills").select(
        _due(
            EventType.BET_MATCHED,
            _json(
                _same("match_id", "outcome", "back_bet_id", "lay_bet_id"),
                _same("fill_no", "odds", "stake", "liability", "winnings", "back_user", "lay_user"),
            ),
        )
    )
    cancelled = (
        run.table("orders")
        .filter(pl.col("cancelled_stake") > 0)
        .select(
            _due(
                EventType.BET_CANCELLED,
                _json(
                    _same("match_id", "bet_id") | {"reason": "cancel_reason"},
                    _same("user_id", "cancelled_stake") | {"refund": "cancel_refund"},
                ),
            )
        )
    )
    settled = run.table("settlements").select(
        _due(EventType.MATCH_SETTLED, _json(_same("match_id", "kind", "result"), _same("settlement_version")))
    )
    return pl.concat([fills, cancelled, settled]).to_series()
