"""An event loop and the gates of the parts of the service: the smallest pieces of the system model."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import simpy

from sim.cores import Cores, Process

Step = Generator[simpy.Event, Any, Any]


class Loop:
    """An event loop: it works through all that has come, in order; what comes meanwhile is for the next turn."""

    def __init__(self, env: simpy.Environment, cores: Cores, process: Process, wake_s: float) -> None:
        self._env, self._cores, self._process, self._wake_s = env, cores, process, wake_s
        self._todo: deque[tuple[float, Callable[[], None]]] = deque()
        self._ready: list[simpy.Event] = []
        self._turns = False

    def call(self, seconds: float, then: Callable[[], None]) -> None:
        """Have the loop do something that takes so long; `then` is called when it is done."""
        self._todo.append((seconds, then))
        if not self._turns:
            self._turns = True
            self._env.process(self._turn())

    def done(self, seconds: float) -> simpy.Event:
        """Have the loop do something that takes so long; the event happens when it is done."""
        event = self._env.event()
        self.call(seconds, partial(_happen, event))
        return event

    def soon(self) -> simpy.Event:
        """Return an event that happens in the loop's next turn, before anything that comes from outside meanwhile."""
        event = self._env.event()
        self._ready.append(event)
        if not self._turns:
            self._turns = True
            self._env.process(self._turn())
        return event

    def _turn(self) -> Step:
        # Half of what waking takes comes before the work that woke the loop, half after it.
        yield self._cores.work(self._process, self._wake_s / 2)
        while self._todo or self._ready:
            ready, self._ready = self._ready, []
            for event in ready:
                event.succeed()
            # Whoever waited for this turn goes on before the loop looks what has come.
            yield self._env.timeout(0)
            mine, self._todo = self._todo, deque()
            for seconds, then in mine:
                if seconds > 0:
                    yield self._cores.work(self._process, seconds)
                then()
            # Who was told goes on first: what it gives the loop to do at once costs no wake of its own.
            yield self._env.timeout(0)
        yield self._cores.work(self._process, self._wake_s / 2)
        self._turns = False
        if self._todo or self._ready:
            self._turns = True
            self._env.process(self._turn())


class Gates:
    """Which parts of the service are there. What needs one that is not waits for it."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._closed: dict[str, simpy.Event] = {}

    def is_open(self, name: str) -> bool:
        """Return whether a part is there."""
        return name not in self._closed

    def close(self, name: str) -> None:
        """Take a part away."""
        self._closed.setdefault(name, self._env.event())

    def open(self, name: str) -> None:
        """Bring it back."""
        event = self._closed.pop(name, None)
        if event is not None:
            event.succeed()

    def passed(self, *names: str) -> Step:
        """Wait until all of these are there."""
        while waits := [self._closed[name] for name in names if name in self._closed]:
            yield waits[0]


def _happen(event: simpy.Event) -> None:
    event.succeed()


def quantile(table: Sequence[float], share: float) -> float:
    """Return the value of a table of equidistant quantiles at `share`, 0 to 1; 0 of an empty table."""
    if not table:
        return 0.0
    place = share * (len(table) - 1)
    low = int(place)
    high = min(low + 1, len(table) - 1)
    return table[low] + (table[high] - table[low]) * (place - low)
