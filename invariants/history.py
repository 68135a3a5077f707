"""The history of a run: every client attempt as an invoke record and at most one completion, kept durably.

One clock for all of it: seconds since the origin of the run, by `time.monotonic()`. Records go to
`history/part-NNNNNN.parquet`; a part counts once its line, with row count and sha256, is in
`history/manifest.jsonl`, and the recording is complete once the closing line is there too. A killed
harness therefore loses at most one flush interval, and `load` says that it did.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NotRequired, Required, TypedDict

import msgspec
import polars as pl

from invariants.files import append_line, publish, sha256_of

FOLDER: Final = "history"
MANIFEST: Final = "manifest.jsonl"
FLUSH_INTERVAL_S: Final = 1.0
CLOSE_TIMEOUT_S: Final = 60.0
"""How long `close` waits for the flusher's last part; a disk slower than this is an error, not a wait."""

FINAL_RETRY: Final = "final_retry"
"""Tag of the attempts that retry half of the unknown keys after the first snapshot."""

HUNG_UP: Final = "impatient"
"""Tag of the attempts whose client hung up on purpose. Their unknown outcome is real, and resolved like any
other, but the workload made it: it is no evidence that a fault had any effect."""

SCHEMA: Final[dict[str, pl.DataType]] = {
    "run": pl.String(),
    "record": pl.String(),
    "attempt": pl.Int64(),
    "client": pl.Int32(),
    "op": pl.String(),
    "key": pl.String(),
    "payload_hash": pl.String(),
    "user": pl.Int64(),
    "api": pl.String(),
    "match_id": pl.String(),
    "bet_id": pl.String(),
    "selection": pl.String(),
    "side": pl.String(),
    "odds": pl.Int32(),
    "amount": pl.Int64(),
    "min_seq": pl.Int64(),
    "intended": pl.Float64(),
    "t": pl.Float64(),
    "status": pl.Int16(),
    "outcome": pl.String(),
    "replayed": pl.Boolean(),
    "seq": pl.Int64(),
    "balance": pl.Int64(),
    "source": pl.String(),
    "stale": pl.Boolean(),
    "error": pl.String(),
    "tag": pl.String(),
    "strong": pl.Boolean(),
    "after_seq": pl.Int64(),
    "as_of": pl.Float64(),
    "page_rows": pl.Int32(),
    "page_cut": pl.Boolean(),
}
"""Columns of a history record. Money in minor units, odds in hundredths, `intended` and `t` in seconds.

Of reads: `strong`, whether a balance was asked of the ledger; `as_of`, the moment (Unix seconds by the database's
clock) before which the answer says it lacks nothing; of a page of entries `after_seq`, where it was to begin,
`page_rows`, how many came, and `page_cut`, whether there are more; `seq` and `balance` are then those of its last
entry."""

ANSWERED: Final = (
    "status",
    "outcome",
    "replayed",
    "seq",
    "balance",
    "source",
    "stale",
    "error",
    "as_of",
    "page_rows",
    "page_cut",
)
"""Columns that the completion of an attempt says; all others are said by its invoke record."""

ADDED: Final = frozenset({"strong", "after_seq", "as_of", "page_rows", "page_cut"})
"""Columns that older recordings do not have; they read as null (`LoadReport.lacking`)."""

_COLUMNS: Final = frozenset(SCHEMA)


class HistoryRecord(TypedDict, total=False):
    """One record as `Recorder.append` takes it; columns that are left out are null."""

    record: Required[str]
    attempt: Required[int]
    t: Required[float]
    client: NotRequired[int]
    op: NotRequired[str]
    key: NotRequired[str | None]
    payload_hash: NotRequired[str | None]
    user: NotRequired[int | None]
    api: NotRequired[str | None]
    match_id: NotRequired[str | None]
    bet_id: NotRequired[str | None]
    selection: NotRequired[str | None]
    side: NotRequired[str | None]
    odds: NotRequired[int | None]
    amount: NotRequired[int | None]
    min_seq: NotRequired[int | None]
    intended: NotRequired[float | None]
    status: NotRequired[int | None]
    outcome: NotRequired[str | None]
    replayed: NotRequired[bool | None]
    seq: NotRequired[int | None]
    balance: NotRequired[int | None]
    source: NotRequired[str | None]
    stale: NotRequired[bool | None]
    error: NotRequired[str | None]
    tag: NotRequired[str | None]
    strong: NotRequired[bool | None]
    after_seq: NotRequired[int | None]
    as_of: NotRequired[float | None]
    page_rows: NotRequired[int | None]
    page_cut: NotRequired[bool | None]


