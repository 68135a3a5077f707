"""Breaks nodes while the load runs, at times drawn beforehand, and heals each of them again.

The faults are driven by threads of their own with the synchronous stack controller. Each is a context
manager: whatever ends it, it heals. Whether a fault had its effect is not decided here: the liveness probe
measures both edges from the side.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from compose.errors import StackError
from compose.probe import Edge
from compose.stack import Stack
from invariants.timeline import Timeline
from ledgerproof.options import MIN_FAULTY_DURATION_S

POSTGRES_HOLD_S: Final = 4.0
WORKER_HOLD_S: Final = 3.0
PAUSE_HOLD_S: Final = 3.0
HOLD_SHARE: Final = 1 / 15
"""A fault lasts no longer than this share of the load, so that short runs recover too."""
HANGS_S: Final = 0.25
"""So long a server hangs before it is killed."""
LEASE_S: Final = 30.0
"""A pause ends by itself after this long, whatever becomes of this process."""
STARTS: Final = (0.15, 0.45, 0.70)
"""When the standard faults begin, as shares of the load."""
WORKERS: Final = ("relay0", "matcher0", "settler0", "projector0")
JOIN_TIMEOUT_S: Final = 90.0
SILENT: Final = "did not answer in time"
"""The probe's reason for a node that accepts connections and says nothing."""
EDGE_TIMEOUT_S: Final = 5.0
"""A healed node is seen alive within this time."""


@dataclass(frozen=True)
class PlannedFault:
    """One fault to come; `at_s` counts from the start of the load."""

    id: int
    kind: str
    """kill or pause."""
    node: str
    at_s: float
    hold_s: float


def plan_faults(seed: int, duration_s: float, servers: int) -> list[PlannedFault]:
    """Return the standard faults: a database server and a worker are killed, Redis is paused.

    Which server and which worker is drawn from the seed. Raises ValueError for a load too short for them.
    """
    if duration_s < MIN_FAULTY_DURATION_S:
        raise ValueError(f"the standard faults need a load of at least {MIN_FAULTY_DURATION_S:g} s")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0xFA])))
    server = f"pg{int(rng.integers(servers))}"
    worker = WORKERS[int(rng.integers(len(WORKERS)))]
    longest_s = duration_s * HOLD_SHARE
    planned = (
        ("kill", server, min(POSTGRES_HOLD_S, longest_s)),
        ("kill", worker, min(WORKER_HOLD_S, longest_s)),
        ("pause", "redis", min(PAUSE_HOLD_S, longest_s)),
    )
    return [
        PlannedFault(number, kind, node, share * duration_s, hold_s)
        for number, ((kind, node, hold_s), share) in enumerate(zip(planned, STARTS, strict=True), start=1)
    ]


class EdgeBook:
    """Puts what the liveness probe sees on the timeline: a fault's measured edges, or a death nobody asked for."""

    def __init__(self, timeline: Timeline, origin: float) -> None:
        """`origin` is the reading of time.monotonic() at which the run's clock was zero."""
        self._timeline = timeline
        self._origin = origin
        self._lock = threading.Lock()
        self._open: dict[str, _OpenFault] = {}
        self._dead: set[str] = set()
        self.failure: OSError | None = None
        """What kept an edge from being recorded, if anything did."""

    def expect(self, planned: PlannedFault, requested_s: float) -> None:
        """From now on the node's edges are those of this fault."""
        with self._lock:
            self._open[planned.node] = _OpenFault(planned, requested_s)

    def healing(self, planned: PlannedFault) -> None:
        """From now on the node's next sign of life is the end of this fault."""
        with self._lock:
            self._open[planned.node].healing = True

    def on_edge(self, edge: Edge) -> None:
        """Record one edge; called from the probe's threads."""
        at_s = edge.t - self._origin
        with self._lock:
            found = self._open.get(edge.target)
            kind = None
            if found is not None and not edge.up and found.started_s is None:
                # The question that was never answered may have been asked a moment before the fault.
                found.started_s = at_s = max(at_s, found.requested_s)
                found.started.set()
                kind = "fault_start"
            elif found is not None and edge.up and found.started_s is not None and not found.ended.is_set():
                if found.healing:
                    kind = "fault_end"
                else:
                    # It was only slow when it seemed down: neither a dead nor a stopped node answers.
                    found.started_s = None
                    found.started.clear()
        if found is None or kind is None:
            self._unasked(edge, at_s)
            return
        self._record(kind, t=at_s, node=edge.target, detail=edge.reason or None, planned=found.planned)
        if kind == "fault_end":
            found.ended.set()

    def _unasked(self, edge: Edge, at_s: float) -> None:
        """Record an edge that no fault explains: a death, or the silence of a process that has too much to do."""
        if edge.up:
            self._record(
                "process_start" if edge.target in self._dead else "note",
                t=at_s,
                node=edge.target,
                detail="answers again",
            )
            self._dead.discard(edge.target)
        elif edge.reason == SILENT:
            self._record("note", t=at_s, node=edge.target, detail=SILENT)
        else:
            self._dead.add(edge.target)
            self._record("process_death", t=at_s, node=edge.target, detail=edge.reason)

    def wait_started(self, planned: PlannedFault, timeout_s: float) -> bool:
        """Return whether the beginning of the fault's effect was seen, waiting for it up to `timeout_s`."""
        with self._lock:
            found = self._open[planned.node]
        return found.started.wait(timeout_s)

    def wait_ended(self, planned: PlannedFault, timeout_s: float) -> bool:
        """Return whether the end of the fault's effect was seen, waiting for it up to `timeout_s`."""
        with self._lock:
            found = self._open[planned.node]
        return found.ended.wait(timeout_s)

    def _record(
        self, kind: str, *, t: float, node: str, detail: str | None, planned: PlannedFault | None = None
    ) -> None:
        fault, fault_id = (None, None) if planned is None else (planned.kind, planned.id)
        try:
            self._timeline.record(kind, t=t, node=node, fault=fault, fault_id=fault_id, detail=detail)
        except OSError as error:
            self.failure = self.failure or error


