"""The order book agrees, step by step, with a slow model that searches all orders and counts in fractions."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from reference.commands import Side
from reference.orderbook import Book, Fill, Order
from tests.depth import depth
from tests.machine.steps import TAKEN

MATCH = UUID(int=1)


@dataclass
class ModelOrder:
    arrival: int
    user_id: int
    outcome: str
    side: str
    odds: int
    open_stake: int
    reserve: int
    exact: Fraction = Fraction(0)
    liability: int = 0
    backed: int = 0


def copied(order: Order) -> Order:
    """The order as it comes back from its row: equal, and another object."""
    return Order(*(getattr(order, name) for name in order.__struct_fields__))


class OrderBookMachine(RuleBasedStateMachine):
    """Places, cancels and reloads in any order."""

    bets = Bundle("bets")

    def __init__(self) -> None:
        super().__init__()
        self.book = Book(MATCH)
        self.follower = Book(MATCH)
        self.orders: dict[int, Order] = {}
        self.unseen: set[int] = set()
        """Arrivals whose changes the follower has not been told of."""
        self.model: dict[int, ModelOrder] = {}

    def expected_fills(self, new: ModelOrder) -> list[tuple[int, int, int, int, int]]:
        """(resting arrival, odds, stake, liability, winnings) in order, by exhaustive search."""
        fills = []
        while new.open_stake:
            resting = [
                order
                for order in self.model.values()
                if order.open_stake
                and order.outcome == new.outcome
                and order.side != new.side
                and order.user_id != new.user_id
                and (order.odds >= new.odds if new.side == "BACK" else order.odds <= new.odds)
            ]
            if not resting:
                break
            sign = -1 if new.side == "BACK" else 1
            best = min(resting, key=lambda order: (sign * order.odds, order.arrival))
            lay = best if new.side == "BACK" else new
            stake = min(best.open_stake, new.open_stake)
            profit = Fraction(stake * (best.odds - 100), 100)
            lay.exact += profit
            liability = ceil(lay.exact) - lay.liability
            lay.liability += liability
            for order in (best, new):
                order.open_stake -= stake
                if order.side == "BACK":
                    order.backed += stake
            fills.append((best.arrival, best.odds, stake, liability, floor(profit)))
        return fills

    @rule(
        target=bets,
        user_id=st.integers(1, 3),
        outcome=st.sampled_from(["HOME", "AWAY"]),
        side=st.sampled_from(["BACK", "LAY"]),
        odds=st.integers(101, 106) | st.integers(195, 205),
        stake=st.integers(1, 12),
    )
    def place(self, user_id: int, outcome: str, side: str, odds: int, stake: int) -> int:
        arrival = len(self.orders) + 1
        reserve = stake if side == "BACK" else ceil(Fraction(stake * (odds - 100), 100))
        order = Order(UUID(int=arrival), MATCH, user_id, outcome, Side(side), odds, stake, reserve, arrival)
        expected = ModelOrder(arrival, user_id, outcome, side, odds, stake, reserve)
        fills = self.book.place(order)

        def seen(fill: Fill) -> tuple[int, int, int, int, int]:
            resting = fill.lay if side == "BACK" else fill.back
            return (resting.arrival, fill.odds, fill.stake, fill.liability, fill.winnings)

        assert [seen(fill) for fill in fills] == self.expected_fills(expected)
        self.unseen.add(arrival)
        for fill in fills:
            # After a reload the book holds other objects than the test does.
            for traded in (fill.back, fill.lay):
                self.orders[traded.arrival] = traded
                self.unseen.add(traded.arrival)
            assert fill.back.odds <= fill.odds <= fill.lay.odds, "nobody gets worse odds than asked for"
            assert fill.back.user_id != fill.lay.user_id
        self.orders[arrival] = order
        self.model[arrival] = expected
        return arrival

    @rule(arrival=bets)
    def cancel(self, arrival: int) -> None:
        model = self.model[arrival]
        cancelled = self.book.cancel(UUID(int=arrival))
        if model.open_stake == 0:
            assert cancelled is None
            return
        assert cancelled is not None
        spent = model.backed if model.side == "BACK" else model.liability
        assert (cancelled.cancelled_stake, cancelled.cancel_refund) == (
            model.open_stake,
            model.reserve - spent,
        )
        model.open_stake = 0
        self.orders[arrival] = cancelled
        self.unseen.add(arrival)

    @rule()
    def reload_from_the_rows(self) -> None:
        self.orders = {arrival: copied(order) for arrival, order in self.orders.items()}
        still_open = [order for order in self.orders.values() if order.remaining]
        self.book = Book(MATCH, self.book.fill_count, reversed(still_open))

    @rule()
    def tell_another_process_what_changed(self) -> None:
        for arrival in sorted(self.unseen, reverse=True):
            self.follower.refresh(copied(self.orders[arrival]))
        self.unseen.clear()
        for outcome in ("HOME", "AWAY"):
            for side in Side:
                assert self.follower.open_orders(outcome, side) == self.book.open_orders(outcome, side)

    @rule()
    def let_the_other_process_take_over(self) -> None:
        self.tell_another_process_what_changed()
        self.follower.fill_count = self.book.fill_count
        self.book, self.follower = self.follower, Book(MATCH)
        for outcome in ("HOME", "AWAY"):
            for side in Side:
                for order in self.book.open_orders(outcome, side):
                    self.orders[order.arrival] = order
        self.unseen = set(self.orders)

    @invariant()
    def the_same_orders_are_open(self) -> None:
        wanted = {arrival: order.open_stake for arrival, order in self.model.items() if order.open_stake}
        seen = {
            order.arrival: order.remaining
            for outcome in ("HOME", "AWAY")
            for side in Side
            for order in self.book.open_orders(outcome, side)
        }
        assert seen == wanted
        assert len(self.book) == len(wanted)

    @invariant()
    def progress_is_within_the_reserve(self) -> None:
        for arrival, order in self.orders.items():
            model = self.model[arrival]
            assert order.spent == (model.backed if model.side == "BACK" else model.liability)
            assert order.spent + order.cancel_refund <= order.reserve

    @invariant()
    def nobody_waits_for_a_trade_that_is_there(self) -> None:
        """What is left in the book cannot trade, unless both orders are of one wallet."""
        for outcome in ("HOME", "AWAY"):
            backs, lays = (self.book.open_orders(outcome, side) for side in (Side.BACK, Side.LAY))
            crossed = [(back, lay) for back in backs for lay in lays if back.odds <= lay.odds]
            assert all(back.user_id == lay.user_id for back, lay in crossed)

    @invariant()
    def what_one_side_matched_the_other_matched_too(self) -> None:
        """Over all orders the fills take as much from backers as from layers, and winnings never exceed liability."""
        backs, lays = ([o for o in self.orders.values() if o.side is side] for side in (Side.BACK, Side.LAY))
        for name in ("matched_stake", "matched_liability", "winnings", "liability_hundredths"):
            assert sum(getattr(order, name) for order in backs) == sum(getattr(order, name) for order in lays)
        for order in self.orders.values():
            assert order.winnings <= order.matched_liability
            assert order.matched_stake + order.cancelled_stake + order.remaining == order.stake
        for lay in lays:
            assert 0 <= 100 * lay.matched_liability - lay.liability_hundredths < 100, "rounded up once, over all fills"

    @invariant()
    def step(self) -> None:
        TAKEN["order book"] += 1


TestOrderBook = OrderBookMachine.TestCase
TestOrderBook.settings = depth(ci=60, nightly=1_500)
