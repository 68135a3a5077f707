"""Closed loops of load, pods and autoscaler: a consumer group with its lag, and the API's pods with their queue.

Fluid in steps of one second, not event by event: at 100,000 events a second an hour is 360 million events, of which
SimPy carries some 20,000 a second, while queues of that size move like a fluid (their noise of ± √n is a thousandth).
Whatever is slow or rare stays discrete: pods start and stop one by one, members join, partitions pause, controllers
look at their own periods, at samples of the age they really have.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np

from sim.autoscaler import (
    HpaState,
    KedaState,
    Pod,
    average_value_desired,
    combined,
    decide,
    kafka_active,
    kafka_metric,
    keda_step,
    pods_desired,
    step_desired,
)
from sim.draws import Floats
from sim.scaling_world import (
    MAX_STEPS,
    STEP_S,
    Announced,
    HpaPolicy,
    KedaPolicy,
    Policy,
    Shape,
    StepPolicy,
    World,
    noisy,
    start_times,
)
from sim.streams import stream

STARTS_DRAWN: Final = 2048
"""Start times drawn for a run; a policy that starts more pods meets the first ones again."""
NOTHING: Final = 1e-9
"""Events below which a queue counts as empty: rounding."""
SLOWEST: Final = 0.1
"""Share of its mean rate that a pod has at least, whatever is drawn."""
RECOVERED_FOR_S: Final = 120.0
"""A queue has recovered once it stays below the target for so long: eight looks of a controller."""
SETTLED_SHARE: Final = 0.5
"""The last part of a run, in which the amplitude is taken."""


@dataclass(frozen=True, slots=True)
class View:
    """What a controller sees at its moment; samples are as old as the metric's way is long."""

    now_s: float
    current: int
    """Replicas asked for, ready or not."""
    ready: int
    cpu: float
    """Mean share of the requested CPU that the ready pods use."""
    memory: float
    lag: float
    """As Kafka says it now."""
    scraped_lag: float
    """As the metrics store has it."""
    lagging: int
    """Partitions with lag."""
    partitions: int
    produced_per_s: float
    shape: Shape


