"""Start, find and signal the processes of a node, and prove for each that it belongs to that node.

A process belongs to a node if at least one of these holds:

- it has the node's token file open as descriptor 9: the file is opened by the new process itself before
  it runs the server, and everything it forks inherits it, so this holds from the first instant, after the
  parent is gone, and after `kill -9` of the harness between start and writing anything down;
- its environment names the token file (for programs that close what they inherit);
- it is the recorded process: same pid *and* same start time, so a recycled pid never counts;
- it descends from one of those.

No signal is sent without one of these proofs. Systems without /proc have the last two only.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import psutil

from compose.errors import NodeStuck

TOKEN_FD = 9
TOKEN_VARIABLE = "LEDGERPROOF_NODE_TOKEN"  # noqa: S105  a path, not a secret
TREE_ROUNDS_MAX = 50
"""Scans until a tree stops growing; a stopped tree needs two."""
KILL_TIMEOUT_S = 15.0
END_TIMEOUT_S = 5.0
POLL_S = 0.01
DELETED = " (deleted)"
"""What Linux appends to the link of a descriptor whose file is gone."""

_TOKEN_ENTRY = b"\0" + TOKEN_VARIABLE.encode() + b"="
_PROC = Path("/proc")
_HAS_PROC = sys.platform == "linux"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if _HAS_PROC else 100


class Identity(msgspec.Struct, frozen=True):
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    start_ticks: int
    """Start time in clock ticks since boot (Linux) or hundredths of a second since 1970 (elsewhere)."""


class Machine(msgspec.Struct, frozen=True):
    """Where process numbers mean something: one boot and one pid namespace of one host."""

    host: str
    boot: str
    pid_namespace: str


Place = Literal["here", "before this boot", "elsewhere"]


class Process(NamedTuple):
    """One row of the process table; `tokens` are the token files it proves."""

    identity: Identity
    parent_pid: int
    state: str
    """One letter as in /proc: R, S, D, T (stopped), …"""
    cpu_s: float
    """CPU seconds of the process and its reaped children."""
    tokens: tuple[str, ...]


_children: dict[int, Identity] = {}
"""Processes this one started and has to reap, by pid; never a recycled one, for a zombie keeps its pid."""
_exit_codes: dict[Identity, int] = {}
"""How they ended; -n for signal n. Read by `run`; the few others are a few bytes each."""
_reaping = threading.Lock()


def this_machine() -> Machine:
    """Return the machine this process runs on."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = str((_PROC / "self/ns/pid").readlink())
    return Machine(socket.gethostname(), boot, namespace)


def place_of(machine: Machine) -> Place:
    """Return whether a machine's process numbers are valid here, were before a restart, or are not ours to judge.

    A container on the same kernel is elsewhere: its processes live although they cannot be seen from here.
    """
    here = this_machine()
    if machine.boot == here.boot:
        same = machine.pid_namespace == here.pid_namespace and (bool(here.boot) or machine.host == here.host)
        return "here" if same else "elsewhere"
    return "before this boot" if machine.host == here.host else "elsewhere"


def identify(pid: int) -> Identity | None:
    """Return the identity of a live process, None if there is none (a zombie is not alive)."""
    row = _read(pid) if _HAS_PROC else _read_portably(pid)
    return row.identity if row else None


def give_way(who: Identity, niceness: int) -> None:
    """Let a session leader and its group run only with the CPU time that others leave; best effort.

    Niceness says that to the scheduler, and only between processes of one session where sessions are grouped
    (Linux' autogroups), whose own niceness counts then.
    """
    if not is_alive(who):
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PGRP, os.getpgid(who.pid), niceness)
    with contextlib.suppress(OSError):
        (_PROC / str(who.pid) / "autogroup").write_text(str(niceness))


def is_alive(who: Identity | None) -> bool:
    """Return whether exactly this process is alive (running, sleeping or stopped)."""
    if who is None:
        return False
    reap()
    return identify(who.pid) == who


def process_table() -> list[Process]:
    """Return every live process this user can see."""
    reap()
    read = _read_with_tokens if _HAS_PROC else _read_portably
    return [row for pid in psutil.pids() if (row := read(pid)) is not None]


