"""Named points at which a harness can make this process fail; a call costs nanoseconds and does nothing otherwise.

The code says where it can be hit (`hit`, `hit_async`); `CATALOGUE` says what each place stands for. Nothing is armed,
counted or listened to unless the configuration names a `failpoint_folder`: only a harness does that. Then the process
has an admin socket in its folder there (`failpoint_socket`), through which points are armed and disarmed:

    exit    the process is gone as after kill -9        raise   InjectedFault, a broken connection
    delay   it goes on after `delay_ms`                 hang    it goes on when released, or after HANG_MAX_S

Hits are counted in a file of the folder, so that they outlive the process that made them.
"""

import asyncio
import mmap
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec

HANG_MAX_S: Final = 60.0
"""A point that nobody releases goes on by itself: a fault ends even if its harness was killed."""
DELAY_MAX_MS: Final = 60_000
TIMES_MAX: Final = 1_000_000
FIRED_WRITTEN_MAX: Final = 10_000
"""Lines that one process appends to its file of what was done."""

CATALOGUE: Final[dict[str, str]] = {
    "api.after_admit_before_handle": "A request was admitted and nothing of it was read or done yet.",
    "api.after_commit_before_ack": "A command is decided and committed, and its caller has not been answered.",
    "grpc.after_commit_before_ack": "The same for a call over gRPC.",
    "desk.after_check_before_submit": "A bet was found acceptable, and its match may close before it is posted.",
    "desk.after_bulk_submit_before_answers": "All commands of a bulk are with the writers, no answer is there yet.",
    "desk.after_transition_before_forget": "A match was moved, and this process still remembers it as it was.",
    "writer.before_post": "A batch was taken from the queue and nothing of it was sent.",
    "writer.after_commit_before_deliver": "A batch is committed and none of its commands has been told.",
    "writer.before_replay_answers": "Repeated commands were recognised, their original answers are not read yet.",
    "writer.between_singles": "A batch that the server refused is tried command by command; one of them is next.",
    "store.before_connect": "A connection to a server is about to be made.",
    "store.before_statement": "A pooled connection was borrowed and nothing was sent over it.",
    "store.after_statement_before_return": "A statement over a pooled connection had its effect, its caller waits.",
    "store.after_routes_before_learn": "Servers have said which shards they hold; this process does not know yet.",
    "relay.after_lead_before_progress": "The leader lock of a relay is held, and what its predecessor did is unknown.",
    "relay.after_read_before_send": "Outbox rows were read and nothing of them was sent.",
    "relay.after_send_before_mark": "The broker has acknowledged events that are not marked: they are sent again.",
    "relay.after_mark_before_next": "Rows are marked, and how far the relay is has been written with them.",
    "publisher.before_send": "Records are about to be handed to the broker's client.",
    "publisher.after_send_before_ack": "Records were handed over and no acknowledgement was waited for.",
    "consumer.before_effect": "Messages were taken from a lane and have had no effect.",
    "consumer.after_effect_before_offset": "Messages had their effect, and come again: no offset is committed yet.",
    "consumer.after_commit_before_poll": "Offsets are committed, nothing new was asked for.",
    "consumer.after_rebalance": "Partitions were just given to this member.",
    "consumer.before_dead_letter": "A message that can have no effect is about to go to events.dlq.",
    "matcher.after_lock_before_write": "Matches are locked and their books read; nothing is written.",
    "matcher.before_commit": "Orders, fills and events of a batch are written and not committed.",
    "matcher.after_commit_before_cache": "A batch is committed, and the copies of its books are not put back.",
    "settler.before_page": "Orders of a settlement were read and none of them is paid.",
    "settler.between_bets": "Bets of a page whose wallets are on one server are paid; the others may not be.",
    "settler.after_pay_before_mark": "All bets of a page are paid, and the page is not marked.",
    "settler.before_finish": "All pages of a settlement are marked, and it is not finished.",
    "settler.before_refund": "Cancelled bets came as events and are not refunded.",
    "projector.after_apply_before_cache": "The projection is written, the cache still has the old balances.",
    "projector.after_cache_before_tell": "Projection and cache are written, nobody who listens was told.",
    "projector.before_report": "What is complete was read, and is about to be vouched for.",
    "cache.before_set": "Balances that were read are about to be put into Redis; newer ones may be there by then.",
    "cache.before_get": "Redis is about to be asked for balances.",
    "reads.before_fill": "A balance was read from the projection and is about to fill the cache.",
    "reconciler.after_snapshot_before_check": "Snapshots of all servers are open and nothing is compared.",
    "reconciler.before_close_gate": "A mismatch was found and payouts go on.",
    "reconciler.before_store": "A pass has ended and its result is not stored.",
    "shards.after_copy_before_freeze": "A shard is copied while clients go on; nothing is frozen.",
    "shards.after_freeze_before_give_up": "A shard takes no commands, its rest is copied, its owner is the old server.",
    "shards.after_give_up_before_accept": "The old server has given a shard up and the new one has not taken it over.",
    "shards.after_accept_before_clear": "The new server holds a shard, and the old one still has its rows.",
}
"""Name of each point → what the world looks like when it is hit."""

