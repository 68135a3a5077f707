"""A01–A05: what the clients were told about each key against what is stored under it."""

from typing import Final

import polars as pl

from invariants.anomalies.common import Found, Row, as_keys, asked_for, bodies, found, seconds
from invariants.fates import (
    OTHER_BODY_STATUS,
    RESETTLE,
    ROLLBACK_PREFIX,
    Fate,
    first_results,
    rollbacks_done,
    states_reached,
)
from invariants.history import FINAL_RETRY
from invariants.run import Run

_NAMES = ["family", "user", "key"]


ARRIVED: Final = "bets that arrived"
"""Where a slice of a large run keeps what it lacks: bet_id of the orders that cancels of the whole run wait for."""


def _effects(run: Run) -> pl.DataFrame:
    """Return the keys that had an effect: family, user, key, seq (of the entry; null elsewhere)."""
    ledger = as_keys(run.client_entries).select(pl.lit("ledger").alias("family"), "user", "key", "seq")
    nowhere = pl.lit(None, dtype=pl.Int64).alias("seq")
    arrived = run.scratch.get(ARRIVED)
    if arrived is None:
        arrived = run.table("orders").select("bet_id").unique()
    done = pl.concat(
        [
            run.table("cancels").filter(~pl.col("waiting")),
            # One that waits for its bet has had no effect once the bet's order is there.
            run.table("cancels").filter(pl.col("waiting")).join(arrived, on="bet_id", how="anti"),
        ]
    )
    cancels = done.filter(
        (pl.col("outcome") == "ACCEPTED") & ~pl.col("idempotent_key").str.starts_with(ROLLBACK_PREFIX)
    ).select(
        pl.lit("cancel").alias("family"),
        pl.col("user_id").alias("user"),
        pl.col("idempotent_key").alias("key"),
        nowhere,
    )
    others = [rollbacks_done(run.final), states_reached(run.final)]
    return pl.concat([ledger, cancels, *(effects.with_columns(nowhere) for effects in others)])


def a01_lost(run: Run) -> Found:
    """A01 lost: a key was acknowledged and its effect is not there.

    deposit, withdraw, bet: no entry with the user and key. cancel: no accepted cancel with them, or one that
    still waits for its bet although the bet's order has arrived. Match commands: the match never entered the state
    that was acknowledged. Rollback: the bet's key holds neither a cancel by the service nor a refusal; any refusal
    is enough, for then there is no bet to take back.
    """
    told = run.fates.filter(pl.col("fate") == Fate.MUST.value)
    lost = told.join(_effects(run).select(_NAMES).unique(), on=_NAMES, how="anti", nulls_equal=True)
    refused = as_keys(run.table("refusals")).select(pl.lit("rollback").alias("family"), "user", "key")
    lost = lost.join(refused.unique(), on=_NAMES, how="anti", nulls_equal=True)

    def sentence(row: Row) -> str:
        return (
            f"{row['op']} of {row['amount']} was acknowledged at {seconds(row['ack_s'])}"
            f" (key {row['key']}, user {row['user']}, seq {row['seq']}) and has no effect in the final state"
        )

    return found("A01", lost.sort("ack_s"), sentence)


def a02_duplicate(run: Run) -> Found:
    """A02 duplicate: more than one effect for a key, or for a business id.

    Two entries of one user and client's key; two debits, or two credits, of one bet, account and version (a stake,
    a commission, what a correction takes back or advances); more corrections of a match to one result than keys that
    asked for it. Two payouts or refunds for one bet and version are A27, so that each bug has one name.
    """
    return repeated_entries(run) + repeated_corrections(run)


