"""The load generator: a process of its own that sends prepared bytes when they are due and times whole answers.

`python -m ledgerproof.bench.generator` reads one `Plan` (a line of JSON) from standard input, prepares everything,
prints `ready`, waits for a line, plays the window and prints one `Window`. When its standard input ends, its owner
has gone and it ends too.

In the open loop a request is due at its time whether or not earlier ones were answered, and its latency counts from
that time: what waits for a stalled server, or for a free connection, is slow, never absent.
"""

import asyncio
import contextlib
import gc
import os
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import uvloop

from ledgerproof.bench.arrivals import poisson
from ledgerproof.bench.plan import CURVE_PERCENTS, Plan, Window
from ledgerproof.bench.requests import build, draw_reads

if TYPE_CHECKING:
    from ledgerproof.bench.grpc_load import GrpcLoad

TICK_S = 0.001
"""The event loop's timers have a resolution of a millisecond; everything due is sent at each."""
NICE = -10
"""A generator on the machine it loads must not be the one that waits for the processor. Where the user may not
raise a priority it stays as it is, and the lag says what that cost."""
AUTOGROUP = Path("/proc/self/autogroup")
CONNECT_TIMEOUT_S = 5.0
OPENING_MAX = 8
REPEATED_RATE_MAX = 150_000
"""Room is made for this many repeated requests a second; a window that uses it up ends early. A quiet machine does
80,000 with a server that only answers."""
REOPEN_AFTER_S = 0.05
HEAD_MAX_BYTES = 16_384
PROBLEM_MAX_BYTES = 300
UNANSWERED = float("inf")

Times = npt.NDArray[np.float64]


class NotLoaded(Exception):
    """The window could not begin; the message says why."""


