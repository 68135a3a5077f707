"""When each node really was down, measured from the side, whatever was asked of it and whenever.

One thread per target asks over a connection it keeps: a killed node is seen by its reset connection, a
paused one by its silence. Keeping the connection is what makes asking cheap: about 0.1 ms per question,
where a new Postgres session alone costs its server over 1 ms.
"""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from compose import wire
from compose.stack import Stack
from compose.state import Kind, StackState

INTERVAL_S = 0.05
TIMEOUT_S = 0.25
SILENCES_TO_DOWN = 2
"""Silent questions in a row that count as down: one may be a busy machine. A reset connection counts at once."""
EDGES_MAX = 100_000
STOP_TIMEOUT_S = 5.0


class Target(NamedTuple):
    """What to ask: a node's kind and port, and for Postgres a login."""

    name: str
    kind: Kind
    port: int
    user: str = ""
    password: str = ""


class Edge(msgspec.Struct, frozen=True):
    """A node went down or came up; times are `time.monotonic()` seconds."""

    target: str
    up: bool
    t: float
    """Down: when the first question without an answer was asked. Up: when the first answer came."""
    not_before: float
    """Down: when the last answer came. Up: when the last unanswered question was asked."""
    reason: str
    """Why it counts as down; empty for up."""


def targets(state: StackState) -> list[Target]:
    """Return a target for every node of a stack."""
    return [
        Target(node.name, node.kind, node.port, state.superuser, state.superuser_password)
        if node.kind == "postgres"
        else Target(node.name, node.kind, node.port)
        for node in state.nodes
    ]


class LivenessProbe:
    """Watch targets from `start` to `stop`; also a context manager. Edges are recorded and reported as seen."""

    def __init__(
        self,
        watched: Sequence[Target],
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
        on_edge: Callable[[Edge], None] | None = None,
    ) -> None:
        """`on_edge` is called from the target's thread and should return at once."""
        self._watched = list(watched)
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._on_edge = on_edge
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._edges: list[Edge] = []
        self._up: dict[str, bool] = {}
        self._threads: list[threading.Thread] = []

    @classmethod
    def of(cls, stack: Stack, on_edge: Callable[[Edge], None] | None = None) -> Self:
        """Return a probe of every node of a stack."""
        return cls(targets(stack.state), on_edge=on_edge)

    def start(self) -> Self:
        """Begin to watch."""
        for index, target in enumerate(self._watched):
            offset_s = self._interval_s * index / len(self._watched)
            thread = threading.Thread(
                target=self._watch, args=(target, offset_s), name=f"probe-{target.name}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        return self

    def stop(self) -> list[Edge]:
        """End watching and return all edges in the order they were seen."""
        self._end.set()
        for thread in self._threads:
            thread.join(STOP_TIMEOUT_S)
        self._threads.clear()
        return self.edges

    def __enter__(self) -> Self:
        """Begin to watch."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End watching."""
        self.stop()

    @property
    def edges(self) -> list[Edge]:
        """The edges seen so far. A target's first state is no edge."""
        with self._lock:
            return list(self._edges)

    def is_up(self, name: str) -> bool | None:
        """Return whether the target answered lately, None if it was not asked yet."""
        with self._lock:
            return self._up.get(name)

    def down_times(self, name: str) -> list[tuple[float, float | None]]:
        """Return when the target was down, as (from, to); `to` is None while it still is."""
        spans: list[tuple[float, float | None]] = []
        for edge in self.edges:
            if edge.target != name:
                continue
            if not edge.up:
                spans.append((edge.t, None))
            elif spans and spans[-1][1] is None:
                spans[-1] = (spans[-1][0], edge.t)
        return spans

    def wait_edge(self, name: str, *, up: bool, after: float, timeout_s: float) -> Edge | None:
        """Return the target's first edge of that direction with t ≥ `after`, None if none comes in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            for edge in self.edges:
                if edge.target == name and edge.up is up and edge.t >= after:
                    return edge
            if time.monotonic() > deadline or self._end.wait(self._interval_s / 2):
                return None

    def _watch(self, target: Target, offset_s: float) -> None:
        connection: wire.Connection | None = None
        last_answer = asked = time.monotonic()
        unanswered_since: float | None = None
        silences = 0
        self._end.wait(offset_s)
        while not self._end.is_set():
            previous, asked = asked, time.monotonic()
            try:
                if connection is None:
                    connection = _connect(target, self._timeout_s)
                _ask(target, connection)
            except wire.NoAnswer as error:
                if connection is not None:
                    connection.close()
                    connection = None
                silences += 1
                unanswered_since = asked if unanswered_since is None else unanswered_since
                if error.definite or silences >= SILENCES_TO_DOWN:
                    self._note(target.name, up=False, t=unanswered_since, not_before=last_answer, reason=str(error))
            else:
                last_answer = time.monotonic()
                self._note(target.name, up=True, t=last_answer, not_before=previous, reason="")
                unanswered_since, silences = None, 0
            self._end.wait(max(0.0, asked + self._interval_s - time.monotonic()))
        if connection is not None:
            connection.close()

    def _note(self, name: str, *, up: bool, t: float, not_before: float, reason: str) -> None:
        """Record an edge if this is one."""
        with self._lock:
            before = self._up.get(name)
            self._up[name] = up
            if before is None or before is up or len(self._edges) >= EDGES_MAX:
                return
            edge = Edge(name, up, t, not_before, reason)
            self._edges.append(edge)
        if self._on_edge is not None:
            self._on_edge(edge)


def _connect(target: Target, timeout_s: float) -> wire.Connection:
    connection = wire.Connection(target.port, timeout_s)
    if target.kind == "postgres":
        try:
            wire.postgres_login(connection, target.user, target.password)
        except wire.NoAnswer:
            connection.close()
            raise
    return connection


def _ask(target: Target, connection: wire.Connection) -> None:
    if target.kind == "postgres":
        wire.postgres_lives(connection)
    elif target.kind == "redis":
        wire.redis_lives(connection)
    elif target.kind == "kafka":
        wire.kafka_lives(connection)
    else:
        wire.http_lives(connection)
