"""Breaks and heals nodes and arms failpoints at the word of a plan, and keeps account of it on the timeline."""

import threading
from typing import Final

from compose import failpoints
from compose.errors import NoFailpoints
from compose.stack import Stack
from invariants.timeline import Timeline
from ledgerproof.faults import EDGE_TIMEOUT_S, LEASE_S, EdgeBook, PlannedFault
from reference.failpoints import Arm, Fired

HEAL_TIMEOUT_S: Final = 60.0

Counts = dict[tuple[str, str], tuple[int, int]]
"""(node, point) → (hits, times it did something)."""


class Breaker:
    """What a plan does to a stack. Thread-safe; every method blocks until what it does has been seen."""

    def __init__(self, stack: Stack, timeline: Timeline, book: EdgeBook) -> None:
        self._stack = stack
        self._timeline = timeline
        self._book = book
        self._lock = threading.Lock()
        self._faults = 0
        self._open: dict[str, PlannedFault] = {}
        self._before = self._read()
        self.armed: list[tuple[str, Arm]] = []
        """What was armed, by node, in order."""

    def fault(self, kind: str, node: str) -> None:
        """Kill or pause a node and wait until that was measured; V03 tells if it never was. Raises StackError."""
        with self._lock:
            self._faults += 1
            planned = PlannedFault(self._faults, kind, node, 0.0, 0.0)
            self._open[node] = planned
        requested_s = self._timeline.record("fault_requested", node=node, fault=kind, fault_id=planned.id)
        self._book.expect(planned, requested_s)
        if kind == "kill":
            self._stack.kill(node)
        else:
            self._stack.pause(node, lease_s=LEASE_S)
        self._book.wait_started(planned, EDGE_TIMEOUT_S)

    def heal(self, node: str) -> None:
        """Start a dead node or resume a paused one, and wait until it is ready and seen to be. Raises StackError."""
        with self._lock:
            planned = self._open.pop(node, None)
        if planned is None:
            self._stack.start_node(node)
            return
        self._book.healing(planned)
        self._timeline.record("heal_requested", node=node, fault=planned.kind, fault_id=planned.id)
        self._stack.start_node(node)
        self._book.wait_ended(planned, EDGE_TIMEOUT_S)

    def heal_all(self) -> list[str]:
        """Disarm every failpoint and bring every node back; return what had to be done. Raises StackError."""
        for node in failpoints.armed_nodes(self._stack):
            try:
                failpoints.disarm(self._stack, node)
            except NoFailpoints:
                continue  # dead or paused: what it was armed with ends with it, or below
        done = []
        with self._lock:
            left = list(self._open)
        for node in left:
            self.heal(node)
            done.append(f"healed {node}")
        done += self._stack.heal(HEAL_TIMEOUT_S)
        for node in failpoints.armed_nodes(self._stack):
            failpoints.disarm(self._stack, node)
        return done

    def arm(self, node: str, order: Arm) -> None:
        """Arm a failpoint. Raises NoFailpoints."""
        failpoints.arm(self._stack, node, order)
        self._timeline.note(f"failpoint {order.name} armed: {order.action}", node)
        self.armed.append((node, order))

    def disarm(self, node: str, name: str | None) -> None:
        """Disarm a failpoint, or all of a node. Raises NoFailpoints."""
        failpoints.disarm(self._stack, node, name)
        self._timeline.note(f"failpoint {name or 'of every name'} disarmed", node)

    def counts(self) -> Counts:
        """Return the hits of every point since this run began."""
        now = self._read()
        nothing = (0, 0)
        return {
            place: (hits - self._before.get(place, nothing)[0], fired - self._before.get(place, nothing)[1])
            for place, (hits, fired) in now.items()
        }

    def fired(self) -> list[tuple[str, Fired]]:
        """Return what the points have done, by node, in the order of time, over the life of the stack."""
        found = [
            (node, each) for node in failpoints.armed_nodes(self._stack) for each in failpoints.fired(self._stack, node)
        ]
        return sorted(found, key=lambda pair: pair[1].t)

    def _read(self) -> Counts:
        found: Counts = {}
        for node in failpoints.armed_nodes(self._stack):
            for point, counts in failpoints.counts(self._stack, node).items():
                found[node, point] = counts
        return found
