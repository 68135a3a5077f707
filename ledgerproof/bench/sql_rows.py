"""The rows of SQL alone, in databases of their own on the same server: two floors, the posting function, and age.

Floor and function take turns on the same tables, batch after batch over one connection each, so that a ratio of two
rows is not a ratio of two moments.
"""

import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg
import msgspec
import numpy as np

from compose.postgres import binaries
from ledgerproof.bench import loading, usage
from ledgerproof.bench.context import FIRST_USER, Bench, BenchFailed
from ledgerproof.bench.plan import Plan
from ledgerproof.bench.requests import DEPOSIT_MINOR, DrawnBet, draw_bets
from ledgerproof.bench.row import Row
from ledgerproof.bench.sql import load
from reference.config import ServiceConfig
from reference.install import install_server
from reference.routing import even_routing
from reference.sql import load_sql

BATCHES: Final = (1, 8, 64, 256)
FLOOR: Final = "floor_unnest"
FLOOR_FIRST_USER: Final = FIRST_USER + 50_000_000
WARM_UP_BATCHES: Final = 3
RATE_MAX: Final = 25_000
"""Batches are made for this many rows a second; a window that uses them up ends early."""
SINGLE_RATE_MAX: Final = 6_000
PGBENCH_CLIENTS: Final = (4, 8)
PGBENCH_GRACE_S: Final = 30.0
AGE_CHUNK: Final = 100_000
AGE_BATCH: Final = 256
NAMES: Final = (FLOOR, "sql_function")


@dataclass
class Tally:
    """What the windows of one kind measured together."""

    rows: int = 0
    seconds: float = 0.0
    batch_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Rows per second of each window."""
    cpu_s: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Rows per second over all windows."""
        return self.rows / self.seconds if self.seconds else 0.0

    def quantile_ms(self, share: float) -> float | None:
        """Return a quantile of the time of one batch."""
        return round(float(np.quantile(self.batch_s, share, method="higher")) * 1000, 3) if self.batch_s else None


@asynccontextmanager
async def scratch(bench: Bench, name: str) -> AsyncIterator[ServiceConfig]:
    """Give the first server another database with the ledger's schema and every shard; drop it after."""
    server = msgspec.structs.replace(bench.config.servers[0], database=f"{bench.run.replace('-', '_')}_{name}")
    config = msgspec.structs.replace(bench.config, servers=[server], routing=even_routing(1))
    user, password = bench.stack.superuser
    await install_server(config, 0, user, password)
    try:
        yield config
    finally:
        owner = await bench.superuser(server, "postgres")
        try:
            await owner.execute(f'DROP DATABASE "{server.database}" WITH (FORCE)')
        finally:
            await owner.close()


def bets_of(bench: Bench, count: int, first_user: int, seed: int) -> Iterator[DrawnBet]:
    """Draw bets as the HTTP rows do, of wallets that begin at `first_user`."""
    matches = [str(UUID(int=number + 1)) for number in range(bench.sizes.matches)]
    plan = Plan(
        ports=[],
        kind="bets",
        loop="closed",
        duration_s=0.0,
        seed=seed,
        first_user=first_user,
        users=bench.sizes.wallets,
        matches=matches,
    )
    return draw_bets(plan, count)


class FloorWallets:
    """The wallets of the floor: seq and balance are kept here, so that the server has nothing to look up."""

    def __init__(self) -> None:
        self._heads: dict[int, tuple[int, int]] = {}

    def batch(self, bets: Sequence[DrawnBet]) -> list[list[object]]:
        """Return the arguments of the floor's statement for one batch."""
        rows: list[tuple[object, ...]] = []
        for bet in bets:
            posting = loading.bet_posting(bet, str(uuid4()))
            seq, balance = self._heads.get(bet.user_id, (1, DEPOSIT_MINOR))
            seq, balance = seq + 1, balance + posting.amount
            self._heads[bet.user_id] = seq, balance
            payload = {
                "bet_id": posting.bet_id,
                "user_id": bet.user_id,
                "seq": seq,
                "amount": posting.amount,
                "balance": balance,
                "match_id": posting.match_id,
                "outcome": bet.outcome,
                "side": bet.side,
                "odds": bet.odds,
                "stake": bet.stake_minor,
                "reserve": -posting.amount,
            }
            rows.append(
                (
                    bet.user_id,
                    seq,
                    posting.amount,
                    balance,
                    posting.match_id,
                    posting.bet_id,
                    posting.key,
                    bet.outcome,
                    bet.side,
                    bet.odds,
                    bet.stake_minor,
                    msgspec.json.encode(payload).decode(),
                )
            )
        return [list(column) for column in zip(*rows, strict=True)]


