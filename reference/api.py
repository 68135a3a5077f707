"""The HTTP door: route, decode, ask the desk or the reads, and say truthfully what became of the request."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import msgspec
from prometheus_client import Counter, Histogram

from reference import metrics, web
from reference.admission import Admission, Needs
from reference.answers import BulkAnswer, RollbackAnswer
from reference.cache import Cache
from reference.commands import (
    BULK_MAX,
    MAX_USER_ID,
    CreateMatch,
    Deposit,
    MatchState,
    Outcome,
    PlaceBet,
    ResettleMatch,
    Rollback,
    SettleMatch,
    Withdraw,
)
from reference.config import ServiceConfig
from reference.desk import MAX_CLOSES_AT_MS, Desk, within
from reference.errors import InvalidCommand, LedgerError
from reference.event_stream import EventStreams
from reference.failpoints import hit_async
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
from reference.tracing import Tracing
from reference.writer import Writer

log = logging.getLogger("ledgerproof.api")

WRITER_STUCK_AFTER_S = 5.0
"""A batch under way for this much longer than its statement may take is not slow but lost."""


_encode = msgspec.json.Encoder().encode
_deposit = msgspec.json.Decoder(Deposit).decode
_withdraw = msgspec.json.Decoder(Withdraw).decode
_place_bet = msgspec.json.Decoder(PlaceBet).decode
_create_match = msgspec.json.Decoder(CreateMatch).decode
_settle_match = msgspec.json.Decoder(SettleMatch).decode
_resettle_match = msgspec.json.Decoder(ResettleMatch).decode
_rollback = msgspec.json.Decoder(Rollback).decode

Handler = Callable[[Any, Any, list[str]], Awaitable[web.Answer | None]]
"""(scope, protocol, the path split at its slashes) → the answer, or None if the handler sent it by itself."""
Shape = tuple[str | None, ...]

_NO_ATTRIBUTES: dict[str, str] = {}

METHODS = ("GET", "POST")


class Route:
    """One operation: its handler, and its metrics bound once, because a look-up by labels costs more than a count.

    They are bound by the first request: series of operations that nobody asks for would make each scrape, which
    stops the event loop, several times as long.
    """

    __slots__ = ("_requests", "_seconds", "handle", "name", "needs")

    def __init__(self, name: str, needs: Needs, handle: Handler) -> None:
        self.name = name
        self.needs = needs
        self.handle = handle
        self._seconds: Histogram | None = None
        self._requests: dict[int, Counter] = {}

    def count(self, status: int, seconds: float) -> None:
        """Count one answer."""
        counter = self._requests.get(status)
        if counter is None:
            counter = self._requests[status] = metrics.HTTP_REQUESTS.labels(self.name, status)
        counter.inc()
        if self._seconds is None:
            self._seconds = metrics.HTTP_SECONDS.labels(self.name)
        self._seconds.observe(seconds)
        if status >= 500:
            metrics.HTTP_ERRORS.labels(self.name).inc()


class Api:
    """One API process: stateless but for its connections and its memory of open matches."""

    def __init__(self, config: ServiceConfig, tracing: Tracing) -> None:
        self._config = config
        self._tracing = tracing
        self._store = Store(config, "ledger_api")
        self._cache = Cache(config)
        self.writers = [Writer(self._store, index, "API", tracing) for index in range(len(config.servers))]
        self.desk = Desk(config, self._store, self.writers)
        self.reads = Reads(self._store, self._cache)
        self.streams = EventStreams(config, self.reads)
        self.admission = Admission(config)
        self._loop_watch = LoopWatch()
        self._health = Health()
        self._health.ready = self.ready
        self._health.alive = self.alive
        self._openapi = _encode(document(config.max_amount_minor))
        self._routes = {shape: Route(name, needs, handle) for shape, name, needs, handle in self._table()}
        self._unknown = Route("unknown", Needs.NOBODY, self._unknown_route)

    def start(self) -> None:
        """Start the writers; call it inside the running event loop."""
        self._loop_watch.start()
        for writer in self.writers:
            writer.start()

    async def drain(self) -> None:
        """Stop being ready, then refuse what is new and wait for what is under way (bounded)."""
        self.admission.stopping = True
        await self.streams.close()
        left = await self.admission.drain()
        if left:
            log.error("%d requests were still under way when the process had to stop", left)

    async def stop(self) -> None:
        """Finish what was admitted, then close every connection."""
        await asyncio.gather(*(writer.stop() for writer in self.writers))
        await self._loop_watch.stop()
        await self.admission.close()
        await self.reads.close()
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
            (("GET", "wallets", "events"), "events", wallet, self._events),
            (("GET", "wallets", "advances"), "advances", wallet, self._advances),
            (("GET", "wallets", "bets"), "wallet_bets", wallet, self._bets),
            (("GET", "wallets", "bets", None), "bet", wallet, self._view_bet),
            (("POST", "matches"), "create_match", admin, self._create_match),
            (("POST", "matches", "close"), "close", admin, self._close_match),
            (("POST", "matches", "settle"), "settle", admin, self._settle_match),
            (("POST", "matches", "resettle"), "resettle", admin, self._resettle_match),
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
        admission = self.admission
        admission.under_way += 1
        span = self._tracing.enter(route.name, scope.headers.get("traceparent"), _NO_ATTRIBUTES)
        try:
            if route.needs is not Needs.NOBODY:
                user = parts[3] if route.needs is Needs.WALLET else ""
                await admission.admit(route.needs, scope.headers.get("authorization"), user)
            await hit_async("api.after_admit_before_handle")
            answer: web.Answer | None = await route.handle(scope, proto, parts)
            if scope.method == "POST":
                await hit_async("api.after_commit_before_ack")
        except Exception as error:  # noqa: BLE001 - the last resort of a server: answer, log, go on
            answer = web.failure(route.name, error)
        finally:
            admission.leave()
        status = 200
        if answer is not None:
            status, headers, body = answer
            proto.response_bytes(status, headers, body)
        if span is not None:
            attributes = {"http.request.method": scope.method, "url.path": path, "http.response.status_code": status}
            self._tracing.leave(span, attributes, failed=status >= 500)
        route.count(status, time.perf_counter() - started)

    async def _unknown_route(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        allowed = [method for method in METHODS if _shape(method, parts) in self._routes]
        if allowed:
            headers = [("allow", ", ".join(allowed))]
            raise web.Rejected(405, "method not allowed", f"this resource takes {', '.join(allowed)}", headers)
        return web.problem(404, "no such route", f"{scope.method} {scope.path[:200]} is not in /openapi.json")

    def alive(self) -> str | None:
        """Alive unless a writer has lost a batch: nothing but a new process would bring that back."""
        longest_s = self._config.statement_timeout_ms / 1000 + WRITER_STUCK_AFTER_S
        for index, writer in enumerate(self.writers):
            if writer.batch_age_s > longest_s:
                name = self._config.servers[index].name
                return f"the writer of {name} has not come back for {writer.batch_age_s:.0f} s"
        return None

    async def ready(self) -> str | None:
        """Ready while at least one server takes commands: one dead server must not take all wallets offline."""
        if self.admission.stopping:
            return "stopping"
        if (reason := self.alive() or self._loop_watch.complaint()) is not None:
            return reason
        for index in range(len(self._config.servers)):
            try:
                async with self._store.connection(index) as connection:
                    await connection.fetchval("SELECT 1", timeout=1)
            except LedgerError:
                continue
            return None
        return "no server can be reached"

    async def _serve_openapi(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        return 200, web.JSON, self._openapi

    # -- commands --------------------------------------------------------------------------------------

    async def _bet(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id, key = web.user_of(parts[3]), web.key_of(scope)
        command = web.decode(_place_bet, await web.read_body(scope, proto))
        return web.answer(user_id, await self.desk.place_bet(user_id, key, command))

    async def _deposit(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id, key = web.user_of(parts[3]), web.key_of(scope)
        command = web.decode(_deposit, await web.read_body(scope, proto))
        return web.answer(user_id, await self.desk.deposit(user_id, key, command))

    async def _withdraw(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id, key = web.user_of(parts[3]), web.key_of(scope)
        command = web.decode(_withdraw, await web.read_body(scope, proto))
        return web.answer(user_id, await self.desk.withdraw(user_id, key, command))

    async def _cancel(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id, key, bet_id = web.user_of(parts[3]), web.key_of(scope), web.uuid_of("bet_id", parts[5])
        await web.read_empty(scope, proto)
        return web.cancel_answer(user_id, await self.desk.cancel(user_id, key, bet_id))

    async def _rollback(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id = web.user_of(parts[3])
        command = web.decode(_rollback, await web.read_body(scope, proto))
        done = await self.desk.rollback(user_id, command)
        if done.outcome != Outcome.ACCEPTED:
            return web.refused(done.outcome, done.differs, replayed=done.replayed)
        answer = RollbackAnswer(
            done.outcome, done.replayed, user_id, command.key, done.bet_id, done.cancelled_stake, done.refund
        )
        return 202, web.JSON, _encode(answer)

    async def _bulk(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        caller = self.admission.gate.caller(scope.headers.get("authorization"))
        commands = web.decode_bulk(await web.read_body(scope, proto, web.BULK_MAX_BYTES))
        within("commands", len(commands), 1, BULK_MAX)
        if not caller.service:
            if caller.subject and len(commands) > 1:
                await self.admission.limiter.take(int(caller.subject), len(commands) - 1)
            commands = [web.own(caller, command) for command in commands]
        results = [web.bulk_result(done) for done in await self.desk.bulk(commands)]
        return 200, web.JSON, _encode(BulkAnswer(results))

    async def _create_match(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        web.key_of(scope)
        return web.match_answer(
            await self.desk.create_match(web.decode(_create_match, await web.read_body(scope, proto)))
        )

    async def _close_match(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        match_id, _ = web.uuid_of("match_id", parts[3]), web.key_of(scope)
        await web.read_empty(scope, proto)
        return web.match_answer(await self.desk.close_match(match_id))

    async def _settle_match(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        match_id, _ = web.uuid_of("match_id", parts[3]), web.key_of(scope)
        command = web.decode(_settle_match, await web.read_body(scope, proto))
        return web.match_answer(await self.desk.settle_match(match_id, command))

    async def _resettle_match(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        match_id, key = web.uuid_of("match_id", parts[3]), web.key_of(scope)
        command = web.decode(_resettle_match, await web.read_body(scope, proto))
        return web.resettle_answer(await self.desk.resettle_match(match_id, key, command))

    async def _void_match(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        match_id, _ = web.uuid_of("match_id", parts[3]), web.key_of(scope)
        await web.read_empty(scope, proto)
        return web.match_answer(await self.desk.void_match(match_id))

    # -- queries ---------------------------------------------------------------------------------------

    async def _balance(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id = web.user_of(parts[3])
        query = web.query_of(scope)
        strong = web.choice(query, "consistency", ("eventual", "strong")) == "strong"
        min_seq = web.number(query, "min_seq", 0, MAX_USER_ID, 0)
        as_of = web.number(query, "as_of", -1, MAX_CLOSES_AT_MS, -1)
        if as_of >= 0:
            if min_seq:
                raise InvalidCommand("min_seq", "has no meaning together with as_of")
            view = await self.reads.balance_as_of(user_id, as_of)
        else:
            view = await self.reads.balance(user_id, strong=strong, min_seq=min_seq)
        return web.found(view, "wallet", user_id)

    async def _entries(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id = web.user_of(parts[3])
        query = web.query_of(scope)
        first = web.number(query, "after_seq", 0, MAX_USER_ID, 0)
        after_seq = web.seq_of(web.cursor(query, ENTRIES, int, first))
        limit = web.number(query, "limit", 1, ENTRIES_PAGE_MAX, 100)
        return 200, web.JSON, _encode(await self.reads.entries(user_id, after_seq, limit))

    async def _transactions(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id = web.user_of(parts[3])
        query = web.query_of(scope)
        before_seq = web.seq_of(web.cursor(query, TRANSACTIONS, int, MAX_USER_ID))
        limit = web.number(query, "limit", 1, ENTRIES_PAGE_MAX, 20)
        return 200, web.JSON, _encode(await self.reads.transactions(user_id, before_seq, limit))

    async def _events(self, scope: Any, proto: Any, parts: list[str]) -> None:
        user_id = web.user_of(parts[3])
        caller = self.admission.gate.caller(scope.headers.get("authorization"))
        last: str = scope.headers.get("last-event-id") or "0"
        last_seq = web.number({"Last-Event-ID": [last]}, "Last-Event-ID", 0, MAX_USER_ID, 0)
        await self.streams.serve(proto, caller, user_id, last_seq)

    async def _advances(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        return 200, web.JSON, _encode(await self.reads.advances(web.user_of(parts[3])))

    async def _stats(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id = web.user_of(parts[3])
        return web.found(await self.reads.stats(user_id), "wallet", user_id)

    async def _bets(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id = web.user_of(parts[3])
        query = web.query_of(scope)
        before = web.cursor(query, BETS, UUID, LAST_UUID)
        limit = web.number(query, "limit", 1, BETS_PAGE_MAX, 50)
        return 200, web.JSON, _encode(await self.reads.bets(user_id, before, limit))

    async def _view_bet(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        user_id, bet_id = web.user_of(parts[3]), web.uuid_of("bet_id", parts[5])
        return web.found(await self.reads.bet(user_id, bet_id), "bet", bet_id)

    async def _matches(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        query = web.query_of(scope)
        state = web.choice(query, "state", tuple(MatchState)) if "state" in query else None
        before = web.cursor(query, MATCHES, tuple[int, UUID], LAST_MATCH)
        if not 0 <= before[0] <= LAST_MATCH[0]:
            raise InvalidCommand("cursor", "must be a next_cursor of this list")
        limit = web.number(query, "limit", 1, MATCHES_PAGE_MAX, 50)
        return 200, web.JSON, _encode(await self.reads.matches(state, before, limit))

    async def _match(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        match_id = web.uuid_of("match_id", parts[3])
        return web.found(await self.reads.match(match_id), "match", match_id)

    async def _book(self, scope: Any, proto: Any, parts: list[str]) -> web.Answer:
        match_id = web.uuid_of("match_id", parts[3])
        depth = web.number(web.query_of(scope), "depth", 1, BOOK_DEPTH_MAX, 10)
        return web.found(await self.reads.book(match_id, depth), "match", match_id)


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


async def run(
    config: ServiceConfig, name: str, port: int, stopping: asyncio.Event, *, grpc_port: int | None = None
) -> None:
    """Serve until `stopping`, then finish what was admitted.

    Raises ConfigError without a key for tokens, and OSError if the port cannot be had.
    """
    tracing = Tracing(config, name)
    api = Api(config, tracing)
    if config.token_key is None:
        log.warning("%s has no token_key: it trusts every caller", name)
    api.start()
    server = await serve(api, port)
    door = None
    if grpc_port is not None:
        # Only a process that serves gRPC pays for it, in memory and in the time to start.
        from reference.grpc_api import GrpcApi  # noqa: PLC0415

        door = GrpcApi(api.desk, api.reads, api.admission, api.ready, grpc_port)
        await door.start()
    log.info("%s serves on port %d, gRPC on %s", name, port, grpc_port)
    await stopping.wait()
    await api.drain()
    await stop_serving(server)
    if door is not None:
        await door.stop(STOP_WITHIN_S)
    await api.stop()
    tracing.close()
