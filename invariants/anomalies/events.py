"""A11, A21–A26: the way of an entry through outbox, Kafka, matcher, projection and cache."""

from typing import Any, Final

import msgspec
import polars as pl

from invariants.anomalies.common import NOTHING, Found, as_keys, found
from invariants.run import Run
from reference.commands import BALANCE_TOPIC, TOPIC_OF, EventType

WALLET_EVENTS: Final = (EventType.BET_CREATED.value, EventType.ENTRY_POSTED.value)
"""Events of which every entry has exactly one."""

_PAYLOAD: Final[dict[str, pl.DataType]] = {
    name: pl.Int64()
    for name in (
        "user_id",
        "seq",
        "amount",
        "balance",
        "odds",
        "stake",
        "reserve",
        "settlement_version",
        "fill_no",
        "liability",
        "winnings",
        "back_user",
        "lay_user",
        "refund",
        "cancelled_stake",
    )
} | {
    name: pl.String()
    for name in (
        "bet_id",
        "match_id",
        "outcome",
        "side",
        "type",
        "contra",
        "back_bet_id",
        "lay_bet_id",
        "reason",
        "kind",
        "result",
    )
}
"""Every field of every event payload; an event has those of its type."""


def a11_projection(run: Run) -> Found:
    """A11 projection: the read model, the cache or the stream of balance updates contradicts the ledger.

    A projection row must exist for every wallet with entries. Its balance, and that of a cached value, must
    be the ledger's at the very seq it names; a seq the ledger does not have is ahead of it. A missing cache
    value is no fault, and a projection that is merely behind after the drain is A26. The wallet in which the run itself
    planted a drift is left out: that one is A35's and V03's.
    """
    planted = run.drifts.select(pl.col("user").alias("user_id")).drop_nulls()
    entries = run.entries.select("user_id", "seq", "balance_snapshot").unique(["user_id", "seq"], keep="first")
    total = NOTHING
    sources = {
        "projection": run.table("projection"),
        "redis": run.table("redis"),
        BALANCE_TOPIC: run.balance_updates.select("user_id", "balance", "seq"),
    }
    for name, told in sources.items():
        own = told.join(planted, on="user_id", how="anti")
        rows = own.join(entries, on=["user_id", "seq"], how="left").rename({"user_id": "user"})
        empty = (pl.col("seq") == 0) & (pl.col("balance") == 0)
        wrong = rows.filter(pl.col("balance").ne_missing(pl.col("balance_snapshot")) & ~empty)
        total += found(
            "A11",
            wrong.sort("user"),
            lambda row, source=name: (  # type: ignore[misc]
                f"{source} says user {row['user']} has {row['balance']} at seq {row['seq']}; the ledger "
                + ("has no such seq" if row["balance_snapshot"] is None else f"says {row['balance_snapshot']}")
            ),
        )
    absent = (
        run.entries.group_by("user_id")
        .agg(pl.col("seq").max())
        .join(run.table("projection"), on="user_id", how="anti")
        .rename({"user_id": "user"})
    )
    return total + found(
        "A11",
        absent.sort("user"),
        lambda row: f"user {row['user']} has {row['seq']} entries and no projection row",
    )


def a21_event_lost(run: Run) -> Found:
    """A21 event lost: an entry without an outbox row, or an outbox row without a Kafka record, after the drain."""
    outbox = run.table("outbox")
    wallet = outbox.filter(pl.col("event_type").is_in(WALLET_EVENTS)).select("user_id", "seq").unique()
    silent = as_keys(run.entries.join(wallet, on=["user_id", "seq"], how="anti"))
    first = found(
        "A21",
        silent,
        lambda row: f"entry seq {row['seq']} of user {row['user']} (key {row['key']}) has no event in the outbox",
    )
    letters = run.table("kafka").select("event_id").unique()
    unsent = outbox.join(letters, on="event_id", how="anti").rename({"user_id": "user"})
    return first + found(
        "A21",
        unsent.sort("server", "id"),
        lambda row: (
            f"event {row['event_id']} ({row['event_type']}, {row['server']} outbox id {row['id']}, marked"
            f" {'published' if row['published_to_kafka'] else 'unpublished'}) is not in Kafka"
        ),
    )


