"""The writer's decisions that need no database: batching, deadlines, comparison of commands under one key."""

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from reference import writer as writer_module
from reference.cache import Balance
from reference.commands import Contra, EntryType
from reference.config import ROLES, ServerConfig, ServiceConfig
from reference.errors import DeadlineExceeded, QueueFull, ServerUnavailable
from reference.projector import newest
from reference.relay import publishable
from reference.store import Store, text_array
from reference.tracing import Tracing
from reference.writer import HOT_COMMANDS, Posting, Writer, arguments, difference


def _config(**changes: object) -> ServiceConfig:
    fields: dict[str, object] = {
        "servers": [ServerConfig("pg0", "127.0.0.1", 1)],
        "routing": [0] * 100,
        "passwords": dict.fromkeys(ROLES, "secret"),
        "kafka_bootstrap": "127.0.0.1:2",
        "redis_host": "127.0.0.1",
        "redis_port": 3,
    }
    return ServiceConfig(**(fields | changes))


def _writer(config: ServiceConfig, store: Store | None = None) -> Writer:
    return Writer(store or Store(config, "ledger_api"), 0, "API", Tracing(config, "api0"))


def _posting(user_id: int = 1, key: str = "k") -> Posting:
    return Posting(user_id, key, EntryType.CREDIT, 5, Contra.EXTERNAL)


@pytest.mark.parametrize(
    ("asked", "stored", "field"),
    [
        ({"op": "deposit", "amount_minor": 5}, {"op": "deposit", "amount_minor": 5}, None),
        ({"op": "deposit", "amount_minor": 5}, {"op": "deposit", "amount_minor": 6}, "amount_minor"),
        ({"op": "deposit", "amount_minor": 5}, {"op": "withdraw", "amount_minor": 6}, "op"),
        ({"op": "bet", "odds": 200}, {"op": "bet", "odds": 200, "stake_minor": 1}, "stake_minor"),
    ],
)
def test_a_second_body_under_a_key_is_named_by_its_first_differing_field(asked, stored, field) -> None:
    assert difference(asked, json.dumps(stored)) == field


def test_one_batch_never_holds_a_key_twice_and_keeps_the_order() -> None:
    async def scenario() -> list[list[str]]:
        writer = _writer(_config())
        waiting = [
            asyncio.ensure_future(writer.post(_posting(user, key)))
            for user, key in [(1, "a"), (1, "a"), (2, "a"), (1, "b"), (1, "a")]
        ]
        await asyncio.sleep(0)
        batches = []
        while batch := writer._take_batch():
            batches.append([f"{item.posting.user_id}{item.posting.key}" for item in batch])
        for future in waiting:
            future.cancel()
        return batches

    assert asyncio.run(scenario()) == [["1a", "2a"], ["1a", "1b"], ["1a"]]


def test_what_stays_behind_in_the_queue_keeps_its_wallets_order() -> None:
    async def scenario() -> tuple[list[str], list[str], list[str]]:
        writer = _writer(_config())
        asked = [(1, "a"), (2, "a"), (1, "a"), (1, "b"), (2, "b"), (3, "a")]
        waiting = [asyncio.ensure_future(writer.post(_posting(user, key))) for user, key in asked]
        await asyncio.sleep(0)
        writer._in_lanes = {2}  # another lane is posting to this wallet
        first = [f"{item.posting.user_id}{item.posting.key}" for item in writer._take_batch()]
        writer._in_lanes = set()
        second = [f"{item.posting.user_id}{item.posting.key}" for item in writer._take_batch()]
        third = [f"{item.posting.user_id}{item.posting.key}" for item in writer._take_batch()]
        for future in waiting:
            future.cancel()
        return first, second, third

    assert asyncio.run(scenario()) == (["1a", "3a"], ["2a", "1a", "1b", "2b"], [])


