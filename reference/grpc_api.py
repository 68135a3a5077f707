"""The gRPC door: the commands of ledger.proto, asked of the same desk as over HTTP, on a port of its own.

A refusal is an OK answer with its outcome. Every status but DEADLINE_EXCEEDED says that nothing was done; UNAVAILABLE
says so with the trailing metadata `x-admitted: 0`.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final
from uuid import UUID

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from reference import metrics
from reference.admission import Admission, Needs
from reference.auth import Caller, check_wallet
from reference.commands import (
    BULK_MAX,
    DEFAULT_OUTCOMES,
    BulkBet,
    BulkCancel,
    BulkCommand,
    BulkDeposit,
    BulkWithdraw,
    CreateMatch,
    Deposit,
    Outcome,
    PlaceBet,
    ResettleMatch,
    Rollback,
    SettleMatch,
    Side,
    Withdraw,
)
from reference.desk import MAX_CLOSES_AT_MS, Cancelled, Desk, Moved, checked_key, checked_user, within
from reference.errors import (
    Forbidden,
    InvalidCommand,
    LedgerError,
    NotAdmitted,
    NotPosted,
    RateLimited,
    Unauthenticated,
)
from reference.failpoints import hit_async
from reference.proto import ledger_pb2 as pb
from reference.reads import Reads
from reference.writer import Posted

log = logging.getLogger("ledgerproof.grpc")

SERVICE: Final = "ledgerproof.v1.Ledger"
MESSAGE_MAX_BYTES: Final = 1024 * 1024
METADATA_MAX_BYTES: Final = 16 * 1024
STREAMS_MAX: Final = 1024
"""Calls of one connection under way at once; further ones wait in the client."""
CALLS_MAX: Final = 8192
"""Calls of all connections under way at once; further ones are answered RESOURCE_EXHAUSTED."""
MIN_REMAINING_S: Final = 0.001
"""A call whose deadline is nearer than this is not admitted: its caller would never hear the answer."""

Code = grpc.StatusCode
Reply = Message
Answering = Callable[[Any, Caller], Awaitable[Reply]]

_SIDES: Final[dict["pb.Side", Side]] = {pb.BACK: Side.BACK, pb.LAY: Side.LAY}
_SIDE_NUMBERS: Final[dict[Side, "pb.Side"]] = {side: number for number, side in _SIDES.items()}


class NotFound(Exception):
    """A read of something that does not exist."""


class Method:
    """One method: what it takes, who may call it, what answers it, and its metrics."""

    def __init__(self, name: str, request: type[Message], needs: Needs, answer: Answering) -> None:
        self.name = name
        self.request = request
        self.needs = needs
        self.answer = answer
        self.commands = not name.startswith("Get")

    def decode(self, raw: bytes) -> Message | None:
        """Return the request, or None where the bytes are none: the library would answer that INTERNAL."""
        try:
            return self.request.FromString(raw)
        except DecodeError:
            return None

    def count(self, code: Code, seconds: float) -> None:
        """Count one answer."""
        metrics.GRPC_SECONDS.labels(self.name).observe(seconds)
        metrics.GRPC_REQUESTS.labels(self.name, code.name).inc()


class GrpcApi:
    """The gRPC door of one API process."""

    def __init__(
        self, desk: Desk, reads: Reads, admission: Admission, ready: Callable[[], Awaitable[str | None]], port: int
    ) -> None:
        self._desk = desk
        self._reads = reads
        self._admission = admission
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=CALLS_MAX,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
                ("grpc.max_metadata_size", METADATA_MAX_BYTES),
                ("grpc.max_concurrent_streams", STREAMS_MAX),
                # Two processes must never share a port by mistake.
                ("grpc.so_reuseport", 0),
            ],
        )
        wallet, admin = Needs.WALLET, Needs.ADMIN
        methods = [
            Method("Deposit", pb.DepositRequest, wallet, self._deposit),
            Method("Withdraw", pb.WithdrawRequest, wallet, self._withdraw),
            Method("PlaceBet", pb.PlaceBetRequest, wallet, self._place_bet),
            Method("CancelBet", pb.CancelBetRequest, wallet, self._cancel),
            Method("Rollback", pb.RollbackRequest, wallet, self._rollback),
            Method("Bulk", pb.BulkRequest, Needs.ANYBODY, self._bulk),
            Method("GetBalance", pb.GetBalanceRequest, wallet, self._balance),
            Method("GetBet", pb.GetBetRequest, wallet, self._bet),
            Method("CreateMatch", pb.CreateMatchRequest, admin, self._create_match),
            Method("CloseMatch", pb.MatchRequest, admin, self._close_match),
            Method("SettleMatch", pb.SettleMatchRequest, admin, self._settle_match),
            Method("ResettleMatch", pb.ResettleMatchRequest, admin, self._resettle_match),
            Method("VoidMatch", pb.MatchRequest, admin, self._void_match),
            Method("GetMatch", pb.MatchRequest, Needs.ANYBODY, self._match),
        ]
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                self._behaviour(method), request_deserializer=method.decode, response_serializer=_serialized
            )
            for method in methods
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(_Health(ready), self._server)
        reflection.enable_server_reflection(
            (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), self._server
        )
        if self._server.add_insecure_port(f"127.0.0.1:{port}") != port:
            raise OSError(f"port {port} cannot be had for gRPC")

    async def start(self) -> None:
        """Begin to take calls."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Take no more connections and finish the calls under way, for `grace_s` at most."""
        await self._server.stop(grace_s)

    def _behaviour(self, method: Method) -> Callable[[Any, Any], Awaitable[Reply]]:
        async def behave(request: Any, context: Any) -> Reply:
            started = time.perf_counter()
            self._admission.under_way += 1
            try:
                reply = await self._answered(method, request, context)
            except Exception as error:  # the last resort of a server: answer, log, go on
                code, details, trailing = _status_of(method, error)
                method.count(code, time.perf_counter() - started)
                await context.abort(code, details, trailing)
                raise  # pragma: no cover - abort raises
            finally:
                self._admission.leave()
            method.count(Code.OK, time.perf_counter() - started)
            return reply

        return behave

    async def _answered(self, method: Method, request: Any, context: Any) -> Reply:
        if request is None:
            raise InvalidCommand("message", f"is no {method.request.DESCRIPTOR.full_name}")
        authorization = next((value for name, value in context.invocation_metadata() if name == "authorization"), None)
        user = str(request.user_id) if method.needs is Needs.WALLET else ""
        cost = max(1, len(request.commands)) if method.name == "Bulk" else 1
        caller = await self._admission.admit(method.needs, authorization, user, cost)
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s < MIN_REMAINING_S:
            raise NotAdmitted("the deadline of the call has passed")
        reply = await method.answer(request, caller)
        if method.commands:
            await hit_async("grpc.after_commit_before_ack")
        return reply

    # -- commands --------------------------------------------------------------------------------------

    async def _deposit(self, request: Any, caller: Caller) -> Reply:
        key = checked_key(request.key, "key")
        return _reply(await self._desk.deposit(checked_user(request.user_id), key, Deposit(request.amount_minor)))

    async def _withdraw(self, request: Any, caller: Caller) -> Reply:
        key = checked_key(request.key, "key")
        return _reply(await self._desk.withdraw(checked_user(request.user_id), key, Withdraw(request.amount_minor)))

    async def _place_bet(self, request: Any, caller: Caller) -> Reply:
        key = checked_key(request.key, "key")
        command = PlaceBet(
            _uuid("match_id", request.match_id),
            request.outcome,
            _side(request.side),
            request.odds,
            request.stake_minor,
        )
        return _reply(await self._desk.place_bet(checked_user(request.user_id), key, command))

    async def _cancel(self, request: Any, caller: Caller) -> Reply:
        key, bet_id = checked_key(request.key, "key"), _uuid("bet_id", request.bet_id)
        return _reply(await self._desk.cancel(checked_user(request.user_id), key, bet_id))

    async def _rollback(self, request: Any, caller: Caller) -> Reply:
        return _reply(await self._desk.rollback(checked_user(request.user_id), Rollback(request.key)))

    async def _bulk(self, request: Any, caller: Caller) -> Reply:
        within("commands", len(request.commands), 1, BULK_MAX)
        commands = [_command(item, caller) for item in request.commands]
        return pb.BulkReply(results=[_result(done) for done in await self._desk.bulk(commands)])

    async def _create_match(self, request: Any, caller: Caller) -> Reply:
        outcomes = tuple(request.outcomes) or DEFAULT_OUTCOMES
        command = CreateMatch(_uuid("match_id", request.match_id), request.closes_at_ms, outcomes)
        return _moved(await self._desk.create_match(command))

    async def _close_match(self, request: Any, caller: Caller) -> Reply:
        return _moved(await self._desk.close_match(_uuid("match_id", request.match_id)))

    async def _settle_match(self, request: Any, caller: Caller) -> Reply:
        match_id = _uuid("match_id", request.match_id)
        return _moved(await self._desk.settle_match(match_id, SettleMatch(request.result)))

    async def _resettle_match(self, request: Any, caller: Caller) -> Reply:
        match_id, key = _uuid("match_id", request.match_id), checked_key(request.key, "key")
        result = request.result if request.HasField("result") else None
        version = request.corrects_version if request.HasField("corrects_version") else None
        return _moved(await self._desk.resettle_match(match_id, key, ResettleMatch(result, version)))

    async def _void_match(self, request: Any, caller: Caller) -> Reply:
        return _moved(await self._desk.void_match(_uuid("match_id", request.match_id)))

    # -- reads -----------------------------------------------------------------------------------------

    async def _balance(self, request: Any, caller: Caller) -> Reply:
        user_id = checked_user(request.user_id)
        if request.HasField("as_of_ms"):
            as_of_ms = within("as_of_ms", request.as_of_ms, 0, MAX_CLOSES_AT_MS)
            view = await self._reads.balance_as_of(user_id, as_of_ms)
        else:
            min_seq = within("min_seq", request.min_seq, 0, 2**63 - 1)
            view = await self._reads.balance(user_id, strong=request.strong, min_seq=min_seq)
        if view is None:
            raise NotFound(f"there is no wallet {user_id} here")
        return pb.Balance(
            user_id=user_id,
            balance_minor=view.balance_minor,
            seq=view.seq,
            source=view.source,
            stale=view.stale,
            updated_at_ms=view.updated_at_ms,
        )

    async def _bet(self, request: Any, caller: Caller) -> Reply:
        user_id, bet_id = checked_user(request.user_id), _uuid("bet_id", request.bet_id)
        view = await self._reads.bet(user_id, bet_id)
        if view is None:
            raise NotFound(f"there is no bet {bet_id} here")
        return pb.Bet(
            bet_id=str(view.bet_id),
            match_id=str(view.match_id),
            outcome=view.outcome,
            side=_SIDE_NUMBERS[Side(view.side)],
            odds=view.odds,
            stake_minor=view.stake_minor,
            reserve_minor=view.reserve_minor,
            state=view.state,
            matched_stake_minor=view.matched_stake_minor,
            cancelled_stake_minor=view.cancelled_stake_minor,
            placed_at_ms=view.placed_at_ms,
        )

    async def _match(self, request: Any, caller: Caller) -> Reply:
        match_id = _uuid("match_id", request.match_id)
        view = await self._reads.match(match_id)
        if view is None:
            raise NotFound(f"there is no match {match_id} here")
        return pb.Match(
            match_id=str(view.match_id),
            state=view.state,
            outcomes=view.outcomes,
            closes_at_ms=view.closes_at_ms,
            settlement_version=view.settlement_version,
            result=view.result or "",
            settled=view.settled,
        )


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The standard health service, saying what /readyz says."""

    def __init__(self, ready: Callable[[], Awaitable[str | None]]) -> None:
        self._ready = ready

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the name in the protocol
        """Return whether the process is ready."""
        if request.service not in ("", SERVICE):
            await context.abort(Code.NOT_FOUND, "no such service")
        serving = await self._ready() is None
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def _uuid(field: str, text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise InvalidCommand(field, "must be a UUID") from error


def _side(number: "pb.Side") -> Side:
    side = _SIDES.get(number)
    if side is None:
        raise InvalidCommand("side", "must be BACK or LAY")
    return side


def _command(item: Any, caller: Caller) -> BulkCommand | LedgerError:
    """Return one command of a bulk, or the error that stands in its place."""
    kind = item.WhichOneof("command")
    try:
        if kind is None:
            raise InvalidCommand("command", "must be set")
        said = getattr(item, kind)
        check_wallet(caller, str(said.user_id))
        match kind:
            case "deposit":
                return BulkDeposit(said.user_id, said.key, said.amount_minor)
            case "withdraw":
                return BulkWithdraw(said.user_id, said.key, said.amount_minor)
            case "cancel":
                return BulkCancel(said.user_id, said.key, _uuid("bet_id", said.bet_id))
            case _:
                match_id, side = _uuid("match_id", said.match_id), _side(said.side)
                return BulkBet(said.user_id, said.key, match_id, said.outcome, side, said.odds, said.stake_minor)
    except LedgerError as error:
        return error


def _reply(done: Posted | Cancelled) -> pb.CommandReply:
    bet_id = "" if done.bet_id is None else str(done.bet_id)
    if isinstance(done, Posted):
        return pb.CommandReply(
            outcome=done.outcome,
            replayed=done.replayed,
            seq=done.seq or 0,
            balance_minor=done.balance or 0,
            bet_id=bet_id,
            field=done.differs or "",
        )
    return pb.CommandReply(
        outcome=done.outcome,
        replayed=done.replayed,
        bet_id=bet_id if done.outcome == Outcome.ACCEPTED else "",
        cancelled_stake_minor=done.cancelled_stake,
        refund_minor=done.refund,
        field=done.differs or "",
    )


def _moved(done: Moved) -> pb.MatchReply:
    return pb.MatchReply(
        outcome=done.outcome,
        replayed=done.replayed,
        match_id=str(done.match_id),
        state=done.state or "",
        field=done.differs or "",
        settlement_version=done.settlement_version or 0,
    )


def _result(done: Posted | Cancelled | Exception) -> pb.BulkResult:
    if isinstance(done, Exception):
        code, details, _ = _status_of(None, done)
        return pb.BulkResult(code=code.value[0], detail=details)
    return pb.BulkResult(code=0, reply=_reply(done))


_NOT_DONE: Final = (("x-admitted", "0"),)


def _status_of(method: Method | None, error: Exception) -> tuple[Code, str, tuple[tuple[str, str], ...]]:
    """Return status, details and trailing metadata of an error: above all whether nothing was done."""
    if isinstance(error, InvalidCommand):
        return Code.INVALID_ARGUMENT, str(error), (("field", error.field),)
    if isinstance(error, Unauthenticated):
        return Code.UNAUTHENTICATED, str(error), ()
    if isinstance(error, Forbidden):
        return Code.PERMISSION_DENIED, str(error), ()
    if isinstance(error, NotFound):
        return Code.NOT_FOUND, str(error), ()
    if isinstance(error, RateLimited):
        return Code.RESOURCE_EXHAUSTED, str(error), (("retry-after", f"{error.retry_after_s:.3f}"), *_NOT_DONE)
    if isinstance(error, NotAdmitted):
        return Code.UNAVAILABLE, str(error), _NOT_DONE
    name = method.name if method else "Bulk"
    if isinstance(error, NotPosted):
        log.warning("%s: %s", name, error)
        return Code.UNAVAILABLE, "the database refused it", _NOT_DONE
    if isinstance(error, LedgerError):
        return Code.DEADLINE_EXCEEDED, f"{error}; repeat the call with the same key to learn what became of it", ()
    log.error("%s failed", name, exc_info=error)
    return Code.INTERNAL, "see the log of this process", ()
