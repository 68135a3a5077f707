"""Whatever is bet, cancelled, spent and settled again, money stays where the rules say, version after version."""

from fractions import Fraction
from math import ceil, floor
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reference.commands import Contra, EntryType, Side
from reference.ledger import reserve_of
from reference.orderbook import Book, Order
from reference.settlement import (
    Entry,
    Ruling,
    SettlementKind,
    cancel_entries,
    correction_entries,
    correction_of,
    entries_of,
)
from tests.depth import depth
from tests.machine.steps import TAKEN

MATCH = UUID(int=1)
OUTCOMES = ("HOME", "DRAW", "AWAY")
USERS = (1, 2, 3, 4)
RULINGS = [Ruling(SettlementKind.SETTLE, outcome) for outcome in OUTCOMES] + [Ruling(SettlementKind.VOID, None)]
BETS = st.tuples(
    st.sampled_from(USERS),
    st.sampled_from(OUTCOMES[:2]),
    st.sampled_from(Side),
    st.sampled_from([200, 199, 201, 101, 133, 333]),
    st.integers(1, 12) | st.integers(1, 10**9),
)
"""User, outcome, side, odds, stake; few odds, so that many trade."""


class SettlementMachine(RuleBasedStateMachine):
    """One match from its first bet to its last correction; the owners of the wallets may spend what they are paid."""

    @initialize(commission_bps=st.sampled_from([200, 0, 1, 10_000]), crowd=st.lists(BETS, min_size=4, max_size=12))
    def open_match(self, commission_bps: int, crowd: list[tuple[int, str, Side, int, int]]) -> None:
        self.commission_bps = commission_bps
        self.book = Book(MATCH)
        self.orders: list[Order] = []
        self.fills: list[tuple[int, int, str, int, int]] = []
        """(backer's arrival, layer's arrival, outcome, odds, stake): all that the model knows of the book."""
        self.posted: list[Entry] = []
        self.balances = dict.fromkeys(USERS, 0)
        self.rulings: list[Ruling] = []
        self.closed = False
        for bet in crowd:
            self.place(bet)

    # -- the ledger

    def post(self, entry: Entry) -> None:
        self.balances[entry.user_id] += entry.amount
        assert self.balances[entry.user_id] >= 0, "no wallet goes below zero, not even between two entries"
        self.posted.append(entry)

    def owed(self, bet_id: UUID) -> int:
        """What the house advanced on a bet and has not got back, as the ledger's lock reads it."""
        return max(0, sum(e.amount for e in self.posted if e.bet_id == bet_id and e.contra is Contra.HOUSE))

    # -- the match

    @precondition(lambda self: not self.closed)
    @rule(bet=BETS)
    def place(self, bet: tuple[int, str, Side, int, int]) -> None:
        for fill in self.book.place(self.arrive(*bet)):
            self.fills.append((fill.back.arrival, fill.lay.arrival, fill.back.outcome, fill.odds, fill.stake))

    def arrive(self, user: int, outcome: str, side: Side, odds: int, stake: int) -> Order:
        arrival = len(self.orders) + 1
        reserve = reserve_of(side, odds, stake)
        order = Order(UUID(int=arrival + 9), MATCH, user, outcome, side, odds, stake, reserve, arrival)
        self.orders.append(order)
        return order

    @rule(user=st.sampled_from(USERS), side=st.sampled_from(Side), stake=st.integers(1, 50))
    @precondition(lambda self: self.closed)
    def come_late(self, user: int, side: Side, stake: int) -> None:
        """Also after the match was settled, even twice: a bet can be under way for a long time."""
        order = self.arrive(user, "HOME", side, 333, stake)
        for entry in cancel_entries(user, MATCH, order.bet_id, order.cancel_rest("LATE")):
            self.post(entry)

    @precondition(lambda self: not self.closed)
    @rule(number=st.integers(0, 30))
    def cancel(self, number: int) -> None:
        order = self.book.cancel(self.orders[number % len(self.orders)].bet_id)
        if order is not None:
            for entry in cancel_entries(order.user_id, MATCH, order.bet_id, order.cancel_refund):
                self.post(entry)

    @precondition(lambda self: not self.rulings)
    @rule(ruling=st.sampled_from(RULINGS))
    def settle(self, ruling: Ruling) -> None:
        self.closed = True
        for order in self.orders:
            for entry in entries_of(order, *ruling, 1, self.commission_bps):
                self.post(entry)
        self.rulings.append(ruling)

    @precondition(lambda self: self.rulings)
    @rule()
    def repeat_the_first_settlement(self) -> None:
        """A settler that was killed begins a page anew: whatever it posts is there already, under the same key."""
        posted = {entry.key: entry for entry in self.posted}
        for order in self.orders:
            refunds = cancel_entries(order.user_id, MATCH, order.bet_id, order.cancel_refund)
            for entry in refunds + entries_of(order, *self.rulings[0], 1, self.commission_bps):
                assert posted[entry.key] == entry

    @precondition(lambda self: self.rulings)
    @rule(ruling=st.sampled_from(RULINGS))
    def settle_again(self, ruling: Ruling) -> None:
        version = len(self.rulings) + 1
        for order in self.orders:
            correction = correction_of(order, self.rulings[-1], ruling, version, self.commission_bps)
            if correction is None:
                continue
            owed = self.owed(order.bet_id)
            for entry in correction_entries(correction, self.balances[order.user_id], owed):
                if entry.type is EntryType.CREDIT:
                    left = self.balances[order.user_id]
                    assert left + entry.amount == -correction.escrow, "an advance is what is lacking, and no cent more"
                self.post(entry)
        self.rulings.append(ruling)

    @precondition(lambda self: self.rulings)
    @rule(user=st.sampled_from(USERS), share=st.sampled_from([Fraction(1), Fraction(1, 2), Fraction(1, 3)]))
    def spend(self, user: int, share: Fraction) -> None:
        self.balances[user] -= floor(self.balances[user] * share)

    # -- what must hold

    def exact_fills(self) -> list[tuple[int, int, str, int, int, int]]:
        """(back, lay, outcome, stake, liability, winnings) of each fill, the lay side rounded up over all its fills."""
        before: dict[int, Fraction] = {}
        rows = []
        for back, lay, outcome, odds, stake in self.fills:
            profit = Fraction(stake * (odds - 100), 100)
            so_far = before.get(lay, Fraction(0))
            before[lay] = so_far + profit
            rows.append((back, lay, outcome, stake, ceil(so_far + profit) - ceil(so_far), floor(profit)))
        return rows

    def right_positions(self) -> tuple[dict[int, int], dict[int, int]]:
        """By arrival: what escrow gave back and what the house takes under the last ruling, from the fills alone."""
        escrow = {order.arrival: order.reserve for order in self.orders}
        house = dict.fromkeys(escrow, 0)
        ruling = self.rulings[-1]
        if ruling.kind is SettlementKind.VOID:
            return escrow, house
        net = dict.fromkeys(escrow, 0)
        for back, lay, outcome, stake, liability, winnings in self.exact_fills():
            escrow[back] -= stake
            escrow[lay] -= liability
            winner = back if outcome == ruling.result else lay
            escrow[winner] += stake + liability
            net[winner] += winnings if winner == back else stake
            house[winner] += liability - winnings if winner == back else 0
        for arrival, won in net.items():
            house[arrival] += ceil(Fraction(won * self.commission_bps, 10_000))
        return escrow, house

    @invariant()
    def each_bet_has_what_the_last_ruling_gives_it(self) -> None:
        if not self.rulings:
            return
        escrow, house = self.right_positions()
        for order in self.orders:
            mine = [entry for entry in self.posted if entry.bet_id == order.bet_id]
            taken = sum(entry.amount for entry in mine if entry.contra is Contra.ESCROW)
            charged = -sum(entry.amount for entry in mine if entry.contra is Contra.HOUSE)
            assert taken == escrow[order.arrival]
            assert charged + self.owed(order.bet_id) == house[order.arrival]
            assert not (self.owed(order.bet_id) and house[order.arrival]), "a winner has paid back what it owed"

    @invariant()
    def escrow_is_empty_after_every_version(self) -> None:
        if self.rulings:
            taken = sum(entry.amount for entry in self.posted if entry.contra is Contra.ESCROW)
            assert taken == sum(order.reserve for order in self.orders)

    @invariant()
    def the_house_takes_its_share_of_winnings_and_nothing_else(self) -> None:
        """It never pays a bet, and all bets together never pay it more than the losers lost."""
        if not self.rulings:
            return
        income = 0
        for order in self.orders:
            mine = [entry for entry in self.posted if entry.bet_id == order.bet_id]
            taken = -sum(entry.amount for entry in mine if entry.contra is Contra.HOUSE) + self.owed(order.bet_id)
            assert taken >= 0
            won = sum(entry.amount for entry in mine if entry.contra is Contra.ESCROW) - order.reserve
            assert taken <= max(0, won), "a winner keeps at least what it risked"
            income += taken
        fills = [fill for fill in self.exact_fills() if self.rulings[-1].kind is SettlementKind.SETTLE]
        won = sum(
            liability if outcome == self.rulings[-1].result else stake for *_, outcome, stake, liability, _ in fills
        )
        assert income <= won

    @invariant()
    def step(self) -> None:
        TAKEN["settlement"] += 1

    @invariant()
    def no_key_and_no_business_key_comes_twice(self) -> None:
        assert len({entry.key for entry in self.posted}) == len(self.posted)
        business = {(entry.bet_id, entry.type, entry.contra, entry.settlement_version) for entry in self.posted}
        assert len(business) == len(self.posted)

    @invariant()
    def an_entry_names_its_bet_and_its_key_says_the_same(self) -> None:
        owners = {order.bet_id: order.user_id for order in self.orders}
        for entry in self.posted:
            assert (entry.match_id, entry.user_id) == (MATCH, owners[entry.bet_id])
            assert 0 <= entry.settlement_version <= len(self.rulings) + 1
            assert entry.key.startswith("ledger:")
            assert entry.key.endswith(f":{entry.bet_id}:{entry.settlement_version}")

    @invariant()
    def signs_are_those_of_the_schema(self) -> None:
        for entry in self.posted:
            assert (entry.amount < 0) is (entry.type is EntryType.DEBIT)
            assert entry.amount != 0

    @invariant()
    def nobody_trades_with_themself(self) -> None:
        for back, lay, *_ in self.fills:
            assert self.orders[back - 1].user_id != self.orders[lay - 1].user_id


TestSettlement = SettlementMachine.TestCase
TestSettlement.settings = depth(ci=80, nightly=2_000, steps=30)
