"""A13, A27, A28, A29: the bets, the book and the payments, against rules stated here a second time.

The rules of money are written from their specification, not taken from the service: a checker that borrows
the rules repeats their mistakes.
"""

from collections.abc import Callable
from typing import Final

import polars as pl

from invariants.anomalies.common import Found, as_keys, found
from invariants.run import Run

ALLOWED_TRANSITIONS: Final = frozenset(
    {
        (None, "OPEN"),
        ("OPEN", "CLOSED"),
        ("CLOSED", "SETTLING"),
        ("SETTLING", "SETTLED"),
        ("OPEN", "VOID"),
        ("CLOSED", "VOID"),
        # A match that is settled again, perhaps as void.
        ("SETTLED", "SETTLING"),
        ("VOID", "SETTLING"),
        ("SETTLING", "VOID"),
    }
)


def a13_torn(run: Run) -> Found:
    """A13 torn: half of something that must be whole.

    A bet row without the stake entry at its user, bet and seq, or with one of another amount than its reserve;
    a stake entry without a bet row. A fill whose BACK or LAY order is missing, or an order whose matched sums
    are not those of its fills: a leg was not booked.
    """
    return torn_stakes(run) + torn_fills(run)


def torn_stakes(run: Run) -> Found:
    """Find the bets without their stake, and stakes without their bet (A13)."""
    stakes = as_keys(run.client_entries).filter(pl.col("contra") == "ESCROW")
    stakes = stakes.select("user", "key", "seq", "bet_id", (-pl.col("amount")).alias("posted"))
    bets = run.table("bets").select(pl.col("user_id").alias("user"), "bet_id", "seq", "reserve", "match_id")
    whole = ["user", "bet_id", "seq"]
    pairs = bets.join(stakes, on=whole, how="left")
    first = found(
        "A13",
        pairs.filter(pl.col("posted").ne_missing(pl.col("reserve"))).sort("user", "seq"),
        lambda row: (
            f"bet {row['bet_id']} of user {row['user']} reserves {row['reserve']} at seq {row['seq']}; the ledger"
            f" took {'nothing' if row['posted'] is None else row['posted']} there"
        ),
    )
    second = found(
        "A13",
        stakes.join(bets, on=whole, how="anti"),
        lambda row: (
            f"entry seq {row['seq']} of user {row['user']} (key {row['key']}) staked {row['posted']} for bet"
            f" {row['bet_id']}, which does not exist at that seq"
        ),
    )
    return first + second


def _legs(run: Run) -> pl.DataFrame:
    """Return two rows per fill: match_id, fill_no, bet_id, side, user, other_user, odds, stake, liability, winnings."""
    fills = run.table("fills")
    shared = ("match_id", "fill_no", "outcome", "odds", "stake", "liability", "winnings", "filled_at")

    def leg(side: str, mine: str, other: str) -> pl.DataFrame:
        return fills.select(
            *shared,
            pl.col(f"{mine}_bet_id").alias("bet_id"),
            pl.col(f"{mine}_user").alias("user"),
            pl.col(f"{other}_user").alias("other_user"),
            pl.lit(side).alias("side"),
        )

    return pl.concat([leg("BACK", "back", "lay"), leg("LAY", "lay", "back")])


def _matched(run: Run) -> pl.DataFrame:
    """Return bet_id, fill_stake, fill_liability, fill_winnings: the sums of each bet's fills."""
    return (
        _legs(run)
        .group_by("bet_id")
        .agg(
            pl.col("stake").sum().alias("fill_stake"),
            pl.col("liability").sum().alias("fill_liability"),
            pl.col("winnings").sum().alias("fill_winnings"),
        )
    )


