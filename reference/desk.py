"""The commands as plain functions: decoded values in, an answer out, whichever door they came through.

Nothing here knows HTTP or gRPC. A refusal is an answer (`outcome`); what is raised is a LedgerError whose
`definite` says whether the command certainly did not happen.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import asyncpg
import msgspec

from reference import exchange
from reference.commands import (
    MAX_KEY_LENGTH,
    MAX_ODDS,
    MAX_USER_ID,
    MIN_ODDS,
    Contra,
    CreateMatch,
    Deposit,
    EntryType,
    MatchState,
    Outcome,
    PlaceBet,
    SettleMatch,
    Withdraw,
)
from reference.config import ServiceConfig
from reference.errors import InvalidCommand, LedgerError
from reference.ledger import reserve_of
from reference.routing import shard_of
from reference.store import Store
from reference.uuid7 import uuid7
from reference.writer import Posted, Posting, Writer

RESERVED_KEYS = "ledger:"
"""Keys of the service itself (payouts, refunds) begin with this; a caller's key may not."""
MAX_OUTCOMES = 64
MAX_OUTCOME_LENGTH = 32
MAX_CLOSES_AT_MS = 253_402_300_799_000

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True, frozen=True)
class Cancelled:
    """The answer to a cancel. Amounts are minor units and 0 while the bet has not reached the order book."""

    outcome: str
    replayed: bool
    bet_id: UUID
    cancelled_stake: int = 0
    refund: int = 0
    differs: str | None = None


@dataclass(slots=True, frozen=True)
class Moved:
    """The answer to a match command; `state` is the match's state after it."""

    outcome: str
    replayed: bool
    match_id: UUID
    state: str | None
    differs: str | None = None


class Desk:
    """Checks commands against the rules that need no lock, and hands them to where they are decided."""

    def __init__(self, config: ServiceConfig, store: Store, writers: Sequence[Writer]) -> None:
        self._config = config
        self._store = store
        self._writers = writers
        self._matches = exchange.Matches(store)

    # -- wallet commands -------------------------------------------------------------------------------

    async def deposit(self, user_id: int, key: str, command: Deposit) -> Posted:
        """Put money from outside into a wallet."""
        amount = within("amount_minor", command.amount_minor, 1, self._config.max_amount_minor)
        asked = b'{"op":"deposit","amount_minor":%d}' % amount
        return await self._post(Posting(user_id, key, EntryType.CREDIT, amount, Contra.EXTERNAL, command=asked))

    async def withdraw(self, user_id: int, key: str, command: Withdraw) -> Posted:
        """Take money out of a wallet."""
        amount = within("amount_minor", command.amount_minor, 1, self._config.max_amount_minor)
        asked = b'{"op":"withdraw","amount_minor":%d}' % amount
        return await self._post(Posting(user_id, key, EntryType.DEBIT, -amount, Contra.EXTERNAL, command=asked))

    async def place_bet(self, user_id: int, key: str, command: PlaceBet) -> Posted:
        """Reserve a bet's stake or liability and put it into the outbox for the matcher."""
        outcome = command.outcome
        # Also a refused bet is stored: a text that Postgres cannot hold would fail the whole batch it is in.
        if not (0 < len(outcome) <= MAX_OUTCOME_LENGTH and outcome.isprintable()):
            raise InvalidCommand("outcome", f"must be 1 to {MAX_OUTCOME_LENGTH} printable characters")
        within("odds", command.odds, MIN_ODDS, MAX_ODDS)
        stake = within("stake_minor", command.stake_minor, 1, self._config.max_amount_minor)
        reserve = reserve_of(command.side, command.odds, stake)
        refusal = await self._matches.refusal(command.match_id, outcome)
        if refusal is None and reserve > self._config.max_amount_minor:
            refusal = Outcome.LIMIT_EXCEEDED
        return await self._post(
            Posting(
                user_id,
                key,
                EntryType.DEBIT,
                -reserve,
                Contra.ESCROW,
                match_id=command.match_id,
                bet_id=uuid7(),
                outcome=outcome,
                side=command.side.value,
                odds=command.odds,
                stake=stake,
                refusal=refusal.value if refusal else None,
                command=_encode(
                    {
                        "op": "bet",
                        "match_id": command.match_id,
                        "outcome": outcome,
                        "side": command.side,
                        "odds": command.odds,
                        "stake_minor": stake,
                    }
                ),
            )
        )

    async def cancel(self, user_id: int, key: str, bet_id: UUID) -> Cancelled:
        """Cancel what of a bet is not matched yet."""
        row = await self._store.fetchrow(self._store.server_of(user_id), "bet", shard_of(user_id), user_id, bet_id)
        if row is None:
            return Cancelled(Outcome.UNKNOWN_BET, replayed=False, bet_id=bet_id)
        return _cancelled(await exchange.cancel_bet(self._store, row["match_id"], bet_id, user_id, key))

    async def _post(self, posting: Posting) -> Posted:
        return await self._writers[self._store.server_of(posting.user_id)].post(posting)

    # -- match commands --------------------------------------------------------------------------------

    async def create_match(self, command: CreateMatch) -> Moved:
        """Open a match."""
        within("closes_at_ms", command.closes_at_ms, 1, MAX_CLOSES_AT_MS)
        outcomes = command.outcomes
        within("outcomes", len(outcomes), 2, MAX_OUTCOMES)
        if len(set(outcomes)) != len(outcomes):
            raise InvalidCommand("outcomes", "must be different from each other")
        for outcome in outcomes:
            within("outcomes", len(outcome), 1, MAX_OUTCOME_LENGTH)
            storable("outcomes", outcome)
        return self._moved(command.match_id, await exchange.create_match(self._store, command))

    async def close_match(self, match_id: UUID) -> Moved:
        """Take no more bets on a match."""
        return await self._move(match_id, MatchState.CLOSED, None)

    async def settle_match(self, match_id: UUID, command: SettleMatch) -> Moved:
        """Settle a closed match by its result."""
        storable("result", command.result)
        return await self._move(match_id, MatchState.SETTLING, command.result)

    async def void_match(self, match_id: UUID) -> Moved:
        """Call a match off: every reserve goes back."""
        return await self._move(match_id, MatchState.VOID, None)

    async def _move(self, match_id: UUID, to: MatchState, result: str | None) -> Moved:
        return self._moved(match_id, await exchange.transition_match(self._store, match_id, to, result))

    def _moved(self, match_id: UUID, done: asyncpg.Record) -> Moved:
        self._matches.forget(match_id)
        status = done["status"]
        if status == Outcome.REPLAYED:
            return Moved(Outcome.ACCEPTED, replayed=True, match_id=match_id, state=done["state"])
        return Moved(status, replayed=False, match_id=match_id, state=done["state"], differs=done["field"])


