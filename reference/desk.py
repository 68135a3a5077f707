"""The commands as plain functions: decoded values in, an answer out, whichever door they came through.

Nothing here knows HTTP or gRPC. A refusal is an answer (`outcome`); what is raised is a LedgerError whose
`definite` says whether the command certainly did not happen.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import asyncpg

from reference import exchange
from reference.commands import (
    MAX_KEY_LENGTH,
    MAX_ODDS,
    MAX_USER_ID,
    MIN_ODDS,
    BulkBet,
    BulkCancel,
    BulkCommand,
    BulkDeposit,
    BulkWithdraw,
    Contra,
    CreateMatch,
    Deposit,
    EntryType,
    MatchState,
    Outcome,
    PlaceBet,
    ResettleMatch,
    Rollback,
    SettleMatch,
    Withdraw,
)
from reference.config import ServiceConfig
from reference.errors import InvalidCommand, LedgerError, ShardNotHere
from reference.failpoints import hit_async
from reference.ledger import reserve_of
from reference.store import Store
from reference.tracing import CURRENT
from reference.uuid7 import uuid7
from reference.writer import Posted, Posting, Writer

RESERVED_KEYS = "ledger:"
"""Keys of the service itself (payouts, refunds) begin with this; a caller's key may not."""
MAX_OUTCOMES = 64
MAX_OUTCOME_LENGTH = 32
MAX_CLOSES_AT_MS = 253_402_300_799_000
MAX_SETTLEMENT_VERSION = 2**15 - 1

CANCELS_AT_ONCE = 4
"""Cancels of one bulk under way at once: as many as the pool of one server has connections."""

_Refusals = dict[tuple[UUID, str], Outcome | LedgerError | None]
_PENDING = AssertionError("a command of a bulk was left without an answer")


