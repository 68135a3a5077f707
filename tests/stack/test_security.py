"""Hostile requests over HTTP: injected, malformed, oversized, smuggled, forged, replayed, somebody else's."""

import asyncio
import json
import socket
import time
import uuid

import aiohttp
import asyncpg
import jwt
import pytest

from reference.auth import AUDIENCE, ISSUER, Scope
from reference.uuid7 import uuid7

INJECTIONS = [
    "'; DROP TABLE wallet_ledger; --",
    "' OR '1'='1",
    "$1",
    "%s%n",
    "\\'; SELECT pg_sleep(10); --",
    '"; DELETE FROM refusals; --',
    "1); TRUNCATE bets; --",
    "{{7*7}}",
    "../../etc/passwd",
    "${jndi:ldap://x}",
]


@pytest.fixture
async def session(operator):
    async with aiohttp.ClientSession(headers=operator) as session:
        yield session


@pytest.fixture
def base(api_bases):
    return api_bases[0]


def new_user() -> int:
    return uuid.uuid4().int % 10**15 + 1


async def post(session, url: str, body: object, key: str | None = None, **headers: str):
    said = {"idempotency-key": key or uuid.uuid4().hex} | headers
    async with session.post(url, json=body, headers=said) as response:
        return response.status, await response.json(content_type=None), response.headers


