"""Snapshots of a stack that earlier runs have used: what was there before this run began is left out.

The run's own checks then see a world that began with it. Offsets of topics count from where the topics ended when the
run began, so that a hole in them still shows.
"""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import polars as pl

from invariants.files import publish
from invariants.snapshot import SERVERS_READ
from ledgerproof.collect import snapshot
from ledgerproof.ending import Copy
from reference.config import ServiceConfig

BY_MATCH: Final = ("matches", "transitions", "orders", "fills", "settlements", "cancels")
BY_WALLET: Final = ("ledger", "bets", "refusals", "projection", "redis")


def later_than(config: ServiceConfig, baseline: Path, work: Path) -> Copy:
    """Return what copies everything that came after the whole snapshot in `baseline`.

    Whole snapshots are kept below `work`, the newest under the name of the copy it was for.
    """

    async def copy(folder: Path, show: Callable[[str], None], earlier: Path | None) -> dict[str, int]:
        whole = work / folder.name
        whole.mkdir(parents=True)
        await snapshot(config, whole, show, baseline if earlier is None else work / earlier.name)
        return await asyncio.to_thread(cut, whole, baseline, folder)

    return copy


def cut(whole: Path, baseline: Path, into: Path) -> dict[str, int]:
    """Write the snapshot `whole` without what `baseline` has into a folder that exists; return rows by table."""
    known_matches = pl.read_parquet(baseline / "matches.parquet")["match_id"].unique()
    known_wallets = pl.concat(
        pl.read_parquet(baseline / f"{table}.parquet")["user_id"] for table in ("ledger", "refusals")
    ).unique()
    sizes = {}
    for path in sorted(whole.glob("*.parquet")):
        frame, table = pl.read_parquet(path), path.stem
        if table in BY_MATCH:
            frame = frame.filter(~pl.col("match_id").is_in(known_matches.implode()))
        elif table in BY_WALLET:
            frame = frame.filter(~pl.col("user_id").is_in(known_wallets.implode()))
        elif table == "outbox":
            frame = _later_events(frame, pl.read_parquet(baseline / path.name))
        elif table == "kafka":
            frame = _later_records(frame, pl.read_parquet(baseline / path.name))
        temporary = into / f"{path.name}.tmp"
        frame.write_parquet(temporary, compression="zstd")
        publish(temporary, into / path.name)
        sizes[table] = frame.height
    shutil.copyfile(whole / SERVERS_READ, into / SERVERS_READ)
    return sizes


def _later_events(frame: pl.DataFrame, before: pl.DataFrame) -> pl.DataFrame:
    """Leave out the rows of the outbox that were there; the service was at rest, so none can commit late."""
    return frame.join(before.select("server", "id"), on=["server", "id"], how="anti", maintain_order="left")


def _later_records(frame: pl.DataFrame, before: pl.DataFrame) -> pl.DataFrame:
    ends = before.group_by("topic", "partition").agg((pl.col("offset").max() + 1).alias("_end"))
    offset = pl.col("offset") - pl.col("_end").fill_null(0)
    joined = frame.join(ends, on=["topic", "partition"], how="left", maintain_order="left")
    return joined.with_columns(offset.alias("offset")).filter(pl.col("offset") >= 0).drop("_end")
