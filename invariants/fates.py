"""The fate of every key, and what the final state says about the keys whose fate nobody was told.

Fate belongs to the key, not to the attempt: a key is sent again after a timeout, raced on two processes,
or misused with another body, and must still have one effect at most. A key is (family, user, key):

- `ledger`: deposit, withdraw, bet. The effect is the entry with that user and key.
- `cancel`: the effect is the accepted row of `cancels` with that user and key.
- `rollback`: the key is that of the bet it takes back. The effect is the accepted row of `cancels` under
  ROLLBACK_PREFIX and that key, or the refusal ROLLED_BACK stored under that key.
- `match`: create, close, settle, void, resettle. These are compare-and-set on the match, so its key is the match
  and the operation, and the effect is that the match has (at some time) reached that state. The key of a resettle
  has the result too: a match can be settled again with several, and the effect is a settlement with this one.
- `read`: no effect, no fate.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import polars as pl

from invariants.snapshot import Snapshot
from reference.routing import SHARDS

LEDGER_OPS: Final = ("deposit", "withdraw", "bet")
CANCEL_OPS: Final = ("cancel",)
ROLLBACK_OPS: Final = ("rollback",)
ROLLBACK_PREFIX: Final = "ledger:rollback:"
"""The service cancels a bet that is rolled back under this and the bet's own key."""
RESETTLE: Final = "resettle_match"
MATCH_OPS: Final = ("create_match", "close_match", "settle_match", "void_match", RESETTLE)
READ_OPS: Final = ("balance", "entries")
STATE_REACHED: Final = {
    "create_match": ("OPEN",),
    "close_match": ("CLOSED",),
    "settle_match": ("SETTLING", "SETTLED"),
    "void_match": ("VOID",),
}
"""Match command → the states of which one must have been entered when it has had its effect."""

REFUSED_STATUS: Final = 422
OTHER_BODY_STATUS: Final = 409
REFUSALS_NOT_STORED: Final = ("UNKNOWN_BET",)
"""Refusals that do not bind the key: the bet may become known."""

RETRY_BY_KEY: Final = ("ledger", "cancel")
"""Families whose unknown keys can be sent again from what the history holds."""


class Fate(StrEnum):
    """What may be found under a key."""

    MUST = "MUST"
    """Acknowledged: exactly one effect."""
    MAY = "MAY"
    """Never answered for certain: no effect or one."""
    MUST_NOT = "MUST_NOT"
    """Refused, or certainly not done: no effect."""


class Resolution(StrEnum):
    """What the final state says about a MAY key."""

    APPLIED = "applied"
    NOT_APPLIED = "not_applied"
    REFUSED = "refused"
    """The service stored a refusal whose answer was lost: not applied, for good."""
    UNRESOLVED = "unresolved"
    """The state does not answer: its server was not read, or it says both yes and no."""


def described(attempts: pl.DataFrame) -> pl.DataFrame:
    """Add to `history.attempts` the columns family, key (for matches: operation and match), body and refused.

    `sent_key` is the key as the client sent it.
    `body` identifies what was asked; two attempts of a key with equal bodies are retries of each other.
    `refused` marks a refusal that the service stores and that is final.
    """
    op = pl.col("op")
    family = (
        pl.when(op.is_in(LEDGER_OPS))
        .then(pl.lit("ledger"))
        .when(op.is_in(CANCEL_OPS))
        .then(pl.lit("cancel"))
        .when(op.is_in(ROLLBACK_OPS))
        .then(pl.lit("rollback"))
        .when(op.is_in(MATCH_OPS))
        .then(pl.lit("match"))
        .otherwise(pl.lit("read"))
    )
    fields = pl.concat_str(
        [pl.col(name).cast(pl.String) for name in ("match_id", "bet_id", "selection", "side", "odds", "amount")],
        separator="|",
        ignore_nulls=True,
    )
    is_match = pl.col("family") == "match"
    return attempts.with_columns(family.alias("family")).with_columns(
        pl.when(is_match & (op == RESETTLE))
        .then(_resettle_key("selection"))
        .when(is_match)
        .then(op + ":" + pl.col("match_id"))
        .otherwise(pl.col("key"))
        .alias("key"),
        pl.col("key").alias("sent_key"),
        pl.when(is_match).then(None).otherwise(pl.col("user")).alias("user"),
        (op + "|" + pl.coalesce("payload_hash", fields)).alias("body"),
        (
            (pl.col("cls") == "fail")
            & (pl.col("status") == REFUSED_STATUS)
            & pl.col("outcome").is_in(REFUSALS_NOT_STORED).fill_null(False).not_()
            & ~is_match
        )
        .fill_null(False)
        .alias("refused"),
    )


