"""The command line with which our own commands start Locust: no interface, its exit code ours, a port of its own."""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

LOCUSTFILE: Final = Path(__file__).with_name("locustfile.py")
STOP_TIMEOUT_S: Final = 10


def command(options: Sequence[str], *, workers: int = 1, locustfile: Path = LOCUSTFILE) -> list[str]:
    """Return the arguments of a run; with more than one worker Locust starts them itself.

    The process ends with 0, 10 (a limit was missed), 30 (INVALID), or 2 (wrong options).
    """
    arguments = [*locust(locustfile), "--headless", "--only-summary"]
    arguments += ["--exit-code-on-error", "0", "--stop-timeout", str(STOP_TIMEOUT_S)]
    if workers > 1:
        port = str(free_port())
        arguments += ["--processes", str(workers), "--master-bind-host", "127.0.0.1"]
        arguments += ["--master-bind-port", port, "--master-port", port]
    return [*arguments, *options]


def locust(locustfile: Path = LOCUSTFILE) -> list[str]:
    """Return how Locust is called with a locustfile, without any option."""
    return [sys.executable, "-m", "locust", "-f", str(locustfile)]


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
