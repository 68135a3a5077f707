"""The HTTP API: decode, validate, route to a writer, and say truthfully what became of the command."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs
from uuid import UUID

import msgspec

from reference import exchange, metrics
from reference.answers import (
    BalanceView,
    BetView,
    CancelAnswer,
    CommandAnswer,
    EntriesView,
    EntryView,
    MatchAnswer,
    MatchView,
    Problem,
)
from reference.cache import Balance, Cache
from reference.commands import (
    MAX_KEY_LENGTH,
    MAX_ODDS,
    MAX_USER_ID,
    MIN_ODDS,
    BetState,
    Contra,
    CreateMatch,
    Deposit,
    EntryType,
    MatchState,
    Outcome,
    PlaceBet,
    SettleMatch,
    Withdraw,
)
from reference.config import ServiceConfig
from reference.errors import InvalidCommand, LedgerError, NotAdmitted, NotPosted
from reference.ledger import reserve_of
from reference.openapi import document
from reference.service import STOP_WITHIN_S, Health, serve, stop_serving
from reference.store import Store
from reference.uuid7 import uuid7
from reference.writer import Posted, Posting, Writer

log = logging.getLogger("ledgerproof.api")

BODY_MAX_BYTES = 64 * 1024
ENTRIES_PAGE_MAX = 1000
RESERVED_KEYS = "ledger:"
"""Keys of the service itself (payouts, refunds) begin with this; a caller's key may not."""
MAX_OUTCOMES = 64
MAX_OUTCOME_LENGTH = 32
MAX_CLOSES_AT_MS = 253_402_300_799_000

JSON = [("content-type", "application/json")]
PROBLEM = [("content-type", "application/problem+json")]
NOT_ADMITTED = [("content-type", "application/problem+json"), ("x-admitted", "0"), ("retry-after", "1")]

_encode = msgspec.json.Encoder().encode
_deposit = msgspec.json.Decoder(Deposit).decode
_withdraw = msgspec.json.Decoder(Withdraw).decode
_place_bet = msgspec.json.Decoder(PlaceBet).decode
_create_match = msgspec.json.Decoder(CreateMatch).decode
_settle_match = msgspec.json.Decoder(SettleMatch).decode

Answer = tuple[int, list[tuple[str, str]], bytes]
_Command = TypeVar("_Command")


