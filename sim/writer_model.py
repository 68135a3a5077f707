"""A SimPy model of the command path: Poisson arrivals, batching writers with a bounded queue and a deadline.

What is modelled is `Writer` of reference/writer.py, one per server in each API process: a free writer takes what
waits, at most `batch_max` commands, and posts it in one transaction of fixed_ms + per_command_ms × size; meanwhile
the next batch gathers. A full queue refuses at once; a sweep refuses commands whose deadline passed in the queue.

What is not: writers of one server do not slow each other (they share its processors and its disk in truth), service
times do not vary, keys are never repeated, and nothing fails. The model is therefore an upper bound until it is
calibrated from measured runs.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import simpy

from reference.routing import SHARDS, even_routing, shards_of_server
from sim.queueing import batch_saturation_per_s
from sim.statistics import MIN_REPLICATIONS, Estimate, estimate, replication_percentile

SWEEP_EVERY_S: Final = 0.1
"""How often a writer looks for commands whose deadline passed."""
WARMUP_SHARE: Final = 0.1
"""Commands that arrive in this first part of a run are served but not counted: the queues begin empty."""
MAX_REPLICATIONS: Final = 1_000
MAX_APIS: Final = 64
MAX_BATCH: Final = 1_000_000
MAX_QUEUE: Final = 10_000_000
MAX_COMMANDS: Final = 5_000_000
"""Commands expected in all replications together at most: about two minutes of computing."""
MAX_SWEEPS: Final = 10_000_000
"""Looks of all writers for passed deadlines, in all replications together, at most."""
MAX_MS: Final = 3_600_000.0
MAX_DURATION_S: Final = 86_400.0
DRAW_AT_ONCE: Final = 4096


@dataclass(frozen=True, slots=True)
class Parameters:
    """One question to the model. Raises ValueError if a value is out of range or the run would be too long."""

    rate_per_s: float
    """Commands that arrive per second at all APIs together; wallets, and so shards, are equally likely."""
    fixed_ms: float
    """Part of a batch's service time that does not depend on its size (round trip, commit, flush)."""
    per_command_ms: float
    """Part of a batch's service time that each command adds."""
    servers: int = 4
    apis: int = 2
    batch_max: int = 256
    queue_max: int = 4096
    deadline_ms: float = 2000.0
    duration_s: float = 60.0
    replications: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated. Comparisons are written so that nan fails them."""
        ranges: list[tuple[str, float, float, float]] = [
            ("rate", self.rate_per_s, 1e-3, MAX_COMMANDS),
            ("fixed-ms", self.fixed_ms, 0, MAX_MS),
            ("per-command-ms", self.per_command_ms, 0, MAX_MS),
            ("servers", self.servers, 1, SHARDS),
            ("apis", self.apis, 1, MAX_APIS),
            ("batch", self.batch_max, 1, MAX_BATCH),
            ("queue", self.queue_max, 1, MAX_QUEUE),
            ("deadline-ms", self.deadline_ms, 1, MAX_MS),
            ("duration", self.duration_s, 0.1, MAX_DURATION_S),
            ("replications", self.replications, MIN_REPLICATIONS, MAX_REPLICATIONS),
            ("seed", self.seed, 0, 2**53),
        ]
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low:,} to {high:,}, not {value:,}")
        if not self.fixed_ms + self.per_command_ms > 0:
            raise ValueError("fixed-ms and per-command-ms must not both be 0")
        commands = self.rate_per_s * self.duration_s * self.replications
        if commands > MAX_COMMANDS:
            raise ValueError(
                f"rate × duration × replications is {commands:,.0f} commands; {MAX_COMMANDS:,} can be simulated at most"
            )
        sweeps = self.writers * self.duration_s / SWEEP_EVERY_S * self.replications
        if sweeps > MAX_SWEEPS:
            raise ValueError(
                f"{self.writers} writers for {self.duration_s:g} s, {self.replications} times, are too long a run: "
                "lower servers, apis, duration or replications"
            )

    @property
    def writers(self) -> int:
        """Number of writers: one per server in each API process."""
        return self.servers * self.apis

    @property
    def writer_saturation_per_s(self) -> float:
        """Commands per second that one writer can post at most."""
        return batch_saturation_per_s(self.fixed_ms / 1000, self.per_command_ms / 1000, self.batch_max)

    @property
    def saturation_per_s(self) -> float:
        """Arrival rate at which the busiest writer saturates; shards do not always divide evenly over servers."""
        routing = even_routing(self.servers)
        busiest = max(len(shards_of_server(routing, server)) for server in range(self.servers)) / SHARDS / self.apis
        return self.writer_saturation_per_s / busiest

    def service_s(self, size: int) -> float:
        """Return how long a batch of `size` commands takes, in seconds."""
        return (self.fixed_ms + self.per_command_ms * size) / 1000


@dataclass(frozen=True, slots=True)
class Replication:
    """What one run measured. Counted are commands that arrived, and batches that began, after the warm-up."""

    arrived: int
    posted: int
    refused_full: int
    refused_late: int
    throughput_per_s: float
    """Commands posted per second between the end of the warm-up and the end of the arrivals."""
    mean_batch: float | None
    """Commands per batch; None without a batch."""
    utilisation: float
    """Busy share of the writers from the first moment to the last answer."""
    mean_ms: float | None
    """Latency of posted commands, arrival to answer; None if none was posted."""
    p50_ms: float | None
    """None, as the other percentiles, if too few commands were posted to state it."""
    p95_ms: float | None
    p99_ms: float | None
    littles_law_gap: float
    """Relative difference of ∫N(t)dt and the sum of all sojourn times over the whole run: rounding, if all is well."""

    @property
    def refused_share(self) -> float:
        """Share of the counted commands that were refused, 0 to 1."""
        return (self.refused_full + self.refused_late) / self.arrived if self.arrived else 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says. An estimate is None if a replication could not state the value."""

    parameters: Parameters
    saturation_per_s: float
    writer_saturation_per_s: float
    saturated: bool
    """Whether more arrives than the busiest writer can post: latencies then show the bounds of queue and deadline."""
    throughput_per_s: Estimate | None
    mean_batch: Estimate | None
    utilisation: Estimate | None
    mean_ms: Estimate | None
    p50_ms: Estimate | None
    p95_ms: Estimate | None
    p99_ms: Estimate | None
    refused_share: Estimate | None
    replications: list[Replication]


