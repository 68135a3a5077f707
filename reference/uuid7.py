"""UUIDs of version 7 (RFC 9562): ordered by time, so that new rows land at the end of an index."""

import os
import time
from uuid import UUID


def uuid7(now_ms: int | None = None) -> UUID:
    """Return a new UUIDv7 of the given Unix millisecond (now by default) with 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    random_bits = int.from_bytes(os.urandom(10), "big")
    value = (milliseconds & (2**48 - 1)) << 80
    value |= 0x7 << 76
    value |= (random_bits >> 68) << 64
    value |= 0b10 << 62
    value |= random_bits & (2**62 - 1)
    return UUID(int=value)