@dataclass
class _OpenFault:
    planned: PlannedFault
    requested_s: float
    started_s: float | None = None
    healing: bool = False
    started: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def fault(stack: Stack, timeline: Timeline, book: EdgeBook, planned: PlannedFault) -> Iterator[None]:
    """Break a node while the block runs and heal it after, recording both requests. Raises StackError."""
    requested_s = timeline.record("fault_requested", node=planned.node, fault=planned.kind, fault_id=planned.id)
    book.expect(planned, requested_s)
    try:
        if planned.kind == "kill":
            if planned.node.startswith("pg"):
                # On a machine with nothing else to do a command is under way for two milliseconds, and a kill meets
                # none. A server that hangs before it dies, as they do, has some: what became of them is the question.
                stack.pause(planned.node, lease_s=LEASE_S)
                time.sleep(HANGS_S)
            stack.kill(planned.node)
        else:
            stack.pause(planned.node, lease_s=LEASE_S)
        yield
    finally:
        book.healing(planned)
        timeline.record("heal_requested", node=planned.node, fault=planned.kind, fault_id=planned.id)
        stack.start_node(planned.node)


class Nemesis:
    """Runs planned faults, each in a thread of its own: a node that heals slowly delays no other fault."""

    def __init__(
        self,
        stack: Stack,
        timeline: Timeline,
        book: EdgeBook,
        planned: list[PlannedFault],
        clock: Callable[[], float],
    ) -> None:
        self._stack = stack
        self._timeline = timeline
        self._book = book
        self._clock = clock
        self._cancelled = threading.Event()
        self._start_s = 0.0
        self._threads = [
            threading.Thread(target=self._run, args=(item,), name=f"nemesis-{item.id}", daemon=True) for item in planned
        ]
        self._active: dict[int, str] = {}
        self.problems: list[str] = []
        """What could not be broken or healed."""

    @property
    def now(self) -> str:
        """The faults under way, for the progress display."""
        return ", ".join(list(self._active.values()))

    def start(self, start_s: float) -> None:
        """Begin; `start_s` is the start of the load on the run's clock."""
        self._start_s = start_s
        for thread in self._threads:
            thread.start()

    def cancel(self) -> None:
        """Begin no further fault and end the present ones early; does not wait."""
        self._cancelled.set()

    def join(self) -> None:
        """Wait until the last fault is healed."""
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._active:
            self.problems.append(f"did not end within {JOIN_TIMEOUT_S:g} s: {self.now}")

    def _run(self, planned: PlannedFault) -> None:
        if self._cancelled.wait(max(0.0, self._start_s + planned.at_s - self._clock())):
            return
        name = f"{planned.kind} {planned.node}"
        self._active[planned.id] = name
        try:
            with fault(self._stack, self._timeline, self._book, planned):
                self._cancelled.wait(planned.hold_s)
            if not self._cancelled.is_set():
                # An edge that never comes is for the checker to report (V03), not for this thread.
                self._book.wait_ended(planned, EDGE_TIMEOUT_S)
        except (StackError, OSError) as error:
            if not self._cancelled.is_set():
                self.problems.append(f"{name}: {error}")
        finally:
            del self._active[planned.id]
