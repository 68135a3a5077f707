"""Made-up run folders for the tests of the report: the shapes of a real run, none of its truth.

`write_run(folder, kind)` writes 60 s of 1,000 attempts/s against four servers, three faults in them. Times
are seconds since the run's origin; everything follows from one seed, so a page can be compared byte by byte.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from invariants.history import SCHEMA

Kind = Literal["pass", "sla_missed", "violated", "invalid", "aborted", "residue"]
KINDS: tuple[Kind, ...] = ("pass", "sla_missed", "violated", "invalid", "aborted", "residue")

ORIGIN_UNIX = 1_763_900_000.0
PHASES = (
    ("seed", 0.0),
    ("before", 5.0),
    ("fault", 17.0),
    ("recovery", 48.0),
    ("after", 53.0),
    ("drain", 65.0),
    ("resolve", 69.5),
    ("check", 74.0),
)
LOAD_START_S, LOAD_END_S = 5.0, 65.0
OPS = ("bet", "deposit", "withdraw", "cancel", "balance", "entries", "settle_match")
SHARES = (0.55, 0.10, 0.05, 0.06, 0.19, 0.045, 0.005)
MEDIAN_MS = {
    "bet": 9.0,
    "deposit": 8.0,
    "withdraw": 8.5,
    "cancel": 7.0,
    "balance": 1.4,
    "entries": 4.0,
    "settle_match": 15.0,
}
FAULTS: tuple[dict[str, Any], ...] = (
    {
        "id": 1,
        "kind": "kill",
        "target": "pg1",
        "requested_at": 18.0,
        "measured_start": 18.04,
        "measured_end": 25.31,
        "healed_at": 24.0,
        "recovered_at": 27.4,
    },
    {
        "id": 2,
        "kind": "kill",
        "target": "relay0",
        "requested_at": 31.0,
        "measured_start": 31.01,
        "measured_end": 36.2,
        "healed_at": 35.0,
        "recovered_at": 40.1,
    },
    {
        "id": 3,
        "kind": "pause",
        "target": "redis",
        "requested_at": 38.5,
        "measured_start": 38.52,
        "measured_end": 46.02,
        "healed_at": 46.0,
        "recovered_at": 46.9,
    },
)
CHECKED = (
    "A01 A02 A03 A04 A05 A07 A09 A10 A11 A12 A21 A22 A27 A30 A31 V01 V02 V03".split()  # noqa: SIM905 (a row reads better)
)
SOMETIMES = {
    "info_resolved_applied": 118,
    "info_resolved_not_applied": 92,
    "retry_replayed": 431,
    "same_key_raced_on_two_apis": 57,
    "same_key_other_body_refused": 44,
    "commit_succeeded_answer_lost": 118,
    "server_killed_between_commit_and_answer": 61,
    "relay_died_between_send_and_mark": 1,
    "consumer_got_event_again": 640,
    "projection_dropped_duplicate": 640,
    "stale_read_flagged": 903,
    "funds_refused_under_contention": 212,
    "backlog_over_10000_then_drained": 0,
    "two_faults_overlapped": 0,
}


def _attempts(rng: np.random.Generator, rate_per_s: int) -> pl.DataFrame:
    """Return one row an attempt: due, sent, done (null if never), result, op, key, user, status."""
    count = int((LOAD_END_S - LOAD_START_S) * rate_per_s)
    due = np.sort(rng.uniform(LOAD_START_S, LOAD_END_S, count))
    lag = rng.exponential(0.0004, count)
    op = rng.choice(OPS, count, p=SHARES)
    user = rng.integers(1, 20_000, count)
    server = user % 4
    median = np.array([MEDIAN_MS[name] for name in op])
    latency = median / 1000 * rng.lognormal(0, 0.45, count)
    spike = rng.uniform(size=count) < 0.008
    latency = np.where(spike, latency * rng.uniform(3, 9, count), latency)
    result = np.full(count, "ok", dtype=object)
    status = np.where(np.isin(op, ("balance", "entries")), 200, 202)
    outcome = np.full(count, "ACCEPTED", dtype=object)
    refused = np.isin(op, ("bet", "withdraw")) & (rng.uniform(size=count) < 0.012)
    result[refused], outcome[refused] = "fail", "INSUFFICIENT_FUNDS"
    status = np.where(refused, 422, status)
    down = (server == 1) & (due > 18.04) & (due < 25.31)
    luck = rng.uniform(size=count)
    lost = down & (luck < 0.06)
    gone = down & ~lost
    result[lost], result[gone] = "info", "fail"
    outcome[lost | gone] = None
    status = np.where(gone, 503, np.where(lost, 504, status))
    latency = np.where(lost, 2.0, np.where(gone, rng.uniform(0.001, 0.3, count), latency))
    queue = (server == 1) & (due >= 25.31) & (due < 28)
    latency = np.where(queue, latency + (28 - due) * 0.25, latency)
    slow_reads = np.isin(op, ("balance",)) & (due > 38.5) & (due < 46)
    latency = np.where(slow_reads, latency + rng.uniform(0.02, 0.06, count), latency)
    return pl.DataFrame(
        {
            "attempt": np.arange(1, count + 1),
            "op": op.astype(str),
            "due": due,
            "sent": due + lag,
            "done": due + lag + latency,
            "result": result.astype(str),
            "status": status.astype(np.int16),
            "outcome": outcome.tolist(),
            "user": user,
        }
    ).with_columns(
        key=pl.format("k-{}", "attempt"),
        tag=pl.when(pl.col("attempt") % 140 == 0).then(pl.lit("retry")).otherwise(None),
    )


def _write_history(folder: Path, run: str, attempts: pl.DataFrame, parts: int = 3) -> None:
    common = {
        "run": pl.lit(run),
        "client": (pl.col("attempt") % 16).cast(pl.Int32),
        "payload_hash": pl.lit("0" * 16),
        "api": pl.format("api{}", pl.col("attempt") % 2),
        "amount": pl.lit(1000, pl.Int64),
    }
    invokes = attempts.select(
        pl.lit("invoke").alias("record"),
        "attempt",
        "op",
        "key",
        "user",
        pl.col("due").alias("intended"),
        pl.col("sent").alias("t"),
        pl.lit(None, pl.Int16).alias("status"),
        pl.lit(None, pl.String).alias("outcome"),
        "tag",
        **common,
    )
    returns = attempts.select(
        pl.col("result").alias("record"),
        "attempt",
        "op",
        "key",
        "user",
        pl.col("due").alias("intended"),
        pl.col("done").alias("t"),
        "status",
        "outcome",
        "tag",
        **common,
    )
    records = pl.concat([invokes, returns]).sort("t")
    records = records.select(
        (pl.col(name) if name in records.columns else pl.lit(None).alias(name)).cast(kind)
        for name, kind in SCHEMA.items()
    )
    history = folder / "history"
    history.mkdir()
    size = -(-records.height // parts)
    lines = []
    for number in range(parts):
        part = records.slice(number * size, size)
        path = history / f"part-{number:06d}.parquet"
        part.write_parquet(path)
        lines.append(
            json.dumps(
                {
                    "file": path.name,
                    "rows": part.height,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
            )
        )
    lines.append(json.dumps({"closed": True, "parts": parts, "rows": records.height}))
    (history / "manifest.jsonl").write_text("\n".join(lines) + "\n")


def _timeline() -> pl.DataFrame:
    rows: list[dict[str, Any]] = [{"t": t, "kind": "phase", "detail": name} for name, t in PHASES]
    for fault in FAULTS:
        about = {"node": fault["target"], "fault": fault["kind"], "fault_id": fault["id"]}
        rows += [
            {"t": fault["requested_at"], "kind": "fault_requested", **about},
            {"t": fault["measured_start"], "kind": "fault_start", **about},
            {"t": fault["measured_end"], "kind": "fault_end", **about},
            {"t": fault["healed_at"], "kind": "heal_requested", **about},
        ]
    rows += [
        {"t": 18.05, "kind": "process_death", "node": "pg1"},
        {"t": 24.2, "kind": "process_start", "node": "pg1"},
    ]
    schema = {
        "t": pl.Float64,
        "kind": pl.String,
        "node": pl.String,
        "fault": pl.String,
        "fault_id": pl.Int32,
        "detail": pl.String,
    }
    return pl.DataFrame(rows, schema=schema).sort("t")


def _series(rng: np.random.Generator) -> pl.DataFrame:
    times = np.arange(0, 74, 0.5)
    frames = []

    def add(name: str, node: str | None, values: Any) -> None:
        frames.append(
            pl.DataFrame(
                {"t": times, "name": name, "node": node, "value": values},
                schema={"t": pl.Float64, "name": pl.String, "node": pl.String, "value": pl.Float64},
            )
        )

    loaded = (times > LOAD_START_S) & (times < LOAD_END_S)
    for index in range(4):
        base = np.where(loaded, rng.poisson(18, len(times)), 0).astype(float)
        relay = np.interp(times, [31, 36.2, 40.1], [0, 1150, 0], left=0, right=0)
        own = np.interp(times, [25.3, 25.8, 27.4], [0, 700, 0], left=0, right=0) if index == 1 else 0
        add("outbox_unpublished", f"pg{index}", base + relay * (1 + 0.1 * index) + own)
    for group, burst in (("matcher", 900.0), ("settler", 220.0), ("projector", 4200.0)):
        lag = np.interp(times, [36, 38, 43], [0, burst, 0], left=0, right=0)
        tail = np.interp(times, [64, 65, 67], [0, burst / 4, 0], left=0, right=0)
        add("kafka_consumer_lag", group, np.where(loaded, rng.poisson(40, len(times)), 0) + lag + tail)
    add("generator_lag_ms", None, np.where(loaded, rng.gamma(2, 0.5, len(times)), 0))
    add(
        "in_flight",
        None,
        np.where(loaded, 12 + np.interp(times, [18, 21, 25.3, 28], [0, 60, 180, 0], left=0, right=0), 0),
    )
    rss = {
        "pg0": 95.0,
        "pg1": 93.0,
        "pg2": 96.0,
        "pg3": 94.0,
        "kafka": 430.0,
        "redis": 14.0,
        "api0": 82.0,
        "api1": 81.0,
        "relay0": 61.0,
        "matcher0": 64.0,
        "settler0": 58.0,
        "projector0": 66.0,
    }
    for node, mb in rss.items():
        grown = mb * (1 + 0.25 * times / times.max())
        use = 0.02 + 0.28 * (node.startswith(("pg", "api"))) + 0.2 * (node == "kafka")
        down = (times > 18.04) & (times < 24.2) & (node == "pg1")
        add("rss_mb", node, np.where(down, 0.0, grown))
        add("cpu_seconds", node, np.cumsum(np.where(down, 0.0, use * 0.5 * np.where(loaded, 1, 0.1))))
    return pl.concat(frames)


def _operations(attempts: pl.DataFrame) -> list[dict[str, Any]]:
    bounds = [t for _, t in PHASES]
    names = [name for name, _ in PHASES]
    phase = [names[int(np.searchsorted(bounds, t, side="right")) - 1] for t in attempts["due"]]
    took = (attempts["done"] - attempts["due"]) * 1000
    frame = attempts.with_columns(phase=pl.Series(phase), took=took)
    answered = pl.col("took").filter(pl.col("result") != "info")
    return (
        frame.group_by("op", "phase")
        .agg(
            count=pl.len(),
            ok=(pl.col("result") == "ok").sum(),
            fail=(pl.col("result") == "fail").sum(),
            info=(pl.col("result") == "info").sum(),
            p50_ms=answered.quantile(0.5),
            p99_ms=answered.quantile(0.99),
            max_ms=answered.max(),
        )
        .sort("op", "phase")
        .to_dicts()
    )


def _write_snapshot(folder: Path, attempts: pl.DataFrame) -> None:
    keyed = attempts.filter(pl.col("op").is_in(["bet", "deposit", "withdraw"]))
    applied = keyed.filter((pl.col("result") == "ok") | ((pl.col("result") == "info") & (pl.col("attempt") % 2 == 0)))
    for name in ("snapshot-1", "snapshot-2"):
        (folder / name).mkdir()
        applied.select(
            pl.format("pg{}", pl.col("user") % 4).alias("server"),
            pl.col("user").alias("user_id"),
            pl.col("key").alias("idempotent_key"),
        ).write_parquet(folder / name / "ledger.parquet")
        keyed.filter(pl.col("status") == 422).select(
            pl.format("pg{}", pl.col("user") % 4).alias("server"),
            pl.col("user").alias("user_id"),
            pl.col("key").alias("idempotent_key"),
        ).write_parquet(folder / name / "refusals.parquet")


def verdict_of(kind: Kind, attempts: pl.DataFrame) -> dict[str, Any]:
    """Return the verdict.json of a made-up run as a dict."""
    bets = attempts.filter((pl.col("op") == "bet") & (pl.col("result") == "ok")).height
    info = attempts.filter(pl.col("result") == "info").height
    anomalies = dict.fromkeys(CHECKED, 0)
    verdict: dict[str, Any] = {
        "verdict": "PASS",
        "exit_code": 0,
        "run": f"20251123-121320-{kind}",
        "seed": 20251123,
        "commit": "f1932bd0c4f5a1e2b7d3a96f0c1b2d3e4f5a6b7c",
        "machine": {
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "memory_gb": 23.4,
            "os": "Debian GNU/Linux 12 (bookworm), Linux 6.1",
            "python": "3.11.7",
        },
        "started_at": "2025-11-23T12:13:20Z",
        "origin_unix": ORIGIN_UNIX,
        "duration_s": 60.0,
        "config": {
            "duration_s": 60,
            "rate_per_s": 1000,
            "servers": 4,
            "faults": "standard",
            "users": 20000,
            "service": {
                "writer_batch": 256,
                "relay_poll_ms": 100,
                "passwords": {"ledger_api": "not-to-be-shown"},
            },
        },
        "acknowledged_bets": bets,
        "bets_per_s": bets / 60,
        "anomalies": anomalies,
        "witnesses": [],
        "unresolved": 0,
        "sometimes": SOMETIMES,
        "faults": [dict(fault) for fault in FAULTS],
        "sla": [
            _sla(
                "Acknowledged bets",
                30_000,
                bets,
                None,
                "bets",
                True,
                "count of 202 answers to bets, seed phase excluded",
            ),
            _sla(
                "Bet latency p99, no fault",
                100.0,
                41.7,
                [39.2, 44.8],
                "ms",
                True,
                "from the scheduled time; before and after; bootstrap over 1 s blocks, 95 %",
            ),
            _sla(
                "Availability outside faults",
                99.9,
                99.986,
                [99.97, 99.995],
                "%",
                True,
                "answered attempts; Wilson interval, 95 %",
            ),
            _sla("Recovery after a fault", 30.0, 4.99, None, "s", True, "largest time from heal to recovered"),
            _sla(
                "Availability during faults",
                None,
                93.61,
                [93.2, 94.0],
                "%",
                None,
                "answered attempts inside measured windows",
            ),
        ],
        "operations": _operations(attempts),
        "generator": {
            "lag_p99_ms": 2.31,
            "late": 41,
            "dropped": 0,
            "scheduled": attempts.height,
            "sent": attempts.height,
        },
        "sizes": {
            "ledger_rows": 46_215,
            "outbox_rows": 71_402,
            "kafka_records": 71_402,
            "history_bytes": 4_812_044,
        },
        "timings": {"stack_s": 17.2, "load_s": 60.0, "drain_s": 4.5, "check_s": 8.4, "total_s": 96.3},
        "residue": [],
        "reasons": [],
        "version": "0.1.0",
    }
    if kind == "sla_missed":
        verdict["verdict"], verdict["exit_code"] = "SLA_MISSED", 10
        verdict["sla"][1].update(measured=183.4, interval=[171.0, 196.2], met=False)
        verdict["reasons"] = ["Bet latency p99, no fault: 183.4 ms, target 100 ms"]
    elif kind == "violated":
        verdict["verdict"], verdict["exit_code"] = "INVARIANT_VIOLATED", 20
        anomalies.update({"A01": 3, "A02": 61, "A09": 1})
        verdict["reasons"] = [
            "A01: 3 acknowledged keys have no entry",
            "A02: 61 keys have more than one effect",
            "A09: 1 broken chain",
        ]
        verdict["witnesses"] = [
            {
                "code": "A01",
                "key": f"k-{n}",
                "user": 101 + n,
                "seq": None,
                "text": "answered 202 with seq 14 at t = 18.031 s, no entry in pg1",
            }
            for n in (5121, 5188, 5190)
        ]
        verdict["witnesses"] += [
            {
                "code": "A02",
                "key": f"k-{7000 + n}-<b>" + "x" * 60,
                "user": 1 + n,
                "seq": 9,
                "text": "two entries, seq 9 and seq 10, both −1000",
            }
            for n in range(40)
        ]
        verdict["witnesses"].append(
            {
                "code": "A09",
                "key": "ledger:REFUND:0198a1f2-7b52-7cc3-9d3e-2f6a1e0b7711:0",
                "user": 7101,
                "seq": 22,
                "text": "balance_snapshot 51200, expected 51100 + 0",
            }
        )
    elif kind == "invalid":
        verdict["verdict"], verdict["exit_code"] = "INVALID", 30
        verdict["unresolved"] = 7
        anomalies["V03"] = 1
        verdict["faults"][2].update(measured_start=None, measured_end=None, recovered_at=None)
        verdict["generator"].update(lag_p99_ms=412.0, late=18_411, dropped=2_904, sent=attempts.height - 2_904)
        verdict["reasons"] = [
            "V03: pause redis was requested but its effect was never measured",
            "the generator fell behind: 412 ms late at the 99th percentile; this machine held 610 attempts/s",
            f"7 of {info} unknown outcomes could not be resolved",
        ]
    elif kind == "residue":
        verdict["verdict"], verdict["exit_code"] = "RESIDUE", 50
        verdict["residue"] = ["process 4312 (postgres) still running after stop"]
        verdict["reasons"] = ["1 process was left behind"]
    return verdict


def _sla(
    metric: str, target: Any, measured: Any, interval: Any, unit: str, met: bool | None, method: str
) -> dict[str, Any]:
    return {
        "metric": metric,
        "target": target,
        "measured": measured,
        "interval": interval,
        "unit": unit,
        "met": met,
        "method": method,
    }


def write_run(folder: Path, kind: Kind = "pass", *, rate_per_s: int = 1000, seed: int = 7) -> Path:
    """Write a whole run folder of the given kind below `folder` and return its path.

    "aborted" is a run that stopped before its load: only verdict.json and config.json are there.
    """
    rng = np.random.default_rng(seed)
    attempts = _attempts(rng, rate_per_s)
    verdict = verdict_of(kind, attempts)
    run = folder / str(verdict["run"])
    run.mkdir(parents=True)
    if kind == "aborted":
        verdict = {
            key: verdict[key] for key in ("run", "seed", "commit", "machine", "started_at", "config", "version")
        } | {
            "verdict": "ABORTED",
            "exit_code": 40,
            "reasons": ["free disk space 1.2 GB is under the bound of 2 GB; free some or choose another --out"],
            "acknowledged_bets": 0,
            "bets_per_s": 0.0,
            "timings": {"stack_s": 3.1, "total_s": 3.4},
        }
    (run / "verdict.json").write_text(json.dumps(verdict))
    (run / "config.json").write_text(json.dumps(verdict["config"]))
    if kind == "aborted":
        return run
    _write_history(run, str(verdict["run"]), attempts)
    _timeline().write_parquet(run / "timeline.parquet")
    _series(rng).write_parquet(run / "series.parquet")
    _write_snapshot(run, attempts)
    (run / "logs").mkdir()
    for node in ("pg0", "pg1", "api0", "relay0"):
        (run / "logs" / f"{node}.log").write_text(f"{node} started\n" * 50)
    return run