@dataclass(slots=True, frozen=True)
class Cancelled:
    """The answer to a cancel or a rollback; amounts are 0 while the bet has not reached the order book."""

    outcome: str
    replayed: bool
    bet_id: UUID | None
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
    settlement_version: int | None = None
    """Of a resettle: the version that has its result."""


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
        return await self._post(self._transfer(user_id, key, command.amount_minor, deposit=True))

    async def withdraw(self, user_id: int, key: str, command: Withdraw) -> Posted:
        """Take money out of a wallet."""
        return await self._post(self._transfer(user_id, key, command.amount_minor, deposit=False))

    async def place_bet(self, user_id: int, key: str, command: PlaceBet | BulkBet) -> Posted:
        """Reserve a bet's stake or liability and put it into the outbox for the matcher."""
        reserve = self._reserve(command)
        refusal = await self._matches.refusal(command.match_id, command.outcome)
        await hit_async("desk.after_check_before_submit")
        return await self._post(self._bet(user_id, key, command, reserve, refusal))

    def _reserve(self, command: PlaceBet | BulkBet) -> int:
        """Return what a bet reserves. Raises InvalidCommand for what no match could take."""
        outcome = command.outcome
        # Also a refused bet is stored: a text that Postgres cannot hold would fail the whole batch it is in.
        if not (0 < len(outcome) <= MAX_OUTCOME_LENGTH and outcome.isprintable()):
            raise InvalidCommand("outcome", f"must be 1 to {MAX_OUTCOME_LENGTH} printable characters")
        within("odds", command.odds, MIN_ODDS, MAX_ODDS)
        stake = within("stake_minor", command.stake_minor, 1, self._config.max_amount_minor)
        return reserve_of(command.side, command.odds, stake)

    def _bet(
        self, user_id: int, key: str, command: PlaceBet | BulkBet, reserve: int, refusal: Outcome | None
    ) -> Posting:
        if refusal is None and reserve > self._config.max_amount_minor:
            refusal = Outcome.LIMIT_EXCEEDED
        return Posting(
            user_id,
            key,
            EntryType.DEBIT,
            -reserve,
            Contra.ESCROW,
            match_id=command.match_id,
            bet_id=uuid7(),
            outcome=command.outcome,
            side=command.side.value,
            odds=command.odds,
            stake=command.stake_minor,
            refusal=refusal.value if refusal else None,
            traceparent=CURRENT.get(),
        )

    def _transfer(self, user_id: int, key: str, amount_minor: int, *, deposit: bool) -> Posting:
        amount = within("amount_minor", amount_minor, 1, self._config.max_amount_minor)
        return Posting(
            user_id,
            key,
            EntryType.CREDIT if deposit else EntryType.DEBIT,
            amount if deposit else -amount,
            Contra.EXTERNAL,
            traceparent=CURRENT.get(),
        )

    async def cancel(self, user_id: int, key: str, bet_id: UUID) -> Cancelled:
        """Cancel what of a bet is not matched yet."""
        row = await self._store.wallet_row(user_id, "bet", bet_id)
        if row is None:
            return Cancelled(Outcome.UNKNOWN_BET, replayed=False, bet_id=bet_id)
        return _cancelled(await exchange.cancel_bet(self._store, row["match_id"], bet_id, user_id, key))

    async def rollback(self, user_id: int, command: Rollback) -> Cancelled:
        """Take back the bet placed under a key; if there is none yet, make sure that there never will be.

        The rollback's identity is that key: a second one gets the answer of the first. `bet_id` is None when no
        bet was placed.
        """
        key = checked_key(command.key, "key")
        row = await self._store.at_wallet(
            user_id, lambda server: self._store.fetchrow(server, "rollback", user_id, key)
        )
        if row is None:
            raise LedgerError("the rollback returned no row")
        status = row["status"]
        if status == Outcome.REPLAYED_DIFFERENTLY:
            return Cancelled(status, replayed=True, bet_id=None, differs="op")
        if status == "PLACED":
            # The key of this cancel is the service's own, so no cancel of a caller can have taken it.
            own_key = f"{RESERVED_KEYS}rollback:{key}"
            return _cancelled(await exchange.cancel_bet(self._store, row["match"], row["bet"], user_id, own_key))
        return Cancelled(Outcome.ACCEPTED, replayed=status == Outcome.REPLAYED, bet_id=None)

    async def _post(self, posting: Posting) -> Posted:
        try:
            return await self._submit(posting)
        except ShardNotHere:
            return await self._post_elsewhere(posting)

    async def _post_elsewhere(self, posting: Posting) -> Posted:
        """Post a command whose shard was not where it was thought to be, or wait while it is being moved."""
        return await self._store.at_wallet(posting.user_id, lambda server: self._writers[server].post(posting))

    def _submit(self, posting: Posting) -> asyncio.Future[Posted]:
        return self._writers[self._store.server_of(posting.user_id)].submit(posting)

    # -- many at once ----------------------------------------------------------------------------------

    async def bulk(self, commands: Sequence[BulkCommand | LedgerError]) -> list[Posted | Cancelled | Exception]:
        """Do many commands and return what became of each, in order; what came as an error stays that error.

        They reach the writers in their order, so commands of one wallet and repeated keys behave as if they were
        sent one after the other; cancels go to other servers and run beside the rest.
        """
        refusals = await self._refusals({(c.match_id, c.outcome) for c in commands if isinstance(c, BulkBet)})
        found: list[Posted | Cancelled | Exception] = []
        posts: list[tuple[int, Posting, asyncio.Future[Posted]]] = []
        cancels: dict[int, list[tuple[int, BulkCancel]]] = {}
        for number, command in enumerate(commands):
            found.append(_PENDING)
            try:
                if isinstance(command, LedgerError):
                    raise command
                checked_user(command.user_id)
                checked_key(command.key, "key")
                if isinstance(command, BulkCancel):
                    cancels.setdefault(command.user_id, []).append((number, command))
                else:
                    posting = self._posting(command, refusals)
                    posts.append((number, posting, self._submit(posting)))
            except LedgerError as error:
                found[number] = error
        cancelling = asyncio.gather(*(self._cancel_each(turn, found) for turn in _turns(cancels, CANCELS_AT_ONCE)))
        await hit_async("desk.after_bulk_submit_before_answers")
        for number, posting, post in posts:
            try:
                try:
                    found[number] = await post
                except ShardNotHere:
                    found[number] = await self._post_elsewhere(posting)
            except LedgerError as error:
                found[number] = error
        await cancelling
        return found

    def _posting(self, command: BulkBet | BulkDeposit | BulkWithdraw, refusals: _Refusals) -> Posting:
        if isinstance(command, BulkBet):
            reserve = self._reserve(command)
            refusal = refusals[command.match_id, command.outcome]
            if isinstance(refusal, LedgerError):
                raise refusal
            return self._bet(command.user_id, command.key, command, reserve, refusal)
        deposit = isinstance(command, BulkDeposit)
        return self._transfer(command.user_id, command.key, command.amount_minor, deposit=deposit)

    async def _refusals(self, wanted: set[tuple[UUID, str]]) -> _Refusals:
        """Ask once for every match and outcome of a bulk whether it takes bets."""
        asked = list(wanted)
        answers = await asyncio.gather(*(self._matches.refusal(*pair) for pair in asked), return_exceptions=True)
        refusals: _Refusals = {}
        for pair, answer in zip(asked, answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, LedgerError):
                raise answer
            refusals[pair] = answer
        return refusals

    async def _cancel_each(
        self, commands: Sequence[tuple[int, BulkCancel]], found: list[Posted | Cancelled | Exception]
    ) -> None:
        for number, command in commands:
            try:
                found[number] = await self.cancel(command.user_id, command.key, command.bet_id)
            except LedgerError as error:
                found[number] = error

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

    async def resettle_match(self, match_id: UUID, key: str, command: ResettleMatch) -> Moved:
        """Settle a settled or void match again with another result; the answer names the version that has it."""
        if command.result is not None:
            storable("result", command.result)
        if command.corrects_version is not None:
            within("corrects_version", command.corrects_version, 1, MAX_SETTLEMENT_VERSION)
        done = await exchange.resettle_match(self._store, match_id, command, key)
        await hit_async("desk.after_transition_before_forget")
        return replace(self._moved(match_id, done), settlement_version=done["version"])

    async def _move(self, match_id: UUID, to: MatchState, result: str | None) -> Moved:
        done = await exchange.transition_match(self._store, match_id, to, result)
        await hit_async("desk.after_transition_before_forget")
        return self._moved(match_id, done)

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


def _turns(
    cancels: Mapping[int, list[tuple[int, BulkCancel]]], count: int
) -> Iterable[Sequence[tuple[int, BulkCancel]]]:
    """Divide cancels into `count` queues at most; those of one wallet stay in one queue, in order."""
    queues: list[list[tuple[int, BulkCancel]]] = [[] for _ in range(count)]
    for number, own in enumerate(cancels.values()):
        queues[number % count] += own
    return [queue for queue in queues if queue]


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
