"""The frame of every process: logging, signals, the health and metrics endpoints, and an orderly stop."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

import ecs_logging
import uvloop

from reference import metrics
from reference.config import ConfigError
from reference.http_request import Request
from reference.http_server import Application, HttpServer
from reference.tracing import CURRENT, span_fields

STOP_WITHIN_S = 5.0
LOOP_TICK_S = 0.1
LOOP_LATE_S = 2.0
"""An event loop this late is not ready: what it admitted would miss its deadline."""
FAILED_ROUND_PAUSE_S = 0.5
DIED_EXIT = 70
"""Exit code of a process whose main task died (EX_SOFTWARE)."""
_TEXT = [("content-type", "text/plain; version=0.0.4; charset=utf-8")]


class EcsLines(ecs_logging.StdlibFormatter):
    """One JSON object a line in Elastic Common Schema, with the trace that the line belongs to."""

    def __init__(self, process: str) -> None:
        super().__init__(
            extra={"service": {"name": "ledgerproof", "node": {"name": process}}},
            exclude_fields=["log.origin", "log.original", "process.thread", "process.name"],
        )

    def format_to_ecs(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return the record's fields."""
        return super().format_to_ecs(record) | span_fields(CURRENT.get())


def configure_logging(process: str) -> None:
    """Send every log record of this process to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EcsLines(process))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class LoopWatch:
    """Knows how late the event loop is: a loop that is blocked or starved cannot keep a deadline."""

    def __init__(self) -> None:
        self._beat_s = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tick; call it inside the running event loop."""
        self._beat_s = time.monotonic()
        self._task = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(LOOP_TICK_S)
            now = time.monotonic()
            metrics.LOOP_LAG.set(max(0.0, now - self._beat_s - LOOP_TICK_S))
            self._beat_s = now

    def complaint(self) -> str | None:
        """Return what is wrong with the loop now, or None."""
        late_s = time.monotonic() - self._beat_s - LOOP_TICK_S
        return f"the event loop is {late_s:.1f} s behind" if late_s > LOOP_LATE_S else None

    async def stop(self) -> None:
        """Stop ticking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class Health:
    """Liveness, readiness and metrics of a process, as an application of the HTTP server."""

    def __init__(self) -> None:
        self.ready: Callable[[], Awaitable[str | None]] = _not_started
        self.alive: Callable[[], str | None] = _alive

    async def __call__(self, scope: Request, proto: Request) -> None:
        """Answer /livez, /readyz and /metrics."""
        if scope.path == "/metrics":
            proto.response_bytes(200, _TEXT, metrics.exposition())
        elif scope.path == "/livez":
            reason = self.alive()
            proto.response_str(200 if reason is None else 503, _TEXT, f"{reason or 'alive'}\n")
        elif scope.path == "/readyz":
            reason = await self.ready()
            proto.response_str(200 if reason is None else 503, _TEXT, f"{reason or 'ready'}\n")
        else:
            proto.response_str(404, _TEXT, "try /livez, /readyz or /metrics\n")


def _alive() -> str | None:
    return None


async def _not_started() -> str | None:
    return "starting"


async def always_ready() -> str | None:
    """Readiness of a process that can work as soon as it runs."""
    return None


async def serve(application: Application, port: int) -> HttpServer:
    """Serve HTTP/1 on 127.0.0.1 from now on, in this event loop. Raises OSError if the port cannot be had."""
    server = HttpServer(application)
    await server.listen(port)
    return server


async def stop_serving(server: HttpServer) -> None:
    """Stop accepting, and finish the requests under way (bounded)."""
    await server.stop(STOP_WITHIN_S)


class Fatal(Exception):
    """The process cannot do its work any more; whoever supervises it has to start another."""


def run_process(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main(stopping)` until it returns; SIGTERM and SIGINT set `stopping`. Return the exit code.

    A process whose main task died says so and returns DIED_EXIT; one that lingers, answering that it is not ready,
    would never be replaced.
    """

    async def framed() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        await main(stopping)

    try:
        uvloop.run(framed())
    except ConfigError:
        raise
    except BaseException:
        logging.getLogger("ledgerproof.process").critical("the process died", exc_info=True)
        return DIED_EXIT
    return 0


def end_process(exit_code: int) -> NoReturn:
    """End the process now, whatever threads of libraries still wait for."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


async def run_worker(
    port: int,
    run_once: Callable[[], Awaitable[object]],
    ready: Callable[[], Awaitable[str | None]],
    stopping: asyncio.Event,
    beside: Sequence[asyncio.Task[None]] = (),
) -> None:
    """Serve health and metrics on `port` and repeat `run_once` until `stopping`.

    A failure of `run_once` is logged and repeated with a pause, so that a passing fault never ends the process.
    What cannot pass does: Fatal from `run_once`, and the end of a task `beside` it before `stopping`. Raises Fatal
    then, and OSError if the port cannot be had.
    """
    health = Health()
    health.ready = ready
    server = await serve(health, port)
    working = asyncio.create_task(_repeat(run_once, stopping), name="main loop")
    waiter = asyncio.create_task(stopping.wait())
    tasks = [working, *beside]
    try:
        await asyncio.wait([waiter, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if not stopping.is_set():
            dead = next(task for task in tasks if task.done())
            error = None if dead.cancelled() else dead.exception()
            raise Fatal(f"the {dead.get_name()} ended: {error!r}") from error
        await asyncio.wait([working], timeout=STOP_WITHIN_S)
    finally:
        waiter.cancel()
        working.cancel()
        await asyncio.gather(waiter, working, return_exceptions=True)
        await stop_serving(server)


async def _repeat(run_once: Callable[[], Awaitable[object]], stopping: asyncio.Event) -> None:
    log = logging.getLogger("ledgerproof.worker")
    while not stopping.is_set():
        try:
            await run_once()
        except Fatal:
            raise
        except Exception:  # the frame must outlive every passing fault, and logs it
            log.exception("a round failed; trying again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), FAILED_ROUND_PAUSE_S)
