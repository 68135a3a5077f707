"""Cells: attempts are counted under the faults that they met, by operation and phase."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from invariants.history import Recorder
from invariants.timeline import Timeline
from ledgerproof.cells import FAILPOINTS_FILE, Cell, as_json, cells_of, empty_cells, together, write_cells
from ledgerproof.cells_command import cells_command
from reference.failpoints import CATALOGUE


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A kill of pg1 from 10 to 12 s, a relay that died at 20 s, and attempts around both."""
    recorder, timeline = Recorder(tmp_path, "test"), Timeline(tmp_path, lambda: 0.0)
    number = 0

    def attempt(op: str, began: float, ended: float | None, record: str = "ok") -> None:
        nonlocal number
        number += 1
        recorder.append({"record": "invoke", "attempt": number, "client": 1, "op": op, "t": began, "intended": began})
        if ended is not None:
            recorder.append({"record": record, "attempt": number, "client": 1, "t": ended})

    attempt("deposit", 1.0, 1.1)
    attempt("bet", 9.9, 10.1, "info")
    attempt("bet", 11.0, 11.1)
    attempt("bet", 12.5, 12.6)
    attempt("deposit", 19.5, 19.6)
    attempt("deposit", 18.0, 18.1)
    attempt("withdraw", 19.9, None)
    recorder.close()
    for t, phase in ((0.5, "seed"), (5.0, "before"), (10.0, "fault"), (12.0, "after")):
        timeline.record("phase", t=t, detail=phase)
    for kind, t in (("fault_requested", 9.9), ("fault_start", 10.0), ("heal_requested", 11.9), ("fault_end", 12.0)):
        timeline.record(kind, t=t, node="pg1", fault="kill", fault_id=1)
    (tmp_path / FAILPOINTS_FILE).write_text(
        json.dumps(
            {
                "hits": {"relay0": {"relay.after_send_before_mark": 3}, "relay1": {"relay.after_send_before_mark": 1}},
                "fired": [{"t": 20.0, "node": "relay0", "point": "relay.after_send_before_mark", "action": "exit"}],
            }
        )
    )
    return tmp_path


def test_attempts_count_under_the_faults_they_met(run: Path) -> None:
    found = cells_of(run)
    relay = "exit relay.after_send_before_mark"
    assert found.cells == [
        Cell(relay, "deposit", "after", 1, 0),
        Cell(relay, "withdraw", "after", 1, 1),
        Cell("kill pg", "bet", "before", 1, 1),
        Cell("kill pg", "bet", "fault", 1, 0),
        Cell("none", "bet", "after", 1, 0),
        Cell("none", "deposit", "after", 1, 0),
        Cell("none", "deposit", "seed", 1, 0),
    ]
    assert found.hits == {"relay.after_send_before_mark": 4}
    assert found.fired == {relay: 1}
    assert len(found.never_hit) == len(CATALOGUE) - 1
    assert ("kill pg", "deposit") in empty_cells(found)
    assert ("kill pg", "bet") not in empty_cells(found)


def test_runs_add_up(run: Path) -> None:
    one = cells_of(run)
    two = together([one, one])
    assert two.runs == 2
    assert [cell.attempts for cell in two.cells] == [2 * cell.attempts for cell in one.cells]
    assert two.hits == {"relay.after_send_before_mark": 8}


def test_the_command_prints_what_the_file_holds(run: Path) -> None:
    write_cells(run)
    stored = json.loads((run / "cells.json").read_text())
    said = CliRunner().invoke(cells_command, [str(run), "--json"], standalone_mode=False)
    assert json.loads(said.output) == stored == as_json(cells_of(run))
    table = CliRunner().invoke(cells_command, [str(run)], standalone_mode=False)
    assert "7 cells in 1 runs" in table.output
    assert "never met: " in table.output


def test_a_run_without_failpoints_has_cells_and_no_points(run: Path) -> None:
    (run / FAILPOINTS_FILE).unlink()
    found = cells_of(run)
    assert found.hits == found.fired == {}
    assert Cell("kill pg", "bet", "fault", 1, 0) in found.cells
