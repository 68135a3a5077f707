"""The timeline and the measured series of a run, on the same clock as its history.

Both are small, so each flush rewrites the whole file under another name and renames it: a reader always
finds a complete Parquet file, at most one flush interval old.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import polars as pl

from invariants.files import publish

TIMELINE_FILE: Final = "timeline.parquet"
SERIES_FILE: Final = "series.parquet"
SERIES_FLUSH_INTERVAL_S: Final = 10.0

TIMELINE_SCHEMA: Final[dict[str, pl.DataType]] = {
    "t": pl.Float64(),
    "kind": pl.String(),
    "node": pl.String(),
    "fault": pl.String(),
    "fault_id": pl.Int32(),
    "detail": pl.String(),
}
SERIES_SCHEMA: Final[dict[str, pl.DataType]] = {
    "t": pl.Float64(),
    "name": pl.String(),
    "node": pl.String(),
    "value": pl.Float64(),
}
KINDS: Final = frozenset(
    {
        "phase",
        "fault_requested",
        "fault_start",
        "fault_end",
        "heal_requested",
        "process_start",
        "process_death",
        "note",
        "drift_planted",
        "drift_measured",
        "drift_repaired",
        "primary",
        "primary_write",
    }
)
"""What a row can be. Of a drift that the run plants, `detail` is JSON (`Run.drifts`). `primary`: `node`, a server of
the service, has from `t` on the primary that `detail` names, JSON `{"member": "pg0b", "term": 2}`; `primary_write`: a
member was seen to commit under a term, JSON `{"member": …, "term": …, "user": …, "seq": …}`, the last two if known."""

PHASES: Final = ("seed", "before", "fault", "recovery", "after", "drain", "resolve", "check")


def _write(path: Path, frame: pl.DataFrame) -> None:
    temporary = path.with_name(path.name + ".tmp")
    frame.write_parquet(temporary, compression="zstd")
    publish(temporary, path)


class Timeline:
    """Records phases, faults, process starts and deaths, and notes. Thread-safe; every row is durable at once.

    Rows are few (hundreds), so each one rewrites the file: after a crash the reader knows the last fault.
    """

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        """Record under `folder` (created). `clock` returns seconds since the run's origin. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / TIMELINE_FILE
        self._clock = clock
        self._rows: list[tuple[float, str, str | None, str | None, int | None, str | None]] = []
        self._lock = threading.Lock()

    def record(
        self,
        kind: str,
        *,
        t: float | None = None,
        node: str | None = None,
        fault: str | None = None,
        fault_id: int | None = None,
        detail: str | None = None,
    ) -> float:
        """Add one row, at `t` seconds or now, and return its time. Raises ValueError for an unknown kind, OSError."""
        if kind not in KINDS:
            raise ValueError(f"no such timeline kind: {kind}")
        with self._lock:
            at = self._clock() if t is None else t
            self._rows.append((at, kind, node, fault, fault_id, detail))
            _write(self._path, self._frame())
        return at

    def phase(self, name: str) -> float:
        """Say that phase `name` begins now and return the time. Raises ValueError for an unknown phase, OSError."""
        if name not in PHASES:
            raise ValueError(f"no such phase: {name}")
        return self.record("phase", detail=name)

    def note(self, text: str, node: str | None = None) -> float:
        """Add a remark for the reader of the report and return its time. Raises OSError."""
        return self.record("note", node=node, detail=text)

    def frame(self) -> pl.DataFrame:
        """Return the rows so far, by time."""
        with self._lock:
            return self._frame()

    def _frame(self) -> pl.DataFrame:
        # Measured edges are recorded when they are known, which may be after later rows; hence the sort.
        return pl.DataFrame(self._rows, schema=TIMELINE_SCHEMA, orient="row").sort("t", maintain_order=True)


class Series:
    """Records measured values over time. Thread-safe; written every `flush_interval_s` and on `close`."""

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float],
        flush_interval_s: float = SERIES_FLUSH_INTERVAL_S,
    ) -> None:
        """Record under `folder` (created). `clock` returns seconds since the run's origin. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / SERIES_FILE
        self._clock = clock
        self._flush_interval_s = flush_interval_s
        self._written_at = time.monotonic()
        self._rows: list[tuple[float, str, str | None, float]] = []
        self._lock = threading.Lock()

    def add(self, name: str, value: float, *, node: str | None = None, t: float | None = None) -> None:
        """Add one value, at `t` seconds or now. Raises OSError when it is time to write and that fails."""
        with self._lock:
            self._rows.append((self._clock() if t is None else t, name, node, float(value)))
            due = time.monotonic() - self._written_at >= self._flush_interval_s
        if due:
            self.flush()

    def flush(self) -> None:
        """Write all values so far. Raises OSError."""
        with self._lock:
            _write(self._path, self._frame())
            self._written_at = time.monotonic()

    def close(self) -> None:
        """Write all values; the recorder may still be used afterwards. Raises OSError."""
        self.flush()

    def frame(self) -> pl.DataFrame:
        """Return the values so far, by time."""
        with self._lock:
            return self._frame()

    def _frame(self) -> pl.DataFrame:
        return pl.DataFrame(self._rows, schema=SERIES_SCHEMA, orient="row").sort("t", maintain_order=True)


def load_timeline(folder: Path) -> pl.DataFrame:
    """Read the timeline of a run; empty if it was never written. Raises polars errors for a damaged file."""
    return _load(folder / TIMELINE_FILE, TIMELINE_SCHEMA)


def load_series(folder: Path) -> pl.DataFrame:
    """Read the series of a run; empty if none was written. Raises polars errors for a damaged file."""
    return _load(folder / SERIES_FILE, SERIES_SCHEMA)


def _load(path: Path, schema: dict[str, pl.DataType]) -> pl.DataFrame:
    if not path.exists():
        return pl.DataFrame(schema=schema)
    return pl.read_parquet(path).select(pl.col(name).cast(kind) for name, kind in schema.items())
