"""V01–V06: what makes a run unable to prove anything, however clean it looks."""

from typing import Final

import polars as pl

from invariants import sometimes
from invariants.anomalies.common import NOTHING, Found, found
from invariants.anomalies.recovery import drift_reports
from invariants.fates import RETRY_BY_KEY, Fate, Resolution
from invariants.history import FINAL_RETRY, HUNG_UP
from invariants.run import Run
from invariants.snapshot import EVIDENCE
from reference.routing import SHARDS

REQUIRED_OPERATIONS: Final = ("deposit", "bet")
"""Operations without which there is no betting ledger to prove, whatever the workload names."""

LONGEST_RUN_S: Final = 30 * 86_400
"""Times of the run's clock lie between 0 and this; a wall clock's do not."""


def _sentences(code: str, sentences: list[str]) -> Found:
    return found(code, pl.DataFrame({"text": sentences}, schema={"text": pl.String}), lambda row: str(row["text"]))


def v01_vacuous(run: Run) -> Found:
    """V01 vacuous: an operation of the workload never succeeded (or there was no deposit, or no bet)."""
    tried = run.attempts.group_by("op").agg(pl.len().alias("tries"), (pl.col("cls") == "ok").sum().alias("oks"))
    succeeded = {op: (tries, oks) for op, tries, oks in tried.iter_rows()}
    wanted = sorted({*REQUIRED_OPERATIONS, *run.config.operations, *(str(op) for op in tried["op"])})
    sentences = [
        f"operation {op} never succeeded in {succeeded.get(op, (0, 0))[0]} attempts"
        for op in wanted
        if succeeded.get(op, (0, 0))[1] == 0
    ]
    return _sentences("V01", sentences)


def v02_no_unknown(run: Run) -> Found:
    """V02 no unknown: faults were injected and not one command had an unknown outcome.

    Then the faults hit nothing, or the client counts a lost answer as a failure or a success. A client that
    hung up on purpose does not count: such clients would make every run look as if its faults had hit.
    """
    faults = run.requested_faults.height
    lost = (pl.col("cls") == "info") & (pl.col("family") != "read") & pl.col("tag").ne_missing(HUNG_UP)
    unknown = run.attempts.filter(lost).height
    if faults and not unknown:
        return _sentences("V02", [f"{faults} faults were injected, yet no command had an unknown outcome"])
    return NOTHING


def v03_fault_unmeasured(run: Run) -> Found:
    """V03 fault unmeasured: a fault was requested and its start or its end was never seen from outside.

    So too a drift that was planted and not seen in the store, or not seen repaired, or repaired before reconciliation
    had either reported it or missed it (A35).
    """
    return _unmeasured_faults(run) + _unmeasured_drifts(run)


def _unmeasured_drifts(run: Run) -> Found:
    if run.drifts.is_empty():
        return NOTHING
    reports = drift_reports(run)
    unread = run.drifts.join(reports.select("node", "user"), on=["node", "user"], how="anti", nulls_equal=True)
    early = pl.col("repaired") < pl.col("planted") + pl.col("within_s")
    wrong = reports.filter(
        pl.col("measured").is_null() | pl.col("repaired").is_null() | (early & ~pl.col("seen") & ~pl.col("blind"))
    )
    return _sentences(
        "V03", [f"a drift was planted on {node}, and the timeline does not say in what" for node in unread["node"]]
    ) + found(
        "V03",
        wrong.sort("planted"),
        lambda row: (
            f"drift planted on {row['node']} in the balance of user {row['user']} at {row['planted']:.3f} s: measured"
            f" {row['measured']}, repaired {row['repaired']}, {'reported' if row['seen'] else 'not reported'} within"
            f" {row['within_s']:.0f} s"
        ),
    )


def _unmeasured_faults(run: Run) -> Found:
    rows = run.requested_faults.filter(
        pl.col("start").is_null() | pl.col("end").is_null() | (pl.col("end") < pl.col("start"))
    )
    return found(
        "V03",
        rows,
        lambda row: (
            f"fault {row['fault_id']} ({row['fault']} {row['node']}) requested at {row['requested']:.3f} s:"
            f" measured start {row['start']}, end {row['end']}"
        ),
    )


def v04_never(run: Run) -> Found:
    """V04 never: a *sometimes* that this run alone must show did not happen. Nothing is listed: nothing to show.

    What only a campaign of several runs must show is added up over its runs (`ledgerproof sometimes`).
    """
    if not run.config.required_sometimes:
        return NOTHING
    counts = sometimes.count(run)
    return _sentences(
        "V04",
        [f"never happened: {name}" for name in run.config.required_sometimes if not counts.get(name)],
    )


