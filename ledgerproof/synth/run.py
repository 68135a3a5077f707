"""Writes the run folder of a synthetic run, in the form in which `prove` writes one."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import polars as pl

from invariants import history
from invariants.files import append_line, publish
from invariants.history import ANSWERED, SCHEMA
from invariants.run import CONFIG_FILE, FIRST_SNAPSHOT, SECOND_SNAPSHOT
from invariants.snapshot import ADDED_TABLES, SERVERS_READ
from invariants.spool import Spool
from invariants.timeline import Series, Timeline
from ledgerproof import __version__, assess, collect
from ledgerproof.assess import GeneratorFacts, HarnessFacts, ReconciliationFacts
from ledgerproof.machine import commit, describe_machine
from ledgerproof.options import EnvironmentProblem
from ledgerproof.synth import plant, tables, told
from ledgerproof.synth.block import play
from ledgerproof.synth.plant import Planted
from ledgerproof.synth.shape import (
    COMMISSION_BPS,
    LOAD_FROM_S,
    MAX_ROWS,
    MIN_ROWS,
    MIXES,
    ORIGIN_UNIX_S,
    PART_ROWS,
    ROUTING,
    SERVER_NAMES,
    Shape,
)
from ledgerproof.synth.spool import write_table
from reference.routing import SHARDS

OPERATIONS: Final = (
    "deposit",
    "withdraw",
    "bet",
    "cancel",
    "rollback",
    "balance",
    "entries",
    "create_match",
    "close_match",
    "settle_match",
    "void_match",
    "resettle_match",
)
COLUMNS: Final[dict[str, dict[str, pl.DataType]]] = {
    **{
        name: {"server": pl.String(), **{column: kind for column, kind in columns.items() if column != "xact"}}
        for name, columns in collect.TABLES.items()
        if name not in {"routes", *ADDED_TABLES}
    },
    "kafka": collect.KAFKA_COLUMNS,
    "redis": collect.REDIS_COLUMNS,
}
"""The columns of each file of a snapshot, as the collector writes them; the routes are the same in every run."""
ORDER: Final = {
    "ledger": ["shard", "_at", "user_id", "seq"],
    "bets": ["shard", "_at"],
    "refusals": ["shard", "_at"],
    "projection": ["shard", "user_id"],
    "redis": ["user_id"],
    "kafka": ["topic", "partition", "_at"],
}
"""In which order a bucket is written; the other tables by server and time."""
STATE_OF_A_MOMENT: Final = ("projection", "redis")
"""Tables whose rows are those of one snapshot and not also of the next."""
SPOOL: Final = "spool"


@dataclass(frozen=True)
class Written:
    """What was written."""

    folder: Path
    sizes: dict[str, int]
    """Rows of the history and of each table of the second snapshot."""
    planted: Planted | None


def write_run(shape: Shape, folder: Path, show: Callable[[str], None]) -> Written:
    """Write a run of this shape to `folder`, which is made, and say how far it is.

    Memory is that of one block, or of one bucket of the largest table. Raises EnvironmentProblem where the folder
    cannot be written or is there already, ValueError for a shape of no sense.
    """
    if not MIN_ROWS <= shape.rows <= MAX_ROWS:
        raise ValueError(f"a synthetic run has {MIN_ROWS} to {MAX_ROWS} history rows, not {shape.rows}")
    if shape.mix not in MIXES:
        raise ValueError(f"no mix {shape.mix}: there is {', '.join(MIXES)}")
    if shape.plant is not None and shape.plant not in plant.PLANTS:
        raise ValueError(f"no violation {shape.plant} can be planted: {', '.join(sorted(plant.PLANTS))} can")
    try:
        folder.mkdir(parents=True)
        for name in (history.FOLDER, FIRST_SNAPSHOT, SECOND_SNAPSHOT):
            (folder / name).mkdir()
        return _write(shape, folder, show)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {error.filename or folder}: {error.strerror}") from error


def _write(shape: Shape, folder: Path, show: Callable[[str], None]) -> Written:
    spools = {name: Spool(folder / SPOOL / name) for name in ("attempts", *COLUMNS)}
    seconds = max(1, round(shape.rows / PART_ROWS))
    whole_s = shape.final_s + 60.0
    planted: Planted | None = None
    bets = 0
    for number in range(shape.blocks):
        show(f"block {number + 1} of {shape.blocks}")
        block = play(shape, number)
        here = shape.plant if number == shape.blocks // 2 else None
        if here is not None:
            plant.in_entries(here, block)
        attempts = told.attempts(block)
        frames = tables.tables(block)
        if here is not None:
            planted, attempts = plant.in_tables(here, block, attempts, frames)
        bucket = (pl.col("t_invoke") * seconds / whole_s).cast(pl.Int64)
        spools["attempts"].add(attempts.with_columns(bucket.alias("_bucket")))
        bets += attempts.filter((pl.col("op") == "bet") & (pl.col("cls") == "ok"))["key"].n_unique()
        for name, frame in frames.items():
            spools[name].add(frame)
    show("history")
    sizes = {"history": _write_history(spools["attempts"], folder)}
    for name in COLUMNS:
        show(name)
        sizes[name] = _write_table(name, spools[name], folder)
    for name in (FIRST_SNAPSHOT, SECOND_SNAPSHOT):
        routes = _routes()
        routes.write_parquet(folder / name / "routes.parquet")
        (folder / name / SERVERS_READ).write_bytes(msgspec.json.encode(SERVER_NAMES))
    shutil.rmtree(folder / SPOOL)
    _write_timeline(shape, folder)
    _write_facts(shape, folder, sizes, bets / shape.load_s)
    return Written(folder, sizes, planted)


def _write_history(spool: Spool, folder: Path) -> int:
    """Write the records in the order of their times, an attempt's number being its place in that order."""
    place = folder / history.FOLDER
    rows = parts = attempts = 0
    waiting = pl.DataFrame(schema=SCHEMA)
    buckets = (spool.take(number) for number in spool.numbers)
    following = next(buckets, None)
    while following is not None:
        bucket, following = following, next(buckets, None)
        numbered = bucket.sort("t_invoke").with_row_index("attempt", offset=attempts + 1)
        attempts += numbered.height
        records = pl.concat([waiting, _records(numbered, folder.name)]).sort("t", maintain_order=True)
        # A completion that comes after the first attempt of the next part belongs behind it.
        until_s = float("inf") if following is None else float(str(following["t_invoke"].min()))
        part, waiting = records.filter(pl.col("t") < until_s), records.filter(pl.col("t") >= until_s)
        name = f"part-{parts:06d}.parquet"
        temporary = place / f"{name}.tmp"
        part.write_parquet(temporary, compression="zstd")
        line = {"file": name, "rows": part.height, "sha256": publish(temporary, place / name)}
        append_line(place / history.MANIFEST, msgspec.json.encode(line).decode())
        rows, parts = rows + part.height, parts + 1
    closing = {"closed": True, "parts": parts, "rows": rows}
    append_line(place / history.MANIFEST, msgspec.json.encode(closing).decode())
    return rows


