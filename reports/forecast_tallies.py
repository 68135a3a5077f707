"""What a run showed of everything that its forecast speaks of, while the load was on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import polars as pl

from reports.folder import RunFolder
from reports.tallies import answered, under_load

if TYPE_CHECKING:
    from sim.run_forecast import RunForecast

READS = ("balance", "entries")
"""Operations that read; the forecast counts every other one as a command that writes."""
SERIES = {
    "outbox": ("outbox_unpublished", None),
    "matcher": ("kafka_consumer_lag", "matcher"),
    "projector": ("kafka_consumer_lag", "projector"),
}
"""Where what waits in a stage was sampled: a series, and of it one node or the sum of all."""
PERCENTS = (50.0, 95.0, 99.0)


@dataclass(frozen=True)
class Seen:
    """What was measured. None and empty where the run did not record it."""

    start_s: float
    """When the load began, in seconds since the run's origin."""
    answered_per_s: float | None = None
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of `bets` (everything that writes) and `reads`, by percentile (`p50`)."""
    lost_share: float | None = None
    """Requests that were not answered, 0 to 1."""
    backlog_peak: dict[str, float] = field(default_factory=dict)
    bins: pl.DataFrame | None = None
    """Per bin that had an answer: t (its middle, since the run's origin), answered (1/s), p50 and p99 (ms)."""
    waiting: dict[str, pl.DataFrame] = field(default_factory=dict)
    """By stage: t and value."""


@dataclass(frozen=True)
class Band:
    """A forecast over time: `edges` of its bins (seconds since the run's origin), lowest and highest in each."""

    edges: list[float]
    low: list[float | None]
    high: list[float | None]


def seen(run: RunFolder, forecast: "RunForecast", bin_s: int) -> Seen | None:
    """Return what a run showed of its forecast; None if it is not known when its load began."""
    start_s = _load_start_s(run)
    if start_s is None:
        return None
    waiting = {stage: _waiting(run.series, stage, start_s, forecast.duration_s) for stage in SERIES}
    peaks = {stage: float(frame["value"].max()) for stage, frame in waiting.items() if not frame.is_empty()}  # type: ignore[arg-type]
    drawn = {stage: _in_bins(frame, start_s, bin_s) for stage, frame in waiting.items() if not frame.is_empty()}
    if run.attempts is None:
        return Seen(start_s, backlog_peak=peaks, waiting=drawn)
    end_s = start_s + forecast.duration_s
    attempts = under_load(run.attempts)
    due = attempts.filter(pl.col("due").is_between(start_s, end_s, closed="left"))
    got = due.filter(answered() & pl.col("done").is_not_null())
    # As the forecast counts: answers that came while the load was on, whenever they were asked for.
    came = attempts.filter(answered() & pl.col("done").is_between(start_s, end_s, closed="left"))
    took = (pl.col("done") - pl.col("due")) * 1000
    latency: dict[str, dict[str, float]] = {}
    for name, of_class in (("bets", ~pl.col("op").is_in(READS)), ("reads", pl.col("op").is_in(READS))):
        values = got.filter(of_class).select(took.alias("ms"))["ms"]
        if len(values):
            latency[name] = {f"p{percent:g}": _quantile(values, percent) for percent in PERCENTS}
    width = pl.col("bin") * bin_s
    bins = (
        got.group_by(((pl.col("due") - start_s) / bin_s).floor().cast(pl.Int64).alias("bin"))
        .agg(answered=pl.len(), p50=took.quantile(0.5, "linear"), p99=took.quantile(0.99, "linear"))
        .sort("bin")
        # The last bin may be shorter than the others.
        .with_columns(wide=pl.min_horizontal(pl.lit(float(bin_s)), forecast.duration_s - width))
        .select(
            (start_s + width + pl.col("wide") / 2).alias("t"),
            (pl.col("answered") / pl.col("wide")).alias("answered"),
            "p50",
            "p99",
        )
    )
    return Seen(
        start_s,
        answered_per_s=came.height / forecast.duration_s,
        latency_ms=latency,
        lost_share=1 - due.filter(answered()).height / due.height if due.height else None,
        backlog_peak=peaks,
        bins=bins,
        waiting=drawn,
    )


def band(values: Sequence[Sequence[float] | None], start_s: float, bin_s: int, *, peaks: bool = False) -> Band:
    """Return lowest and highest of each second in bins: their means, or of what peaks the highest."""
    edges = [start_s]
    low: list[float | None] = []
    high: list[float | None] = []
    for at in range(0, len(values), bin_s):
        some = [pair for pair in values[at : at + bin_s] if pair is not None]
        edges.append(start_s + min(at + bin_s, len(values)))
        for index, column in enumerate((low, high)):
            mine = [pair[index] for pair in some]
            column.append((max(mine) if peaks else sum(mine) / len(mine)) if mine else None)
    return Band(edges, low, high)


def _load_start_s(run: RunFolder) -> float | None:
    if run.timeline is not None:
        marks = run.timeline.filter((pl.col("kind") == "phase") & (pl.col("detail") == "before"))["t"]
        if len(marks):
            return float(marks[0])
    if run.attempts is None:
        return None
    first = under_load(run.attempts)["due"].min()
    return float(first) if isinstance(first, int | float) else None


def _quantile(values: pl.Series, percent: float) -> float:
    found = values.quantile(percent / 100, "linear")
    assert found is not None, "only what has values is asked"
    return float(found)


def _waiting(series: pl.DataFrame | None, stage: str, start_s: float, duration_s: float) -> pl.DataFrame:
    """Return what waited in a stage in each second of the load that has a sample: second and value."""
    if series is None:
        return pl.DataFrame({"second": [], "value": []}, {"second": pl.Int64, "value": pl.Float64})
    name, node = SERIES[stage]
    rows = series.filter(
        (pl.col("name") == name) & pl.col("t").is_between(start_s, start_s + duration_s, closed="left")
    )
    if node is not None:
        rows = rows.filter(pl.col("node") == node)
    each = rows.group_by((pl.col("t") - start_s).floor().cast(pl.Int64).alias("second"), "node").agg(
        pl.col("value").max()
    )
    return each.group_by("second").agg(pl.col("value").sum()).sort("second")


def _in_bins(frame: pl.DataFrame, start_s: float, bin_s: int) -> pl.DataFrame:
    grouped = frame.group_by((pl.col("second") // bin_s).alias("bin")).agg(pl.col("value").max()).sort("bin")
    return grouped.select(((pl.col("bin") + 0.5) * bin_s + start_s).alias("t"), "value")
