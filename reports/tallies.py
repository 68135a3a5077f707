"""Turns attempts and series into what the figures draw and the tables count: pure functions over columns.

Times are seconds since the run's origin; every figure of a page shares one `Clock`, so that equal places on
two figures are the same moment.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from invariants.history import FINAL_RETRY
from invariants.timeline import PHASES
from reports.folder import Fault, RunFolder

BIN_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
MAX_BINS = 400
"""More bins than this are finer than the pixels they are drawn with."""

SHORTEST_PHASE_S = 0.05
"""A phase shorter than this was superseded as soon as it began."""

CLASSES: dict[str, tuple[str, ...]] = {
    "Bets": ("bet",),
    "Deposits and withdrawals": ("deposit", "withdraw"),
    "Cancellations": ("cancel", "rollback"),
    "Reads": ("balance", "entries"),
}
"""Operations that are drawn together, because they take the same path through the service."""

READS = ("balance", "entries")
MONEY = ("bet", "deposit", "withdraw")
"""Operations whose effect, or refusal, is a row that carries the caller's key."""


@dataclass(frozen=True)
class Phase:
    """A named stretch of the run."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Clock:
    """The time axis of all figures and what is marked on it."""

    start: float
    end: float
    bin_s: int
    phases: list[Phase]
    faults: list[Fault]

    @property
    def bins(self) -> int:
        """Number of bins between start and end."""
        return max(1, math.ceil((self.end - self.start) / self.bin_s))


@dataclass(frozen=True)
class Fate:
    """What became of a group of unknown outcomes."""

    name: str
    count: int
    meaning: str


@dataclass(frozen=True)
class Interruption:
    """A process that did not answer although no fault was aimed at it; `until` is None if it stayed away."""

    node: str
    start: float
    until: float | None
    detail: str


@dataclass(frozen=True)
class Usage:
    """Memory (MB) and processor use (cores) of one process over the run; None where not sampled."""

    node: str
    rss_peak_mb: float | None
    rss_mean_mb: float | None
    cpu_seconds: float | None
    cpu_mean_cores: float | None


def clock_of(run: RunFolder) -> Clock | None:
    """Return the time axis that holds all attempts and series, or None if nothing has a time."""
    moments: list[float] = []
    if run.attempts is not None:
        moments += _extent(under_load(run.attempts), "due", "done", "sent")
    if run.series is not None and (run.attempts is None or run.series.height):
        last = _extent(run.series, "t")
        # Samples before the first attempt show a stack that is starting; after the last one, lag that drains.
        moments += last if run.attempts is None else last[1:]
    faults = run.verdict.faults
    moments += [value for fault in faults for value in moments_of(fault)]
    marks = _phase_marks(run)
    if not moments:
        moments = [t for _, t in marks]
    if not moments:
        return None
    start, end = math.floor(min(moments)), max(math.ceil(max(moments)), math.floor(min(moments)) + 1)
    bin_s = next((size for size in BIN_SECONDS if (end - start) / size <= MAX_BINS), BIN_SECONDS[-1])
    ends = [*(t for _, t in marks[1:]), math.inf][: len(marks)]
    phases = [
        Phase(name, max(t, start), min(until, end))
        for (name, t), until in zip(marks, ends, strict=True)
        if t < end and until > start
    ]
    return Clock(start, end, bin_s, phases, faults)


def moments_of(fault: Fault) -> list[float]:
    """Return the times of a fault that were recorded."""
    times = (
        fault.requested_at,
        fault.measured_start,
        fault.measured_end,
        fault.healed_at,
        fault.recovered_at,
    )
    return [value for value in times if value is not None and math.isfinite(value)]


def _extent(frame: pl.DataFrame, *columns: str) -> list[float]:
    values: list[float] = []
    for column in columns:
        known = frame[column].drop_nulls()
        if known.len():
            values += [float(known.min()), float(known.max())]  # type: ignore[arg-type]
    return values


def _phase_marks(run: RunFolder) -> list[tuple[str, float]]:
    """Return the phases in order; of those that begin at the same moment, only the one that holds after it."""
    if run.timeline is None:
        return []
    rows = run.timeline.filter((pl.col("kind") == "phase") & pl.col("detail").is_not_null())
    order = {name: place for place, name in enumerate(PHASES)}
    marks: list[tuple[str, float]] = []
    for name, t in sorted(rows.select("detail", "t").iter_rows(), key=lambda row: (row[1], order.get(row[0], 0))):
        if marks and t - marks[-1][1] < SHORTEST_PHASE_S:
            marks.pop()
        if not marks or marks[-1][0] != name:
            marks.append((name, t))
    return marks


def under_load(attempts: pl.DataFrame) -> pl.DataFrame:
    """Return the attempts without the retries after the snapshot, which are part of the check, not of the load."""
    return attempts.filter(pl.col("tag").is_null() | (pl.col("tag") != FINAL_RETRY))


def interruptions(run: RunFolder) -> list[Interruption]:
    """Return when processes that were not the target of a fault at that time did not answer the probe."""
    if run.timeline is None:
        return []
    found: list[Interruption] = []
    away: dict[str, tuple[float, str]] = {}
    rows = run.timeline.filter(pl.col("kind").is_in(["process_death", "process_start"]) & pl.col("node").is_not_null())
    for t, kind, node, detail in rows.select("t", "kind", "node", "detail").iter_rows():
        if kind == "process_death":
            away.setdefault(node, (t, detail or ""))
        elif node in away:
            start, why = away.pop(node)
            found.append(Interruption(node, start, t, why))
    found += [Interruption(node, start, None, why) for node, (start, why) in away.items()]
    return sorted(
        (item for item in found if not _is_target(item, run.verdict.faults)), key=lambda item: (item.start, item.node)
    )


def _is_target(item: Interruption, faults: Iterable[Fault]) -> bool:
    for fault in faults:
        known = moments_of(fault)
        if fault.target == item.node and known and min(known) <= item.start <= max(known):
            return True
    return False


def _bin(column: str, clock: Clock) -> pl.Expr:
    return ((pl.col(column) - clock.start) / clock.bin_s).floor().cast(pl.Int64).alias("bin")


def _every_bin(frame: pl.DataFrame, clock: Clock) -> pl.DataFrame:
    """Add the bins in which nothing happened, as nulls, and the time of each bin's middle."""
    grid = pl.DataFrame({"bin": pl.arange(0, clock.bins, eager=True, dtype=pl.Int64)})
    middle = (pl.col("bin") + 0.5) * clock.bin_s + clock.start
    return grid.join(frame, on="bin", how="left").sort("bin").with_columns(t=middle)


