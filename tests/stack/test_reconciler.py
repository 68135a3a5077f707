"""The reconciler on a real stack: planted drift is found and named, lag is not, and payouts wait for an operator."""

import asyncio
import contextlib
import getpass
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
import psutil
import pytest
from confluent_kafka import Producer
from reconciled_stack import World, filled, found, fresh_wallet, play, reconciled_stack, until
from redis.asyncio import Redis

from compose.stack import Stack
from ledgerproof.collect import drain
from reference import operations, reconciliation
from reference.commands import Contra, EntryType
from reference.errors import PayoutsPaused
from reference.reconciliation import Kind, Pass
from reference.routing import shard_of_match
from reference.uuid7 import uuid7
from reference.writer import Posting, post_entries

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def own_stack() -> Iterator[Stack]:
    """Drift is planted here, so that no other test may share it."""
    with reconciled_stack() as started:
        yield started


@pytest.fixture(scope="module")
def world(own_stack: Stack) -> World:
    return asyncio.run(filled(own_stack))


@pytest.fixture(autouse=True)
async def gates_open(world: World) -> AsyncIterator[None]:
    """Every test leaves the payouts running for the next."""
    yield
    for index in range(len(world.config.servers)):
        await operations.resume(world.config, index, "test", "the drift is repaired")


@asynccontextmanager
async def planted(connection: asyncpg.Connection, plant: str, repair: str, *args: object) -> AsyncIterator[None]:
    """Change a store by hand while the block runs. Both statements change exactly one row."""
    try:
        assert (await connection.execute(plant, *args)).endswith(" 1")
        yield
    finally:
        assert (await connection.execute(repair, *args)).endswith(" 1")
        await connection.close()


async def entry_of(world: World, connection: asyncpg.Connection, user: int) -> asyncpg.Record:
    """An entry in the middle of a wallet's chain."""
    return await connection.fetchrow(
        "SELECT * FROM wallet_ledger WHERE shard = $1 AND user_id = $2 AND seq = 2", user % 100, user
    )


async def named(world: World, kind: Kind = Kind.FULL) -> set[tuple[str, int | None, int | None]]:
    return {(item.code, item.user_id, item.seq) for item in found(await world.run(kind))}


async def test_a_clean_ledger_has_no_findings_and_payouts_go_on(world: World) -> None:
    for kind in (Kind.FULL, Kind.INCREMENTAL):
        report = await world.run(kind)
        assert found(report) == []
        assert [server.state for server in report.servers] == ["CLEAN", "CLEAN"]
        assert all(server.entries and server.events and server.records for server in report.servers)
    assert [(await operations.gate_of(world.config, index)).paused for index in (0, 1)] == [False, False]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_stake_of_a_bet_that_came_too_late_is_no_finding(world: World, cancelled: bool) -> None:
    """Until its refund is posted; also if a cancel waited for it, so that its order says REQUESTED and not LATE."""
    user, match_id, bet_id = world.users[0], world.settled[0], uuid7()
    store = world.role("ledger_api")
    home = world.config.routing[shard_of_match(match_id)]
    owner, matches = await world.owner(user), await asyncpg.connect(world.dsn(home))
    late = Posting(
        user,
        f"late-{bet_id}",
        EntryType.DEBIT,
        -50,
        Contra.ESCROW,
        match_id=match_id,
        bet_id=bet_id,
        outcome="HOME",
        side="BACK",
        odds=200,
        stake=50,
    )
    state = "SELECT cancel_reason FROM orders WHERE bet_id = $1"
    refunded = "SELECT count(*) FROM wallet_ledger WHERE bet_id = $1 AND type = 'REFUND'"
    server = world.config.routing[user % 100]
    assert await operations.pause(world.config, server, "test", "the refund has to wait")
    try:
        if cancelled:
            await matches.execute(
                "INSERT INTO cancels (user_id, idempotent_key, bet_id, match_id, outcome, waiting)"
                " VALUES ($1, $2, $3, $4, 'ACCEPTED', true)",
                *(user, f"cancel-{bet_id}", bet_id, match_id),
            )
        async with store.connection(server) as connection:
            (row,) = await post_entries(connection, store.sql["post"], "API", [late])
            assert row["status"] == "ACCEPTED"
        await until(lambda: matches.fetchval(state, bet_id))
        assert await matches.fetchval(state, bet_id) == ("REQUESTED" if cancelled else "LATE")
        for kind in (Kind.FULL, Kind.INCREMENTAL):
            assert found(await world.run(kind)) == []
        assert await owner.fetchval(refunded, bet_id) == 0
        assert await operations.resume(world.config, server, "test", "go on")
        await until(lambda: owner.fetchval(refunded, bet_id))
        await drain(world.config, 60.0, lambda _: None)
    finally:
        for connection in (owner, matches):
            await connection.close()
        await store.close()


