"""What every check returns, and the folds that several of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import polars as pl

from invariants.run import Run
from invariants.subjects import kept, subjects_of

MAX_WITNESSES: Final = 20
"""Witnesses kept per code: enough to see a pattern, few enough to read."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Witness:
    """One violation a reader can follow by hand: whose, where, and one sentence of proof."""

    code: str
    text: str
    key: str | None = None
    user: int | None = None
    seq: int | None = None
    match_id: str | None = None
    bet_id: str | None = None
    event_id: str | None = None
    attempt: int | None = None
    fault_id: int | None = None
    shard: int | None = None


PLACES: Final = ("key", "user", "seq", "match_id", "bet_id", "event_id", "attempt", "fault_id", "shard")
"""What a witness names besides its sentence: the columns of a violation that say where to look."""


@dataclass(frozen=True)
class Found:
    """How many violations a check found, and up to `MAX_WITNESSES` of them."""

    count: int = 0
    witnesses: list[Witness] = field(default_factory=list)
    subjects: frozenset[str] = frozenset()
    """What all of them are about (`invariants.subjects`), for comparison with what other judges find."""

    def __add__(self, other: "Found") -> "Found":
        """Return both findings together."""
        return Found(
            self.count + other.count,
            (self.witnesses + other.witnesses)[:MAX_WITNESSES],
            kept(self.subjects | other.subjects),
        )


NOTHING: Final = Found()


class Scope(StrEnum):
    """What of a run a fold must see at once; a large run is judged in slices (`invariants.slices`)."""

    WHOLE = "whole"
    WALLET = "wallet"
    """All rows of each wallet. Commands on matches, which no wallet owns, are in the first slice alone."""
    MATCH = "match"
    """All rows of each match."""
    EVENTS = "events"
    """Entries, rows of the book, outbox and topics of every event: a screen looks at them all, and only what it
    suspects is judged (`invariants.anomalies.event_screen`)."""


@dataclass(frozen=True)
class Part:
    """A fold of a check that is right for each slice by itself: the findings of all slices are those of the run."""

    scope: Scope
    find: Callable[[Run], Found]


@dataclass(frozen=True)
class Summed:
    """A fold of a check over sums: each slice gives a small frame, and all of them together are judged."""

    scope: Scope
    summary: Callable[[Run], pl.DataFrame]
    find: Callable[[Run, pl.DataFrame], Found]


@dataclass(frozen=True)
class Check:
    """One code and the function that specifies and finds it."""

    code: str
    name: str
    find: Callable[[Run], Found]
    rests_on_absence: bool
    """True: its witnesses say that something is *not* there, so they prove nothing when the recording or the
    snapshot itself has holes (V05, V06). False: what they show is there whatever else was lost."""
    older: tuple[str, ...] = ()
    """What older runs do not hold (`Run.lacking`) and without which this code is decided in part only."""


def found(code: str, rows: pl.DataFrame, sentence: Callable[[Row], str]) -> Found:
    """Return one violation per row; the columns of PLACES, where present, name the witness."""
    if rows.is_empty():
        return NOTHING
    witnesses = [
        Witness(code, sentence(row), **{name: row.get(name) for name in PLACES})
        for row in rows.head(MAX_WITNESSES).iter_rows(named=True)
    ]
    return Found(rows.height, witnesses, subjects_of(code, rows))


def as_keys(entries: pl.DataFrame) -> pl.DataFrame:
    """Return ledger rows with the names that attempts use: user and key."""
    return entries.rename({"user_id": "user", "idempotent_key": "key"})


def highest_before(
    rows: pl.DataFrame,
    events: pl.DataFrame,
    *,
    by: list[str],
    at: str,
    moment: str,
    value: str,
) -> pl.DataFrame:
    """Add to `rows` the column `highest`: the largest `value` of `events` of the same `by` strictly before.

    `at` is the time column of `rows`, `moment` that of `events`, both in seconds. Null where there is none.
    One sort of each side and a merge.
    """
    known = events.filter(pl.col(moment).is_finite()).sort(moment)
    known = known.select(*by, pl.col(moment), pl.col(value).cum_max().over(by).alias("highest"))
    return rows.sort(at).join_asof(
        known,
        left_on=at,
        right_on=moment,
        by=by,
        strategy="backward",
        allow_exact_matches=False,
        check_sortedness=False,
    )


