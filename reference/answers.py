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


class MatchAnswer(msgspec.Struct, frozen=True):
    """An accepted match command."""

    outcome: str
    replayed: bool
    match_id: UUID
    state: str


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
    """A page of entries in order of `seq`; pass `next_after_seq` for the next page, null at the end."""

    entries: list[EntryView]
    next_after_seq: int | None


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request was not accepted. `outcome` is set for refusals, `field` for the part at fault."""

    type: str
    title: str
    status: int
    detail: str
    outcome: str | None = None
    field: str | None = None
    replayed: bool | None = None
