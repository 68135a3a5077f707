"""One machine for two systems: the rules of the exchange against a model, whatever carries them out.

A system is the service's pure rules in memory (`pure_exchange`) or the service's own functions over one Postgres
server (`sql_exchange`). Each step does the same to the system and to the model and compares the answers; after each
step wallets, orders and fills must be the model's, entry by entry.
"""

from typing import Any, NamedTuple, Protocol
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.machine.model_desk import Answer, Bet, CancelAnswer, Command, Line, MatchAnswer
from tests.machine.model_exchange import Exchange, Fill, Progress
from tests.machine.steps import TAKEN

MAX_AMOUNT = 100_000
PAGE = 3
"""Orders that are settled at a time: few, so that a match of an example has more than one page."""
COMMISSIONS_BPS = (200, 0, 1, 10_000)
OUTCOMES = ("HOME", "AWAY")
CLOSES_AT_MS = 4_102_444_800_000
MATCHES = 3


class Place(NamedTuple):
    """Where one example plays: nobody else uses these wallets and matches."""

    wallets: tuple[int, ...]
    """The last one belongs to a shard that is on another server."""
    matches: tuple[UUID, ...]
    """The last one is never created."""


class System(Protocol):
    """What the machine needs of a system; bets are named by user and key, as in the model."""

    name: str
    place: Place

    def post(self, commands: list[Command], *, over_the_desk: bool) -> list[Answer]:
        """Answer commands in their order. Over the desk they are a bulk; otherwise batches of the writer."""

    def rollback(self, user: int, key: str) -> CancelAnswer: ...
    def cancel(self, user: int, key: str, bet: Bet) -> CancelAnswer: ...
    def create_match(self, match: UUID, outcomes: tuple[str, ...], closes_at_ms: int) -> MatchAnswer: ...
    def close_match(self, match: UUID) -> MatchAnswer: ...
    def settle_match(self, match: UUID, result: str) -> MatchAnswer: ...
    def void_match(self, match: UUID) -> MatchAnswer: ...
    def resettle_match(self, match: UUID, result: str | None, corrects: int | None, key: str) -> MatchAnswer: ...

    def arrive(self, bets: list[Bet]) -> None:
        """The events of placed bets reach the matcher, in this order, together."""

    def replace_matcher(self) -> None:
        """Another matcher process takes over, with nothing in memory."""

    def refund(self, bets: list[Bet]) -> None:
        """The events of cancelled bets reach the settler, together."""

    def settle(self, match: UUID) -> bool:
        """A settler looks after a match; False if it finds nothing to do."""

    def lines(self) -> dict[int, list[Line]]:
        """Every entry of the wallets of this place, in the order of seq; wallets without entries are left out."""

    def orders(self, match: UUID) -> list[tuple[Progress, str]]:
        """Progress and state of a match's orders by arrival."""

    def fills(self, match: UUID) -> list[Fill]: ...

    def close(self) -> None: ...


SEATS = st.integers(0, 2)
KEYS = st.integers(0, 30).map(lambda number: f"k{number}")
AMOUNTS = st.sampled_from([1, 7, 99, 100, 1_000, MAX_AMOUNT])
STAKES = st.integers(1, 12) | st.sampled_from([100, 999, 5_000])
ODDS = st.sampled_from([200, 199, 201, 101, 133, 333, 100_000])
SIDES = st.sampled_from(["BACK", "LAY"])
MATCH_NUMBERS = st.sampled_from([0, 0, 0, 1, 1, 2, MATCHES])
OPEN_ONE = -1
"""The first match that still takes bets."""
RESULTS = st.sampled_from([*OUTCOMES, "HOME", "NEVER"])
PLANS = st.one_of(
    st.tuples(st.just("deposit"), AMOUNTS),
    st.tuples(st.sampled_from(["withdraw", "withdraw", "withdraw all", "withdraw all and one"]), AMOUNTS),
    st.tuples(st.just("bet"), STAKES, MATCH_NUMBERS, RESULTS, SIDES, ODDS),
    st.tuples(st.just("bet"), STAKES, st.just(OPEN_ONE), st.just("HOME"), SIDES, ODDS),
    st.tuples(st.just("bet"), STAKES, st.just(OPEN_ONE), st.just("HOME"), SIDES, ODDS),
)
"""What is sent, before it is known by whom. Few odds and outcomes, so that many bets trade."""
MOSTLY = st.sampled_from([True, True, True, True, False])
VERSIONS = st.none() | st.integers(1, 4)
TERMS = [OUTCOMES, OUTCOMES, ("HOME", "DRAW")]
CHANGES = st.sampled_from([None, None, "amount", "op", "outcome", "side", "odds", "match"])