async def raw(port: int, request: bytes, within_s: float = 10) -> bytes:
    """Send bytes and return everything that comes back until the server closes or is silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        got = b""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    chunk = await asyncio.wait_for(reader.read(65536), 0.7 if got else within_s)
                except TimeoutError:
                    return got
                if not chunk:
                    return got
                got += chunk
    except ConnectionError:
        return got
    finally:
        writer.close()


# -- injection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", INJECTIONS)
async def test_sql_in_any_text_is_text(session, base, superuser_dsn, text) -> None:
    user_id, key = new_user(), f"{uuid.uuid4().hex}{text}"[:255]
    wallet = f"{base}/v1/wallets/{user_id}"
    status, answer, _ = await post(session, f"{wallet}/deposits", {"amount_minor": 500}, key)
    assert (status, answer["balance_minor"]) == (202, 500)
    assert (await post(session, f"{wallet}/deposits", {"amount_minor": 500}, key))[1]["replayed"] is True
    async with session.get(f"{wallet}/entries") as response:
        assert [entry["key"] for entry in (await response.json())["entries"]] == [key]
    match_id = str(uuid7())
    match = {"match_id": match_id, "closes_at_ms": int(time.time() * 1000) + 10**6, "outcomes": [text, "AWAY"]}
    assert (await post(session, f"{base}/v1/matches", match))[0] == 202
    bet = {"match_id": match_id, "outcome": text, "side": "BACK", "odds": 200, "stake_minor": 5}
    assert (await post(session, f"{wallet}/bets", bet))[0] == 202
    other = bet | {"outcome": (text + "x")[:32] if len(text) < 32 else "x"}
    assert (await post(session, f"{wallet}/bets", other))[1]["outcome"] == "UNKNOWN_OUTCOME"
    assert (await post(session, f"{wallet}/rollbacks", {"key": text}))[0] == 202
    item = {"op": "deposit", "user_id": user_id, "key": text + "b", "amount_minor": 1}
    assert (await post(session, f"{base}/v1/commands", {"commands": [item]}))[1]["results"][0]["status"] == 202
    await post(session, f"{base}/v1/matches/{match_id}/close", {})
    assert (await post(session, f"{base}/v1/matches/{match_id}/settle", {"result": text}))[0] == 202
    for name in ("consistency", "min_seq", "as_of"):
        async with session.get(f"{wallet}/balance", params={name: text}) as response:
            assert response.status == 400
    for dsn in superuser_dsn:
        connection = await asyncpg.connect(dsn)
        try:
            assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE tablename = 'bets'") == 1
        finally:
            await connection.close()


# -- malformed and oversized -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "application/json", 413),
        (b"[" * 7_000 + b"]" * 7_000, "application/json", 400),
        (b'{"amount_minor":' + b"[" * 5_000, "application/json", 400),
        (b'{"amount_minor": 1' + b" " * 20_000 + b"}", "application/json", 413),
        (b'{"amount_minor":' + b"9" * 5_000 + b"}", "application/json", 400),
        (b'{"amount_minor": 1, "amount_minor": "x"}', "application/json", 400),
        (b'{"amount_minor": NaN}', "application/json", 400),
        (b'{"amount_minor": true}', "application/json", 400),
        (b'\xef\xbb\xbf{"amount_minor": 1}', "application/json", 400),
        (b"amount_minor=1", "application/x-www-form-urlencoded", 415),
        (b"<amount>1</amount>", "application/xml", 415),
        (b'{"amount_minor": 1}', "text/plain", 415),
        (b'{"amount_minor": 1}', "application/jsonx", 415),
        (b'{"amount_minor": 1}', "application/json; charset=utf-8", 202),
    ],
)
async def test_bodies_are_refused_for_what_they_are(session, base, body, kind, status) -> None:
    for path in (f"/v1/wallets/{new_user()}/deposits",):
        headers = {"idempotency-key": "k", "content-type": kind}
        async with session.post(base + path, data=body, headers=headers) as response:
            answer = await response.json(content_type=None)
            assert response.status == status, answer
            if status >= 400:
                assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("body", [b"[" * 400_000, b'{"commands":' + b"[" * 500_000, b'{"commands": [1, null, []]}'])
async def test_a_bulk_that_is_nonsense_is_refused(session, base, body) -> None:
    headers = {"content-type": "application/json"}
    async with session.post(f"{base}/v1/commands", data=body, headers=headers) as response:
        answer = await response.json(content_type=None)
        if response.status == 200:
            assert {result["status"] for result in answer["results"]} == {400}
        else:
            assert response.status == 400


async def test_a_chunked_body_without_end_is_cut_off(session, base) -> None:
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 4096
            yield b" " * 4096
            await asyncio.sleep(0)

    headers = {"idempotency-key": "k", "content-type": "application/json"}
    try:
        async with session.post(f"{base}/v1/wallets/1/deposits", data=endless(), headers=headers) as response:
            assert response.status == 413
    except aiohttp.ClientConnectionError:
        pass  # the server closed while we were still sending, which is as good
    assert sent < 64 * 1024 * 1024


async def test_headers_beyond_the_limits_are_refused(stack, operator) -> None:
    port = stack.port("api0")
    many = b"".join(b"x-%d: 1\r\n" % number for number in range(5000))
    for headers in (many, b"x-long: " + b"a" * 200_000 + b"\r\n"):
        answer = await raw(port, b"GET /v1/matches HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n")
        assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")), answer[:200]
    assert (await raw(port, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")).startswith(b"HTTP/1.1 200")


# -- smuggling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 4\r\ncontent-length: 60\r\n",
        b"content-length: 60\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding : chunked\r\n",
        b"content-length: +4\r\n",
        b"content-length: 0x10\r\n",
        b"content-length: -1\r\n",
        b"content-length: 4, 4\r\n",
    ],
)
async def test_a_request_hidden_in_another_is_never_done(stack, session, base, framing) -> None:
    user_id = new_user()
    token = stack.token().encode()
    hidden = (
        b"POST /v1/wallets/%d/deposits HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\nidempotency-key: h\r\n"
        b"content-type: application/json\r\ncontent-length: 18\r\n\r\n" % (user_id, token)
    ) + b'{"amount_minor":1}'
    request = (
        b"POST /v1/wallets/%d/withdrawals HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\nidempotency-key: o\r\n"
        b"content-type: application/json\r\n%s\r\n0\r\n\r\n%s" % (user_id, token, framing, hidden)
    )
    answer = await raw(stack.port("api0"), request)
    statuses = [line.split(b" ")[1] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    # Either the framing is refused and the connection closed, or one of its readings is taken and what follows it
    # is a request of the same sender, answered for itself. It never becomes a body or a header of another.
    assert statuses, answer
    if statuses == [b"400"]:
        async with session.get(f"{base}/v1/wallets/{user_id}/balance?consistency=strong") as response:
            assert response.status == 404
    else:
        assert len(statuses) <= 2
        assert not statuses[0].startswith(b"2")


async def test_a_header_cannot_be_folded_or_split_into_another(stack) -> None:
    for line in (
        b"idempotency-key: a\r\n b",
        b"idempotency-key: a\x00b",
        b"idempotency-key: a\nx-admitted: 1",
        b"\r\nx: y",
    ):
        request = (
            b"POST /v1/wallets/1/deposits HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\n"
            b"content-type: application/json\r\ncontent-length: 0\r\n%s\r\n\r\n" % (stack.token().encode(), line)
        )
        answer = await raw(stack.port("api0"), request)
        assert not answer.startswith(b"HTTP/1.1 2"), answer


# -- tokens and wallets ----------------------------------------------------------------------------------


def forged(key: str, **changes) -> str:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 60, "scope": "service admin"} | changes
    return jwt.encode(claims, key, algorithm="HS256" if key else "none")


async def test_every_route_refuses_a_missing_expired_or_forged_token(stack, base) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{base}/openapi.json") as response:
        document = await response.json()
    tokens = [None, "", "x", forged(""), forged("k" * 64), stack.token(ttl_s=-60), stack.token()[:-2] + "xx"]
    refused = 0
    async with aiohttp.ClientSession() as session:
        for path, operations in document["paths"].items():
            if path == "/openapi.json":
                continue
            url = base + path.format(user_id=7, bet_id=uuid7(), match_id=uuid7())
            for method in operations:
                for token in tokens:
                    headers = {} if token is None else {"authorization": f"Bearer {token}"}
                    async with session.request(method, url, headers=headers, json={}) as response:
                        body = await response.text()
                        assert response.status == 401, (method, path, token, body)
                        assert response.headers["www-authenticate"].startswith("Bearer ")
                        refused += 1
    assert refused > 100


async def test_a_user_acts_on_their_own_wallet_only(stack, base) -> None:
    user_id, victim = new_user(), new_user()
    own = {"authorization": f"Bearer {stack.token(Scope.WALLET, user_id=user_id)}"}
    async with aiohttp.ClientSession(headers=own) as session:
        assert (await post(session, f"{base}/v1/wallets/{user_id}/deposits", {"amount_minor": 9}))[0] == 202
        for path, body in [
            ("deposits", {"amount_minor": 1}),
            ("withdrawals", {"amount_minor": 1}),
            ("bets", {}),
            (f"bets/{uuid7()}/cancel", {}),
            ("rollbacks", {"key": "k"}),
        ]:
            for wallet in (str(victim), f"0{user_id}", f"%3{str(victim)[0]}{str(victim)[1:]}", "7/../8"):
                status, _, headers = await post(session, f"{base}/v1/wallets/{wallet}/{path}", body)
                assert status in (403, 404), (wallet, path, status)
                if status == 403:
                    assert "insufficient_scope" in headers["www-authenticate"]
        for path in ("balance", "stats", "entries", "transactions", "bets", f"bets/{uuid7()}", "events"):
            async with session.get(f"{base}/v1/wallets/{victim}/{path}") as response:
                assert response.status == 403
        status, _, _ = await post(session, f"{base}/v1/matches", {"match_id": str(uuid7()), "closes_at_ms": 1})
        assert status == 403
        items = [{"op": "withdraw", "user_id": who, "key": "k", "amount_minor": 1} for who in (victim, user_id)]
        _, answer, _ = await post(session, f"{base}/v1/commands", {"commands": items})
        assert [result["status"] for result in answer["results"]] == [403, 202]


async def test_a_recorded_request_sent_again_moves_nothing(stack, session, base) -> None:
    user_id = new_user()
    request = (
        b"POST /v1/wallets/%d/deposits HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\nidempotency-key: once\r\n"
        b"content-type: application/json\r\ncontent-length: 20\r\n\r\n" % (user_id, stack.token().encode())
    ) + b'{"amount_minor":100}'
    for _ in range(5):
        assert (await raw(stack.port("api0"), request)).startswith(b"HTTP/1.1 202")
    assert (await raw(stack.port("api1"), request * 3)).count(b'"replayed":true') == 3
    async with session.get(f"{base}/v1/wallets/{user_id}/balance?consistency=strong") as response:
        view = await response.json()
    assert (view["balance_minor"], view["seq"]) == (100, 1)


async def test_no_answer_and_no_log_holds_a_secret(stack, service_config, session, base) -> None:
    secrets = [*service_config.passwords.values(), service_config.redis_password or "", service_config.token_key or ""]
    secrets += [stack.superuser[1], stack.token()]
    said = []
    for path in ("/metrics", "/readyz", "/livez", "/openapi.json", "/v1/wallets/1/balance", "/v1/x", "/config.json"):
        async with session.get(base + path) as response:
            said.append(await response.text())
    async with session.post(
        f"{base}/v1/wallets/1/deposits", data=b"{", headers={"content-type": "application/json"}
    ) as r:
        said.append(await r.text())
    said += [stack.logs_tail(node.name, 100_000) for node in stack.state.nodes if node.kind == "service"]
    for secret in secrets:
        assert len(secret) > 16
        assert not any(secret in text for text in said)
    assert any("serves on port" in text for text in said)


async def test_paths_that_are_no_paths_are_404_and_methods_405(session, base, stack) -> None:
    for path in ("/v1/wallets/7", "/v1//7/bets", "/v2/wallets/7/balance", "//v1/matches", "/"):
        async with session.get(base + path) as response:
            assert response.status == 404, path
    async with session.delete(f"{base}/v1/matches/{uuid7()}") as response:
        assert (response.status, response.headers["allow"]) == (405, "GET")
    async with session.put(f"{base}/v1/matches") as response:
        assert (response.status, response.headers["allow"]) == (405, "GET, POST")
    answer = await raw(stack.port("api0"), b"GET /v1/matches/\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 401", b"HTTP/1.1 404"), answer[:200]


def test_a_connection_that_says_nothing_does_not_keep_others_waiting(stack, base) -> None:
    silent = [socket.create_connection(("127.0.0.1", stack.port("api0"))) for _ in range(50)]
    try:
        for one in silent:
            one.sendall(b"POST /v1/wallets/1/deposits HTTP/1.1\r\nhost: x\r\n")
        answer = asyncio.run(raw(stack.port("api0"), b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"))
        assert answer.startswith(b"HTTP/1.1 200")
    finally:
        for one in silent:
            one.close()


def test_the_document_of_the_api_is_json_with_an_example_for_every_body(stack) -> None:
    answer = asyncio.run(raw(stack.port("api0"), b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"))
    document = json.loads(answer.partition(b"\r\n\r\n")[2])
    for path, operations in document["paths"].items():
        for operation in operations.values() if path != "/openapi.json" else ():
            contents = [said["content"] for said in operation["responses"].values()]
            contents += [operation["requestBody"]["content"]] if "requestBody" in operation else []
            for content in contents:
                for media in content.values():
                    assert "example" in media, (path, operation["operationId"])