def torn_fills(run: Run) -> Found:
    """Find the fills without an order, and orders that are not the sum of their fills (A13)."""
    legs = _legs(run).unique(["match_id", "fill_no", "bet_id"], keep="first")
    orders = run.table("orders").select("bet_id", "match_id", "side", pl.col("user_id").alias("user"), "outcome")
    lame = legs.join(orders, on=["bet_id", "match_id", "side", "user", "outcome"], how="anti")
    first = found(
        "A13",
        lame.sort("match_id", "fill_no"),
        lambda row: (
            f"fill {row['fill_no']} of match {row['match_id']} names {row['side']} bet {row['bet_id']} of user"
            f" {row['user']}; there is no such order"
        ),
    )
    sums = (
        run.table("orders")
        .join(_matched(run), on="bet_id", how="left")
        .with_columns(
            pl.col("fill_stake", "fill_liability", "fill_winnings").fill_null(0), pl.col("user_id").alias("user")
        )
    )
    wrong = sums.filter(
        (pl.col("matched_stake") != pl.col("fill_stake"))
        | (pl.col("matched_liability") != pl.col("fill_liability"))
        | (pl.col("winnings") != pl.col("fill_winnings"))
    )
    return first + found(
        "A13",
        wrong.sort("bet_id"),
        lambda row: (
            f"order {row['bet_id']} says stake {row['matched_stake']}, liability {row['matched_liability']},"
            f" winnings {row['winnings']} matched; its fills sum to {row['fill_stake']},"
            f" {row['fill_liability']}, {row['fill_winnings']}"
        ),
    )


def a27_paid_twice(run: Run) -> Found:
    """A27 paid twice: more than one PAYOUT, or more than one REFUND, per bet, account and settlement version.

    By bet, not by wallet: a payout posted once to each of two wallets is paid twice as well. A correction may
    refund from HOUSE (commission given back) what it takes back into ESCROW.
    """
    paid = as_keys(run.system_entries).filter(pl.col("type").is_in(["PAYOUT", "REFUND"]))
    # Grouping costs most, so only what has the hash of another row is grouped.
    same = [pl.col(name).hash(i) for i, name in enumerate(("bet_id", "type", "contra", "settlement_version"))]
    paid = paid.filter((same[0] ^ same[1] ^ same[2] ^ same[3]).is_duplicated())
    rows = paid.group_by("bet_id", "type", "contra", "settlement_version").agg(
        pl.len().alias("times"),
        pl.col("amount").sum(),
        pl.col("user").first(),
        pl.col("seq").max(),
        pl.col("seq").sort().alias("seqs"),
        pl.col("key").last(),
    )
    return found(
        "A27",
        rows.filter(pl.col("times") > 1).sort("user", "seq"),
        lambda row: (
            f"bet {row['bet_id']} has {row['times']} {row['type']} entries of version"
            f" {row['settlement_version']} ({row['amount']} together): seqs {row['seqs']} of user {row['user']}"
        ),
    )