@pytest.mark.parametrize("server", [0, 1])
async def test_a_changed_amount_breaks_the_chain_the_sum_and_its_event(world: World, server: int) -> None:
    user = next(user for user in world.users if world.config.routing[user % 100] == server)
    change = "UPDATE wallet_ledger SET amount = amount {} 5 WHERE shard = $1 AND user_id = $2 AND seq = 2"
    async with planted(await world.owner(user), change.format("-"), change.format("+"), user % 100, user):
        report = await world.run()
    seen = {(item.code, item.user_id, item.seq) for item in found(report)}
    assert {("LEDGER_CHAIN", user, 2), ("EVENT_DIFFERS", user, 2)} <= seen
    assert {code for code, who, _ in seen if who == user} >= {"LEDGER_SUM"}
    assert {item.server for item in found(report) if not item.code.startswith("ESCROW")} == {f"pg{server}"}
    gate = await operations.gate_of(world.config, server)
    assert (gate.paused, gate.changed_by, gate.run_id) == (True, "reconciler", report.run_id)
    assert gate.reason is not None
    assert str(user) in gate.reason


async def test_an_amount_and_its_balance_changed_together_are_found(world: World) -> None:
    user = world.users[1]
    change = """UPDATE wallet_ledger SET amount = amount {0} 5, balance_snapshot = balance_snapshot {0} 5
                 WHERE shard = $1 AND user_id = $2 AND seq = 2"""
    async with planted(await world.owner(user), change.format("-"), change.format("+"), user % 100, user):
        seen = await named(world)
    assert {("LEDGER_CHAIN", user, 3), ("EVENT_DIFFERS", user, 2)} <= seen


@pytest.mark.parametrize("which", ["middle", "newest"])
async def test_a_deleted_entry_is_missed_where_it_was(world: World, which: str) -> None:
    user = world.users[2]
    owner = await world.owner(user)
    seq = 2
    if which == "newest":
        seq = await owner.fetchval(
            "SELECT max(seq) FROM wallet_ledger WHERE shard = $1 AND user_id = $2", user % 100, user
        )
    await owner.execute("CREATE TABLE kept AS SELECT * FROM wallet_ledger WHERE user_id = $1 AND seq = $2", user, seq)
    try:
        await owner.execute(
            "DELETE FROM wallet_ledger WHERE shard = $1 AND user_id = $2 AND seq = $3", user % 100, user, seq
        )
        seen = await named(world)
    finally:
        await owner.execute("INSERT INTO wallet_ledger SELECT * FROM kept")
        await owner.execute("DROP TABLE kept")
        await owner.close()
    assert ("ENTRY_MISSING", user, seq) in seen
    assert (("LEDGER_GAP", user, 3) if which == "middle" else ("PROJECTION_AHEAD", user, seq)) in seen


@pytest.mark.parametrize("kind", list(Kind))
async def test_an_inserted_entry_has_no_event(world: World, kind: Kind) -> None:
    user = fresh_wallet(world.config, 1)
    plant = """INSERT INTO wallet_ledger VALUES
        ($1, $2, 1, 'CREDIT', 700, 'EXTERNAL', NULL, NULL, NULL, 700, 'forged', NULL, 'API', clock_timestamp())"""
    repair = "DELETE FROM wallet_ledger WHERE shard = $1 AND user_id = $2"
    await world.run(Kind.INCREMENTAL)
    async with planted(await world.owner(user), plant, repair, user % 100, user):
        assert await named(world, kind) == {("EVENT_MISSING", user, 1)}