def predict(parameters: Parameters) -> Prediction:
    """Run every replication and return the estimates. The same parameters and seed give the same prediction.

    Replication r of two predictions with the same seed draws from the same streams (common random numbers), so
    that their difference is due to the parameters.
    """
    runs = [simulate(parameters, number) for number in range(parameters.replications)]
    return Prediction(
        parameters=parameters,
        saturation_per_s=parameters.saturation_per_s,
        writer_saturation_per_s=parameters.writer_saturation_per_s,
        saturated=parameters.rate_per_s >= parameters.saturation_per_s,
        throughput_per_s=estimate([run.throughput_per_s for run in runs]),
        mean_batch=estimate([run.mean_batch for run in runs]),
        utilisation=estimate([run.utilisation for run in runs], upper=1.0),
        mean_ms=estimate([run.mean_ms for run in runs]),
        p50_ms=estimate([run.p50_ms for run in runs]),
        p95_ms=estimate([run.p95_ms for run in runs]),
        p99_ms=estimate([run.p99_ms for run in runs]),
        refused_share=estimate([run.refused_share for run in runs], upper=1.0),
        replications=runs,
    )


def simulate(parameters: Parameters, replication: int) -> Replication:
    """Run the model once, from empty to empty: arrivals end after `duration_s`, then the queues drain."""
    env = simpy.Environment()
    tally = _Tally(env)
    writers = [_Writer(env, parameters, tally) for _ in range(parameters.writers)]
    env.process(_arrivals(env, parameters, replication, writers, tally))
    env.run(until=tally.drained)
    return _measured(parameters, tally, env.now)


@dataclass(slots=True)
class _Tally:
    """Everything observed in one run; times in seconds."""

    env: simpy.Environment
    arrived: list[float] = field(default_factory=list)
    posted: list[tuple[float, float]] = field(default_factory=list)
    """Arrival and answer of each posted command."""
    refused_full: list[float] = field(default_factory=list)
    refused_late: list[float] = field(default_factory=list)
    """Arrival of each command whose deadline passed."""
    batches: list[tuple[float, int]] = field(default_factory=list)
    busy_s: float = 0.0
    sojourn_s: float = 0.0
    in_system: int = 0
    area_s: float = 0.0
    """∫ in_system dt, from what the system holds; `sojourn_s` comes from each command's own times."""
    closed: bool = False
    drained: simpy.Event = field(init=False)
    _changed_at: float = 0.0

    def __post_init__(self) -> None:
        self.drained = self.env.event()

    def enter(self) -> None:
        """One command was admitted."""
        self._change(1)

    def leave(self, arrived_at: float) -> None:
        """One admitted command was answered or refused."""
        self.sojourn_s += self.env.now - arrived_at
        self._change(-1)
        self.end_if_empty()

    def end_if_empty(self) -> None:
        """End the run once nothing arrives any more and nothing is left."""
        if self.closed and self.in_system == 0:
            self.drained.succeed()

    def _change(self, by: int) -> None:
        self.area_s += self.in_system * (self.env.now - self._changed_at)
        self._changed_at = self.env.now
        self.in_system += by


