"""The broker in trouble: away for a while, and back with an empty disk."""

import asyncio
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from compose.stack import Stack
from compose.state import StackSpec
from reference.bus import end_offsets
from reference.commands import Contra, EntryType
from reference.store import Store
from reference.writer import Posting, post_entries

ROOT = Path(__file__).parents[2]
OUTAGE_S = 20.0
WITHIN_S = 90.0
WALLETS = 50
KEPT_BY_KAFKA = ("meta.properties", "bootstrap.checkpoint")
"""What formatting writes: an empty disk is one that was formatted and holds nothing else."""


@pytest.fixture
def stack() -> Iterator[Stack]:
    root = ROOT / ".ledgerproof" / "tests"
    with Stack.start(StackSpec(servers=1, apis=0, matchers=0, settlers=0), root=root) as started:
        yield started
    assert started.residue == []


async def deposit(store: Store, users: list[int]) -> None:
    postings = [Posting(user, uuid.uuid4().hex, EntryType.CREDIT, 1, Contra.EXTERNAL) for user in users]
    async with store.connection(0) as connection:
        await post_entries(connection, store.sql["post"], "API", postings)


async def projected_at(owner: asyncpg.Connection, seq: int) -> None:
    """Wait until every wallet's projection is at a seq, the outbox is empty, and the projection says it is fresh."""
    query = """SELECT (SELECT count(*) FROM wallet_balance_projection WHERE seq = $1 AND balance = $1) = $2
                  AND NOT EXISTS (SELECT FROM events WHERE NOT published_to_kafka)
                  AND (SELECT complete_at_ms FROM projection_progress)
                      >= (SELECT extract(epoch FROM max(created_at)) * 1000 FROM events)"""
    deadline = time.monotonic() + WITHIN_S
    while not await owner.fetchval(query, seq, WALLETS):
        if time.monotonic() > deadline:
            counts = await owner.fetch("SELECT seq, count(*) FROM wallet_balance_projection GROUP BY seq")
            pytest.fail(f"not projected: {counts}")
        await asyncio.sleep(0.2)


async def test_a_broker_that_is_away_delays_and_one_that_lost_its_disk_is_noticed_and_refilled(stack: Stack) -> None:
    store = Store(stack.config, "ledger_api")
    user, password = stack.superuser
    owner = await asyncpg.connect(f"postgresql://{user}:{password}@127.0.0.1:{stack.port('pg0')}/ledger")
    users = [100 * number + 7 for number in range(1, WALLETS + 1)]
    await deposit(store, users)
    await projected_at(owner, 1)

    # Away: commands go on, nothing is lost, and it catches up by itself.
    stack.kill("kafka")
    away_until = time.monotonic() + OUTAGE_S
    await deposit(store, users)
    complete = await owner.fetchval("SELECT complete_at_ms FROM projection_progress")
    await asyncio.sleep(away_until - time.monotonic())
    # While nothing can be applied, nobody claims to be complete.
    assert await owner.fetchval("SELECT complete_at_ms FROM projection_progress") < complete + 5_000
    assert await owner.fetchval("SELECT count(*) FROM events WHERE NOT published_to_kafka") == WALLETS
    await asyncio.to_thread(stack.start_node, "kafka")
    await projected_at(owner, 2)

    # Back with an empty disk: topics, events and the groups' offsets are gone.
    before = end_offsets(stack.config, ["wallet.posted"])
    stack.kill("kafka")
    data = Path(next(node.folder for node in stack.state.nodes if node.name == "kafka")) / "data"
    for path in data.iterdir():
        if path.name not in KEPT_BY_KAFKA:
            (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    await asyncio.to_thread(stack.start_node, "kafka")
    await deposit(store, users)
    await projected_at(owner, 3)
    after = end_offsets(stack.config, ["wallet.posted"])
    assert sum(after.values()) < sum(before.values())
    log = stack.logs_tail("relay0", 400)
    assert "Kafka lacked topics that were there before" in log
    assert "the broker lost events that it had acknowledged" in log

    command = ["events", "replay", "--from", "1h", "--config", str(stack.config_path), "--json"]
    replay = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ledgerproof", *command),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(replay.communicate(), 120)
    assert replay.returncode == 0, err.decode()
    assert json.loads(out)["events"] == {"wallet.posted": 3 * WALLETS}
    await projected_at(owner, 3)
    assert sum(end_offsets(stack.config, ["wallet.posted"]).values()) >= 3 * WALLETS
    assert await owner.fetchval("SELECT count(*) FROM wallet_balance_projection") == WALLETS
    await owner.close()
    await store.close()
