"""Measures one configuration of the service for the capacity model: an idle window, given rates, and saturation.

Everything is read from outside of the window: CPU of each process, of the machine, and what the writers say of their
batches. The ledger is judged at the end, for a rate of a ledger that lost something is no rate.
"""

import asyncio
import contextlib
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import psutil
import uvloop

from compose.stack import DEFAULT_ROOT, Stack
from compose.state import StackSpec
from ledgerproof.bench.check import check
from ledgerproof.bench.context import Bench
from ledgerproof.bench.drive import play
from ledgerproof.bench.lag import scrape
from ledgerproof.bench.options import QUICK, BenchOptions
from ledgerproof.bench.plan import CURVE_PERCENTS
from ledgerproof.bench.plan import Plan as LoadPlan
from ledgerproof.interrupts import terminate_as_interrupt
from ledgerproof.machine import commit, describe_machine
from ledgerproof.modelling.outages import measure_outage
from ledgerproof.modelling.reading import counted
from ledgerproof.progress import Progress
from sim.cases import Burst, Cases, Measured, OutageCase, Shape, Window

UNDISTURBED: Final = {"reconcile_every_s": 0.0}
"""A pass of the reconciler takes seconds once a minute: it would fall into one window in five, and score by luck."""
IDLE_S: Final = 6.0
WARM_S: Final = 2.0
"""Latencies count from here on: in the first moments connections, caches and books are new."""
TIMERS: Final = 250
TIMER_S: Final = 0.004
PIECES: Final = 150
PIECE: Final = 200
REST_S: Final = 0.004
WARM_ROUNDS: Final = 5
CLOSED_RATE_MAX: Final = 12_000
"""Requests are prepared for this many a second where saturation is measured."""
TICKS_PER_S: Final = 100
"""Unit of /proc/stat on Linux (USER_HZ)."""
_POST: Final = re.compile(r"^db_query_duration_seconds_(sum|count|bucket)\{([^}]*)\} ([0-9.eE+]+)$", re.MULTILINE)
WORKERS: Final = ("relay", "matcher", "settler", "projector")
SESSIONS: Final = (
    "SELECT pid, coalesce(usename, backend_type) AS who FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
)
_LIMIT: Final = re.compile(r'le="([^"]+)"')


class LedgerWrong(Exception):
    """The ledger that the load left is wrong; the message says by which rules."""


