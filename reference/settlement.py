"""What each bet is paid when its match is settled or void, or when it is cancelled: pure arithmetic.

All of it follows from the bet's row in `orders`; running it again gives the same entries under the same
keys, which is what makes a repeated settlement harmless. Over all bets of a match the entries against
ESCROW add up to exactly what the bets put in:

- Every fill put `stake + liability` into escrow, and exactly one of its two bets takes `stake + liability`
  out.
- Every bet takes out the part of its reserve that no fill used, once: at its cancellation or at settlement.

The house takes, from the winner and never from escrow, the commission on the net winnings (rounded up) and
the residue between the lay side's liability and the backer's winnings (rounded down).

A match can be settled again under the next version. Nothing is rewritten: each bet gets the difference between
what the new ruling gives it and what the one before gave it (`correction_of`), so the escrow of the match adds up
to zero after every version. A wallet that has spent what it has to give back is never taken below zero: the house
advances what is lacking, as an entry of its own, and that is what the bet owes until a later version pays it again.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from reference.commands import Contra, EntryType, Side
from reference.orderbook import Order

CANCEL_VERSION = 0
"""The settlement version of a refund for a cancelled or late bet; settlements count from 1."""


class SettlementKind(StrEnum):
    """SETTLE pays by the result; VOID gives every reserve back."""

    SETTLE = "SETTLE"
    VOID = "VOID"


class Ruling(NamedTuple):
    """What one settlement version says of its match; `result` is None for VOID."""

    kind: SettlementKind
    result: str | None


class Entry(NamedTuple):
    """One entry of a wallet to be. `amount` is signed, minor units; `key` makes it post at most once."""

    user_id: int
    type: EntryType
    amount: int
    contra: Contra
    match_id: UUID
    bet_id: UUID
    settlement_version: int
    key: str


def business_key(kind: str, bet_id: UUID, version: int) -> str:
    """Return the idempotency key of a settlement entry; callers' own keys cannot begin with `ledger:`."""
    return f"ledger:{kind}:{bet_id}:{version}"


def _refund(user_id: int, match_id: UUID, bet_id: UUID, amount: int, version: int) -> list[Entry]:
    if amount == 0:
        return []
    if amount < 0:
        raise ValueError(f"bet {bet_id} used {-amount} more than it reserved")
    key = business_key("REFUND", bet_id, version)
    return [Entry(user_id, EntryType.REFUND, amount, Contra.ESCROW, match_id, bet_id, version, key)]


def cancel_entries(user_id: int, match_id: UUID, bet_id: UUID, refund: int) -> list[Entry]:
    """Return the refund of a cancelled or late bet: one entry, or none if `refund` (minor units) is 0."""
    return _refund(user_id, match_id, bet_id, refund, CANCEL_VERSION)


def wins(order: Order, result: str) -> bool:
    """Return whether the matched part of a bet wins: BACK on the result, LAY on any other outcome."""
    return (order.outcome == result) is (order.side is Side.BACK)


