"""The HTTP door: route, decode, ask the desk or the reads, and say truthfully what became of the request."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import Any, TypeVar
from urllib.parse import parse_qs
from uuid import UUID

import msgspec
from prometheus_client import Counter

from reference import metrics
from reference.answers import (
    BulkAnswer,
    BulkResult,
    CancelAnswer,
    CommandAnswer,
    MatchAnswer,
    Problem,
    RollbackAnswer,
)
from reference.auth import Caller, Gate, check_admin, check_wallet
from reference.cache import Cache
from reference.commands import (
    BULK_MAX,
    MAX_USER_ID,
    Bulk,
    BulkCommand,
    CreateMatch,
    Deposit,
    MatchState,
    Outcome,
    PlaceBet,
    Rollback,
    SettleMatch,
    Withdraw,
)
from reference.config import ServiceConfig
from reference.cursor import decode_cursor
from reference.desk import MAX_CLOSES_AT_MS, Cancelled, Desk, Moved, checked_key, within
from reference.errors import (
    Draining,
    Forbidden,
    InvalidCommand,
    LedgerError,
    NotAdmitted,
    NotPosted,
    RateLimited,
    Unauthenticated,
)
from reference.limiter import Limiter
from reference.openapi import document
from reference.reads import (
    BETS,
    BETS_PAGE_MAX,
    BOOK_DEPTH_MAX,
    ENTRIES,
    ENTRIES_PAGE_MAX,
    LAST_MATCH,
    LAST_UUID,
    MATCHES,
    MATCHES_PAGE_MAX,
    TRANSACTIONS,
    Reads,
)
from reference.service import STOP_WITHIN_S, Health, LoopWatch, serve, stop_serving
from reference.store import Store
from reference.writer import Posted, Writer

log = logging.getLogger("ledgerproof.api")

BODY_MAX_BYTES = 16 * 1024
BULK_MAX_BYTES = 1024 * 1024
QUERY_FIELDS_MAX = 16
DRAIN_WITHIN_S = 12.0
"""Requests under way when the process is asked to stop are waited for this long: longer than a deadline in the queue
and a statement together can take."""
WRITER_STUCK_AFTER_S = 5.0
"""A batch under way for this much longer than its statement may take is not slow but lost."""

Headers = list[tuple[str, str]]
JSON: Headers = [("content-type", "application/json")]
PROBLEM: Headers = [("content-type", "application/problem+json")]
CHALLENGE: Headers = [*PROBLEM, ("www-authenticate", 'Bearer realm="ledgerproof", error="invalid_token"')]
NOT_ADMITTED: Headers = [("content-type", "application/problem+json"), ("x-admitted", "0"), ("retry-after", "1")]

_encode = msgspec.json.Encoder().encode
_deposit = msgspec.json.Decoder(Deposit).decode
_withdraw = msgspec.json.Decoder(Withdraw).decode
_place_bet = msgspec.json.Decoder(PlaceBet).decode
_create_match = msgspec.json.Decoder(CreateMatch).decode
_settle_match = msgspec.json.Decoder(SettleMatch).decode
_rollback = msgspec.json.Decoder(Rollback).decode
_bulk = msgspec.json.Decoder(Bulk).decode
_bulk_item = msgspec.json.Decoder(BulkCommand).decode


class _RawBulk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    commands: list[msgspec.Raw]


_raw_bulk = msgspec.json.Decoder(_RawBulk).decode

Answer = tuple[int, Headers, bytes]
Handler = Callable[[Any, Any, list[str]], Awaitable[Answer]]
"""(scope, protocol, the path split at its slashes) → the answer."""
Shape = tuple[str | None, ...]
_Command = TypeVar("_Command")
_Position = TypeVar("_Position")

METHODS = ("GET", "POST")


class Rejected(Exception):
    """A request whose form alone is refused, before anybody looks at what it says."""

    def __init__(self, status: int, title: str, detail: str, headers: Headers | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.headers = PROBLEM + (headers or [])


class Needs(Enum):
    """What a caller must be for a route."""

    NOBODY = 0
    ANYBODY = 1
    """Any valid token."""
    WALLET = 2
    """The wallet of the path, or a service."""
    ADMIN = 3


class Route:
    """One operation: its handler, and its metrics bound once, because a look-up by labels costs more than a count."""

    __slots__ = ("_requests", "errors", "handle", "name", "needs", "seconds")

    def __init__(self, name: str, needs: Needs, handle: Handler) -> None:
        self.name = name
        self.needs = needs
        self.handle = handle
        self.seconds = metrics.HTTP_SECONDS.labels(name)
        self.errors = metrics.HTTP_ERRORS.labels(name)
        self._requests: dict[int, Counter] = {}

    def count(self, status: int, seconds: float) -> None:
        """Count one answer."""
        counter = self._requests.get(status)
        if counter is None:
            counter = self._requests[status] = metrics.HTTP_REQUESTS.labels(self.name, status)
        counter.inc()
        self.seconds.observe(seconds)
        if status >= 500:
            self.errors.inc()


class Api:
    """One API process: stateless but for its connections and its memory of open matches."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._store = Store(config, "ledger_api")
        self._cache = Cache(config)
        self._writers = [Writer(self._store, index, "API") for index in range(len(config.servers))]
        self.desk = Desk(config, self._store, self._writers)
        self.reads = Reads(self._store, self._cache, config.projection_stale_after_ms)
        self.gate = Gate(config.token_key, trust_every_caller=config.trust_every_caller)
        self.limiter = Limiter(config)
        self._loop_watch = LoopWatch()
        self._health = Health()
        self._health.ready = self._ready
        self._health.alive = self._alive
        self._openapi = _encode(document())
        self._routes = {shape: Route(name, needs, handle) for shape, name, needs, handle in self._table()}
        self._unknown = Route("unknown", Needs.NOBODY, self._unknown_route)
        self._stopping = False
        self._draining = False
        self._under_way = 0
        self._idle = asyncio.Event()

    def start(self) -> None:
        """Start the writers; call it inside the running event loop."""
        self._loop_watch.start()
        for writer in self._writers:
            writer.start()

    async def drain(self) -> None:
        """Stop being ready, then refuse what is new and wait for what is under way (bounded)."""
        self._stopping = True
        await asyncio.sleep(self._config.drain_notice_ms / 1000)
        self._draining = True
        if self._under_way:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), DRAIN_WITHIN_S)
            except TimeoutError:
                log.exception("%d requests were still under way when the process had to stop", self._under_way)

    async def stop(self) -> None:
        """Finish what was admitted, then close every connection."""
        await asyncio.gather(*(writer.stop() for writer in self._writers))
        await self._loop_watch.stop()
        await self.limiter.close()
        await self._store.close()
        await self._cache.close()

    def _table(self) -> list[tuple[Shape, str, Needs, Handler]]:
        """Return (shape, name, who may, handler) of every operation; see `_shape`."""
        wallet, admin, anybody = Needs.WALLET, Needs.ADMIN, Needs.ANYBODY
        return [
            (("POST", "wallets", "bets"), "bets", wallet, self._bet),
            (("POST", "wallets", "deposits"), "deposits", wallet, self._deposit),
            (("POST", "wallets", "withdrawals"), "withdrawals", wallet, self._withdraw),
            (("POST", "wallets", "bets", "cancel"), "cancel", wallet, self._cancel),
            (("POST", "wallets", "rollbacks"), "rollbacks", wallet, self._rollback),
            (("GET", "wallets", "balance"), "balance", wallet, self._balance),
            (("GET", "wallets", "entries"), "entries", wallet, self._entries),
            (("GET", "wallets", "transactions"), "transactions", wallet, self._transactions),
            (("GET", "wallets", "stats"), "stats", wallet, self._stats),
            (("GET", "wallets", "bets"), "wallet_bets", wallet, self._bets),
            (("GET", "wallets", "bets", None), "bet", wallet, self._view_bet),
            (("POST", "matches"), "create_match", admin, self._create_match),
            (("POST", "matches", "close"), "close", admin, self._close_match),
            (("POST", "matches", "settle"), "settle", admin, self._settle_match),
            (("POST", "matches", "void"), "void", admin, self._void_match),
            (("POST", "commands"), "bulk", anybody, self._bulk),
            (("GET", "matches"), "matches", anybody, self._matches),
            (("GET", "matches", None), "match", anybody, self._match),
            (("GET", "matches", "book"), "book", anybody, self._book),
            (("GET", "openapi.json"), "openapi", Needs.NOBODY, self._serve_openapi),
        ]

    async def __call__(self, scope: Any, proto: Any) -> None:
        """Answer one request."""
        started = time.perf_counter()
        path = scope.path
        parts = path.split("/")
        route = self._routes.get(_shape(scope.method, parts))
        if route is None:
            if path in ("/livez", "/readyz", "/metrics"):
                await self._health(scope, proto)
                return
            route = self._unknown
        self._under_way += 1
        try:
            if self._draining or route.needs is not Needs.NOBODY:
                await self._admit(route.needs, scope, parts)
            answer = await route.handle(scope, proto, parts)
        except Exception as error:  # noqa: BLE001 - the last resort of a server: answer, log, go on
            answer = _failure(route, error)
        finally:
            self._under_way -= 1
            if self._draining and not self._under_way:
                self._idle.set()
        status, headers, body = answer
        proto.response_bytes(status, headers, body)
        route.count(status, time.perf_counter() - started)

    async def _admit(self, needs: Needs, scope: Any, parts: list[str]) -> None:
        """Let a request in, or raise: the process is stopping, or the caller may not, or calls too often."""
        if self._draining:
            raise Draining("this process is stopping; send the request to another one")
        caller = self.gate.caller(scope.headers.get("authorization"))
        if needs is Needs.WALLET:
            check_wallet(caller, parts[3])
        elif needs is Needs.ADMIN:
            check_admin(caller)
        if caller.subject and not caller.service:
            await self.limiter.take(int(caller.subject))

    async def _unknown_route(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        allowed = [method for method in METHODS if _shape(method, parts) in self._routes]
        if allowed:
            headers = [("allow", ", ".join(allowed))]
            raise Rejected(405, "method not allowed", f"this resource takes {', '.join(allowed)}", headers)
        return _problem(404, "no such route", f"{scope.method} {scope.path[:200]} is not in /openapi.json")

    def _alive(self) -> str | None:
        """Alive unless a writer has lost a batch: nothing but a new process would bring that back."""
        longest_s = self._config.statement_timeout_ms / 1000 + WRITER_STUCK_AFTER_S
        for index, writer in enumerate(self._writers):
            if writer.batch_age_s > longest_s:
                name = self._config.servers[index].name
                return f"the writer of {name} has not come back for {writer.batch_age_s:.0f} s"
        return None

    async def _ready(self) -> str | None:
        """Ready while at least one server takes commands: one dead server must not take all wallets offline."""
        if self._stopping:
            return "stopping"
        if (reason := self._alive() or self._loop_watch.complaint()) is not None:
            return reason
        for index in range(len(self._config.servers)):
            try:
                async with self._store.connection(index) as connection:
                    await connection.fetchval("SELECT 1", timeout=1)
            except LedgerError:
                continue
            return None
        return "no server can be reached"

    async def _serve_openapi(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        return 200, JSON, self._openapi

    # -- commands --------------------------------------------------------------------------------------

    async def _bet(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id, key = _user(parts[3]), _key(scope)
        command = _decode(_place_bet, await _body(scope, proto))
        return _answer(user_id, await self.desk.place_bet(user_id, key, command))

    async def _deposit(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id, key = _user(parts[3]), _key(scope)
        command = _decode(_deposit, await _body(scope, proto))
        return _answer(user_id, await self.desk.deposit(user_id, key, command))

    async def _withdraw(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id, key = _user(parts[3]), _key(scope)
        command = _decode(_withdraw, await _body(scope, proto))
        return _answer(user_id, await self.desk.withdraw(user_id, key, command))

    async def _cancel(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id, key, bet_id = _user(parts[3]), _key(scope), _uuid("bet_id", parts[5])
        await _empty_body(scope, proto)
        return _cancel_answer(user_id, await self.desk.cancel(user_id, key, bet_id))

    async def _rollback(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id = _user(parts[3])
        command = _decode(_rollback, await _body(scope, proto))
        done = await self.desk.rollback(user_id, command)
        if done.outcome != Outcome.ACCEPTED:
            return _refused(done.outcome, done.differs, replayed=done.replayed)
        answer = RollbackAnswer(
            done.outcome, done.replayed, user_id, command.key, done.bet_id, done.cancelled_stake, done.refund
        )
        return 202, JSON, _encode(answer)

    async def _bulk(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        caller = self.gate.caller(scope.headers.get("authorization"))
        commands = _decode_bulk(await _body(scope, proto, BULK_MAX_BYTES))
        within("commands", len(commands), 1, BULK_MAX)
        if not caller.service:
            if caller.subject:
                await self.limiter.take(int(caller.subject), len(commands) - 1)
            commands = [_own(caller, command) for command in commands]
        results = [_bulk_result(done) for done in await self.desk.bulk(commands)]
        return 200, JSON, _encode(BulkAnswer(results))

    async def _create_match(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        _key(scope)
        return _match_answer(await self.desk.create_match(_decode(_create_match, await _body(scope, proto))))

    async def _close_match(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        match_id, _ = _uuid("match_id", parts[3]), _key(scope)
        await _empty_body(scope, proto)
        return _match_answer(await self.desk.close_match(match_id))

    async def _settle_match(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        match_id, _ = _uuid("match_id", parts[3]), _key(scope)
        command = _decode(_settle_match, await _body(scope, proto))
        return _match_answer(await self.desk.settle_match(match_id, command))

    async def _void_match(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        match_id, _ = _uuid("match_id", parts[3]), _key(scope)
        await _empty_body(scope, proto)
        return _match_answer(await self.desk.void_match(match_id))

    # -- queries ---------------------------------------------------------------------------------------

    async def _balance(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id = _user(parts[3])
        query = _query(scope)
        strong = _choice(query, "consistency", ("eventual", "strong")) == "strong"
        min_seq = _number(query, "min_seq", 0, MAX_USER_ID, 0)
        as_of = _number(query, "as_of", -1, MAX_CLOSES_AT_MS, -1)
        if as_of >= 0:
            if min_seq:
                raise InvalidCommand("min_seq", "has no meaning together with as_of")
            view = await self.reads.balance_as_of(user_id, as_of)
        else:
            view = await self.reads.balance(user_id, strong=strong, min_seq=min_seq)
        return _found(view, "wallet", user_id)

    async def _entries(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id = _user(parts[3])
        query = _query(scope)
        first = _number(query, "after_seq", 0, MAX_USER_ID, 0)
        after_seq = _seq(_cursor(query, ENTRIES, int, first))
        limit = _number(query, "limit", 1, ENTRIES_PAGE_MAX, 100)
        return 200, JSON, _encode(await self.reads.entries(user_id, after_seq, limit))

    async def _transactions(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id = _user(parts[3])
        query = _query(scope)
        before_seq = _seq(_cursor(query, TRANSACTIONS, int, MAX_USER_ID))
        limit = _number(query, "limit", 1, ENTRIES_PAGE_MAX, 20)
        return 200, JSON, _encode(await self.reads.transactions(user_id, before_seq, limit))

    async def _stats(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id = _user(parts[3])
        return _found(await self.reads.stats(user_id), "wallet", user_id)

    async def _bets(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id = _user(parts[3])
        query = _query(scope)
        before = _cursor(query, BETS, UUID, LAST_UUID)
        limit = _number(query, "limit", 1, BETS_PAGE_MAX, 50)
        return 200, JSON, _encode(await self.reads.bets(user_id, before, limit))

    async def _view_bet(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id, bet_id = _user(parts[3]), _uuid("bet_id", parts[5])
        return _found(await self.reads.bet(user_id, bet_id), "bet", bet_id)

    async def _matches(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        query = _query(scope)
        state = _choice(query, "state", ("", *MatchState)) or None
        before = _cursor(query, MATCHES, tuple[int, UUID], LAST_MATCH)
        if not 0 <= before[0] <= LAST_MATCH[0]:
            raise InvalidCommand("cursor", "must be a next_cursor of this list")
        limit = _number(query, "limit", 1, MATCHES_PAGE_MAX, 50)
        return 200, JSON, _encode(await self.reads.matches(state, before, limit))

    async def _match(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        match_id = _uuid("match_id", parts[3])
        return _found(await self.reads.match(match_id), "match", match_id)

    async def _book(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        match_id = _uuid("match_id", parts[3])
        depth = _number(_query(scope), "depth", 1, BOOK_DEPTH_MAX, 10)
        return _found(await self.reads.book(match_id, depth), "match", match_id)


def _shape(method: str, parts: list[str]) -> Shape:
    """Return the literal parts of a path below /v1 with its method: what routes are found by.

    Ids stand at the fourth and sixth place; a trailing one is None in the shape. () is the shape of nothing.
    """
    count = len(parts)
    if count == 2:
        return method, parts[1]
    if count < 3 or parts[1] != "v1" or parts[0]:
        return ()
    if count == 5:
        return method, parts[2], parts[4]
    if count == 6:
        return method, parts[2], parts[4], None
    if count == 7:
        return method, parts[2], parts[4], parts[6]
    if count == 4:
        return method, parts[2], None
    if count == 3:
        return method, parts[2]
    return ()


def _failure(route: Route, error: Exception) -> Answer:
    """Return what is answered for an error: above all whether the command certainly did not happen."""
    if isinstance(error, InvalidCommand):
        return _problem(400, "invalid request", str(error), field=error.field)
    if isinstance(error, Rejected):
        return _problem(error.status, error.title, str(error), headers=error.headers)
    if isinstance(error, Unauthenticated):
        return _problem(401, "unauthenticated", str(error), headers=CHALLENGE)
    if isinstance(error, Forbidden):
        asks = f'Bearer realm="ledgerproof", error="insufficient_scope", scope="{error.scope}"'
        return _problem(403, "forbidden", str(error), headers=[*PROBLEM, ("www-authenticate", asks)])
    if isinstance(error, RateLimited):
        after = ("retry-after", str(math.ceil(error.retry_after_s)))
        return _problem(429, "rate limited", str(error), headers=[*PROBLEM, after, ("x-admitted", "0")])
    if isinstance(error, Draining):
        return _problem(503, "not admitted", str(error), headers=[*NOT_ADMITTED, ("connection", "close")])
    if isinstance(error, NotAdmitted):
        return _problem(503, "not admitted", str(error), headers=NOT_ADMITTED)
    if isinstance(error, NotPosted):
        log.warning("%s: %s", route.name, error)
        return _problem(503, "not posted", "the database refused it", headers=NOT_ADMITTED)
    if isinstance(error, LedgerError):
        return _problem(
            504,
            "outcome unknown",
            f"{error}; repeat the request with the same key to learn what became of it",
        )
    log.error("%s failed", route.name, exc_info=error)
    return _problem(500, "internal error", "see the log of this process")


def _answer(user_id: int, posted: Posted) -> Answer:
    """Say what became of a wallet command."""
    if posted.outcome == Outcome.ACCEPTED:
        answer = CommandAnswer(
            posted.outcome, user_id, posted.seq or 0, posted.balance or 0, posted.bet_id, posted.replayed
        )
        return 202, JSON, _encode(answer)
    return _refused(posted.outcome, posted.differs, replayed=posted.replayed)


def _cancel_answer(user_id: int, done: Cancelled) -> Answer:
    if done.outcome == Outcome.ACCEPTED and done.bet_id is not None:
        answer = CancelAnswer(done.outcome, done.replayed, user_id, done.bet_id, done.cancelled_stake, done.refund)
        return 202, JSON, _encode(answer)
    return _refused(done.outcome, done.differs, replayed=done.replayed)


def _bulk_result(done: Posted | Cancelled | Exception) -> BulkResult:
    """Say what became of one command of a bulk, in the words of the same command sent alone."""
    if isinstance(done, Exception):
        if isinstance(done, InvalidCommand):
            return BulkResult(400, title="invalid request", detail=str(done), field=done.field)
        if isinstance(done, Forbidden):
            return BulkResult(403, title="forbidden", detail=str(done))
        if isinstance(done, NotAdmitted | NotPosted):
            detail = str(done) if isinstance(done, NotAdmitted) else "the database refused it"
            return BulkResult(503, title="not admitted", detail=detail, admitted=False)
        if isinstance(done, LedgerError):
            return BulkResult(504, title="outcome unknown", detail=str(done))
        raise done
    if done.outcome == Outcome.ACCEPTED:
        if isinstance(done, Posted):
            return BulkResult(202, done.outcome, done.replayed, done.seq, done.balance, done.bet_id)
        return BulkResult(
            202,
            done.outcome,
            done.replayed,
            bet_id=done.bet_id,
            cancelled_stake_minor=done.cancelled_stake,
            refund_minor=done.refund,
        )
    if done.outcome == Outcome.REPLAYED_DIFFERENTLY:
        return BulkResult(409, done.outcome, replayed=True, title="key already used", field=done.differs)
    return BulkResult(422, done.outcome, done.replayed, title="refused", detail=REFUSALS[Outcome(done.outcome)])


def _match_answer(done: Moved) -> Answer:
    if done.outcome == Outcome.ACCEPTED:
        return 202, JSON, _encode(MatchAnswer(done.outcome, done.replayed, done.match_id, done.state or ""))
    return _refused(done.outcome, done.differs, replayed=done.replayed)


def _found(view: msgspec.Struct | None, what: str, name: object) -> Answer:
    if view is None:
        return _problem(404, f"no such {what}", f"there is no {what} {name} here")
    return 200, JSON, _encode(view)


REFUSALS = {
    Outcome.INSUFFICIENT_FUNDS: "the wallet does not hold enough",
    Outcome.LIMIT_EXCEEDED: "the bet would reserve more than the limit",
    Outcome.UNKNOWN_MATCH: "there is no such match",
    Outcome.UNKNOWN_OUTCOME: "the match has no such outcome",
    Outcome.MATCH_CLOSED: "the match does not take bets or cancels any more",
    Outcome.UNKNOWN_BET: "the wallet has no such bet",
    Outcome.NOTHING_TO_CANCEL: "no part of the bet is unmatched",
    Outcome.ILLEGAL_TRANSITION: "the match cannot go there from its state",
    Outcome.ROLLED_BACK: "the key was rolled back before the bet arrived",
}
"""What each refusal means."""


def _refused(outcome: str, differs: str | None, *, replayed: bool) -> Answer:
    """Return a refusal: an answer that is final for its key (422), or a key used for another body (409)."""
    if outcome == Outcome.REPLAYED_DIFFERENTLY:
        problem = Problem(
            "urn:ledgerproof:replayed-differently",
            "key already used",
            409,
            f"this key was used with another {differs}; use a new key for a new command",
            outcome,
            differs,
            True,
        )
        return 409, PROBLEM, _encode(problem)
    problem = Problem(
        f"urn:ledgerproof:refusal:{outcome}", "refused", 422, REFUSALS[Outcome(outcome)], outcome, replayed=replayed
    )
    return 422, PROBLEM, _encode(problem)


def _problem(status: int, title: str, detail: str, *, field: str | None = None, headers: Headers = PROBLEM) -> Answer:
    kind = f"urn:ledgerproof:{title.replace(' ', '-')}"
    return status, headers, _encode(Problem(kind, title, status, detail, field=field))


# -- reading requests ------------------------------------------------------------------------------------


def _user(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 19 and 1 <= (user_id := int(text)) <= MAX_USER_ID:
        return user_id
    raise InvalidCommand("user_id", "must be a whole number from 1 to 2^63-1")


def _uuid(field: str, text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise InvalidCommand(field, "must be a UUID") from error


def _key(scope: Any) -> str:
    key: str | None = scope.headers.get("idempotency-key")
    if key is None:
        raise InvalidCommand("Idempotency-Key", "this header is required; repeat it to repeat the command safely")
    return checked_key(key, "Idempotency-Key")


async def _body(scope: Any, proto: Any, limit: int = BODY_MAX_BYTES) -> bytes:
    kind = scope.headers.get("content-type")
    if kind is not None and kind != "application/json" and kind.partition(";")[0].strip().lower() != "application/json":
        raise Rejected(415, "unsupported media type", "send application/json")
    return await _bytes(scope, proto, limit)


async def _bytes(scope: Any, proto: Any, limit: int) -> bytes:
    length = scope.headers.get("content-length")
    if length is not None:
        if len(length) > 12 or int(length) > limit:
            raise _too_large(limit)
        whole: bytes = await proto()
        return whole
    chunks = bytearray()
    async for chunk in proto:
        chunks += chunk
        if len(chunks) > limit:
            raise _too_large(limit)
    return bytes(chunks)


def _too_large(limit: int) -> Rejected:
    # What was not read of the body must not be taken for the next request.
    return Rejected(413, "body too large", f"the body must be at most {limit} bytes", [("connection", "close")])


async def _empty_body(scope: Any, proto: Any) -> None:
    # Of any type: clients label even an empty body, each in its own way.
    if (await _bytes(scope, proto, BODY_MAX_BYTES)).strip() not in (b"", b"{}"):
        raise InvalidCommand("body", "must be empty or {}")


def _decode(decoder: Callable[[bytes], _Command], body: bytes) -> _Command:
    try:
        return decoder(body)
    except msgspec.ValidationError as error:
        message = str(error)
        field = message.rpartition("`$.")[2].rstrip("`") if "`$." in message else "body"
        raise InvalidCommand(field, message) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidCommand("body", f"is not the JSON expected: {error}") from error
    except RecursionError as error:
        raise InvalidCommand("body", "is nested too deeply") from error


def _decode_bulk(body: bytes) -> Sequence[BulkCommand | LedgerError]:
    """Decode a bulk; where a command is wrong, only that one becomes an error."""
    try:
        return _bulk(body).commands
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found: list[BulkCommand | LedgerError] = []
        for item in _decode(_raw_bulk, body).commands:
            try:
                found.append(_decode(_bulk_item, bytes(item)))
            except InvalidCommand as error:
                found.append(error)
        return found


def _own(caller: Caller, command: BulkCommand | LedgerError) -> BulkCommand | LedgerError:
    """Return the command, or an error in its place if the caller may not act for its wallet."""
    if isinstance(command, LedgerError):
        return command
    try:
        check_wallet(caller, str(command.user_id))
    except Forbidden as error:
        return error
    return command


def _query(scope: Any) -> dict[str, list[str]]:
    text = scope.query_string
    if not text:
        return {}
    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=QUERY_FIELDS_MAX)
    except ValueError as error:
        raise InvalidCommand("query", f"must have at most {QUERY_FIELDS_MAX} parameters") from error


def _cursor(query: dict[str, list[str]], kind: str, position: type[_Position], first: _Position) -> _Position:
    """Return where a page begins: at its cursor, or at `first` without one."""
    values = query.get("cursor")
    if values is None:
        return first
    if len(values) != 1:
        raise InvalidCommand("cursor", "must be given once")
    return decode_cursor(kind, values[0], position)


def _seq(seq: int) -> int:
    if not 0 <= seq <= MAX_USER_ID:
        raise InvalidCommand("cursor", "must be a next_cursor of this list")
    return seq


def _choice(query: dict[str, list[str]], name: str, choices: tuple[str, ...]) -> str:
    values = query.get(name, [choices[0]])
    if len(values) != 1 or values[0] not in choices:
        raise InvalidCommand(name, f"must be one of {', '.join(choices)}")
    return values[0]


def _number(query: dict[str, list[str]], name: str, low: int, high: int, default: int) -> int:
    values = query.get(name)
    if values is None:
        return default
    if len(values) != 1 or not values[0].isascii() or not values[0].isdigit() or len(values[0]) > 19:
        raise InvalidCommand(name, f"must be a whole number from {low} to {high}")
    return within(name, int(values[0]), low, high)


async def run(
    config: ServiceConfig, name: str, port: int, stopping: asyncio.Event, *, grpc_port: int | None = None
) -> None:
    """Serve until `stopping`, then finish what was admitted. Raises ConfigError without a key for tokens."""
    api = Api(config)
    if config.token_key is None:
        log.warning("%s has no token_key: it trusts every caller", name)
    api.start()
    server = serve(api, port)
    serving = asyncio.create_task(server.serve())
    log.info("%s serves on port %d", name, port)
    waiter = asyncio.create_task(stopping.wait())
    await asyncio.wait([waiter, serving], return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    await api.drain()
    stop_serving(server)
    await asyncio.wait([serving], timeout=STOP_WITHIN_S)
    await api.stop()
