"""One load profile from its stack to its verdict: played by Locust, then ended and judged exactly as `prove` is.

stack → Locust opens wallets and matches, plays the schedule, tells every attempt → matches settled → end of every
run → stack down → judge → load.json, verdict.json, report.html
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from compose.stack import DEFAULT_ROOT, Stack
from compose.state import StackSpec
from invariants.run import WALL_CLOCK_DRIFT
from ledgerproof.assess import GeneratorFacts
from ledgerproof.client import REQUEST_TIMEOUT_S, Client
from ledgerproof.ending import DRAIN_TIMEOUT_S, Scene, collect, drained, whole
from ledgerproof.interrupts import terminate_as_interrupt
from ledgerproof.loading.compare import LOAD_FILE
from ledgerproof.loading.intake import Intake
from ledgerproof.loading.locusts import END_WITHIN_S, Locusts, NotPlayed
from ledgerproof.options import RUNS_FOLDER, EnvironmentProblem
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
from ledgerproof.wire import Wire
from ledgerproof.workload import Command
from load.options import Drawn, drawn
from load.profiles import PROFILES, Profile
from load.result import Result

LOAD_NAME: Final = "load"
PREPARE_TIMEOUT_S: Final = 300.0
FINISH_TIMEOUT_S: Final = 300.0
FINISH_POLL_S: Final = 0.25
FINISH_AT_ONCE: Final = 32
CLIENTS_FROM: Final = 1_900_000_000
"""Clients of this process have numbers that no worker's clients reach."""
ENDS: Final = {"OPEN": "close_match", "CLOSED": "settle_match"}
RECORDED: Final = {
    "grpc_bet": "bet",
    "strong_balance": "balance",
    "close": "close_match",
    "settle": "settle_match",
    "create": "create_match",
    "void": "void_match",
}
"""What the history calls the operations of a schedule, where it has another name."""


@dataclass(frozen=True)
class LoadOptions:
    """How a profile is played."""

    seed: int
    workers: int = 2
    servers: int = 2
    apis: int = 2
    rate_factor: float = 1.0
    time_factor: float = 1.0
    lag_limit_ms: float = 5.0
    trace: Path | None = None
    """Played instead of the profile's arrivals."""
    out: Path = RUNS_FOLDER
    root: Path = DEFAULT_ROOT
    base_port: int | None = None
    keep: bool = False


@dataclass
class Job:
    """A load and what it works with once its stack is there."""

    name: str
    profile: Profile
    profiles_file: Path
    options: LoadOptions
    stack: Stack
    recording: Recording
    progress: Progress
    intake: Intake
    matches: list[str] = field(default_factory=list)
    """Of all loads played so far; they are settled at the end."""
    _playing: Locusts | None = None
    _stopped: bool = False

    def play(self, name: str, seed: int, load: Drawn, more: list[str], show: Callable[[str], None]) -> Result:
        """Play one load and return what it found. Raises NotPlayed."""
        stack, options = self.stack, self.options
        apis = stack.nodes_of("api")
        address = self.intake.start()
        # Every load opens wallets of its own: each took an attempt, so this is beyond those of the load before.
        # A trace names its wallets itself.
        first_wallet = 0 if options.trace is not None else 1 + self.intake.numbers.last
        run = run_name(name, seed)
        arguments = [
            *("--load-profile", self.name, "--load-profiles", str(self.profiles_file), "--seed", str(seed)),
            *("--run-name", run, "--prepare", "--first-wallet", str(first_wallet)),
            *("--targets", ",".join(f"127.0.0.1:{stack.port(api)}" for api in apis)),
            *("--grpc-targets", ",".join(f"127.0.0.1:{stack.grpc_port(api)}" for api in apis)),
            *("--request-timeout", str(REQUEST_TIMEOUT_S), "--lag-limit-ms", str(options.lag_limit_ms)),
            *("--history-socket", address, "--history-origin", repr(self.recording.origin)),
            *more,
        ]
        locusts = Locusts(self.recording.folder, name, options.workers, arguments, stack.token())
        self.matches += load.match_ids
        began = time.monotonic()

        def tick() -> None:
            if self._stopped:
                raise NotPlayed("the run was stopped")
            show(
                f"{time.monotonic() - began:.0f} s, {self.intake.sent:,} requests, "
                f"{self.intake.acknowledged_bets:,} bets acknowledged, {self.intake.unknown_count} unknown"
            )

        self._playing = locusts
        try:
            if self._stopped:
                raise NotPlayed("the run was stopped")
            locusts.start()
            return locusts.wait(PREPARE_TIMEOUT_S + load.duration_s + END_WITHIN_S, tick)
        finally:
            locusts.kill()
            self.intake.stop(options.workers)

    def stop(self) -> None:
        """End the load that is played, if one is, and let none begin; whoever waits for it gets NotPlayed."""
        self._stopped = True
        if self._playing is not None:
            self._playing.kill()


