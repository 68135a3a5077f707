"""The service's pure rules as one exchange in memory: postings, book, settlement, comparison of repeated commands.

What the service does in SQL only (funds, keys, states of matches) has no second implementation in Python that could be
tested here: those parts are the model's own, and only `sql_exchange` says something about them.
"""

from itertools import count
from uuid import UUID, uuid4

import msgspec

from reference.commands import BulkBet, BulkDeposit, BulkWithdraw, Outcome, Side
from reference.config import ROLES, ServerConfig, ServiceConfig
from reference.desk import Desk
from reference.matcher import Arrival, BetCreated, _Changes, _Match
from reference.orderbook import Book, Fill, Order
from reference.routing import even_routing, shard_of
from reference.settlement import (
    Entry,
    Ruling,
    SettlementKind,
    cancel_entries,
    correction_entries,
    correction_of,
    entries_of,
)
from reference.store import Store
from reference.writer import Posting, difference
from tests.machine import exchange_machine, model_desk, model_exchange
from tests.machine.exchange_machine import Place
from tests.machine.model_desk import NOT_HERE, Answer, Bet, CancelAnswer, Command, Line, MatchAnswer

HERE = 0
_NUMBERS = count(1)


def new_place() -> Place:
    """Wallets of two shards of server 0 and one of server 1, and matches whose home is server 0."""
    number = next(_NUMBERS)
    wallets = (number * 1000, number * 1000 + 100, number * 1000 + 1, number * 1000 + 99)
    return Place(wallets, tuple(UUID(int=number * 1000 + one) for one in range(exchange_machine.MATCHES + 1)))


def config_of(servers: list[ServerConfig], passwords: dict[str, str], commission_bps: int) -> ServiceConfig:
    """The service's configuration for two servers, with the machine's limits."""
    return ServiceConfig(
        servers=servers,
        routing=even_routing(2),
        passwords=passwords,
        kafka_bootstrap="127.0.0.1:1",
        redis_host="127.0.0.1",
        redis_port=1,
        commission_bps=commission_bps,
        max_amount_minor=exchange_machine.MAX_AMOUNT,
    )


def bulk_command(command: Command) -> BulkBet | BulkDeposit | BulkWithdraw:
    """The command in the service's words."""
    if command.op == "deposit":
        return BulkDeposit(command.user, command.key, command.amount)
    if command.op == "withdraw":
        return BulkWithdraw(command.user, command.key, command.amount)
    assert command.match and command.outcome and command.side and command.odds
    side = Side(command.side)
    return BulkBet(command.user, command.key, command.match, command.outcome, side, command.odds, command.amount)


def _differing(asked: Posting, kept: Posting) -> frozenset[str]:
    field = difference(asked.command, msgspec.json.encode(kept.command))
    return frozenset() if field is None else frozenset({field})


class _Cancelling:
    """An order as `model_desk.Cancels` wants it."""

    def __init__(self, order: Order, book: Book) -> None:
        self.remaining = order.remaining
        self._order, self._book = order, book

    def cancel(self, reason: str) -> int:
        assert reason == "REQUESTED"
        assert self._book.cancel(self._order.bet_id) is self._order
        return self._order.cancel_refund