def throughput(attempts: pl.DataFrame, clock: Clock) -> pl.DataFrame:
    """Return per bin, in 1/s: attempts due, ok answers and acknowledged bets (by the time of the answer)."""
    due = attempts.group_by(_bin("due", clock)).agg(due=pl.len())
    ok = attempts.filter((pl.col("result") == "ok") & pl.col("done").is_not_null())
    returned = ok.group_by(_bin("done", clock)).agg(ok=pl.len(), bets=(pl.col("op") == "bet").sum())
    frame = _every_bin(due, clock).join(returned, on="bin", how="left").sort("bin")
    return frame.with_columns(pl.col("due", "ok", "bets").fill_null(0) / clock.bin_s)


def latency(attempts: pl.DataFrame, clock: Clock) -> dict[str, pl.DataFrame]:
    """Return per class and bin (by the time the attempt was due) p50 and p99 of the answered attempts, ms."""
    served = attempts.filter(answered() & pl.col("done").is_not_null())
    took = (pl.col("done") - pl.col("due")) * 1000
    result = {}
    for name, ops in CLASSES.items():
        of_class = served.filter(pl.col("op").is_in(ops))
        if of_class.is_empty():
            continue
        quantiles = of_class.group_by(_bin("due", clock)).agg(
            p50=took.quantile(0.5, "nearest"), p99=took.quantile(0.99, "nearest")
        )
        result[name] = _every_bin(quantiles, clock)
    return result


def answered() -> pl.Expr:
    """Tell whether an attempt got an answer: done, or refused by a rule; not "unavailable", not silence."""
    return (pl.col("result") == "ok") | ((pl.col("result") == "fail") & ~_unavailable())


def _unavailable() -> pl.Expr:
    status = pl.col("status")
    return (pl.col("result") == "fail") & (status.is_null() | (status >= 500) | (status == 429))


def availability(attempts: pl.DataFrame, clock: Clock) -> pl.DataFrame:
    """Return per bin (by due time) the answered share in percent, and unavailable and unknown in 1/s."""
    frame = attempts.group_by(_bin("due", clock)).agg(
        percent=answered().mean() * 100,
        unavailable=_unavailable().sum() / clock.bin_s,
        unknown=(pl.col("result") == "info").sum() / clock.bin_s,
    )
    return _every_bin(frame, clock).with_columns(pl.col("unavailable", "unknown").fill_null(0.0))


def samples(series: pl.DataFrame, name: str, clock: Clock, limit: int = 6) -> dict[str, pl.DataFrame]:
    """Return per node the largest sample of each bin; past `limit` nodes, the others' maximum as one."""
    rows = series.filter((pl.col("name") == name) & pl.col("t").is_between(clock.start, clock.end))
    rows = rows.with_columns(pl.col("node").fill_null(""))
    nodes = rows.group_by("node").agg(pl.col("value").max()).sort("node")
    if nodes.height > limit:
        main = set(nodes.sort("value", descending=True)["node"][: limit - 1])
        others = f"largest of {nodes.height - len(main)} others"
        shown = pl.when(pl.col("node").is_in(list(main))).then(pl.col("node")).otherwise(pl.lit(others))
        rows = rows.with_columns(node=shown)
    result = {}
    for node in sorted(set(rows["node"])):
        maxima = rows.filter(pl.col("node") == node).group_by(_bin("t", clock)).agg(pl.col("value").max())
        # Bins are at least as wide as the sampling interval only on long runs, so empty ones are left out.
        result[str(node)] = _every_bin(maxima, clock).drop_nulls("value").select("t", "value")
    return result


