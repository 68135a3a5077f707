"""Measures the service levels of a run from its recording: latencies, availability, lag and recovery times.

Everything is computed from the history, the timeline and the snapshots, never from what the generator kept in
memory, so `check` gives the same numbers from a stored run. Requests that touched a fault window (from the
fault's start to the measured recovery) are left out of the objectives and shown in the table of operations.
Times are seconds on the run's clock, latencies count from the intended time.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from invariants.history import FINAL_RETRY, HUNG_UP

AVAILABILITY_TARGET: Final = 99.99
LATENCY_TARGET_MS: Final = 500.0
LAG_TARGET: Final = 10_000
QUIET_S: Final = 1.0
"""Without a failed request for this long, the error rate is back to zero."""
RECOVERED_LAG: Final = 1_000
"""Backlog that counts as caught up: about the records of one second."""
EDGE_S: Final = 0.25
"""A window begins this much before the measured edge: the probe sees a fault a little after it happened."""
Z_95: Final = 1.959964
RECOVERY_TARGET_S: Final = {"postgres": 600.0, "worker": 300.0}
"""The architecture's bounds: single database crash below 10 minutes, worker crash below 5 minutes."""


@dataclass(frozen=True)
class Window:
    """A stretch of time on the run's clock."""

    start_s: float
    end_s: float


@dataclass
class FaultRecord:
    """One fault as it was asked for, measured and recovered from; times are None where never seen."""

    id: int
    kind: str
    target: str
    requested_at: float
    measured_start: float | None = None
    measured_end: float | None = None
    healed_at: float | None = None
    recovered_at: float | None = None

    def window(self, until_s: float) -> Window:
        """Return when requests may have suffered from it; `until_s` ends it if no recovery was seen."""
        began = self.requested_at if self.measured_start is None else self.measured_start
        ends = [t for t in (self.recovered_at, self.measured_end, self.healed_at) if t is not None]
        return Window(min(began, self.requested_at) - EDGE_S, max(ends) if self.recovered_at else until_s)


def faults_of(timeline: pl.DataFrame) -> list[FaultRecord]:
    """Return the faults of a timeline, in the order of their ids; recovery is not on the timeline."""
    fields = {
        "fault_requested": "requested_at",
        "fault_start": "measured_start",
        "fault_end": "measured_end",
        "heal_requested": "healed_at",
    }
    found: dict[int, FaultRecord] = {}
    for row in timeline.filter(pl.col("fault_id").is_not_null()).sort("t").iter_rows(named=True):
        record = found.setdefault(
            row["fault_id"],
            FaultRecord(row["fault_id"], row["fault"] or "?", row["node"] or "?", float(row["t"])),
        )
        name = fields.get(row["kind"])
        if name is not None and (name == "requested_at" or getattr(record, name) is None):
            setattr(record, name, float(row["t"]))
    return [found[number] for number in sorted(found)]


def prepared(attempts: pl.DataFrame, load: Window) -> pl.DataFrame:
    """Return the attempts of the load with `latency_ms` and `bad` (unknown, 5xx, or no connection).

    An attempt without an answer has no latency. Attempts whose client hung up on purpose are left out.
    """
    answered = pl.col("t_return").is_finite()
    return attempts.filter(
        pl.col("intended").is_between(load.start_s, load.end_s)
        & pl.col("tag").is_in(["seed", FINAL_RETRY, HUNG_UP]).fill_null(False).not_()
    ).with_columns(
        pl.when(answered).then((pl.col("t_return") - pl.col("intended")) * 1000).alias("latency_ms"),
        (
            (pl.col("cls") == "info")
            | (pl.col("status") >= 500).fill_null(False)
            | ((pl.col("cls") == "fail") & pl.col("status").is_null())
        ).alias("bad"),
    )


