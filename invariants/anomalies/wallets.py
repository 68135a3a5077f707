"""A06, A07, A09, A10, A12, A30, A31, A33: the ledger replayed against itself."""

import polars as pl

from invariants.anomalies.common import NOTHING, Found, as_keys, found
from invariants.run import Run
from reference.routing import SHARDS

_SETTLED_STATES = ("SETTLED", "VOID")


def a06_overdraft(run: Run) -> Found:
    """A06 overdraft: a client's debit at whose row the replayed sum of the amounts falls below zero."""
    rows = as_keys(run.client_entries).filter((pl.col("amount") < 0) & (pl.col("replayed_balance") < 0))
    return found(
        "A06",
        rows,
        lambda row: (
            f"seq {row['seq']} of user {row['user']} takes {-row['amount']} (key {row['key']}) from a wallet"
            f" that held {row['replayed_balance'] - row['amount']}"
        ),
    )


def a07_negative(run: Run) -> Found:
    """A07 negative: a balance below zero after any entry, as stored or as replayed."""
    rows = as_keys(run.entries).filter((pl.col("balance_snapshot") < 0) | (pl.col("replayed_balance") < 0))
    return found(
        "A07",
        rows,
        lambda row: (
            f"after seq {row['seq']} user {row['user']} has {row['balance_snapshot']}"
            f" (replayed {row['replayed_balance']}), key {row['key']}"
        ),
    )


def a09_broken_chain(run: Run) -> Found:
    """A09 broken chain: balance_snapshot ≠ the previous row's balance_snapshot + amount (0 before seq 1).

    Judged between rows with consecutive seqs; a gap or a repeat is A10.
    """
    rows = as_keys(run.entries).filter(
        (pl.col("seq") == pl.col("before_seq") + 1)
        & (pl.col("balance_snapshot") != pl.col("before_balance") + pl.col("amount"))
    )
    return found(
        "A09",
        rows,
        lambda row: (
            f"seq {row['seq']} of user {row['user']} says {row['balance_snapshot']}, but the row before it says"
            f" {row['before_balance']} and it moves {row['amount']} (key {row['key']})"
        ),
    )


def a10_seq(run: Run) -> Found:
    """A10 seq: the seqs of a wallet are not 1, 2, 3, … without gap or repeat."""
    rows = as_keys(run.entries).filter(pl.col("seq") != pl.col("before_seq") + 1)
    return found(
        "A10",
        rows,
        lambda row: f"user {row['user']} has seq {row['seq']} after seq {row['before_seq']} (key {row['key']})",
    )


def a12_money(run: Run) -> Found:
    """A12 money: not conserved at a recorded cut: either snapshot, both taken at rest.

    - In each snapshot, over all servers: Σ of each wallet's last balance_snapshot + house + escrow ≠ what came from
      outside, where house, escrow and outside are sums over the entries' contra accounts.
    - In the last one, per match that is neither settled nor void: escrow ≠ Σ reserves of its bets − Σ refunds of
      cancelled orders. For any match: escrow below zero, unless it is being settled again. (Escrow left in a settled or
      void match is A30.)
    """
    return money_conserved(run, money(run)) + escrow_of_matches(run)


def money(run: Run) -> pl.DataFrame:
    """Return cut (its snapshot), name, total (minor units): wallets' and contra accounts' sums; those of slices add."""
    sums = [_sums(run.entries, run.final.name)]
    if run.second is not None:
        ordered = run.first.table("ledger").sort("user_id", "seq", "idempotent_key")
        sums.append(_sums(ordered, run.first.name))
    return pl.concat(sums)


def _sums(entries: pl.DataFrame, cut: str) -> pl.DataFrame:
    """Return the sums of `money` for one snapshot; `entries` by wallet and seq."""
    last = entries.filter(pl.col("user_id").ne_missing(pl.col("user_id").shift(-1)))
    contra = entries.group_by(pl.col("contra").alias("name")).agg((-pl.col("amount").sum()).alias("total"))
    held = last.select(pl.lit("WALLETS").alias("name"), pl.col("balance_snapshot").sum().alias("total"))
    return pl.concat([held, contra]).select(pl.lit(cut).alias("cut"), "name", "total")


def money_conserved(run: Run, sums: pl.DataFrame) -> Found:
    """Judge the sums of `money`: in each cut wallets, house and escrow hold what came from outside."""
    total = _conserved(sums.filter(pl.col("cut") == run.final.name), run.final.name)
    if run.second is not None:
        total = _conserved(sums.filter(pl.col("cut") == run.first.name), run.first.name) + total
    return total