def a22_effect_repeated(run: Run) -> Found:
    """A22 effect repeated: one event had its effect twice in a consumer.

    matcher: two orders for one bet or of one event; two fills of one pair of bets (an order trades with each
    resting order once) or with one number. settler: two refunds for one cancelled order. Raw duplicate records
    in Kafka are expected of at-least-once delivery and are only counted (`Judgement.raw_duplicates`).
    """
    orders = run.table("orders")
    total = NOTHING
    for name in ("event_id", "bet_id"):
        # Grouping costs most, so only what is there twice is grouped. Orders of one bet by one event are named by their
        # event.
        repeated = (
            orders.filter(pl.col(name).is_duplicated())
            .group_by(name)
            .agg(
                pl.len().alias("times"),
                pl.col("event_id").n_unique().alias("events"),
                pl.col("user_id").first().alias("user"),
                pl.col("bet_id").first().alias("bet"),
            )
        )
        wrong = repeated.filter((pl.col("times") > 1) & ((pl.col("events") > 1) | pl.lit(name == "event_id")))
        total += found(
            "A22",
            wrong.drop("events").sort(name),
            lambda row, by=name: f"{row['times']} orders have {by} {row[by]} (bet {row['bet']})",  # type: ignore[misc]
        )
    fills = run.table("fills")
    same = (pl.col("back_bet_id").hash(1) ^ pl.col("lay_bet_id").hash(2)).is_duplicated()
    pairs = (
        fills.filter(same)
        .group_by("back_bet_id", "lay_bet_id")
        .agg(pl.len().alias("times"), pl.col("match_id").first(), pl.col("back_user").first().alias("user"))
    )
    total += found(
        "A22",
        pairs.filter(pl.col("times") > 1).sort("back_bet_id"),
        lambda row: (
            f"bets {row['back_bet_id']} and {row['lay_bet_id']} of match {row['match_id']} were filled against"
            f" each other {row['times']} times"
        ),
    )
    numbered = fills.group_by("match_id", "fill_no").agg(pl.len().alias("times"))
    total += found(
        "A22",
        numbered.filter(pl.col("times") > 1).sort("match_id", "fill_no"),
        lambda row: f"{row['times']} fills of match {row['match_id']} have the number {row['fill_no']}",
    )
    refunds = as_keys(run.system_entries).filter((pl.col("type") == "REFUND") & (pl.col("settlement_version") == 0))
    repeated = refunds.group_by("bet_id").agg(
        pl.len().alias("times"), pl.col("user").first(), pl.col("seq").max(), pl.col("key").last()
    )
    return total + found(
        "A22",
        repeated.filter(pl.col("times") > 1).sort("bet_id"),
        lambda row: f"the cancel of bet {row['bet_id']} was refunded {row['times']} times",
    )


def a23_event_order(run: Run) -> Found:
    """A23 event order: the seqs of a wallet do not increase within a partition, or a key is in two partitions.

    Only the first record of each event counts: a relay that died before it marked a batch sends it again.
    """
    firsts = run.events.filter(pl.col("event_id").is_first_distinct())
    wallet = firsts.filter(pl.col("event_type").is_in(WALLET_EVENTS) & pl.col("seq").is_not_null())
    ordered = wallet.sort("topic", "partition", "user_id", "offset").with_columns(
        pl.when(
            (pl.col("topic") == pl.col("topic").shift(1))
            & (pl.col("partition") == pl.col("partition").shift(1))
            & (pl.col("user_id") == pl.col("user_id").shift(1))
        )
        .then(pl.col("seq").shift(1))
        .alias("earlier")
    )
    back = ordered.filter(pl.col("earlier") >= pl.col("seq")).rename({"user_id": "user"}).drop("key")
    first = found(
        "A23",
        back,
        lambda row: (
            f"{row['topic']}[{row['partition']}] has seq {row['seq']} of user {row['user']} at offset"
            f" {row['offset']}, after its seq {row['earlier']}"
        ),
    )
    split = firsts.group_by("topic", "key").agg(pl.col("partition").unique().sort().alias("partitions"))
    return first + found(
        "A23",
        split.filter(pl.col("partitions").list.len() > 1)
        .sort("topic", "key")
        .rename({"key": "record_key"})
        .with_columns(pl.col("record_key").cast(pl.Int64, strict=False).alias("user")),
        lambda row: f"{row['topic']} has key {row['record_key']} in partitions {row['partitions']}",
    )


