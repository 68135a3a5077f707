"""The machines notice what they are for: each of these planted bugs makes one fail within the quick profile."""

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

import reference.desk
import reference.matcher
import reference.orderbook
import reference.settlement
from reference.commands import Side
from reference.orderbook import Book, Fill, Order
from tests.depth import depth
from tests.machine import pure_exchange, test_settlement_machine
from tests.machine.steps import TAKEN
from tests.machine.test_exchange_machine import PureRules
from tests.machine.test_orderbook_machine import OrderBookMachine
from tests.machine.test_settlement_machine import SettlementMachine

EXAMPLES = 60


def fails(machine: type[RuleBasedStateMachine]) -> None:
    """Run a machine until it fails; the shortest way to fail is of no interest here."""
    taken = TAKEN.copy()
    quick = settings(depth(ci=EXAMPLES, nightly=EXAMPLES), phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, ValueError)):
        run_state_machine_as_test(machine, settings=quick)
    # Steps count what a sound build was put through.
    TAKEN.clear()
    TAKEN.update(taken)


def rounded_down(side: Side, odds: int, stake_minor: int) -> int:
    return stake_minor if side is Side.BACK else stake_minor * (odds - 100) // 100


def latest_first(order: Order) -> int:
    price = -order.odds if order.side is Side.BACK else order.odds
    return price * reference.orderbook.ARRIVALS + order.arrival


def at_the_limit_of_the_newcomer(fill_no: int, incoming: Order, resting: Order) -> Fill:
    resting_odds, resting.odds = resting.odds, incoming.odds
    try:
        return SOUND_TRADE(fill_no, incoming, resting)
    finally:
        resting.odds = resting_odds


def without_residue(order: Order, commission_bps: int) -> int:
    net = order.winnings if order.side is Side.BACK else order.matched_stake
    return -(-net * commission_bps // 10_000)


def placed_with_itself(book: Book, order: Order) -> list[Fill]:
    owner, order.user_id = order.user_id, -1
    try:
        return SOUND_PLACE(book, order)
    finally:
        order.user_id = owner


def forgetting_what_is_owed(correction: reference.settlement.Correction, balance: int, owed: int) -> object:
    return SOUND_CORRECTION(correction, balance, 0)


def below_zero(correction: reference.settlement.Correction, balance: int, owed: int) -> object:
    return (entry for entry in SOUND_CORRECTION(correction, balance, owed) if ":ADVANCE:" not in entry.key)


def nothing(*_: object) -> list[object]:
    return []


def no_difference(*_: object) -> None:
    return None


SOUND_TRADE = reference.orderbook._trade
SOUND_PLACE = Book.place
SOUND_CORRECTION = reference.settlement.correction_entries


@pytest.mark.parametrize(
    ("machine", "where", "name", "bug"),
    [
        (PureRules, reference.desk, "reserve_of", rounded_down),
        (PureRules, pure_exchange, "difference", no_difference),
        (PureRules, pure_exchange, "cancel_entries", nothing),
        (PureRules, pure_exchange, "correction_entries", below_zero),
        (PureRules, pure_exchange, "correction_entries", forgetting_what_is_owed),
        (PureRules, reference.settlement, "house_share", without_residue),
        (PureRules, Book, "place", placed_with_itself),
        (OrderBookMachine, reference.orderbook, "_trade", at_the_limit_of_the_newcomer),
        (OrderBookMachine, Book, "place", placed_with_itself),
        (SettlementMachine, test_settlement_machine, "cancel_entries", nothing),
        (SettlementMachine, reference.settlement, "house_share", without_residue),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_bug_is_noticed(
    machine: type[RuleBasedStateMachine], where: object, name: str, bug: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, bug)
    fails(machine)


def test_a_book_that_serves_the_latest_first_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time priority, wherever the order of a side is made."""
    monkeypatch.setattr(reference.orderbook, "rank_of", latest_first)
    monkeypatch.setattr(reference.orderbook, "_arrival_of", lambda rank: rank % reference.orderbook.ARRIVALS)
    fails(OrderBookMachine)
