"""The search for the knee: the highest rate that meets the profile's p99, bracketed by one that does not.

Windows at one rate each are played on one stack, up from the lower bound and then between the highest that held and
the lowest that did not; at the end the whole history is judged, for a rate that breaks the ledger is no rate.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Any, Final

import msgspec

from invariants.files import publish
from ledgerproof.collect import NotDrained, drain
from ledgerproof.loading.compare import KNEE_FILE, LOAD_FILE
from ledgerproof.loading.run import Job, play_and_collect, run_name, take_over
from ledgerproof.progress import Step
from ledgerproof.recording import write_config
from load.options import drawn
from load.profiles import Knee
from load.result import LAG_P99_MS, Result

UP: Final = 1.5
"""Factor from a rate that held to the next, until one fails."""
WINDOWS_MAX: Final = 16
REST_WITHIN_S: Final = 60.0
"""Between two windows the service has this long to finish its work; the next window shows it if it has not."""
AGAIN: Final = 2
"""A window whose generator was late says nothing; it is played so often at most."""


class Window(msgspec.Struct, frozen=True):
    """One window of the search."""

    rate: float
    held: bool | None
    """None: the window proves nothing."""
    why: str
    p99_ms: float | None
    low_ms: float | None
    high_ms: float | None
    lag_p99_ms: float


class Found(msgspec.Struct):
    """What the search found: the knee lies between `holds` and `fails`."""

    p99_ms: float
    """The limit."""
    windows: list[Window] = []
    holds: float | None = None
    """Highest rate that held, arrivals per second; None: not even the lowest did."""
    fails: float | None = None
    """Lowest rate that did not; None: none was found up to the upper bound, so there is no knee to tell."""
    unproven: float | None = None
    """Lowest rate at which the generator itself failed. The search stayed below; it is no bound of the service."""

    @property
    def knee(self) -> float | None:
        """The middle of the bracket on the scale of ratios; None without a bracket."""
        return None if self.holds is None or self.fails is None else math.sqrt(self.holds * self.fails)

    @property
    def text(self) -> str:
        """What was found, in words."""
        if self.knee is not None:
            return f"the knee is at {self.knee:,.0f}/s: {self.holds:,.0f}/s holds, {self.fails:,.0f}/s does not"
        if self.unproven is not None and self.holds is not None:
            return (
                f"{self.holds:,.0f}/s held, and at {self.unproven:,.0f}/s the generator did not keep its schedule: the "
                "knee of the service lies higher"
            )
        if self.holds is None:
            return "not even the lowest rate held: there is no knee between the bounds"
        return f"{self.holds:,.0f}/s held and no higher rate failed: the bounds do not bracket the knee"


def search(knee: Knee, attempt: Callable[[float, int], Window]) -> Found:
    """Search between the bounds of a profile; `attempt(rate, number)` plays one window."""
    found = Found(knee.p99_ms)
    rate = knee.low_rate
    while len(found.windows) < WINDOWS_MAX:
        window = _proven(attempt, rate, found)
        if window.held:
            found.holds = rate
            if rate >= knee.high_rate:
                return found
        elif window.held is None:
            found.unproven = rate
        else:
            found.fails = rate
        if found.holds is None:
            return found
        above = min((bound for bound in (found.fails, found.unproven) if bound is not None), default=None)
        if above is None:
            rate = min(knee.high_rate, rate * UP)
        elif above / found.holds <= 1 + knee.tolerance:
            return found
        else:
            rate = math.sqrt(found.holds * above)
    return found


def _proven(attempt: Callable[[float, int], Window], rate: float, found: Found) -> Window:
    for _ in range(AGAIN):
        window = attempt(rate, len(found.windows))
        found.windows.append(window)
        if window.held is not None:
            break
    return window


def judged(rate: float, knee: Knee, result: Result, lag_limit_ms: float = LAG_P99_MS) -> Window:
    """Return whether a window held its rate."""
    total = result.total()
    estimate = total.percentile(99.0)
    held: bool | None
    if result.dropped and result.lag_p99_ms <= lag_limit_ms:
        # The generator was in time: the service let more requests wait than anyone would hold open.
        held, why = False, f"{result.dropped:,} arrivals were dropped, so many requests waited for an answer"
    elif result.invalid:
        held, why = None, "; ".join(result.invalid)
    elif estimate.refused is not None:
        held, why = None, estimate.refused
    elif estimate.ms is None or estimate.ms > knee.p99_ms:
        held, why = False, f"p99 is {estimate.text()} ms, the limit is {knee.p99_ms:g} ms"
    elif total.error_share > knee.error_share:
        held, why = False, f"{total.error_share:.2%} errors, the limit is {knee.error_share:.2%}"
    else:
        held, why = True, f"p99 is {estimate.text()} ms"
    return Window(rate, held, why, estimate.ms, estimate.low_ms, estimate.high_ms, result.lag_p99_ms)


async def sought_and_collected(job: Job, knee: Knee, operations: list[str]) -> None:
    """Search, write knee.json, and bring everything home. A search without a bracket is INVALID."""
    recording = job.recording
    # Some windows are meant to be too much for the service.
    recording.facts.search = True
    write_config(recording, job.stack.config, operations)

    def attempt(rate: float, number: int, step: Step) -> Window:
        # Matches and keys are drawn from the seed, so every window has its own.
        seed = job.options.seed * 1000 + number
        name = f"window{number:02}"
        load = drawn(
            job.profile,
            seed=seed,
            rate_factor=1.0,
            time_factor=1.0,
            rate=rate,
            grpc=True,
            world=run_name(name, seed),
            trace=None,
        )
        result = job.play(name, seed, load, ["--rate", repr(rate)], step.show)
        result.write(recording.folder / LOAD_FILE)
        kept.append(result)
        return judged(rate, knee, result, job.options.lag_limit_ms)

    kept: list[Result] = []

    async def play() -> None:
        def one(rate: float, number: int) -> Window:
            if number:
                # What the window before left behind is not this one's to bear.
                with contextlib.suppress(NotDrained), job.progress.step("Draining what the window left") as step:
                    asyncio.run(drain(job.stack.config, REST_WITHIN_S, step.show))
            with job.progress.step(f"Window {number}: {rate:,.0f}/s for {knee.window_s:g} s") as step:
                window = attempt(rate, number, step)
                said = {True: "held", False: "did not hold", None: "proves nothing"}[window.held]
                step.detail = f"{said}: {window.why}"
            return window

        try:
            found = await asyncio.to_thread(search, knee, one)
        finally:
            if kept:
                _span(job, kept)
        write(job, found)
        recording.facts.config["knee"] = msgspec.to_builtins(found) | {"knee": found.knee, "text": found.text}
        if found.knee is None:
            recording.invalid(found.text)

    await play_and_collect(job, play)


def _span(job: Job, results: list[Result]) -> None:
    """Let the load be from the first window to the last; that windows beyond the knee are slow is no fault."""
    recording, facts = job.recording, job.recording.facts
    before = (list(facts.parts), list(facts.reasons))
    for result in results:
        first_s = facts.load_start_s
        take_over(job, result)
        if first_s is not None:
            facts.load_start_s = first_s
    facts.parts, facts.reasons = before
    recording.timeline.note(f"{len(results)} windows were played")


def write(job: Job, found: Found) -> None:
    """Write knee.json. Raises OSError."""
    path = job.recording.folder / KNEE_FILE
    temporary = path.with_name(path.name + ".tmp")
    told: dict[str, Any] = msgspec.to_builtins(found) | {"knee": found.knee, "text": found.text}
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")
    publish(temporary, path)