def a24_phantom_event(run: Run) -> Found:
    """A24 phantom event: an event of something that was never committed, or earlier than its commit.

    A Kafka record whose event id is in no outbox; an outbox event of a wallet without an entry at its user and
    seq, or a second event for one entry; a fill, cancel or settlement event without its row. A record that Kafka holds
    from a moment before its outbox row was written.
    """
    return phantom_events(run) + too_early(run)


def phantom_events(run: Run) -> Found:
    """Find the events of something that was never committed (A24)."""
    outbox = run.table("outbox")
    strangers = run.events.join(outbox.select("event_id").unique(), on="event_id", how="anti")
    first = found(
        "A24",
        strangers.drop("key").rename({"user_id": "user"}),
        lambda row: (
            f"{row['topic']}[{row['partition']}] offset {row['offset']} holds event {row['event_id']}"
            f" ({row['event_type']}), which no outbox holds"
        ),
    )
    wallet = outbox.filter(pl.col("event_type").is_in(WALLET_EVENTS))
    unfounded = wallet.join(run.entries.select("user_id", "seq").unique(), on=["user_id", "seq"], how="anti")
    second = found(
        "A24",
        unfounded.sort("server", "id").rename({"user_id": "user"}),
        lambda row: (
            f"event {row['event_id']} ({row['event_type']}) tells of seq {row['seq']} of user {row['user']},"
            " which the ledger does not have"
        ),
    )
    twice = wallet.group_by(pl.col("user_id").alias("user"), "seq").agg(pl.len().alias("times"))
    third = found(
        "A24",
        twice.filter((pl.col("times") > 1) & pl.col("seq").is_not_null()).sort("user", "seq"),
        lambda row: f"seq {row['seq']} of user {row['user']} has {row['times']} events in the outbox",
    )
    return first + second + third + _unfounded_book_events(run)


def too_early(run: Run) -> Found:
    """Find the records that Kafka holds from a moment before their outbox row was written (A24)."""
    written = run.table("outbox").select("event_id", "created_at").drop_nulls()
    rows = run.events.drop_nulls("timestamp").join(written, on="event_id", how="inner")
    return found(
        "A24",
        rows.filter(pl.col("timestamp") < pl.col("created_at") - run.clock_slack_s)
        .drop("key")
        .rename({"user_id": "user"}),
        lambda row: (
            f"{row['topic']}[{row['partition']}] offset {row['offset']} holds event {row['event_id']} since"
            f" {row['created_at'] - row['timestamp']:.3f} s before its outbox row was written"
        ),
    )


def _unfounded_book_events(run: Run) -> Found:
    total = NOTHING
    fills = run.table("fills").select("match_id", "fill_no").unique()
    cancelled = run.table("orders").filter(pl.col("cancelled_stake") > 0).select("bet_id").unique()
    settled = run.table("settlements").select("match_id", "settlement_version").unique()
    for event_type, rows in (
        (EventType.BET_MATCHED, fills),
        (EventType.BET_CANCELLED, cancelled),
        (EventType.MATCH_SETTLED, settled),
    ):
        events = outbox_payloads(run).filter(pl.col("event_type") == event_type.value)
        total += found(
            "A24",
            events.join(rows, on=rows.columns, how="anti").sort("event_id").drop("seq"),
            lambda row: f"event {row['event_id']} ({row['event_type']}) tells of something that is not stored",
        )
    return total