def house_share(order: Order, commission_bps: int) -> int:
    """Return what the house takes from a winner, minor units: commission rounded up, and the residue.

    `commission_bps` is in hundredths of a percent of the net winnings: what the bet wins beyond what it
    risked. The residue is what rounding left between the lay side's liability and the backer's winnings.
    """
    if order.side is Side.BACK:
        net, residue = order.winnings, order.matched_liability - order.winnings
    else:
        net, residue = order.matched_stake, 0
    return -(-net * commission_bps // 10_000) + residue


def entries_of(
    order: Order, kind: SettlementKind, result: str | None, version: int, commission_bps: int
) -> list[Entry]:
    """Return what settlement `version` (1, 2, …) of its match posts for one bet, in the order of posting.

    PAYOUT comes before the DEBIT of the house's share, so that the wallet can always pay it. Raises
    ValueError if a SETTLE has no result, or if the row contradicts itself.
    """
    if kind is SettlementKind.VOID:
        return _refund(order.user_id, order.match_id, order.bet_id, order.reserve - order.cancel_refund, version)
    if result is None:
        raise ValueError(f"match {order.match_id} cannot be settled without a result")
    unused = order.reserve - order.spent - order.cancel_refund
    entries = _refund(order.user_id, order.match_id, order.bet_id, unused, version)
    if order.matched_stake and wins(order, result):
        owner = (order.match_id, order.bet_id, version)
        payout = order.matched_stake + order.matched_liability
        key = business_key("PAYOUT", order.bet_id, version)
        entries.append(Entry(order.user_id, EntryType.PAYOUT, payout, Contra.ESCROW, *owner, key))
        house = house_share(order, commission_bps)
        if house:
            key = business_key("COMMISSION", order.bet_id, version)
            entries.append(Entry(order.user_id, EntryType.DEBIT, -house, Contra.HOUSE, *owner, key))
    return entries


def escrow_share(order: Order, ruling: Ruling) -> int:
    """Return what a bet takes out of escrow under a ruling, minor units, not counting its cancelled part.

    It is the sum of the entries against ESCROW that `entries_of` gives for the ruling.
    """
    if ruling.kind is SettlementKind.VOID:
        return order.reserve - order.cancel_refund
    unused = order.reserve - order.spent - order.cancel_refund
    if order.matched_stake and ruling.result is not None and wins(order, ruling.result):
        return unused + order.matched_stake + order.matched_liability
    return unused


def charge(order: Order, ruling: Ruling, commission_bps: int) -> int:
    """Return what the house takes from a bet under a ruling, minor units; 0 unless the bet wins."""
    if ruling.kind is SettlementKind.VOID or ruling.result is None or not order.matched_stake:
        return 0
    return house_share(order, commission_bps) if wins(order, ruling.result) else 0


class Correction(NamedTuple):
    """What a settlement version changes for one bet; amounts in minor units."""

    user_id: int
    match_id: UUID
    bet_id: UUID
    version: int
    escrow: int
    """What the bet takes out of escrow beyond what it has; negative: what it gives back."""
    house: int
    """What the house takes beyond what it has; negative: what it gives back."""
    paid_as: EntryType
    """PAYOUT, or REFUND if the match is void now: the type of an entry that takes more out of escrow."""


def correction_of(order: Order, before: Ruling, after: Ruling, version: int, commission_bps: int) -> Correction | None:
    """Return what settlement `version` (2, 3, …) changes for one bet, or None if that is nothing.

    `before` is the ruling of the version before it. Raises ValueError if the row contradicts itself.
    """
    if min(escrow_share(order, before), escrow_share(order, after)) < 0:
        raise ValueError(f"bet {order.bet_id} used more than it reserved")
    escrow = escrow_share(order, after) - escrow_share(order, before)
    house = charge(order, after, commission_bps) - charge(order, before, commission_bps)
    if escrow == 0 and house == 0:
        return None
    paid_as = EntryType.REFUND if after.kind is SettlementKind.VOID else EntryType.PAYOUT
    return Correction(order.user_id, order.match_id, order.bet_id, version, escrow, house, paid_as)


def correction_entries(correction: Correction, balance: int, owed: int) -> Iterator[Entry]:
    """Yield the entries that make a correction, in the order of posting.

    `balance` is the wallet's before them, `owed` what the house has advanced on this bet and not got back; both
    must be read under the wallet's lock. No balance falls below zero on the way: what the wallet lacks to give
    back, the house advances first. What a bet is paid again goes to the house first, up to what the bet owes.
    """
    match_id, bet_id, version = correction.match_id, correction.bet_id, correction.version

    def entry(kind: str, entry_type: EntryType, amount: int, contra: Contra) -> Entry:
        key = business_key(kind, bet_id, version)
        return Entry(correction.user_id, entry_type, amount, contra, match_id, bet_id, version, key)

    escrow, house = correction.escrow, correction.house
    if house < 0:
        yield entry("COMMISSION_BACK", EntryType.REFUND, -house, Contra.HOUSE)
        balance -= house
    if escrow < 0:
        if balance < -escrow:
            yield entry("ADVANCE", EntryType.CREDIT, -escrow - balance, Contra.HOUSE)
        yield entry("TAKE_BACK", EntryType.DEBIT, escrow, Contra.ESCROW)
    elif escrow > 0:
        yield entry(correction.paid_as.value, correction.paid_as, escrow, Contra.ESCROW)
    taken = max(house, 0)
    if escrow > taken:
        taken += min(owed, escrow - taken)
    if taken:
        yield entry("COMMISSION", EntryType.DEBIT, -taken, Contra.HOUSE)