async def window(
    bench: Bench,
    connection: asyncpg.Connection,
    sql: str,
    batches: Sequence[Sequence[Any]],
    *,
    size: int,
    seconds: float,
) -> Tally:
    """Send batches one after the other for some seconds; the first few only warm up."""
    for batch in batches[:WARM_UP_BATCHES]:
        await connection.fetch(sql, *batch)
    tally = Tally()
    cpu, client = usage.cpu_seconds(bench.stack), time.process_time()
    answers = []
    began = at = time.perf_counter()
    for batch in batches[WARM_UP_BATCHES:]:
        answers.append(await connection.fetch(sql, *batch))
        now = time.perf_counter()
        tally.batch_s.append(now - at)
        at = now
        if now - began >= seconds:
            break
    tally.seconds = at - began
    tally.cpu_s = {"client": time.process_time() - client}
    tally.cpu_s["postgres"] = usage.spent(cpu, usage.cpu_seconds(bench.stack)).get("postgres", 0.0)
    tally.rows = len(tally.batch_s) * size
    tally.rates = [tally.rate]
    for rows in answers:
        loading.check_accepted(rows)
    return tally


def together(tallies: Sequence[Tally]) -> Tally:
    """Return several windows as one."""
    whole = Tally()
    for each in tallies:
        whole.rows += each.rows
        whole.seconds += each.seconds
        whole.batch_s += each.batch_s
        whole.rates += each.rates
        for group, value in each.cpu_s.items():
            whole.cpu_s[group] = whole.cpu_s.get(group, 0.0) + value
    return whole


async def seed(config: ServiceConfig, first_user: int, users: int) -> None:
    """Open wallets with a deposit each."""
    await loading.post_all(
        config, [loading.deposit_posting(user, "open") for user in range(first_user, first_user + users)]
    )


def _count(size: int, seconds: float) -> int:
    """Return how many batches a window can use at most, the warm-up included."""
    rate = SINGLE_RATE_MAX * size if size * SINGLE_RATE_MAX < RATE_MAX else RATE_MAX
    return WARM_UP_BATCHES + max(2, int(rate * seconds / size) + 1)


def floor_and_function(bench: Bench) -> None:
    """Measure the floor and the posting function by batch size, window by window in turn; later calls find it done."""
    if not any(row.name in NAMES for row in bench.rows):
        asyncio.run(_floor_and_function(bench))


async def _floor_and_function(bench: Bench) -> None:
    sizes = bench.sizes
    wanted = [name for name in NAMES if name in bench.options.only]
    post, unnest = load_sql("queries")["post"], load("floor")["unnest"]
    found: dict[tuple[str, int], Tally] = {}
    async with scratch(bench, "floor") as config:
        bench.show("opening wallets in a database of its own")
        await seed(config, FIRST_USER, sizes.wallets)
        await seed(config, FLOOR_FIRST_USER, sizes.wallets)
        wallets = FloorWallets()
        function = await loading.open_connection(config, 0)
        floor = await bench.superuser(config.servers[0])
        try:
            for number, size in enumerate(BATCHES):
                tallies: dict[str, list[Tally]] = {name: [] for name in NAMES}
                for turn in range(sizes.sql_rounds):
                    bench.show(f"batches of {size}, round {turn + 1} of {sizes.sql_rounds}")
                    count = _count(size, sizes.sql_s)
                    drawing = number * 100 + turn
                    for name in NAMES if turn % 2 == 0 else reversed(NAMES):
                        if name == FLOOR:
                            bets = list(bets_of(bench, count * size, FLOOR_FIRST_USER, drawing))
                            made = [wallets.batch(bets[at : at + size]) for at in range(0, len(bets), size)]
                            tally = await window(bench, floor, unnest, made, size=size, seconds=sizes.sql_s)
                        else:
                            bets = list(bets_of(bench, count * size, FIRST_USER, drawing))
                            postings = [loading.bet_posting(bet, f"{drawing}-{at}") for at, bet in enumerate(bets)]
                            posts = loading.batches(postings, size)
                            tally = await window(bench, function, post, posts, size=size, seconds=sizes.sql_s)
                        tallies[name].append(tally)
                for name in NAMES:
                    found[name, size] = together(tallies[name])
            age = int(await floor.fetchval(load("floor")["count"]))
        finally:
            function.terminate()
            floor.terminate()
    for name in wanted:
        for size in BATCHES:
            tally = found[name, size]
            row = _sql_row(bench, name, tally, size, age)
            if name != FLOOR:
                row.details["floor_of_this_batch"] = round(found[FLOOR, size].rate, 1)
                row.details["ratio_to_floor_of_this_batch"] = round(tally.rate / found[FLOOR, size].rate, 3)
            bench.add(row)


