"""What a stack is and where it is written: `stack.json` in the stack's folder, replaced atomically.

Everything another process needs to attach, heal or clean up is in that one file; nothing is remembered
elsewhere. A folder `<root>/stacks/<name>/` appears with its `stack.json` in place, so a stack folder
without one is never half a stack.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import msgspec
from filelock import FileLock, Timeout

from compose.errors import FolderError, LockHeld, SpecError, StackExists, StackNotFound
from compose.processes import Identity, Machine, Place, is_alive, place_of
from reference.routing import SHARDS

STATE_FILE = "stack.json"
STACKS_FOLDER = "stacks"
NEW_PREFIX = ".new-"
FORMAT = 1
LOCK_TIMEOUT_S = 30.0

Kind = Literal["postgres", "kafka", "redis", "service"]


class StackSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of a stack. Raises SpecError if it makes no sense."""

    servers: int = 4
    """Postgres servers, 1 to 100."""
    apis: int = 2
    relays: int = 1
    matchers: int = 1
    settlers: int = 1
    projectors: int = 1
    reconcilers: int = 1
    base_port: int | None = None
    """First of the consecutive ports; None: any free run of ports."""
    partitions: int = 8
    """Partitions of every topic that `settings` does not name."""
    keep: bool = False
    """The stack outlives the process that started it, until somebody takes it down."""
    settings: dict[str, Any] = {}
    """Fields of `reference.config.ServiceConfig` that differ from their defaults."""
    only: Literal["all", "infra"] = "all"
    """`infra`: the servers without the service's processes."""
    failpoints: bool = False
    """Every process of the service opens an admin socket in its node's folder, to arm its failpoints (`failpoints`)."""

    def __post_init__(self) -> None:
        """Refuse impossible shapes."""
        if not 1 <= self.servers <= SHARDS:
            raise SpecError(f"servers must be 1 to {SHARDS}, not {self.servers}")
        if not 1 <= self.partitions <= 1000:
            raise SpecError(f"partitions must be 1 to 1000, not {self.partitions}")
        for role in ("apis", "relays", "matchers", "settlers", "projectors", "reconcilers"):
            if not 0 <= getattr(self, role) <= 50:
                raise SpecError(f"{role} must be 0 to 50, not {getattr(self, role)}")
        if self.base_port is not None and not 1024 <= self.base_port <= 65_000:
            raise SpecError(f"the first port must be 1024 to 65000, not {self.base_port}")

    def nodes(self) -> list[tuple[str, Kind]]:
        """Return name and kind of every node, in the order of their ports."""
        found: list[tuple[str, Kind]] = [(f"pg{index}", "postgres") for index in range(self.servers)]
        found += [("kafka", "kafka"), ("redis", "redis")]
        if self.only == "all":
            for role, count in (
                ("api", self.apis),
                ("relay", self.relays),
                ("matcher", self.matchers),
                ("settler", self.settlers),
                ("projector", self.projectors),
                ("reconciler", self.reconcilers),
            ):
                found += [(f"{role}{index}", "service") for index in range(count)]
        return found


class NodeRecord(msgspec.Struct):
    """One node: how it is started and which process it is. `process` is None until its first start."""

    name: str
    kind: Kind
    port: int
    folder: str
    argv: list[str] = []
    env: dict[str, str] = {}
    """What is added to the environment of the controller."""
    process: Identity | None = None
    grpc_port: int | None = None
    """The second port of an API process."""

    @property
    def token(self) -> Path:
        """The file that proves which processes belong to the node."""
        return Path(self.folder) / "token"

    @property
    def log(self) -> Path:
        """Everything the node printed, over all its restarts."""
        return Path(self.folder) / "log"