NAMES: Final = tuple(sorted(CATALOGUE))
_INDEX: Final = {name: index for index, name in enumerate(NAMES)}

HITS_FILE: Final = "failpoints.hits"
"""In the folder of a process: for each name of `NAMES`, how often it was hit and how often it did something."""
FIRED_FILE: Final = "failpoints.fired"
"""In the folder of a process: a line of JSON (`Fired`) for each time a point did something."""
_WORD = 8

Action = Literal["exit", "raise", "delay", "hang"]


class InjectedFault(ConnectionError):
    """What an armed point raises: to the code around it a connection that broke just there."""


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a point is to do: from the hit after `skip`, for `times` hits (None: every one). Raises ValueError."""

    name: str
    action: Action
    times: int | None = 1
    skip: int = 0
    delay_ms: int | None = None
    """Of a delay, and only of a delay."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.name not in CATALOGUE:
            raise ValueError(f"there is no failpoint {self.name!r}; `ledgerproof failpoints list` names them")
        if self.times is not None and not 1 <= self.times <= TIMES_MAX:
            raise ValueError(f"times must be 1 to {TIMES_MAX}, or null for every hit, not {self.times}")
        if not 0 <= self.skip <= TIMES_MAX:
            raise ValueError(f"skip must be 0 to {TIMES_MAX}, not {self.skip}")
        if (self.action == "delay") != (self.delay_ms is not None):
            raise ValueError("delay_ms belongs to the action delay, and to no other")
        if self.delay_ms is not None and not 1 <= self.delay_ms <= DELAY_MAX_MS:
            raise ValueError(f"delay_ms must be 1 to {DELAY_MAX_MS}, not {self.delay_ms}")


class Fired(msgspec.Struct, frozen=True):
    """One time that a point did something."""

    t: float
    """time.monotonic() of this machine."""
    name: str
    action: str
    hit: int
    """The number of the hit, counted over all processes that had this folder."""


class PointState(msgspec.Struct, frozen=True):
    """How a point is in one process. Counts include earlier processes with the same folder."""

    name: str
    hits: int
    fired: int
    armed: Arm | None = None
    hanging: int = 0
    """Callers that hang in it now."""


