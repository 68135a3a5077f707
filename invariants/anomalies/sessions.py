"""A14–A20: what clients saw, in real time, within their sessions, and against one another."""

from typing import Final

import polars as pl

from invariants.anomalies.common import Found, acknowledged, as_keys, found, highest_before, seconds
from invariants.run import Run

NOT_FOUND_STATUS: Final = 404


def _reads(run: Run) -> pl.DataFrame:
    """Return the answered balance reads."""
    return run.attempts.filter((pl.col("op") == "balance") & (pl.col("cls") == "ok") & pl.col("seq").is_not_null())


def _unflagged() -> pl.Expr:
    return ~pl.col("stale").fill_null(False)


def a14_real_time_order(run: Run) -> Found:
    """A14 real-time order: of two entries of a wallet, the later one was acknowledged before the other was sent.

    That is: its acknowledgement came before the first attempt of the key with the smaller seq began.
    """
    sent = run.fates.filter(pl.col("family") == "ledger").select("user", "key", "begin_s")
    rows = as_keys(run.client_entries).select("user", "key", "seq").join(sent, on=["user", "key"], how="inner")
    ordered = highest_before(rows, acknowledged(run), by=["user"], at="begin_s", moment="ack_s", value="seq")
    return found(
        "A14",
        ordered.filter(pl.col("highest") > pl.col("seq")),
        lambda row: (
            f"key {row['key']} of user {row['user']} was first sent at {seconds(row['begin_s'])} and has seq"
            f" {row['seq']}, although seq {row['highest']} had been acknowledged before"
        ),
    )


def a15_session(run: Run) -> Found:
    """A15 session: an unflagged read shows a smaller seq of a wallet than the same client had seen before.

    Only what the client saw more than the staleness bound before it sent the read counts: a younger value may
    honestly be unflagged, unless the client says what it has seen (`min_seq`), and then it is A16.
    """
    reads = _reads(run).with_columns((pl.col("t_invoke") - run.config.stale_after_s).alias("horizon"))
    rows = highest_before(reads, reads, by=["client", "user"], at="horizon", moment="t_return", value="seq")
    return found(
        "A15",
        rows.filter(_unflagged() & (pl.col("highest") > pl.col("seq"))),
        lambda row: (
            f"client {row['client']} had seen seq {row['highest']} of user {row['user']}; its read at"
            f" {seconds(row['t_invoke'])} answered seq {row['seq']} from {row['source']}, unflagged"
        ),
    )


def a16_own_writes(run: Run) -> Found:
    """A16 own writes: a read that named a `min_seq` got a smaller seq, or no wallet at all, unflagged."""
    reads = run.attempts.filter((pl.col("op") == "balance") & (pl.col("min_seq") > 0))
    less = (pl.col("cls") == "ok") & (pl.col("seq") < pl.col("min_seq")) & _unflagged()
    none = (pl.col("status") == NOT_FOUND_STATUS).fill_null(False)
    return found(
        "A16",
        reads.filter(less.fill_null(False) | none),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} asked for seq {row['min_seq']} or"
            f" newer and got {row['seq'] if row['seq'] is not None else 'no wallet'} from {row['source']},"
            " unflagged"
        ),
    )


def a17_too_stale(run: Run) -> Found:
    """A17 too stale: an unflagged balance is older than the bound (`stale_after_s`).

    - It lacks an entry that was acknowledged more than the bound before the read was sent. Answers from the ledger are
      A18's, answers below a `min_seq` A16's.
    - Or it says itself (`as_of`) that what was committed more than the bound before the read was sent may be missing.
    """
    own = (pl.col("source") == "ledger").fill_null(False) | (pl.col("seq") < pl.col("min_seq")).fill_null(False)
    unflagged = _reads(run).filter(_unflagged() & ~own)
    reads = unflagged.with_columns((pl.col("t_invoke") - run.config.stale_after_s).alias("horizon"))
    rows = highest_before(reads, acknowledged(run), by=["user"], at="horizon", moment="ack_s", value="seq")
    lacking = rows.filter(pl.col("highest") > pl.col("seq"))
    first = found(
        "A17",
        lacking.sort("t_invoke"),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} answered seq {row['seq']} from"
            f" {row['source']}, unflagged; seq {row['highest']} had been acknowledged before {seconds(row['horizon'])}"
        ),
    )
    old = _with_as_of(run, reads).filter(pl.col("as_of_s") < pl.col("horizon") - run.clock_slack_s)
    return first + found(
        "A17",
        old.join(lacking.select("attempt"), on="attempt", how="anti").sort("t_invoke"),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} answered seq {row['seq']} from"
            f" {row['source']} as of {seconds(row['as_of_s'])}, which is older than the bound, unflagged"
        ),
    )


def _with_as_of(run: Run, reads: pl.DataFrame) -> pl.DataFrame:
    """Return the reads that say up to when they are complete, with `as_of_s` on the run's clock."""
    if run.config.origin_unix is None:
        return reads.clear().with_columns(as_of_s=pl.lit(0.0))
    return reads.drop_nulls("as_of").with_columns((pl.col("as_of") - run.config.origin_unix).alias("as_of_s"))


