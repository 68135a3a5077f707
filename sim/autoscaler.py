"""The autoscalers' algorithms, without a clock of their own: Kubernetes' HPA, KEDA on Kafka lag, the seed's steps.

Sources, public documentation:
- Kubernetes, "Horizontal Pod Autoscaling", sections "Algorithm details" and "Configurable scaling behavior", and the
  API reference of `autoscaling/v2`: kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale.
- KEDA, "Apache Kafka" scaler and "ScaledObject specification": keda.sh/docs/latest/scalers/apache-kafka,
  keda.sh/docs/latest/reference/scaledobject-spec.

Times are seconds on any clock that does not go back. `decide` and `keda_step` change the state they are given and
nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

MEMORY_MAX: Final = 100_000
"""Recommendations and scale events that one autoscaler remembers at most: a window of a day at one a second."""
CEIL_SLACK: Final = 1e-9
"""Share by which a count may lie above a whole number and still be that number: rounding of floating point."""

Count = Annotated[int, Meta(ge=0, le=100_000)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Period = Annotated[float, Meta(gt=0, le=1800)]
"""`periodSeconds`, which Kubernetes bounds by 1800."""


class ScalingPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At most so many pods, or per cent of the pods at the beginning of the period, within a period."""

    kind: Literal["Pods", "Percent"]
    value: Annotated[int, Meta(gt=0, le=100_000)]
    period_s: Period = 15.0


class ScalingRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast one direction may go: `behavior.scaleUp` or `behavior.scaleDown`."""

    policies: tuple[ScalingPolicy, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"
    """Which policy counts: that of the largest change, that of the smallest, or none: the direction is closed."""
    stabilisation_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0


UP_BY_DEFAULT: Final = ScalingRules((ScalingPolicy("Percent", 100), ScalingPolicy("Pods", 4)))
DOWN_BY_DEFAULT: Final = ScalingRules((ScalingPolicy("Percent", 100),), stabilisation_s=300.0)


class Behaviour(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds and speed of one HPA. The defaults are those of Kubernetes."""

    min_replicas: Count = 1
    max_replicas: Count = 100
    tolerance: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    up: ScalingRules = UP_BY_DEFAULT
    down: ScalingRules = DOWN_BY_DEFAULT

    def __post_init__(self) -> None:
        """Raise ValueError if there is no count between the bounds."""
        if self.max_replicas < max(self.min_replicas, 1):
            raise ValueError("max_replicas must be at least 1 and not below min_replicas")


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod as the HPA sees it."""

    usage: float | None
    """The metric in the unit of the target, e.g. the share of the requested CPU; None if there is no sample."""
    ready: bool = True
    """Whether it counts: see `cpu_counts` for CPU; for other metrics only a pod that is pending does not."""


@dataclass(slots=True)
class HpaState:
    """What an HPA remembers: recommendations as (time, pods), and changes as (time, pods added or removed)."""

    recommendations: list[tuple[float, int]] = field(default_factory=list)
    added: list[tuple[float, int]] = field(default_factory=list)
    removed: list[tuple[float, int]] = field(default_factory=list)


def whole_up(value: float) -> int:
    """Return the smallest whole number that is not below the value, but for rounding of the last digits."""
    return math.ceil(value - abs(value) * CEIL_SLACK)


def cpu_counts(
    now_s: float,
    started_s: float,
    *,
    ready: bool,
    changed_s: float,
    sample_s: float,
    window_s: float = 30.0,
    initialisation_s: float = 300.0,
    initial_delay_s: float = 30.0,
) -> bool:
    """Return whether a pod's CPU sample counts as that of a ready pod.

    While younger than `initialisation_s` (`--horizontal-pod-autoscaler-cpu-initialization-period`) it counts if it is
    ready and the whole window of its sample lies after it became so. Later it counts unless it is unready and has
    been so since before `initial_delay_s` (`--horizontal-pod-autoscaler-initial-readiness-delay`) were over: then it
    has never been ready. `changed_s` is the moment its readiness changed last, `sample_s` that of the sample.
    """
    if now_s < started_s + initialisation_s:
        return ready and sample_s >= changed_s + window_s
    return ready or changed_s > started_s + initial_delay_s


def pods_desired(current: int, pods: Sequence[Pod], target: float, tolerance: float = 0.1) -> int | None:
    """Return the pods that a metric per pod asks for (types Resource and Pods), or None if no ready pod has a sample.

    ceil(current × metric / target) over the ready pods that have samples. Where pods are not ready or have no sample,
    the ratio is taken again with the most careful guess for them: 0 of the target if it says up, for pods without a
    sample 100 % of it if it says down. If the direction turns, or the new ratio is within the tolerance, nothing
    changes. (For CPU and memory the controller guesses the larger of 100 % of the request and the target, which
    differs from the documentation only for targets below 100 %; the documented value is used here.)
    """
    counted = [pod.usage for pod in pods if pod.ready and pod.usage is not None]
    missing = sum(pod.ready and pod.usage is None for pod in pods)
    unready = sum(not pod.ready for pod in pods)
    if not counted:
        return None
    ratio = sum(counted) / len(counted) / target
    again = (unready > 0 and ratio > 1) or missing > 0
    if not again:
        return current if _within(ratio, tolerance) else whole_up(ratio * len(counted))
    total, number = sum(counted), len(counted)
    if ratio < 1:
        total, number = total + missing * target, number + missing
    elif ratio > 1:
        number += missing + unready
    new_ratio = total / number / target
    if _within(new_ratio, tolerance) or (ratio < 1 < new_ratio) or (new_ratio < 1 < ratio):
        return current
    desired = whole_up(new_ratio * number)
    turned = (new_ratio < 1 and desired > current) or (new_ratio > 1 and desired < current)
    return current if turned else desired


def value_desired(current: int, ready: int, value: float, target: float, tolerance: float = 0.1) -> int:
    """Return the pods that one value for all pods asks for (types Object and External with `Value`).

    From zero pods it is ceil(value / target), since there is no pod to multiply.
    """
    ratio = value / target
    if current == 0:
        return whole_up(ratio)
    return current if _within(ratio, tolerance) else whole_up(ratio * ready)


def average_value_desired(current: int, total: float, target: float, tolerance: float = 0.1) -> int:
    """Return the pods that a total asks for which they share (External with `AverageValue`): ceil(total / target).

    Nothing changes while total / (target × current) is within the tolerance of 1.
    """
    if current > 0 and _within(total / (target * current), tolerance):
        return current
    return whole_up(total / target)


def _within(ratio: float, tolerance: float) -> bool:
    # The border itself is within, and 1.1 − 1 is a little more than 0.1 in floating point.
    return abs(1 - ratio) <= tolerance + CEIL_SLACK


def combined(current: int, proposals: Sequence[int | None]) -> int | None:
    """Return what several metrics ask for together: the largest; None if nothing may be done.

    With a metric that could not be read, more pods may still be asked for, but never fewer.
    """
    known = [proposal for proposal in proposals if proposal is not None]
    if not known:
        return None
    largest = max(known)
    return None if len(known) < len(proposals) and largest < current else largest


def decide(behaviour: Behaviour, state: HpaState, now_s: float, current: int, proposal: int | None) -> int:
    """Return the replicas that the HPA sets now, given what its metrics ask for, and remember it.

    In this order: an HPA of zero pods is off unless its minimum is zero; a count outside the bounds is moved to
    them at once; the proposal is stabilised (not above the lowest recommendation of the window up, not below the
    highest of the window down); then each direction is limited by its policies and the bounds.
    """
    if not state.recommendations:
        state.recommendations.append((now_s, current))
    if current == 0 and behaviour.min_replicas != 0:
        return 0
    if not behaviour.min_replicas <= current <= behaviour.max_replicas:
        desired = min(max(current, behaviour.min_replicas), behaviour.max_replicas)
    elif proposal is None:
        return current
    else:
        steady = _stabilised(behaviour, state, now_s, current, proposal)
        desired = _limited(behaviour, state, now_s, current, steady)
    if desired > current:
        state.added.append((now_s, desired - current))
    elif desired < current:
        state.removed.append((now_s, current - desired))
    _forget(behaviour, state, now_s)
    return desired


def _stabilised(behaviour: Behaviour, state: HpaState, now_s: float, current: int, proposal: int) -> int:
    lowest = highest = proposal
    for at_s, pods in state.recommendations:
        if at_s > now_s - behaviour.up.stabilisation_s:
            lowest = min(lowest, pods)
        if at_s > now_s - behaviour.down.stabilisation_s:
            highest = max(highest, pods)
    state.recommendations.append((now_s, proposal))
    return min(max(current, lowest), highest)


def _limited(behaviour: Behaviour, state: HpaState, now_s: float, current: int, desired: int) -> int:
    if desired > current:
        fastest = max(rate_limit(behaviour.up, state, now_s, current, up=True), current)
        return min(desired, fastest, behaviour.max_replicas)
    if desired < current:
        slowest = min(rate_limit(behaviour.down, state, now_s, current, up=False), current)
        return max(desired, slowest, behaviour.min_replicas)
    return min(max(desired, behaviour.min_replicas), behaviour.max_replicas)


def rate_limit(rules: ScalingRules, state: HpaState, now_s: float, current: int, *, up: bool) -> int:
    """Return how many pods the policies of one direction allow now: at most (up) or at least (down).

    Each policy counts from the pods at the beginning of its own period, that is without what was added, and with
    what was removed, since. Per cent are rounded so that they reach further: up when adding, down when removing.
    """
    if rules.select == "Disabled" or not rules.policies:
        return current
    limits = []
    for policy in rules.policies:
        since_s = now_s - policy.period_s
        began = current - _sum_since(state.added, since_s) + _sum_since(state.removed, since_s)
        sign = 1 if up else -1
        if policy.kind == "Pods":
            limits.append(began + sign * policy.value)
        elif up:
            limits.append(whole_up(began * (1 + policy.value / 100)))
        else:
            limits.append(math.floor(began * (1 - policy.value / 100) + CEIL_SLACK * began))
    furthest = (rules.select == "Max") == up
    return max(limits) if furthest else min(limits)


def _sum_since(events: Sequence[tuple[float, int]], since_s: float) -> int:
    return sum(pods for at_s, pods in events if at_s > since_s)


def _forget(behaviour: Behaviour, state: HpaState, now_s: float) -> None:
    window_s = max(behaviour.up.stabilisation_s, behaviour.down.stabilisation_s)
    # The newest is kept, whatever its age: an empty list means that the HPA has just begun.
    state.recommendations = [
        *(item for item in state.recommendations[:-1] if item[0] > now_s - window_s),
        state.recommendations[-1],
    ][-MEMORY_MAX:]
    for rules, name in ((behaviour.up, "added"), (behaviour.down, "removed")):
        both = [policy.period_s for each in (rules, behaviour.up, behaviour.down) for policy in each.policies]
        oldest_s = now_s - max(both, default=0.0)
        setattr(state, name, [event for event in getattr(state, name) if event[0] > oldest_s][-MEMORY_MAX:])


class KafkaTrigger(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """KEDA's trigger `kafka`; the defaults are KEDA's."""

    lag_threshold: Annotated[int, Meta(gt=0)] = 10
    """`lagThreshold`: messages of lag per replica."""
    activation_lag_threshold: Annotated[int, Meta(ge=0)] = 0
    """`activationLagThreshold`: the workload is active while the lag is above it."""
    allow_idle_consumers: bool = False
    limit_to_partitions_with_lag: bool = False


class KedaObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """KEDA's ScaledObject around a trigger; the defaults are KEDA's."""

    polling_interval_s: Annotated[float, Meta(gt=0)] = 30.0
    """How often KEDA itself looks, which decides between none and some; from one pod on the HPA looks."""
    cooldown_s: Seconds = 300.0
    """How long a workload must have been inactive before KEDA takes its last pods."""
    min_replicas: Count = 0
    max_replicas: Count = 100
    up: ScalingRules = UP_BY_DEFAULT
    down: ScalingRules = DOWN_BY_DEFAULT

    @property
    def behaviour(self) -> Behaviour:
        """The HPA that KEDA makes: its minimum is 1 even where KEDA's is zero."""
        return Behaviour(max(self.min_replicas, 1), self.max_replicas, up=self.up, down=self.down)


