"""What the matcher's and the settler's tests share: paid bets, matches of one home server, and money counts."""

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from reference.bus import Message
from reference.commands import Contra, CreateMatch, EntryType, MatchState, Side
from reference.exchange import create_match, transition_match
from reference.ledger import reserve_of
from reference.matcher import Arrival, BetCreated, BookCache, MatcherResult, apply_orders
from reference.settler import SETTLEMENT_CLASS
from reference.store import Store
from reference.writer import Posting, post_entries

TIMEOUT_S = 10.0
OUTCOMES = ("HOME", "DRAW", "AWAY")
PLENTY = 10**12


@dataclass
class Floor:
    """An exchange floor: the API's connections to place and cancel, the matcher's to match."""

    api: Store
    matcher: Store
    owner: list[asyncpg.Connection]

    async def open_match(self, home: int = 0, closes_in_s: float = 3600) -> UUID:
        """Create a match whose home is the given server."""
        match_id = uuid4()
        while self.api.home_of(match_id) != home:
            match_id = uuid4()
        closes_at_ms = int((time.time() + closes_in_s) * 1000)
        row = await create_match(self.api, CreateMatch(match_id, closes_at_ms, OUTCOMES))
        assert row["status"] == "ACCEPTED"
        return match_id

    async def move(self, match_id: UUID, to: MatchState, result: str | None = None) -> None:
        row = await transition_match(self.api, match_id, to, result)
        assert row["status"] == "ACCEPTED"

    async def fund(self, users: Iterable[int], amount: int = PLENTY) -> None:
        await self._post([Posting(user, "fund", EntryType.CREDIT, amount, Contra.EXTERNAL) for user in users])

    async def spend(self, users: Iterable[int]) -> dict[int, int]:
        """Withdraw all that wallets hold, minor units by user."""
        held = {user: (await self.head(user))[0] for user in users}
        await self._post(
            [
                Posting(user, uuid4().hex, EntryType.DEBIT, -amount, Contra.EXTERNAL)
                for user, amount in held.items()
                if amount
            ]
        )
        return held

    async def reserve(self, match_id: UUID) -> None:
        """Lock a match as its settler does, so that the stack's own settler leaves it alone."""
        low = match_id.int & 0x7FFF_FFFF
        assert await self.at(match_id).fetchval("SELECT pg_try_advisory_lock($1, $2)", SETTLEMENT_CLASS, low)

    async def head(self, user: int) -> tuple[int, int]:
        """Balance and seq of a wallet; zeros for one without entries."""
        row = await self.api.fetchrow(self.api.server_of(user), "head", user % 100, user)
        return (0, 0) if row is None else (row["balance"], row["seq"])

    async def pay(self, arrivals: Sequence[Arrival]) -> None:
        """Post the entries that pay for the bets, as the API does."""
        await self._post(
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
            ]
        )

    async def _post(self, postings: Sequence[Posting]) -> None:
        for server in range(len(self.api.config.servers)):
            batch = [posting for posting in postings if self.api.server_of(posting.user_id) == server]
            async with self.api.connection(server) as connection:
                rows = await post_entries(connection, self.api.sql["post"], "API", batch)
            assert all(row["status"] == "ACCEPTED" for row in rows)

    async def apply(self, books: BookCache, arrivals: Sequence[Arrival]) -> MatcherResult:
        home = self.matcher.home_of(arrivals[0].bet.match_id)
        async with self.matcher.connection(home) as connection:
            return await apply_orders(connection, books, arrivals, TIMEOUT_S)

    def at(self, match_id: UUID) -> asyncpg.Connection:
        """The owner's connection to the home server of a match."""
        return self.owner[self.api.home_of(match_id)]

    async def escrow(self, match_id: UUID) -> int:
        """What is left of the bets' money over all servers, minor units."""
        query = "SELECT coalesce(-sum(amount), 0)::bigint FROM wallet_ledger WHERE match_id = $1 AND contra = 'ESCROW'"
        return sum([await connection.fetchval(query, match_id) for connection in self.owner])

    async def entries(self, match_id: UUID) -> list[tuple[int, str, int, str]]:
        """(user, type, amount, key) of every settlement or refund entry of a match, over all servers."""
        query = """SELECT user_id, type, amount, idempotent_key AS key FROM wallet_ledger
                    WHERE match_id = $1 AND settlement_version IS NOT NULL ORDER BY user_id, seq"""
        return [tuple(row.values()) for connection in self.owner for row in await connection.fetch(query, match_id)]

    async def orders(self, match_id: UUID) -> list[asyncpg.Record]:
        return await self.at(match_id).fetch("SELECT * FROM orders WHERE match_id = $1 ORDER BY arrival", match_id)

    async def fills(self, match_id: UUID) -> list[asyncpg.Record]:
        return await self.at(match_id).fetch("SELECT * FROM fills WHERE match_id = $1 ORDER BY fill_no", match_id)

    async def events(self, match_id: UUID, event_type: str) -> list[asyncpg.Record]:
        query = """SELECT partition_key, payload FROM events
                    WHERE event_type = $2 AND payload->>'match_id' = $1::text ORDER BY id"""
        return await self.at(match_id).fetch(query, str(match_id), event_type)


def wallets(count: int) -> list[int]:
    """Fresh wallets, spread over all shards."""
    start = uuid4().int % 10**14 + 1
    # 37 steps around the 100 shards: any six of them are on both servers.
    return [start + 37 * number for number in range(count)]


def arrival(
    match_id: UUID, user_id: int, side: Side, odds: int = 250, stake: int = 100, outcome: str = "HOME"
) -> Arrival:
    bet = BetCreated(uuid4(), user_id, match_id, outcome, side, odds, stake, reserve_of(side, odds, stake))
    return Arrival(bet, uuid4(), None)


def redelivered(again: Arrival) -> Arrival:
    """The same event as another object, as Kafka brings it a second time."""
    return replace(again)


def message(topic: str, event_type: str, payload: dict[str, Any]) -> Message:
    """An event as the consumer hands it out."""
    return Message(
        topic=topic,
        partition=0,
        offset=0,
        key="1",
        event_id=str(uuid4()),
        event_type=event_type,
        traceparent=None,
        committed_at_ms=0,
        payload=payload,
        raw=b"{}",
    )


def crowd(seed: int, match_ids: Sequence[UUID], users: Sequence[int], count: int) -> list[Arrival]:
    """Bets of both sides at few odds, so that many trade, some partly, and rounding has work to do."""
    chance = random.Random(seed)
    return [
        arrival(
            chance.choice(match_ids),
            chance.choice(users),
            chance.choice(list(Side)),
            chance.choice([101, 133, 150, 199, 201, 250, 333]),
            chance.choice([1, 3, 7, 100, 1234]),
            chance.choice(OUTCOMES),
        )
        for _ in range(count)
    ]