def measure_recovery(
    faults: Sequence[FaultRecord], attempts: pl.DataFrame, series: pl.DataFrame, load_end_s: float
) -> None:
    """Set `recovered_at` of each measured fault: no more errors, and every backlog caught up.

    `attempts` as from `prepared`. A fault whose errors never ended, or whose backlog never came back under
    its bound, keeps None.
    """
    bad = np.sort(attempts.filter(pl.col("bad"))["intended"].to_numpy())
    backlog = series.filter(pl.col("name").is_in(["kafka_consumer_lag", "outbox_unpublished"]))
    for fault in faults:
        if fault.measured_end is None:
            continue
        quiet_s = fault.measured_end
        for moment in bad[np.searchsorted(bad, fault.measured_end) :]:
            if moment - quiet_s > QUIET_S:
                break
            quiet_s = float(moment)
        if load_end_s - quiet_s < QUIET_S and len(bad) and quiet_s == bad[-1]:
            # Requests failed until the load ended: nobody saw it work again.
            continue
        caught_up_s = _caught_up(backlog, quiet_s)
        if caught_up_s is not None:
            fault.recovered_at = caught_up_s


def _caught_up(backlog: pl.DataFrame, since_s: float) -> float | None:
    """Return when the last of the backlogs is first seen under its bound, None if one never is."""
    later = backlog.filter(pl.col("t") >= since_s)
    moment = since_s
    for _, samples in later.group_by("name", "node"):
        low = samples.filter(pl.col("value") <= RECOVERED_LAG)["t"].min()
        if low is None:
            return None
        first = samples["t"].min()
        # Already low at the first sample after the errors ended: it was not the backlog that took time.
        if low != first:
            moment = max(moment, float(str(low)))
    return moment


def phases_of(attempts: pl.DataFrame, faults: Sequence[FaultRecord], load: Window) -> pl.DataFrame:
    """Add `phase` to prepared attempts: before, fault, recovery or after, by the intended time.

    A request that began before a fault but was still waiting when it started belongs to the fault.
    """
    ended = pl.min_horizontal(pl.col("t_return"), pl.col("t_invoke") + 60.0)
    first = min((fault.window(load.end_s).start_s for fault in faults), default=math.inf)
    phase = pl.when(ended < first).then(pl.lit("before")).otherwise(pl.lit("after"))
    for fault in faults:
        window = fault.window(load.end_s)
        over = fault.measured_end if fault.measured_end is not None else window.end_s
        phase = (
            pl.when((pl.col("intended") > over) & (pl.col("intended") <= window.end_s))
            .then(pl.lit("recovery"))
            .otherwise(phase)
        )
    for fault in faults:
        window = fault.window(load.end_s)
        over = fault.measured_end if fault.measured_end is not None else window.end_s
        phase = pl.when((ended >= window.start_s) & (pl.col("intended") <= over)).then(pl.lit("fault")).otherwise(phase)
    return attempts.with_columns(phase.alias("phase"))


def phase_changes(faults: Sequence[FaultRecord], load: Window) -> list[tuple[float, str]]:
    """Return when the load was in which phase after `before`: (seconds, fault | recovery | after), in order."""
    windows = [fault.window(load.end_s) for fault in faults]
    over = [
        window.end_s if fault.measured_end is None else fault.measured_end
        for fault, window in zip(faults, windows, strict=True)
    ]
    edges = {edge for window in windows for edge in (window.start_s, window.end_s)} | set(over)
    changes: list[tuple[float, str]] = []
    for edge in sorted(edge for edge in edges if load.start_s <= edge < load.end_s):
        if any(window.start_s <= edge < end for window, end in zip(windows, over, strict=True)):
            phase = "fault"
        elif any(window.start_s <= edge < window.end_s for window in windows):
            phase = "recovery"
        else:
            phase = "after"
        if not changes or changes[-1][1] != phase:
            changes.append((edge, phase))
    return changes


