"""The worker's side of a load: what the master says to it, and the Locust user that plays its share.

A worker has one user, and that user plays the whole share, over HTTP and gRPC, with a greenlet for each arrival: how
many arrivals there are is the schedule's business and not that of Locust's number of users.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import gevent
import gevent.event
import msgspec
from locust import User, task
from locust.exception import StopUser

from load.options import drawn
from load.plan import Start, WorkerPlan
from load.player import Player
from load.profiles import read_profile

PLAN: Final = "load-plan"
READY: Final = "load-ready"
START: Final = "load-start"
STOP: Final = "load-stop"
RESULT: Final = "load-result"
"""The messages between master and workers, in the order of a run."""
MASTER_SILENT_S: Final = 15.0
"""A worker whose master said nothing for so long ends its run: the master was killed."""

BREATH_S: Final = 0.001
_log = logging.getLogger(__name__)


class Session:
    """One worker's part in one run after another."""

    def __init__(self, runner: Any, on_request: Callable[..., None], *, is_child: bool) -> None:
        """Work for `runner`. `is_child`: its master started this process, so the master's end shows at once."""
        self._runner = runner
        self._is_child = is_child
        self._on_request = on_request
        self._plan: WorkerPlan | None = None
        self._player: Player | None = None
        self._started: gevent.event.AsyncResult[float | None] = gevent.event.AsyncResult()
        self._playing = False
        self._heard_s = time.monotonic()

    def listen(self) -> None:
        """Take messages of the master from now on."""
        self._runner.register_message(PLAN, self._on_plan)
        self._runner.register_message(START, self._on_start)
        self._runner.register_message(STOP, self._on_stop)

    def watch_master(self) -> None:
        """End the run, and the worker, when its master is gone. A greenlet of its own."""
        parent = os.getppid()
        while True:
            gevent.sleep(1.0)
            orphaned = self._is_child and os.getppid() != parent
            if orphaned or time.monotonic() - self._heard_s > MASTER_SILENT_S:
                _log.error("the master is gone: the worker ends")
                if self._player is not None:
                    self._player.stop()
                self._runner.quit()
                return

    def heard_master(self, **_: Any) -> None:
        """Note that the master lives."""
        self._heard_s = time.monotonic()

    def leave(self, *_: Any) -> None:
        """End this worker's part: nothing more is sent, and the result is told when what is under way has ended.

        A handler of SIGINT. Ctrl-C reaches a master and its workers alike; the master ends the run, so a worker must
        not die of the first one before it told what it measured. The second one ends it at once.
        """
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._player is not None:
            self._player.stop()
        if not self._is_child:
            gevent.spawn(self._quit_after_play)

    def _quit_after_play(self) -> None:
        while self._playing and self._player is not None:
            gevent.sleep(0.05)
        self._runner.quit()

    def tell_now(self, **_: Any) -> None:
        """Tell the result as it stands; the process is about to end."""
        self._finish()

    def play(self) -> None:
        """Wait for the start, play the share, and send the result. Raises StopUser when there is nothing to do."""
        if self._playing:
            raise StopUser
        self._playing = True
        try:
            start_s = self._started.get()
            if start_s is not None and self._player is not None:
                self._player.play(start_s)
        finally:
            # Reached by a user that Locust kills, too: what was measured until then is told.
            self._finish()
        raise StopUser

    def _finish(self) -> None:
        player, self._player = self._player, None
        self._playing = False
        self._started = gevent.event.AsyncResult()
        if player is not None:
            result = player.close()
            self._runner.send_message(
                RESULT, {"run": self._run_of(), "index": result.index, "result": msgspec.json.encode(result)}
            )

    def _run_of(self) -> str:
        return self._plan.run if self._plan is not None else ""

    def _on_plan(self, environment: Any, msg: Any, **_: Any) -> None:
        self._plan = msgspec.json.decode(msg.data["plan"], type=WorkerPlan)
        gevent.spawn(self._prepare, self._plan, Path(msg.data["profiles"]))

    def _prepare(self, plan: WorkerPlan, profiles: Path) -> None:
        problem: str | None = None
        try:
            run = drawn(
                read_profile(plan.profile, profiles),
                seed=plan.seed,
                rate_factor=plan.rate_factor,
                time_factor=plan.time_factor,
                rate=plan.rate,
                grpc=bool(plan.grpc_targets),
                world=plan.world,
                trace=None if plan.trace is None else Path(plan.trace),
                breathe=_breathe,
            )
            if run.schedule.digest() != plan.digest:
                problem = "it drew another schedule than the master: its profiles, its trace or its NumPy differ"
            self._player = Player(plan, run.schedule.share(plan.index, plan.count), run.match_ids, self._on_request)
            self._player.prepare()
        except Exception as error:  # noqa: BLE001 - whatever it is, the master must not wait for this worker
            problem = f"{type(error).__name__}: {error}"
        self._runner.send_message(READY, {"run": plan.run, "index": plan.index, "problem": problem})

    def _on_start(self, environment: Any, msg: Any, **_: Any) -> None:
        self._started.set(msgspec.json.decode(msg.data, type=Start).here())

    def _on_stop(self, environment: Any, msg: Any, **_: Any) -> None:
        if self._player is not None:
            self._player.stop()
        if not self._started.ready():
            self._started.set(None)


def _breathe() -> None:
    """Let heartbeats through while a long trace is read: a moment that is long enough to look at the sockets."""
    gevent.sleep(BREATH_S)


_sessions: dict[Any, Session] = {}


def session_of(environment: Any) -> Session:
    """Return the session of a Locust environment, made when it is first asked for."""
    if environment not in _sessions:
        _sessions[environment] = Session(
            environment.runner, environment.events.request.fire, is_child=bool(environment.parsed_options.processes)
        )
    return _sessions[environment]


class Bettor(User):
    """Plays its worker's share of the schedule."""

    @task
    def play(self) -> None:
        """Play the whole share once."""
        session_of(self.environment).play()
