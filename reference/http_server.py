"""HTTP/1.1 inside the event loop: the application gets each request as a task, its answer leaves in one write.

The application is `async def __call__(scope, proto)` in the words of RSGI; one `Request` is both. Promised are: answers
in the order of the requests, bounded memory for a connection, an end for whoever is too slow, strictness about where a
request ends, and that a handler which has begun is never cut off because its client left.
"""

import asyncio
import contextlib
import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from math import ceil
from typing import Any, Final, cast
from urllib.parse import unquote, urlsplit

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser

from reference.http_request import PROBLEM, ConnectionEnded, Headers, Request, Stream, problem

log = logging.getLogger("ledgerproof.http")

BACKLOG: Final = 1024
HEADER_MAX_BYTES: Final = 32 * 1024
URL_MAX_BYTES: Final = 8 * 1024
PIECE_BYTES: Final = 16 * 1024
"""Parsed at once. The parser cannot be stopped, so this bounds how many short requests are in memory as objects."""
HEADS_MAX: Final = 512
"""Heads of answers that are kept as bytes."""

Application = Callable[[Request, Request], Coroutine[Any, Any, None]]
"""(scope, protocol) of a request; it answers through the protocol."""

_WITHOUT_BODY: Final = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class Limits:
    """How many clients are served and how long each is waited for, give or take one sweep."""

    connections: int = 8192
    """A further one is closed at once: in the listener's backlog it would wait for nobody knows how long, while this
    tells the client now to go elsewhere. Idle connections count, so it is far above what a host is sent at once."""
    header_s: float = 30.0
    """From the first byte of a request to the end of its header; also how long a connection may be idle."""
    body_s: float = 30.0
    """Without a byte of a body that is not complete."""
    answer_s: float = 30.0
    """For taking what is in the way of the next answer."""
    linger_s: float = 2.0
    """After a last answer that was given before the request was read: closed at once, a client that is still sending
    would see its connection reset and not the answer."""
    sweep_s: float = 1.0
    """One timer looks after all connections this often."""


class _Refused(Exception):
    """Raised within the parser about a request that no application sees: status, title, detail."""


