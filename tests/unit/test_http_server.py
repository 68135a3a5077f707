"""The HTTP server over real sockets: order, framing, limits, flow control, clients that leave, and a stop."""

import asyncio
import functools
import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import web
from reference.http_request import BODY_BUFFER_BYTES, ConnectionEnded, Request
from reference.http_server import (
    HEADER_MAX_BYTES,
    PIECE_BYTES,
    URL_MAX_BYTES,
    HttpServer,
    Limits,
)

WITHIN_S = 20.0
TEXT = [("content-type", "text/plain")]
SHORT = Limits(header_s=0.2, body_s=0.2, answer_s=0.2, linger_s=0.2, sweep_s=0.05)


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in the event loop that the service uses."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(WITHIN_S):
                await test(*args, **kwargs)

        uvloop.run(bounded())

    return run


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    for _ in range(int(WITHIN_S / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


class Application:
    """Answers by path, and remembers what it saw."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.finished: list[str] = []
        self.ended: list[str] = []
        self.pieces: list[int] = []
        self.streamed = 0
        self.changed = asyncio.Event()
        self.release = asyncio.Event()

    async def __call__(self, scope: Request, proto: Request) -> None:
        self.begun.append(scope.path)
        self.changed.set()
        _, name, *_ = scope.path.split("/")
        try:
            await getattr(self, f"at_{name}")(scope, proto)
        except ConnectionEnded as error:
            self.ended.append(str(error))
            proto.response_bytes(*web.failure("test", error))
        finally:
            self.finished.append(scope.path)
            self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def at_echo(self, scope: Request, proto: Request) -> None:
        body = await proto()
        seen = [scope.method, scope.path, scope.query_string, body.decode("latin-1"), scope.headers.get("x-a")]
        proto.response_bytes(200, web.JSON, json.dumps(seen).encode())

    async def at_hold(self, scope: Request, proto: Request) -> None:
        await self.release.wait()
        proto.response_str(200, TEXT, scope.path)

    async def at_limited(self, scope: Request, proto: Request) -> None:
        try:
            body = await web.read_all(scope, proto, 1000)
        except web.Rejected as error:
            proto.response_bytes(*web.failure("test", error))
        else:
            proto.response_str(200, TEXT, str(len(body)))

    async def at_slow(self, scope: Request, proto: Request) -> None:
        await self.release.wait()
        async for piece in proto:
            self.pieces.append(len(piece))
        proto.response_str(200, TEXT, str(sum(self.pieces)))

    async def at_unread(self, scope: Request, proto: Request) -> None:
        proto.response_str(200, TEXT, "unread")

    async def at_status(self, scope: Request, proto: Request) -> None:
        proto.response_bytes(int(scope.path.rpartition("/")[2]), TEXT, b"")

    async def at_large(self, scope: Request, proto: Request) -> None:
        proto.response_bytes(200, TEXT, b"x" * 4_000_000)

    async def at_raise(self, scope: Request, proto: Request) -> None:
        raise LookupError("odd")

    async def at_silent(self, scope: Request, proto: Request) -> None:
        pass

    async def at_twice(self, scope: Request, proto: Request) -> None:
        proto.response_str(200, TEXT, "once")
        proto.response_str(200, TEXT, "twice")

    async def at_split(self, scope: Request, proto: Request) -> None:
        proto.response_str(200, [("x-a", "1\r\nx-b: 2")], "")

    async def at_stream(self, scope: Request, proto: Request) -> None:
        stream = proto.response_stream(200, TEXT)
        await stream.send_str("one")
        await stream.send_bytes(b"")
        await stream.send_bytes(b"two")

    async def at_torn(self, scope: Request, proto: Request) -> None:
        stream = proto.response_stream(200, TEXT)
        await stream.send_str("one")
        raise LookupError("odd")

    async def at_endless(self, scope: Request, proto: Request) -> None:
        stream = proto.response_stream(200, TEXT)
        try:
            while True:
                await stream.send_bytes(b"x" * 10_000)
                self.streamed += 10_000
                self.changed.set()
        except ConnectionEnded as error:
            self.ended.append(str(error))

    async def at_watch(self, scope: Request, proto: Request) -> None:
        stream = proto.response_stream(200, TEXT)
        await stream.send_str("there")
        await proto.client_disconnect()
        self.ended.append("disconnect")


class Answer(NamedTuple):
    """What a client reads."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One connection, by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        assert lines[0].startswith("HTTP/1.1 ")
        pairs = [line.split(": ", 1) for line in lines[1:]]
        assert len({name for name, _ in pairs}) == len(pairs), "a header twice"
        return int(lines[0].split(" ")[1]), dict(pairs)

    async def chunk(self) -> bytes:
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def answer(self, *, bodiless: bool = False) -> Answer:
        status, headers = await self.head()
        if bodiless or status in (100, 204, 304):
            return Answer(status, headers, b"")
        if "content-length" in headers:
            return Answer(status, headers, await self.reader.readexactly(int(headers["content-length"])))
        assert headers["transfer-encoding"] == "chunked"
        body = b""
        while chunk := await self.chunk():
            body += chunk
        return Answer(status, headers, body)

    async def is_closed(self) -> bool:
        """Whether nothing more comes; waits for that."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.close()


class Serving(NamedTuple):
    """A server, its application, and a way to connect to it."""

    server: HttpServer
    app: Application
    connect: Callable[[], Awaitable[Client]]


@asynccontextmanager
async def serving(limits: Limits | None = None) -> AsyncIterator[Serving]:
    """A server; at its end no handler runs and no connection is open."""
    app = Application()
    server = HttpServer(app, limits)
    await server.listen(0)
    clients: list[Client] = []

    async def connect() -> Client:
        clients.append(Client(*await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 23)))
        return clients[-1]

    try:
        yield Serving(server, app, connect)
    finally:
        for client in clients:
            client.close()
        app.release.set()
        await server.stop(5.0)
        await app.until(lambda: len(app.begun) == len(app.finished))


def get(path: str, more: str = "", *, method: str = "GET", version: str = "1.1") -> bytes:
    return f"{method} {path} HTTP/{version}\r\nhost: x\r\n{more}\r\n".encode("latin-1")


def post(path: str, body: bytes, more: str = "") -> bytes:
    return get(path, f"content-length: {len(body)}\r\n{more}", method="POST") + body


def chunked(path: str, *chunks: bytes, more: str = "", trailers: str = "") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return get(path, f"transfer-encoding: chunked\r\n{more}", method="POST") + body + f"0\r\n{trailers}\r\n".encode()


def echoed(answer: Answer) -> list[Any]:
    assert answer.status == 200, answer
    seen: list[Any] = json.loads(answer.body)
    return seen


# -- requests --------------------------------------------------------------------------------------------


@on_uvloop
async def test_a_connection_serves_one_request_after_the_other() -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        for number in range(3):
            client.send(post(f"/echo/{number}", b"body %d" % number, "X-A: one\r\nx-a: two\r\n"))
            answer = await client.answer()
            assert echoed(answer) == ["POST", f"/echo/{number}", "", f"body {number}", "one"]
            assert answer.headers.keys() == {"content-type", "content-length", "date"}
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", answer.headers["date"])


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/echo/a%20b%2Fc/%C3%A4%FF?x=%41+b", "/echo/a b/c/ä�", "x=%41+b"),
        ("/echo/%zz%4", "/echo/%zz%4", ""),
        ("/echo/?", "/echo/", ""),
        ("/echo/a?b?c", "/echo/a", "b?c"),
        ("/echo/a#frag?x", "/echo/a", ""),
        ("http://h:1/echo/p%41?q=1", "/echo/pA", "q=1"),
    ],
)
@on_uvloop
async def test_a_target_is_split_and_its_path_decoded(target, path, query) -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        client.send(get(target, "x-a: \xe4\r\n"))
        assert echoed(await client.answer()) == ["GET", path, query, "", "ä"]


@on_uvloop
async def test_pipelined_requests_are_answered_in_order_and_one_at_a_time() -> None:
    async with serving() as (_, app, connect):
        client = await connect()
        client.send(get("/hold/1") + get("/echo/2") + post("/echo/3", b"3") + get("/hold/4") + get("/stream"))
        await app.until(lambda: bool(app.begun))
        assert app.begun == ["/hold/1"]
        app.release.set()
        answers = [await client.answer() for _ in range(5)]
        assert [answer.body for answer in answers] == [
            b"/hold/1",
            b'["GET", "/echo/2", "", "", null]',
            b'["POST", "/echo/3", "", "3", null]',
            b"/hold/4",
            b"onetwo",
        ]


@on_uvloop
async def test_a_flood_of_pipelined_requests_waits_outside() -> None:
    async with serving() as (server, app, connect):
        client = await connect()
        count = 20_000
        client.send(get("/hold/0") + get("/unread") * count)
        await app.until(lambda: bool(app.begun))
        await asyncio.sleep(0.1)
        (connection,) = server._connections
        assert len(connection._waiting) < PIECE_BYTES // 20
        assert client.writer.transport.get_write_buffer_size() + len(connection._unread) > 0
        app.release.set()
        assert (await client.answer()).body == b"/hold/0"
        for _ in range(count):
            assert (await client.answer()).status == 200


VALID = [
    get("/echo/1?a=b", "x-a: one\r\nx-b:\r\n"),
    post("/echo/2", b"body of two"),
    post("/echo/3", b"x" * 300, "expect: 100-continue\r\n"),
    chunked("/echo/4", b"a", b"bc" * 100, trailers="x-a: trailer\r\nx-t: 1\r\n"),
    get("/stream"),
    post("/echo/5", b"GET / HTTP/1.1\r\n\r\n", "connection: upgrade\r\nupgrade: h2c\r\n"),
    chunked("/echo/6", b"six", more="connection: upgrade, keep-alive\r\nupgrade: websocket\r\n"),
    b"\r\n" + get("/echo/7", "x-a: " + "7" * 300 + "\r\n"),
    get("/status/204"),
    get("/raise"),
    post("/limited", b"y" * 900),
]
LAST = [get("/echo/8", "connection: close\r\n"), get("/echo/8", version="1.0"), b"BAD\r\n\r\n", get("/" + "a" * 9000)]


async def play(pieces: list[bytes], count: int) -> list[Answer]:
    """The answers to a stream sent in pieces, without those that say 100 and without dates."""
    async with serving() as (_, _, connect):
        client = await connect()
        client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            client.send(piece)
            await asyncio.sleep(0)
        answers = []
        while len(answers) < count:
            answer = await client.answer()
            answer.headers.pop("date", None)
            answers += [answer] if answer.status != 100 else []
        assert await client.is_closed()
        return answers


@given(st.lists(st.sampled_from(VALID), max_size=5), st.sampled_from(LAST), st.data())
@settings(max_examples=60)
def test_how_a_stream_is_cut_into_pieces_changes_no_answer(requests, last, data) -> None:
    stream = b"".join([*requests, last])
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
    bounds = [0, *cuts, len(stream)]
    pieces = [stream[start:end] for start, end in pairwise(bounds)]

    async def both() -> tuple[list[Answer], list[Answer]]:
        async with asyncio.timeout(WITHIN_S):
            return await play([stream], len(requests) + 1), await play(pieces, len(requests) + 1)

    whole, cut = uvloop.run(both())
    assert cut == whole
    assert [answer.headers.get("connection") for answer in whole] == [None] * len(requests) + ["close"]


@on_uvloop
async def test_requests_that_come_byte_by_byte_are_understood() -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post("/echo/a", b"hello") + chunked("/echo/b", b"wor", b"ld", trailers="x-a: no\r\n"):
            client.send(bytes([byte]))
            await asyncio.sleep(0.001)
        assert echoed(await client.answer())[3] == "hello"
        assert echoed(await client.answer()) == ["POST", "/echo/b", "", "world", None]


# -- bodies ----------------------------------------------------------------------------------------------


@on_uvloop
async def test_a_body_over_the_limit_is_refused_without_being_read() -> None:
    async with serving() as (_, _, connect):
        for request in (
            get("/limited", "content-length: 1000000000\r\n", method="POST"),
            get("/limited", "transfer-encoding: chunked\r\n", method="POST") + b"7d0\r\n" + b"x" * 2000,
            post("/limited", b"x" * 300_000),
            post("/limited", b"x" * 1001),
        ):
            client = await connect()
            client.send(request)
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (413, "close")
            assert json.loads(answer.body)["type"] == "urn:ledgerproof:body-too-large"
            assert await client.is_closed()


@on_uvloop
async def test_a_client_that_goes_on_sending_still_reads_why_it_was_refused() -> None:
    async with serving(SHORT) as (server, _, connect):
        client = await connect()
        client.send(get("/limited", "content-length: 100000000\r\n", method="POST"))
        answer = await client.answer()
        for _ in range(20):
            client.send(b"x" * 100_000)
            await asyncio.sleep(0.001)
        assert answer.status == 413
        assert await client.is_closed()
        await eventually(lambda: not server._connections)


@on_uvloop
async def test_a_body_nobody_asks_for_waits_outside() -> None:
    async with serving() as (server, app, connect):
        client = await connect()
        body = b"x" * 30_000_000
        client.send(post("/slow", body))
        await app.until(lambda: bool(app.begun))
        await asyncio.sleep(0.2)
        assert client.writer.transport.get_write_buffer_size() > 1_000_000, "it was read although nobody wanted it"
        (connection,) = server._connections
        assert len(connection._receiving._body) <= BODY_BUFFER_BYTES + PIECE_BYTES
        app.release.set()
        assert (await client.answer()).body == b"30000000"
        assert max(app.pieces) <= BODY_BUFFER_BYTES + PIECE_BYTES


@on_uvloop
async def test_a_large_body_arrives_whole() -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        body = bytes(range(256)) * 4000
        client.send(post("/echo/", body), chunked("/echo/", body[:500_000], body[500_000:]))
        assert echoed(await client.answer())[3].encode("latin-1") == body
        assert echoed(await client.answer())[3].encode("latin-1") == body


@on_uvloop
async def test_continue_is_said_when_the_body_is_asked_for_and_only_then() -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        expecting = "expect: 100-Continue\r\n"
        client.send(get("/echo/a", f"content-length: 2\r\n{expecting}", method="POST"))
        assert (await client.answer()).status == 100
        client.send(b"hi")
        assert echoed(await client.answer())[3] == "hi"
        client.send(post("/echo/b", b"at once", expecting))
        assert echoed(await client.answer())[3] == "at once"
        client.send(get("/limited", f"content-length: 2000\r\n{expecting}", method="POST"))
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert await client.is_closed()


@on_uvloop
async def test_an_unread_body_ends_the_connection_unless_it_is_there_already() -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        client.send(post("/unread", b"whole"))
        assert "connection" not in (await client.answer()).headers
        client.send(get("/unread", "content-length: 5\r\n", method="POST"))
        assert (await client.answer()).headers["connection"] == "close"
        assert await client.is_closed()


# -- answers ---------------------------------------------------------------------------------------------


@on_uvloop
async def test_answers_without_a_body_have_none() -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        client.send(get("/echo/", method="HEAD"))
        answer = await client.answer(bodiless=True)
        assert (answer.status, answer.headers["content-length"]) == (200, "32")
        for status in (204, 304):
            client.send(get(f"/status/{status}"))
            answer = await client.answer()
            assert (answer.status, answer.headers.keys()) == (status, {"content-type", "date"})
        client.send(get("/stream", method="HEAD"))
        assert (await client.answer(bodiless=True)).headers["transfer-encoding"] == "chunked"
        client.send(get("/status/200"))
        assert (await client.answer()).headers["content-length"] == "0"


@on_uvloop
async def test_http_1_0_and_connection_close_end_the_connection() -> None:
    async with serving() as (_, _, connect):
        for request in (
            get("/echo/", version="1.0"),
            b"GET /echo/ HTTP/1.0\r\n\r\n",
            get("/echo/", "connection: keep-alive\r\n", version="1.0"),
            get("/echo/", "connection: keep-alive, Close\r\n"),
            get("/echo/", "connection: close\r\n") + get("/echo/after"),
        ):
            client = await connect()
            client.send(request)
            answer = await client.answer()
            assert (echoed(answer)[1], answer.headers["connection"]) == ("/echo/", "close")
            assert await client.is_closed()
        client = await connect()
        client.send(get("/stream", version="1.0"))
        status, headers = await client.head()
        assert (status, headers["connection"], "transfer-encoding" in headers) == (200, "close", False)
        assert await client.reader.read() == b"onetwo"


@on_uvloop
async def test_a_handler_that_fails_is_answered_with_500_and_logged(caplog) -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        for path in ("/raise", "/silent", "/split"):
            client.send(get(path))
            answer = await client.answer()
            assert (answer.status, answer.headers["content-type"]) == (500, "application/problem+json")
            assert json.loads(answer.body)["title"] == "internal error"
        client.send(get("/twice"))
        assert (await client.answer()).body == b"once"
        client.send(get("/unread"))
        assert (await client.answer()).body == b"unread"
    assert [record.message for record in caplog.records] == [
        "GET /raise failed",
        "GET /silent got no answer",
        "GET /split failed",
        "GET /twice failed",
    ]


@on_uvloop
async def test_a_stream_whose_handler_fails_is_torn_off(caplog) -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        client.send(get("/torn"))
        await client.head()
        assert await client.chunk() == b"one"
        assert await client.is_closed(), "no last chunk"
    assert "GET /torn failed" in caplog.text


@on_uvloop
async def test_a_client_that_takes_no_answers_gets_no_further_ones_and_is_cut_off() -> None:
    async with serving(SHORT) as (server, app, connect):
        client = await connect()
        client.writer.transport.pause_reading()
        client.send(get("/large") * 50)
        await eventually(lambda: not server._connections)
        assert 1 <= len(app.begun) < 10


@on_uvloop
async def test_a_slow_reader_gets_every_answer() -> None:
    async with serving() as (_, app, connect):
        client = await connect()
        client.writer.transport.pause_reading()
        client.send(get("/large") * 5 + get("/nonsense HTTP"))
        await app.until(lambda: bool(app.finished))
        client.writer.transport.resume_reading()
        for _ in range(5):
            assert len((await client.answer()).body) == 4_000_000
        assert (await client.answer()).status == 400
        assert app.begun == ["/large"] * 5


# -- refusals --------------------------------------------------------------------------------------------

BODY = b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00", 400),
        (b"GET /echo/ HTTP/1.1\nhost: x\n\n", 400),
        (b"GET /echo/\xff HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET echo HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET http://[/ HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET /echo/ HTTP/1.1\r\n\r\n", 400),
        (get("/echo/", "Host: y\r\n"), 400),
        (get("/echo/", "x-a: 1\r\n 2\r\n"), 400),
        (get("/echo/", "x-a : 1\r\n"), 400),
        (get("/echo/", "x-a: \x00\r\n"), 400),
        (get("/echo/", "content-length: 1\r\ncontent-length: 2\r\n") + b"ab", 400),
        (get("/echo/", "content-length: 1\r\ncontent-length: 1\r\n") + b"a", 400),
        (get("/echo/", "content-length: 1, 1\r\n") + b"a", 400),
        (get("/echo/", "content-length: +1\r\n") + b"a", 400),
        (get("/echo/", "content-length: 99999999999999999999999\r\n"), 400),
        (get("/echo/", "content-length: 5\r\ntransfer-encoding: chunked\r\n") + BODY, 400),
        (get("/echo/", "transfer-encoding: chunked\r\ncontent-length: 5\r\n") + BODY, 400),
        (get("/echo/", "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n") + BODY, 400),
        (get("/echo/", "transfer-encoding: gzip, chunked\r\n") + BODY, 400),
        (get("/echo/", "transfer-encoding: chunked, identity\r\n") + BODY, 400),
        (get("/echo/", "transfer-encoding: xchunked\r\n") + BODY, 400),
        (get("/echo/", "transfer-encoding: chunked\r\n", version="1.0") + BODY, 400),
        (get("/echo/", "transfer-encoding: chunked\r\n") + b"1x\r\na\r\n0\r\n\r\n", 400),
        (get("/echo/", "transfer-encoding: chunked\r\n") + b"1\na\n0\n\n", 400),
        (get("/echo/", version="2.0"), 505),
        (b"GET /echo/\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (get("/echo/" + "a" * URL_MAX_BYTES), 414),
        (b"GET /echo/" + b"a" * 1_000_000, 414),
        (get("/echo/", "x-a: " + "a" * HEADER_MAX_BYTES + "\r\n"), 431),
        (get("/echo/", "x-a: b\r\n" * (HEADER_MAX_BYTES // 8)), 431),
        (b"GET /echo/ HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * 1_000_000, 431),
    ],
)
@on_uvloop
async def test_what_is_no_request_is_refused_after_the_answers_before_it(request_bytes, status) -> None:
    async with serving() as (_, _, connect):
        for before in (0, 2):
            client = await connect()
            client.send(get("/unread") * before + request_bytes)
            for _ in range(before):
                assert (await client.answer()).body == b"unread"
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (status, "close")
            assert answer.headers["content-type"] == "application/problem+json"
            problem = json.loads(answer.body)
            assert problem["status"] == status
            assert problem["type"] == f"urn:ledgerproof:{problem['title'].replace(' ', '-')}"
            assert await client.is_closed()


@on_uvloop
async def test_a_header_just_below_the_limits_is_taken() -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        value = "v" * (HEADER_MAX_BYTES - 100)
        client.send(get("/echo/", f"x-a: {value}\r\n"))
        assert echoed(await client.answer())[4] == value
        path = "/echo/" + "a" * (URL_MAX_BYTES - 6)
        client.send(get(path))
        assert echoed(await client.answer())[1] == path


@on_uvloop
async def test_an_upgrade_is_ignored_and_a_tunnel_refused() -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        upgrade = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAM\r\n"
        client.send(get("/echo/a", upgrade) + post("/echo/b", b"GET /x HTTP/1.1\r\n", upgrade) + get("/echo/c"))
        assert [echoed(await client.answer())[1:4:2] for _ in range(3)] == [
            ["/echo/a", ""],
            ["/echo/b", "GET /x HTTP/1.1\r\n"],
            ["/echo/c", ""],
        ]
        client.send(b"CONNECT /echo:1 HTTP/1.1\r\nhost: x\r\n\r\nGET /echo/ HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = await client.answer()
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()


# -- clients that are slow or leave ----------------------------------------------------------------------


@on_uvloop
async def test_who_keeps_us_waiting_for_a_request_is_cut_off() -> None:
    async with serving(SHORT) as (_, app, connect):
        idle, slow, half, stalled = [await connect() for _ in range(4)]
        half.send(get("/unread") + b"GET /unread HT")
        assert (await half.answer()).status == 200
        stalled.send(get("/echo/", "content-length: 9\r\n", method="POST") + b"half")

        async def drip() -> None:
            for byte in get("/unread", "x-a: " + "a" * 1000 + "\r\n"):
                slow.send(bytes([byte]))
                await asyncio.sleep(0.01)

        dripping = asyncio.create_task(drip())
        for client in (idle, slow, half, stalled):
            assert await client.is_closed()
        dripping.cancel()
        await app.until(lambda: bool(app.ended))
        assert app.begun == ["/unread", "/echo/"]
        assert app.ended == ["the client left in the middle of its request"]


@on_uvloop
async def test_neither_a_long_handler_nor_a_quiet_stream_is_cut_off() -> None:
    async with serving(SHORT) as (server, app, connect):
        waiting, watching = await connect(), await connect()
        waiting.send(get("/hold/") + b"GET /unread HTTP/1.1\r\nhos")
        watching.send(get("/watch"))
        await watching.head()
        began = server.now
        await eventually(lambda: server.now > began + 3 * server.bounds.header)
        app.release.set()
        assert (await waiting.answer()).body == b"/hold/"
        assert await watching.chunk() == b"there"
        assert app.ended == []


@on_uvloop
async def test_a_handler_goes_on_when_its_client_leaves(caplog) -> None:
    async with serving() as (server, app, connect):
        for leave in ("close", "reset", "half-close"):
            app.release.clear()
            path = f"/hold/{leave}"
            client = await connect()
            client.send(post(path, b"whole"))
            await app.until(lambda path=path: path in app.begun)
            if leave == "close":
                client.close()
            elif leave == "reset":
                linger = struct.pack("ii", 1, 0)
                client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                client.close()
                await eventually(lambda: not server._connections)
            else:
                client.writer.write_eof()
                await eventually(lambda: all(connection.is_left for connection in server._connections))
            assert path not in app.finished
            app.release.set()
            await app.until(lambda path=path: path in app.finished)
            if leave == "half-close":
                answer = await client.answer()
                assert (answer.body, answer.headers["connection"]) == (path.encode(), "close")
                assert await client.is_closed()
            await eventually(lambda: not server._connections)
    assert caplog.records == []


@on_uvloop
async def test_a_half_closed_connection_gets_every_answer_that_is_due() -> None:
    async with serving() as (_, _, connect):
        client = await connect()
        client.send(get("/unread") + post("/echo/", b"x") + get("/stream"))
        client.writer.write_eof()
        assert [(await client.answer()).status for _ in range(3)] == [200, 200, 200]
        assert await client.is_closed()


@on_uvloop
async def test_a_body_broken_off_is_told_to_its_handler() -> None:
    async with serving() as (_, app, connect):
        for end in (lambda client: client.close(), lambda client: client.writer.write_eof()):
            client = await connect()
            client.send(get("/echo/", "content-length: 9\r\n", method="POST") + b"half")
            await app.until(lambda: len(app.begun) > len(app.ended))
            end(client)
            await app.until(lambda: len(app.begun) == len(app.ended))
        assert (await client.answer()).status == 400
        assert await client.is_closed()


@on_uvloop
async def test_a_stream_honours_flow_control_and_notices_that_its_client_left() -> None:
    async with serving() as (_, app, connect):
        client = await connect()
        client.writer.transport.pause_reading()
        client.send(get("/endless"))
        while True:
            before = app.streamed
            await asyncio.sleep(0.2)
            if before and app.streamed == before:
                break
        assert app.streamed < 20_000_000
        client.writer.transport.resume_reading()
        await app.until(lambda: app.streamed > 2 * before)
        client.writer.transport.abort()
        await app.until(lambda: bool(app.ended))
        assert app.ended == ["the client left"]

        client = await connect()
        client.send(get("/watch"))
        await client.head()
        assert await client.chunk() == b"there"
        client.close()
        await app.until(lambda: len(app.ended) == 2)


@on_uvloop
async def test_a_connection_too_many_is_closed_and_room_is_made_again() -> None:
    async with serving(Limits(connections=2)) as (server, _, connect):
        first, second, third = await connect(), await connect(), await connect()
        assert await third.is_closed()
        first.send(get("/unread"))
        assert (await first.answer()).status == 200
        second.close()
        await eventually(lambda: len(server._connections) == 1)
        fourth = await connect()
        fourth.send(get("/unread"))
        assert (await fourth.answer()).status == 200


# -- start and stop --------------------------------------------------------------------------------------


@on_uvloop
async def test_a_port_that_is_taken_is_an_error() -> None:
    async with serving() as (server, app, _):
        other = HttpServer(app)
        with pytest.raises(OSError, match="in use"):
            await other.listen(server.port)


@on_uvloop
async def test_a_stop_answers_what_has_begun_and_nothing_else() -> None:
    async with serving() as (server, app, connect):
        idle, half, busy, piping = [await connect() for _ in range(4)]
        idle.send(get("/unread"))
        await idle.answer()
        half.send(b"GET /unread HT")
        busy.send(get("/hold/busy"))
        piping.send(get("/hold/first") + get("/hold/second"))
        await app.until(lambda: len(app.begun) == 3)
        port = server.port
        stopping = asyncio.create_task(server.stop(10.0))
        assert await idle.is_closed()
        assert await half.is_closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert not stopping.done()
        app.release.set()
        for client, path in ((busy, b"/hold/busy"), (piping, b"/hold/first")):
            answer = await client.answer()
            assert (answer.body, answer.headers["connection"]) == (path, "close")
            assert await client.is_closed()
            client.close()
        await stopping
        assert "/hold/second" not in app.begun


@on_uvloop
async def test_a_stop_waits_no_longer_than_it_is_told() -> None:
    async with serving() as (server, app, connect):
        client = await connect()
        client.send(get("/hold/"))
        await app.until(lambda: bool(app.begun))
        await server.stop(0.05)
        assert await client.is_closed()
        assert app.finished == [], "the handler was not cut off"


@pytest.mark.parametrize(
    "endless", [b"0\r\nx-a: " + b"a" * 10 * HEADER_MAX_BYTES, b"1;" + b"e" * 10 * HEADER_MAX_BYTES]
)
@on_uvloop
async def test_what_stands_beside_the_chunks_of_a_body_is_bounded(endless) -> None:
    """Trailers and extensions are nobody's, and the parser would keep an unfinished one for as long as it grows."""
    async with serving() as (_, application, connect):
        client = await connect()
        client.send(get("/echo/", "transfer-encoding: chunked\r\n", method="POST") + b"1\r\na\r\n", endless)
        await eventually(lambda: bool(application.ended))
        assert "too large" in application.ended[0]
        assert (await client.answer()).status == 400
