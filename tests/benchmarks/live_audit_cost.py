"""What the live auditor costs, and how fast it finds one cent: `python tests/benchmarks/live_audit_cost.py`.

Places bets at a fixed rate on a stack of its own, by turns without and with `ledgerproof audit --live` beside it, and
prints for each turn the CPU of a bet (all processes of the service, and the auditor's own) and the 99th percentile of
the answers. Then, at the same rate, plants one cent in the projection, in Redis, in an old entry and in an old outbox
row, and prints after how many seconds each was in the auditor's metrics.

    --rate BETS/S (1000)  --seconds S (20, one turn)  --rounds N (3)  --servers N (1)  --wallets N (20000)  --json PATH
"""

import argparse
import asyncio
import json
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from measuring import described, machine
from redis import Redis

from compose.stack import Stack
from compose.state import StackSpec
from ledgerproof.bench.context import FIRST_USER, Bench
from ledgerproof.bench.http_rows import Attempt, place
from ledgerproof.bench.options import QUICK, BenchOptions
from ledgerproof.collect import auditor, load_audit_sql
from ledgerproof.progress import Progress
from reference.cache import KEY_PREFIX

FOUND_WITHIN_S = 60.0
DRAIN_WITHIN_S = 240.0
SETTLE_S = 3.0


class Floor(Bench):
    """A benchmark that waits for outbox and projection by SQL: Kafka's own answers take long on a busy machine."""

    def drain(self) -> None:
        """Wait until everything is published and projected on every server."""
        sql = load_audit_sql()

        async def left() -> int:
            count = 0
            for server in self.config.servers:
                async with auditor(self.config, server) as connection:
                    count += (await connection.fetchrow(sql["progress"]))["unpublished"]
                    count += await connection.fetchval(sql["unprojected"])
            return count

        deadline = time.monotonic() + DRAIN_WITHIN_S
        while asyncio.run(left()):
            if time.monotonic() > deadline:
                raise SystemExit(f"not drained within {DRAIN_WITHIN_S:g} s")
            time.sleep(0.25)


