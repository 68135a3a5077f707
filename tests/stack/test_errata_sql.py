"""Errors of the seed that a real Postgres shows: its statements are executed as they were written.

Each test is a row of docs/errata.md. Where the schema of the service answers the same question, the same test
asks it too.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from reference.commands import Contra, EntryType
from reference.sql import load_sql
from reference.writer import Posting, arguments

SEED_COLUMNS = """
  id BIGSERIAL PRIMARY KEY,
  user_id BIGINT NOT NULL,
  type VARCHAR(20) NOT NULL,
  amount BIGINT NOT NULL,
  bet_id UUID,
  match_id UUID,
  reference_id VARCHAR(255),
  idempotent_key VARCHAR(255) UNIQUE NOT NULL,
  created_at TIMESTAMP DEFAULT now(),
  created_by VARCHAR(255),
  balance_snapshot BIGINT,
  partition_key SMALLINT GENERATED ALWAYS AS (user_id % 100) STORED
"""
SEED_LEDGER = f"CREATE TABLE wallet_ledger ({SEED_COLUMNS})"
SEED_PARTITION = (
    "CREATE TABLE wallet_ledger_{n} PARTITION OF wallet_ledger FOR VALUES WITH (MODULUS 100, REMAINDER {n})"
)
SEED_INDEXES = """
CREATE INDEX idx_ledger_user_created ON wallet_ledger(user_id, created_at DESC);
CREATE INDEX idx_ledger_idempotent ON wallet_ledger(idempotent_key);
"""
SEED_RECENT_INDEX = """
CREATE INDEX idx_ledger_recent ON wallet_ledger(user_id) WHERE created_at > now() - INTERVAL '7 days'
"""
SEED_PROJECTION = """
CREATE TABLE wallet_balance_projection (
  user_id BIGINT PRIMARY KEY,
  balance BIGINT NOT NULL,
  last_ledger_id BIGINT NOT NULL,
  updated_at TIMESTAMP DEFAULT now(),
  version INT DEFAULT 0
)
"""
SEED_EVENTS = """
CREATE TABLE events (
  id BIGSERIAL PRIMARY KEY,
  event_id UUID UNIQUE NOT NULL,
  aggregate_id VARCHAR(255) NOT NULL,
  aggregate_type VARCHAR(255) NOT NULL,
  event_type VARCHAR(255) NOT NULL,
  payload JSONB NOT NULL,
  causality_chain UUID,
  published_to_kafka BOOLEAN DEFAULT FALSE,
  published_at TIMESTAMP,
  created_at TIMESTAMP DEFAULT now(),
  CONSTRAINT event_published_check CHECK (
    (published_to_kafka = FALSE AND published_at IS NULL) OR
    (published_to_kafka = TRUE AND published_at IS NOT NULL)
  )
)
"""
# The columns that the seed's placeBet fills.
SEED_INSERT = "INSERT INTO wallet_ledger (user_id, type, amount, idempotent_key) VALUES ($1, $2, $3, $4)"
SEED_EVENT = """
INSERT INTO events (event_id, aggregate_id, aggregate_type, event_type, payload)
VALUES (gen_random_uuid(), $1, 'Bet', 'BetCreated', '{}')
"""
# The dispatcher's query, as TypeORM would send it.
SEED_POLL = """
SELECT aggregate_id FROM events WHERE published_to_kafka = FALSE ORDER BY created_at ASC LIMIT 1000
"""
LOCK_WAIT_S = 10.0
MATCH = UUID("019a0000-0000-7000-8000-000000000001")

Connection = asyncpg.Connection


class Seed:
    """A schema of its own for the seed's tables, and as many sessions in it as a test wants."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.schema = f"seed_{secrets.token_hex(6)}"
        self.sessions: list[Connection] = []

    async def session(self) -> Connection:
        connection = await asyncpg.connect(self.dsn, server_settings={"search_path": self.schema})
        self.sessions.append(connection)
        return connection


