"""A server on 127.0.0.1 with programmed freezes: `python -m load.freeze_server PATTERN DURATION_S`.

It prints its port, answers every HTTP/1.1 request with the same small JSON, and begins its pattern at the first
request. When its standard input ends it prints, as JSON, when the pattern began and how late its answers left; what a
load must report follows from that and the schedule.

One thread, epoll, and a timer file: the answers leave within a tenth of a millisecond of their time, where the timers
of asyncio would add up to one.
"""

import heapq
import re
import select
import socket
import sys
import time
from typing import Final

import msgspec
import numpy as np

from load.alarm import TimerFile
from load.freezes import PATTERNS, Pattern
from load.priority import real_time

BODY: Final = b'{"outcome":"ACCEPTED","replayed":false}'
ANSWER: Final = (
    b"HTTP/1.1 202 Accepted\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
)
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
MAX_REQUEST_BYTES: Final = 1_000_000


class ServerReport(msgspec.Struct, frozen=True):
    """What the server says at its end. Moments are readings of time.monotonic()."""

    began_s: float
    arrivals_s: list[float]
    """When requests came, since the first."""
    lateness_ms: list[float]
    """How long after their time answers left, ascending."""

    def late_ms(self, percent: float) -> float:
        """Return the lateness of the answers at a percentile."""
        return float(np.percentile(self.lateness_ms, percent)) if self.lateness_ms else 0.0


class FreezeServer:
    """Serves one pattern. Freezes are relative to the first request."""

    def __init__(self, pattern: Pattern, duration_s: float) -> None:
        self._pattern = pattern
        self._duration_s = duration_s
        self._windows = pattern.windows(duration_s)
        self._began_s: float | None = None
        self._due: list[tuple[float, int, socket.socket]] = []
        self._number = 0
        self._buffers: dict[int, tuple[socket.socket, bytes]] = {}
        self._late_ms: list[float] = []
        self._arrivals_s: list[float] = []
        self._epoll = select.epoll()
        self._timer = TimerFile()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]

    def serve(self, until_fd: int) -> ServerReport:
        """Serve until a file can be read."""
        for fd in (self._listener.fileno(), self._timer.fd, until_fd):
            self._epoll.register(fd, select.EPOLLIN)
        while True:
            for fd, _ in self._epoll.poll():
                if fd == until_fd:
                    return self._report()
                if fd == self._timer.fd:
                    self._timer.take()
                elif fd == self._listener.fileno():
                    self._accept()
                else:
                    self._receive(fd)
            self._answer_due()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._buffers[connection.fileno()] = (connection, b"")
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _receive(self, fd: int) -> None:
        connection, buffer = self._buffers[fd]
        try:
            data = connection.recv(65_536)
        except OSError:
            data = b""
        if not data or len(buffer) > MAX_REQUEST_BYTES:
            self._drop(connection, fd)
            return
        buffer += data
        while (end := buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(buffer, 0, end + 2)
            total = end + 4 + (int(length[1]) if length is not None else 0)
            if len(buffer) < total:
                break
            buffer = buffer[total:]
            self._requested(connection)
        self._buffers[fd] = (connection, buffer)

    def _drop(self, connection: socket.socket, fd: int) -> None:
        self._epoll.unregister(fd)
        del self._buffers[fd]
        connection.close()

    def _requested(self, connection: socket.socket) -> None:
        """Note when the answer to a request that comes now is due."""
        now_s = time.monotonic()
        if self._began_s is None:
            self._began_s = now_s
        since_s = now_s - self._began_s
        wait_s = next((end_s - since_s for start_s, end_s in self._windows if start_s <= since_s < end_s), 0.0)
        service_s = float(self._pattern.service(np.array(since_s), self._duration_s))
        self._arrivals_s.append(since_s)
        self._number += 1
        heapq.heappush(self._due, (now_s + wait_s + service_s, self._number, connection))

    def _answer_due(self) -> None:
        now_s = time.monotonic()
        while self._due and self._due[0][0] <= now_s:
            due_s, _, connection = heapq.heappop(self._due)
            self._late_ms.append((now_s - due_s) * 1000)
            try:
                connection.send(ANSWER)
            except OSError:
                continue  # the client is gone; its connection ends by itself
            now_s = time.monotonic()
        if self._due:
            self._timer.set(self._due[0][0])

    def _report(self) -> ServerReport:
        return ServerReport(self._began_s or 0.0, self._arrivals_s, sorted(self._late_ms))


def main() -> int:
    """Serve until standard input ends."""
    pattern, duration_s = sys.argv[1:3]
    server = FreezeServer(PATTERNS[pattern], float(duration_s))
    print(server.port, flush=True)
    with real_time():
        report = server.serve(sys.stdin.fileno())
    print(msgspec.json.encode(report).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