def v05_incomplete_reads(run: Run) -> Found:
    """V05 incomplete reads: the final state was not read whole.

    A table or column is missing; a server was not read; a Kafka partition has offsets missing at its start
    or in between; or the ledger holds no row of a server although acknowledged keys belong there. Of a recorded run
    (evidence 2 and later) also: there is no second snapshot, or the first one left keys to send again and none was.
    """
    sentences = run.first.missing()
    if run.second is not None:
        sentences += run.second.missing()
    if run.config.evidence >= EVIDENCE and not sentences:
        sentences += _protocol_left_out(run)
    if sentences:
        return _sentences("V05", sentences)
    ledger_servers = set(run.table("ledger")["server"].drop_nulls().unique().to_list())
    told = run.fates.filter((pl.col("family") == "ledger") & (pl.col("fate") == Fate.MUST.value))
    expected = {run.server_of_shard[int(shard)] for shard in (told["user"].drop_nulls() % SHARDS).unique()}
    read = run.final.servers_read()
    for server in run.config.servers:
        if server in expected and server not in ledger_servers:
            sentences.append(f"no ledger row of {server} was read, although acknowledged keys belong there")
        elif run.final.lists_servers and server not in read:
            sentences.append(f"{server} was not read")
    offsets = (
        run.table("kafka")
        .group_by("topic", "partition")
        .agg(
            pl.col("offset").min().alias("low"),
            pl.col("offset").max().alias("high"),
            pl.col("offset").n_unique().alias("records"),
        )
    )
    holes = offsets.filter((pl.col("low") != 0) | (pl.col("high") - pl.col("low") + 1 != pl.col("records")))
    return _sentences("V05", sentences) + found(
        "V05",
        holes.sort("topic", "partition"),
        lambda row: (
            f"{row['topic']}[{row['partition']}]: {row['records']} records were read between offsets"
            f" {row['low']} and {row['high']}, and it must start at 0"
        ),
    )


def _protocol_left_out(run: Run) -> list[str]:
    """Return what is missing of the last reads: a random half of the unknown keys sent again, and a second snapshot."""
    if run.second is None:
        return [f"there is only one snapshot: nothing says what changed after {run.first.name}"]
    able = run.first_resolution.filter(
        pl.col("family").is_in(RETRY_BY_KEY) & (pl.col("resolution") != Resolution.UNRESOLVED.value)
    )
    retried = run.attempts.filter(pl.col("tag") == FINAL_RETRY)
    sent = able.join(retried, on=["family", "user", "key"], how="semi", nulls_equal=True).height
    if 2 * sent < able.height:
        return [f"{sent} of {able.height} keys with an unknown outcome were sent again, and half of them must be"]
    return []


def v06_recording(run: Run) -> Found:
    """V06 recording: a gap or a clock regression in the history.

    A part missing, corrupt or unfinished, or records taken but not written; a completion without its invoke;
    an attempt recorded twice; a number left out, for attempts are numbered from 1 without a gap; a completion before
    its invoke; a time outside the run's clock.
    """
    history = run.recording.frame
    invokes = history.filter(pl.col("record") == "invoke").select("attempt", "t")
    completions = history.filter(pl.col("record") != "invoke").select("attempt", pl.col("t").alias("t_return"))
    orphans = completions.join(invokes, on="attempt", how="anti")
    twice = pl.concat(
        [
            invokes.filter(pl.col("attempt").is_duplicated()).select("attempt"),
            completions.filter(pl.col("attempt").is_duplicated()).select("attempt"),
        ]
    ).unique()
    numbers = invokes["attempt"].unique().sort()
    gaps = pl.DataFrame({"attempt": numbers, "before": numbers.shift(1).fill_null(0)}).filter(
        pl.col("attempt") != pl.col("before") + 1
    )
    backwards = run.attempts.filter(pl.col("t_return") < pl.col("t_invoke"))
    outside = history.filter(
        pl.col("t").is_null() | pl.col("t").is_nan() | (pl.col("t") < 0) | (pl.col("t") > LONGEST_RUN_S)
    )
    return (
        _sentences("V06", run.recording.problems())
        + found("V06", orphans, lambda row: f"attempt {row['attempt']} was completed but never invoked")
        + found(
            "V06",
            gaps,
            lambda row: f"after attempt {row['before']} the next one recorded is {row['attempt']}",
        )
        + found("V06", twice.sort("attempt"), lambda row: f"attempt {row['attempt']} was recorded twice")
        + found(
            "V06",
            backwards,
            lambda row: (
                f"attempt {row['attempt']} returned at {row['t_return']:.6f} s, before it was sent at"
                f" {row['t_invoke']:.6f} s"
            ),
        )
        + found(
            "V06",
            outside.drop("key", "user", "seq"),
            lambda row: f"attempt {row['attempt']} has the time {row['t']}, which is outside the run's clock",
        )
    )
