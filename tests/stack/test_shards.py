"""Moving a shard under load loses, refuses and doubles nothing, whoever is killed in between."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import pytest
from exchange_floor import Floor
from shard_traffic import Traffic, compare, events_are_in_order, traffic, wallets_of

from compose.stack import Stack
from reference import metrics
from reference.cache import Cache
from reference.config import ServiceConfig
from reference.errors import LedgerError
from reference.shards import Moved, MoveRefused, MoveUnfinished, Phase, list_shards, move_shard

HERE = Path(__file__).parent
WITHIN_S = 30.0


async def until(wanted, within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not await wanted():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        await asyncio.sleep(0.05)


async def open_match(found: Traffic) -> str:
    match_id = str(uuid4())
    body = {"match_id": match_id, "closes_at_ms": int((time.time() + 3600) * 1000)}
    async with found.session.post(f"{found.bases[0]}/v1/matches", json=body, headers={"idempotency-key": "m"}) as reply:
        assert reply.status == 202
    return match_id


async def settle(found: Traffic, match_id: str) -> None:
    for step, body in (("close", None), ("settle", {"result": "HOME"})):
        url = f"{found.bases[0]}/v1/matches/{match_id}/{step}"
        async with found.session.post(url, json=body, headers={"idempotency-key": step}) as reply:
            assert reply.status == 202

    async def settled() -> bool:
        async with found.session.get(f"{found.bases[0]}/v1/matches/{match_id}") as reply:
            return (await reply.json())["settled"]

    await until(settled)


async def drained(floor: Floor, users: list[int], owner: list[asyncpg.Connection] | None = None) -> None:
    """Every event of the wallets is published and projected."""
    owner = owner or floor.owner
    keys = [str(user) for user in users]

    async def projected() -> bool:
        for connection in owner:
            query = "SELECT count(*) FROM events WHERE NOT published_to_kafka AND partition_key = ANY ($1)"
            if await connection.fetchval(query, keys):
                return False
        for user in users:
            try:
                head = await floor.api.wallet_row(user, "head")
                row = await floor.api.wallet_row(user, "projected")
            except LedgerError:
                return False  # a connection that broke with its server; the next one is new
            if row is None or row["seq"] != head["seq"] or row["balance"] != head["balance"]:
                return False
        return True

    await until(projected)


async def test_a_shard_moves_there_and_back_under_load_with_bets_fills_and_settlement(
    stack: Stack, service_config: ServiceConfig, api_bases: list[str], operator: dict[str, str], floor: Floor
) -> None:
    moving, staying = wallets_of(11, 6), wallets_of(61, 3)
    async with aiohttp.ClientSession(headers=operator) as session:
        match_id = await open_match(Traffic(session, api_bases, []))
    async with traffic(api_bases, operator, moving + staying, match_id=match_id) as found:
        await asyncio.sleep(1)
        before = len(found.accepted)
        first = await move_shard(service_config, stack.superuser, 11, 1)
        assert (first.source, first.target, first.moved, first.epoch) == ("pg0", "pg1", True, 1)
        assert first.entries > 6
        assert first.bets > 0
        assert 0 < first.freeze_ms < 5_000
        moved = len(found.accepted)
        await until(lambda: _true(len(found.accepted) > moved + 100))
        assert moved > before, "clients went on while the shard was copied"
        bet = next(key for key, (path, _) in found.sent.items() if path.endswith("bets") and key in found.accepted)
        assert bet
        second = await move_shard(service_config, stack.superuser, 11, 0)
        assert (second.source, second.target, second.epoch) == ("pg1", "pg0", 2)
        third = await move_shard(service_config, stack.superuser, 11, 1)
        assert third.entries >= second.entries >= first.entries
    async with aiohttp.ClientSession(headers=operator) as session:
        found.session = session
        await settle(found, match_id)
    longest_ms = max(first.freeze_ms, second.freeze_ms, third.freeze_ms)
    assert found.not_admitted == set() or longest_ms > 1_000, "a short freeze is waited out"
    await drained(floor, moving + staying)
    await compare(found, floor.owner, {11: 1, 61: 1})
    assert await floor.escrow(UUID(match_id)) == 0
    paid = "SELECT count(*) FROM wallet_ledger WHERE match_id = $1::text::uuid AND type = 'PAYOUT'"
    assert sum([await connection.fetchval(paid, match_id) for connection in floor.owner]) > 0
    assert await events_are_in_order(service_config, moving) > len(moving)
    await move_shard(service_config, stack.superuser, 11, 0)


async def _true(value: bool) -> bool:
    return value


async def test_two_shards_change_places_at_the_same_time(
    stack: Stack, service_config: ServiceConfig, api_bases: list[str], operator: dict[str, str], floor: Floor
) -> None:
    users = wallets_of(12, 4) + wallets_of(62, 4)
    async with traffic(api_bases, operator, users) as found:
        await asyncio.sleep(0.5)
        await asyncio.gather(
            move_shard(service_config, stack.superuser, 12, 1), move_shard(service_config, stack.superuser, 62, 0)
        )
        await asyncio.sleep(0.5)
    await drained(floor, users)
    await compare(found, floor.owner, {12: 1, 62: 0})
    await asyncio.gather(
        move_shard(service_config, stack.superuser, 12, 0), move_shard(service_config, stack.superuser, 62, 1)
    )


async def test_two_movers_of_one_shard_do_not_meet(stack: Stack, service_config: ServiceConfig) -> None:
    results = await asyncio.gather(
        *(move_shard(service_config, stack.superuser, 13, 1) for _ in range(2)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, MoveRefused)]
    assert len(refused) == 1
    assert "another command" in str(refused[0])
    await move_shard(service_config, stack.superuser, 13, 0)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.CLEARED])
async def test_a_mover_killed_at_any_point_stops_no_wallet_and_its_command_can_be_repeated(
    stack: Stack,
    service_config: ServiceConfig,
    api_bases: list[str],
    operator: dict[str, str],
    floor: Floor,
    phase: Phase,
) -> None:
    shard = 14 + list(Phase).index(phase)
    users = wallets_of(shard, 3)
    async with traffic(api_bases, operator, users, clients=3) as found:
        await until(lambda: _true(len(found.refused) > 0))
        command = [sys.executable, str(HERE / "move_and_die.py"), str(stack.folder), str(shard), "1", phase]
        died = await asyncio.create_subprocess_exec(*command)
        assert await asyncio.wait_for(died.wait(), WITHIN_S) == -signal.SIGKILL
        # Nobody repeats anything: the wallets take commands again by themselves.
        for user in users:

            async def answered(user: int = user) -> bool:
                status, answer = await found.send(user, "deposits", f"after {phase}", {"amount_minor": 7})
                assert status in (202, 503), answer
                return status == 202

            await until(answered)
        views = {view.shard: view for view in await list_shards(service_config, stack.superuser)}
        given_up = list(Phase).index(phase) >= list(Phase).index(Phase.GIVEN_UP)
        assert views[shard].server == ("pg1" if given_up else "pg0")
        assert (views[shard].problem is not None) == (phase not in (Phase.LOCKED, Phase.CLEARED))
        again = await repeated(service_config, stack, shard)
        assert again.moved is not given_up
        assert again.resumed is (phase is not Phase.LOCKED)
    await drained(floor, users)
    await compare(found, floor.owner, {shard: 1})
    await move_shard(service_config, stack.superuser, shard, 0)


async def repeated(config: ServiceConfig, stack: Stack, shard: int) -> Moved:
    """Give the command again, once the servers have noticed that the killed mover is gone."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            return await move_shard(config, stack.superuser, shard, 1)
        except MoveRefused as error:
            if "another command" not in str(error) or time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("victim", "phase"),
    [
        ("pg0", Phase.STAGED),
        ("pg0", Phase.FROZEN),
        ("pg0", Phase.ACCEPTED),
        ("pg1", Phase.COPIED),
        ("pg1", Phase.PREPARED),
        ("pg1", Phase.GIVEN_UP),
    ],
)
async def test_a_server_killed_during_a_move_costs_nothing_but_time(
    stack: Stack,
    service_config: ServiceConfig,
    api_bases: list[str],
    operator: dict[str, str],
    superuser_dsn: list[str],
    floor: Floor,
    victim: str,
    phase: Phase,
) -> None:
    shard = 31
    users = wallets_of(shard, 3)
    healing: list[asyncio.Task[None]] = []

    def reached(now: Phase) -> None:
        if now is phase and not healing:
            stack.kill(victim)
            healing.append(asyncio.create_task(asyncio.to_thread(stack.start_node, victim)))

    async with traffic(api_bases, operator, users, clients=2) as found:
        await until(lambda: _true(len(found.refused) > 0))
        try:
            await move_shard(service_config, stack.superuser, shard, 1, reached)
        except LedgerError as error:
            assert "repeat" in str(error) or isinstance(error, MoveRefused)
        (task,) = healing
        await asyncio.wait_for(task, 60)
        again = await repeated(service_config, stack, shard)
        assert again.target == "pg1"
        answered = len(found.accepted)
        await until(lambda: _true(len(found.accepted) > answered))
    async with AsyncExitStack() as connections:
        owner = [await asyncpg.connect(dsn) for dsn in superuser_dsn]
        for connection in owner:
            connections.push_async_callback(connection.close)
        await drained(floor, users, owner)
        await compare(found, owner, {shard: 1})
    await move_shard(service_config, stack.superuser, shard, 0)