def _conserved(sums: pl.DataFrame, cut: str) -> Found:
    totals = {str(name): int(total) for name, total in sums.group_by("name").agg(pl.col("total").sum()).iter_rows()}
    held, house, escrow, outside = (totals.get(name, 0) for name in ("WALLETS", "HOUSE", "ESCROW", "EXTERNAL"))
    total = pl.DataFrame({"off": [held + house + escrow + outside]}).filter(pl.col("off") != 0)
    return found(
        "A12",
        total,
        lambda row: (
            f"in {cut} wallets hold {held}, house {house}, escrow {escrow}: together {held + house + escrow}, but"
            f" {-outside} came from outside ({row['off']:+d})"
        ),
    )


def _escrow(run: Run) -> pl.DataFrame:
    """Return match_id, escrow (minor units) of every match that ever had an escrow entry."""
    return (
        run.entries.filter(pl.col("contra") == "ESCROW")
        .group_by("match_id")
        .agg((-pl.col("amount").sum()).alias("escrow"))
    )


def _final_matches(run: Run) -> pl.DataFrame:
    """Return match_id of every match that is settled or void, by its state or a finished settlement."""
    by_state = run.table("matches").filter(pl.col("state").is_in(_SETTLED_STATES)).select("match_id")
    by_row = run.table("settlements").filter(pl.col("state") == "DONE").select("match_id")
    # While a settlement runs, the escrow of its match is between two states.
    running = run.table("settlements").filter(pl.col("state") != "DONE").select("match_id")
    return pl.concat([by_state, by_row]).unique().join(running, on="match_id", how="anti")


def escrow_of_matches(run: Run) -> Found:
    """Find the matches whose escrow is not what their bets reserved less what was refunded (A12)."""
    reserved = run.table("bets").group_by("match_id").agg(pl.col("reserve").sum().alias("reserved"))
    returned = run.table("orders").group_by("match_id").agg(pl.col("cancel_refund").sum().alias("returned"))
    rows = (
        _escrow(run)
        .join(reserved, on="match_id", how="full", coalesce=True)
        .join(returned, on="match_id", how="left")
        .with_columns(pl.col("escrow", "reserved", "returned").fill_null(0))
    )
    running = run.table("settlements").select("match_id").unique()
    final = _final_matches(run)
    still_open = rows.join(final, on="match_id", how="anti").join(running, on="match_id", how="anti")
    differs = still_open.filter(pl.col("escrow") != pl.col("reserved") - pl.col("returned"))
    negative = rows.filter(pl.col("escrow") < 0).join(differs, on="match_id", how="anti")
    again = run.table("settlements").filter(pl.col("settlement_version") > 1).select("match_id").unique()
    negative = negative.join(final, on="match_id", how="anti").join(again, on="match_id", how="anti")
    first = found(
        "A12",
        differs.sort("match_id"),
        lambda row: (
            f"match {row['match_id']} holds {row['escrow']} in escrow; its bets reserved {row['reserved']}"
            f" and cancelled orders got back {row['returned']}"
        ),
    )
    return first + found(
        "A12",
        negative.sort("match_id"),
        lambda row: f"match {row['match_id']} paid {-row['escrow']} more out of its escrow than came in",
    )


def a30_escrow_leak(run: Run) -> Found:
    """A30 escrow leak: the escrow of a settled or void match is not zero after the drain, over all servers."""
    rows = _escrow(run).join(_final_matches(run), on="match_id", how="semi").filter(pl.col("escrow") != 0)
    return found(
        "A30",
        rows.sort("match_id"),
        lambda row: f"match {row['match_id']} is final and its escrow still holds {row['escrow']}",
    )


def a31_wrong_shard(run: Run) -> Found:
    """A31 wrong shard: rows of one wallet or match on two servers, or not on the server the routing names.

    Ledger, bets, refusals and projection by user_id % 100; matches, orders and fills by the hash of the match
    id. A stored `shard` that is not user_id % 100 counts too, and so does a shard that is not held by exactly
    one server, the one that every route of the highest epoch names.
    """
    return shard_owners(run) + misplaced_wallets(run) + misplaced_matches(run)


