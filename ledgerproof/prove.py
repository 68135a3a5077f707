"""The main job: stack up, load, faults, drain, snapshots, checks, verdict, report.

    start stack → seed wallets → open load + faults → stop clients → heal → close and settle what is left
    → wait out timeouts → drain → snapshot 1 → resolve unknown keys, retry half → drain → snapshot 2
    → stack down → judge → verdict.json, report.html

A run that began always ends with a verdict.json, whatever happened, and with its stack taken down.
"""

import asyncio
import contextlib
import errno
import gc
import logging
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import uvloop

from compose.errors import StackError
from compose.probe import LivenessProbe, targets
from compose.stack import Stack
from compose.state import StackSpec
from invariants import fates
from invariants.history import Recorder, RecordingError
from invariants.run import CONFIG_FILE, FIRST_SNAPSHOT, SECOND_SNAPSHOT, WALL_CLOCK_DRIFT, load_run
from invariants.snapshot import EVIDENCE
from invariants.timeline import Series, Timeline
from invariants.verdict import Verdict
from ledgerproof import __version__, assess, sla
from ledgerproof.assess import GeneratorFacts, HarnessFacts, ReconciliationFacts
from ledgerproof.client import REQUEST_TIMEOUT_S, NotSeeded, Player, monotonic_clock
from ledgerproof.collect import NotCollected, NotDrained, drain, snapshot
from ledgerproof.drift import FOLLOWS, Drift, NotPlanted, PlannedDrift, plan_drift
from ledgerproof.faults import EdgeBook, Nemesis, PlannedFault, plan_faults
from ledgerproof.grpc_wire import GrpcWire
from ledgerproof.machine import commit, describe_machine
from ledgerproof.options import EnvironmentProblem, Options
from ledgerproof.progress import Progress, Step
from ledgerproof.sampler import Sampler
from ledgerproof.shard_move import ShardMove, plan_move
from ledgerproof.wire import Wire
from ledgerproof.workload import Schedule, draw
from reference import operations
from reference.config import ServiceConfig
from reference.errors import LedgerError
from reference.reconciliation import Kind, Pass
from reports.render import render

HARNESS_LOG: Final = "harness.log"
DRAIN_TIMEOUT_S: Final = 60.0
SHORT_DRAIN_TIMEOUT_S: Final = 5.0
"""For the second drain, if the first one failed."""
FINISH_TIMEOUT_S: Final = 60.0
"""Closing and settling the matches that the load left open takes no longer than this."""
HEAL_TIMEOUT_S: Final = 60.0
LEAD_S: Final = 0.5
"""The load begins this much after everything is ready to measure it."""
SHOW_EVERY_S: Final = 0.5
RECONCILE_EVERY_S: Final = 15.0
"""A run is short: the reconciler passes over what is new more often, so that it does so during the faults too."""
RECONCILE_SHARE: Final = 0.25
"""And in a run that is shorter still, once in so much of its load, so that the planted drift is found in time."""
RECONCILE_LEAST_S: Final = 3.0
PASSES_READ_MAX: Final = 2_000
FINDINGS_READ_MAX: Final = 2_000
EXAMPLES_MAX: Final = 5
PROBE_EVERY_S: Final = 0.15
MIN_FREE_BYTES: Final = 500_000_000
"""Free space on the disk of the run folder; a default run writes about 100 MB there."""
REQUIRED_SOMETIMES: Final = (
    "a retry replayed",
    "same key raced on two API processes",
    "same key with another body refused",
    "funds refused under contention",
    "a settled match was settled again",
)
"""What the workload does by itself, again and again: a run of REQUIRED_FROM_BETS or more without one of these went
wrong. What depends on the moment is asked of a campaign of runs (`ledgerproof sometimes`)."""
REQUIRED_FROM_BETS: Final = 10_000
OPERATIONS: Final = (
    "deposit",
    "withdraw",
    "bet",
    "cancel",
    "balance",
    "entries",
    "create_match",
    "close_match",
    "settle_match",
    "resettle_match",
)
"""Operations that must succeed at least once for a run to prove anything."""

