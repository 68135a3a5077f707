"""The rows of reads, each with proof of where the answers came from, and the generator's own ceiling."""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from redis import Redis

from ledgerproof.bench import usage
from ledgerproof.bench.context import FIRST_USER, Bench, BenchFailed
from ledgerproof.bench.drive import ROOT, play
from ledgerproof.bench.http_rows import generator_details
from ledgerproof.bench.plan import Window
from ledgerproof.bench.row import FSYNC_NONE, ended

CONNECTIONS: Final = 32
CEILING_CONNECTIONS: Final = 64
MARKER: Final = '"source":"'
CLAIMED_SHARE_MIN: Final = 0.995
"""A row whose answers came from elsewhere more often than the rest is not that row."""
HOT_WALLETS: Final = 5_000
"""Wallets of the Redis row: all of them are read again long before their values expire."""
CEILING: Final = "generator_ceiling"
WRK_THREADS: Final = 1
WRK_GRACE_S: Final = 20.0
START_TIMEOUT_S: Final = 10.0


def ceiling(bench: Bench) -> None:
    """Measure the generator against a responder that does nothing."""
    with static_server() as port:
        plan = bench.plan(
            "static",
            loop="closed",
            duration_s=bench.sizes.read_s,
            requests_max=1,
            repeat=True,
            ports=[port],
            connections=CEILING_CONNECTIONS,
        )
        window = play(plan)
    row = bench.row(
        CEILING,
        unit="requests/s",
        rate=round(window.accepted_per_s, 1),
        p50_ms=window.p50_ms,
        p99_ms=window.p99_ms,
        loop=f"closed, {CEILING_CONNECTIONS} connections",
        duration_s=round(window.duration_s, 2),
        samples=window.answered,
        cpu_ms_per_op=usage.per_operation_ms({"generator": window.cpu_s}, window.answered),
        fsync=FSYNC_NONE,
        reason=f"{1e6 * window.cpu_s / max(1, window.answered):.0f} µs of CPU a request",
        details=generator_details(window),
    )
    bench.add(row)


@contextlib.contextmanager
def static_server() -> Iterator[int]:
    """Run the responder that does nothing in a process of its own and give its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ledgerproof.bench.static_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise BenchFailed("the responder of the generator's ceiling did not start")
        yield int(line)
    finally:
        process.kill()
        process.wait(START_TIMEOUT_S)
        process.stdin.close()
        process.stdout.close()


def from_redis(bench: Bench) -> None:
    """Measure balances that are cached."""
    bench.open_workload()
    bench.drain()
    users = min(HOT_WALLETS, bench.sizes.wallets)
    # Each wallet once, which puts into the cache what is not there.
    play(bench.plan("balances", loop="closed", duration_s=60.0, requests_max=users, users=users))
    fields: dict[str, Any] = {"requests_max": users, "users": users, "repeat": True}
    _read(bench, "reads_redis", "redis", "hot wallets", fields)


def from_projection(bench: Bench) -> None:
    """Measure balances that are not cached: Redis is emptied and every wallet read once at most."""
    bench.open_workload()
    bench.drain()
    with Redis(
        host=bench.config.redis_host, port=bench.config.redis_port, password=bench.config.redis_password
    ) as redis:
        redis.flushdb()
    fields = {"requests_max": bench.sizes.wallets}
    _read(bench, "reads_projection", "projection", "Redis misses", fields)


def from_ledger(bench: Bench) -> None:
    """Measure balances read from the ledger itself."""
    bench.open_workload()
    fields = {"requests_max": bench.sizes.wallets, "repeat": True, "query": "?consistency=strong"}
    _read(bench, "reads_ledger", "ledger", "consistency=strong", fields)


def _read(bench: Bench, name: str, source: str, variant: str, fields: dict[str, Any]) -> None:
    age = bench.entries()
    plan = bench.plan(
        "balances",
        loop="closed",
        duration_s=bench.sizes.read_s,
        connections=CONNECTIONS,
        marker=MARKER,
        **fields,
    )
    window, used = bench.measured(plan)
    row = bench.row(
        name,
        variant=variant,
        unit="reads/s",
        rate=round(window.accepted_per_s, 1),
        p50_ms=window.p50_ms,
        p99_ms=window.p99_ms,
        floor=CEILING,
        loop=f"closed, {CONNECTIONS} connections",
        data_age=age,
        duration_s=round(window.duration_s, 2),
        samples=window.answered,
        cpu_ms_per_op=usage.per_operation_ms(used, window.answered),
        fsync=FSYNC_NONE,
        details={**generator_details(window), "sources": window.marks, "statuses": window.statuses},
    )
    problem = wrong_source(window, source)
    if problem:
        ended(row, problem)
    elif name == "reads_redis":
        row.details["wrk"] = _wrk(bench)
        if row.details["wrk"]:
            row.reason = f"wrk: {row.details['wrk']['rate']:,.0f}/s, p99 {row.details['wrk']['p99_ms']:g} ms"
    bench.add(row)


def wrong_source(window: Window, source: str) -> str | None:
    """Return why the answers are not what the row claims, None if they are."""
    if window.answered == 0 or window.accepted < window.due:
        return f"{window.due - window.accepted} of {window.due} reads failed: {window.statuses} {window.first_problem}"
    claimed = window.marks.get(source, 0)
    if claimed < CLAIMED_SHARE_MIN * window.answered:
        return f"only {claimed} of {window.answered} answers came from {source}: {window.marks}"
    return None


def _wrk(bench: Bench) -> dict[str, float]:
    """Measure the same reads with wrk, where it is installed; empty where it is not."""
    program = shutil.which("wrk")
    if program is None:
        return {}
    users = min(HOT_WALLETS, bench.sizes.wallets)
    seconds = max(2, round(bench.sizes.read_s))
    with tempfile.TemporaryDirectory(prefix="ledgerproof-wrk-") as folder:
        script = Path(folder) / "reads.lua"
        script.write_text(
            f"request = function() return wrk.format('GET', '/v1/wallets/' .. math.random({FIRST_USER}, "
            f"{FIRST_USER + users - 1}) .. '/balance') end\n"
            + (f"wrk.headers['Authorization'] = 'Bearer {bench.token}'\n" if bench.token else "")
        )
        command = [
            *(program, f"-t{WRK_THREADS}", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(script)),
            f"http://127.0.0.1:{bench.api_ports[0]}",
        ]
        done = subprocess.run(  # noqa: S603 - our own words
            command, capture_output=True, text=True, timeout=seconds + WRK_GRACE_S, check=False
        )
    if done.returncode != 0:
        raise BenchFailed(f"wrk ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return parse_wrk(done.stdout)


def parse_wrk(text: str) -> dict[str, float]:
    """Return rate (requests/s), p50_ms and p99_ms of what `wrk --latency` printed. Raises BenchFailed."""
    units = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    latencies = {
        share: float(value) * units[unit] for share, value, unit in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", text)
    }
    if rate is None or set(latencies) != {"50", "99"}:
        raise BenchFailed(f"wrk printed something unexpected: {text[-300:]}")
    return {"rate": float(rate[1]), "p50_ms": latencies["50"], "p99_ms": latencies["99"]}
