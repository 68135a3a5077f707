"""What the rules say of keys, wallets, matches and cancels, written from their description alone.

Nothing of the service is imported: a model that borrows the rules repeats their bugs. Amounts are minor units, odds
hundredths. A bet is named by who placed it under which key, because its id is the service's business.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

Bet = tuple[int, str]
"""User and key."""
Body = dict[str, Any]


class Command(NamedTuple):
    """What a caller sends: `amount` is the stake of a bet."""

    op: str
    user: int
    key: str
    amount: int
    match: UUID | None = None
    outcome: str | None = None
    side: str | None = None
    odds: int | None = None

    @property
    def body(self) -> Body:
        """The fields of the request, under the names that callers know them by."""
        if self.op != "bet":
            return {"op": self.op, "amount_minor": self.amount}
        return {
            "op": "bet",
            "match_id": str(self.match),
            "outcome": self.outcome,
            "side": self.side,
            "odds": self.odds,
            "stake_minor": self.amount,
        }


class Answer(NamedTuple):
    """The answer to a command. `differs` has the fields of which the service must name one."""

    outcome: str
    replayed: bool
    seq: int | None = None
    balance: int | None = None
    bet: Bet | None = None
    differs: frozenset[str] = frozenset()


class CancelAnswer(NamedTuple):
    outcome: str
    replayed: bool
    bet: Bet | None
    stake: int = 0
    refund: int = 0
    differs: str | None = None


class MatchAnswer(NamedTuple):
    outcome: str
    replayed: bool
    state: str | None
    differs: str | None = None
    version: int | None = None


class Line(NamedTuple):
    """An entry of a wallet."""

    seq: int
    type: str
    amount: int
    contra: str
    match: UUID | None
    bet: Bet | None
    version: int | None
    key: str
    balance: int


NOT_HERE = Answer("NOT_HERE", replayed=False)
ROLLED_BACK = "ROLLED_BACK"


def differing(first: Body, second: Body) -> frozenset[str]:
    """The fields in which two requests differ; another operation is a difference that says it all."""
    if first["op"] != second["op"]:
        return frozenset({"op"})
    return frozenset(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


@dataclass
class Kept:
    """What is stored under a key for good."""

    outcome: str
    body: Any
    seq: int | None = None
    balance: int | None = None
    bet: Bet | None = None


class Wallets:
    """Entries and answers of every wallet. Bodies are compared by `differing`, so their form is the caller's own."""

    def __init__(self, differing: Callable[[Any, Any], frozenset[str]] = differing) -> None:
        self.lines: dict[int, list[Line]] = {}
        self.kept: dict[tuple[int, str], Kept] = {}
        self._differing = differing

    def balance(self, user: int) -> int:
        return sum(line.amount for line in self.lines.get(user, []))

    def post(
        self,
        user: int,
        key: str,
        body: Any,
        entry: tuple[str, int, str],
        match: UUID | None = None,
        bet: Bet | None = None,
        version: int | None = None,
        refusal: str | None = None,
    ) -> Answer:
        """Decide a command once, and answer it again the same way for ever; `entry` is (type, amount, contra)."""
        kept = self.kept.get((user, key))
        if kept is not None and kept.outcome == ROLLED_BACK:
            return Answer(ROLLED_BACK, replayed=True)
        if kept is not None:
            differs = self._differing(body, kept.body)
            outcome = "REPLAYED_DIFFERENTLY" if differs else kept.outcome
            return Answer(outcome, True, kept.seq, kept.balance, kept.bet, differs)
        entry_type, amount, contra = entry
        if refusal is None and self.balance(user) + amount < 0:
            refusal = "INSUFFICIENT_FUNDS"
        if refusal is not None:
            self.kept[user, key] = Kept(refusal, body)
            return Answer(refusal, replayed=False)
        own = self.lines.setdefault(user, [])
        line = Line(len(own) + 1, entry_type, amount, contra, match, bet, version, key, self.balance(user) + amount)
        own.append(line)
        self.kept[user, key] = Kept("ACCEPTED", body, line.seq, line.balance, bet)
        return Answer("ACCEPTED", False, line.seq, line.balance, bet)

    def roll_back(self, user: int, key: str, op_of: Callable[[Any], str]) -> CancelAnswer | Bet:
        """Take back what was or will be placed under a key; a Bet where one stands that is to be cancelled."""
        kept = self.kept.get((user, key))
        if kept is None:
            self.kept[user, key] = Kept(ROLLED_BACK, None)
            return CancelAnswer("ACCEPTED", False, None)
        if kept.outcome == ROLLED_BACK:
            return CancelAnswer("ACCEPTED", True, None)
        if op_of(kept.body) != "bet":
            return CancelAnswer("REPLAYED_DIFFERENTLY", True, None, differs="op")
        return CancelAnswer("ACCEPTED", False, None) if kept.bet is None else kept.bet


