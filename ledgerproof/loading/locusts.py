"""Starts Locust for one load: a master and its workers on this machine, none of which outlives this process."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final

import msgspec

from load.launch import free_port, locust
from load.result import Result

ROOT: Final = Path(__file__).resolve().parents[2]
POLL_S: Final = 0.2
END_WITHIN_S: Final = 30.0
"""After its last answer Locust counts and writes; this is long for that."""
STOP_TIMEOUT_S: Final = 20
WORKERS_WITHIN_S: Final = 60
"""A worker that dies at its start is not waited for longer."""


class NotPlayed(Exception):
    """Locust gave no result; the message is the last it said."""


class Locusts:
    """One load from `start` on; `wait` returns its result, `kill` ends it at once. Logs go to `folder`."""

    def __init__(self, folder: Path, name: str, workers: int, arguments: Sequence[str], token: str) -> None:
        """`arguments` are those of the locustfile; the token is handed over where other users cannot read it."""
        self._folder, self._name, self._workers = folder, name, workers
        self._arguments = list(arguments)
        self._environment = {**os.environ, "LEDGERPROOF_TOKEN": token}
        # Locust runs in the folder of the project, wherever this process is.
        self._result = (folder / f"{name}.json").resolve()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[IO[bytes]] = []

    def start(self) -> None:
        """Start master and workers. Raises OSError."""
        port = free_port()
        common = [*locust(), "--loglevel", "WARNING"]
        master = [
            *(*common, "--headless", "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", str(port)),
            *("--expect-workers", str(self._workers), "--expect-workers-max-wait", str(WORKERS_WITHIN_S)),
            *("--exit-code-on-error", "0"),
            *("--stop-timeout", str(STOP_TIMEOUT_S), "--only-summary", "--until-input-ends"),
            *("--result", str(self._result), *self._arguments),
        ]
        worker = [*common, "--worker", "--master-host", "127.0.0.1", "--master-port", str(port)]
        self._spawn("master", master, subprocess.PIPE)
        for number in range(self._workers):
            self._spawn(f"worker{number}", worker, subprocess.DEVNULL)

    def _spawn(self, part: str, command: Sequence[str], stdin: int) -> None:
        log = (self._folder / "logs" / f"{self._name}-{part}.log").open("wb")
        self._logs.append(log)
        self._processes.append(
            subprocess.Popen(  # noqa: S603 - our own command line
                command,
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for the run, which then ends these.
            )
        )

    def wait(self, timeout_s: float, tick: Callable[[], None]) -> Result:
        """Wait for the end and return the result; `tick` is called now and then. Raises NotPlayed."""
        deadline_s = time.monotonic() + timeout_s
        master = self._processes[0]
        while master.poll() is None:
            tick()
            died = [number for number, each in enumerate(self._processes[1:]) if each.poll() is not None]
            if time.monotonic() > deadline_s:
                raise NotPlayed(f"the load did not end within {timeout_s:.0f} s; {self._said()}")
            if len(died) == self._workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    master.wait(END_WITHIN_S)
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                master.wait(POLL_S)
        try:
            return Result.from_json(self._result.read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise NotPlayed(f"Locust ended with {master.returncode} and no result; {self._said()}") from error

    def _said(self) -> str:
        """Return the last line of the master's log, or where it is."""
        path = self._folder / "logs" / f"{self._name}-master.log"
        lines = path.read_text(errors="replace").strip().splitlines()
        return f"it said: {lines[-1]}" if lines else f"{path} is empty"

    def kill(self) -> None:
        """End every process at once; safe to repeat."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        for log in self._logs:
            log.close()
