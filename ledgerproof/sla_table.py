"""The architecture's service levels, each with what was measured here: from a run's verdict and a benchmark's rows.

A line says one of three things, and never one in the clothes of another:

    measured      seen here, at the scale the method names; it is met, missed, or has no target
    extrapolated  calculated from what was seen here, with its arithmetic; it never counts as met
    not measured  not seen here; the reason says why, and the nearest quantity that was seen is named

Pure: a verdict.json, a bench.json and the run's series in, lines out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from ledgerproof.sla import AVAILABILITY_TARGET, LAG_TARGET, LATENCY_TARGET_MS

MEASURED: Final = "measured"
EXTRAPOLATED: Final = "extrapolated"
NOT_MEASURED: Final = "not measured here"

MONTH_S: Final = 30 * 86_400
MONTH_BUDGET_S: Final = MONTH_S / 10_000
"""What 99.99 % leaves of a month, in seconds of all requests."""
EVENTS_TARGET: Final = 100_000
"""Events a second over all consumers, and requests a second over all API processes: the architecture's size."""
CONSUMERS: Final = 100
HEADROOM: Final = 0.7
"""A consumer that is busy for more of its time than this does not catch up after a pause (errata 43)."""
API_TARGET_S: Final = 60.0
REQUIRED: Final = ("Availability", "API p99", "Consumer lag", "Duplicate entries", "Reconciliation match")
"""Rows of a verdict without which the table is not proven."""
WORKER_ROWS: Final = {
    "relay_events": "relay",
    "projector_events": "projector",
    "matcher_bets": "matcher",
    "settler_bets": "settler",
}
PROVED: Final = ("PASS", "SLA_MISSED", "RESIDUE")
"""Verdicts of a run whose figures mean what they say."""


class Line(msgspec.Struct, kw_only=True):
    """One line of the table. `measured` and `interval` are in `unit`; None: there is no such figure."""

    level: str
    """The row of the architecture's table, or the scenario of its recovery plan."""
    of: str
    """What the line is about, if it is narrower than the level."""
    target: str
    alert: str = ""
    kind: str
    """measured, extrapolated or not measured here."""
    met: bool | None = None
    """Only of measured lines with a target."""
    measured: float | None = None
    interval: list[float] | None = None
    unit: str = ""
    says: str
    """The figure in words: what was measured, extrapolated to, or the nearest that was seen."""
    method: str
    """How it was measured and at which scale; the arithmetic; or why it could not be."""

    @property
    def result(self) -> str:
        """One or two words for the last column."""
        if self.kind != MEASURED:
            return self.kind
        return "measured" if self.met is None else "met" if self.met else "MISSED"


class Source(msgspec.Struct, kw_only=True):
    """Where the figures come from."""

    run: str
    verdict: str
    scale: str
    """The size of what was measured."""
    bench: str
    """Commit, machine and time of the benchmark; empty: there was none."""
    machine: dict[str, Any]
    commit: str
    version: str


class Table(msgspec.Struct, kw_only=True):
    """All lines, where they come from, and what keeps them from being proven."""

    lines: list[Line]
    source: Source
    missed: list[str]
    """Levels that were measured and not met."""
    unproven: list[str]
    """Why the table proves nothing, or not all that it should. Empty: it does."""
    made_at: str = ""

    @property
    def exit_code(self) -> int:
        """0: all measured levels met; 10: one missed; 30: not proven, which outweighs the others."""
        return 30 if self.unproven else 10 if self.missed else 0


