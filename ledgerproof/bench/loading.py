"""Posts bets straight into servers, as fast as one connection each allows: backlogs, and the rows of SQL alone."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final
from uuid import UUID

import asyncpg

from ledgerproof.bench.requests import DEPOSIT_MINOR, DrawnBet
from reference.commands import Contra, EntryType, Side
from reference.config import ServiceConfig
from reference.ledger import reserve_of
from reference.routing import shard_of
from reference.sql import load_sql
from reference.store import connect
from reference.uuid7 import uuid7
from reference.writer import Posting, arguments

ROLE: Final = "ledger_api"
CREATED_BY: Final = "API"
LOAD_BATCH: Final = 256
STATEMENT_TIMEOUT_MS: Final = 60_000


class NotPosted(Exception):
    """The ledger did not accept what the bench gave it; the message says what."""


def bet_posting(bet: DrawnBet, key: str) -> Posting:
    """Return the posting that the API makes of a bet."""
    side = Side(bet.side)
    return Posting(
        bet.user_id,
        key,
        EntryType.DEBIT,
        -reserve_of(side, bet.odds, bet.stake_minor),
        Contra.ESCROW,
        match_id=UUID(bet.match_id),
        bet_id=uuid7(),
        outcome=bet.outcome,
        side=side.value,
        odds=bet.odds,
        stake=bet.stake_minor,
    )


def deposit_posting(user_id: int, key: str) -> Posting:
    """Return the posting that the API makes of an opening deposit."""
    return Posting(user_id, key, EntryType.CREDIT, DEPOSIT_MINOR, Contra.EXTERNAL)


def batches(postings: Sequence[Posting], size: int) -> list[list[object]]:
    """Return the arguments of `ledger_post`, one list a batch."""
    return [arguments(CREATED_BY, postings[at : at + size]) for at in range(0, len(postings), size)]


async def open_connection(config: ServiceConfig, server: int) -> asyncpg.Connection:
    """Open a connection as the API does, with a limit that suits loading."""
    return await connect(
        config.servers[server], ROLE, config.passwords[ROLE], statement_timeout_ms=STATEMENT_TIMEOUT_MS
    )


async def post_all(config: ServiceConfig, postings: Iterable[Posting]) -> None:
    """Post everything, all servers at once. Raises NotPosted unless every posting is new and accepted."""
    by_server: dict[int, list[Posting]] = defaultdict(list)
    for posting in postings:
        by_server[config.routing[shard_of(posting.user_id)]].append(posting)
    sql = load_sql("queries")["post"]

    async def post(server: int, mine: list[Posting]) -> None:
        connection = await open_connection(config, server)
        try:
            for batch in batches(mine, LOAD_BATCH):
                check_accepted(await connection.fetch(sql, *batch))
        finally:
            connection.terminate()

    await asyncio.gather(*(post(server, mine) for server, mine in by_server.items()))


def check_accepted(rows: Sequence[asyncpg.Record]) -> None:
    """Raise NotPosted unless every row of an answer says ACCEPTED."""
    for row in rows:
        if row["status"] != "ACCEPTED":
            raise NotPosted(f"a posting of the benchmark was answered {row['status']}")
