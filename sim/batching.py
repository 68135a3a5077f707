"""The batching writer of one API process for one server, as reference/writer.py has it, in the system model."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import simpy

from sim.cores import WEIGHTS, Process
from sim.event_loop import Step

if TYPE_CHECKING:
    from sim.system import System

SWEEP_EVERY_S: Final = 0.1
LANES: Final = 2
CROWDED: Final = 64
LINGER_FROM: Final = 20
LINGER_BATCH: Final = 64
HOT_COMMANDS: Final = 8
HOT_BATCH: Final = 8
HOT_REST: Final = 15.0
HOT_REST_MAX_S: Final = 0.5
HOT_WAITS_S: Final = 0.05
"""The writer's constants (reference/writer.py); `tests/unit/test_sim_system.py` holds them equal."""


@dataclass(slots=True)
class Request:
    """One request under way."""

    due_s: float
    api: int
    server: int
    read: bool
    hot: bool
    deadline_s: float = 0.0
    tries: int = 1
    ended: bool = False
    """Its client has an answer, or waits no longer; the service may still work on it."""


@dataclass
class Hot:
    """The one hot wallet in one writer."""

    queue: deque[Request] = field(default_factory=deque)
    commands: int = 0


class Lane:
    """One of the loops that post, with its session of Postgres."""

    __slots__ = ("session", "wanted", "works")

    def __init__(self, env: simpy.Environment, name: str) -> None:
        self.session = Process(name, WEIGHTS[0])
        self.wanted = env.event()
        self.works = False

    def want(self) -> None:
        """Wake the lane."""
        if not self.wanted.triggered:
            self.wanted.succeed()


