"""Runs a plan from its stack to its verdict, recorded, ended and judged exactly as `prove` does.

    stack (its own, or one that runs) → wallets and matches → clients, faults, failpoints → heal → end of every run
    → stack down → judge → verdict.json, report.html

Nothing is offered at a rate, so no service level is judged; everything else is.
"""

import asyncio
import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from compose.errors import StackError
from compose.probe import LivenessProbe, targets
from compose.stack import DEFAULT_ROOT, Stack
from ledgerproof.assess import PlanFacts
from ledgerproof.cells import FAILPOINTS_FILE
from ledgerproof.client import REQUEST_TIMEOUT_S, Client
from ledgerproof.collect import NotCollected, NotDrained, drain, snapshot
from ledgerproof.ending import DRAIN_TIMEOUT_S, Copy, Scene, collect, drained, whole
from ledgerproof.faults import EdgeBook
from ledgerproof.grpc_wire import GrpcWire
from ledgerproof.interrupts import terminate_as_interrupt
from ledgerproof.options import RUNS_FOLDER, EnvironmentProblem
from ledgerproof.plan import format as plans
from ledgerproof.plan.faults import Breaker
from ledgerproof.plan.performer import Astray, Performer
from ledgerproof.plan.places import Places, place
from ledgerproof.plan.scope import later_than
from ledgerproof.progress import Progress
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
from ledgerproof.wire import Wire
from reference.config import ServiceConfig

PLAN_FILE: Final = "plan.json"
PROBE_EVERY_S: Final = 0.05
FINISH_TIMEOUT_S: Final = 30.0
QUIET_TIMEOUT_S: Final = 30.0
"""A stack that is lent to a plan is at rest within this time, or it is not taken."""
WORK_FOLDER: Final = "whole"


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is run."""

    out: Path = RUNS_FOLDER
    root: Path = DEFAULT_ROOT
    base_port: int | None = None
    keep: bool = False
    report: bool = True
    """Write report.html too."""
    stack: Stack | None = None
    """A running stack to use, on which nobody else gives commands meanwhile; None: one of its own."""


def run_plan(plan: plans.Plan, options: PlanOptions, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Run a plan and return the run folder and its verdict.

    Raises EnvironmentProblem if it could not begin; everything later is in the verdict.
    """
    began = time.monotonic()
    if options.stack is not None:
        _fits(plan, options.stack)
    folder = make_run_folder(options.out, plan.seed)
    recording = open_recording(folder, seed=plan.seed, rate=0.0, config=_settings(plan))
    recording.facts.plan = PlanFacts(plan.title, list(plan.requires.waive))
    (folder / PLAN_FILE).write_bytes(plans.encode(plan))
    with log_to(folder / HARNESS_LOG), terminate_as_interrupt():
        if options.stack is not None:
            _run_on(Act(options.stack, plan, recording, progress), lent=True)
        else:
            spec = plan.stack.spec(keep=options.keep, base_port=options.base_port)
            stack = start_stack(spec, options.root, recording, progress)
            try:
                _run_on(Act(stack, plan, recording, progress), lent=False)
            finally:
                take_down(stack, recording, progress, keep=options.keep)
        verdict = conclude(recording, progress, began, report=options.report)
    return folder, verdict


def _settings(plan: plans.Plan) -> dict[str, Any]:
    """Return what config.json says of the workload."""
    return {
        "plan": plan.title,
        "servers": plan.stack.servers,
        "apis": plan.stack.apis,
        "request_timeout_s": REQUEST_TIMEOUT_S,
        "wallets": len(plan.wallets),
        "matches": len(plan.matches),
        "required_sometimes": plan.requires.sometimes,
    }


def _fits(plan: plans.Plan, stack: Stack) -> None:
    """Raise EnvironmentProblem unless the running stack has what the plan needs."""
    has = {node.name for node in stack.state.nodes}
    lacks = sorted({name for name, _ in plan.stack.spec().nodes()} - has)
    if lacks:
        raise EnvironmentProblem(f"stack {stack.name} has no {', '.join(lacks)}, which the plan needs")
    config, wanted = msgspec.to_builtins(stack.config), plan.stack.settings
    for name, value in wanted.items():
        if config.get(name) != value:
            raise EnvironmentProblem(
                f"stack {stack.name} runs with {name} = {config.get(name)}, the plan needs {value}"
            )
    arms = any(isinstance(step, plans.Arm) for client in plan.clients for step in client.steps)
    if arms and not stack.state.spec.failpoints:
        raise EnvironmentProblem(f"the plan arms failpoints, and stack {stack.name} was started without them")


@dataclass(frozen=True)
class Act:
    """A plan on its stack."""

    stack: Stack
    plan: plans.Plan
    recording: Recording
    progress: Progress


def _run_on(act: Act, *, lent: bool) -> None:
    """Do everything that needs the stack; `lent`: earlier runs have left things on it."""
    recording, config = act.recording, act.stack.config

    async def work() -> None:
        write_config(recording, config, act.plan.requires.operations)
        copy, first_wallet, tag = whole(config), 1, ""
        if lent:
            copy = await _leave_out(config, recording, act.progress)
            # Later runs have later times, so their wallets have higher numbers.
            first_wallet, tag = int(recording.origin_unix * 10), f"-{int(recording.origin_unix * 1000):x}"
        places = place(act.plan, config.routing, first_wallet, tag, recording.origin_unix)
        await _perform(act, places, copy)

    carry_out(recording, work)
    shutil.rmtree(recording.folder / WORK_FOLDER, ignore_errors=True)