class RecordingError(Exception):
    """The history could not be written (disk full, folder gone), or a record does not fit its columns."""


class Recorder:
    """Writes the history of one run; `append` never touches the disk, so it may be called on an event loop.

    Thread-safe. After a failed write every call raises RecordingError: a run whose history is lost cannot
    be proved, so there is nothing to gain by going on quietly.
    """

    def __init__(self, folder: Path, run: str, flush_interval_s: float = FLUSH_INTERVAL_S) -> None:
        """Record run `run` under `folder`/history (created). Raises OSError, or RecordingError if one is there."""
        self._folder = folder / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        if (self._folder / MANIFEST).exists():
            raise RecordingError(f"{self._folder} already holds a recording; give each run its own folder")
        self._run = run
        self._flush_interval_s = flush_interval_s
        self._buffer: list[Mapping[str, object]] = []
        self._appended_rows = 0
        self._parts = 0
        self._failure: BaseException | None = None
        self._swap = threading.Lock()
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._flush_until_stopped, name="history-flusher", daemon=True)
        self._thread.start()

    @property
    def appended_rows(self) -> int:
        """Records taken so far, flushed or not."""
        return self._appended_rows

    def append(self, record: HistoryRecord) -> None:
        """Take one record. The caller must not change it afterwards. Raises RecordingError."""
        if self._failure is not None:
            raise RecordingError(f"the history could not be written: {self._failure}") from self._failure
        if not record.keys() <= _COLUMNS:
            raise RecordingError(f"no such history columns: {sorted(record.keys() - _COLUMNS)}")
        with self._swap:
            if self._stop.is_set():
                raise RecordingError("the history is closed")
            self._buffer.append(record)
            self._appended_rows += 1

    def flush(self) -> None:
        """Write everything appended so far and return when it is on disk. Raises RecordingError."""
        try:
            self._write_part()
        except (OSError, pl.exceptions.PolarsError, TypeError) as error:
            self._failure = error
        if self._failure is not None:
            raise RecordingError(f"the history could not be written: {self._failure}") from self._failure

    def close(self) -> None:
        """Flush, write the closing line and stop the thread; a second call does nothing. Raises RecordingError."""
        with self._swap:
            if self._stop.is_set():
                return
            self._stop.set()
        self._thread.join(timeout=CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise RecordingError(f"the history flusher did not finish within {CLOSE_TIMEOUT_S:g} s")
        self.flush()
        # The number taken and the number written are counted apart, so that a lost buffer shows.
        closing = {"closed": True, "parts": self._parts, "rows": self._appended_rows}
        try:
            append_line(self._folder / MANIFEST, msgspec.json.encode(closing).decode())
        except OSError as error:
            self._failure = error
            raise RecordingError(f"the history could not be closed: {error}") from error

    def _flush_until_stopped(self) -> None:
        while not self._stop.wait(self._flush_interval_s):
            try:
                self.flush()
            except RecordingError:
                return  # The failure is kept; the next append and close raise it in the caller's thread.

    def _write_part(self) -> None:
        with self._writing:
            with self._swap:
                rows, self._buffer = self._buffer, []
            if not rows:
                return
            columns: dict[str, list[object]] = {name: [row.get(name) for row in rows] for name in SCHEMA}
            columns["run"] = [self._run] * len(rows)
            name = f"part-{self._parts:06d}.parquet"
            temporary = self._folder / f"{name}.tmp"
            pl.DataFrame(columns, schema=SCHEMA).write_parquet(temporary, compression="zstd")
            digest = publish(temporary, self._folder / name)
            line = {"file": name, "rows": len(rows), "sha256": digest}
            append_line(self._folder / MANIFEST, msgspec.json.encode(line).decode())
            self._parts += 1


@dataclass(frozen=True)
class LoadReport:
    """What `load` could read, and everything that is wrong with the recording."""

    frame: pl.DataFrame
    parts: int = 0
    closed: bool = True
    missing: list[str] = field(default_factory=list)
    """Parts of the manifest that are not in the folder."""
    corrupt: list[str] = field(default_factory=list)
    """Parts or manifest lines whose checksum, row count or form is wrong."""
    unfinished: list[str] = field(default_factory=list)
    """Files that never got their manifest line: the harness died while writing them."""
    lost_rows: int = 0
    """Records that were taken but are in no part, by the closing line's own count."""
    lacking: frozenset[str] = frozenset()
    """Columns of `ADDED` that a part does not have, because the run is older than they are."""

    def problems(self) -> list[str]:
        """Return one sentence per defect; empty means the recording is whole."""
        found = [f"history part {name} is missing" for name in self.missing]
        found += [f"history part {name} is corrupt" for name in self.corrupt]
        found += [f"history part {name} was never finished" for name in self.unfinished]
        if not self.closed:
            found.append("the history was never closed: the harness ended before its last flush")
        if self.lost_rows:
            found.append(f"{self.lost_rows} records were taken but not written")
        return found


def load(folder: Path) -> LoadReport:
    """Read `folder`/history, verifying every checksum. Never raises for a damaged recording: it reports it."""
    frames: list[pl.DataFrame] = []
    report = load_parts(folder, frames.append)
    return replace(report, frame=pl.concat(frames)) if frames else report


def load_parts(folder: Path, take: Callable[[pl.DataFrame], None]) -> LoadReport:
    """Give every whole part of `folder`/history to `take`, in order, and report as `load` does, with an empty frame."""
    place = folder / FOLDER
    missing: list[str] = []
    corrupt: list[str] = []
    listed: set[str] = set()
    parts = rows = 0
    closing: dict[str, object] | None = None
    lacking: set[str] = set()
    manifest = place / MANIFEST
    lines = manifest.read_bytes().splitlines() if manifest.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = msgspec.json.decode(line, type=dict[str, object])
        except msgspec.DecodeError:
            corrupt.append(f"{MANIFEST} line {number}")
            continue
        if entry.get("closed"):
            closing = entry
            continue
        name = str(entry.get("file"))
        listed.add(name)
        frame = _read_part(place / name, str(entry.get("sha256")))
        if not (place / name).exists():
            missing.append(name)
        elif frame is None or frame.height != entry.get("rows"):
            corrupt.append(name)
        else:
            lacking |= ADDED - set(frame.columns)
            take(_completed(frame))
            parts, rows = parts + 1, rows + frame.height
    present = {path.name for path in place.glob("part-*")} if place.exists() else set()
    return LoadReport(
        frame=pl.DataFrame(schema=SCHEMA),
        parts=parts,
        closed=closing is not None,
        missing=missing,
        corrupt=corrupt,
        unfinished=sorted(present - listed),
        lost_rows=_rows_missing(closing, rows) if not missing and not corrupt else 0,
        lacking=frozenset(lacking),
    )


def _rows_missing(closing: dict[str, object] | None, rows: int) -> int:
    taken = closing.get("rows") if closing is not None else rows
    return abs(taken - rows) if isinstance(taken, int) else rows


def _read_part(path: Path, sha256: str) -> pl.DataFrame | None:
    if not path.exists() or sha256_of(path) != sha256:
        return None
    try:
        frame = pl.read_parquet(path)
        there = set(frame.columns)
        return frame.select(
            pl.col(name).cast(kind) for name, kind in SCHEMA.items() if name in there or name not in ADDED
        )
    except pl.exceptions.PolarsError:
        return None


def _completed(frame: pl.DataFrame) -> pl.DataFrame:
    """Return a part with all columns, null where it is older than they are."""
    there = set(frame.columns)
    return frame.select(
        pl.col(name) if name in there else pl.lit(None, dtype=kind).alias(name) for name, kind in SCHEMA.items()
    )


def attempts(history: pl.DataFrame) -> pl.DataFrame:
    """Return one row per attempt: its invoke columns, `t_invoke`, `t_return`, `cls` and its answer.

    `t_return` is +inf and `cls` is `info` for an attempt that never completed: nobody knows what became of
    it. `answer_bet_id` is the bet the answer names. Where an attempt has two completions the earlier one in
    the history counts (V06 reports the other).
    """
    said = history.filter(pl.col("record") == "invoke").drop("record", "run", *ANSWERED)
    said = said.rename({"t": "t_invoke"}).unique("attempt", keep="first", maintain_order=True)
    answers = history.filter(pl.col("record") != "invoke").select(
        "attempt",
        pl.col("record").alias("cls"),
        pl.col("t").alias("t_return"),
        *ANSWERED,
        pl.col("bet_id").alias("answer_bet_id"),
    )
    answers = answers.unique("attempt", keep="first", maintain_order=True)
    return said.join(answers, on="attempt", how="left", maintain_order="left").with_columns(
        pl.col("cls").fill_null("info"),
        pl.col("t_return").fill_null(float("inf")),
    )