def kinds_over_time(series: pl.DataFrame, name: str, clock: Clock) -> dict[str, list[float]]:
    """Return per kind of process (pg, kafka, api …) the sum over its nodes in each bin: MB or cores.

    `name` is "rss_mb" (a level) or "cpu_seconds" (a counter, turned into a rate; a restart resets it).
    """
    rows = series.filter((pl.col("name") == name) & pl.col("node").is_not_null()).sort("node", "t")
    if name == "cpu_seconds":
        rise = pl.col("value").diff().over("node").clip(lower_bound=0)
        step = pl.col("t").diff().over("node")
        rows = rows.with_columns(value=rise / step).filter(pl.col("value").is_finite())
    rows = rows.filter(pl.col("t").is_between(clock.start, clock.end))
    per_node = rows.group_by("node", _bin("t", clock)).agg(pl.col("value").mean())
    per_kind = per_node.group_by(pl.col("node").str.replace(r"[-_]?\d+$", "").alias("kind"), "bin").agg(
        pl.col("value").sum()
    )
    total = per_kind.group_by("kind").agg(pl.col("value").sum()).sort("value", descending=True)
    result = {}
    for kind in total["kind"]:
        frame = _every_bin(per_kind.filter(pl.col("kind") == kind).drop("kind"), clock)
        filled = frame["value"].forward_fill().fill_null(0.0)
        result[str(kind)] = [float(value) for value in filled]
    return result


def usage(series: pl.DataFrame) -> list[Usage]:
    """Return memory and processor use of each process over the whole recording."""
    rows = series.filter(pl.col("name").is_in(["rss_mb", "cpu_seconds"]) & pl.col("node").is_not_null())
    result = []
    for node in sorted(set(rows["node"])):
        own = rows.filter(pl.col("node") == node).sort("t")
        rss = own.filter((pl.col("name") == "rss_mb") & (pl.col("value") > 0))["value"]
        cpu = own.filter(pl.col("name") == "cpu_seconds")
        spent = float(cpu["value"].diff().clip(lower_bound=0).sum()) if cpu.height > 1 else None
        span = float(cpu["t"][-1] - cpu["t"][0]) if cpu.height > 1 else 0.0
        result.append(
            Usage(
                node=str(node),
                rss_peak_mb=_float(rss.max()),
                rss_mean_mb=_float(rss.mean()),
                cpu_seconds=spent,
                cpu_mean_cores=spent / span if spent is not None and span > 0 else None,
            )
        )
    return result


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def fates(run: RunFolder) -> list[Fate]:
    """Sort the unknown outcomes of the run by what became of them.

    Fate belongs to the key: it is counted as answered when another attempt under the same key got an answer
    during the load; otherwise the first snapshot of the ledger says whether it was applied.
    """
    if run.attempts is None:
        return []
    during = under_load(run.attempts)
    unknown = during.filter(pl.col("result") == "info")
    reads = unknown.filter(pl.col("op").is_in(READS))
    commands = unknown.filter(~pl.col("op").is_in(READS))
    settled = during.filter(answered() & pl.col("key").is_not_null()).select("user", "key").unique()
    retried = commands.join(settled, on=["user", "key"], how="semi", nulls_equal=True)
    open_ = commands.join(settled, on=["user", "key"], how="anti", nulls_equal=True)
    money = open_.filter(pl.col("op").is_in(MONEY))
    other = open_.filter(~pl.col("op").is_in(MONEY))
    result = [
        Fate("Read", reads.height, "a read changes nothing: no matter whether it was served"),
        Fate("Answered on a retry", retried.height, "another attempt with the same key got its answer"),
    ]
    if run.effects is None:
        result.append(Fate("Left to the checker", money.height, "the ledger's snapshot is not in this folder"))
    else:
        joined = money.join(run.effects, left_on=["user", "key"], right_on=["user_id", "idempotent_key"], how="left")
        effect = dict(joined.group_by(pl.col("effect").fill_null("none")).agg(pl.len()).iter_rows())
        result += [
            Fate("Applied", effect.get("applied", 0), "it had happened, only the answer was lost"),
            Fate("Refused", effect.get("refused", 0), "the service had refused it and kept the refusal"),
            Fate("Not applied", effect.get("none", 0), "it never happened: no entry carries the key"),
        ]
    result.append(
        Fate("On a bet or match", other.height, "cancel, close, settle, void, resettle: looked up in their own tables")
    )
    return [fate for fate in result if fate.count]


def unknown_count(attempts: pl.DataFrame) -> int:
    """Return the number of attempts whose outcome the client did not learn, final retries left out."""
    return under_load(attempts).filter(pl.col("result") == "info").height


def largest(values: Iterable[float | None]) -> float | None:
    """Return the largest known value, or None if there is none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return max(known, default=None)