def repeated_entries(run: Run) -> Found:
    """Find the keys and the business ids with more than one entry (A02)."""
    entries = as_keys(run.entries)
    own = entries.filter(~pl.col("system"))
    # Grouping costs most, so only what has the hash of another row is grouped.
    by_key = (
        own.filter((pl.col("user").hash(1) ^ pl.col("key").hash(2)).is_duplicated())
        .group_by("user", "key")
        .agg(pl.len().alias("times"), pl.col("seq").max(), pl.col("seq").sort().alias("seqs"))
        .filter(pl.col("times") > 1)
    )
    kind = pl.col("contra").is_in(["ESCROW", "HOUSE"]) & pl.col("type").is_in(["DEBIT", "CREDIT"])
    by_bet = (
        entries.filter(kind & pl.col("bet_id").is_not_null())
        .filter((pl.col("bet_id").hash(1) ^ pl.col("contra").hash(2)).is_duplicated())
        .group_by("bet_id", "type", "contra", "settlement_version")
        .agg(
            pl.len().alias("times"),
            pl.col("key").n_unique().alias("keys"),
            pl.col("system").any(),
            pl.col("user").first(),
            pl.col("seq").max(),
            pl.col("seq").sort().alias("seqs"),
            pl.col("key").last(),
        )
        # A stake posted twice under one key was counted above.
        .filter((pl.col("times") > 1) & ((pl.col("keys") > 1) | pl.col("system")))
    )
    first = found(
        "A02",
        by_key.sort("user", "seq"),
        lambda row: f"key {row['key']} of user {row['user']} has {row['times']} entries: seqs {row['seqs']}",
    )
    second = found(
        "A02",
        by_bet.sort("user", "seq"),
        lambda row: (
            f"bet {row['bet_id']} has {row['times']} {row['type']} entries against {row['contra']}"
            f" (version {row['settlement_version']}): seqs {row['seqs']} of user {row['user']}"
        ),
    )
    return first + second


def repeated_corrections(run: Run) -> Found:
    """Find the matches with more corrections to a result than keys that asked for it: one counted twice (A02)."""
    asked = (
        run.attempts.filter(pl.col("op") == RESETTLE)
        .group_by("match_id", pl.col("selection").fill_null("VOID").alias("asked_for"))
        .agg(pl.col("sent_key").drop_nulls().unique().sort().alias("keys"))
    )
    made = (
        run.table("settlements")
        .filter(pl.col("settlement_version") > 1)
        .unique(["match_id", "settlement_version"])
        .group_by("match_id", pl.col("result").fill_null("VOID").alias("asked_for"))
        .agg(pl.col("settlement_version").sort().alias("versions"), pl.col("settlement_version").max())
    )
    # A correction that nobody asked for at all is a phantom (A03).
    rows = made.join(asked, on=["match_id", "asked_for"], how="inner")
    return found(
        "A02",
        rows.filter(pl.col("versions").list.len() > pl.col("keys").list.len()).sort("match_id", "asked_for"),
        lambda row: (
            f"match {row['match_id']} was corrected to {row['asked_for']} {len(row['versions'])} times, as versions"
            f" {row['versions']}, and only {len(row['keys'])} keys asked for that: {row['keys']}"
        ),
    )


def a03_phantom(run: Run) -> Found:
    """A03 phantom: an effect that nobody attempted, or that differs from every attempt of its key.

    A client's entry must have an attempt of the same user and key that asks for this type, account and
    amount (for bets: the order in its bet row). An entry of the service's own must belong to a known bet of this
    wallet and match, have the key `ledger:KIND:bet_id:version` of what it is, and its version must exist: 0 for a
    cancelled or late order, else a settlement of the match. A settlement or void must have been asked for, with
    this result.
    """
    return unasked_entries(run) + unfounded_system_entries(run) + unasked_settlements(run)


def unasked_entries(run: Run) -> Found:
    """Find the clients' entries that no client asked for, or not so (A03)."""
    attempts = run.attempts.filter(pl.col("family") == "ledger").select("user", "key")
    entries = as_keys(run.client_entries)
    unasked = entries.join(attempts, on=["user", "key"], how="anti")
    nobody = found(
        "A03",
        unasked,
        lambda row: (
            f"entry seq {row['seq']} of user {row['user']} ({row['type']} {row['amount']}) has key"
            f" {row['key']}, which no client ever sent for this wallet"
        ),
    )
    differing = asked_for(run, bodies(run.attempts), only_unlike=True).filter(~pl.col("fits"))
    other = found(
        "A03",
        differing,
        lambda row: (
            f"entry seq {row['seq']} of user {row['user']} is {row['type']} {row['posted']}, which no attempt"
            f" of key {row['key']} asked for"
        ),
    )
    return nobody + other


