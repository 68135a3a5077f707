"""What every recorded run has, whatever it does: a folder, one clock, an end that is a verdict in any case.

Errors of the harness become parts of the verdict here, and the stack goes down with its logs kept.
"""

import asyncio
import contextlib
import errno
import logging
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from compose.errors import StackError
from compose.stack import Stack
from compose.state import StackSpec
from invariants.history import Recorder, RecordingError
from invariants.run import CONFIG_FILE
from invariants.snapshot import EVIDENCE
from invariants.timeline import Series, Timeline
from invariants.verdict import Verdict
from ledgerproof import __version__, assess, cells, sla
from ledgerproof.assess import HarnessFacts
from ledgerproof.client import NotSeeded, monotonic_clock
from ledgerproof.collect import NotCollected
from ledgerproof.drift import NotPlanted
from ledgerproof.interrupts import undisturbed
from ledgerproof.machine import commit, describe_machine
from ledgerproof.options import EnvironmentProblem
from ledgerproof.progress import Progress
from reference.config import ServiceConfig

HARNESS_LOG: Final = "harness.log"
MIN_FREE_BYTES: Final = 500_000_000
"""Free space on the disk of the run folder; a default run writes about 100 MB there."""

log = logging.getLogger("ledgerproof.recording")


class Interrupted(Exception):
    """The user asked to stop."""


@dataclass
class Recording:
    """What a run writes while it goes on, on one clock."""

    folder: Path
    clock: Callable[[], float]
    origin: float
    """Reading of time.monotonic() at which the clock was zero."""
    origin_unix: float
    recorder: Recorder
    timeline: Timeline
    series: Series
    facts: HarnessFacts

    def invalid(self, reason: str) -> None:
        """Say that the run proves nothing, and why."""
        self.facts.parts.append(Verdict.INVALID.name)
        self.facts.reasons.append(reason)

    def aborted(self, reason: str) -> None:
        """Say that the run was stopped, and why."""
        self.facts.parts.append(Verdict.ABORTED.name)
        self.facts.reasons.append(reason)


@contextlib.contextmanager
def timed(facts: HarnessFacts, name: str) -> Iterator[None]:
    """Add the seconds the block takes to the timings, also if it fails."""
    began = time.monotonic()
    try:
        yield
    finally:
        facts.timings[name] = facts.timings.get(name, 0.0) + time.monotonic() - began


def make_run_folder(out: Path, seed: int) -> Path:
    """Make the folder of a new run in `out`. Raises EnvironmentProblem if that cannot be written or is full."""
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-s{seed}-{secrets.token_hex(2)}"
    folder = out / name
    try:
        folder.mkdir(parents=True)
        (folder / "logs").mkdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write {error.filename or folder}: {error.strerror}; choose another folder with --out"
        ) from error
    if free < MIN_FREE_BYTES:
        shutil.rmtree(folder, ignore_errors=True)
        raise EnvironmentProblem(
            f"only {free // 1_000_000} MB are free where {out} is, {MIN_FREE_BYTES // 1_000_000} MB are "
            "needed: make room or choose another folder with --out"
        )
    return folder


def open_recording(folder: Path, *, seed: int, rate: float, config: dict[str, Any]) -> Recording:
    """Begin to record a run in its folder. Raises EnvironmentProblem if that cannot be written."""
    origin, origin_unix = time.monotonic(), time.time()
    clock = monotonic_clock(origin)
    facts = HarnessFacts(
        run=folder.name,
        seed=seed,
        commit=commit(),
        version=__version__,
        machine=dict(describe_machine()),
        started_at=datetime.fromtimestamp(origin_unix, UTC).isoformat(timespec="seconds"),
        origin_unix=origin_unix,
        rate=rate,
        config=config,
    )
    try:
        return Recording(
            folder=folder,
            clock=clock,
            origin=origin,
            origin_unix=origin_unix,
            recorder=Recorder(folder, folder.name),
            timeline=Timeline(folder, clock),
            series=Series(folder, clock),
            facts=facts,
        )
    except (OSError, RecordingError) as error:
        raise EnvironmentProblem(f"cannot write the run folder {folder}: {error}") from error


def start_stack(spec: StackSpec, root: Path, recording: Recording, progress: Progress) -> Stack:
    """Start the stack; whatever prevents it ends the run before it began. Raises EnvironmentProblem."""
    title = f"Starting {spec.servers} Postgres servers, Kafka, Redis and the service"
    try:
        with timed(recording.facts, "stack_s"), progress.step(title) as step:
            stack = Stack.start(spec, root, progress=progress.show)
            step.detail = ""
    except BaseException as error:
        recording.recorder.close()
        shutil.rmtree(recording.folder, ignore_errors=True)
        if isinstance(error, StackError):
            raise EnvironmentProblem(str(error)) from error
        if isinstance(error, OSError):
            raise EnvironmentProblem(f"the stack could not be started: {error}") from error
        raise
    return stack


def write_config(
    recording: Recording,
    config: ServiceConfig,
    operations: Sequence[str],
    required_sometimes: Sequence[str] = (),
) -> None:
    """Write config.json: the workload's and the service's settings, without any password. Raises OSError."""
    service = msgspec.to_builtins(config)
    for secret in ("passwords", "redis_password", "token_key"):
        service.pop(secret)
    recording.facts.config = {
        **recording.facts.config,
        "evidence": EVIDENCE,
        "origin_unix": recording.origin_unix,
        "operations": list(operations),
        "required_sometimes": list(required_sometimes),
        "service": service,
    }
    text = msgspec.json.format(msgspec.json.encode(recording.facts.config), indent=2)
    (recording.folder / CONFIG_FILE).write_bytes(text + b"\n")
    # Written again at the end; until then it says that the run did not finish.
    assess.write_facts(recording.folder, recording.facts)