async def test_a_bet_paid_twice_under_another_version_leaves_its_match_short(world: World) -> None:
    owner = await world.owner(world.users[0])
    paid = await owner.fetchrow(
        "SELECT * FROM wallet_ledger WHERE type = 'PAYOUT' AND match_id = $1 LIMIT 1", world.settled[0]
    )
    user = paid["user_id"]
    head = "(SELECT max(seq) {} FROM wallet_ledger WHERE shard = $1 AND user_id = $2)"
    plant = f"""INSERT INTO wallet_ledger SELECT shard, user_id, {head.format("+ 1")}, type, amount, contra, match_id,
        bet_id, 9, amount + (SELECT balance_snapshot FROM wallet_ledger WHERE shard = $1 AND user_id = $2
        ORDER BY seq DESC LIMIT 1), 'forged', NULL, 'Settler', clock_timestamp()
        FROM wallet_ledger WHERE shard = $1 AND user_id = $2 AND seq = {paid["seq"]}"""
    repair = "DELETE FROM wallet_ledger WHERE shard = $1 AND user_id = $2 AND idempotent_key = 'forged'"
    async with planted(owner, plant, repair, user % 100, user):
        report = await world.run()
        gates = [await operations.gate_of(world.config, index) for index in (0, 1)]
    findings = found(report)
    (escrow,) = [item for item in findings if item.code == "ESCROW_NOT_ZERO"]
    assert (escrow.match_id, escrow.expected, escrow.found) == (str(world.settled[0]), "0", str(-paid["amount"]))
    assert {item.code for item in findings} == {"ESCROW_NOT_ZERO", "EVENT_MISSING"}
    assert [gate.paused for gate in gates] == [True, True]


@pytest.mark.parametrize("kind", list(Kind))
async def test_a_projection_with_another_balance_or_ahead_is_found(world: World, kind: Kind) -> None:
    store = world.role("ledger_api")
    user = world.users[3]
    server = world.config.routing[user % 100]
    async with store.connection(server) as connection:
        posting = Posting(user, uuid4().hex, EntryType.CREDIT, 1, Contra.EXTERNAL)
        ((_, _, seq, balance),) = await post_entries(connection, store.sql["post"], "API", [posting])
    await store.close()
    await drain(world.config, 30.0, lambda _: None)
    where = "WHERE shard = $1 AND user_id = $2"
    change = f"UPDATE wallet_balance_projection SET balance = balance {{}} 1 {where}"
    async with planted(await world.owner(user), change.format("+"), change.format("-"), user % 100, user):
        report = await world.run(kind)
    (finding,) = found(report)
    assert (finding.code, finding.user_id, finding.seq) == ("PROJECTION_DIFFERS", user, seq)
    assert (finding.expected, finding.found) == (f"balance {balance}", f"seq {seq}, balance {balance + 1}")
    change = f"UPDATE wallet_balance_projection SET seq = seq {{}} 1 {where}"
    async with planted(await world.owner(user), change.format("+"), change.format("-"), user % 100, user):
        assert await named(world, kind) == {("PROJECTION_AHEAD", user, seq + 1)}
    change = f"UPDATE wallet_balance_projection SET seq = seq {{0}} 1, balance = balance {{0}} 1 {where}"
    async with planted(await world.owner(user), change.format("-"), change.format("+"), user % 100, user):
        assert await named(world, kind) == set(), "a projection that is behind, with its own balance, is only late"


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(
    ("value", "code"),
    [("{seq} 123 0", "REDIS_DIFFERS"), ("{ahead} 5 0", "REDIS_AHEAD"), ("nonsense", "REDIS_MALFORMED")],
)
async def test_a_cache_that_says_otherwise_is_found(world: World, kind: Kind, value: str, code: str) -> None:
    user = world.users[4]
    owner = await world.owner(user)
    seq = await owner.fetchval("SELECT max(seq) FROM wallet_ledger WHERE shard = $1 AND user_id = $2", user % 100, user)
    await owner.close()
    config = world.config
    cache = Redis(host=config.redis_host, port=config.redis_port, password=config.redis_password)
    try:
        await cache.set(f"balance:{user}", value.format(seq=seq, ahead=seq + 1))
        (finding,) = found(await world.run(kind))
    finally:
        await cache.delete(f"balance:{user}")
        await cache.aclose()
    assert (finding.code, finding.server) == (code, config.servers[config.routing[user % 100]].name)
    if code != "REDIS_MALFORMED":
        assert (finding.user_id, finding.seq) == (user, seq + (code == "REDIS_AHEAD"))
    else:
        assert f"balance:{user}" in finding.found


