"""Snapshots of a lent stack: what was there is left out, and what is missing since still shows."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from invariants.snapshot import SERVERS_READ, TABLES, Snapshot
from ledgerproof.client import Answer, Result
from ledgerproof.plan.performer import words_of
from ledgerproof.plan.scope import cut
from tests.unit.honest_world import server_of_user

EARLIER, LATER = "a match of before", "a match of now"


def write(folder: Path, tables: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir()
    for name, schema in TABLES.items():
        frame = pl.DataFrame(tables.get(name, []), schema=schema)
        frame.write_parquet(folder / f"{name}.parquet")
    (folder / SERVERS_READ).write_text('["pg0"]')
    return folder


def entry(user: int, seq: int) -> dict[str, Any]:
    return {"server": server_of_user(user), "user_id": user, "seq": seq}


def record(offset: int, topic: str = "wallet.posted", partition: int = 0) -> dict[str, Any]:
    return {"topic": topic, "partition": partition, "offset": offset}


@pytest.fixture
def snapshots(tmp_path: Path) -> tuple[Path, Path, Path]:
    before = {
        "ledger": [entry(7, 1)],
        "refusals": [{"user_id": 9}],
        "matches": [{"match_id": EARLIER}],
        "outbox": [{"server": "pg0", "id": 1}, {"server": "pg1", "id": 5}],
        "kafka": [record(0), record(1), record(0, partition=1)],
        "routes": [{"shard": 7}],
    }
    now = {
        "ledger": [entry(7, 1), entry(7, 2), entry(8, 1)],
        "refusals": [{"user_id": 9}, {"user_id": 8}],
        "matches": [{"match_id": EARLIER}, {"match_id": LATER}],
        "orders": [{"match_id": LATER, "user_id": 8}, {"match_id": EARLIER, "user_id": 7}],
        "outbox": [*before["outbox"], {"server": "pg0", "id": 5}],
        "kafka": [*before["kafka"], record(2), record(4), record(1, partition=1), record(0, "bet.created")],
        "routes": [{"shard": 7}],
    }
    (tmp_path / "cut").mkdir()
    return write(tmp_path / "before", before), write(tmp_path / "now", now), tmp_path / "cut"


def test_only_what_came_since_is_left(snapshots: tuple[Path, Path, Path]) -> None:
    before, now, into = snapshots
    sizes = cut(now, before, into)
    found = Snapshot("cut", into)
    assert found.missing() == []
    assert found.servers_read() == {"pg0"}
    assert found.table("ledger")["user_id"].to_list() == [8]
    assert found.table("refusals")["user_id"].to_list() == [8]
    assert found.table("matches")["match_id"].to_list() == [LATER]
    assert found.table("orders")["match_id"].to_list() == [LATER]
    assert found.table("outbox").select("server", "id").rows() == [("pg0", 5)]
    assert found.table("routes").height == 1
    assert sizes["ledger"] == 1


def test_offsets_count_from_where_the_topics_ended_and_holes_stay_holes(snapshots: tuple[Path, Path, Path]) -> None:
    before, now, into = snapshots
    cut(now, before, into)
    rows = Snapshot("cut", into).table("kafka").select("topic", "partition", "offset").rows()
    # Offset 3 was missing of what came since: it is missing still.
    assert sorted(rows) == [
        ("bet.created", 0, 0),
        ("wallet.posted", 0, 0),
        ("wallet.posted", 0, 2),
        ("wallet.posted", 1, 0),
    ]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Result("ok", 202, Answer(outcome="ACCEPTED", replayed=False)), {"ok", "ACCEPTED"}),
        (Result("ok", 202, Answer(outcome="ACCEPTED", replayed=True)), {"ok", "ACCEPTED", "replayed"}),
        (Result("fail", 422, Answer(outcome="INSUFFICIENT_FUNDS")), {"refused", "INSUFFICIENT_FUNDS"}),
        (Result("fail", 409, Answer(outcome="REPLAYED_DIFFERENTLY")), {"rejected", "REPLAYED_DIFFERENTLY"}),
        (Result("fail", 503, Answer()), {"rejected"}),
        (Result("fail", None, Answer()), {"rejected"}),
        (Result("info", 504, Answer()), {"unknown"}),
        (Result("info", None, Answer()), {"unknown"}),
    ],
)
def test_what_an_answer_can_be_expected_as(result: Result, words: set[str]) -> None:
    assert words_of(result) == words
