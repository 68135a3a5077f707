"""Judges the ledger that the load left: a rate of a ledger that lost something is no rate."""

import asyncio
from collections import Counter
from typing import Final

from ledgerproof.bench.context import Bench
from ledgerproof.bench.sql import load
from ledgerproof.collect import auditor

TIMEOUT_S: Final = 120.0


def check(bench: Bench) -> dict[str, int]:
    """Wait until everything is at rest and return the violations by rule. Raises NotDrained or NotCollected."""
    bench.drain()
    return asyncio.run(_check(bench))


async def _check(bench: Bench) -> dict[str, int]:
    found: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for server in bench.config.servers:
        async with auditor(bench.config, server) as connection:
            for rule, sql in load("consistency").items():
                bench.show(f"{server.name}: {rule.strip('_')}")
                # What begins with _ is summed over the servers and judged below.
                arguments = [f"{bench.run}-"] if rule == "_acknowledged" else []
                count = int(await connection.fetchval(sql, *arguments, timeout=TIMEOUT_S))
                (sums if rule.startswith("_") else found)[rule] += count
    found["bet_not_in_a_book"] = abs(sums["_bets"] - sums["_orders"])
    found["acknowledged_bet_missing"] = max(0, bench.acknowledged - sums["_acknowledged"])
    return dict(found)
