"""Compares scaling policies under the same loads, says whether they settle, and searches for a better one.

Every policy meets the same loads, start times and pauses, replication by replication (common random numbers), so the
difference of two policies has an interval much narrower than either has.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

from msgspec.structs import replace

from sim.scaling_loops import Outcome, Trace, api_run, consumer_run
from sim.scaling_world import Announced, HpaPolicy, KedaPolicy, Policy, Score, Shape, StepPolicy, World
from sim.statistics import Estimate, estimate, paired_difference

Role = Literal["consumers", "api"]
ROLES: Final[tuple[Role, ...]] = ("consumers", "api")
CANDIDATES_MAX: Final = 500
SETTLED_AMPLITUDE_SHARE: Final = 0.15
"""A policy settles under a load that no longer changes if its replicas then stay within this share of their mean …"""
SETTLED_REVERSALS_PER_H: Final = 2.0
"""… and it changes direction at most so often."""
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Line:
    """One policy under one shape: means over replications with 95 % intervals."""

    role: Role
    policy: str
    shape: str
    beyond_target_s: Estimate
    beyond_alert_s: Estimate
    peak: Estimate
    recovery_s: Estimate | None
    """None if the shape has no disturbance."""
    unrecovered: int
    """Replications that ended beyond the target."""
    scale_events: Estimate
    reversals_per_h: Estimate
    amplitude: Estimate
    pod_hours: Estimate
    refused_share: Estimate
    score: Estimate
    """In pod-hours, by the prices of the file: lower is better."""
    settles: bool | None
    """Whether it comes to rest; None if the load changes to the end, so that there is nothing to rest at."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Score of a policy minus that of the seed's, paired by replication: below zero is better than the seed."""

    role: Role
    policy: str
    shape: str
    score: Estimate


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found."""

    lines: list[Line]
    differences: list[Difference]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One policy of a search with its score over all shapes."""

    role: Role
    settings: dict[str, float]
    policy: Policy
    score: Estimate
    replications: int


def price(score: Score, outcome: Outcome) -> float:
    """Return what a run cost, in pod-hours."""
    return (
        outcome.pod_hours
        + score.target_minute * outcome.beyond_target_s / 60
        + score.alert_minute * outcome.beyond_alert_s / 60
        + score.reversal * outcome.reversals_per_h
        + score.refused_share * outcome.refused_share
    )


def policies_of(world: World, role: Role) -> Mapping[str, Policy]:
    """Return the policies of a role, by name."""
    return world.consumers.policies if role == "consumers" else world.api.policies


def run_once(world: World, role: Role, policy: Policy, shape: Shape, replication: int) -> Trace:
    """Run one policy of one role once. Raises ValueError for a policy by lag at the API, which has none."""
    if role == "consumers":
        return consumer_run(world, policy, shape, replication)
    if isinstance(policy, HpaPolicy):
        return api_run(world, policy, shape, replication)
    raise ValueError("the API scales by CPU and memory, so its policies are of kind hpa")


def compare(
    world: World,
    *,
    roles: Iterable[Role] = ROLES,
    policies: Iterable[str] | None = None,
    shapes: Iterable[str] | None = None,
    tell: Told = lambda _: None,
) -> Comparison:
    """Run every policy under every shape and return what was measured. Names that a role does not have are passed."""
    lines: list[Line] = []
    differences: list[Difference] = []
    wanted = set(policies) if policies is not None else None
    chosen = [name for name in world.shapes if shapes is None or name in set(shapes)]
    for role, shape_name in itertools.product(roles, chosen):
        shape = world.shapes[shape_name]
        prices: dict[str, list[float]] = {}
        for name, policy in policies_of(world, role).items():
            if wanted is not None and name not in wanted:
                continue
            tell(f"{role}, {shape_name}, {name}")
            runs = [run_once(world, role, policy, shape, number).outcome for number in range(world.replications)]
            prices[name] = [price(world.score, run) for run in runs]
            lines.append(_line(world, role, name, shape_name, runs))
        for name, own in prices.items():
            if name != "seed" and "seed" in prices:
                differences.append(Difference(role, name, shape_name, paired_difference(prices["seed"], own)))
    return Comparison(lines, differences)


