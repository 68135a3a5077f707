"""The path of a command on fast paths: gateway, API event loops, batching writers, Postgres servers.

A command passes the gateway (several servers, one queue), then the event loop of one API process, then waits there for
the writer of its Postgres server, is posted in a batch and answered. Each API has a writer per Postgres server; the
writers of a server share the transactions that it serves at once. Arrivals are Poisson; API and server are chosen at
random. What is not modelled: deadlines, hot wallets, and cores that processes share (sim/system.py has them).
"""

from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim import paths
from sim.queueing import batch_saturation_per_s
from sim.statistics import Estimate, estimate, mser5_cut, replication_percentile
from sim.streams import Exponential, law_of, stream

MODEL: Final = "command path 1"
"""Part of every digest: to be changed with anything that changes a result."""
LIMITS: Final[dict[str, tuple[float, float]]] = {
    "rate_per_s": (1e-3, 1e7),
    "gateway_ms": (0, 60_000),
    "gateway_scv": (0, 100),
    "gateway_servers": (1, 1_024),
    "apis": (1, 256),
    "api_ms": (0, 60_000),
    "api_scv": (0, 100),
    "servers": (1, 100),
    "slots": (1, 1_024),
    "fixed_ms": (1e-3, 60_000),
    "fixed_scv": (0, 100),
    "per_command_ms": (0, 60_000),
    "batch_max": (1, 1_000_000),
    "queue_max": (1, 10_000_000),
    "linger_ms": (0, 60_000),
}
"""Lowest and highest value of each parameter."""
MIN_ANSWERED: Final = 100
"""Of fewer answers in a replication no latency is stated. At least one command is always answered."""
PERCENTILES: Final = (50, 95, 99)


class Configuration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One system to be simulated. An scv (variance / mean²) of 0 is a constant time, of 1 an exponential one.

    Raises ValueError, which begins with the name of the parameter, for a value outside LIMITS.
    """

    rate_per_s: float = 540.0
    """Commands that arrive per second at the whole system."""
    gateway_ms: float = 0.0
    """Time of a command at the gateway; 0 leaves the gateway out."""
    gateway_scv: float = 1.0
    gateway_servers: int = 1
    apis: int = 2
    api_ms: float = 0.5
    """Time that a command keeps its API's event loop busy."""
    api_scv: float = 1.0
    servers: int = 4
    """Postgres servers."""
    slots: int = 2
    """Transactions that a Postgres server serves at once."""
    fixed_ms: float = 2.0
    """Time of a transaction, whatever its size."""
    fixed_scv: float = 0.25
    per_command_ms: float = 0.13
    """Time that each command adds to its transaction."""
    batch_max: int = 256
    queue_max: int = 4096
    """Commands that wait for one writer at most; more are refused."""
    linger_ms: float = 0.0
    """How long a free writer waits for a fuller batch."""

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        for name in LIMITS:
            check_limits(name, getattr(self, name))

    @property
    def saturations_per_s(self) -> dict[str, float]:
        """Commands per second that each station can serve at most, by closed form."""
        full_s = batch_saturation_per_s(self.fixed_ms / 1000, self.per_command_ms / 1000, self.batch_max)
        found = {"postgres": self.servers * min(self.slots, self.apis) * full_s}
        if self.api_ms:
            found["api"] = self.apis * 1000 / self.api_ms
        if self.gateway_ms:
            found["gateway"] = self.gateway_servers * 1000 / self.gateway_ms
        return found

    @property
    def bottleneck(self) -> str:
        """Name of the station that saturates first: gateway, api or postgres."""
        return min(self.saturations_per_s, key=self.saturations_per_s.__getitem__)


def check_limits(name: str, value: float) -> None:
    """Raise ValueError, which begins with the name, for a value outside LIMITS. Comparisons make nan fail."""
    low, high = LIMITS[name]
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low:,g} to {high:,g}, not {value:,g}")


class Replication(msgspec.Struct, frozen=True):
    """What one run measured after its warm-up."""

    settled: bool
    """Whether MSER-5 found a warm-up to cut. If not, the first half was cut, and the numbers depend on the length."""
    throughput_per_s: float
    """Commands answered per second."""
    refused_share: float
    mean_batch: float
    postgres_busy: float
    """Share of the servers' slots that are busy, over the whole run."""
    mean_ms: float | None
    """Latency, arrival to answer, of answered commands; None if none was."""
    percentiles_ms: dict[int, float | None]


class Outcome(msgspec.Struct, frozen=True):
    """What all replications of one configuration say; an estimate is None if a replication could not state it."""

    saturation_per_s: float
    """Rate at which the bottleneck saturates, by closed form."""
    bottleneck: str
    settled: bool
    throughput_per_s: Estimate | None
    refused_share: Estimate | None
    mean_batch: Estimate | None
    postgres_busy: Estimate | None
    mean_ms: Estimate | None
    p50_ms: Estimate | None
    p95_ms: Estimate | None
    p99_ms: Estimate | None