def _cancelled(done: asyncpg.Record) -> Cancelled:
    status, bet_id = done["status"], done["bet"]
    if status == Outcome.REPLAYED_DIFFERENTLY:
        return Cancelled(status, replayed=True, bet_id=bet_id, differs="bet_id")
    replayed = status == Outcome.REPLAYED
    outcome = Outcome.ACCEPTED if replayed else status
    return Cancelled(outcome, replayed, bet_id, done["cancelled_stake"], done["refund"])


async def gathered(posts: Sequence[asyncio.Future[Posted]]) -> list[Posted | LedgerError]:
    """Wait for several answers; a failed one fails none of the others."""
    answers = await asyncio.gather(*posts, return_exceptions=True)
    found: list[Posted | LedgerError] = []
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, LedgerError):
            raise answer
        found.append(answer)
    return found


# -- what any door checks before it asks ----------------------------------------------------------------


def checked_user(user_id: int) -> int:
    """Return a wallet's number; InvalidCommand if it cannot be one."""
    return within("user_id", user_id, 1, MAX_USER_ID)


def checked_key(key: str, field: str) -> str:
    """Return a caller's key; InvalidCommand (naming `field`) if it is not 1 to 255 printable ASCII characters."""
    if not 1 <= len(key) <= MAX_KEY_LENGTH or not key.isascii() or not key.isprintable():
        raise InvalidCommand(field, f"must be 1 to {MAX_KEY_LENGTH} printable ASCII characters")
    if key.startswith(RESERVED_KEYS):
        raise InvalidCommand(field, f"keys beginning with {RESERVED_KEYS} belong to the service")
    return key


def within(field: str, value: int, low: int, high: int) -> int:
    """Return `value`; InvalidCommand unless it is `low` to `high`."""
    if not low <= value <= high:
        raise InvalidCommand(field, f"must be {low} to {high}")
    return value


def storable(field: str, text: str) -> None:
    """Refuse what has no place in a name; Postgres text cannot even hold NUL."""
    if not text.isprintable():
        raise InvalidCommand(field, "must be printable")