def run_load(
    name: str, profile: Profile, profiles_file: Path, options: LoadOptions, progress: Progress
) -> tuple[Path, dict[str, Any]]:
    """Play a profile and return the run folder and its verdict.

    Raises EnvironmentProblem if it could not begin; everything later is in the verdict.
    """
    began = time.monotonic()
    load = _drawn(profile, options)
    if not len(load.schedule):
        raise EnvironmentProblem("the profile has no arrivals at these factors: raise them")
    folder = make_run_folder(options.out, options.seed)
    bets = sum(load.schedule.count_of(op) for op in ("bet", "grpc_bet"))
    settings = _settings(name, profile, options, load)
    if profiles_file.resolve() != PROFILES:
        settings["profiles_file"] = str(profiles_file.resolve())
    if options.trace is not None:
        settings["trace"] = str(options.trace.resolve())
    recording = open_recording(
        folder,
        seed=options.seed,
        rate=bets / load.duration_s,
        config=settings,
    )
    with log_to(folder / HARNESS_LOG), terminate_as_interrupt():
        spec = StackSpec(servers=options.servers, apis=options.apis, base_port=options.base_port, keep=options.keep)
        stack = start_stack(spec, options.root, recording, progress)
        try:
            with Intake(recording.recorder) as intake:
                job = Job(name, profile, profiles_file.resolve(), options, stack, recording, progress, intake)
                operations = sorted({RECORDED.get(op, op) for op in load.schedule.operations()} | {"create_match"})
                if profile.knee is not None:
                    from ledgerproof.loading.knee import sought_and_collected  # noqa: PLC0415 - it imports this module

                    knee = profile.knee
                    carry_out(recording, lambda: sought_and_collected(job, knee, operations))
                else:
                    carry_out(recording, lambda: _played_and_collected(job, load, operations))
        finally:
            take_down(stack, recording, progress, keep=options.keep)
        verdict = conclude(recording, progress, began)
    return folder, verdict


def _settings(name: str, profile: Profile, options: LoadOptions, load: Drawn) -> dict[str, Any]:
    """Return what config.json says of the load."""
    return {
        "profile": name,
        "duration_s": load.duration_s,
        "servers": options.servers,
        "apis": options.apis,
        "workers": options.workers,
        "rate_factor": options.rate_factor,
        "time_factor": options.time_factor,
        "lag_limit_ms": options.lag_limit_ms,
        "request_timeout_s": REQUEST_TIMEOUT_S,
        "wallets": profile.wallets,
        "matches": profile.matches,
        "arrivals": len(load.schedule),
        "schedule_digest": load.schedule.digest(),
    }


async def _played_and_collected(job: Job, drawn_load: Drawn, operations: list[str]) -> None:
    write_config(job.recording, job.stack.config, operations)
    options = job.options
    more = ["--rate-factor", repr(options.rate_factor), "--time-factor", repr(options.time_factor)]

    if options.trace is not None:
        more += ["--trace", str(options.trace)]

    def load(step: Step) -> Result:
        return job.play(LOAD_NAME, options.seed, drawn_load, more, step.show)

    async def play() -> None:
        with job.progress.step(f"Playing {job.name}") as step:
            result = await asyncio.to_thread(load, step)
            step.detail = f"{result.sent:,} of {result.scheduled:,} arrivals sent, lag p99 {result.lag_p99_ms:.1f} ms"
        result.write(job.recording.folder / LOAD_FILE)
        take_over(job, result)

    await play_and_collect(job, play)


def run_name(name: str, seed: int) -> str:
    """Return what begins every key of one load of this run."""
    return f"{name}-{seed}"


def _drawn(profile: Profile, options: LoadOptions) -> Drawn:
    """Draw the load as the workers will. Raises EnvironmentProblem for a trace that cannot be played."""
    try:
        return drawn(
            profile,
            seed=options.seed,
            rate_factor=options.rate_factor,
            time_factor=options.time_factor,
            rate=None,
            grpc=True,
            world=run_name(LOAD_NAME, options.seed),
            trace=options.trace,
        )
    except (ValueError, OSError) as error:
        raise EnvironmentProblem(str(error)) from error


