"""The load's HTTP client: exact about what may have been sent, and of one mind with the main job's client."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import gevent
import pytest

from ledgerproof import client as main_client
from ledgerproof import wire as main_wire
from ledgerproof import workload as main_workload
from load import requests
from load.alarm import Alarm
from load.answers import Lost, NotSent, get, post
from load.schedule import Arrival
from load.wire import DEFINITE_STATUSES, Wire, classify
from reference.commands import Side

ANSWER = b"HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\n{}"

Behaviour = Callable[[socket.socket, int], None]
"""What a server does with one connection, and which one that is."""


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[Wire]:
    """A real server of threads, and a wire to it that gives up after 0.3 s."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=behave, args=(connection, len(connections)), daemon=True).start()

    def behave(connection: socket.socket, number: int) -> None:
        with suppress(OSError):  # the client may be gone at any time
            behaviour(connection, number)

    threading.Thread(target=accept, daemon=True).start()
    wire = Wire("localhost", listener.getsockname()[1], timeout_s=0.3)
    try:
        yield wire
    finally:
        wire.close()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            connection.close()


def answers(*pieces: bytes) -> Behaviour:
    def behave(connection: socket.socket, _: int) -> None:
        while connection.recv(65536):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.01)

    return behave


def closes_after(data: bytes) -> Behaviour:
    def behave(connection: socket.socket, _: int) -> None:
        connection.recv(65536)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_RDWR)

    return behave


def test_an_answer_in_pieces_is_put_together() -> None:
    with serving(answers(ANSWER[:9], ANSWER[9:40], ANSWER[40:])) as wire:
        for _ in range(3):
            reply = wire.exchange(get("/", ""))
            assert (reply.status, reply.not_admitted, reply.body) == (202, False, b"{}")


def test_a_refusal_that_certifies_that_nothing_was_done() -> None:
    data = b"HTTP/1.1 503 Busy\r\nX-Admitted: 0\r\nContent-Length: 0\r\n\r\n"
    with serving(answers(data)) as wire:
        reply = wire.exchange(get("/", ""))
    assert classify(reply.status, reply.not_admitted) == "fail"
    assert classify(503, not_admitted=False) == "info"


def test_silence_is_lost_at_its_deadline_and_the_connection_is_not_used_again() -> None:
    def behave(connection: socket.socket, number: int) -> None:
        while connection.recv(65536):
            if number > 1:
                connection.sendall(ANSWER)

    with serving(behave) as wire:
        began = time.monotonic()
        with pytest.raises(Lost, match="timeout"):
            wire.exchange(get("/", ""))
        assert 0.25 < time.monotonic() - began < 2.0
        assert wire.exchange(get("/", "")).status == 202


def test_many_silent_requests_end_together() -> None:
    with serving(lambda connection, _: time.sleep(5)) as wire:
        waiting = [gevent.spawn(_outcome, wire) for _ in range(20)]
        gevent.joinall(waiting, timeout=3.0)
        assert [greenlet.value for greenlet in waiting] == ["timeout"] * 20


def _outcome(wire: Wire) -> str:
    try:
        return str(wire.exchange(get("/", "")).status)
    except Lost as error:
        return str(error)


@pytest.mark.parametrize(
    "data",
    [b"", ANSWER[:20], ANSWER[:-1], b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", b"x" * 70_000],
)
def test_anything_but_a_whole_answer_is_lost(data: bytes) -> None:
    with serving(closes_after(data)) as wire, pytest.raises(Lost):
        wire.exchange(get("/", ""))


def test_no_connection_is_not_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    wire = Wire("127.0.0.1", port, timeout_s=0.3)
    with pytest.raises(NotSent):
        wire.exchange(get("/", ""))
    wire.close()


def test_an_idle_connection_that_was_closed_is_not_used() -> None:
    closed = threading.Event()

    def behave(connection: socket.socket, number: int) -> None:
        connection.recv(65536)
        connection.sendall(ANSWER)
        if number == 1:
            connection.shutdown(socket.SHUT_RDWR)
            closed.set()

    with serving(behave) as wire:
        wire.exchange(get("/", ""))
        assert closed.wait(5.0)
        assert wire.exchange(get("/", "")).status == 202


def test_a_connection_that_is_to_be_closed_is_not_used_again() -> None:
    seen: list[int] = []

    def behave(connection: socket.socket, number: int) -> None:
        while connection.recv(65536):
            seen.append(number)
            connection.sendall(ANSWER.replace(b"content", b"connection: close\r\ncontent"))

    with serving(behave) as wire:
        wire.exchange(get("/", ""))
        wire.exchange(get("/", ""))
    assert seen == [1, 2]


def test_an_alarm_rings_at_its_moment_and_lets_others_run() -> None:
    alarm = Alarm()
    others: list[float] = []
    ticker = gevent.spawn(lambda: [others.append(time.monotonic()) or gevent.sleep(0.001) for _ in range(20)])
    moment = time.monotonic() + 0.05
    alarm.wait_until(moment)
    assert 0 <= time.monotonic() - moment < 0.04
    assert others
    alarm.wait_until(moment - 1)
    ticker.join()
    alarm.close()


# --- of one mind with the main job ------------------------------------------------------------------------


def test_both_clients_classify_every_answer_alike() -> None:
    assert DEFINITE_STATUSES == main_client.DEFINITE_STATUSES
    for status in range(100, 600):
        for not_admitted in (False, True):
            assert classify(status, not_admitted) == main_client.classify(status, not_admitted)


def test_both_clients_send_the_same_bytes() -> None:
    assert get("/a", "t") == main_wire.get("/a", "t")
    assert post("/a", "k", b"{}", "") == main_wire.post("/a", "k", b"{}", "")


def test_both_workloads_record_the_same_commands() -> None:
    arrival = Arrival(5, 1.0, "bet", "a", 3, 0, "HOME", "LAY", 250, 400, 0)
    names = requests.Names("run", "world", 1000, ["m0"])
    theirs = main_workload.bet(
        user=1003, match_id="m0", selection="HOME", side=Side.LAY, odds=250, stake_minor=400, key="run-5"
    )
    pairs = [
        (names.command(arrival), theirs),
        (requests.deposit(7, 100, "k"), main_workload.deposit(7, 100, "k")),
        (requests.cancel(7, "m0", "b", "k"), main_workload.cancel(7, "m0", "b", "k")),
        (
            requests.balance(7, strong=False, min_seq=3),
            main_workload.balance(7, strong=False, min_seq=3),
        ),
        (requests.entries(7, 2), main_workload.entries(7, 2)),
    ]
    for ours, other in pairs:
        assert ours.payload_hash() == other.payload_hash
        for name in requests.Command.__slots__:
            assert getattr(ours, name) == getattr(other, name), (ours.op, name)
