"""The rows of the workers, each alone on a backlog: relay, projector, matcher, settler; and what a bet takes on disk.

One backlog goes through all of them: bets are posted while every worker is stopped, then one worker after the other
is started by itself and timed until it has done its part. A rate counts from the first progress that is seen, so that
starting a process and joining a consumer group are not in it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from ledgerproof.bench import usage
from ledgerproof.bench.context import FIRST_USER, SETUP_TIMEOUT_S, Bench, BenchFailed
from ledgerproof.bench.lag import DONE, scrape, values
from ledgerproof.bench.loading import bet_posting, post_all
from ledgerproof.bench.plan import Plan
from ledgerproof.bench.requests import draw_bets
from ledgerproof.bench.row import FSYNC_KAFKA
from ledgerproof.bench.sql import load
from ledgerproof.wire import Wire
from reference.routing import shard_of_match

NAMES: Final = ("relay_events", "projector_events", "matcher_bets", "settler_bets", "bytes_per_bet")
WORKERS: Final = ("relay", "projector", "matcher", "settler", "reconciler")
POLL_S: Final = 0.2
STAGE_TIMEOUT_S: Final = 180.0
FLOOR: Final = "floor_unnest"


@dataclass
class Drained:
    """How a backlog went down."""

    rate: float
    count: int
    """Operations that the rate rests on."""
    duration_s: float
    cpu_s: dict[str, float]
    progress: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the first look, and operations done by then."""


def rate_of(progress: list[tuple[float, int]], goal: int) -> tuple[float, int, float]:
    """Return rate, operations and seconds between the first progress and the last look before the goal.

    The look that finds everything done may come late, so it counts only when there is nothing else to count with.
    """
    moving = [(at, done) for at, done in progress if done > 0]
    inside = [(at, done) for at, done in moving if done < goal]
    used = inside if len(inside) >= 3 else moving
    if len(used) < 2 or used[-1][0] <= used[0][0]:
        first = progress[0] if progress else (0.0, 0)
        used = [first, progress[-1]] if progress else [first, first]
    (began, before), (ended, after) = used[0], used[-1]
    seconds = ended - began
    return ((after - before) / seconds if seconds > 0 else 0.0), after - before, seconds


async def drained(bench: Bench, read: Callable[[], Awaitable[int]], goal: int, what: str) -> Drained:
    """Poll `read` until it reaches the goal. Raises BenchFailed if that takes too long."""
    began = time.monotonic()
    progress: list[tuple[float, int]] = []
    cpu: dict[str, float] | None = None
    while True:
        done = await read()
        now = time.monotonic() - began
        progress.append((now, done))
        bench.show(f"{what}: {done:,} of {goal:,}")
        if done > 0 and cpu is None:
            cpu, cpu_from = usage.cpu_seconds(bench.stack), done
        if done >= goal:
            break
        if now > STAGE_TIMEOUT_S:
            raise BenchFailed(f"{what} did {done:,} of {goal:,} in {now:.0f} s")
        await asyncio.sleep(POLL_S)
    assert cpu is not None, "the goal is above zero"
    used = usage.spent(cpu, usage.cpu_seconds(bench.stack))
    rate, count, seconds = rate_of(progress, goal)
    share = count / max(1, goal - cpu_from) if goal > cpu_from else 1.0
    return Drained(rate, count, seconds, {group: value * share for group, value in used.items()}, progress)


