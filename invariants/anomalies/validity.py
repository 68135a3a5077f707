"""V01–V06: what makes a run unable to prove anything, however clean it looks."""

from typing import Final

import polars as pl

from invariants import sometimes
from invariants.anomalies.common import NOTHING, Found, found
from invariants.anomalies.recovery import drift_reports
from invariants.fates import RETRY_BY_KEY, Resolution
from invariants.history import FINAL_RETRY, HUNG_UP
from invariants.run import Run
from invariants.snapshot import EVIDENCE, MissingEvidence
from reference.routing import SHARDS

REQUIRED_OPERATIONS: Final = ("deposit", "bet")
"""Operations without which there is no betting ledger to prove, whatever the workload names."""

NUMBERS: Final = "numbers of attempts"
"""Where a large run, which has no history of its own, keeps the numbers of its invoke records: attempt, in order."""

LAST_READS: Final = "(last reads)"
"""Stands for an operation where the keys are counted that could be, and were, sent again after the first snapshot."""

LONGEST_RUN_S: Final = 30 * 86_400
"""Times of the run's clock lie between 0 and this; a wall clock's do not."""


def _sentences(code: str, sentences: list[str]) -> Found:
    return found(code, pl.DataFrame({"text": sentences}, schema={"text": pl.String}), lambda row: str(row["text"]))


def v01_vacuous(run: Run) -> Found:
    """V01 vacuous: an operation of the workload never succeeded (or there was no deposit, or no bet)."""
    return judge_vacuous(run, told(run))


def told(run: Run) -> pl.DataFrame:
    """Return op, family, cls, tag, shard, attempts: how often clients were told what; sums of slices add."""
    shard = (pl.col("user") % SHARDS).alias("shard")
    return run.attempts.group_by("op", "family", "cls", "tag", shard).agg(pl.len().cast(pl.Int64).alias("attempts"))


def judge_vacuous(run: Run, counts: pl.DataFrame) -> Found:
    """Judge by `told` whether each operation succeeded (V01)."""
    tried = counts.group_by("op").agg(
        pl.col("attempts").sum().alias("tries"), pl.col("attempts").filter(pl.col("cls") == "ok").sum().alias("oks")
    )
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
    return judge_unknown(run, told(run))


def judge_unknown(run: Run, counts: pl.DataFrame) -> Found:
    """Judge by `told` whether faults left any outcome unknown (V02)."""
    faults = run.requested_faults.height
    lost = (pl.col("cls") == "info") & (pl.col("family") != "read") & pl.col("tag").ne_missing(HUNG_UP)
    unknown = counts.filter(lost).height
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
    return _judge_reads(run, reads_told(run), rows=True)


def judge_reads(run: Run, counts: pl.DataFrame) -> Found:
    """Judge the snapshots, of whose files only the ends are read, and by `reads_told` what they must hold (V05)."""
    return _judge_reads(run, counts, rows=False)


def _judge_reads(run: Run, counts: pl.DataFrame, *, rows: bool) -> Found:
    sentences = run.first.missing(rows=rows)
    if run.second is not None:
        sentences += run.second.missing(rows=rows)
    if run.config.evidence >= EVIDENCE and not sentences:
        sentences += _protocol_left_out(run, counts)
    if sentences:
        return _sentences("V05", sentences)
    ledger_servers = set(run.final.column("ledger", "server").drop_nulls().unique().to_list())
    acknowledged = counts.filter((pl.col("family") == "ledger") & (pl.col("cls") == "ok"))
    expected = {run.server_of_shard[int(shard)] for shard in acknowledged["shard"].drop_nulls().unique()}
    read = run.final.servers_read()
    for server in run.config.servers:
        if server in expected and server not in ledger_servers:
            sentences.append(f"no ledger row of {server} was read, although acknowledged keys belong there")
        elif run.final.lists_servers and server not in read:
            sentences.append(f"{server} was not read")
    offsets = (
        run.final.scan("kafka")
        .select("topic", "partition", "offset")
        .group_by("topic", "partition")
        .agg(
            pl.col("offset").min().alias("low"),
            pl.col("offset").max().alias("high"),
            pl.col("offset").n_unique().alias("records"),
        )
        .collect()
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


def reads_told(run: Run) -> pl.DataFrame:
    """Return `told`, and under the op LAST_READS how many keys could be sent again at the end (cls `able`, `sent`)."""
    counts = told(run)
    if run.config.evidence < EVIDENCE or run.second is None:
        return counts
    try:
        able = run.first_resolution.filter(
            pl.col("family").is_in(RETRY_BY_KEY) & (pl.col("resolution") != Resolution.UNRESOLVED.value)
        )
    except MissingEvidence:
        return counts  # What is missing is a sentence of its own.
    retried = run.attempts.filter(pl.col("tag") == FINAL_RETRY)
    sent = able.join(retried, on=["family", "user", "key"], how="semi", nulls_equal=True)
    last = pl.DataFrame(
        {"op": LAST_READS, "cls": ["able", "sent"], "attempts": [able.height, sent.height]},
        schema={"op": pl.String, "cls": pl.String, "attempts": pl.Int64},
    )
    return pl.concat([counts, last], how="diagonal")


def _protocol_left_out(run: Run, counts: pl.DataFrame) -> list[str]:
    """Return what is missing of the last reads: a random half of the unknown keys sent again, and a second snapshot."""
    if run.second is None:
        return [f"there is only one snapshot: nothing says what changed after {run.first.name}"]
    last = counts.filter(pl.col("op") == LAST_READS)
    able, sent = (int(last.filter(pl.col("cls") == name)["attempts"].sum()) for name in ("able", "sent"))
    if 2 * sent < able:
        return [f"{sent} of {able} keys with an unknown outcome were sent again, and half of them must be"]
    return []


def v06_recording(run: Run) -> Found:
    """V06 recording: a gap or a clock regression in the history.

    A part missing, corrupt or unfinished, or records taken but not written; a completion without its invoke;
    an attempt recorded twice; a number left out, for attempts are numbered from 1 without a gap; a completion before
    its invoke; a time outside the run's clock.
    """
    return recording_problems(run) + numbers_left_out(run) + broken_records(run)


def recording_problems(run: Run) -> Found:
    """Find what is wrong with the parts of the history (V06)."""
    return _sentences("V06", run.recording.problems())


def numbers_left_out(run: Run) -> Found:
    """Find the numbers that no attempt has (V06)."""
    numbers = run.scratch.get(NUMBERS)
    if numbers is None:
        numbers = run.recording.frame.filter(pl.col("record") == "invoke").select("attempt").unique().sort("attempt")
    gaps = numbers.with_columns(pl.col("attempt").shift(1).fill_null(0).alias("before")).filter(
        pl.col("attempt") != pl.col("before") + 1
    )
    return found("V06", gaps, lambda row: f"after attempt {row['before']} the next one recorded is {row['attempt']}")


def broken_records(run: Run) -> Found:
    """Find the records that contradict each other or the clock (V06)."""
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
    backwards = run.attempts.filter(pl.col("t_return") < pl.col("t_invoke"))
    outside = history.filter(
        pl.col("t").is_null() | pl.col("t").is_nan() | (pl.col("t") < 0) | (pl.col("t") > LONGEST_RUN_S)
    )
    return (
        found("V06", orphans, lambda row: f"attempt {row['attempt']} was completed but never invoked")
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
