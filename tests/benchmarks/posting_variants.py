"""Measures what rules and look-ups of the posting function cost, on one real Postgres with all hundred shards.

    .venv/bin/python tests/benchmarks/posting_variants.py [--rounds 5] [--seconds 2]

Each variant is a database with the service's schema and one thing changed. They take turns, batch size by batch size;
what counts is the CPU time of the server's process for one bet, which other work on the machine moves least.
"""

import argparse
import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from uuid import UUID

import asyncpg
from measuring import described, machine, ratios, spread

from compose.stack import Stack
from compose.state import StackSpec
from ledgerproof.bench import loading
from ledgerproof.bench.plan import Plan
from ledgerproof.bench.requests import draw_bets
from reference.config import ROLES, ServerConfig, ServiceConfig
from reference.install import install_server
from reference.routing import even_routing
from reference.sql import load_sql

BATCHES = (1, 16, 64, 256)
FIRST_USER, USERS, MATCHES = 1_000_000, 20_000, 40
RATE_MAX = 20_000
"""Bets are prepared for this many a second."""
NO_FORM = "ALTER TABLE wallet_ledger DROP CONSTRAINT wallet_ledger_form"
CHECKS = """
    ALTER TABLE wallet_ledger DROP CONSTRAINT wallet_ledger_form,
        ADD CHECK (shard = user_id % 100), ADD CHECK (user_id > 0), ADD CHECK (seq > 0),
        ADD CHECK ((type = 'DEBIT' AND amount < 0) OR (type IN ('CREDIT', 'REFUND', 'PAYOUT') AND amount > 0)),
        ADD CHECK ((contra = 'EXTERNAL' AND match_id IS NULL)
                   OR (contra IN ('ESCROW', 'HOUSE') AND match_id IS NOT NULL)),
        ADD CHECK (length(idempotent_key) BETWEEN 1 AND 255)
"""


def heads_from(wallets: int) -> str:
    """Return the posting function that reads the heads of more than so many wallets by one statement."""
    functions = load_sql("functions")["functions"]
    begin = functions.index("CREATE FUNCTION ledger_post(")
    post = functions[begin : functions.index("END $$;", begin) + len("END $$;")]
    asked = "cardinality(wallets) > 48"
    if post.count(asked) != 1:
        raise RuntimeError(f"ledger_post has no {asked!r} any more: mend this benchmark")
    return post.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION").replace(
        asked, f"cardinality(wallets) > {wallets}"
    )


VARIANTS = {
    "as it is": "",
    "six CHECKs instead of entry_form": CHECKS,
    "no rule of form at all": NO_FORM,
    "heads one by one": heads_from(1_000_000),
    "heads by one statement": heads_from(0),
}


async def prepare(config: ServiceConfig, superuser: tuple[str, str], change: str) -> asyncpg.Connection:
    """Install a variant, open its wallets and return a connection of the API's role."""
    user, password = superuser
    server = config.servers[0]
    await install_server(config, 0, user, password)
    if change:
        owner = await asyncpg.connect(
            host=server.host, port=server.port, user=user, password=password, database=server.database
        )
        await owner.execute(change)
        await owner.close()
    opening = (loading.deposit_posting(user, "open") for user in range(FIRST_USER, FIRST_USER + USERS))
    await loading.post_all(config, opening)
    return await loading.open_connection(config, 0)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process so far."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


async def window(connection: asyncpg.Connection, pid: int, size: int, drawing: int, seconds: float) -> float:
    """Post batches for some seconds; return the server's CPU microseconds a bet."""
    plan = Plan(
        ports=[],
        kind="bets",
        loop="closed",
        duration_s=0.0,
        seed=drawing,
        first_user=FIRST_USER,
        users=USERS,
        matches=[str(UUID(int=number + 1)) for number in range(MATCHES)],
    )
    bets = list(draw_bets(plan, int(RATE_MAX * seconds)))
    batches = loading.batches([loading.bet_posting(bet, f"{drawing}-{n}") for n, bet in enumerate(bets)], size)
    post = load_sql("queries")["post"]
    for batch in batches[:3]:
        await connection.fetch(post, *batch)
    posted, began, used = 0, time.monotonic(), cpu_s(pid)
    for batch in batches[3:]:
        await connection.fetch(post, *batch)
        posted += size
        if time.monotonic() - began > seconds:
            break
    return (cpu_s(pid) - used) / posted * 1e6


async def measure(
    server: ServerConfig, superuser: tuple[str, str], rounds: int, seconds: float
) -> dict[tuple[str, int], list[float]]:
    """Return the microseconds by variant and batch size, one a round."""
    connections: dict[str, asyncpg.Connection] = {}
    pids: dict[str, int] = {}
    passwords = {role: secrets.token_hex(16) for role in ROLES}
    for number, (name, change) in enumerate(VARIANTS.items()):
        config = ServiceConfig(
            servers=[ServerConfig(server.name, server.host, server.port, database=f"variant_{number}")],
            routing=even_routing(1),
            passwords=passwords,
            kafka_bootstrap="",
            redis_host="",
            redis_port=0,
        )
        connections[name] = await prepare(config, superuser, change)
        pids[name] = await connections[name].fetchval("SELECT pg_backend_pid()")
    found: dict[tuple[str, int], list[float]] = {}
    for size in BATCHES:
        for turn in range(rounds):
            names: Sequence[str] = list(VARIANTS)
            for name in names if turn % 2 == 0 else reversed(names):
                cost = await window(connections[name], pids[name], size, size * 1_000 + turn, seconds)
                found.setdefault((name, size), []).append(cost)
        print(f"batches of {size} done", file=sys.stderr, flush=True)
    for connection in connections.values():
        connection.terminate()
    return found


def table(found: dict[tuple[str, int], list[float]]) -> str:
    """Return a Markdown table: ratios to the first variant in the same round, and its own microseconds a bet."""
    lines = ["| variant | " + " | ".join(f"batch {size}: ratio (range), µs" for size in BATCHES) + " |"]
    lines.append("|---|" + "---|" * len(BATCHES))
    first = next(iter(VARIANTS))
    for name in VARIANTS:
        cells = [
            f"{spread(ratios(found[name, size], found[first, size]))}, {median(found[name, size]):.0f}"
            for size in BATCHES
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Start one server, measure every variant in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    with Stack.start(StackSpec(servers=1, only="infra")) as stack:
        server = ServerConfig("pg0", "127.0.0.1", stack.port("pg0"))
        found = asyncio.run(measure(server, stack.superuser, args.rounds, args.seconds))
    print(described(machine()) + f"  {args.rounds} rounds of {args.seconds:g} s")
    print(table(found))


if __name__ == "__main__":
    main()
