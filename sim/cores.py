"""Processors that processes share as under Linux' fair scheduler: by weight, in slices, and not at once.

A process works on one thing at a time, in order of arrival, and never on more than one core. Who has used least of its
share (run time divided by weight) is next. Who runs is left alone until it has had a slice, whoever wakes meanwhile;
after that a process that wakes takes its core if it is behind, and else the kernel looks once a tick. With many cores'
worth of short bursts this waiting for others' slices, not the sharing itself, is what an answer is late by.

Source: Stoica and Abdel-Wahab, "Earliest Eligible Virtual Deadline First" (1995); Linux, kernel/sched/fair.c
(RUN_TO_PARITY: a process keeps its core for its slice) and sched-eevdf in the kernel's documentation.
"""

import math
from collections import deque
from typing import Final

import simpy

DONE_S: Final = 1e-12
"""Work below this is rounding."""
SLICE_S: Final = 0.0014
"""base_slice_ns: 0.7 ms times 1 + log2 of the number of processors, here two."""
TICK_S: Final = 0.004
"""CONFIG_HZ=250, the default of servers."""
MEMORY_S: Final = 0.05
"""How long it takes until cores are warm, or cold again: a cache of some megabytes is filled in less."""
TICK_ROUNDING: Final = 1e-6
REAL_TIME: Final = 1e9
"""A weight from which on a process is scheduled before all others, and at once."""
WEIGHTS: Final = {0: 1024.0, 5: 335.0, 10: 110.0, -10: 9548.0}
"""Linux' weights of niceness (kernel/sched/core.c)."""
UNIT: Final = 1024.0
"""The weight at which run time is counted as it is."""


class Process:
    """One operating system process, seen by the scheduler."""

    __slots__ = (
        "busy_s",
        "jobs",
        "name",
        "number",
        "remaining_s",
        "since_s",
        "slice_from_s",
        "state",
        "used",
        "weight",
    )

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.jobs: deque[tuple[float, simpy.Event]] = deque()
        self.remaining_s = 0.0
        """Of the first job."""
        self.state = "idle"
        """idle, ready, running or stopped."""
        self.since_s = 0.0
        """When it was last accounted for while running."""
        self.slice_from_s = 0.0
        """When it was given its core."""
        self.used = 0.0
        """Run time divided by weight: who has least is next."""
        self.number = 0
        """Of its newest run; what an older one has in the queue of events is void."""
        self.busy_s = 0.0
        """CPU seconds it has used."""

    @property
    def at_once(self) -> bool:
        """Whether it is scheduled in real time."""
        return self.weight >= REAL_TIME


