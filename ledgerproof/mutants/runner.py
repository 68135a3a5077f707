"""Plants one bug after another in a copy of the tree, runs its trigger there, and says whether it was noticed.

The servers (Postgres, Kafka, Redis) are started once, from the clean tree; everything of ours runs from the copy.
What the clean tree does under a trigger is found out once, and is the control of every bug of that trigger.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from compose.errors import StackError
from compose.stack import Stack
from compose.state import StackSpec
from ledgerproof.mutants import workshop
from ledgerproof.mutants.outcome import Alone, Outcome, Row, complaint, not_run, row_of
from ledgerproof.mutants.patches import Hunk, Mutant, PatchError

SERVERS: Final = 2
PROBE_S: Final = 240.0
"""A probe that takes longer is ended; it is then not killed, as nothing over 60 s is."""
POLL_S: Final = 0.1
END_S: Final = 5.0
WORK: Final = "planted"
"""Folder of the copies and of what they wrote, below the root of the stacks."""


class Runner:
    """Runs triggers, on one set of servers that is started when it is first needed."""

    def __init__(
        self, root: Path, show: Callable[[str], None], *, keep: bool = False, servers: Stack | None = None
    ) -> None:
        """Work below `root`; `show` is told what is done. With `keep` logs and run folders stay.

        `servers` are used, and left running, instead of servers of its own.
        """
        self._root = root
        self._work = root.resolve() / WORK / secrets.token_hex(4)
        self._show = show
        self._keep = keep
        self._stack = servers
        self._own_stack = servers is None
        self._controls: dict[str, Outcome] = {}
        self._number = 0

    def close(self) -> None:
        """Take the servers down and remove the copies."""
        if self._stack is not None and self._own_stack:
            self._stack.down()
            self._stack = None
        if not self._keep:
            shutil.rmtree(self._work, ignore_errors=True)

    def row(self, mutant: Mutant) -> Row:
        """Run one planted bug, and its control if that was not run yet. Raises PatchError, StackError."""
        header = mutant.header
        control = self.control(header.trigger, header.tier)
        if not control.silent:
            return row_of(header, Outcome("not run", error="the control is not silent"), control, [])
        self._show(header.id)
        outcome = self.outcome(mutant)
        alone = []
        # What each half alone does matters once both together are noticed.
        for half in header.halves if not complaint(header, outcome, control, []) else []:
            self._show(f"{header.id}, hunks {half} alone")
            shown = self.outcome(mutant, [mutant.hunks[number] for number in half])
            alone.append(Alone(half, shown.text, shown.safe, round(shown.seconds, 1)))
        return row_of(header, outcome, control, alone)

    def control(self, trigger: str, tier: str) -> Outcome:
        """Return what the clean tree does under a trigger; it is run once."""
        if trigger not in self._controls:
            self._show(f"control of {trigger}")
            self._controls[trigger] = self._run(trigger, tier, None, None)
        return self._controls[trigger]

    def outcome(self, mutant: Mutant, hunks: Sequence[Hunk] | None = None) -> Outcome:
        """Return what a planted bug (or some of its hunks) does under its trigger."""
        return self._run(mutant.header.trigger, mutant.header.tier, mutant, hunks)

    def _run(self, trigger: str, tier: str, mutant: Mutant | None, hunks: Sequence[Hunk] | None) -> Outcome:
        stack = None if tier == "worlds" else self._servers()
        self._number += 1
        place = self._work / f"{self._number:03d}-{trigger if mutant is None else mutant.header.id}"
        with workshop.copy_of(place / "tree", mutant, hunks) as copy:
            outcome = self._probe(copy, place, trigger, stack)
        if outcome.error is None and not self._keep:
            shutil.rmtree(place, ignore_errors=True)
        elsewhere = {name: path for name, path in outcome.imports.items() if Path(path) != copy.resolve()}
        if elsewhere and outcome.error is None:
            outcome.error = f"the probe imported {elsewhere} and not its copy"
        return outcome

    def _probe(self, copy: Path, place: Path, trigger: str, stack: Stack | None) -> Outcome:
        out = place / "outcome.json"
        arguments = ["ledgerproof.mutants.probe", "--trigger", trigger]
        arguments += ["--out", str(out), "--folder", str(place / "run")]
        if stack is not None:
            arguments += ["--stack", str(stack.folder)]
        began = time.monotonic()
        process = workshop.start(copy, arguments, place / "log")
        try:
            while process.poll() is None and time.monotonic() - began < PROBE_S:
                time.sleep(POLL_S)
        finally:
            end_session(process)
        seconds = round(time.monotonic() - began, 2)
        try:
            outcome = msgspec.json.decode(out.read_bytes(), type=Outcome)
        except (OSError, msgspec.DecodeError):
            why = "it took too long" if seconds >= PROBE_S else f"it ended with {process.returncode}"
            return Outcome("ABORTED", error=f"{why}; see {_shown(place / 'log')}", seconds=seconds)
        outcome.seconds = seconds
        if outcome.error is not None:
            outcome.error += f"; see {_shown(place / 'log')}"
        return outcome

    def _servers(self) -> Stack:
        if self._stack is None:
            self._show(f"starting {SERVERS} Postgres servers, Kafka and Redis")
            spec = StackSpec(servers=SERVERS, only="infra", partitions=4)
            self._stack = Stack.start(spec, self._root)
        else:
            # A trigger that broke off may have left a node broken.
            self._stack.heal()
        return self._stack


def _shown(path: Path) -> str:
    """Return a path for a message that may be stored: as seen from here, without the machine's folders."""
    return os.path.relpath(path)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_S)


@contextlib.contextmanager
def runner(
    root: Path, show: Callable[[str], None], *, keep: bool = False, servers: Stack | None = None
) -> Iterator[Runner]:
    """Return a runner, and take down what it started after the block."""
    started = Runner(root, show, keep=keep, servers=servers)
    try:
        yield started
    finally:
        started.close()


def run_all(
    mutants: Sequence[Mutant], work: Runner, told: Callable[[Row], None], *, stop: Callable[[], bool] = lambda: False
) -> list[Row]:
    """Run many planted bugs, those of one trigger together; `told` gets each row as it is there.

    One that cannot be run has a row that says so. `stop` is asked before each.
    """
    rows = []
    for mutant in sorted(mutants, key=lambda one: (one.header.tier != "worlds", one.header.trigger, one.header.id)):
        if stop():
            row = not_run(mutant.header, "stopped before its turn")
        else:
            try:
                row = work.row(mutant)
            except (PatchError, StackError, OSError) as error:
                row = not_run(mutant.header, str(error))
        rows.append(row)
        told(row)
    return sorted(rows, key=lambda row: row.id)
