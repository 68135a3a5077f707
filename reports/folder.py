"""Reads a run folder and says plainly what is missing from it.

Nothing here raises for a folder that is incomplete, torn or odd: each part that cannot be read becomes a
`Gap` that the page shows, because a report of a failed run is needed more than one of a good run.
Times are seconds since the run's origin, latencies seconds, unless a name says otherwise.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import polars as pl

from invariants import history
from reports.gaps import Gap, read_json, why_unread
from reports.loads import KNEE_FILE, LOAD_FILE, Knee, Load, read_knee, read_load

if TYPE_CHECKING:
    from sim.run_forecast import RunForecast

Number = float | str | None
PREDICTION_FILE = "prediction.json"
"""What `ledgerproof prove --predict` writes before the run."""


class Fault(msgspec.Struct):
    """One fault: when it was asked for and when its effect was measured."""

    id: int | str | None = None
    kind: str = "fault"
    target: str | None = None
    requested_at: float | None = None
    measured_start: float | None = None
    measured_end: float | None = None
    healed_at: float | None = None
    recovered_at: float | None = None

    @property
    def label(self) -> str:
        """The fault in two words: what was done to which node."""
        return f"{self.kind} {self.target}" if self.target else self.kind


class ShardMove(msgspec.Struct):
    """One shard that was moved to another server during the load."""

    shard: int | None = None
    source: str | None = None
    target: str | None = None
    began_at: float | None = None
    total_ms: float | None = None
    freeze_ms: float | None = None
    entries: int | None = None
    bets: int | None = None
    frozen_rows: int | None = None


class Sla(msgspec.Struct):
    """One service level: `met` is None for a metric that is only reported."""

    metric: str = ""
    target: Number = None
    measured: Number = None
    interval: list[Number] | None = None
    unit: str | None = None
    met: bool | None = None
    method: str | None = None


class Operation(msgspec.Struct):
    """Counts and latencies of one operation in one phase."""

    op: str = ""
    phase: str | None = None
    count: int | None = None
    ok: int | None = None
    fail: int | None = None
    info: int | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None


class Witness(msgspec.Struct):
    """One place in the ledger that shows an anomaly."""

    code: str = ""
    key: str | None = None
    user: int | str | None = None
    seq: int | str | None = None
    text: str = ""


class JudgeRow(msgspec.Struct):
    """A judge that was asked, or why not."""

    name: str = ""
    codes: list[str] = []
    seconds: float | None = None
    skipped: str | None = None


class Disagreement(msgspec.Struct):
    """A code of which two judges say different things."""

    code: str = ""
    judges: list[str] = []
    text: str = ""


class Generator(msgspec.Struct):
    """How well the load generator kept its own schedule."""

    lag_p99_ms: float | None = None
    late: int | None = None
    dropped: int | None = None
    scheduled: int | None = None
    sent: int | None = None
    skipped: int | None = None
    gave_up: bool | None = None
    cpu_s: float | None = None


class Verdict(msgspec.Struct):
    """The fields of verdict.json; each is None or empty when the run did not record it."""

    verdict: str | None = None
    exit_code: int | None = None
    run: str | None = None
    seed: int | str | None = None
    commit: str | None = None
    version: str | None = None
    started_at: str | float | None = None
    origin_unix: float | None = None
    duration_s: float | None = None
    acknowledged_bets: int | None = None
    bets_per_s: float | None = None
    unresolved: int | None = None
    machine: dict[str, Any] = {}
    config: dict[str, Any] = {}
    anomalies: dict[str, int] = {}
    unchecked: dict[str, str] = {}
    judges: list[JudgeRow] = []
    disagreements: list[Disagreement] = []
    raw_duplicates: int | None = None
    witnesses: list[Witness] = []
    sometimes: dict[str, int] = {}
    faults: list[Fault] = []
    shard_moves: list[ShardMove] = []
    sla: list[Sla] = []
    operations: list[Operation] = []
    generator: Generator | None = None
    sizes: dict[str, Any] = {}
    timings: dict[str, Any] = {}
    residue: list[Any] = []
    reasons: list[str] = []


@dataclass(frozen=True)
class FileGroup:
    """Files of the run folder that belong together."""

    name: str
    files: int
    size_bytes: int


@dataclass(frozen=True)
class RunFolder:
    """Everything the page is made of.

    `attempts` has one row an attempt: attempt, op, key, user, tag, due, sent, done (null if no answer was
    recorded), result (ok, fail or info), status, outcome.
    """

    path: Path
    verdict: Verdict
    attempts: pl.DataFrame | None
    timeline: pl.DataFrame | None
    series: pl.DataFrame | None
    effects: pl.DataFrame | None
    """Keys that had an effect by the first snapshot: user_id, idempotent_key, effect (applied or refused)."""
    files: list[FileGroup]
    load: Load | None = None
    """What `ledgerproof load` found; None for a run of another command."""
    knee: Knee | None = None
    forecast: "RunForecast | None" = None
    """What the capacity model said before the run."""
    gaps: list[Gap] = field(default_factory=list)


TIMELINE_COLUMNS: dict[str, pl.DataType] = {
    "t": pl.Float64(),
    "kind": pl.String(),
    "node": pl.String(),
    "fault": pl.String(),
    "fault_id": pl.Int64(),
    "detail": pl.String(),
}
SERIES_COLUMNS: dict[str, pl.DataType] = {
    "t": pl.Float64(),
    "name": pl.String(),
    "node": pl.String(),
    "value": pl.Float64(),
}
REQUIRED = frozenset({"t", "kind", "name", "value"})
"""Columns without which a table says nothing; any other one is null when it is absent."""


def read_run(path: Path) -> RunFolder:
    """Read what is there of the run folder `path`.

    Raises NotADirectoryError if it is no folder; everything less than that becomes a gap.
    """
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a run folder: no such directory")
    gaps: list[Gap] = []
    verdict = _read_verdict(path, gaps)
    attempts = _read_history(path, gaps)
    timeline = _read_table(
        path / "timeline.parquet",
        TIMELINE_COLUMNS,
        "phases and faults on the figures come from verdict.json as far as it has them",
        gaps,
    )
    series = _read_table(
        path / "series.parquet", SERIES_COLUMNS, "there are no lag curves and no use of resources", gaps
    )
    if not verdict.faults and timeline is not None:
        verdict.faults = _faults_of(timeline)
        if verdict.faults:
            gaps.append(Gap("verdict.json: faults", "the faults were taken from the timeline, unjudged"))
    # Only a load has these files, so only its configuration makes their absence a gap.
    profile = verdict.config.get("profile")
    load = read_load(path / LOAD_FILE, gaps) if profile or (path / LOAD_FILE).exists() else None
    searched = profile == "knee" or "knee" in verdict.config or (path / KNEE_FILE).exists()
    return RunFolder(
        path=path,
        verdict=verdict,
        attempts=attempts,
        timeline=None if timeline is None else timeline.filter(pl.col("t").is_finite()).sort("t", maintain_order=True),
        series=None if series is None else series.filter(pl.col("t").is_finite() & pl.col("value").is_finite()),
        effects=_read_effects(path / "snapshot-1"),
        files=_list_files(path),
        load=load,
        knee=read_knee(path / KNEE_FILE, gaps) if searched else None,
        forecast=_read_forecast(path / PREDICTION_FILE, verdict.config.get("prediction_digest"), gaps),
        gaps=gaps,
    )


def _read_verdict(path: Path, gaps: list[Gap]) -> Verdict:
    """Read verdict.json field by field, so that one odd field does not take the others with it."""
    verdict = Verdict()
    raw = read_json(path / "verdict.json", "nothing says whether the ledger was right; this page cannot", gaps)
    # What a killed harness left of itself still says how to repeat the run. Its absence is no gap of its own.
    raw = {**read_json(path / "harness.json", "", []), **raw}
    for name, kind in ((item.name, item.type) for item in msgspec.structs.fields(Verdict)):
        if raw.get(name) is None:
            continue
        try:
            setattr(verdict, name, msgspec.convert(raw[name], kind, strict=False))
        except msgspec.ValidationError as error:
            gaps.append(Gap(f"verdict.json: {name}", f"left out, it does not have the agreed form ({error})"))
    if not verdict.config and (path / "config.json").exists():
        verdict.config = read_json(path / "config.json", "the configuration is not shown", gaps)
    return verdict


def _read_forecast(path: Path, sealed_as: object, gaps: list[Gap]) -> "RunForecast | None":
    """Read the forecast of the run; `sealed_as` is the digest that the verdict holds, if any.

    One that is not as it was sealed is no forecast: it could have been written after the run.
    """
    if not path.exists() and not sealed_as:
        return None
    from sim.run_forecast import read_run_forecast  # noqa: PLC0415 - slow to import, and few runs have one

    consequence = "the forecast is not shown"
    try:
        found = read_run_forecast(path)
    except OSError as error:
        gaps.append(Gap(path.name, f"{why_unread(error)}: {consequence}"))
        return None
    except (ValueError, msgspec.MsgspecError) as error:
        gaps.append(Gap(path.name, f"{error}: {consequence}"))
        return None
    if sealed_as and found.digest != sealed_as:
        gaps.append(Gap(path.name, f"not the one whose seal the verdict holds: {consequence}"))
        return None
    bands = [band for second in found.seconds for band in (second.answered, second.p50_ms, second.p99_ms)]
    bands += [band for second in found.seconds for band in second.backlog.values()]
    if found.duration_s <= 0 or any(band is not None and len(band) != 2 for band in bands):
        gaps.append(Gap(path.name, f"a band has not two bounds, or the load no length: {consequence}"))
        return None
    return found


def _read_table(path: Path, columns: dict[str, pl.DataType], consequence: str, gaps: list[Gap]) -> pl.DataFrame | None:
    """Read the named columns of a Parquet file, or record why that was not possible and return None."""
    try:
        if not path.exists():
            raise FileNotFoundError(path)
        present = set(pl.read_parquet_schema(path))
        lacking = sorted((REQUIRED & set(columns)) - present)
        if lacking:
            gaps.append(Gap(path.name, f"has no column {', '.join(lacking)}: {consequence}"))
            return None
        frame = pl.read_parquet(path, columns=[name for name in columns if name in present])
        return frame.select(
            (pl.col(name).cast(kind, strict=False) if name in present else pl.lit(None, kind).alias(name))
            for name, kind in columns.items()
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        gaps.append(Gap(path.name, f"{why_unread(error)}: {consequence}"))
        return None


def _read_history(path: Path, gaps: list[Gap]) -> pl.DataFrame | None:
    """Read every whole part of the history and pair each invoke with its completion."""
    if not any((path / history.FOLDER).glob("part-*")):
        gaps.append(Gap("history/", "missing: there is no throughput, latency or availability over time"))
        return None
    try:
        loaded = history.load(path)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        gaps.append(Gap("history/", f"{why_unread(error)}: its attempts are not on this page"))
        return None
    gaps += [Gap("history/", f"{problem}; its attempts are not on this page") for problem in loaded.problems()]
    started, due = pl.col("t_invoke"), pl.col("intended")
    # Open arrivals: a request that had to wait for a busy generator has waited for its caller too, so its
    # time counts from the moment it was due. A retry or a final read has no schedule and counts from the
    # moment it was sent.
    attempts = (
        history.attempts(loaded.frame.filter(pl.col("attempt").is_not_null() & pl.col("t").is_finite()))
        .select(
            "attempt",
            "op",
            "key",
            "user",
            "tag",
            pl.when(due.is_finite() & (due <= started)).then(due).otherwise(started).alias("due"),
            started.alias("sent"),
            pl.when(pl.col("t_return").is_finite()).then(pl.col("t_return")).alias("done"),
            pl.col("cls").alias("result"),
            pl.col("status").cast(pl.Int64),
            "outcome",
        )
        .sort("due")
    )
    if attempts.is_empty():
        gaps.append(Gap("history/", "holds no attempt: the run ended before its load began"))
        return None
    return attempts


def _read_effects(snapshot: Path) -> pl.DataFrame | None:
    """Return the keys with an effect, or None where the snapshot is missing: the table is then left out."""
    columns: dict[str, pl.DataType] = {"user_id": pl.Int64(), "idempotent_key": pl.String()}
    ledger = _read_table(snapshot / "ledger.parquet", columns, "", [])
    if ledger is None:
        return None
    refusals = _read_table(snapshot / "refusals.parquet", columns, "", [])
    parts = [ledger.with_columns(effect=pl.lit("applied"))]
    if refusals is not None:
        parts.append(refusals.with_columns(effect=pl.lit("refused")))
    return pl.concat(parts).unique(["user_id", "idempotent_key"], keep="first", maintain_order=True)


def _faults_of(timeline: pl.DataFrame) -> list[Fault]:
    """Rebuild the faults from the rows of the timeline that carry a fault id."""
    moments = {
        "fault_requested": "requested_at",
        "fault_start": "measured_start",
        "fault_end": "measured_end",
        "heal_requested": "healed_at",
    }
    faults: dict[int, Fault] = {}
    for row in timeline.filter(pl.col("fault_id").is_not_null()).iter_rows(named=True):
        fault = faults.setdefault(row["fault_id"], Fault(id=row["fault_id"]))
        fault.kind, fault.target = row["fault"] or fault.kind, row["node"] or fault.target
        if row["kind"] in moments:
            setattr(fault, moments[row["kind"]], row["t"])
    return list(faults.values())


def _list_files(path: Path) -> list[FileGroup]:
    """Return the files of the run, one group for each entry of the folder, the page itself left out."""

    def size_bytes(item: Path) -> int:
        # A process that is still stopping may remove its own file between the listing and this line.
        try:
            return item.stat().st_size
        except FileNotFoundError:
            return 0

    groups = []
    for entry in sorted(path.iterdir(), key=lambda item: (item.is_dir(), item.name)):
        if entry.name == "report.html":
            continue
        files = [entry] if entry.is_file() else [item for item in entry.rglob("*") if item.is_file()]
        name = f"{entry.name}/" if entry.is_dir() else entry.name
        groups.append(FileGroup(name, len(files), sum(size_bytes(item) for item in files)))
    return groups