class PureExchange:
    """One example's exchange."""

    name = "pure rules"

    def __init__(self, commission_bps: int) -> None:
        self.place = new_place()
        servers = [ServerConfig(f"pg{index}", "127.0.0.1", 1) for index in range(2)]
        self._config = config_of(servers, dict.fromkeys(ROLES, "unused"), commission_bps)
        self._desk = Desk(self._config, Store(self._config, "ledger_api"), [])
        self._wallets = model_desk.Wallets(_differing)
        self._matches = model_desk.Matches()
        self._cancels = model_desk.Cancels()
        self._ids: dict[Bet, UUID] = {}
        self._names: dict[UUID, Bet] = {}
        self._bets: dict[Bet, BetCreated] = {}
        self._orders: dict[Bet, Order] = {}
        self._books: dict[UUID, Book] = {}
        self._fills: dict[UUID, list[model_exchange.Fill]] = {}

    # -- the desk

    def post(self, commands: list[Command], *, over_the_desk: bool) -> list[Answer]:
        return [self._post(command) for command in commands]

    def _post(self, command: Command) -> Answer:
        if self._config.routing[shard_of(command.user)] != HERE:
            return NOT_HERE
        asked = bulk_command(command)
        refusals: dict[tuple[UUID, str], Outcome | Exception | None] = {}
        if isinstance(asked, BulkBet):
            refusal = self._matches.refusal(asked.match_id, asked.outcome)
            refusals[asked.match_id, asked.outcome] = Outcome(refusal) if refusal else None
        posting = self._desk._posting(asked, refusals)
        bet = (command.user, command.key) if posting.bet_id is not None else None
        answer = self._wallets.post(
            posting.user_id,
            posting.key,
            posting,
            (posting.type.value, posting.amount, posting.contra.value),
            posting.match_id,
            bet,
            refusal=posting.refusal,
        )
        if bet is not None and answer.outcome == "ACCEPTED" and not answer.replayed:
            assert isinstance(asked, BulkBet)
            assert posting.bet_id is not None
            self._ids[bet], self._names[posting.bet_id] = posting.bet_id, bet
            self._bets[bet] = BetCreated(
                posting.bet_id,
                posting.user_id,
                asked.match_id,
                asked.outcome,
                asked.side,
                asked.odds,
                asked.stake_minor,
                -posting.amount,
            )
        return answer

    def rollback(self, user: int, key: str) -> CancelAnswer:
        done = self._wallets.roll_back(user, key, lambda posting: str(posting.command["op"]))
        return done if isinstance(done, CancelAnswer) else self.cancel(user, f"ledger:rollback:{key}", done)

    def cancel(self, user: int, key: str, bet: Bet) -> CancelAnswer:
        created = self._bets[bet]
        if created.user_id != user:
            return CancelAnswer("UNKNOWN_BET", False, bet)
        order = self._orders.get(bet)
        found = None if order is None else _Cancelling(order, self._books[created.match_id])
        return self._cancels.decide(user, key, bet, is_open=self._matches.is_open(created.match_id), order=found)

    # -- matches

    def create_match(self, match: UUID, outcomes: tuple[str, ...], closes_at_ms: int) -> MatchAnswer:
        self._books.setdefault(match, Book(match))
        self._fills.setdefault(match, [])
        return self._matches.create(match, outcomes, closes_at_ms)

    def close_match(self, match: UUID) -> MatchAnswer:
        return self._matches.close(match)

    def settle_match(self, match: UUID, result: str) -> MatchAnswer:
        return self._matches.settle(match, result)

    def void_match(self, match: UUID) -> MatchAnswer:
        return self._matches.void(match)

    def resettle_match(self, match: UUID, result: str | None, corrects: int | None, key: str) -> MatchAnswer:
        return self._matches.resettle(match, result, corrects, key)

    # -- workers

    def arrive(self, bets: list[Bet]) -> None:
        changes = _Changes()
        matches: dict[UUID, _Match] = {}
        for bet in bets:
            created = self._bets[bet]
            if bet in self._orders:
                continue
            match_id = created.match_id
            book = self._books[match_id] if self._matches.is_open(match_id) else None
            arrivals = sum(order.match_id == match_id for order in self._orders.values())
            match = matches.setdefault(match_id, _Match((), 0, arrivals, book))
            cancel_waits = bet in self._cancels.waiting
            changes.admit(Arrival(created, uuid4(), None), match, cancel_waits=cancel_waits)
            self._orders[bet] = changes.new[created.bet_id][0]
        for fill in changes.fills:
            self._fills[fill.back.match_id].append(self._fill(fill))

    def _fill(self, fill: Fill) -> model_exchange.Fill:
        back, lay = self._names[fill.back.bet_id], self._names[fill.lay.bet_id]
        return model_exchange.Fill(fill.fill_no, back, lay, fill.odds, fill.stake, fill.liability, fill.winnings)

    def replace_matcher(self) -> None:
        """Every book is read anew from copies of its open orders."""
        self._orders = {
            bet: Order(*(getattr(order, name) for name in order.__struct_fields__))
            for bet, order in self._orders.items()
        }
        for match_id, book in self._books.items():
            waiting = [o for o in self._orders.values() if o.match_id == match_id and o.remaining]
            self._books[match_id] = Book(match_id, book.fill_count, reversed(waiting))

    def refund(self, bets: list[Bet]) -> None:
        for order in (self._orders[bet] for bet in bets):
            self._pay(cancel_entries(order.user_id, order.match_id, order.bet_id, order.cancel_refund))

    def settle(self, match_id: UUID) -> bool:
        match = self._matches.known[match_id]
        if not match.running:
            return False
        rulings = [
            Ruling(SettlementKind.VOID if result is None else SettlementKind.SETTLE, result) for result in match.rulings
        ]
        version, bps = len(rulings), self._config.commission_bps
        orders = [order for order in self._orders.values() if order.match_id == match_id]
        for start in range(0, len(orders), exchange_machine.PAGE):
            page = orders[start : start + exchange_machine.PAGE]
            for order in page:
                self._pay(cancel_entries(order.user_id, order.match_id, order.bet_id, order.cancel_refund))
                if version == 1:
                    self._pay(entries_of(order, *rulings[0], version, bps))
            for order in page if version > 1 else []:
                correction = correction_of(order, rulings[-2], rulings[-1], version, bps)
                if correction is not None:
                    balance, owed = self._wallets.balance(order.user_id), self._owed(order)
                    self._pay(list(correction_entries(correction, balance, owed)))
        self._matches.finish(match_id)
        return True

    def _owed(self, order: Order) -> int:
        bet = self._names[order.bet_id]
        own = self._wallets.lines.get(order.user_id, [])
        return max(0, sum(line.amount for line in own if line.bet == bet and line.contra == "HOUSE"))

    def _pay(self, entries: list[Entry]) -> None:
        for entry in entries:
            posting = Posting(entry.user_id, entry.key, entry.type, entry.amount, entry.contra)
            answer = self._wallets.post(
                entry.user_id,
                entry.key,
                posting,
                (entry.type.value, entry.amount, entry.contra.value),
                entry.match_id,
                self._names[entry.bet_id],
                entry.settlement_version,
            )
            assert answer.outcome == "ACCEPTED", entry

    # -- what stands there

    def lines(self) -> dict[int, list[Line]]:
        return {
            user: [line._replace(key=named_key(line.key, self._names)) for line in own]
            for user, own in self._wallets.lines.items()
        }

    def orders(self, match: UUID) -> list[tuple[model_exchange.Progress, str]]:
        return [
            (progress_of(self._names[order.bet_id], order), order.state.value)
            for order in self._orders.values()
            if order.match_id == match
        ]

    def fills(self, match: UUID) -> list[model_exchange.Fill]:
        return self._fills[match]

    def close(self) -> None:
        """Nothing was opened."""


def named_key(key: str, names: dict[UUID, Bet]) -> str:
    """A settlement entry's key with the bet's name in the place of its id; other keys as they are."""
    if not key.startswith("ledger:"):
        return key
    prefix, kind, bet_id, version = key.split(":")
    user, own_key = names[UUID(bet_id)]
    return f"{prefix}:{kind}:{user}/{own_key}:{version}"


def progress_of(bet: Bet, order: Order) -> model_exchange.Progress:
    return model_exchange.Progress(
        bet,
        order.arrival,
        order.matched_stake,
        order.matched_liability,
        order.winnings,
        order.cancelled_stake,
        order.cancel_refund,
        order.cancel_reason,
    )