@dataclass(slots=True)
class KedaState:
    """What a ScaledObject remembers: its HPA, when it polled last, and when it was active last."""

    hpa: HpaState = field(default_factory=HpaState)
    polled_s: float = -math.inf
    active_s: float = -math.inf


def kafka_metric(trigger: KafkaTrigger, total_lag: int, partitions: int, partitions_with_lag: int) -> int:
    """Return the lag that KEDA tells the HPA, a total for `AverageValue`.

    Beyond the partitions (or those with lag) × `lagThreshold` it is cut to that, since more consumers would idle.
    KEDA divides whole numbers, so up to one threshold more passes uncut, and the HPA may ask for one replica more
    than there are partitions: `maxReplicaCount` has to be the true bound.
    """
    if trigger.allow_idle_consumers and not trigger.limit_to_partitions_with_lag:
        return total_lag
    most = partitions_with_lag if trigger.limit_to_partitions_with_lag else partitions
    return min(total_lag, most * trigger.lag_threshold) if total_lag // trigger.lag_threshold > most else total_lag


def kafka_active(trigger: KafkaTrigger, total_lag: int) -> bool:
    """Return whether the trigger is active, which decides between none and some."""
    return total_lag > trigger.activation_lag_threshold


def keda_step(
    scaled: KedaObject, state: KedaState, now_s: float, current: int, proposals: Sequence[int | None], *, active: bool
) -> int:
    """Return the replicas that KEDA and its HPA set now.

    At its polling interval KEDA starts the first replica of an active workload, and takes the last of one that was
    inactive for the cooldown, if the minimum is zero. Between them the HPA decides, by what the triggers propose.
    """
    if now_s >= state.polled_s + scaled.polling_interval_s:
        state.polled_s = now_s
        if active:
            state.active_s = now_s
            if current == 0:
                return max(scaled.min_replicas, 1)
        elif scaled.min_replicas == 0 and current > 0 and now_s >= state.active_s + scaled.cooldown_s:
            return 0
        elif scaled.min_replicas > current:
            return scaled.min_replicas
    if current == 0:
        return 0
    return decide(scaled.behaviour, state.hpa, now_s, current, combined(current, proposals))


class StepRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The seed's policy for consumers: a lag above one border adds, below another removes."""

    add_above_lag: Annotated[int, Meta(ge=0)] = 1_000_000
    add: Annotated[int, Meta(gt=0)] = 5
    remove_below_lag: Annotated[int, Meta(ge=0)] = 100_000
    remove: Annotated[int, Meta(gt=0)] = 1
    min_replicas: Count = 1
    """The seed names none; a group of nobody would never see its lag fall."""
    max_replicas: Count = 50


def step_desired(rule: StepRule, current: int, lag: float) -> int:
    """Return the consumers that the seed's policy sets at this lag, whatever is still starting."""
    wanted = current
    if lag > rule.add_above_lag:
        wanted = current + rule.add
    elif lag < rule.remove_below_lag:
        wanted = current - rule.remove
    return min(max(wanted, rule.min_replicas), rule.max_replicas)
