"""A08: refusals for a reason that at no moment they may have been decided at was true."""

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from invariants.anomalies.common import NOTHING, Found, acknowledged, found, seconds
from invariants.anomalies.settlement import reserve_rule
from invariants.fates import REFUSED_STATUS
from invariants.run import Run

Numbers = NDArray[np.int64]

REASONS: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("bet", "MATCH_CLOSED"): ("CLOSED", "SETTLING", "SETTLED", "VOID"),
    ("cancel", "MATCH_CLOSED"): ("CLOSED", "SETTLING", "SETTLED", "VOID"),
    ("close_match", "ILLEGAL_TRANSITION"): ("VOID",),
    ("settle_match", "ILLEGAL_TRANSITION"): ("OPEN", "VOID"),
    ("void_match", "ILLEGAL_TRANSITION"): ("SETTLING", "SETTLED"),
} | {
    (op, "UNKNOWN_MATCH"): ("ABSENT",)
    for op in ("bet", "cancel", "close_match", "settle_match", "void_match", "resettle_match")
}
"""(operation, reason of its refusal) → the states of its match in which the reason is true; ABSENT is the match before
it was created. To ask for a state that
the match has reached already is a replay and not refused."""

COMMANDS: Final = "commands on matches"
"""Where a slice of a large run keeps the attempts of all match commands (`history.attempts`): no wallet owns them."""

ENTERED_BY: Final = {
    "create_match": ("OPEN",),
    "close_match": ("CLOSED",),
    "settle_match": ("SETTLING",),
    "void_match": ("VOID",),
    "resettle_match": ("SETTLING",),
}
"""Match command → the state it leads to."""


def a08_wrong_refusal(run: Run) -> Found:
    """A08 wrong refusal: at every position in the window of a refusal the rules would have answered otherwise.

    The window of a stored refusal begins when its key was first sent and ends when the refusal was first answered;
    of a refused match command that is not stored it is the attempt's own. The positions it may have been decided at
    follow from real time: after all that had been acknowledged (or read) before the window, before all that was first
    sent after it. A refusal is wrong when its reason is true at none of them:

    - INSUFFICIENT_FUNDS: after every seq of the wallet in that interval the balance covers the amount, or what a bet
      reserves. A deposit never lacks funds.
    - MATCH_CLOSED, UNKNOWN_MATCH, ILLEGAL_TRANSITION: by the transitions of the match in that interval (`REASONS`).
      A bet is also late once its match's closing time has come. Of resettles only UNKNOWN_MATCH is judged, for the
      others depend on a version that attempts do not name.
    - UNKNOWN_OUTCOME: the match has the outcome. LIMIT_EXCEEDED: the bet reserves no more than the limit.
    - ROLLED_BACK: nobody had sent a rollback of the key.
    - NOTHING_TO_CANCEL: a cancel of the bet that was sent later was accepted and cancelled a part of it.

    A refused key that was applied all the same is A04's or A05's.
    """
    windows = _windows(run)
    if windows.is_empty():
        return NOTHING
    return (
        _funds(run, windows)
        + _states(run, windows)
        + _unknown_outcomes(run, windows)
        + _limits(run, windows)
        + _rollbacks(run, windows)
        + _cancels(run, windows)
    )


def _windows(run: Run) -> pl.DataFrame:
    """Return each refusal once, with `begin` and `until` (seconds) of the window it was decided in."""
    names = ["family", "user", "key"]
    refused = run.attempts.filter((pl.col("cls") == "fail") & (pl.col("status") == REFUSED_STATUS).fill_null(False))
    stored = (
        refused.filter(pl.col("refused"))
        .sort("t_return")
        .unique([*names, "outcome"], keep="first", maintain_order=True)
        .join(run.fates.select(*names, "begin_s"), on=names, how="inner", nulls_equal=True)
        .with_columns(pl.col("begin_s").alias("begin"))
        .drop("begin_s")
    )
    applied = run.client_entries.select(
        pl.lit("ledger").alias("family"), pl.col("user_id").alias("user"), pl.col("idempotent_key").alias("key")
    )
    stored = stored.join(applied.unique(), on=names, how="anti", nulls_equal=True)
    others = refused.filter(pl.col("family") == "match").with_columns(pl.col("t_invoke").alias("begin"))
    return pl.concat([stored, others.select(stored.columns)]).with_columns(pl.col("t_return").alias("until"))


