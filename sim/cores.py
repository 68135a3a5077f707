"""Processors that processes share by weight: what each gets while others want them, too.

A process works on one thing at a time, in order of arrival, and never on more than one core. Where more processes have
work than there are cores, each gets a share by its weight, no more than one core (generalised processor sharing:
Parekh and Gallager, IEEE/ACM Transactions on Networking 1 (1993)); this is what Linux' fair scheduler approximates.
"""

from collections import deque
from typing import Final

import simpy

DONE_S: Final = 1e-12
"""Work below this is rounding."""


class Process:
    """One operating system process, seen by the scheduler."""

    __slots__ = ("busy_s", "jobs", "name", "rate", "remaining_s", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.jobs: deque[tuple[float, simpy.Event]] = deque()
        self.remaining_s = 0.0
        """Of the first job."""
        self.rate = 0.0
        """Share of a core that it has now."""
        self.busy_s = 0.0
        """CPU seconds it has used."""


class Cores:
    """`count` equal processors."""

    def __init__(self, env: simpy.Environment, count: int) -> None:
        self._env = env
        self.count = count
        self._active: list[Process] = []
        self._now = 0.0
        self._number = 0
        """Of the newest plan; what an older one has in the queue of events is void."""
        self.paused: set[str] = set()
        """Names of processes that are stopped: they keep their work."""

    def work(self, process: Process, seconds: float) -> simpy.Event:
        """Give a process work; the event that is returned happens when it is done."""
        done = self._env.event()
        process.jobs.append((seconds, done))
        if len(process.jobs) == 1 and process.name not in self.paused:
            self._advance()
            process.remaining_s = seconds
            self._active.append(process)
            self._plan()
        return done

    def pause(self, process: Process) -> None:
        """Stop a process where it is."""
        self._advance()
        self.paused.add(process.name)
        if process in self._active:
            self._active.remove(process)
        self._plan()

    def resume(self, process: Process) -> None:
        """Let a process go on."""
        self._advance()
        self.paused.discard(process.name)
        if process.jobs and process not in self._active:
            if process.remaining_s <= DONE_S:
                process.remaining_s = process.jobs[0][0]
            self._active.append(process)
        self._plan()

    def settle(self) -> None:
        """Bring `busy_s` of all processes up to now."""
        self._advance()

    def _advance(self) -> None:
        now = self._env.now
        passed = now - self._now
        self._now = now
        if passed > 0:
            for process in self._active:
                done = process.rate * passed
                process.remaining_s -= done
                process.busy_s += done

    def _plan(self) -> None:
        """Share the cores among those with work and plan the next moment at which one of them is done."""
        self._number += 1
        active = self._active
        if not active:
            return
        if len(active) <= self.count:
            for process in active:
                process.rate = 1.0
        else:
            share(active, self.count)
        soonest = min(process.remaining_s / process.rate for process in active)
        timeout = self._env.timeout(max(soonest, 0.0), self._number)
        timeout.callbacks.append(self._due)

    def _due(self, event: simpy.Event) -> None:
        if event.value != self._number:
            return
        self._advance()
        finished: list[simpy.Event] = []
        for process in [process for process in self._active if process.remaining_s <= DONE_S]:
            finished.append(process.jobs.popleft()[1])
            if process.jobs:
                process.remaining_s = process.jobs[0][0]
            else:
                self._active.remove(process)
        self._plan()
        for done in finished:
            done.succeed()


def share(active: list[Process], cores: int) -> None:
    """Set the rate of each: by weight, nobody above one core, all cores used. There are more processes than cores."""
    left, weight = float(cores), sum(process.weight for process in active)
    for process in sorted(active, key=lambda process: -process.weight):
        # From the heaviest on: who would get more than a core has one, and the others share what is left.
        process.rate = min(1.0, left * process.weight / weight)
        left -= process.rate
        weight -= process.weight
