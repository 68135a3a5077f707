"""Bets over gRPC, as exact as `wire.py` about what may have reached the service.

Status codes are told in the words of HTTP, so that the history and its rules know one vocabulary.
"""

from typing import Any, Final

import grpc

from ledgerproof.wire import Lost
from ledgerproof.workload import Command
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
_CLOSE_S: Final = 1.0


class GrpcWire:
    """One channel to one API process."""

    def __init__(self, port: int, token: str, *, timeout_s: float) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=_OPTIONS)
        self._stub = ledger_pb2_grpc.LedgerStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._timeout_s = timeout_s

    async def place_bet(self, command: Command) -> tuple[int, bool, dict[str, Any]]:
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
            reply = await self._stub.PlaceBet(request, metadata=self._metadata, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            status = _STATUS.get(error.code())
            not_admitted = trailing.get("x-admitted") == "0"
            if status is None or status == 504 or (status == 503 and not not_admitted):
                # A code of the library's own, such as UNAVAILABLE when a connection broke, says nothing.
                raise Lost(f"{error.code().name}: {error.details()}") from error
            return status, not_admitted, {"title": error.details()}
        answer: dict[str, Any] = {"outcome": reply.outcome, "replayed": reply.replayed}
        if reply.outcome == "ACCEPTED":
            answer |= {"seq": reply.seq, "balance_minor": reply.balance_minor, "bet_id": reply.bet_id}
            return 202, False, answer
        return 409 if reply.outcome == "REPLAYED_DIFFERENTLY" else 422, False, answer

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(_CLOSE_S)