@pytest.fixture
async def seed(pg_dsn: str) -> AsyncIterator[Seed]:
    made = Seed(pg_dsn)
    first = await made.session()
    await first.execute(f"CREATE SCHEMA {made.schema}")
    yield made
    for other in made.sessions[1:]:
        await other.close()
    await first.execute(f"DROP SCHEMA {made.schema} CASCADE")
    await first.close()


@pytest.fixture
async def ours(pg_dsn: str) -> AsyncIterator[Connection]:
    """The schema and functions of the service in a database of their own, with the partition of shard 7."""
    maintenance = await asyncpg.connect(pg_dsn)
    name = f"errata_{secrets.token_hex(6)}"
    await maintenance.execute(f"CREATE DATABASE {name}")
    connection = await asyncpg.connect(pg_dsn, database=name)
    schema = load_sql("schema")
    await connection.execute(schema["schema"])
    await connection.execute(schema["partition"].replace("{shard}", "7"))
    await connection.execute(load_sql("functions")["functions"])
    # It believes that it holds shard 8 as well, as after a mistake of an operator: a row finds no partition.
    await connection.execute(
        "INSERT INTO shard_routes (shard, server_name, here) SELECT s, 'pg0', true FROM unnest(ARRAY[7, 8]) s"
    )
    yield connection
    await connection.close()
    await maintenance.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await maintenance.close()


async def post(connection: Connection, user_id: int, key: str, amount: int, **bet: Any) -> asyncpg.Record:
    """Post one entry through the service's own function: a deposit, a withdrawal or (with `bet_id`) a bet."""
    is_bet = "bet_id" in bet
    posting = Posting(
        user_id,
        key,
        EntryType.DEBIT if amount < 0 else EntryType.CREDIT,
        amount,
        Contra.ESCROW if is_bet else Contra.EXTERNAL,
        match_id=MATCH if is_bet else None,
        bet_id=bet.get("bet_id"),
        outcome="HOME" if is_bet else None,
        side="BACK" if is_bet else None,
        odds=200 if is_bet else None,
        stake=-amount if is_bet else None,
    )
    row = await connection.fetchrow(load_sql("queries")["post"], *arguments("test", [posting]))
    assert row is not None
    return row


async def wait_until_blocked(watcher: Connection, pid: int) -> None:
    """Return when the session `pid` waits for a lock."""
    async with asyncio.timeout(LOCK_WAIT_S):
        while True:
            if await watcher.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid):
                return
            await asyncio.sleep(0.005)


# --- partitions and keys ----------------------------------------------------------------------------------


async def test_seed_ledger_is_not_partitioned(seed: Seed) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER)
    with pytest.raises(asyncpg.InvalidObjectDefinitionError, match="is not partitioned"):
        await connection.execute(SEED_PARTITION.format(n=0))


@pytest.mark.parametrize(
    ("dropped", "constraint"), [(" UNIQUE", "PRIMARY KEY"), (" PRIMARY KEY", "UNIQUE")], ids=["primary_key", "unique"]
)
async def test_keys_of_a_partitioned_table_must_contain_its_partition_key(
    seed: Seed, dropped: str, constraint: str
) -> None:
    (connection,) = seed.sessions
    columns = SEED_COLUMNS.replace(dropped, "")
    assert constraint in columns
    with pytest.raises(asyncpg.FeatureNotSupportedError, match="must include all partitioning columns"):
        await connection.execute(f"CREATE TABLE wallet_ledger ({columns}) PARTITION BY HASH (user_id)")


async def test_seed_partition_key_cannot_partition(seed: Seed) -> None:
    (connection,) = seed.sessions
    columns = SEED_COLUMNS.replace(" UNIQUE", "").replace(" PRIMARY KEY", "")
    with pytest.raises(asyncpg.InvalidObjectDefinitionError, match="generated column in partition key"):
        await connection.execute(f"CREATE TABLE wallet_ledger ({columns}) PARTITION BY LIST (partition_key)")


