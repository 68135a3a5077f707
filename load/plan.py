"""What a master tells its workers before a run, and how they agree on when it begins."""

import time
from pathlib import Path
from typing import Final

import msgspec

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class WorkerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker needs; nothing is read from its own command line."""

    index: int
    count: int
    profile: str
    seed: int
    rate_factor: float
    time_factor: float
    trace: str | None = None
    """Path of the trace that is played instead of the profile's stages."""
    rate: float | None = None
    """For a profile with a knee: the rate of this window."""
    digest: str
    """Of the whole schedule as the master drew it."""
    run: str
    world: str
    first_wallet: int
    targets: list[tuple[str, int]]
    grpc_targets: list[str]
    token: str
    timeout_s: float
    prepare: bool
    wallet_ranks: list[int] = []
    """Wallets that this worker opens."""
    history: str | None = None
    """Address of the process that writes the history."""
    origin_s: float = 0.0
    """Reading of time.monotonic() that the history calls 0."""


class Start(msgspec.Struct, frozen=True):
    """The moment at which all workers begin."""

    monotonic_s: float
    unix_s: float
    boot_id: str

    @classmethod
    def after(cls, lead_s: float) -> "Start":
        """Return the moment that comes in `lead_s` seconds."""
        return cls(time.monotonic() + lead_s, time.time() + lead_s, boot_id())

    def here(self) -> float:
        """Return the moment as a reading of this process's time.monotonic().

        On the same machine the clock is the same; on another the wall clocks must agree.
        """
        if self.boot_id == boot_id():
            return self.monotonic_s
        return time.monotonic() + self.unix_s - time.time()


def boot_id() -> str:
    """Return what tells this machine, since its last start, from others; empty if the kernel does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