log = logging.getLogger("ledgerproof.prove")


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


@dataclass
class Job:
    """Everything one run works with once its stack is there."""

    options: Options
    schedule: Schedule
    planned: list[PlannedFault]
    stack: Stack
    config: ServiceConfig
    recording: Recording
    progress: Progress


@contextlib.contextmanager
def timed(facts: HarnessFacts, name: str) -> Iterator[None]:
    """Add the seconds the block takes to the timings, also if it fails."""
    began = time.monotonic()
    try:
        yield
    finally:
        facts.timings[name] = facts.timings.get(name, 0.0) + time.monotonic() - began


def prove(options: Options, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Run the main job and return the run folder and its verdict.

    Raises EnvironmentProblem if the run could not begin, ValueError for impossible options; everything later
    is in the verdict.
    """
    began = time.monotonic()
    planned = plan_faults(options.seed, options.duration_s, options.servers) if options.faults == "standard" else []
    schedule = draw(options.seed, options.rate, options.duration_s, apis=options.apis)
    folder = make_run_folder(options)
    try:
        recording = _open_recording(folder, options, schedule)
    except (OSError, RecordingError) as error:
        raise EnvironmentProblem(f"cannot write the run folder {folder}: {error}") from error
    with _log_to(folder / HARNESS_LOG), _terminate_as_interrupt():
        stack = _start_stack(options, recording, progress)
        try:
            _run(Job(options, schedule, planned, stack, stack.config, recording, progress))
        finally:
            _take_down(stack, options, recording, progress)
        verdict = _judge(recording, progress, began)
    return folder, verdict


def make_run_folder(options: Options) -> Path:
    """Make the folder of a new run. Raises EnvironmentProblem if it cannot be written or the disk is full."""
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-s{options.seed}-{secrets.token_hex(2)}"
    folder = options.out / name
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
            f"only {free // 1_000_000} MB are free where {options.out} is, {MIN_FREE_BYTES // 1_000_000} MB are "
            "needed: make room or choose another folder with --out"
        )
    return folder


def _open_recording(folder: Path, options: Options, schedule: Schedule) -> Recording:
    origin = time.monotonic()
    origin_unix = time.time()
    clock = monotonic_clock(origin)
    facts = HarnessFacts(
        run=folder.name,
        seed=options.seed,
        commit=commit(),
        version=__version__,
        machine=dict(describe_machine()),
        started_at=datetime.fromtimestamp(origin_unix, UTC).isoformat(timespec="seconds"),
        origin_unix=origin_unix,
        rate=options.rate,
        config={
            "duration_s": options.duration_s,
            "rate": options.rate,
            "servers": options.servers,
            "apis": options.apis,
            "faults": options.faults,
            "request_timeout_s": REQUEST_TIMEOUT_S,
            "wallets": len(schedule.seed_deposits),
            "matches": len(schedule.matches),
            "arrivals": len(schedule),
            "schedule_digest": schedule.digest(),
        },
    )
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


def _start_stack(options: Options, recording: Recording, progress: Progress) -> Stack:
    """Start the stack; whatever prevents it ends the run before it began."""
    spec = StackSpec(
        servers=options.servers,
        apis=options.apis,
        base_port=options.base_port,
        keep=options.keep,
        settings={"reconcile_every_s": reconcile_every_s(options.duration_s)},
    )
    title = f"Starting {options.servers} Postgres servers, Kafka, Redis and the service"
    try:
        with timed(recording.facts, "stack_s"), progress.step(title) as step:
            stack = Stack.start(spec, options.root, progress=progress.show)
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


def reconcile_every_s(duration_s: float) -> float:
    """Return how often the reconciler passes over what is new in a run with a load of `duration_s`."""
    return min(RECONCILE_EVERY_S, max(RECONCILE_LEAST_S, RECONCILE_SHARE * duration_s))


def _run(job: Job) -> None:
    """Do everything that needs the stack; whatever goes wrong becomes part of the verdict."""
    recording = job.recording
    try:
        _write_config(job)
        uvloop.run(_on_loop(job))
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


def _write_config(job: Job) -> None:
    """Write config.json: the workload's and the service's settings, without any password."""
    recording = job.recording
    service = msgspec.to_builtins(job.config)
    for secret in ("passwords", "redis_password", "token_key"):
        service.pop(secret)
    bets = job.options.rate * job.options.duration_s
    recording.facts.config = {
        **recording.facts.config,
        "evidence": EVIDENCE,
        "origin_unix": recording.origin_unix,
        "operations": list(OPERATIONS),
        "required_sometimes": list(REQUIRED_SOMETIMES) if bets >= REQUIRED_FROM_BETS else [],
        "service": service,
    }
    text = msgspec.json.format(msgspec.json.encode(recording.facts.config), indent=2)
    (recording.folder / CONFIG_FILE).write_bytes(text + b"\n")
    # Written again at the end; until then it says that the run did not finish.
    assess.write_facts(recording.folder, recording.facts)


async def _on_loop(job: Job) -> None:
    """Run load, drain and snapshots on this event loop; Ctrl-C and SIGTERM raise Interrupted."""
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(_load_and_collect(job))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        raise Interrupted from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _load_and_collect(job: Job) -> None:
    """Seed, load, and bring everything the service holds home."""
    recording, stack = job.recording, job.stack
    wires = [Wire("127.0.0.1", stack.port(name), timeout_s=REQUEST_TIMEOUT_S) for name in stack.nodes_of("api")]
    token = stack.token()
    grpc_wires = [GrpcWire(stack.grpc_port(name), token, timeout_s=REQUEST_TIMEOUT_S) for name in stack.nodes_of("api")]
    player = Player(
        job.schedule,
        wires,
        recording.recorder,
        recording.clock,
        recording.origin_unix,
        token=token,
        grpc_wires=grpc_wires,
    )
    sampler = _sampler(job, player)
    drift = _drift(job)
    watching: asyncio.Task[None] | None = None
    try:
        recording.timeline.phase("seed")
        with timed(recording.facts, "seed_s"), job.progress.step(f"Opening {len(job.schedule.seed_deposits)} wallets"):
            await player.seed()
            await drift.plant(job.options.seed, player.open)
        watching = asyncio.create_task(drift.run(), name="drift")
        # From here until all is drained, so that backlogs are seen to come down.
        sampler.start()
        with timed(recording.facts, "load_s"):
            await _load(job, player, sampler)
        with timed(recording.facts, "drain_s"):
            await _bring_to_rest(job, player)
            with job.progress.step("Waiting for the reconciler to report the planted drift") as step:
                await watching
                step.detail = "not reported" if drift.reported_s is None else f"seen at {drift.reported_s:.0f} s"
        if drift.problem is not None:
            recording.invalid(f"the planted drift could not be repaired: {drift.problem}")
        sampler.stop()
        if sampler.failure is not None:
            recording.timeline.note(f"sampling ended early: {sampler.failure}")
        await _collect(job, player, drift.planned)
    finally:
        sampler.stop()
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        await player.stop()
        for wire in wires:
            wire.close()
        await asyncio.gather(*(grpc_wire.close() for grpc_wire in grpc_wires))


# -- load ----------------------------------------------------------------------------------------------


def _drift(job: Job) -> Drift:
    """Return the drift that this run plants, not planted yet."""
    move = plan_move(job.options.seed, job.schedule.duration_s, job.config.routing, len(job.config.servers))
    broken = frozenset(fault.node for fault in job.planned)
    planned = plan_drift(job.options.seed, job.config, moved_shard=None if move is None else move.shard, broken=broken)
    return Drift(job.config, job.stack.superuser, job.recording.timeline, job.recording.clock, planned)


def _sampler(job: Job, player: Player) -> Sampler:
    """Return a sampler of every process of the service, not started yet."""
    stack = job.stack
    sorts = ("api", "relay", "matcher", "settler", "projector", "reconciler")
    ports = {node: stack.port(node) for sort in sorts for node in stack.nodes_of(sort)}
    sampler = Sampler(job.recording.series, job.recording.clock, ports, stack.status)
    sampler.watch("generator_lag_ms", lambda: player.last_lag_s * 1000)
    sampler.watch("in_flight", lambda: float(player.in_flight))
    clock, origin_unix = job.recording.clock, job.recording.origin_unix
    sampler.watch(WALL_CLOCK_DRIFT, lambda: time.time() - origin_unix - clock())
    return sampler


async def _load(job: Job, player: Player, sampler: Sampler) -> None:
    """Play the schedule while the nemesis breaks nodes and the probe measures that; heal everything after."""
    stack, planned, recording, progress = job.stack, job.planned, job.recording, job.progress
    facts, schedule = recording.facts, job.schedule
    book = EdgeBook(recording.timeline, recording.origin)
    nemesis = Nemesis(stack, recording.timeline, book, planned, recording.clock)
    plan = plan_move(job.options.seed, schedule.duration_s, job.config.routing, len(job.config.servers))
    move = None if plan is None else ShardMove(stack, recording.timeline, plan, recording.clock)
    title = f"{schedule.rate:g} bets/s for {schedule.duration_s:g} s"
    if planned:
        title += ", " + ", ".join(f"{fault.kind} {fault.node}" for fault in planned)
    with contextlib.ExitStack() as stopping:
        # After Ctrl-C nobody waits for a node to come back: the stack is taken down with all its nodes.
        stopping.callback(nemesis.cancel)
        if move is not None:
            stopping.callback(move.cancel)
        watched = targets(stack.state)
        stopping.enter_context(LivenessProbe(watched, interval_s=PROBE_EVERY_S, on_edge=book.on_edge))
        with _garbage_later(), progress.step(title) as step:
            cpu_s = time.process_time()
            start_s = recording.clock() + LEAD_S
            facts.load_start_s = start_s
            facts.load_end_s = start_s + schedule.duration_s
            recording.timeline.record("phase", t=start_s, detail="before")
            nemesis.start(start_s)
            if move is not None:
                move.start(start_s)
            showing = asyncio.ensure_future(_show(step, player, sampler, nemesis, start_s))
            try:
                await player.run(start_s)
            finally:
                showing.cancel()
                facts.load_end_s = min(facts.load_end_s, max(start_s, recording.clock()))
                facts.generator = _generator_facts(player, time.process_time() - cpu_s)
                step.detail = f"{player.acknowledged_bets} bets acknowledged"
        recording.timeline.phase("drain")
        with progress.step("Healing every fault"):
            await asyncio.to_thread(nemesis.join)
            healed = await asyncio.to_thread(stack.heal, HEAL_TIMEOUT_S)
            if healed:
                recording.timeline.note(f"healed at the end: {', '.join(healed)}")
        if move is not None:
            await asyncio.to_thread(move.join)
            if move.done is not None:
                facts.shard_moves = [move.done]
            else:
                recording.invalid(f"the shard was not moved: {move.problem}")
        for problem in nemesis.problems:
            recording.invalid(f"fault: {problem}")
        if book.failure is not None:
            recording.aborted(f"the timeline could not be written: {book.failure}")


def _generator_facts(player: Player, cpu_s: float) -> GeneratorFacts:
    lags_ms = np.frombuffer(player.lags_s, dtype=np.float64) * 1000 if len(player.lags_s) else np.zeros(1)
    return GeneratorFacts(
        lag_p99_ms=round(float(np.quantile(lags_ms, 0.99, method="higher")), 3),
        late=player.late,
        dropped=player.dropped,
        scheduled=len(player.schedule),
        sent=player.sent,
        skipped=player.skipped,
        gave_up=player.gave_up,
        cpu_s=round(cpu_s, 2),
    )


async def _show(step: Step, player: Player, sampler: Sampler, nemesis: Nemesis, start_s: float) -> None:
    """Show once a moment how the load goes."""
    before, at_s = 0, player.clock()
    while True:
        await asyncio.sleep(SHOW_EVERY_S)
        now_s = player.clock()
        per_s = (player.acknowledged_bets - before) / max(now_s - at_s, 1e-3)
        before, at_s = player.acknowledged_bets, now_s
        text = (
            f"{max(0.0, now_s - start_s):.0f} s, {player.acknowledged_bets} bets ({per_s:.0f}/s), "
            f"{player.unknown_count} unknown, lag {sum(sampler.latest_lag.values()):.0f}"
        )
        step.show(f"{text}, now: {nemesis.now}" if nemesis.now else text)


@contextlib.contextmanager
def _garbage_later() -> Iterator[None]:
    """Keep garbage collection from pausing the generator: what lives is frozen, the young are collected rarely."""
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1_000)
    # The sampler and the recorder run in threads; they must not keep the generator waiting.
    sys.setswitchinterval(0.001)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.unfreeze()


# -- rest, snapshots, resolution -----------------------------------------------------------------------


async def _bring_to_rest(job: Job, player: Player) -> None:
    """Close and settle the matches that are left, and wait until the service has nothing more to do."""
    recording = job.recording
    with job.progress.step(f"Settling {len(job.schedule.matches)} matches"):
        left = await player.finish_matches(recording.clock() + FINISH_TIMEOUT_S)
        if left:
            recording.timeline.note(f"not settled: {', '.join(left)}")
    recording.facts.drained = await _drained(job, player, DRAIN_TIMEOUT_S)


async def _collect(job: Job, player: Player, planted: PlannedDrift) -> None:
    """Copy what the service holds, send half of the unknown keys again, and copy once more."""
    config, recording, progress = job.config, job.recording, job.progress
    facts = recording.facts
    with timed(facts, "snapshot_s"), progress.step("Reading everything the service holds") as step:
        first = recording.folder / FIRST_SNAPSHOT
        first.mkdir()
        sizes = await snapshot(config, first, step.show)
        step.detail = f"{sizes['ledger']} ledger rows"
    recording.timeline.phase("resolve")
    with timed(facts, "resolve_s"):
        await _resolve(job, player)
        timeout_s = DRAIN_TIMEOUT_S if facts.drained else SHORT_DRAIN_TIMEOUT_S
        facts.drained = await _drained(job, player, timeout_s) and facts.drained
    with timed(facts, "snapshot_s"), progress.step("Reading everything once more") as step:
        second = recording.folder / SECOND_SNAPSHOT
        second.mkdir()
        sizes = await snapshot(config, second, step.show, first)
        step.detail = f"{sizes['ledger']} ledger rows"
    with timed(facts, "reconcile_s"), progress.step("Asking the reconciler") as step:
        facts.reconciliation = await _reconciled(config, step, planted.user, at_rest=facts.drained)
    facts.sizes = {f"{table}_rows": rows for table, rows in sizes.items()}
    facts.sizes["history_rows"] = recording.recorder.appended_rows


async def _reconciled(config: ServiceConfig, step: Step, planted: int, *, at_rest: bool) -> ReconciliationFacts:
    """Run a full pass of the service's own reconciler and return what it and all earlier passes found.

    What follows from the drift in the wallet `planted` is counted apart: it is the checker's to judge (A35).

    Of a service that does not come to rest only the earlier passes are asked: they may say why, for findings pause
    payouts.
    """
    said = ReconciliationFacts()
    try:
        report = await Pass(config, Kind.FULL, "prove", show=step.show).run() if at_rest else None
        if report is not None:
            said.problems += report.problems
        for index, server in enumerate(config.servers):
            said.passes += len(await operations.runs_of(config, index, PASSES_READ_MAX))
            for row in await operations.findings_of(config, index, None, FINDINGS_READ_MAX):
                if row["user_id"] == planted and row["code"] in FOLLOWS:
                    said.planted += 1
                    continue
                said.findings[row["code"]] = said.findings.get(row["code"], 0) + 1
                if len(said.examples) < EXAMPLES_MAX:
                    where = (
                        f"wallet {row['user_id']}, seq {row['seq']}, match {row['match_id']}, event {row['event_id']}"
                    )
                    said.examples.append(
                        f"{row['code']} on {server.name}: {where}: expected {row['expected']}, found {row['found']}"
                    )
    except LedgerError as error:
        said.problems.append(str(error))
    step.detail = f"{sum(said.findings.values())} findings in {said.passes} passes"
    return said


async def _drained(job: Job, player: Player, timeout_s: float) -> bool:
    """Wait until every request's time is over and the service has finished its work; return whether it has."""
    config, recording = job.config, job.recording
    with job.progress.step("Draining outbox, topics, settlements and projection") as step:
        # A request whose answer was lost may still be in the service: in its queue until the deadline, then in
        # one statement until that one's timeout.
        longest_s = (config.command_deadline_ms + config.statement_timeout_ms) / 1000 + 1.0
        wait_s = player.last_unknown_sent_s + longest_s - recording.clock()
        if player.unknown_count and wait_s > 0:
            step.show("waiting until no request can be under way")
            await asyncio.sleep(wait_s)
        try:
            left = await drain(config, timeout_s, step.show)
        except NotDrained as error:
            recording.invalid(str(error))
            step.detail = "not drained"
            return False
        step.detail = left.text()
        return True


async def _resolve(job: Job, player: Player) -> None:
    """Ask the ledger what became of the unknown keys and send a random half of them once more."""
    recording = job.recording
    await asyncio.to_thread(recording.recorder.flush)
    run = await asyncio.to_thread(load_run, recording.folder)
    resolved = run.first_resolution
    chosen = fates.choose_retries(resolved, recording.facts.seed)
    asked = zip(chosen["family"].to_list(), chosen["user"].to_list(), chosen["key"].to_list(), strict=True)
    identities = [identity for identity in asked if identity in player.unknown]
    with job.progress.step(f"Resolving {resolved.height} unknown outcomes") as step:
        results = await player.retry_unknown(identities)
        replayed = sum(bool(result.answer.replayed) for _, result in results)
        step.detail = f"{len(results)} sent again, {replayed} of them replayed"


# -- end -----------------------------------------------------------------------------------------------


def _take_down(stack: Stack, options: Options, recording: Recording, progress: Progress) -> None:
    """Keep the logs and take the stack down; what is left of it is part of the verdict."""
    with _undisturbed():
        try:
            stack.collect_logs(recording.folder / "logs")
        except OSError as error:
            log.warning("the logs could not be kept: %s", error)
        if options.keep:
            progress.say(f"The stack {stack.name} keeps running; `ledgerproof down` ends it.")
            return
        with timed(recording.facts, "down_s"), progress.step("Taking the stack down") as step:
            try:
                recording.facts.residue = stack.down()
            except (StackError, OSError) as error:
                log.exception("the stack could not be taken down")
                recording.facts.residue = [str(error)]
            step.detail = "; ".join(recording.facts.residue)


def _judge(recording: Recording, progress: Progress, began: float) -> dict[str, Any]:
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
def _log_to(path: Path) -> Iterator[None]:
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


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM while the block runs: half a clean-up is worse than a late one."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run like Ctrl-C does, so that the stack is taken down."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
