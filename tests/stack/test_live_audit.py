"""The live auditor beside a working stack: planted drift is found within a few looks, and a clean stack is silent.

Looks are counted and not timed: the default is one a second, so that ten seconds are ten of them.
"""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
import pytest
from confluent_kafka import Producer
from reconciled_stack import World, filled, fresh_wallet, play, reconciled_stack, until
from redis import Redis

from compose.stack import Stack
from invariants.verdict import Verdict
from ledgerproof.collect import drain
from ledgerproof.live.auditor import Auditor
from ledgerproof.live.server import ROUND_POLLS, Server
from reference.cache import KEY_PREFIX
from reference.commands import Contra, EntryType
from reference.config import ServiceConfig
from reference.shards import move_shard
from reference.store import Store
from reference.writer import Posting, post_entries

FOUND_WITHIN_LOOKS = ROUND_POLLS + 3
PAUSE_S = 0.3
"""Between two looks of these tests; long enough for relay and projector to go on."""


@pytest.fixture(scope="module")
def own_stack() -> Iterator[Stack]:
    """Drift is planted here, so that no other test may share it."""
    with reconciled_stack() as started:
        yield started


@pytest.fixture(scope="module")
def world(own_stack: Stack) -> World:
    return asyncio.run(filled(own_stack))


@contextlib.asynccontextmanager
async def auditing(world: World) -> AsyncIterator[Auditor]:
    """An audit that has taken the ledger over and looked once through everything, and found nothing."""
    audit = Auditor(world.config)
    try:
        for _ in range(ROUND_POLLS + 1):
            await look(audit)
        assert audit.findings.counts == {}, audit.findings.witnesses
        yield audit
    finally:
        audit.close()


async def look(audit: Auditor) -> None:
    await audit.poll()
    await asyncio.sleep(PAUSE_S)


async def found_by(audit: Auditor, code: str, looks: int = FOUND_WITHIN_LOOKS) -> list[Any]:
    """Look until the code was found; its witnesses."""
    for number in range(1, looks + 1):
        await look(audit)
        if code in audit.findings.counts:
            print(f"{code} found in look {number}")
            return [witness for witness in audit.findings.witnesses if witness.code == code]
    raise AssertionError(
        f"{code} was not found in {looks} looks, only {audit.findings.counts}; {audit.findings.unseen}"
    )


@contextlib.asynccontextmanager
async def traffic(config: ServiceConfig, users: list[int]) -> AsyncIterator[list[int]]:
    """Deposits of these wallets, one after the other, while the block runs; how many there were."""
    store, stopping, posted = Store(config, "ledger_api"), asyncio.Event(), [0]

    async def post() -> None:
        while not stopping.is_set():
            user = users[posted[0] % len(users)]
            server = store.server_of(user)
            async with store.connection(server) as connection:
                await post_entries(connection, store.sql["post"], "API", [deposit(user, f"traffic {uuid4()}")])
            posted[0] += 1

    task = asyncio.create_task(post())
    try:
        yield posted
    finally:
        stopping.set()
        await task
        await store.close()


def deposit(user: int, key: str, amount: int = 700) -> Posting:
    return Posting(user, key, EntryType.CREDIT, amount, Contra.EXTERNAL)


async def wallet_of(world: World, server: int, entries: int = 3) -> int:
    """A new wallet on a server with some entries that went through the whole service."""
    user = fresh_wallet(world.config, server)
    store = world.role("ledger_api")
    async with store.connection(server) as connection:
        for number in range(entries):
            await post_entries(connection, store.sql["post"], "API", [deposit(user, f"deposit {number}")])
    await store.close()
    await drain(world.config, 60.0, lambda _: None)
    return user


@contextlib.asynccontextmanager
async def repaired(connection: asyncpg.Connection, *statements: tuple[Any, ...]) -> AsyncIterator[None]:
    """Undo what the block planted: the next test's audit has to find nothing."""
    try:
        yield
    finally:
        for statement, *args in statements:
            await connection.execute(statement, *args)
        await connection.close()


