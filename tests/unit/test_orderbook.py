"""The order book pairs by price, then arrival, at the resting order's odds, and never within one wallet."""

from uuid import UUID

import pytest

from reference.commands import BetState, Side
from reference.ledger import reserve_of
from reference.orderbook import Book, Order

MATCH = UUID(int=1)


class Desk:
    """A book and the queue in front of it: every order placed through it gets the next arrival."""

    def __init__(self) -> None:
        self.book = Book(MATCH)
        self.arrivals = 0

    def order(self, user_id: int, side: Side, odds: int, stake: int, outcome: str = "HOME") -> Order:
        self.arrivals += 1
        reserve = reserve_of(side, odds, stake)
        bet_id = UUID(int=1000 + self.arrivals)
        return Order(bet_id, MATCH, user_id, outcome, side, odds, stake, reserve, self.arrivals)

    def place(self, user_id: int, side: Side, odds: int, stake: int, outcome: str = "HOME") -> Order:
        order = self.order(user_id, side, odds, stake, outcome)
        self.fills = self.book.place(order)
        return order


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_back_takes_the_lay_with_the_highest_odds_first(desk: Desk) -> None:
    desk.place(1, Side.LAY, 210, 100)
    best = desk.place(2, Side.LAY, 250, 100)
    desk.place(3, Side.LAY, 230, 100)
    desk.place(4, Side.BACK, 200, 100)
    assert [(fill.lay, fill.odds) for fill in desk.fills] == [(best, 250)]


def test_lay_takes_the_back_with_the_lowest_odds_first(desk: Desk) -> None:
    desk.place(1, Side.BACK, 210, 100)
    best = desk.place(2, Side.BACK, 180, 100)
    desk.place(3, Side.BACK, 190, 100)
    desk.place(4, Side.LAY, 220, 100)
    assert [(fill.back, fill.odds) for fill in desk.fills] == [(best, 180)]


@pytest.mark.parametrize("side", Side)
def test_at_equal_odds_the_earlier_arrival_trades_first(desk: Desk, side: Side) -> None:
    other = Side.LAY if side is Side.BACK else Side.BACK
    first, second, third = (desk.place(user, other, 200, 10) for user in (1, 2, 3))
    desk.place(9, side, 200, 25)
    traded = [(fill.back if fill.lay.user_id == 9 else fill.lay, fill.stake) for fill in desk.fills]
    assert traded == [(first, 10), (second, 10), (third, 5)]
    assert third.state is BetState.PART_MATCHED


def test_an_order_keeps_its_priority_after_a_partial_fill(desk: Desk) -> None:
    first = desk.place(1, Side.LAY, 200, 100)
    desk.place(2, Side.LAY, 200, 100)
    desk.place(3, Side.BACK, 200, 30)
    desk.place(4, Side.BACK, 200, 70)
    assert [fill.lay for fill in desk.fills] == [first]
    assert first.state is BetState.MATCHED


def test_backs_above_every_lay_wait(desk: Desk) -> None:
    lay = desk.place(1, Side.LAY, 200, 100)
    back = desk.place(2, Side.BACK, 201, 100)
    assert desk.fills == []
    assert (lay.state, back.state) == (BetState.PENDING, BetState.PENDING)
    assert len(desk.book) == 2


def test_outcomes_do_not_meet(desk: Desk) -> None:
    desk.place(1, Side.LAY, 300, 100, "HOME")
    desk.place(2, Side.BACK, 200, 100, "AWAY")
    assert desk.fills == []


def test_what_is_left_of_an_incoming_order_rests_at_its_own_odds(desk: Desk) -> None:
    desk.place(1, Side.LAY, 250, 40)
    back = desk.place(2, Side.BACK, 200, 100)
    assert back.state is BetState.PART_MATCHED
    assert desk.book.open_orders("HOME", Side.BACK) == [back]
    desk.place(3, Side.LAY, 260, 60)
    assert [(fill.odds, fill.stake) for fill in desk.fills] == [(200, 60)]
    assert len(desk.book) == 0


def test_own_orders_are_passed_over_and_stay(desk: Desk) -> None:
    own = desk.place(7, Side.LAY, 250, 100)
    other = desk.place(8, Side.LAY, 240, 100)
    desk.place(7, Side.BACK, 200, 100)
    assert [fill.lay for fill in desk.fills] == [other]
    assert desk.book.open_orders("HOME", Side.LAY) == [own]
    desk.place(9, Side.BACK, 200, 10)
    assert [fill.lay for fill in desk.fills] == [own]


