"""The controller: start a stack, break and heal its nodes, find stacks again, and leave nothing behind.

Everything is synchronous, and everything can be done from another process that attaches to the stack's
folder. The life of a stack:

    reserve ports → folder with stack.json → servers in parallel → install → service processes → ready
    … kill, pause, resume, start_node, heal …
    closing → every process ended, the proof being that no process has a token of the folder → folder removed
"""

import contextlib
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from compose import kafka, nodes, ports, postgres, processes, redis, service, state
from compose.cleanup import DEFAULT_ROOT, DownReport, Progress, down_all, find_stacks, silent, sweep, take_down
from compose.errors import (
    FolderError,
    NodeDied,
    NodeError,
    NodeNotReady,
    SpecError,
    StackClosing,
    StackError,
    UnknownNode,
)
from compose.lease import LEASE_MAX_S
from compose.nodes import NodeStatus
from compose.processes import Errand
from compose.state import NodeRecord, StackSpec, StackState
from reference.auth import Scope, issue
from reference.config import ServiceConfig

__all__ = ["DEFAULT_ROOT", "DownReport", "Stack", "StackSpec", "down_all", "find_stacks", "sweep"]

FREE_SPACE_MIN_BYTES = 1 << 30
START_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
LEASE_S = 60.0
TOKEN_TTL_S = 86_400
LOGS_OF_FAILED_MAX = 5