async def test_a_clean_stack_under_traffic_is_silent_and_all_of_it_was_read(world: World) -> None:
    async with auditing(world) as audit, traffic(world.config, world.users) as posted:
        dsn = [world.dsn(index) for index in range(len(world.config.servers))]
        before = audit.ledger.entries
        playing = asyncio.create_task(play(world.config, dsn, world.users, 60, 5))
        while not playing.done():
            await look(audit)
        for _ in range(2 * ROUND_POLLS):
            await look(audit)
        assert audit.findings.counts == {}, audit.findings.witnesses
        assert audit.ledger.entries - before > 60
        assert audit.flow.records > 60
        assert audit.told > 0
        assert audit.verified > 0
    await drain(world.config, 60.0, lambda _: None)
    assert posted[0] > 10
    assert audit.findings.verdict is Verdict.PASS


async def test_everything_that_was_posted_beside_it_was_replayed(world: World) -> None:
    """Late commits included: transactions begun before a look and committed after it."""
    user = fresh_wallet(world.config, 0)
    store = world.role("ledger_api")
    async with auditing(world) as audit:
        async with store.connection(0) as late, store.connection(0) as other:
            holding = late.transaction()
            await holding.start()
            await post_entries(late, store.sql["post"], "API", [deposit(user, "late")])
            quick = fresh_wallet(world.config, 0)
            await post_entries(other, store.sql["post"], "API", [deposit(quick, "quick")])
            for _ in range(3):
                await look(audit)
            assert user not in audit.ledger.wallets
            assert audit.ledger.wallets[quick].seq == 1
            await holding.commit()
        await look(audit)
        assert audit.ledger.wallets[user].seq == 1
        for _ in range(FOUND_WITHIN_LOOKS):
            await look(audit)
        # Its event had a lower id than one that was read before: had it been skipped, it would be reported as lost.
        assert (user, 1) not in audit.flow.entries
        assert audit.findings.counts == {}, audit.findings.witnesses
    await store.close()
    await drain(world.config, 60.0, lambda _: None)


@pytest.mark.parametrize("server", [0, 1])
async def test_one_cent_in_the_projection_is_found(world: World, server: int) -> None:
    user = await wallet_of(world, server)
    owner = await world.owner_of(server)
    change = "UPDATE wallet_balance_projection SET balance = balance + $3 WHERE shard = $1 AND user_id = $2"
    async with (
        repaired(owner, (change, user % 100, user, -1)),
        auditing(world) as audit,
        traffic(world.config, world.users),
    ):
        await owner.execute(change, user % 100, user, 1)
        (witness,) = await found_by(audit, "A11")
        assert (witness.user, witness.seq) == (user, 3)
        assert witness.text == f"projection says user {user} has 2101 at seq 3; the ledger says 2100"
        assert audit.findings.verdict is Verdict.INVARIANT_VIOLATED
    await drain(world.config, 60.0, lambda _: None)


async def test_one_cent_in_redis_is_found(world: World) -> None:
    user = await wallet_of(world, 1)
    config = world.config
    redis = Redis(host=config.redis_host, port=config.redis_port, password=config.redis_password, decode_responses=True)
    key = f"{KEY_PREFIX}{user}"
    async with auditing(world) as audit:
        seq, balance, *rest = str(redis.get(key)).split(" ")
        redis.set(key, " ".join([seq, str(int(balance) + 1), *rest]))
        try:
            (witness,) = await found_by(audit, "A11")
        finally:
            redis.delete(key)
            redis.close()
        assert witness.text == f"redis says user {user} has 2101 at seq 3; the ledger says 2100"


async def test_one_cent_in_an_old_entry_is_found_as_a_rewrite_with_its_row(world: World) -> None:
    user = await wallet_of(world, 0)
    owner = await world.owner_of(0)
    change = "UPDATE wallet_ledger SET amount = amount + $3 WHERE shard = $1 AND user_id = $2 AND seq = 2"
    async with repaired(owner, (change, user % 100, user, -1)), auditing(world) as audit:
        session = await world.owner_of(0)
        await session.execute(change, user % 100, user, 1)
        await session.close()
        (witness,) = await found_by(audit, "A33")
        assert witness.user == user
        assert witness.seq == 2
        assert "written again: seq 2: CREDIT 701, balance 1400" in witness.text
        # What the rewrite breaks is named as well.
        assert [(w.code, w.user, w.seq) for w in audit.findings.witnesses if w.code == "A09"] == [("A09", user, 2)]