def fates(attempts: pl.DataFrame) -> pl.DataFrame:
    """Return one row per key of `described` attempts, reads left out.

    Columns: family, user (null for matches), key, fate; `begin_s`, the first invoke; `ack_s`, the first
    acknowledgement (+inf without one); the counts oks, infos, refusals, tries; and the request to send again
    (op, api, match_id, bet_id, selection, side, odds, amount) of the attempt that decides the fate.

    Any ok makes MUST. Without one, a stored refusal makes MUST_NOT, because it is final for the key whatever
    an unanswered attempt of it does later. Without that, an unknown outcome makes MAY. A body refused with
    409 decides nothing: it says only that the key belongs to another body.
    """
    # Attempts are ordered so that the first of a key is the one that decides: an ok, then a refusal, then an
    # unknown. One sort replaces a conditional aggregate per column.
    rank = (
        pl.when(pl.col("cls") == "ok")
        .then(0)
        .when(pl.col("refused"))
        .then(1)
        .when(pl.col("cls") == "info")
        .then(2)
        .when(pl.col("status") == OTHER_BODY_STATUS)
        .then(4)
        .otherwise(3)
    )
    commands = attempts.filter(pl.col("family") != "read").with_columns(rank.alias("rank"))
    request = ("op", "api", "match_id", "bet_id", "selection", "side", "odds", "amount", "body")
    grouped = (
        commands.sort("rank", "t_invoke", "attempt", nulls_last=True)
        .group_by("family", "user", "key", maintain_order=True)
        .agg(
            pl.col("rank").first(),
            pl.col("t_invoke").min().alias("begin_s"),
            pl.col("t_return").filter(pl.col("rank") == 0).min().fill_null(float("inf")).alias("ack_s"),
            pl.col("seq").first(),
            (pl.col("cls") == "ok").sum().cast(pl.Int64).alias("oks"),
            (pl.col("cls") == "info").sum().cast(pl.Int64).alias("infos"),
            pl.col("refused").sum().cast(pl.Int64).alias("refusals"),
            pl.len().cast(pl.Int64).alias("tries"),
            *(pl.col(name).first() for name in request),
        )
    )
    fate = (
        pl.when(pl.col("rank") == 0)
        .then(pl.lit(Fate.MUST.value))
        .when(pl.col("rank") == 2)
        .then(pl.lit(Fate.MAY.value))
        .otherwise(pl.lit(Fate.MUST_NOT.value))
    )
    return grouped.with_columns(fate.alias("fate")).drop("rank")


def resolve(
    fates_of_keys: pl.DataFrame,
    snapshot: Snapshot,
    server_of_shard: Mapping[int, str],
) -> pl.DataFrame:
    """Return the MAY keys of `fates` with `resolution` (see Resolution) and `server`, their wallet's server.

    Only a snapshot taken at rest (clients stopped, every timeout waited out, everything drained) can say
    *not applied*. Raises MissingEvidence when a table is absent.
    """
    unknown = fates_of_keys.filter(pl.col("fate") == Fate.MAY.value)
    ledger = _marked(snapshot.table("ledger").rename({"user_id": "user", "idempotent_key": "key"}), "ledger")
    refusals = _marked(snapshot.table("refusals").rename({"user_id": "user", "idempotent_key": "key"}), "ledger")
    cancels = snapshot.table("cancels").rename({"user_id": "user", "idempotent_key": "key"})
    accepted = pl.col("outcome") == "ACCEPTED"
    effects = pl.concat(
        [ledger, _marked(cancels.filter(accepted), "cancel"), rollbacks_done(snapshot), states_reached(snapshot)]
    )
    own = cancels.filter(pl.col("key").str.starts_with(ROLLBACK_PREFIX) & ~accepted)
    kept = own.with_columns(pl.col("key").str.strip_prefix(ROLLBACK_PREFIX))
    denied = pl.concat([refusals, _marked(cancels.filter(~accepted), "cancel"), _marked(kept, "rollback")])
    names = ["family", "user", "key"]
    # Few keys are unknown, and most effects belong to others.
    effects = effects.join(unknown, on=names, how="semi", nulls_equal=True)
    marked = unknown.join(
        effects.unique().with_columns(applied=True), on=names, how="left", nulls_equal=True, maintain_order="left"
    ).join(denied.unique().with_columns(denied=True), on=names, how="left", nulls_equal=True, maintain_order="left")
    routes = pl.DataFrame(
        {"shard": list(server_of_shard), "server": list(server_of_shard.values())},
        schema={"shard": pl.Int64, "server": pl.String},
    )
    read = list(snapshot.servers_read())
    marked = marked.with_columns(
        (pl.col("user") % SHARDS).alias("shard"),
        pl.col("applied").fill_null(False),
        pl.col("denied").fill_null(False),
    ).join(routes, on="shard", how="left", maintain_order="left")
    unread = pl.col("user").is_not_null() & ~pl.col("server").is_in(read).fill_null(False)
    resolution = (
        pl.when(pl.col("applied") & pl.col("denied"))
        .then(pl.lit(Resolution.UNRESOLVED.value))
        .when(pl.col("applied"))
        .then(pl.lit(Resolution.APPLIED.value))
        .when(pl.col("denied"))
        .then(pl.lit(Resolution.REFUSED.value))
        .when(unread)
        .then(pl.lit(Resolution.UNRESOLVED.value))
        .otherwise(pl.lit(Resolution.NOT_APPLIED.value))
    )
    return marked.with_columns(resolution.alias("resolution")).drop("applied", "denied", "shard")