@dataclass
class _Pipe:
    """What the stages share."""

    bench: Bench
    bets: int
    age: int = 0
    big_match: str = ""
    big_bets: int = 0
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes by relation, and of WAL, at named moments."""


def pipeline(bench: Bench) -> None:
    """Measure every row of this module that is asked for; later calls find it done."""
    wanted = [name for name in NAMES if name in bench.options.only]
    if not wanted or any(row.name in NAMES for row in bench.rows):
        return
    bench.open_workload()
    pipe = _Pipe(bench, bench.sizes.backlog_bets)
    try:
        _load(pipe)
        _relay(pipe)
        if wanted == ["relay_events"]:
            return
        _projector(pipe)
        if set(wanted) <= {"relay_events", "projector_events"}:
            return
        _matcher(pipe)
        if set(wanted) & {"settler_bets", "bytes_per_bet"}:
            _settler(pipe)
            _disk(pipe)
    finally:
        for sort in WORKERS:
            for node in bench.stack.nodes_of(sort):
                bench.stack.start_node(node)


def _stop_workers(bench: Bench) -> None:
    bench.peak.note(bench.stack)
    for sort in WORKERS:
        for node in bench.stack.nodes_of(sort):
            bench.stack.stop(node)


def _load(pipe: _Pipe) -> None:
    """Post the backlog with every worker stopped."""
    bench = pipe.bench
    bench.drain()
    pipe.age = bench.entries()
    others = bench.create_matches(bench.sizes.matches)
    (pipe.big_match,) = bench.create_matches(1)
    pipe.big_bets = min(bench.sizes.settle_bets, pipe.bets)
    _stop_workers(bench)
    pipe.sizes["before"] = asyncio.run(_sizes(bench))
    bench.show(f"posting a backlog of {pipe.bets:,} bets")
    drawn = []
    for number, (matches, count) in enumerate([([pipe.big_match], pipe.big_bets), (others, pipe.bets - pipe.big_bets)]):
        plan = Plan(
            ports=[],
            kind="bets",
            loop="closed",
            duration_s=0.0,
            seed=1000 + number,
            first_user=FIRST_USER,
            users=bench.sizes.wallets,
            matches=matches,
        )
        drawn += [
            bet_posting(bet, f"{bench.run}-backlog-{number}-{at}") for at, bet in enumerate(draw_bets(plan, count))
        ]
    asyncio.run(post_all(bench.config, drawn))
    bench.acknowledged += len(drawn)
    pipe.sizes["posted"] = asyncio.run(_sizes(bench))


def _relay(pipe: _Pipe) -> None:
    bench = pipe.bench
    goal = asyncio.run(_unpublished(bench))
    done = _timed(bench, "relay", _published, goal)
    _add(pipe, "relay_events", "events/s", done, batch_size=bench.config.relay_batch)


def _projector(pipe: _Pipe) -> None:
    done = _timed(pipe.bench, "projector", _jobs("projector"), pipe.bets)
    _add(pipe, "projector_events", "events/s", done, batch_size=pipe.bench.config.consumer_batch)


def _matcher(pipe: _Pipe) -> None:
    done = _timed(pipe.bench, "matcher", _jobs("matcher"), pipe.bets)
    bench = pipe.bench
    details = {"matches": bench.sizes.matches + 1, "bets_on_one_match": pipe.big_bets}
    _add(pipe, "matcher_bets", "bets/s", done, batch_size=bench.config.consumer_batch, details=details)


def _settler(pipe: _Pipe) -> None:
    """Let everything come to rest, then settle the one large match with nothing but the settler running."""
    bench = pipe.bench
    for sort in WORKERS:
        for node in bench.stack.nodes_of(sort):
            bench.stack.start_node(node)
    bench.drain()
    _stop_workers(bench)
    match_id = UUID(pipe.big_match)
    server = bench.config.servers[bench.config.routing[shard_of_match(match_id)]]
    asyncio.run(_move_match(bench, pipe.big_match))
    sql = load("disk")["settlement"]

    async def settle() -> Drained:
        connection = await bench.superuser(server)

        async def settled() -> int:
            row = await connection.fetchrow(sql, match_id)
            return int(row["last_arrival"]) if row else 0

        try:
            return await drained(bench, settled, pipe.big_bets, "settler")
        finally:
            await connection.close()

    bench.stack.start_node(bench.stack.nodes_of("settler")[0])
    done = asyncio.run(settle())
    _add(pipe, "settler_bets", "bets/s", done, details={"bets_of_the_match": pipe.big_bets})
    for sort in WORKERS:
        for node in bench.stack.nodes_of(sort):
            bench.stack.start_node(node)
    bench.drain()
    pipe.sizes["settled"] = asyncio.run(_sizes(bench))


def _disk(pipe: _Pipe) -> None:
    """Say how many bytes a bet takes: after the transaction that answers 202, and after everything behind it."""
    bench = pipe.bench
    if "bytes_per_bet" not in bench.options.only:
        return
    before, posted, settled = (pipe.sizes[moment] for moment in ("before", "posted", "settled"))

    def grown(later: dict[str, int]) -> dict[str, float]:
        return {
            name: round((size - before.get(name, 0)) / pipe.bets, 1)
            for name, size in sorted(later.items())
            if size > before.get(name, 0)
        }

    accepted, whole = grown(posted), grown(settled)
    totals = {"accepted": round(_disk_total(accepted), 1), "whole_life": round(_disk_total(whole), 1)}
    row = bench.row(
        "bytes_per_bet",
        unit="bytes/bet",
        loop="backlog",
        data_age=pipe.age,
        samples=pipe.bets,
        reason=(
            f"{totals['accepted']:,.0f} bytes on disk when accepted, {totals['whole_life']:,.0f} when matched, "
            f"projected and (half of them) settled; WAL {accepted['WAL']:,.0f} and {whole['WAL']:,.0f}"
        ),
        details={"bytes_per_bet": totals, "when_accepted": accepted, "when_settled": whole},
    )
    bench.add(row)


def _disk_total(grown: dict[str, float]) -> float:
    return sum(value for name, value in grown.items() if name != "WAL")


def _timed(bench: Bench, sort: str, reader: Callable[[int], Callable[[], Awaitable[int]]], goal: int) -> Drained:
    """Start the one worker of a sort, time it until the goal is reached, and stop it."""
    node = bench.stack.nodes_of(sort)[0]
    bench.stack.start_node(node)
    done = asyncio.run(drained(bench, reader(bench.stack.port(node)), goal, sort))
    bench.peak.note(bench.stack)
    bench.stack.stop(node)
    return done


def _published(port: int) -> Callable[[], Awaitable[int]]:
    async def read() -> int:
        text = await asyncio.to_thread(scrape, port)
        return int(sum(values(text, {"events_published_total": "server"}).values())) if text else 0

    return read


def _jobs(group: str) -> Callable[[int], Callable[[], Awaitable[int]]]:
    def reader(port: int) -> Callable[[], Awaitable[int]]:
        async def read() -> int:
            text = await asyncio.to_thread(scrape, port)
            return int(values(text, DONE).get(f"{group} lag", 0.0)) if text else 0

        return read

    return reader


async def _unpublished(bench: Bench) -> int:
    total = 0
    for server in bench.config.servers:
        connection = await bench.superuser(server)
        try:
            total += int(await connection.fetchval(load("disk")["unpublished"]))
        finally:
            await connection.close()
    return total


async def _sizes(bench: Bench) -> dict[str, int]:
    """Return the bytes of every table, of every index, and of WAL written so far, over all servers."""
    found: dict[str, int] = {"WAL": 0}
    sql = load("disk")
    for server in bench.config.servers:
        connection = await bench.superuser(server)
        try:
            for row in await connection.fetch(sql["sizes"]):
                name = row["relation"] + (f" ({row['index_columns']})" if row["index_columns"] else "")
                found[name] = found.get(name, 0) + row["bytes"]
            found["WAL"] += await connection.fetchval(sql["wal"])
        finally:
            await connection.close()
    return found


async def _move_match(bench: Bench, match_id: str) -> None:
    wire = Wire("127.0.0.1", bench.api_ports[0], timeout_s=SETUP_TIMEOUT_S)
    try:
        await bench.command(wire, f"/v1/matches/{match_id}/close", f"close-{match_id}", {})
        await bench.command(wire, f"/v1/matches/{match_id}/settle", f"settle-{match_id}", {"result": "HOME"})
    finally:
        wire.close()


def _add(pipe: _Pipe, name: str, unit: str, done: Drained, **fields: Any) -> None:
    bench = pipe.bench
    if name not in bench.options.only:
        return
    details = {
        **fields.pop("details", {}),
        "backlog": pipe.bets,
        "progress": [[round(at, 2), count] for at, count in done.progress],
    }
    bench.add(
        bench.row(
            name,
            unit=unit,
            rate=round(done.rate, 1),
            floor=FLOOR,
            loop="backlog, this worker alone",
            data_age=pipe.age + pipe.bets,
            duration_s=round(done.duration_s, 2),
            samples=done.count,
            cpu_ms_per_op=usage.per_operation_ms(done.cpu_s, done.count),
            fsync=FSYNC_KAFKA,
            details=details,
            **fields,
        )
    )