async def test_a_removed_entry_is_found(world: World) -> None:
    user = await wallet_of(world, 1)
    owner = await world.owner_of(1)
    row = "SELECT * FROM wallet_ledger WHERE shard = $1 AND user_id = $2 AND seq = 3"
    kept = await owner.fetchrow(row, user % 100, user)
    marks = ", ".join(f"${number}" for number in range(1, len(kept) + 1))
    async with repaired(owner, (f"INSERT INTO wallet_ledger VALUES ({marks})", *kept)), auditing(world) as audit:
        session = await world.owner_of(1)
        await session.execute(
            "DELETE FROM wallet_ledger WHERE shard = $1 AND user_id = $2 AND seq = 3", user % 100, user
        )
        await session.close()
        (witness,) = await found_by(audit, "A33")
        assert (witness.user, "3 entries were read and 2 are there now" in witness.text) == (user, True)


async def test_an_entry_that_no_event_tells_of_is_found(world: World) -> None:
    user = await wallet_of(world, 0)
    owner = await world.owner_of(0)
    plant = """INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, balance_snapshot, idempotent_key,
                                          created_by, created_at)
               VALUES ($1, $2, 4, 'CREDIT', 1, 'EXTERNAL', 2101, 'planted', 'test', now())"""
    remove = "DELETE FROM wallet_ledger WHERE shard = $1 AND user_id = $2 AND seq = 4"
    async with repaired(owner, (remove, user % 100, user)), auditing(world) as audit:
        await owner.execute(plant, user % 100, user)
        (witness,) = await found_by(audit, "A21")
        assert (witness.user, witness.seq, witness.key) == (user, 4, "planted")


async def test_one_cent_in_an_old_outbox_row_is_found(world: World) -> None:
    """It was written and published before the audit began."""
    user = await wallet_of(world, 0)
    owner = await world.owner_of(0)
    change = """UPDATE events
                   SET payload = jsonb_set(payload, '{amount}', to_jsonb((payload ->> 'amount')::bigint + $2))
                 WHERE partition_key = $1 AND payload ->> 'seq' = '2'"""
    async with repaired(owner, (change, str(user), -1)), auditing(world) as audit:
        await owner.execute(change, str(user), 1)
        (witness,) = await found_by(audit, "A25")
        assert (witness.user, witness.seq) == (user, 2)
        assert "amount is 701 and the row says 700" in witness.text


async def test_one_cent_in_an_outbox_row_that_the_audit_has_read_is_found(world: World) -> None:
    owner = await world.owner_of(1)
    change = """UPDATE events
                   SET payload = jsonb_set(payload, '{balance}', to_jsonb((payload ->> 'balance')::bigint + $2))
                 WHERE partition_key = $1 AND payload ->> 'seq' = '2'"""
    async with auditing(world) as audit:
        user = await wallet_of(world, 1)
        await look(audit)
        async with repaired(owner, (change, str(user), -1)):
            await owner.execute(change, str(user), 1)
            (witness,) = await found_by(audit, "A25")
            assert (witness.user, witness.seq) == (user, 2)


async def test_an_event_of_no_entry_is_found(world: World) -> None:
    user = await wallet_of(world, 0)
    owner = await world.owner_of(0)
    plant = """INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload, published_to_kafka,
                                   published_at)
               SELECT aggregate_type, aggregate_id, event_type, partition_key, jsonb_set(payload, '{seq}', '9'), true,
                      now()
                 FROM events WHERE partition_key = $1 AND payload ->> 'seq' = '3'"""
    remove = "DELETE FROM events WHERE partition_key = $1 AND payload ->> 'seq' = '9'"
    async with repaired(owner, (remove, str(user))), auditing(world) as audit:
        await owner.execute(plant, str(user))
        (witness,) = await found_by(audit, "A24")
        assert (witness.user, witness.seq) == (user, 9)