def table(
    verdict: Mapping[str, Any],
    bench: Mapping[str, Any] | None = None,
    *,
    lag_in_faults: float | None = None,
    drift_s: float | None = None,
    api_ready_s: float | None = None,
    no_bench: str = "no benchmark was given: `ledgerproof sla` without --no-bench measures it",
) -> Table:
    """Return the table for a run's verdict and, for what only a benchmark measures, a bench.json.

    `lag_in_faults` is the largest consumer lag of the whole run, `drift_s` the seconds from planting a wrong balance
    until the service's reconciliation reported it and it was repaired, `api_ready_s` those from the kill of an API
    process until it was ready again; None: not recorded. `no_bench` says why there is no benchmark.

    Raises KeyError, TypeError or ValueError for dictionaries of another form.
    """
    rows = {row["metric"]: row for row in verdict["sla"]}
    config = verdict["config"]
    scale = (
        f"{config['rate']:g} bets/s for {config['duration_s']:g} s on {config['servers']} Postgres servers and "
        f"{config['apis']} API processes of one machine"
    )
    lines = [
        *_availability(rows, verdict, scale),
        *_latency(rows, bench, scale, no_bench),
        *_throughput(rows, bench, no_bench),
        *_lag(rows, lag_in_faults, scale),
        _plain(rows, "Duplicate entries", "Duplicate entries", "0", "> 0"),
        _plain(rows, "Reconciliation match", "Reconciliation match", "100 %", "< 99.99 %"),
        _api_crash(api_ready_s),
        *_recovery(verdict, rows, drift_s),
    ]
    unproven = []
    if verdict["verdict"] not in PROVED:
        because = "; ".join(verdict["reasons"][:3]) or "it gives no reason"
        unproven.append(f"the run ended {verdict['verdict']}: {because}")
    unproven += [
        f"{name} was not measured by the run" for name in REQUIRED if name not in rows or rows[name]["measured"] is None
    ]
    if unjudged := [code for code in ("A02", "A22", "A27") if code not in verdict["anomalies"]]:
        unproven.append(f"duplicates were not looked for: {', '.join(unjudged)} could not be checked")
    machine = verdict["machine"]
    return Table(
        lines=lines,
        source=Source(
            run=str(verdict["run"]),
            verdict=str(verdict["verdict"]),
            scale=scale,
            bench=""
            if bench is None
            else f"commit {bench['commit']}, {bench['started_at']}, {bench['machine']['cpu']}",
            machine=dict(machine),
            commit=str(verdict["commit"]),
            version=str(verdict["version"]),
        ),
        missed=list(dict.fromkeys(line.level for line in lines if line.met is False)),
        unproven=unproven,
    )


# -- lines -----------------------------------------------------------------------------------------------


def _plain(  # noqa: PLR0917 - the columns of the table, in their order
    rows: Mapping[str, Any], metric: str, level: str, target: str, alert: str, of: str = ""
) -> Line:
    """Return a row of the verdict as a line."""
    row = rows.get(metric)
    if row is None or row["measured"] is None:
        return _absent(level, of, target, alert, "" if row is None else row["method"])
    return Line(
        level=level,
        of=of,
        target=target,
        alert=alert,
        kind=MEASURED,
        met=row["met"],
        measured=row["measured"],
        interval=row["interval"],
        unit=row["unit"],
        says=_said(row),
        method=row["method"],
    )


def _absent(level: str, of: str, target: str, alert: str, why: str) -> Line:
    return Line(
        level=level,
        of=of,
        target=target,
        alert=alert,
        kind=NOT_MEASURED,
        says="–",
        method=f"the run did not measure it{': ' + why if why else ''}",
    )


def _availability(rows: Mapping[str, Any], verdict: Mapping[str, Any], scale: str) -> list[Line]:
    target, alert = "≥ 99.99 %", "< 99.98 %"
    calm = _plain(rows, "Availability", "Availability", target, alert, "of this run, outside the faults")
    calm.method += f"; {scale}"
    if calm.met and calm.interval is not None and calm.interval[0] < AVAILABILITY_TARGET:
        calm.method += "; met by what was seen: too few requests to exclude less than the target"
    stormy = rows.get("Availability during faults")
    month = Line(
        level="Availability",
        of="of a month",
        target=target,
        alert=alert,
        kind=NOT_MEASURED,
        says="–",
        method="a month is longer than a run, and no fault of this run was measured from which to calculate",
    )
    lost = None if stormy is None or stormy["measured"] is None else _lost_in_faults(stormy, verdict)
    kills = len(verdict["faults"])
    if lost is not None and kills:
        requests_per_s = sum(row["count"] for row in verdict["operations"]) / verdict["duration_s"]
        lost_s = lost / requests_per_s
        month.kind = EXTRAPOLATED
        # Rounded down, as part of a failure cannot be had, but not by what binary fractions lose.
        month.says = (
            f"{math.floor(round(MONTH_BUDGET_S / lost_s, 6)):,} rounds of the same {kills} faults in 30 days"
            if lost_s
            else f"no request was lost to the {kills} faults"
        )
        month.method = (
            f"0.01 % of 30 days is {MONTH_BUDGET_S:.1f} s of all requests. The {kills} faults of this run lost {lost} "
            f"requests at {requests_per_s:.0f}/s, that is {lost_s:.2f} s of all. {MONTH_BUDGET_S:.1f} ÷ {lost_s:.2f} "
            "rounds would use up the month, if nothing else failed and nodes were restarted as fast as here"
            if lost_s
            else f"0.01 % of 30 days is {MONTH_BUDGET_S:.1f} s of all requests, of which this run's faults used none"
        )
    inside = _plain(rows, "Availability during faults", "Availability", "none", "", "of this run, inside the faults")
    return [calm, *([inside] if stormy is not None else []), month]