async def test_a_changed_payload_is_found_against_its_entry_and_its_topic(world: World) -> None:
    user = world.users[5]
    owner = await world.owner(user)
    event = await owner.fetchrow(
        "SELECT id, event_id, payload FROM events WHERE partition_key = $1 AND event_type = 'EntryPosted' LIMIT 1",
        str(user),
    )
    change = (
        "UPDATE events SET payload = jsonb_set(payload, ARRAY['balance'], to_jsonb((payload->>'balance')::bigint {} 1))"
    )
    where = " WHERE id = $1"
    async with planted(owner, change.format("+") + where, change.format("-") + where, event["id"]):
        findings = found(await world.run())
    seq = json.loads(event["payload"])["seq"]
    assert {(item.code, item.user_id, item.seq, item.event_id) for item in findings} == {
        ("EVENT_DIFFERS", user, seq, str(event["event_id"])),
        ("TOPIC_DIFFERS", user, None, str(event["event_id"])),
    }


async def test_a_deleted_event_is_missed_by_its_entry_and_by_its_record(world: World) -> None:
    user = world.users[6]
    owner = await world.owner(user)
    event = await owner.fetchrow(
        "SELECT * FROM events WHERE partition_key = $1 AND event_type = 'BetCreated' LIMIT 1", str(user)
    )
    await owner.execute("CREATE TABLE kept AS SELECT * FROM events WHERE id = $1", event["id"])
    try:
        await owner.execute("DELETE FROM events WHERE id = $1", event["id"])
        seen = {(item.code, item.user_id, item.seq, item.event_id) for item in found(await world.run())}
    finally:
        await owner.execute("INSERT INTO events OVERRIDING SYSTEM VALUE SELECT * FROM kept")
        await owner.execute("DROP TABLE kept")
        await owner.close()
    seq = json.loads(event["payload"])["seq"]
    assert seen == {("EVENT_MISSING", user, seq, None), ("TOPIC_UNKNOWN", user, None, str(event["event_id"]))}


@pytest.mark.parametrize("kind", list(Kind))
async def test_an_event_that_was_never_sent_but_says_so_is_found(world: World, kind: Kind) -> None:
    plant = """INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload,
        published_to_kafka, published_at) VALUES ('Bet', $1, 'BetMatched', $1, '{}', true, clock_timestamp())"""
    user = str(fresh_wallet(world.config, 0))
    await world.run(Kind.INCREMENTAL)
    async with planted(await world.owner_of(0), plant, "DELETE FROM events WHERE partition_key = $1", user):
        (finding,) = found(await world.run(kind))
    assert (finding.code, finding.server, finding.topic) == ("TOPIC_MISSING", "pg0", "bet.matched")
    assert finding.user_id == int(user)


async def test_an_event_of_an_entry_that_never_was_is_found(world: World) -> None:
    user = fresh_wallet(world.config, 1)
    plant = """INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload)
        VALUES ('Wallet', $1, 'EntryPosted', $1, jsonb_build_object('user_id', $1::text::bigint, 'seq', 1,
        'amount', 5, 'balance', 5))"""
    # The relay is held, so that the event stays in the outbox and is gone with its row.
    world.stack.pause("relay0")
    try:
        repair = "DELETE FROM events WHERE partition_key = $1"
        async with planted(await world.owner(user), plant, repair, str(user)):
            assert await named(world, Kind.INCREMENTAL) == {("ENTRY_MISSING", user, 1)}
            assert await named(world) == {("ENTRY_MISSING", user, 1)}
    finally:
        world.stack.resume("relay0")


