"""The checklist on a real stack: it says ok of what is right, and failed once that is broken."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
import pytest

from compose.stack import Stack
from ledgerproof.checklist.item import CANNOT, FAILED, OK, Answer
from ledgerproof.checklist.run import check
from ledgerproof.progress import Progress


def look(stack: Stack, *only: str) -> dict[str, Answer]:
    found = check(only, stack, Progress(quiet=True), may_break=False)
    return {answer.id: answer for answer in found.answers}


@contextmanager
def changed(dsn: str, there: str, back: str) -> Iterator[None]:
    """Change a server as its superuser while the block runs."""

    async def run(statement: str) -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run(there))
    try:
        yield
    finally:
        asyncio.run(run(back))


def test_what_is_right_is_ok_and_what_this_stack_lacks_is_said(stack: Stack) -> None:
    right = ("partitions", "indexes", "rights", "outbox", "endpoints", "idempotency", "rate-limit", "durability")
    found = look(stack, *right, "kafka", "scheduled", "failover", "chaos", "on-call", "replication", "backups")
    assert {name: found[name].result for name in right} == dict.fromkeys(right, OK), found
    assert "100 shards" in found["partitions"].evidence
    # This stack has 8 partitions a topic and no reconciler, and it is not ours to break.
    assert found["kafka"].result == FAILED
    assert "bet.created 8 of 100" in found["kafka"].evidence
    assert (found["scheduled"].result, found["scheduled"].evidence) == (FAILED, "the stack has no reconciler")
    for name in ("failover", "chaos", "on-call", "replication", "backups"):
        assert found[name].result == CANNOT, found[name]


@pytest.mark.parametrize(
    ("item", "there", "back", "says"),
    [
        (
            "partitions",
            "ALTER TABLE wallet_ledger_3 DISABLE TRIGGER wallet_ledger_immutable",
            "ALTER TABLE wallet_ledger_3 ENABLE TRIGGER wallet_ledger_immutable",
            "the partition of shard 3 on pg0 lacks a trigger",
        ),
        (
            "indexes",
            "ALTER INDEX orders_changed RENAME TO orders_gone",
            "ALTER INDEX orders_gone RENAME TO orders_changed",
            "pg0 lacks the indexes orders_changed",
        ),
        (
            "rights",
            "GRANT UPDATE (amount) ON wallet_ledger TO ledger_api; GRANT UPDATE ON wallet_ledger TO ledger_api",
            "REVOKE UPDATE ON wallet_ledger FROM ledger_api; REVOKE UPDATE (amount) ON wallet_ledger FROM ledger_api",
            "ledger_api",
        ),
        ("durability", "ALTER SYSTEM SET synchronous_commit = off", "ALTER SYSTEM RESET synchronous_commit", "off"),
    ],
)
def test_what_is_broken_is_failed(
    stack: Stack, superuser_dsn: list[str], item: str, there: str, back: str, says: str
) -> None:
    with changed(superuser_dsn[0], there, back):
        if "SYSTEM" in there:
            with changed(superuser_dsn[0], "SELECT pg_reload_conf()", "SELECT 1"):
                answer = look(stack, item)[item]
        else:
            answer = look(stack, item)[item]
    if "SYSTEM" in there:
        with changed(superuser_dsn[0], "SELECT pg_reload_conf()", "SELECT 1"):
            assert look(stack, item)[item].result == OK
    assert answer.result == FAILED, answer
    assert says in answer.evidence
