"""Which combinations of fault, operation and phase a run has hit: what was tried, beside what only held by luck.

A cell counts the attempts of one operation that were begun in one phase and met one fault: under way in its measured
window, or, for a failpoint, under way when it acted or answered within ACTED_S before (what stands behind an answer is
done after it). Attempts that met none count under the fault `none`.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import polars as pl

from invariants import history
from invariants.files import publish
from invariants.timeline import PHASES, load_timeline
from ledgerproof.sla import faults_of
from reference.failpoints import CATALOGUE

CELLS_FILE: Final = "cells.json"
FAILPOINTS_FILE: Final = "failpoints.json"
ACTED_S: Final = 1.0
NONE: Final = "none"


class Cell(msgspec.Struct, frozen=True, order=True):
    """One combination; `unknown` of its attempts got no answer."""

    fault: str
    operation: str
    phase: str
    attempts: int
    unknown: int


class Cells(msgspec.Struct):
    """The cells of one run, or of several together."""

    runs: int = 1
    cells: list[Cell] = []
    hits: dict[str, int] = {}
    """Hits of each failpoint, over all nodes; empty where a run had none."""
    fired: dict[str, int] = {}
    """How often each failpoint did something, as `exit relay.after_send_before_mark`."""

    @property
    def never_hit(self) -> list[str]:
        """Failpoints that no process passed."""
        return [name for name in CATALOGUE if not self.hits.get(name)]


class _Act(msgspec.Struct):
    t: float
    node: str
    point: str
    action: str


class _Failpoints(msgspec.Struct):
    hits: dict[str, dict[str, int]] = {}
    fired: list[_Act] = []


def cells_of(folder: Path) -> Cells:
    """Return the cells of a run folder. Raises OSError, polars or msgspec errors for damaged evidence."""
    path = folder / FAILPOINTS_FILE
    points = msgspec.json.decode(path.read_bytes(), type=_Failpoints) if path.exists() else _Failpoints()
    timeline = load_timeline(folder)
    attempts = _with_phase(history.attempts(history.load(folder).frame), timeline)
    windows = [
        (
            f"{fault.kind} {fault.target.rstrip('0123456789')}",
            fault.requested_at if fault.measured_start is None else fault.measured_start,
            fault.measured_end if fault.measured_end is not None else fault.healed_at,
        )
        for fault in faults_of(timeline)
    ]
    windows += [(f"{act.action} {act.point}", act.t - ACTED_S, act.t) for act in points.fired]
    counted: Counter[tuple[str, str, str]] = Counter()
    unknown: Counter[tuple[str, str, str]] = Counter()
    met = pl.lit(False)
    for name, start_s, end_s in windows:
        inside = (pl.col("t_return") >= start_s) & (pl.col("t_invoke") <= (float("inf") if end_s is None else end_s))
        met = met | inside
        _count(attempts.filter(inside), name, counted, unknown)
    _count(attempts.filter(~met), NONE, counted, unknown)
    hits: Counter[str] = Counter()
    for of_node in points.hits.values():
        hits.update(of_node)
    fired = Counter(f"{act.action} {act.point}" for act in points.fired)
    cells = sorted(Cell(*where, number, unknown[where]) for where, number in counted.items())
    return Cells(1, cells, dict(sorted(hits.items())), dict(sorted(fired.items())))


def _with_phase(attempts: pl.DataFrame, timeline: pl.DataFrame) -> pl.DataFrame:
    """Add the phase in which each attempt was begun."""
    phases = timeline.filter(pl.col("kind") == "phase").select("t", pl.col("detail").alias("phase")).sort("t")
    begun = attempts.select("op", "cls", "t_invoke", "t_return").sort("t_invoke")
    joined = begun.join_asof(phases, left_on="t_invoke", right_on="t", strategy="backward")
    # What never came back was under way to the end.
    return joined.with_columns(pl.col("phase").fill_null(PHASES[0]), pl.col("t_return").fill_null(float("inf")))


def _count(
    frame: pl.DataFrame,
    fault: str,
    counted: Counter[tuple[str, str, str]],
    unknown: Counter[tuple[str, str, str]],
) -> None:
    grouped = frame.group_by("op", "phase").agg(pl.len().alias("n"), (pl.col("cls") == "info").sum().alias("unknown"))
    for op, phase, number, lost in grouped.iter_rows():
        counted[fault, op, phase] += number
        unknown[fault, op, phase] += lost


def together(many: Sequence[Cells]) -> Cells:
    """Add up the cells of several runs."""
    attempts: Counter[tuple[str, str, str]] = Counter()
    unknown: Counter[tuple[str, str, str]] = Counter()
    hits: Counter[str] = Counter()
    fired: Counter[str] = Counter()
    for one in many:
        for cell in one.cells:
            attempts[cell.fault, cell.operation, cell.phase] += cell.attempts
            unknown[cell.fault, cell.operation, cell.phase] += cell.unknown
        hits.update(one.hits)
        fired.update(one.fired)
    cells = sorted(Cell(*where, number, unknown[where]) for where, number in attempts.items())
    return Cells(sum(one.runs for one in many), cells, dict(sorted(hits.items())), dict(sorted(fired.items())))


def empty_cells(cells: Cells) -> list[tuple[str, str]]:
    """Return the pairs of a fault and an operation, both of which occurred, that never met in any phase."""
    faults = {cell.fault for cell in cells.cells} - {NONE}
    operations = {cell.operation for cell in cells.cells}
    met = {(cell.fault, cell.operation) for cell in cells.cells}
    return sorted((fault, operation) for fault in faults for operation in operations if (fault, operation) not in met)


def as_json(cells: Cells) -> dict[str, Any]:
    """Return what cells.json and `ledgerproof cells --json` hold."""
    return {
        **msgspec.to_builtins(cells),
        "never_hit": cells.never_hit,
        "never_met": [list(pair) for pair in empty_cells(cells)],
    }


def write_cells(folder: Path) -> None:
    """Write cells.json of a run folder. Raises as `cells_of`."""
    text = msgspec.json.format(msgspec.json.encode(as_json(cells_of(folder))), indent=2)
    temporary = folder / f"{CELLS_FILE}.tmp"
    temporary.write_bytes(text + b"\n")
    publish(temporary, folder / CELLS_FILE)