async def _leave_out(config: ServiceConfig, recording: Recording, progress: Progress) -> Copy:
    """Return snapshots without what is on a lent stack already, which must be at rest. Raises NotCollected."""
    with progress.step("Reading what the stack holds already") as step:
        try:
            await drain(config, QUIET_TIMEOUT_S, step.show)
        except NotDrained as error:
            raise NotCollected(f"the stack is not at rest, so this run could not be told apart: {error}") from error
        work = recording.folder / WORK_FOLDER
        baseline = work / "before"
        baseline.mkdir(parents=True)
        sizes = await snapshot(config, baseline, step.show)
        step.detail = f"{sizes['ledger']} ledger rows"
    return later_than(config, baseline, work)


async def _perform(act: Act, places: Places, copy: Copy) -> None:
    """Prepare, let the clients act, heal, and bring everything home."""
    stack, plan, recording, progress = act.stack, act.plan, act.recording, act.progress
    facts, token = recording.facts, stack.token()
    apis = stack.nodes_of("api")[: plan.stack.apis]
    wires = [Wire("127.0.0.1", stack.port(name), timeout_s=REQUEST_TIMEOUT_S) for name in apis]
    grpc_wires = [GrpcWire(stack.grpc_port(name), token, timeout_s=REQUEST_TIMEOUT_S) for name in apis]
    client = Client(wires, recording.recorder, recording.clock, token=token, grpc_wires=grpc_wires)
    scene = Scene(stack.config, recording, progress, client, copy)
    book = EdgeBook(recording.timeline, recording.origin)
    breaker = Breaker(stack, recording.timeline, book)
    performer = Performer(plan, places, client, stack, breaker)
    sampler = _sampler(stack, recording)
    try:
        recording.timeline.phase("seed")
        sampler.start()
        with timed(facts, "seed_s"), progress.step(f"Opening {len(plan.wallets)} wallets, {len(plan.matches)} matches"):
            await _or_invalid(recording, performer.prepare())
        with LivenessProbe(targets(stack.state), interval_s=PROBE_EVERY_S, on_edge=book.on_edge):
            with timed(facts, "load_s"), _loading(recording), progress.step(plan.title) as step:
                await _or_invalid(recording, performer.perform())
                step.detail = f"{client.sent} requests, {client.unknown_count} without an answer"
            recording.timeline.phase("drain")
            with timed(facts, "heal_s"), progress.step("Healing every fault"):
                healed = await asyncio.to_thread(breaker.heal_all)
                if healed:
                    recording.timeline.note(f"healed at the end: {', '.join(healed)}")
        if book.failure is not None:
            recording.aborted(f"the timeline could not be written: {book.failure}")
        with timed(facts, "drain_s"):
            left = await performer.finish(FINISH_TIMEOUT_S)
            if left:
                recording.timeline.note(f"not settled: {', '.join(left)}")
            _hold_to_plan(plan, performer, breaker, recording)
            facts.drained = await drained(scene, DRAIN_TIMEOUT_S)
        sampler.stop()
        await collect(scene)
    finally:
        sampler.stop()
        with contextlib.suppress(StackError, OSError):  # a stack that is gone has nothing more to say
            _keep_hits(breaker, recording)
        for wire in wires:
            wire.close()
        await asyncio.gather(*(wire.close() for wire in grpc_wires))


async def _or_invalid(recording: Recording, work: Any) -> None:
    """Await a part of the plan; if it went astray the run is INVALID, and goes on to its end."""
    try:
        await work
    except Astray as error:
        recording.invalid(f"not as planned: {error}")


@contextlib.contextmanager
def _loading(recording: Recording) -> Iterator[None]:
    """Say when the clients were at work."""
    facts = recording.facts
    facts.load_start_s = recording.timeline.phase("before")
    facts.load_end_s = facts.load_start_s
    try:
        yield
    finally:
        facts.load_end_s = recording.clock()


def _hold_to_plan(plan: plans.Plan, performer: Performer, breaker: Breaker, recording: Recording) -> None:
    """Make the run INVALID for everything that the plan says and that did not happen."""
    for problem in performer.problems:
        recording.invalid(f"not as planned: {problem}")
    if performer.left_out:
        recording.timeline.note(f"{performer.left_out} steps left out: what they refer to was never answered")
    counts = breaker.counts()
    for client in plan.clients:
        for step in client.steps:
            if isinstance(step, plans.Arm) and not step.may_miss and not counts.get((step.node, step.point), (0, 0))[1]:
                recording.invalid(f"failpoint {step.point} of {step.node} was armed and never did anything")
    for operation in plan.requires.operations:
        if not performer.succeeded[operation]:
            recording.invalid(f"operation {operation} never succeeded, and the plan requires it")


def _keep_hits(breaker: Breaker, recording: Recording) -> None:
    """Put what failpoints did on the timeline, and how often each was hit into failpoints.json."""
    fired = [(node, each) for node, each in breaker.fired() if each.t >= recording.origin]
    for node, each in fired:
        at_s = each.t - recording.origin
        recording.timeline.record("note", t=at_s, node=node, detail=f"failpoint {each.name}: {each.action}")
    hits: dict[str, dict[str, int]] = {}
    for (node, point), (count, _) in breaker.counts().items():
        if count:
            hits.setdefault(node, {})[point] = count
    told = [
        {"t": round(each.t - recording.origin, 6), "node": node, "point": each.name, "action": each.action}
        for node, each in fired
    ]
    text = msgspec.json.format(msgspec.json.encode({"hits": hits, "fired": told}), indent=2)
    (recording.folder / FAILPOINTS_FILE).write_bytes(text + b"\n")


def _sampler(stack: Stack, recording: Recording) -> Sampler:
    ports = {node.name: node.port for node in stack.state.nodes if node.kind == "service"}
    return Sampler(recording.series, recording.clock, ports, stack.status)
