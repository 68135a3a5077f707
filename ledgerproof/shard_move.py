"""Moves one shard while the load runs, as an operator would, in a thread of its own beside the generator."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from compose.stack import Stack
from invariants.timeline import Timeline
from reference.errors import LedgerError
from reference.routing import SHARDS
from reference.shards import Moved, move_shard

MOVE_AT: Final = 0.33
"""When the move begins, as a share of the load: between the standard faults, and late enough to have much to copy."""
TRIES: Final = 20
RETRY_S: Final = 1.0
"""A fault may be in the way; the command is then repeated, as its message says."""
JOIN_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True)
class PlannedMove:
    """One move to come; `at_s` counts from the start of the load."""

    shard: int
    target: int
    at_s: float


def plan_move(seed: int, duration_s: float, routing: list[int], servers: int) -> PlannedMove | None:
    """Return which shard moves where, drawn from the seed; None with one server."""
    if servers < 2:
        return None
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x5A])))
    shard = int(rng.integers(SHARDS))
    target = (routing[shard] + 1 + int(rng.integers(servers - 1))) % servers
    return PlannedMove(shard, target, MOVE_AT * duration_s)


class ShardMove:
    """Runs a planned move; `done` holds what became of it."""

    def __init__(self, stack: Stack, timeline: Timeline, planned: PlannedMove, clock: Callable[[], float]) -> None:
        self._stack = stack
        self._timeline = timeline
        self._planned = planned
        self._clock = clock
        self._cancelled = threading.Event()
        self._start_s = 0.0
        self._thread = threading.Thread(target=self._run, name="shard-move", daemon=True)
        self.done: dict[str, Any] | None = None
        self.problem: str | None = None

    def start(self, start_s: float) -> None:
        """Begin; `start_s` is the start of the load on the run's clock."""
        self._start_s = start_s
        self._thread.start()

    def cancel(self) -> None:
        """Begin no (further) attempt; does not wait."""
        self._cancelled.set()

    def join(self) -> None:
        """Wait until the move is over; afterwards `done` or `problem` is set."""
        if self._thread.ident is not None:
            self._thread.join(JOIN_TIMEOUT_S)
        if self.done is None and self.problem is None:
            self.problem = f"did not end within {JOIN_TIMEOUT_S:g} s"

    def _run(self) -> None:
        planned = self._planned
        if self._cancelled.wait(max(0.0, self._start_s + planned.at_s - self._clock())):
            self.problem = "the run ended before it"
            return
        began_s = self._clock()
        try:
            moved = self._move()
        except Exception as error:  # noqa: BLE001 - a thread's failure is the run's to report
            self.problem = f"{type(error).__name__}: {error}"
            return
        if moved is not None:
            self.done = {"began_at": round(began_s, 3), **msgspec.to_builtins(moved)}
            self._timeline.note(
                f"shard {moved.shard} moved from {moved.source} to {moved.target}: {moved.entries} entries, "
                f"{moved.bets} bets; frozen for {moved.freeze_ms:.0f} ms"
            )

    def _move(self) -> Moved | None:
        """Give the command until it has been carried out; None after setting `problem`."""
        planned = self._planned
        for _ in range(TRIES):
            try:
                moved = asyncio.run(
                    move_shard(self._stack.config, self._stack.superuser, planned.shard, planned.target)
                )
            except LedgerError as error:
                self.problem = str(error)
                self._timeline.note(f"moving shard {planned.shard}: {error}")
            else:
                self.problem = None
                return moved
            if self._cancelled.wait(RETRY_S):
                break
        return None