async def test_hash_partitions_are_not_the_shards_of_the_sharding_function(seed: Seed) -> None:
    (connection,) = seed.sessions
    columns = SEED_COLUMNS.replace(" UNIQUE", "").replace(" PRIMARY KEY", "")
    await connection.execute(f"CREATE TABLE wallet_ledger ({columns}) PARTITION BY HASH (user_id)")
    for n in range(100):
        await connection.execute(SEED_PARTITION.format(n=n))
    await connection.execute(
        "INSERT INTO wallet_ledger (user_id, type, amount, idempotent_key)"
        " SELECT u, 'CREDIT', 1, u::text FROM generate_series(1, 1000) u"
    )
    agreeing = await connection.fetchval(
        "SELECT count(*) FROM wallet_ledger WHERE tableoid::regclass::text LIKE '%wallet_ledger_' || user_id % 100"
    )
    assert agreeing < 100, "a row is found in the partition of its own shard only by chance"


async def test_row_of_another_shard_finds_no_partition(ours: Connection) -> None:
    assert (await post(ours, 107, "a", 500))["status"] == "ACCEPTED"
    with pytest.raises(asyncpg.CheckViolationError, match="no partition of relation"):
        await post(ours, 108, "a", 500)


async def test_now_is_not_allowed_in_an_index_predicate(seed: Seed) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER)
    with pytest.raises(asyncpg.InvalidObjectDefinitionError, match="must be marked IMMUTABLE"):
        await connection.execute(SEED_RECENT_INDEX)


async def test_seed_indexes_the_idempotency_key_twice(seed: Seed) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER + ";" + SEED_INDEXES)
    same = await connection.fetchval(
        "SELECT count(*) FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]"
        " WHERE i.indrelid = 'wallet_ledger'::regclass AND i.indnatts = 1 AND a.attname = 'idempotent_key'"
    )
    assert same == 2


async def test_seed_timestamp_depends_on_the_session(seed: Seed) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER)
    async with connection.transaction():
        for zone in ("UTC", "Asia/Ho_Chi_Minh"):
            await connection.execute(f"SET LOCAL TIME ZONE '{zone}'")
            await connection.execute(SEED_INSERT, 1, "CREDIT", 1, zone)
        moments = await connection.fetch("SELECT created_at FROM wallet_ledger ORDER BY id")
    # One moment, as now() is the transaction's, stored as two that lie seven hours apart.
    assert (moments[1]["created_at"] - moments[0]["created_at"]).total_seconds() == 7 * 3600


async def test_shard_of_ten_million_entries_is_not_one_gigabyte(seed: Seed, ours: Connection) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER + ";" + SEED_INDEXES)
    rows = 20_000
    await connection.execute(
        "INSERT INTO wallet_ledger (user_id, type, amount, bet_id, match_id, reference_id, idempotent_key, created_by,"
        " balance_snapshot)"
        " SELECT 7 + 100 * (n % 1000), 'DEBIT', -1000, b, gen_random_uuid(), b::text, 'BET:' || b, 'API', 5000"
        " FROM (SELECT n, gen_random_uuid() AS b FROM generate_series(1, $1::int) n)",
        rows,
    )
    await ours.execute(
        "INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, match_id, bet_id, balance_snapshot,"
        " idempotent_key, created_by, created_at)"
        " SELECT 7, 7 + 100 * (n % 1000), n / 1000 + 1, 'DEBIT', -1000, 'ESCROW', gen_random_uuid(), uuidv7(), 5000,"
        " 'bet-' || gen_random_uuid(), 'api0', now() FROM generate_series(0, $1::int - 1) n",
        rows,
    )
    size = "SELECT pg_total_relation_size($1::regclass) / $2::float * 1e7 / 1e9"
    assert 3.5 < await connection.fetchval(size, "wallet_ledger", rows) < 5, "GB of 10 million rows, indexes included"
    assert 2.5 < await ours.fetchval(size, "wallet_ledger_7", rows) < 4


# --- what keeps the money right ---------------------------------------------------------------------------