def a25_event_differs(run: Run) -> Found:
    """A25 event differs: the payload of an event is not its row, or a Kafka record is not its outbox event.

    Compared by fields, not as text. A Kafka record must also be on the topic of its type under the outbox's
    partition key.
    """
    return _payload_is_not_the_row(run) + _record_is_not_the_event(run)


def _payload_is_not_the_row(run: Run) -> Found:
    entries = run.entries.select(
        "user_id",
        "seq",
        "type",
        "amount",
        "contra",
        "match_id",
        "bet_id",
        "settlement_version",
        pl.col("balance_snapshot").alias("balance"),
    )
    bets = run.table("bets").select("user_id", "bet_id", "match_id", "outcome", "side", "odds", "stake", "reserve")
    orders = run.table("orders").select(
        "bet_id",
        "match_id",
        "user_id",
        "cancelled_stake",
        pl.col("cancel_refund").alias("refund"),
        pl.col("cancel_reason").alias("reason"),
    )
    fills = run.table("fills").drop("server", "filled_at")
    settlements = run.table("settlements").select("match_id", "settlement_version", "kind", "result")
    comparisons: list[tuple[EventType, pl.DataFrame, list[str]]] = [
        (EventType.ENTRY_POSTED, entries, ["user_id", "seq"]),
        (EventType.BET_CREATED, entries.select("user_id", "seq", "amount", "balance", "bet_id"), ["user_id", "seq"]),
        (EventType.BET_CREATED, bets, ["user_id", "bet_id"]),
        (EventType.BET_MATCHED, fills, ["match_id", "fill_no"]),
        (EventType.BET_CANCELLED, orders, ["bet_id"]),
        (EventType.MATCH_SETTLED, settlements, ["match_id", "settlement_version"]),
    ]
    total = NOTHING
    for event_type, rows, names in comparisons:
        events = outbox_payloads(run).filter(pl.col("event_type") == event_type.value)
        pairs = events.join(rows.unique(names, keep="first"), on=names, how="inner", suffix="_row")
        fields = [name for name in rows.columns if name not in names]
        differ = [pl.col(name).ne_missing(pl.col(f"{name}_row")) for name in fields]
        wrong = pairs.filter(pl.any_horizontal(differ)).sort("event_id")
        total += found(
            "A25",
            wrong.with_columns(pl.col("user_id").alias("user")),
            lambda row, fields=fields: (  # type: ignore[misc]
                f"event {row['event_id']} ({row['event_type']}) differs from its row: " + _differences(row, fields)
            ),
        )
    return total


def _differences(row: Any, fields: list[str]) -> str:
    return ", ".join(
        f"{name} is {row[name]} and the row says {row[name + '_row']}"
        for name in fields
        if row[name] != row[name + "_row"]
    )


def _record_is_not_the_event(run: Run) -> Found:
    outbox = run.table("outbox").select("event_id", "event_type", "partition_key", pl.col("payload").alias("stored"))
    records = run.events.drop("event_type").join(outbox, on="event_id", how="inner")
    topics = pl.DataFrame({"event_type": [str(name) for name in TOPIC_OF], "right_topic": list(TOPIC_OF.values())})
    records = records.join(topics, on="event_type", how="left")
    misplaced = records.filter(
        pl.col("topic").ne_missing(pl.col("right_topic")) | pl.col("key").ne_missing(pl.col("partition_key"))
    )
    first = found(
        "A25",
        misplaced.drop("key").rename({"user_id": "user"}),
        lambda row: (
            f"event {row['event_id']} ({row['event_type']}, key {row['partition_key']}) is at"
            f" {row['topic']}[{row['partition']}] offset {row['offset']}, under another topic or key"
        ),
    )
    # Equal text needs no parsing, and most of it is equal or differs only by white space.
    unequal = records.filter(pl.col("payload").ne_missing(pl.col("stored")))
    if unequal.is_empty():
        return first
    sent, kept = decoded(unequal["payload"]), decoded(unequal["stored"])
    same = pl.Series([left == right for left, right in zip(sent.rows(), kept.rows(), strict=True)], dtype=pl.Boolean)
    return first + found(
        "A25",
        unequal.filter(~same).drop("key").rename({"user_id": "user"}),
        lambda row: (
            f"{row['topic']}[{row['partition']}] offset {row['offset']} says {row['payload']}; the outbox says"
            f" {row['stored']}"
        ),
    )


