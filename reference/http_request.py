"""One HTTP request as the application sees it: what it asks for, its body, and the way to answer it."""

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self

import msgspec

from reference.answers import Problem

if TYPE_CHECKING:
    from reference.http_server import Connection

log = logging.getLogger("ledgerproof.http")

BODY_BUFFER_BYTES: Final = 64 * 1024
"""So much of a body waits for an application that has not asked for the whole; then the client has to wait."""

Headers = Sequence[tuple[str, str]]
PROBLEM: Final = [("content-type", "application/problem+json")]
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_encode = msgspec.json.Encoder().encode


class ConnectionEnded(Exception):
    """The rest of the request cannot come or the answer cannot go: the client left, stalled or broke the protocol."""


class Request:
    """One request: what it asks for, its body, and the way to answer it, once."""

    __slots__ = (
        "_answered",
        "_body",
        "_broken",
        "_connection",
        "_gone",
        "_stream",
        "_waiter",
        "_wants_all",
        "complete",
        "expects_continue",
        "headers",
        "http10",
        "keep_alive",
        "method",
        "path",
        "query_string",
    )

    def __init__(
        self, connection: "Connection", method: str, path: str, query_string: str, headers: dict[str, str]
    ) -> None:
        self.method = method
        self.path = path
        """Decoded from percents and UTF-8; what is not UTF-8 is replaced."""
        self.query_string = query_string
        self.headers = headers
        """The first value of each header, by its name in lower case."""
        self.keep_alive = True
        self.http10 = False
        self.complete = False
        """The whole body has arrived."""
        self.expects_continue = False
        """The client sends its body once it is told to."""
        self._connection = connection
        self._body: bytes | bytearray = b""
        self._broken: str | None = None
        self._wants_all = False
        self._waiter: asyncio.Future[None] | None = None
        self._gone: asyncio.Future[None] | None = None
        self._answered = False
        self._stream: Stream | None = None

    async def __call__(self) -> bytes:
        """Return the whole body, however long: look at content-length first. Raises ConnectionEnded."""
        self._wants_all = True
        while not self.complete:
            await self._more()
        body, self._body = bytes(self._body), b""
        return body

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Return the next piece of the body. Raises ConnectionEnded."""
        while not self._body:
            if self.complete:
                raise StopAsyncIteration
            await self._more()
        piece, self._body = bytes(self._body), b""
        return piece

    def response_bytes(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer. Without effect if the client is gone."""
        self._check_unanswered()
        self._connection.answer(self, status, headers, body)
        self._answered = True

    def response_str(self, status: int, headers: Headers, body: str) -> None:
        """Answer with a text."""
        self.response_bytes(status, headers, body.encode())

    def response_stream(self, status: int, headers: Headers) -> "Stream":
        """Begin an answer of unknown length; it ends when the handler returns."""
        self._check_unanswered()
        self._stream = self._connection.begin_stream(self, status, headers)
        self._answered = True
        return self._stream

    def client_disconnect(self) -> asyncio.Future[None]:
        """Return a future that is done once the client left or stopped sending for good."""
        if self._gone is None:
            self._gone = asyncio.get_running_loop().create_future()
            if self._connection.is_left:
                self._gone.set_result(None)
        return self._gone

    def _check_unanswered(self) -> None:
        if self._answered:
            raise RuntimeError("a request is answered once")

    async def _more(self) -> None:
        """Wait until something of the body arrived. Raises ConnectionEnded."""
        if self._broken is not None:
            raise ConnectionEnded(self._broken)
        if self.expects_continue:
            self.expects_continue = False
            self._connection.write(_CONTINUE)
        self._waiter = asyncio.get_running_loop().create_future()
        self._connection.go_on()
        await self._waiter

    # -- called by the connection ----------------------------------------------------------------------

    def take(self, piece: bytes) -> None:
        """Add what arrived of the body."""
        self.expects_continue = False
        if not self._body:
            self._body = piece
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += piece
        self.wake()

    def wake(self) -> None:
        """Let the handler look at what changed."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def is_full(self) -> bool:
        """Whether no more of the body may be read for now."""
        return len(self._body) > BODY_BUFFER_BYTES and not self._wants_all

    def break_off(self, reason: str) -> None:
        """Nothing more of the body will come."""
        self._broken = reason
        self.wake()

    def leave(self) -> None:
        """Tell the handler, if it asks, that its client left."""
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def end(self, *, failed: bool) -> None:
        """End the stream of a handler that returned, or answer in its place if it did not."""
        if self._stream is not None:
            self._stream.end(failed=failed)
        elif not self._answered:
            if not failed:
                log.error("%s %s got no answer", self.method, self.path)
            body = problem(500, "internal error", "see the log of this process")
            self.response_bytes(500, PROBLEM, body)


class Stream:
    """An answer that is sent in pieces."""

    __slots__ = ("_chunked", "_closes", "_connection", "_ended", "_mute")

    def __init__(self, connection: "Connection", *, chunked: bool, mute: bool, closes: bool) -> None:
        self._connection = connection
        self._chunked = chunked
        self._mute = mute
        self._closes = closes
        self._ended = False

    async def send_bytes(self, data: bytes) -> None:
        """Send a piece and wait while the client does not take what was sent. Raises ConnectionEnded."""
        if self._ended or self._connection.is_lost:
            raise ConnectionEnded("the answer is over" if self._ended else "the client left")
        if data and not self._mute:
            self._connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        await self._connection.drained()

    async def send_str(self, text: str) -> None:
        """Send a text. Raises ConnectionEnded."""
        await self.send_bytes(text.encode())

    def end(self, *, failed: bool) -> None:
        """End the answer; one that failed is cut off, so that nobody takes it for whole."""
        self._ended = True
        if failed:
            self._connection.abort()
        else:
            if self._chunked and not self._mute:
                self._connection.write(b"0\r\n\r\n")
            self._connection.finish(closes=self._closes)


def problem(status: int, title: str, detail: str) -> bytes:
    """Return an error of the server itself in the form of the application's (`web.problem`)."""
    return _encode(Problem(f"urn:ledgerproof:{title.replace(' ', '-')}", title, status, detail))
