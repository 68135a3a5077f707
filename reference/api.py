"""The HTTP door: route, decode, ask the desk or the reads, and say truthfully what became of the request."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs
from uuid import UUID

import msgspec
from prometheus_client import Counter

from reference import metrics
from reference.answers import CancelAnswer, CommandAnswer, MatchAnswer, Problem
from reference.cache import Cache
from reference.commands import MAX_USER_ID, CreateMatch, Deposit, Outcome, PlaceBet, SettleMatch, Withdraw
from reference.config import ServiceConfig
from reference.desk import Cancelled, Desk, Moved, checked_key, within
from reference.errors import InvalidCommand, LedgerError, NotAdmitted, NotPosted
from reference.openapi import document
from reference.reads import ENTRIES_PAGE_MAX, Reads
from reference.service import STOP_WITHIN_S, Health, serve, stop_serving
from reference.store import Store
from reference.writer import Posted, Writer

log = logging.getLogger("ledgerproof.api")

BODY_MAX_BYTES = 64 * 1024

Headers = list[tuple[str, str]]
JSON: Headers = [("content-type", "application/json")]
PROBLEM: Headers = [("content-type", "application/problem+json")]
NOT_ADMITTED: Headers = [("content-type", "application/problem+json"), ("x-admitted", "0"), ("retry-after", "1")]

_encode = msgspec.json.Encoder().encode
_deposit = msgspec.json.Decoder(Deposit).decode
_withdraw = msgspec.json.Decoder(Withdraw).decode
_place_bet = msgspec.json.Decoder(PlaceBet).decode
_create_match = msgspec.json.Decoder(CreateMatch).decode
_settle_match = msgspec.json.Decoder(SettleMatch).decode

Answer = tuple[int, Headers, bytes]
Handler = Callable[[Any, Any, list[str]], Awaitable[Answer]]
"""(scope, protocol, the path split at its slashes) → the answer."""
_Command = TypeVar("_Command")

METHODS = ("GET", "POST")


class Route:
    """One operation: its handler, and its metrics bound once, because a look-up by labels costs more than a count."""

    __slots__ = ("_requests", "errors", "handle", "name", "seconds")

    def __init__(self, name: str, handle: Handler) -> None:
        self.name = name
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
        self._health = Health()
        self._health.ready = self._ready
        self._openapi = _encode(document())
        self._routes = {shape: Route(name, handle) for shape, name, handle in self._table()}
        self._unknown = Route("unknown", _unknown_route)

    def start(self) -> None:
        """Start the writers; call it inside the running event loop."""
        for writer in self._writers:
            writer.start()

    async def stop(self) -> None:
        """Finish what was admitted, then close every connection."""
        await asyncio.gather(*(writer.stop() for writer in self._writers))
        await self._store.close()
        await self._cache.close()

    def _table(self) -> list[tuple[tuple[str | None, ...], str, Handler]]:
        """Return (shape, name, handler) of every operation; see `_shape`."""
        return [
            (("POST", "wallets", "bets"), "bets", self._bet),
            (("POST", "wallets", "deposits"), "deposits", self._deposit),
            (("POST", "wallets", "withdrawals"), "withdrawals", self._withdraw),
            (("POST", "wallets", "bets", "cancel"), "cancel", self._cancel),
            (("GET", "wallets", "balance"), "balance", self._balance),
            (("GET", "wallets", "entries"), "entries", self._entries),
            (("GET", "wallets", "bets", None), "bet", self._view_bet),
            (("POST", "matches"), "matches", self._create_match),
            (("GET", "matches", None), "match", self._match),
            (("POST", "matches", "close"), "close", self._close_match),
            (("POST", "matches", "settle"), "settle", self._settle_match),
            (("POST", "matches", "void"), "void", self._void_match),
            (("GET", "openapi.json"), "openapi", self._serve_openapi),
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
        try:
            status, headers, body = await route.handle(scope, proto, parts)
        except Exception as error:  # noqa: BLE001 - the last resort of a server: answer, log, go on
            status, headers, body = _failure(route, error)
        proto.response_bytes(status, headers, body)
        route.count(status, time.perf_counter() - started)

    async def _ready(self) -> str | None:
        """Ready while at least one server takes commands: one dead server must not take all wallets offline."""
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
        return _found(await self.reads.balance(user_id, strong=strong, min_seq=min_seq), "wallet", user_id)

    async def _entries(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id = _user(parts[3])
        query = _query(scope)
        after_seq = _number(query, "after_seq", 0, MAX_USER_ID, 0)
        limit = _number(query, "limit", 1, ENTRIES_PAGE_MAX, 100)
        return 200, JSON, _encode(await self.reads.entries(user_id, after_seq, limit))

    async def _view_bet(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        user_id, bet_id = _user(parts[3]), _uuid("bet_id", parts[5])
        return _found(await self.reads.bet(user_id, bet_id), "bet", bet_id)

    async def _match(self, scope: Any, proto: Any, parts: list[str]) -> Answer:
        match_id = _uuid("match_id", parts[3])
        return _found(await self.reads.match(match_id), "match", match_id)


def _shape(method: str, parts: list[str]) -> tuple[str | None, ...]:
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


async def _unknown_route(scope: Any, proto: Any, parts: list[str]) -> Answer:
    return _problem(404, "no such route", f"{scope.method} {scope.path[:200]} is not in /openapi.json")


def _failure(route: Route, error: Exception) -> Answer:
    """Return what is answered for an error: above all whether the command certainly did not happen."""
    if isinstance(error, InvalidCommand):
        return _problem(400, "invalid request", str(error), field=error.field)
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
    if done.outcome == Outcome.ACCEPTED:
        answer = CancelAnswer(done.outcome, done.replayed, user_id, done.bet_id, done.cancelled_stake, done.refund)
        return 202, JSON, _encode(answer)
    return _refused(done.outcome, done.differs, replayed=done.replayed)


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
    length = scope.headers.get("content-length")
    if length is not None and (not length.isdigit() or int(length) > limit):
        raise InvalidCommand("body", f"must be at most {limit} bytes")
    if length is not None:
        whole: bytes = await proto()
        return whole
    chunks = bytearray()
    async for chunk in proto:
        chunks += chunk
        if len(chunks) > limit:
            raise InvalidCommand("body", f"must be at most {limit} bytes")
    return bytes(chunks)


async def _empty_body(scope: Any, proto: Any) -> None:
    if (await _body(scope, proto)).strip() not in (b"", b"{}"):
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


def _query(scope: Any) -> dict[str, list[str]]:
    return parse_qs(scope.query_string)


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


async def run(config: ServiceConfig, name: str, port: int, stopping: asyncio.Event) -> None:
    """Serve until `stopping`, then finish what was admitted."""
    api = Api(config)
    api.start()
    server = serve(api, port)
    serving = asyncio.create_task(server.serve())
    log.info("%s serves on port %d", name, port)
    waiter = asyncio.create_task(stopping.wait())
    await asyncio.wait([waiter, serving], return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    stop_serving(server)
    await asyncio.wait([serving], timeout=STOP_WITHIN_S)
    await api.stop()
