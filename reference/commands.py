"""The vocabulary of the service: outcomes, sides, states and the commands a caller can give.

Amounts are `int` minor units (cents). Odds are hundredths (250 is 2.50). Ids are UUIDs or the
caller's own `user_id` (1 … 2⁶³−1).
"""

from enum import StrEnum
from uuid import UUID

import msgspec

MAX_USER_ID = 2**63 - 1
MAX_AMOUNT_MINOR = 10**12
"""Largest amount of one command: 10 billion units of money. Sums of 9 million such stay in BIGINT."""
MIN_ODDS = 101
MAX_ODDS = 100_000
MAX_KEY_LENGTH = 255
DEFAULT_OUTCOMES = ("HOME", "DRAW", "AWAY")


class Outcome(StrEnum):
    """What became of a command. A refusal is an answer: it is stored under the key and final."""

    ACCEPTED = "ACCEPTED"
    REPLAYED = "REPLAYED"
    REPLAYED_DIFFERENTLY = "REPLAYED_DIFFERENTLY"
    INSUFFICIENT_FUNDS = "INSUFFICIENT_FUNDS"
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    UNKNOWN_MATCH = "UNKNOWN_MATCH"
    UNKNOWN_OUTCOME = "UNKNOWN_OUTCOME"
    MATCH_CLOSED = "MATCH_CLOSED"
    UNKNOWN_BET = "UNKNOWN_BET"
    NOTHING_TO_CANCEL = "NOTHING_TO_CANCEL"
    ILLEGAL_TRANSITION = "ILLEGAL_TRANSITION"
    ROLLED_BACK = "ROLLED_BACK"
    """The bet's key was rolled back before the bet arrived: there never will be such a bet."""


class EntryType(StrEnum):
    """The seed's entry types."""

    CREDIT = "CREDIT"
    DEBIT = "DEBIT"
    REFUND = "REFUND"
    PAYOUT = "PAYOUT"


class Contra(StrEnum):
    """The account on the other side of an entry. ESCROW is one account per match."""

    EXTERNAL = "EXTERNAL"
    ESCROW = "ESCROW"
    HOUSE = "HOUSE"


class Side(StrEnum):
    """BACK bets that the outcome happens, LAY that it does not."""

    BACK = "BACK"
    LAY = "LAY"


class MatchState(StrEnum):
    """OPEN → CLOSED → SETTLING → SETTLED, or OPEN | CLOSED → VOID; a resettle: SETTLED | VOID → SETTLING again."""

    OPEN = "OPEN"
    CLOSED = "CLOSED"
    SETTLING = "SETTLING"
    SETTLED = "SETTLED"
    VOID = "VOID"


class BetState(StrEnum):
    """State of a bet in the order book of its match's home server."""

    PENDING = "PENDING"
    PART_MATCHED = "PART_MATCHED"
    MATCHED = "MATCHED"
    CANCELLED = "CANCELLED"
    SETTLED = "SETTLED"
    VOID = "VOID"


class EventType(StrEnum):
    """Events of the outbox; `TOPIC_OF` says where each goes."""

    BET_CREATED = "BetCreated"
    BET_MATCHED = "BetMatched"
    BET_CANCELLED = "BetCancelled"
    MATCH_SETTLED = "MatchSettled"
    ENTRY_POSTED = "EntryPosted"


TOPIC_OF: dict[str, str] = {
    EventType.BET_CREATED: "bet.created",
    EventType.BET_MATCHED: "bet.matched",
    EventType.BET_CANCELLED: "bet.matched",
    EventType.MATCH_SETTLED: "match.settled",
    EventType.ENTRY_POSTED: "wallet.posted",
}
"""The topic of each event type. Topics are the seed's names; `events.dlq` takes poison messages."""

DLQ_TOPIC = "events.dlq"

BALANCE_TOPIC = "user.balance.updated"
"""Where the projector says what a wallet's balance has become; key and order by user."""


class Deposit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Money from outside into a wallet: one CREDIT against EXTERNAL."""

    amount_minor: int


class Withdraw(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Money out of a wallet: one DEBIT against EXTERNAL."""

    amount_minor: int


class PlaceBet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A limit order: reserves stake (BACK) or liability (LAY) by one DEBIT into the match's escrow."""

    match_id: UUID
    outcome: str
    side: Side
    odds: int
    stake_minor: int


class CreateMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A new match, OPEN until `closes_at_ms` (Unix milliseconds) or an explicit close."""

    match_id: UUID
    closes_at_ms: int
    outcomes: tuple[str, ...] = DEFAULT_OUTCOMES


class SettleMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of a CLOSED match: the one outcome that happened."""

    result: str


class ResettleMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another result for a match that is settled or void; null makes it void."""

    result: str | None
    corrects_version: int | None = None
    """The settlement version to correct; refused if it is not the present one any more."""


class Rollback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Take the bet placed under `key` back: its unmatched part if it stands, and for good if it is yet to come."""

    key: str


BULK_MAX = 1000
"""Commands of one bulk at most."""


class BulkBet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="bet"):
    """A bet inside a bulk."""

    user_id: int
    key: str
    match_id: UUID
    outcome: str
    side: Side
    odds: int
    stake_minor: int


class BulkDeposit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="deposit"):
    """A deposit inside a bulk."""

    user_id: int
    key: str
    amount_minor: int


class BulkWithdraw(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="withdraw"):
    """A withdrawal inside a bulk."""

    user_id: int
    key: str
    amount_minor: int


class BulkCancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="cancel"):
    """A cancel inside a bulk."""

    user_id: int
    key: str
    bet_id: UUID


BulkCommand = BulkBet | BulkDeposit | BulkWithdraw | BulkCancel


class Bulk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Up to BULK_MAX commands; each has its own wallet, key and outcome, and none depends on another's."""

    commands: list[BulkCommand]
