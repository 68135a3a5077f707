"""The parts of the later codes that have a simple truth to compare with."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from invariants.anomalies.refusals import least_between
from ledgerproof.drift import WALLETS_FROM, plan_drift
from ledgerproof.prove import reconcile_every_s
from reference.config import ServerConfig, ServiceConfig
from reference.routing import SHARDS, even_routing, shard_of


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=70), st.data())
def test_least_of_every_stretch_is_the_least(values: list[int], data: st.DataObject) -> None:
    last = len(values) - 1
    spans = data.draw(st.lists(st.tuples(st.integers(0, last), st.integers(0, last)).map(sorted), max_size=20))
    low = np.array([span[0] for span in spans], dtype=np.int64)
    high = np.array([span[1] for span in spans], dtype=np.int64)
    least = least_between(np.array(values, dtype=np.int64), low, high)
    assert least.tolist() == [min(values[start : end + 1]) for start, end in spans]


def service(servers: int) -> ServiceConfig:
    return ServiceConfig(
        servers=[ServerConfig(f"pg{n}", "127.0.0.1", 5432 + n) for n in range(servers)],
        routing=even_routing(servers),
        kafka_bootstrap="127.0.0.1:9092",
        redis_host="127.0.0.1",
        redis_port=6379,
        redis_password="x",
        passwords={},
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**53), st.integers(0, SHARDS - 1))
def test_drift_is_planted_where_neither_the_move_nor_a_fault_is(seed: int, moved: int) -> None:
    config = service(2)
    planned = plan_drift(seed, config, moved_shard=moved, broken=frozenset({"pg0", "redis"}))
    assert planned == plan_drift(seed, config, moved_shard=moved, broken=frozenset({"pg0", "redis"}))
    assert WALLETS_FROM <= planned.user < WALLETS_FROM + SHARDS
    assert shard_of(planned.user) != moved
    assert planned.server == config.routing[shard_of(planned.user)] == 1
    assert planned.within_s > 3 * config.reconcile_every_s


def test_drift_is_planted_even_where_every_server_is_broken() -> None:
    planned = plan_drift(1, service(1), moved_shard=None, broken=frozenset({"pg0"}))
    assert planned.server == 0


def test_short_runs_reconcile_more_often() -> None:
    assert [reconcile_every_s(duration) for duration in (1.0, 20.0, 150.0)] == [3.0, 5.0, 15.0]