def misplaced_wallets(run: Run) -> Found:
    """Find the wallets with rows on another server or shard than theirs (A31)."""
    routes = pl.DataFrame(
        {"right_shard": list(run.server_of_shard), "right_server": list(run.server_of_shard.values())},
        schema={"right_shard": pl.Int64, "right_server": pl.String},
    )
    total = NOTHING
    for name in ("ledger", "bets", "refusals", "projection"):
        places = (
            run.table(name).group_by("server", "shard", pl.col("user_id").alias("user")).agg(pl.len().alias("rows"))
        )
        rows = places.with_columns((pl.col("user") % SHARDS).alias("right_shard")).join(
            routes, on="right_shard", how="left"
        )
        wrong = rows.filter(
            pl.col("server").ne_missing(pl.col("right_server")) | (pl.col("shard") != pl.col("right_shard"))
        )
        total += found(
            "A31",
            wrong.sort("user", "server"),
            lambda row, table=name: (  # type: ignore[misc]
                f"{row['rows']} rows of user {row['user']} in {table} are on {row['server']} shard"
                f" {row['shard']}; they belong on {row['right_server']} shard {row['right_shard']}"
            ),
        )
    return total


def misplaced_matches(run: Run) -> Found:
    """Find the matches with rows on another server than their home (A31)."""
    total = NOTHING
    for name in ("matches", "orders", "fills"):
        places = run.table(name).group_by("server", "match_id").agg(pl.len().alias("rows"))
        ids = places["match_id"].unique().to_list()
        homes = pl.DataFrame(
            {"match_id": ids, "home": [run.home_of_match(match_id) for match_id in ids]},
            schema={"match_id": pl.String, "home": pl.String},
        )
        wrong = places.join(homes, on="match_id").filter(pl.col("server") != pl.col("home"))
        total += found(
            "A31",
            wrong.sort("match_id", "server"),
            lambda row, table=name: (  # type: ignore[misc]
                f"{row['rows']} rows of match {row['match_id']} in {table} are on {row['server']}, its home is"
                f" {row['home']}"
            ),
        )
    return total


def shard_owners(run: Run) -> Found:
    """Find the shards that are not held by exactly one server, or by another than the newest route names."""
    table = run.table("routes")
    newest = table.sort("epoch", "here").group_by("shard", maintain_order=True).agg(pl.col("server_name").last())
    claims = table.filter(pl.col("here")).group_by("shard").agg(pl.col("server").sort().alias("holders"))
    shards = pl.DataFrame({"shard": range(SHARDS)}, schema={"shard": pl.Int64})
    rows = shards.join(claims, on="shard", how="left").join(newest, on="shard", how="left")
    sole = (pl.col("holders").list.len() == 1) & (pl.col("holders").list.first() == pl.col("server_name"))
    return found(
        "A31",
        rows.filter(~sole.fill_null(False)).sort("shard"),
        lambda row: (
            f"shard {row['shard']} is held by {', '.join(row['holders'] or ['no server'])}; it is to be on"
            f" {row['server_name']}"
        ),
    )


def a33_rewritten(run: Run) -> Found:
    """A33 rewritten: an entry of the first snapshot is absent from, or differs in, the second one.

    An UPDATE that changes nothing differs too: the row is another transaction's then (`ledger.xact`). The rows of a
    wallet up to its seq in the first snapshot must be the same rows in the second. Nothing to compare, and so nothing
    found, in a run with one snapshot.
    """
    if run.second is None:
        return NOTHING
    before, after = as_keys(run.first.table("ledger")), as_keys(run.second.table("ledger"))
    # created_at and shard take part: an UPDATE of any column is a rewrite.
    # Two rows are compared by one hash of all their columns: a join over them all would cost ten times as much.
    every = pl.lit(0, dtype=pl.UInt64)
    for number, name in enumerate(before.columns):
        every ^= pl.col(name).hash(number)
    hashed = after.select(every.alias("hash"))
    changed = before.with_columns(every.alias("hash")).join(hashed, on="hash", how="anti").drop("hash")
    prefix = before.group_by("user").agg(pl.col("seq").max().alias("seen"))
    inserted = (
        after.join(prefix, on="user", how="inner")
        .filter(pl.col("seq") <= pl.col("seen"))
        .join(before.select("user", "seq", "key"), on=["user", "seq", "key"], how="anti")
        # A row that replaced another was reported as changed.
        .join(changed.select("user", "seq"), on=["user", "seq"], how="anti")
    )
    first = found(
        "A33",
        changed.sort("user", "seq"),
        lambda row: (
            f"seq {row['seq']} of user {row['user']} (key {row['key']}, {row['type']} {row['amount']}) of the"
            f" first snapshot is gone or different in the second"
        ),
    )
    return first + found(
        "A33",
        inserted.sort("user", "seq"),
        lambda row: (
            f"seq {row['seq']} of user {row['user']} (key {row['key']}) appeared below seq {row['seen']},"
            " which the first snapshot already held"
        ),
    )
