"""A14, A15, A16, A18, A19: what clients saw, in real time and within their sessions."""

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


def a18_dishonest_flag(run: Run) -> Found:
    """A18 dishonest flag: an unflagged answer names the ledger as its source and is behind the ledger.

    It misses an entry that was acknowledged before the read was sent; the ledger itself never does.
    """
    strong = _reads(run).filter((pl.col("source") == "ledger") & _unflagged())
    rows = highest_before(strong, acknowledged(run), by=["user"], at="t_invoke", moment="ack_s", value="seq")
    return found(
        "A18",
        rows.filter(pl.col("highest") > pl.col("seq")),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} says it comes from the ledger at seq"
            f" {row['seq']}, but seq {row['highest']} had been acknowledged before"
        ),
    )


def a19_impossible_read(run: Run) -> Found:
    """A19 impossible read: a read answered a (wallet, seq) with a balance that the ledger never had there.

    Seq 0 with balance 0 is the wallet before its first entry.
    """
    history = as_keys(run.entries).select("user", "seq", pl.col("balance_snapshot").alias("balance"))
    empty = (pl.col("seq") == 0) & (pl.col("balance") == 0)
    reads = _reads(run).filter(~empty)
    impossible = reads.join(history.unique(), on=["user", "seq", "balance"], how="anti")
    return found(
        "A19",
        impossible.sort("t_invoke"),
        lambda row: (
            f"a read of user {row['user']} at {seconds(row['t_invoke'])} answered {row['balance']} at seq"
            f" {row['seq']} from {row['source']}; the ledger never had that"
        ),
    )