class Api:
    """One API process: stateless but for its connections and its memory of open matches."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._store = Store(config, "ledger_api")
        self._cache = Cache(config)
        self._writers = [Writer(self._store, index, "API") for index in range(len(config.servers))]
        self._matches = exchange.Matches(self._store)
        self._health = Health()
        self._health.ready = self._ready
        self._openapi = _encode(document())
        self._fills: set[asyncio.Task[bool]] = set()

    def start(self) -> None:
        """Start the writers; call it inside the running event loop."""
        for writer in self._writers:
            writer.start()

    async def stop(self) -> None:
        """Finish what was admitted, then close every connection."""
        await asyncio.gather(*(writer.stop() for writer in self._writers))
        await self._store.close()
        await self._cache.close()

    async def __call__(self, scope: Any, proto: Any) -> None:
        """Answer one request."""
        path = scope.path
        if path in ("/livez", "/readyz", "/metrics"):
            await self._health(scope, proto)
            return
        started = time.perf_counter()
        route, action = self._route(scope.method, path)
        try:
            status, headers, body = await action(scope, proto)
        except InvalidCommand as error:
            status, headers, body = _problem(400, "invalid request", str(error), field=error.field)
        except NotAdmitted as error:
            status, headers, body = _problem(503, "not admitted", str(error), headers=NOT_ADMITTED)
        except NotPosted as error:
            log.warning("%s: %s", route, error)
            status, headers, body = _problem(503, "not posted", "the database refused it", headers=NOT_ADMITTED)
        except LedgerError as error:
            status, headers, body = _problem(
                504,
                "outcome unknown",
                f"{error}; repeat the request with the same key to learn what became of it",
            )
        except Exception:  # the last resort of a server: answer, log, go on
            log.exception("%s failed", route)
            status, headers, body = _problem(500, "internal error", "see the log of this process")
        proto.response_bytes(status, headers, body)
        metrics.HTTP_SECONDS.labels(route).observe(time.perf_counter() - started)
        metrics.HTTP_REQUESTS.labels(route, status).inc()
        if status >= 500:
            metrics.HTTP_ERRORS.labels(route).inc()

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

    def _route(  # noqa: PLR0912 - one case a route reads better than any table
        self, method: str, path: str
    ) -> tuple[str, Callable[[Any, Any], Awaitable[Answer]]]:
        parts = path.split("/")[1:]
        match method, parts:
            case "POST", ["v1", "wallets", user, "bets"]:
                return "bets", lambda scope, proto: self._bet(scope, proto, user)
            case "GET", ["v1", "wallets", user, "balance"]:
                return "balance", lambda scope, proto: self._balance(scope, user)
            case "POST", ["v1", "wallets", user, "deposits"]:
                return "deposits", lambda scope, proto: self._transfer(scope, proto, user, EntryType.CREDIT)
            case "POST", ["v1", "wallets", user, "withdrawals"]:
                return "withdrawals", lambda scope, proto: self._transfer(scope, proto, user, EntryType.DEBIT)
            case "POST", ["v1", "wallets", user, "bets", bet, "cancel"]:
                return "cancel", lambda scope, proto: self._cancel(scope, proto, user, bet)
            case "GET", ["v1", "wallets", user, "bets", bet]:
                return "bet", lambda scope, proto: self._view_bet(user, bet)
            case "GET", ["v1", "wallets", user, "entries"]:
                return "entries", lambda scope, proto: self._entries(scope, user)
            case "POST", ["v1", "matches"]:
                return "matches", self._create_match
            case "GET", ["v1", "matches", match_id]:
                return "match", lambda scope, proto: self._match(match_id)
            case "POST", ["v1", "matches", match_id, "close"]:
                return "close", lambda scope, proto: self._move_match(scope, proto, match_id, MatchState.CLOSED)
            case "POST", ["v1", "matches", match_id, "settle"]:
                return "settle", lambda scope, proto: self._move_match(scope, proto, match_id, MatchState.SETTLING)
            case "POST", ["v1", "matches", match_id, "void"]:
                return "void", lambda scope, proto: self._move_match(scope, proto, match_id, MatchState.VOID)
            case "GET", ["openapi.json"]:
                return "openapi", self._serve_openapi
        return "unknown", lambda scope, proto: _not_found(method, path)

    async def _serve_openapi(self, scope: Any, proto: Any) -> Answer:
        return 200, JSON, self._openapi

    async def _transfer(self, scope: Any, proto: Any, user: str, entry_type: EntryType) -> Answer:
        user_id, key = _user(user), _key(scope)
        body = await _body(scope, proto)
        deposit = entry_type is EntryType.CREDIT
        asked = _decode(_deposit, body).amount_minor if deposit else _decode(_withdraw, body).amount_minor
        amount = _within("amount_minor", asked, 1, self._config.max_amount_minor)
        posted = await self._post(
            Posting(
                user_id,
                key,
                entry_type,
                amount if deposit else -amount,
                Contra.EXTERNAL,
                command=_encode({"op": "deposit" if deposit else "withdraw", "amount_minor": amount}),
            )
        )
        return _answer(user_id, posted)

    async def _bet(self, scope: Any, proto: Any, user: str) -> Answer:
        user_id, key = _user(user), _key(scope)
        command = _decode(_place_bet, await _body(scope, proto))
        _within("odds", command.odds, MIN_ODDS, MAX_ODDS)
        stake = _within("stake_minor", command.stake_minor, 1, self._config.max_amount_minor)
        reserve = reserve_of(command.side, command.odds, stake)
        refusal = await self._matches.refusal(command.match_id, command.outcome)
        if refusal is None and reserve > self._config.max_amount_minor:
            refusal = Outcome.LIMIT_EXCEEDED
        posted = await self._post(
            Posting(
                user_id,
                key,
                EntryType.DEBIT,
                -reserve,
                Contra.ESCROW,
                match_id=command.match_id,
                bet_id=uuid7(),
                outcome=command.outcome,
                side=command.side.value,
                odds=command.odds,
                stake=stake,
                refusal=refusal.value if refusal else None,
                command=_encode(
                    {
                        "op": "bet",
                        "match_id": command.match_id,
                        "outcome": command.outcome,
                        "side": command.side,
                        "odds": command.odds,
                        "stake_minor": stake,
                    }
                ),
            )
        )
        return _answer(user_id, posted)

    async def _post(self, posting: Posting) -> Posted:
        return await self._store.at_wallet(posting.user_id, lambda server: self._writers[server].post(posting))

    async def _cancel(self, scope: Any, proto: Any, user: str, bet: str) -> Answer:
        user_id, key, bet_id = _user(user), _key(scope), _uuid("bet_id", bet)
        await _empty_body(scope, proto)
        row = await self._store.wallet_row(user_id, "bet", bet_id)
        if row is None:
            return _refusal(Outcome.UNKNOWN_BET, replayed=False)
        done = await exchange.cancel_bet(self._store, row["match_id"], bet_id, user_id, key)
        status = done["status"]
        if status == Outcome.REPLAYED_DIFFERENTLY:
            return _differs("bet_id")
        if status not in (Outcome.ACCEPTED, Outcome.REPLAYED):
            return _refusal(status, replayed=False)
        answer = CancelAnswer(
            Outcome.ACCEPTED,
            status == Outcome.REPLAYED,
            user_id,
            done["bet"],
            done["cancelled_stake"],
            done["refund"],
        )
        return 202, JSON, _encode(answer)

    async def _view_bet(self, user: str, bet: str) -> Answer:
        user_id, bet_id = _user(user), _uuid("bet_id", bet)
        row = await self._store.wallet_row(user_id, "bet", bet_id)
        if row is None:
            return _problem(404, "no such bet", f"wallet {user_id} has no bet {bet_id}")
        order = await self._store.fetchrow(self._store.home_of(row["match_id"]), "order", bet_id)
        view = BetView(
            bet_id,
            row["match_id"],
            row["outcome"],
            row["side"],
            row["odds"],
            row["stake"],
            row["reserve"],
            order["state"] if order else BetState.PENDING,
            order["matched_stake"] if order else 0,
            order["cancelled_stake"] if order else 0,
        )
        return 200, JSON, _encode(view)

    async def _create_match(self, scope: Any, proto: Any) -> Answer:
        _key(scope)
        command = _decode(_create_match, await _body(scope, proto))
        _within("closes_at_ms", command.closes_at_ms, 1, MAX_CLOSES_AT_MS)
        outcomes = command.outcomes
        _within("outcomes", len(outcomes), 2, MAX_OUTCOMES)
        if len(set(outcomes)) != len(outcomes):
            raise InvalidCommand("outcomes", "must be different from each other")
        for outcome in outcomes:
            _within("outcomes", len(outcome), 1, MAX_OUTCOME_LENGTH)
            _storable("outcomes", outcome)
        done = await exchange.create_match(self._store, command)
        self._matches.forget(command.match_id)
        return _match_answer(command.match_id, done)

    async def _move_match(self, scope: Any, proto: Any, match: str, to: MatchState) -> Answer:
        match_id = _uuid("match_id", match)
        _key(scope)
        if to is MatchState.SETTLING:
            result = _decode(_settle_match, await _body(scope, proto)).result
            _storable("result", result)
        else:
            await _empty_body(scope, proto)
            result = None
        done = await exchange.transition_match(self._store, match_id, to, result)
        self._matches.forget(match_id)
        return _match_answer(match_id, done)

    async def _match(self, match: str) -> Answer:
        match_id = _uuid("match_id", match)
        row = await self._store.fetchrow(self._store.home_of(match_id), "match", match_id)
        if row is None:
            return _problem(404, "no such match", f"match {match_id} does not exist")
        view = MatchView(
            match_id,
            row["state"],
            row["outcomes"],
            row["closes_at_ms"],
            row["settlement_version"],
            row["result"],
            row["settled"],
        )
        return 200, JSON, _encode(view)

    async def _balance(self, scope: Any, user: str) -> Answer:
        user_id = _user(user)
        query = parse_qs(scope.query_string)
        consistency = _choice(query, "consistency", ("eventual", "strong"))
        min_seq = _number(query, "min_seq", 0, MAX_USER_ID, 0)
        found, source = None, "ledger"
        if consistency == "eventual":
            found, source = await self._cache.get(user_id), "redis"
            if found is None or found.seq < min_seq:
                found, source = await self._projected(user_id) or found, "projection"
        if found is None:
            row = await self._store.wallet_row(user_id, "head")
            if row is None:
                return _problem(404, "no such wallet", f"wallet {user_id} has no entry")
            found, source = Balance(user_id, row["balance"], row["seq"], row["updated_at_ms"]), "ledger"
        metrics.CACHE_READS.labels(source).inc()
        age_ms = int(time.time() * 1000) - found.updated_at_ms
        stale = found.seq < min_seq or (source != "ledger" and age_ms > self._config.projection_stale_after_ms)
        view = BalanceView(user_id, found.balance, found.seq, source, stale, found.updated_at_ms)
        return 200, JSON, _encode(view)

    async def _projected(self, user_id: int) -> Balance | None:
        """Read the projection and fill the cache behind the answer; None if it has no row or is unreachable."""
        try:
            row = await self._store.wallet_row(user_id, "projected")
        except LedgerError:
            return None
        if row is None:
            return None
        found = Balance(user_id, row["balance"], row["seq"], row["updated_at_ms"])
        fill = asyncio.create_task(self._cache.put([found]))
        self._fills.add(fill)
        fill.add_done_callback(self._fills.discard)
        return found

    async def _entries(self, scope: Any, user: str) -> Answer:
        user_id = _user(user)
        query = parse_qs(scope.query_string)
        after_seq = _number(query, "after_seq", 0, MAX_USER_ID, 0)
        limit = _number(query, "limit", 1, ENTRIES_PAGE_MAX, 100)
        rows = await self._store.wallet_rows(user_id, "entries", after_seq, limit)
        entries = [
            EntryView(
                row["seq"],
                row["type"],
                row["amount"],
                row["balance_snapshot"],
                row["contra"],
                row["match_id"],
                row["bet_id"],
                row["idempotent_key"],
                row["created_at_ms"],
            )
            for row in rows
        ]
        view = EntriesView(entries, entries[-1].seq if len(entries) == limit else None)
        return 200, JSON, _encode(view)


def _answer(user_id: int, posted: Posted) -> Answer:
    """Say what became of a wallet command."""
    if posted.outcome == Outcome.REPLAYED_DIFFERENTLY:
        return _differs(posted.differs)
    if posted.outcome != Outcome.ACCEPTED:
        return _refusal(posted.outcome, replayed=posted.replayed)
    answer = CommandAnswer(
        Outcome.ACCEPTED, user_id, posted.seq or 0, posted.balance or 0, posted.bet_id, posted.replayed
    )
    return 202, JSON, _encode(answer)


def _match_answer(match_id: UUID, done: Any) -> Answer:
    status = done["status"]
    if status == Outcome.REPLAYED_DIFFERENTLY:
        return _differs(done["field"])
    if status not in (Outcome.ACCEPTED, Outcome.REPLAYED):
        return _refusal(status, replayed=False)
    answer = MatchAnswer(Outcome.ACCEPTED, status == Outcome.REPLAYED, match_id, done["state"])
    return 202, JSON, _encode(answer)


_REFUSALS = {
    Outcome.INSUFFICIENT_FUNDS: "the wallet does not hold enough",
    Outcome.LIMIT_EXCEEDED: "the bet would reserve more than the limit",
    Outcome.UNKNOWN_MATCH: "there is no such match",
    Outcome.UNKNOWN_OUTCOME: "the match has no such outcome",
    Outcome.MATCH_CLOSED: "the match does not take bets or cancels any more",
    Outcome.UNKNOWN_BET: "the wallet has no such bet",
    Outcome.NOTHING_TO_CANCEL: "no part of the bet is unmatched",
    Outcome.ILLEGAL_TRANSITION: "the match cannot go there from its state",
}


def _refusal(outcome: str, *, replayed: bool) -> Answer:
    problem = Problem(
        f"urn:ledgerproof:refusal:{outcome}",
        "refused",
        422,
        _REFUSALS[Outcome(outcome)],
        outcome,
        replayed=replayed,
    )
    return 422, PROBLEM, _encode(problem)


def _differs(field: str | None) -> Answer:
    problem = Problem(
        "urn:ledgerproof:replayed-differently",
        "key already used",
        409,
        f"this key was used with another {field}; use a new key for a new command",
        Outcome.REPLAYED_DIFFERENTLY,
        field,
        True,
    )
    return 409, PROBLEM, _encode(problem)


def _problem(
    status: int,
    title: str,
    detail: str,
    *,
    field: str | None = None,
    headers: list[tuple[str, str]] = PROBLEM,
) -> Answer:
    kind = f"urn:ledgerproof:{title.replace(' ', '-')}"
    return status, headers, _encode(Problem(kind, title, status, detail, field=field))


async def _not_found(method: str, path: str) -> Answer:
    return _problem(404, "no such route", f"{method} {path[:200]} is not in /openapi.json")


def _user(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19 or not 1 <= int(text) <= MAX_USER_ID:
        raise InvalidCommand("user_id", "must be a whole number from 1 to 2^63-1")
    return int(text)


def _uuid(field: str, text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise InvalidCommand(field, "must be a UUID") from error


def _key(scope: Any) -> str:
    key: str | None = scope.headers.get("idempotency-key")
    if key is None:
        raise InvalidCommand("Idempotency-Key", "this header is required; repeat it to repeat the command safely")
    if not 1 <= len(key) <= MAX_KEY_LENGTH or not key.isascii() or not key.isprintable():
        raise InvalidCommand("Idempotency-Key", f"must be 1 to {MAX_KEY_LENGTH} printable ASCII characters")
    if key.startswith(RESERVED_KEYS):
        raise InvalidCommand("Idempotency-Key", f"keys beginning with {RESERVED_KEYS} belong to the service")
    return key


async def _body(scope: Any, proto: Any) -> bytes:
    length = scope.headers.get("content-length")
    if length is not None and (not length.isdigit() or int(length) > BODY_MAX_BYTES):
        raise InvalidCommand("body", f"must be at most {BODY_MAX_BYTES} bytes")
    if length is not None:
        whole: bytes = await proto()
        return whole
    chunks = bytearray()
    async for chunk in proto:
        chunks += chunk
        if len(chunks) > BODY_MAX_BYTES:
            raise InvalidCommand("body", f"must be at most {BODY_MAX_BYTES} bytes")
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


def _within(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidCommand(field, f"must be {low} to {high}")
    return value


def _storable(field: str, text: str) -> None:
    """Postgres text cannot hold NUL; control characters have no place in names."""
    if not text.isprintable():
        raise InvalidCommand(field, "must be printable")


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
    return _within(name, int(values[0]), low, high)


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
