"""Ports: never the same for two stacks, and clear words when they are taken."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from compose import ports
from compose.errors import FolderError, NoFreePorts, PortTaken, StackExists
from compose.processes import Identity, identify, this_machine
from compose.state import StackSpec, StackState, create


@pytest.fixture(autouse=True)
def _own_register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A register of this test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def me() -> Identity:
    """This process."""
    found = identify(os.getpid())
    assert found is not None
    return found


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A foreign server on some port."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


DEAD = Identity(2**22 + 1, 1)
"""A process that cannot be: its pid is above the kernel's limit."""


def test_two_stacks_never_get_the_same_port(tmp_path: Path, me: Identity) -> None:
    runs = [ports.reserve(tmp_path / f"s{index}", 13, None, me, keep=False) for index in range(20)]
    every = [port for run in runs for port in run]
    assert len(set(every)) == len(every)
    assert all(run == list(range(run[0], run[0] + 13)) for run in runs)


def test_ports_are_below_those_of_outgoing_connections(tmp_path: Path, me: Identity) -> None:
    # A dead node's port could otherwise be taken by anybody's outgoing connection.
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports.reserve(tmp_path / "s", 13, None, me, keep=False)) < first_outgoing


def test_reserved_port_stays_reserved_while_nobody_listens(tmp_path: Path, me: Identity) -> None:
    got = ports.reserve(tmp_path / "one", 3, None, me, keep=False)
    with pytest.raises(PortTaken, match=rf"port {got[0]} .*{tmp_path / 'one'}"):
        ports.reserve(tmp_path / "two", 3, got[0], me, keep=False)
    ports.release(tmp_path / "one")
    assert ports.reserve(tmp_path / "two", 3, got[0], me, keep=False) == got


def test_taken_port_is_named_with_its_holder(tmp_path: Path, me: Identity, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(PortTaken, match=rf"port {port} is in use by pid {os.getpid()} "):
        ports.reserve(tmp_path / "s", 2, port - 1, me, keep=False)
    assert ports.reservations() == []


def test_connections_that_wait_out_their_time_do_not_count(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    server, _peer = listener.accept()
    server.close()  # the side that closes first keeps the port in TIME_WAIT
    client.close()
    listener.close()
    assert ports.is_free(port)


def test_second_stack_in_a_folder_is_refused_and_takes_nothing_from_the_first(tmp_path: Path, me: Identity) -> None:
    got = ports.reserve(tmp_path / "s", 2, None, me, keep=False)
    with pytest.raises(StackExists, match="already a stack"):
        ports.reserve(tmp_path / "s", 2, None, me, keep=False)
    assert [entry.ports for entry in ports.reservations()] == [got]


def test_reservation_of_a_dead_owner_lives_as_long_as_its_stack_has_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "stacks" / "s"
    got = ports.reserve(folder, 2, None, DEAD, keep=True)
    create(folder, _state(DEAD, got))
    assert [entry.ports for entry in ports.reservations()] == [got]


def test_reservation_goes_when_another_stack_has_its_folder(tmp_path: Path, me: Identity) -> None:
    folder = tmp_path / "stacks" / "s"
    got = ports.reserve(folder, 2, None, DEAD, keep=False)
    create(folder, _state(me, got))
    assert ports.reservations() == []


def test_unreadable_register_is_begun_anew(tmp_path: Path, me: Identity) -> None:
    (ports.register_folder() / "ports.json").write_text("{")
    assert len(ports.reserve(tmp_path / "s", 2, None, me, keep=False)) == 2


def test_register_prepared_by_somebody_else_is_refused(tmp_path: Path, me: Identity) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"ledgerproof-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(FolderError, match="somebody else"):
        ports.reserve(tmp_path / "s", 2, None, me, keep=False)


def test_no_free_run_is_an_answer(tmp_path: Path, me: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "is_free", lambda _port: False)
    with pytest.raises(NoFreePorts, match="ledgerproof down"):
        ports.reserve(tmp_path / "s", 2, None, me, keep=False)


def test_processes_that_reserve_at_once_get_different_ports(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom compose import ports, processes\n"
        "me = processes.identify(os.getpid())\n"
        "for i in range(10): print(*ports.reserve(Path(sys.argv[1]) / str(i), 5, None, me, keep=False))\n"
        "sys.stdout.flush(); sys.stdin.read()\n"
    )
    project = Path(__file__).parents[2]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / str(index))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=project,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        for index in range(2)
    ]
    every: list[str] = []
    for process in running:
        assert process.stdout is not None
        every += [port for _line in range(10) for port in process.stdout.readline().split()]
    for process in running:
        process.communicate()
    assert len(every) == 100
    assert len(set(every)) == 100


def _state(owner: Identity, got: list[int]) -> StackState:
    return msgspec.convert(
        {
            "name": "s",
            "machine": msgspec.to_builtins(this_machine()),
            "owner": msgspec.to_builtins(owner),
            "created_unix_s": 0.0,
            "spec": msgspec.to_builtins(StackSpec(keep=True)),
            "ports": got,
            "nodes": [],
            "superuser": "postgres",
            "superuser_password": "x",
            "redis_password": "x",
            "kafka_controller_port": 1,
        },
        StackState,
    )
