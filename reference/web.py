"""What every HTTP operation needs: requests read with their limits, answers written, errors said as problem+json."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs
from uuid import UUID

import msgspec

from reference.answers import BulkResult, CancelAnswer, CommandAnswer, MatchAnswer, Problem, ResettleAnswer
from reference.auth import Caller, check_wallet
from reference.commands import MAX_USER_ID, Bulk, BulkCommand, Outcome
from reference.cursor import decode_cursor
from reference.desk import Cancelled, Moved, checked_key, within
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
from reference.http_request import ConnectionEnded
from reference.writer import Posted

log = logging.getLogger("ledgerproof.api")

BODY_MAX_BYTES = 16 * 1024
BULK_MAX_BYTES = 1024 * 1024
QUERY_FIELDS_MAX = 16
UUID_CHARACTERS = 36

Headers = list[tuple[str, str]]
JSON: Headers = [("content-type", "application/json")]
PROBLEM: Headers = [("content-type", "application/problem+json")]
CHALLENGE: Headers = [*PROBLEM, ("www-authenticate", 'Bearer realm="ledgerproof", error="invalid_token"')]
NOT_ADMITTED: Headers = [*PROBLEM, ("x-admitted", "0"), ("retry-after", "1")]
Answer = tuple[int, Headers, bytes]
"""Status, headers and body."""
_Command = TypeVar("_Command")
_Position = TypeVar("_Position")

_encode = msgspec.json.Encoder().encode
_bulk = msgspec.json.Decoder(Bulk).decode
_bulk_item = msgspec.json.Decoder(BulkCommand).decode


class _RawBulk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    commands: list[msgspec.Raw]


_raw_bulk = msgspec.json.Decoder(_RawBulk).decode


class Rejected(Exception):
    """A request whose form alone is refused, before anybody looks at what it says."""

    def __init__(self, status: int, title: str, detail: str, headers: Headers | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.headers = PROBLEM + (headers or [])


def failure(name: str, error: Exception) -> Answer:
    """Return what is answered for an error: above all whether the command certainly did not happen."""
    if isinstance(error, InvalidCommand):
        return problem(400, "invalid request", str(error), field=error.field)
    if isinstance(error, Rejected):
        return problem(error.status, error.title, str(error), headers=error.headers)
    if isinstance(error, ConnectionEnded):
        return problem(400, "request broken off", str(error))
    if isinstance(error, Unauthenticated):
        return problem(401, "unauthenticated", str(error), headers=CHALLENGE)
    if isinstance(error, Forbidden):
        asks = f'Bearer realm="ledgerproof", error="insufficient_scope", scope="{error.scope}"'
        return problem(403, "forbidden", str(error), headers=[*PROBLEM, ("www-authenticate", asks)])
    if isinstance(error, RateLimited):
        after = ("retry-after", str(math.ceil(error.retry_after_s)))
        return problem(429, "rate limited", str(error), headers=[*PROBLEM, after, ("x-admitted", "0")])
    if isinstance(error, Draining):
        return problem(503, "not admitted", str(error), headers=[*NOT_ADMITTED, ("connection", "close")])
    if isinstance(error, NotAdmitted):
        return problem(503, "not admitted", str(error), headers=NOT_ADMITTED)
    if isinstance(error, NotPosted):
        log.warning("%s: %s", name, error)
        return problem(503, "not posted", "the database refused it", headers=NOT_ADMITTED)
    if isinstance(error, LedgerError):
        return problem(
            504,
            "outcome unknown",
            f"{error}; repeat the request with the same key to learn what became of it",
        )
    log.error("%s failed", name, exc_info=error)
    return problem(500, "internal error", "see the log of this process")


def answer(user_id: int, posted: Posted) -> Answer:
    """Say what became of a wallet command."""
    if posted.outcome == Outcome.ACCEPTED:
        answer = CommandAnswer(
            posted.outcome, user_id, posted.seq or 0, posted.balance or 0, posted.bet_id, posted.replayed
        )
        return 202, JSON, _encode(answer)
    return refused(posted.outcome, posted.differs, replayed=posted.replayed)


def cancel_answer(user_id: int, done: Cancelled) -> Answer:
    """Say what became of a cancel."""
    if done.outcome == Outcome.ACCEPTED and done.bet_id is not None:
        answer = CancelAnswer(done.outcome, done.replayed, user_id, done.bet_id, done.cancelled_stake, done.refund)
        return 202, JSON, _encode(answer)
    return refused(done.outcome, done.differs, replayed=done.replayed)


def bulk_result(done: Posted | Cancelled | Exception) -> BulkResult:
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


def match_answer(done: Moved) -> Answer:
    """Say what became of a match command."""
    if done.outcome == Outcome.ACCEPTED:
        return 202, JSON, _encode(MatchAnswer(done.outcome, done.replayed, done.match_id, done.state or ""))
    return refused(done.outcome, done.differs, replayed=done.replayed)


def resettle_answer(done: Moved) -> Answer:
    """Say what became of a resettle."""
    if done.outcome != Outcome.ACCEPTED or done.settlement_version is None:
        return match_answer(done)
    view = ResettleAnswer(done.outcome, done.replayed, done.match_id, done.state or "", done.settlement_version)
    return 202, JSON, _encode(view)


def found(view: msgspec.Struct | None, what: str, name: object) -> Answer:
    """Return a view, or 404 if there is none."""
    if view is None:
        return problem(404, f"no such {what}", f"there is no {what} {name} here")
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


def refused(outcome: str, differs: str | None, *, replayed: bool) -> Answer:
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


def problem(status: int, title: str, detail: str, *, field: str | None = None, headers: Headers = PROBLEM) -> Answer:
    """Return an error as problem+json; its type is a URN made of the title."""
    kind = f"urn:ledgerproof:{title.replace(' ', '-')}"
    return status, headers, _encode(Problem(kind, title, status, detail, field=field))


# -- reading requests ------------------------------------------------------------------------------------


def user_of(text: str) -> int:
    """Return the wallet's number in a path. Raises InvalidCommand."""
    if text.isascii() and text.isdigit() and len(text) <= 19 and 1 <= (user_id := int(text)) <= MAX_USER_ID:
        return user_id
    raise InvalidCommand("user_id", "must be a whole number from 1 to 2^63-1")