def evaluate(configuration: Configuration, customers: int, replications: int, seed: int) -> Outcome:
    """Run `replications` of `customers` commands each. The same seed gives all configurations the same streams."""
    runs = [replicate(configuration, customers, seed, number) for number in range(replications)]
    p50, p95, p99 = (estimate([run.percentiles_ms[percent] for run in runs]) for percent in PERCENTILES)
    bottleneck = configuration.bottleneck
    return Outcome(
        saturation_per_s=configuration.saturations_per_s[bottleneck],
        bottleneck=bottleneck,
        settled=all(run.settled for run in runs),
        throughput_per_s=estimate([run.throughput_per_s for run in runs]),
        refused_share=estimate([run.refused_share for run in runs], upper=1.0),
        mean_batch=estimate([run.mean_batch for run in runs]),
        postgres_busy=estimate([run.postgres_busy for run in runs], upper=1.0),
        mean_ms=estimate([run.mean_ms for run in runs]),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
    )


def replicate(configuration: Configuration, customers: int, seed: int, replication: int) -> Replication:
    """Run one replication, from an empty system to an empty system."""
    drawn = Drawn.of(configuration, customers, seed, replication)
    left, batches = travel(configuration, drawn)
    return _measured(configuration, drawn.arrived_s, left, batches)


class Drawn(msgspec.Struct, frozen=True):
    """Everything random about one replication; arrays by customer, in order of arrival."""

    arrived_s: NDArray[Any]
    gateway_s: NDArray[Any]
    api_s: NDArray[Any]
    api: NDArray[Any]
    """Number of the API that each command goes to."""
    server: NDArray[Any]
    """Number of the Postgres server that each command is posted on."""
    fixed_s: NDArray[Any]
    """Fixed times of transactions. Batch k of a writer takes number k of those at its own customers' places."""

    @classmethod
    def of(cls, configuration: Configuration, customers: int, seed: int, replication: int) -> "Drawn":
        """Draw a replication, one stream per purpose: another value of a parameter changes its own numbers only."""

        def times(purpose: str, mean_ms: float, scv: float) -> NDArray[Any]:
            if not mean_ms:
                return np.zeros(customers)
            return law_of(mean_ms / 1000, scv).draw(stream(seed, replication, purpose), customers)

        def chosen(purpose: str, among: int) -> NDArray[Any]:
            number: NDArray[Any] = (stream(seed, replication, purpose).random(customers) * among).astype(int)
            return number

        gaps = Exponential(1 / configuration.rate_per_s).draw(stream(seed, replication, "arrivals"), customers)
        return cls(
            arrived_s=np.cumsum(gaps),
            gateway_s=times("gateway", configuration.gateway_ms, configuration.gateway_scv),
            api_s=times("api", configuration.api_ms, configuration.api_scv),
            api=chosen("which api", configuration.apis),
            server=chosen("which server", configuration.servers),
            fixed_s=times("transaction", configuration.fixed_ms, configuration.fixed_scv),
        )


def travel(configuration: Configuration, drawn: Drawn) -> tuple[NDArray[Any], list[paths.Batch]]:
    """Return when each command is answered (nan: refused), and all batches of all writers."""
    at_api = drawn.arrived_s
    if configuration.gateway_ms:
        at_api = paths.kiefer_wolfowitz(at_api, drawn.gateway_s, configuration.gateway_servers)
    # Several gateway servers let commands overtake each other: each API takes them as they come.
    order = np.argsort(at_api, kind="stable")
    at_writer = np.empty(len(order))
    for number in range(configuration.apis):
        own = order[drawn.api[order] == number]
        at_writer[own] = paths.lindley(at_api[own], drawn.api_s[own])
    left = np.full(len(order), np.nan)
    batches: list[paths.Batch] = []
    rules = rules_of(configuration)
    for server in range(configuration.servers):
        here = order[drawn.server[order] == server]
        queues = [here[drawn.api[here] == number] for number in range(configuration.apis)]
        answered, posted = paths.shared_batches(
            [at_writer[own] for own in queues], [drawn.fixed_s[own] for own in queues], rules, configuration.slots
        )
        for own, ends in zip(queues, answered, strict=True):
            left[own] = ends
        batches += posted
    return left, batches


def rules_of(configuration: Configuration) -> paths.Batching:
    """Return how the writers gather their batches."""
    return paths.Batching(
        configuration.per_command_ms / 1000,
        configuration.batch_max,
        configuration.queue_max,
        configuration.linger_ms / 1000,
    )


def _measured(
    configuration: Configuration, arrived_s: NDArray[Any], left_s: NDArray[Any], batches: list[paths.Batch]
) -> Replication:
    answered = ~np.isnan(left_s)
    latencies_ms = (left_s - arrived_s)[answered] * 1000
    enough = len(latencies_ms) >= MIN_ANSWERED
    cut = mser5_cut(latencies_ms) if enough else None
    counted = len(latencies_ms) // 2 if cut is None else cut
    begin_s, end_s = float(arrived_s[answered][counted]), float(arrived_s[-1])
    in_window = int(np.count_nonzero((left_s >= begin_s) & (left_s < end_s)))
    busy_s = sum(batch.ended_s - batch.began_s for batch in batches)
    places_s = float(np.nanmax(left_s)) * configuration.servers * configuration.slots
    steady_ms = latencies_ms[counted:]
    return Replication(
        settled=cut is not None,
        throughput_per_s=in_window / (end_s - begin_s) if end_s > begin_s else 0.0,
        refused_share=float(1 - answered[arrived_s >= begin_s].mean()),
        mean_batch=len(latencies_ms) / len(batches),
        postgres_busy=busy_s / places_s,
        mean_ms=float(steady_ms.mean()) if enough else None,
        percentiles_ms={percent: replication_percentile(steady_ms, percent) for percent in PERCENTILES},
    )