async def test_two_payments_for_one_reason_are_a_duplicate(world: World) -> None:
    owner = await world.owner_of(0)
    paid = await owner.fetchrow("SELECT * FROM wallet_ledger WHERE type = 'PAYOUT' LIMIT 1")
    user, index = paid["user_id"], f"wallet_ledger_{paid['shard']}"
    name = await owner.fetchval(
        """SELECT indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
            WHERE indrelid = $1::regclass AND indpred IS NOT NULL AND relname LIKE '%bet_id%'""",
        index,
    )
    assert name
    # Only without the unique index can it happen at all: a copy of the partition stands in for a broken one.
    report = None
    async with owner.transaction():
        await owner.execute("DROP INDEX wallet_ledger_business_key")
    try:
        await owner.execute(
            """INSERT INTO wallet_ledger SELECT shard, user_id, (SELECT max(seq) + 1 FROM wallet_ledger
               WHERE shard = $1 AND user_id = $2), type, amount, contra, match_id, bet_id, settlement_version,
               amount, 'again', NULL, created_by, clock_timestamp() FROM wallet_ledger
               WHERE shard = $1 AND user_id = $2 AND seq = $3""",
            paid["shard"],
            user,
            paid["seq"],
        )
        report = await world.run()
    finally:
        await owner.execute("DELETE FROM wallet_ledger WHERE idempotent_key = 'again'")
        await owner.execute(
            """CREATE UNIQUE INDEX wallet_ledger_business_key ON wallet_ledger
               (shard, bet_id, type, contra, settlement_version) WHERE settlement_version IS NOT NULL"""
        )
        await owner.close()
    (twice,) = [item for item in found(report) if item.code == "LEDGER_DUPLICATE"]
    assert twice.user_id == user
    assert str(paid["bet_id"]) in twice.expected
    assert [server.duplicates for server in report.servers] == [1, 0]


async def test_findings_pause_payouts_that_wait_and_then_go_on_once(world: World) -> None:
    """Pays nothing while paused, everything after, nobody twice."""
    users = [fresh_wallet(world.config, index) for index in (0, 1, 0, 1)]
    config = world.config
    dsn = [world.dsn(0), world.dsn(1)]
    assert await operations.pause(config, 1, "test", "an inspection")
    assert not await operations.pause(config, 1, "test", "again")
    store = world.role("ledger_api")
    for user in users:
        async with store.connection(config.routing[user % 100]) as connection:
            funds = Posting(user, "fund", EntryType.CREDIT, 10**9, Contra.EXTERNAL)
            await post_entries(connection, store.sql["post"], "API", [funds])
    await store.close()
    match_id = await play(config, dsn, users, 60, 5)
    owners = [await asyncpg.connect(address) for address in dsn]
    paid = "SELECT count(*) FROM wallet_ledger WHERE match_id = $1 AND settlement_version > 0"
    done = "SELECT count(*) FROM settlements WHERE match_id = $1 AND state = 'DONE'"
    try:
        # Server 0 pays its own wallets, so the settler has been at it; server 1 pays nothing.
        await until(lambda: owners[0].fetchval(paid, match_id))
        assert await owners[1].fetchval(paid, match_id) == 0
        settler = world.role("ledger_settler")
        with pytest.raises(PayoutsPaused, match="an inspection"):
            async with settler.connection(1) as connection:
                entry = Posting(users[1], "mine", EntryType.CREDIT, 1, Contra.EXTERNAL)
                await post_entries(connection, settler.sql["post"], "API", [entry])
        await settler.close()
        assert await owners[1].fetchval(paid, match_id) == 0
        assert found(await world.run()) == [], "a settlement that waits is late, not wrong"
        assert await operations.resume(config, 1, "test", "all is well")

        async def settled() -> bool:
            return bool(sum([await owner.fetchval(done, match_id) for owner in owners]))

        await until(settled)
        rows = [
            tuple(row)
            for owner in owners
            for row in await owner.fetch(
                "SELECT bet_id, type, contra FROM wallet_ledger WHERE match_id = $1 AND settlement_version > 0",
                match_id,
            )
        ]
        assert len(set(rows)) == len(rows)
    finally:
        for owner in owners:
            await owner.close()
    await drain(config, 60.0, lambda _: None)
    assert found(await world.run()) == []
    changes = (await operations.gate_of(config, 1)).changes
    assert [(item.paused, item.changed_by, item.reason, item.login) for item in changes[:2]] == [
        (False, "test", "all is well", "ledger_operator"),
        (True, "test", "an inspection", "ledger_operator"),
    ]


