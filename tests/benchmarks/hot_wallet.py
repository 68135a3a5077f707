"""Measures what one wallet at its own maximum rate costs all others, in turns within one run.

    .venv/bin/python tests/benchmarks/hot_wallet.py [--rounds 4] [--seconds 3] [--rate 200] [--in-flight 64]

Two processes, each with the service's own writer for one server, post deposits: `--rate` a second each to 2,000
wallets, arriving whether they are answered or not; and, every other turn, to one hot wallet as fast as it answers
`--in-flight` commands of each process. No HTTP is in between: what is measured is queue, batch, lock and commit.
Latency counts from the time a command was due.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import uvloop
from measuring import described, machine, spread

from compose.stack import Stack
from compose.state import StackSpec
from reference.commands import Contra, EntryType
from reference.config import load_config
from reference.errors import LedgerError
from reference.store import Store
from reference.tracing import Tracing
from reference.writer import Posting, Writer

PROCESSES = 2
WALLETS = 2_000
HOT = 77
WARM_S = 2.0
GAP_S = 0.3


def deposit(user_id: int) -> Posting:
    """A deposit under a key of its own."""
    return Posting(user_id, uuid.uuid4().hex, EntryType.CREDIT, 1, Contra.EXTERNAL)


async def others(writer: Writer, rate: float, until: float, latencies: list[float]) -> int:
    """Post to many wallets at fixed times; returns how many failed."""
    failed = 0
    tasks: set[asyncio.Task[None]] = set()

    async def one(due: float) -> None:
        nonlocal failed
        try:
            await writer.post(deposit(1_000_000 + 100 * random.randrange(WALLETS) + random.randrange(100)))
        except LedgerError:
            failed += 1
        else:
            latencies.append((time.time() - due) * 1000)

    due = time.time()
    while due < until:
        await asyncio.sleep(max(0.0, due - time.time()))
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += random.expovariate(rate)
    if tasks:
        await asyncio.wait(tasks)
    return failed


async def hot(writer: Writer, until: float) -> int:
    """Post to the hot wallet one command after the other; returns how many were accepted."""
    done = 0
    while time.time() < until:
        try:
            await writer.post(deposit(HOT))
            done += 1
        except LedgerError:
            await asyncio.sleep(0.01)
    return done


async def child(start: float, rounds: int, seconds: float, rate: float, in_flight: int) -> None:
    """Take turns without and with the hot wallet, and print one line a turn."""
    config = load_config()
    store = Store(config, "ledger_api")
    writer = Writer(store, 0, "API", Tracing(config, "hot_wallet"))
    writer.start()
    await others(writer, rate, start, [])
    for number in range(2 * rounds):
        until = start + (number + 1) * (seconds + GAP_S) - GAP_S
        latencies: list[float] = []
        clients = [asyncio.create_task(hot(writer, until)) for _ in range(in_flight if number % 2 else 0)]
        failed = await others(writer, rate, until, latencies)
        done = sum(await asyncio.gather(*clients))
        print(json.dumps({"turn": number, "latencies": latencies, "failed": failed, "hot": done}), flush=True)
        await asyncio.sleep(max(0.0, until + GAP_S - time.time()))
    await writer.stop()
    await store.close()


def p99(values: list[float]) -> float:
    """The value that one in a hundred exceeds."""
    return sorted(values)[int(len(values) * 0.99)]


def measure(config: Path, args: argparse.Namespace, files: ExitStack) -> None:
    """Run both processes and print medians over the rounds, and the ratio within each round."""
    start = time.time() + WARM_S + 1.5
    options = [str(start), str(args.rounds), str(args.seconds), str(args.rate), str(args.in_flight)]
    command = [sys.executable, __file__, "--child", *options]
    environment = os.environ | {"LEDGERPROOF_CONFIG": str(config)}
    # Into files: a pipe that nobody empties would hold a child up.
    printed = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(PROCESSES)]  # noqa: SIM115
    children = [subprocess.Popen(command, stdout=file, env=environment) for file in printed]
    turns: dict[int, list[float]] = {}
    failed, accepted = 0, 0
    for process, file in zip(children, printed, strict=True):
        if process.wait():
            raise SystemExit(f"a child ended with {process.returncode}")
        file.seek(0)
        for line in file:
            turn = json.loads(line)
            turns.setdefault(turn["turn"], []).extend(turn["latencies"])
            failed += turn["failed"]
            accepted += turn["hot"]
    calm = [turns[number] for number in range(0, 2 * args.rounds, 2)]
    busy = [turns[number] for number in range(1, 2 * args.rounds, 2)]
    print("| others | p50 ms | p99 ms |\n|---|---|---|")
    for name, rows in (("without a hot wallet", calm), ("with one", busy)):
        print(f"| {name} | {median(map(median, rows)):.1f} | {median(map(p99, rows)):.1f} |")
    quotients = [p99(with_it) / p99(without) for without, with_it in zip(calm, busy, strict=True)]
    print(f"p99 with / without, by round: {spread(quotients)}")
    print(f"hot wallet: {accepted / (args.rounds * args.seconds):,.0f} entries/s; others that failed: {failed}")


def main() -> None:
    """Start one server with the service, measure, print."""
    if sys.argv[1:2] == ["--child"]:
        start, rounds, seconds, rate, in_flight = sys.argv[2:]
        uvloop.run(child(float(start), int(rounds), float(seconds), float(rate), int(in_flight)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=200.0, help="commands a second of each process to other wallets")
    parser.add_argument("--in-flight", type=int, default=64, help="commands of the hot wallet that wait, per process")
    args = parser.parse_args()
    with Stack.start(StackSpec(servers=1, apis=1)) as stack:
        print(described(machine()) + f"  {PROCESSES} writers, {args.rounds} rounds of 2 × {args.seconds:g} s")
        with ExitStack() as files:
            measure(stack.config_path, args, files)


if __name__ == "__main__":
    main()
