"""Starts the generator's process for one window, lets others prepare to watch it, and reads what it measured."""

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from ledgerproof.bench.plan import Plan, Window

ROOT: Final = Path(__file__).resolve().parents[2]
END_TIMEOUT_S: Final = 10.0


class GeneratorFailed(Exception):
    """The generator ended without a result; the message is what it said."""


def _nothing() -> None:
    """Do nothing: nobody watches this window."""


def play(plan: Plan, before: Callable[[], object] = _nothing, after: Callable[[], object] = _nothing) -> Window:
    """Play one window and return what was measured.

    `before` is called when all requests are made and all connections open, `after` when the window is over. Raises
    GeneratorFailed. The process is ended whatever happens here.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "ledgerproof.bench.generator"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        # Ctrl-C reaches this process alone, which then ends the generator.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(plan) + b"\n")
            process.stdin.flush()
        if process.stdout.readline().strip() != b"ready":
            raise GeneratorFailed(_reason(process))
        before()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        line = process.stdout.readline()
        after()
        if not line:
            raise GeneratorFailed(_reason(process))
        return msgspec.json.decode(line, type=Window)
    finally:
        process.kill()
        process.wait(END_TIMEOUT_S)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()


def _reason(process: "subprocess.Popen[bytes]") -> str:
    assert process.stderr is not None
    process.wait(END_TIMEOUT_S)
    said = process.stderr.read().decode(errors="replace").strip()
    return f"the load generator ended with {process.returncode}: {said.splitlines()[-1] if said else 'nothing said'}"