class _Posts:
    """Stands for Postgres: accepts every batch and notes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.posted: list[str] = []
        self.batches: list[list[int]] = []
        monkeypatch.setattr(writer_module, "post_entries", self.post)
        monkeypatch.setattr(Store, "connect", self.connect)

    async def connect(self, server: int) -> Any:
        class Connection:
            def is_closed(self) -> bool:
                return False

            def terminate(self) -> None:
                pass

        return Connection()

    async def post(self, connection: Any, sql: str, created_by: str, postings: list[Posting]) -> list[dict[str, Any]]:
        await asyncio.sleep(0.001)
        self.posted += [f"{posting.user_id} {posting.key}" for posting in postings]
        self.batches.append([posting.user_id for posting in postings])
        return [{"status": "ACCEPTED", "entry_seq": 1, "entry_balance": 5}] * len(postings)


def test_a_bulk_of_one_wallets_commands_is_answered_whole_in_order_and_the_writer_can_stop(monkeypatch) -> None:
    """More than a batch of them: what is behind the commands that went to the hot lane must not be left lying."""
    posts = _Posts(monkeypatch)

    async def scenario() -> None:
        writer = _writer(_config())
        writer.start()
        async with asyncio.timeout(10):
            commands = [(1, str(n)) for n in range(1000)] + [(2, "behind")]
            done = await asyncio.gather(*(writer.post(_posting(user, key)) for user, key in commands))
            assert all(posted.outcome == "ACCEPTED" for posted in done)
            await writer.stop()

    asyncio.run(scenario())
    assert [posted for posted in posts.posted if posted.startswith("1 ")] == [f"1 {n}" for n in range(1000)]


def test_what_of_a_hot_wallet_is_deep_in_the_queue_stays_before_what_comes_later(monkeypatch) -> None:
    posts = _Posts(monkeypatch)

    async def scenario() -> None:
        writer = _writer(_config())
        commands = [(1, f"a{n}") for n in range(20)] + [(10 + n, "x") for n in range(500)] + [(1, "early")]
        waiting = [asyncio.ensure_future(writer.post(_posting(user, key))) for user, key in commands]
        await asyncio.sleep(0)
        writer.start()
        for _ in range(10):
            if 1 not in writer._hot_commands:
                await asyncio.sleep(0)  # the lanes take turns at their first batches
        assert 1 in writer._hot_commands
        waiting.append(asyncio.ensure_future(writer.post(_posting(1, "late"))))
        async with asyncio.timeout(10):
            await asyncio.gather(*waiting)
            await writer.stop()

    asyncio.run(scenario())
    assert [posted for posted in posts.posted if posted.startswith("1 ")][-3:] == ["1 a19", "1 early", "1 late"]


def test_two_lanes_never_post_to_one_wallet_at_once_and_keep_its_order(monkeypatch) -> None:
    posts = _Posts(monkeypatch)
    at_once: list[set[int]] = []
    most = 0
    plain = posts.post

    async def watched(connection: Any, sql: str, created_by: str, postings: list[Posting]) -> list[dict[str, Any]]:
        nonlocal most
        mine = {posting.user_id for posting in postings}
        assert all(mine.isdisjoint(others) for others in at_once)
        at_once.append(mine)
        most = max(most, len(at_once))
        try:
            return await plain(connection, sql, created_by, postings)
        finally:
            at_once.remove(mine)

    monkeypatch.setattr(writer_module, "post_entries", watched)
    drawn = random.Random(7)
    commands = [(drawn.randrange(1, 600), str(n)) for n in range(3000)]

    async def scenario() -> None:
        writer = _writer(_config())
        writer.start()
        async with asyncio.timeout(20):
            await asyncio.gather(*(writer.post(_posting(user, key)) for user, key in commands))
            await writer.stop()

    asyncio.run(scenario())
    assert most >= 2, "the second lane must have worked"
    for user in {user for user, _ in commands}:
        own = [int(posted.split()[1]) for posted in posts.posted if posted.startswith(f"{user} ")]
        assert own == sorted(own), f"wallet {user} was posted out of order"
    assert len(posts.posted) == len(commands)


def test_a_wallet_with_many_commands_goes_to_its_own_lane_in_its_order() -> None:
    async def scenario() -> tuple[list[int], list[str], list[int], list[str]]:
        writer = _writer(_config())
        waiting = [asyncio.ensure_future(writer.post(_posting(2 + n, "x"))) for n in range(2)]
        waiting += [asyncio.ensure_future(writer.post(_posting(1, str(n)))) for n in range(HOT_COMMANDS + 1)]
        await asyncio.sleep(0)
        others = [item.posting.user_id for item in writer._take_batch()]
        # While one of its commands is in the lane, the next ones are sent after it, however few they are.
        waiting += [asyncio.ensure_future(writer.post(_posting(user, "last"))) for user in (1, 2)]
        await asyncio.sleep(0)
        then = [item.posting.user_id for item in writer._take_batch()]
        first = writer._take_hot_batch(4)
        rest = writer._take_hot_batch(100)
        writer._left_hot_lane([*first, *rest])
        waiting.append(asyncio.ensure_future(writer.post(_posting(1, "later"))))
        await asyncio.sleep(0)
        after = [item.posting.key for item in writer._take_batch()]
        for future in waiting:
            future.cancel()
        return others, [item.posting.key for item in (*first, *rest)], then, after

    others, lane, then, after = asyncio.run(scenario())
    assert others == [2, 3]
    assert lane == [*(str(n) for n in range(HOT_COMMANDS + 1)), "last"]
    assert then == [2]
    assert after == ["later"], "a wallet that has cooled down is one of the others again"


def test_the_lane_of_hot_wallets_never_sends_a_key_twice_at_once_and_counts_as_waiting() -> None:
    async def scenario() -> list[int]:
        writer = _writer(_config(writer_queue=2 * HOT_COMMANDS))
        waiting = [asyncio.ensure_future(writer.post(_posting(1, str(n % 12)))) for n in range(2 * HOT_COMMANDS)]
        await asyncio.sleep(0)
        assert writer._take_batch() == []
        with pytest.raises(QueueFull):
            await writer.post(_posting(7))
        sizes = [len(writer._take_hot_batch(100)) for _ in range(2)]
        for future in waiting:
            future.cancel()
        return sizes

    assert asyncio.run(scenario()) == [12, 2 * HOT_COMMANDS - 12]


def test_a_full_queue_refuses_before_anything_is_sent() -> None:
    async def scenario() -> None:
        writer = _writer(_config(writer_queue=2))
        waiting = [asyncio.ensure_future(writer.post(_posting(key=str(n)))) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await writer.post(_posting(key="third"))
        for future in waiting:
            future.cancel()

    asyncio.run(scenario())


def test_an_unreachable_server_refuses_at_once_and_definitely() -> None:
    async def scenario() -> None:
        writer = _writer(_config())
        writer.start()
        with pytest.raises(ServerUnavailable) as raised:
            await writer.post(_posting())
        assert raised.value.definite
        await writer.stop()
        with pytest.raises(ServerUnavailable):
            await writer.post(_posting())

    asyncio.run(scenario())


def test_a_command_past_its_deadline_is_refused_while_the_database_hangs() -> None:
    async def scenario() -> None:
        async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()  # accepts the connection and never answers, as a stopped process does
            writer.close()

        server = await asyncio.start_server(hang, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        config = _config(servers=[ServerConfig("pg0", "127.0.0.1", port)], command_deadline_ms=100)
        store = Store(config, "ledger_api")
        writer = _writer(config, store)
        writer.start()
        first = asyncio.ensure_future(writer.post(_posting(key="in the batch")))
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlineExceeded):
            await writer.post(_posting(key="in the queue"))
        with pytest.raises(ServerUnavailable):
            await first
        await writer.stop()
        await store.close()
        server.close()

    asyncio.run(scenario())


def test_the_arrays_of_the_posting_function_are_parallel() -> None:
    created_by, *arrays = arguments("API", [_posting(1, "a"), _posting(2, "b")])
    assert created_by == "API"
    assert len(arrays) == 14
    assert arrays[:2] == [[1, 2], '{"a","b"}']
    assert all(len(array) == 2 if isinstance(array, list) else array.count(",") == 1 for array in arrays)


def test_texts_become_the_literal_of_an_array() -> None:
    assert text_array([]) == "{}"
    assert text_array([None, None]) == "{NULL,NULL}"
    assert text_array(["a", EntryType.CREDIT, ""]) == '{"a","CREDIT",""}'
    assert text_array(["NULL", None, "a,b}"]) == '{"NULL",NULL,"a,b}"}'
    assert text_array(['say "hi"', "back\\slash", None]) == '{"say \\"hi\\"","back\\\\slash",NULL}'


def test_a_row_behind_an_unacknowledged_row_of_its_key_is_not_marked() -> None:
    rows = [{"id": n, "partition_key": key} for n, key in [(1, "a"), (2, "b"), (3, "a"), (4, "b"), (5, "c")]]
    sent = (0, 7)
    assert publishable(rows, [None, sent, sent, sent, sent]) == [2, 4, 5]


def test_the_newest_event_of_a_wallet_decides_whatever_the_order() -> None:
    events = [(1, 2, 20), (1, 3, 30), (2, 1, 10), (1, 2, 20)]
    messages = [
        SimpleNamespace(payload={"user_id": user, "seq": seq, "balance": balance}, committed_at_ms=seq * 7)
        for user, seq, balance in events
    ]
    expected = {1: Balance(1, 30, 3, 21), 2: Balance(2, 10, 1, 7)}
    assert newest(messages) == expected
    assert newest(reversed(messages)) == expected
