"""Which logical shard a wallet or a match belongs to, and which physical server holds that shard.

Vocabulary shared with the checker and the capacity model; it does no I/O.
"""

from collections.abc import Sequence
from uuid import UUID

SHARDS = 100
"""Number of logical shards. The seed's constant: it is part of every stored row, so it never changes."""


NOT_HERE = "NOT_HERE"
"""Status of a posting that nothing happened to: its shard is being moved, or is on another server. No Outcome."""
SHARD_NOT_HERE = "LP002"
"""SQLSTATE of a read of a wallet whose shard the server does not hold."""


def shard_of(user_id: int) -> int:
    """Return the logical shard, 0 … 99, of a wallet (the seed's `getShardKey`)."""
    return user_id % SHARDS


def shard_of_match(match_id: UUID) -> int:
    """Return the logical shard, 0 … 99, whose server is the home of a match.

    The low 64 bits are used: they are random in UUIDs of version 4 and 7, while the high bits of
    version 7 are a clock and would send all matches of one moment to one server.
    """
    return (match_id.int & (2**64 - 1)) % SHARDS


def even_routing(servers: int) -> list[int]:
    """Return the default routing table: `table[shard]` is the index of the server that holds it.

    Raises ValueError unless 1 ≤ servers ≤ 100.
    """
    if not 1 <= servers <= SHARDS:
        raise ValueError(f"servers must be 1 to {SHARDS}, not {servers}")
    return [shard * servers // SHARDS for shard in range(SHARDS)]


def shards_of_server(routing: Sequence[int], server: int) -> list[int]:
    """Return the logical shards that `server` (an index into the configured servers) holds."""
    return [shard for shard, holder in enumerate(routing) if holder == server]