class Cancels:
    """Answers to cancels by key, and those that wait for their bet to arrive."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], CancelAnswer] = {}
        self.waiting: set[Bet] = set()

    def decide(self, user: int, key: str, bet: Bet, *, is_open: bool, order: Any) -> CancelAnswer:
        """Cancel what is left of a bet. `order` (None before it arrived) has `remaining` and `cancel(reason)`."""
        kept = self._kept.get((user, key))
        if kept is not None and kept.bet != bet:
            return CancelAnswer("REPLAYED_DIFFERENTLY", True, kept.bet, differs="bet_id")
        if kept is not None:
            return kept._replace(replayed=kept.outcome == "ACCEPTED")
        if not is_open:
            answer = CancelAnswer("MATCH_CLOSED", False, bet)
        elif order is None:
            answer = CancelAnswer("ACCEPTED", False, bet)
            self.waiting.add(bet)
        elif order.remaining == 0:
            answer = CancelAnswer("NOTHING_TO_CANCEL", False, bet)
        else:
            stake = order.remaining
            answer = CancelAnswer("ACCEPTED", False, bet, stake, order.cancel("REQUESTED"))
        self._kept[user, key] = answer
        return answer


@dataclass
class Match:
    outcomes: tuple[str, ...]
    closes_at_ms: int
    state: str = "OPEN"
    rulings: list[str | None] = field(default_factory=list)
    """Result of each settlement version, the first is version 1; None is void."""
    running: bool = False
    """The newest ruling is not paid yet."""
    resettles: dict[str, tuple[str | None, int | None, str, int]] = field(default_factory=dict)
    """Key → result and version it named, its outcome, the version that it was answered with."""

    @property
    def first_result(self) -> str | None:
        return next((result for result in self.rulings if result is not None), None)


class Matches:
    """State of every match."""

    def __init__(self) -> None:
        self.known: dict[UUID, Match] = {}

    def refusal(self, match_id: UUID, outcome: str) -> str | None:
        match = self.known.get(match_id)
        if match is None:
            return "UNKNOWN_MATCH"
        if outcome not in match.outcomes:
            return "UNKNOWN_OUTCOME"
        return None if match.state == "OPEN" else "MATCH_CLOSED"

    def is_open(self, match_id: UUID) -> bool:
        return self.known[match_id].state == "OPEN"

    def create(self, match_id: UUID, outcomes: tuple[str, ...], closes_at_ms: int) -> MatchAnswer:
        match = self.known.get(match_id)
        if match is None:
            self.known[match_id] = Match(outcomes, closes_at_ms)
            return MatchAnswer("ACCEPTED", False, "OPEN")
        if match.outcomes != outcomes:
            return MatchAnswer("REPLAYED_DIFFERENTLY", False, match.state, "outcomes")
        if match.closes_at_ms != closes_at_ms:
            return MatchAnswer("REPLAYED_DIFFERENTLY", False, match.state, "closes_at_ms")
        return MatchAnswer("ACCEPTED", True, match.state)

    def close(self, match_id: UUID) -> MatchAnswer:
        match = self.known.get(match_id)
        if match is None:
            return MatchAnswer("UNKNOWN_MATCH", False, None)
        if match.state == "VOID":
            return MatchAnswer("ILLEGAL_TRANSITION", False, "VOID")
        replayed = match.state != "OPEN"
        if not replayed:
            match.state = "CLOSED"
        return MatchAnswer("ACCEPTED", replayed, match.state)

    def settle(self, match_id: UUID, result: str) -> MatchAnswer:
        match = self.known.get(match_id)
        if match is None:
            return MatchAnswer("UNKNOWN_MATCH", False, None)
        if match.first_result is not None:
            # Also after a correction the settle is answered from the settlement that it made.
            if match.first_result != result:
                return MatchAnswer("REPLAYED_DIFFERENTLY", False, match.state, "result")
            return MatchAnswer("ACCEPTED", True, match.state)
        if result not in match.outcomes:
            return MatchAnswer("UNKNOWN_OUTCOME", False, match.state, "result")
        if match.state != "CLOSED":
            return MatchAnswer("ILLEGAL_TRANSITION", False, match.state)
        self._rule(match, result, "SETTLING")
        return MatchAnswer("ACCEPTED", False, "SETTLING")

    def void(self, match_id: UUID) -> MatchAnswer:
        match = self.known.get(match_id)
        if match is None:
            return MatchAnswer("UNKNOWN_MATCH", False, None)
        if match.state == "VOID":
            return MatchAnswer("ACCEPTED", True, "VOID")
        if match.state not in ("OPEN", "CLOSED"):
            return MatchAnswer("ILLEGAL_TRANSITION", False, match.state)
        self._rule(match, None, "VOID")
        return MatchAnswer("ACCEPTED", False, "VOID")

    def resettle(self, match_id: UUID, result: str | None, corrects: int | None, key: str) -> MatchAnswer:
        match = self.known.get(match_id)
        if match is None:
            return MatchAnswer("UNKNOWN_MATCH", False, None)
        if key in match.resettles:
            named, corrected, outcome, version = match.resettles[key]
            if named != result or corrected != corrects:
                field = "result" if named != result else "corrects_version"
                return MatchAnswer("REPLAYED_DIFFERENTLY", False, match.state, field, version)
            return MatchAnswer(outcome, outcome == "ACCEPTED", match.state, None, version)
        outcome, replayed, differs = "ACCEPTED", False, None
        if result is not None and result not in match.outcomes:
            outcome, differs = "UNKNOWN_OUTCOME", "result"
        elif not match.rulings:
            outcome = "ILLEGAL_TRANSITION"
        elif match.rulings[-1] == result:
            replayed = True
        elif match.running or corrects not in (None, len(match.rulings)):
            outcome = "ILLEGAL_TRANSITION"
        else:
            self._rule(match, result, "SETTLING")
        version = len(match.rulings)
        match.resettles[key] = (result, corrects, outcome, version)
        return MatchAnswer(outcome, replayed, match.state, differs, version)

    def finish(self, match_id: UUID) -> None:
        """The newest ruling is paid."""
        match = self.known[match_id]
        match.running = False
        match.state = "VOID" if match.rulings[-1] is None else "SETTLED"

    def _rule(self, match: Match, result: str | None, state: str) -> None:
        match.rulings.append(result)
        match.running = True
        match.state = state
