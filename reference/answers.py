"""Bodies of the API's answers and of its errors (problem+json, RFC 9457)."""

from uuid import UUID

import msgspec


class CommandAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """An accepted wallet command; a replay repeats the original values with `replayed` true."""

    outcome: str
    user_id: int
    seq: int
    balance_minor: int
    bet_id: UUID | None = None
    replayed: bool = msgspec.field(default_factory=bool)


class CancelAnswer(msgspec.Struct, frozen=True):
    """An accepted cancel; amounts are 0 while the bet has not reached the order book yet."""

    outcome: str
    replayed: bool
    user_id: int
    bet_id: UUID
    cancelled_stake_minor: int
    refund_minor: int


class RollbackAnswer(msgspec.Struct, frozen=True):
    """A rollback that is done. `bet_id` is null if no bet was placed under the key: there never will be one."""

    outcome: str
    replayed: bool
    user_id: int
    key: str
    bet_id: UUID | None
    cancelled_stake_minor: int
    refund_minor: int


class BulkResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one command of a bulk: `status` and the fields are those of the same command sent alone.

    `admitted` is false when it certainly was not done for a reason that may pass: send it again.
    """

    status: int
    outcome: str | None = None
    replayed: bool | None = None
    seq: int | None = None
    balance_minor: int | None = None
    bet_id: UUID | None = None
    cancelled_stake_minor: int | None = None
    refund_minor: int | None = None
    title: str | None = None
    detail: str | None = None
    field: str | None = None
    admitted: bool | None = None


class BulkAnswer(msgspec.Struct, frozen=True):
    """One result a command, in the order of the commands."""

    results: list[BulkResult]


class MatchAnswer(msgspec.Struct, frozen=True):
    """An accepted match command."""

    outcome: str
    replayed: bool
    match_id: UUID
    state: str


class ResettleAnswer(msgspec.Struct, frozen=True):
    """An accepted resettle and the settlement version that holds its result."""

    outcome: str
    replayed: bool
    match_id: UUID
    state: str
    settlement_version: int


class MatchView(msgspec.Struct, frozen=True):
    """A match as its home server knows it; `settled` once every payout or refund is posted."""

    match_id: UUID
    state: str
    outcomes: list[str]
    closes_at_ms: int
    settlement_version: int
    result: str | None
    settled: bool


class BetView(msgspec.Struct, frozen=True):
    """A bet and how far it got in the order book; PENDING until the matcher has seen it."""

    bet_id: UUID
    match_id: UUID
    outcome: str
    side: str
    odds: int
    stake_minor: int
    reserve_minor: int
    state: str
    matched_stake_minor: int
    cancelled_stake_minor: int
    placed_at_ms: int


class BetsView(msgspec.Struct, frozen=True):
    """A page of a wallet's bets, newest first; `next_cursor` is null at the end."""

    bets: list[BetView]
    next_cursor: str | None


class MatchesView(msgspec.Struct, frozen=True):
    """A page of matches, newest first; `next_cursor` is null at the end."""

    matches: list[MatchView]
    next_cursor: str | None


class Level(msgspec.Struct, frozen=True):
    """Everything unmatched at one price."""

    odds: int
    stake_minor: int
    bets: int


class OutcomeBook(msgspec.Struct, frozen=True):
    """The unmatched bets on one outcome, best price first: BACKs from low odds, LAYs from high odds."""

    outcome: str
    back: list[Level]
    lay: list[Level]


class BookView(msgspec.Struct, frozen=True):
    """The best levels of a match's order book, at most `as_of_ms` old."""

    match_id: UUID
    as_of_ms: int
    outcomes: list[OutcomeBook]


class StatsView(msgspec.Struct, frozen=True):
    """Sums over a wallet's entries 1 … `seq`; `complete` is false while later entries are still to be added.

    `open_bets` counts the bets not yet settled, voided or cancelled among the newest `open_bets_of` bets.
    """

    user_id: int
    seq: int
    complete: bool
    deposits: int
    deposited_minor: int
    withdrawals: int
    withdrawn_minor: int
    bets: int
    staked_minor: int
    payouts: int
    won_minor: int
    refunds: int
    refunded_minor: int
    commission_minor: int
    open_bets: int
    open_bets_of: int


class BalanceView(msgspec.Struct, frozen=True):
    """A balance, after which entry it holds, where it was read and whether it may be behind.

    `updated_at_ms` is when the entry was written; nothing committed before `as_of_ms` is missing. `stale`: that is
    more than half a second ago, or the balance is behind `min_seq`.
    """

    user_id: int
    balance_minor: int
    seq: int
    source: str
    stale: bool
    updated_at_ms: int
    as_of_ms: int


class EntryView(msgspec.Struct, frozen=True):
    """One entry of a wallet."""

    seq: int
    type: str
    amount_minor: int
    balance_minor: int
    contra: str
    match_id: UUID | None
    bet_id: UUID | None
    key: str
    created_at_ms: int


class EntriesView(msgspec.Struct, frozen=True):
    """A page of entries in order of `seq`, or newest first; `next_cursor` is null at the end."""

    entries: list[EntryView]
    next_cursor: str | None


class BalanceEvent(msgspec.Struct, frozen=True):
    """What an event stream sends: the balance after the entry `seq`, which was written at `updated_at_ms`."""

    user_id: int
    seq: int
    balance_minor: int
    updated_at_ms: int


class AdvanceView(msgspec.Struct, frozen=True):
    """What the house advanced on one bet, because its wallet had spent what a correction took back."""

    match_id: UUID
    bet_id: UUID
    owed_minor: int


class AdvancesView(msgspec.Struct, frozen=True):
    """All that a wallet owes the house; it is got back only from what later corrections pay the same bets."""

    owed_minor: int
    bets: list[AdvanceView]


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request was not accepted. `outcome` is set for refusals, `field` for the part at fault."""

    type: str
    title: str
    status: int
    detail: str
    outcome: str | None = None
    field: str | None = None
    replayed: bool | None = None
