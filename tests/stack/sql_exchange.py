"""The service's own functions over one real Postgres server as one exchange: desk, writer, matcher and settler.

They are called in this process as the service's processes call them, each over connections of its own database role;
what travels by Kafka otherwise is taken from the outbox. The server is that of the session's stack; the database is
the machine's own, so that the stack's workers do not take part.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import msgspec

from reference.bus import Message
from reference.commands import (
    TOPIC_OF,
    BulkBet,
    BulkCommand,
    CreateMatch,
    EventType,
    ResettleMatch,
    Rollback,
    SettleMatch,
)
from reference.config import ServerConfig, ServiceConfig
from reference.desk import Cancelled, Desk, Moved
from reference.errors import ShardNotHere
from reference.install import install_server
from reference.matcher import Matcher, order_of
from reference.settler import Settlement, Settler
from reference.store import Store
from reference.tracing import Tracing
from reference.writer import Posted, Posting, Writer, _Waiting
from tests.machine import exchange_machine, model_exchange
from tests.machine.model_desk import NOT_HERE, Answer, Bet, CancelAnswer, Command, Line, MatchAnswer
from tests.machine.pure_exchange import bulk_command, config_of, named_key, new_place, progress_of

DATABASE = "machine"
HERE = 0
FOR_EVER = float("inf")

_LINES = """SELECT user_id, seq, type, amount, contra, match_id, bet_id, settlement_version, idempotent_key,
                   balance_snapshot
              FROM wallet_ledger WHERE user_id = ANY ($1::bigint[]) AND shard = ANY ($2::smallint[])
             ORDER BY user_id, seq"""
_ORDERS = """SELECT bet_id, match_id, user_id, outcome, side, odds, stake, reserve, arrival, matched_stake,
                    matched_liability, winnings, liability_hundredths, cancelled_stake, cancel_refund, cancel_reason,
                    state
               FROM orders WHERE match_id = $1 ORDER BY arrival"""
_FILLS = "SELECT * FROM fills WHERE match_id = $1 ORDER BY fill_no"
_EVENTS = "SELECT id, event_id, event_type, partition_key, payload::text AS body FROM events WHERE id > $1 ORDER BY id"

_Result = TypeVar("_Result")


@dataclass
class _Rate:
    """The service's parts under one rate of commission, with what they opened."""

    desk: Desk
    writer: Writer
    api: Store
    matching: Store
    settling: Store


@dataclass
class Server:
    """One database of a real server and all that the service has over it; kept for all examples."""

    place: ServerConfig
    elsewhere: ServerConfig
    passwords: dict[str, str]
    superuser: tuple[str, str]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    rates: dict[int, _Rate] = field(default_factory=dict)
    newest_event: int = 0

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return self.loop.run_until_complete(work)

    def open(self) -> None:
        """Install the schema as the service does, and connect as its owner to look at the tables."""
        user, password = self.superuser
        self.run(install_server(self.config(0), HERE, user, password))
        place = self.place
        self.owner = self.run(
            asyncpg.connect(host=place.host, port=place.port, user=user, password=password, database=DATABASE)
        )
        self.posting = self.run(Store(self.config(0), "ledger_api").connect(HERE))

    def config(self, commission_bps: int) -> ServiceConfig:
        return config_of([self.place, self.elsewhere], self.passwords, commission_bps)

    def rate(self, commission_bps: int) -> _Rate:
        if commission_bps not in self.rates:
            config = self.config(commission_bps)
            api, matching, settling = (Store(config, f"ledger_{role}") for role in ("api", "matcher", "settler"))
            writer = Writer(api, HERE, "API", Tracing(config, "machine"))

            async def start() -> None:
                writer.start()

            self.run(start())
            self.rates[commission_bps] = _Rate(Desk(config, api, [writer]), writer, api, matching, settling)
        return self.rates[commission_bps]

    def close(self) -> None:
        async def end() -> None:
            for rate in self.rates.values():
                await rate.writer.stop()
                for store in (rate.api, rate.matching, rate.settling):
                    await store.close()
            await self.posting.close()
            await self.owner.close()

        self.run(end())
        self.loop.close()


