"""V01–V06: what makes a run unable to prove anything, however clean it looks."""

from typing import Final

import polars as pl

from invariants import sometimes
from invariants.anomalies.common import NOTHING, Found, found
from invariants.history import HUNG_UP
from invariants.run import Run
from reference.routing import SHARDS

REQUIRED_OPERATIONS: Final = ("deposit", "bet")
"""Operations without which there is no betting ledger to prove, whatever the workload names."""

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
    """V03 fault unmeasured: a fault was requested and its start or its end was never seen from outside."""
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
    """V04 never: a *sometimes* that this campaign must show did not happen. Nothing is listed: nothing to show."""
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
    or in between; or the ledger holds no row of a server although acknowledged keys belong there.
    """
    return judge_reads(run, told(run))


def judge_reads(run: Run, counts: pl.DataFrame) -> Found:
    """Judge the snapshots, and by `told` which servers must hold entries (V05)."""
    sentences = run.first.missing()
    if run.second is not None:
        sentences += run.second.missing()
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


def v06_recording(run: Run) -> Found:
    """V06 recording: a gap or a clock regression in the history.

    A part missing, corrupt or unfinished, or records taken but not written; a completion without its invoke;
    an attempt recorded twice; a completion before its invoke; a time outside the run's clock.
    """
    return recording_problems(run) + broken_records(run)


def recording_problems(run: Run) -> Found:
    """Find what is wrong with the parts of the history (V06)."""
    return _sentences("V06", run.recording.problems())


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
