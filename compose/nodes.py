"""What can be done to one node, of whatever kind: look at it, break it, heal it, wait for it."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from compose import kafka, ports, postgres, processes, redis, service, wire
from compose.errors import NodeDied, NodeNotReady, NodeStuck, PortTaken, UnknownNode
from compose.processes import Identity, Process
from compose.state import Kind, NodeRecord, StackState

NodeState = Literal["running", "paused", "dead"]

STOP_SIGNALS: dict[Kind, int] = {
    "postgres": postgres.STOP_SIGNAL,
    "kafka": kafka.STOP_SIGNAL,
    "redis": redis.STOP_SIGNAL,
    "service": service.STOP_SIGNAL,
}
DISCARD_SIGNALS: dict[Kind, int] = {**STOP_SIGNALS, "postgres": postgres.DISCARD_SIGNAL, "kafka": signal.SIGKILL}
"""How a node is ended whose data will not be read again."""

READY_TRY_S = 2.0
"""One question whether a node is ready waits this long at most."""
READY_POLL_S = 0.05
PORT_FREE_TIMEOUT_S = 15.0
WORKER_NICENESS = 10
"""A worker that is late leaves a backlog; an answer that is late is lost. A tenth of the weight of the others."""
KAFKA_NICENESS = 5
"""Only workers wait for it; less far back than they are, for it has leases to keep."""
TAIL_LINES = 15
TAIL_BYTES = 16_384
PAUSE_FILE = "pause"

# They would change how a server or a client library behaves, depending on who starts the stack.
FOREIGN_VARIABLES = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS", "CLASSPATH")
FOREIGN_PREFIXES = ("PG", "LEDGERPROOF_")


class NodeStatus(msgspec.Struct, frozen=True):
    """How a node is at one moment."""

    name: str
    kind: Kind
    port: int
    state: NodeState
    pid: int | None
    """The node's first process, None if it is dead."""
    processes: int
    memory_bytes: int
    """Of all its processes, shared pages counted once (0 if not asked for)."""
    cpu_s: float
    """CPU seconds since its start, of all its processes and of those they waited for."""


def named(state: StackState, name: str) -> NodeRecord:
    """Return the record of a node; UnknownNode if the stack has none of that name."""
    for node in state.nodes:
        if node.name == name:
            return node
    raise UnknownNode(f"there is no node {name!r}; there are {', '.join(n.name for n in state.nodes)}")


def environment(node: NodeRecord | None = None) -> dict[str, str]:
    """Return the environment a node is started with."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in FOREIGN_VARIABLES and not key.startswith(FOREIGN_PREFIXES)
    }
    return inherited | (node.env if node else {})


def find(node: NodeRecord) -> list[Process]:
    """Return the live processes that provably belong to the node, oldest first."""
    return processes.members(processes.process_table(), node.token, [node.process])


def status(node: NodeRecord, table: list[Process] | None = None, *, memory: bool = True) -> NodeStatus:
    """Return how the node is; `table` saves a scan when several nodes are asked for."""
    rows = processes.members(table if table is not None else processes.process_table(), node.token, [node.process])
    first = next((row for row in rows if row.identity == node.process), None)
    state: NodeState = "dead" if first is None else "paused" if first.state == "T" else "running"
    return NodeStatus(
        name=node.name,
        kind=node.kind,
        port=node.port,
        state=state,
        pid=first.identity.pid if first else None,
        processes=len(rows),
        memory_bytes=processes.memory_bytes(rows) if memory else 0,
        cpu_s=round(sum(row.cpu_s for row in rows), 2),
    )


def kill(node: NodeRecord) -> None:
    """SIGKILL all of the node's processes and wait until they are gone. Harmless if it is dead."""
    processes.kill_tree(lambda: find(node))
    forget_pause(node)


def stop(node: NodeRecord, timeout_s: float) -> None:
    """Ask the node to end in its own way and wait for it; NodeStuck if it does not within `timeout_s`."""
    resume(node)
    if node.process is not None:
        processes.send(node.process, STOP_SIGNALS[node.kind])
    try:
        processes.wait_gone(lambda: find(node), timeout_s)
    except NodeStuck as error:
        raise NodeStuck(f"{node.name} does not stop: {error}; kill it instead{tail_for_message(node)}") from error


def pause(node: NodeRecord) -> None:
    """SIGSTOP all of the node's processes; NodeDied if there are none."""
    if not processes.pause_tree(lambda: find(node)):
        raise NodeDied(f"{node.name} is dead and cannot be paused: start it first")


def resume(node: NodeRecord) -> None:
    """Let all of the node's processes run again. Harmless if they do."""
    # Forgotten after, not before: if this process dies in between, the lease still knows its pause.
    processes.resume_tree(lambda: find(node))
    forget_pause(node)


