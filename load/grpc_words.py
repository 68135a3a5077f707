"""What every client of the gRPC door says and how it reads status codes, on asyncio and on gevent."""

from typing import Any, Final

import grpc

from reference.proto import ledger_pb2 as pb

STATUS: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""Status codes in the words of HTTP, so that results and history know one vocabulary."""
OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # The library must never send a command twice by itself: the history would not know.
    ("grpc.enable_retries", 0),
)


def bet_of(command: Any) -> pb.PlaceBetRequest:
    """Return the message of a bet; `command` has the fields of a history record."""
    return pb.PlaceBetRequest(
        user_id=command.user,
        key=command.key,
        match_id=command.match_id,
        outcome=command.selection,
        side=command.side,
        odds=command.odds,
        stake_minor=command.amount,
    )


def refusal_of(error: Any) -> tuple[int | None, bool]:
    """Return the status of an error and whether the command certainly was not admitted.

    The status is None where the code is the library's own, such as UNAVAILABLE when a connection broke: it says nothing
    of the command.
    """
    status = STATUS.get(error.code())
    not_admitted = dict(error.trailing_metadata() or ()).get("x-admitted") == "0"
    if status == 504 or (status == 503 and not not_admitted):
        return None, not_admitted
    return status, not_admitted