def _ceil_div(numerator: pl.Expr, denominator: int) -> pl.Expr:
    return -((-numerator) // denominator)


def reserve_rule(side: pl.Expr, odds: pl.Expr, stake: pl.Expr) -> pl.Expr:
    """Return what a bet reserves: its stake (BACK), or its liability stake × (odds − 100) / 100, rounded up (LAY)."""
    return pl.when(side == "BACK").then(stake).otherwise(_ceil_div(stake * (odds - 100), 100))


def a28_paid_wrong(run: Run) -> Found:
    """A28 paid wrong: money that differs from the rules by a cent or more, was not paid, or was paid to a loser.

    - A bet reserves `reserve_rule`.
    - A fill trades at the odds of the order that arrived first, within the other's limit. With X the lay
      order's exact liability so far, its liability is ⌈X after⌉ − ⌈X before⌉; the backer's winnings are
      ⌊stake × (odds − 100) / 100⌋.
    - Among orders of other wallets that rest at the same odds, the one that arrived first trades first.
    - A cancelled order gets back its unmatched stake (BACK) or reserve − matched liability (LAY): REFUND,
      version 0.
    - Settled: REFUND of what is neither matched nor already returned (BACK: stake − matched stake − returned;
      LAY: reserve − matched liability − returned). A winner with a matched stake: PAYOUT of matched stake +
      matched liability, and DEBIT to HOUSE of ⌈net × commission / 10000⌉ (net: winnings for BACK, matched stake
      for LAY) plus for BACK the rounding residue, matched liability − winnings. Void: REFUND of reserve −
      returned.
    - Settled again: the difference between what the new ruling and the one before it give. More out of escrow is
      a PAYOUT (void: a REFUND), less is a DEBIT to ESCROW; less for the house is a REFUND from HOUSE, more a DEBIT
      to HOUSE. If the wallet holds less than it must give back, then a CREDIT from HOUSE of exactly what it lacks,
      before that DEBIT (a missing one takes the wallet below zero: A07); the next version that pays the bet more
      takes it back with its DEBIT to HOUSE, as far as the payment goes.

    Payments of bets whose order never arrived are A26.
    """
    bets = run.table("bets").with_columns(
        reserve_rule(pl.col("side"), pl.col("odds"), pl.col("stake")).alias("right"),
        pl.col("user_id").alias("user"),
    )
    reserves = found(
        "A28",
        bets.filter(pl.col("reserve") != pl.col("right")).sort("user", "seq"),
        lambda row: (
            f"bet {row['bet_id']} ({row['side']} {row['stake']} at {row['odds'] / 100:.2f}) of user {row['user']}"
            f" reserved {row['reserve']}; the rule says {row['right']}"
        ),
    )
    return reserves + _wrong_fills(run) + _passed_over(run) + _wrong_cancels(run) + _wrong_payments(run)


def _wrong_fills(run: Run) -> Found:
    orders = run.table("orders").unique("bet_id", keep="first")
    sides = {
        side: orders.select(
            pl.col("bet_id").alias(f"{side}_bet_id"),
            pl.col("odds").alias(f"{side}_odds"),
            pl.col("arrival").alias(f"{side}_arrival"),
        )
        for side in ("back", "lay")
    }
    fills = run.table("fills").unique(["match_id", "fill_no"], keep="first")
    rows = fills.join(sides["back"], on="back_bet_id").join(sides["lay"], on="lay_bet_id")
    exact = (pl.col("stake") * (pl.col("odds") - 100)).cum_sum().over("lay_bet_id")
    step = pl.col("stake") * (pl.col("odds") - 100)
    rows = rows.sort("match_id", "fill_no").with_columns(
        (_ceil_div(exact, 100) - _ceil_div(exact - step, 100)).alias("right_liability"),
        (step // 100).alias("right_winnings"),
        pl.when(pl.col("back_arrival") < pl.col("lay_arrival"))
        .then(pl.col("back_odds"))
        .otherwise(pl.col("lay_odds"))
        .alias("right_odds"),
    )
    wrong = rows.filter(
        (pl.col("liability") != pl.col("right_liability"))
        | (pl.col("winnings") != pl.col("right_winnings"))
        | (pl.col("odds") != pl.col("right_odds"))
        | (pl.col("back_odds") > pl.col("lay_odds"))
    )
    return found(
        "A28",
        wrong.with_columns(pl.col("back_user").alias("user")),
        lambda row: (
            f"fill {row['fill_no']} of match {row['match_id']} ({row['stake']} at {row['odds'] / 100:.2f}) has"
            f" liability {row['liability']} and winnings {row['winnings']}; the rules say"
            f" {row['right_liability']} and {row['right_winnings']} at {row['right_odds'] / 100:.2f} (limits"
            f" {row['back_odds'] / 100:.2f} and {row['lay_odds'] / 100:.2f})"
        ),
    )


def _judged_orders(run: Run) -> pl.DataFrame:
    """Return each bet that has an order, with its fill sums and `right_refund`, what its cancel returns."""
    cached = run.scratch.get("judged_orders")
    if cached is not None:
        return cached
    orders = run.table("orders").select("bet_id", "state", "cancelled_stake", "cancel_refund", "cancel_reason")
    rows = run.table("bets").join(orders.unique("bet_id", keep="first"), on="bet_id", how="inner")
    rows = rows.join(_matched(run), on="bet_id", how="left").with_columns(
        pl.col("fill_stake", "fill_liability", "fill_winnings").fill_null(0), pl.col("user_id").alias("user")
    )
    cancelled = (
        pl.when(pl.col("side") == "BACK")
        .then(pl.col("stake") - pl.col("fill_stake"))
        .otherwise(pl.col("reserve") - pl.col("fill_liability"))
    )
    rows = rows.with_columns(pl.when(pl.col("cancelled_stake") > 0).then(cancelled).otherwise(0).alias("right_refund"))
    run.scratch["judged_orders"] = rows
    return rows


NEVER_DONE: Final = 2**62
"""Above every number of a fill: when an order is done that still has stake to trade."""


def _queue(run: Run) -> pl.DataFrame:
    """Return each order with `until`: the number of the last fill before which it still had stake to trade.

    0 if it never traded and was cancelled, NEVER_DONE if it still has stake.
    """
    fills = run.table("fills").unique(["match_id", "fill_no"], keep="first")
    legs = pl.concat([fills.select("fill_no", bet_id=f"{side}_bet_id") for side in ("back", "lay")])
    orders = run.table("orders").unique("bet_id", keep="first", maintain_order=True)
    left = pl.col("stake") > pl.col("matched_stake") + pl.col("cancelled_stake")
    return orders.join(legs.group_by("bet_id").agg(pl.col("fill_no").max()), on="bet_id", how="left").select(
        "bet_id",
        "match_id",
        "outcome",
        "side",
        "odds",
        "arrival",
        "user_id",
        pl.when(left).then(NEVER_DONE).otherwise(pl.col("fill_no").fill_null(0)).alias("until"),
    )


def _passed_over(run: Run) -> Found:
    """Find the fills whose resting order was not the first of those that rested at its odds."""
    queue = _queue(run)
    level = ["match_id", "outcome", "side", "odds"]
    resting = queue.sort("arrival").with_columns(pl.col("until").cum_max().shift(1).over(level).alias("waited"))
    sides = {
        side: queue.select(
            pl.col("bet_id").alias(f"{side}_bet_id"),
            pl.col("arrival").alias(f"{side}_arrival"),
            pl.col("user_id").alias(f"{side}_owner"),
        )
        for side in ("back", "lay")
    }
    fills = (
        run.table("fills")
        .unique(["match_id", "fill_no"], keep="first")
        .select(pl.col("match_id").alias("match"), "fill_no", "back_bet_id", "lay_bet_id", "back_user")
    )
    rows = fills.join(sides["back"], on="back_bet_id").join(sides["lay"], on="lay_bet_id")
    back_rests = pl.col("back_arrival") < pl.col("lay_arrival")
    rows = rows.with_columns(
        pl.when(back_rests).then("back_bet_id").otherwise("lay_bet_id").alias("bet_id"),
        pl.when(back_rests).then("lay_owner").otherwise("back_owner").alias("incoming"),
    ).join(resting.drop("user_id", "until"), on="bet_id")
    # Hardly any fill is left here, so that the orders of its level may be looked at one by one.
    suspects = rows.filter(pl.col("waited") > pl.col("fill_no"))
    earlier = queue.select(*level, pl.col("bet_id").alias("first"), pl.col("arrival").alias("came"), "user_id", "until")
    passed = suspects.join(earlier, on=level).filter(
        (pl.col("came") < pl.col("arrival"))
        & (pl.col("until") > pl.col("fill_no"))
        & (pl.col("user_id") != pl.col("incoming"))
    )
    wrong = passed.sort("came").unique(["match", "fill_no"], keep="first", maintain_order=True)
    return found(
        "A28",
        wrong.drop("match_id").rename({"match": "match_id"}).with_columns(pl.col("back_user").alias("user")),
        lambda row: (
            f"fill {row['fill_no']} of match {row['match_id']} took order {row['bet_id']} (arrival {row['arrival']})"
            f" and passed over order {row['first']} (arrival {row['came']}) at the same odds {row['odds'] / 100:.2f}"
        ),
    )


def _wrong_cancels(run: Run) -> Found:
    rows = _judged_orders(run).filter(
        (pl.col("cancel_refund") != pl.col("right_refund"))
        | ((pl.col("cancelled_stake") > 0) & (pl.col("cancelled_stake") != pl.col("stake") - pl.col("fill_stake")))
    )
    return found(
        "A28",
        rows.sort("user", "seq"),
        lambda row: (
            f"order {row['bet_id']} of user {row['user']} cancelled {row['cancelled_stake']} of"
            f" {row['stake']} ({row['fill_stake']} matched) for {row['cancel_refund']}; the rule says"
            f" {row['right_refund']}"
        ),
    )


def right_payments(run: Run) -> pl.DataFrame:
    """Return every payment the rules demand: user, bet_id, type, contra, settlement_version, amount (signed)."""
    names = ("user", "bet_id", "type", "contra", "settlement_version", "right")

    def payment(rows: pl.DataFrame, kind: str, contra: str, version: pl.Expr, amount: pl.Expr) -> pl.DataFrame:
        return (
            rows.with_columns(
                pl.lit(kind).alias("type"),
                pl.lit(contra).alias("contra"),
                version.cast(pl.Int64).alias("settlement_version"),
                amount.alias("right"),
            )
            .filter(pl.col("right") != 0)
            .select(names)
        )

    orders = _judged_orders(run)
    rulings = (
        run.table("settlements")
        .unique(["match_id", "settlement_version"], keep="first", maintain_order=True)
        .sort("match_id", "settlement_version")
        .select("match_id", "kind", "result", pl.col("settlement_version").alias("version"))
    )
    before = [pl.col(name).shift(1).over("match_id").alias(f"{name}_before") for name in ("kind", "result")]
    ruled = orders.join(rulings.with_columns(before), on="match_id", how="inner")
    version = pl.col("version")
    first = ruled.filter(pl.col("kind_before").is_null())
    void = first.filter(pl.col("kind") == "VOID")
    played = first.filter(pl.col("kind") == "SETTLE")
    winners = played.filter(_wins("result"))
    return pl.concat(
        [
            payment(orders, "REFUND", "ESCROW", pl.lit(0), pl.col("right_refund")),
            payment(void, "REFUND", "ESCROW", version, pl.col("reserve") - pl.col("right_refund")),
            payment(played, "REFUND", "ESCROW", version, _left_over()),
            payment(winners, "PAYOUT", "ESCROW", version, pl.col("fill_stake") + pl.col("fill_liability")),
            payment(winners, "DEBIT", "HOUSE", version, -_charge(run)),
            *_right_corrections(run, ruled.filter(pl.col("kind_before").is_not_null()), payment),
        ]
    )


def _wins(result: str) -> pl.Expr:
    """Return whether the matched part of a bet wins by the result in this column; false where it is null."""
    back = pl.col("side") == "BACK"
    return ((back == (pl.col("outcome") == pl.col(result))) & (pl.col("fill_stake") > 0)).fill_null(False)


def _left_over() -> pl.Expr:
    """Return what neither a fill nor a cancel used of a bet's reserve."""
    return pl.when(pl.col("side") == "BACK").then(pl.col("stake") - pl.col("fill_stake")).otherwise(
        pl.col("reserve") - pl.col("fill_liability")
    ) - pl.col("right_refund")


def _charge(run: Run) -> pl.Expr:
    """Return what the house takes from a bet that wins: commission, and the rounding residue of a BACK."""
    back = pl.col("side") == "BACK"
    net = pl.when(back).then(pl.col("fill_winnings")).otherwise(pl.col("fill_stake"))
    residue = pl.when(back).then(pl.col("fill_liability") - pl.col("fill_winnings")).otherwise(0)
    return _ceil_div(net * run.config.commission_bps, 10_000) + residue


def _right_corrections(
    run: Run, ruled: pl.DataFrame, payment: Callable[[pl.DataFrame, str, str, pl.Expr, pl.Expr], pl.DataFrame]
) -> list[pl.DataFrame]:
    """Return the payments of settlements that correct an earlier one; `ruled` has a row per bet and such version."""

    def out_of_escrow(kind: str, result: str) -> pl.Expr:
        won = pl.when(_wins(result)).then(pl.col("fill_stake") + pl.col("fill_liability")).otherwise(0)
        all_of_it = pl.col("reserve") - pl.col("right_refund")
        return pl.when(pl.col(kind) == "VOID").then(all_of_it).otherwise(_left_over() + won)

    def charged(kind: str, result: str) -> pl.Expr:
        return pl.when((pl.col(kind) != "VOID") & _wins(result)).then(_charge(run)).otherwise(0)

    rows = ruled.with_columns(
        (out_of_escrow("kind", "result") - out_of_escrow("kind_before", "result_before")).alias("escrow"),
        (charged("kind", "result") - charged("kind_before", "result_before")).alias("house"),
    ).filter((pl.col("escrow") != 0) | (pl.col("house") != 0))
    # What the house has advanced on a bet, and what the wallet held at that moment, only the ledger says.
    booked = run.system_entries.filter(pl.col("contra") == "HOUSE")
    booked = booked.select("bet_id", "settlement_version", "type", "amount", "balance_snapshot")
    owed = (
        rows.select("bet_id", "version")
        .join(booked, on="bet_id", how="inner")
        .filter(pl.col("settlement_version") < pl.col("version"))
        .group_by("bet_id", "version")
        .agg(pl.col("amount").sum().clip(0).alias("owed"))
    )
    advanced = booked.filter(pl.col("type") == "CREDIT").select(
        "bet_id",
        pl.col("settlement_version").alias("version"),
        (pl.col("balance_snapshot") - pl.col("amount")).alias("held"),
    )
    rows = rows.join(owed, on=["bet_id", "version"], how="left").with_columns(pl.col("owed").fill_null(0))
    short = rows.join(advanced.unique(["bet_id", "version"], keep="first"), on=["bet_id", "version"], how="inner")
    version, escrow, house = pl.col("version"), pl.col("escrow"), pl.col("house")
    paid = pl.col("kind").replace_strict({"VOID": "REFUND", "SETTLE": "PAYOUT"})
    taken = house.clip(0)
    repaid = pl.min_horizontal(pl.col("owed"), (escrow - taken).clip(0))
    more = rows.filter(escrow > 0)
    return [
        payment(more.filter(paid == "REFUND"), "REFUND", "ESCROW", version, escrow),
        payment(more.filter(paid == "PAYOUT"), "PAYOUT", "ESCROW", version, escrow),
        payment(rows.filter(escrow < 0), "DEBIT", "ESCROW", version, escrow),
        payment(rows.filter(house < 0), "REFUND", "HOUSE", version, -house),
        payment(rows, "DEBIT", "HOUSE", version, -(taken + repaid)),
        payment(short, "CREDIT", "HOUSE", version, (-escrow - pl.col("held")).clip(0)),
    ]


def _wrong_payments(run: Run) -> Found:
    names = ["user", "bet_id", "type", "contra", "settlement_version"]
    cancelled = run.table("orders").filter(pl.col("cancelled_stake") > 0).select("bet_id").unique()
    known = run.table("orders").select("bet_id").unique()
    settled = run.table("settlements").select("match_id", "settlement_version").unique()
    paid = as_keys(run.system_entries).join(known, on="bet_id", how="semi")
    # Payments without a cancel or settlement at all are phantoms (A03), and second ones are A27.
    founded = pl.concat(
        [
            paid.filter(pl.col("settlement_version") == 0).join(cancelled, on="bet_id", how="semi"),
            paid.filter(pl.col("settlement_version") > 0).join(
                settled, on=["match_id", "settlement_version"], how="semi"
            ),
        ]
    )
    firsts = founded.unique(names, keep="first", maintain_order=True).select(*names, "key", "seq", "amount")
    rows = right_payments(run).join(firsts, on=names, how="full", coalesce=True, nulls_equal=True)
    return found(
        "A28",
        rows.filter(pl.col("right").ne_missing(pl.col("amount"))).sort("user", "bet_id", "type"),
        lambda row: (
            f"bet {row['bet_id']} of user {row['user']} got {row['type']} {row['amount'] or 0} against"
            f" {row['contra']} (version {row['settlement_version']}); the rule says {row['right'] or 0}"
        ),
    )


def a29_illegal_transition(run: Run) -> Found:
    """A29 illegal transition: of a match or a bet, or a bet traded after its match closed.

    A match's transitions are numbered without gap, each from the state the one before reached, all of them
    among ALLOWED_TRANSITIONS, and the match stands in the last. Each settlement has a version of its own, counted
    from 1, and another result than the one before it. An order's state
    agrees with its matched and cancelled stakes and with its match. No fill, and no order whose stake was not
    cancelled, is younger than the close of its match. Nobody trades with themself.
    """
    return _match_steps(run) + _order_states(run) + _after_close(run) + _self_matches(run)


def _match_steps(run: Run) -> Found:
    steps = run.table("transitions").sort("match_id", "transition_no")
    same = pl.col("match_id") == pl.col("match_id").shift(1)
    steps = steps.with_columns(
        pl.when(same).then(pl.col("to_state").shift(1)).alias("stood"),
        pl.when(same).then(pl.col("transition_no").shift(1)).alias("number_before"),
        pl.when(same).then(pl.col("settlement_version").shift(1)).otherwise(0).alias("version_before"),
        (pl.col("match_id") != pl.col("match_id").shift(-1)).fill_null(True).alias("last"),
    )
    allowed = pl.DataFrame(
        sorted(ALLOWED_TRANSITIONS, key=str), schema={"from_state": pl.String, "to_state": pl.String}, orient="row"
    )
    judged = steps.join(allowed.with_columns(legal=True), on=["from_state", "to_state"], how="left", nulls_equal=True)
    gap = (pl.col("number_before") + 1 != pl.col("transition_no")).fill_null(False)
    to, source = pl.col("to_state"), pl.col("from_state")
    settles = (to == "SETTLING") | ((to == "VOID") & source.ne_missing("SETTLING"))
    wrong_version = pl.col("settlement_version") != pl.col("version_before") + settles.cast(pl.Int64)
    illegal = judged.filter(
        pl.col("legal").is_null()
        | pl.col("stood").ne_missing(source)
        | gap
        | wrong_version
        # The first settlement of a match leads to SETTLED; to VOID leads only one that corrects.
        | ((to == "VOID") & source.eq_missing("SETTLING") & (pl.col("settlement_version") < 2))
    )
    first = found(
        "A29",
        illegal.sort("match_id", "transition_no").drop("key", strict=False),
        lambda row: (
            f"match {row['match_id']} went {row['from_state']} → {row['to_state']} (transition"
            f" {row['transition_no']}, version {row['settlement_version']}) when it stood in {row['stood']}"
        ),
    )
    ends = steps.filter(pl.col("last")).select("match_id", "to_state")
    astray = (
        run.table("matches")
        .join(ends, on="match_id", how="left")
        .filter(pl.col("state").ne_missing(pl.col("to_state")))
    )
    second = found(
        "A29",
        astray.sort("match_id"),
        lambda row: f"match {row['match_id']} is {row['state']}, but its last transition led to {row['to_state']}",
    )
    return first + second + _settlement_versions(run)


def _settlement_versions(run: Run) -> Found:
    rulings = run.table("settlements").sort("match_id", "settlement_version")
    same = pl.col("match_id").eq_missing(pl.col("match_id").shift(1))
    version_before = pl.when(same).then(pl.col("settlement_version").shift(1)).otherwise(0)
    unchanged = same & pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in ("kind", "result"))
    return found(
        "A29",
        rulings.filter(unchanged | (pl.col("settlement_version") != version_before + 1)),
        lambda row: (
            f"match {row['match_id']} was settled as {row['result'] or row['kind']} under version"
            f" {row['settlement_version']}, which is not the next one or changes nothing"
        ),
    )


def _order_states(run: Run) -> Found:
    orders = run.table("orders").join(
        run.table("matches").select("match_id", pl.col("state").alias("match_state")), on="match_id", how="left"
    )
    state, matched, cancelled = pl.col("state"), pl.col("matched_stake"), pl.col("cancelled_stake")
    fits = (
        pl.when(state == "PENDING")
        .then((matched == 0) & (cancelled == 0))
        .when(state == "PART_MATCHED")
        .then((matched > 0) & (matched < pl.col("stake")) & (cancelled == 0))
        .when(state == "MATCHED")
        .then((matched > 0) & (matched + cancelled == pl.col("stake")))
        .when(state == "CANCELLED")
        .then((cancelled > 0) & (matched + cancelled == pl.col("stake")))
        .when(state == "SETTLED")
        .then(pl.col("match_state").is_in(["SETTLING", "SETTLED"]))
        .when(state == "VOID")
        .then(pl.col("match_state").is_in(["VOID", "SETTLING"]))
        .otherwise(pl.lit(False))
    )
    return found(
        "A29",
        orders.filter(~fits.fill_null(False)).with_columns(pl.col("user_id").alias("user")).sort("bet_id"),
        lambda row: (
            f"order {row['bet_id']} is {row['state']} with {row['matched_stake']} matched and"
            f" {row['cancelled_stake']} cancelled of {row['stake']}, its match {row['match_state']}"
        ),
    )


def _after_close(run: Run) -> Found:
    closes = (
        run.table("transitions")
        .filter(pl.col("to_state").is_in(["CLOSED", "VOID"]))
        .group_by("match_id")
        .agg(pl.col("at").min().alias("closed_at"))
    )
    fills = run.table("fills").join(closes, on="match_id").filter(pl.col("filled_at") > pl.col("closed_at"))
    first = found(
        "A29",
        fills.with_columns(pl.col("back_user").alias("user")).sort("match_id", "fill_no"),
        lambda row: (
            f"fill {row['fill_no']} of match {row['match_id']} happened"
            f" {row['filled_at'] - row['closed_at']:.6f} s after the match closed"
        ),
    )
    late = (
        run.table("orders")
        .join(closes, on="match_id")
        .filter((pl.col("arrived_at") > pl.col("closed_at")) & (pl.col("cancelled_stake") == 0))
    )
    return first + found(
        "A29",
        late.with_columns(pl.col("user_id").alias("user")).sort("bet_id"),
        lambda row: (
            f"order {row['bet_id']} arrived {row['arrived_at'] - row['closed_at']:.6f} s after match"
            f" {row['match_id']} closed and was not refused as late"
        ),
    )


def _self_matches(run: Run) -> Found:
    rows = run.table("fills").filter(pl.col("back_user") == pl.col("lay_user"))
    return found(
        "A29",
        rows.with_columns(pl.col("back_user").alias("user")).sort("match_id", "fill_no"),
        lambda row: f"fill {row['fill_no']} of match {row['match_id']} has user {row['user']} on both sides",
    )