class ExchangeMachine(RuleBasedStateMachine):
    """Everything that callers, operators and workers can do, in any order."""

    system: System

    def open_system(self, commission_bps: int) -> System:
        """Return a fresh system; each test says which."""
        raise NotImplementedError

    @initialize(
        commission_bps=st.sampled_from(COMMISSIONS_BPS),
        funds=st.lists(st.sampled_from([MAX_AMOUNT, 50_000, 500]), min_size=3, max_size=3),
        crowd=st.lists(st.tuples(SEATS, STAKES, SIDES, ODDS), min_size=4, max_size=10),
    )
    def begin(self, commission_bps: int, funds: list[int], crowd: list[tuple[Any, ...]]) -> None:
        self.system = self.open_system(commission_bps)
        self.place = self.system.place
        self.model = Exchange(MAX_AMOUNT, commission_bps, PAGE)
        self.sent: list[Command] = []
        self.create_match(0, OUTCOMES, 0)
        self.create_match(1, OUTCOMES, 0)
        commands = [
            Command("deposit", self.place.wallets[seat], f"fund{seat}", amount) for seat, amount in enumerate(funds)
        ]
        commands += [
            Command("bet", self.place.wallets[seat], f"crowd{number}", stake, self.place.matches[0], "HOME", side, odds)
            for number, (seat, stake, side, odds) in enumerate(crowd)
        ]
        self.post(commands, over_the_desk=True)

    def post(self, commands: list[Command], *, over_the_desk: bool) -> None:
        elsewhere = self.place.wallets[-1:]
        expected = self.model.post(commands, elsewhere)
        answers = self.system.post(commands, over_the_desk=over_the_desk)
        for command, answer, right in zip(commands, answers, expected, strict=True):
            assert answer._replace(differs=frozenset()) == right._replace(differs=frozenset()), command
            assert bool(answer.differs) is bool(right.differs), command
            assert answer.differs <= right.differs, command
        self.sent += [command for command in commands if command.user not in elsewhere]

    def command(self, seat: int, key: str, plan: tuple[Any, ...]) -> Command:
        user = self.place.wallets[seat]
        op, amount, *order = plan
        if op.startswith("withdraw all"):
            amount = min(MAX_AMOUNT, max(1, self.model.wallets.balance(user) + (op == "withdraw all and one")))
            return Command("withdraw", user, key, amount)
        if op != "bet":
            return Command(op, user, key, amount)
        number, outcome, side, odds = order
        match = self.place.matches[max(number, 0)]
        if number == OPEN_ONE:
            match = next((one for one, its in self.model.matches.known.items() if its.state == "OPEN"), match)
        return Command("bet", user, key, amount, match, outcome, side, odds)

    # -- callers

    @rule(plans=st.lists(st.tuples(SEATS, KEYS, PLANS), min_size=1, max_size=6), over_the_desk=st.booleans())
    def send(self, plans: list[tuple[int, str, tuple[Any, ...]]], over_the_desk: bool) -> None:
        """Several commands of several wallets at once; a key may come twice, also with another body."""
        if plans:
            self.post([self.command(*plan) for plan in plans], over_the_desk=over_the_desk)

    @precondition(lambda self: self.sent)
    @rule(number=st.integers(0, 200), change=CHANGES, plan=PLANS, over_the_desk=st.booleans())
    def send_again(self, number: int, change: str | None, plan: tuple[Any, ...], over_the_desk: bool) -> None:
        """The same key again, with the same body or another, before and behind something new of the same wallet."""
        command = self.sent[number % len(self.sent)]
        seat = self.place.wallets.index(command.user)
        new = [self.command(seat, f"new{len(self.sent)}{side}", plan) for side in "ab"]
        self.post([new[0], self.changed(command, change), new[1]], over_the_desk=over_the_desk)

    def changed(self, command: Command, change: str | None) -> Command:
        if change == "amount":
            return command._replace(amount=command.amount % MAX_AMOUNT + 1)
        if change == "op" and command.op != "bet":
            return command._replace(op="withdraw" if command.op == "deposit" else "deposit")
        if command.op == "bet" and change == "outcome":
            return command._replace(outcome="AWAY" if command.outcome == "HOME" else "HOME")
        if command.op == "bet" and change == "side":
            return command._replace(side="LAY" if command.side == "BACK" else "BACK")
        if command.op == "bet" and command.odds and change == "odds":
            return command._replace(odds=command.odds + 1 if command.odds < 100_000 else 99_999)
        if command.op == "bet" and change == "match":
            return command._replace(match=self.place.matches[1 if command.match == self.place.matches[0] else 0])
        if command.op == "bet" and change == "op":
            return Command("withdraw", command.user, command.key, command.amount)
        return command

    @rule(plans=st.lists(st.tuples(st.integers(0, 3), KEYS, PLANS), min_size=1, max_size=4))
    def send_to_the_wrong_server(self, plans: list[tuple[int, str, tuple[Any, ...]]]) -> None:
        """A batch that has commands of a wallet whose shard is elsewhere: nothing happens to those."""
        far = Command("deposit", self.place.wallets[-1], "far", 5)
        self.post([*(self.command(*plan) for plan in plans), far], over_the_desk=False)

    @rule(seat=SEATS, number=st.integers(0, 200), new_key=KEYS, of_a_sent_one=st.booleans())
    def roll_back(self, seat: int, number: int, new_key: str, of_a_sent_one: bool) -> None:
        user, key = self.place.wallets[seat], new_key
        if of_a_sent_one and self.sent:
            command = self.sent[number % len(self.sent)]
            user, key = command.user, command.key
        assert self.system.rollback(user, key) == self.model.rollback(user, key)

    @precondition(lambda self: self.model.bets)
    @rule(
        number=st.integers(0, 200),
        key=st.integers(0, 9),
        seat=SEATS,
        by_the_owner=st.sampled_from([True] * 4 + [False]),
    )
    def cancel(self, number: int, key: int, seat: int, by_the_owner: bool) -> None:
        bet = self.bet(number)
        user = bet[0] if by_the_owner else self.place.wallets[seat]
        assert self.system.cancel(user, f"c{key}", bet) == self.model.cancel(user, f"c{key}", bet)

    @precondition(lambda self: self.cancellable())
    @rule(number=st.integers(0, 200))
    def cancel_what_is_left(self, number: int) -> None:
        """A cancel that does cancel something."""
        bets = self.cancellable()
        bet = bets[number % len(bets)]
        key = f"rest{len(self.sent)}/{number}"
        assert self.system.cancel(bet[0], key, bet) == self.model.cancel(bet[0], key, bet)

    def cancellable(self) -> list[Bet]:
        """Bets of open matches with something to cancel, those that traded first."""
        is_open = [one for one, its in self.model.matches.known.items() if its.state == "OPEN"]
        orders = [o for o in self.model.orders.values() if o.remaining and self.model.bets[o.bet].match in is_open]
        return [order.bet for order in sorted(orders, key=lambda order: not order.fills)]

    def bet(self, number: int) -> Bet:
        bets = list(self.model.bets)
        return bets[number % len(bets)]

    # -- operators

    @rule(number=st.integers(0, MATCHES - 1), outcomes=st.sampled_from(TERMS), later=st.integers(0, 1))
    def create_match(self, number: int, outcomes: tuple[str, ...], later: int) -> None:
        arguments = (self.place.matches[number], outcomes, CLOSES_AT_MS + later)
        assert self.system.create_match(*arguments) == self.model.matches.create(*arguments)

    @rule(number=MATCH_NUMBERS)
    def close_match(self, number: int) -> None:
        match = self.place.matches[number]
        assert self.system.close_match(match) == self.model.matches.close(match)

    @rule(number=MATCH_NUMBERS, result=RESULTS)
    def settle_match(self, number: int, result: str) -> None:
        match = self.place.matches[number]
        assert self.system.settle_match(match, result) == self.model.matches.settle(match, result)

    @rule(number=MATCH_NUMBERS, odd=st.integers(0, 3))
    def void_match(self, number: int, odd: int) -> None:
        if odd:
            return  # A match that is void takes no more bets: rarely, or there would be little to play with.
        match = self.place.matches[number]
        assert self.system.void_match(match) == self.model.matches.void(match)

    @rule(
        number=MATCH_NUMBERS, result=RESULTS | st.none(), corrects=st.none() | st.integers(1, 4), key=st.integers(0, 9)
    )
    def resettle_match(self, number: int, result: str | None, corrects: int | None, key: int) -> None:
        arguments = (self.place.matches[number], result, corrects, f"r{key}")
        assert self.system.resettle_match(*arguments) == self.model.matches.resettle(*arguments)

    @precondition(lambda self: any(match.state == "OPEN" for match in self.model.matches.known.values()))
    @rule(result=st.sampled_from(OUTCOMES), spend=st.sets(SEATS))
    def play_to_the_end(self, result: str, spend: set[int]) -> None:
        """An open match is closed, settled and paid, and some owners withdraw what they have at once."""
        number = next(n for n, one in enumerate(self.place.matches) if self.model.matches.refusal(one, "HOME") is None)
        self.arrive([], all_that_wait=True)
        self.close_match(number)
        self.settle_match(number, result)
        self.settle(number)
        self.send([(seat, f"out{len(self.sent)}", ("withdraw all", 0)) for seat in sorted(spend)], over_the_desk=True)

    @precondition(lambda self: any(match.rulings for match in self.model.matches.known.values()))
    @rule(number=st.integers(0, 9), result=st.sampled_from([*OUTCOMES, None]), spend=st.sets(SEATS))
    def correct(self, number: int, result: str | None, spend: set[int]) -> None:
        """A match that was settled or void gets another result, and is paid at once."""
        ruled = [n for n, one in enumerate(self.place.matches[:-1]) if one in self.model.matches.known]
        ruled = [n for n in ruled if self.model.matches.known[self.place.matches[n]].rulings]
        number = ruled[number % len(ruled)]
        self.settle(number)
        self.resettle_match(number, result, None, 100 + len(self.sent))
        self.settle(number)
        self.send([(seat, f"out{len(self.sent)}", ("withdraw all", 0)) for seat in sorted(spend)], over_the_desk=True)

    # -- workers

    @precondition(lambda self: self.model.bets)
    @rule(numbers=st.lists(st.integers(0, 200), max_size=6), all_that_wait=st.booleans())
    def arrive(self, numbers: list[int], all_that_wait: bool) -> None:
        """Bets reach the matcher in any order; some of them again."""
        bets = [self.bet(number) for number in numbers]
        if all_that_wait:
            bets += [bet for bet in self.model.bets if bet not in self.model.orders]
        if bets:
            self.system.arrive(bets)
        for bet in bets:
            self.model.arrive(bet)

    @rule()
    def replace_matcher(self) -> None:
        self.system.replace_matcher()

    @precondition(lambda self: any(order.cancelled for order in self.model.orders.values()))
    @rule(numbers=st.lists(st.integers(0, 200), min_size=1, max_size=3))
    def refund(self, numbers: list[int]) -> None:
        """Events of cancelled bets reach the settler in any order, some of them again."""
        cancelled = [bet for bet, order in self.model.orders.items() if order.cancelled]
        bets = [cancelled[number % len(cancelled)] for number in numbers]
        self.system.refund(bets)
        for bet in bets:
            self.model.refund(bet)

    @rule(number=MATCH_NUMBERS)
    def settle(self, number: int) -> None:
        """A settler looks at a match, also where there is nothing to do for it."""
        match = self.place.matches[number]
        if match in self.model.matches.known:
            assert self.system.settle(match) is self.model.settle(match)

    # -- what must hold after each step

    @invariant()
    def step(self) -> None:
        TAKEN[self.system.name] += 1

    @invariant()
    def wallets_hold_what_the_model_says(self) -> None:
        lines = self.system.lines()
        assert lines == {user: own for user, own in self.model.wallets.lines.items() if own}
        everything = [line for own in lines.values() for line in own]
        outside = sum(line.amount for line in everything if line.contra == "EXTERNAL")
        kept = -sum(line.amount for line in everything if line.contra != "EXTERNAL")
        assert sum(own[-1].balance for own in lines.values()) + kept == outside
        assert all(line.balance >= 0 for line in everything)

    @invariant()
    def books_hold_what_the_model_says(self) -> None:
        for match_id, match in self.model.matches.known.items():
            orders = self.system.orders(match_id)
            assert [progress for progress, _ in orders] == [order.progress() for order in self.model.of_match(match_id)]
            if match.state in ("OPEN", "CLOSED"):
                assert [state for _, state in orders] == [order.state() for order in self.model.of_match(match_id)]
            fills = self.system.fills(match_id)
            assert fills == self.model.fills_of(match_id)
            assert all(fill.back[0] != fill.lay[0] for fill in fills)

    @invariant()
    def the_escrow_of_a_paid_match_is_what_is_still_under_way(self) -> None:
        for match_id, escrow in self.model.escrow_left():
            match = self.model.matches.known[match_id]
            if match.rulings and not match.running:
                unpaid = 0
                for bet, command in self.model.bets.items():
                    if command.match != match_id:
                        continue
                    order = self.model.orders.get(bet)
                    paid = any(line.version == 0 and line.bet == bet for line in self.model.wallets.lines[bet[0]])
                    if order is None:
                        unpaid -= self.model.wallets.lines[bet[0]][self.seq_of(bet) - 1].amount
                    elif not paid:
                        unpaid += order.refund
                assert escrow == unpaid

    def seq_of(self, bet: Bet) -> int:
        seq = self.model.wallets.kept[bet].seq
        assert seq is not None
        return seq

    def teardown(self) -> None:
        if hasattr(self, "system"):
            self.system.close()