def states_reached(snapshot: Snapshot) -> pl.DataFrame:
    """Return the effects of match commands as keys: family, user (null), key. Raises MissingEvidence.

    A result that a match had from the first counts for a resettle: asking for it again is a replay.
    """
    entered = snapshot.table("transitions").select("match_id", "to_state")
    known = snapshot.table("matches").select("match_id", pl.lit("OPEN").alias("to_state"))
    rows = pl.concat([entered, known])
    effects = [
        rows.filter(pl.col("to_state").is_in(states)).select(
            pl.lit("match").alias("family"),
            pl.lit(None, dtype=pl.Int64).alias("user"),
            (pl.lit(op + ":") + pl.col("match_id")).alias("key"),
        )
        for op, states in STATE_REACHED.items()
    ]
    settled = snapshot.table("settlements").select(
        pl.lit("match").alias("family"),
        pl.lit(None, dtype=pl.Int64).alias("user"),
        _resettle_key("result").alias("key"),
    )
    return pl.concat([*effects, settled]).unique()


def first_results(snapshot: Snapshot) -> pl.DataFrame:
    """Return the keys (family, key) of resettles to the result that a match has only by its first settlement.

    No resettle made them true, whatever the answer to one was. Raises MissingEvidence.
    """
    rows = snapshot.table("settlements").select("settlement_version", _resettle_key("result").alias("key"))
    versions = rows.group_by("key").agg(pl.col("settlement_version").max())
    return versions.filter(pl.col("settlement_version") == 1).select(pl.lit("match").alias("family"), "key")


def _resettle_key(result: str) -> pl.Expr:
    """Return the key of a resettle of `match_id` to the result in a column, null for void."""
    return pl.lit(f"{RESETTLE}:") + pl.col("match_id") + ":" + pl.col(result).fill_null("VOID")


def rollbacks_done(snapshot: Snapshot) -> pl.DataFrame:
    """Return the effects of rollbacks as keys: family, user, key. Raises MissingEvidence."""
    names = {"user_id": "user", "idempotent_key": "key"}
    cancels = snapshot.table("cancels").rename(names).filter(pl.col("outcome") == "ACCEPTED")
    cancelled = cancels.filter(pl.col("key").str.starts_with(ROLLBACK_PREFIX)).with_columns(
        pl.col("key").str.strip_prefix(ROLLBACK_PREFIX)
    )
    tombstones = snapshot.table("refusals").rename(names).filter(pl.col("outcome") == "ROLLED_BACK")
    return pl.concat([_marked(cancelled, "rollback"), _marked(tombstones, "rollback")]).unique()


def choose_retries(resolution: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Return a random half, by `seed`, of the resolved keys that can be sent again with the same body.

    Keys that turned out applied must then answer *replayed* and add no row. At least one key is chosen
    where there is one.
    """
    able = resolution.filter(
        pl.col("family").is_in(RETRY_BY_KEY) & (pl.col("resolution") != Resolution.UNRESOLVED.value)
    ).sort("family", "user", "key")
    return able.sample(n=(able.height + 1) // 2, seed=seed, shuffle=False)


def late_effects(before: pl.DataFrame, after: pl.DataFrame, retried: pl.DataFrame) -> pl.DataFrame:
    """Return the keys whose resolution changed between two snapshots although nobody sent them again.

    `before` and `after` are results of `resolve`; `retried` holds the columns family, user, key.
    """
    names = ["family", "user", "key"]
    changed = before.join(
        after.select(*names, pl.col("resolution").alias("later")), on=names, how="inner", nulls_equal=True
    ).filter(pl.col("later") != pl.col("resolution"))
    return changed.join(retried.select(names).unique(), on=names, how="anti", nulls_equal=True)


def _marked(frame: pl.DataFrame, family: str) -> pl.DataFrame:
    return frame.select(pl.lit(family).alias("family"), "user", "key")