def acknowledged(run: Run) -> pl.DataFrame:
    """Return the client's entries that were acknowledged: user, key, seq, begin_s, ack_s (seconds)."""
    told = run.fates.filter((pl.col("family") == "ledger") & pl.col("ack_s").is_finite())
    return (
        as_keys(run.client_entries)
        .select("user", "key", "seq")
        .join(told.select("user", "key", "begin_s", "ack_s"), on=["user", "key"], how="inner")
    )


def seconds(value: float) -> str:
    """Return a time of the run for a sentence."""
    return f"{value:.3f} s"


def bodies(attempts: pl.DataFrame) -> pl.DataFrame:
    """Return the requests of ledger keys, with the entry each asks for: type, contra, want_amount.

    `want_amount` is null for bets: what a bet reserves is a rule of money (A28), not part of the request.
    """
    kind = pl.col("op")
    return (
        attempts.filter(pl.col("family") == "ledger")
        .select("user", "key", "op", "match_id", "selection", "side", "odds", "amount", "cls")
        .with_columns(
            pl.when(kind == "deposit").then(pl.lit("CREDIT")).otherwise(pl.lit("DEBIT")).alias("want_type"),
            pl.when(kind == "bet").then(pl.lit("ESCROW")).otherwise(pl.lit("EXTERNAL")).alias("want_contra"),
            pl.when(kind == "deposit")
            .then(pl.col("amount"))
            .when(kind == "withdraw")
            .then(-pl.col("amount"))
            .alias("want_amount"),
        )
    )


def asked_for(run: Run, requests: pl.DataFrame, *, only_unlike: bool = False) -> pl.DataFrame:
    """Return the client's entries that have a request (`bodies`) under their key, with the column `fits`.

    `fits`: some request of the key asks for exactly this entry. A bet is compared by the order in its bet
    row; a bet entry without one is torn (A13) and counts as fitting here, so that one bug has one name.
    `only_unlike` leaves out the entries that every request of their key fits, which are nearly all.
    """
    bets = run.table("bets").select(
        pl.col("user_id").alias("user"),
        "bet_id",
        pl.col("match_id").alias("bet_match"),
        pl.col("outcome").alias("bet_outcome"),
        pl.col("side").alias("bet_side"),
        pl.col("odds").alias("bet_odds"),
        pl.col("stake").alias("bet_stake"),
    )
    rows = as_keys(run.client_entries).select(
        "user", "key", "seq", "type", "contra", pl.col("amount").alias("posted"), "bet_id"
    )
    rows = rows.join(bets.unique(["user", "bet_id"]), on=["user", "bet_id"], how="left")
    both = rows.join(requests, on=["user", "key"], how="inner")
    same_order = (
        (pl.col("bet_match") == pl.col("match_id"))
        & (pl.col("bet_outcome") == pl.col("selection"))
        & (pl.col("bet_side") == pl.col("side"))
        & (pl.col("bet_odds") == pl.col("odds"))
        & (pl.col("bet_stake") == pl.col("amount"))
    )
    content = (
        pl.when(pl.col("op") == "bet")
        .then(pl.col("bet_stake").is_null() | same_order)
        .otherwise(pl.col("posted") == pl.col("want_amount"))
    )
    fits = (pl.col("type") == pl.col("want_type")) & (pl.col("contra") == pl.col("want_contra")) & content
    both = both.select("user", "key", "seq", "posted", "type", fits.fill_null(False).alias("fits"))
    if only_unlike:
        both = both.join(both.filter(~pl.col("fits")), on=["user", "key"], how="semi", maintain_order="left")
    return both.group_by("user", "key", "seq", "posted", "type", maintain_order=True).agg(pl.col("fits").any())