def _lost_in_faults(row: Mapping[str, Any], verdict: Mapping[str, Any]) -> int:
    """Return how many requests inside the fault windows were not answered."""
    inside: int = sum(item["count"] for item in verdict["operations"] if item["phase"] in ("fault", "recovery"))
    return round(inside * (1 - float(row["measured"]) / 100))


def _latency(rows: Mapping[str, Any], bench: Mapping[str, Any] | None, scale: str, no_bench: str) -> list[Line]:
    target, alert = f"< {LATENCY_TARGET_MS:g} ms", f"> {LATENCY_TARGET_MS:g} ms"
    here = _plain(rows, "API p99", "API latency p99", target, alert, "of this run, outside the faults")
    here.method += f"; {scale}"
    whole = Line(
        level="API latency p99",
        of="at 100,000 requests/s",
        target=target,
        alert=alert,
        kind=NOT_MEASURED,
        says="–",
        method=no_bench,
    )
    best = _best(bench, "http_single_bets_accepted")
    if best is not None and best["p99_ms"] is not None:
        machines = math.ceil(EVENTS_TARGET / best["rate"])
        whole.kind = EXTRAPOLATED
        whole.says = f"{machines} machines like this one"
        whole.method = (
            f"{EVENTS_TARGET:,} ÷ {best['rate']:,.0f} bets/s, the highest rate that one such machine accepted with a "
            f"p99 of {best['p99_ms']:.0f} ms ({best['samples']:,} requests, generator on the same machine), if "
            "machines do not slow each other: wallets share nothing, a match and Kafka they share"
        )
    elif bench is not None:
        invalid = [row["reason"] for row in bench["rows"] if row["name"] == "http_single_bets_accepted"]
        whole.method = "the benchmark has no valid row http_single_bets_accepted" + "".join(
            f": {why}" for why in invalid
        )
    return [here, whole]


def _throughput(rows: Mapping[str, Any], bench: Mapping[str, Any] | None, no_bench: str) -> list[Line]:
    target, alert = f"> {EVENTS_TARGET:,} events/s", "< 80,000 events/s"
    offered = _plain(rows, "Worker throughput", "Worker throughput", "none", "", "as this run offered them")
    lines = [offered]
    found = {name: row for name in WORKER_ROWS if (row := _best(bench, name)) is not None}
    for name, row in found.items():
        lines.append(
            Line(
                level="Worker throughput",
                of=f"one {WORKER_ROWS[name]} on a backlog",
                target="none",
                kind=MEASURED,
                measured=round(row["rate"], 1),
                unit=row["unit"],
                says=f"{row['rate']:,.0f} {row['unit']}",
                method=f"bench row {name}: {row['samples']:,} done in {row['duration_s']:.1f} s, nothing else running",
            )
        )
    whole = Line(
        level="Worker throughput",
        of=f"over {CONSUMERS} consumers",
        target=target,
        alert=alert,
        kind=NOT_MEASURED,
        says="–",
        method=no_bench if bench is None else "the benchmark has no valid row of relay or projector",
    )
    # Relay and projector see every event; matcher and settler only those of bets and matches.
    each = {name: row["rate"] for name, row in found.items() if name in ("relay_events", "projector_events")}
    if "projector_events" in each:
        slow = min(each, key=lambda name: each[name])
        rate = each[slow]
        whole.kind = EXTRAPOLATED
        whole.says = f"{math.ceil(EVENTS_TARGET / (HEADROOM * rate))} of the slowest worker"
        whole.method = (
            f"{EVENTS_TARGET:,} events/s ÷ ({HEADROOM:g} × {rate:,.0f} events/s of one {WORKER_ROWS[slow]}): busy for "
            f"{HEADROOM:.0%} of the time, so that a pause is caught up. {CONSUMERS} of them would carry "
            f"{CONSUMERS * HEADROOM * rate:,.0f} events/s. It holds if workers on other machines, servers and "
            "partitions do not slow each other, which one machine cannot show"
        )
    return [*lines, whole]


