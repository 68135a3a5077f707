"""The order book of one match: BACK meets LAY by price, then arrival, at the resting order's odds.

Rules, all in integers (amounts are minor units, odds are hundredths):

- BACK and LAY of one outcome may trade when `back.odds <= lay.odds`. An incoming BACK takes the LAYs with
  the highest odds first, an incoming LAY the BACKs with the lowest odds first; among equal odds the earlier
  arrival goes first.
- A fill trades at the *resting* order's odds, so nobody gets worse odds than asked for.
- Two orders of one wallet never trade with each other. An incoming order passes over its owner's resting
  orders, which stay where they are with their priority; the book of such a wallet may therefore look
  crossed, and that is not an error.
- The lay side's liability is rounded up once over all fills of the order and not once a fill, so that the
  parts never add up to more than was reserved. The backer's winnings are rounded down each fill. What lies
  between goes to the house.

The book does no I/O and holds open orders only; `matcher.py` keeps it equal to the `orders` table.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from uuid import UUID

import msgspec

from reference.commands import BetState, Side


class Order(msgspec.Struct, gc=False):
    """A bet in the book of its match. Fields up to `arrival` never change; the others are its progress."""

    bet_id: UUID
    match_id: UUID
    user_id: int
    outcome: str
    side: Side
    odds: int
    """Limit odds, hundredths."""
    stake: int
    """What the backer of this bet risks, minor units, for both sides."""
    reserve: int
    """What the wallet paid into escrow: the stake (BACK) or the liability at the limit odds, rounded up
    (LAY)."""
    arrival: int
    """Position in the match's queue; unique and increasing within the match."""
    matched_stake: int = 0
    matched_liability: int = 0
    """Sum of `Fill.liability` over this order's fills, whichever side it is on."""
    winnings: int = 0
    """Sum of `Fill.winnings` over this order's fills, whichever side it is on."""
    liability_hundredths: int = 0
    """Exact liability of the fills in hundredths of a minor unit: the state that the rounding needs."""
    cancelled_stake: int = 0
    cancel_refund: int = 0
    cancel_reason: str | None = None

    @property
    def remaining(self) -> int:
        """Stake that can still be matched, minor units."""
        return self.stake - self.matched_stake - self.cancelled_stake

    @property
    def spent(self) -> int:
        """The part of the reserve that the fills have used, minor units."""
        return self.matched_stake if self.side is Side.BACK else self.matched_liability

    @property
    def state(self) -> BetState:
        """State by the order's progress; a cancelled rest leaves MATCHED if anything was matched."""
        if self.remaining:
            return BetState.PART_MATCHED if self.matched_stake else BetState.PENDING
        return BetState.MATCHED if self.matched_stake else BetState.CANCELLED

    def cancel_rest(self, reason: str) -> int:
        """Cancel what is not matched and return the refund, minor units: reserve that no fill used.

        `reason` is REQUESTED or LATE. Raises ValueError when nothing is left to cancel. The refund can be 0
        although stake was cancelled: rounding may have used up the whole reserve of a LAY.
        """
        if self.remaining == 0:
            raise ValueError(f"bet {self.bet_id} has nothing left to cancel")
        self.cancelled_stake = self.remaining
        self.cancel_refund = self.reserve - self.spent
        self.cancel_reason = reason
        return self.cancel_refund


class Fill(msgspec.Struct, frozen=True):
    """One trade between a BACK and a LAY."""

    fill_no: int
    """1, 2, 3 … within the match."""
    back: Order
    lay: Order
    odds: int
    """Odds of the resting order, hundredths."""
    stake: int
    liability: int
    """What the lay side adds to the pot, minor units; the winner's payout of this fill is stake +
    liability."""
    winnings: int
    """What the backer wins on top of the stake, before commission, minor units; at most `liability`."""


ARRIVALS = 2**44
"""More than a match can have arrivals: what separates price and arrival in a rank."""

Rank = int
"""Sort key of a resting order within its side; the order to take first has the greatest rank. One number and not a
pair: a deep book has as many of them as orders."""


def rank_of(order: Order) -> Rank:
    """Return the rank: BACKs with low odds first, LAYs with high odds first, then the earlier arrival."""
    price = -order.odds if order.side is Side.BACK else order.odds
    return price * ARRIVALS - order.arrival


def _arrival_of(rank: Rank) -> int:
    return -rank % ARRIVALS


