"""The master's side of a load: draws the schedule, gives each worker its share, and adds up what they found.

In a run without workers the same process is both, and the messages go to itself.
"""

import logging
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import gevent
import msgspec

from load.options import Settings, settings_of
from load.plan import Start
from load.result import Phase, Plan, Result, WorkerResult, merge
from load.users import BREATH_S, PLAN, READY, RESULT, START, STOP

LEAD_S: Final = 0.5
"""Between the last worker's readiness and the common start."""
PREPARE_TIMEOUT_S: Final = 300.0
RESULT_GRACE_S: Final = 15.0
"""A worker's result is late when it comes later than this after the last deadline of its requests."""
WRITER_TIMEOUT_S: Final = 60.0
EXIT_USAGE: Final = 2
EXIT_MISSED: Final = 10
EXIT_INVALID: Final = 30
"""Exit codes, as of the main job."""

_log = logging.getLogger(__name__)


@dataclass
class _Run:
    """One run under way."""

    settings: Settings
    plan: Plan
    origin_s: float
    clients: list[str]
    """Locust's ids of the workers, by index; empty in a run without workers."""
    duration_s: float
    begun_s: float
    writer: "subprocess.Popen[bytes] | None" = None
    socket_folder: "tempfile.TemporaryDirectory[str] | None" = None
    ready: set[int] = field(default_factory=set)
    results: dict[int, WorkerResult] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    start_s: float | None = None


