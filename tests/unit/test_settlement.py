"""A settlement pays out exactly what the bets of its match put in, whatever happened in the book."""

from collections import defaultdict
from dataclasses import dataclass
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.commands import Contra, EntryType, Side
from reference.ledger import reserve_of
from reference.orderbook import Book, Fill, Order
from reference.settlement import (
    Entry,
    Ruling,
    SettlementKind,
    cancel_entries,
    correction_entries,
    correction_of,
    entries_of,
    escrow_share,
    house_share,
    wins,
)

MATCH = UUID(int=1)
OUTCOMES = ("HOME", "DRAW", "AWAY")


@dataclass(frozen=True)
class Bet:
    """A bet of a plan: it arrives, perhaps late, and perhaps its owner cancels some earlier bet first."""

    user_id: int
    outcome: str
    side: Side
    odds: int
    stake: int
    late: bool
    cancels: int | None


ODDS = st.one_of(st.integers(101, 110), st.integers(101, 400), st.integers(101, 100_000))
STAKES = st.one_of(st.integers(1, 20), st.integers(1, 10**9))
BETS = st.builds(
    Bet,
    user_id=st.integers(1, 6),
    outcome=st.sampled_from(OUTCOMES),
    side=st.sampled_from(Side),
    odds=ODDS,
    stake=STAKES,
    late=st.sampled_from([False, False, False, True]),
    cancels=st.none() | st.integers(0, 30),
)
HISTORIES = st.lists(BETS, max_size=40)


def play(plan: list[Bet]) -> tuple[list[Order], list[Fill], list[Entry]]:
    """Run a plan through a book; return every order, every fill and the refunds of cancelled bets."""
    book = Book(MATCH)
    orders: list[Order] = []
    fills: list[Fill] = []
    refunds: list[Entry] = []
    for arrival, bet in enumerate(plan, 1):
        if bet.cancels is not None and bet.cancels < len(orders):
            cancelled = book.cancel(orders[bet.cancels].bet_id)
            if cancelled is not None:
                refunds += cancel_entries(cancelled.user_id, MATCH, cancelled.bet_id, cancelled.cancel_refund)
        reserve = reserve_of(bet.side, bet.odds, bet.stake)
        bet_id = UUID(int=100 + arrival)
        order = Order(bet_id, MATCH, bet.user_id, bet.outcome, bet.side, bet.odds, bet.stake, reserve, arrival)
        orders.append(order)
        if bet.late:
            refunds += cancel_entries(bet.user_id, MATCH, order.bet_id, order.cancel_rest("LATE"))
        else:
            fills += book.place(order)
    return orders, fills, refunds


def settle(
    orders: list[Order], kind: SettlementKind, result: str | None, commission_bps: int = 200, version: int = 1
) -> list[Entry]:
    return [entry for order in orders for entry in entries_of(order, kind, result, version, commission_bps)]


def escrow_after(orders: list[Order], entries: list[Entry]) -> int:
    return sum(order.reserve for order in orders) - sum(
        entry.amount for entry in entries if entry.contra is Contra.ESCROW
    )


@given(HISTORIES, st.sampled_from(OUTCOMES), st.integers(0, 10_000))
def test_a_settled_match_leaves_nothing_in_escrow_and_the_house_never_pays(
    plan: list[Bet], result: str, commission_bps: int
) -> None:
    orders, _, refunds = play(plan)
    entries = refunds + settle(orders, SettlementKind.SETTLE, result, commission_bps)
    assert escrow_after(orders, entries) == 0
    taken = [entry for entry in entries if entry.contra is Contra.HOUSE]
    assert all(entry.type is EntryType.DEBIT and entry.amount < 0 for entry in taken)


@given(HISTORIES)
def test_a_void_match_gives_every_bet_exactly_its_reserve_back(plan: list[Bet]) -> None:
    orders, _, refunds = play(plan)
    entries = refunds + settle(orders, SettlementKind.VOID, None)
    returned: dict[UUID, int] = defaultdict(int)
    for entry in entries:
        assert (entry.type, entry.contra) == (EntryType.REFUND, Contra.ESCROW)
        returned[entry.bet_id] += entry.amount
    assert returned == {order.bet_id: order.reserve for order in orders}


@given(HISTORIES, st.sampled_from(OUTCOMES), st.integers(0, 10_000))
def test_keys_and_business_keys_are_unique_so_a_second_run_adds_nothing(
    plan: list[Bet], result: str, commission_bps: int
) -> None:
    orders, _, refunds = play(plan)
    first = refunds + settle(orders, SettlementKind.SETTLE, result, commission_bps)
    keys = [entry.key for entry in first]
    business = [(entry.bet_id, entry.type, entry.contra, entry.settlement_version) for entry in first]
    assert len(set(keys)) == len(keys)
    assert len(set(business)) == len(business)
    assert settle(orders, SettlementKind.SETTLE, result, commission_bps) == first[len(refunds) :]