def _cost() -> pl.Expr:
    """Return what a command takes from its wallet, minor units; below zero for a deposit."""
    op = pl.col("op")
    return (
        pl.when(op == "bet")
        .then(reserve_rule(pl.col("side"), pl.col("odds").cast(pl.Int64), pl.col("amount")))
        .when(op == "deposit")
        .then(-pl.col("amount"))
        .otherwise(pl.col("amount"))
    )


def _funds(run: Run, windows: pl.DataFrame) -> Found:
    refused = windows.filter((pl.col("outcome") == "INSUFFICIENT_FUNDS") & (pl.col("family") == "ledger"))
    refused = refused.with_columns(_cost().alias("cost")).drop("seq", "balance").drop_nulls("cost")
    if refused.is_empty():
        return NOTHING
    wallets = run.entries.join(refused.select(pl.col("user").alias("user_id")).unique(), on="user_id", how="semi")
    wallets = wallets.select(pl.col("user_id").alias("user"), "seq", "replayed_balance", "idempotent_key")
    placed = _placed(run, refused, wallets)
    # The balances of a wallet in the order of its entries, each wallet led by the empty one.
    starts = wallets.select("user").unique().with_columns(seq=0, replayed_balance=0)
    absent = refused.select("user").unique().join(starts, on="user", how="anti").with_columns(seq=0, replayed_balance=0)
    order = ["user", "seq", "replayed_balance"]
    whole = [pl.col("seq", "replayed_balance").cast(pl.Int64)]
    line = pl.concat([frame.with_columns(whole).select(order) for frame in (starts, absent, wallets)])
    line = line.sort("user", "seq").with_row_index("row")
    rows = line.group_by("user").agg(pl.col("row").min().alias("first"), pl.len().alias("length"))
    seqs = line.select("user", "seq", pl.col("row").cast(pl.Int64)).unique(["user", "seq"], keep="last")
    judged = placed.join(rows, on="user")
    for name in ("low", "high"):
        judged = judged.join(
            seqs.rename({"seq": name, "row": f"{name}_row"}), on=["user", name], how="left", maintain_order="left"
        )
    last = pl.col("first").cast(pl.Int64) + pl.col("length").cast(pl.Int64) - 1
    judged = judged.with_columns(
        pl.col("low_row").fill_null(pl.col("first").cast(pl.Int64)), pl.col("high_row").fill_null(last)
    ).filter(pl.col("high_row") >= pl.col("low_row"))
    least = least_between(
        line["replayed_balance"].to_numpy(), judged["low_row"].to_numpy(), judged["high_row"].to_numpy()
    )
    wrong = judged.with_columns(pl.Series("least", least, dtype=pl.Int64)).filter(pl.col("least") >= pl.col("cost"))
    return found(
        "A08",
        wrong.with_columns(pl.col("low").alias("seq")).sort("until"),
        lambda row: (
            f"{row['op']} of {row['cost']} (key {row['key']}, user {row['user']}) was refused for lack of funds between"
            f" {seconds(row['begin'])} and {seconds(row['until'])}, that is after seq {row['low']} and at the latest"
            f" after seq {row['high']}; at all these moments the wallet held at least {row['least']}"
        ),
    )


def _placed(run: Run, refused: pl.DataFrame, wallets: pl.DataFrame) -> pl.DataFrame:
    """Add `low` and `high`: after which seq at least, and after which at most, each refusal was decided."""
    users = refused.select("user").unique()
    reads = run.attempts.filter((pl.col("family") == "read") & (pl.col("cls") == "ok") & pl.col("seq").is_not_null())
    known = pl.concat(
        [
            acknowledged(run).select("user", "seq", pl.col("ack_s").alias("at")),
            reads.select("user", "seq", at="t_return"),
        ]
    ).join(users, on="user", how="semi")
    known = known.sort("at").with_columns(pl.col("seq").cum_max().over("user").alias("low")).select("user", "at", "low")
    sent = run.fates.filter(pl.col("family") == "ledger").select("user", "key", "begin_s")
    later = wallets.rename({"idempotent_key": "key"}).join(sent, on=["user", "key"], how="inner")
    later = later.sort("begin_s", descending=True).with_columns(
        (pl.col("seq").cum_min().over("user") - 1).alias("high")
    )
    later = later.select("user", pl.col("begin_s").alias("at"), "high").sort("at")
    heads = wallets.group_by("user").agg(pl.col("seq").max().alias("head"))
    placed = refused.sort("begin").join_asof(
        known,
        left_on="begin",
        right_on="at",
        by="user",
        strategy="backward",
        allow_exact_matches=False,
        check_sortedness=False,
    )
    placed = placed.sort("until").join_asof(
        later,
        left_on="until",
        right_on="at",
        by="user",
        strategy="forward",
        allow_exact_matches=False,
        check_sortedness=False,
    )
    return placed.join(heads, on="user", how="left").with_columns(
        pl.col("low").fill_null(0), pl.coalesce("high", "head", pl.lit(0)).alias("high")
    )


