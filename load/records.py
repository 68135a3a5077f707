"""The two records of an attempt as a worker sends them to the process that writes the history.

Nothing here imports the history's own modules: a worker sends arrays, the writing process makes rows of them.
"""

from typing import Final

import msgspec

LENGTH_BYTES: Final = 4
"""Each record on the wire is its length, big-endian, then its MessagePack bytes."""


class Invoke(msgspec.Struct, array_like=True, tag="invoke"):
    """An attempt begins. Recorded before its request is sent."""

    attempt: int
    """Numbered from 1 by the worker, without gaps; the writing process gives each its number in the history."""
    client: int
    op: str
    key: str | None
    payload_hash: str | None
    user: int | None
    api: str
    match_id: str | None
    bet_id: str | None
    selection: str | None
    side: str | None
    odds: int | None
    amount: int | None
    min_seq: int | None
    strong: bool | None
    after_seq: int | None
    intended: float
    """Seconds since the origin of the history's clock, as `t`."""
    t: float
    tag: str | None


class Complete(msgspec.Struct, array_like=True, tag="complete"):
    """What became of an attempt."""

    record: str
    """ok, fail or info."""
    attempt: int
    client: int
    t: float
    status: int | None = None
    outcome: str | None = None
    replayed: bool | None = None
    seq: int | None = None
    balance: int | None = None
    bet_id: str | None = None
    source: str | None = None
    stale: bool | None = None
    as_of: float | None = None
    page_rows: int | None = None
    page_cut: bool | None = None
    error: str | None = None


class Hello(msgspec.Struct, array_like=True, tag="hello"):
    """The first record of a worker."""

    worker: int


class End(msgspec.Struct, array_like=True, tag="end"):
    """The last record of a worker: nothing it sent is missing if this came and its numbers agree."""

    attempts: int


Record = Hello | Invoke | Complete | End


def frame(encoded: bytes) -> bytes:
    """Return a record with its length before it."""
    return len(encoded).to_bytes(LENGTH_BYTES, "big") + encoded