class Connection(asyncio.Protocol):
    """One kept connection with at most one request under way."""

    __slots__ = ("_buffer", "_load", "_transport", "index")

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._buffer = b""
        self._transport: asyncio.WriteTransport | None = None
        self.index = -1
        """Which request is under way, -1 for none."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def send(self, index: int, request: bytes) -> None:
        """Send a request; its answer is reported to the load."""
        self.index = index
        if self._transport is not None:
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Report an answer when all of it is here."""
        if self._buffer:
            data = self._buffer + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > HEAD_MAX_BYTES:
                self._load.unreadable(self)
            else:
                self._buffer = data
            return
        at = data.find(b"content-length: ", 0, end)
        if at < 0:
            at = data[:end].lower().find(b"content-length: ")
        if at < 0 or not data.startswith(b"HTTP/1.1 "):
            self._load.unreadable(self)
            return
        line_end = data.find(b"\r\n", at, end + 2)
        if len(data) < end + 4 + int(data[at + 16 : line_end]):
            self._buffer = data
            return
        self._buffer = b""
        self._load.answered(self, int(data[9:12]), data, end + 4)

    def connection_lost(self, _error: Exception | None) -> None:
        """Tell the load, which opens another one when it needs it."""
        self._transport = None
        self._load.lost_connection(self)

    def close(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


class Load:
    """One window. `run` plays it; the arrays have one element a request."""

    def __init__(self, plan: Plan, requests: Sequence[bytes], due: Times | None) -> None:
        self._plan = plan
        self._requests = requests
        self._open_loop = due is not None
        count = len(requests) if due is None else len(due)
        capacity = count if not plan.repeat else max(count, int(plan.duration_s * REPEATED_RATE_MAX))
        self.due: Times = np.zeros(capacity) if due is None else due.copy()
        self.latency: Times = np.full(capacity, UNANSWERED)
        self.lag: Times = np.zeros(capacity)
        self.status = np.zeros(capacity, dtype=np.uint16)
        self._idle: deque[Connection] = deque()
        self._waiting: deque[int] = deque()
        self._all: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._opened = 0
        self._next = 0
        self._under_way = 0
        self._queued = 0
        self._lost = 0
        self._unreadable = 0
        self._marks: Counter[str] = Counter()
        self._marker = plan.marker.encode()
        self._count = plan.count.encode()
        self._counted = 0
        self._problem = b""
        self._began = 0.0
        self._running = False
        self._finished = asyncio.Event()

    async def connect(self) -> None:
        """Open the first connections. Raises NotLoaded if a server does not take them."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.gather(*(self._open() for _ in range(self._plan.connections)))
        except (OSError, TimeoutError) as error:
            raise NotLoaded(f"cannot connect to 127.0.0.1 {self._plan.ports}: {error}") from error

    async def run(self) -> Window:
        """Play the window, wait for answers no longer than the grace, and return what was measured."""
        gc.collect()
        gc.disable()  # A pause of the collector would look like a slow server; a window makes no cycles to speak of.
        cpu = time.process_time()
        self._running = True
        self._began = time.perf_counter()
        if self._open_loop:
            self._tick()
        else:
            for connection in list(self._idle):
                self._idle.remove(connection)
                self._send_next(connection)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._finished.wait(), self._plan.duration_s + self._plan.grace_s)
        self._running = False
        cpu = time.process_time() - cpu
        gc.enable()
        for task in self._opening:
            task.cancel()
        for connection in list(self._all):
            connection.close()
        return self._window(cpu)

    # --- called by connections -----------------------------------------------------------------------------

    def answered(self, connection: Connection, status: int, data: bytes, body_at: int) -> None:
        """Note an answer and give the connection its next request."""
        index = connection.index
        if index < 0:
            return
        now = time.perf_counter() - self._began
        self.latency[index] = now - self.due[index]
        self.status[index] = status
        if self._marker:
            at = data.find(self._marker, body_at)
            if at >= 0:
                at += len(self._marker)
                self._marks[data[at : data.find(b'"', at)].decode()] += 1
        if self._count:
            self._counted += data.count(self._count, body_at)
        if status >= 300 and not self._problem:
            self._problem = data[body_at : body_at + PROBLEM_MAX_BYTES]
        self._under_way -= 1
        connection.index = -1
        self._free(connection, now)

    def unreadable(self, connection: Connection) -> None:
        """Give up a connection whose answer is not understood."""
        self._unreadable += 1
        connection.close()

    def lost_connection(self, connection: Connection) -> None:
        """Forget a connection that ended; a request under way on it has no answer."""
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        if not self._running:
            return
        if connection.index >= 0:
            self._lost += 1
            self._under_way -= 1
        if self._waiting or not self._open_loop:
            self._open_later()
        self._check_finished()

    # --- inside ----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Hand over everything that is due and come back in a moment."""
        if not self._running:
            return
        due, lag = self.due, self.lag
        count = len(due)
        now = time.perf_counter() - self._began
        while self._next < count and due[self._next] <= now:
            index = self._next
            self._next += 1
            self._under_way += 1
            lag[index] = now - due[index]
            if self._idle:
                # First in, first out: every connection, and so every process behind the ports, gets its share.
                self._idle.popleft().send(index, self._requests[index])
            else:
                self._waiting.append(index)
                self._queued += 1
                self._open_later()
        if self._next < count:
            asyncio.get_running_loop().call_later(TICK_S, self._tick)
        else:
            self._check_finished()

    def _free(self, connection: Connection, now: float) -> None:
        if self._waiting:
            index = self._waiting.popleft()
            connection.send(index, self._requests[index])
        elif self._open_loop:
            self._idle.append(connection)
            self._check_finished()
        elif now < self._plan.duration_s and self._running:
            self._send_next(connection)
        else:
            self._check_finished()

    def _send_next(self, connection: Connection) -> None:
        """Send the next request of a closed loop, if one is left."""
        index = self._next
        if index >= len(self.due):
            self._check_finished()
            return
        self._next += 1
        self._under_way += 1
        self.due[index] = time.perf_counter() - self._began
        connection.send(index, self._requests[index % len(self._requests)])

    def _check_finished(self) -> None:
        if self._under_way == 0 and (self._next >= len(self.due) or not self._open_loop):
            self._finished.set()

    def _open_later(self) -> None:
        """Open one more connection, a few at a time: a burst of them would make the generator itself late."""
        if len(self._opening) >= OPENING_MAX or len(self._all) + len(self._opening) >= self._plan.connections_max:
            return
        task = asyncio.get_running_loop().create_task(self._open_for_waiting())
        self._opening.add(task)
        task.add_done_callback(self._opened_one)

    def _opened_one(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if self._waiting and self._running:
            self._open_later()

    async def _open_for_waiting(self) -> None:
        try:
            await self._open()
        except OSError:
            # Refused or reset: what waits is tried again with the next connection, at the pace of the timer.
            self._lost += 1
            await asyncio.sleep(REOPEN_AFTER_S)

    async def _open(self) -> None:
        port = self._plan.ports[self._opened % len(self._plan.ports)]
        self._opened += 1
        _, connection = await asyncio.get_running_loop().create_connection(lambda: Connection(self), "127.0.0.1", port)
        self._all.add(connection)
        if self._running:
            self._free(connection, time.perf_counter() - self._began)
        else:
            self._idle.append(connection)

    def _window(self, cpu_s: float) -> Window:
        sent = self._next if not self._open_loop else len(self.due)
        latency, status, due, lag = self.latency[:sent], self.status[:sent], self.due[:sent], self.lag[:sent]
        accepted = (status >= 200) & (status < 300)
        answered = status > 0
        ended = due + latency
        duration_s = self._plan.duration_s
        if not self._open_loop and answered.any():
            duration_s = float(ended[answered].max())
        values, counts = np.unique(status[answered], return_counts=True)
        classes = _classes(self._plan, sent)
        warm = due >= self._plan.warm_s
        seconds = range(max(1, int(np.ceil(self._plan.duration_s))))
        second_due = due.astype(np.int64)
        second_ended = np.where(accepted, ended, -1).astype(np.int64)
        return Window(
            loop=self._plan.loop,
            duration_s=duration_s,
            due=sent,
            answered=int(answered.sum()),
            accepted=int(accepted.sum()),
            statuses={str(value): int(count) for value, count in zip(values, counts, strict=True)},
            p50_ms=quantile_ms(latency, 0.5),
            p99_ms=quantile_ms(latency, 0.99),
            max_ms=quantile_ms(latency, 1.0),
            accepted_p50_ms=quantile_ms(latency[accepted], 0.5),
            accepted_p99_ms=quantile_ms(latency[accepted], 0.99),
            lag_p99_ms=quantile_ms(lag, 0.99) or 0.0,
            lag_max_ms=quantile_ms(lag, 1.0) or 0.0,
            queued=self._queued,
            connections=self._opened,
            lost=self._lost,
            unreadable=self._unreadable,
            marks=dict(self._marks),
            counted=self._counted,
            cpu_s=cpu_s,
            priority=_priority(),
            first_problem=self._problem.decode(errors="replace"),
            p99_by_second_ms=[quantile_ms(latency[second_due == second], 0.99) for second in seconds],
            accepted_by_second=[int((second_ended == second).sum()) for second in seconds],
            curves_ms={
                name: [quantile_ms(latency[mine & warm], percent / 100) for percent in CURVE_PERCENTS]
                for name, mine in classes.items()
            },
            accepted_of={name: int((accepted & mine).sum()) for name, mine in classes.items()},
        )


def _classes(plan: Plan, sent: int) -> dict[str, npt.NDArray[np.bool_]]:
    """Return for each class of mixed requests which of those sent belong to it."""
    if plan.kind != "mixed":
        return {}
    reads = np.array(draw_reads(plan, sent), dtype=bool)
    return {name: mine for name, mine in (("bets", ~reads), ("reads", reads)) if mine.any()}


def quantile_ms(seconds: Times, share: float) -> float | None:
    """Return the quantile in milliseconds, never below what was measured; None if empty or not finite."""
    if len(seconds) == 0:
        return None
    value = float(np.quantile(seconds, share, method="higher"))
    return round(value * 1000, 3) if np.isfinite(value) else None


def prepare(plan: Plan) -> Load:
    """Draw the schedule and build the requests of a window; call it inside the running event loop."""
    if plan.loop == "open":
        due = poisson(plan.rate, plan.duration_s, plan.seed, plan.burst)
        return Load(plan, build(plan, len(due)), due)
    return Load(plan, build(plan, plan.requests_max), None)


def _favour_this_process(plan: Plan) -> None:
    """Raise the priority and the number of files as far as the user may.

    In the open loop the process is scheduled in real time: it sleeps between ticks and uses a fraction of a core, but
    must have that when a request is due, as a client on a machine of its own would.
    """
    with contextlib.suppress(OSError):
        if plan.loop == "open":
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        else:
            os.setpriority(os.PRIO_PROCESS, 0, NICE)
            # Linux shares the processor between sessions first; within one the priority above decides.
            AUTOGROUP.write_text(str(NICE))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _priority() -> str:
    """Return how this process is scheduled."""
    if os.sched_getscheduler(0) == os.SCHED_RR:
        return "real time"
    return f"nice {os.getpriority(os.PRIO_PROCESS, 0)}"


def _load_of(plan: Plan) -> "Load | GrpcLoad":
    if plan.kind != "grpc_bets":
        return prepare(plan)
    from ledgerproof.bench.grpc_load import GrpcLoad  # noqa: PLC0415 - slow to import

    return GrpcLoad(plan)


async def _serve_plan(plan: Plan) -> Window:
    load = _load_of(plan)
    await load.connect()
    gc.freeze()
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    go = asyncio.Event()

    def heard() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            os._exit(1)  # Whoever started us has gone, and nobody would read the result.
        go.set()

    loop.add_reader(sys.stdin.fileno(), heard)
    await go.wait()
    return await load.run()


def main() -> int:
    """Play the plan on standard input. Returns 1 if the window could not begin, with the reason on standard error."""
    # Read without a buffer: what follows the first line is watched on the descriptor itself.
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = os.read(sys.stdin.fileno(), 65_536)
        if not piece:
            return 1
        line += piece
    plan = msgspec.json.decode(line, type=Plan)
    _favour_this_process(plan)
    try:
        window = uvloop.run(_serve_plan(plan))
    except NotLoaded as error:
        print(error, file=sys.stderr)
        return 1
    print(msgspec.json.encode(window).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
