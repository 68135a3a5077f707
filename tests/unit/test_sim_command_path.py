"""The fast path of a command is the SimPy model of it, customer by customer, and what theory says where it knows."""

from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from sim import queueing, writer_model
from sim.command_path import LIMITS, Configuration, Drawn, evaluate, rules_of, travel
from sim.stations import BatchServer, Servers, Visit, arrive
from sim.statistics import Estimate
from tests.depth import depth

EXACT_S = 1e-9
CUSTOMERS = 80


def known(value: Estimate | None) -> Estimate:
    assert value is not None
    return value


def simulated(configuration: Configuration, drawn: Drawn) -> Any:
    """Answers by SimPy, of the same draws."""
    env = simpy.Environment()
    gateway = Servers(env, configuration.gateway_servers)
    apis = [Servers(env, 1) for _ in range(configuration.apis)]
    writers = {}
    for server in range(configuration.servers):
        slots = simpy.Resource(env, configuration.slots)
        for api in range(configuration.apis):
            # A writer's k-th transaction takes the k-th time at the places of its own commands, as they reach it.
            own = [n for n in by_gateway(configuration, drawn) if (drawn.api[n], drawn.server[n]) == (api, server)]
            writers[api, server] = BatchServer(env, drawn.fixed_s[own].tolist(), rules_of(configuration), slots)

    def visit(n: int) -> Visit:
        if configuration.gateway_ms:
            yield from gateway.visit(drawn.gateway_s[n])
        yield from apis[drawn.api[n]].visit(drawn.api_s[n])
        return (yield from writers[drawn.api[n], drawn.server[n]].visit())

    left = arrive(env, drawn.arrived_s.tolist(), visit)
    env.run()
    return np.array(left)


def by_gateway(configuration: Configuration, drawn: Drawn) -> list[int]:
    """Commands in the order in which they leave the gateway, by SimPy, too."""
    if not configuration.gateway_ms:
        return list(range(len(drawn.arrived_s)))
    env = simpy.Environment()
    gateway = Servers(env, configuration.gateway_servers)
    left = arrive(env, drawn.arrived_s.tolist(), lambda n: gateway.visit(drawn.gateway_s[n]))
    env.run()
    return np.argsort(np.array(left), kind="stable").tolist()


@given(
    st.builds(
        Configuration,
        rate_per_s=st.sampled_from([100.0, 1000.0, 3000.0]),
        gateway_ms=st.sampled_from([0.0, 1.0]),
        gateway_servers=st.integers(1, 3),
        apis=st.integers(1, 3),
        api_ms=st.sampled_from([0.0, 0.5]),
        servers=st.integers(1, 3),
        slots=st.integers(1, 3),
        fixed_ms=st.sampled_from([1.0, 5.0]),
        batch_max=st.sampled_from([1, 3, 50]),
        queue_max=st.sampled_from([1, 4, 50]),
        linger_ms=st.sampled_from([0.0, 2.0]),
    ),
    st.integers(0, 2**40),
)
@depth(ci=60, nightly=1_000)
def test_every_command_is_answered_when_simpy_answers_it(configuration: Configuration, seed: int) -> None:
    drawn = Drawn.of(configuration, CUSTOMERS, seed, 0)
    fast, _ = travel(configuration, drawn)
    slow = simulated(configuration, drawn)
    assert (np.isnan(fast) == np.isnan(slow)).all()
    assert np.nanmax(np.abs(fast - slow), initial=0.0) <= EXACT_S


def test_one_event_loop_is_mm1_and_what_follows_it_adds_its_own_time() -> None:
    alone = Configuration(
        rate_per_s=60, apis=1, api_ms=10, servers=1, slots=1, fixed_ms=0.001, fixed_scv=0, per_command_ms=0
    )
    found = evaluate(alone, customers=100_000, replications=10, seed=3)
    expected_ms = (queueing.mm1_mean_wait_s(60, 0.01) + 0.01) * 1000 + 0.001
    assert known(found.mean_ms).low <= expected_ms <= known(found.mean_ms).high
    p95 = known(found.p95_ms)
    assert p95.low <= queueing.mm1_latency_quantile_s(60, 0.01, 95) * 1000 <= p95.high
    assert (found.bottleneck, found.saturation_per_s) == ("api", 100)


def test_one_writer_is_a_gated_batch_server() -> None:
    alone = Configuration(
        rate_per_s=1000, apis=1, api_ms=0, servers=1, slots=1, fixed_ms=4, fixed_scv=0, per_command_ms=0.4
    )
    found = evaluate(alone, customers=30_000, replications=10, seed=3)
    expected_ms = queueing.gated_batch_mean_latency_s(1000, 0.004, 0.0004) * 1000
    assert known(found.mean_ms).low <= expected_ms <= known(found.mean_ms).high


def test_writers_alone_agree_with_the_model_of_the_writer() -> None:
    shared: dict[str, Any] = {"rate_per_s": 2000, "servers": 2, "apis": 2, "fixed_ms": 5, "per_command_ms": 0.5}
    path = evaluate(Configuration(**shared, api_ms=0, fixed_scv=0, batch_max=8), 20_000, 6, seed=3)
    model = writer_model.predict(
        writer_model.Parameters(**shared, batch_max=8, duration_s=5, replications=6, deadline_ms=60_000)
    )
    for mine, other in ((path.mean_ms, model.mean_ms), (path.mean_batch, model.mean_batch)):
        assert known(mine).mean == pytest.approx(known(other).mean, rel=0.05)


def test_more_than_saturation_is_refused_and_the_rest_is_served_at_saturation() -> None:
    small = Configuration(
        rate_per_s=2000, apis=1, api_ms=0, servers=1, slots=1, fixed_ms=10, fixed_scv=0, batch_max=4, queue_max=40
    )
    found = evaluate(small, 20_000, 4, seed=1)
    assert found.bottleneck == "postgres"
    assert known(found.throughput_per_s).mean == pytest.approx(found.saturation_per_s, rel=0.01)
    assert known(found.refused_share).mean == pytest.approx(1 - found.saturation_per_s / 2000, abs=0.02)
    assert known(found.postgres_busy).mean == pytest.approx(1, abs=0.01)


def test_what_grows_without_end_is_not_settled() -> None:
    assert not evaluate(Configuration(rate_per_s=5000, apis=1, api_ms=1), 5_000, 2, seed=1).settled


def test_few_answers_state_no_latency() -> None:
    flooded = Configuration(rate_per_s=1e7, apis=1, api_ms=0, servers=1, fixed_ms=1000, queue_max=1, batch_max=1)
    found = evaluate(flooded, 1_000, 2, seed=1)
    assert found.mean_ms is None
    assert known(found.refused_share).mean > 0.99


def test_the_slots_of_a_server_are_shared_by_its_writers() -> None:
    narrow = Configuration(rate_per_s=1200, apis=4, servers=1, slots=1, fixed_ms=2, batch_max=2)
    wide = Configuration(rate_per_s=1200, apis=4, servers=1, slots=4, fixed_ms=2, batch_max=2)
    slow, fast = (known(evaluate(each, 5_000, 4, seed=1).mean_ms) for each in (narrow, wide))
    assert slow.low > 2 * fast.high


def test_every_parameter_has_limits_and_is_held_to_them() -> None:
    assert set(LIMITS) == set(Configuration.__struct_fields__)
    for name, (_, high) in LIMITS.items():
        for value in (high * 2, -1, float("nan")):
            with pytest.raises(ValueError, match=f"^{name} must be"):
                Configuration(**{name: value})  # type: ignore[arg-type]
