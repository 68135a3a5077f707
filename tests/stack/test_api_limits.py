"""The rate limit, the drain, many connections, and an API that says when it cannot work: on processes of their own."""

import asyncio
import json
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import aiohttp
import grpc
import pytest
from api_process import ApiProcess
from msgspec.structs import replace

from reference.api import Api
from reference.auth import Scope
from reference.errors import RateLimited
from reference.limiter import Limiter
from reference.proto import ledger_pb2 as pb
from reference.proto import ledger_pb2_grpc
from reference.service import LoopWatch
from reference.tracing import Tracing


@contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Ports that nobody has; they are let go just before they are used."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    yield ports


@pytest.fixture
def own_api(service_config, tmp_path):
    """Start an API process with changed settings; it is ended at the end of the test."""
    started: list[ApiProcess] = []

    def start(**changes) -> ApiProcess:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        with free_ports(2) as ports:
            process = ApiProcess(service_config, folder, *ports, **changes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.stop()


def new_user() -> int:
    return uuid.uuid4().int % 10**15 + 1


# -- rate limit ------------------------------------------------------------------------------------------


async def test_a_user_is_limited_on_all_processes_together_and_a_service_is_not(own_api, stack, operator) -> None:
    apis = [own_api(rate_limit_per_s=0.5, rate_limit_burst=10) for _ in range(2)]
    user_id = new_user()
    own = {"authorization": f"Bearer {stack.token(Scope.WALLET, user_id=user_id)}"}
    other_id = new_user()
    other = {"authorization": f"Bearer {stack.token(Scope.WALLET, user_id=other_id)}"}

    async def deposit(session, api: ApiProcess, user: int, headers: dict) -> tuple[int, dict, Any]:
        async with session.post(
            f"{api.base}/v1/wallets/{user}/deposits",
            json={"amount_minor": 1},
            headers=headers | {"idempotency-key": uuid.uuid4().hex},
        ) as response:
            return response.status, await response.json(content_type=None), response.headers

    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(*(deposit(session, apis[n % 2], user_id, own) for n in range(40)))
        refused = [(body, headers) for status, body, headers in answers if status == 429]
        # Half a token a second comes back meanwhile.
        assert 10 <= 40 - len(refused) <= 13
        for body, headers in refused:
            assert body["type"] == "urn:ledgerproof:rate-limited"
            assert 1 <= int(headers["retry-after"]) <= 30
            assert headers["x-admitted"] == "0"
        assert (await deposit(session, apis[0], other_id, other))[0] == 202
        answers = await asyncio.gather(*(deposit(session, apis[n % 2], user_id, operator) for n in range(40)))
        assert {status for status, _, _ in answers} == {202}
        async with session.post(
            f"{apis[0].base}/v1/commands",
            headers=other,
            json={
                "commands": [
                    {"op": "deposit", "user_id": other_id, "key": f"b{n}", "amount_minor": 1} for n in range(100)
                ]
            },
        ) as response:
            assert response.status == 429, "a bulk counts its commands"


async def test_what_was_refused_is_allowed_again_after_the_time_that_was_said(service_config) -> None:
    limiter = Limiter(replace(service_config, rate_limit_per_s=5, rate_limit_burst=2))
    user_id = new_user()
    try:
        await limiter.take(user_id)
        await limiter.take(user_id)
        with pytest.raises(RateLimited) as raised:
            await limiter.take(user_id)
        assert 0 < raised.value.retry_after_s <= 0.2
        began = time.monotonic()
        await asyncio.sleep(raised.value.retry_after_s)
        await limiter.take(user_id)
        assert time.monotonic() - began < 10
    finally:
        await limiter.close()


async def test_the_limit_is_open_while_redis_is_down(service_config) -> None:
    with free_ports(1) as ports:
        limiter = Limiter(replace(service_config, redis_port=ports[0], rate_limit_burst=1))
    try:
        for _ in range(5):
            await limiter.take(7)
    finally:
        await limiter.close()


# -- drain -----------------------------------------------------------------------------------------------


async def test_a_process_that_is_asked_to_stop_finishes_what_it_admitted_and_refuses_the_rest(
    own_api, operator, stack
) -> None:
    api = own_api(drain_notice_ms=700)
    user_id = new_user()
    answers: list[tuple[int, str | None]] = []
    readiness: list[int] = []
    gone = 0
    enough = asyncio.Event()
    accepted: dict[int, int] = dict.fromkeys(range(8), 0)
    cut: list[int] = []

    async def client(session, number: int) -> None:
        nonlocal gone
        for turn in range(100_000):
            try:
                async with session.post(
                    f"{api.base}/v1/wallets/{user_id + number}/deposits",
                    json={"amount_minor": 1},
                    headers=operator | {"idempotency-key": f"k{turn}"},
                ) as response:
                    await response.read()
                    answers.append((response.status, response.headers.get("x-admitted")))
                    accepted[number] += response.status == 202
                    if len(answers) >= 50:
                        enough.set()
            except aiohttp.ClientConnectorError:
                gone += 1
                return
            except aiohttp.ClientConnectionError:
                # A kept-alive connection closed under a request that the server had not read: it was not admitted,
                # which the ledger has to confirm below.
                cut.append(number)

    async def watch(session) -> None:
        while True:
            try:
                async with session.get(f"{api.base}/readyz") as response:
                    readiness.append(response.status)
            except aiohttp.ClientError:
                return
            await asyncio.sleep(0.02)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = [asyncio.create_task(client(session, number)) for number in range(8)]
        watching = asyncio.create_task(watch(session))
        await enough.wait()
        before = len(answers)
        api.terminate()
        async with asyncio.timeout(60):
            await asyncio.gather(*clients)
            await watching
    code, log = await asyncio.to_thread(api.stop)
    assert code == 0, log
    assert '"log.level": "error"' not in log, log
    # Nothing but 202 and the certified 503, and nothing was done without its answer.
    assert set(answers[:before]) == {(202, None)}
    assert set(answers[before:]) <= {(202, None), (503, "0")}
    assert (202, None) in answers[before:], "it went on taking requests until it had been seen not to be ready"
    assert 503 in readiness
    assert readiness == sorted(readiness), "ready again after not being ready"
    assert gone == 8
    assert len(cut) <= 16, "connections are closed once, not again and again"
    async with aiohttp.ClientSession(headers=operator) as session:
        for number, count in accepted.items():
            url = f"http://127.0.0.1:{stack.port('api0')}/v1/wallets/{user_id + number}/balance?consistency=strong"
            async with session.get(url) as response:
                assert (await response.json())["seq"] == count, cut


async def test_a_drain_over_grpc_refuses_with_a_trailer_and_loses_no_call(own_api, operator, stack) -> None:
    api = own_api(drain_notice_ms=700)
    user_id = new_user()
    metadata = (("authorization", operator["authorization"]),)
    accepted = dict.fromkeys(range(8), 0)
    refused: list[tuple[grpc.StatusCode, str | None]] = []
    enough = asyncio.Event()

    async def caller(stub, number: int) -> None:
        for turn in range(100_000):
            request = pb.DepositRequest(user_id=user_id + number, key=f"k{turn}", amount_minor=1)
            try:
                reply = await stub.Deposit(request, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                refused.append((error.code(), dict(error.trailing_metadata() or ()).get("x-admitted")))
                if refused[-1][1] is None:
                    return
            else:
                accepted[number] += reply.outcome == "ACCEPTED"
                if sum(accepted.values()) >= 50:
                    enough.set()

    async with grpc.aio.insecure_channel(f"127.0.0.1:{api.grpc_port}") as channel, asyncio.timeout(60):
        stub = ledger_pb2_grpc.LedgerStub(channel)
        callers = [asyncio.create_task(caller(stub, number)) for number in range(8)]
        await enough.wait()
        assert not refused
        api.terminate()
        await asyncio.gather(*callers)
    code, log = await asyncio.to_thread(api.stop)
    assert code == 0, log
    # Certified while the process was there to say so; then the connection closed, before a call or under one.
    assert (grpc.StatusCode.UNAVAILABLE, "0") in refused
    assert {status for status, _ in refused} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    async with aiohttp.ClientSession(headers=operator) as session:
        for number, count in accepted.items():
            url = f"http://127.0.0.1:{stack.port('api0')}/v1/wallets/{user_id + number}/balance?consistency=strong"
            async with session.get(url) as response:
                assert (await response.json())["seq"] == count


# -- health ----------------------------------------------------------------------------------------------


async def test_a_process_that_reaches_no_server_is_alive_and_not_ready(own_api, service_config) -> None:
    with free_ports(1) as ports:
        nowhere = [replace(server, port=ports[0]) for server in service_config.servers]
    api = own_api(wait=False, servers=nowhere)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{api.base}/livez") as response:
            assert (response.status, await response.text()) == (200, "alive\n")
        async with session.get(f"{api.base}/readyz") as response:
            assert (response.status, await response.text()) == (503, "no server can be reached\n")


async def test_a_process_whose_writer_lost_its_batch_is_not_alive(service_config) -> None:
    api = Api(service_config, Tracing(service_config, "test"))
    writer = api.writers[0]
    assert api.alive() is None
    writer._lanes[0].began_s = time.monotonic() - 11
    assert (api.alive() or "").startswith("the writer of pg0 has not come back for 11 s")
    assert await api.ready() == api.alive()
    await api.stop()


async def test_a_blocked_event_loop_is_noticed() -> None:
    watch = LoopWatch()
    watch.start()
    await asyncio.sleep(0.3)
    assert watch.complaint() is None
    time.sleep(2.5)  # noqa: ASYNC251 - blocking the loop is the point
    assert "the event loop is 2." in (watch.complaint() or "")
    await asyncio.sleep(0.3)
    assert watch.complaint() is None
    await watch.stop()


async def test_more_idle_connections_than_a_thousand_keep_no_new_one_waiting(own_api, operator) -> None:
    api = own_api()
    idle = []
    try:
        for _ in range(1500):
            _, writer = await asyncio.open_connection("127.0.0.1", api.port)
            idle.append(writer)
        async with (
            asyncio.timeout(10),
            aiohttp.ClientSession(headers=operator) as session,
            session.get(f"{api.base}/v1/matches?limit=1") as response,
        ):
            assert response.status == 200
            json.loads(await response.read())
    finally:
        for writer in idle:
            writer.close()