def _sql_row(bench: Bench, name: str, tally: Tally, size: int, age: int) -> Row:
    return bench.row(
        name,
        variant=f"batch {size}",
        rate=round(tally.rate, 1),
        p50_ms=tally.quantile_ms(0.5),
        p99_ms=tally.quantile_ms(0.99),
        floor=FLOOR,
        loop="batch after batch, one connection",
        batch_size=size,
        data_age=age,
        duration_s=round(tally.seconds, 2),
        samples=tally.rows,
        cpu_ms_per_op=usage.per_operation_ms(tally.cpu_s, tally.rows),
        details={"latency_is_of": "one batch", "rates_of_windows": [round(rate) for rate in tally.rates]},
    )


def floor_pgbench(bench: Bench) -> None:
    """Measure single-row inserts through pgbench, prepared, each committed by itself."""
    asyncio.run(_floor_pgbench(bench))


async def _floor_pgbench(bench: Bench) -> None:
    seconds = max(2, round(bench.sizes.sql_s * bench.sizes.sql_rounds))
    async with scratch(bench, "pgbench") as config:
        for clients in PGBENCH_CLIENTS:
            bench.show(f"pgbench with {clients} clients")
            cpu = usage.cpu_seconds(bench.stack)
            latencies_s = await asyncio.to_thread(_pgbench, bench, config, clients, seconds)
            used = usage.spent(cpu, usage.cpu_seconds(bench.stack))
            tally = Tally(len(latencies_s), float(seconds), latencies_s, cpu_s={"postgres": used.get("postgres", 0.0)})
            row = _sql_row(bench, "floor_pgbench", tally, 1, 0)
            row.variant, row.unit = f"{clients} clients", "rows/s"
            row.loop = f"closed, {clients} connections"
            row.details = {"latency_is_of": "one row of wallet_ledger, inserted and committed"}
            bench.add(row)