def clear_way(node: NodeRecord) -> None:
    """End what is left of the node's last tree and wait for its port; PortTaken if somebody else got that."""
    kill(node)
    deadline = time.monotonic() + PORT_FREE_TIMEOUT_S
    for port in (node.port, node.grpc_port):
        while port is not None and not ports.is_free(port):
            if time.monotonic() > deadline:
                raise PortTaken(f"port {port} of {node.name} is in use by {ports.holder(port)}: free it")
            time.sleep(READY_POLL_S)


def launch(node: NodeRecord) -> Identity:
    """Start the node's process and return its identity; NodeDied if its program cannot be run."""
    if node.kind == "postgres":
        postgres.forget_zombie(Path(node.folder))
    try:
        return processes.spawn(node.argv, token=node.token, log=node.log, env=environment(node))
    except OSError as error:
        raise NodeDied(f"{node.name}: cannot run {node.argv[0]}: {error.strerror}") from error


def check_ready(node: NodeRecord, redis_password: str, timeout_s: float = READY_TRY_S) -> None:
    """Raise wire.NoAnswer unless the node does its work now."""
    if node.kind == "postgres":
        postgres.check_ready(node.port, timeout_s)
    elif node.kind == "kafka":
        kafka.check_ready(node.port, timeout_s)
    elif node.kind == "redis":
        redis.check_ready(node.port, redis_password, timeout_s)
    else:
        service.check_ready(node.port, timeout_s)


def wait_ready(node: NodeRecord, redis_password: str, timeout_s: float, go_on: Callable[[], None]) -> None:
    """Wait until the node does its work; `go_on` is called all the while and raises to give up.

    Raises NodeDied if its process ends meanwhile, NodeNotReady after `timeout_s`; both show the log's end.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        go_on()
        if not processes.is_alive(node.process):
            raise NodeDied(f"{node.name} ended while it was starting{tail_for_message(node)}")
        try:
            check_ready(node, redis_password)
        except wire.NoAnswer as error:
            if time.monotonic() > deadline:
                raise NodeNotReady(
                    f"{node.name} is not ready after {timeout_s:g} s ({error}){tail_for_message(node)}"
                ) from error
        else:
            # Only now: with less than its share of a busy machine a process takes long to start.
            if node.process is not None and (behind := _niceness(node)):
                processes.give_way(node.process, behind)
            return
        time.sleep(READY_POLL_S)


def _niceness(node: NodeRecord) -> int:
    """Return how far a node stands back behind those that a caller waits for: the API, Postgres and Redis."""
    if node.kind == "kafka":
        return KAFKA_NICENESS
    return WORKER_NICENESS if node.kind == "service" and service.role_of(node.name) != service.ANSWERING_ROLE else 0


def current_pause(node: NodeRecord) -> str | None:
    """Return the identifier of the pause the node is in, None if it is in none."""
    with contextlib.suppress(OSError):
        return _pause_file(node).read_text()
    return None


def note_pause(node: NodeRecord, pause_id: str) -> None:
    """Write down which pause the node is in."""
    _pause_file(node).write_text(pause_id)


def forget_pause(node: NodeRecord) -> None:
    """Strike out the pause the node was in; its lease ends with it."""
    _pause_file(node).unlink(missing_ok=True)


def log_tail(node: NodeRecord, lines: int = TAIL_LINES) -> str:
    """Return the last lines the node printed."""
    return tail(node.log, lines)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log file; empty if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def tail_for_message(node: NodeRecord) -> str:
    """Return the end of the log as the end of an error message."""
    text = log_tail(node)
    return f"\n--- end of {node.log}\n{text}" if text else f" (its log {node.log} is empty)"


def discard(node: NodeRecord) -> None:
    """Tell the node to end at once, for its data will not be read again; does not wait."""
    rows = find(node)
    if all(row.identity != node.process for row in rows):
        discard_unrecorded(rows)  # started by somebody who was killed before writing that down
        return
    for row in rows:
        if row.identity == node.process:
            processes.send(row.identity, DISCARD_SIGNALS[node.kind])
        processes.send(row.identity, signal.SIGCONT)


def discard_unrecorded(rows: list[Process]) -> None:
    """Tell processes to end at once that are proven to be a stack's, but whose record is lost; does not wait."""
    for row in rows:
        name = ""
        with contextlib.suppress(psutil.Error):
            name = psutil.Process(row.identity.pid).name()
        processes.send(row.identity, signal.SIGTERM)
        if name == "postgres":
            # A server would now wait for its sessions to end; this makes it end them. (SIGQUIT would be
            # faster, but initdb's server does not give its shared memory back then.)
            processes.send(row.identity, signal.SIGINT)
        processes.send(row.identity, signal.SIGCONT)


def _pause_file(node: NodeRecord) -> Path:
    return Path(node.folder) / PAUSE_FILE
