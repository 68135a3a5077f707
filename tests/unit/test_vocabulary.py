"""Routing, configuration, SQL files, errors and ids keep what they promise."""

import json
import time
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import errors
from reference.commands import Side
from reference.config import ROLES, ConfigError, load_config
from reference.ledger import reserve_of
from reference.routing import SHARDS, even_routing, shard_of, shard_of_match, shards_of_server
from reference.sql import load_sql
from reference.uuid7 import uuid7

CONFIG = {
    "servers": [{"name": "pg0", "host": "127.0.0.1", "port": 1}],
    "routing": [0] * SHARDS,
    "passwords": dict.fromkeys(ROLES, "secret"),
    "kafka_bootstrap": "127.0.0.1:2",
    "redis_host": "127.0.0.1",
    "redis_port": 3,
}


@given(st.integers(1, 2**63 - 1))
def test_a_wallet_has_exactly_one_shard_the_seeds(user_id: int) -> None:
    assert shard_of(user_id) == user_id % 100


@given(st.integers(1, SHARDS))
def test_every_shard_is_held_by_exactly_one_server(servers: int) -> None:
    routing = even_routing(servers)
    held = [shard for server in range(servers) for shard in shards_of_server(routing, server)]
    assert sorted(held) == list(range(SHARDS))
    sizes = [len(shards_of_server(routing, server)) for server in range(servers)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("servers", [0, -1, 101])
def test_a_routing_table_for_an_impossible_number_of_servers_is_refused(servers: int) -> None:
    with pytest.raises(ValueError, match="1 to 100"):
        even_routing(servers)


def test_matches_made_in_one_millisecond_spread_over_the_shards() -> None:
    shards = {shard_of_match(uuid7(1_700_000_000_000)) for _ in range(1000)}
    assert len(shards) > 90


def test_uuid7_is_ordered_by_time_and_well_formed() -> None:
    before, after = uuid7(1_000), uuid7(1_001)
    assert before < after
    for value in (before, after, uuid7()):
        assert value.version == 7
        assert value.variant == "specified in RFC 4122"
    assert abs((uuid7().int >> 80) - time.time() * 1000) < 5_000


@given(st.integers(101, 100_000), st.integers(1, 10**12))
def test_a_reserve_covers_the_worst_case_and_no_cent_more(odds: int, stake: int) -> None:
    assert reserve_of(Side.BACK, odds, stake) == stake
    liability = reserve_of(Side.LAY, odds, stake)
    assert (liability - 1) * 100 < stake * (odds - 100) <= liability * 100


def test_a_configuration_file_is_read_from_the_variable(tmp_path, monkeypatch) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    monkeypatch.setenv("LEDGERPROOF_CONFIG", str(path))
    config = load_config()
    assert config.servers[0].name == "pg0"
    assert config.partitions_of("bet.created") == config.default_partitions


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"routing": [0] * 99}, "routing must have 100"),
        ({"routing": [1] * 100}, "not in servers"),
        ({"servers": "pg0"}, "servers"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_wrong_configuration_names_the_file_and_the_fault(tmp_path, change, complaint) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | change))
    with pytest.raises(ConfigError, match=complaint) as raised:
        load_config(path)
    assert str(path) in str(raised.value)


def test_a_missing_configuration_says_what_to_set(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("LEDGERPROOF_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="LEDGERPROOF_CONFIG"):
        load_config()
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.json")


def test_every_error_says_whether_it_is_definite() -> None:
    pending, seen = [errors.LedgerError], []
    while pending:
        error = pending.pop()
        seen.append(error)
        pending += error.__subclasses__()
        assert error.__name__ in (errors.__doc__ or ""), f"draw {error.__name__} in the tree"
    assert [error.__name__ for error in seen if not error.definite] == ["UnknownOutcome"]


@pytest.mark.parametrize(
    "file", ["schema", "functions", "queries", "matcher", "settler", "reconciliation", "reconciler"]
)
def test_every_sql_file_has_named_blocks(file: str) -> None:
    blocks = load_sql(file)
    assert blocks
    assert all(text for text in blocks.values())


def test_a_uuid_of_any_version_has_a_home() -> None:
    assert 0 <= shard_of_match(UUID(int=0)) < SHARDS


@pytest.mark.parametrize(("low_bits", "shard"), [(0, 0), (1, 1), (99, 99), (100, 0), (2**63, 8), (2**64 - 1, 15)])
@pytest.mark.parametrize("high_bits", [0, 1, 2**64 - 1])
def test_the_home_of_a_match_follows_from_the_low_half_of_its_id(low_bits: int, shard: int, high_bits: int) -> None:
    assert shard_of_match(UUID(int=high_bits << 64 | low_bits)) == shard
    assert isinstance(shard_of_match(UUID(int=low_bits)), int)