async def test_a_pause_waits_for_payouts_under_way_and_stops_those_that_come(world: World) -> None:
    settler = world.role("ledger_settler")
    user = fresh_wallet(world.config, 0)

    def entry(key: str) -> Posting:
        return Posting(user, key, EntryType.CREDIT, 1, Contra.EXTERNAL)

    async with settler.connection(0) as connection:
        under_way = connection.transaction()
        await under_way.start()
        await post_entries(connection, settler.sql["post"], "Settler", [entry("first")])
        pausing = asyncio.create_task(operations.pause(world.config, 0, "test", "now"))
        done, _ = await asyncio.wait([pausing], timeout=0.5)
        assert not done, "it said paused while a payout could still commit"
        await under_way.commit()
    assert await pausing
    with pytest.raises(PayoutsPaused):
        async with settler.connection(0) as connection:
            await post_entries(connection, settler.sql["post"], "Settler", [entry("second")])
    await settler.close()


async def test_passes_under_load_with_a_killed_worker_find_nothing(world: World) -> None:
    config, dsn = world.config, [world.dsn(0), world.dsn(1)]
    users = world.users[10:30]
    playing = [asyncio.create_task(play(config, dsn, users, 300, seed)) for seed in range(10)]
    passes = 0
    killed = False
    try:
        while not all(task.done() for task in playing):
            kind = Kind.FULL if passes % 3 == 2 else Kind.INCREMENTAL
            assert found(await world.run(kind)) == []
            passes += 1
            if not killed:
                killed = True
                for worker in ("settler0", "projector0", "relay0"):
                    await asyncio.to_thread(world.stack.kill, worker)
                for dead in Kind:
                    assert found(await world.run(dead)) == []
                    passes += 1
                await asyncio.to_thread(world.stack.heal)
        await asyncio.gather(*playing)
        for kind in (Kind.FULL, Kind.INCREMENTAL):
            assert found(await world.run(kind)) == []
    finally:
        await asyncio.to_thread(world.stack.heal)
        for task in playing:
            task.cancel()
        await asyncio.gather(*playing, return_exceptions=True)
    assert passes >= 3
    await drain(config, 60.0, lambda _: None)
    assert found(await world.run()) == []


@pytest.mark.parametrize("node", ["pg1", "redis", "kafka"])
async def test_what_cannot_be_read_is_a_gap_and_no_finding(world: World, node: str) -> None:
    await asyncio.to_thread(world.stack.kill, node)
    try:
        report = await world.run()
    finally:
        await asyncio.to_thread(world.stack.heal)
    assert report.findings == 0
    assert report.problems
    assert {server.state for server in report.servers if not (node == "pg1" and server.server == "pg1")} == {
        "INCOMPLETE"
    }


async def test_a_server_that_hangs_ends_a_pass_and_not_the_reconciler(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciliation, "PASS_TIMEOUT_S", dict.fromkeys(Kind, 3.0))
    monkeypatch.setattr(reconciliation, "ANSWER_TIMEOUT_S", 3.0)
    check = Pass._check

    async def hanging(self: Pass) -> None:
        await asyncio.to_thread(world.stack.pause, "pg1")
        await check(self)

    monkeypatch.setattr(Pass, "_check", hanging)
    try:
        async with asyncio.timeout(60):
            report = await world.run()
    finally:
        await asyncio.to_thread(world.stack.heal)
    assert report.findings == 0
    assert any("given up after 3 s" in problem for problem in report.problems)
    assert [server.state for server in report.servers] == ["INCOMPLETE", "INCOMPLETE"]


async def test_two_passes_at_once_take_turns_and_a_scheduled_one_gives_way(world: World) -> None:
    first = asyncio.create_task(world.run())
    await asyncio.sleep(0)
    reports = await asyncio.gather(first, *(Pass(world.config, Kind.INCREMENTAL, "schedule").run() for _ in range(2)))
    assert all(report is not None and report.findings == 0 for report in reports)
    holder = await world.role("ledger_reconciler").connect(0)
    await holder.execute("SELECT pg_advisory_lock(7, 2)")
    assert await Pass(world.config, Kind.INCREMENTAL, "schedule").run(wait=False) is None
    await holder.close()