def least_between(values: Numbers, low: Numbers, high: Numbers) -> Numbers:
    """Return the least of values[low[i]] … values[high[i]] for each i; all three hold integers, low ≤ high.

    Two overlapping stretches of a power of two cover each range; the minima of all stretches of one such length
    follow from those of half of it, so that only one array is kept. O(n log n).
    """
    answers = np.empty(len(low), dtype=np.int64)
    lengths = high - low + 1
    levels = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    least = values.astype(np.int64)
    for level in range(int(levels.max(initial=0)) + 1):
        mine = levels == level
        answers[mine] = np.minimum(least[low[mine]], least[high[mine] - (1 << level) + 1])
        if len(least) <= 1 << level:
            break
        least = np.minimum(least[: -(1 << level)], least[1 << level :])
    return answers


def _states(run: Run, windows: pl.DataFrame) -> Found:
    claims = pl.DataFrame(
        [(op, outcome, list(states)) for (op, outcome), states in REASONS.items()],
        schema={"op": pl.String, "outcome": pl.String, "true_in": pl.List(pl.String)},
        orient="row",
    )
    claimed = windows.drop("seq").join(claims, on=["op", "outcome"], how="inner").drop_nulls("match_id")
    closes = run.table("matches").select("match_id", "closes_at").unique("match_id")
    claimed = claimed.join(closes, on="match_id", how="left", maintain_order="left")
    if run.config.origin_unix is None:
        # Whether the closing time had come cannot be said without the wall clock.
        claimed = claimed.filter(pl.col("outcome") != "MATCH_CLOSED")
        due = pl.lit(False)
    else:
        closed_s = pl.col("closes_at") - run.config.origin_unix
        due = (pl.col("outcome") == "MATCH_CLOSED") & (closed_s <= pl.col("until") + run.clock_slack_s).fill_null(False)
    if claimed.is_empty():
        return NOTHING
    steps = _steps(run)
    claimed = claimed.filter(~due).with_row_index("claim")
    pairs = claimed.select("claim", "match_id", "begin", "until", "true_in").join(steps, on="match_id", how="left")
    # A step that was done before the window comes before it, one first asked for after it comes later.
    at = pl.col("step")
    bounds = pairs.group_by("claim").agg(
        at.filter(pl.col("done") < pl.col("begin")).max().fill_null(0).alias("low"),
        at.filter(pl.col("asked") > pl.col("until")).min().alias("next"),
    )
    pairs = pairs.join(bounds, on="claim").filter(
        (at >= pl.col("low")) & (pl.col("next").is_null() | (at < pl.col("next"))) | at.is_null()
    )
    # A match without any row was never created, at any moment.
    state = pl.col("state").fill_null("ABSENT")
    held = pairs.group_by("claim").agg(
        state.is_in(pl.col("true_in")).any().alias("true"), state.unique().sort().alias("states")
    )
    wrong = claimed.join(held, on="claim").filter(~pl.col("true"))
    return found(
        "A08",
        wrong.sort("until"),
        lambda row: (
            f"{row['op']} of match {row['match_id']} (key {row['key']}) was refused as {row['outcome']} between"
            f" {seconds(row['begin'])} and {seconds(row['until'])}, when the match was {' or '.join(row['states'])}"
        ),
    )


