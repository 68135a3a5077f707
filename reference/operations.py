"""What an operator asks of a server: whether payouts are paused, and to pause or resume them; what passes found."""

from datetime import datetime
from typing import Any

import msgspec

from reference.config import ServiceConfig
from reference.errors import LedgerError
from reference.sql import load_sql
from reference.store import DRIVER_ERRORS, connect, hang_up, meaning_of

ROLE = "ledger_operator"
TIMEOUT_MS = 30_000
"""Pausing waits for payouts under way, which end within their own statement's timeout."""
REASON_MAX = 1_000
BY_MAX = 200


class Change(msgspec.Struct, frozen=True):
    """Payouts were paused or resumed: who said they were, why, and the database role that did it."""

    paused: bool
    changed_by: str
    reason: str
    login: str
    run_id: str | None
    changed_at: datetime


class Gate(msgspec.Struct, frozen=True):
    """Whether a server's payouts are paused. `error` says why it could not be asked; the rest is then unknown."""

    server: str
    paused: bool | None = None
    changed_by: str | None = None
    reason: str | None = None
    run_id: str | None = None
    changed_at: datetime | None = None
    changes: list[Change] = []
    error: str | None = None


async def gate_of(config: ServiceConfig, index: int, changes: int = 10) -> Gate:
    """Return the gate of a server with its newest changes. Never raises: a server that is down says so in `error`."""
    server = config.servers[index].name
    try:
        (gate,) = await _fetch(config, index, "gate")
        rows = await _fetch(config, index, "changes", changes)
    except LedgerError as error:
        return Gate(server, error=str(error))
    return Gate(server, **gate, changes=[Change(**row) for row in rows])


async def pause(config: ServiceConfig, index: int, by: str, reason: str) -> bool:
    """Pause a server's payouts; none is under way any more when it returns. False if they were paused. LedgerError."""
    rows = await _fetch(config, index, "pause", by[:BY_MAX], reason[:REASON_MAX], None)
    return bool(rows[0]["payouts_pause"])


async def resume(config: ServiceConfig, index: int, by: str, reason: str) -> bool:
    """Resume a server's payouts. Returns False if they were not paused. Raises LedgerError."""
    rows = await _fetch(config, index, "resume", by[:BY_MAX], reason[:REASON_MAX])
    return bool(rows[0]["payouts_resume"])


async def runs_of(config: ServiceConfig, index: int, limit: int) -> list[dict[str, Any]]:
    """Return a server's newest passes, newest first. Raises LedgerError."""
    return await _fetch(config, index, "runs", limit)


async def findings_of(config: ServiceConfig, index: int, run_id: str | None, limit: int) -> list[dict[str, Any]]:
    """Return a server's newest findings, of all passes or of one. Raises LedgerError."""
    return await _fetch(config, index, "findings", run_id, limit)


async def _fetch(config: ServiceConfig, index: int, query: str, *args: object) -> list[dict[str, Any]]:
    connection = await connect(config.servers[index], ROLE, config.passwords[ROLE], statement_timeout_ms=TIMEOUT_MS)
    try:
        rows = await connection.fetch(load_sql("reconciler")[query], *args, timeout=TIMEOUT_MS / 1000 + 1)
    except DRIVER_ERRORS as error:
        raise meaning_of(error) from error
    finally:
        await hang_up(connection)
    return [dict(row) for row in rows]
