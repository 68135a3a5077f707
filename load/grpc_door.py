"""Bets over gRPC from a gevent process, as exact as `wire.py` about what may have reached the service.

Status codes of gRPC are told in the words of HTTP, so that results and history know one vocabulary.
"""

from typing import Any, Final

import grpc
from grpc.experimental import gevent as grpc_gevent

from load.requests import Answer, Command
from load.wire import Lost
from reference.proto import ledger_pb2 as pb
from reference.proto import ledger_pb2_grpc

_STATUS: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # The library must never send a command twice by itself: the history would not know.
    ("grpc.enable_retries", 0),
)


class GrpcDoor:
    """One channel to one API process; calls block their greenlet only."""

    def __init__(self, address: str, token: str, *, timeout_s: float) -> None:
        # Without this a call would block the whole process until it is answered. Safe to repeat.
        grpc_gevent.init_gevent()
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = ledger_pb2_grpc.LedgerStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout_s = timeout_s

    def place_bet(self, command: Command) -> tuple[int, bool, Answer]:
        """Place a bet; return the status in HTTP's words, whether it certainly was not admitted, and the answer.

        Raises Lost when no answer of the service came: the bet may or may not have been placed.
        """
        request = pb.PlaceBetRequest(
            user_id=command.user,
            key=command.key,
            match_id=command.match_id,
            outcome=command.selection,
            side=command.side,
            odds=command.odds,
            stake_minor=command.amount,
        )
        try:
            reply: Any = self._stub.PlaceBet(request, metadata=self._metadata, timeout=self._timeout_s)
        except grpc.RpcError as error:
            return _refusal(error)
        answer = Answer(outcome=reply.outcome, replayed=reply.replayed)
        if reply.outcome == "ACCEPTED":
            answer.seq, answer.balance_minor, answer.bet_id = reply.seq, reply.balance_minor, reply.bet_id
            return 202, False, answer
        return 409 if reply.outcome == "REPLAYED_DIFFERENTLY" else 422, False, answer

    def close(self) -> None:
        """Close the channel; calls under way are Lost."""
        self._channel.close()


def _refusal(error: Any) -> tuple[int, bool, Answer]:
    """Return what the service said by an error. Raises Lost if the error is the library's own."""
    trailing = dict(error.trailing_metadata() or ())
    status = _STATUS.get(error.code())
    not_admitted = trailing.get("x-admitted") == "0"
    if status is None or status == 504 or (status == 503 and not not_admitted):
        # A code of the library's own, such as UNAVAILABLE when a connection broke, says nothing.
        raise Lost("timeout" if status == 504 else f"gRPC {error.code().name}")
    return status, not_admitted, Answer(title=error.details())
