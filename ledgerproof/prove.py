"""The main job: stack up, load, faults, drain, snapshots, checks, verdict, report.

    start stack → seed wallets → open load + faults → stop clients → heal → close and settle what is left
    → wait out timeouts → drain → snapshot 1 → resolve unknown keys, retry half → drain → snapshot 2
    → stack down → judge → verdict.json, report.html

A run that began always ends with a verdict.json, whatever happened, and with its stack taken down.
"""

import asyncio
import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from compose.probe import LivenessProbe, targets
from compose.stack import Stack
from compose.state import StackSpec
from invariants.run import WALL_CLOCK_DRIFT
from ledgerproof.assess import GeneratorFacts
from ledgerproof.client import REQUEST_TIMEOUT_S, Player
from ledgerproof.drift import Drift, plan_drift
from ledgerproof.ending import DRAIN_TIMEOUT_S, Scene, collect, drained, whole
from ledgerproof.faults import EdgeBook, Nemesis, PlannedFault, plan_faults
from ledgerproof.grpc_wire import GrpcWire
from ledgerproof.interrupts import terminate_as_interrupt
from ledgerproof.live.beside import Beside
from ledgerproof.options import Options
from ledgerproof.progress import Progress, Step
from ledgerproof.recording import (
    HARNESS_LOG,
    Recording,
    carry_out,
    conclude,
    log_to,
    make_run_folder,
    open_recording,
    start_stack,
    take_down,
    timed,
    write_config,
)
from ledgerproof.sampler import Sampler
from ledgerproof.shard_move import ShardMove, plan_move
from ledgerproof.wire import Wire
from ledgerproof.workload import Schedule, draw
from reference.config import ServiceConfig

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
PROBE_EVERY_S: Final = 0.15
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


def prove(options: Options, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Run the main job and return the run folder and its verdict.

    Raises EnvironmentProblem if the run could not begin, ValueError for impossible options; everything later
    is in the verdict.
    """
    began = time.monotonic()
    planned = plan_faults(options.seed, options.duration_s, options.servers) if options.faults == "standard" else []
    schedule = draw(options.seed, options.rate, options.duration_s, apis=options.apis)
    folder = make_run_folder(options.out, options.seed)
    recording = open_recording(folder, seed=options.seed, rate=options.rate, config=_settings(options, schedule))
    spec = StackSpec(
        servers=options.servers,
        apis=options.apis,
        base_port=options.base_port,
        keep=options.keep,
        settings={"reconcile_every_s": reconcile_every_s(options.duration_s)},
    )
    with log_to(folder / HARNESS_LOG), terminate_as_interrupt():
        if options.predict:
            _foretell(recording, options, schedule, planned, progress)
        stack = start_stack(spec, options.root, recording, progress)
        try:
            job = Job(options, schedule, planned, stack, stack.config, recording, progress)
            carry_out(recording, lambda: _load_and_collect(job))
        finally:
            take_down(stack, recording, progress, keep=options.keep)
        verdict = conclude(recording, progress, began)
    return folder, verdict


def _foretell(
    recording: Recording, options: Options, schedule: Schedule, planned: list[PlannedFault], progress: Progress
) -> None:
    """Write the forecast of this run; its digest goes into the verdict, so that it cannot be changed afterwards."""
    from ledgerproof.modelling.foretelling import foretell  # noqa: PLC0415 - slow to import

    with progress.step("Forecasting the run") as step:
        said = foretell(recording.folder, options, schedule, planned)
        step.detail = f"sealed as {said.digest[:12]}"
    recording.facts.config["prediction_digest"] = said.digest


def reconcile_every_s(duration_s: float) -> float:
    """Return how often the reconciler passes over what is new in a run with a load of `duration_s`."""
    return min(RECONCILE_EVERY_S, max(RECONCILE_LEAST_S, RECONCILE_SHARE * duration_s))


def _settings(options: Options, schedule: Schedule) -> dict[str, Any]:
    """Return what config.json says of the workload."""
    return {
        "duration_s": options.duration_s,
        "rate": options.rate,
        "servers": options.servers,
        "apis": options.apis,
        "faults": options.faults,
        "audit": options.audit,
        "request_timeout_s": REQUEST_TIMEOUT_S,
        "wallets": len(schedule.seed_deposits),
        "matches": len(schedule.matches),
        "arrivals": len(schedule),
        "schedule_digest": schedule.digest(),
    }


async def _load_and_collect(job: Job) -> None:
    """Seed, load, and bring everything the service holds home."""
    recording, stack = job.recording, job.stack
    bets = job.options.rate * job.options.duration_s
    write_config(recording, job.config, OPERATIONS, REQUIRED_SOMETIMES if bets >= REQUIRED_FROM_BETS else ())
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
    scene = Scene(job.config, recording, job.progress, player, whole(job.config), drift.planned.user)
    beside = Beside(stack.config_path, recording.folder, drift.planned.user) if job.options.audit else None
    try:
        if beside is not None:
            beside.start()
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
            await _bring_to_rest(job, player, scene)
            with job.progress.step("Waiting for the reconciler to report the planted drift") as step:
                await watching
                step.detail = "not reported" if drift.reported_s is None else f"seen at {drift.reported_s:.0f} s"
        if drift.problem is not None:
            recording.invalid(f"the planted drift could not be repaired: {drift.problem}")
        sampler.stop()
        if sampler.failure is not None:
            recording.timeline.note(f"sampling ended early: {sampler.failure}")
        if beside is not None:
            with timed(recording.facts, "live_audit_s"), job.progress.step("Asking the live auditor") as step:
                recording.facts.live_audit = said = await asyncio.to_thread(beside.stop)
                step.detail = f"{sum(said['findings'].values())} findings"
        await collect(scene)
    finally:
        if beside is not None:
            beside.kill()
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


# -- rest ------------------------------------------------------------------------------------------------


async def _bring_to_rest(job: Job, player: Player, scene: Scene) -> None:
    """Close and settle the matches that are left, and wait until the service has nothing more to do."""
    recording = job.recording
    with job.progress.step(f"Settling {len(job.schedule.matches)} matches"):
        left = await player.finish_matches(recording.clock() + FINISH_TIMEOUT_S)
        if left:
            recording.timeline.note(f"not settled: {', '.join(left)}")
    recording.facts.drained = await drained(scene, DRAIN_TIMEOUT_S)
