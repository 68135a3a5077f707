"""Errors of the seed that arithmetic or a few lines show; the others are in tests/stack/test_errata_sql.py."""

import msgspec

from reference.commands import TOPIC_OF, EventType
from reference.routing import SHARDS, even_routing, shard_of, shards_of_server

USERS = 1_000_000


def test_seed_range_query_finds_one_user_in_a_hundred() -> None:
    # getTotalBalance asks shard n for the users from n × 10,000 on; getShardKey put them on user_id % 100.
    found = sum(1 for user_id in range(USERS) if user_id // (USERS // SHARDS) == shard_of(user_id))
    assert found == USERS // 100


def test_seed_partitions_inside_a_shard_hold_one_partition_each() -> None:
    # Shard and partition are the same function, so every wallet of a shard falls into the same partition.
    wallets_of_shard = range(7, USERS, SHARDS)
    assert {user_id % 100 for user_id in wallets_of_shard} == {7}
    # Ours: a server has exactly the partitions of the shards it holds.
    held = [shards_of_server(even_routing(4), server) for server in range(4)]
    assert sorted(shard for shards in held for shard in shards) == list(range(SHARDS))


def test_seed_topic_names_do_not_meet() -> None:
    built = "Bet".lower() + "." + "BetCreated"
    consumed = "bet.created"
    assert built != consumed
    assert TOPIC_OF[EventType.BET_CREATED] == consumed


def test_seed_numbers_lose_large_user_ids() -> None:
    # TypeScript's `number` is a double; BIGINT holds ids it cannot tell apart.
    assert float(2**53 + 1) == float(2**53)
    body = msgspec.json.encode({"user_id": 2**63 - 1})
    assert msgspec.json.decode(body)["user_id"] == 2**63 - 1


def test_seed_consumers_have_no_headroom() -> None:
    events_per_s, per_consumer_per_s, autoscaler_maximum = 100_000, 1_000, 50
    needed = events_per_s / per_consumer_per_s
    assert needed == 100, "every consumer is busy all the time, so any pause grows the lag for ever"
    assert needed > autoscaler_maximum


def test_seed_kafka_storage_forgets_the_copies() -> None:
    one_copy_tb = 100_000 * 1_000 * 7 * 86_400 / 1e12
    assert round(one_copy_tb) == 60
    assert round(3 * one_copy_tb) == 181
