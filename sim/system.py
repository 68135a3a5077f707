"""The SimPy model of the service on one machine: generator, API, writers, Postgres, relay, Kafka, consumers, Redis.

What is modelled is what the service does, step by step, with the costs that `sim/costs.py` holds: requests are read by
an event loop, wait for a batch of their server's writer (reference/writer.py: linger, lanes, hot lane, queue bound,
deadline), are posted and answered; every entry then goes through outbox, relay, broker and consumers. All processes
share the machine's cores by weight (`sim/cores.py`).

What is not: rows that lock each other (wallets are many, and a hot one has a lane of its own), vacuum and checkpoints
(their effect is in the commits' tail), and money.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import msgspec
import numpy as np
import simpy
from numpy.typing import NDArray

from sim.batching import LANES, Request, Writer
from sim.cases import Shape
from sim.cores import REAL_TIME, WEIGHTS, Cores, Process
from sim.costs import Costs, Linear
from sim.event_loop import Gates, Loop, Step, quantile
from sim.faults import Fault

DEFAULTS: Final = {
    "writer_batch": 256,
    "writer_linger_ms": 4,
    "writer_queue": 4096,
    "command_deadline_ms": 2000,
    "relay_batch": 1000,
    "relay_poll_ms": 100,
    "relay_gather_ms": 50,
    "consumer_batch": 1000,
}
"""Defaults of the service's configuration; the test holds them equal, too."""
SAMPLE_EVERY_S: Final = 0.2
GROUPS: Final = ("matcher", "projector")
BACKLOGS: Final = ("outbox", *GROUPS)
FETCH_WAIT_S: Final = 0.05
"""fetch.wait.max.ms of the consumers (reference/bus.py)."""
FETCH_ENOUGH: Final = 160
"""Events in fetch.min.bytes: 64 KB of about 400 bytes each."""
FETCHED_AHEAD: Final = 20_000
"""Events that a group holds before it asks for no more."""
CACHE_TIMEOUT_S: Final = 0.1
CACHE_REST_S: Final = 1.0
"""A reader waits so long for Redis, and then does without for so long (reference/cache.py)."""
REQUESTS_MAX: Final = 5_000_000
AT_ONCE: Final = 8
"""So many requests or answers pass an event loop before the first of them is seen on the other side."""
SENT_AT_ONCE: Final = 32
"""So many requests leave the generator before an event loop on another core has woken to the first of them."""
NO_GATEWAY: Final = Linear()
REFUSED_REST_S: Final = 0.01
Floats = NDArray[np.float64]


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stretch of a load whose rate goes evenly from one value to another."""

    duration_s: float
    from_per_s: float
    to_per_s: float

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not (self.duration_s > 0 and self.from_per_s >= 0 and self.to_per_s >= 0):
            raise ValueError("duration_s must be above zero, from_per_s and to_per_s not below")


class Play(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of the model is asked."""

    shape: Shape
    costs: Costs
    rate_per_s: float | None
    """Requests that arrive per second (Poisson); None: `connections` in a closed loop."""
    duration_s: float
    stages: tuple[Stage, ...] = ()
    """How the rate moves; empty: it is `rate_per_s` from the beginning to the end."""
    burst: int = 1
    """Requests that are due at the same moment."""
    connections: int = 128
    timeout_s: float | None = None
    """A client waits so long for an answer; what it asked for goes on in the service. None: for ever."""
    retries: int = 0
    """How often a client asks again after a time-out or a refusal before it gives up. Open loop only."""
    retry_after_s: float = 0.1
    """It rests so long before it asks again, and twice as long each further time."""
    seed: int = 1
    replication: int = 0
    warm_s: float = 2.0
    """Requests that are due in this first time are not counted."""
    faults: tuple[Fault, ...] = ()
    drain_s: float = 0.0
    """The run goes on for so long after the last arrival, so that backlogs can shrink."""


