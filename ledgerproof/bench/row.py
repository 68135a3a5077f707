"""A row of the result: a rate, and everything that is needed to know what it means."""

from typing import Any

import msgspec

FSYNC_COMMIT = "Postgres, at every COMMIT (fsync on, synchronous_commit on)"
FSYNC_NONE = "nowhere: nothing is written"
FSYNC_KAFKA = "Postgres at every COMMIT; Kafka acknowledges from memory (acks=all, its own flush intervals)"


class Row(msgspec.Struct, kw_only=True):
    """One line of the benchmark. Rates are operations per second, latencies milliseconds; None: not applicable."""

    name: str
    variant: str = ""
    """What tells rows of one name apart, as a batch size."""
    unit: str = "bets/s"
    rate: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    ratio_to_floor: float | None = None
    floor: str = ""
    """The row whose rate the ratio divides by."""
    valid: bool = True
    reason: str = ""
    """Why the row is not valid, or what limited it."""
    loop: str = ""
    """open, closed, batch after batch, or backlog."""
    batch_size: int | None = None
    data_age: int = 0
    """Entries in the ledger when the window began."""
    duration_s: float = 0.0
    samples: int = 0
    """Operations that the rate and the latencies rest on."""
    cpu_ms_per_op: dict[str, float] = {}
    """CPU milliseconds for one operation, by group of processes."""
    fsync: str = FSYNC_COMMIT
    details: dict[str, Any] = {}
    commit: str = ""
    machine: str = ""

    @property
    def title(self) -> str:
        """Name and variant."""
        return f"{self.name} ({self.variant})" if self.variant else self.name


def ended(row: Row, reason: str) -> Row:
    """Return the row as invalid, for a reason."""
    row.valid = False
    row.reason = reason
    return row
