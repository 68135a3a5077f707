"""What a campaign must have shown at least once, counted from evidence in the run itself.

A run in which nothing ever raced or broke proves little. Most are counted from the history and the snapshots; what only
a process of the service can see (a cache fill that lost, an event that came again) from its own counters, sampled about
once a second, so that a process killed in between may have seen more.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import polars as pl

from invariants.fates import OTHER_BODY_STATUS, Resolution
from invariants.history import FINAL_RETRY, HUNG_UP
from invariants.run import Run
from reference.commands import TOPIC_OF, EventType
from reference.routing import SHARDS

BIG_BACKLOG: Final = 10_000
"""Events not yet published, or not yet consumed, that count as a big backlog."""

CONSUMED: Final = {
    "matcher": (TOPIC_OF[EventType.BET_CREATED],),
    "projector": (TOPIC_OF[EventType.BET_CREATED], TOPIC_OF[EventType.ENTRY_POSTED]),
}
"""What the consumers read that say how many events came again; by the name of their processes without its number."""

_KEY: Final = ["family", "user", "key"]


def count(run: Run) -> dict[str, int]:
    """Return how often each *sometimes* of `COUNTERS` happened. Raises MissingEvidence without a snapshot."""
    if run.shown is not None:
        return run.shown
    return {name: counter(run) for name, counter in COUNTERS.items()}


def _first_resolved(run: Run, resolutions: tuple[Resolution, ...]) -> int:
    values = [resolution.value for resolution in resolutions]
    return run.first_resolution.filter(pl.col("resolution").is_in(values)).height


def _info_applied(run: Run) -> int:
    """Count keys nobody had an answer for whose effect the first snapshot holds."""
    return _first_resolved(run, (Resolution.APPLIED,))


def _info_not_applied(run: Run) -> int:
    """Count keys nobody had an answer for of which the first snapshot holds no effect."""
    return _first_resolved(run, (Resolution.NOT_APPLIED, Resolution.REFUSED))


def _retry_replayed(run: Run) -> int:
    """Count answers that said they are a replay."""
    return run.attempts.filter(pl.col("replayed").fill_null(False)).height


def _raced(run: Run) -> int:
    """Count keys two of whose attempts were under way at once on two API processes."""
    commands = run.attempts.filter(pl.col("family").is_in(["ledger", "cancel"]))
    several = commands.filter(pl.struct(_KEY).is_duplicated()).sort(*_KEY, "t_invoke")
    same = pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in _KEY)
    overlapping = several.filter(
        same & (pl.col("t_return").shift(1) > pl.col("t_invoke")) & (pl.col("api") != pl.col("api").shift(1))
    )
    return overlapping.select(_KEY).unique().height


def _other_body_refused(run: Run) -> int:
    """Count attempts refused because their key belongs to another body."""
    return run.attempts.filter(pl.col("status") == OTHER_BODY_STATUS).height


def _lost_answers(run: Run) -> pl.DataFrame:
    """Return the unanswered attempts of ledger keys that were applied by one of them.

    A key counts when it has an entry and no attempt was answered as the original: then the commit belongs to
    an unanswered one.
    """
    cached = run.scratch.get("lost_answers")
    if cached is not None:
        return cached
    own = run.attempts.filter((pl.col("family") == "ledger") & pl.col("tag").ne_missing(FINAL_RETRY))
    # Unanswered attempts are few: everything else is first cut down to their keys.
    names = ["user", "key"]
    unanswered = own.filter(pl.col("cls") == "info")
    originals = own.filter((pl.col("cls") == "ok") & ~pl.col("replayed").fill_null(False)).select(names)
    as_names = (pl.col("user_id").alias("user"), pl.col("idempotent_key").alias("key"))
    entries = run.client_entries.select(as_names).join(unanswered, on=names, how="semi")
    if run.second is not None:
        # What a final retry applied was not applied by the lost attempt.
        held = run.first.table("ledger").select(as_names)
        entries = entries.join(held, on=names, how="semi")
    lost = unanswered.join(originals, on=names, how="anti").join(entries, on=names, how="semi")
    run.scratch["lost_answers"] = lost
    return lost


def _commit_answer_lost(run: Run) -> int:
    """Count keys that were committed although every attempt that could have done it got no answer."""
    return _lost_answers(run).select("user", "key").unique().height


def _killed_between(run: Run) -> int:
    """Count those keys that were under way when their own server was killed, and whose client did not hang up.

    The kill happened somewhere between its request and the moment it was seen from outside.
    """
    kills = run.requested_faults.filter((pl.col("fault") == "kill") & pl.col("start").is_not_null())
    lost = _lost_answers(run).filter(pl.col("tag").ne_missing(HUNG_UP))
    total = 0
    for node, requested, start in kills.select("node", "requested", "start").iter_rows():
        shards = [shard for shard, server in run.server_of_shard.items() if server == node]
        hit = lost.filter(
            (pl.col("user") % SHARDS).is_in(shards) & (pl.col("t_invoke") <= start) & (pl.col("t_return") >= requested)
        )
        total += hit.select("user", "key").unique().height
    return total


REPEATED: Final = "records sent again"
"""Where a large run keeps what its slices found: topic and timestamp of the records that repeat an event."""


def repeated_records(run: Run) -> pl.DataFrame:
    """Return topic and timestamp of the Kafka records that repeat an earlier event id; those of slices add."""
    return _raw_duplicates(run).select("topic", "timestamp")


def _raw_duplicates(run: Run) -> pl.DataFrame:
    return run.events.filter(~pl.col("event_id").is_first_distinct())


def raw_duplicates(run: Run) -> int:
    """Return how many Kafka records repeat an earlier event id: expected of at-least-once delivery."""
    return _raw_duplicates(run).height


def _relay_died_between(run: Run) -> int:
    """Count records sent again, in a run in which a relay died."""
    died = run.timeline.filter(
        pl.col("kind").is_in(["process_death", "fault_start"]) & pl.col("node").str.starts_with("relay")
    )
    return raw_duplicates(run) if died.height else 0


def _projection_dropped(run: Run) -> int:
    """Count wallet events that are in Kafka twice and whose projection, at or past them, is right."""
    repeated = _raw_duplicates(run).filter(pl.col("user_id").is_not_null() & pl.col("seq").is_not_null())
    entries = run.entries.join(repeated, on="user_id", how="semi")
    entries = entries.select("user_id", "seq", pl.col("balance_snapshot").alias("balance"))
    right = run.table("projection").join(entries, on=["user_id", "seq", "balance"], how="semi")
    rows = repeated.select("user_id", "seq").join(
        right.select("user_id", pl.col("seq").alias("stands_at")), on="user_id", how="inner"
    )
    return rows.filter(pl.col("stands_at") >= pl.col("seq")).height


def _stale_flagged(run: Run) -> int:
    """Count reads whose answer said that it is stale."""
    return run.attempts.filter(pl.col("stale").fill_null(False)).height


def _refused_under_contention(run: Run) -> int:
    """Count refusals for lack of funds while another command of the same wallet was under way."""
    commands = run.attempts.filter(pl.col("family") == "ledger")
    refused = commands.filter(pl.col("outcome") == "INSUFFICIENT_FUNDS")
    commands = commands.join(refused, on="user", how="semi").sort("user", "t_invoke")
    same_before = pl.col("user") == pl.col("user").shift(1)
    same_after = pl.col("user") == pl.col("user").shift(-1)
    busy = (same_before & (pl.col("t_return").shift(1) > pl.col("t_invoke"))) | (
        same_after & (pl.col("t_invoke").shift(-1) < pl.col("t_return"))
    )
    return commands.filter(busy.fill_null(False) & (pl.col("outcome") == "INSUFFICIENT_FUNDS")).height


def _settle_raced_void(run: Run) -> int:
    """Count matches of which a settle and a void were under way at once."""
    times = {
        op: run.attempts.filter(pl.col("op") == op).select(
            "match_id", pl.col("t_invoke").alias(f"{op}_from"), pl.col("t_return").alias(f"{op}_to")
        )
        for op in ("settle_match", "void_match")
    }
    pairs = times["settle_match"].join(times["void_match"], on="match_id")
    both = pairs.filter(
        (pl.col("settle_match_from") < pl.col("void_match_to"))
        & (pl.col("void_match_from") < pl.col("settle_match_to"))
    )
    return both["match_id"].n_unique()


def _corrected(run: Run) -> int:
    """Count settlements that corrected an earlier one of their match."""
    return run.table("settlements").filter(pl.col("settlement_version") > 1).height


def _advanced(run: Run) -> int:
    """Count corrections that took back more than the wallet still had, so that the house advanced the rest."""
    return run.system_entries.filter((pl.col("type") == "CREDIT") & (pl.col("contra") == "HOUSE")).height


def _late_bets(run: Run) -> int:
    """Count bets that were accepted and reached the matcher after their match had closed."""
    return run.table("orders").filter(pl.col("cancel_reason") == "LATE").height


def _backlog_drained(run: Run) -> int:
    """Count backlogs (per kind and node) that passed `BIG_BACKLOG` and were empty at the end."""
    backlogs = run.series.filter(pl.col("name").is_in(["outbox_unpublished", "kafka_consumer_lag"]))
    peaks = (
        backlogs.sort("t")
        .group_by("name", "node")
        .agg(pl.col("value").max().alias("peak"), pl.col("value").last().alias("last"))
    )
    return peaks.filter((pl.col("peak") > BIG_BACKLOG) & (pl.col("last") == 0)).height


def _shard_moved(run: Run) -> int:
    """Count shards that were moved to another server, one or more times, since the installation."""
    return run.table("routes").filter(pl.col("here") & (pl.col("epoch") > 0)).height


def _faults_overlapped(run: Run) -> int:
    """Count faults that were measured to begin before an earlier one had ended."""
    rows = run.requested_faults.drop_nulls(["start", "end"]).sort("start")
    earlier = pl.col("end").cum_max().shift(1)
    return rows.filter(pl.col("start") < earlier).height


def _failover(run: Run) -> int:
    """Count members that became primary of a server after another one was, by the timeline (kind `primary`).

    Only runs with a standby have such rows.
    """
    rows = run.timeline.filter(pl.col("kind") == "primary").with_columns(
        pl.col("detail").str.json_decode(pl.Struct({"member": pl.String(), "term": pl.Int64()})).alias("member_of")
    )
    rows = rows.unnest("member_of").sort("node", "term", "t")
    other = (pl.col("node") == pl.col("node").shift(1)) & (pl.col("member") != pl.col("member").shift(1))
    return rows.filter(other).height


def _fill_lost(run: Run) -> int:
    """Count balances that a read wanted to put into the cache and that lost to newer ones there."""
    samples = run.series.filter(
        (pl.col("name") == "cache_fills_lost_total") & pl.col("node").str.starts_with("api")
    ).sort("node", "t")
    same = pl.col("node") == pl.col("node").shift(1)
    step = pl.col("value") - pl.when(same).then(pl.col("value").shift(1)).otherwise(0)
    # A counter that falls belongs to a process that was started again.
    grown = samples.select(pl.when(step >= 0).then(step).otherwise(pl.col("value")).sum()).item()
    return int(grown or 0)


def _came_again(run: Run) -> int:
    """Count events that a consumer got again, as it says itself, after it was started again or rebalanced.

    Records that are in Kafka twice come again without a rebalance: as many as were sent since then to a topic that this
    consumer reads do not count.
    """
    samples = run.series.filter(pl.col("name").is_in(["events_repeated_total", "kafka_assignments_total"]))
    killed = (pl.col("kind") == "fault_start") & (pl.col("fault") == "kill")
    died = run.timeline.filter((pl.col("kind") == "process_death") | killed).group_by("node")
    rows = samples.join(died.agg(pl.col("t").max().alias("died")), on="node", how="left")
    # What a process that was started again has counted, it has counted since.
    rows = rows.filter(pl.col("died").is_null() | (pl.col("t") > pl.col("died")))
    again = pl.col("name") == "events_repeated_total"
    assigned = rows.filter(~again & (pl.col("value") >= 2)).group_by("node").agg(pl.col("t").min().alias("rebalanced"))
    counted = rows.filter(again).join(assigned, on="node", how="left").sort("node", "t")
    before = pl.col("value").filter(pl.col("t") < pl.col("rebalanced")).last().fill_null(0)
    totals = counted.group_by("node").agg(
        pl.col("value").last().alias("all"),
        (pl.col("value").last() - before).alias("since"),
        pl.col("died").first(),
        pl.col("rebalanced").first(),
    )
    began = totals.with_columns(
        pl.when(pl.col("died").is_not_null()).then(pl.col("all")).otherwise(pl.col("since")).alias("came"),
        pl.coalesce("died", "rebalanced").alias("began"),
    ).drop_nulls("began")
    total = 0
    for node, came, began_s in began.select("node", "came", "began").iter_rows():
        total += max(0, int(came) - _sent_twice_since(run, str(node), float(began_s)))
    return total


def _sent_twice_since(run: Run, node: str, began_s: float) -> int:
    """Count the records that repeat an event on the topics of a consumer's process, sent since a moment (seconds)."""
    topics = CONSUMED.get(node.rstrip("0123456789"), tuple(TOPIC_OF.values()))
    known = run.scratch.get(REPEATED)
    repeated = (repeated_records(run) if known is None else known).filter(pl.col("topic").is_in(topics))
    if run.config.origin_unix is None:
        return repeated.height
    since = run.config.origin_unix + began_s - run.clock_slack_s
    return repeated.filter((pl.col("timestamp") >= since).fill_null(True)).height