def a26_skipped(run: Run) -> Found:
    """A26 skipped: an event is in Kafka, the drain is over, and a consumer never applied it nor put it into the DLQ.

    projector: the projection of a wallet is behind the wallet's newest event. matcher: a BetCreated event
    without an order.
    """
    return projection_behind(run) + bets_without_order(run)


def _alive(run: Run) -> pl.DataFrame:
    """Return the records of wallets' events that are not in the DLQ."""
    wallet = run.events.filter(pl.col("event_type").is_in(WALLET_EVENTS))
    buried = run.dead_letters.select("event_id").drop_nulls().unique()
    return wallet.join(buried, on="event_id", how="anti")


def projection_behind(run: Run) -> Found:
    """Find the wallets whose projection never got their newest event (A26)."""
    newest = _alive(run).group_by("user_id").agg(pl.col("seq").max().alias("newest"))
    behind = (
        run.table("projection")
        .join(newest, on="user_id", how="inner")
        .filter(pl.col("seq") < pl.col("newest"))
        .rename({"user_id": "user"})
    )
    return found(
        "A26",
        behind.sort("user"),
        lambda row: (
            f"the projection of user {row['user']} stands at seq {row['seq']} after the drain; Kafka holds its"
            f" event of seq {row['newest']}"
        ),
    )


def bets_without_order(run: Run) -> Found:
    """Find the BetCreated events that never became an order (A26)."""
    created = outbox_payloads(run).filter(pl.col("event_type") == EventType.BET_CREATED.value)
    sent = created.join(_alive(run).select("event_id").unique(), on="event_id", how="semi")
    return found(
        "A26",
        sent.join(run.table("orders").select("bet_id").unique(), on="bet_id", how="anti")
        .with_columns(pl.col("user_id").alias("user"))
        .sort("event_id"),
        lambda row: (
            f"event {row['event_id']} of bet {row['bet_id']} (user {row['user']}, match {row['match_id']}) is in"
            " Kafka and never became an order"
        ),
    )


def outbox_payloads(run: Run) -> pl.DataFrame:
    """Return event_id, event_type and every payload field (null where the type has none) of the outbox."""
    cached = run.scratch.get("outbox_payloads")
    if cached is None:
        outbox = run.table("outbox")
        cached = outbox.select("event_id", "event_type").hstack(decoded(outbox["payload"]))
        run.scratch["outbox_payloads"] = cached
    return cached


def decoded(payloads: pl.Series) -> pl.DataFrame:
    """Return the fields of JSON payloads, one row each; text that is no such object gives nulls."""
    form = pl.Struct([pl.Field(name, kind) for name, kind in _PAYLOAD.items()])
    try:
        return payloads.str.json_decode(form).struct.unnest()
    except pl.exceptions.PolarsError:
        # One bad payload spoils the vectorised parse; then each is parsed alone and the bad ones stay null.
        return pl.DataFrame([_parsed(text) for text in payloads.to_list()], schema=_PAYLOAD, strict=False)


def _parsed(text: str | None) -> dict[str, object]:
    try:
        value = msgspec.json.decode(text or "")
    except msgspec.DecodeError:
        value = None
    fields = value if isinstance(value, dict) else {}
    return {name: fields.get(name) if _fits(fields.get(name), kind) else None for name, kind in _PAYLOAD.items()}


def _fits(value: object, kind: pl.DataType) -> bool:
    """Whether a payload's field has the type it must have; one that has not is as good as absent, and differs."""
    if kind == pl.String():
        return isinstance(value, str)
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