class StackState(msgspec.Struct):
    """Everything about a stack that outlives the process that started it."""

    name: str
    machine: Machine
    owner: Identity
    created_unix_s: float
    spec: StackSpec
    ports: list[int]
    nodes: list[NodeRecord]
    superuser: str
    superuser_password: str
    redis_password: str
    kafka_controller_port: int
    ready: bool = False
    """Start finished."""
    closing: bool = False
    """It is being taken down: nothing more is started."""
    format: int = FORMAT

    @property
    def place(self) -> Place:
        """Whether its process numbers are valid here."""
        return place_of(self.machine)

    @property
    def owner_is_alive(self) -> bool:
        """Whether the process that started the stack still runs here."""
        return self.place == "here" and is_alive(self.owner)


def stacks_folder(root: Path) -> Path:
    """Return the folder that holds the stacks of a state folder."""
    return root / STACKS_FOLDER


def create(folder: Path, state: StackState) -> None:
    """Make the stack's folder appear with its state in it; StackExists if the folder is there already."""
    fresh = folder.with_name(f"{NEW_PREFIX}{folder.name}-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        fresh.mkdir(parents=True)
        # Postgres runs as another user when started by root and has to get through to its own folder.
        fresh.chmod(0o711)
        _write(fresh, state)
        try:
            fresh.rename(folder)
        except OSError as error:
            if folder.exists():
                raise StackExists(
                    f"there is already a stack in {folder}: take it down (`ledgerproof down`) or use another name"
                ) from error
            raise
    except OSError as error:
        raise FolderError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    finally:
        if fresh.exists():
            (fresh / STATE_FILE).unlink(missing_ok=True)
            fresh.rmdir()


def load(folder: Path) -> StackState:
    """Read the state of the stack in `folder`; StackNotFound if there is none that can be read."""
    path = folder / STATE_FILE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=StackState)
    except FileNotFoundError as error:
        raise StackNotFound(f"there is no stack in {folder}: start one with `ledgerproof up`") from error
    except OSError as error:
        raise StackNotFound(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.DecodeError, SpecError) as error:
        raise StackNotFound(f"{path} is not a stack of this version: {error}") from error
    if state.format != FORMAT:
        raise StackNotFound(f"{path} has format {state.format}, this version reads {FORMAT}")
    return state


@contextlib.contextmanager
def change(folder: Path) -> Iterator[StackState]:
    """Read the state, let the block change it and write it back, under the stack's lock."""
    load(folder)  # taking the lock would make the folder of a stack that is gone
    with lock(folder):
        state = load(folder)
        yield state
        _write(folder, state)


def lock(folder: Path) -> AbstractContextManager[None]:
    """Hold the lock of a stack's state; it is held for milliseconds."""
    return held(folder / "lock", LOCK_TIMEOUT_S)


def lock_of_node(folder: Path, node: str) -> AbstractContextManager[None]:
    """Hold the lock that keeps two controllers from starting the same node at once."""
    return held(folder / node / "lock", LOCK_TIMEOUT_S)


@contextlib.contextmanager
def held(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold a lock between processes; the kernel frees it if its holder dies. Raises LockHeld or FolderError."""
    lock_file = FileLock(path, timeout=timeout_s, mode=0o600)
    try:
        lock_file.acquire()
    except Timeout as error:
        raise LockHeld(f"another process has been holding {path} for {timeout_s:g} s: end it or try again") from error
    except OSError as error:
        raise FolderError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        lock_file.release()


def new_name() -> str:
    """Return a name for a stack that nobody named: its time of day and three random digits."""
    return f"{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def check_name(name: str) -> None:
    """Raise SpecError unless the name can be a folder's."""
    if not name or len(name) > 64 or name[0] in ".-" or not all(c.isalnum() or c in "._-" for c in name):
        raise SpecError(f"a stack's name is 1 to 64 letters, digits, dots and dashes, not {name!r}")


def _write(folder: Path, state: StackState) -> None:
    """Replace stack.json in one step; it holds passwords, so only its owner may read it."""
    path = folder / STATE_FILE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(state), indent=1))
        temporary.replace(path)
    except OSError as error:
        raise FolderError(f"cannot write {path}: {error.strerror}") from error
