"""Runs the live auditor as a process of its own beside a load: it shares neither the generator's loop nor its lock."""

import subprocess
import sys
from pathlib import Path
from typing import IO, Any, Final

import msgspec

RESULT_FILE: Final = "live-audit.json"
LOG_FILE: Final = "live-audit.log"
END_WITHIN_S: Final = 60.0
"""After its input has ended it looks once more through everything; this is long for that."""
KILL_WITHIN_S: Final = 10.0


class Beside:
    """One auditor of one service, from `start` to `stop`. When this process dies, its input ends and so does it."""

    def __init__(self, config: Path, folder: Path, planted_user: int) -> None:
        """`config` is the service's configuration file, `folder` gets the result and what it printed.

        `planted_user` is the wallet whose balance the run makes wrong on purpose.
        """
        self._config, self._folder, self._planted_user = config, folder, planted_user
        self._process: subprocess.Popen[bytes] | None = None
        self._files: list[IO[bytes]] = []

    def start(self) -> None:
        """Start it. Raises OSError."""
        out, err = (self._folder / name for name in (RESULT_FILE, LOG_FILE))
        self._files = [out.open("wb"), err.open("wb")]
        arguments = ["audit", "--live", "--until-input-ends", "--json", "--config", str(self._config)]
        arguments += ["--planted", str(self._planted_user)]
        self._process = subprocess.Popen(  # noqa: S603 - our own command line
            [sys.executable, "-m", "ledgerproof", *arguments],
            stdin=subprocess.PIPE,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,  # Ctrl-C is for the run, which then ends this one.
        )

    def stop(self) -> dict[str, Any]:
        """End it and return its result; one that has none to give says so as `missed`."""
        process = self._process
        if process is None:
            return {"findings": {}, "witnesses": [], "unseen": {}, "missed": ["the live auditor was not started"]}
        assert process.stdin is not None, "it was started with a pipe"
        process.stdin.close()
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()
        for file in self._files:
            file.close()
        try:
            result: dict[str, Any] = msgspec.json.decode((self._folder / RESULT_FILE).read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError):
            why = f"the live auditor ended with exit code {process.returncode} and no result; see {LOG_FILE}"
            return {"findings": {}, "witnesses": [], "unseen": {}, "missed": [why]}
        return result

    def kill(self) -> None:
        """End it at once, without a result; safe to repeat."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(KILL_WITHIN_S)
