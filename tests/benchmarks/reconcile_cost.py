"""What a pass of the reconciler costs on an aged ledger: `python tests/benchmarks/reconcile_cost.py [ENTRIES]`.

Fills one server with ENTRIES (a million by default) entries and their events, runs a full pass, posts 2,000 entries
more, and runs incremental passes. Prints the seconds, the pages that Postgres touched, the peak memory of this
process, and which plan nodes the incremental pass uses on the ledger.
"""

import asyncio
import re
import resource
import sys
from pathlib import Path

import asyncpg

from compose.stack import Stack
from compose.state import StackSpec
from reference.commands import Contra, EntryType
from reference.reconciliation import Kind, Pass
from reference.store import Store
from reference.writer import Posting, post_entries

PER_WALLET = 50
NEW_ENTRIES = 2_000
FILL = """
INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, balance_snapshot, idempotent_key, created_by,
                           created_at)
SELECT u % 100, u, s, 'CREDIT', 10, 'EXTERNAL', 10 * s, 'fill ' || s, 'API', now() - interval '3 days'
  FROM generate_series(1, $1) u, generate_series(1, $2) s"""
FILL_EVENTS = """
INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload, published_to_kafka, published_at,
                    created_at)
SELECT 'Wallet', user_id::text, 'EntryPosted', user_id::text,
       jsonb_build_object('user_id', user_id, 'seq', seq, 'type', type, 'amount', amount, 'balance', balance_snapshot,
           'contra', contra, 'match_id', NULL, 'bet_id', NULL, 'settlement_version', NULL),
       true, created_at, created_at
  FROM wallet_ledger"""
PAGES = "SELECT blks_read + blks_hit FROM pg_stat_database WHERE datname = 'ledger'"


async def main(stack: Stack, entries: int) -> None:
    """Fill, pass, post, pass."""
    config = stack.config
    user, password = stack.superuser
    dsn = f"postgresql://{user}:{password}@127.0.0.1:{stack.port('pg0')}/ledger"
    owner = await asyncpg.connect(dsn)
    await owner.execute(FILL, entries // PER_WALLET, PER_WALLET, timeout=900)
    await owner.execute(FILL_EVENTS, timeout=900)
    await owner.execute("VACUUM ANALYZE", timeout=900)
    print(f"{entries} entries of {entries // PER_WALLET} wallets")
    await run(owner, config, Kind.FULL)
    store = Store(config, "ledger_api")
    async with store.connection(0) as connection:
        postings = [
            Posting(number % (entries // PER_WALLET) + 1, f"new {number}", EntryType.CREDIT, 1, Contra.EXTERNAL)
            for number in range(NEW_ENTRIES)
        ]
        for start in range(0, NEW_ENTRIES, 200):
            await post_entries(connection, store.sql["post"], "API", postings[start : start + 200])
    await store.close()
    for _ in range(2):
        await run(owner, config, Kind.INCREMENTAL)
    await plans(owner)
    await run(owner, config, Kind.FULL)
    await owner.close()


async def run(owner: asyncpg.Connection, config, kind: Kind) -> None:  # type: ignore[no-untyped-def]
    """Run a pass and print what it took."""
    before = await owner.fetchval(PAGES)
    report = await Pass(config, kind, "benchmark").run()
    await asyncio.sleep(1.5)  # Postgres counts the pages of a session about once a second.
    pages = await owner.fetchval(PAGES) - before
    (server,) = report.servers
    print(
        f"{kind:<12} {report.seconds:7.2f} s  {pages:9} pages  entries {server.entries:8}  events {server.events:7}  "
        f"records {server.records:6}  findings {server.total}  problems {server.problems}  "
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB"
    )


async def plans(owner: asyncpg.Connection) -> None:
    """Print how the incremental pass finds new entries of one partition, and the event of one entry."""
    await owner.execute("SET plan_cache_mode = force_generic_plan")
    for text in (
        "SELECT * FROM wallet_ledger WHERE shard = 7 AND ctid >= '(100,0)'::tid AND ctid < '(999,0)'::tid "
        "AND created_at >= now() - interval '1 minute'",
        "SELECT * FROM events WHERE id > 900000 ORDER BY id LIMIT 500000",
    ):
        rows = await owner.fetch(f"EXPLAIN (COSTS OFF) {text}")
        print("\n".join(re.sub(r"^", "  ", row[0]) for row in rows))


if __name__ == "__main__":
    root = Path(__file__).parents[2] / ".ledgerproof" / "benchmarks"
    spec = StackSpec(servers=1, apis=1, settings={"reconcile_every_s": 0.0, "reconcile_full_at": ""})
    with Stack.start(spec, root=root) as started:
        asyncio.run(main(started, int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000))
