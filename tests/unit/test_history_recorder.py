"""The recorder keeps what it was given, and a damaged recording says how it is damaged."""

import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from invariants import history
from invariants.history import HistoryRecord, Recorder, RecordingError, load

SLOW_S = 3600.0
"""A flush interval no test reaches: parts appear only where a test flushes."""


def invoke(attempt: int, t: float = 1.0) -> HistoryRecord:
    return {"record": "invoke", "attempt": attempt, "t": t, "op": "deposit", "user": 7, "key": f"k{attempt}"}


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.01)


def recorded(folder: Path, parts: int = 2) -> Path:
    """Record `parts` parts of three records each, close, and return the history folder."""
    recorder = Recorder(folder, "r1", flush_interval_s=SLOW_S)
    for part in range(parts):
        for number in range(3):
            recorder.append(invoke(part * 3 + number))
        recorder.flush()
    recorder.close()
    return folder / "history"


def test_everything_appended_comes_back_in_order(tmp_path: Path) -> None:
    recorded(tmp_path)
    report = load(tmp_path)
    assert report.problems() == []
    assert report.frame["attempt"].to_list() == [0, 1, 2, 3, 4, 5]
    assert report.frame["run"].unique().to_list() == ["r1"]
    assert dict(report.frame.schema) == history.SCHEMA


def test_flusher_writes_without_being_asked(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "r1", flush_interval_s=0.01)
    recorder.append(invoke(1))
    wait_until(lambda: load(tmp_path).frame.height == 1)
    recorder.close()


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "r1")
    recorder.append(invoke(1))
    recorder.close()
    recorder.close()
    assert load(tmp_path).problems() == []


def test_empty_recording_is_whole(tmp_path: Path) -> None:
    Recorder(tmp_path, "r1").close()
    report = load(tmp_path)
    assert report.problems() == []
    assert report.frame.height == 0


def test_recording_that_was_never_closed_says_so(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "r1", flush_interval_s=SLOW_S)
    recorder.append(invoke(1))
    recorder.flush()
    recorder.append(invoke(2))
    report = load(tmp_path)
    assert report.frame.height == 1
    assert not report.closed
    assert "never closed" in report.problems()[0]
    recorder.close()


def test_absent_recording_says_so(tmp_path: Path) -> None:
    assert load(tmp_path).problems() != []


def test_last_buffer_dropped_is_noticed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "r1", flush_interval_s=SLOW_S)
    recorder.append(invoke(1))
    recorder.flush()
    recorder.append(invoke(2))
    recorder._buffer.clear()
    recorder.close()
    assert load(tmp_path).lost_rows == 1
    assert load(tmp_path).problems() == ["1 records were taken but not written"]


def test_flipped_byte_is_corrupt(tmp_path: Path) -> None:
    part = recorded(tmp_path) / "part-000000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    report = load(tmp_path)
    assert report.corrupt == ["part-000000.parquet"]
    assert report.frame.height == 3


def test_removed_part_is_missing(tmp_path: Path) -> None:
    (recorded(tmp_path) / "part-000001.parquet").unlink()
    assert load(tmp_path).missing == ["part-000001.parquet"]


def test_history_cut_by_a_row_is_corrupt(tmp_path: Path) -> None:
    part = recorded(tmp_path) / "part-000000.parquet"
    pl.read_parquet(part).head(2).write_parquet(part)
    assert load(tmp_path).corrupt == ["part-000000.parquet"]


def test_part_without_manifest_line_is_unfinished_and_not_counted(tmp_path: Path) -> None:
    manifest = recorded(tmp_path) / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text(lines[0] + "\n")
    report = load(tmp_path)
    assert report.unfinished == ["part-000001.parquet"]
    assert report.frame.height == 3


def test_torn_manifest_line_is_corrupt(tmp_path: Path) -> None:
    manifest = recorded(tmp_path) / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-10])
    report = load(tmp_path)
    assert report.corrupt == ["manifest.jsonl line 3"]
    assert not report.closed


def test_unknown_column_is_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "r1", flush_interval_s=SLOW_S)
    with pytest.raises(RecordingError, match="colour"):
        recorder.append({"record": "invoke", "attempt": 1, "t": 0.0, "colour": "red"})  # type: ignore[typeddict-unknown-key]
    recorder.close()


def test_append_after_close_is_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "r1", flush_interval_s=SLOW_S)
    recorder.close()
    with pytest.raises(RecordingError, match="closed"):
        recorder.append(invoke(1))


def test_second_recording_in_one_folder_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path)
    with pytest.raises(RecordingError, match="already holds a recording"):
        Recorder(tmp_path, "r2")


def test_failed_write_is_raised_to_whoever_appends_next(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "r1", flush_interval_s=SLOW_S)
    (tmp_path / "history").rmdir()
    recorder.append(invoke(1))
    with pytest.raises(RecordingError, match="could not be written"):
        recorder.flush()
    with pytest.raises(RecordingError, match="could not be written"):
        recorder.append(invoke(2))
    with pytest.raises(RecordingError, match="could not be written"):
        recorder.close()


def test_value_of_the_wrong_type_is_an_error_and_not_a_null(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "r1", flush_interval_s=SLOW_S)
    recorder.append({"record": "invoke", "attempt": 1, "t": 0.0, "user": "ann"})  # type: ignore[typeddict-item]
    with pytest.raises(RecordingError):
        recorder.flush()


def rows(*records: HistoryRecord) -> pl.DataFrame:
    return pl.DataFrame([{n: r.get(n) for n in history.SCHEMA} for r in records], schema=history.SCHEMA)


def test_attempt_without_completion_is_unknown_for_ever() -> None:
    attempt = history.attempts(rows(invoke(1))).row(0, named=True)
    assert (attempt["cls"], attempt["t_invoke"], attempt["t_return"]) == ("info", 1.0, float("inf"))


def test_attempt_joins_its_request_and_its_answer() -> None:
    done: HistoryRecord = {
        "record": "ok",
        "attempt": 1,
        "t": 2.5,
        "seq": 4,
        "balance": 90,
        "bet_id": "b",
        "status": 202,
    }
    attempt = history.attempts(rows(invoke(1), invoke(2), done)).row(0, named=True)
    assert attempt["key"] == "k1"
    assert (attempt["cls"], attempt["t_return"], attempt["seq"], attempt["answer_bet_id"]) == ("ok", 2.5, 4, "b")
    assert attempt["bet_id"] is None


def test_first_of_two_completions_counts() -> None:
    first: HistoryRecord = {"record": "ok", "attempt": 1, "t": 2.0}
    second: HistoryRecord = {"record": "info", "attempt": 1, "t": 3.0}
    assert history.attempts(rows(invoke(1), first, second))["cls"].to_list() == ["ok"]
