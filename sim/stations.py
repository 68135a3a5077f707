"""Readable SimPy stations, each with what it did with its customers; sim/paths.py has the same ones as recursions.

A customer visits a station with `yield from station.visit(…)`, which says whether it was served. Where several things
happen at one moment, arrivals come first, because `arrive` schedules them before anything else; so both agree path by
path, to the last digits. Times in seconds.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import simpy

from sim.paths import Batching

Visit = Generator[simpy.Event, Any, bool]


def arrive(env: simpy.Environment, arrived_s: Iterable[float], visit: Callable[[int], Visit]) -> list[float]:
    """Let customer n arrive at `arrived_s[n]` and do `visit(n)`; return the departures, which `env.run()` fills in.

    Who is not served leaves at nan. To be called at time 0: a delay from there is the exact moment.
    """
    left: list[float] = []

    def customer(number: int, arrived: float) -> Generator[simpy.Event, Any, None]:
        yield env.timeout(arrived)
        if (yield from visit(number)):
            left[number] = env.now

    for number, arrived in enumerate(arrived_s):
        left.append(math.nan)
        env.process(customer(number, arrived))
    return left


@dataclass(slots=True)
class Occupancy:
    """How many are in a station and how many servers are busy, summed over time, from what the station holds."""

    env: simpy.Environment
    inside: int = 0
    busy: int = 0
    inside_s: float = 0.0
    """∫ inside dt: by Little's law the sum of all times spent here."""
    busy_s: float = 0.0
    """∫ busy dt: by the utilisation law the sum of all services given here."""
    _changed_s: float = field(default=0.0, repr=False)

    def change(self, *, inside: int = 0, busy: int = 0) -> None:
        """Count customers and busy servers that come (above 0) or go (below)."""
        passed = self.env.now - self._changed_s
        self.inside_s += self.inside * passed
        self.busy_s += self.busy * passed
        self._changed_s = self.env.now
        self.inside += inside
        self.busy += busy


class Delay:
    """Everybody is served at once: thinking, a network, a station that never queues."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self.occupancy = Occupancy(env)

    def visit(self, service_s: float) -> Visit:
        """Stay for the service."""
        self.occupancy.change(inside=1, busy=1)
        yield self._env.timeout(service_s)
        self.occupancy.change(inside=-1, busy=-1)
        return True


class Servers:
    """A number of servers, first come first served; `capacity` places in all, those in service included."""

    def __init__(self, env: simpy.Environment, servers: int, capacity: float = math.inf) -> None:
        self._env = env
        self._servers = simpy.Resource(env, servers)
        self._capacity = capacity
        self.occupancy = Occupancy(env)

    def visit(self, service_s: float, patience_s: float = math.inf) -> Visit:
        """Wait, at most for the patience, and be served; a full station refuses."""
        if self.occupancy.inside >= self._capacity:
            return False
        self.occupancy.change(inside=1)
        with self._servers.request() as server:
            if math.isinf(patience_s):
                yield server
            else:
                yield server | self._env.timeout(patience_s)
                if not server.triggered:
                    # Who leaves at this very moment frees a server, which still counts.
                    yield self._env.timeout(0)
            served = server.triggered
            if served:
                self.occupancy.change(busy=1)
                yield self._env.timeout(service_s)
                self.occupancy.change(busy=-1)
        self.occupancy.change(inside=-1)
        return served


class SharedProcessor:
    """One server that serves all customers at once, each at 1/n of its speed."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._rest_s: dict[simpy.Event, float] = {}
        self._served_until_s = 0.0
        self._plan = 0
        self.occupancy = Occupancy(env)

    def visit(self, service_s: float) -> Visit:
        """Be served together with all others."""
        self._serve_until_now()
        self.occupancy.change(inside=1, busy=not self._rest_s)
        done = self._env.event()
        self._rest_s[done] = service_s
        self._plan_next()
        yield done
        return True

    def _serve_until_now(self) -> None:
        for done in self._rest_s:
            self._rest_s[done] -= (self._env.now - self._served_until_s) / len(self._rest_s)
        self._served_until_s = self._env.now

    def _plan_next(self) -> None:
        """Plan the next departure as it is if nobody else arrives; what was planned before no longer counts."""
        self._plan += 1
        if self._rest_s:
            done = min(self._rest_s, key=self._rest_s.__getitem__)
            self._env.process(self._finish(done, max(self._rest_s[done], 0.0) * len(self._rest_s), self._plan))

    def _finish(self, done: simpy.Event, after_s: float, plan: int) -> Generator[simpy.Event, Any, None]:
        yield self._env.timeout(after_s)
        if plan == self._plan:
            self._serve_until_now()
            del self._rest_s[done]
            self.occupancy.change(inside=-1, busy=0 if self._rest_s else -1)
            done.succeed()
            self._plan_next()