def _behind_the_ledger(run: Run) -> pl.DataFrame:
    """Return the answers of the ledger that lack an entry acknowledged before they were asked for (`highest`)."""
    rows = highest_before(
        _ledger_reads(run), acknowledged(run), by=["user"], at="t_invoke", moment="ack_s", value="seq"
    )
    return rows.filter(pl.col("highest") > pl.col("seq"))


def _ledger_reads(run: Run) -> pl.DataFrame:
    """Return the unflagged answers of the ledger that show a wallet's head: balances, and pages that are not cut.

    `seq` is the newest entry they show; an empty page shows none behind where it was to begin.
    """
    reads = run.attempts.filter((pl.col("cls") == "ok") & _unflagged())
    balances = reads.filter((pl.col("op") == "balance") & (pl.col("source") == "ledger") & pl.col("seq").is_not_null())
    pages = reads.filter((pl.col("op") == "entries") & pl.col("page_cut").eq_missing(False))
    return pl.concat([balances, pages.with_columns(pl.coalesce("seq", "after_seq").alias("seq"))]).drop_nulls("seq")


def a18_dishonest_flag(run: Run) -> Found:
    """A18 dishonest flag: an answer says that it is fresher than it is, or names another source than it has.

    - An answer of the ledger, unflagged, lacks an entry that was acknowledged before the read was sent; the ledger
      itself never does.
    - Any balance lacks an entry that was acknowledged before the moment up to which it says it is complete (`as_of`).
    - A read that asked for the ledger (`strong`) was answered from elsewhere.
    """
    behind = _behind_the_ledger(run)
    first = found(
        "A18",
        behind.sort("t_invoke"),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} says it comes from the ledger at seq"
            f" {row['seq']}, but seq {row['highest']} had been acknowledged before"
        ),
    )
    reads = _with_as_of(run, _reads(run)).with_columns((pl.col("as_of_s") - run.clock_slack_s).alias("claimed"))
    rows = highest_before(reads, acknowledged(run), by=["user"], at="claimed", moment="ack_s", value="seq")
    claims = rows.filter(pl.col("highest") > pl.col("seq")).join(behind.select("attempt"), on="attempt", how="anti")
    second = found(
        "A18",
        claims.sort("t_invoke"),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} answered seq {row['seq']} from"
            f" {row['source']} and says that nothing from before {seconds(row['as_of_s'])} is missing, but seq"
            f" {row['highest']} had been acknowledged before"
        ),
    )
    elsewhere = _reads(run).filter(pl.col("strong").fill_null(False) & pl.col("source").ne_missing("ledger"))
    return (
        first
        + second
        + found(
            "A18",
            elsewhere.sort("t_invoke"),
            lambda row: (
                f"a read of user {row['user']} at {seconds(row['t_invoke'])} asked for the ledger and was answered from"
                f" {row['source']}"
            ),
        )
    )


def a19_impossible_read(run: Run) -> Found:
    """A19 impossible read: a read answered a (wallet, seq) with a balance that the ledger never had there.

    Seq 0 with balance 0 is the wallet before its first entry. A page of entries must begin right behind the seq it was
    asked to begin behind, have no gap, and end with a balance of the ledger.
    """
    history = as_keys(run.entries).select("user", "seq", pl.col("balance_snapshot").alias("balance"))
    empty = (pl.col("seq") == 0) & (pl.col("balance") == 0)
    pages = run.attempts.filter((pl.col("op") == "entries") & (pl.col("cls") == "ok") & (pl.col("page_rows") > 0))
    reads = pl.concat([_reads(run).filter(~empty), pages])
    impossible = reads.join(history.unique(), on=["user", "seq", "balance"], how="anti")
    torn = pages.filter(pl.col("seq") - pl.col("after_seq") != pl.col("page_rows"))
    return found(
        "A19",
        impossible.sort("t_invoke"),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} answered {row['balance']} at seq"
            f" {row['seq']} from {row['source'] or 'its entries'}; the ledger never had that"
        ),
    ) + found(
        "A19",
        torn.join(impossible.select("attempt"), on="attempt", how="anti").sort("t_invoke"),
        lambda row: (
            f"a page of user {row['user']} at {seconds(row['t_invoke'])} was to begin behind seq {row['after_seq']}; it"
            f" has {row['page_rows']} entries and ends with seq {row['seq']}"
        ),
    )


def a20_fractured(run: Run) -> Found:
    """A20 fractured: answers of the ledger order two commits oppositely, or show half of a transaction.

    Entries of one transaction (`ledger.xact`; an entry alone where it is not recorded) were committed together, and
    were so once any of them had been acknowledged or shown by any read.

    - A later answer of the ledger that lacks one of them orders commits as nobody else saw them: of two wallets of a
      transaction one was seen with it and the other, later, without it; or two clients saw one wallet grow in
      opposite orders. If the missing entry had itself been acknowledged, it is A18.
    - An answer of the ledger that ends between two entries of one transaction shows half of it.
    """
    return halves_shown(run) + judge_orders(run, orders_seen(run))