COUNTERS: Final[dict[str, Callable[[Run], int]]] = {
    "an info resolved as applied": _info_applied,
    "an info resolved as not applied": _info_not_applied,
    "a retry replayed": _retry_replayed,
    "same key raced on two API processes": _raced,
    "same key with another body refused": _other_body_refused,
    "commit succeeded and the answer was lost": _commit_answer_lost,
    "server killed between commit and answer": _killed_between,
    "failover promoted the standby": _failover,
    "relay died between send and mark": _relay_died_between,
    "a consumer got an event again after a rebalance": _came_again,
    "projection dropped a duplicate": _projection_dropped,
    "a stale read was flagged": _stale_flagged,
    "a cache fill lost to a newer one": _fill_lost,
    "funds refused under contention": _refused_under_contention,
    "settle and void raced": _settle_raced_void,
    "a settled match was settled again": _corrected,
    "a wallet had spent what a correction took back": _advanced,
    "a bet arrived while its match closed": _late_bets,
    "backlog over 10000 then drained": _backlog_drained,
    "two faults overlapped": _faults_overlapped,
    "a shard was moved to another server": _shard_moved,
}
"""Name of each *sometimes* → the function that counts it."""

OF_THE_RUN: Final = frozenset(
    {
        "failover promoted the standby",
        "a consumer got an event again after a rebalance",
        "a cache fill lost to a newer one",
        "a settled match was settled again",
        "backlog over 10000 then drained",
        "two faults overlapped",
        "a shard was moved to another server",
    }
)
"""Counted once for the whole run; the others are sums over its wallets."""
OF_MATCHES: Final = frozenset({"a bet arrived while its match closed"})
"""Sums over the matches of the run."""


def never(counts: Iterable[Mapping[str, int]], required: Iterable[str] = tuple(COUNTERS)) -> list[str]:
    """Return what of `required` none of a campaign's runs showed; `counts` are those of each run."""
    shown = {name for run in counts for name, times in run.items() if times}
    return [name for name in required if name not in shown]