async def test_seed_entry_can_be_rewritten_and_ours_cannot(seed: Seed, ours: Connection) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER)
    await connection.execute(SEED_INSERT, 7, "CREDIT", 500, "a")
    assert await connection.execute("UPDATE wallet_ledger SET amount = 999") == "UPDATE 1"
    assert await connection.execute("DELETE FROM wallet_ledger") == "DELETE 1"

    await post(ours, 7, "a", 500)
    for rewrite in (
        "UPDATE wallet_ledger SET amount = 999",
        "UPDATE wallet_ledger_7 SET amount = 999",
        "DELETE FROM wallet_ledger",
        "TRUNCATE wallet_ledger",
        "TRUNCATE wallet_ledger_7",
    ):
        with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="append-only"):
            await ours.execute(rewrite)


async def test_seed_bet_overdraws_and_ours_is_refused(seed: Seed, ours: Connection) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER)
    await connection.execute(SEED_INSERT, 7, "DEBIT", -100, "BET:1")
    assert await connection.fetchval("SELECT sum(amount) FROM wallet_ledger WHERE user_id = 7") == -100

    await post(ours, 7, "deposit", 99)
    refused = await post(ours, 7, "bet", -100, bet_id=MATCH)
    assert (refused["status"], refused["entry_seq"]) == ("INSUFFICIENT_FUNDS", None)
    with pytest.raises(asyncpg.CheckViolationError, match="wallet_ledger_funds"):
        await ours.execute(
            "INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, balance_snapshot, idempotent_key,"
            " created_by, created_at) VALUES (7, 7, 2, 'DEBIT', -100, 'EXTERNAL', -1, 'b', 'test', now())"
        )


async def test_seed_bet_leaves_no_snapshot_and_ours_chains_it(seed: Seed, ours: Connection) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER)
    await connection.execute(SEED_INSERT, 7, "DEBIT", -100, "BET:1")
    assert await connection.fetchval("SELECT balance_snapshot FROM wallet_ledger") is None

    answers = [await post(ours, 7, str(amount), amount) for amount in (500, -100, 100, 50)]
    assert [row["entry_balance"] for row in answers] == [500, 400, 500, 550]
    assert [row["entry_seq"] for row in answers] == [1, 2, 3, 4]


async def test_seed_takes_a_debit_that_adds_money(seed: Seed, ours: Connection) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER)
    await connection.execute(SEED_INSERT, 7, "DEBIT", 100, "a")
    await connection.execute(SEED_INSERT, 7, "GIFT", 100, "b")
    for kind in ("DEBIT", "GIFT"):
        with pytest.raises(asyncpg.CheckViolationError, match="wallet_ledger_sign"):
            await ours.execute(
                "INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, balance_snapshot,"
                " idempotent_key, created_by, created_at)"
                " VALUES (7, 7, 1, $1, 100, 'EXTERNAL', 100, 'c', 'test', now())",
                kind,
            )


async def test_seed_retry_is_a_second_bet_and_ours_a_replay(seed: Seed, ours: Connection) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER)
    for _ in range(2):
        # placeBet makes a new bet id each time it is called, and the key from it.
        bet_id = await connection.fetchval("SELECT gen_random_uuid()")
        await connection.execute(SEED_INSERT, 7, "DEBIT", -100, f"BET:{bet_id}")
    assert await connection.fetchval("SELECT count(*) FROM wallet_ledger") == 2

    await post(ours, 7, "deposit", 500)
    first = await post(ours, 7, "the caller's key", -100, bet_id=UUID(int=1))
    again = await post(ours, 7, "the caller's key", -100, bet_id=UUID(int=2))
    assert (first["status"], again["status"]) == ("ACCEPTED", "REPLAYED")
    assert await ours.fetchval("SELECT count(*) FROM bets") == 1