async def play_and_collect(job: Job, play: Callable[[], Any]) -> None:
    """Let `play` load the stack, bring the service to rest, and everything that it holds home."""
    recording, stack = job.recording, job.stack
    facts = recording.facts
    wires = [Wire("127.0.0.1", stack.port(api), timeout_s=REQUEST_TIMEOUT_S) for api in stack.nodes_of("api")]
    client = Client(wires, recording.recorder, recording.clock, token=stack.token())
    scene = Scene(stack.config, recording, job.progress, client, whole(stack.config))
    sampler = _sampler(job)
    try:
        recording.timeline.phase("before")
        sampler.start()
        with timed(facts, "load_s"):
            try:
                await play()
            except NotPlayed as error:
                recording.invalid(str(error))
            finally:
                # After Ctrl-C the thread that waits for the load would wait for its end.
                job.stop()
        for problem in job.intake.problems:
            recording.invalid(problem)
        recording.timeline.phase("drain")
        client.go_on_from(job.intake.numbers.last, CLIENTS_FROM)
        client.unknown |= job.intake.unknown
        client.unknown_count += job.intake.unknown_count
        client.last_unknown_sent_s = job.intake.last_unknown_sent_s
        with timed(facts, "drain_s"):
            with job.progress.step(f"Settling {len(job.matches)} matches") as step:
                left = await _finish(job, client, recording.clock() + FINISH_TIMEOUT_S, step)
                if left:
                    recording.timeline.note(f"not settled: {', '.join(sorted(left))}")
            facts.drained = await drained(scene, DRAIN_TIMEOUT_S)
        sampler.stop()
        await collect(scene)
    finally:
        sampler.stop()
        for wire in wires:
            wire.close()


def take_over(job: Job, result: Result) -> None:
    """Put what a load found into the facts of the run."""
    recording = job.recording
    facts = recording.facts
    start_s = result.start_monotonic_s - recording.origin
    if result.start_monotonic_s:
        facts.load_start_s = start_s
        facts.load_end_s = start_s + max((phase.end_s for phase in result.phases), default=0.0)
    facts.generator = GeneratorFacts(
        lag_p99_ms=round(result.lag_p99_ms, 3),
        late=result.late,
        dropped=result.dropped,
        scheduled=result.scheduled,
        sent=result.sent,
        skipped=result.skipped,
        cpu_s=round(sum(worker.cpu_s for worker in result.workers), 2),
    )
    for phase in result.phases:
        recording.timeline.record("note", t=start_s + phase.start_s, detail=f"load phase {phase.name}")
    for reason in result.invalid:
        recording.invalid(f"load: {reason}")
    if result.missed:
        facts.parts.append("SLA_MISSED")
        facts.reasons.extend(f"limit missed: {missed}" for missed in result.missed)


def _sampler(job: Job) -> Sampler:
    """Return a sampler of every process of the service, not started yet."""
    recording = job.recording
    ports = {node.name: node.port for node in job.stack.state.nodes if node.kind == "service"}
    sampler = Sampler(recording.series, recording.clock, ports, job.stack.status)
    clock, origin_unix = recording.clock, recording.origin_unix
    sampler.watch(WALL_CLOCK_DRIFT, lambda: time.time() - origin_unix - clock())
    return sampler


async def _finish(job: Job, client: Client, deadline_s: float, step: Step) -> set[str]:
    """Close and settle every match that is left; return the ids of those still unpaid at `deadline_s`."""
    left = set(job.matches)
    tries = 0

    async def further(match_id: str) -> None:
        answer = await client.state_of(match_id)
        if answer is None:
            return
        op = ENDS.get(answer.state or "")
        if op is not None:
            path = f"/v1/matches/{match_id}/{'close' if op == 'close_match' else 'settle'}"
            body, result = (b"{}", None) if op == "close_match" else (b'{"result":"HOME"}', "HOME")
            command = Command(op, path, f"end-{match_id}-{op}-{tries}", body, match_id=match_id, selection=result)
            await client.attempt(command, tries % len(client.wires), client.clock())
        elif answer.settled or answer.state == "UNKNOWN":
            left.discard(match_id)

    while left and client.clock() < deadline_s:
        waiting = sorted(left)
        for at in range(0, len(waiting), FINISH_AT_ONCE):
            await asyncio.gather(*(further(match_id) for match_id in waiting[at : at + FINISH_AT_ONCE]))
        step.show(f"{len(left)} left")
        tries += 1
        if left:
            await asyncio.sleep(FINISH_POLL_S)
    return left
