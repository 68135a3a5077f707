"""The whole exchange as a slow model: searches every order, counts in fractions, and rounds once at the end.

It is told the same things as the service and says what must be answered and what must stand in every wallet. Nothing
of the service is imported. Amounts are minor units, odds hundredths.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import NamedTuple
from uuid import UUID

from tests.machine.model_desk import NOT_HERE, Answer, Bet, CancelAnswer, Cancels, Command, Matches, Wallets


class Fill(NamedTuple):
    number: int
    back: Bet
    lay: Bet
    odds: int
    stake: int
    liability: int
    winnings: int


class Progress(NamedTuple):
    """How far an order got: what its row must say."""

    bet: Bet
    arrival: int
    matched_stake: int
    matched_liability: int
    winnings: int
    cancelled_stake: int
    refund: int
    reason: str | None


def reserve_of(side: str, odds: int, stake: int) -> int:
    """The stake of a BACK, the liability of a LAY rounded up."""
    return stake if side == "BACK" else ceil(Fraction(stake) * (odds - 100) / 100)


@dataclass
class Order:
    bet: Bet
    outcome: str
    side: str
    odds: int
    stake: int
    arrival: int
    fills: list[Fill] = field(default_factory=list)
    cancelled: int = 0
    refund: int = 0
    reason: str | None = None

    @property
    def reserve(self) -> int:
        return reserve_of(self.side, self.odds, self.stake)

    @property
    def matched(self) -> int:
        return sum(fill.stake for fill in self.fills)

    @property
    def remaining(self) -> int:
        return self.stake - self.matched - self.cancelled

    @property
    def liability(self) -> int:
        return sum(fill.liability for fill in self.fills)

    @property
    def spent(self) -> int:
        return self.matched if self.side == "BACK" else self.liability

    @property
    def exact_liability(self) -> Fraction:
        return sum((Fraction(fill.stake * (fill.odds - 100), 100) for fill in self.fills), Fraction(0))

    def cancel(self, reason: str) -> int:
        self.cancelled, self.reason = self.remaining, reason
        self.refund = self.reserve - self.spent
        return self.refund

    def wins(self, result: str) -> bool:
        return (self.outcome == result) == (self.side == "BACK")

    def progress(self) -> Progress:
        winnings = sum(fill.winnings for fill in self.fills)
        return Progress(
            self.bet, self.arrival, self.matched, self.liability, winnings, self.cancelled, self.refund, self.reason
        )

    def state(self) -> str:
        """Until its match is settled."""
        if self.remaining:
            return "PART_MATCHED" if self.fills else "PENDING"
        return "MATCHED" if self.fills else "CANCELLED"


class Exchange:
    """Wallets, matches, books and settlements together; `page` orders are settled at a time."""

    def __init__(self, max_amount: int, commission_bps: int, page: int) -> None:
        self.wallets = Wallets()
        self.matches = Matches()
        self.cancels = Cancels()
        self.bets: dict[Bet, Command] = {}
        """Every bet that was accepted."""
        self.orders: dict[Bet, Order] = {}
        self._max_amount = max_amount
        self._commission = Fraction(commission_bps, 10_000)
        self._page = page

    # -- the desk

    def post(self, commands: Sequence[Command], elsewhere: Collection[int] = ()) -> list[Answer]:
        """Decide commands in their order; nothing happens to those of wallets that are elsewhere."""
        # Whether a match takes bets is asked once, before the first of them is decided: none of them changes it.
        return [NOT_HERE if command.user in elsewhere else self._post(command) for command in commands]

    def _post(self, command: Command) -> Answer:
        user, key, amount = command.user, command.key, command.amount
        if command.op != "bet":
            entry = ("CREDIT", amount, "EXTERNAL") if command.op == "deposit" else ("DEBIT", -amount, "EXTERNAL")
            return self.wallets.post(user, key, command.body, entry)
        assert command.match and command.outcome and command.side and command.odds
        reserve = reserve_of(command.side, command.odds, amount)
        refusal = self.matches.refusal(command.match, command.outcome)
        if refusal is None and reserve > self._max_amount:
            refusal = "LIMIT_EXCEEDED"
        answer = self.wallets.post(
            user, key, command.body, ("DEBIT", -reserve, "ESCROW"), command.match, (user, key), refusal=refusal
        )
        if answer.outcome == "ACCEPTED" and not answer.replayed:
            self.bets[user, key] = command
        return answer

    def rollback(self, user: int, key: str) -> CancelAnswer:
        done = self.wallets.roll_back(user, key, lambda body: str(body["op"]))
        if isinstance(done, CancelAnswer):
            return done
        return self.cancel(user, f"ledger:rollback:{key}", done)

    def cancel(self, user: int, key: str, bet: Bet) -> CancelAnswer:
        command = self.bets.get(bet)
        if command is None or command.user != user:
            return CancelAnswer("UNKNOWN_BET", False, bet)
        assert command.match
        is_open = self.matches.is_open(command.match)
        return self.cancels.decide(user, key, bet, is_open=is_open, order=self.orders.get(bet))

    # -- the matcher

    def of_match(self, match_id: UUID) -> list[Order]:
        """The orders of a match in the order of their arrival."""
        return [order for order in self.orders.values() if self.bets[order.bet].match == match_id]

    def fills_of(self, match_id: UUID) -> list[Fill]:
        return sorted({fill for order in self.of_match(match_id) for fill in order.fills})

    def arrive(self, bet: Bet) -> None:
        """A paid bet reaches the book; a second time it changes nothing."""
        if bet in self.orders:
            return
        command = self.bets[bet]
        assert command.match and command.outcome and command.side and command.odds
        arrival = len(self.of_match(command.match)) + 1
        order = Order(bet, command.outcome, command.side, command.odds, command.amount, arrival)
        self.orders[bet] = order
        if bet in self.cancels.waiting:
            order.cancel("REQUESTED")
        elif not self.matches.is_open(command.match):
            order.cancel("LATE")
        else:
            self._trade(order, command.match)

    def _trade(self, new: Order, match_id: UUID) -> None:
        while new.remaining:
            partners = [
                order
                for order in self.of_match(match_id)
                if order.remaining
                and order.outcome == new.outcome
                and order.side != new.side
                and order.bet[0] != new.bet[0]
                and (order.odds >= new.odds if new.side == "BACK" else order.odds <= new.odds)
            ]
            if not partners:
                return
            cheaper = -1 if new.side == "BACK" else 1
            best = min(partners, key=lambda order: (cheaper * order.odds, order.arrival))
            back, lay = (new, best) if new.side == "BACK" else (best, new)
            stake = min(new.remaining, best.remaining)
            profit = Fraction(stake * (best.odds - 100), 100)
            liability = ceil(lay.exact_liability + profit) - lay.liability
            number = len(self.fills_of(match_id)) + 1
            fill = Fill(number, back.bet, lay.bet, best.odds, stake, liability, floor(profit))
            back.fills.append(fill)
            lay.fills.append(fill)

    # -- the settler

    def refund(self, bet: Bet) -> None:
        """Give a cancelled or late bet its refund, once."""
        order = self.orders[bet]
        if order.refund:
            self._entry(order, "REFUND", ("REFUND", order.refund, "ESCROW"), 0)

    def due(self, order: Order, result: str | None) -> tuple[int, int]:
        """What a bet takes out of escrow under a ruling beside its refund, and what the house takes of that."""
        rest = order.reserve - order.refund
        if result is None:
            return rest, 0
        if not order.fills or not order.wins(result):
            return rest - order.spent, 0
        gained = sum(fill.stake + fill.liability for fill in order.fills)
        if order.side == "BACK":
            net = sum(fill.winnings for fill in order.fills)
            residue = order.liability - net
        else:
            net, residue = order.matched, 0
        return rest - order.spent + gained, ceil(net * self._commission) + residue

    def settle(self, match_id: UUID) -> bool:
        """Pay what the newest ruling of a match gives; False if that was done or there is none."""
        match = self.matches.known[match_id]
        if not match.running:
            return False
        orders = self.of_match(match_id)
        version = len(match.rulings)
        for start in range(0, len(orders), self._page):
            page = orders[start : start + self._page]
            if version == 1:
                for order in page:
                    self.refund(order.bet)
                    self._pay(order, match.rulings[0])
                continue
            for order in page:
                self.refund(order.bet)
            for order in page:
                self._correct(order, match.rulings[-2], match.rulings[-1], version)
        self.matches.finish(match_id)
        return True

    def _pay(self, order: Order, result: str | None) -> None:
        taken, house = self.due(order, result)
        won = 0
        if result is not None and order.fills and order.wins(result):
            won = sum(fill.stake + fill.liability for fill in order.fills)
        if taken - won:
            self._entry(order, "REFUND", ("REFUND", taken - won, "ESCROW"), 1)
        if won:
            self._entry(order, "PAYOUT", ("PAYOUT", won, "ESCROW"), 1)
        if house:
            self._entry(order, "COMMISSION", ("DEBIT", -house, "HOUSE"), 1)

    def _correct(self, order: Order, before: str | None, after: str | None, version: int) -> None:
        """Move a bet from one ruling's position to the next one's; the house advances what its wallet lacks."""
        (had, charged), (has, charge) = self.due(order, before), self.due(order, after)
        more, house = has - had, charge - charged
        owed = self.owed(order.bet)
        if house < 0:
            self._entry(order, "COMMISSION_BACK", ("REFUND", -house, "HOUSE"), version)
        if more < 0:
            lacking = -more - self.wallets.balance(order.bet[0])
            if lacking > 0:
                self._entry(order, "ADVANCE", ("CREDIT", lacking, "HOUSE"), version)
            self._entry(order, "TAKE_BACK", ("DEBIT", more, "ESCROW"), version)
        elif more > 0:
            paid_as = "REFUND" if after is None else "PAYOUT"
            self._entry(order, paid_as, (paid_as, more, "ESCROW"), version)
        to_house = max(house, 0)
        if more > to_house:
            to_house += min(owed, more - to_house)
        if to_house:
            self._entry(order, "COMMISSION", ("DEBIT", -to_house, "HOUSE"), version)

    def owed(self, bet: Bet) -> int:
        """What the house advanced on a bet and has not got back."""
        own = self.wallets.lines.get(bet[0], [])
        return max(0, sum(line.amount for line in own if line.bet == bet and line.contra == "HOUSE"))

    def _entry(self, order: Order, kind: str, entry: tuple[str, int, str], version: int) -> None:
        user, own_key = order.bet
        key = f"ledger:{kind}:{user}/{own_key}:{version}"
        body = {"op": entry[0].lower(), "amount_minor": abs(entry[1])}
        match_id = self.bets[order.bet].match
        answer = self.wallets.post(user, key, body, entry, match_id, order.bet, version)
        assert answer.outcome == "ACCEPTED", "no settlement entry is ever refused"

    # -- what must always hold

    def escrow_left(self) -> Iterator[tuple[UUID, int]]:
        """(match, escrow) of each match; it follows from the entries of all wallets."""
        for match_id in self.matches.known:
            own = [line for lines in self.wallets.lines.values() for line in lines if line.match == match_id]
            yield match_id, -sum(line.amount for line in own if line.contra == "ESCROW")