def _steps(run: Run) -> pl.DataFrame:
    """Return the states of each match in order: match_id, step, state, `asked` and `done` in seconds.

    `asked` is when a command that leads to the state was first sent (−inf if none was: the service did it by itself),
    `done` when one was first answered with success (+inf if none). Step 0 is the match before it was created.
    """
    ops = [(op, state) for op, states in ENTERED_BY.items() for state in states]
    led = pl.DataFrame(ops, schema={"op": pl.String, "state": pl.String}, orient="row")
    commands = (
        run.scratch.get(COMMANDS, run.attempts)
        .join(led, on="op", how="inner")
        .with_columns(
            (pl.col("op") == "resettle_match").alias("again"), pl.col("selection").fill_null("VOID").alias("result")
        )
    )
    rows = run.table("transitions").select(
        "match_id",
        pl.col("transition_no").alias("step"),
        pl.col("to_state").alias("state"),
        (pl.col("settlement_version") > 1).alias("again"),
    )
    asked = commands.group_by("match_id", "state", "again").agg(
        pl.col("t_invoke").min().alias("asked"),
        pl.col("t_return").filter(pl.col("cls") == "ok").min().alias("done"),
    )
    known = rows.join(asked, on=["match_id", "state", "again"], how="left", maintain_order="left")
    # A second correction is asked for later than the first and done later: of several, only the first is placed.
    several = pl.col("again") & (pl.col("state") == "SETTLING")
    known = known.with_columns(
        pl.when(several).then(None).otherwise(pl.col("done")).fill_null(float("inf")).alias("done"),
        pl.col("asked").fill_null(float("-inf")),
    )
    before = (
        rows.select("match_id")
        .unique()
        .with_columns(step=pl.lit(0, dtype=pl.Int64), state=pl.lit("ABSENT"), asked=float("-inf"), done=float("-inf"))
    )
    columns = ["match_id", "step", "state", "asked", "done"]
    return pl.concat([before.select(columns), known.select(columns)])


def _unknown_outcomes(run: Run, windows: pl.DataFrame) -> Found:
    outcomes = (
        run.table("matches").select("match_id", pl.col("outcomes").str.split(",").alias("known")).unique("match_id")
    )
    claimed = windows.filter(pl.col("outcome") == "UNKNOWN_OUTCOME").drop("seq").join(outcomes, on="match_id")
    return found(
        "A08",
        claimed.filter(pl.col("known").list.contains(pl.col("selection")).fill_null(False)).sort("until"),
        lambda row: (
            f"{row['op']} on {row['selection']} of match {row['match_id']} (key {row['key']}) was refused as an unknown"
            f" outcome; the match has {', '.join(row['known'])}"
        ),
    )


def _limits(run: Run, windows: pl.DataFrame) -> Found:
    claimed = windows.filter(pl.col("outcome") == "LIMIT_EXCEEDED").drop("seq").with_columns(_cost().alias("cost"))
    limit = run.config.max_amount_minor
    return found(
        "A08",
        claimed.filter((pl.col("op") == "bet") & (pl.col("cost") <= limit)).sort("until"),
        lambda row: (
            f"bet of user {row['user']} (key {row['key']}) that reserves {row['cost']} was refused as beyond the limit"
            f" of {limit}"
        ),
    )


def _rollbacks(run: Run, windows: pl.DataFrame) -> Found:
    claimed = windows.filter((pl.col("outcome") == "ROLLED_BACK") & (pl.col("family") == "ledger")).drop("seq")
    sent = (
        run.attempts.filter(pl.col("family") == "rollback")
        .group_by("user", "key")
        .agg(pl.col("t_invoke").min().alias("rolled_back"))
    )
    rows = claimed.join(sent, on=["user", "key"], how="left")
    return found(
        "A08",
        rows.filter((pl.col("rolled_back") < pl.col("until")).fill_null(False).not_()).sort("until"),
        lambda row: (
            f"{row['op']} with key {row['key']} of user {row['user']} was refused as rolled back at"
            f" {seconds(row['until'])}, but nobody had sent a rollback of that key"
        ),
    )


def _cancels(run: Run, windows: pl.DataFrame) -> Found:
    claimed = windows.filter((pl.col("outcome") == "NOTHING_TO_CANCEL") & (pl.col("family") == "cancel")).drop("seq")
    done = run.table("cancels").filter((pl.col("outcome") == "ACCEPTED") & (pl.col("cancelled_stake") > 0))
    done = done.select(
        "bet_id", pl.col("user_id").alias("user"), pl.col("idempotent_key").alias("later_key"), "cancelled_stake"
    )
    sent = run.fates.filter(pl.col("family") == "cancel").select("user", pl.col("key").alias("later_key"), "begin_s")
    rows = claimed.join(done.join(sent, on=["user", "later_key"]), on=["user", "bet_id"])
    return found(
        "A08",
        rows.filter(pl.col("begin_s") > pl.col("until")).unique("attempt", maintain_order=True).sort("until"),
        lambda row: (
            f"cancel of bet {row['bet_id']} (key {row['key']}, user {row['user']}) found nothing to cancel at"
            f" {seconds(row['until'])}; key {row['later_key']}, sent at {seconds(row['begin_s'])}, cancelled"
            f" {row['cancelled_stake']} of it"
        ),
    )