class BatchServer:
    """Serves all who wait together, as `Batching` says; meanwhile the next batch gathers.

    Batch number k takes `own_s[k]` + size · per customer, at a station that it may share with other batch servers.
    """

    def __init__(
        self, env: simpy.Environment, own_s: Iterable[float], rules: Batching, shared: simpy.Resource | None = None
    ) -> None:
        self._env = env
        self._own_s = iter(own_s)
        self._rules = rules
        self._shared = shared or simpy.Resource(env, 1)
        self._queue: deque[simpy.Event] = deque()
        self._woken = env.event()
        self._full = env.event()
        self.occupancy = Occupancy(env)
        env.process(self._run())

    def visit(self) -> Visit:
        """Wait for the next batch and be served in it, or be refused by a full queue."""
        if len(self._queue) >= self._rules.queue_max:
            return False
        self.occupancy.change(inside=1)
        done = self._env.event()
        self._queue.append(done)
        for event, due in ((self._woken, True), (self._full, len(self._queue) >= self._rules.batch_max)):
            if due and not event.triggered:
                event.succeed()
        yield done
        return True

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            if not self._queue:
                self._woken = self._env.event()
                yield self._woken
            if self._rules.linger_s and len(self._queue) < self._rules.batch_max:
                self._full = self._env.event()
                yield self._full | self._env.timeout(self._rules.linger_s)
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._rules.batch_max))]
            with self._shared.request() as place:
                yield place
                self.occupancy.change(busy=1)
                yield self._env.timeout(next(self._own_s) + self._rules.per_customer_s * len(batch))
            self.occupancy.change(inside=-len(batch), busy=-1)
            for done in batch:
                done.succeed()


class BreakableServer:
    """One server, first come first served, that fails at given moments and goes on where it was when repaired."""

    def __init__(self, env: simpy.Environment, fails_s: Iterable[float], repaired_s: Iterable[float]) -> None:
        """Plan the outages; to be called at time 0, as `arrive`."""
        self._env = env
        self._server = simpy.Resource(env, 1)
        self._failed = env.event()
        self._repaired = env.event()
        self.occupancy = Occupancy(env)
        for fails, repaired in zip(fails_s, repaired_s, strict=True):
            env.process(self._at(fails, self._fail))
            env.process(self._at(repaired, self._repair))

    def visit(self, service_s: float) -> Visit:
        """Wait, be served, and wait through every outage on the way."""
        self.occupancy.change(inside=1)
        with self._server.request() as server:
            yield server
            rest_s, finished = service_s, False
            while not finished:
                while self._failed.triggered:
                    yield self._repaired
                began, failed = self._env.now, self._failed
                self.occupancy.change(busy=1)
                yield failed | self._env.timeout(rest_s)
                self.occupancy.change(busy=-1)
                # An outage that begins as the service ends comes first.
                finished = not failed.triggered
                rest_s = max(rest_s - (self._env.now - began), 0.0)
        self.occupancy.change(inside=-1)
        return True

    def _at(self, moment: float, act: Callable[[], None]) -> Generator[simpy.Event, Any, None]:
        yield self._env.timeout(moment)
        act()

    def _fail(self) -> None:
        self._repaired = self._env.event()
        self._failed.succeed()

    def _repair(self) -> None:
        self._failed = self._env.event()
        self._repaired.succeed()
