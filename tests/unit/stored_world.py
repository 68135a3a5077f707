"""Stores a world as a run folder, as the main job leaves it."""

import json
from pathlib import Path
from typing import Any

import polars as pl
from honest_world import ORIGIN_UNIX_S, ROUTING, SERVERS, World, frame, frames

from invariants.history import Recorder
from invariants.timeline import SERIES_SCHEMA, TIMELINE_SCHEMA
from ledgerproof.assess import HarnessFacts, write_facts


def store(world: World, folder: Path, *, evidence: int | None = None) -> Path:
    """Write the folder and return it; without `evidence` it says nothing of it, as runs of the first version did."""
    folder.mkdir(parents=True)
    recorder = Recorder(folder, folder.name)
    for row in world.history:
        recorder.append(row)  # type: ignore[arg-type]
    recorder.close()
    frame(world.timeline, TIMELINE_SCHEMA).sort("t").write_parquet(folder / "timeline.parquet")
    frame(world.series, SERIES_SCHEMA).sort("t").write_parquet(folder / "series.parquet")
    for name, tables in (("snapshot-1", world.tables), ("snapshot-2", world.second)):
        if tables is not None:
            (folder / name).mkdir()
            for table, rows in frames(tables).items():
                rows.write_parquet(folder / name / f"{table}.parquet")
            (folder / name / "servers.json").write_text(json.dumps(SERVERS))
    service: dict[str, Any] = {"servers": [{"name": name} for name in SERVERS], "routing": ROUTING}
    config: dict[str, Any] = {"service": service, "origin_unix": ORIGIN_UNIX_S}
    if evidence is not None:
        config["evidence"] = evidence
    (folder / "config.json").write_text(json.dumps(config))
    write_facts(
        folder,
        HarnessFacts(
            run=folder.name,
            seed=1,
            commit="abc",
            version="0.1.0",
            machine={},
            started_at="2023-11-14T22:13:20+00:00",
            origin_unix=ORIGIN_UNIX_S,
            config=config,
            rate=1.0,
            load_start_s=0.0,
            load_end_s=world.t,
            drained=True,
            finished=True,
        ),
    )
    return folder


def without(folder: Path, table: str, *columns: str) -> None:
    """Remove columns from a table of the first snapshot, or the whole table, as an older run would have it."""
    path = folder / "snapshot-1" / f"{table}.parquet"
    if columns:
        pl.read_parquet(path).drop(columns).write_parquet(path)
    else:
        path.unlink()
