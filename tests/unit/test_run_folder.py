"""A run folder is read as it was written, and every part that is absent or damaged is named."""

import json
from pathlib import Path

import polars as pl
import pytest
from honest_world import ROUTING, SERVERS, World, frames, small_world

from invariants.history import HistoryRecord, Recorder
from invariants.run import load_run
from invariants.snapshot import SERVERS_READ, MissingEvidence, Snapshot
from invariants.timeline import Timeline
from invariants.verdict import Verdict, judge

SERVICE = {"servers": [{"name": name, "host": "127.0.0.1", "port": 1} for name in SERVERS], "routing": ROUTING}


def written(world: World, folder: Path, config: dict[str, object] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps({"service": SERVICE} if config is None else config))
    recorder = Recorder(folder, "r1", flush_interval_s=3600.0)
    for row in world.history:
        recorder.append(HistoryRecord(**row))  # type: ignore[typeddict-item]
    recorder.close()
    timeline = Timeline(folder, lambda: 0.0)
    for row in world.timeline:
        timeline.record(row.pop("kind"), **row)
    for name in ("snapshot-1", "snapshot-2"):
        (folder / name).mkdir()
        for table, frame in frames(world.tables).items():
            frame.write_parquet(folder / name / f"{table}.parquet")
    return folder


def test_run_folder_of_an_honest_run_passes(tmp_path: Path) -> None:
    judgement = judge(load_run(written(small_world(), tmp_path)))
    assert (judgement.reasons, judgement.verdict) == ([], Verdict.PASS)


def test_service_configuration_may_stand_at_the_top(tmp_path: Path) -> None:
    config = load_run(written(small_world(), tmp_path, SERVICE | {"projection_stale_after_ms": 250})).config
    assert config.servers == SERVERS
    assert config.stale_after_s == 0.25


@pytest.mark.parametrize("text", ["", "{}", '{"service": {"servers": 3}}'])
def test_configuration_that_does_not_fit_is_named(tmp_path: Path, text: str) -> None:
    written(small_world(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MissingEvidence, match=r"config\.json"):
        load_run(tmp_path)


def test_removed_table_makes_the_run_invalid_by_name(tmp_path: Path) -> None:
    written(small_world(), tmp_path)
    (tmp_path / "snapshot-2" / "fills.parquet").unlink()
    judgement = judge(load_run(tmp_path))
    assert judgement.verdict is Verdict.INVALID
    assert judgement.unchecked["A28"] == "snapshot-2 has no table fills"
    assert "V05" in {w.code for w in judgement.witnesses}


def test_unreadable_table_makes_the_run_invalid_by_name(tmp_path: Path) -> None:
    written(small_world(), tmp_path)
    (tmp_path / "snapshot-2" / "fills.parquet").write_bytes(b"not parquet")
    assert "snapshot-2 table fills cannot be read" in judge(load_run(tmp_path)).unchecked["A28"]


def test_table_without_a_column_is_named() -> None:
    snapshot = Snapshot("s", None, {"redis": pl.DataFrame({"user_id": [1], "seq": [1]})})
    with pytest.raises(MissingEvidence, match="redis lacks the columns balance"):
        snapshot.table("redis")


def test_table_with_a_column_of_another_type_is_named() -> None:
    snapshot = Snapshot("s", None, {"redis": pl.DataFrame({"user_id": ["x"], "seq": [1], "balance": [1]})})
    with pytest.raises(MissingEvidence, match="redis has a column of another type"):
        snapshot.table("redis")


def test_empty_table_without_columns_has_no_rows() -> None:
    assert Snapshot("s", None, {"redis": pl.DataFrame()}).table("redis").is_empty()


def test_list_of_servers_read_counts_before_the_rows(tmp_path: Path) -> None:
    written(small_world(), tmp_path)
    for name in ("snapshot-1", "snapshot-2"):
        (tmp_path / name / SERVERS_READ).write_text('["pg0"]')
    judgement = judge(load_run(tmp_path))
    assert "pg1 was not read" in {w.text for w in judgement.witnesses}
    assert judgement.unresolved == 1
