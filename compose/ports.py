"""Ports that stay a stack's own from its start to its end, also while the node that uses one is dead.

A machine-wide register (one per user, in the folder for temporary files) holds the ports of every stack;
it is changed under a lock, and a port is only handed out after a trial bind. Ports come from below the
range the kernel gives to outgoing connections, which could otherwise take the port of a dead node.
"""

import contextlib
import os
import random
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from compose.errors import FolderError, NoFreePorts, PortTaken, StackExists
from compose.processes import Identity, Machine, describe, is_alive, place_of, this_machine
from compose.state import STATE_FILE, StackState, held

HOST = "127.0.0.1"
FIRST_PORT = 12_000
LAST_PORT = 32_000
TRIES_MAX = 500
LOCK_TIMEOUT_S = 30.0


class Reservation(msgspec.Struct, frozen=True):
    """The ports of one stack, from before its folder exists until it is taken down."""

    folder: str
    ports: list[int]
    owner: Identity
    machine: Machine
    keep: bool


def reserve(folder: Path, count: int, base_port: int | None, owner: Identity, *, keep: bool) -> list[int]:
    """Reserve `count` consecutive ports for the stack in `folder` and return them.

    Raises PortTaken if a port from `base_port` on is in use, NoFreePorts if no free run is found, StackExists
    if there is a stack in that folder or one is being started there.
    """
    with _register() as book:
        if any(entry.folder == str(folder) for entry in book):
            raise StackExists(
                f"there is already a stack in {folder}: take it down (`ledgerproof down`) or use another name"
            )
        reserved = {port: entry for entry in book for port in entry.ports}
        if base_port is not None:
            ports = list(range(base_port, base_port + count))
            for port in ports:
                if port in reserved:
                    raise PortTaken(
                        f"port {port} is reserved by the stack in {reserved[port].folder}: "
                        "take that one down or choose another first port"
                    )
                if not is_free(port):
                    raise PortTaken(f"port {port} is in use by {holder(port)}: free it or choose another first port")
        else:
            ports = _free_run(count, set(reserved))
        book.append(Reservation(str(folder), ports, owner, this_machine(), keep))
    return ports


def release(folder: Path) -> None:
    """Give back the ports of the stack in `folder`; harmless if it has none."""
    with _register() as book:
        book[:] = [entry for entry in book if entry.folder != str(folder)]


def reservations() -> list[Reservation]:
    """Return what is in the register, stale entries removed."""
    with _register() as book:
        return list(book)


def is_free(port: int) -> bool:
    """Return whether a server could listen on the port of 127.0.0.1 now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        # As servers do: connections of an ended server that only wait out their time are no hindrance.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
            trial.listen(1)
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """Return who listens on a port, as far as this user may see it."""
    # Other users' sockets are hidden from an ordinary user; on some systems all are.
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid
            ):
                return describe(connection.pid)
    return "a process that cannot be seen from here"


def register_folder() -> Path:
    """Return the folder of the register; FolderError if another user could have prepared it."""
    user_id = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"ledgerproof-{user_id}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise FolderError(
            f"cannot make {folder}: {error.strerror}; set TMPDIR to a folder that can be written"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user_id:
        raise FolderError(f"{folder} belongs to somebody else: remove it or set TMPDIR to a folder of your own")
    return folder


@contextlib.contextmanager
def _register() -> Iterator[list[Reservation]]:
    """Hold the register: yield its live entries for change, and write them back."""
    folder = register_folder()
    path = folder / "ports.json"
    with held(folder / "ports.lock", LOCK_TIMEOUT_S):
        book: list[Reservation] = []
        # An unreadable register (disk full, older version) is begun anew: the trial bind still protects.
        with contextlib.suppress(OSError, msgspec.DecodeError):
            book = msgspec.json.decode(path.read_bytes(), type=list[Reservation])
        book = [entry for entry in book if not _is_stale(entry)]
        yield book
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(book))
            temporary.replace(path)
        except OSError as error:
            raise FolderError(f"cannot write {path}: {error.strerror}") from error


def _is_stale(entry: Reservation) -> bool:
    """Return whether nobody can come back to these ports.

    While a folder still says it holds a stack, its ports stay: it may be healed, or is still to be cleaned.
    """
    place = place_of(entry.machine)
    if place == "here" and is_alive(entry.owner):
        return False
    try:
        state = msgspec.json.decode((Path(entry.folder) / STATE_FILE).read_bytes(), type=StackState)
    except (OSError, ValueError):
        # The folder is gone. Processes may be left, and only the register knows of them: `sweep` releases.
        return place == "before this boot"
    return state.owner != entry.owner


def _free_run(count: int, reserved: set[int]) -> list[int]:
    last = min(LAST_PORT, _first_outgoing_port() - 1)
    for _try in range(TRIES_MAX):
        first = random.randint(FIRST_PORT, max(FIRST_PORT, last - count))  # noqa: S311  spreads, protects nothing
        run = list(range(first, first + count))
        if reserved.isdisjoint(run) and all(is_free(port) for port in run):
            return run
    raise NoFreePorts(
        f"no {count} consecutive free ports between {FIRST_PORT} and {last}: "
        "take other stacks down (`ledgerproof down`) or name a first port"
    )


def _first_outgoing_port() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return 49_152
