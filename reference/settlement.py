"""What each bet is paid when its match is settled or void, or when it is cancelled: pure arithmetic.

All of it follows from the bet's row in `orders`; running it again gives the same entries under the same
keys, which is what makes a repeated settlement harmless. Over all bets of a match the entries against
ESCROW add up to exactly what the bets put in:

- Every fill put `stake + liability` into escrow, and exactly one of its two bets takes `stake + liability`
  out.
- Every bet takes out the part of its reserve that no fill used, once: at its cancellation or at settlement.

The house takes, from the winner and never from escrow, the commission on the net winnings (rounded up) and
the residue between the lay side's liability and the backer's winnings (rounded down).
"""

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
