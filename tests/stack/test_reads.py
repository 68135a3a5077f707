"""The balance as of a time is exact on the millisecond, and never changes once it was answered."""

import asyncio
import time
import uuid

import asyncpg
import pytest
from exchange_floor import Floor
from shard_traffic import wallets_of

from reference.answers import BalanceView
from reference.cache import Cache
from reference.commands import Contra, EntryType
from reference.errors import InvalidCommand
from reference.reads import Reads
from reference.writer import Posting, post_entries

SHARD = 41
START_MS = 1_700_000_000_000
INSERT = """INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, balance_snapshot, idempotent_key,
                                       created_by, created_at)
            SELECT $1::bigint % 100, $1, n, 'CREDIT', n, 'EXTERNAL', n * (n + 1) / 2, 'k' || n, 'test',
                   to_timestamp($2::bigint / 1000.0) + (n / $3) * interval '1500 microseconds'
              FROM generate_series(1, $4::bigint) AS n"""


async def balance_as_of(floor: Floor, user: int, at_ms: int) -> BalanceView | None:
    cache = Cache(floor.api.config)
    try:
        return await Reads(floor.api, cache).balance_as_of(user, at_ms)
    finally:
        await cache.close()


async def history(owner: asyncpg.Connection, entries: int, at_once: int) -> int:
    """A wallet with entries 1.5 ms apart, some written at one moment; returns it."""
    (user,) = wallets_of(SHARD, 1)
    await owner.execute(INSERT, user, START_MS, at_once, entries)
    return user


async def test_every_millisecond_of_a_history_answers_what_a_full_scan_answers(floor: Floor) -> None:
    user = await history(floor.owner[0], 200, 3)
    query = """SELECT count(*) AS seq, coalesce(sum(amount), 0)::bigint AS balance FROM wallet_ledger
                WHERE shard = $1 AND user_id = $2 AND (extract(epoch FROM created_at) * 1000)::bigint <= $3"""
    answers = set()
    for at_ms in range(START_MS - 3, START_MS + 105):
        found = await balance_as_of(floor, user, at_ms)
        expected = await floor.owner[0].fetchrow(query, SHARD, user, at_ms)
        assert (found.seq, found.balance_minor) == (expected["seq"], expected["balance"]), at_ms
        answers.add(found.seq)
    assert len(answers) > 60
    assert {0, 200} <= answers


async def test_a_time_that_an_entry_shows_includes_that_entry(floor: Floor) -> None:
    user = await history(floor.owner[0], 20, 1)
    for row in await floor.api.wallet_rows(user, "entries", 0, 100):
        at = await balance_as_of(floor, user, row["created_at_ms"])
        before = await balance_as_of(floor, user, row["created_at_ms"] - 1)
        assert at.seq >= row["seq"] > before.seq
        assert at.updated_at_ms == row["created_at_ms"]


async def test_before_the_first_entry_it_is_zero_and_without_any_entry_unknown(floor: Floor) -> None:
    user = await history(floor.owner[0], 5, 1)
    first = await balance_as_of(floor, user, 0)
    assert (first.balance_minor, first.seq, first.updated_at_ms) == (0, 0, 0)
    assert await balance_as_of(floor, user + 100, START_MS) is None
    assert (await balance_as_of(floor, user, int(time.time() * 1000))).seq == 5


async def test_the_future_has_no_balance(floor: Floor) -> None:
    user = await history(floor.owner[0], 1, 1)
    for at_ms in (int(time.time() * 1000) + 60_000, 2**63 - 1):
        with pytest.raises(InvalidCommand, match="future"):
            await balance_as_of(floor, user, at_ms)


async def test_a_balance_of_this_moment_waits_for_the_entry_that_is_being_written(floor: Floor) -> None:
    (user,) = wallets_of(SHARD, 1)
    await floor.fund([user])
    writing = await floor.api.connect(0)
    await writing.execute("BEGIN")
    deposit = Posting(user, uuid.uuid4().hex, EntryType.CREDIT, 5, Contra.EXTERNAL)
    (row,) = await post_entries(writing, floor.api.sql["post"], "API", [deposit])
    assert row["status"] == "ACCEPTED"
    await asyncio.sleep(0.002)
    reading = asyncio.create_task(balance_as_of(floor, user, int(time.time() * 1000)))
    done, _ = await asyncio.wait([reading], timeout=0.3)
    assert not done, "the entry under way bears an earlier time"
    await writing.execute("COMMIT")
    await writing.close()
    assert (await reading).seq == 2


async def test_a_long_history_is_searched_by_a_handful_of_index_looks(floor: Floor) -> None:
    """Counted in pages, which no neighbour's load changes; a scan would read ten thousand and more."""
    owner = floor.owner[0]
    user = await history(owner, 100_000, 7)
    looks = "SELECT idx_scan + seq_scan FROM pg_stat_xact_user_tables WHERE relname = $1"
    read = """SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = $1"""
    async with owner.transaction():
        found = await owner.fetchrow("SELECT * FROM wallet_as_of($1, $2, $3)", SHARD, user, START_MS + 9_000)
        scans, rows = (
            await owner.fetchval(looks, f"wallet_ledger_{SHARD}"),
            await owner.fetchval(read, f"wallet_ledger_{SHARD}"),
        )
    assert found["seq"] == 42_006
    assert scans <= 40
    assert rows <= 40