def _line(world: World, role: Role, name: str, shape_name: str, runs: Sequence[Outcome]) -> Line:
    shape = world.shapes[shape_name]

    def of(field: str) -> Estimate:
        return _mean([float(getattr(run, field)) for run in runs])

    still = _still(shape, role)
    hours = shape.duration_s / 3600
    mean_pods = fmean(run.pod_hours for run in runs) / hours
    rests = (
        of("amplitude").mean <= max(SETTLED_AMPLITUDE_SHARE * mean_pods, 2)
        and of("reversals_per_h").mean <= SETTLED_REVERSALS_PER_H
    )
    return Line(
        role=role,
        policy=name,
        shape=shape_name,
        beyond_target_s=of("beyond_target_s"),
        beyond_alert_s=of("beyond_alert_s"),
        peak=of("peak"),
        recovery_s=of("recovery_s") if shape.disturbed_s is not None else None,
        unrecovered=sum(not run.recovered for run in runs),
        scale_events=of("scale_events"),
        reversals_per_h=of("reversals_per_h"),
        amplitude=of("amplitude"),
        pod_hours=of("pod_hours"),
        refused_share=of("refused_share"),
        score=_mean([price(world.score, run) for run in runs]),
        settles=rests if still else None,
    )


def _mean(values: Sequence[float]) -> Estimate:
    found = estimate(values)
    assert found is not None, "no value is missing"
    return found


def _still(shape: Shape, role: Role) -> bool:
    """Return whether the load does not change in the last half, but for its noise."""
    points = shape.events if role == "consumers" else shape.requests
    return len(points) == 1 or points[-1][0] <= shape.duration_s / 2


def search(world: World, role: Role, *, tell: Told = lambda _: None) -> list[Candidate]:
    """Try every combination of the grid for the policy `best` of a role, and return the finalists, best first.

    All candidates meet the same few replications; the best of them go on with all. Raises ValueError for a grid that
    is too large.
    """
    trials = list(_trials(world, role))
    if len(trials) > CANDIDATES_MAX:
        raise ValueError(f"search: {len(trials)} combinations are too many; {CANDIDATES_MAX} are tried at most")
    screened = []
    for number, (settings, policy) in enumerate(trials, 1):
        tell(f"{role}: {number} of {len(trials)}")
        screened.append(_scored(world, role, settings, policy, world.search.screen))
    screened.sort(key=lambda candidate: candidate.score.mean)
    finalists = []
    for candidate in screened[: world.search.finalists]:
        tell(f"{role}: finalists")
        finalists.append(_scored(world, role, candidate.settings, candidate.policy, world.replications))
    return sorted(finalists, key=lambda candidate: candidate.score.mean)


def _scored(world: World, role: Role, settings: dict[str, float], policy: Policy, replications: int) -> Candidate:
    prices = [
        sum(price(world.score, run_once(world, role, policy, shape, number).outcome) for shape in world.shapes.values())
        for number in range(replications)
    ]
    return Candidate(role, settings, policy, _mean(prices), replications)


def _trials(world: World, role: Role) -> Iterable[tuple[dict[str, float], Policy]]:
    grid, best = world.search, policies_of(world, role)["best"]
    first: tuple[float, ...] = grid.rate_per_replica_per_s if role == "consumers" else grid.cpu
    thresholds = grid.lag_threshold if role == "consumers" else (0,)
    for value, threshold, down_s, floor in itertools.product(
        first, thresholds, grid.down_stabilisation_s, grid.announced_replicas
    ):
        floored = Announced(floor, grid.announced_lead_s) if floor else None
        if isinstance(best, StepPolicy):
            raise ValueError("policies.best: steps by lag have no grid; write a policy of kind keda or hpa")  # noqa: TRY004
        if isinstance(best, KedaPolicy):
            down = replace(best.scaled.down, stabilisation_s=down_s)
            settings = {"rate_per_replica_per_s": value, "lag_threshold": threshold}
            policy: Policy = replace(
                best,
                scaled=replace(best.scaled, down=down),
                kafka=replace(best.kafka, lag_threshold=threshold),
                rate_per_replica_per_s=value,
                announced=floored,
            )
        else:
            down = replace(best.behaviour.down, stabilisation_s=down_s)
            settings = {"cpu": value}
            policy = replace(best, cpu=value, behaviour=replace(best.behaviour, down=down), announced=floored)
        yield {**settings, "down_stabilisation_s": down_s, "announced_replicas": float(floor)}, policy


def traces(world: World, role: Role, shape: str, replication: int = 0) -> dict[str, Trace]:
    """Return one replication of every policy of a role under a shape, step by step, by name of the policy."""
    return {
        name: run_once(world, role, policy, world.shapes[shape], replication)
        for name, policy in policies_of(world, role).items()
    }