class Conductor:
    """Conducts one run after another."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._runner = environment.runner
        self._run: _Run | None = None
        self.result: Result | None = None
        """Of the last run that ended."""

    def listen(self) -> None:
        """Take messages of workers, and Locust's events, from now on."""
        self._runner.register_message(READY, self._on_ready)
        self._runner.register_message(RESULT, self._on_result)
        events = self._environment.events
        events.test_start.add_listener(self._on_test_start)
        events.test_stopping.add_listener(self._on_test_stopping)
        events.test_stop.add_listener(self._on_test_stop)
        events.quitting.add_listener(self._on_quitting)

    def worker_count(self) -> int:
        """Return how many workers would play a run that began now."""
        return max(1, len(self._active_clients()))

    def finished(self) -> bool:
        """Return whether the run under way has nothing left to wait for."""
        run = self._run
        if run is None:
            return False
        if run.problems or len(run.results) == run.plan.workers:
            return True
        now_s = time.monotonic()
        active = self._active_clients()
        gone = [index for index, client in enumerate(run.clients) if index not in run.results and client not in active]
        if run.start_s is None:
            if gone:
                run.problems.append(f"worker {gone[0]} was gone before the load began")
            elif now_s - run.begun_s > PREPARE_TIMEOUT_S:
                run.problems.append(f"not every worker was ready within {PREPARE_TIMEOUT_S:g} s")
            return bool(run.problems)
        if gone and len(run.results) + len(gone) == run.plan.workers:
            return True
        return now_s > run.start_s + run.duration_s + run.settings.timeout_s + RESULT_GRACE_S

    def _active_clients(self) -> list[str]:
        clients = getattr(self._runner, "clients", None)
        if clients is None:
            return []
        active = [*clients.ready, *clients.spawning, *clients.running]
        return sorted((client.id for client in active), key=self._runner.get_worker_index)

    # -- Locust's events -------------------------------------------------------------------------------

    def _on_test_start(self, **_: Any) -> None:
        now = datetime.now(UTC)
        try:
            settings = settings_of(self._environment.parsed_options)
            name = settings.run or f"load{settings.seed}-{now:%Y%m%dT%H%M%S}"
            drawn = settings.drawn(settings.world or name, lambda: gevent.sleep(BREATH_S))
        except (ValueError, OSError) as error:
            _log.error("%s", error)
            self._environment.process_exit_code = EXIT_USAGE
            gevent.spawn(self._runner.quit)
            return
        clients = self._active_clients()
        count = max(1, len(clients))
        origin_s = settings.history_origin_s if settings.history_origin_s is not None else time.monotonic()
        run = _Run(
            settings,
            Plan(
                profile=settings.profile_name,
                seed=settings.seed,
                run=name,
                started_at=now.isoformat(timespec="milliseconds"),
                digest=drawn.schedule.digest(),
                scheduled=len(drawn.schedule),
                workers=count,
                phases=[Phase(*span) for span in drawn.spans],
            ),
            origin_s,
            clients,
            drawn.duration_s,
            time.monotonic(),
        )
        self._run = run
        address = settings.history_socket or None
        if settings.history is not None:
            address = self._start_writer(run, settings.history)
        for index in range(count):
            plan = settings.worker_plan(
                drawn.schedule, index=index, count=count, run=run.plan.run, history=address, origin_s=origin_s
            )
            data = {"plan": msgspec.json.encode(plan), "profiles": self._environment.parsed_options.load_profiles}
            self._runner.send_message(PLAN, data, client_id=clients[index] if clients else None)

    def _on_test_stopping(self, **_: Any) -> None:
        """Have what is left of a run that is stopped early told before its workers' users are killed."""
        run = self._run
        if run is None or self.finished():
            return
        self._runner.send_message(STOP)
        deadline_s = time.monotonic() + run.settings.timeout_s + 2.0
        while run.start_s is not None and not self.finished() and time.monotonic() < deadline_s:
            gevent.sleep(0.05)

    def _on_test_stop(self, **_: Any) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        parts = [run.results[index] for index in sorted(run.results)]
        if run.problems:
            self._runner.send_message(STOP)
        problems = run.problems + self._end_writer(run)
        result = merge(run.plan, parts, lag_p99_ms=run.settings.lag_limit_ms)
        result.start_monotonic_s = run.start_s or 0.0
        result.history_origin_s = run.origin_s
        result.invalid = problems + result.invalid
        if not result.invalid:
            result.missed = run.settings.profile.missed(result)
        self.result = result
        if run.settings.result is not None:
            result.write(run.settings.result)
        print(summary(result), flush=True)
        self._environment.process_exit_code = EXIT_INVALID if result.invalid else EXIT_MISSED if result.missed else 0

    def _on_quitting(self, **_: Any) -> None:
        if self._run is not None:
            self._end_writer(self._run)

    # -- messages --------------------------------------------------------------------------------------

    def _on_ready(self, environment: Any, msg: Any, **_: Any) -> None:
        run = self._run
        if run is None or msg.data["run"] != run.plan.run:
            return
        index = msg.data["index"]
        if msg.data["problem"] is not None:
            run.problems.append(f"worker {index} could not begin: {msg.data['problem']}")
            return
        run.ready.add(index)
        if len(run.ready) == run.plan.workers and run.start_s is None:
            start = Start.after(LEAD_S)
            run.start_s = start.monotonic_s
            run.plan = _begun(run.plan)
            self._runner.send_message(START, msgspec.json.encode(start))

    def _on_result(self, environment: Any, msg: Any, **_: Any) -> None:
        run = self._run
        if run is not None and msg.data["run"] == run.plan.run:
            run.results[msg.data["index"]] = msgspec.json.decode(msg.data["result"], type=WorkerResult)

    # -- the history -----------------------------------------------------------------------------------

    def _start_writer(self, run: _Run, folder: Path) -> str:
        """Start the process that writes the history; return the address to which workers send their records."""
        folder.mkdir(parents=True, exist_ok=True)
        # A socket's path is short, so it is not below the folder, which may be anywhere.
        run.socket_folder = tempfile.TemporaryDirectory(prefix="load-")
        address = str(Path(run.socket_folder.name) / "history.sock")
        run.writer = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "load.recording", str(folder), address, run.plan.run, str(run.plan.workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for the master; the writer ends when its standard input does.
            start_new_session=True,
        )
        assert run.writer.stdout is not None, "asked for above"
        if run.writer.stdout.readline() != b"ready\n":
            run.problems.append("the history's writer could not begin")
        return address

    def _end_writer(self, run: _Run) -> list[str]:
        """Have the history closed; return what is wrong with it."""
        writer, run.writer = run.writer, None
        if writer is None:
            return []
        try:
            said, _ = writer.communicate(timeout=WRITER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()
            return [f"the history's writer did not end within {WRITER_TIMEOUT_S:g} s"]
        finally:
            if run.socket_folder is not None:
                run.socket_folder.cleanup()
        return [] if said.strip() == b"closed" else ["the history has a gap: see the messages of its writer"]


def _begun(plan: Plan) -> Plan:
    started = datetime.fromtimestamp(time.time() + LEAD_S, UTC)
    return replace(plan, started_at=started.isoformat(timespec="milliseconds"))


def summary(result: Result) -> str:
    """Return a result as a table for the terminal."""
    lines = [
        f"load {result.profile} seed {result.seed}: {result.scheduled:,} scheduled, {result.sent:,} sent, "
        f"{result.dropped:,} dropped, {result.late:,} late, {result.unresolved:,} unresolved; "
        f"lag p50 {result.lag_p50_ms:.2f} ms, p99 {result.lag_p99_ms:.2f} ms, max {result.lag_max_ms:.2f} ms",
        f"{'operation':<16}{'phase':<14}{'count':>9}{'ok':>9}{'fail':>7}{'info':>7}   "
        + "".join(f"{f'p{percent:g} ms':>24}" for percent in (50, 95, 99)),
    ]
    for cell in result.cells:
        estimates = (cell.percentile(percent).text() for percent in (50, 95, 99))
        lines.append(
            f"{cell.op:<16}{cell.phase:<14}{cell.count:>9,}{cell.ok:>9,}{cell.fail:>7,}{cell.info:>7,}   "
            + "".join(f"{text:>24}" for text in estimates)
        )
    lines += [f"INVALID: {reason}" for reason in result.invalid]
    lines += [f"missed: {reason}" for reason in result.missed]
    return "\n".join(lines)