def uuid_of(field: str, text: str) -> UUID:
    """Return an id in a path. Raises InvalidCommand."""
    try:
        # UUID() also takes braces, prefixes and what else has 32 digits.
        if len(text) == UUID_CHARACTERS:
            return UUID(text)
    except ValueError:
        pass
    raise InvalidCommand(field, "must be a UUID")


def key_of(scope: Any) -> str:
    """Return the idempotency key of a request. Raises InvalidCommand."""
    key: str | None = scope.headers.get("idempotency-key")
    if key is None:
        raise InvalidCommand("Idempotency-Key", "this header is required; repeat it to repeat the command safely")
    return checked_key(key, "Idempotency-Key")


async def read_body(scope: Any, proto: Any, limit: int = BODY_MAX_BYTES) -> bytes:
    """Return a JSON body of at most `limit` bytes. Raises Rejected."""
    kind = scope.headers.get("content-type")
    if kind is not None and kind != "application/json" and kind.partition(";")[0].strip().lower() != "application/json":
        raise Rejected(415, "unsupported media type", "send application/json")
    return await read_all(scope, proto, limit)


async def read_all(scope: Any, proto: Any, limit: int) -> bytes:
    """Return a body of any type of at most `limit` bytes. Raises Rejected."""
    length = scope.headers.get("content-length")
    if length is not None:
        if len(length) > 12 or int(length) > limit:
            raise too_large(limit)
        whole: bytes = await proto()
        return whole
    chunks = bytearray()
    async for chunk in proto:
        chunks += chunk
        if len(chunks) > limit:
            raise too_large(limit)
    return bytes(chunks)


def too_large(limit: int) -> Rejected:
    """Return the answer to a body of more than `limit` bytes."""
    # What was not read of the body must not be taken for the next request.
    return Rejected(413, "body too large", f"the body must be at most {limit} bytes", [("connection", "close")])


async def read_empty(scope: Any, proto: Any) -> None:
    """Read a body that has nothing to say. Raises InvalidCommand or Rejected."""
    # Of any type: clients label even an empty body, each in its own way.
    if (await read_all(scope, proto, BODY_MAX_BYTES)).strip() not in (b"", b"{}"):
        raise InvalidCommand("body", "must be empty or {}")


def decode(decoder: Callable[[bytes], _Command], body: bytes) -> _Command:
    """Decode a body. Raises InvalidCommand naming the field at fault."""
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


def decode_bulk(body: bytes) -> Sequence[BulkCommand | LedgerError]:
    """Decode a bulk; where a command is wrong, only that one becomes an error."""
    try:
        return _bulk(body).commands
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found: list[BulkCommand | LedgerError] = []
        for item in decode(_raw_bulk, body).commands:
            try:
                found.append(decode(_bulk_item, bytes(item)))
            except InvalidCommand as error:
                found.append(error)
        return found


def own(caller: Caller, command: BulkCommand | LedgerError) -> BulkCommand | LedgerError:
    """Return the command, or an error in its place if the caller may not act for its wallet."""
    if isinstance(command, LedgerError):
        return command
    try:
        check_wallet(caller, str(command.user_id))
    except Forbidden as error:
        return error
    return command


def query_of(scope: Any) -> dict[str, list[str]]:
    """Return the query's parameters. Raises InvalidCommand."""
    text = scope.query_string
    if not text:
        return {}
    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=QUERY_FIELDS_MAX)
    except ValueError as error:
        raise InvalidCommand("query", f"must have at most {QUERY_FIELDS_MAX} parameters") from error


def cursor(query: dict[str, list[str]], kind: str, position: type[_Position], first: _Position) -> _Position:
    """Return where a page begins: at its cursor, or at `first` without one."""
    values = query.get("cursor")
    if values is None:
        return first
    if len(values) != 1:
        raise InvalidCommand("cursor", "must be given once")
    return decode_cursor(kind, values[0], position)


def seq_of(position: int) -> int:
    """Return a `seq` that came from a cursor. Raises InvalidCommand."""
    if not 0 <= position <= MAX_USER_ID:
        raise InvalidCommand("cursor", "must be a next_cursor of this list")
    return position


def choice(query: dict[str, list[str]], name: str, choices: tuple[str, ...]) -> str:
    """Return a parameter that is one of `choices`, the first if it is missing. Raises InvalidCommand."""
    values = query.get(name, [choices[0]])
    if len(values) != 1 or values[0] not in choices:
        raise InvalidCommand(name, f"must be one of {', '.join(choices)}")
    return values[0]


def number(query: dict[str, list[str]], name: str, low: int, high: int, default: int) -> int:
    """Return a parameter that is a whole number. Raises InvalidCommand."""
    values = query.get(name)
    if values is None:
        return default
    if len(values) != 1 or not values[0].isascii() or not values[0].isdigit() or len(values[0]) > 19:
        raise InvalidCommand(name, f"must be a whole number from {low} to {high}")
    return within(name, int(values[0]), low, high)