class _Armed:
    """An armed point and who hangs in it."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.seen = 0
        self.hanging = 0
        self.released = threading.Event()
        self.waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def due(self) -> bool:
        """Count one hit and return whether it is one that does something."""
        self.seen += 1
        after = self.seen - self.arm.skip
        return after > 0 and (self.arm.times is None or after <= self.arm.times)


class Failpoints:
    """The points of one process that a harness controls. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Count hits in `folder`, going on from those of earlier processes. Raises OSError."""
        self._lock = threading.Lock()
        self._armed: dict[str, _Armed] = {}
        size = 2 * _WORD * len(NAMES)
        handle = os.open(folder / HITS_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(handle).st_size != size:
                os.ftruncate(handle, 0)
                os.ftruncate(handle, size)
            # A page of the file itself: what is counted there is not lost with the process.
            self._counts = memoryview(mmap.mmap(handle, size)).cast("Q")
        finally:
            os.close(handle)
        self._fired = os.open(folder / FIRED_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._fired_left = FIRED_WRITTEN_MAX

    # -- for the harness -------------------------------------------------------------------------------

    def arm(self, arm: Arm) -> None:
        """Arm a point; what it was armed with before is released and forgotten."""
        self.disarm(arm.name)
        with self._lock:
            self._armed[arm.name] = _Armed(arm)

    def disarm(self, name: str | None = None) -> None:
        """Disarm one point, or all of them; whoever hangs in it goes on."""
        with self._lock:
            gone = [self._armed.pop(each) for each in ([name] if name else list(self._armed)) if each in self._armed]
            for armed in gone:
                armed.released.set()
                for loop, waiter in armed.waiters:
                    with suppress(RuntimeError):  # its loop has ended, and nobody waits any more
                        loop.call_soon_threadsafe(_wake, waiter)

    def states(self) -> list[PointState]:
        """Return how every point is, by name."""
        with self._lock:
            found = []
            for index, name in enumerate(NAMES):
                armed = self._armed.get(name)
                hits, fired = self._counts[2 * index], self._counts[2 * index + 1]
                found.append(PointState(name, hits, fired, armed.arm if armed else None, armed.hanging if armed else 0))
            return found

    # -- for the code ----------------------------------------------------------------------------------

    def hit(self, name: str) -> None:
        """Count a hit and do what the point is armed with. Raises InjectedFault if it is that."""
        armed = self._count(name)
        if armed is None:
            return
        arm = armed.arm
        if arm.action == "hang":
            armed.released.wait(HANG_MAX_S)
            self._left(armed)
        elif arm.action == "delay":
            time.sleep((arm.delay_ms or 0) / 1000)
        else:
            _break(arm)

    async def hit_async(self, name: str) -> None:
        """Do the same without holding up the event loop."""
        armed = self._count(name)
        if armed is None:
            return
        arm = armed.arm
        if arm.action == "hang":
            await self._hang(armed)
        elif arm.action == "delay":
            await asyncio.sleep((arm.delay_ms or 0) / 1000)
        else:
            _break(arm)

    async def _hang(self, armed: _Armed) -> None:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        with self._lock:
            armed.waiters.append((loop, waiter))
            if armed.released.is_set():
                _wake(waiter)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(HANG_MAX_S):
                    await waiter
        finally:
            self._left(armed)

    def _left(self, armed: _Armed) -> None:
        with self._lock:
            armed.hanging -= 1

    def _count(self, name: str) -> _Armed | None:
        """Count a hit; return the armed point if this hit is one that does something."""
        index = _INDEX[name]
        with self._lock:
            self._counts[2 * index] += 1
            armed = self._armed.get(name)
            if armed is None or not armed.due():
                return None
            self._counts[2 * index + 1] += 1
            if armed.arm.action == "hang":
                armed.hanging += 1
            if self._fired_left:
                self._fired_left -= 1
                line = Fired(time.monotonic(), name, armed.arm.action, self._counts[2 * index])
                os.write(self._fired, msgspec.json.encode(line) + b"\n")
            return armed


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _break(arm: Arm) -> None:
    """End the process as kill -9 does, or raise."""
    if arm.action == "exit":
        os.kill(os.getpid(), signal.SIGKILL)
    raise InjectedFault(f"failpoint {arm.name}")


_active: Failpoints | None = None


def activate(points: Failpoints | None) -> None:
    """Let `hit` reach these points from now on; None: nothing any more."""
    global _active  # noqa: PLW0603 - one switch a process, set while it starts: a call must cost next to nothing
    _active = points


def hit(name: str) -> None:
    """Pass a point in a thread or where nothing can be awaited. Raises InjectedFault if it is armed with that."""
    if _active is not None:
        _active.hit(name)


async def hit_async(name: str) -> None:
    """Pass a point in a coroutine; a hang or a delay holds up only this coroutine. Raises as `hit` does."""
    if _active is not None:
        await _active.hit_async(name)


# -- what outlives a process ----------------------------------------------------------------------------


def read_counts(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (hits, fired) of each point from a process's folder, also while the process is dead or stopped.

    Empty if no process counted there. Raises OSError if it cannot be read.
    """
    try:
        text = (folder / HITS_FILE).read_bytes()
    except FileNotFoundError:
        return {}
    words = memoryview(text[: len(text) // _WORD * _WORD]).cast("Q")
    if len(words) != 2 * len(NAMES):
        return {}
    return {name: (words[2 * index], words[2 * index + 1]) for index, name in enumerate(NAMES)}


def read_fired(folder: Path) -> list[Fired]:
    """Return what the points of a process's folder did, oldest first; a line cut short is left out. Raises OSError."""
    try:
        lines = (folder / FIRED_FILE).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [msgspec.json.decode(line, type=Fired) for line in lines if line.endswith(b"}")]
