"""Match commands and cancels on the home server, and each API process's memory of which matches take bets."""

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from reference.commands import CreateMatch, MatchState, Outcome, ResettleMatch
from reference.errors import LedgerError
from reference.store import Store

FRESH_S = 1.0
"""A match remembered as OPEN is looked up again after this long, in the background."""
REMEMBERED_MAX = 10_000
ADVANCES_MAX = 1_000
"""Bets that one answer about what a wallet owes names at most."""


@dataclass(slots=True)
class KnownMatch:
    """What this process last saw of a match."""

    state: str
    outcomes: tuple[str, ...]
    closes_at_ms: int
    seen_at: float


class Matches:
    """Which matches take bets, as far as this process knows.

    It may be behind: the matcher decides under the match's lock, and a bet that comes too late is refunded there.
    That is why an unreachable home server does not stop bets on matches already known to be open.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[UUID, KnownMatch] = {}
        self._lookups: dict[UUID, asyncio.Task[KnownMatch | None]] = {}

    async def refusal(self, match_id: UUID, outcome: str) -> Outcome | None:
        """Return why a bet on this match and outcome is refused, or None if it may be placed.

        Raises LedgerError when the match is unknown here and its home server cannot be asked.
        """
        known = self._known.get(match_id)
        if known is None:
            joined = match_id in self._lookups
            known = await asyncio.shield(self._lookup(match_id))
            if known is None and joined:
                # That look-up began before this bet came, perhaps before the match was created.
                known = await asyncio.shield(self._lookup(match_id))
            if known is None:
                return Outcome.UNKNOWN_MATCH
        elif known.state == MatchState.OPEN and time.monotonic() - known.seen_at > FRESH_S:
            self._lookup(match_id)
        if outcome not in known.outcomes:
            return Outcome.UNKNOWN_OUTCOME
        if known.state != MatchState.OPEN or time.time() * 1000 >= known.closes_at_ms:
            return Outcome.MATCH_CLOSED
        return None

    def forget(self, match_id: UUID) -> None:
        """Look the match up again at its next bet."""
        self._known.pop(match_id, None)

    def _lookup(self, match_id: UUID) -> asyncio.Task[KnownMatch | None]:
        task = self._lookups.get(match_id)
        if task is None:
            task = asyncio.create_task(self._fetch(match_id))
            self._lookups[match_id] = task
            task.add_done_callback(lambda done: self._looked_up(match_id, done))
        return task

    def _looked_up(self, match_id: UUID, task: asyncio.Task[KnownMatch | None]) -> None:
        self._lookups.pop(match_id, None)
        if task.cancelled() or task.exception() is not None:
            known = self._known.get(match_id)
            if known is not None:
                known.seen_at = time.monotonic()

    async def _fetch(self, match_id: UUID) -> KnownMatch | None:
        row = await self._store.fetchrow(self._store.home_of(match_id), "match", match_id)
        if row is None:
            return None
        known = KnownMatch(row["state"], tuple(row["outcomes"]), row["closes_at_ms"], time.monotonic())
        while len(self._known) >= REMEMBERED_MAX:
            self._known.pop(next(iter(self._known)))
        self._known[match_id] = known
        return known


async def create_match(store: Store, command: CreateMatch) -> asyncpg.Record:
    """Create a match. Returns (status, state, field); raises LedgerError."""
    closes_at = datetime.fromtimestamp(command.closes_at_ms / 1000, UTC)
    return await _one(store, command.match_id, "create_match", command.match_id, list(command.outcomes), closes_at)


async def transition_match(store: Store, match_id: UUID, to: MatchState, result: str | None) -> asyncpg.Record:
    """Move a match to CLOSED, SETTLING (with `result`) or VOID. Returns (status, state, field)."""
    return await _one(store, match_id, "transition_match", match_id, to.value, result)


async def resettle_match(store: Store, match_id: UUID, command: ResettleMatch, key: str) -> asyncpg.Record:
    """Settle a settled or void match again under the next version. Returns (status, state, field, version)."""
    return await _one(store, match_id, "resettle_match", match_id, command.result, command.corrects_version, key)


async def advances(store: Store, user_id: int) -> list[asyncpg.Record]:
    """Return what the house advanced on bets of a wallet and has not got back: (match_id, bet_id, owed) each.

    Amounts are minor units; at most ADVANCES_MAX bets.
    """
    return await store.wallet_rows(user_id, "advances", ADVANCES_MAX)


async def cancel_bet(store: Store, match_id: UUID, bet_id: UUID, user_id: int, key: str) -> asyncpg.Record:
    """Cancel the unmatched part of a bet. Returns (status, bet, cancelled_stake, refund)."""
    return await _one(store, match_id, "cancel_bet", match_id, bet_id, user_id, key)


async def _one(store: Store, match_id: UUID, query: str, *args: object) -> asyncpg.Record:
    row = await store.fetchrow(store.home_of(match_id), query, *args)
    if row is None:
        raise LedgerError(f"{query} returned no row")
    return row