async def test_an_event_marked_as_published_that_kafka_lacks_is_found(world: World) -> None:
    user = await wallet_of(world, 0)
    owner = await world.owner_of(0)
    entry = """INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, balance_snapshot, idempotent_key,
                                          created_by, created_at)
               VALUES ($1, $2, 4, 'CREDIT', 1, 'EXTERNAL', 2101, 'planted', 'test', now())"""
    event = """INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload, published_to_kafka,
                                   published_at)
               SELECT aggregate_type, aggregate_id, event_type, partition_key,
                      payload || '{"seq": 4, "amount": 1, "balance": 2101}', true, now()
                 FROM events WHERE partition_key = $1 AND payload ->> 'seq' = '3'"""
    repairs = (
        ("DELETE FROM wallet_ledger WHERE shard = $1 AND user_id = $2 AND seq = 4", user % 100, user),
        ("DELETE FROM events WHERE partition_key = $1 AND payload ->> 'seq' = '4'", str(user)),
    )
    async with repaired(owner, *repairs), auditing(world) as audit:
        async with owner.transaction():
            await owner.execute(entry, user % 100, user)
            await owner.execute(event, str(user))
        # It may be on its way for a while, so that it takes longer than what one look decides.
        (witness,) = await found_by(audit, "A21", looks=30)
        assert (witness.user, witness.seq) == (user, 4)
        assert "not in Kafka" in witness.text


