"""UUIDs of version 7 (RFC 9562): ordered by time, so that new rows land at the end of an index."""

import os
import time
from uuid import UUID

_RANDOM_BYTES = 10
_POOL_BYTES = 256 * _RANDOM_BYTES

_pool = b""
_used = 0


def uuid7(now_ms: int | None = None) -> UUID:
    """Return a new UUIDv7 of the given Unix millisecond (now by default) with 74 random bits.

    For one thread, as everything on the event loop is.
    """
    global _pool, _used  # noqa: PLW0603 - asking the kernel for ten bytes at a time took longer than all the rest
    if _used >= len(_pool):
        _pool, _used = os.urandom(_POOL_BYTES), 0
    random_bits = int.from_bytes(_pool[_used : _used + _RANDOM_BYTES], "big")
    _used += _RANDOM_BYTES
    milliseconds = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    value = (milliseconds & (2**48 - 1)) << 80
    value |= 0x7 << 76
    value |= (random_bits >> 68) << 64
    value |= 0b10 << 62
    value |= random_bits & (2**62 - 1)
    return UUID(int=value)