class _Writer:
    """One writer: its queue, its batching loop and its sweep."""

    def __init__(self, env: simpy.Environment, parameters: Parameters, tally: _Tally) -> None:
        self._env = env
        self._parameters = parameters
        self._tally = tally
        self._queue: deque[float] = deque()
        self._woken = env.event()
        env.process(self._run())
        env.process(self._sweep())

    def offer(self) -> None:
        """Queue a command that arrives now, or refuse it at once because the queue is full."""
        now = self._env.now
        if len(self._queue) >= self._parameters.queue_max:
            self._tally.refused_full.append(now)
            return
        self._queue.append(now)
        self._tally.enter()
        if not self._woken.triggered:
            self._woken.succeed()

    def _run(self) -> Generator[simpy.Event, None, None]:
        while True:
            yield self._woken
            while self._queue:
                size = min(len(self._queue), self._parameters.batch_max)
                batch = [self._queue.popleft() for _ in range(size)]
                service_s = self._parameters.service_s(size)
                self._tally.batches.append((self._env.now, size))
                self._tally.busy_s += service_s
                yield self._env.timeout(service_s)
                for arrived_at in batch:
                    self._tally.posted.append((arrived_at, self._env.now))
                    self._tally.leave(arrived_at)
            self._woken = self._env.event()

    def _sweep(self) -> Generator[simpy.Event, None, None]:
        deadline_s = self._parameters.deadline_ms / 1000
        while True:
            yield self._env.timeout(SWEEP_EVERY_S)
            while self._queue and self._queue[0] + deadline_s < self._env.now:
                arrived_at = self._queue.popleft()
                self._tally.refused_late.append(arrived_at)
                self._tally.leave(arrived_at)


def _arrivals(
    env: simpy.Environment, parameters: Parameters, replication: int, writers: Sequence[_Writer], tally: _Tally
) -> Generator[simpy.Event, None, None]:
    """Offer Poisson arrivals to the writers until `duration_s`. One random stream per purpose."""
    gaps, shards, apis = (
        np.random.default_rng(np.random.SeedSequence(parameters.seed, spawn_key=(replication, purpose)))
        for purpose in range(3)
    )
    routing = even_routing(parameters.servers)
    while True:
        # Draws of unit mean are scaled, so that another rate stretches the same path.
        drawn = zip(
            (gaps.standard_exponential(DRAW_AT_ONCE) / parameters.rate_per_s).tolist(),
            shards.integers(SHARDS, size=DRAW_AT_ONCE).tolist(),
            (apis.random(DRAW_AT_ONCE) * parameters.apis).astype(int).tolist(),
            strict=True,
        )
        for gap_s, shard, api in drawn:
            if env.now + gap_s >= parameters.duration_s:
                tally.closed = True
                tally.end_if_empty()
                return
            yield env.timeout(gap_s)
            tally.arrived.append(env.now)
            writers[routing[shard] * parameters.apis + api].offer()


def _measured(parameters: Parameters, tally: _Tally, ended_s: float) -> Replication:
    begin_s, end_s = WARMUP_SHARE * parameters.duration_s, parameters.duration_s

    def counted(times: Sequence[float]) -> int:
        return sum(time >= begin_s for time in times)

    latencies_ms = np.array([(answered - came) * 1000 for came, answered in tally.posted if came >= begin_s])
    sizes = [size for began, size in tally.batches if begin_s <= began < end_s]
    in_window = sum(begin_s <= answered < end_s for _, answered in tally.posted)

    return Replication(
        arrived=counted(tally.arrived),
        posted=len(latencies_ms),
        refused_full=counted(tally.refused_full),
        refused_late=counted(tally.refused_late),
        throughput_per_s=in_window / (end_s - begin_s),
        mean_batch=float(np.mean(sizes)) if sizes else None,
        utilisation=tally.busy_s / (parameters.writers * ended_s) if ended_s else 0.0,
        mean_ms=float(latencies_ms.mean()) if len(latencies_ms) else None,
        p50_ms=replication_percentile(latencies_ms, 50),
        p95_ms=replication_percentile(latencies_ms, 95),
        p99_ms=replication_percentile(latencies_ms, 99),
        littles_law_gap=abs(tally.area_s - tally.sojourn_s) / tally.sojourn_s if tally.sojourn_s else 0.0,
    )