@given(HISTORIES, st.sampled_from(OUTCOMES), st.integers(0, 10_000))
def test_a_wallet_without_any_other_money_can_pay_the_house(plan: list[Bet], result: str, commission_bps: int) -> None:
    orders, _, _ = play(plan)
    for order in orders:
        balance = 0
        for entry in entries_of(order, SettlementKind.SETTLE, result, 1, commission_bps):
            balance += entry.amount
            assert balance >= 0


@given(HISTORIES)
def test_fills_stay_within_reserves_and_give_nobody_worse_odds(plan: list[Bet]) -> None:
    orders, fills, _ = play(plan)
    for order in orders:
        assert 0 <= order.spent <= order.reserve
        assert order.matched_stake + order.cancelled_stake <= order.stake
        assert order.cancel_refund + order.spent <= order.reserve
        own = [fill for fill in fills if order.bet_id in (fill.back.bet_id, fill.lay.bet_id)]
        assert order.matched_stake == sum(fill.stake for fill in own)
        assert order.matched_liability == sum(fill.liability for fill in own)
        assert order.winnings == sum(fill.winnings for fill in own)
    for number, fill in enumerate(fills, 1):
        assert fill.fill_no == number
        assert fill.stake > 0
        assert 0 <= fill.winnings <= fill.liability
        assert fill.back.odds <= fill.odds <= fill.lay.odds
        assert fill.back.user_id != fill.lay.user_id
        assert fill.back.outcome == fill.lay.outcome
        assert fill.odds == min(fill.back, fill.lay, key=lambda order: order.arrival).odds


@given(HISTORIES, st.sampled_from(OUTCOMES))
def test_of_the_two_bets_of_a_fill_exactly_one_wins(plan: list[Bet], result: str) -> None:
    _, fills, _ = play(plan)
    assert all(wins(fill.back, result) is not wins(fill.lay, result) for fill in fills)


def traded(back_odds: int, lay_odds: int, stake: int) -> tuple[Order, Order]:
    book = Book(MATCH)
    lay = Order(UUID(int=2), MATCH, 22, "HOME", Side.LAY, lay_odds, stake, reserve_of(Side.LAY, lay_odds, stake), 1)
    back = Order(UUID(int=3), MATCH, 33, "HOME", Side.BACK, back_odds, stake, stake, 2)
    book.place(lay)
    book.place(back)
    return back, lay


def test_a_winning_back_is_paid_stake_and_liability_less_commission_and_residue() -> None:
    back, lay = traded(200, 233, 100)
    assert (lay.reserve, back.winnings, back.matched_liability) == (133, 133, 133)
    payout, commission = entries_of(back, SettlementKind.SETTLE, "HOME", 1, 200)
    assert (payout.type, payout.amount, payout.contra) == (EntryType.PAYOUT, 233, Contra.ESCROW)
    assert payout.key == f"ledger:PAYOUT:{back.bet_id}:1"
    assert (commission.type, commission.amount, commission.contra) == (EntryType.DEBIT, -3, Contra.HOUSE)
    assert commission.key == f"ledger:COMMISSION:{back.bet_id}:1"
    assert entries_of(lay, SettlementKind.SETTLE, "HOME", 1, 200) == []


def test_a_winning_lay_keeps_its_liability_and_wins_the_stake() -> None:
    back, lay = traded(200, 250, 101)
    assert (lay.matched_liability, lay.winnings) == (152, 151)
    payout, commission = entries_of(lay, SettlementKind.SETTLE, "DRAW", 3, 200)
    assert (payout.amount, commission.amount) == (101 + 152, -3)
    assert payout.settlement_version == 3
    assert entries_of(back, SettlementKind.SETTLE, "DRAW", 3, 200) == []


def test_the_rounding_residue_goes_to_the_house_and_not_to_the_winner() -> None:
    back, _ = traded(200, 250, 101)
    assert house_share(back, 0) == 1
    assert house_share(back, 200) == 4 + 1


def test_unmatched_stake_comes_back_before_the_payout_under_its_own_key() -> None:
    half = Order(UUID(int=4), MATCH, 44, "HOME", Side.LAY, 300, 50, 100, 3)
    half.matched_stake, half.matched_liability, half.winnings, half.liability_hundredths = 10, 20, 20, 2000
    refund, payout, _ = entries_of(half, SettlementKind.SETTLE, "AWAY", 1, 200)
    assert (refund.type, refund.amount, refund.key) == (
        EntryType.REFUND,
        80,
        f"ledger:REFUND:{half.bet_id}:1",
    )
    assert payout.amount == 30
    for entry in (refund, payout):
        assert (entry.user_id, entry.match_id, entry.bet_id) == (44, MATCH, half.bet_id)


def test_a_cancelled_bet_is_not_refunded_twice() -> None:
    order = Order(UUID(int=5), MATCH, 55, "HOME", Side.BACK, 200, 70, 70, 1)
    refund = order.cancel_rest("REQUESTED")
    (entry,) = cancel_entries(55, MATCH, order.bet_id, refund)
    assert (entry.user_id, entry.match_id, entry.bet_id) == (55, MATCH, order.bet_id)
    assert (entry.amount, entry.settlement_version) == (70, 0)
    assert entry.key == f"ledger:REFUND:{order.bet_id}:0"
    assert entries_of(order, SettlementKind.SETTLE, "HOME", 1, 200) == []
    assert entries_of(order, SettlementKind.VOID, None, 1, 200) == []


