"""Event streams on the real stack: every change arrives, a client that returns misses nothing, ends are clean."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator

import aiohttp
import pytest
from test_api_limits import own_api

from reference.auth import Scope

__all__ = ["own_api"]


def new_user() -> int:
    return uuid.uuid4().int % 10**15 + 1


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, dict]]:
    """(id, data) of each event; comments and the retry hint are left out."""
    block: dict[str, str] = {}
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line:
            name, _, value = line.partition(": ")
            block[name] = value
            continue
        if "data" in block:
            assert block["event"] == "user.balance.updated"
            yield block["id"], json.loads(block["data"])
        block = {}


async def deposit(session: aiohttp.ClientSession, base: str, user_id: int, amount: int) -> int:
    headers = {"idempotency-key": uuid.uuid4().hex}
    url = f"{base}/v1/wallets/{user_id}/deposits"
    async with session.post(url, json={"amount_minor": amount}, headers=headers) as response:
        assert response.status == 202
        return (await response.json())["seq"]


async def until_seq(stream: AsyncIterator[tuple[str, dict]], seq: int) -> list[dict]:
    seen = []
    async with asyncio.timeout(60):
        async for number, data in stream:
            assert int(number) == data["seq"]
            seen.append(data)
            if data["seq"] >= seq:
                return seen
    raise AssertionError(f"the stream ended at {seen}")


async def test_a_stream_tells_every_change_and_its_reader_misses_nothing_while_away(api_bases, operator) -> None:
    user_id = new_user()
    url = f"{api_bases[0]}/v1/wallets/{user_id}/events"
    async with aiohttp.ClientSession(headers=operator) as session:
        await deposit(session, api_bases[0], user_id, 100)
        async with session.get(url) as response:
            assert response.headers["content-type"] == "text/event-stream"
            stream = events(response)
            first = await until_seq(stream, 1)
            assert [(event["seq"], event["balance_minor"]) for event in first] == [(1, 100)]
            await deposit(session, api_bases[1], user_id, 20)
            later = await until_seq(stream, 2)
            assert (later[-1]["user_id"], later[-1]["balance_minor"]) == (user_id, 120)
        await deposit(session, api_bases[0], user_id, 3)
        async with session.get(url, headers={"last-event-id": "2"}) as response:
            assert [event["balance_minor"] for event in await until_seq(events(response), 3)] == [123]
        async with session.get(url, headers={"last-event-id": "3"}) as response:
            stream = events(response)
            await deposit(session, api_bases[0], user_id, 4)
            assert [event["seq"] for event in await until_seq(stream, 4)] == [4]
        for wrong in ("x", "-1", "9" * 30):
            async with session.get(url, headers={"last-event-id": wrong}) as response:
                assert response.status == 400


@pytest.mark.usefixtures("stack")
async def test_streams_are_bounded_end_with_their_token_and_with_the_process(own_api, stack, operator) -> None:
    api = own_api(event_streams_max=2)
    user_id = new_user()
    url = f"{api.base}/v1/wallets/{user_id}/events"
    async with aiohttp.ClientSession() as session:
        async with session.get(url, headers=operator) as one, session.get(url, headers=operator) as two:
            assert (one.status, two.status) == (200, 200)
            async with session.get(url, headers=operator) as three:
                assert (three.status, three.headers["x-admitted"]) == (503, "0")
        async with asyncio.timeout(60):
            while True:
                # The streams that were left make room as soon as the process notices.
                short = {"authorization": f"Bearer {stack.token(Scope.WALLET, user_id=user_id, ttl_s=-2)}"}
                async with session.get(url, headers=short) as expiring:
                    # The clock's leeway of five seconds has three left for this token.
                    said = await expiring.read()
                if expiring.status == 200:
                    break
                assert expiring.status == 503
                await asyncio.sleep(0.1)
        assert said.startswith(b"retry:")
        async with session.get(url, headers=operator) as open_stream:
            reading = asyncio.create_task(open_stream.read())
            api.terminate()
            async with asyncio.timeout(30):
                try:
                    assert b"retry:" in await reading
                except aiohttp.ClientPayloadError as error:
                    pytest.fail(f"the stream was cut: {error}\n{api.log.read_text()}")
    code, log = await asyncio.to_thread(api.stop)
    assert code == 0, log