class Connection(asyncio.Protocol):
    """One client: parses its requests, has them answered one after the other, and ends with it."""

    __slots__ = (
        "_active",
        "_deaf",
        "_drained",
        "_header_bytes",
        "_headers",
        "_in_header",
        "_lingers",
        "_parser",
        "_paused",
        "_pieces_bytes",
        "_received",
        "_receiving",
        "_reframing",
        "_refusal",
        "_server",
        "_since",
        "_transport",
        "_unread",
        "_url",
        "_waiting",
        "is_left",
    )

    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser: HttpRequestParser | None = HttpRequestParser(self)
        self._url = b""
        self._headers: dict[str, str] = {}
        self._header_bytes = 0
        self._pieces_bytes = 0
        """Received in whole pieces of a header that has not ended, or of a body that brought nothing of it."""
        self._received = 0
        """Pieces of bodies so far."""
        self._in_header = False
        self._reframing = False
        self._receiving: Request | None = None
        """The request whose body is arriving."""
        self._active: Request | None = None
        """The request whose handler owes the next answer."""
        self._waiting: deque[Request] = deque()
        """Requests after the active one."""
        self._refusal: _Refused | None = None
        """Answered after all requests before it, then the connection ends."""
        self._unread: bytes = b""
        """Received and not parsed yet; the transport is paused then."""
        self._paused = False
        self._deaf = False
        """Whatever still arrives is not for us."""
        self._lingers = False
        self._drained: asyncio.Event | None = None
        """There while the client does not take what was sent."""
        self._since = server.now
        self.is_left = False
        """The client will send nothing more."""

    # -- transport -------------------------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """Nothing can be sent any more."""
        return self._transport is None or self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the client if there is room."""
        self._transport = cast("asyncio.Transport", transport)
        if not self._server.admit(self):
            self._deaf = True
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        self._unread = self._unread + data if self._unread else data
        self._read()

    def eof_received(self) -> bool:
        """Keep a half-closed connection for the answers that are due."""
        self._leave("the client stopped sending in the middle of its request")
        return self._active is not None or bool(self._waiting)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything but the handler that runs."""
        self._transport = None
        self._parser = None
        self._waiting.clear()
        self._leave("the client left in the middle of its request")
        if self._drained is not None:
            self._drained.set()
        self._server.forget(self)

    def _leave(self, reason: str) -> None:
        self._deaf = True
        self._unread = b""
        self.is_left = True
        if self._receiving is not None:
            self._receiving.break_off(reason)
        if self._active is not None:
            self._active.leave()

    def pause_writing(self) -> None:
        """Begin no further answer until the client has taken the last ones."""
        self._drained = asyncio.Event()
        self._since = self._server.now

    def resume_writing(self) -> None:
        """Go on."""
        if self._drained is not None:
            self._drained.set()
            self._drained = None
        self._since = self._server.now
        if self._active is None:
            self._next()

    def write(self, data: bytes) -> None:
        """Send, unless the client is gone."""
        if self._transport is not None:
            self._transport.write(data)

    async def drained(self) -> None:
        """Let others have their turn, and wait while the client does not take what was sent. Raises ConnectionEnded."""
        if self._drained is None:
            await asyncio.sleep(0)
        else:
            await self._drained.wait()
        if self.is_lost:
            raise ConnectionEnded("the client left")

    def abort(self) -> None:
        """Cut the client off."""
        if self._transport is not None:
            self._transport.abort()

    def is_overdue(self, now: int) -> bool:
        """Whether this client let us wait too long; `now` is counted in sweeps."""
        waited, bounds = now - self._since, self._server.bounds
        if self._transport is None:
            return False
        if self._drained is not None or self._transport.is_closing():
            return waited > bounds.answer
        if self._lingers:
            return waited > bounds.linger
        if self._active is None:
            return waited > bounds.header
        return not self._active.complete and not self._paused and waited > bounds.body

    def wind_up(self) -> None:
        """Close unless an answer is due: the server stops."""
        if self._active is None and not self._lingers and self._transport is not None:
            self._deaf = True
            self._transport.close()

    # -- parser ----------------------------------------------------------------------------------------

    def _is_full(self) -> bool:
        receiving = self._receiving
        return bool(self._waiting) or (receiving is not None and receiving.is_full())

    def _read(self) -> None:
        """Parse what may be taken now; read no more while something is left."""
        while self._unread and not self._deaf and not self._is_full():
            piece, self._unread = self._unread[:PIECE_BYTES], self._unread[PIECE_BYTES:]
            self._parse(piece)
        if self._deaf:
            self._unread = b""
        holds = not self._deaf and (bool(self._unread) or self._is_full())
        if holds is not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = holds
            if holds:
                self._transport.pause_reading()
            else:
                self._since = self._server.now
                self._transport.resume_reading()

    def go_on(self) -> None:
        """Read on if the reason to wait is gone."""
        if self._paused:
            self._read()

    def _parse(self, piece: bytes) -> None:
        assert self._parser is not None, "nothing is received after the connection was lost"
        had_begun, receiving, received = self._in_header, self._receiving, self._received
        http_ends_at = -1
        try:
            self._parser.feed_data(piece)
        except HttpParserUpgrade as upgrade:
            http_ends_at = upgrade.args[0]
        except HttpParserError as error:
            self._break_off(error)
            return
        if http_ends_at >= 0:
            self._stay_with_http(piece[http_ends_at:])
        elif had_begun and self._in_header:
            self._pieces_bytes += len(piece)
            if self._pieces_bytes > HEADER_MAX_BYTES:
                self._refuse(_header_too_large())
        elif receiving is not None and self._receiving is receiving and self._received == received:
            # Trailers and extensions of chunks: nobody wants them, and the parser keeps what has not ended.
            self._pieces_bytes += len(piece)
            if self._pieces_bytes > HEADER_MAX_BYTES:
                self._deaf = True
                receiving.break_off("what stands between and behind its chunks is too large")

    def _stay_with_http(self, rest: bytes) -> None:
        """Go on after a request for another protocol, which is ignored (RFC 9110, 7.8).

        The parser takes what follows the header for the other protocol; so another one is told of the body alone.
        """
        assert self._receiving is not None, "the header of the request was complete"
        headers = self._receiving.headers
        framing = "transfer-encoding: chunked"
        if "transfer-encoding" not in headers:
            framing = f"content-length: {headers.get('content-length', '0')}"
        self._parser = HttpRequestParser(self)
        self._parser.feed_data(f"POST / HTTP/1.1\r\n{framing}\r\n\r\n".encode())
        if rest and not self._deaf:
            self._parse(rest)

    def _break_off(self, error: HttpParserError) -> None:
        if self._deaf:
            return
        if isinstance(error, HttpParserCallbackError):
            if not isinstance(error.__context__, _Refused):
                raise error
            self._refuse(error.__context__)
        elif self._receiving is not None:
            self._deaf = True
            self._receiving.break_off(f"the body is malformed: {error}")
        else:
            self._refuse(_Refused(400, "malformed request", f"this is not HTTP/1.1: {error}"))

    def _refuse(self, refusal: _Refused) -> None:
        self._deaf = True
        self._refusal = refusal
        if self._active is None:
            self._next()

    def on_message_begin(self) -> None:
        """Begin a header."""
        if self._deaf:
            raise _Refused  # the parser knows no other way to stop
        self._in_header = True
        self._url = b""
        self._headers = {}
        self._header_bytes = 0
        self._pieces_bytes = 0
        if self._active is None:
            self._since = self._server.now

    def on_url(self, piece: bytes) -> None:
        """Take the target, or a piece of it."""
        self._url = self._url + piece if self._url else piece
        if len(self._url) > URL_MAX_BYTES:
            raise _Refused(414, "target too long", f"the target must be at most {URL_MAX_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; the first of a name counts. Trailers come here too and are nobody's."""
        self._header_bytes += len(name) + len(value) + 4
        key = name.decode("latin-1").lower()
        if not self._in_header:
            return
        if key not in self._headers:
            self._headers[key] = value.decode("latin-1")
        elif key == "host":
            raise _Refused(400, "malformed request", "there is more than one host header")

    def on_headers_complete(self) -> None:
        """Begin the request, or have it wait for those before it."""
        self._in_header = False
        self._pieces_bytes = 0
        if self._reframing:
            self._reframing = False
            return
        assert self._parser is not None, "it called this"
        if self._header_bytes > HEADER_MAX_BYTES:
            raise _header_too_large()
        headers = self._headers
        request = Request(self, self._parser.get_method().decode(), *_target(self._url), headers)
        request.keep_alive = self._parser.should_keep_alive()
        if not request.keep_alive or "connection" in headers or "host" not in headers:
            self._look_closer(request, self._parser.get_http_version())
        if "transfer-encoding" in headers:
            _check_coding(headers["transfer-encoding"], http10=request.http10)
        if "expect" in headers and not request.http10:
            request.expects_continue = headers["expect"].lower() == "100-continue"
        if self._parser.should_upgrade():
            self._reframing = True
            request.keep_alive = request.keep_alive and request.method != "CONNECT"
        self._receiving = request
        if self._active is None and not self._waiting and self._drained is None:
            self._since = self._server.now
            self._start(request)
        else:
            self._waiting.append(request)

    def _look_closer(self, request: Request, version: str) -> None:
        """Check what depends on the version, which is costly to ask for."""
        if version == "1.0":
            request.http10 = True
            request.keep_alive = False
        elif version != "1.1":
            raise _Refused(505, "version not supported", "this server speaks HTTP/1.1")
        elif "host" not in request.headers:
            raise _Refused(400, "malformed request", "the host header is required")

    def on_body(self, piece: bytes) -> None:
        """Take a piece of the body."""
        if self._receiving is not None:
            self._since = self._server.now
            self._pieces_bytes = 0
            self._received += 1
            self._receiving.take(piece)

    def on_message_complete(self) -> None:
        """Let the handler have the whole body."""
        request = self._receiving
        if self._reframing or request is None:
            return
        self._receiving = None
        request.complete = True
        request.wake()
        if not request.keep_alive:
            self._deaf = True

    # -- answers ---------------------------------------------------------------------------------------

    def _start(self, request: Request) -> None:
        self._active = request
        if self.is_left:
            request.leave()
        self._server.start(request)

    def _closes_after(self, request: Request) -> bool:
        return not request.keep_alive or not request.complete or self._is_done()

    def _is_done(self) -> bool:
        """Whether nothing comes after the active request."""
        return self._server.stopping or (self.is_left and not self._waiting and self._refusal is None)

    def answer(self, request: Request, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer."""
        if self._transport is None:
            return
        head, closes = self._server.head(status, headers, closes=self._closes_after(request))
        date = self._server.date
        if status in _WITHOUT_BODY:
            self._transport.write(b"%b%b\r\n" % (head, date))
        else:
            sent = b"" if request.method == "HEAD" else body
            self._transport.write(b"%b%bcontent-length: %d\r\n\r\n%b" % (head, date, len(body), sent))
        self.finish(closes=closes)

    def begin_stream(self, request: Request, status: int, headers: Headers) -> Stream:
        """Send the head of an answer without a length."""
        closes = self._closes_after(request) or request.http10
        head, closes = self._server.head(status, headers, closes=closes)
        coding = b"" if request.http10 else b"transfer-encoding: chunked\r\n"
        self.write(b"%b%b%b\r\n" % (head, self._server.date, coding))
        return Stream(self, chunked=not request.http10, mute=request.method == "HEAD", closes=closes)

    def finish(self, *, closes: bool) -> None:
        """Go on after the answer to the active request."""
        self._active = None
        self._since = self._server.now
        if self._transport is None:
            return
        if closes or self._is_done():
            self._close()
        elif self._waiting or self._paused or self._refusal is not None:
            self._next()

    def _next(self) -> None:
        """Begin what is next, if the client took the answers before it."""
        if self._drained is None:
            if self._waiting:
                self._start(self._waiting.popleft())
            elif self._refusal is not None:
                self._answer_refusal(*self._refusal.args)
                return
        self.go_on()

    def _answer_refusal(self, status: int, title: str, detail: str) -> None:
        head, _ = self._server.head(status, PROBLEM, closes=True)
        body = problem(status, title, detail)
        self.write(b"%b%bcontent-length: %d\r\n\r\n%b" % (head, self._server.date, len(body), body))
        self._close()

    def _close(self) -> None:
        """Close after the last answer; where the client may still be sending, only when it has seen the answer."""
        assert self._transport is not None, "nothing is answered after the connection was lost"
        unread = self._receiving or self._refusal or self._waiting or self._paused
        self._deaf = True
        self._waiting.clear()
        self._refusal = None
        if unread and not self.is_left and not self._transport.is_closing():
            self._lingers = True
            self._since = self._server.now
            self._transport.write_eof()
            if self._paused:
                self._paused = False
                self._transport.resume_reading()
        else:
            self._transport.close()


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The limits of time in sweeps."""

    header: int
    body: int
    answer: int
    linger: int


class HttpServer:
    """Serves one application on one port. All of it runs in the event loop that `listen` was called in."""

    def __init__(self, application: Application, limits: Limits | None = None) -> None:
        self._application = application
        self._limits = limits or Limits()
        each_s = self._limits.sweep_s
        self.bounds = _Bounds(
            ceil(self._limits.header_s / each_s),
            ceil(self._limits.body_s / each_s),
            ceil(self._limits.answer_s / each_s),
            ceil(self._limits.linger_s / each_s),
        )
        self.now = 0
        """Time in sweeps: while this process stands still, no client is late."""
        self.date = b""
        self.stopping = False
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._connections: set[Connection] = set()
        self._emptied = asyncio.Event()
        self._running: dict[Request, asyncio.Task[None]] = {}
        """Requests whose handler runs. The loop itself holds tasks only weakly."""
        self._context = contextvars.copy_context()
        self._heads: dict[tuple[int, bool, tuple[tuple[str, str], ...]], tuple[bytes, bool]] = {}
        self._full_at = -1

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self._listener is not None, "listen() comes first"
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def listen(self, port: int) -> None:
        """Accept connections to 127.0.0.1. Raises OSError if the port cannot be had."""
        self._sweep()
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(lambda: Connection(self), "127.0.0.1", port, backlog=BACKLOG)
        except BaseException:
            self._stop_sweeping()
            raise

    async def stop(self, within_s: float) -> None:
        """Accept nothing more, answer what has begun, and cut off who is left after `within_s`."""
        self.stopping = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.wind_up()
        if self._connections:
            self._emptied.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), within_s)
        for connection in list(self._connections):
            connection.abort()
        self._stop_sweeping()

    def _sweep(self) -> None:
        """Cut off who let us wait too long, and set the clock."""
        self.now += 1
        self.date = b"date: %b\r\n" % formatdate(time.time(), usegmt=True).encode()
        for connection in list(self._connections):
            if connection.is_overdue(self.now):
                connection.abort()
        self._sweeper = asyncio.get_running_loop().call_later(self._limits.sweep_s, self._sweep)

    def _stop_sweeping(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()

    # -- called by connections -------------------------------------------------------------------------

    def admit(self, connection: Connection) -> bool:
        """Count a connection in, if there is room for it."""
        if self.stopping or len(self._connections) >= self._limits.connections:
            if self._full_at != self.now and not self.stopping:
                self._full_at = self.now
                log.warning("%d connections are open: a further one was closed", len(self._connections))
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: Connection) -> None:
        """Count a connection out."""
        self._connections.discard(connection)
        if not self._connections:
            self._emptied.set()

    def start(self, request: Request) -> None:
        """Run the handler, in a context that knows nothing of other requests."""
        task = asyncio.get_running_loop().create_task(self._handle(request), context=self._context.copy())
        self._running[request] = task

    async def _handle(self, request: Request) -> None:
        failed = True
        try:
            await self._application(request, request)
            failed = False
        except Exception:  # the last resort of a server: answer, log, go on
            log.exception("%s %s failed", request.method, request.path)
        finally:
            del self._running[request]
            request.end(failed=failed)

    def head(self, status: int, headers: Headers, *, closes: bool) -> tuple[bytes, bool]:
        """Return status line and headers as bytes, and whether they announce the end of the connection."""
        key = (status, closes, tuple(headers))
        found = self._heads.get(key)
        if found is None:
            if len(self._heads) >= HEADS_MAX:
                self._heads.clear()
            found = self._heads[key] = _head(status, headers, closes=closes)
        return found


def _head(status: int, headers: Headers, *, closes: bool) -> tuple[bytes, bool]:
    announced = any(name == "connection" and value == "close" for name, value in headers)
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers)]
    if closes and not announced:
        lines.append("connection: close")
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header must be one line")
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1"), closes or announced


def _target(url: bytes) -> tuple[str, str]:
    """Return path and query of a request's target. Raises _Refused."""
    text = url.decode("latin-1")
    if text.startswith("/"):
        if "#" in text:
            text = text.partition("#")[0]
        path, _, query = text.partition("?")
    else:
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise _Refused(400, "malformed request", "the target is no address") from error
        path, query = parts.path or "/", parts.query
    return (unquote(path) if "%" in path else path), query


def _check_coding(coding: str, *, http10: bool) -> None:
    """Whoever is in front of us must not be able to see another end of the body than we do. Raises _Refused."""
    if http10 or coding.strip().lower() != "chunked":
        raise _Refused(400, "malformed request", "of the transfer codings, only chunked is understood, in HTTP/1.1")


def _header_too_large() -> _Refused:
    return _Refused(431, "header too large", f"the header must be at most {HEADER_MAX_BYTES} bytes")