def operations(attempts: pl.DataFrame) -> list[dict[str, Any]]:
    """Return counts and latencies of each operation in each phase; percentiles are of answered requests."""
    order = pl.Enum(["before", "fault", "recovery", "after"])
    latency = pl.col("latency_ms")
    table = (
        attempts.with_columns(pl.col("phase").cast(order))
        .group_by("op", "phase")
        .agg(
            pl.len().alias("count"),
            (pl.col("cls") == "ok").sum().alias("ok"),
            (pl.col("cls") == "fail").sum().alias("fail"),
            (pl.col("cls") == "info").sum().alias("info"),
            latency.quantile(0.5, "higher").round(3).alias("p50_ms"),
            latency.quantile(0.99, "higher").round(3).alias("p99_ms"),
            latency.max().round(3).alias("max_ms"),
        )
        .sort("op", "phase")
    )
    return table.with_columns(pl.col("phase").cast(pl.String)).to_dicts()


def proportion_interval(successes: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion. Raises ValueError for an empty sample."""
    if count <= 0:
        raise ValueError("a proportion of nothing has no interval")
    share, z2 = successes / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def quantile_interval(values: np.ndarray[Any, np.dtype[np.float64]], q: float) -> tuple[float, float, float]:
    """Return the q-quantile and its 95 % interval by order statistics, which assumes no distribution.

    The interval's ranks are those of the binomial distribution (normal approximation); where the sample is too
    small for the upper rank, the bound is the maximum. Raises ValueError for an empty sample.
    """
    if len(values) == 0:
        raise ValueError("an empty sample has no quantile")
    ordered = np.sort(values)
    count = len(ordered)
    half = Z_95 * math.sqrt(count * q * (1 - q))
    low = max(0, math.floor(count * q - half) - 1)
    high = min(count - 1, math.ceil(count * q + half))
    return float(ordered[min(count - 1, math.ceil(count * q) - 1)]), float(ordered[low]), float(ordered[high])


def reconciliation(ledger: pl.DataFrame, projection: pl.DataFrame) -> tuple[int, int]:
    """Return how many wallets' projection is the ledger's head, and how many wallets there are."""
    head = (
        ledger.sort("seq")
        .group_by("user_id")
        .agg(pl.col("seq").last().alias("head_seq"), pl.col("amount").sum().alias("head_balance"))
    )
    joined = head.join(projection.select("user_id", "seq", "balance"), on="user_id", how="left")
    same = (pl.col("seq") == pl.col("head_seq")) & (pl.col("balance") == pl.col("head_balance"))
    return int(joined.select(same.fill_null(False).sum()).item()), head.height


def _row(  # noqa: PLR0917 - the columns of the table, in their order
    metric: str,
    target: str | float | None,
    measured: float | None,
    unit: str,
    met: bool | None,
    method: str,
    interval: Sequence[float] | None = None,
) -> dict[str, Any]:
    return {
        "metric": metric,
        "target": target,
        "measured": None if measured is None else round(measured, 4),
        "interval": None if interval is None else [round(value, 4) for value in interval],
        "unit": unit,
        "met": met,
        "method": method,
    }


def rows(
    attempts: pl.DataFrame,
    faults: Sequence[FaultRecord],
    series: pl.DataFrame,
    load: Window,
    *,
    rate: float,
    acknowledged_bets: int,
    anomalies: Mapping[str, int],
    reconciled: tuple[int, int],
    events: int,
) -> list[dict[str, Any]]:
    """Return the table of service levels. `attempts` as from `phases_of`; `rate` is the bets/s asked for."""
    calm = attempts.filter(pl.col("phase").is_in(["before", "after"]))
    stormy = attempts.filter(~pl.col("phase").is_in(["before", "after"]))
    table = [*_availability(calm, stormy), _latency(calm)]
    duration_s = load.end_s - load.start_s
    table.append(
        _row(
            "Acknowledged bets",
            f"{rate:g} asked",
            acknowledged_bets / duration_s,
            "bets/s",
            None,
            f"{acknowledged_bets} distinct keys answered ACCEPTED over {duration_s:.1f} s of load, faults included",
        )
    )
    table.append(_lag(series, faults, load))
    duplicates = sum(anomalies.get(code, 0) for code in ("A02", "A22", "A27"))
    table.append(
        _row(
            "Duplicate entries",
            0,
            float(duplicates),
            "entries",
            duplicates == 0,
            "anomalies A02, A22 and A27 over the whole ledger",
        )
    )
    same, wallets = reconciled
    share = 100.0 * same / wallets if wallets else None
    table.append(
        _row(
            "Reconciliation match",
            "100",
            share,
            "%",
            None if share is None else same == wallets,
            f"{same} of {wallets} wallets: projection at the end = head of the ledger, balance and seq",
        )
    )
    table.extend(_recovery(fault) for fault in faults)
    table.append(
        _row(
            "Worker throughput",
            "> 100000",
            events / duration_s,
            "events/s",
            None,
            "events that passed through Kafka and every consumer, per second of load, on this one machine; the "
            "target is that of 100 consumers and is not extrapolated",
        )
    )
    return table


def _availability(calm: pl.DataFrame, stormy: pl.DataFrame) -> Iterable[dict[str, Any]]:
    for name, frame, target in (
        ("Availability", calm, AVAILABILITY_TARGET),
        ("Availability during faults", stormy, None),
    ):
        if frame.is_empty():
            continue
        good = int(frame.select((~pl.col("bad")).sum()).item())
        low, high = proportion_interval(good, frame.height)
        share = 100.0 * good / frame.height
        where = "outside" if target else "inside"
        yield _row(
            name,
            f">= {target}" if target else None,
            share,
            "%",
            share >= target if target else None,
            f"{frame.height - good} of {frame.height} requests {where} the fault windows were not answered or "
            "answered 5xx; refusals are answers; Wilson 95 %",
            (100.0 * low, 100.0 * high),
        )


def _latency(calm: pl.DataFrame) -> dict[str, Any]:
    # A request without an answer took at least as long as its client waited.
    waited = pl.coalesce("latency_ms", pl.lit(60_000.0))
    values = calm.select(waited).to_series().to_numpy()
    if len(values) == 0:
        return _row("API p99", f"< {LATENCY_TARGET_MS:g}", None, "ms", None, "no request outside the faults")
    p99, low, high = quantile_interval(values, 0.99)
    return _row(
        "API p99",
        f"< {LATENCY_TARGET_MS:g}",
        p99,
        "ms",
        p99 < LATENCY_TARGET_MS,
        f"from the intended time, {len(values)} requests outside the fault windows; 95 % by order statistics",
        (low, high),
    )


def _lag(series: pl.DataFrame, faults: Sequence[FaultRecord], load: Window) -> dict[str, Any]:
    samples = series.filter((pl.col("name") == "kafka_consumer_lag") & pl.col("t").is_between(load.start_s, load.end_s))
    for fault in faults:
        window = fault.window(load.end_s)
        samples = samples.filter(~pl.col("t").is_between(window.start_s, window.end_s))
    top = samples["value"].max()
    measured = None if top is None else float(str(top))
    return _row(
        "Consumer lag",
        f"< {LAG_TARGET}",
        measured,
        "records",
        None if measured is None else measured < LAG_TARGET,
        f"largest of {samples.height} samples (one a second and group) outside the fault windows",
    )


def _recovery(fault: FaultRecord) -> dict[str, Any]:
    role = "postgres" if fault.target.startswith("pg") else "worker"
    target = RECOVERY_TARGET_S[role] if fault.kind == "kill" else None
    if fault.recovered_at is not None and fault.measured_start is not None:
        measured = fault.recovered_at - fault.measured_start
    else:
        measured = None
    return _row(
        f"Recovery: {fault.kind} {fault.target}",
        f"< {target:g}" if target else None,
        measured,
        "s",
        None if target is None else measured is not None and measured < target,
        f"from the measured start of the fault until no request failed for {QUIET_S:g} s and every backlog was "
        f"below {RECOVERED_LAG} records",
    )
