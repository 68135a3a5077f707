"""The ledger of a real server defends itself: funds, keys, chain, immutability, shards, privileges."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import asyncpg
import msgspec
import pytest

from reference.commands import Contra, EntryType
from reference.config import ServiceConfig
from reference.store import Store
from reference.uuid7 import uuid7
from reference.writer import Posting, difference, post_entries

SERVER = 0


@pytest.fixture
async def store(service_config: ServiceConfig) -> AsyncIterator[Store]:
    opened = Store(service_config, "ledger_api")
    yield opened
    await opened.close()


@pytest.fixture
async def api_role(store: Store) -> AsyncIterator[asyncpg.Connection]:
    connection = await store.connect(SERVER)
    yield connection
    await connection.close()


@pytest.fixture
async def owner(superuser_dsn: list[str]) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(superuser_dsn[SERVER])
    yield connection
    await connection.close()


@pytest.fixture
def user_id() -> int:
    """A fresh wallet of logical shard 0, which server 0 holds."""
    return (uuid.uuid4().int % 10**12 + 1) * 100


def _deposit(user_id: int, amount: int, key: str) -> Posting:
    return Posting(user_id, key, EntryType.CREDIT, amount, Contra.EXTERNAL)


def _withdraw(user_id: int, amount: int, key: str) -> Posting:
    return Posting(user_id, key, EntryType.DEBIT, -amount, Contra.EXTERNAL)


async def _post(connection: asyncpg.Connection, store: Store, *postings: Posting) -> list[tuple[str, int, int]]:
    rows = await post_entries(connection, store.sql["post"], "API", postings)
    return [(row["status"], row["entry_seq"], row["entry_balance"]) for row in rows]


async def test_replayed_deposit_moves_nothing(api_role, store, user_id) -> None:
    assert await _post(api_role, store, _deposit(user_id, 500, "d")) == [("ACCEPTED", 1, 500)]
    assert await _post(api_role, store, _deposit(user_id, 500, "d")) == [("REPLAYED", None, None)]
    row = await store.fetchrow(SERVER, "head", 0, user_id)
    assert (row["balance"], row["seq"]) == (500, 1)


async def test_a_wallet_never_goes_below_zero_and_the_refusal_is_final(api_role, store, user_id) -> None:
    assert await _post(
        api_role,
        store,
        _deposit(user_id, 100, "d"),
        _withdraw(user_id, 60, "w1"),
        _withdraw(user_id, 60, "w2"),
        _withdraw(user_id, 40, "w3"),
    ) == [("ACCEPTED", 1, 100), ("ACCEPTED", 2, 40), ("INSUFFICIENT_FUNDS", None, None), ("ACCEPTED", 3, 0)]
    await _post(api_role, store, _deposit(user_id, 1000, "d2"))
    assert await _post(api_role, store, _withdraw(user_id, 60, "w2")) == [("REPLAYED", None, None)]


async def test_a_repeated_key_among_new_ones_moves_nothing_and_leaves_no_gap(api_role, store, user_id) -> None:
    await _post(api_role, store, _deposit(user_id, 100, "d"), _withdraw(user_id, 70, "w1"))
    assert await _post(
        api_role,
        store,
        _deposit(user_id, 10, "d2"),
        _withdraw(user_id, 70, "w1"),
        _withdraw(user_id, 20, "w2"),
        _withdraw(user_id, 90, "w3"),
    ) == [("ACCEPTED", 3, 40), ("REPLAYED", None, None), ("ACCEPTED", 4, 20), ("INSUFFICIENT_FUNDS", None, None)]


async def test_a_repeated_key_is_no_refusal_however_little_is_left(api_role, store, user_id) -> None:
    """Nothing but a look-up tells a repeated withdrawal from a new one that the wallet cannot pay."""
    await _post(api_role, store, _deposit(user_id, 100, "d"), _withdraw(user_id, 100, "w1"))
    assert await _post(api_role, store, _withdraw(user_id, 100, "w1")) == [("REPLAYED", None, None)]
    refusals = await store.fetch(SERVER, "answers", [user_id], ["w1"])
    assert [row["outcome"] for row in refusals] == ["ACCEPTED"]


async def test_a_key_refused_before_stays_refused_when_the_funds_are_there(api_role, store, user_id) -> None:
    await _post(api_role, store, _withdraw(user_id, 100, "w1"))
    await _post(api_role, store, _deposit(user_id, 100, "d"))
    assert await _post(api_role, store, _withdraw(user_id, 100, "w1"), _withdraw(user_id, 100, "w2")) == [
        ("REPLAYED", None, None),
        ("ACCEPTED", 2, 0),
    ]


async def test_a_hundred_racing_withdrawals_take_only_what_is_there(store, user_id) -> None:
    async with store.connection(SERVER) as connection:
        await _post(connection, store, _deposit(user_id, 1000, "d"))

    async def withdraw(number: int) -> str:
        async with store.connection(SERVER) as connection:
            ((status, _, _),) = await _post(connection, store, _withdraw(user_id, 30, f"w{number}"))
            return status

    statuses = await asyncio.gather(*(withdraw(number) for number in range(100)))
    assert statuses.count("ACCEPTED") == 33
    row = await store.fetchrow(SERVER, "head", 0, user_id)
    assert (row["balance"], row["seq"]) == (10, 34)


async def test_one_key_raced_on_many_connections_has_one_effect(store, user_id) -> None:
    async def deposit() -> str:
        async with store.connection(SERVER) as connection:
            ((status, _, _),) = await _post(connection, store, _deposit(user_id, 5, "same"))
            return status

    statuses = await asyncio.gather(*(deposit() for _ in range(20)))
    assert sorted(statuses) == ["ACCEPTED"] + ["REPLAYED"] * 19


async def test_batches_over_the_same_wallets_in_opposite_order_do_not_deadlock(store) -> None:
    users = [(uuid.uuid4().int % 10**12 + 1) * 100 for _ in range(40)]

    async def batch(number: int) -> None:
        order = users if number % 2 else users[::-1]
        async with store.connection(SERVER) as connection:
            await _post(connection, store, *(_deposit(user, 1, f"b{number}") for user in order))

    await asyncio.gather(*(batch(number) for number in range(30)))
    for user in users:
        row = await store.fetchrow(SERVER, "head", 0, user)
        assert (row["balance"], row["seq"]) == (30, 30)


async def test_the_unique_key_refuses_what_slipped_past_the_check(api_role, store, user_id) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await _post(api_role, store, _deposit(user_id, 5, "twice"), _deposit(user_id, 5, "twice"))
    assert await store.fetchrow(SERVER, "head", 0, user_id) is None


async def test_a_row_of_another_servers_shard_cannot_be_written(owner, api_role, store, service_config) -> None:
    foreign = service_config.routing.index(1) + 100
    mine = (uuid.uuid4().int % 10**12 + 1) * 100
    assert await _post(api_role, store, _withdraw(foreign, 5, "stray"), _deposit(mine, 5, uuid.uuid4().hex)) == [
        ("NOT_HERE", None, None),
        ("ACCEPTED", 1, 5),
    ]
    assert await owner.fetchval("SELECT count(*) FROM refusals WHERE user_id = $1", foreign) == 0
    with pytest.raises(asyncpg.CheckViolationError, match="no partition"):
        await owner.execute(
            """INSERT INTO wallet_ledger VALUES
               ($1::bigint % 100, $1, 1, 'CREDIT', 5, 'EXTERNAL', NULL, NULL, NULL, 5, 'k', NULL, 'API', now())""",
            foreign,
        )


async def test_a_row_under_a_wrong_shard_cannot_be_written(owner, user_id) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="wallet_ledger_shard"):
        await owner.execute(
            """INSERT INTO wallet_ledger VALUES
               (1, $1, 1, 'CREDIT', 5, 'EXTERNAL', NULL, NULL, NULL, 5, 'k', NULL, 'API', now())""",
            user_id,
        )


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE wallet_ledger SET amount = amount + 1 WHERE shard = 0 AND user_id = $1",
        "DELETE FROM wallet_ledger WHERE shard = 0 AND user_id = $1",
    ],
)
async def test_not_even_the_owner_rewrites_an_entry(owner, api_role, store, user_id, statement) -> None:
    await _post(api_role, store, _deposit(user_id, 5, "d"))
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="append-only"):
        await owner.execute(statement, user_id)


@pytest.mark.parametrize("table", ["wallet_ledger", "wallet_ledger_0"])
async def test_the_ledger_cannot_be_truncated(owner, table) -> None:
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="append-only"):
        await owner.execute(f"TRUNCATE {table}")


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        ("ledger_api", "UPDATE wallet_ledger SET amount = 1"),
        ("ledger_api", "INSERT INTO wallet_ledger SELECT * FROM wallet_ledger"),
        ("ledger_api", "DELETE FROM events"),
        ("ledger_relay", "UPDATE events SET payload = '{}'"),
        ("ledger_projector", "INSERT INTO wallet_ledger SELECT * FROM wallet_ledger"),
        ("ledger_matcher", "SELECT * FROM wallet_ledger"),
        ("ledger_auditor", "INSERT INTO wallet_balance_projection VALUES (0, 100, 1, 1, now())"),
    ],
)
async def test_a_role_can_do_only_its_own_work(service_config, role, statement) -> None:
    connection = await Store(service_config, role).connect(SERVER)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    finally:
        await connection.close()


async def test_a_payout_under_a_new_key_is_refused_by_the_business_key(owner, user_id) -> None:
    bet, match = uuid7(), uuid7()
    insert = """INSERT INTO wallet_ledger VALUES
        (0, $1, $2, 'PAYOUT', 5, 'ESCROW', $3, $4, 1, $5, $6, NULL, 'Settler', now())"""
    await owner.execute(insert, user_id, 1, match, bet, 5, "first")
    with pytest.raises(asyncpg.UniqueViolationError, match="bet_id"):
        await owner.execute(insert, user_id, 2, match, bet, 10, "second")


async def test_an_entry_its_bet_and_its_event_are_written_together(owner, api_role, store, user_id) -> None:
    match, bet = uuid7(), uuid7()
    stake = Posting(
        user_id,
        "b",
        EntryType.DEBIT,
        -30,
        Contra.ESCROW,
        match_id=match,
        bet_id=bet,
        outcome="HOME",
        side="BACK",
        odds=250,
        stake=30,
    )
    await _post(api_role, store, _deposit(user_id, 100, "d"), stake)
    row = await owner.fetchrow("SELECT * FROM bets WHERE shard = 0 AND user_id = $1 AND bet_id = $2", user_id, bet)
    assert (row["seq"], row["reserve"], row["match_id"]) == (2, 30, match)
    events = await owner.fetch(
        "SELECT event_type, payload->>'balance' AS balance FROM events WHERE partition_key = $1 ORDER BY id",
        str(user_id),
    )
    assert [tuple(event) for event in events] == [("EntryPosted", "100"), ("BetCreated", "70")]


@pytest.mark.parametrize("text", ['say "hi"', "back\\slash", "{a,b}", "NULL", "null", "'", "  ", "ärger ☂", "\\"])
async def test_texts_reach_the_ledger_as_they_were(owner, api_role, store, user_id, text) -> None:
    """Columns of text travel as literals: whatever is in them must come out as it went in."""
    match = uuid7()
    bets = [
        Posting(
            user_id,
            f"{text} {number}",
            EntryType.DEBIT,
            -30,
            Contra.ESCROW,
            match_id=match,
            bet_id=uuid7(),
            outcome=text,
            side="BACK",
            odds=250,
            stake=30,
        )
        for number in range(2)
    ]
    statuses = [status for status, _, _ in await _post(api_role, store, _deposit(user_id, 30, "d"), *bets)]
    assert statuses == ["ACCEPTED", "ACCEPTED", "INSUFFICIENT_FUNDS"]
    placed = await owner.fetchrow("SELECT outcome FROM bets WHERE shard = 0 AND user_id = $1", user_id)
    assert placed["outcome"] == text
    for bet in bets:
        (answer,) = await api_role.fetch(store.sql["answers"], [user_id], [bet.key])
        assert difference(bet.command, answer["command"]) is None
        other = msgspec.structs.replace(bet, outcome=text + "x")
        assert difference(other.command, answer["command"]) == "outcome"


@pytest.mark.parametrize("posting", [_deposit(0, 5, "k"), _withdraw(0, 5, "k")])
async def test_a_refused_transfer_is_kept_in_the_words_of_an_accepted_one(api_role, store, user_id, posting) -> None:
    refused = msgspec.structs.replace(posting, user_id=user_id, refusal="LIMIT_EXCEEDED")
    assert [status for status, _, _ in await _post(api_role, store, refused)] == ["LIMIT_EXCEEDED"]
    (answer,) = await api_role.fetch(store.sql["answers"], [user_id], ["k"])
    assert difference(refused.command, answer["command"]) is None
    assert difference(msgspec.structs.replace(refused, amount=7).command, answer["command"]) == "amount_minor"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"shard": 1}, "no partition"),
        ({"user_id": -100}, "wallet_ledger_user"),
        ({"user_id": 101}, "wallet_ledger_shard"),
        ({"seq": 0}, "wallet_ledger_seq"),
        ({"type": "DEBIT"}, "wallet_ledger_sign"),
        ({"type": "GIFT"}, "wallet_ledger_sign"),
        ({"amount": 0}, "wallet_ledger_sign"),
        ({"amount": -5}, "wallet_ledger_sign"),
        ({"contra": "ESCROW"}, "wallet_ledger_contra"),
        ({"contra": "BANK"}, "wallet_ledger_contra"),
        ({"match_id": uuid7()}, "wallet_ledger_contra"),
        ({"contra": "HOUSE"}, "wallet_ledger_contra"),
        ({"balance": -1}, "wallet_ledger_funds"),
        ({"key": ""}, "wallet_ledger_key_length"),
        ({"key": "k" * 256}, "wallet_ledger_key_length"),
        ({}, None),
    ],
)
async def test_each_rule_of_an_entrys_form_is_kept_by_the_table_itself(owner, user_id, change, rule) -> None:
    row = {"shard": 0, "user_id": user_id, "seq": 1, "type": "CREDIT", "amount": 5, "contra": "EXTERNAL"}
    row |= {"match_id": None, "balance": 5, "key": "k"} | change
    insert = """INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, match_id, balance_snapshot,
        idempotent_key, created_by, created_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'API', now())"""
    if rule is None:
        await owner.execute(insert, *row.values())
        return
    # Where server 0 holds shard 1 too, the entry finds a partition and the rule of the shard stops it.
    match = "no partition|wallet_ledger_shard" if rule == "no partition" else rule
    with pytest.raises(asyncpg.CheckViolationError, match=match):
        await owner.execute(insert, *row.values())
