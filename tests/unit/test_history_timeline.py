"""Timeline and series are complete files at every moment, ordered by time."""

import math
from pathlib import Path

import pytest

from invariants.timeline import Series, Timeline, load_series, load_timeline


class Clock:
    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self) -> float:
        self.t += 1.0
        return self.t


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, Clock())
    assert math.isclose(timeline.phase("seed"), 1.0)
    timeline.record("fault_requested", node="pg0", fault="kill", fault_id=1)
    timeline.note("something to know")
    assert load_timeline(tmp_path).equals(timeline.frame())
    assert load_timeline(tmp_path)["kind"].to_list() == ["phase", "fault_requested", "note"]


def test_edge_measured_later_is_put_in_its_place(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, Clock())
    timeline.phase("seed")
    timeline.phase("before")
    timeline.record("fault_start", t=1.5, node="pg0", fault="kill", fault_id=1)
    assert load_timeline(tmp_path)["t"].to_list() == [1.0, 1.5, 2.0]


@pytest.mark.parametrize("call", [lambda t: t.record("earthquake"), lambda t: t.phase("lunch")])
def test_unknown_name_is_refused(tmp_path: Path, call: object) -> None:
    with pytest.raises(ValueError, match="no such"):
        call(Timeline(tmp_path, Clock()))  # type: ignore[operator]


def test_absent_files_are_empty_frames(tmp_path: Path) -> None:
    assert load_timeline(tmp_path).is_empty()
    assert load_series(tmp_path).is_empty()


def test_series_is_written_when_due_and_on_close(tmp_path: Path) -> None:
    lazy = Series(tmp_path, Clock())
    lazy.add("in_flight", 3)
    assert load_series(tmp_path).is_empty()
    lazy.close()
    assert load_series(tmp_path).rows() == [(1.0, "in_flight", None, 3.0)]
    eager = Series(tmp_path, Clock(), flush_interval_s=0.0)
    eager.add("rss_mb", 120.5, node="api0", t=9.0)
    assert load_series(tmp_path).rows() == [(9.0, "rss_mb", "api0", 120.5)]
