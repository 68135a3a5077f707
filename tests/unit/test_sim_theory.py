"""SimPy stations and fast paths agree with the closed forms of queueing theory, family by family.

Every SimPy run also obeys Little's law and the utilisation law in the station's own books. Seeds are fixed, so that a
test that holds holds again; that the same comparison notices services that take a little longer is a test of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import simpy

from sim import networks, paths, queueing
from sim.paths import Batching
from sim.stations import BatchServer, BreakableServer, Delay, Servers, SharedProcessor, Visit, arrive
from sim.statistics import Estimate, estimate
from sim.streams import Deterministic, Erlang, Exponential, Hyperexponential, Law, Lognormal, stream

SEED = 20
CONFIDENCE = 0.999
"""With so many comparisons, one in twenty would fail for nothing at 95 %."""
REPLICATIONS = 10
FAST_CUSTOMERS = 30_000
SLOW_CUSTOMERS = 2_500
"""SimPy has a hundredth of the speed; that it equals the fast path is shown customer by customer elsewhere."""
WARM_UP = 0.1
MEAN_S = 0.01
EXPONENTIAL = Exponential(MEAN_S)


@dataclass
class Drawn:
    """What one replication draws, one stream per purpose; `slower` plants an error in the services."""

    replication: int
    count: int
    slower: float = 1.0

    def times(self, purpose: str, law: Law) -> Any:
        drawn = law.draw(stream(SEED, self.replication, purpose), self.count)
        return drawn * self.slower if purpose.startswith("service") else drawn


Fast = Callable[[Any, Any, Drawn], Any]
"""Departures, given arrivals and services."""
Build = Callable[[simpy.Environment, Any, Drawn], tuple[Any, Callable[[int], Visit]]]
"""A station, and how customer n visits it."""
Measure = Callable[[Any, Any, Any], float]
"""What is compared, given arrivals, services and departures after the warm-up."""


@dataclass
class Family:
    """One queue: its closed form, and how both engines find the same."""

    name: str
    expected: float
    measure: Measure
    rate_per_s: float
    service: Law
    fast: Fast
    build: Build

    def measured(self, drawn: Drawn, engine: str) -> float:
        arrived = np.cumsum(drawn.times("arrivals", Exponential(1 / self.rate_per_s)))
        service = drawn.times("service", self.service)
        left = self.fast(arrived, service, drawn) if engine == "fast" else self.simulated(arrived, service, drawn)
        counted = slice(int(WARM_UP * drawn.count), None)
        return self.measure(arrived[counted], service[counted], left[counted])

    def simulated(self, arrived: Any, service: Any, drawn: Drawn) -> Any:
        env = simpy.Environment()
        station, visit = self.build(env, service, drawn)
        departures = arrive(env, arrived.tolist(), visit)
        env.run()
        left = np.array(departures)
        books = station.occupancy
        if not isinstance(station, BatchServer):
            given = float(service[~np.isnan(left)].sum())
            assert books.busy_s == pytest.approx(given, rel=1e-9), "utilisation law"
        if self.name != "M/M/c+M":
            assert books.inside_s == pytest.approx(float(np.nansum(left - arrived)), rel=1e-9), "Little's law"
        return left

    def over_replications(self, engine: str, slower: float = 1.0) -> Estimate:
        count = FAST_CUSTOMERS if engine == "fast" else SLOW_CUSTOMERS
        values = [self.measured(Drawn(number, count, slower), engine) for number in range(REPLICATIONS)]
        found = estimate(values, confidence=CONFIDENCE)
        assert found is not None
        return found


def latency(arrived: Any, _service: Any, left: Any) -> float:
    return float(np.nanmean(left - arrived))


def lost(_arrived: Any, _service: Any, left: Any) -> float:
    return float(np.isnan(left).mean())


def latency_p90(arrived: Any, _service: Any, left: Any) -> float:
    return float(np.percentile(left - arrived, 90))


def wait_p95(arrived: Any, service: Any, left: Any) -> float:
    return float(np.percentile(left - arrived - service, 95))


def finds_four(arrived: Any, _service: Any, left: Any) -> float:
    """Share of arrivals that find four others: Poisson arrivals see what an outside observer sees."""
    there = np.arange(len(arrived)) - np.searchsorted(np.sort(left), arrived)
    return float((there[len(there) // 10 :] == 4).mean())


def servers(count: int, capacity: float = np.inf) -> Build:
    def build(env: simpy.Environment, service: Any, _drawn: Drawn) -> Any:
        station = Servers(env, count, capacity)
        return station, lambda n: station.visit(service[n])

    return build


def fcfs(count: int) -> Fast:
    return lambda arrived, service, _: paths.kiefer_wolfowitz(arrived, service, count)


def single(arrived: Any, service: Any, _drawn: Drawn) -> Any:
    return paths.lindley(arrived, service)


def finite(count: int, capacity: int) -> Fast:
    return lambda arrived, service, _: paths.finite_capacity(arrived, service, count, capacity)


def sharing(env: simpy.Environment, service: Any, _drawn: Drawn) -> Any:
    station = SharedProcessor(env)
    return station, lambda n: station.visit(service[n])


def delay(env: simpy.Environment, service: Any, _drawn: Drawn) -> Any:
    station = Delay(env)
    return station, lambda n: station.visit(service[n])


PATIENCE = Exponential(0.02)


def with_patience(env: simpy.Environment, service: Any, drawn: Drawn) -> Any:
    station, patience = Servers(env, 3), drawn.times("patience", PATIENCE)
    return station, lambda n: station.visit(service[n], patience[n])


UP, REPAIR = Exponential(0.5), Erlang(0.1, 2)


def outages(drawn: Drawn) -> tuple[Any, Any]:
    edges = np.cumsum(np.column_stack((drawn.times("up", UP), drawn.times("repair", REPAIR))).ravel())
    return edges[::2], edges[1::2]


def breakable(env: simpy.Environment, service: Any, drawn: Drawn) -> Any:
    # Outages long after the last arrival would only cost time.
    fails, repaired = (edges[: drawn.count // 20] for edges in outages(drawn))
    station = BreakableServer(env, fails.tolist(), repaired.tolist())
    return station, lambda n: station.visit(service[n])


PER_CUSTOMER_S = 0.0004


def unbounded(drawn: Drawn) -> Batching:
    return Batching(PER_CUSTOMER_S * drawn.slower, drawn.count, drawn.count)


def batches(env: simpy.Environment, service: Any, drawn: Drawn) -> Any:
    station = BatchServer(env, service.tolist(), unbounded(drawn))
    return station, lambda _: station.visit()


def gated(arrived: Any, service: Any, drawn: Drawn) -> Any:
    return paths.gated_batches(arrived, service, unbounded(drawn))[0]


HYPER, LOGNORMAL, ERLANG = Hyperexponential(MEAN_S, 4.0), Lognormal(MEAN_S, 2.0), Erlang(MEAN_S, 3)
BATCH = Deterministic(0.004)
SMALL_BOX = queueing.mmck(90, MEAN_S, 1, 5)

FAMILIES = [
    Family("M/M/1", queueing.mm1_mean_wait_s(70, MEAN_S) + MEAN_S, latency, 70, EXPONENTIAL, single, servers(1)),
    Family(
        "M/M/1 p90", queueing.mm1_latency_quantile_s(70, MEAN_S, 90), latency_p90, 70, EXPONENTIAL, single, servers(1)
    ),
    Family(
        "M/D/1",
        queueing.md1_mean_wait_s(70, MEAN_S) + MEAN_S,
        latency,
        70,
        Deterministic(MEAN_S),
        single,
        servers(1),
    ),
    *(
        Family(
            f"M/G/1 {law.__class__.__name__}",
            queueing.mg1_mean_wait_s(60, MEAN_S, law.scv) + MEAN_S,
            latency,
            60,
            law,
            single,
            servers(1),
        )
        for law in (HYPER, LOGNORMAL, ERLANG)
    ),
    Family("M/M/c", queueing.mmc_mean_wait_s(300, MEAN_S, 4) + MEAN_S, latency, 300, EXPONENTIAL, fcfs(4), servers(4)),
    Family(
        "M/M/c p95", queueing.mmc_wait_quantile_s(300, MEAN_S, 4, 95), wait_p95, 300, EXPONENTIAL, fcfs(4), servers(4)
    ),
    Family("M/M/c/K lost", queueing.mmck(280, MEAN_S, 2, 5).lost, lost, 280, EXPONENTIAL, finite(2, 5), servers(2, 5)),
    Family(
        "M/M/1/K latency",
        SMALL_BOX.number / SMALL_BOX.throughput_per_s,
        latency,
        90,
        EXPONENTIAL,
        finite(1, 5),
        servers(1, 5),
    ),
    Family("Erlang B", queueing.erlang_b(5.0, 6), lost, 500, LOGNORMAL, finite(6, 6), servers(6, 6)),
    Family(
        "M/G/1-PS",
        queueing.mg1_ps_mean_latency_s(60, MEAN_S),
        latency,
        60,
        HYPER,
        lambda arrived, service, _: paths.processor_sharing(arrived, service),
        sharing,
    ),
    Family(
        "M/G/∞",
        queueing.mginf_number_probability(800, MEAN_S, 4),
        finds_four,
        800,
        ERLANG,
        lambda arrived, service, _: arrived + service,
        delay,
    ),
    Family(
        "M/G/1 with breakdowns",
        queueing.mg1_breakdowns_mean_latency_s(
            50, MEAN_S, ERLANG.scv, up_s=UP.mean_s, down_s=REPAIR.mean_s, down_scv=REPAIR.scv
        ),
        latency,
        50,
        ERLANG,
        lambda arrived, service, drawn: paths.interrupted(arrived, service, *outages(drawn)),
        breakable,
    ),
    Family(
        "M/M/c+M",
        queueing.erlang_a(330, MEAN_S, 3, PATIENCE.mean_s).lost,
        lost,
        330,
        EXPONENTIAL,
        lambda arrived, service, drawn: paths.impatient(arrived, service, drawn.times("patience", PATIENCE), 3),
        with_patience,
    ),
    Family(
        "gated batches",
        queueing.gated_batch_mean_latency_s(1000, BATCH.mean_s, PER_CUSTOMER_S),
        latency,
        1000,
        BATCH,
        gated,
        batches,
    ),
]
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@families
def test_fast_path_agrees_with_its_closed_form(family: Family) -> None:
    found = family.over_replications("fast")
    assert found.low <= family.expected <= found.high, found
    assert found.high - found.low < 0.25 * family.expected, "an interval this wide would agree with anything"


@families
def test_simpy_station_agrees_with_its_closed_form_and_obeys_the_laws(family: Family) -> None:
    found = family.over_replications("slow")
    assert found.low <= family.expected <= found.high, found
    assert found.high - found.low < family.expected


@families
def test_services_that_take_longer_are_noticed(family: Family) -> None:
    found = family.over_replications("fast", slower=1.1)
    assert not found.low <= family.expected <= found.high, found


# --- networks -----------------------------------------------------------------------------------------------


def test_a_tandem_is_two_queues_that_know_nothing_of_each_other() -> None:
    routing = [[0.0, 1.0], [0.0, 0.0]]
    nodes = networks.jackson([70, 0], routing, [MEAN_S, 0.02], [1, 2])
    values = []
    for number in range(REPLICATIONS):
        drawn = Drawn(number, FAST_CUSTOMERS)
        arrived = np.cumsum(drawn.times("arrivals", Exponential(1 / 70)))
        services = [drawn.times("service", EXPONENTIAL), drawn.times("service 2", Exponential(0.02))]
        left = paths.tandem(arrived, services, [1, 2])
        values.append(float((left - arrived)[drawn.count // 10 :].mean()))
    found = estimate(values, confidence=CONFIDENCE)
    assert found is not None
    assert found.low <= networks.jackson_latency_s(nodes, [70, 0]) <= found.high
    assert found.high - found.low < 0.15 * found.mean


ROUTING = [[0.0, 0.6, 0.4], [0.2, 0.0, 0.0], [0.0, 0.5, 0.1]]
OUTSIDE_PER_S, SERVICE_S, COUNTS = [60.0, 20.0, 0.0], [0.01, 0.018, 0.02], [1, 2, 1]


def jackson_run(replication: int, slower: float = 1.0, seconds: float = 40.0) -> tuple[float, list[float]]:
    """Mean time in the network and mean number at each station, by SimPy, from 10 % of the time on."""
    env = simpy.Environment()
    stations = [Servers(env, count) for count in COUNTS]
    needs, ways = (stream(SEED, replication, purpose) for purpose in ("jackson service", "jackson routing"))
    spent: list[float] = []

    def customer(at: int) -> Any:
        came, here = env.now, at
        while here < len(stations):
            yield from stations[here].visit(needs.exponential(SERVICE_S[here] * slower))
            leaves = 1 - sum(ROUTING[here])
            here = int(ways.choice(len(stations) + 1, p=[*ROUTING[here], leaves]))
        if came > 0.1 * seconds:
            spent.append(env.now - came)

    def source(at: int) -> Any:
        gaps = stream(SEED, replication, f"jackson arrivals {at}")
        while OUTSIDE_PER_S[at]:
            yield env.timeout(gaps.exponential(1 / OUTSIDE_PER_S[at]))
            env.process(customer(at))

    for at in range(len(stations)):
        env.process(source(at))
    env.run(until=0.1 * seconds)
    before = [book(station) for station in stations]
    env.run(until=seconds)
    numbers = [(book(station) - old) / (0.9 * seconds) for station, old in zip(stations, before, strict=True)]
    return float(np.mean(spent)), numbers


def book(station: Servers) -> float:
    station.occupancy.change()
    return station.occupancy.inside_s


def test_a_jackson_network_with_feedback_takes_as_long_as_its_product_form_says() -> None:
    nodes = networks.jackson(OUTSIDE_PER_S, ROUTING, SERVICE_S, COUNTS)
    runs = [jackson_run(number) for number in range(REPLICATIONS)]
    expected = [networks.jackson_latency_s(nodes, OUTSIDE_PER_S), *(node.number for node in nodes)]
    for value, seen in zip(expected, zip(*((mean, *numbers) for mean, numbers in runs), strict=True), strict=True):
        found = estimate(list(seen), confidence=CONFIDENCE)
        assert found is not None
        assert found.low <= value <= found.high
        assert found.high - found.low < 0.9 * value
    slow = estimate([jackson_run(number, slower=1.25)[0] for number in range(REPLICATIONS)], confidence=CONFIDENCE)
    assert slow is not None
    assert slow.low > expected[0]


def closed_run(replication: int, customers: int, think_s: float, slower: float = 1.0) -> float:
    """Cycles per second of a closed network of a shared processor and two visits to one server, by SimPy."""
    seconds = max(400.0 / customers, 50.0)
    env = simpy.Environment()
    disk, cores = Servers(env, 1), SharedProcessor(env)
    drawn = {purpose: stream(SEED, replication, f"closed {purpose}") for purpose in ("think", "disk", "cores")}
    ends: list[float] = []

    def customer() -> Any:
        while True:
            yield env.timeout(drawn["think"].exponential(think_s))
            # Processor sharing does not care about the law of its services.
            yield from cores.visit(float(drawn["cores"].lognormal(-0.5, 1.0)) * 0.01 * slower)
            for _ in range(2):
                yield from disk.visit(drawn["disk"].exponential(0.006 * slower))
            ends.append(env.now)

    for _ in range(customers):
        env.process(customer())
    env.run(until=seconds)
    return sum(end > 0.1 * seconds for end in ends) / (0.9 * seconds)


@pytest.mark.parametrize("customers", [1, 3, 8])
def test_a_closed_network_cycles_as_fast_as_mean_value_analysis_says(customers: int) -> None:
    expected = networks.closed_mva([0.01, 0.012], customers, think_s=0.03).throughput_per_s
    found = estimate([closed_run(number, customers, 0.03) for number in range(6)], confidence=CONFIDENCE)
    slow = estimate([closed_run(number, customers, 0.03, slower=1.25) for number in range(6)], confidence=CONFIDENCE)
    assert found is not None
    assert slow is not None
    assert found.low <= expected <= found.high
    assert found.high - found.low < 0.2 * expected
    assert slow.high < expected