def _records(attempts: pl.DataFrame, run: str) -> pl.DataFrame:
    """Return the two records of each attempt."""
    named = attempts.with_columns(pl.col("attempt").cast(pl.Int64), pl.lit(run).alias("run"))
    silent = [pl.lit(None, dtype=SCHEMA[name]).alias(name) for name in ANSWERED]
    asked = named.drop("answer_bet", "t_return", "cls").with_columns(
        *silent, pl.lit("invoke").alias("record"), pl.col("t_invoke").alias("t")
    )
    said = [name for name in SCHEMA if name not in {*ANSWERED, "run", "record", "attempt", "client", "t", "bet_id"}]
    answered = named.with_columns(
        *(pl.lit(None, dtype=SCHEMA[name]).alias(name) for name in said),
        pl.col("cls").alias("record"),
        pl.col("t_return").alias("t"),
        pl.col("answer_bet").alias("bet_id"),
    )
    return pl.concat([asked.select(*SCHEMA), answered.select(*SCHEMA)])


def _write_table(name: str, spool: Spool, folder: Path) -> int:
    """Write a table to both snapshots and return its rows in the second."""
    numbers: dict[str, int] = dict.fromkeys(SERVER_NAMES, 0)
    order = ORDER.get(name, ["server", "_at"])

    def shaped(bucket: pl.DataFrame) -> pl.DataFrame:
        rows = bucket.sort(order, maintain_order=True)
        if name == "outbox":
            # Each server numbers its own events; a bucket holds rows of one of them.
            server = str(rows["server"][0])
            rows = rows.with_row_index("id", offset=numbers[server] + 1)
            numbers[server] += rows.height
        elif name == "kafka":
            rows = rows.with_row_index("offset")
        return rows

    def first(rows: pl.DataFrame) -> pl.DataFrame:
        return rows.filter(~pl.col("_final")).select(pl.col(name).cast(kind) for name, kind in COLUMNS[table].items())

    def second(rows: pl.DataFrame) -> pl.DataFrame:
        rows = rows.filter(pl.col("_final")) if table in STATE_OF_A_MOMENT else rows
        return rows.select(pl.col(name).cast(kind) for name, kind in COLUMNS[table].items())

    table = name
    paths = {folder / FIRST_SNAPSHOT / f"{name}.parquet": first, folder / SECOND_SNAPSHOT / f"{name}.parquet": second}
    return write_table(spool, paths, shaped)[folder / SECOND_SNAPSHOT / f"{name}.parquet"]


