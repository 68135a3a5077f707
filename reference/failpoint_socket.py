"""The admin socket of the failpoints: a Unix socket in the process's folder that only its owner can open.

It exists only where the configuration names a `failpoint_folder`. One request and one answer a connection, each a
line of JSON. It is served by a thread of its own, so that it answers while the event loop hangs in a point.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from reference import failpoints
from reference.config import ServiceConfig
from reference.failpoints import Arm, Failpoints, PointState

SOCKET_FILE: Final = "failpoints.sock"
REQUEST_MAX_BYTES: Final = 65_536
REQUEST_TIMEOUT_S: Final = 5.0
WAITING_MAX: Final = 16
"""Connections that wait for the one being answered."""


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Arm a point, disarm one ("" for all), or neither; the answer says how every point is after it."""

    arm: Arm | None = None
    disarm: str | None = None


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """How every point is, or why the request was refused."""

    points: list[PointState] = []
    error: str | None = None


@contextmanager
def short_path(folder: Path, name: str) -> Iterator[str]:
    """Yield a path to `name` in `folder` that fits into a socket's address, however long the folder's own is."""
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/{name}"
    finally:
        os.close(handle)


def listen(config: ServiceConfig, name: str) -> None:
    """Open the admin socket of process `name` and switch its failpoints on, if the configuration asks for that.

    Raises OSError if its folder cannot be used.
    """
    if config.failpoint_folder is None:
        return
    folder = Path(config.failpoint_folder) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    points = Failpoints(folder)
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    (folder / SOCKET_FILE).unlink(missing_ok=True)
    with short_path(folder, SOCKET_FILE) as path:
        door.bind(path)
    # Nobody can connect before `listen`, so there is no moment at which others could.
    (folder / SOCKET_FILE).chmod(0o600)
    door.listen(WAITING_MAX)
    failpoints.activate(points)
    threading.Thread(target=_serve, args=(door, points), name="failpoints", daemon=True).start()


def _serve(door: socket.socket, points: Failpoints) -> None:
    while True:
        connection, _ = door.accept()
        with connection, suppress(OSError):  # whoever asked has gone: there is nobody to tell
            connection.settimeout(REQUEST_TIMEOUT_S)
            connection.sendall(msgspec.json.encode(_answer(_line(connection), points)) + b"\n")


def _line(connection: socket.socket) -> bytes:
    """Read one line. Raises OSError if it does not come or does not end."""
    text = b""
    while not text.endswith(b"\n"):
        more = connection.recv(4096)
        if not more or len(text) > REQUEST_MAX_BYTES:
            raise OSError("no request came")
        text += more
    return text


def _answer(text: bytes, points: Failpoints) -> Answer:
    try:
        request = msgspec.json.decode(text, type=Request)
    except msgspec.DecodeError as error:
        return Answer(error=str(error))
    if request.disarm is not None:
        points.disarm(request.disarm or None)
    if request.arm is not None:
        points.arm(request.arm)
    return Answer(points.states())