class Stack:
    """One stack. Make it with `Stack.start` or `Stack.attach`; as a context manager it is taken down at the end."""

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        self.folder = folder
        self._progress = progress or silent
        self._closing = threading.Event()
        self._expected: StackState | None = None
        self.residue: list[str] = []
        """What the last `down` could not remove."""

    # --- begin and end -----------------------------------------------------------------------------------

    @classmethod
    def start(
        cls,
        spec: StackSpec,
        root: Path = DEFAULT_ROOT,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Start a stack below `root` and return it when every node is ready.

        Stacks of dead owners are cleaned up first. If anything fails, or Ctrl-C is pressed, everything
        started is ended and removed again, the logs are kept below `root`/failed, and the error raised.
        """
        name = state.new_name() if name is None else name
        state.check_name(name)
        root = _writable(root)
        sweep(root, progress)
        folder = state.stacks_folder(root) / name
        stack = cls(folder, progress)
        config = stack._create(spec)
        try:
            stack._bring_up(config)
        except BaseException as error:
            stack._closing.set()
            stack._abandon(root, error)
            if isinstance(error, OSError):
                raise FolderError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error
            raise
        return stack

    @classmethod
    def attach(cls, folder: Path, progress: Progress | None = None) -> Self:
        """Return the stack in `folder`; StackNotFound if there is none."""
        stack = cls(folder.resolve(), progress)
        stack._expected = stack.state
        return stack

    def __enter__(self) -> Self:
        """Return the stack."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the stack down, unless it was started to be kept."""
        if self._expected is None or not self._expected.spec.keep:
            self.down()

    def down(self) -> list[str]:
        """End every process, give back ports and shared memory, remove the folder; return what is left.

        The list is empty when all went well. Further Ctrl-C are ignored meanwhile. Harmless to repeat.
        """
        self._closing.set()
        with _undisturbed():
            self.residue = take_down(self.folder, self._progress, self._expected)
        return self.residue

    # --- what it is --------------------------------------------------------------------------------------

    @property
    def state(self) -> StackState:
        """The stack's state as it is written now; StackNotFound after `down`."""
        return state.load(self.folder)

    @property
    def name(self) -> str:
        """The stack's name: that of its folder."""
        return self.folder.name

    @property
    def config_path(self) -> Path:
        """The service's configuration file, for LEDGERPROOF_CONFIG."""
        return self.folder / "config.json"

    @property
    def config(self) -> ServiceConfig:
        """The service's configuration: where the servers are, and the roles' passwords."""
        return msgspec.json.decode(self.config_path.read_bytes(), type=ServiceConfig)

    @property
    def superuser(self) -> tuple[str, str]:
        """Name and password of the superuser of every Postgres server."""
        found = self.state
        return found.superuser, found.superuser_password

    def port(self, node: str) -> int:
        """Return the port of a node."""
        return nodes.named(self.state, node).port

    def grpc_port(self, node: str) -> int:
        """Return the gRPC port of an API process; UnknownNode if the node has none."""
        port = nodes.named(self.state, node).grpc_port
        if port is None:
            raise UnknownNode(f"{node} has no gRPC port: only API processes have one")
        return port

    def token(self, *scopes: Scope, user_id: int | None = None, ttl_s: int = TOKEN_TTL_S) -> str:
        """Return a bearer token for the stack's API; without a scope it may do everything."""
        return issue(self.config, scopes or (Scope.SERVICE, Scope.ADMIN), user_id=user_id, ttl_s=ttl_s)

    def nodes_of(self, prefix: str) -> list[str]:
        """Return the names of the nodes of one sort, as pg0, pg1 for `pg`."""
        return [node.name for node in self.state.nodes if node.name.rstrip("0123456789") == prefix]

    def status(self, *, memory: bool = True) -> list[NodeStatus]:
        """Return how every node is; `memory=False` saves about a millisecond per process."""
        found = self.state
        table = processes.process_table()
        return [nodes.status(node, table, memory=memory) for node in found.nodes]

    def logs_tail(self, node: str, lines: int = nodes.TAIL_LINES) -> str:
        """Return the last lines a node printed."""
        return nodes.log_tail(nodes.named(self.state, node), lines)

    def collect_logs(self, target: Path) -> list[Path]:
        """Copy every node's log to `target`/<node>.log; return the copies."""
        target.mkdir(parents=True, exist_ok=True)
        copies = []
        for log in sorted(self.folder.glob("*/log")):
            copy = target / f"{log.parent.name}.log"
            shutil.copyfile(log, copy)
            copies.append(copy)
        return copies

    # --- faults and healing ------------------------------------------------------------------------------

    def kill(self, node: str) -> None:
        """SIGKILL a node's whole tree of processes; returns when it is gone. Nothing restarts it but you."""
        nodes.kill(nodes.named(self.state, node))

    def stop(self, node: str, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Let a node end in order; NodeStuck if it does not within `timeout_s`."""
        nodes.stop(nodes.named(self.state, node), timeout_s)

    def pause(self, node: str, lease_s: float = LEASE_S) -> None:
        """SIGSTOP a node's whole tree; it hangs, its connections stay.

        It resumes by itself after `lease_s` (at most an hour), whatever happens to this process.
        """
        if not 0 < lease_s <= LEASE_MAX_S:
            raise SpecError(f"a lease is more than 0 and at most {LEASE_MAX_S:g} s, not {lease_s:g}")
        record = nodes.named(self.state, node)
        pause_id = secrets.token_hex(8)
        leases = self.folder / "leases"
        leases.mkdir(exist_ok=True)
        nodes.note_pause(record, pause_id)
        # The lease runs before anything is stopped, so that there is no moment without one.
        processes.spawn(
            [sys.executable, "-m", "compose.lease", str(self.folder), node, pause_id, str(lease_s)],
            token=leases / "token",
            log=leases / "log",
            env=nodes.environment() | service.environment(self.config_path),
        )
        try:
            nodes.pause(record)
        except BaseException:
            nodes.resume(record)
            raise

    def resume(self, node: str) -> None:
        """Let a paused node run again. Harmless if it runs."""
        nodes.resume(nodes.named(self.state, node))

    def start_node(self, node: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Start a dead node on its port and folder and wait until it is ready; resume a paused one.

        Harmless if it runs. Raises NodeDied, NodeNotReady or PortTaken.
        """
        self._revive(node)
        self.wait_ready(node, timeout_s)

    def wait_ready(self, node: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until a node does its work; NodeDied or NodeNotReady with the end of its log if it does not."""
        found = self.state
        nodes.wait_ready(nodes.named(found, node), found.redis_password, timeout_s, self._go_on)

    def heal(self, timeout_s: float = READY_TIMEOUT_S) -> list[str]:
        """Resume every paused node, start every dead one, wait until all are ready; return what was done.

        Harmless to repeat. A node that cannot be healed does not keep the others from it: the first error is
        raised at the end.
        """
        deadline = time.monotonic() + timeout_s
        done: list[str] = []
        errors: list[StackError] = []
        names = [node.name for node in self.state.nodes]
        for name in names:
            try:
                if action := self._revive(name):
                    done.append(f"{action} {name}")
            except StackError as error:
                errors.append(error)
        for name in names:
            try:
                self.wait_ready(name, max(1.0, deadline - time.monotonic()))
            except StackError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return done

    # --- inside ------------------------------------------------------------------------------------------

    def _revive(self, name: str) -> str | None:
        """Resume or start a node if it needs that; return which of the two was done."""
        record = nodes.named(self.state, name)
        with state.lock_of_node(self.folder, name):
            record = nodes.named(self.state, name)  # another controller may have started it meanwhile
            now = nodes.status(record, memory=False).state
            if now == "running":
                nodes.forget_pause(record)
                return None
            if now == "paused":
                nodes.resume(record)
                return "resumed"
            self._launch(record)
            return "started"

    def _launch(self, record: NodeRecord) -> None:
        """Start a node's process and write down which it is."""
        nodes.clear_way(record)
        with state.change(self.folder) as found:
            if found.closing:
                raise StackClosing(f"stack {found.name} is being taken down")
            self._go_on()
            nodes.named(found, record.name).process = nodes.launch(record)

    def _go_on(self) -> None:
        if self._closing.is_set():
            raise StackClosing(f"stack {self.name} is being taken down")

    def _create(self, spec: StackSpec) -> ServiceConfig:
        """Reserve ports, make the folder appear with its state and return the service's configuration."""
        me = processes.identify(os.getpid())
        if me is None:
            raise StackError("cannot find this process in the process table: is /proc mounted?")
        wanted = spec.nodes()
        # The APIs' second ports follow those of all nodes; Kafka's controller listens on the last port.
        apis = [name for name, _ in wanted if service.role_of(name) == "api"]
        got = ports.reserve(self.folder, len(wanted) + len(apis) + 1, spec.base_port, me, keep=spec.keep)
        try:
            records = [
                NodeRecord(name=name, kind=kind, port=port, folder=str(self.folder / name))
                for (name, kind), port in zip(wanted, got, strict=False)
            ]
            for name, port in zip(apis, got[len(wanted) : -1], strict=True):
                next(record for record in records if record.name == name).grpc_port = port
            fresh = StackState(
                name=self.name,
                machine=processes.this_machine(),
                owner=me,
                created_unix_s=time.time(),
                spec=spec,
                ports=got,
                nodes=records,
                superuser=postgres.SUPERUSER,
                superuser_password=secrets.token_hex(16),
                redis_password=secrets.token_hex(16),
                kafka_controller_port=got[-1],
            )
            config = service.configuration(spec, records, fresh.redis_password, self.folder)
            state.create(self.folder, fresh)
            self._expected = fresh
        except BaseException:
            ports.release(self.folder)
            raise
        return config

    def _bring_up(self, config: ServiceConfig) -> None:
        """Start everything; the servers at the same time, then the service."""
        began = time.monotonic()
        service.write_configuration(self.config_path, config)
        found = self.state
        for node in found.nodes:
            _folder(Path(node.folder))
        self._together([n for n in found.nodes if n.kind != "service"], lambda n: self._first_start(n, found))
        if found.spec.only == "all":
            self._install(found)
            self._together([n for n in found.nodes if n.kind == "service"], lambda n: self._first_start(n, found))
        with state.change(self.folder) as now:
            now.ready = True
        self._progress(f"stack {found.name} is ready after {time.monotonic() - began:.1f} s")

    def _first_start(self, node: NodeRecord, found: StackState) -> None:
        """Make a node's files, start it, and wait until it is ready."""
        began = time.monotonic()
        folder = Path(node.folder)
        errand = self._errand(folder, nodes.environment())
        try:
            if node.kind == "postgres":
                node.argv = postgres.prepare(folder, node.port, found.superuser_password, errand)
            elif node.kind == "kafka":
                node.env = kafka.ENVIRONMENT
                errand = self._errand(folder, nodes.environment(node))
                node.argv = kafka.prepare(folder, node.port, found.kafka_controller_port, errand)
            elif node.kind == "redis":
                node.argv = redis.prepare(folder, node.port, found.redis_password)
            else:
                node.argv = service.command(node)
                node.env = service.environment(self.config_path)
        except NodeError as error:
            raise type(error)(f"{node.name}: {error}{nodes.tail_for_message(node)}") from error
        except TimeoutError as error:
            raise NodeNotReady(f"{node.name}: {error}{nodes.tail_for_message(node)}") from error
        except OSError as error:
            raise FolderError(f"{node.name}: cannot write {error.filename or folder}: {error.strerror}") from error
        with state.change(self.folder) as now:
            record = nodes.named(now, node.name)
            record.argv, record.env = node.argv, node.env
        self._launch(record)
        self.wait_ready(node.name, START_TIMEOUT_S)
        self._progress(f"{node.name} ready on port {node.port} after {time.monotonic() - began:.1f} s")

    def _install(self, found: StackState) -> None:
        began = time.monotonic()
        folder = _folder(self.folder / "install")
        secret = folder / "password"
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(found.superuser_password)
        errand = self._errand(folder, nodes.environment() | service.environment(self.config_path))
        try:
            service.install(found.superuser, secret, errand)
        except NodeDied as error:
            raise NodeDied(f"{error}\n--- end of {folder / 'log'}\n{nodes.tail(folder / 'log')}") from error
        except TimeoutError as error:
            raise NodeNotReady(f"installing the service: {error}\n{nodes.tail(folder / 'log')}") from error
        finally:
            secret.unlink()
        self._progress(f"service installed after {time.monotonic() - began:.1f} s")

    def _errand(self, folder: Path, env: dict[str, str]) -> Errand:
        return Errand(folder / "token", folder / "log", env, self._go_on, self._progress)

    def _together(self, records: list[NodeRecord], action: Callable[[NodeRecord], None]) -> None:
        """Do something to several nodes at once; the first error ends all of it and is raised."""
        if not records:
            return
        with ThreadPoolExecutor(len(records), thread_name_prefix="stack") as pool:
            futures = [pool.submit(action, record) for record in records]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # Threads that still wait see this; with Ctrl-C we get here without any of them having failed.
                if not all(future.done() and future.exception() is None for future in futures):
                    self._closing.set()
        _raise_first(futures)

    def _abandon(self, root: Path, error: BaseException) -> None:
        """After a failed start: keep the logs, end and remove everything."""
        failed = root / "failed"
        if not isinstance(error, KeyboardInterrupt):
            # The disk may be full, which may be why we are here.
            with contextlib.suppress(OSError):
                self.collect_logs(failed / self.name)
                self._progress(f"the logs are kept in {failed / self.name}")
                older = sorted(failed.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
                for path in older[LOGS_OF_FAILED_MAX:]:
                    shutil.rmtree(path, ignore_errors=True)
        self.down()


def _writable(root: Path) -> Path:
    """Return the state folder, made and resolved; FolderError if it cannot be written or its disk is full."""
    try:
        stacks = state.stacks_folder(root.resolve())
        stacks.mkdir(parents=True, exist_ok=True)
        trial = stacks / f".trial-{os.getpid()}-{secrets.token_hex(3)}"
        trial.touch()
        trial.unlink()
        free = shutil.disk_usage(stacks).free
    except OSError as error:
        raise FolderError(
            f"cannot write {error.filename or root}: {error.strerror}; run in a folder that can be written"
        ) from error
    if free < FREE_SPACE_MIN_BYTES:
        raise FolderError(
            f"only {free >> 20} MB are free on the disk of {root}, a stack needs {FREE_SPACE_MIN_BYTES >> 20} MB: "
            "make room or run in a folder on another disk"
        )
    return root.resolve()


def _folder(path: Path) -> Path:
    """Make a folder that another user may pass through but not list."""
    path.mkdir(exist_ok=True)
    path.chmod(0o711)
    return path


def _raise_first(futures: list[Future[None]]) -> None:
    """Raise what went wrong first: those who only gave up because of it come last."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    errors.sort(key=lambda error: isinstance(error, StackClosing))
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C inside the block: half a clean-up is worse than a late one. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