def carry_out(recording: Recording, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do everything that needs the stack; whatever goes wrong becomes part of the verdict."""
    try:
        uvloop.run(_on_loop(work))
    except (KeyboardInterrupt, Interrupted):
        recording.aborted("stopped by the user")
    except (NotSeeded, NotPlanted, NotCollected, StackError) as error:
        log.exception("the run cannot go on")
        recording.invalid(str(error))
    except RecordingError as error:
        log.exception("the recording failed")
        recording.aborted(str(error))
    except OSError as error:
        log.exception("the run cannot go on")
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EMFILE}:
            recording.aborted(f"{error.filename or recording.folder}: {error.strerror}")
        else:
            recording.invalid(f"the harness failed: {error}; see {HARNESS_LOG} in the run folder")
    except Exception as error:
        log.exception("the harness failed")
        recording.invalid(f"the harness failed: {type(error).__name__}: {error}; see {HARNESS_LOG} in the run folder")
    finally:
        try:
            recording.recorder.close()
            recording.series.close()
        except (RecordingError, OSError) as error:
            recording.aborted(f"the recording could not be finished: {error}")


async def _on_loop(make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run the work on this event loop; Ctrl-C and SIGTERM raise Interrupted."""
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(make())
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        raise Interrupted from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def take_down(stack: Stack, recording: Recording, progress: Progress, *, keep: bool) -> None:
    """Keep the logs and take the stack down unless it is to be kept; what is left is part of the verdict."""
    with undisturbed():
        try:
            stack.collect_logs(recording.folder / "logs")
        except OSError as error:
            log.warning("the logs could not be kept: %s", error)
        if keep:
            progress.say(f"The stack {stack.name} keeps running; `ledgerproof down` ends it.")
            return
        with timed(recording.facts, "down_s"), progress.step("Taking the stack down") as step:
            try:
                recording.facts.residue = stack.down()
            except (StackError, OSError) as error:
                log.exception("the stack could not be taken down")
                recording.facts.residue = [str(error)]
            step.detail = "; ".join(recording.facts.residue)


def conclude(recording: Recording, progress: Progress, began: float, *, report: bool = True) -> dict[str, Any]:
    """Judge the run, write verdict.json and the report. A checker that fails makes the run INVALID."""
    facts, folder = recording.facts, recording.folder
    facts.finished = True
    with progress.step("Checking") as step:
        started = time.monotonic()
        try:
            recording.timeline.phase("check")
            _mark_phases(recording)
            verdict = assess.assess(folder, facts)
        except KeyboardInterrupt:
            recording.aborted("stopped by the user while the run was being checked")
            verdict = _unjudged(folder, facts)
        except Exception as error:  # nothing unproven is green, and the user gets a verdict in any case
            log.exception("the run could not be judged")
            # Of a run that was cut short (on a full disk, perhaps) nothing else was to be expected.
            if Verdict.ABORTED.name not in facts.parts:
                recording.invalid(f"the run could not be judged: {type(error).__name__}: {error}")
            verdict = _unjudged(folder, facts)
        facts.timings["check_s"] = time.monotonic() - started
        facts.timings["total_s"] = time.monotonic() - began
        verdict["timings"] = {name: round(value, 2) for name, value in facts.timings.items()}
        step.detail = f"{len(verdict['anomalies'])} rules"
    try:
        assess.write_facts(folder, facts)
        assess.write_verdict(folder, verdict)
    except OSError as error:
        log.warning("the verdict could not be written: %s", error)
        progress.warn(f"the verdict could not be written: {error}")
        if verdict["exit_code"] == Verdict.PASS:
            # A pass that nobody can look up is not one.
            verdict.update(verdict=Verdict.ABORTED.name, exit_code=int(Verdict.ABORTED))
            verdict["reasons"].append("the verdict could not be written")
    try:
        cells.write_cells(folder)
    except Exception as error:  # what was tried is not part of the verdict; `ledgerproof cells` can try again
        log.exception("the cells could not be counted")
        progress.warn(f"the cells could not be counted: {error}")
    if not report:
        return verdict
    try:
        from reports.render import render  # noqa: PLC0415 - plots are slow to import, and not every run has a page

        with progress.step("Writing the report"):
            render(folder)
    except Exception as error:  # the verdict stands without its page, and `ledgerproof report` can try again
        log.exception("the report could not be written")
        progress.warn(f"the report could not be written: {error}")
    return verdict


def _unjudged(folder: Path, facts: HarnessFacts) -> dict[str, Any]:
    """Return the verdict of what the harness itself says, without looking at the evidence."""
    return assess.assess(folder, msgspec.structs.replace(facts, load_start_s=None))


def _mark_phases(recording: Recording) -> None:
    """Put the phases between the measured edges of the faults on the timeline."""
    facts = recording.facts
    measured = assess.measure(recording.folder, facts)
    if measured is None:
        return
    for at_s, phase in sla.phase_changes(measured.faults, measured.load):
        recording.timeline.record("phase", t=at_s, detail=phase)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send the harness's own log to a file of the run folder while the block runs."""

    def from_thread(arguments: threading.ExceptHookArgs) -> None:
        log.error("thread %s failed", arguments.thread, exc_info=arguments.exc_value)

    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    before, threading.excepthook = threading.excepthook, from_thread
    try:
        yield
    finally:
        threading.excepthook = before
        root.removeHandler(handler)
        # On a full disk its last lines are lost; the verdict says why.
        with contextlib.suppress(OSError):
            handler.close()