def members(table: Sequence[Process], token: str | Path, recorded: Iterable[Identity | None] = ()) -> list[Process]:
    """Return the processes of `table` that belong to the node of `token`, oldest first.

    `token` ending in a slash stands for every token below that folder. The calling process never counts.
    """
    text = str(token)
    known = set(recorded)
    proven = [row for row in table if row.identity in known or any(_matches(t, text) for t in row.tokens)]
    found = {row.identity: row for row in proven}
    children: dict[int, list[Process]] = {}
    for row in table:
        children.setdefault(row.parent_pid, []).append(row)
    while proven:
        parent = proven.pop()
        for row in children.get(parent.identity.pid, []):
            # A child is never older than its parent: an older one had a parent whose pid was recycled.
            if row.identity not in found and row.identity.start_ticks >= parent.identity.start_ticks:
                found[row.identity] = row
                proven.append(row)
    mine = os.getpid()
    rows = [row for row in found.values() if row.identity.pid != mine]
    return sorted(rows, key=lambda row: (row.identity.start_ticks, row.identity.pid))


def spawn(argv: Sequence[str], *, token: Path, log: Path, env: Mapping[str, str]) -> Identity:
    """Start a program in a session of its own, with output appended to `log`, and return its identity.

    Raises OSError if the program cannot be run. The caller keeps no handle: see `reap`.
    """
    token.touch(mode=0o644)
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        *((os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable_fds()),
        (os.POSIX_SPAWN_OPEN, TOKEN_FD, str(token), os.O_RDONLY, 0),
    ]
    pid = os.posix_spawn(
        argv[0],
        list(argv),
        {**env, TOKEN_VARIABLE: str(token)},
        file_actions=actions,
        setsid=True,
        # Python ignores SIGPIPE; a server that inherited that would never notice a closed pipe.
        setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
        setsigmask=[],
    )
    # Our own child keeps its pid, at least as a zombie, until `reap` collects it: this cannot be another.
    identity = identify(pid) or Identity(pid, -1)
    _children[pid] = identity
    return identity


class Errand(NamedTuple):
    """Programs to be run to their end while a node is prepared, as processes of that node."""

    token: Path
    log: Path
    env: Mapping[str, str]
    go_on: Callable[[], None]
    """Called all the while; raises to give up."""
    progress: Callable[[str], None]
    """Told, for people, what takes long."""

    def spawn(self, argv: Sequence[str]) -> Identity:
        """Start a program and return its identity."""
        return spawn(argv, token=self.token, log=self.log, env=self.env)

    def run(self, argv: Sequence[str], timeout_s: float) -> int:
        """Run a program to its end and return its exit code (-n for signal n).

        It is killed with everything it started if `go_on` raises, or after `timeout_s` with TimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        self.go_on()
        who = self.spawn(argv)
        try:
            while is_alive(who) and time.monotonic() < deadline:
                self.go_on()
                time.sleep(POLL_S)
        finally:
            in_time = not is_alive(who)
            self.end(who)
        if not in_time:
            raise TimeoutError(f"{Path(argv[0]).name} did not end within {timeout_s:g} s")
        return _exit_codes.pop(who)

    def end(self, who: Identity) -> None:
        """End what is left of a program and of everything it started, by SIGKILL if it takes too long.

        It is asked first, for initdb's server would leave its shared memory behind.
        """

        def find() -> list[Process]:
            return members(process_table(), self.token, [who])

        for row in find():
            send(row.identity, signal.SIGTERM)
        with contextlib.suppress(NodeStuck):
            wait_gone(find, END_TIMEOUT_S)
        kill_tree(find)


def reap() -> None:
    """Collect children that ended, so that their pids do not linger as zombies."""
    with _reaping:
        for pid, who in list(_children.items()):
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                # This process is a fork of the one that started it, or somebody else waited for it.
                ended, status = pid, -1
            if ended:
                del _children[pid]
                _exit_codes[who] = os.waitstatus_to_exitcode(status) if status != -1 else -1


def send(who: Identity, number: int) -> bool:
    """Send a signal to exactly this process; False if it is gone.

    The process is held by a pidfd between check and signal, so its pid cannot be recycled in between.
    """
    try:
        fd = os.pidfd_open(who.pid)
    except ProcessLookupError:
        return False
    except (OSError, AttributeError):
        return _send_without_pidfd(who, number)
    try:
        if identify(who.pid) != who:
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def pause_tree(find: Callable[[], list[Process]]) -> list[Identity]:
    """Stop every process that `find` returns, until no new one appears; return those stopped.

    Stopping comes first in killing too: a stopped process cannot fork one that the scan missed.
    """
    stopped: dict[Identity, None] = {}
    for _round in range(TREE_ROUNDS_MAX):
        fresh = [row.identity for row in find() if row.identity not in stopped]
        if not fresh:
            return list(stopped)
        for who in fresh:
            send(who, signal.SIGSTOP)
            stopped[who] = None
    raise NodeStuck(f"the tree still grows after {TREE_ROUNDS_MAX} rounds of stopping its processes")


def resume_tree(find: Callable[[], list[Process]]) -> list[Identity]:
    """Let every process that `find` returns run again; return those resumed. Harmless to running ones."""
    return [row.identity for row in find() if send(row.identity, signal.SIGCONT)]


def kill_tree(find: Callable[[], list[Process]], timeout_s: float = KILL_TIMEOUT_S) -> list[Identity]:
    """SIGKILL every process that `find` returns and wait until they are gone; return those killed.

    Raises NodeStuck if some survive (they hang in the kernel, on a dead disk for example).
    """
    killed = pause_tree(find)
    for who in killed:
        send(who, signal.SIGKILL)
    wait_gone(find, timeout_s, known=killed, again=signal.SIGKILL)
    return killed


def wait_gone(
    find: Callable[[], list[Process]],
    timeout_s: float,
    *,
    known: Iterable[Identity] = (),
    again: int | None = None,
) -> None:
    """Wait until `find` returns nothing and no process it ever returned, nor any `known`, is alive.

    A process that is just ending has closed its descriptors, its token with them, but may not be gone yet.
    Signal `again` is sent to what is left. Raises NodeStuck after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    left = set(known)
    while left := {who for who in left if is_alive(who)} | {row.identity for row in find()}:
        if time.monotonic() > deadline:
            pids = ", ".join(str(who.pid) for who in sorted(left, key=lambda who: who.pid))
            raise NodeStuck(f"processes {pids} are still there after {timeout_s:g} s")
        if again is not None:
            for who in left:
                send(who, again)
        time.sleep(POLL_S)


