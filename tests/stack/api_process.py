"""An API process of a test's own beside those of the session's stack, with settings of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from compose import wire
from compose.service import PROJECT, write_configuration
from reference.config import CONFIG_VARIABLE, ServiceConfig

START_WITHIN_S = 60.0


class ApiProcess:
    """A running API process; `stop` ends it and returns its exit code and everything it logged."""

    def __init__(
        self, config: ServiceConfig, folder: Path, port: int, grpc_port: int, *, wait: bool = True, **changes: Any
    ) -> None:
        self.port = port
        self.grpc_port = grpc_port
        self.base = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        path = folder / "config.json"
        write_configuration(path, msgspec.structs.replace(config, **changes))
        command = [sys.executable, "-m", "reference", "api", "--name", "own", "--port", str(port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--grpc-port", str(grpc_port)],
                env=os.environ | {CONFIG_VARIABLE: str(path), "PYTHONPATH": str(PROJECT)},
                stderr=log,
                stdout=log,
            )
        deadline = time.monotonic() + START_WITHIN_S
        while not (self.ready() if wait else self.answers()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def ready(self) -> bool:
        """Whether /readyz says so."""
        return self._status("/readyz") == 200

    def answers(self) -> bool:
        """Whether it listens."""
        return self._status("/livez") is not None

    def _status(self, path: str) -> int | None:
        try:
            return wire.http_status(self.port, path, 2.0)
        except wire.NoAnswer:
            return None

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> tuple[int, str]:
        """End the process in order, by force if it does not."""
        if self.process.poll() is None:
            self.terminate()
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise
        return code, self.log.read_text()
