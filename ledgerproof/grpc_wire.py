"""Bets over gRPC, as exact as `wire.py` about what may have reached the service.

Status codes are told in the words of HTTP, so that the history and its rules know one vocabulary.
"""

from typing import Any, Final

import grpc

from ledgerproof.wire import Lost
from ledgerproof.workload import Command
from load.grpc_words import OPTIONS, bet_of, refusal_of
from reference.proto import ledger_pb2_grpc

_CLOSE_S: Final = 1.0


class GrpcWire:
    """One channel to one API process."""

    def __init__(self, port: int, token: str, *, timeout_s: float) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)
        self._stub = ledger_pb2_grpc.LedgerStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._timeout_s = timeout_s

    async def place_bet(self, command: Command) -> tuple[int, bool, dict[str, Any]]:
        """Place a bet; return the status in HTTP's words, whether it certainly was not admitted, and the answer.

        Raises Lost when no answer of the service came: the bet may or may not have been placed.
        """
        try:
            reply = await self._stub.PlaceBet(bet_of(command), metadata=self._metadata, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            status, not_admitted = refusal_of(error)
            if status is None:
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