@dataclass
class Run:
    """What one run showed. Latencies in seconds from the moment a request was due."""

    throughput_per_s: float
    latency_s: dict[str, Floats]
    """By class, `bets` and `reads`: answered requests that were due after the warm-up."""
    due_s: dict[str, Floats]
    refused: int
    """Answers that a request was not admitted; a client may have asked again."""
    timed_out: int
    """How often a client waited in vain."""
    abandoned: int
    """Requests whose client gave up."""
    batch: float | None
    """Entries of a batch on average."""
    utilisation: dict[str, float]
    """Busy share of `cores`, `api` (the busiest event loop), `writer` (lanes at work), `redis`, `generator`."""
    backlog: dict[str, Floats]
    """Samples of what waits, by stage."""
    sampled_s: Floats

    @property
    def answered(self) -> int:
        """Requests that were answered and counted."""
        return sum(map(len, self.latency_s.values()))

    @property
    def refused_share(self) -> float:
        """Share of the answers that said that a request was not admitted."""
        return self.refused / max(1, self.refused + self.answered)


class System:
    """One run. `run` plays it."""

    def __init__(self, play: Play) -> None:
        self.play, self.costs, self.shape = play, play.costs, play.shape
        self.env = simpy.Environment()
        self.cores = Cores(self.env, self.costs.cores, warm=self.costs.warm, cold_at=self.costs.cold_at)
        shape = self.shape
        self.setting = {name: shape.setting(name, value) for name, value in DEFAULTS.items()}
        real_time = play.rate_per_s is not None
        self.generator = Process("generator", REAL_TIME if real_time else WEIGHTS[-10])
        self.apis = [Process(f"api{index}", WEIGHTS[0]) for index in range(shape.apis)]
        self.loops = [Loop(self.env, self.cores, process, self.costs.api_wake_ms / 1000) for process in self.apis]
        self.redis = Process("redis", WEIGHTS[0])
        self.kafka = Process("kafka", WEIGHTS[5])
        self.relay = Process("relay", WEIGHTS[10])
        self.matcher = Process("matcher", WEIGHTS[10])
        self.projector = Process("projector", WEIGHTS[10])
        self.machine = [Process(f"machine{index}", 10 * REAL_TIME) for index in range(self.costs.cores)]
        self.gateway = Process("gateway", WEIGHTS[0])
        self.background = Process("background", WEIGHTS[5])
        self.random = {
            name: np.random.default_rng([play.seed, play.replication, number])
            for number, name in enumerate(("arrivals", "kinds", "commits", "stalls", "phases"))
        }
        self.sessions: dict[str, Process] = {}
        """Sessions of the workers by name."""
        self.gates = Gates(self.env)
        self.logs = [simpy.Resource(self.env, 1) for _ in range(shape.servers)]
        self.writers = [[Writer(self, api, server) for server in range(shape.servers)] for api in range(shape.apis)]
        self.outbox = [0] * shape.servers
        self.in_topic = {name: [0] * shape.servers for name in GROUPS}
        self.in_lane = {name: [0] * shape.servers for name in GROUPS}
        self.told = {name: self.env.event() for name in GROUPS}
        self.lane_told = {name: [self.env.event() for _ in range(shape.servers)] for name in GROUPS}
        self.latencies: dict[str, list[float]] = {"bets": [], "reads": []}
        self.dues: dict[str, list[float]] = {"bets": [], "reads": []}
        self.answered = 0
        self.refused = 0
        self.timed_out = 0
        self.abandoned = 0
        self.entries = 0
        self.batches = 0
        self.post_s = 0.0
        self.samples: list[tuple[float, ...]] = []
        self._read_waits: list[list[Request]] = [[] for _ in range(shape.apis)]
        self._reading = [False] * shape.apis
        self._cache_rests_until_s = [0.0] * shape.apis

    # --- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        """Play it. Raises ValueError if it is too long to be computed, or over before anything is counted."""
        play, env = self.play, self.env
        if play.duration_s <= play.warm_s:
            raise ValueError(f"{play.duration_s:g} s are too short: the first {play.warm_s:g} s are not counted")
        if (play.rate_per_s or 0) * play.duration_s > REQUESTS_MAX:
            raise ValueError(
                f"{play.rate_per_s:,.0f}/s for {play.duration_s:g} s is more than {REQUESTS_MAX:,} requests"
            )
        for server in range(self.shape.servers):
            env.process(self._relay(server))
        for name in GROUPS:
            env.process(self._fetching(name))
            for server in range(self.shape.servers):
                env.process(self._lane(name, server))
        env.process(self._sampler())
        env.process(self._idle())
        if self.costs.stalls_per_s > 0:
            env.process(self._stalls())
        for fault in play.faults:
            env.process(self._fault(fault))
        env.process(self._open_loop() if play.rate_per_s is not None else self._closed_loop())
        env.run(until=play.duration_s + play.drain_s)
        self.cores.settle()
        return self._found()

    def _found(self) -> Run:
        play = self.play
        whole_s = play.duration_s + play.drain_s
        lanes = LANES * self.shape.servers * self.shape.apis
        everyone = [
            self.generator,
            self.gateway,
            *self.apis,
            self.redis,
            self.kafka,
            self.relay,
            self.matcher,
            self.projector,
        ]
        everyone += [lane.session for row in self.writers for writer in row for lane in writer.lanes]
        everyone += [self.background, *self.sessions.values()]
        samples = np.array(self.samples, dtype=float).reshape(-1, 1 + len(BACKLOGS))
        return Run(
            throughput_per_s=self.answered / (play.duration_s - play.warm_s),
            latency_s={name: np.array(values) for name, values in self.latencies.items()},
            due_s={name: np.array(values) for name, values in self.dues.items()},
            refused=self.refused,
            timed_out=self.timed_out,
            abandoned=self.abandoned,
            batch=self.entries / self.batches if self.batches else None,
            utilisation={
                "cores": sum(process.busy_s for process in everyone) / whole_s / self.costs.cores,
                "api": max(process.busy_s for process in self.apis) / whole_s,
                "writer": self.post_s / whole_s / lanes,
                "redis": self.redis.busy_s / whole_s,
                "gateway": self.gateway.busy_s / whole_s,
                "generator": self.generator.busy_s / whole_s,
            },
            backlog={name: samples[:, 1 + index] for index, name in enumerate(BACKLOGS)},
            sampled_s=samples[:, 0],
        )

    def session(self, who: str, server: int) -> Process:
        """Return the session of a worker on a server."""
        name = f"{who} pg{server}"
        if name not in self.sessions:
            self.sessions[name] = Process(name, WEIGHTS[0])
        return self.sessions[name]

    # --- requests --------------------------------------------------------------------------------------------------

    def _requests(self, dues: Floats) -> list[Request]:
        draw, shape, count = self.random["kinds"], self.shape, len(dues)
        reads = draw.random(count) < shape.read_share
        hot = draw.random(count) < shape.hot_share
        servers = draw.integers(0, shape.servers, count)
        return [
            Request(
                float(due),
                index % shape.apis,
                0 if hot[index] else int(servers[index]),
                bool(reads[index]),
                bool(hot[index]),
            )
            for index, due in enumerate(dues)
        ]

    def _open_loop(self) -> Step:
        play, env, costs = self.play, self.env, self.costs
        assert play.rate_per_s is not None
        draw = self.random["arrivals"]
        stages = play.stages or (Stage(play.duration_s, play.rate_per_s, play.rate_per_s),)
        dues = np.repeat(arrivals(stages, play.burst, draw), play.burst)
        requests = self._requests(dues)
        at, count, tick_s = 0, len(requests), costs.tick_ms / 1000
        while at < count:
            # The generator wakes at its ticks, and sends all that is due by then.
            wake = (int(requests[at].due_s / tick_s) + 1) * tick_s
            if wake > env.now:
                yield env.timeout(wake - env.now)
            first = at
            while at < count and requests[at].due_s <= env.now:
                at += 1
            yield self.cores.work(self.generator, costs.generator.fixed_ms / 2000)
            for begin in range(first, at, SENT_AT_ONCE):
                some = requests[begin : min(begin + SENT_AT_ONCE, at)]
                yield self.cores.work(self.generator, costs.generator.each_ms * len(some) / 2000)
                self._send(some)
            yield self.cores.work(self.generator, costs.generator.fixed_ms / 2000)

    def _closed_loop(self) -> Step:
        first = self._requests(np.zeros(self.play.connections))
        for begin in range(0, len(first), AT_ONCE):
            some = first[begin : begin + AT_ONCE]
            yield self.cores.work(self.generator, self.costs.generator.each_ms * len(some) / 1000)
            self._send(some)

    def _send(self, requests: list[Request]) -> None:
        """Let requests leave their clients, who wait for answers from now on."""
        if self.play.timeout_s is not None:
            waited = self.env.timeout(self.play.timeout_s)
            waited.callbacks.append(lambda _: self._waited(requests))
        cost = self.costs.gateway
        if cost == NO_GATEWAY:
            self._arrived(requests)
        else:
            passed = self.cores.work(self.gateway, cost.seconds(len(requests)))
            passed.callbacks.append(lambda _: self._arrived(requests))

    def _arrived(self, requests: list[Request]) -> None:
        """Let requests come to their event loops."""
        costs = self.costs
        for api in range(self.shape.apis):
            mine = [request for request in requests if request.api == api]
            for each_ms, group in (
                (costs.api_bet_ms, [request for request in mine if not request.read]),
                (costs.api_read_ms, [request for request in mine if request.read]),
            ):
                for at in range(0, len(group), AT_ONCE):
                    some = group[at : at + AT_ONCE]
                    work_s = each_ms * costs.received_share * len(some) / 1000
                    self.loops[api].call(work_s, partial(self._received, api, some))

    def _waited(self, requests: list[Request]) -> None:
        """Have clients who have no answer yet ask again, or give up."""
        late = [request for request in requests if not request.ended]
        self.timed_out += len(late)
        self._ask_again(late)

    def _ask_again(self, requests: list[Request]) -> None:
        for request in requests:
            request.ended = True
            if request.tries > self.play.retries:
                self.abandoned += 1
                continue
            again = replace(request, tries=request.tries + 1, ended=False)
            rest_s = self.play.retry_after_s * 2 ** (request.tries - 1)
            self.env.timeout(rest_s).callbacks.append(partial(self._sent_again, again))

    def _sent_again(self, request: Request, _: simpy.Event) -> None:
        self._send([request])

    def _received(self, api: int, requests: list[Request]) -> None:
        if requests[0].read:
            self._read_waits[api] += requests
            if not self._reading[api]:
                self._reading[api] = True
                self.env.process(self._read(api))
            return
        deadline_s = self.env.now + self.setting["command_deadline_ms"] / 1000
        refused: list[Request] = []
        for request in requests:
            request.deadline_s = deadline_s
            if not self.writers[api][request.server].submit(request):
                refused.append(request)
        if refused:
            self.refuse(refused)

    def _read(self, api: int) -> Step:
        """Ask Redis for all that waits, one question at a time; the loop must come round to its answer first."""
        half_s = self.costs.api_question_ms / 2000
        while self._read_waits[api]:
            yield self.loops[api].done(half_s)
            mine, self._read_waits[api] = self._read_waits[api], []
            if self.env.now >= self._cache_rests_until_s[api]:
                if self.gates.is_open("redis"):
                    yield self.cores.work(self.redis, self.costs.redis_read.seconds(len(mine)))
                else:
                    yield self.env.timeout(CACHE_TIMEOUT_S)
                    self._cache_rests_until_s[api] = self.env.now + CACHE_REST_S
            # Else Postgres answers; what that costs its session was not measured, and is left out.
            yield self.loops[api].done(half_s)
            self.answer(api, mine, self.costs.api_read_ms * (1 - self.costs.received_share))
        self._reading[api] = False

    def answer(self, api: int, requests: list[Request], each_ms: float) -> None:
        """Have an event loop answer requests, some at a time."""
        for at in range(0, len(requests), AT_ONCE):
            group = requests[at : at + AT_ONCE]
            self.loops[api].call(each_ms * len(group) / 1000, partial(self._answered, group))

    def _answered(self, requests: list[Request]) -> None:
        play, now = self.play, self.env.now
        closed = play.rate_per_s is None
        each_s = self.costs.generator.each_ms / (1000 if closed else 2000)
        done = self.cores.work(self.generator, each_s * len(requests))
        if closed:
            done.callbacks.append(lambda _: self._again(requests))
        for number, request in enumerate(requests, 1):
            if request.ended:
                continue
            request.ended = True
            at = now + (0.0 if closed else each_s * number)
            if request.due_s >= play.warm_s:
                name = "reads" if request.read else "bets"
                self.latencies[name].append(at - request.due_s)
                self.dues[name].append(request.due_s)
            if play.warm_s <= at < play.duration_s:
                self.answered += 1

    def _again(self, requests: list[Request]) -> None:
        """Send the next request of each connection whose answer has come."""
        fresh = self._requests(np.full(len(requests), self.env.now))
        for new, old in zip(fresh, requests, strict=True):
            new.api = old.api
        self._send(fresh)

    def refuse(self, requests: list[Request]) -> None:
        """Answer that requests were not admitted."""
        self.refused += len(requests)
        if self.play.rate_per_s is None:
            # A connection that is refused at once is not used at once: nobody asks a server to death.
            self.env.timeout(REFUSED_REST_S).callbacks.append(lambda _: self._again(requests))
        else:
            self._ask_again([request for request in requests if not request.ended])

    # --- behind the answers ----------------------------------------------------------------------------------------

    def commit_s(self) -> float:
        """Draw what a commit waits for besides the processors."""
        draw = self.random["commits"]
        waits_ms = quantile(self.costs.commit_ms, float(draw.random()))
        if self.costs.standby_ms:
            waits_ms += quantile(self.costs.standby_ms, float(draw.random()))
        return waits_ms / 1000

    def _relay(self, server: int) -> Step:
        env, costs = self.env, self.costs
        yield env.timeout(float(self.random["phases"].random()) * self.setting["relay_poll_ms"] / 1000)
        session = self.session("relay", server)
        most = int(self.setting["relay_batch"])
        while True:
            yield from self.gates.passed("relay", f"pg{server}", "kafka")
            count = min(self.outbox[server], most)
            yield self.cores.work(session, costs.relay.session.seconds(count))
            if not count:
                yield env.timeout(self.setting["relay_poll_ms"] / 1000)
                continue
            yield self.cores.work(self.relay, costs.relay.process.seconds(count))
            yield self.cores.work(self.kafka, costs.kafka.seconds(count))
            yield from self.gates.passed("relay", f"pg{server}", "kafka")
            self.outbox[server] -= count
            for name in GROUPS:
                self.in_topic[name][server] += count
                if not self.told[name].triggered:
                    self.told[name].succeed()
            if count < most:
                yield env.timeout(self.setting["relay_gather_ms"] / 1000)

    def _fetching(self, name: str) -> Step:
        """Fetch for a group: the broker answers when there is much, or after a while if there is anything at all."""
        env = self.env
        while True:
            asked_s = env.now
            if not any(self.in_topic[name]):
                self.told[name] = env.event()
                yield self.told[name]
            rest_s = asked_s + FETCH_WAIT_S - env.now
            if sum(self.in_topic[name]) < FETCH_ENOUGH and rest_s > 0:
                yield env.timeout(rest_s)
            yield from self.gates.passed(name, "kafka")
            counts = self.in_topic[name]
            if name == "matcher" and self.shape.servers > 1:
                # A bet goes to the home of its match, which need not be the server of its wallet.
                even = [1 / self.shape.servers] * self.shape.servers
                counts = self.random["phases"].multinomial(sum(counts), even).tolist()
            self.in_topic[name] = [0] * self.shape.servers
            for server, count in enumerate(counts):
                self.in_lane[name][server] += count
                if count and not self.lane_told[name][server].triggered:
                    self.lane_told[name][server].succeed()
            # What was fetched ahead is bounded: a group that is behind is not asked for more.
            while sum(self.in_lane[name]) > FETCHED_AHEAD:
                yield env.timeout(FETCH_WAIT_S)

    def _lane(self, name: str, server: int) -> Step:
        """Work through what has come for one server: a group has a lane for each."""
        stage = self.costs.matcher if name == "matcher" else self.costs.projector
        process = self.matcher if name == "matcher" else self.projector
        session = self.session(name, server)
        while True:
            if not self.in_lane[name][server]:
                self.lane_told[name][server] = self.env.event()
                yield self.lane_told[name][server]
            yield from self.gates.passed(name, "kafka")
            count = min(self.in_lane[name][server], int(self.setting["consumer_batch"]))
            yield self.cores.work(process, stage.process.seconds(count))
            yield from self.gates.passed(name, f"pg{server}")
            yield self.cores.work(session, stage.session.seconds(count))
            if name == "projector":
                yield from self.gates.passed("redis")
                yield self.cores.work(self.redis, self.costs.projector_redis.seconds(count))
            self.in_lane[name][server] -= count

    def waiting(self, name: str) -> int:
        """Return what a group has not done yet of what is in its topics."""
        return sum(self.in_topic[name]) + sum(self.in_lane[name])

    def _sampler(self) -> Step:
        while True:
            self.samples.append((self.env.now, sum(self.outbox), *(self.waiting(name) for name in GROUPS)))
            yield self.env.timeout(SAMPLE_EVERY_S)

    def _idle(self) -> Step:
        """Use what the service uses when nothing is asked of it: a little, often."""
        piece_s = 0.0005
        if self.costs.idle_cores <= 0:
            return
        draw = self.random["phases"]
        while True:
            yield self.env.timeout(float(draw.exponential(piece_s / self.costs.idle_cores)))
            self.cores.work(self.background, piece_s)

    def _stalls(self) -> Step:
        draw = self.random["stalls"]
        while True:
            yield self.env.timeout(float(draw.exponential(1 / self.costs.stalls_per_s)))
            lasts_s = quantile(self.costs.stall_ms, float(draw.random())) / 1000
            yield simpy.AllOf(self.env, [self.cores.work(core, lasts_s) for core in self.machine])

    def _fault(self, fault: Fault) -> Step:
        yield self.env.timeout(fault.at_s)
        self.gates.close(fault.target)
        if fault.target.startswith("pg") and fault.kind == "kill":
            for row in self.writers:
                self.refuse(row[int(fault.target[2:])].fail())
        yield self.env.timeout(fault.lasts_s)
        self.gates.open(fault.target)


def replicated(play: Play, replications: int) -> list[Run]:
    """Play the same several times, each with random streams of its own."""
    return [System(msgspec.structs.replace(play, replication=number)).run() for number in range(replications)]


def arrivals(stages: Sequence[Stage], burst: int, draw: np.random.Generator) -> Floats:
    """Return the times of a Poisson process whose rate moves as the stages say, divided by `burst`.

    Given their number, arrivals of a stage are independent with a density that goes as its rate does; they are drawn by
    the inverse of its distribution (Lewis and Shedler, Naval Research Logistics Quarterly 26 (1979)).
    """
    times: list[Floats] = []
    began_s = 0.0
    for stage in stages:
        low, high = stage.from_per_s, stage.to_per_s
        count = int(draw.poisson((low + high) / 2 * stage.duration_s / burst))
        share = draw.random(count)
        if low != high:
            # The share of arrivals before x (0 to 1) is (low·x + (high − low)·x²/2) / ((low + high)/2).
            share = (np.sqrt(low**2 + (high**2 - low**2) * share) - low) / (high - low)
        times.append(np.sort(began_s + share * stage.duration_s))
        began_s += stage.duration_s
    return np.concatenate(times) if times else np.empty(0)
