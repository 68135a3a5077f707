"""The facts around one place of the evidence, each kind as one section for a person to read.

A section shows what the run holds about the key, wallet, bet, match, event or fault that a witness names; nothing is
decided here.
"""

from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from invariants import sometimes
from invariants.anomalies import Witness
from invariants.anomalies.events import WALLET_EVENTS
from invariants.anomalies.recovery import BACKLOGS, drift_reports
from invariants.run import Run
from reference.routing import SHARDS

ROWS_AROUND: Final = 5
"""Ledger rows shown before and after the one that is meant."""
LINES_MAX: Final = 40
"""Lines of a section; how many more there are is said."""
AROUND_S: Final = 5.0
"""The timeline is shown from so long before the first to so long after the last moment of the proof."""
NOTHING_THERE: Final = "nothing is recorded"


@dataclass(frozen=True)
class Line:
    """One fact: when (seconds of the run, None where it has no moment), what, and whether it is the point."""

    text: str
    at_s: float | None = None
    marked: bool = False


@dataclass(frozen=True)
class Section:
    """Facts of one kind, in order."""

    title: str
    lines: list[Line] = field(default_factory=list)
    left_out: int = 0
    """Further lines that were not kept."""


def _section(title: str, lines: list[Line]) -> Section:
    """Return a section of at most LINES_MAX lines: around its marked ones, or else the first."""
    if len(lines) <= LINES_MAX:
        return Section(title, lines or [Line(NOTHING_THERE)])
    point = next((number for number, line in enumerate(lines) if line.marked), 0)
    start = min(max(0, point - LINES_MAX // 2), len(lines) - LINES_MAX)
    return Section(title, lines[start : start + LINES_MAX], len(lines) - LINES_MAX)


def _on_clock(run: Run, unix_s: float | None) -> float | None:
    """Return a time of the service on the run's clock, seconds; None where the run does not know how."""
    return None if unix_s is None or run.config.origin_unix is None else unix_s - run.config.origin_unix


def _moment(at_s: float | None) -> str:
    return "never" if at_s is None else f"{at_s:.3f} s"


def _values(row: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)


# -- sections


def show_ledger(run: Run, witness: Witness) -> Section | None:
    """Show the wallet's rows around the seq; without one, its last rows."""
    if witness.user is None:
        return None
    rows = run.entries.filter(pl.col("user_id") == witness.user)
    if witness.seq is not None:
        near = (pl.col("seq") >= witness.seq - ROWS_AROUND) & (pl.col("seq") <= witness.seq + ROWS_AROUND)
        rows = rows.filter(near | (pl.col("idempotent_key") == (witness.key or "")))
    elif witness.key is not None and rows.filter(pl.col("idempotent_key") == witness.key).height:
        seq = rows.filter(pl.col("idempotent_key") == witness.key)["seq"].item(0)
        rows = rows.filter((pl.col("seq") - seq).abs() <= ROWS_AROUND)
    else:
        rows = rows.tail(2 * ROWS_AROUND)
    lines = [
        Line(
            f"seq {row['seq']} on {row['server']}: {row['type']} {row['amount']:+d} against {row['contra']}, balance"
            f" {row['before_balance']} → {row['balance_snapshot']}"
            + (
                f" (the amounts sum to {row['replayed_balance']})"
                if row["replayed_balance"] != row["balance_snapshot"]
                else ""
            )
            + f", key {row['idempotent_key']}"
            + "".join(f", {name} {row[name]}" for name in ("bet_id", "match_id", "xact") if row[name] is not None),
            _on_clock(run, row["created_at"]),
            marked=row["seq"] == witness.seq or row["idempotent_key"] == witness.key,
        )
        for row in rows.iter_rows(named=True)
    ]
    if witness.seq is not None and all(f"seq {witness.seq} on" not in line.text for line in lines):
        lines.append(Line(f"there is no row with seq {witness.seq}", marked=True))
    return _section(f"Ledger of user {witness.user}", lines)


def _attempt_line(run: Run, row: dict[str, Any], witness: Witness) -> Line:
    asked = _values(row, "amount", "side", "odds", "selection", "match_id", "bet_id", "min_seq", "after_seq", "tag") + (
        " of the ledger" if row["strong"] else ""
    )
    took = "" if row["t_return"] == float("inf") else f" after {(row['t_return'] - row['t_invoke']) * 1000:.1f} ms"
    said = _values(row, "status", "outcome", "seq", "balance", "replayed", "source", "page_rows")
    said += ", flagged stale" if row["stale"] else ""
    as_of = _on_clock(run, row["as_of"])
    said += "" if as_of is None else f", as of {as_of:.3f} s"
    answered = "answered" if row["family"] == "read" else "acknowledged"
    answers = {"ok": answered, "fail": "refused", "info": "no answer"}
    error = f" ({row['error']})" if row["error"] else ""
    return Line(
        f"#{row['attempt']} client {row['client']} → {row['api']}: {row['op']}"
        + (f" of user {row['user']}" if row["user"] is not None else "")
        + (" by the ledger" if row["strong"] else "")
        + (f" ({asked})" if asked else "")
        + f": {answers.get(row['cls'], row['cls'])}{took}"
        + (f": {said}" if said else "")
        + error,
        row["t_invoke"],
        marked=row["attempt"] == witness.attempt,
    )


def show_attempts(run: Run, witness: Witness) -> Section | None:
    """Show every attempt of the key, in order."""
    if witness.key is None:
        return None
    mine = run.attempts.filter(
        (pl.col("key") == witness.key)
        & (pl.lit(witness.user is None) | pl.col("user").eq_missing(pl.lit(witness.user)) | pl.col("user").is_null())
    ).sort("t_invoke")
    lines = [_attempt_line(run, row, witness) for row in mine.iter_rows(named=True)]
    lines += [
        Line(
            f"stored refusal on {row['server']}: {row['outcome']}",
            _on_clock(run, row["created_at"]),
        )
        for row in run.table("refusals")
        .filter((pl.col("idempotent_key") == witness.key) & (pl.col("user_id") == (witness.user or -1)))
        .iter_rows(named=True)
    ]
    return Section(f"Attempts of key {witness.key}", lines or [Line("nobody ever sent it", marked=True)])


def show_around(run: Run, witness: Witness) -> Section | None:
    """Show what was asked about the wallet, and answered, around the attempt or the key."""
    if witness.user is None:
        return None
    mine = run.attempts.filter(pl.col("user") == witness.user).sort("t_invoke")
    point = (pl.col("attempt") == witness.attempt) if witness.attempt is not None else (pl.col("key") == witness.key)
    marked = mine.with_row_index("row").filter(point.fill_null(False))
    if marked.is_empty():
        return None
    at = int(marked["row"].item(0))
    near = mine.slice(max(0, at - 2 * ROWS_AROUND), 3 * ROWS_AROUND + 1)
    return _section(
        f"What clients were told of user {witness.user}",
        [_attempt_line(run, row, witness) for row in near.iter_rows(named=True)],
    )


def show_transaction(run: Run, witness: Witness) -> Section | None:
    """Show what was committed together with the wallet's next entries, and by when each of these had been shown."""
    if witness.user is None or witness.seq is None:
        return None
    next_ones = run.entries.filter((pl.col("user_id") == witness.user) & (pl.col("seq") > witness.seq)).head(
        ROWS_AROUND
    )
    together = ["server", "xact", "created_at"]
    mates = run.entries.join(next_ones.select(together).drop_nulls().unique(), on=together, how="semi")
    lines = []
    for row in pl.concat([next_ones, mates]).unique(["user_id", "seq"], maintain_order=True).iter_rows(named=True):
        shown = run.attempts.filter(
            (pl.col("user") == row["user_id"]) & (pl.col("cls") == "ok") & (pl.col("seq") >= row["seq"])
        ).sort("t_return")
        first = "" if shown.is_empty() else f", first shown by #{shown['attempt'].item(0)}"
        at_s = None if shown.is_empty() else float(shown["t_return"].item(0))
        text = f"seq {row['seq']} of user {row['user_id']}: {row['type']} {row['amount']:+d}, xact {row['xact']}{first}"
        lines.append(Line(text, at_s))
    return _section("Entries it does not show, and what was committed with them", lines)


def show_bet(run: Run, witness: Witness) -> Section | None:
    """Show the bet, its order, its fills and its entries."""
    bet_id = witness.bet_id or _bet_of_key(run, witness)
    if bet_id is None:
        return None
    lines = [
        Line(
            f"bet on {row['server']}: user {row['user_id']}, seq {row['seq']}, {row['side']} {row['stake']} at"
            f" {row['odds'] / 100:.2f} on {row['outcome']} of match {row['match_id']}, reserve {row['reserve']}",
            _on_clock(run, row["placed_at"]),
        )
        for row in run.table("bets").filter(pl.col("bet_id") == bet_id).iter_rows(named=True)
    ] or [Line("there is no bet row", marked=True)]
    lines += [
        Line(
            f"order on {row['server']}: {row['state']}, arrival {row['arrival']}, matched {row['matched_stake']}"
            f" (liability {row['matched_liability']}, winnings {row['winnings']}), cancelled {row['cancelled_stake']}"
            f" for {row['cancel_refund']} ({row['cancel_reason'] or 'no reason'}), event {row['event_id']}",
            _on_clock(run, row["arrived_at"]),
        )
        for row in run.table("orders").filter(pl.col("bet_id") == bet_id).iter_rows(named=True)
    ] or [Line("there is no order", marked=True)]
    mine = (pl.col("back_bet_id") == bet_id) | (pl.col("lay_bet_id") == bet_id)
    lines += [_fill_line(run, row) for row in run.table("fills").filter(mine).sort("fill_no").iter_rows(named=True)]
    lines += [
        Line(
            f"entry seq {row['seq']} of user {row['user_id']}: {row['type']} {row['amount']:+d} against {row['contra']}"
            f", version {row['settlement_version']}, key {row['idempotent_key']}",
            _on_clock(run, row["created_at"]),
            marked=row["seq"] == witness.seq and row["user_id"] == witness.user,
        )
        for row in run.entries.filter(pl.col("bet_id") == bet_id).iter_rows(named=True)
    ]
    lines += [
        Line(f"cancel by key {row['idempotent_key']}: {row['outcome']}, {row['cancelled_stake']} for {row['refund']}")
        for row in run.table("cancels").filter(pl.col("bet_id") == bet_id).iter_rows(named=True)
    ]
    return _section(f"Bet {bet_id}", lines)


def _bet_of_key(run: Run, witness: Witness) -> str | None:
    if witness.key is None or witness.user is None:
        return None
    mine = run.entries.filter((pl.col("user_id") == witness.user) & (pl.col("idempotent_key") == witness.key))
    ids = mine["bet_id"].drop_nulls().to_list()
    asked = run.attempts.filter((pl.col("user") == witness.user) & (pl.col("key") == witness.key))
    ids += asked["bet_id"].drop_nulls().to_list()
    return str(ids[0]) if ids else None


def _fill_line(run: Run, row: dict[str, Any]) -> Line:
    return Line(
        f"fill {row['fill_no']} on {row['server']}: {row['stake']} at {row['odds'] / 100:.2f}, BACK"
        f" {row['back_bet_id']} of user {row['back_user']}, LAY {row['lay_bet_id']} of user {row['lay_user']},"
        f" liability {row['liability']},"
        f" winnings {row['winnings']}",
        _on_clock(run, row["filled_at"]),
    )


def show_match(run: Run, witness: Witness) -> Section | None:
    """Show the match, its transitions and settlements, who asked for them, and its escrow."""
    match_id = witness.match_id
    if match_id is None:
        return None
    mine = pl.col("match_id") == match_id
    lines = [
        Line(f"match on {row['server']}: {row['state']}, version {row['settlement_version']}, result {row['result']}")
        for row in run.table("matches").filter(mine).iter_rows(named=True)
    ] or [Line("there is no such match", marked=True)]
    lines += [
        Line(
            f"transition {row['transition_no']}: {row['from_state']} → {row['to_state']}, version"
            f" {row['settlement_version']}, result {row['result']}",
            _on_clock(run, row["at"]),
        )
        for row in run.table("transitions").filter(mine).sort("transition_no").iter_rows(named=True)
    ]
    lines += [
        Line(f"settlement version {row['settlement_version']}: {row['kind']} {row['result'] or ''}, {row['state']}")
        for row in run.table("settlements").filter(mine).sort("settlement_version").iter_rows(named=True)
    ]
    commands = run.attempts.filter(mine & (pl.col("family") == "match")).sort("t_invoke")
    lines += [_attempt_line(run, row, witness) for row in commands.iter_rows(named=True)]
    escrow = run.entries.filter(mine & (pl.col("contra") == "ESCROW"))
    sums = escrow.group_by("type").agg((-pl.col("amount").sum()).alias("moved"), pl.len().alias("rows")).sort("type")
    lines += [
        Line(f"escrow: {row['rows']} {row['type']} entries, {row['moved']:+d}") for row in sums.iter_rows(named=True)
    ]
    lines.append(Line(f"escrow holds {-int(escrow['amount'].sum())} in the final state", marked=True))
    return _section(f"Match {match_id}", lines)


def show_event(run: Run, witness: Witness) -> Section | None:
    """Show the event in the outbox and its records in Kafka; of an entry, every event that tells of it."""
    outbox = run.table("outbox")
    if witness.event_id is not None:
        rows, title = outbox.filter(pl.col("event_id") == witness.event_id), f"Event {witness.event_id}"
        ids = [witness.event_id]
    elif witness.user is not None:
        own = (pl.col("user_id") == witness.user) & pl.col("event_type").is_in(WALLET_EVENTS)
        near = pl.lit(True) if witness.seq is None else (pl.col("seq") - witness.seq).abs() <= 2
        rows, title = outbox.filter(own & near), f"Events of user {witness.user}"
        ids = rows["event_id"].to_list()
    else:
        return None
    lines = [
        Line(
            f"outbox {row['id']} on {row['server']}: {row['event_type']} {row['event_id']}, seq {row['seq']}, key"
            f" {row['partition_key']}, {'published' if row['published_to_kafka'] else 'not published'}:"
            f" {row['payload']}",
            _on_clock(run, row["created_at"]),
            marked=row["seq"] == witness.seq,
        )
        for row in rows.sort("server", "id").iter_rows(named=True)
    ] or [Line("no outbox holds it", marked=True)]
    records = run.table("kafka").filter(pl.col("event_id").is_in(ids)).sort("topic", "partition", "offset")
    lines += [
        Line(
            f"{row['topic']}[{row['partition']}] offset {row['offset']}, key {row['key']}: {row['event_type']}"
            f" {row['event_id']}, seq {row['seq']}: {row['payload']}",
            _on_clock(run, row["timestamp"]),
        )
        for row in records.iter_rows(named=True)
    ] or [Line("no topic holds it", marked=True)]
    return _section(title, lines)


def show_stores(run: Run, witness: Witness) -> Section | None:
    """Show what each store says the wallet has."""
    if witness.user is None:
        return None
    mine = pl.col("user_id") == witness.user
    lines = [
        Line(f"projection on {row['server']}: {row['balance']} at seq {row['seq']}", marked=row["seq"] == witness.seq)
        for row in run.table("projection").filter(mine).iter_rows(named=True)
    ] or [Line("there is no projection row", marked=True)]
    lines += [
        Line(f"redis: {row['balance']} at seq {row['seq']}", marked=row["seq"] == witness.seq)
        for row in run.table("redis").filter(mine).iter_rows(named=True)
    ]
    head = run.entries.filter(mine).tail(1)
    lines += [
        Line(f"ledger on {row['server']}: {row['balance_snapshot']} at its newest seq {row['seq']}")
        for row in head.iter_rows(named=True)
    ]
    told = run.balance_updates.filter(mine).sort("seq").tail(ROWS_AROUND)
    lines += [
        Line(f"told to {row['topic']}: {row['balance']} at seq {row['seq']}", _on_clock(run, row["timestamp"]))
        for row in told.iter_rows(named=True)
    ]
    return _section(f"What the stores say of user {witness.user}", lines)


def show_money(run: Run, _: Witness) -> Section:
    """Show what came in, and where it is, in each snapshot."""
    lines: list[Line] = []
    for snapshot in (run.first, run.second):
        if snapshot is None:
            continue
        entries = snapshot.table("ledger").sort("user_id", "seq")
        heads = entries.group_by("user_id").agg(pl.col("balance_snapshot").last())
        sums = dict(entries.group_by("contra").agg(-pl.col("amount").sum()).iter_rows())
        held = int(heads["balance_snapshot"].sum())
        house, escrow, outside = (int(sums.get(name, 0)) for name in ("HOUSE", "ESCROW", "EXTERNAL"))
        lines.append(
            Line(
                f"{snapshot.name}: {held} in wallets + {house} house + {escrow} escrow = {held + house + escrow};"
                f" {-outside} came from outside",
                marked=held + house + escrow != -outside,
            )
        )
    return Section("The money", lines)


def show_routes(run: Run, witness: Witness) -> Section | None:
    """Show where the shard is, and where its rows are."""
    shard = witness.shard if witness.user is None else witness.user % SHARDS
    if shard is None:
        return None
    lines = [
        Line(
            f"route on {row['server']}: shard {shard} is {'here' if row['here'] else 'on ' + row['server_name']}, epoch"
            f" {row['epoch']}",
            _on_clock(run, row["changed_at"]),
            marked=row["here"],
        )
        for row in run.table("routes").filter(pl.col("shard") == shard).sort("server").iter_rows(named=True)
    ]
    whose = f"user {witness.user}" if witness.user is not None else f"shard {shard}"
    mine = (pl.col("user_id") == witness.user) if witness.user is not None else (pl.col("user_id") % SHARDS == shard)
    for name in ("ledger", "bets", "refusals", "projection", "outbox"):
        rows = run.table(name).filter(mine).group_by("server").len().sort("server")
        lines += [Line(f"{count} rows of {whose} in {name} on {server}") for server, count in rows.iter_rows()]
    return Section(f"Shard {shard}", lines)


def show_both_snapshots(run: Run, witness: Witness) -> Section | None:
    """Show the row in the first and in the second snapshot."""
    if run.second is None or witness.user is None:
        return None
    lines: list[Line] = []
    for snapshot in (run.first, run.second):
        mine = snapshot.table("ledger").filter(
            (pl.col("user_id") == witness.user) & ((pl.col("seq") - (witness.seq or 0)).abs() <= 1)
        )
        lines += [
            Line(
                f"{snapshot.name}: seq {row['seq']} {row['type']} {row['amount']:+d}, balance {row['balance_snapshot']}"
                f", key {row['idempotent_key']}, created {row['created_at']}, xact {row['xact']}",
                marked=row["seq"] == witness.seq,
            )
            for row in mine.sort("seq").iter_rows(named=True)
        ]
    return Section("The row in both snapshots", lines)


def show_faults(run: Run, _: Witness) -> Section:
    """Show every fault as it was asked for and measured."""
    return _section(
        "Faults",
        [
            Line(
                f"fault {row['fault_id']}: {row['fault']} {row['node']}, measured from {_moment(row['start'])} to"
                f" {_moment(row['end'])}",
                row["requested"],
            )
            for row in run.requested_faults.iter_rows(named=True)
        ],
    )


def show_curves(run: Run, witness: Witness) -> Section:
    """Show errors and backlogs from the measured end of the fault to the end of its time."""
    faults = run.requested_faults.filter(pl.col("fault_id") == (witness.fault_id or -1)).drop_nulls("end")
    if faults.is_empty():
        return Section("After the heal", [Line(NOTHING_THERE)])
    healed = float(faults["end"].item(0))
    until = healed + run.config.recover_within_s
    bad = (pl.col("cls") == "info") | (pl.col("status") >= 500).fill_null(False) | pl.col("status").is_null()
    second = ((pl.col("t_invoke") - healed) // 5 * 5).cast(pl.Int64).alias("second")
    shares = (
        run.attempts.filter(pl.col("t_invoke").is_between(healed, until))
        .group_by(second)
        .agg(bad.sum().alias("bad"), pl.len().alias("all"))
        .sort("second")
    )
    lines = [
        Line(f"{row['bad']} of {row['all']} requests of these 5 s were errors", healed + row["second"])
        for row in shares.iter_rows(named=True)
    ]
    samples = run.series.filter(pl.col("name").is_in(BACKLOGS) & pl.col("t").is_between(healed, until))
    window = ((pl.col("t") - healed) // 5 * 5).alias("second")
    worst = samples.group_by("name", "node", window).agg(pl.col("value").min()).sort("name", "node", "second")
    lines += [
        Line(f"{row['name']} of {row['node']} at least {row['value']:.0f}", healed + row["second"])
        for row in worst.iter_rows(named=True)
    ]
    return _section("After the heal, every 5 s", lines)


def show_drift(run: Run, _: Witness) -> Section:
    """Show what was planted, and what the passes of the reconciler said."""
    lines = [
        Line(
            f"drift on {row['node']} in the balance of user {row['user']}: measured {_moment(row['measured'])},"
            f" repaired {_moment(row['repaired'])}; {row['code']} was due within {row['within_s']:.0f} s and was"
            f" {'reported' if row['seen'] else 'not reported'}"
            + (f"; pass {row['blind_run']} missed it" if row["blind"] else ""),
            row["planted"],
            marked=True,
        )
        for row in drift_reports(run).iter_rows(named=True)
    ]
    lines += [
        Line(
            f"pass {row['kind']} on {row['server']} by {row['requested_by']}: {row['state']}"
            + ("" if row["code"] is None else f": {row['code']} of user {row['user_id']}, found {row['found']}"),
            _on_clock(run, row["finished_at"]),
        )
        for row in run.table("reconciliations").sort("finished_at").iter_rows(named=True)
    ]
    return _section("Planted drift and reconciliation", lines)


def show_primaries(run: Run, _: Witness) -> Section | None:
    """Show who was primary of which server, and who wrote."""
    rows = run.timeline.filter(pl.col("kind").is_in(["primary", "primary_write"]))
    if rows.is_empty():
        return None
    return _section(
        "Primaries",
        [Line(f"{row['kind']} of {row['node']}: {row['detail']}", row["t"]) for row in rows.iter_rows(named=True)],
    )


def show_operations(run: Run, _: Witness) -> Section:
    """Show how often each operation was tried, and how it was answered."""
    counts = run.attempts.group_by("op", "cls").len().sort("op", "cls")
    return Section("Operations", [Line(f"{op}: {count} {cls}") for op, cls, count in counts.iter_rows()])


def show_shown_sometimes(run: Run, _: Witness) -> Section:
    """Show what the run must show, and how often it did."""
    counts = sometimes.count(run)
    return Section(
        "What this run must show",
        [
            Line(f"{name}: {counts.get(name, 0)} times", marked=not counts.get(name))
            for name in run.config.required_sometimes
        ],
    )


def show_recorded(run: Run, _: Witness) -> Section:
    """Show what of the recording and the snapshots could be read."""
    report = run.recording
    lines = [
        Line(f"{report.frame.height} records in {report.parts} parts, {'closed' if report.closed else 'not closed'}")
    ]
    lines += [Line(problem, marked=True) for problem in report.problems()]
    for snapshot in (run.first, run.second):
        if snapshot is not None:
            lines += [Line(problem, marked=True) for problem in snapshot.missing()]
    kafka = run.table("kafka").group_by("topic").agg(pl.len().alias("records"), pl.col("partition").n_unique())
    lines += [
        Line(f"{topic}: {records} records in {partitions} partitions")
        for topic, records, partitions in kafka.sort("topic").iter_rows()
    ]
    return _section("What was recorded and read", lines)


def show_timeline(run: Run, moments: list[float]) -> Section:
    """Show faults, deaths and notes around the moments of the proof; all of them where it has no moment."""
    rows = run.timeline
    if moments:
        rows = rows.filter(pl.col("t").is_between(min(moments) - AROUND_S, max(moments) + AROUND_S))
    lines = [
        Line(
            " ".join(str(row[name]) for name in ("kind", "fault", "node", "detail") if row[name] is not None), row["t"]
        )
        for row in rows.iter_rows(named=True)
    ]
    return _section("Timeline around it" if moments else "Timeline", lines)
