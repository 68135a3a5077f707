"""Bets over gRPC from a gevent process, as exact as `wire.py` about what may have reached the service.

Status codes of gRPC are told in the words of HTTP, so that results and history know one vocabulary.
"""

from typing import Any

import grpc
from grpc.experimental import gevent as grpc_gevent

from load.answers import Lost
from load.grpc_words import OPTIONS, bet_of, refusal_of
from load.requests import Answer, Command
from reference.proto import ledger_pb2_grpc


class GrpcDoor:
    """One channel to one API process; calls block their greenlet only."""

    def __init__(self, address: str, token: str, *, timeout_s: float) -> None:
        # Without this a call would block the whole process until it is answered. Safe to repeat.
        grpc_gevent.init_gevent()
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stub = ledger_pb2_grpc.LedgerStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout_s = timeout_s

    def place_bet(self, command: Command) -> tuple[int, bool, Answer]:
        """Place a bet; return the status in HTTP's words, whether it certainly was not admitted, and the answer.

        Raises Lost when no answer of the service came: the bet may or may not have been placed.
        """
        try:
            reply: Any = self._stub.PlaceBet(bet_of(command), metadata=self._metadata, timeout=self._timeout_s)
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
    status, not_admitted = refusal_of(error)
    if status is None:
        raise Lost("timeout" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else f"gRPC {error.code().name}")
    return status, not_admitted, Answer(title=error.details())