def measure(
    shape: Shape,
    cases: Cases,
    rates_per_s: Sequence[float],
    progress: Progress,
    *,
    idle: bool = False,
    outages: Sequence[OutageCase] = (),
    saturate: bool = True,
) -> Measured:
    """Measure a configuration on a stack of its own. Raises LedgerWrong, and what the bench raises.

    `idle` adds the idle window, bursts and reads of a calibration.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine()
    spec = StackSpec(servers=shape.servers, apis=shape.apis, settings={**UNDISTURBED, **shape.settings})
    with terminate_as_interrupt():
        with progress.step(f"{shape.name}: starting {shape.servers} servers and {shape.apis} APIs"):
            stack = Stack.start(spec, DEFAULT_ROOT, progress=progress.show)
        try:
            options = BenchOptions(sizes=QUICK, servers=shape.servers, apis=shape.apis)
            bench = Bench(options, stack, stack.config, progress, commit(), str(machine["cpu"]))
            with progress.step(f"{shape.name}: opening wallets"):
                bench.open_workload()
            found = Measured(
                shape=shape,
                commit=bench.commit,
                machine=dict(machine),
                started_at=started_at,
                cores=machine["cores"],
                connections=cases.connections,
                idle=None,
                windows=[],
                saturation=None,
                warm=warm_share(),
                timer_late_ms=timer_late_ms(),
            )
            window_s = cases.calibration_window_s if idle else cases.window_s
            if idle:
                with progress.step(f"{shape.name}: idle"):
                    found.idle = _idle(bench)
            for rate in rates_per_s:
                found.windows.append(_at(bench, shape, Burst(rate, 1), window_s))
                bench.drain()
            if idle:
                reads = msgspec.structs.replace(shape, read_share=1.0)
                for burst in cases.bet_bursts:
                    found.windows.append(_at(bench, shape, burst, window_s))
                    bench.drain()
                for burst in [*(Burst(rate, 1) for rate in cases.read_rates_per_s), *cases.read_bursts]:
                    found.windows.append(_at(bench, reads, burst, window_s))
            for case in outages:
                with progress.step(f"{shape.name}: {case.kind} {case.node}") as step:
                    found.outages.append(one := measure_outage(bench, stack, case))
                    step.detail = f"back after {one.gone_s:.1f} s, nothing behind after {one.recovered_s:.1f} s"
            if saturate:
                with progress.step(f"{shape.name}: saturation") as step:
                    found.saturation = _saturated(bench, shape, cases)
                    step.detail = f"{found.saturation.accepted_per_s:,.0f}/s"
            began = time.monotonic()
            with progress.step(f"{shape.name}: checking the ledger"):
                bench.drain()
                found.drain_s = time.monotonic() - began
                broken = {rule: count for rule, count in check(bench).items() if count}
        finally:
            stack.down()
    if broken:
        raise LedgerWrong(f"after the load the ledger is wrong: {broken}")
    return found


def _at(bench: Bench, shape: Shape, burst: Burst, duration_s: float) -> Window:
    rate = burst.rate_per_s
    each = f" in bursts of {burst.size}" if burst.size > 1 else ""
    with bench.progress.step(f"{shape.name}: {rate:,.0f}/s{each}, {shape.read_share:.0%} reads") as step:
        plan = bench.plan(
            "mixed",
            loop="open",
            rate=rate,
            burst=burst.size,
            warm_s=WARM_S,
            duration_s=duration_s,
            read_share=shape.read_share,
            hot_share=shape.hot_share,
        )
        window = _window(bench, plan, rate)
        middle = {name: curve[CURVE_PERCENTS.index(50.0)] for name, curve in window.curves_ms.items()}
        step.detail = f"p50 {middle} ms, lag p99 {window.lag_p99_ms:.1f} ms"
    return window


def _saturated(bench: Bench, shape: Shape, cases: Cases) -> Window:
    plan = bench.plan(
        "mixed",
        loop="closed",
        duration_s=cases.saturation_s,
        requests_max=int(CLOSED_RATE_MAX * cases.saturation_s),
        connections=cases.connections,
        warm_s=WARM_S,
        read_share=shape.read_share,
        hot_share=shape.hot_share,
    )
    return _window(bench, plan, None)


def _idle(bench: Bench) -> Window:
    before, began = _reading(bench), time.monotonic()
    time.sleep(IDLE_S)
    return _difference(before, _reading(bench), time.monotonic() - began)


def _window(bench: Bench, plan: LoadPlan, rate: float | None) -> Window:
    readings: list[_Reading] = []
    played = play(plan, lambda: readings.append(_reading(bench)), lambda: readings.append(_reading(bench)))
    bench.acknowledged += played.accepted_of.get("bets", 0)
    window = _difference(readings[0], readings[1], played.duration_s)
    window.offered_per_s = rate
    window.read_share = plan.read_share
    window.burst = plan.burst
    window.due = played.due
    window.accepted = played.accepted
    window.statuses = played.statuses
    window.curves_ms = played.curves_ms
    window.accepted_of = played.accepted_of
    window.percents = list(CURVE_PERCENTS)
    window.lag_p99_ms = played.lag_p99_ms
    window.cpu_s["generator"] = played.cpu_s
    return window


class _Reading(msgspec.Struct):
    cpu_s: dict[str, float]
    busy_s: float
    steal_s: float
    posts: dict[str, float]
    posted: float
    work: dict[str, float]


def _reading(bench: Bench) -> _Reading:
    posts: dict[str, float] = defaultdict(float)
    posted = 0.0
    for name in bench.stack.nodes_of("api"):
        text = scrape(bench.stack.port(name)) or ""
        for what, labels, value in _POST.findall(text):
            if 'query="post"' in labels:
                limit = _LIMIT.search(labels)
                posts[limit.group(1) if what == "bucket" and limit else what] += float(value)
        posted += counted(name, text)["entries"]
    work: dict[str, float] = defaultdict(float)
    for sort in WORKERS:
        for name in bench.stack.nodes_of(sort):
            for what, value in counted(name, scrape(bench.stack.port(name)) or "").items():
                work[what] += value
    cpu = {node.name: node.cpu_s for node in bench.stack.status(memory=False)}
    cpu.update(asyncio.run(_sessions_s(bench)))
    busy, steal = _machine_s()
    return _Reading(cpu, busy, steal, dict(posts), posted, dict(work))


async def _sessions_s(bench: Bench) -> dict[str, float]:
    """Return the CPU seconds of the sessions of each server by role, as `pg0 ledger_api`."""
    found: dict[str, float] = defaultdict(float)
    for server in bench.config.servers:
        connection = await bench.superuser(server)
        try:
            for row in await connection.fetch(SESSIONS):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = psutil.Process(row["pid"]).cpu_times()
                    found[f"{server.name} {row['who']}"] += times.user + times.system
        finally:
            await connection.close()
    return dict(found)


def _difference(before: _Reading, after: _Reading, duration_s: float) -> Window:
    """Return a window without requests that used what lies between two readings."""
    posts = {name: value - before.posts.get(name, 0.0) for name, value in after.posts.items()}
    return Window(
        offered_per_s=0.0,
        read_share=0.0,
        burst=1,
        duration_s=duration_s,
        due=0,
        accepted=0,
        statuses={},
        curves_ms={},
        accepted_of={},
        percents=[],
        lag_p99_ms=0.0,
        cpu_s={name: value - before.cpu_s.get(name, 0.0) for name, value in after.cpu_s.items()},
        busy_s=after.busy_s - before.busy_s,
        steal_s=after.steal_s - before.steal_s,
        posts=int(posts.pop("count", 0)),
        post_s=posts.pop("sum", 0.0),
        post_buckets=posts,
        posted=int(after.posted - before.posted),
        work={name: value - before.work.get(name, 0.0) for name, value in after.work.items()},
    )


def timer_late_ms() -> float:
    """Return by how much timers of the service's event loop are late on average, in milliseconds."""

    async def late_s() -> float:
        total = 0.0
        for _ in range(TIMERS):
            began = time.perf_counter()
            await asyncio.sleep(TIMER_S)
            total += time.perf_counter() - began - TIMER_S
        return total / TIMERS

    return uvloop.run(late_s()) * 1000


def warm_share() -> float:
    """Return the share of its time that a piece of work takes if the core has not rested before it.

    The piece is about as long as what the service does between two waits: a tenth of a millisecond of Python.
    """

    def piece_s(rest_s: float) -> float:
        took = 0.0
        for _ in range(PIECES):
            began = time.thread_time()
            for number in range(PIECE):
                msgspec.json.decode(msgspec.json.encode({"user": number, "keys": [number, str(number)]}))
            took += time.thread_time() - began
            if rest_s:
                time.sleep(rest_s)
        return took / PIECES

    shares = [piece_s(0.0) / piece_s(REST_S) for _ in range(WARM_ROUNDS)]
    return min(1.0, statistics.median(shares))


def _machine_s() -> tuple[float, float]:
    """Return the seconds that all processors worked so far, and those that were taken from them."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _wait, interrupt, soft, steal = fields
    return (user + nice + system + interrupt + soft) / TICKS_PER_S, steal / TICKS_PER_S