def unfounded_system_entries(run: Run) -> Found:
    """Find the service's own entries that no cancelled order and no settlement accounts for (A03)."""
    entries = as_keys(run.system_entries)
    kind = pl.col("key").str.splitn(":", 3).struct.field("field_1")
    entries = entries.with_columns(
        kind.alias("kind"),
        pl.concat_str(pl.lit("ledger"), kind, "bet_id", "settlement_version", separator=":").alias("business_key"),
    )
    bets = run.table("bets").select(pl.col("user_id").alias("user"), "bet_id", pl.col("match_id").alias("bet_match"))
    cancelled = run.table("orders").filter(pl.col("cancelled_stake") > 0).select("bet_id", cancelled=True)
    versions = run.table("settlements").select("match_id", "settlement_version", settled=True)
    rows = (
        entries.join(bets.unique(["user", "bet_id"]), on=["user", "bet_id"], how="left")
        .join(cancelled.unique(), on="bet_id", how="left")
        .join(versions.unique(), on=["match_id", "settlement_version"], how="left")
    )
    shape = (
        pl.when(pl.col("kind") == "REFUND")
        .then((pl.col("type") == "REFUND") & (pl.col("contra") == "ESCROW"))
        .when(pl.col("kind") == "PAYOUT")
        .then((pl.col("type") == "PAYOUT") & (pl.col("contra") == "ESCROW"))
        .when(pl.col("kind") == "COMMISSION")
        .then((pl.col("type") == "DEBIT") & (pl.col("contra") == "HOUSE"))
        .when(pl.col("settlement_version") < 2)
        .then(pl.lit(False))
        .when(pl.col("kind") == "TAKE_BACK")
        .then((pl.col("type") == "DEBIT") & (pl.col("contra") == "ESCROW"))
        .when(pl.col("kind") == "COMMISSION_BACK")
        .then((pl.col("type") == "REFUND") & (pl.col("contra") == "HOUSE"))
        .when(pl.col("kind") == "ADVANCE")
        .then((pl.col("type") == "CREDIT") & (pl.col("contra") == "HOUSE"))
        .otherwise(pl.lit(False))
    )
    founded = (
        shape
        & (pl.col("key") == pl.col("business_key"))
        & (pl.col("bet_match") == pl.col("match_id"))
        & pl.when(pl.col("settlement_version") == 0)
        .then((pl.col("kind") == "REFUND") & pl.col("cancelled").fill_null(False))
        .otherwise(pl.col("settled").fill_null(False))
    )
    return found(
        "A03",
        rows.filter(~founded.fill_null(False)),
        lambda row: (
            f"system entry seq {row['seq']} of user {row['user']} ({row['type']} {row['amount']}, key"
            f" {row['key']}) belongs to no cancelled order or settlement of a bet of this wallet"
        ),
    )


def unasked_settlements(run: Run) -> Found:
    """Find the settlements that no client asked for (A03)."""
    # The first settlement of a match is asked for by settle or void, the others by resettle.
    op = pl.col("op")
    void = (op == "void_match") | ((op == "resettle_match") & pl.col("selection").is_null())
    tried = run.attempts.filter(op.is_in(["settle_match", "void_match", "resettle_match"])).select(
        "match_id",
        "cls",
        pl.when(void).then(pl.lit("VOID")).otherwise(pl.lit("SETTLE")).alias("kind"),
        (op == "resettle_match").alias("again"),
        pl.col("selection").alias("asked_result"),
    )
    made = run.table("settlements").with_columns((pl.col("settlement_version") > 1).alias("again"))
    rows = made.join(tried, on=["match_id", "kind", "again"], how="left")
    # Where every attempt failed the settlement is A04's, so a failed attempt is enough to have asked here.
    asked = pl.col("cls").is_not_null() & (
        pl.col("asked_result").is_null() | pl.col("asked_result").eq_missing(pl.col("result"))
    )
    grouped = rows.group_by("match_id", "settlement_version", "kind", "result").agg(asked.any().alias("asked"))
    return found(
        "A03",
        grouped.filter(~pl.col("asked")).sort("match_id"),
        lambda row: (
            f"match {row['match_id']} has {row['kind']} {row['result'] or ''} version"
            f" {row['settlement_version']}, which no client asked for"
        ),
    )


