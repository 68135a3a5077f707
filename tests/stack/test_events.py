"""Events on the real stack: lanes, dead letters, replay, rebuild, freshness, cache epochs and the balance feed."""

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from compose.stack import Stack
from reference.balance_feed import BalanceFeed
from reference.balance_reader import BalanceReader
from reference.bus import Consumer, Message, Publisher, end_offsets
from reference.cache import EPOCH_PREFIX, KEY_PREFIX, Balance, Cache, impatient_redis
from reference.commands import Contra, EntryType
from reference.config import ServiceConfig
from reference.dlq import Letter, letters
from reference.errors import UnknownOutcome
from reference.relay import Relay
from reference.service import DIED_EXIT
from reference.store import Store
from reference.uuid7 import uuid7
from reference.writer import Posting, post_entries

ROOT = Path(__file__).parents[2]
WITHIN_S = 30.0


@pytest.fixture
async def api(service_config: ServiceConfig) -> AsyncIterator[Store]:
    opened = Store(service_config, "ledger_api")
    yield opened
    await opened.close()


@pytest.fixture
async def cache(service_config: ServiceConfig) -> AsyncIterator[Cache]:
    opened = Cache(service_config)
    yield opened
    await opened.close()


@pytest.fixture
def publisher(service_config: ServiceConfig) -> Any:
    opened = Publisher(service_config, "test")
    yield opened
    opened.close()