class Cores:
    """`count` equal processors."""

    def __init__(
        self,
        env: simpy.Environment,
        count: int,
        *,
        slice_s: float = SLICE_S,
        tick_s: float = TICK_S,
        warm: float = 1.0,
        cold_at: float = 0.0,
    ) -> None:
        """Make processors on which work takes what is said where they are busy for `cold_at` of the time.

        Where they never rest it takes `warm` of that, for caches and clocks of a core that has just been idle are cold;
        between the two it is linear.
        """
        self._env = env
        self.count = count
        self._warm, self._cold_at = warm, cold_at
        self._level = cold_at
        """Share of the cores that was busy in the last moments."""
        self._level_at_s = 0.0
        self._slice_s, self._tick_s = slice_s, tick_s
        self._running: list[Process] = []
        self._ready: list[Process] = []
        self._least = 0.0
        """The least use of anybody who runs or waits: who was asleep begins here, and not with what it saved up."""

    def work(self, process: Process, seconds: float) -> simpy.Event:
        """Give a process work; the event that is returned happens when it is done."""
        done = self._env.event()
        if self._warm != 1.0:
            seconds *= self._factor()
        process.jobs.append((seconds, done))
        if process.state == "idle":
            process.remaining_s = seconds
            self._wake(process)
        return done

    def pause(self, process: Process) -> None:
        """Stop a process where it is."""
        if process.state == "running":
            self._account(process)
            process.number += 1
            self._age()
            self._running.remove(process)
        elif process.state == "ready":
            self._ready.remove(process)
        process.state = "stopped"
        self._fill()

    def resume(self, process: Process) -> None:
        """Let a process go on."""
        if process.state == "stopped":
            process.state = "idle"
            if process.jobs:
                if process.remaining_s <= DONE_S:
                    process.remaining_s = process.jobs[0][0]
                self._wake(process)

    def settle(self) -> None:
        """Bring `busy_s` of all processes up to now."""
        for process in self._running:
            self._account(process)

    def _factor(self) -> float:
        self._age()
        share = (self._level - self._cold_at) / (1 - self._cold_at)
        return 1 - (1 - self._warm) * min(max(share, 0.0), 1.0)

    def _age(self) -> None:
        """Bring the level up to now; whoever starts or stops a process asks for it first."""
        now = self._env.now
        fade = math.exp((self._level_at_s - now) / MEMORY_S)
        self._level = self._level * fade + len(self._running) / self.count * (1 - fade)
        self._level_at_s = now

    def _wake(self, process: Process) -> None:
        process.used = max(process.used, self._least)
        if len(self._running) < self.count:
            self._start(process)
            return
        victim = self._victim(process)
        if victim is None:
            process.state = "ready"
            self._ready.append(process)
            return
        self._stop(victim)
        self._start(process)

    def _victim(self, process: Process) -> Process | None:
        """Return whose core a process that wakes may take."""
        if process.at_once:
            others = [other for other in self._running if not other.at_once]
            return max(others, key=_used, default=None)
        now = self._env.now
        others = []
        for other in self._running:
            if not other.at_once and now - other.slice_from_s >= self._slice_s:
                self._account(other)
                if other.used > process.used:
                    others.append(other)
        return max(others, key=_used, default=None)

    def _start(self, process: Process) -> None:
        now = self._env.now
        process.state = "running"
        process.since_s = process.slice_from_s = now
        self._age()
        self._running.append(process)
        self._plan(process)

    def _stop(self, process: Process) -> None:
        self._account(process)
        process.number += 1
        self._age()
        self._running.remove(process)
        process.state = "ready"
        self._ready.append(process)

    def _plan(self, process: Process) -> None:
        """Plan the moment at which a running process is done, or the tick at which it may have to give way."""
        process.number += 1
        lasts_s = process.remaining_s
        if not process.at_once:
            now = self._env.now
            earliest_s = max(now, process.slice_from_s + self._slice_s)
            # A tick that rounding puts at this very moment is over.
            tick_s = (int(earliest_s / self._tick_s + TICK_ROUNDING) + 1) * self._tick_s
            lasts_s = min(lasts_s, tick_s - now)
        timeout = self._env.timeout(max(lasts_s, 0.0), (process, process.number))
        timeout.callbacks.append(self._due)

    def _account(self, process: Process) -> None:
        now = self._env.now
        passed = now - process.since_s
        process.since_s = now
        process.remaining_s -= passed
        process.busy_s += passed
        if not process.at_once:
            process.used += passed * UNIT / process.weight

    def _due(self, event: simpy.Event) -> None:
        process, number = event.value or (None, 0)
        assert process is not None, "_plan gives the process"
        if number != process.number or process.state != "running":
            return
        self._account(process)
        done: simpy.Event | None = None
        if process.remaining_s <= DONE_S:
            done = process.jobs.popleft()[1]
            if process.jobs:
                process.remaining_s = process.jobs[0][0]
        if not process.jobs:
            process.number += 1
            self._age()
            self._running.remove(process)
            process.state = "idle"
            self._fill()
        elif self._ready and self._over(process):
            self._stop(process)
            self._fill()
        else:
            self._plan(process)
        if done is not None:
            done.succeed()

    def _over(self, process: Process) -> bool:
        """Return whether a running process has to give way now: its slice is over, and somebody is behind it."""
        if process.at_once or self._env.now - process.slice_from_s < self._slice_s:
            return False
        return any(other.at_once or other.used < process.used for other in self._ready)

    def _fill(self) -> None:
        """Give free cores to those who have had least."""
        while self._ready and len(self._running) < self.count:
            soonest = min(self._ready, key=lambda process: (not process.at_once, process.used))
            self._ready.remove(soonest)
            self._start(soonest)
        fair = [process.used for process in (*self._running, *self._ready) if not process.at_once]
        if fair:
            self._least = max(self._least, min(fair))


def _used(process: Process) -> float:
    return process.used