def a04_failed_but_applied(run: Run) -> Found:
    """A04 failed but applied: every attempt of a key was refused or certainly not done, and its effect exists.

    This also checks the claim `x-admitted: 0` and a refused connection make. Closing is left out for matches:
    they close by themselves at their time. So is a resettle to a result that the match had from the first. A key
    that holds an entry and a stored refusal is one too, whoever was told what: of a bet and the rollback that takes
    it back before it is there, exactly one may be decided.
    """
    from_the_first = first_results(run.final).with_columns(pl.lit(None, dtype=pl.Int64).alias("user"))
    denied = run.fates.filter((pl.col("fate") == Fate.MUST_NOT.value) & (pl.col("op") != "close_match")).join(
        from_the_first, on=_NAMES, how="anti", nulls_equal=True
    )
    applied = denied.drop("seq").join(
        _effects(run).unique(_NAMES, keep="first"), on=_NAMES, how="inner", nulls_equal=True
    )
    both = as_keys(run.client_entries).join(
        as_keys(run.table("refusals")).select("user", "key", "outcome").unique(), on=["user", "key"], how="inner"
    )
    contradicted = found(
        "A04",
        both.sort("user", "seq"),
        lambda row: (
            f"key {row['key']} of user {row['user']} holds the entry seq {row['seq']} and the stored refusal"
            f" {row['outcome']}"
        ),
    )
    return contradicted + found(
        "A04",
        applied.sort("begin_s"),
        lambda row: (
            f"{row['op']} of {row['amount']} (key {row['key']}, user {row['user']}) was answered only with"
            f" failures ({row['refusals']} stored refusals in {row['tries']} tries), yet it was applied"
            f" (seq {row['seq']})"
        ),
    )


def a05_replay_diverges(run: Run) -> Found:
    """A05 replay diverges: two answers for one key contradict each other, or the key's entry.

    - two acknowledgements with another seq, balance or bet id, or with two bodies;
    - an acknowledgement and a stored refusal, or two refusals with different reasons;
    - more than one acknowledgement that claims to be the original (`replayed` false), or a final retry of a
      key (also of a cancel) the first snapshot already holds that does;
    - an acknowledgement whose seq or balance is not that of the key's entry, or whose body is not the one
      that was applied;
    - a 409 (other body) although no other body was ever sent under the key.
    """
    return (
        _answers_differ(run)
        + _answer_is_not_the_entry(run)
        + _applied_another_body(run)
        + _original_claimed_late(run)
        + _wrongly_called_another_body(run)
    )


def _answers_differ(run: Run) -> Found:
    ok = pl.col("cls") == "ok"

    def several(name: str) -> pl.Expr:
        return pl.col(name).filter(ok).drop_nulls().n_unique() > 1

    reasons = pl.col("outcome").filter(pl.col("refused")).drop_nulls().n_unique()
    answers = run.attempts.filter(pl.col("family").is_in(["ledger", "cancel"]) & (ok | pl.col("refused")))
    repeated = answers.filter(pl.struct("family", "user", "key").is_duplicated())
    grouped = repeated.group_by("family", "user", "key", maintain_order=True).agg(
        pl.col("seq").filter(ok).first(),
        pl.col("seq").filter(ok).drop_nulls().unique().alias("seqs"),
        (several("seq") | several("balance") | several("answer_bet_id")).alias("values"),
        several("body").alias("bodies"),
        (ok.any() & pl.col("refused").any()).alias("both"),
        (reasons > 1).alias("reasons"),
        ((ok & pl.col("replayed").eq_missing(False)).sum() > 1).alias("originals"),
    )
    flags = ("values", "bodies", "both", "reasons", "originals")
    why = {
        "values": "two acknowledgements with different values",
        "bodies": "acknowledgements of two different bodies",
        "both": "an acknowledgement and a stored refusal",
        "reasons": "refusals with different reasons",
        "originals": "two acknowledgements that both claim to be the first",
    }
    return found(
        "A05",
        grouped.filter(pl.any_horizontal(flags)),
        lambda row: (
            f"key {row['key']} of user {row['user']} was given "
            + " and ".join(why[flag] for flag in flags if row[flag])
            + f" (seqs {sorted(row['seqs'])})"
        ),
    )


