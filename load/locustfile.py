"""The Locust file of the load: `locust -f load/locustfile.py --headless --targets HOST:PORT --load-profile smoke`.

Everything of Locust's works with it: the web interface, --master and --worker, --processes, --csv, --html. The number
of users and the duration follow from the profile.
"""

import os
import signal
import sys
from typing import Any, Final

import gevent
import gevent.os
from locust import LoadTestShape, events
from locust.runners import MasterRunner, WorkerRunner

from load.conductor import EXIT_INVALID, Conductor
from load.options import OptionError, add_options, settings_of
from load.users import Bettor, session_of

__all__ = ["Bettor", "WholeSchedule"]

events.init_command_line_parser.add_listener(add_options)  # type: ignore[no-untyped-call]

QUIT_WITHIN_S: Final = 20.0

_conductors: dict[Any, Conductor] = {}


class WholeSchedule(LoadTestShape):
    """One user for each worker, from the start until every worker has told its result."""

    def tick(self) -> tuple[int, float] | None:
        """Return how many users there are to be, or None when the run is over."""
        conductor = _conductors[self.runner.environment] if self.runner is not None else None
        if conductor is None or conductor.finished():
            return None
        workers = conductor.worker_count()
        return workers, float(workers)


def connect(environment: Any, runner: Any, **_: Any) -> None:
    """Join Locust's events and messages to our part of the work."""
    if not isinstance(runner, WorkerRunner):
        try:
            settings_of(environment.parsed_options)
        except OptionError as error:
            print(f"load: {error}", file=sys.stderr)
            sys.exit(2)
        if environment.parsed_options.until_input_ends:
            gevent.spawn(_end_with_input, runner)
        _conductors[environment] = Conductor(environment)
        _conductors[environment].listen()
        if environment.parsed_options.headless:
            # Locust takes SIGTERM only once its run is over; until then it is to end like Ctrl-C, with a result.
            gevent.signal_handler(signal.SIGTERM, os.kill, os.getpid(), signal.SIGINT)
    session = session_of(environment)
    if not isinstance(runner, MasterRunner):
        session.listen()
    if isinstance(runner, WorkerRunner):
        signal.signal(signal.SIGINT, session.leave)
        environment.events.quitting.add_listener(session.tell_now)
        environment.events.heartbeat_received.add_listener(session.heard_master)
        gevent.spawn(session.watch_master)


def _end_with_input(runner: Any) -> None:
    """End the run, and this process, when standard input ends."""
    while gevent.os.tp_read(sys.stdin.fileno(), 4096):
        pass
    # While Locust waits for its workers it hears of nothing else.
    gevent.spawn_later(QUIT_WITHIN_S, os._exit, EXIT_INVALID)
    runner.quit()


events.init.add_listener(connect)  # type: ignore[no-untyped-call]
