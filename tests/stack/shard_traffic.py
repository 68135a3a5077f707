"""Clients of a few shards that never stop, write down every answer, and compare them with the ledger afterwards."""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import asyncpg

from ledgerproof.collect import read_topics
from reference.config import ServiceConfig
from reference.routing import shard_of

WALLET_TABLES = ("wallet_ledger", "bets", "refusals", "wallet_balance_projection")


def wallets_of(shard: int, count: int) -> list[int]:
    """Fresh wallets of one shard."""
    start = uuid.uuid4().int % 10**12 + 1
    return [(start + number) * 100 + shard for number in range(count)]


@dataclass
class Traffic:
    """What clients asked and what they were told."""

    session: aiohttp.ClientSession
    bases: list[str]
    users: list[int]
    match_id: str | None = None
    sent: dict[tuple[int, str], tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """(user, key) → path and body."""
    accepted: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    """(user, key) → seq and balance."""
    refused: set[tuple[int, str]] = field(default_factory=set)
    not_admitted: set[tuple[int, str]] = field(default_factory=set)
    unknown: set[tuple[int, str]] = field(default_factory=set)
    strange: list[object] = field(default_factory=list)
    slowest_s: float = 0.0
    last_seq: dict[int, int] = field(default_factory=dict)
    stopping: bool = False

    async def send(self, user: int, kind: str, key: str, body: dict[str, Any], api: int = 0) -> tuple[int, Any]:
        path = f"/v1/wallets/{user}/{kind}"
        self.sent[(user, key)] = (path, body)
        started = time.monotonic()
        try:
            async with self.session.post(self.bases[api] + path, json=body, headers={"idempotency-key": key}) as reply:
                status, answer = reply.status, await reply.json(content_type=None)
                admitted = reply.headers.get("x-admitted") != "0"
        except aiohttp.ClientError:
            self.unknown.add((user, key))
            return 0, None
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        identity = (user, key)
        if status == 202:
            told = (answer["seq"], answer["balance_minor"])
            if self.accepted.setdefault(identity, told) != told:
                self.strange.append(("answered differently", identity, self.accepted[identity], told))
            self.last_seq[user] = max(self.last_seq.get(user, 0), answer["seq"])
        elif status == 422:
            self.refused.add(identity)
        elif status == 503 and not admitted:
            self.not_admitted.add(identity)
        elif status == 504:
            self.unknown.add(identity)
        else:
            self.strange.append((identity, status, answer))
        return status, answer

    async def read(self, user: int, api: int) -> None:
        """Read strongly: never behind what was acknowledged before, never a wallet that does not exist."""
        seen = self.last_seq.get(user, 0)
        url = f"{self.bases[api]}/v1/wallets/{user}/balance?consistency=strong"
        async with self.session.get(url) as reply:
            view = await reply.json(content_type=None)
        if reply.status == 200 and view["seq"] >= seen:
            return
        if reply.status not in (503, 504) and seen:
            self.strange.append(("read", user, seen, reply.status, view))

    async def client(self, number: int) -> None:
        chance = random.Random(number)
        count = 0
        while not self.stopping:
            count += 1
            user, api, key = chance.choice(self.users), chance.randrange(len(self.bases)), f"{number}-{count}"
            draw = chance.random()
            if draw < 0.2:
                await self.send(user, "deposits", key, {"amount_minor": chance.randint(1, 500)}, api)
            elif draw < 0.3:
                # Far more than there is: a refusal is an answer that has to move too.
                await self.send(user, "withdrawals", key, {"amount_minor": 900_000_000}, api)
            elif draw < 0.5 or self.match_id is None:
                await self.send(user, "withdrawals", key, {"amount_minor": chance.randint(1, 50)}, api)
            elif draw < 0.85:
                side = chance.choice(["BACK", "LAY"])
                body = {"match_id": self.match_id, "outcome": "HOME", "side": side, "odds": 200, "stake_minor": 10}
                await self.send(user, "bets", key, body, api)
            elif draw < 0.95:
                await self.read(user, api)
            elif self.sent:
                again = chance.choice(list(self.sent))
                path, body = self.sent[again]
                await self.send(again[0], path.rsplit("/", 1)[1], again[1], body, api)
            await asyncio.sleep(0.01)

    async def replays_answer_the_same(self, count: int = 50) -> None:
        """Every kind of decided key gives its first answer again, wherever the wallet is now."""
        for identity in list(self.accepted)[-count:] + list(self.refused)[-count:]:
            path, body = self.sent[identity]
            status, answer = await self.send(identity[0], path.rsplit("/", 1)[1], identity[1], body)
            assert status == (202 if identity in self.accepted else 422), (identity, status, answer)
            assert answer["replayed"] is True


@asynccontextmanager
async def traffic(
    bases: list[str], operator: dict[str, str], users: Sequence[int], clients: int = 6, match_id: str | None = None
) -> AsyncIterator[Traffic]:
    """Fund wallets and keep clients busy with them while the block runs; a client that fails fails the block."""
    timeout = aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession(timeout=timeout, headers=operator) as session:
        found = Traffic(session, bases, list(users), match_id)
        for user in users:
            status, answer = await found.send(user, "deposits", "first", {"amount_minor": 10_000})
            assert status == 202, answer
        tasks = [asyncio.create_task(found.client(number)) for number in range(clients)]
        try:
            yield found
        finally:
            # Every request is seen to its end: of one that is cut off nobody could say what became of it.
            found.stopping = True
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        broken = [end for end in ends if isinstance(end, Exception)]
        assert broken == []
        await found.replays_answer_the_same()
        assert found.strange == []


async def compare(found: Traffic, owner: list[asyncpg.Connection], holder: dict[int, int]) -> None:
    """Every answer that clients got is in the ledger, nothing else is, and all of it on the shard's one server."""
    for shard, server in holder.items():
        for index, connection in enumerate(owner):
            here = await connection.fetchval("SELECT here FROM shard_routes WHERE shard = $1", shard)
            assert here is (index == server), f"shard {shard} on server {index}"
            if index != server:
                assert await connection.fetchval("SELECT to_regclass($1)", f"wallet_ledger_{shard}") is None
                for table in WALLET_TABLES:
                    query = f"SELECT count(*) FROM {table} WHERE shard = $1"
                    assert await connection.fetchval(query, shard) == 0, f"{table} of shard {shard} on {index}"
    entries: dict[tuple[int, str], tuple[int, int]] = {}
    for user in found.users:
        connection = owner[holder[shard_of(user)]]
        rows = await connection.fetch(
            "SELECT seq, amount, balance_snapshot, idempotent_key FROM wallet_ledger "
            "WHERE shard = $1 AND user_id = $2 ORDER BY seq",
            shard_of(user),
            user,
        )
        balance = 0
        for number, row in enumerate(rows, start=1):
            balance += row["amount"]
            assert (row["seq"], row["balance_snapshot"]) == (number, balance)
            if not row["idempotent_key"].startswith("ledger:"):
                entries[(user, row["idempotent_key"])] = (row["seq"], row["balance_snapshot"])
        refusals = await connection.fetch(
            "SELECT idempotent_key FROM refusals WHERE shard = $1 AND user_id = $2", shard_of(user), user
        )
        told = {key for owner_id, key in found.refused if owner_id == user}
        kept = {row["idempotent_key"] for row in refusals}
        assert told <= kept <= told | {key for owner_id, key in found.unknown if owner_id == user}
    assert {key: entries.get(key) for key in found.accepted} == found.accepted
    decided = found.accepted.keys() | found.unknown
    assert entries.keys() <= decided, entries.keys() - decided


async def events_are_in_order(config: ServiceConfig, users: Sequence[int]) -> int:
    """In each topic the first records of a wallet's events come in the order of seq. Returns how many there are."""
    records = await asyncio.to_thread(read_topics, config)
    newest: dict[tuple[str, int], int] = {}
    seen: set[str] = set()
    wallets = set(users)
    rows = records.sort("topic", "partition", "offset").select("topic", "event_id", "event_type", "user_id", "seq")
    for topic, event_id, event_type, user, seq in rows.iter_rows():
        if user not in wallets or event_id in seen or event_type not in ("EntryPosted", "BetCreated"):
            continue
        seen.add(event_id)
        assert seq > newest.get((topic, user), 0), (topic, user, seq)
        newest[(topic, user)] = seq
    return len(seen)
