"""Fast paths: when does each customer leave, given when each arrives and what service each needs.

They are exact recursions without an event calendar, and both the oracle of the SimPy stations of sim/stations.py and
the engine of sweeps. Arrays are in order of arrival, times in seconds from the start of an empty system; a customer
who is not served leaves at nan. Where several things happen at one moment, arrivals come first: who arrives as a
service ends still finds it busy, and who arrives as a batch begins is in it.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Times = NDArray[Any]


def lindley(arrived_s: Times, service_s: Times) -> Times:
    """Return departures of G/G/1, first come first served, without a loop.

    The departure of n is max over k ≤ n of (arrival of k + services of k … n), a running maximum once the sum of all
    services up to n is taken out. Source: Lindley, "The theory of queues with a single server", Proceedings of the
    Cambridge Philosophical Society 48 (1952). Raises ValueError for arrays that are no path, as every function here.
    """
    _check(arrived_s, service_s)
    done = np.cumsum(service_s)
    left: Times = done + np.maximum.accumulate(arrived_s - (done - service_s))
    return left


def kiefer_wolfowitz(arrived_s: Times, service_s: Times, servers: int) -> Times:
    """Return departures of G/G/c, first come first served: each takes the server that is free first.

    Source: Kiefer and Wolfowitz, "On the theory of queues with many servers", Transactions of the American
    Mathematical Society 78 (1955). Their sorted vector is a heap here.
    """
    _check(arrived_s, service_s, servers)
    free = [0.0] * servers
    left = []
    replace = heapq.heapreplace
    for arrived, service in zip(arrived_s.tolist(), service_s.tolist(), strict=True):
        first = free[0]
        end = (arrived if arrived > first else first) + service
        replace(free, end)
        left.append(end)
    return np.asarray(left)


def finite_capacity(arrived_s: Times, service_s: Times, servers: int, capacity: int) -> Times:
    """Return departures of G/G/c/K, first come first served: who finds K in the system, served or waiting, is refused.

    Raises ValueError unless K ≥ c.
    """
    _check(arrived_s, service_s, servers)
    if capacity < servers:
        raise ValueError(f"{servers} servers have no place in a system of {capacity}")
    free = [0.0] * servers
    inside: list[float] = []
    left = []
    for arrived, service in zip(arrived_s.tolist(), service_s.tolist(), strict=True):
        while inside and inside[0] < arrived:
            heapq.heappop(inside)
        if len(inside) >= capacity:
            left.append(np.nan)
            continue
        end = max(arrived, free[0]) + service
        heapq.heapreplace(free, end)
        heapq.heappush(inside, end)
        left.append(end)
    return np.asarray(left)


def impatient(arrived_s: Times, service_s: Times, patience_s: Times, servers: int) -> Times:
    """Return departures of G/G/c+G, first come first served: who would wait longer than its patience gives up.

    A wait of exactly the patience is served.
    """
    _check(arrived_s, service_s, servers)
    _check(arrived_s, patience_s)
    free = [0.0] * servers
    left = []
    for arrived, service, patience in zip(arrived_s.tolist(), service_s.tolist(), patience_s.tolist(), strict=True):
        start = max(arrived, free[0])
        if start > arrived + patience:
            left.append(np.nan)
            continue
        heapq.heapreplace(free, start + service)
        left.append(start + service)
    return np.asarray(left)


def interrupted(arrived_s: Times, service_s: Times, fails_s: Times, repaired_s: Times) -> Times:
    """Return departures of G/G/1, first come first served, whose server fails and then goes on where it was.

    `fails_s[k]` to `repaired_s[k]` are the outages, in order and apart; the last may end before the last departure,
    after which there is none. An outage that begins as a service ends comes first.
    """
    _check(arrived_s, service_s)
    _check_outages(fails_s, repaired_s)
    fails, repaired = fails_s.tolist(), repaired_s.tolist()
    outage, free = 0, 0.0
    left = []
    for arrived, service in zip(arrived_s.tolist(), service_s.tolist(), strict=True):
        now, rest = max(arrived, free), service
        while outage < len(fails):
            if now < fails[outage]:
                if now + rest < fails[outage]:
                    break
                rest = max(rest - (fails[outage] - now), 0.0)
            now = max(now, repaired[outage])
            outage += 1
        free = now + rest
        left.append(free)
    return np.asarray(left)


def processor_sharing(arrived_s: Times, service_s: Times) -> Times:
    """Return departures of G/G/1 in which all customers are served at once, each at 1/n of the speed.

    By the attained service that every customer present shares: it grows at 1/n, and who arrives when it is v leaves
    when it is v + service. Source: Kleinrock, "Queueing Systems" volume 2 (1976), section 4.4.
    """
    _check(arrived_s, service_s)
    left = [0.0] * len(arrived_s)
    present: list[tuple[float, int]] = []
    now = attained = 0.0

    def leave_until(moment: float) -> None:
        nonlocal now, attained
        while present:
            goal, customer = present[0]
            ends = now + (goal - attained) * len(present)
            if ends > moment:
                attained += (moment - now) / len(present)
                break
            heapq.heappop(present)
            now, attained = max(ends, now), goal
            left[customer] = now
        if not present:
            # Starting anew keeps the attained service small, so that no digit is lost in a long run.
            attained = 0.0
        now = max(now, moment)

    for customer, (arrived, service) in enumerate(zip(arrived_s.tolist(), service_s.tolist(), strict=True)):
        leave_until(arrived)
        heapq.heappush(present, (attained + service, customer))
    leave_until(np.inf)
    return np.asarray(left)


def tandem(arrived_s: Times, services_s: Sequence[Times], servers: Sequence[int]) -> Times:
    """Return departures from the last of several stations in a row, each first come first served.

    `services_s[station][customer]` is what each needs there. Who leaves a station at the same moment as another goes
    on in order of arrival.
    """
    order = np.arange(len(arrived_s))
    moved = np.asarray(arrived_s, dtype=float)
    for service, count in zip(services_s, servers, strict=True):
        left = kiefer_wolfowitz(moved, np.asarray(service)[order], count)
        by_departure = np.argsort(left, kind="stable")
        order, moved = order[by_departure], left[by_departure]
    ended = np.empty(len(order))
    ended[order] = moved
    return ended


@dataclass(frozen=True, slots=True)
class Batching:
    """How a batch server gathers its batches. Raises ValueError for a bound below 1 or a negative time.

    A free server that sees somebody waiting begins after `linger_s`, or as soon as `batch_max` wait, and takes at
    most so many, in order. A batch takes a time of its own + size · `per_customer_s`. Who arrives while `queue_max`
    wait is refused.
    """

    per_customer_s: float
    batch_max: int
    queue_max: int
    linger_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.batch_max, self.queue_max) < 1 or not (self.per_customer_s >= 0 and self.linger_s >= 0):
            raise ValueError("batch and queue must be 1 or more, times not negative")


class Batch(NamedTuple):
    """One batch: when it left its queue, when its service began, when it ended, and how many were in it."""

    taken_s: float
    began_s: float
    ended_s: float
    size: int


@dataclass(slots=True)
class _Gate:
    """The queue of one batch server: who waits, who is refused, and when the next batch begins."""

    arrived: list[float]
    rules: Batching
    waiting: list[int] = field(default_factory=list)
    """Customers that wait, in order."""
    seen: int = 0
    """Customers that arrived up to now, refused ones too."""

    def admit(self, until: float) -> None:
        """Let in, or refuse, everybody who arrives up to a moment. Nobody leaves the queue meanwhile."""
        seen = bisect_right(self.arrived, until, self.seen)
        fits = min(self.seen + self.rules.queue_max - len(self.waiting), seen)
        self.waiting.extend(range(self.seen, fits))
        self.seen = seen

    def begins(self, free: float) -> float | None:
        """Return when the next batch begins if the server is free from a moment on, None if nobody comes."""
        self.admit(free)
        if not self.waiting:
            if self.seen == len(self.arrived):
                return None
            free = self.arrived[self.seen]
            self.admit(free)
        missing = self.rules.batch_max - len(self.waiting)
        if self.rules.linger_s and missing > 0:
            free += self.rules.linger_s
            last = self.seen + missing - 1
            if self.rules.batch_max <= self.rules.queue_max and last < len(self.arrived):
                free = min(free, self.arrived[last])
            self.admit(free)
        return free

    def take(self) -> list[int]:
        """Take the next batch out of the queue."""
        batch = self.waiting[: self.rules.batch_max]
        del self.waiting[: self.rules.batch_max]
        return batch


def gated_batches(arrived_s: Times, own_s: Times, rules: Batching) -> tuple[Times, list[Batch]]:
    """Return departures of one batch server, and its batches; batch number k has the time `own_s[k]` of its own."""
    left, batches = shared_batches([arrived_s], [own_s], rules, 1)
    return left[0], batches


def shared_batches(
    arrived_s: Sequence[Times], own_s: Sequence[Times], rules: Batching, slots: int
) -> tuple[list[Times], list[Batch]]:
    """Return departures of several batch servers that share `slots` places to be served in, and their batches.

    Each server's batch goes to the shared station, which serves `slots` batches at a time, first come first served;
    until it is answered the server waits. Batch number k of server i has the time `own_s[i][k]` of its own.
    Raises ValueError without a slot.
    """
    if slots < 1:
        raise ValueError("a station needs a server")
    gates = []
    for arrived, each_s in zip(arrived_s, own_s, strict=True):
        _check(arrived, each_s)
        gates.append(_Gate(arrived.tolist(), rules))
    left = [[np.nan] * len(arrived) for arrived in arrived_s]
    counts = [0] * len(gates)
    own = [times.tolist() for times in own_s]
    free = [0.0] * slots
    batches: list[Batch] = []
    # A server's next batch depends on nobody else's, so that batches can be taken in the order in which they begin.
    due = [(begins, number) for number, gate in enumerate(gates) if (begins := gate.begins(0.0)) is not None]
    heapq.heapify(due)
    while due:
        begins, number = heapq.heappop(due)
        batch = gates[number].take()
        served = max(begins, free[0])
        ends = served + (own[number][counts[number]] + rules.per_customer_s * len(batch))
        heapq.heapreplace(free, ends)
        for customer in batch:
            left[number][customer] = ends
        counts[number] += 1
        batches.append(Batch(begins, served, ends, len(batch)))
        if (begins := gates[number].begins(ends)) is not None:
            heapq.heappush(due, (begins, number))
    return [np.asarray(times) for times in left], batches


def _check(arrived_s: Times, service_s: Times, servers: int = 1) -> None:
    if len(arrived_s) != len(service_s):
        raise ValueError(f"{len(arrived_s)} arrivals and {len(service_s)} times do not belong together")
    if servers < 1:
        raise ValueError("a station needs a server")
    if not len(arrived_s):
        return
    if not (arrived_s[0] >= 0 and np.isfinite(arrived_s[-1]) and (np.diff(arrived_s) >= 0).all()):
        raise ValueError("arrivals must be finite, in ascending order, from 0 on")
    if not (np.isfinite(service_s).all() and (service_s >= 0).all()):
        raise ValueError("service times must be finite and not negative")


def _check_outages(fails_s: Times, repaired_s: Times) -> None:
    edges = np.column_stack((fails_s, repaired_s)).ravel()
    if len(edges) and not (edges[0] >= 0 and np.isfinite(edges).all() and (np.diff(edges) >= 0).all()):
        raise ValueError("outages must be finite, in order and apart: fails, repaired, fails, …")