async def test_seed_lets_a_bet_be_paid_twice_under_another_key(seed: Seed, ours: Connection) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER)
    paid = "INSERT INTO wallet_ledger (user_id, type, amount, bet_id, idempotent_key) VALUES (7, 'PAYOUT', 90, $1, $2)"
    for key in ("first try", "second try"):
        await connection.execute(paid, MATCH, key)

    ours_paid = (
        "INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, match_id, bet_id, settlement_version,"
        " balance_snapshot, idempotent_key, created_by, created_at)"
        " VALUES (7, 7, $1, 'PAYOUT', 90, 'ESCROW', $2, $2, 1, 90, $3, 'test', now())"
    )
    await ours.execute(ours_paid, 1, MATCH, "first try")
    with pytest.raises(asyncpg.UniqueViolationError, match="settlement_version"):
        await ours.execute(ours_paid, 2, MATCH, "second try")


# --- order ------------------------------------------------------------------------------------------------


async def test_seed_dispatcher_reorders_a_late_commit(seed: Seed) -> None:
    (first,) = seed.sessions
    second = await seed.session()
    await first.execute(SEED_EVENTS)
    dispatcher = await seed.session()
    late = first.transaction()
    await late.start()
    await first.execute(SEED_EVENT, "earlier bet")
    await second.execute(SEED_EVENT, "later bet")
    sent = [row["aggregate_id"] for row in await dispatcher.fetch(SEED_POLL)]
    await late.commit()
    newest = await dispatcher.fetchval("SELECT max(created_at) FROM events WHERE aggregate_id = ANY ($1)", sent)
    cursor = await dispatcher.fetch("SELECT aggregate_id FROM events WHERE created_at > $1", newest)
    sent += [row["aggregate_id"] for row in await dispatcher.fetch(SEED_POLL) if row["aggregate_id"] not in sent]
    assert sent == ["later bet", "earlier bet"], "by flag: the earlier event is sent after the later one"
    assert cursor == [], "by created_at: the earlier event is never sent"


async def test_seed_events_of_one_transaction_have_no_order(seed: Seed) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_EVENTS)
    async with connection.transaction():
        for name in ("a", "b"):
            await connection.execute(SEED_EVENT, name)
    assert await connection.fetchval("SELECT count(DISTINCT created_at) FROM events") == 1


async def test_last_ledger_id_passes_over_a_late_commit(seed: Seed) -> None:
    (first,) = seed.sessions
    await first.execute(SEED_LEDGER)
    second, builder = await seed.session(), await seed.session()
    late = first.transaction()
    await late.start()
    await first.execute(SEED_INSERT, 7, "CREDIT", 100, "slow")
    await second.execute(SEED_INSERT, 7, "CREDIT", 5, "quick")
    newer = "SELECT id, amount FROM wallet_ledger WHERE user_id = 7 AND id > $1 ORDER BY id"
    seen = await builder.fetch(newer, 0)
    await late.commit()
    seen += await builder.fetch(newer, seen[-1]["id"])
    assert sum(row["amount"] for row in seen) == 5
    assert await builder.fetchval("SELECT sum(amount) FROM wallet_ledger WHERE user_id = 7") == 105


async def test_our_second_writer_of_a_wallet_waits_and_numbers_after_the_first(pg_dsn: str, ours: Connection) -> None:
    other = await asyncpg.connect(pg_dsn, database=await ours.fetchval("SELECT current_database()"))
    watcher = await asyncpg.connect(pg_dsn)
    try:
        slow = ours.transaction()
        await slow.start()
        await post(ours, 7, "slow", 100)
        quick = asyncio.create_task(post(other, 7, "quick", -100))
        await wait_until_blocked(watcher, other.get_server_pid())
        await slow.commit()
        # The second writer saw the first one's money although its own statement began before that commit.
        assert (await quick)["entry_balance"] == 0
        rows = await ours.fetch("SELECT payload ->> 'seq' AS seq FROM events ORDER BY id")
        assert [row["seq"] for row in rows] == ["1", "2"]
    finally:
        await other.close()
        await watcher.close()


