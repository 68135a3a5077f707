"""Keep-alive HTTP/1.1 to one API process on gevent, exact about whether a request may have reached the service.

As in the main job's own client, `NotSent` means certainly not and `Lost` means perhaps; nothing is sent twice. One
greenlet waits for one answer; deadlines are kept by one sweeping greenlet a pool, because a timer for each request
costs more than the rest of it.
"""

import socket as plain_socket
import time
from typing import Any, Final

import gevent
from gevent import socket

from load.answers import CLOSE, CONNECT_TIMEOUT_S, LENGTH, MAX_HEADER_BYTES, NOT_ADMITTED, Lost, NotSent, Reply

MAX_BODY_BYTES: Final = 16_777_216
RECEIVE_BYTES: Final = 65_536
SWEEP_S: Final = 0.05
"""Deadlines are kept to this precision."""

_PEEK: Final = plain_socket.MSG_PEEK | plain_socket.MSG_DONTWAIT

DEFINITE_STATUSES: Final = frozenset({400, 401, 403, 404, 405, 409, 411, 413, 414, 415, 422, 429, 431})
"""Refusals by status alone: the service answered, and it answers these before or instead of posting."""


def classify(status: int, not_admitted: bool) -> str:
    """Return what an answer says about its command: "ok", "fail" (certainly no effect) or "info" (nobody knows)."""
    if 200 <= status < 300:
        return "ok"
    if status in DEFINITE_STATUSES or (status == 503 and not_admitted):
        return "fail"
    return "info"


class _Connection:
    __slots__ = ("deadline", "expired", "sock")

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.deadline = 0.0
        self.expired = False


class Wire:
    """A pool of connections to one API process. The last one used is the first used again."""

    def __init__(self, host: str, port: int, *, timeout_s: float) -> None:
        """Take the name or IPv4 address of a host. Raises OSError if the name is not known."""
        self.host = plain_socket.gethostbyname(host)
        self.port = port
        self.timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._busy: dict[_Connection, None] = {}
        """In the order in which their requests began, which is also that of their deadlines."""
        self._sweeper = gevent.spawn(self._sweep)

    def exchange(self, request: bytes) -> Reply:
        """Send one serialised request and return its answer.

        Raises NotSent if there was no connection to send it on, Lost if it was sent and no complete answer came in
        time.
        """
        connection = self._take()
        connection.deadline = time.monotonic() + self.timeout_s
        self._busy[connection] = None
        reply: Reply | None = None
        reusable = False
        try:
            connection.sock.sendall(request)
            reply, reusable = _receive(connection.sock)
        except OSError as error:
            raise Lost("timeout" if connection.expired else f"connection broke: {type(error).__name__}") from error
        finally:
            # Reached by a killed greenlet too: a connection with an answer under way is never used again.
            del self._busy[connection]
            if reusable and not connection.expired:
                self._idle.append(connection)
            else:
                connection.sock.close()
        return reply

    def connect(self, count: int) -> None:
        """Open connections ahead, so that the first requests do not wait for theirs. Raises NotSent."""
        opened = [self._open() for _ in range(count)]
        self._idle.extend(opened)

    def close(self) -> None:
        """Drop every connection; requests still waiting are Lost."""
        self._sweeper.kill()
        for connection in [*self._idle, *self._busy]:
            connection.sock.close()
        self._idle.clear()

    def _take(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if _is_open(connection.sock):
                return connection
            connection.sock.close()
        return self._open()

    def _open(self) -> _Connection:
        # gevent's create_connection would look the address up in a thread each time, for ten times the CPU of this.
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(CONNECT_TIMEOUT_S)
        try:
            sock.connect((self.host, self.port))
        except OSError as error:
            sock.close()
            raise NotSent(f"no connection: {type(error).__name__}") from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        return _Connection(sock)

    def _sweep(self) -> None:
        while True:
            gevent.sleep(SWEEP_S)
            now = time.monotonic()
            for connection in list(self._busy):
                if connection.deadline > now:
                    break
                connection.expired = True
                # Wakes the greenlet that waits for the answer with an error.
                connection.sock.close()


def _is_open(sock: Any) -> bool:
    """Return whether an idle connection can carry a request; one with anything to read cannot."""
    try:
        # On the plain socket below gevent's, so that it answers at once.
        sock._sock.recv(1, _PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _receive(sock: Any) -> tuple[Reply, bool]:
    """Read one answer; return it and whether the connection may be used again. Raises Lost and OSError."""
    buffer = sock.recv(RECEIVE_BYTES)
    end = buffer.find(b"\r\n\r\n")
    while end < 0:
        if not buffer:
            raise Lost("connection closed before the answer")
        if len(buffer) > MAX_HEADER_BYTES:
            raise Lost("the answer's header is too long")
        more = sock.recv(RECEIVE_BYTES)
        if not more:
            raise Lost("connection closed within the answer")
        buffer += more
        end = buffer.find(b"\r\n\r\n")
    head = buffer[: end + 2]
    length = LENGTH.search(head)
    if length is None or not head.startswith(b"HTTP/1."):
        # The service always sends a length; anything else is not an answer we can trust.
        raise Lost("the answer has no content-length")
    total = end + 4 + int(length[1])
    if total > MAX_BODY_BYTES:
        raise Lost("the answer is too long")
    while len(buffer) < total:
        more = sock.recv(RECEIVE_BYTES)
        if not more:
            raise Lost("connection closed within the answer")
        buffer += more
    status = int(head[9:12])
    not_admitted = status >= 400 and NOT_ADMITTED.search(head) is not None
    reusable = len(buffer) == total and CLOSE.search(head) is None
    return Reply(status, not_admitted, buffer[end + 4 : total]), reusable