def _routes() -> pl.DataFrame:
    rows = [
        {"server": server, "shard": shard, "server_name": SERVER_NAMES[ROUTING[shard]], "epoch": 0}
        for server in SERVER_NAMES
        for shard in range(SHARDS)
    ]
    return pl.DataFrame(rows).with_columns((pl.col("server") == pl.col("server_name")).alias("here"))


def _write_timeline(shape: Shape, folder: Path) -> None:
    """Write what happened when, and the backlogs of each second."""
    start_s, end_s = shape.fault_s
    timeline = Timeline(folder, lambda: 0.0)
    for at_s, name in ((0.5, "seed"), (LOAD_FROM_S, "before"), (shape.load_to_s, "drain"), (shape.final_s, "resolve")):
        timeline.record("phase", t=at_s, detail=name)
    for at_s, kind in ((start_s - 0.1, "fault_requested"), (start_s, "fault_start"), (end_s, "fault_end")):
        timeline.record(kind, t=at_s, node="pg1", fault="kill", fault_id=1)
    series = Series(folder, lambda: 0.0, flush_interval_s=float("inf"))
    for second in np.arange(LOAD_FROM_S, shape.final_s):
        down = start_s <= second <= end_s
        for node in ("matcher", "projector", "settler"):
            series.add("kafka_consumer_lag", 40.0 if second < shape.load_to_s else 0.0, node=node, t=float(second))
        for node in SERVER_NAMES:
            backlog = (400.0 if down and node == "pg1" else 12.0) if second < shape.load_to_s else 0.0
            series.add("outbox_unpublished", backlog, node=node, t=float(second))
    series.close()


def _write_facts(shape: Shape, folder: Path, sizes: dict[str, int], bets_per_s: float) -> None:
    """Write config.json and harness.json."""
    service = {
        "servers": [{"name": name, "host": "127.0.0.1", "port": 1} for name in SERVER_NAMES],
        "routing": ROUTING,
        "commission_bps": COMMISSION_BPS,
    }
    config: dict[str, Any] = {
        "synthetic": {"rows": shape.rows, "seed": shape.seed, "mix": shape.mix, "plant": shape.plant},
        "operations": list(OPERATIONS),
        "service": service,
    }
    (folder / CONFIG_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
    attempts = shape.attempts
    facts = HarnessFacts(
        run=folder.name,
        seed=shape.seed,
        commit=commit(),
        version=__version__,
        machine=dict(describe_machine()),
        started_at=datetime.fromtimestamp(ORIGIN_UNIX_S, UTC).isoformat(timespec="seconds"),
        origin_unix=ORIGIN_UNIX_S,
        config=config,
        rate=bets_per_s,
        load_start_s=LOAD_FROM_S,
        load_end_s=shape.load_to_s,
        generator=GeneratorFacts(lag_p99_ms=0.0, late=0, dropped=0, scheduled=attempts, sent=attempts),
        drained=True,
        finished=True,
        sizes=sizes,
        reconciliation=ReconciliationFacts(passes=1),
    )
    assess.write_facts(folder, facts)