async def test_lock_and_read_in_one_statement_reads_the_past(pg_dsn: str, ours: Connection) -> None:
    other = await asyncpg.connect(pg_dsn, database=await ours.fetchval("SELECT current_database()"))
    watcher = await asyncpg.connect(pg_dsn)
    one_statement = (
        "WITH locked AS MATERIALIZED (SELECT pg_advisory_xact_lock(7))"
        " SELECT (SELECT sum(amount) FROM wallet_ledger WHERE user_id = 7) FROM locked"
    )
    try:
        slow = ours.transaction()
        await slow.start()
        await post(ours, 7, "slow", 100)
        reading = asyncio.create_task(other.fetchval(one_statement))
        await wait_until_blocked(watcher, other.get_server_pid())
        await slow.commit()
        assert await reading is None, "the statement's snapshot is older than the lock it was granted"
        assert await other.fetchval(one_statement) == 100
    finally:
        await other.close()
        await watcher.close()


async def test_event_goes_to_the_partition_of_its_user(ours: Connection) -> None:
    await post(ours, 7, "deposit", 500)
    await post(ours, 7, "bet", -100, bet_id=MATCH)
    event = await ours.fetchrow("SELECT aggregate_id, partition_key FROM events WHERE event_type = 'BetCreated'")
    assert event is not None
    # The seed uses the aggregate, which is the bet, as Kafka's key; every bet would have an order of its own.
    assert (event["aggregate_id"], event["partition_key"]) == (str(MATCH), "7")


async def test_every_entry_has_an_event_with_seq_and_balance(ours: Connection) -> None:
    await post(ours, 7, "deposit", 500)
    await post(ours, 7, "bet", -100, bet_id=MATCH)
    await post(ours, 7, "withdrawal", -50)
    rows = await ours.fetch(
        "SELECT (payload ->> 'seq')::int AS seq, (payload ->> 'balance')::int AS balance FROM events ORDER BY id"
    )
    assert [tuple(row) for row in rows] == [(1, 500), (2, 400), (3, 350)]


# --- reconciliation ---------------------------------------------------------------------------------------

SEED_LEDGER_SUM = "SELECT SUM(amount) FROM wallet_ledger WHERE created_at >= now() - INTERVAL '1 day'"
SEED_PROJECTION_SUM = "SELECT SUM(balance) FROM wallet_balance_projection"


async def test_seed_reconciliation_alarms_on_a_correct_ledger(seed: Seed) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER + ";" + SEED_PROJECTION)
    await connection.execute(
        "INSERT INTO wallet_ledger (user_id, type, amount, idempotent_key, created_at)"
        " VALUES (7, 'CREDIT', 500, 'a', now() - INTERVAL '2 days'), (7, 'DEBIT', -100, 'b', now())"
    )
    await connection.execute("INSERT INTO wallet_balance_projection VALUES (7, 400, 2)")
    assert await connection.fetchval(SEED_LEDGER_SUM) == -100
    assert await connection.fetchval(SEED_PROJECTION_SUM) == 400


async def test_seed_reconciliation_is_silent_when_errors_cancel_out(seed: Seed) -> None:
    (connection,) = seed.sessions
    await connection.execute(SEED_LEDGER + ";" + SEED_PROJECTION)
    await connection.execute(SEED_INSERT, 7, "CREDIT", 500, "a")
    await connection.execute(SEED_INSERT, 107, "CREDIT", 500, "b")
    await connection.execute("INSERT INTO wallet_balance_projection VALUES (7, 900, 1), (107, 100, 2)")
    assert await connection.fetchval(SEED_LEDGER_SUM) == await connection.fetchval(SEED_PROJECTION_SUM)


# --- capacity ---------------------------------------------------------------------------------------------


async def test_seed_pools_need_more_connections_than_a_server_has(seed: Seed) -> None:
    (connection,) = seed.sessions
    allowed = await connection.fetchval("SELECT boot_val::int FROM pg_settings WHERE name = 'max_connections'")
    pods, pool_size = 50, 20
    assert pods * pool_size >= 10 * allowed