class Auditor:
    """`ledgerproof audit --live` as a user starts it."""

    def __init__(self, stack: Stack) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        where = ["--metrics-port", str(self.port), "--config", str(stack.config_path)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ledgerproof", "audit", "--live", "--until-input-ends", "--json", *where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._until(lambda: self.value("ledgerproof_audit_polls_total") >= 3)

    def value(self, name: str) -> float:
        """A sample of its metrics; 0 while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return 0.0
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def cpu_s(self) -> float:
        """CPU seconds used so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def seconds_until_found(self, code: str, plant: Callable[[], None]) -> float:
        """Plant drift and return after how long it was counted under the code."""
        name = f'ledgerproof_audit_findings_total{{code="{code}"}}'
        before = self.value(name)
        began = time.monotonic()
        plant()
        self._until(lambda: self.value(name) > before)
        return time.monotonic() - began

    def stop(self) -> dict[str, Any]:
        """End it and return its result."""
        out, _ = self._process.communicate(timeout=60)
        result: dict[str, Any] = json.loads(out)
        return result

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @staticmethod
    def _until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + FOUND_WITHIN_S
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit("the auditor did not come to that in time")
            time.sleep(0.05)


@contextmanager
def auditing(stack: Stack) -> Iterator[Auditor]:
    beside = Auditor(stack)
    try:
        yield beside
    finally:
        beside.kill()


def turn(bench: Bench, rate: float, seconds: float, beside: Auditor | None) -> dict[str, float]:
    """One window; CPU in ms for a bet."""
    before = beside.cpu_s() if beside else 0.0
    attempt: Attempt = place(bench, rate, seconds, judge_lag=False)
    own = (beside.cpu_s() - before) if beside else 0.0
    bets = attempt.window.accepted
    service = sum(value for group, value in attempt.cpu_s.items() if group != "generator")
    bench.drain()
    return {
        "bets": bets,
        "service_ms": 1000 * service / bets,
        "postgres_ms": 1000 * attempt.cpu_s["postgres"] / bets,
        "auditor_ms": 1000 * own / bets,
        "total_ms": 1000 * (service + own) / bets,
        "p99_ms": attempt.window.p99_ms or float("inf"),
    }


def plants(stack: Stack, users: int) -> list[tuple[str, str, Callable[[], None]]]:
    """What is planted where: name, code, action. Every wallet has its deposit as seq 1."""
    config = stack.config
    user, password = stack.superuser

    def on_server(wallet: int, statement: str) -> None:
        async def run() -> None:
            server = config.servers[config.routing[wallet % 100]]
            owner = await asyncpg.connect(
                host=server.host, port=server.port, user=user, password=password, database=server.database
            )
            await owner.execute("SET session_replication_role = replica")
            done = await owner.execute(statement)
            await owner.close()
            assert done.endswith(" 1"), done

        asyncio.run(run())

    def in_redis() -> None:
        redis = Redis(
            host=config.redis_host, port=config.redis_port, password=config.redis_password, decode_responses=True
        )
        for wallet in range(FIRST_USER + users - 3, FIRST_USER, -1):
            text = redis.get(f"{KEY_PREFIX}{wallet}")
            if text is not None:
                seq, balance, *rest = str(text).split(" ")
                redis.set(f"{KEY_PREFIX}{wallet}", " ".join([seq, str(int(balance) + 1), *rest]), keepttl=True)
                break
        redis.close()

    one, two, three = FIRST_USER + users - 1, FIRST_USER + users - 2, FIRST_USER + users - 4
    where = "shard = {0} % 100 AND user_id = {0}"
    return [
        (
            "projection",
            "A11",
            lambda: on_server(
                one, f"UPDATE wallet_balance_projection SET balance = balance + 1 WHERE {where.format(one)}"
            ),
        ),
        ("redis", "A11", in_redis),
        (
            "ledger (as superuser)",
            "A33",
            lambda: on_server(
                two, f"UPDATE wallet_ledger SET amount = amount + 1 WHERE {where.format(two)} AND seq = 1"
            ),
        ),
        (
            "outbox",
            "A25",
            lambda: on_server(
                three,
                "UPDATE events SET payload = jsonb_set(payload, '{amount}',"
                " to_jsonb((payload ->> 'amount')::bigint + 1))"
                f" WHERE partition_key = '{three}' AND payload ->> 'seq' = '1'",
            ),
        ),
    ]


def main(arguments: argparse.Namespace, stack: Stack) -> None:
    """Measure the cost, then the time to detection."""
    options = BenchOptions(sizes=replace(QUICK, wallets=arguments.wallets), servers=arguments.servers)
    bench = Floor(options, stack, stack.config, Progress(), "", "")
    bench.open_workload()
    place(bench, arguments.rate, 5.0, judge_lag=False)  # Plans, pages and code are warm after that.
    turns: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(arguments.rounds):
        turns["without"].append(turn(bench, arguments.rate, arguments.seconds, None))
        with auditing(stack) as beside:
            turns["with"].append(turn(bench, arguments.rate, arguments.seconds, beside))
            result = beside.stop()
            assert result["findings"] == {}, result["witnesses"]
    print(described(machine()))
    print(f"{arguments.rate:g} bets/s, {arguments.rounds} turns of {arguments.seconds:g} s each, CPU ms a bet:")
    for name, rows in turns.items():
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(
            f"  {name:<8} service {medians['service_ms']:.3f} (Postgres {medians['postgres_ms']:.3f})"
            f"  auditor {medians['auditor_ms']:.3f}  total {medians['total_ms']:.3f}"
            f"  p99 {max(row['p99_ms'] for row in rows):.0f} ms at most  bets {sum(row['bets'] for row in rows):.0f}"
        )
    base, loaded = (statistics.median(row["total_ms"] for row in turns[name]) for name in ("without", "with"))
    print(f"  cost: {100 * (loaded / base - 1):+.1f} % CPU a bet")
    found = {}
    with auditing(stack) as beside:
        load = threading.Thread(
            target=place, args=(bench, arguments.rate, arguments.seconds + 30), kwargs={"judge_lag": False}
        )
        load.start()
        time.sleep(SETTLE_S)
        for name, code, plant in plants(stack, bench.sizes.wallets):
            found[name] = beside.seconds_until_found(code, plant)
            print(f"  one cent in {name}: {code} after {found[name]:.1f} s")
        load.join()
    if arguments.json:
        turns_and_found = {"rate": arguments.rate, "turns": turns, "found_after_s": found}
        Path(arguments.json).write_text(json.dumps(turns_and_found, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--wallets", type=int, default=QUICK.wallets)
    parser.add_argument("--json")
    asked = parser.parse_args()
    root = Path(__file__).parents[2] / ".ledgerproof" / "benchmarks"
    spec = StackSpec(servers=asked.servers, apis=1, settings={"reconcile_every_s": 0.0, "reconcile_full_at": ""})
    with Stack.start(spec, root=root) as started:
        main(asked, started)