async def test_a_process_that_knows_nothing_of_the_move_is_sent_on(
    stack: Stack, service_config: ServiceConfig, floor: Floor
) -> None:
    """Its own table still names the old server, which has neither the shard nor its rows."""
    (user,) = wallets_of(32, 1)
    await floor.fund([user])
    await move_shard(service_config, stack.superuser, 32, 1)
    assert floor.api.server_of(user) == 0
    row = await floor.api.wallet_row(user, "head")
    assert row is not None
    assert row["seq"] == 1
    assert floor.api.server_of(user) == 1
    await move_shard(service_config, stack.superuser, 32, 0)


async def test_the_command_moves_lists_and_refuses(stack: Stack) -> None:
    def run(*arguments: str):
        return subprocess.run(
            [sys.executable, "-m", "ledgerproof", "shards", *arguments, "--stack", str(stack.folder)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    moved = await asyncio.to_thread(run, "move", "--shard", "33", "--to", "pg1", "--json")
    assert moved.returncode == 0, moved.stderr
    assert json.loads(moved.stdout)["moved"] is True
    again = await asyncio.to_thread(run, "move", "--shard", "33", "--to", "pg1", "--json")
    assert json.loads(again.stdout)["moved"] is False
    listed = await asyncio.to_thread(run, "list", "--json")
    views = {view["shard"]: view for view in json.loads(listed.stdout)}
    assert (views[33]["server"], views[33]["problem"]) == ("pg1", None)
    assert len(views) == 100
    table = await asyncio.to_thread(run, "list")
    assert "33" in next(line for line in table.stdout.splitlines() if line.startswith("pg1"))
    unknown = await asyncio.to_thread(run, "move", "--shard", "33", "--to", "pg9")
    assert unknown.returncode == 2
    assert "pg9" in unknown.stderr
    assert (await asyncio.to_thread(run, "move", "--shard", "100", "--to", "pg0")).returncode == 2
    back = await asyncio.to_thread(run, "move", "--shard", "33", "--to", "pg0")
    assert back.returncode == 0
    assert "pg1 -> pg0" in back.stdout


async def test_a_freeze_that_the_relay_holds_up_is_let_go_and_leaves_all_as_it_was(
    stack: Stack,
    service_config: ServiceConfig,
    api_bases: list[str],
    operator: dict[str, str],
    floor: Floor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events that the old server has not sent would come after those of the new one."""
    monkeypatch.setattr("reference.shards.BACKLOG_WAIT_S", 2.0)
    users = wallets_of(34, 2)
    frozen: list[int] = []

    async with traffic(api_bases, operator, users, clients=2) as found:
        await until(lambda: _true(len(found.refused) > 0))

        def reached(phase: Phase) -> None:
            if phase is Phase.VERIFIED:
                for relay in stack.nodes_of("relay"):
                    stack.pause(relay)
            elif phase is Phase.FROZEN:
                frozen.append(len(found.accepted))

        try:
            # What was committed before is projected already in most rounds; the rest is what the freeze waits for.
            monkeypatch.setattr("reference.shards._Move._projected", lambda *_: _true(value=True))
            monkeypatch.setattr("reference.shards.FREEZE_TRIES", 2)
            with pytest.raises(MoveRefused, match="published and projected"):
                await move_shard(service_config, stack.superuser, 34, 1, reached)
            assert len(frozen) == 2
            answered = len(found.accepted)
            await until(lambda: _true(len(found.accepted) > answered))
        finally:
            for relay in stack.nodes_of("relay"):
                stack.resume(relay)
    await drained(floor, users)
    await compare(found, floor.owner, {34: 0})


async def test_a_projection_that_is_behind_is_no_state_to_move_in(
    stack: Stack, service_config: ServiceConfig, floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new server's account of its progress would vouch for what it never saw."""
    monkeypatch.setattr("reference.shards.BACKLOG_WAIT_S", 1.0)
    (user,) = wallets_of(35, 1)
    stack.pause("projector0")
    try:
        await floor.fund([user])
        with pytest.raises(MoveRefused, match="projector"):
            await move_shard(service_config, stack.superuser, 35, 1)
    finally:
        stack.resume("projector0")
    moved = await move_shard(service_config, stack.superuser, 35, 1)
    assert moved.moved
    row = await floor.owner[1].fetchrow("SELECT seq FROM wallet_balance_projection WHERE user_id = $1", user)
    assert row["seq"] == 1
    await move_shard(service_config, stack.superuser, 35, 0)


async def test_a_redis_in_trouble_before_the_freeze_is_waited_for(
    stack: Stack, service_config: ServiceConfig, floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (user,) = wallets_of(36, 1)
    await floor.fund([user])
    stack.pause("redis")
    try:
        monkeypatch.setattr("reference.shards.REDIS_WAIT_S", 0.5)
        with pytest.raises(MoveRefused, match="Redis does not answer"):
            await move_shard(service_config, stack.superuser, 36, 1)
        monkeypatch.setattr("reference.shards.REDIS_WAIT_S", 15.0)
        moving = asyncio.create_task(move_shard(service_config, stack.superuser, 36, 1))
        failures = metrics.REGISTRY.get_sample_value("cache_errors_total")
        await until(lambda: _true(metrics.REGISTRY.get_sample_value("cache_errors_total") > failures))
    finally:
        stack.resume("redis")
    assert (await moving).moved


async def test_what_redis_kept_of_a_shard_does_not_count_after_its_move_whenever_redis_failed(
    stack: Stack, service_config: ServiceConfig, floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old server's cache is still vouched for: a reader that has not heard of the move would believe it."""
    monkeypatch.setattr("reference.shards.REDIS_WAIT_S", 0.5)
    (user,) = wallets_of(37, 1)
    await floor.fund([user])
    await drained(floor, [user])
    cache = Cache(service_config)
    try:
        seen: list[str | None] = []

        async def settled() -> bool:
            # The projector begins an epoch as well when it sees a shard leave, as it did in the test before.
            seen.append((await cache.get("pg0", user)).epoch)
            return len(seen) > 20 and set(seen[-20:]) == {seen[-1]}

        await until(settled)
        before = seen[-1]

        def reached(phase: Phase) -> None:
            if phase is Phase.PREPARED:
                stack.pause("projector0")  # It would begin an epoch of its own as soon as it sees the shard leave.
            elif phase is Phase.GIVEN_UP:
                stack.pause("redis")

        try:
            with pytest.raises(MoveUnfinished, match="Redis does not answer"):
                await move_shard(service_config, stack.superuser, 37, 1, reached)
        finally:
            stack.resume("redis")
        await until(lambda: _true(cache.available))
        again = await move_shard(service_config, stack.superuser, 37, 1)
        assert (again.moved, again.resumed) == (False, True)
        assert (await cache.get("pg0", user)).epoch != before
    finally:
        stack.resume("projector0")
        await cache.close()
