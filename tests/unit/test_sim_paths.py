"""The SimPy stations and the fast paths agree on when every single customer leaves, to a billionth of a second.

`pytest tests/unit/test_sim_paths.py` tries some hundred cases; 10,000 cases and more:
`pytest tests/unit/test_sim_paths.py --hypothesis-profile nightly`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import given, note
from hypothesis import strategies as st

from sim import paths
from sim.paths import Batching
from sim.stations import BatchServer, BreakableServer, Delay, Servers, SharedProcessor, Visit, arrive
from tests.depth import depth

EXACT_S = 1e-9
CUSTOMERS = 24
CASES = {"ci": 40, "nightly": 1_250}
"""Of each of nine properties: 11,250 in the nightly profile."""

# Eighths make many things happen at one moment, and are exact; the others never meet.
eighths = st.integers(0, 24).map(lambda number: number / 8)
some = st.integers(1, 24).map(lambda number: number / 8)
wild = st.floats(1e-3, 5.0)


@st.composite
def customers(draw: st.DrawFn, services: st.SearchStrategy[float] = eighths) -> tuple[Any, Any]:
    """Arrivals and services of a few customers."""
    gap, need = (wild, wild) if draw(st.booleans()) else (eighths, services)
    pairs = draw(st.lists(st.tuples(gap, need), max_size=CUSTOMERS))
    gaps, needed = zip(*pairs, strict=True) if pairs else ((), ())
    return np.cumsum(np.array(gaps)), np.array(needed)


def simulated(
    arrived: Any, build: Callable[[simpy.Environment], tuple[list[Any], Callable[[int], Visit]]], in_vain: bool = False
) -> Any:
    """Departures by SimPy; on the way, Little's law for the stations' own books, unless some wait in vain."""
    env = simpy.Environment()
    stations, visit = build(env)
    left = arrive(env, arrived.tolist(), visit)
    env.run()
    for station in stations:
        assert station.occupancy.inside == station.occupancy.busy == 0
    if not in_vain:
        spent = float(np.nansum(np.array(left) - arrived))
        assert sum(station.occupancy.inside_s for station in stations) == pytest.approx(spent, abs=1e-6)
    return np.array(left)


def assert_same(fast: Any, slow: Any) -> None:
    note(f"fast {fast}")
    note(f"slow {slow}")
    assert len(fast) == len(slow)
    assert (np.isnan(fast) == np.isnan(slow)).all(), "another customer was refused"
    assert np.nanmax(np.abs(fast - slow), initial=0.0) <= EXACT_S


@given(customers())
@depth(**CASES)
def test_lindley(case: tuple[Any, Any]) -> None:
    arrived, service = case

    def build(env: simpy.Environment) -> Any:
        station = Servers(env, 1)
        return [station], lambda n: station.visit(service[n])

    slow = simulated(arrived, build)
    assert_same(paths.lindley(arrived, service), slow)


@given(customers(), st.integers(1, 4))
@depth(**CASES)
def test_kiefer_wolfowitz(case: tuple[Any, Any], servers: int) -> None:
    arrived, service = case

    def build(env: simpy.Environment) -> Any:
        station = Servers(env, servers)
        return [station], lambda n: station.visit(service[n])

    assert_same(paths.kiefer_wolfowitz(arrived, service, servers), simulated(arrived, build))


@given(customers(), st.integers(1, 3), st.integers(0, 3))
@depth(**CASES)
def test_finite_capacity(case: tuple[Any, Any], servers: int, places: int) -> None:
    arrived, service = case

    def build(env: simpy.Environment) -> Any:
        station = Servers(env, servers, servers + places)
        return [station], lambda n: station.visit(service[n])

    assert_same(paths.finite_capacity(arrived, service, servers, servers + places), simulated(arrived, build))


@given(customers(some), st.integers(1, 3), st.data())
@depth(**CASES)
def test_impatient(case: tuple[Any, Any], servers: int, data: st.DataObject) -> None:
    arrived, service = case
    patience = np.array(data.draw(st.lists(eighths, min_size=len(arrived), max_size=len(arrived))))

    def build(env: simpy.Environment) -> Any:
        station = Servers(env, servers)
        return [station], lambda n: station.visit(service[n], patience[n])

    assert_same(paths.impatient(arrived, service, patience, servers), simulated(arrived, build, in_vain=True))


@given(customers(some), st.lists(st.tuples(eighths, eighths), max_size=6))
@depth(**CASES)
def test_interrupted(case: tuple[Any, Any], outages: list[tuple[float, float]]) -> None:
    arrived, service = case
    edges = np.cumsum(np.array(outages).ravel()).reshape(-1, 2)

    def build(env: simpy.Environment) -> Any:
        station = BreakableServer(env, edges[:, 0].tolist(), edges[:, 1].tolist())
        return [station], lambda n: station.visit(service[n])

    assert_same(paths.interrupted(arrived, service, edges[:, 0], edges[:, 1]), simulated(arrived, build))


@given(customers(some))
@depth(**CASES)
def test_processor_sharing(case: tuple[Any, Any]) -> None:
    arrived, service = case

    def build(env: simpy.Environment) -> Any:
        station = SharedProcessor(env)
        return [station], lambda n: station.visit(service[n])

    assert_same(paths.processor_sharing(arrived, service), simulated(arrived, build))


@given(customers(), st.integers(1, 3), st.integers(1, 3), st.data())
@depth(**CASES)
def test_tandem(case: tuple[Any, Any], first: int, second: int, data: st.DataObject) -> None:
    arrived, service = case
    later = np.array(data.draw(st.lists(eighths, min_size=len(arrived), max_size=len(arrived))))

    def build(env: simpy.Environment) -> Any:
        stations = Servers(env, first), Servers(env, second)

        def visit(n: int) -> Visit:
            yield from stations[0].visit(service[n])
            return (yield from stations[1].visit(later[n]))

        return list(stations), visit

    assert_same(paths.tandem(arrived, [service, later], [first, second]), simulated(arrived, build))


@given(customers(some), eighths, st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.0, 0.25, 1.0, 2.1]))
@depth(**CASES)
def test_gated_batches(case: tuple[Any, Any], per_customer: float, batch: int, queue: int, linger: float) -> None:
    arrived, fixed = case
    rules = Batching(per_customer, batch, queue, linger)

    def build(env: simpy.Environment) -> Any:
        station = BatchServer(env, fixed.tolist(), rules)
        return [station], lambda _: station.visit()

    left, batches = paths.gated_batches(arrived, fixed, rules)
    assert_same(left, simulated(arrived, build))
    assert sum(each.size for each in batches) == np.count_nonzero(~np.isnan(left))
    assert max((each.size for each in batches), default=0) <= batch


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 0.3]))
@depth(**CASES)
def test_batches_that_share_a_station(seed: int, servers: int, slots: int, linger: float) -> None:
    rng = np.random.default_rng(seed)
    count = 40
    arrived, fixed = np.cumsum(rng.exponential(0.3, count)), rng.exponential(1.0, (servers, count))
    chosen = rng.integers(servers, size=count)
    rules = Batching(0.1, 3, 5, linger)

    def build(env: simpy.Environment) -> Any:
        shared = simpy.Resource(env, slots)
        stations = [BatchServer(env, fixed[k].tolist(), rules, shared) for k in range(servers)]
        return stations, lambda n: stations[chosen[n]].visit()

    slow = simulated(arrived, build)
    mine = [np.flatnonzero(chosen == number) for number in range(servers)]
    fast, _ = paths.shared_batches(
        [arrived[own] for own in mine], [fixed[k][: len(own)] for k, own in enumerate(mine)], rules, slots
    )
    for own, left in zip(mine, fast, strict=True):
        assert_same(left, slow[own])


def test_a_delay_keeps_nobody_waiting() -> None:
    arrived, service = np.array([0.0, 0.0, 1.0]), np.array([2.0, 3.0, 0.5])

    def build(env: simpy.Environment) -> Any:
        station = Delay(env)
        return [station], lambda n: station.visit(service[n])

    assert simulated(arrived, build).tolist() == [2.0, 3.0, 1.5]


def test_who_arrives_as_a_service_ends_still_finds_it_busy() -> None:
    arrived, service = np.array([0.0, 1.0, 1.5]), np.array([1.0, 1.0, 1.0])
    assert np.isnan(paths.finite_capacity(arrived, service, 1, 1)).tolist() == [False, True, False]


def test_an_outage_that_begins_as_a_service_ends_comes_first() -> None:
    arrived, service, edges = np.array([0.0, 0.5]), np.array([1.0, 1.0]), np.array([[1.0, 2.0]])

    def build(env: simpy.Environment) -> Any:
        station = BreakableServer(env, [1.0], [2.0])
        return [station], lambda n: station.visit(service[n])

    assert simulated(arrived, build).tolist() == [2.0, 3.0]
    assert paths.interrupted(arrived, service, edges[:, 0], edges[:, 1]).tolist() == [2.0, 3.0]


def test_a_linger_ends_when_the_batch_is_full() -> None:
    arrived = np.array([0.0, 1.0, 2.0, 9.0])
    left, batches = paths.gated_batches(arrived, np.full(4, 0.5), Batching(0.0, batch_max=2, queue_max=9, linger_s=3.0))
    assert [(batch.taken_s, batch.size) for batch in batches] == [(1.0, 2), (5.0, 1), (12.0, 1)]
    assert left.tolist() == [1.5, 1.5, 5.5, 12.5]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: paths.lindley(np.array([1.0, 0.5]), np.array([1.0, 1.0])),
        lambda: paths.lindley(np.array([1.0, np.inf]), np.array([1.0, 1.0])),
        lambda: paths.lindley(np.array([1.0]), np.array([-1.0])),
        lambda: paths.lindley(np.array([1.0]), np.array([1.0, 2.0])),
        lambda: paths.kiefer_wolfowitz(np.array([1.0]), np.array([1.0]), 0),
        lambda: paths.finite_capacity(np.array([1.0]), np.array([1.0]), 2, 1),
        lambda: paths.interrupted(np.array([1.0]), np.array([1.0]), np.array([2.0]), np.array([1.0])),
        lambda: Batching(0.1, 0, 1),
        lambda: Batching(-0.1, 1, 1),
    ],
)
def test_what_is_no_path_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must|belong|needs|place"):
        wrong()
