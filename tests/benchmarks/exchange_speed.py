"""Measures matcher and settler on real servers: bets per second of one process, and the settler's peak memory.

    .venv/bin/python tests/benchmarks/exchange_speed.py [--bets 100000] [--matches 40] [--kill] [--json PATH]

    matcher   bets over `--matches` matches, in batches of the consumer's size, with every fill
    settler   one match with all the bets, settled by a process of its own, then settled again with another result;
              `--kill` kills that process with SIGKILL four times on the way

All bets are paid for before, by entries of their own; two Postgres servers with fsync on, closed loop, empty ledger
at the start. After each settlement the escrow of the match must be empty, or the command fails.
"""

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import random
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from measuring import described, machine

from compose.stack import Stack
from compose.state import StackSpec
from reference import settler
from reference.commands import Contra, CreateMatch, EntryType, MatchState, ResettleMatch, Side
from reference.config import ServiceConfig, load_config
from reference.exchange import create_match, resettle_match, transition_match
from reference.ledger import reserve_of
from reference.matcher import Arrival, BetCreated, BookCache, apply_orders
from reference.sql import load_sql
from reference.store import Store
from reference.writer import Posting, post_entries

BATCH = 1_000
WALLETS = 5_000
KILLS = 4


async def funded(store: Store, users: Sequence[int]) -> None:
    await posted(store, [Posting(user, "fund", EntryType.CREDIT, 10**12, Contra.EXTERNAL) for user in users])


async def posted(store: Store, postings: Sequence[Posting]) -> None:
    for server in range(len(store.config.servers)):
        mine = [posting for posting in postings if store.server_of(posting.user_id) == server]
        for start in range(0, len(mine), BATCH):
            async with store.connection(server) as connection:
                await post_entries(connection, store.sql["post"], "API", mine[start : start + BATCH])


async def opened(store: Store, home: int) -> UUID:
    match_id = uuid4()
    while store.home_of(match_id) != home:
        match_id = uuid4()
    closes_at_ms = int((time.time() + 86_400) * 1000)
    await create_match(store, CreateMatch(match_id, closes_at_ms, ("HOME", "DRAW", "AWAY")))
    return match_id


def drawn(chance: random.Random, match_ids: Sequence[UUID], users: Sequence[int], count: int) -> list[Arrival]:
    """Bets around one price per outcome, so that about two in three trade, as in the main job."""
    arrivals = []
    for _ in range(count):
        side, odds = chance.choice(list(Side)), max(101, round(chance.gauss(250, 8)))
        stake = chance.randrange(50, 2_000, 10)
        bet = BetCreated(
            uuid4(),
            chance.choice(users),
            chance.choice(match_ids),
            chance.choice(("HOME", "DRAW", "AWAY")),
            side,
            odds,
            stake,
            reserve_of(side, odds, stake),
        )
        arrivals.append(Arrival(bet, uuid4(), None))
    return arrivals


async def paid(store: Store, arrivals: Sequence[Arrival]) -> None:
    await posted(
        store,
        [
            Posting(
                user_id=bet.user_id,
                key=f"bet {bet.bet_id}",
                type=EntryType.DEBIT,
                amount=-bet.reserve,
                contra=Contra.ESCROW,
                match_id=bet.match_id,
                bet_id=bet.bet_id,
                outcome=bet.outcome,
                side=bet.side.value,
                odds=bet.odds,
                stake=bet.stake,
            )
            for bet in (arrival.bet for arrival in arrivals)
        ],
    )


async def matched(
    store: Store, arrivals: Sequence[Arrival], by_statement: dict[str, float] | None = None
) -> tuple[float, float, int]:
    """Match arrivals of one home server; return seconds, CPU seconds of this process, and fills.

    `by_statement` gets the seconds of each statement, from sending it to its last row.
    """
    books, fills = BookCache(), 0
    connection = await store.connect(store.home_of(arrivals[0].bet.match_id))
    if by_statement is not None:
        name_of = {text: name for name, text in load_sql("matcher").items()}

        def log(record: Any) -> None:
            name = name_of.get(record.query, record.query)
            by_statement[name] = by_statement.get(name, 0.0) + record.elapsed

        connection.add_query_logger(log)
    started, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(arrivals), BATCH):
        result = await apply_orders(connection, books, arrivals[start : start + BATCH], 60.0)
        fills += result.fills
    spent = time.perf_counter() - started, time.process_time() - cpu
    await connection.close()
    return *spent, fills


async def settle_here(config_path: Path, match_id: UUID, profile: Path | None) -> None:
    """Be the settler process: settle one match and print what it took as JSON."""
    store = Store(load_config(config_path), "ledger_settler")
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    started = time.perf_counter()
    settlement = settler.Settlement(store, match_id)
    await settlement.run()
    seconds = time.perf_counter() - started
    if profile:
        profiler.disable()
        profiler.dump_stats(profile)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report = {
        "bets": settlement.bets,
        "entries": settlement.entries,
        "seconds": seconds,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
    }
    print(json.dumps(report))
    await store.close()


