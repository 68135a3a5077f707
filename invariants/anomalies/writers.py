"""A32: writes of those who were not to write any more: a server that gave a shard up, a primary that was deposed."""

from typing import Final

import polars as pl

from invariants.anomalies.common import NOTHING, Found, found, seconds
from invariants.anomalies.events import WALLET_EVENTS
from invariants.run import Run
from reference.routing import SHARDS

_MEMBER: Final = pl.Struct({"member": pl.String(), "term": pl.Int64(), "user": pl.Int64(), "seq": pl.Int64()})
"""The `detail` of `primary` and `primary_write` rows of the timeline, as JSON."""


def a32_zombie_write(run: Run) -> Found:
    """A32 zombie write: committed by a retired writer or by a deposed primary.

    - A server has an entry, a bet, a refusal or a wallet's event of a shard that it had given up, written after it had
      (`routes.changed_at` of its own row, whose epoch says that the shard was moved): both times are of its own clock.
    - By the timeline, a member of a server committed under a term (`primary_write`) after another had become primary
      of that server under a higher one (`primary`); or two members were primary under one term.
    """
    return _after_giving_up(run) + _after_deposition(run)


def _after_giving_up(run: Run) -> Found:
    given_up = (
        run.table("routes")
        .filter(~pl.col("here") & (pl.col("epoch") > 0) & pl.col("changed_at").is_not_null())
        .select("server", "shard", "epoch", "changed_at", pl.col("server_name").alias("owner"))
    )
    if given_up.is_empty():
        return NOTHING
    shard = (pl.col("user") % SHARDS).alias("shard")
    nothing = pl.lit(None, dtype=pl.String).alias("key")
    no_seq = pl.lit(None, dtype=pl.Int64).alias("seq")
    user, key = pl.col("user_id").alias("user"), pl.col("idempotent_key").alias("key")
    sources = {
        "the entry": run.final.scan("ledger").select("server", user, "seq", key, pl.col("created_at").alias("at")),
        "the bet": run.final.scan("bets").select("server", user, "seq", nothing, pl.col("placed_at").alias("at")),
        "a refusal": run.final.scan("refusals").select("server", user, no_seq, key, pl.col("created_at").alias("at")),
        "the event": run.final.scan("outbox")
        .filter(pl.col("event_type").is_in(WALLET_EVENTS))
        .select("server", user, "seq", nothing, pl.col("created_at").alias("at")),
    }
    # Of a large run hardly a row is kept: each table is read in streams and only for this.
    after = [
        frame.with_columns(pl.lit(name).alias("what"), shard)
        .join(given_up.lazy(), on=["server", "shard"], how="inner")
        .filter(pl.col("at") > pl.col("changed_at"))
        .collect(engine="streaming")
        for name, frame in sources.items()
    ]
    late = (
        pl.concat(after)
        # An entry, its bet and its event are one write.
        .sort("user", "seq", "what")
        .unique(["server", "user", "seq", "key"], keep="first", maintain_order=True)
    )
    whole = late.filter(pl.col("key").is_not_null())
    parts = late.filter(pl.col("key").is_null()).join(
        whole.select("server", "user", "seq"), on=["server", "user", "seq"], how="anti"
    )
    return found(
        "A32",
        pl.concat([whole, parts.unique(["server", "user", "seq"], keep="first", maintain_order=True)]).sort("at"),
        lambda row: (
            f"{row['server']} wrote {row['what']}"
            + ("" if row["seq"] is None else f" of seq {row['seq']}")
            + f" of user {row['user']}"
            + ("" if row["key"] is None else f" (key {row['key']})")
            + f" {row['at'] - row['changed_at']:.3f} s after it had given shard {row['shard']} up to {row['owner']}"
            f" (epoch {row['epoch']})"
        ),
    )


def _after_deposition(run: Run) -> Found:
    rows = run.timeline.filter(pl.col("kind").is_in(["primary", "primary_write"])).with_columns(
        pl.col("detail").str.json_decode(_MEMBER).alias("member_of")
    )
    rows = rows.unnest("member_of")
    primaries = rows.filter(pl.col("kind") == "primary").select("node", "t", "member", "term")
    writes = rows.filter(pl.col("kind") == "primary_write").select("node", "t", "member", "term", "user", "seq")
    newer = primaries.select("node", pl.col("t").alias("since"), pl.col("member").alias("other"), newer="term")
    deposed = (
        writes.join(newer, on="node", how="inner")
        .filter((pl.col("since") < pl.col("t")) & (pl.col("newer") > pl.col("term")))
        .sort("t", "newer")
        .unique(["node", "t", "member", "term"], keep="first", maintain_order=True)
    )
    first = found(
        "A32",
        deposed,
        lambda row: (
            f"{row['member']} of {row['node']} committed under term {row['term']} at {seconds(row['t'])}"
            + ("" if row["user"] is None else f" (user {row['user']}, seq {row['seq']})")
            + f", although {row['other']} was primary under term {row['newer']} since {seconds(row['since'])}"
        ),
    )
    split = primaries.group_by("node", "term").agg(pl.col("member").unique().sort().alias("members"))
    return first + found(
        "A32",
        split.filter(pl.col("members").list.len() > 1).sort("node", "term"),
        lambda row: f"{' and '.join(row['members'])} were both primary of {row['node']} under term {row['term']}",
    )