def _lag(rows: Mapping[str, Any], in_faults: float | None, scale: str) -> list[Line]:
    target, alert = f"< {LAG_TARGET:,} records", "> 100,000 records"
    calm = _plain(rows, "Consumer lag", "Consumer lag", target, alert, "of this run, outside the faults")
    calm.method += f"; {scale}"
    lines = [calm]
    if in_faults is not None:
        lines.append(
            Line(
                level="Consumer lag",
                of="of this run, faults included",
                target="none",
                alert=alert,
                kind=MEASURED,
                measured=in_faults,
                unit="records",
                says=f"{in_faults:,.0f} records",
                method="largest of all samples of the run (one a second and group)",
            )
        )
    return lines


def _api_crash(ready_s: float | None) -> Line:
    line = Line(
        level="Recovery: API crash",
        of="",
        target=f"< {API_TARGET_S:g} s",
        kind=NOT_MEASURED,
        says="–",
        method="the standard faults kill no API process: give what `ledgerproof checklist --json FILE` measured, with "
        "--checklist FILE",
    )
    if ready_s is not None:
        line.kind, line.met, line.measured, line.unit = MEASURED, ready_s < API_TARGET_S, ready_s, "s"
        line.says = f"{ready_s:.1f} s"
        line.method = "from the kill until the process, started again by its controller, said that it was ready"
    return line


def _recovery(verdict: Mapping[str, Any], rows: Mapping[str, Any], drift_s: float | None) -> list[Line]:
    """Return the scenarios of the recovery plan."""
    lines: list[Line] = []
    for fault in verdict["faults"]:
        metric = f"Recovery: {fault['kind']} {fault['target']}"
        row = rows.get(metric)
        if row is None:
            continue
        sort = _sort_of(fault)
        line = _plain(rows, metric, sort, _target(row), "", f"{fault['kind']} {fault['target']}")
        if line.kind == NOT_MEASURED:
            # It was broken and not seen to recover: that is a result, and no gap of the measurement.
            line.kind, line.met, line.says = MEASURED, row["met"], "not recovered"
            line.method = row["method"]
        if fault["kind"] == "kill" and fault["target"].startswith("pg"):
            line.method += "; the same server is started again: this stack has no replica to fail over to"
        lines.append(line)
    named = {line.level for line in lines}
    for sort, target in (("Recovery: worker crash", "< 300 s"), ("Recovery: single database crash", "< 600 s")):
        if sort not in named:
            lines.append(_absent(sort, "", target, "", "it had no such fault"))
    lines.append(
        Line(
            level="Recovery: data corruption",
            of="",
            target="< 3600 s",
            kind=NOT_MEASURED,
            says="–" if drift_s is None else f"a wrong read balance was reported and repaired after {drift_s:.1f} s",
            method="restoring a ledger from a backup was not part of the run"
            + ("" if drift_s is None else "; the nearest is a balance of the read model that the run made wrong"),
        )
    )
    lines += [
        Line(
            level=level,
            of="",
            target=target,
            kind=NOT_MEASURED,
            says="–",
            method=why,
        )
        for level, target, why in (
            (
                "Recovery: entire region down",
                "< 1800 s",
                "one machine is one region; there is no second one to activate",
            ),
            ("Data lost by a disaster (RPO)", "< 300 s", "needs a disk that is lost and a backup or standby elsewhere"),
        )
    ]
    return lines


def _sort_of(fault: Mapping[str, Any]) -> str:
    if fault["kind"] != "kill":
        return "Recovery: others"
    return "Recovery: single database crash" if fault["target"].startswith("pg") else "Recovery: worker crash"


def _target(row: Mapping[str, Any]) -> str:
    return "none" if row["target"] is None else f"{row['target']} {row['unit']}"


def _best(bench: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    """Return the fastest valid row of a name."""
    rows: Sequence[Mapping[str, Any]] = () if bench is None else bench["rows"]
    valid = [row for row in rows if row["name"] == name and row["valid"] and row["rate"]]
    return max(valid, key=lambda row: float(row["rate"]), default=None)


def _said(row: Mapping[str, Any]) -> str:
    digits = 4 if row["unit"] == "%" else 1
    text = f"{_number(row['measured'], digits)} {row['unit']}"
    if row["interval"] is None:
        return text
    low, high = (_number(value, digits) for value in row["interval"])
    return f"{text} ({low} to {high})"


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.{digits}f}"