async def settled(
    config_path: Path, store: Store, match_id: UUID, home: asyncpg.Connection, bets: int, *, kills: int
) -> dict[str, float]:
    """Settle a match by processes of its own, killing the first `kills` of them; return what the last one says."""
    command = [sys.executable, __file__, "--settle", str(config_path), str(match_id)]
    query = "SELECT max(last_arrival) FROM settlements WHERE match_id = $1 AND state = 'RUNNING'"
    started = time.perf_counter()
    for kill in range(kills):
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
        while True:
            if (await home.fetchval(query, match_id) or 0) >= bets * (kill + 1) // (kills + 1):
                break
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    report: dict[str, float] = json.loads(printed)
    report["wall_s"] = time.perf_counter() - started
    held = 0
    for server in range(len(store.config.servers)):
        escrow = "SELECT coalesce(sum(amount), 0)::bigint FROM wallet_ledger WHERE match_id = $1 AND contra = 'ESCROW'"
        auditor = Store(store.config, "ledger_auditor")
        async with auditor.connection(server) as connection:
            held += await connection.fetchval(escrow, match_id)
        await auditor.close()
    if held:
        raise SystemExit(f"the escrow of match {match_id} holds {-held} after its settlement")
    return report


async def measure(config_path: Path, config: ServiceConfig, arguments: argparse.Namespace) -> dict[str, object]:
    api, matcher = Store(config, "ledger_api"), Store(config, "ledger_matcher")
    users = list(range(1, WALLETS + 1))
    chance = random.Random(arguments.seed)
    await funded(api, users)
    report: dict[str, object] = {**machine(), "bets": arguments.bets, "batch": BATCH, "kills": arguments.kill * KILLS}

    match_ids = [await opened(api, 0) for _ in range(arguments.matches)]
    some = drawn(chance, match_ids, users, min(arguments.bets, 20_000))
    profiler = cProfile.Profile()
    if arguments.profile:
        profiler.enable()
    by_statement: dict[str, float] | None = {} if arguments.profile else None
    seconds, cpu_s, fills = await matched(matcher, some, by_statement)
    if arguments.profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        for name, spent_s in sorted((by_statement or {}).items(), key=lambda item: -item[1]):
            print(f"    {1000 * spent_s / (len(some) / BATCH):8.2f} ms a batch   {name}")
    report["matcher"] = {"bets_per_s": len(some) / seconds, "fills": fills, "cpu_ms_per_bet": 1000 * cpu_s / len(some)}
    print(f"matcher   {len(some) / seconds:8.0f} bets/s   {fills} fills   {1000 * cpu_s / len(some):.3f} CPU-ms a bet")

    match_id = await opened(api, 0)
    for start in range(0, arguments.bets, 10_000):
        bets = drawn(chance, [match_id], users, min(10_000, arguments.bets - start))
        await paid(api, bets)
        await matched(matcher, bets)
    await transition_match(api, match_id, MatchState.CLOSED, None)
    settler_role = Store(config, "ledger_settler")
    home = await settler_role.connect(api.home_of(match_id))
    for name, result in (("settler", "HOME"), ("settler, again", "AWAY")):
        if name == "settler":
            await transition_match(api, match_id, MatchState.SETTLING, result)
        else:
            await resettle_match(api, match_id, ResettleMatch(result), uuid4().hex)
        kills = KILLS if arguments.kill else 0
        done = await settled(config_path, api, match_id, home, arguments.bets, kills=kills)
        report[name] = done
        rate = done["bets"] / done["seconds"]
        print(
            f"{name:14} {rate:8.0f} bets/s   {done['entries']:.0f} entries   peak {done['peak_mb']:.0f} MB   "
            f"{1000 * done['cpu_s'] / done['bets']:.3f} CPU-ms a bet   all of it {done['wall_s']:.1f} s"
        )
    for store in (api, matcher, settler_role):
        await store.close()
    await home.close()
    return report


def main() -> None:
    """Read the arguments, measure on a stack of its own, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bets", type=int, default=100_000)
    parser.add_argument("--matches", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where matcher and settler spend their time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--settle", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.settle:
        path = os.environ.get("SETTLER_PROFILE")
        asyncio.run(settle_here(Path(arguments.settle[0]), UUID(arguments.settle[1]), Path(path) if path else None))
        return
    print(described(machine()))
    root = Path(__file__).parents[2] / ".ledgerproof" / "benchmarks"
    with Stack.start(StackSpec(servers=2), root=root) as stack:
        # Only the databases take part: what the workers would do with the events is not measured here.
        for kind in ("relay", "matcher", "settler", "projector", "api"):
            for node in stack.nodes_of(kind):
                stack.stop(node)
        report = asyncio.run(measure(stack.config_path, stack.config, arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