Controller = Callable[[View], int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of one policy measured."""

    beyond_target_s: float
    """Consumers: seconds with more lag than the target. API: seconds in which a request waits longer than that."""
    beyond_alert_s: float
    """Consumers: seconds with more lag than the alert. API: seconds in which requests were refused."""
    peak: float
    """Largest lag in events, or longest wait in seconds."""
    recovery_s: float | None
    """From the disturbance until the queue stays below the target for RECOVERED_FOR_S; None without a disturbance."""
    recovered: bool
    """Whether it did: otherwise `recovery_s` is the rest of the run."""
    scale_events: int
    reversals_per_h: float
    """Changes of direction per hour."""
    amplitude: int
    """Highest minus lowest count of replicas in the last half."""
    pod_hours: float
    refused_share: float


@dataclass(frozen=True, slots=True)
class Trace:
    """One run step by step; all arrays have one value a step of STEP_S."""

    offered_per_s: Floats
    queue: Floats
    """Lag in events, or wait in seconds."""
    wanted: Floats
    ready: Floats
    outcome: Outcome


def controller(policy: Policy) -> Controller:
    """Return a controller of this policy that remembers what it has seen."""
    if isinstance(policy, StepPolicy):
        return lambda view: step_desired(policy.rule, view.current, view.scraped_lag)
    return _keda(policy) if isinstance(policy, KedaPolicy) else _hpa(policy)


def _keda(policy: KedaPolicy) -> Controller:
    state = KedaState()

    def look(view: View) -> int:
        told = kafka_metric(policy.kafka, int(view.lag), view.partitions, view.lagging)
        proposals: list[int | None] = [average_value_desired(view.current, told, policy.kafka.lag_threshold)]
        if policy.rate_per_replica_per_s is not None:
            proposals.append(average_value_desired(view.current, view.produced_per_s, policy.rate_per_replica_per_s))
        floor = _announced(policy.announced, view)
        proposals.append(floor)
        active = kafka_active(policy.kafka, int(view.lag)) or floor > 0
        return keda_step(policy.scaled, state, view.now_s, view.current, proposals, active=active)

    return look


def _hpa(policy: HpaPolicy) -> Controller:
    state = HpaState()

    def look(view: View) -> int:
        waiting = [Pod(None, ready=False)] * (view.current - view.ready)
        proposals = [pods_desired(view.current, [Pod(view.cpu)] * view.ready + waiting, policy.cpu)]
        if policy.memory is not None:
            proposals.append(pods_desired(view.current, [Pod(view.memory)] * view.ready + waiting, policy.memory))
        proposals.append(_announced(policy.announced, view))
        return decide(policy.behaviour, state, view.now_s, view.current, combined(view.current, proposals))

    return look


def _announced(announced: Announced | None, view: View) -> int:
    on = announced is not None and view.shape.is_announced(view.now_s, announced.lead_s)
    return announced.replicas if announced is not None and on else 0


class Fleet:
    """Pods that were asked for: ready ones, and the moments at which the others will be."""

    def __init__(self, initial: int, starts_s: list[float]) -> None:
        self.ready = initial
        self.starting: list[float] = []
        self._starts_s = starts_s
        self._started = 0

    @property
    def wanted(self) -> int:
        """Pods asked for, ready or not."""
        return self.ready + len(self.starting)

    def arrived(self, now_s: float) -> int:
        """Let the pods whose time has come be ready, and return how many."""
        number = 0
        while self.starting and self.starting[0] <= now_s:
            heapq.heappop(self.starting)
            number += 1
        self.ready += number
        return number

    def ask(self, now_s: float, wanted: int) -> int:
        """Start or stop pods, those that are not ready first, and return how many ready ones went."""
        for _ in range(wanted - self.wanted):
            heapq.heappush(self.starting, now_s + self._starts_s[self._started % len(self._starts_s)])
            self._started += 1
        surplus = max(self.wanted - wanted, 0)
        waiting = min(surplus, len(self.starting))
        if waiting:
            self.starting = sorted(self.starting)[: len(self.starting) - waiting]
        self.ready -= surplus - waiting
        return surplus - waiting


class Group:
    """A consumer group in fluid: what waits in each partition, which member has it, and what pauses."""

    def __init__(self, weight: Floats, members: int, rate_per_s: float) -> None:
        self.members = members
        self.waiting = 0.0
        """Events that wait, in all partitions together."""
        self._weight = weight
        self._lag = np.zeros(len(weight))
        self._can_do = rate_per_s * STEP_S
        self._paused = np.zeros(len(weight), dtype=bool)
        self._paused_until_s = 0.0
        self._assign()

    def rebalance(self, now_s: float, members: int, pause_s: float, *, cooperative: bool) -> None:
        """Let the group have other members; all partitions pause, or only those that have to move."""
        partitions = len(self._weight)
        moved = _moved(self.members, members, partitions) if cooperative else partitions
        self.members = members
        self._paused_until_s = now_s + pause_s
        # Spread over the topic, as the partitions of one member are.
        self._paused[:] = False
        self._paused[np.arange(moved) * partitions // max(moved, 1)] = True
        self._assign()

    def _assign(self) -> None:
        partitions = len(self._weight)
        active = max(min(self.members, partitions), 1)
        self._begins = np.arange(active) * partitions // active
        self._owner = np.searchsorted(self._begins, np.arange(partitions), side="right") - 1
        self._busiest = float(np.add.reduceat(self._weight, self._begins).max())

    def step(self, now_s: float, arriving: float) -> float:
        """Let so many events arrive and the members work for one step; return how many were done.

        A member that cannot do all shares its time over its partitions by what waits in each.
        """
        pausing = now_s < self._paused_until_s
        if self.waiting == 0.0 and not pausing and self.members and self._busiest * arriving <= self._can_do:
            return arriving
        work = self._lag + self._weight * arriving
        if self.members:
            within_reach = np.where(self._paused, 0.0, work) if pausing else work
            per_member = np.add.reduceat(within_reach, self._begins)
            share = np.minimum(1.0, self._can_do / np.maximum(per_member, NOTHING))
            work -= within_reach * share[self._owner]
        before = self.waiting + arriving
        self.waiting = float(work.sum())
        if self.waiting < NOTHING * len(work):
            self.waiting, work = 0.0, np.zeros(len(work))
        self._lag = work
        return before - self.waiting

    def lagging(self) -> int:
        """Return in how many partitions at least one event waits."""
        return int((self._lag >= 1).sum()) if self.waiting else 0


def consumer_run(world: World, policy: Policy, shape: Shape, replication: int) -> Trace:
    """Run the consumer group once under one policy. The same world and replication give the same load and pods.

    Partitions are spread evenly over members. With more members than partitions the others idle, and with a count
    that does not divide the partitions some members have one more than others: the group keeps up only if those do.
    """
    table, pods = world.consumers, world.pods
    load, weights, starts, pauses, speed = (
        stream(world.seed, replication, purpose) for purpose in ("events", "weights", "starts", "pauses", "speed")
    )
    offered = noisy(pods, load, shape.factors(shape.events)) * table.base_per_s
    weight = np.maximum(1 + table.skew * weights.standard_normal(table.partitions), 0.0)
    pause_s = table.rebalance.draw(pauses, STARTS_DRAWN).tolist()
    rate = table.per_consumer_per_s * max(1 + table.pod_spread * float(speed.standard_normal()), SLOWEST)
    fleet = Fleet(table.initial, start_times(pods, starts, STARTS_DRAWN))
    group = Group(weight / weight.sum(), table.initial, rate)
    look = controller(policy)
    # Plain lists: the loop touches one number at a time, which arrays are slow at.
    queue, busy, wanted, ready = ([0.0] * _steps(shape) for _ in range(4))
    rebalances = 0
    for step, arriving in enumerate((offered * STEP_S).tolist()):
        now_s = step * STEP_S
        fleet.arrived(now_s)
        if _due(now_s, pods.sync_s):
            at, scraped = _sampled(now_s, pods.delay_s, STEP_S), _sampled(now_s, pods.delay_s, pods.scrape_s)
            window = slice(max(scraped - int(pods.scrape_s), 0), scraped + 1)
            view = View(
                now_s=now_s,
                current=fleet.wanted,
                ready=fleet.ready,
                cpu=fmean(busy[window]),
                memory=0.0,
                lag=queue[at],
                scraped_lag=queue[scraped],
                # What is written and not yet committed is lag in every partition, if there is enough of it.
                lagging=table.partitions if offered[at] * table.commit_s >= table.partitions else group.lagging(),
                partitions=table.partitions,
                produced_per_s=float(offered[window].mean()),
                shape=shape,
            )
            fleet.ask(now_s, look(view))
        if fleet.ready != group.members:
            group.rebalance(now_s, fleet.ready, pause_s[rebalances % STARTS_DRAWN], cooperative=table.cooperative)
            rebalances += 1
        done = group.step(now_s, arriving)
        busy[step] = done / (rate * STEP_S * fleet.ready) if fleet.ready else 0.0
        queue[step] = group.waiting + arriving / STEP_S * table.commit_s
        wanted[step], ready[step] = fleet.wanted, fleet.ready
    lags, asked = np.array(queue), np.array(wanted)
    outcome = _outcome(shape, lags, asked, target=table.target_lag, alerts=lags > table.alert_lag)
    return Trace(offered, lags, asked, np.array(ready), outcome)


def api_run(world: World, policy: HpaPolicy, shape: Shape, replication: int) -> Trace:
    """Run the API's pods once under one policy: one queue of bounded wait, all ready pods alike."""
    api, pods = world.api, world.pods
    load, starts, speed = (stream(world.seed, replication, purpose) for purpose in ("requests", "starts", "speed"))
    offered = noisy(pods, load, shape.factors(shape.requests)) * api.base_per_s
    rate = api.per_pod_per_s * max(1 + api.pod_spread * float(speed.standard_normal()), SLOWEST)
    fleet = Fleet(api.initial, start_times(pods, starts, STARTS_DRAWN))
    look = controller(policy)
    steps = _steps(shape)
    # Plain lists: the loop touches one number at a time, which arrays are slow at.
    wait, busy, wanted, ready, refused = ([0.0] * steps for _ in range(5))
    backlog = 0.0
    for step, arriving in enumerate((offered * STEP_S).tolist()):
        now_s = step * STEP_S
        fleet.arrived(now_s)
        if _due(now_s, pods.sync_s):
            scraped = _sampled(now_s, pods.delay_s, pods.scrape_s)
            cpu = fmean(busy[max(scraped - int(pods.scrape_s), 0) : scraped + 1])
            view = View(
                now_s=now_s,
                current=fleet.wanted,
                ready=fleet.ready,
                cpu=cpu,
                memory=api.memory_idle + api.memory_busy * cpu,
                lag=0.0,
                scraped_lag=0.0,
                lagging=0,
                partitions=0,
                produced_per_s=0.0,
                shape=shape,
            )
            fleet.ask(now_s, look(view))
        capacity = rate * fleet.ready
        work = backlog + arriving
        done = min(work, capacity * STEP_S)
        backlog = min(work - done, capacity * api.deadline_s)
        refused[step] = work - done - backlog
        wait[step] = backlog / capacity if capacity else api.deadline_s
        busy[step] = done / (capacity * STEP_S) if capacity else 0.0
        wanted[step], ready[step] = fleet.wanted, fleet.ready
    lost = np.array(refused)
    outcome = _outcome(
        shape,
        np.array(wait),
        np.array(wanted),
        target=api.target_wait_s,
        alerts=lost > 0,
        refused_share=float(lost.sum() / (offered.sum() * STEP_S)),
    )
    return Trace(offered, np.array(wait), np.array(wanted), np.array(ready), outcome)


def _steps(shape: Shape) -> int:
    steps = int(shape.duration_s / STEP_S)
    if steps > MAX_STEPS:
        raise ValueError(f"duration_s must be at most {MAX_STEPS * STEP_S:,.0f}, not {shape.duration_s:,.0f}")
    return steps


def _due(now_s: float, every_s: float) -> bool:
    """Return whether a period of the controller ends in this step; it does not look at the very beginning."""
    return now_s > 0 and now_s % every_s < STEP_S


def _sampled(now_s: float, delay_s: float, every_s: float) -> int:
    """Return the step of the newest sample that can be read now."""
    return int(max((now_s - delay_s) // every_s * every_s, 0.0) / STEP_S) if now_s > delay_s else 0


def _moved(before: int, after: int, partitions: int) -> int:
    """Return how many partitions change their member if as few as possible do."""
    before, after = min(before, partitions), min(after, partitions)
    if before == after:
        return 0
    return round(partitions * (1 - min(before, after) / max(before, after)))


def _outcome(
    shape: Shape, queue: Floats, wanted: Floats, *, target: float, alerts: np.ndarray, refused_share: float = 0.0
) -> Outcome:
    changes = np.diff(wanted)
    signs = np.sign(changes[changes != 0])
    hours = len(queue) * STEP_S / 3600
    beyond = queue > target
    recovered_s = _recovered_s(beyond, shape.disturbed_s) if shape.disturbed_s is not None else None
    rest_s = len(queue) * STEP_S - (shape.disturbed_s or 0.0)
    tail = wanted[int(len(wanted) * (1 - SETTLED_SHARE)) :]
    return Outcome(
        beyond_target_s=float(beyond.sum()) * STEP_S,
        beyond_alert_s=float(alerts.sum()) * STEP_S,
        peak=float(queue.max()),
        recovery_s=None if shape.disturbed_s is None else rest_s if recovered_s is None else recovered_s,
        recovered=shape.disturbed_s is None or recovered_s is not None,
        scale_events=int((changes != 0).sum()),
        reversals_per_h=float((np.diff(signs) != 0).sum()) / hours,
        amplitude=int(tail.max() - tail.min()),
        pod_hours=float(wanted.sum()) * STEP_S / 3600,
        refused_share=refused_share,
    )


def _recovered_s(beyond: np.ndarray, disturbed_s: float) -> float | None:
    """Return how long after the disturbance the queue has come back for good, or None."""
    began, hold = int(disturbed_s / STEP_S), int(RECOVERED_FOR_S / STEP_S)
    bad = np.flatnonzero(beyond[began:])
    if not len(bad):
        return 0.0
    edges = np.append(bad, len(beyond) - began)
    quiet = np.flatnonzero(np.diff(edges) > hold)
    return float(edges[quiet[0]] + 1) * STEP_S if len(quiet) else None