class SqlExchange:
    """One example's exchange on the server."""

    name = "one Postgres server"

    def __init__(self, server: Server, commission_bps: int) -> None:
        self.place = new_place()
        self._server = server
        self._run = server.run
        self._rate = server.rate(commission_bps)
        self._desk = self._rate.desk
        self._matcher = Matcher(self._rate.matching)
        self._settler = Settler(self._rate.settling)
        self._ids: dict[Bet, UUID] = {}
        self._names: dict[UUID, Bet] = {}
        self._created: dict[Bet, Message] = {}
        self._cancelled: dict[Bet, Message] = {}
        # An example that failed may have left events that nobody read.
        server.newest_event = self._run(server.owner.fetchval("SELECT coalesce(max(id), 0) FROM events"))

    # -- the desk

    def post(self, commands: list[Command], *, over_the_desk: bool) -> list[Answer]:
        asked = [bulk_command(command) for command in commands]
        done = self._run(self._desk.bulk(asked) if over_the_desk else self._post_in_batches(asked))
        answers = [self._answer(command, each) for command, each in zip(commands, done, strict=True)]
        self._read_outbox()
        return answers

    async def _post_in_batches(self, commands: Sequence[BulkCommand]) -> list[Any]:
        """Post as the writer does, without its choice of what goes together: as much as may."""
        refusals = await self._desk._refusals({(c.match_id, c.outcome) for c in commands if isinstance(c, BulkBet)})
        waiting = [self._waiting(self._desk._posting(command, refusals)) for command in commands]
        batch: dict[tuple[int, str], _Waiting] = {}
        for one in waiting:
            identity = (one.posting.user_id, one.posting.key)
            if identity in batch:
                assert await self._rate.writer._post_over(self._server.posting, list(batch.values()))
                batch = {}
            batch[identity] = one
        assert await self._rate.writer._post_over(self._server.posting, list(batch.values()))
        return await asyncio.gather(*(one.future for one in waiting), return_exceptions=True)

    def _waiting(self, posting: Posting) -> _Waiting:
        return _Waiting(posting, asyncio.get_running_loop().create_future(), FOR_EVER)

    def _answer(self, command: Command, done: Posted | Cancelled | Exception) -> Answer:
        if isinstance(done, ShardNotHere):
            return NOT_HERE
        if isinstance(done, Exception):
            raise done
        assert isinstance(done, Posted)
        bet = (command.user, command.key)
        if done.bet_id is not None and not done.replayed:
            assert self._ids.setdefault(bet, done.bet_id) == done.bet_id
            self._names[done.bet_id] = bet
        name = self._named(done.bet_id)
        differs = frozenset() if done.differs is None else frozenset({done.differs})
        return Answer(str(done.outcome), done.replayed, done.seq, done.balance, name, differs)

    def _named(self, bet_id: UUID | None) -> Bet | None:
        """A bet's name; one that nobody was told of has a name that no model knows."""
        return None if bet_id is None else self._names.get(bet_id, (0, f"unknown bet {bet_id}"))

    def rollback(self, user: int, key: str) -> CancelAnswer:
        return self._cancel_answer(self._run(self._desk.rollback(user, Rollback(key))))

    def cancel(self, user: int, key: str, bet: Bet) -> CancelAnswer:
        return self._cancel_answer(self._run(self._desk.cancel(user, key, self._ids[bet])))

    def _cancel_answer(self, done: Cancelled) -> CancelAnswer:
        self._read_outbox()
        bet = self._named(done.bet_id)
        return CancelAnswer(str(done.outcome), done.replayed, bet, done.cancelled_stake, done.refund, done.differs)

    # -- matches

    def create_match(self, match: UUID, outcomes: tuple[str, ...], closes_at_ms: int) -> MatchAnswer:
        return self._moved(self._desk.create_match(CreateMatch(match, closes_at_ms, outcomes)))

    def close_match(self, match: UUID) -> MatchAnswer:
        return self._moved(self._desk.close_match(match))

    def settle_match(self, match: UUID, result: str) -> MatchAnswer:
        return self._moved(self._desk.settle_match(match, SettleMatch(result)))

    def void_match(self, match: UUID) -> MatchAnswer:
        return self._moved(self._desk.void_match(match))

    def resettle_match(self, match: UUID, result: str | None, corrects: int | None, key: str) -> MatchAnswer:
        return self._moved(self._desk.resettle_match(match, key, ResettleMatch(result, corrects)))

    def _moved(self, work: Coroutine[Any, Any, Moved]) -> MatchAnswer:
        done = self._run(work)
        return MatchAnswer(str(done.outcome), done.replayed, done.state, done.differs, done.settlement_version)

    # -- workers

    def arrive(self, bets: list[Bet]) -> None:
        self._run(self._matcher.handle(HERE, [self._created[bet] for bet in bets]))
        self._read_outbox()

    def replace_matcher(self) -> None:
        async def replace() -> None:
            self._matcher.close()

        self._run(replace())
        self._matcher = Matcher(self._rate.matching)

    def refund(self, bets: list[Bet]) -> None:
        messages = [self._cancelled[bet] for bet in bets]
        self._run(self._settler.handle(self._settler.lane_of(messages[0]), messages))

    def settle(self, match: UUID) -> bool:
        return self._run(Settlement(self._rate.settling, match).run(exchange_machine.PAGE))

    def _read_outbox(self) -> None:
        """Take what was written since the last look; an event of a bet comes once in its life."""
        for row in self._run(self._server.owner.fetch(_EVENTS, self._server.newest_event)):
            self._server.newest_event = row["id"]
            message = Message(
                topic=TOPIC_OF[row["event_type"]],
                partition=0,
                offset=row["id"],
                key=row["partition_key"],
                event_id=str(row["event_id"]),
                event_type=row["event_type"],
                traceparent=None,
                committed_at_ms=0,
                payload=msgspec.json.decode(row["body"]),
                raw=row["body"].encode(),
            )
            kind = {EventType.BET_CREATED: self._created, EventType.BET_CANCELLED: self._cancelled}
            if message.event_type in kind:
                bet = self._named(UUID(message.payload["bet_id"]))
                assert bet is not None
                seen = kind[EventType(message.event_type)]
                assert bet not in seen, f"two {message.event_type} events of bet {bet}"
                seen[bet] = message

    # -- what stands there

    def lines(self) -> dict[int, list[Line]]:
        users = list(self.place.wallets)
        found: dict[int, list[Line]] = {}
        for row in self._run(self._server.owner.fetch(_LINES, users, [user % 100 for user in users])):
            bet = self._named(row["bet_id"])
            user, seq, kind, amount, contra, match_id, _, version, key, balance = row
            line = Line(seq, kind, amount, contra, match_id, bet, version, named_key(key, self._names), balance)
            found.setdefault(user, []).append(line)
        return found

    def orders(self, match: UUID) -> list[tuple[model_exchange.Progress, str]]:
        rows = self._run(self._server.owner.fetch(_ORDERS, match))
        return [(progress_of(self._names[row["bet_id"]], order_of(row)), row["state"]) for row in rows]

    def fills(self, match: UUID) -> list[model_exchange.Fill]:
        rows = self._run(self._server.owner.fetch(_FILLS, match))
        return [
            model_exchange.Fill(
                row["fill_no"],
                self._names[row["back_bet_id"]],
                self._names[row["lay_bet_id"]],
                row["odds"],
                row["stake"],
                row["liability"],
                row["winnings"],
            )
            for row in rows
        ]

    def close(self) -> None:
        self.replace_matcher()
