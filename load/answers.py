"""What requests and answers of the HTTP API look like on the wire, for every client that must know what became of them.

`NotSent` means certainly not, `Lost` means perhaps; nothing is sent twice. Nothing here waits for anything, so clients
on asyncio and on gevent share it.
"""

import re
from typing import Final, NamedTuple

CONNECT_TIMEOUT_S: Final = 1.0
MAX_HEADER_BYTES: Final = 65_536
LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
NOT_ADMITTED: Final = re.compile(rb"\r\nx-admitted: *0\r\n", re.IGNORECASE)
CLOSE: Final = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)


class WireError(Exception):
    """A request got no answer."""


class NotSent(WireError):
    """No connection could be made, so no byte of the request left this process."""


class Lost(WireError):
    """The request was sent and no complete answer came: it may or may not have had its effect."""


class Reply(NamedTuple):
    """A complete answer."""

    status: int
    not_admitted: bool
    """The answer carries `x-admitted: 0`: the service certifies that nothing was done."""
    body: bytes


def get(path: str, token: str = "") -> bytes:
    """Return a serialised GET, with a bearer token unless that is empty."""
    return f"GET {path} HTTP/1.1\r\nHost: ledger\r\n{_bearer(token)}\r\n".encode()


def post(path: str, key: str, body: bytes, token: str = "") -> bytes:
    """Return a serialised POST of a JSON body under an idempotency key, with a bearer token unless that is empty."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: ledger\r\nContent-Type: application/json\r\n{_bearer(token)}"
        f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _bearer(token: str) -> str:
    return f"Authorization: Bearer {token}\r\n" if token else ""