def memory_bytes(rows: Iterable[Process]) -> int:
    """Return the memory of processes: shared pages counted once (PSS) where the kernel tells, else RSS."""
    total = 0
    for row in rows:
        pid = row.identity.pid
        try:
            text = (_PROC / str(pid) / "smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):
            with contextlib.suppress(psutil.Error):
                total += psutil.Process(pid).memory_info().rss
    return total


def describe(pid: int) -> str:
    """Return `pid 123 (command line)` for messages, as far as it can be seen."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return f"pid {pid} ({' '.join(process.cmdline())[:120] or process.name()})"
    return f"pid {pid}"


def _matches(candidate: str, token: str) -> bool:
    candidate = candidate.removesuffix(DELETED)
    return candidate.startswith(token) if token.endswith("/") else candidate == token


def is_zombie(pid: int) -> bool:
    """Return whether a process has ended and only waits for its parent to take note; False if there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    return text[text.rfind(")") + 2 :].startswith(("Z", "X"))


def _read(pid: int) -> Process | None:
    """Read one process from /proc, without its tokens; None if it is gone or a zombie."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The command name is in parentheses and may itself hold spaces and parentheses.
    fields = text[text.rfind(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    cpu_ticks = sum(int(field) for field in fields[11:15])
    return Process(Identity(pid, int(fields[19])), int(fields[1]), fields[0], cpu_ticks / _TICKS_PER_S, ())


def _read_with_tokens(pid: int) -> Process | None:
    row = _read(pid)
    if row is None:
        return None
    tokens = []
    # Processes of other users cannot be looked into, and any may end meanwhile: they prove nothing then.
    with contextlib.suppress(OSError):
        tokens.append(os.readlink(f"/proc/{pid}/fd/{TOKEN_FD}"))  # noqa: PTH115  a scan reads hundreds
    with contextlib.suppress(OSError):
        environment = b"\0" + (_PROC / str(pid) / "environ").read_bytes()
        _before, found, after = environment.partition(_TOKEN_ENTRY)
        if found:
            tokens.append(os.fsdecode(after.partition(b"\0")[0]))
    return row._replace(tokens=tuple(tokens))


def _read_portably(pid: int) -> Process | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            status, times = process.status(), process.cpu_times()
            if status == psutil.STATUS_ZOMBIE:
                return None
            identity = Identity(pid, round(process.create_time() * 100))
            state = "T" if status == psutil.STATUS_STOPPED else "S"
            return Process(identity, process.ppid(), state, times.user + times.system, ())
    except psutil.Error:
        return None


def _send_without_pidfd(who: Identity, number: int) -> bool:
    """Send a signal where the kernel has no pidfd: check right before, which leaves microseconds."""
    if identify(who.pid) != who:
        return False
    try:
        os.kill(who.pid, number)
    except ProcessLookupError:
        return False
    return True


def _inheritable_fds() -> list[int]:
    """Return descriptors above 2 that a new process would inherit, so that a server never holds a caller's pipe."""
    found = []
    for entry in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fd = int(entry.name)
            if fd > 2 and fd != TOKEN_FD and os.get_inheritable(fd):
                found.append(fd)
    return found