def test_a_refund_of_nothing_posts_nothing() -> None:
    assert cancel_entries(1, MATCH, UUID(int=9), 0) == []


def test_a_contradictory_row_is_refused_and_not_paid() -> None:
    order = Order(UUID(int=6), MATCH, 66, "HOME", Side.BACK, 200, 70, 70, 1)
    order.matched_stake, order.cancel_refund = 70, 1
    with pytest.raises(ValueError, match="more than it reserved"):
        entries_of(order, SettlementKind.SETTLE, "HOME", 1, 200)
    with pytest.raises(ValueError, match="without a result"):
        entries_of(order, SettlementKind.SETTLE, None, 1, 200)


HOME, DRAW, AWAY = (Ruling(SettlementKind.SETTLE, result) for result in OUTCOMES)
VOID = Ruling(SettlementKind.VOID, None)


def corrected(
    order: Order, before: Ruling, after: Ruling, balance: int, owed: int = 0
) -> list[tuple[str, str, str, int]]:
    """(kind in the key, type, contra, amount) of each entry of version 2."""
    correction = correction_of(order, before, after, 2, 200)
    entries = [] if correction is None else list(correction_entries(correction, balance, owed))
    assert all(entry.settlement_version == 2 and entry.key.endswith(f":{order.bet_id}:2") for entry in entries)
    return [(entry.key.split(":")[1], entry.type.value, entry.contra.value, entry.amount) for entry in entries]


def test_a_winner_that_lost_gets_its_commission_back_and_gives_the_payout_back() -> None:
    back, lay = traded(200, 233, 100)
    assert corrected(back, HOME, AWAY, 1000) == [
        ("COMMISSION_BACK", "REFUND", "HOUSE", 3),
        ("TAKE_BACK", "DEBIT", "ESCROW", -233),
    ]
    assert corrected(lay, HOME, AWAY, 0) == [
        ("PAYOUT", "PAYOUT", "ESCROW", 233),
        ("COMMISSION", "DEBIT", "HOUSE", -2),
    ]


def test_a_bet_that_wins_under_both_results_is_left_alone() -> None:
    _, lay = traded(200, 233, 100)
    assert corrected(lay, DRAW, AWAY, 0) == []


def test_what_a_wallet_lacks_is_advanced_before_it_gives_back() -> None:
    back, _ = traded(200, 233, 100)
    assert corrected(back, HOME, AWAY, 30) == [
        ("COMMISSION_BACK", "REFUND", "HOUSE", 3),
        ("ADVANCE", "CREDIT", "HOUSE", 200),
        ("TAKE_BACK", "DEBIT", "ESCROW", -233),
    ]
    # At exactly enough nothing is advanced.
    assert [kind for kind, *_ in corrected(back, HOME, AWAY, 230)] == ["COMMISSION_BACK", "TAKE_BACK"]


def test_what_a_bet_owes_is_taken_from_what_it_is_paid_again_and_from_nothing_else() -> None:
    back, _ = traded(200, 233, 100)
    assert corrected(back, AWAY, HOME, 0, owed=200)[1] == ("COMMISSION", "DEBIT", "HOUSE", -203)
    assert corrected(back, AWAY, VOID, 10**6, owed=200) == [
        ("REFUND", "REFUND", "ESCROW", 100),
        ("COMMISSION", "DEBIT", "HOUSE", -100),
    ]


def test_a_settled_match_made_void_gives_each_bet_its_reserve() -> None:
    back, lay = traded(200, 233, 100)
    assert corrected(back, HOME, VOID, 1000)[1] == ("TAKE_BACK", "DEBIT", "ESCROW", -133)
    assert corrected(lay, HOME, VOID, 0) == [("REFUND", "REFUND", "ESCROW", 133)]
    assert corrected(lay, VOID, HOME, 133) == [("TAKE_BACK", "DEBIT", "ESCROW", -133)]


@given(HISTORIES, st.sampled_from([HOME, DRAW, AWAY, VOID]))
def test_a_bets_share_of_escrow_is_what_its_first_settlement_posts(plan: list[Bet], ruling: Ruling) -> None:
    orders, _, _ = play(plan)
    for order in orders:
        posted = [entry for entry in entries_of(order, *ruling, 1, 200) if entry.contra is Contra.ESCROW]
        assert escrow_share(order, ruling) == sum(entry.amount for entry in posted)


def test_a_contradictory_row_is_not_corrected() -> None:
    order = Order(UUID(int=6), MATCH, 66, "HOME", Side.BACK, 200, 70, 70, 1)
    order.matched_stake, order.cancel_refund = 70, 1
    with pytest.raises(ValueError, match="more than it reserved"):
        correction_of(order, HOME, AWAY, 2, 200)