def test_cancel_keeps_what_was_matched_and_refunds_the_rest(desk: Desk) -> None:
    lay = desk.place(1, Side.LAY, 300, 100)
    desk.place(2, Side.BACK, 250, 30)
    assert desk.book.cancel(lay.bet_id) is lay
    assert (lay.matched_stake, lay.cancelled_stake, lay.cancel_refund) == (30, 70, 140)
    assert (lay.state, lay.cancel_reason) == (BetState.MATCHED, "REQUESTED")
    desk.place(3, Side.BACK, 250, 30)
    assert desk.fills == []


def test_a_bet_can_be_cancelled_once(desk: Desk) -> None:
    back = desk.place(1, Side.BACK, 200, 50)
    assert desk.book.cancel(back.bet_id) is back
    assert desk.book.cancel(back.bet_id) is None
    assert back.cancel_refund == 50
    with pytest.raises(ValueError, match="nothing left"):
        back.cancel_rest("REQUESTED")


def test_a_matched_bet_cannot_be_cancelled(desk: Desk) -> None:
    lay = desk.place(1, Side.LAY, 200, 50)
    desk.place(2, Side.BACK, 200, 50)
    assert desk.book.cancel(lay.bet_id) is None


def test_a_late_order_gets_its_whole_reserve_back(desk: Desk) -> None:
    late = desk.order(1, Side.LAY, 333, 7)
    assert late.reserve == 17
    assert late.cancel_rest("LATE") == 17
    assert (late.state, late.cancelled_stake, late.cancel_reason) == (BetState.CANCELLED, 7, "LATE")


def test_small_fills_do_not_take_more_than_the_lay_reserved(desk: Desk) -> None:
    # Each fill of 1 at 1.01 is worth 0.01: rounded up a fill at a time, 10 of them would cost 10 times the
    # reserve of 1.
    lay = desk.place(1, Side.LAY, 101, 10)
    for user in range(2, 12):
        desk.place(user, Side.BACK, 101, 1)
    assert (lay.reserve, lay.matched_liability, lay.winnings) == (1, 1, 0)


def test_a_reloaded_book_rounds_on_from_where_it_was(desk: Desk) -> None:
    lay = desk.place(1, Side.LAY, 133, 10)
    desk.place(2, Side.BACK, 133, 1)
    assert (lay.matched_liability, lay.liability_hundredths) == (1, 33)
    reloaded = Book(MATCH, desk.book.fill_count, [lay])
    desk.book = reloaded
    desk.place(3, Side.BACK, 133, 2)
    assert [(fill.fill_no, fill.liability) for fill in desk.fills] == [(2, 0)]
    desk.place(4, Side.BACK, 133, 1)
    assert [(fill.fill_no, fill.liability) for fill in desk.fills] == [(3, 1)]


def test_a_refreshed_order_keeps_its_place_or_leaves(desk: Desk) -> None:
    first, second = (desk.place(user, Side.LAY, 200, 100) for user in (1, 2))
    traded = Order(*(getattr(first, name) for name in first.__struct_fields__))
    traded.matched_stake, traded.matched_liability = 60, 60
    desk.book.refresh(traded)
    assert desk.book.open_orders("HOME", Side.LAY) == [traded, second]
    traded = Order(*(getattr(second, name) for name in second.__struct_fields__))
    traded.cancel_rest("REQUESTED")
    desk.book.refresh(traded)
    desk.place(3, Side.BACK, 200, 100)
    assert [(fill.lay.bet_id, fill.stake) for fill in desk.fills] == [(first.bet_id, 40)]
    gone = desk.order(4, Side.LAY, 200, 10)
    gone.cancel_rest("LATE")
    desk.book.refresh(gone)
    assert desk.book.open_orders("HOME", Side.LAY) == []


def test_the_book_refuses_what_does_not_belong_into_it(desk: Desk) -> None:
    order = desk.place(1, Side.BACK, 200, 10)
    with pytest.raises(ValueError, match="already"):
        desk.book.place(order)
    with pytest.raises(ValueError, match="belongs to match"):
        Book(UUID(int=2)).place(order)
    desk.book.cancel(order.bet_id)
    with pytest.raises(ValueError, match="not open"):
        Book(MATCH, 0, [order])
