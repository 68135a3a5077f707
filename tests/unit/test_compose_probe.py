"""The probe sees resets at once, silence soon, and nothing else."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from compose import wire
from compose.probe import Edge, LivenessProbe, Target

Answer = Callable[[bytes], bytes | None]


class Server:
    """A server in a thread: answers what it is told to, hangs on None, and can be killed and started."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen, on the port of last time if there was one."""
        self._connections: list[socket.socket] = []
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen()
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """Close everything."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for connection in self._connections:
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        threads = []
        while True:
            try:
                connection, _peer = listener.accept()
            except OSError:
                break
            self._connections.append(connection)
            threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            threads[-1].start()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed by its client already
        for thread in threads:
            thread.join()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while data := connection.recv(65_536):
                answer = self.answer(data)
                if answer is not None:
                    connection.sendall(answer)
        except OSError:
            return  # killed


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Server]]:
    """Make servers that are gone after the test."""
    made: list[Server] = []

    def make(answer: Answer) -> Server:
        made.append(Server(answer))
        return made[-1]

    yield make
    for server in made:
        if server._thread.is_alive():
            server.kill()


def pong(_data: bytes) -> bytes:
    """Answer as a Redis that wants a password."""
    return b"-NOAUTH Authentication required.\r\n"


def refused_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def test_refused_connection_is_definite() -> None:
    with pytest.raises(wire.NoAnswer) as caught:
        wire.Connection(refused_port(), 1.0)
    assert caught.value.definite


def test_silence_is_not_definite(serve: Callable[[Answer], Server]) -> None:
    with wire.Connection(serve(lambda _d: None).port, 0.1) as connection:
        with pytest.raises(wire.NoAnswer) as caught:
            wire.redis_lives(connection)
        assert not caught.value.definite


@pytest.mark.parametrize("ask", [wire.redis_lives, wire.kafka_lives, wire.postgres_lives, wire.http_lives])
def test_server_of_another_kind_does_not_count_as_alive(
    serve: Callable[[Answer], Server], ask: Callable[[wire.Connection], None]
) -> None:
    server = serve(lambda _d: b"220 mail.example ESMTP\r\n\r\n")
    with wire.Connection(server.port, 0.2) as connection, pytest.raises(wire.NoAnswer):
        ask(connection)


@pytest.mark.parametrize(
    ("answer", "alive"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", True),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno", False),
        (b"HTTP/1.1 200 OK\r\n\r\nendless", False),
    ],
)
def test_livez(serve: Callable[[Answer], Server], answer: bytes, alive: bool) -> None:
    with wire.Connection(serve(lambda _d: answer).port, 0.3) as connection:
        for _question in range(3 if alive else 1):
            if alive:
                wire.http_lives(connection)
            else:
                with pytest.raises(wire.NoAnswer):
                    wire.http_lives(connection)


def test_status_of_a_path(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda _d: b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno")
    assert wire.http_status(server.port, "/readyz", 1.0) == 503
    with pytest.raises(wire.NoAnswer):
        wire.http_status(serve(lambda _d: b"nonsense\r\n\r\n").port, "/readyz", 1.0)


def test_kill_and_start_are_edges_of_the_right_time(serve: Callable[[Answer], Server]) -> None:
    server = serve(pong)
    seen: list[Edge] = []
    with LivenessProbe([Target("redis", "redis", server.port)], interval_s=0.02, on_edge=seen.append) as probe:
        assert _soon(lambda: probe.is_up("redis") is True)
        killed = time.monotonic()
        server.kill()
        down = probe.wait_edge("redis", up=False, after=killed, timeout_s=5)
        started = time.monotonic()
        server.start()
        up = probe.wait_edge("redis", up=True, after=started, timeout_s=5)
    assert down is not None
    assert up is not None
    assert down.not_before <= down.t
    assert seen == [down, up] == probe.edges
    assert probe.down_times("redis") == [(down.t, up.t)]
    assert down.reason
    assert not up.reason


def test_silence_is_down_from_its_first_unanswered_question(serve: Callable[[Answer], Server]) -> None:
    hanging = threading.Event()
    server = serve(lambda data: None if hanging.is_set() else pong(data))
    target = Target("redis", "redis", server.port)
    with LivenessProbe([target], interval_s=0.02, timeout_s=0.2) as probe:
        assert _soon(lambda: probe.is_up("redis") is True)
        paused = time.monotonic()
        hanging.set()
        down = probe.wait_edge("redis", up=False, after=paused, timeout_s=5)
        noticed = time.monotonic()
        assert down is not None
        assert down.t < noticed - 0.2  # two silent questions later, but dated back to the first
        hanging.clear()
        assert probe.wait_edge("redis", up=True, after=noticed, timeout_s=5) is not None


def test_one_slow_answer_is_no_edge(serve: Callable[[Answer], Server]) -> None:
    slow_once = threading.Event()

    def answer(data: bytes) -> bytes:
        if slow_once.is_set():
            slow_once.clear()
            time.sleep(0.3)
        return pong(data)

    server = serve(answer)
    with LivenessProbe([Target("redis", "redis", server.port)], interval_s=0.02, timeout_s=0.2) as probe:
        assert _soon(lambda: probe.is_up("redis") is True)
        slow_once.set()
        assert _soon(lambda: not slow_once.is_set())
        assert probe.wait_edge("redis", up=False, after=0.0, timeout_s=0.8) is None


def test_node_that_is_down_from_the_start_has_no_edge_until_it_is_up(serve: Callable[[Answer], Server]) -> None:
    server = serve(pong)
    server.kill()
    with LivenessProbe([Target("redis", "redis", server.port)], interval_s=0.02) as probe:
        assert _soon(lambda: probe.is_up("redis") is False)
        assert probe.edges == []
        server.start()
        assert _soon(lambda: [edge.up for edge in probe.edges] == [True])
        assert probe.down_times("redis") == []


def _soon(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