def _answer_is_not_the_entry(run: Run) -> Found:
    entries = as_keys(run.client_entries)
    told = run.attempts.filter((pl.col("family") == "ledger") & (pl.col("cls") == "ok"))
    told = told.select("user", "key", pl.col("seq").alias("told_seq"), pl.col("balance").alias("told_balance"))
    wrong = (pl.col("told_seq") != pl.col("seq")) | (pl.col("told_balance") != pl.col("balance_snapshot"))
    rows = told.join(entries, on=["user", "key"], how="inner").filter(wrong.fill_null(False)).unique()
    # Which of several entries of one key an answer means cannot be said: that is A02.
    mine = entries.join(rows, on=["user", "key"], how="semi")
    rows = rows.join(mine.unique(["user", "key"], keep="none"), on=["user", "key"], how="semi")
    ledger = found(
        "A05",
        rows.sort("user", "seq"),
        lambda row: (
            f"key {row['key']} of user {row['user']} was acknowledged with seq {row['told_seq']} and balance"
            f" {row['told_balance']}; its entry is seq {row['seq']} with balance {row['balance_snapshot']}"
        ),
    )
    # A cancel that was acknowledged has an accepted row; a row with another outcome is another answer.
    cancels = run.table("cancels").select(
        pl.col("user_id").alias("user"), pl.col("idempotent_key").alias("key"), "outcome", "bet_id"
    )
    told_cancels = run.fates.filter((pl.col("family") == "cancel") & (pl.col("fate") == Fate.MUST.value))
    pairs = told_cancels.select("user", "key", pl.col("bet_id").alias("told_bet")).join(
        cancels, on=["user", "key"], how="inner"
    )
    return ledger + found(
        "A05",
        pairs.filter(pl.col("told_bet") != pl.col("bet_id")),
        lambda row: (
            f"cancel key {row['key']} of user {row['user']} was acknowledged for bet {row['told_bet']} and is"
            f" stored for bet {row['bet_id']}"
        ),
    )


def _applied_another_body(run: Run) -> Found:
    # Only a key that was sent more than once can have had two bodies.
    several = run.fates.filter((pl.col("family") == "ledger") & (pl.col("tries") > 1))
    every = bodies(run.attempts.join(several, on=["user", "key"], how="semi"))
    told = asked_for(run, every.filter(pl.col("cls") == "ok")).filter(~pl.col("fits"))
    # An entry that no attempt at all asked for is a phantom (A03), not a mix-up of two bodies.
    mixed = told.join(
        asked_for(run, every).filter(pl.col("fits")).select("user", "key", "seq"),
        on=["user", "key", "seq"],
        how="semi",
    )
    return found(
        "A05",
        mixed,
        lambda row: (
            f"key {row['key']} of user {row['user']} was applied with a body ({row['type']} {row['posted']},"
            f" seq {row['seq']}) other than the one that was acknowledged"
        ),
    )


def _original_claimed_late(run: Run) -> Found:
    if run.second is None:
        return Found()
    entries = as_keys(run.first.table("ledger")).select(pl.lit("ledger").alias("family"), "user", "key", "seq")
    cancels = as_keys(run.first.table("cancels")).filter(pl.col("outcome") == "ACCEPTED")
    no_seq = pl.lit(None, dtype=pl.Int64).alias("seq")
    held = pl.concat([entries, cancels.select(pl.lit("cancel").alias("family"), "user", "key", no_seq)])
    retried = run.attempts.filter(
        (pl.col("tag") == FINAL_RETRY)
        & pl.col("family").is_in(["ledger", "cancel"])
        & (pl.col("cls") == "ok")
        & pl.col("replayed").eq_missing(False)
    )
    return found(
        "A05",
        retried.drop("seq").join(held, on=_NAMES, how="inner"),
        lambda row: (
            f"key {row['key']} of user {row['user']} was already applied (seq {row['seq']}), yet its retry at"
            f" {seconds(row['t_invoke'])} was answered as if it were the first"
        ),
    )


def _wrongly_called_another_body(run: Run) -> Found:
    commands = run.attempts.filter(pl.col("family").is_in(["ledger", "cancel"]))
    accused = commands.filter(pl.col("status") == OTHER_BODY_STATUS)
    if accused.is_empty():
        return Found()
    others = commands.select(*_NAMES, pl.col("body").alias("other"), pl.col("t_invoke").alias("other_began_s")).unique()
    explained = accused.join(others, on=_NAMES, how="inner").filter(
        (pl.col("other") != pl.col("body")) & (pl.col("other_began_s") < pl.col("t_return"))
    )
    return found(
        "A05",
        accused.join(explained.select("attempt").unique(), on="attempt", how="anti"),
        lambda row: (
            f"{row['op']} with key {row['key']} of user {row['user']} was refused as another body at"
            f" {seconds(row['t_return'])}, but no other body was ever sent under that key"
        ),
    )
