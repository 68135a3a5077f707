"""What `sim/scaling.toml` may say: load shapes, the consumer group, the API's pods, policies, and what is best.

Every value there has its source in a comment: the seed, a measurement of this project, public documentation, or chosen.
"""

from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from sim.autoscaler import Behaviour, KafkaTrigger, KedaObject, StepRule
from sim.draws import Floats, lognormal, slow_factor

SCALING_TOML: Final = Path(__file__).with_name("scaling.toml")
STEP_S: Final = 1.0
"""Length of a step of the closed loops: a fifteenth of the shortest period of a controller."""
MAX_STEPS: Final = 200_000

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0, le=1e9)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Points = Annotated[tuple[tuple[Seconds, Annotated[float, Meta(ge=0, le=1000)]], ...], Meta(min_length=1)]
"""(second, factor) points, straight lines between them."""


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lognormal time, told by its median and the value that one in twenty exceeds."""

    median_s: Annotated[float, Meta(gt=0, le=86_400)]
    p95_s: Annotated[float, Meta(gt=0, le=86_400)]

    def __post_init__(self) -> None:
        """Raise ValueError if the 95 % value is below the median."""
        if self.p95_s < self.median_s:
            raise ValueError("p95_s must not be below median_s")

    def draw(self, random: np.random.Generator, number: int) -> Floats:
        """Return so many draws, in seconds."""
        return lognormal(random, number, self.median_s, self.p95_s)


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A load over time, as factors of the base rates, and what of it is in the calendar."""

    about: str
    duration_s: Annotated[float, Meta(ge=60, le=86_400)]
    events: Points
    """Factor of the events that consumers read."""
    requests: Points
    """Factor of the requests at the API."""
    disturbed_s: Seconds | None = None
    """When the last disturbance begins: recovery counts from here. Without one there is none to measure."""
    announced: tuple[tuple[Seconds, Seconds], ...] = ()
    """(from, to) of loads that are known beforehand, as a final whistle is."""

    def factors(self, points: Points) -> Floats:
        """Return the factor of each step."""
        at_s, factor = np.array(points, dtype=float).T
        return np.asarray(np.interp(np.arange(0.0, self.duration_s, STEP_S), at_s, factor))

    def is_announced(self, now_s: float, lead_s: float) -> bool:
        """Return whether an announced load is on, or begins within `lead_s`."""
        return any(begin - lead_s <= now_s < end for begin, end in self.announced)


class Pods(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How pods start and how their metrics reach a controller."""

    start: Spread
    """From the decision to the first work, where a node has room."""
    node: Spread
    """Further wait for a pod that needs a new node."""
    node_share: Share
    """Share of the started pods that need one."""
    noise: Share
    """Standard deviation of the load's slow random factor."""
    noise_s: Annotated[float, Meta(gt=0, le=3600)]
    """Time in which that factor forgets itself."""
    scrape_s: Annotated[float, Meta(ge=1, le=300)]
    """Period of the metric."""
    delay_s: Seconds
    """Age of a sample when the controller can read it."""
    sync_s: Annotated[float, Meta(ge=1, le=300)] = 15.0
    """Period of the controller."""


class Announced(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A floor of replicas while an announced load is on: KEDA's trigger `cron`."""

    replicas: Annotated[int, Meta(ge=0, le=100_000)]
    lead_s: Seconds
    """How long before the load the floor begins."""


class StepPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="step"):
    """The seed's steps by lag."""

    rule: StepRule = StepRule()


class KedaPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="keda"):
    """KEDA: a trigger on lag, and if given one on the rate at which events are produced, and one by the calendar."""

    scaled: KedaObject = KedaObject()
    kafka: KafkaTrigger = KafkaTrigger()
    rate_per_replica_per_s: Positive | None = None
    """Threshold of a trigger `prometheus` on the rate of production: it sees the cause, and lag only the effect."""
    announced: Announced | None = None


class HpaPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="hpa"):
    """HPA on CPU, and if given on memory, as shares of what a pod requests; a floor by the calendar if given."""

    behaviour: Behaviour = Behaviour()
    cpu: Annotated[float, Meta(gt=0, le=1)] = 0.7
    memory: Annotated[float, Meta(gt=0, le=1)] | None = None
    announced: Announced | None = None


Policy = StepPolicy | KedaPolicy | HpaPolicy


class Consumers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A consumer group on one topic."""

    base_per_s: Positive
    """Events per second at factor 1."""
    per_consumer_per_s: Positive
    """Events per second that a busy consumer handles, on average over the pods."""
    pod_spread: Share
    """Standard deviation of that rate from replication to replication: nobody knows it exactly."""
    partitions: Annotated[int, Meta(ge=1, le=10_000)]
    skew: Share
    """Standard deviation of a partition's share of the load around an equal one."""
    commit_s: Seconds
    """Time from an event's write to the commit behind it when nothing waits: the lag at rest."""
    initial: Annotated[int, Meta(ge=0, le=10_000)]
    cooperative: bool
    """Whether only partitions that move pause at a rebalance, or all."""
    rebalance: Spread
    """Pause of a rebalance."""
    target_lag: Positive
    alert_lag: Positive
    policies: dict[str, Policy]


class Api(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The pods behind the load balancer."""

    base_per_s: Positive
    per_pod_per_s: Positive
    """Requests per second with which a pod uses all of the CPU it requests."""
    pod_spread: Share
    memory_idle: Share
    """Share of the requested memory that a pod without load holds."""
    memory_busy: Share
    """What a full load adds to it."""
    deadline_s: Annotated[float, Meta(gt=0, le=60)]
    """A request that would wait longer is refused."""
    target_wait_s: Annotated[float, Meta(gt=0, le=60)]
    initial: Annotated[int, Meta(ge=1, le=10_000)]
    policies: dict[str, HpaPolicy]


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a policy costs, in pod-hours: choices of the operator, not facts."""

    target_minute: Annotated[float, Meta(ge=0)]
    """Pod-hours that one would pay to avoid a minute beyond the target."""
    alert_minute: Annotated[float, Meta(ge=0)]
    reversal: Annotated[float, Meta(ge=0)]
    """… to avoid one change of direction: each is a rebalance or a cold pod for nothing."""
    refused_share: Annotated[float, Meta(ge=0)]
    """… to avoid that all requests of an hour are refused."""


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values that a search tries for the policy `best`, every combination of them."""

    lag_threshold: tuple[Annotated[int, Meta(gt=0)], ...]
    rate_per_replica_per_s: tuple[Positive, ...]
    down_stabilisation_s: tuple[Annotated[float, Meta(ge=0, le=3600)], ...]
    announced_replicas: tuple[Annotated[int, Meta(ge=0)], ...]
    announced_lead_s: Seconds
    cpu: tuple[Annotated[float, Meta(gt=0, le=1)], ...]
    screen: Annotated[int, Meta(ge=2, le=1000)]
    """Replications of the first round; the best go on with all of them."""
    finalists: Annotated[int, Meta(ge=1, le=100)]


class World(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    seed: Annotated[int, Meta(ge=0)]
    replications: Annotated[int, Meta(ge=2, le=1000)]
    pods: Pods
    consumers: Consumers
    api: Api
    shapes: dict[str, Shape]
    score: Score
    search: Grid


def noisy(pods: Pods, random: np.random.Generator, factors: Floats) -> Floats:
    """Return the factors with the load's slow random factor on them, which has the mean 1."""
    return np.asarray(factors * slow_factor(random, len(factors), pods.noise, pods.noise_s, STEP_S))


def start_times(pods: Pods, random: np.random.Generator, number: int) -> list[float]:
    """Return how long each of so many pods takes to start, in the order in which they are asked for."""
    slow = random.random(number) < pods.node_share
    drawn: list[float] = (pods.start.draw(random, number) + slow * pods.node.draw(random, number)).tolist()
    return drawn