async def test_the_process_shows_findings_of_every_pass_as_metrics_and_logs_them(world: World) -> None:
    port = world.stack.port("reconciler0")

    async def shown() -> dict[str, float]:
        text = await asyncio.to_thread(_answer, f"http://127.0.0.1:{port}/metrics")
        return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)}

    user = fresh_wallet(world.config, 1)
    plant = "INSERT INTO wallet_balance_projection VALUES ($1, $2, 5, 1, now())"
    repair = "DELETE FROM wallet_balance_projection WHERE shard = $1 AND user_id = $2"
    async with planted(await world.owner(user), plant, repair, user % 100, user):
        assert await named(world) == {("PROJECTION_AHEAD", user, 1)}

    async def alarmed() -> bool:
        now = await shown()
        return (now['reconciliation_mismatch{server="pg1"}'], now['payouts_paused{server="pg1"}']) == (1.0, 1.0)

    await until(alarmed)
    assert (await shown())['reconciliation_mismatch{server="pg0"}'] == 0.0
    await operations.resume(world.config, 1, "test", "repaired")
    # A pass over what is new does not take the alarm back; one over everything does.
    await world.run(Kind.INCREMENTAL)
    assert (await shown())['reconciliation_mismatch{server="pg1"}'] == 1.0
    await world.run(Kind.FULL)

    async def calm() -> bool:
        now = await shown()
        return (now['reconciliation_mismatch{server="pg1"}'], now['payouts_paused{server="pg1"}']) == (0.0, 0.0)

    await until(calm)


async def test_the_process_shows_connections_and_locks_of_every_server(world: World) -> None:
    port = world.stack.port("reconciler0")

    async def shown(name: str) -> float:
        text = await asyncio.to_thread(_answer, f"http://127.0.0.1:{port}/metrics")
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    async def has(name: str, least: float, most: float = 1e9) -> bool:
        return least <= await shown(name) <= most

    await until(lambda: has('db_locks_active{server="pg1",state="awaited"}', 0, 0))
    before = await shown('db_connection_active{server="pg1"}')
    holder, waiter = [await world.owner_of(1) for _ in range(2)]
    await holder.execute("SELECT pg_advisory_lock(4711)")
    waiting = asyncio.create_task(waiter.execute("SELECT pg_advisory_lock(4711)"))
    await until(lambda: has('db_locks_active{server="pg1",state="awaited"}', 1))
    await until(lambda: has('db_connection_active{server="pg1"}', before + 1))
    assert await shown('db_locks_active{server="pg1",state="held"}') >= 1
    await holder.execute("SELECT pg_advisory_unlock(4711)")
    await waiting
    await until(lambda: has('db_locks_active{server="pg1",state="awaited"}', 0, 0))
    await asyncio.gather(holder.close(), waiter.close())


async def test_stored_results_name_the_finding_and_are_bounded(world: World) -> None:
    owner = await world.owner_of(0)
    users = [fresh_wallet(world.config, 0) for _ in range(130)]
    await owner.executemany(
        "INSERT INTO wallet_balance_projection VALUES ($1, $2, 5, 1, now())", [(user % 100, user) for user in users]
    )
    try:
        report = await world.run(only=["pg0"])
    finally:
        await owner.execute("DELETE FROM wallet_balance_projection WHERE user_id = ANY ($1)", users)
        await owner.close()
    (server,) = report.servers
    assert (server.total, len(server.findings)) == (130, 100)
    stored = await operations.findings_of(world.config, 0, report.run_id, 1_000)
    assert len(stored) == 100
    assert {row["code"] for row in stored} == {"PROJECTION_AHEAD"}
    assert {row["user_id"] for row in stored} <= set(users)
    (run,) = [row for row in await operations.runs_of(world.config, 0, 10) if row["run_id"] == report.run_id]
    assert (run["state"], run["findings"], run["requested_by"]) == ("FINDINGS", 130, "test")
    assert await operations.findings_of(world.config, 1, report.run_id, 10) == []