class Writer:
    """The writer of one API process for one server: the loop of reference/writer.py."""

    def __init__(self, system: "System", api: int, server: int) -> None:
        self.system, self.api, self.server = system, api, server
        env = system.env
        self.queue: deque[Request] = deque()
        self.hot = Hot()
        self.hot_came = env.event()
        self.gap = env.event()
        self.others_posted = False
        self.lanes = [Lane(env, f"post{lane} api{api} pg{server}") for lane in range(LANES + 1)]
        """The last one is that of hot wallets."""
        self.arrivals = 0
        self.lingers = False
        self.linger_s = system.setting["writer_linger_ms"] / 1000
        for lane in self.lanes[:LANES]:
            env.process(self._run(lane))
        env.process(self._run_hot())
        env.process(self._sweep())

    @property
    def gate(self) -> str:
        """What the model calls this writer's server."""
        return f"pg{self.server}"

    def submit(self, request: Request) -> bool:
        """Take a command, or return False: the queue is full, or the server is not there."""
        if not self.system.gates.is_open(self.gate):
            return False
        if len(self.queue) + len(self.hot.queue) >= self.system.setting["writer_queue"]:
            return False
        if request.hot and self.hot.commands:
            self._enter_hot(request)
            return True
        self.arrivals += 1
        self.queue.append(request)
        self.lanes[0].want()
        if len(self.queue) >= CROWDED:
            self.lanes[1].want()
        return True

    def fail(self) -> list[Request]:
        """Give back all that waits: its server has gone."""
        failed = [*self.queue, *self.hot.queue]
        self.hot.commands -= len(self.hot.queue)
        self.queue.clear()
        self.hot.queue.clear()
        return failed

    def _enter_hot(self, request: Request) -> None:
        self.hot.queue.append(request)
        self.hot.commands += 1
        if not self.hot_came.triggered:
            self.hot_came.succeed()

    def _sweep(self) -> Step:
        env = self.system.env
        yield env.timeout(float(self.system.random["phases"].random()) * SWEEP_EVERY_S)
        while True:
            late: list[Request] = []
            for queue in (self.queue, self.hot.queue):
                while queue and queue[0].deadline_s < env.now:
                    late.append(queue.popleft())
                    self.hot.commands -= queue is self.hot.queue
            if late:
                self.system.refuse(late)
            self.lingers = self.arrivals >= LINGER_FROM
            self.arrivals = 0
            yield env.timeout(SWEEP_EVERY_S)

    @property
    def _busy(self) -> bool:
        return any(lane.works for lane in self.lanes[:LANES])

    def _open_gap(self) -> None:
        if not self.gap.triggered:
            self.gap.succeed()

    def _run(self, lane: Lane) -> Step:
        env, system = self.system.env, self.system
        first = lane is self.lanes[0]
        while True:
            yield lane.wanted
            lane.wanted = env.event()
            lane.works = True
            # A task goes on in the loop's next turn, when all that came in this one has been queued.
            yield system.loops[self.api].soon()
            while self.queue if first else len(self.queue) >= CROWDED:
                if first and self.lingers and len(self.queue) < LINGER_BATCH:
                    self._open_gap()
                    yield env.timeout(self.linger_s + (system.costs.linger_slack_ms / 1000 if self.linger_s else 0.0))
                    yield system.loops[self.api].soon()
                if self.gap.triggered:
                    self.gap = env.event()
                batch = self._take()
                if not batch:
                    continue
                yield from self._post(lane, batch)
                self.others_posted = True
                if self.queue:
                    self.lanes[0].want()
            lane.works = False
            if not self._busy:
                self._open_gap()

    def _take(self) -> list[Request]:
        size = min(len(self.queue), int(self.system.setting["writer_batch"]))
        taken = [self.queue.popleft() for _ in range(size)]
        hot = sum(request.hot for request in taken)
        if not hot or (hot <= HOT_COMMANDS and not self.hot.commands):
            return taken
        heated = not self.hot.commands
        for request in taken:
            if request.hot:
                self._move_to_hot(request)
        if heated and any(request.hot for request in self.queue):
            rest = [*self.queue]
            self.queue.clear()
            for request in rest:
                if request.hot:
                    self._move_to_hot(request)
                else:
                    self.queue.append(request)
        return [request for request in taken if not request.hot]

    def _move_to_hot(self, request: Request) -> None:
        self._enter_hot(request)
        self.arrivals = max(0, self.arrivals - 1)

    def _run_hot(self) -> Step:
        env, system = self.system.env, self.system
        lane = self.lanes[LANES]
        while True:
            yield self.hot_came
            self.hot_came = env.event()
            while self.hot.queue:
                began = env.now
                alone = not (self.others_posted or self._busy)
                self.others_posted = False
                most = int(system.setting["writer_batch"]) if alone else HOT_BATCH
                batch = [self.hot.queue.popleft() for _ in range(min(most, len(self.hot.queue)))]
                yield from self._post(lane, batch)
                self.hot.commands -= len(batch)
                if self.hot.queue and (self.others_posted or self._busy):
                    yield env.timeout(min(HOT_REST_MAX_S, HOT_REST * (env.now - began)))
                    yield simpy.AnyOf(env, [self.gap, env.timeout(HOT_WAITS_S)])

    def _post(self, lane: Lane, batch: list[Request]) -> Step:
        system, costs = self.system, self.system.costs
        began = system.env.now
        handed_ms = costs.api_batch_ms / 2 + costs.api_bet_ms * costs.handed_share * len(batch)
        yield system.loops[self.api].done(handed_ms / 1000)
        yield from system.gates.passed(self.gate)
        yield system.cores.work(lane.session, costs.post.seconds(len(batch)))
        # Commits of one server wait for the log one after the other.
        with system.logs[self.server].request() as turn:
            yield turn
            yield system.env.timeout(system.commit_s() + costs.commit_each_ms * len(batch) / 1000)
        system.outbox[self.server] += len(batch)
        if began >= system.play.warm_s:
            system.entries += len(batch)
            system.batches += 1
        # The lane goes on when the loop has come round to Postgres' answer.
        yield system.loops[self.api].done(costs.api_batch_ms / 2000)
        system.post_s += system.env.now - began
        system.cores.work(system.background, costs.unseen_bet_ms * len(batch) / 1000)
        answered_ms = costs.api_bet_ms * (1 - costs.received_share - costs.handed_share)
        system.answer(self.api, batch, answered_ms)