async def test_an_event_sent_before_the_audit_and_marked_after_its_first_look_is_innocent(
    world: World, own_stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ledgerproof.live.suspects.OVERDUE_S", 0.0)
    user = await wallet_of(world, 0)
    owner = await world.owner_of(0)
    mark = """UPDATE events SET published_to_kafka = $2, published_at = CASE WHEN $2 THEN now() END
               WHERE partition_key = $1"""
    own_stack.pause("relay0")  # It has sent these events and not yet said so.
    audit = Auditor(world.config)
    try:
        async with repaired(owner, (mark, str(user), True)):
            await owner.execute(mark, str(user), False)
            await look(audit)
            await look(audit)
            assert len(audit.flow.unsent) == 3
            await owner.execute(mark, str(user), True)
            await look(audit)
            await look(audit)
            assert audit.flow.unsent == {}
            assert audit.findings.counts == {}, audit.findings.witnesses
    finally:
        audit.close()
        own_stack.resume("relay0")


async def test_a_record_of_no_event_is_found(world: World) -> None:
    user = await wallet_of(world, 1)
    producer = Producer({"bootstrap.servers": world.config.kafka_bootstrap})
    event_id = str(uuid4())
    payload = {"user_id": user, "seq": 1, "type": "CREDIT", "amount": 700, "balance": 700, "contra": "EXTERNAL"}
    async with auditing(world) as audit:
        producer.produce(
            "wallet.posted",
            key=str(user),
            value=msgspec.json.encode(payload),
            headers=[("event-id", event_id.encode()), ("event-type", b"EntryPosted")],
        )
        assert producer.flush(10) == 0
        (witness,) = await found_by(audit, "A24")
        assert witness.user == user
        assert event_id in witness.text


async def test_a_stake_without_its_bet_and_a_leak_from_a_settled_match_are_found(world: World) -> None:
    user, match_id = await wallet_of(world, 0), world.settled[0]
    owner = await world.owner_of(0)
    bet_id = uuid4()
    entry = """INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, match_id, bet_id, balance_snapshot,
                                          idempotent_key, created_by, created_at)
               VALUES ($1, $2, 4, 'DEBIT', -5, 'ESCROW', $3, $4, 2095, 'planted', 'test', now())"""
    remove = "DELETE FROM wallet_ledger WHERE shard = $1 AND user_id = $2 AND seq = 4"
    async with repaired(owner, (remove, user % 100, user)), auditing(world) as audit:
        await owner.execute(entry, user % 100, user, match_id, bet_id)
        (torn,) = await found_by(audit, "A13")
        assert (torn.user, torn.seq) == (user, 4)
        assert str(bet_id) in torn.text
        (leak,) = await found_by(audit, "A30", looks=20)
        assert leak.text == f"match {match_id} is final and its escrow still holds 5"


async def test_a_moved_shard_and_a_killed_server_are_survived_and_said(world: World, own_stack: Stack) -> None:
    user = await wallet_of(world, 0)
    async with auditing(world) as audit, traffic(world.config, [user]):
        moved = asyncio.create_task(move_shard(world.config, own_stack.superuser, user % 100, 1))
        while not moved.done():
            await look(audit)
        assert moved.result().moved
        await until_looked(audit, lambda: bool(audit.findings.notes))
        assert f"shard {user % 100} moved from pg0 to pg1" in audit.findings.notes
        for _ in range(FOUND_WITHIN_LOOKS):
            await look(audit)
        assert audit.findings.counts == {}, audit.findings.witnesses
    async with auditing(world) as audit:
        await asyncio.to_thread(own_stack.kill, "pg1")
        await until_looked(audit, lambda: "pg1" in audit.findings.unseen)
        assert audit.findings.verdict is Verdict.INVALID
        await asyncio.to_thread(own_stack.start_node, "pg1")
        await until_looked(audit, lambda: not audit.findings.unseen)
        for _ in range(FOUND_WITHIN_LOOKS):
            await look(audit)
        assert audit.findings.counts == {}, audit.findings.witnesses
        assert audit.findings.verdict is Verdict.PASS
        assert "pg1 is read again" in audit.findings.notes


async def test_a_server_that_breaks_off_while_it_is_taken_over_is_taken_over_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit, long = Auditor(world.config), Server.long
    broken: list[str] = []

    async def breaks_once(server: Server, name: str, *args: object) -> list[asyncpg.Record]:
        if name == "accounts" and not broken:
            broken.append(server.name)
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        return await long(server, name, *args)

    monkeypatch.setattr(Server, "long", breaks_once)
    try:
        await look(audit)
        assert list(audit.findings.unseen) == broken == ["pg0"]
        for _ in range(FOUND_WITHIN_LOOKS):
            await look(audit)
        assert audit.findings.unseen == {}
        assert audit.ledger.off == 0
        assert audit.findings.counts == {}, audit.findings.witnesses
    finally:
        audit.close()


async def until_looked(audit: Auditor, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        await look(audit)


# -- the command


@contextlib.contextmanager
def command(stack: Stack, *arguments: str, stdin: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """`ledgerproof audit --live` as a user starts it; it is gone when the block ends."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ledgerproof", "audit", "--live", "--json", *arguments),
            *("--interval", "0.3", "--config", str(stack.config_path)),
        ],
        cwd=Path(__file__).parents[2],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def fetched(port: int, path: str) -> bytes:
    """What the auditor serves. Raises OSError if it does not."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        body: bytes = answer.read()
        return body


def sample(port: int, name: str) -> float | None:
    """A sample of the auditor's metrics; None while it does not answer."""
    try:
        text = fetched(port, "/metrics").decode()
    except OSError:
        return None
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


async def test_the_command_serves_its_findings_and_ends_with_20_after_ctrl_c(world: World, own_stack: Stack) -> None:
    user = await wallet_of(world, 0)
    owner = await world.owner_of(0)
    change = "UPDATE wallet_balance_projection SET balance = balance + $3 WHERE shard = $1 AND user_id = $2"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    counted = 'ledgerproof_audit_findings_total{code="A11"}'
    async with repaired(owner, (change, user % 100, user, -1)):
        with command(own_stack, "--metrics-port", str(port)) as process:
            await until(
                lambda: asyncio.to_thread(lambda: (sample(port, "ledgerproof_audit_polls_total") or 0) > 2), 90.0
            )
            assert sample(port, counted) == 0
            assert fetched(port, "/livez") == b"alive\n"
            await owner.execute(change, user % 100, user, 1)
            await until(lambda: asyncio.to_thread(lambda: sample(port, counted)), 60.0)
            process.send_signal(signal.SIGINT)
            out, _ = await asyncio.to_thread(process.communicate, timeout=60)
            result = json.loads(out)
    assert process.returncode == result["exit_code"] == Verdict.INVARIANT_VIOLATED
    assert result["findings"] == {"A11": 1}
    assert result["witnesses"][0]["user"] == user
    with pytest.raises(OSError, match="refused"):
        fetched(port, "/livez")


async def test_the_command_ends_with_its_owner_and_says_that_nothing_is_wrong(own_stack: Stack) -> None:
    with command(own_stack, "--until-input-ends", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        out, _ = await asyncio.to_thread(process.communicate, timeout=90)
        result = json.loads(out)
    assert process.returncode == result["exit_code"] == Verdict.PASS, result
    assert result["wallets"] > 40
    assert result["polls"] > 2