def _pgbench(bench: Bench, config: ServiceConfig, clients: int, seconds: int) -> list[float]:
    """Run pgbench and return the seconds of each transaction. Raises BenchFailed."""
    server = config.servers[0]
    user, password = bench.stack.superuser
    with tempfile.TemporaryDirectory(prefix="ledgerproof-pgbench-") as folder:
        script = Path(folder) / "script.sql"
        script.write_text(load("floor")["pgbench"] + "\n")
        command = [
            str(binaries() / "pgbench"),
            *("--no-vacuum", "--protocol=prepared", f"--client={clients}", "--jobs=2", f"--time={seconds}"),
            *(f"--file={script}", "--log", f"--log-prefix={folder}/log"),
            *(f"--host={server.host}", f"--port={server.port}", f"--username={user}", server.database),
        ]
        done = subprocess.run(  # noqa: S603 - our own words
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "PGPASSWORD": password},
            timeout=seconds + PGBENCH_GRACE_S,
            check=False,
        )
        if done.returncode != 0:
            raise BenchFailed(f"pgbench ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return [int(line.split()[2]) / 1e6 for log in sorted(Path(folder).glob("log.*")) for line in log.open() if line]


def growth_with_age(bench: Bench) -> None:
    """Measure the posting function on an empty and on an aged database in turn."""
    asyncio.run(_growth_with_age(bench))


async def _growth_with_age(bench: Bench) -> None:
    sizes = bench.sizes
    post = load_sql("queries")["post"]
    tallies: dict[str, list[Tally]] = {"empty": [], "aged": []}
    async with scratch(bench, "empty") as empty, scratch(bench, "aged") as aged:
        await seed(empty, FIRST_USER, sizes.wallets)
        began = time.monotonic()
        ages = {"empty": sizes.wallets, "aged": await _age(bench, aged)}
        loaded_s = time.monotonic() - began
        connections = {
            name: await loading.open_connection(config, 0) for name, config in (("empty", empty), ("aged", aged))
        }
        touched_s: dict[str, float] = {}
        try:
            for name, connection in connections.items():
                bench.show(f"{name}, one bet of every wallet")
                touched_s[name] = await _touch(bench, connection, post)
            for turn in range(sizes.age_rounds):
                for name in ("empty", "aged") if turn % 2 == 0 else ("aged", "empty"):
                    bench.show(f"{name}, round {turn + 1} of {sizes.age_rounds}")
                    bets = bets_of(bench, _count(AGE_BATCH, sizes.sql_s) * AGE_BATCH, FIRST_USER, 5_000 + turn)
                    postings = [loading.bet_posting(bet, f"{turn}-{at}") for at, bet in enumerate(bets)]
                    made = loading.batches(postings, AGE_BATCH)
                    tallies[name].append(
                        await window(bench, connections[name], post, made, size=AGE_BATCH, seconds=sizes.sql_s)
                    )
        finally:
            for connection in connections.values():
                connection.terminate()
    ratios = [new.rate / old.rate for old, new in zip(tallies["empty"], tallies["aged"], strict=True)]
    for name, each in tallies.items():
        tally = together(each)
        row = _sql_row(bench, "growth_with_age", tally, AGE_BATCH, ages[name])
        row.variant = f"{ages[name]:,} entries"
        row.details["latency_is_of"] = "one batch"
        if name == "aged":
            middle = float(np.median(ratios))
            row.floor, row.ratio_to_floor = "", round(middle, 3)
            row.reason = f"{middle:.3f} of the empty database, rounds {min(ratios):.3f} to {max(ratios):.3f}"
            row.details["ratios_of_rounds"] = [round(ratio, 3) for ratio in ratios]
            row.details["first_touch_ratio"] = round(touched_s["empty"] / touched_s["aged"], 3)
            row.details["first_touch_is"] = "the first bet of every wallet after a checkpoint, before the rounds"
            row.details["loaded_in_s"] = round(loaded_s, 1)
            row.details["aged_tables"] = "wallet_ledger and bets; of the outbox, old events are published and archived"
        else:
            row.floor = ""
        bench.add(row)


async def _touch(bench: Bench, connection: asyncpg.Connection, post: str) -> float:
    """Post one bet of every wallet, in no order of wallets, and return how many seconds that took.

    A wallet with a past has index pages of its own. Postgres writes each of them whole into its log at the first
    change after a checkpoint, once; what a bet costs from then until the next checkpoint is what the rounds measure.
    """
    users = bench.sizes.wallets
    order = np.random.default_rng(users).permutation(users)
    bets = [
        msgspec.structs.replace(bet, user_id=FIRST_USER + int(place))
        for place, bet in zip(order, bets_of(bench, users, FIRST_USER, 4_999), strict=True)
    ]
    postings = [loading.bet_posting(bet, f"touch-{at}") for at, bet in enumerate(bets)]
    made = loading.batches(postings, AGE_BATCH)
    began = time.perf_counter()
    for batch in made:
        loading.check_accepted(await connection.fetch(post, *batch))
    return time.perf_counter() - began


async def _age(bench: Bench, config: ServiceConfig) -> int:
    """Fill a database with entries of the past and return how many; each wallet of the workload gets its share."""
    users = bench.sizes.wallets
    each = max(1, bench.sizes.aged // users)
    per_chunk = max(1, AGE_CHUNK // each)
    owner = await bench.superuser(config.servers[0])
    try:
        await owner.execute("SET synchronous_commit = off")
        for first in range(0, users, per_chunk):
            last = min(users, first + per_chunk) - 1
            await owner.execute(
                load("floor")["age"], FIRST_USER + first, FIRST_USER + last, each, DEPOSIT_MINOR, UUID(int=1)
            )
            bench.show(f"loading the past: {(last + 1) * each:,} of {users * each:,} entries")
        await owner.execute("VACUUM ANALYZE")
        await owner.execute("CHECKPOINT")
    finally:
        owner.terminate()
    return users * each