def _trade(fill_no: int, incoming: Order, resting: Order) -> Fill:
    stake = min(incoming.remaining, resting.remaining)
    back, lay = (incoming, resting) if incoming.side is Side.BACK else (resting, incoming)
    profit_hundredths = stake * (resting.odds - 100)
    before = -(-lay.liability_hundredths // 100)
    after = -(-(lay.liability_hundredths + profit_hundredths) // 100)
    fill = Fill(fill_no, back, lay, resting.odds, stake, after - before, profit_hundredths // 100)
    for order in (back, lay):
        order.matched_stake += stake
        order.matched_liability += fill.liability
        order.winnings += fill.winnings
        order.liability_hundredths += profit_hundredths
    return fill


class Book:
    """Open orders of one match, all outcomes.

    Each side of each outcome is a sorted list whose last item trades next: taking the best is O(1), placing
    and cancelling are a binary search and one `memmove`.
    """

    def __init__(self, match_id: UUID, fill_count: int = 0, orders: Iterable[Order] = ()) -> None:
        """Start with the match's number of fills so far and its open orders, in any order."""
        self.match_id = match_id
        self.fill_count = fill_count
        self._sides: dict[tuple[str, Side], list[Rank]] = {}
        self._at_arrival: dict[int, Order] = {}
        self._names: dict[str, str] = {}
        for order in orders:
            if order.remaining <= 0:
                raise ValueError(f"bet {order.bet_id} is not open")
            self._sides.setdefault((order.outcome, order.side), []).append(rank_of(order))
            self._remember(order)
        for resting in self._sides.values():
            resting.sort()

    def __len__(self) -> int:
        return len(self._at_arrival)

    def open_orders(self, outcome: str, side: Side) -> list[Order]:
        """Return one side's open orders, the one that trades next first."""
        return [self._at_arrival[_arrival_of(rank)] for rank in reversed(self._sides.get((outcome, side), []))]

    def place(self, order: Order) -> list[Fill]:
        """Trade an arriving order, put what is left of it into the book, and return the fills.

        The orders of the returned fills are already updated. Cost grows with the number of fills and of the
        owner's own resting orders that are passed over. Raises ValueError if its arrival is in the book already.
        """
        if order.match_id != self.match_id:
            raise ValueError(f"bet {order.bet_id} belongs to match {order.match_id}, not {self.match_id}")
        if order.arrival in self._at_arrival:
            raise ValueError(f"arrival {order.arrival} of bet {order.bet_id} is in the book already")
        opposite = Side.LAY if order.side is Side.BACK else Side.BACK
        resting = self._sides.get((order.outcome, opposite), [])
        fills: list[Fill] = []
        position = len(resting) - 1
        while order.remaining and position >= 0:
            candidate = self._at_arrival[_arrival_of(resting[position])]
            back, lay = (order, candidate) if order.side is Side.BACK else (candidate, order)
            if back.odds > lay.odds:
                break
            if candidate.user_id != order.user_id:
                self.fill_count += 1
                fills.append(_trade(self.fill_count, order, candidate))
                if not candidate.remaining:
                    del resting[position]
                    self._forget(candidate)
            position -= 1
        if order.remaining:
            self._rest(order)
        return fills

    def cancel(self, bet_id: UUID) -> Order | None:
        """Take a bet's order out of the book and cancel its rest; None if the bet is not in the book.

        It looks through the whole book: the service cancels in the table and then tells the book (`refresh`).
        """
        order = next((order for order in self._at_arrival.values() if order.bet_id == bet_id), None)
        if order is None:
            return None
        self._withdraw(order)
        order.cancel_rest("REQUESTED")
        return order

    def refresh(self, order: Order) -> None:
        """Take over what somebody else did to an order, given as it is now: placed, traded or cancelled."""
        known = self._at_arrival.get(order.arrival)
        if known is not None and order.remaining:
            # Odds and arrival never change, so neither does the place in the queue.
            self._remember(order)
        elif known is not None:
            self._withdraw(known)
        elif order.remaining:
            self._rest(order)

    def _rest(self, order: Order) -> None:
        insort(self._sides.setdefault((order.outcome, order.side), []), rank_of(order))
        self._remember(order)

    def _withdraw(self, order: Order) -> None:
        resting = self._sides[order.outcome, order.side]
        del resting[bisect_left(resting, rank_of(order))]
        self._forget(order)

    def _remember(self, order: Order) -> None:
        # Each came with an id and a name of its own, a quarter of what it would take in memory.
        order.match_id = self.match_id
        order.outcome = self._names.setdefault(order.outcome, order.outcome)
        self._at_arrival[order.arrival] = order

    def _forget(self, order: Order) -> None:
        del self._at_arrival[order.arrival]