_TOGETHER: Final = ["server", "xact", "created_at"]


def _of_transactions(run: Run) -> pl.DataFrame:
    return run.entries.select(pl.col("user_id").alias("user"), "seq", *_TOGETHER)


def _halves(run: Run, strong: pl.DataFrame) -> pl.DataFrame:
    entries = _of_transactions(run)
    return strong.join(entries, on=["user", "seq"], how="inner").join(
        entries.with_columns(pl.col("seq") - 1).drop_nulls("xact"), on=["user", "seq", *_TOGETHER], how="semi"
    )


def halves_shown(run: Run) -> Found:
    """Find the answers of the ledger that end between two entries of one transaction (A20)."""
    return found(
        "A20",
        _halves(run, _ledger_reads(run)).sort("t_invoke"),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} showed the ledger up to seq {row['seq']}, but"
            f" seq {row['seq'] + 1} was committed by the same transaction"
        ),
    )


def orders_seen(run: Run) -> pl.DataFrame:
    """Return what A20 must compare of several wallets; that of slices is put together.

    Column `what` says of what: `read`, an answer of the ledger (attempt, user, key, seq, t_invoke) with `highest`, the
    newest entry of its wallet that had been shown or acknowledged before; `transaction` (server, xact, created_at),
    with `at` (seconds), by when it was committed; `entry`, of a wallet that was read (user, seq, and its transaction).
    """
    strong = _ledger_reads(run)
    entries = _of_transactions(run)
    shown = _committed_by(run, entries)
    excused = [_behind_the_ledger(run).select("attempt"), _halves(run, strong).select("attempt")]
    rows = highest_before(strong, shown, by=["user"], at="t_invoke", moment="at", value="seq")
    reads = rows.join(pl.concat(excused), on="attempt", how="anti", maintain_order="left")
    transactions = shown.drop_nulls("xact").group_by(_TOGETHER).agg(pl.col("at").min())
    read = entries.drop_nulls("xact").join(strong.select("user").unique(), on="user", how="semi")
    frames = {"read": reads, "transaction": transactions, "entry": read}
    return pl.concat(
        [
            frame.with_columns(pl.lit(what).alias("what")).select(
                pl.col(name).cast(kind) if name in {*frame.columns, "what"} else pl.lit(None, dtype=kind).alias(name)
                for name, kind in _SEEN.items()
            )
            for what, frame in frames.items()
        ]
    )


_SEEN: Final[dict[str, pl.DataType]] = {
    "what": pl.String(),
    "attempt": pl.Int64(),
    "user": pl.Int64(),
    "key": pl.String(),
    "seq": pl.Int64(),
    "t_invoke": pl.Float64(),
    "highest": pl.Int64(),
    "server": pl.String(),
    "xact": pl.Int64(),
    "created_at": pl.Float64(),
    "at": pl.Float64(),
}


def judge_orders(run: Run, seen: pl.DataFrame) -> Found:
    """Judge by `orders_seen` whether answers of the ledger order commits oppositely (A20)."""
    reads = seen.filter(pl.col("what") == "read").select("attempt", "user", "key", "seq", "t_invoke", "highest")
    transactions = seen.filter(pl.col("what") == "transaction").group_by(_TOGETHER).agg(pl.col("at").min())
    entries = seen.filter(pl.col("what") == "entry").select("user", pl.col("seq").alias("beside"), *_TOGETHER)
    beside = entries.join(transactions, on=_TOGETHER, how="inner").select("user", "beside", "at")
    rows = highest_before(
        reads.rename({"highest": "own"}), beside, by=["user"], at="t_invoke", moment="at", value="beside"
    ).with_columns(pl.max_horizontal("own", "highest").alias("highest"))
    return found(
        "A20",
        rows.filter(pl.col("highest") > pl.col("seq")).sort("t_invoke"),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} showed the ledger up to seq {row['seq']}, but"
            f" seq {row['highest']}, or another entry of its transaction, had been shown before"
        ),
    )


def _committed_by(run: Run, entries: pl.DataFrame) -> pl.DataFrame:
    """Return `entries` that were shown, with `at` (seconds): by when each was committed at the latest."""
    shown = run.attempts.filter((pl.col("family") == "read") & (pl.col("cls") == "ok") & (pl.col("seq") > 0))
    seen = pl.concat(
        [acknowledged(run).select("user", "seq", at="ack_s"), shown.select("user", "seq", at="t_return")]
    ).join(entries.select("user", "seq").unique(), on=["user", "seq"], how="semi")
    # Who shows an entry shows all before it: the earliest moment of this seq or a higher one.
    seen = seen.group_by("user", "seq").agg(pl.col("at").min())
    heads = seen.rename({"seq": "shown"}).sort("shown")
    return (
        entries.sort("seq")
        .join_asof(
            heads.sort("shown", descending=True).with_columns(pl.col("at").cum_min().over("user")).sort("shown"),
            left_on="seq",
            right_on="shown",
            by="user",
            strategy="forward",
            check_sortedness=False,
        )
        .drop_nulls("at")
    )