async def until(condition: Callable[[], Awaitable[Any]], within_s: float = WITHIN_S) -> Any:
    """Wait for a condition and return what it returned; fails with its last answer."""
    deadline = time.monotonic() + within_s
    while not (answer := await condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {answer!r}"
        await asyncio.sleep(0.05)
    return answer


async def deposit(api: Store, user_id: int, count: int = 1) -> None:
    """Post deposits of 1 to one wallet in one transaction."""
    postings = [Posting(user_id, uuid.uuid4().hex, EntryType.CREDIT, 1, Contra.EXTERNAL) for _ in range(count)]
    async with api.connection(api.server_of(user_id)) as connection:
        await post_entries(connection, api.sql["post"], "API", postings)


def fresh_wallet(shard: int = 7) -> int:
    return (uuid.uuid4().int % 10**12 + 1) * 100 + shard


async def ledgerproof(stack: Stack, *arguments: str) -> Any:
    """Run a command as a user does, beside whatever this test does, and return what it printed as JSON."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ledgerproof", *arguments, "--config", str(stack.config_path), "--json"),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, (out + err).decode()
    return json.loads(out)


def headers_of(event_id: str, event_type: str) -> list[tuple[str, str | bytes | None]]:
    return [
        ("event-id", event_id.encode()),
        ("event-type", event_type.encode()),
        ("timestamp", b"2026-01-31T12:00:00+00:00"),
    ]


# --- lanes ------------------------------------------------------------------------------------------------


@pytest.fixture
async def topic(service_config: ServiceConfig) -> str:
    name = f"lanes-{uuid.uuid4().hex}"
    admin = AdminClient({"bootstrap.servers": service_config.kafka_bootstrap})
    partitions = service_config.partitions_of(name)
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result()
    return name


async def publish_numbers(publisher: Publisher, topic: str, count: int) -> None:
    """Publish messages for lanes 0 and 1 in turns; those of one key are in order."""
    records = [
        (topic, str(number % 20), json.dumps({"n": number}).encode(), headers_of(str(number), "Number"))
        for number in range(count)
    ]
    assert None not in await publisher.publish(records)


class Lanes:
    """A consumer of numbers whose lanes can be blocked."""

    def __init__(self, config: ServiceConfig, topic: str, held_max: int = 40_000) -> None:
        self.seen: dict[int, list[int]] = {0: [], 1: []}
        self.open = {0: asyncio.Event(), 1: asyncio.Event()}
        self.most_held = 0
        self.consumer = Consumer(config, topic, [topic], f"{topic}-member", self.lane_of, held_max=held_max)
        self._running = asyncio.create_task(self._run())

    @staticmethod
    def lane_of(message: Message) -> int:
        return int(message.payload["n"]) % 2

    async def handle(self, lane: int, messages: list[Message]) -> None:
        await self.open[lane].wait()
        self.seen[lane] += [message.payload["n"] for message in messages]

    async def _run(self) -> None:
        while True:
            await self.consumer.run_once(self.handle)
            held = sum(len(lane.waiting) for lane in self.consumer._lanes.values())
            self.most_held = max(self.most_held, held)

    async def close(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.consumer.close()


async def test_a_lane_that_hangs_delays_no_other(service_config, topic, publisher) -> None:
    await publish_numbers(publisher, topic, 3_000)
    lanes = Lanes(service_config, topic)
    lanes.open[1].set()
    try:
        await until(lambda: _true(len(lanes.seen[1]) == 1_500))
        assert lanes.seen[0] == []
        lanes.open[0].set()
        await until(lambda: _true(len(lanes.seen[0]) == 1_500))
    finally:
        lanes.open[0].set()
        await lanes.close()
    for lane in (0, 1):
        for key in range(lane, 20, 2):
            of_key = [number for number in lanes.seen[lane] if number % 20 == key]
            assert of_key == sorted(of_key), "messages of one key changed their order"


async def _true(value: object) -> object:
    return value


async def test_a_hanging_lane_holds_a_bounded_number_of_messages_and_keeps_its_membership(
    service_config, topic, publisher
) -> None:
    await publish_numbers(publisher, topic, 12_000)
    lanes = Lanes(service_config, topic, held_max=2_000)
    try:
        await until(lambda: _true(lanes.consumer._paused))
        before = lanes.consumer.assignments
        lanes.open[1].set()
        await until(lambda: _true(lanes.seen[1]))
        lanes.open[0].set()
        await until(lambda: _true(len(lanes.seen[0]) + len(lanes.seen[1]) == 12_000))
        assert lanes.most_held <= 2_000 + service_config.consumer_batch
        assert lanes.consumer.assignments == before
    finally:
        for event in lanes.open.values():
            event.set()
        await lanes.close()
    assert sorted(lanes.seen[0] + lanes.seen[1]) == list(range(12_000))


async def test_what_was_not_finished_is_repeated_by_the_next_member_and_nothing_else(
    service_config, topic, publisher
) -> None:
    await publish_numbers(publisher, topic, 2_000)
    first = Lanes(service_config, topic)
    first.open[1].set()
    await until(lambda: _true(len(first.seen[1]) == 1_000))
    await first.close()
    # Lane 0 never finished anything, so no offset of a partition that has messages of it may be behind them.
    second = Lanes(service_config, topic)
    for event in second.open.values():
        event.set()
    try:
        await until(lambda: _true(len(second.seen[0]) == 1_000))
    finally:
        await second.close()
    assert sorted(second.seen[0]) == list(range(0, 2_000, 2))
    assert set(first.seen[1]) == set(range(1, 2_000, 2))


async def test_only_content_makes_a_message_poison(service_config, topic, publisher) -> None:
    await publish_numbers(publisher, topic, 40)
    fails = True

    class Faulty(Lanes):
        async def handle(self, lane: int, messages: list[Message]) -> None:
            if lane == 0 and fails:
                raise UnknownOutcome("the server does not answer")
            if any(message.payload["n"] == 7 for message in messages):
                raise ValueError("seven")
            await super().handle(lane, messages)

    lanes = Faulty(service_config, topic)
    for event in lanes.open.values():
        event.set()
    try:
        await until(lambda: _true(len(lanes.seen[1]) == 19))
        fails = False
        await until(lambda: _true(len(lanes.seen[0]) == 20))
    finally:
        await lanes.close()
    buried = [letter for letter in await asyncio.to_thread(letters, service_config) if letter.group == topic]
    assert [(letter.event_id, letter.cause) for letter in buried] == [("7", "seven")]


# --- dead letters -----------------------------------------------------------------------------------------


async def buried(config: ServiceConfig, key: str) -> Letter | None:
    found = [letter for letter in await asyncio.to_thread(letters, config) if letter.key == key]
    return found[-1] if found else None


async def test_an_undecodable_message_is_buried_with_its_origin_and_content(
    stack, service_config, publisher, api_bases
) -> None:
    key = uuid.uuid4().hex
    ((partition, offset),) = await publisher.publish([("wallet.posted", key, b"\xff{", [("event-id", b"e")])])
    letter = await until(lambda: buried(service_config, key))
    assert (letter.group, letter.origin, letter.event_id) == ("projector", f"wallet.posted/{partition}/{offset}", "e")
    assert "event-type" in letter.cause
    opened = await ledgerproof(stack, "dlq", "show", letter.id)
    assert (opened["value"], opened["value_bytes"], opened["headers"]) == ("\\xff{", 2, [["event-id", "e"]])
    metrics = f"http://127.0.0.1:{stack.port('projector0')}/metrics"
    async with aiohttp.ClientSession() as session, session.get(metrics) as response:
        text = await response.text()
    (line,) = [line for line in text.splitlines() if line.startswith('events_dead_lettered_total{group="projector"}')]
    assert float(line.split()[-1]) >= 1


@pytest.mark.parametrize(
    "change", [{"seq": "x"}, {"seq": 0}, {"balance": -1}, {"balance": 2**63}, {"user_id": 0}, {"user_id": "joe"}]
)
async def test_a_message_with_wrong_types_or_values_is_buried_and_its_neighbours_are_applied(
    service_config, publisher, superuser_dsn, api, change
) -> None:
    wallet, event_id = fresh_wallet(), str(uuid.uuid4())
    good = {"user_id": wallet, "seq": 1, "balance": 5}
    # Good entries before and behind it in the same partition, posted for real.
    await deposit(api, wallet, 2)
    bad = json.dumps(good | change).encode()
    await publisher.publish([("wallet.posted", str(wallet), bad, headers_of(event_id, "EntryPosted"))])
    await deposit(api, wallet, 1)
    letter = await until(lambda: buried(service_config, str(wallet)))
    assert letter.event_id == event_id

    async def projected() -> bool:
        row = await api.fetchrow(api.server_of(wallet), "projected", wallet % 100, wallet)
        return row is not None and (row["seq"], row["balance"]) == (3, 3)

    await until(projected)


async def test_a_letter_is_replayed_once_its_cause_is_repaired_and_a_second_replay_says_so(
    stack, service_config, publisher, floor
) -> None:
    match_id, bet_id, user_id, event_id = str(uuid7()), str(uuid7()), fresh_wallet(), str(uuid7())
    payload = {"bet_id": bet_id, "user_id": user_id, "seq": 1, "amount": -100, "balance": 5, "match_id": match_id}
    payload |= {"outcome": "HOME", "side": "BACK", "odds": 250, "stake": 100, "reserve": 100}
    record = ("bet.created", str(user_id), json.dumps(payload).encode(), headers_of(event_id, "BetCreated"))
    await publisher.publish([record])
    letter = await until(lambda: buried(service_config, str(user_id)))
    assert letter.group == "matcher"
    assert match_id in letter.cause
    assert letter.id in [item["id"] for item in await ledgerproof(stack, "dlq", "list")]

    home = floor.owner[floor.api.home_of(uuid.UUID(match_id))]
    await home.execute(
        "INSERT INTO matches (match_id, outcomes, closes_at) VALUES ($1, '{HOME,DRAW,AWAY}', now() + interval '1 h')",
        match_id,
    )
    assert await ledgerproof(stack, "dlq", "replay", letter.id) == {"replayed": [letter.id], "left_alone": {}}
    query = "SELECT count(*) FROM orders WHERE bet_id = $1 AND event_id = $2"
    await until(lambda: home.fetchval(query, bet_id, event_id))
    assert await ledgerproof(stack, "dlq", "replay", letter.id) == {
        "replayed": [],
        "left_alone": {letter.id: "replayed"},
    }
    assert (await ledgerproof(stack, "dlq", "replay", letter.id, "--again"))["replayed"] == [letter.id]
    (told,) = [item for item in await ledgerproof(stack, "dlq", "list", "--all") if item["id"] == letter.id]
    assert (told["resolution"], told["replays"]) == ("replayed", 2)
    assert letter.id not in [item["id"] for item in await ledgerproof(stack, "dlq", "list")]
    assert await home.fetchval("SELECT count(*) FROM orders WHERE match_id = $1", match_id) == 1
    # The bet was never paid for, so its order must not stay in a book that other tests look at.
    await home.execute("DELETE FROM orders WHERE bet_id = $1", bet_id)


async def test_a_dropped_letter_waits_no_more(stack, service_config, publisher) -> None:
    key = uuid.uuid4().hex
    await publisher.publish([("match.settled", key, b"[]", headers_of("d", "MatchSettled"))])
    letter = await until(lambda: buried(service_config, key))
    assert (await ledgerproof(stack, "dlq", "drop", letter.id))["dropped"] == [letter.id]
    assert (await ledgerproof(stack, "dlq", "replay", letter.id))["left_alone"] == {letter.id: "dropped"}


# --- rebuild and replay under load ------------------------------------------------------------------------


class Load:
    """Deposits to some wallets and reads of their projections, until stopped; a row never goes back or away."""

    def __init__(self, api: Store, users: list[int]) -> None:
        self.api, self.users = api, users
        self.reads = 0
        self._stop = False
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    async def _write(self) -> None:
        number = 0
        while not self._stop:
            await deposit(self.api, self.users[number % len(self.users)])
            number += 1

    async def _read(self) -> None:
        newest: dict[int, int] = {}
        while not self._stop:
            for user_id in self.users:
                row = await self.api.fetchrow(self.api.server_of(user_id), "projected", user_id % 100, user_id)
                seq = 0 if row is None else row["seq"]
                assert seq >= newest.get(user_id, 0), f"wallet {user_id} went from {newest[user_id]} to {seq}"
                newest[user_id] = seq
                self.reads += 1

    async def stop(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)


async def agree(api: Store, users: list[int]) -> bool:
    """Whether the projection has what the ledger has."""
    for user_id in users:
        head = await api.fetchrow(api.server_of(user_id), "head", user_id % 100, user_id)
        row = await api.fetchrow(api.server_of(user_id), "projected", user_id % 100, user_id)
        if head is None or row is None or (head["seq"], head["balance"]) != (row["seq"], row["balance"]):
            return False
    return True


@pytest.mark.parametrize("from_zero", [False, True])
async def test_a_rebuild_under_load_repairs_every_row_and_sets_none_back(
    stack, api, superuser_dsn, service_config, cache, from_zero
) -> None:
    users = [fresh_wallet(shard) for shard in (3, 7, 60, 90)]
    wrong, missing, phantom, ahead = (fresh_wallet(8) for _ in range(4))
    for user_id in (*users, wrong, missing, ahead):
        await deposit(api, user_id, 2)
    await until(lambda: agree(api, [*users, wrong, missing, ahead]))
    server = api.server_of(wrong)
    name = service_config.servers[server].name
    owner = await asyncpg.connect(superuser_dsn[server])
    table = "wallet_balance_projection"
    await owner.execute(f"UPDATE {table} SET balance = 77 WHERE user_id = $1", wrong)
    await owner.execute(f"UPDATE {table} SET seq = 99, balance = 99 WHERE user_id = $1", ahead)
    await owner.execute(f"DELETE FROM {table} WHERE user_id = $1", missing)
    await owner.execute(f"INSERT INTO {table} VALUES (8, $1, 5, 5, now())", phantom)
    await owner.close()
    reader = BalanceReader(api, cache)
    assert (await reader.read(phantom)).balance.balance == 5
    load = Load(api, users)
    try:
        done = await ledgerproof(stack, "projection", "rebuild", *(["--from-zero"] if from_zero else []))
    finally:
        await load.stop()
    assert load.reads > 100
    (of_server,) = [item for item in done if item["server"] == name]
    assert of_server["wrong"] >= 3
    assert of_server["wallets"] >= 3
    assert not of_server["resumed"]
    await until(lambda: agree(api, [*users, wrong, missing, ahead]))
    assert await api.fetchrow(server, "projected", 8, phantom) is None
    # What Redis held of the wrong rows is gone with them.
    assert await reader.read(phantom) is None
    assert (await reader.read(wrong)).balance.balance == 2
    await reader.close()


async def test_a_killed_rebuild_goes_on_where_it_was(stack, service_config, api) -> None:
    first, second = fresh_wallet(0), fresh_wallet(0)
    for user_id in (first, second):
        await deposit(api, user_id)
    store = Store(service_config, "ledger_projector")
    shards = [shard for shard, holder in enumerate(service_config.routing) if holder == 0]
    await store.fetch(0, "begin_rebuild", shards, True, True)
    # Killed after a shard and a page of the next one.
    while not (await store.fetch(0, "rebuild_page", shards[1], 1_000))[0]["last"]:
        pass
    assert (await store.fetch(0, "rebuild_page", shards[0], 1))[0]["rebuilt"] == 1
    left = [row["shard"] for row in await store.fetch(0, "rebuilds", shards)]
    assert left == [shard for shard in shards if shard != shards[1]]
    done = await ledgerproof(stack, "projection", "rebuild", "--server", service_config.servers[0].name, "--from-zero")
    assert [(item["server"], item["resumed"]) for item in done] == [(service_config.servers[0].name, True)]
    assert await store.fetch(0, "rebuilds", shards) == []
    await store.close()


async def test_events_replayed_under_load_have_no_second_effect(stack, service_config, api, superuser_dsn) -> None:
    users = [fresh_wallet(shard) for shard in (3, 60)]
    for user_id in users:
        await deposit(api, user_id, 3)
    await until(lambda: agree(api, users))
    counts = """SELECT (SELECT count(*) FROM orders) AS orders, (SELECT count(*) FROM fills) AS fills,
                       (SELECT count(*) FROM wallet_ledger WHERE settlement_version IS NOT NULL) AS payments"""
    owners = [await asyncpg.connect(dsn) for dsn in superuser_dsn]
    before = [tuple(await owner.fetchrow(counts)) for owner in owners]
    ends = end_offsets(service_config, ["wallet.posted"])
    load = Load(api, users)
    try:
        done = await ledgerproof(stack, "events", "replay", "--from", "1h")
    finally:
        await load.stop()
    assert done["events"]["wallet.posted"] >= 6
    grown = sum(end_offsets(service_config, ["wallet.posted"]).values()) - sum(ends.values())
    assert grown >= done["events"]["wallet.posted"]
    await until(lambda: agree(api, users))
    assert [tuple(await owner.fetchrow(counts)) for owner in owners] == before
    for owner in owners:
        await owner.close()


# --- freshness --------------------------------------------------------------------------------------------


async def balance(stack: Stack, user_id: int, query: str = "") -> dict[str, Any]:
    api, headers = f"http://127.0.0.1:{stack.port('api0')}", {"authorization": f"Bearer {stack.token()}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{api}/v1/wallets/{user_id}/balance{query}") as response,
    ):
        assert response.status == 200
        answer: dict[str, Any] = await response.json()
        return answer


async def test_an_idle_wallet_is_fresh_as_long_as_the_projection_is(api, stack) -> None:
    user_id = fresh_wallet()
    await deposit(api, user_id)

    async def idle_and_fresh() -> bool:
        view = await balance(stack, user_id)
        old = view["as_of_ms"] - view["updated_at_ms"] > 1_000
        return view["source"] in ("redis", "projection") and old and not view["stale"]

    await until(idle_and_fresh)
    stack.kill("projector0")
    try:
        # What was said before the kill holds for half a second; from then on nobody can know.
        await until(lambda: _stale(stack, user_id), within_s=10)
        await deposit(api, user_id)
        view = await balance(stack, user_id)
        assert (view["stale"], view["seq"]) == (True, 1)
        # A session that knows of the entry gets it all the same.
        view = await balance(stack, user_id, "?min_seq=2")
        assert (view["stale"], view["seq"], view["source"]) == (False, 2, "ledger")
    finally:
        await asyncio.to_thread(stack.start_node, "projector0")
    await until(idle_and_fresh)
    assert (await balance(stack, user_id))["seq"] == 2


async def _stale(stack: Stack, user_id: int) -> bool:
    return bool((await balance(stack, user_id))["stale"])


async def test_a_second_relay_waits_and_takes_over_from_a_dead_one(stack, service_config, api) -> None:
    store, publisher = Store(service_config, "ledger_relay"), Publisher(service_config, "second-relay")
    second = Relay(store, publisher, 0)
    user_id = fresh_wallet(0)
    assert await second.run_once() == 0
    assert second._connection is None, "two relays lead one server"
    stack.kill("relay0")
    try:
        await deposit(api, user_id)

        async def moved() -> int:
            return await second.run_once()

        await until(moved)
        await until(lambda: agree(api, [user_id]))
    finally:
        await second._drop()
        publisher.close()
        await store.close()
        await asyncio.to_thread(stack.start_node, "relay0")
    await deposit(api, user_id)
    await until(lambda: agree(api, [user_id]))


def _farewell(connection) -> None:
    """Let a connection read what a server says before it hangs up, and nothing of the hanging up yet."""
    fields = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
    connection._protocol.data_received(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)


async def test_a_servers_farewell_between_two_statements_costs_a_connection_and_nothing_else(service_config) -> None:
    store = Store(service_config, "ledger_api")
    try:
        async with store.connection(0) as connection:
            _farewell(connection)
        with pytest.raises(UnknownOutcome, match="another operation"):
            async with store.connection(0) as again:
                assert again is connection
                await again.fetchval("SELECT 1")
        async with store.connection(0) as fresh:
            assert await fresh.fetchval("SELECT 1") == 1
    finally:
        await store.close()


async def test_a_relay_survives_the_farewell_of_its_server(stack, service_config, api) -> None:
    store, publisher = Store(service_config, "ledger_relay"), Publisher(service_config, "third-relay")
    third, stopping, user_id = Relay(store, publisher, 0), asyncio.Event(), fresh_wallet(0)
    stack.kill("relay0")
    try:

        async def leads() -> bool:
            await third.run_once()
            return third._connection is not None

        await until(leads)
        _farewell(third._connection)
        running = asyncio.create_task(third.run(stopping))
        await deposit(api, user_id)
        await until(lambda: agree(api, [user_id]))
        stopping.set()
        await running
    finally:
        publisher.close()
        await store.close()
        await asyncio.to_thread(stack.start_node, "relay0")


async def test_a_dead_relay_makes_reads_stale_too(api, stack) -> None:
    user_id = fresh_wallet()
    await deposit(api, user_id)
    await until(lambda: agree(api, [user_id]))
    stack.kill("relay0")
    try:
        await until(lambda: _stale(stack, user_id), within_s=15)
    finally:
        await asyncio.to_thread(stack.start_node, "relay0")

    async def is_fresh() -> bool:
        view = await balance(stack, user_id)
        return not view["stale"] and view["source"] != "ledger"

    await until(is_fresh)


async def test_fresh_is_never_said_of_a_balance_that_lacks_an_old_entry(api, cache) -> None:
    """The promise itself, checked against the ledger's clock while entries come in."""
    user_id = fresh_wallet()
    await deposit(api, user_id)
    reader = BalanceReader(api, cache)
    committed: dict[int, int] = {1: 0}
    checked = 0
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        await deposit(api, user_id)
        head = await api.fetchrow(api.server_of(user_id), "head", user_id % 100, user_id)
        committed[head["seq"]] = head["now_ms"]
        for _ in range(3):
            reading = await reader.read(user_id)
            assert reading is not None
            if reading.stale:
                continue
            checked += 1
            missing = [
                seq for seq, at_ms in committed.items() if seq > reading.balance.seq and at_ms < reading.as_of_ms
            ]
            assert missing == [], f"as of {reading.as_of_ms} seq {reading.balance.seq} lacks {missing}"
            await asyncio.sleep(0.01)
    await reader.close()
    assert checked > 10


# --- the cache --------------------------------------------------------------------------------------------


async def test_a_late_write_loses_by_seq_and_by_epoch(cache) -> None:
    server, user_id, now = f"test-{uuid.uuid4().hex}", fresh_wallet(), time.monotonic()
    first = await cache.begin(server)
    assert first is not None
    assert await cache.put(server, first, [Balance(user_id, 30, 3, 1)], now) == first
    assert await cache.put(server, first, [Balance(user_id, 20, 2, 1)], now) == first
    assert (await cache.get(server, user_id)).balance == Balance(user_id, 30, 3, 1)
    # Somebody who may have missed a write empties the cache in one step.
    second = await cache.begin(server)
    assert second not in (None, first)
    assert (await cache.get(server, user_id)).balance is None
    # What was read before that is refused, even though nothing newer is there to win against it.
    assert await cache.put(server, first, [Balance(user_id, 30, 3, 1)], now) == second
    assert (await cache.get(server, user_id)).balance is None
    # And a value that was held back too long is not written at all.
    assert await cache.put(server, second, [Balance(user_id, 30, 3, 1)], now - 3600) is None
    await cache._redis.delete(EPOCH_PREFIX + server, f"{KEY_PREFIX}{user_id}")


async def test_wallets_that_are_asked_for_together_get_their_own_answers(cache) -> None:
    servers = [f"test-{uuid.uuid4().hex}" for _ in range(2)]
    epochs = {server: await cache.begin(server) for server in servers}
    wallets = {fresh_wallet(): servers[number % 2] for number in range(600)}
    for server, epoch in epochs.items():
        known = [Balance(user_id, 7 * user_id, 1, 1) for user_id, own in wallets.items() if own == server]
        assert await cache.put(server, epoch, known, time.monotonic()) == epoch
    garbled = next(iter(wallets))
    await cache._redis.set(f"{KEY_PREFIX}{garbled}", "neither seq nor balance")
    asked = [*wallets.items(), (fresh_wallet(), servers[0]), (garbled, "no such server")]
    found = await asyncio.gather(*(cache.get(server, user_id) for user_id, server in asked))
    for (user_id, server), one in zip(asked, found, strict=True):
        is_known = user_id in wallets and user_id != garbled
        assert one.balance == (Balance(user_id, 7 * user_id, 1, 1) if is_known else None)
        assert one.epoch == epochs.get(server)
    # A wallet that nobody could read counts again as soon as it is written.
    written = Balance(garbled, 5, 2, 1)
    await cache.put(wallets[garbled], epochs[wallets[garbled]], [written], time.monotonic())
    assert (await cache.get(wallets[garbled], garbled)).balance == written
    await cache._redis.delete(*(EPOCH_PREFIX + name for name in servers), *(f"{KEY_PREFIX}{user}" for user in wallets))


async def test_everybody_who_waits_for_a_redis_that_fails_gets_an_answer(service_config) -> None:
    lost = Cache(msgspec.structs.replace(service_config, redis_port=1))
    found = await asyncio.gather(*(lost.get("pg0", user_id) for user_id in range(1, 600)))
    assert {(one.balance, one.epoch) for one in found} == {(None, None)}
    assert not lost.available
    await lost.close()


async def test_connections_that_redis_has_closed_are_made_anew_and_nobody_notices(cache, service_config) -> None:
    server, user_id = service_config.servers[0].name, fresh_wallet()
    epoch = await cache.begin(server)
    known = Balance(user_id, 7, 1, 1)
    assert await cache.put(server, epoch, [known], time.monotonic()) == epoch
    async with impatient_redis(service_config, max_connections=1) as other:
        for _ in range(3):
            assert await other.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") > 0
            assert (await cache.get(server, user_id)).balance == known
            assert cache.available


async def cached_seq(cache: Cache, service_config: ServiceConfig, api: Store, user_id: int, seq: int) -> bool:
    found = await cache.get(service_config.servers[api.server_of(user_id)].name, user_id)
    return found.balance is not None and found.balance.seq == seq


@pytest.mark.parametrize("fault", ["flushed", "killed", "paused"])
async def test_redis_in_trouble_changes_no_answer(stack, service_config, api, cache, fault) -> None:
    user_id = fresh_wallet()
    await deposit(api, user_id)
    await until(lambda: cached_seq(cache, service_config, api, user_id, 1))
    if fault == "flushed":
        await cache._redis.flushall()
    elif fault == "killed":
        stack.kill("redis")
    else:
        stack.pause("redis", 30)
    try:
        await deposit(api, user_id)

        async def newest_and_fresh() -> bool:
            view = await balance(stack, user_id)
            assert view["seq"] == 2 or view["stale"] or view["as_of_ms"] <= written_ms
            return view["seq"] == 2 and not view["stale"]

        head = await api.fetchrow(api.server_of(user_id), "head", user_id % 100, user_id)
        written_ms = head["now_ms"]
        await until(newest_and_fresh)
    finally:
        if fault == "killed":
            await asyncio.to_thread(stack.start_node, "redis")
        elif fault == "paused":
            stack.resume("redis")

    async def from_redis_and_fresh() -> bool:
        view = await balance(stack, user_id)
        return (view["source"], view["seq"], view["stale"]) == ("redis", 2, False)

    await until(from_redis_and_fresh)


async def test_what_redis_missed_while_the_projector_was_new_is_never_called_fresh(
    stack, service_config, api, cache
) -> None:
    """A projector that starts beside a Redis that hangs has never learnt the epoch in which the old balance is."""
    user_id = fresh_wallet()
    await deposit(api, user_id)
    await until(lambda: cached_seq(cache, service_config, api, user_id, 1))
    stack.kill("projector0")
    stack.pause("redis", 60)
    try:
        await deposit(api, user_id)
        head = await api.fetchrow(api.server_of(user_id), "head", user_id % 100, user_id)
        await asyncio.to_thread(stack.start_node, "projector0")
        await until(lambda: agree(api, [user_id]))
    finally:
        stack.resume("redis")
    name = service_config.servers[api.server_of(user_id)].name

    # Nobody reads the wallet through the service meanwhile: that would put the new balance into Redis.
    async def vouched() -> bool:
        found = await cache.get(name, user_id)
        assert found.balance is None or found.balance.seq == 2 or found.complete_at_ms <= head["now_ms"], found
        return found.complete_at_ms > head["now_ms"]

    await until(vouched)


# --- the feed of balances ---------------------------------------------------------------------------------


async def test_a_listener_gets_every_change_in_order_and_goes_on_after_a_seq(service_config, api) -> None:
    user_id, other = fresh_wallet(), fresh_wallet()
    feed = BalanceFeed(service_config, "test-feed")
    try:
        async with await feed.subscribe(user_id) as updates, await feed.subscribe(other, after_seq=2) as others:
            for _ in range(3):
                await deposit(api, user_id)
            await deposit(api, other, 3)
            last = 0
            while last < 3:
                update = await asyncio.wait_for(anext(updates), WITHIN_S)
                assert (update.user_id, update.balance) == (user_id, update.seq)
                assert update.seq > last
                last = update.seq
            assert (await asyncio.wait_for(anext(others), WITHIN_S)).seq == 3
            assert feed.listeners == 2
        assert feed.listeners == 0
        # After a pause without listeners it begins again.
        async with await feed.subscribe(user_id, after_seq=3) as updates:
            await deposit(api, user_id)
            assert (await asyncio.wait_for(anext(updates), WITHIN_S)).seq == 4
    finally:
        await feed.close()


# --- processes that end themselves ------------------------------------------------------------------------


async def test_a_worker_whose_name_another_took_ends_itself(stack, service_config) -> None:
    thief = Consumer(service_config, "projector", ["wallet.posted", "bet.created"], "projector0", lambda _: 0)

    async def never(lane: int, messages: list[Message]) -> None:
        raise UnknownOutcome("the thief applies nothing")

    async def dead() -> bool:
        await thief.run_once(never)
        (node,) = [node for node in stack.status(memory=False) if node.name == "projector0"]
        return node.state == "dead"

    try:
        await until(dead, 60)
        assert "the process died" in stack.logs_tail("projector0", 40)
    finally:
        await thief.close()
        await asyncio.to_thread(stack.start_node, "projector0")
    assert DIED_EXIT != 0