async def test_an_operator_reconciles_pauses_and_resumes_by_command(world: World) -> None:
    def ledgerproof(*arguments: str) -> tuple[int, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "ledgerproof", *arguments, "--stack", world.stack.name, "--json"],
            cwd=world.stack.folder.parents[2],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr

    code, report = await asyncio.to_thread(ledgerproof, "reconcile", "run", "--full")
    assert (code, report["findings"], len(report["servers"])) == (0, 0, 2)
    user = fresh_wallet(world.config, 1)
    plant = "INSERT INTO wallet_balance_projection VALUES ($1, $2, 5, 1, now())"
    repair = "DELETE FROM wallet_balance_projection WHERE shard = $1 AND user_id = $2"
    async with planted(await world.owner(user), plant, repair, user % 100, user):
        code, report = await asyncio.to_thread(ledgerproof, "reconcile", "run", "--server", "pg1")
    assert (code, report["findings"], report["servers"][0]["paused"]) == (20, 1, True)
    code, rows = await asyncio.to_thread(ledgerproof, "reconcile", "findings", "--run", report["run_id"])
    assert (code, [(row["code"], row["user_id"], row["server"]) for row in rows]) == (
        20,
        [("PROJECTION_AHEAD", user, "pg1")],
    )
    code, gates = await asyncio.to_thread(ledgerproof, "payouts", "status")
    assert (code, [gate["paused"] for gate in gates]) == (20, [False, True])
    code, state = await asyncio.to_thread(ledgerproof, "reconcile", "status", "--server", "pg1", "--limit", "1")
    assert (code, state[0]["runs"][0]["state"]) == (20, "FINDINGS")
    change = ("payouts", "resume", "--server", "pg1", "--reason", "the projection is rebuilt")
    assert await asyncio.to_thread(ledgerproof, *change) == (
        0,
        {"server": "pg1", "paused": False, "changed": True},
    )
    code, gates = await asyncio.to_thread(ledgerproof, "payouts", "status")
    assert (code, gates[1]["reason"], gates[1]["changed_by"]) == (0, "the projection is rebuilt", getpass.getuser())
    code, _ = await asyncio.to_thread(ledgerproof, "reconcile", "run", "--server", "pg9")
    assert code == 2


async def test_no_password_of_the_stack_is_in_a_log_an_answer_or_a_process_list(world: World, tmp_path: Path) -> None:
    config = world.config
    secrets = {*config.passwords.values(), str(config.redis_password), str(config.token_key), world.stack.superuser[1]}
    assert len(secrets) == len(config.passwords) + 3
    texts = {log.name: log.read_text(errors="replace") for log in world.stack.collect_logs(tmp_path)}
    assert any(texts.values())
    texts["status"] = msgspec.json.encode(world.stack.status()).decode()
    base = f"http://127.0.0.1:{world.stack.port('api0')}"
    for path in ("/metrics", "/openapi.json", "/v1/wallets/x/balance", "/nowhere", "/v1/wallets/7/balance"):
        texts[path] = await asyncio.to_thread(_answer, base + path)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            texts[f"process {process.pid}"] = " ".join([*process.cmdline(), *process.environ().values()])
    report = await Pass(config, Kind.INCREMENTAL, "test").run()
    texts["report"] = msgspec.json.encode(report).decode()
    for index in (0, 1):
        rows = await operations.runs_of(config, index, 1_000)
        rows += await operations.findings_of(config, index, None, 1_000)
        texts[f"stored {index}"] = msgspec.json.encode(rows).decode()
    told = {name for name, text in texts.items() for secret in secrets if secret in text}
    assert told == set()


def _answer(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


@pytest.mark.parametrize("kind", [Kind.INCREMENTAL, Kind.FULL])
async def test_a_topic_with_an_invented_or_altered_record_is_found(world: World, kind: Kind) -> None:
    """The last test: what is in a topic stays there."""
    await world.run(Kind.INCREMENTAL)
    user = world.users[7]
    owner = await world.owner(user)
    event = await owner.fetchrow(
        "SELECT event_id::text, payload FROM events WHERE partition_key = $1 AND event_type = 'EntryPosted' LIMIT 1",
        str(user),
    )
    await owner.close()
    future = str(uuid4())
    sender = Producer({"bootstrap.servers": world.config.kafka_bootstrap})
    altered = json.dumps({**json.loads(event["payload"]), "balance": 1})
    for event_id, value in ((future, event["payload"]), (event["event_id"], altered)):
        headers = [("event-id", event_id), ("event-type", "EntryPosted"), ("timestamp", "2026-01-01T00:00:00+00:00")]
        sender.produce("wallet.posted", value, str(user), headers=headers)
    assert sender.flush(10) == 0
    seen = {(item.code, item.topic, item.event_id, item.user_id) for item in found(await world.run(kind))}
    assert ("TOPIC_UNKNOWN", "wallet.posted", future, user) in seen
    assert ("TOPIC_DIFFERS", "wallet.posted", event["event_id"], user) in seen
