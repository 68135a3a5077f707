"""Opaque cursors of pages: where the next page begins, as text that a caller passes back unread.

A cursor holds the sort position of the last item, never an offset, so that new items neither repeat nor hide one.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as BadBase64
from typing import TypeVar

import msgspec

from reference.errors import InvalidCommand

CURSOR_MAX_CHARACTERS = 256
_Position = TypeVar("_Position")


def encode_cursor(kind: str, position: object) -> str:
    """Return the cursor of a list of this kind at `position` (anything JSON can hold)."""
    return urlsafe_b64encode(msgspec.json.encode([kind, position])).decode().rstrip("=")


def decode_cursor(kind: str, text: str, position: type[_Position]) -> _Position:
    """Return the position in a cursor. Raises InvalidCommand if it is not a cursor of a list of this kind."""
    refused = InvalidCommand("cursor", "must be a next_cursor of this list")
    if len(text) > CURSOR_MAX_CHARACTERS:
        raise refused
    try:
        raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        found_kind, found = msgspec.json.decode(raw, type=tuple[str, position])  # type: ignore[valid-type]
    except (BadBase64, ValueError, msgspec.DecodeError) as error:
        raise refused from error
    if found_kind != kind:
        raise refused
    return found
