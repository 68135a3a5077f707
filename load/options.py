"""The options of a load: Locust's command line with ours added, read in this one place.

Only the master (or a run without workers) reads them; workers are told by message.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from load.plan import WorkerPlan
from load.profiles import PROFILES, Profile, ProfileError, read_profile
from load.result import LAG_P99_MS
from load.schedule import Schedule, Stage, match_ids, phase_spans
from load.trace import TraceError
from load.traces import TraceSchedule, read_trace

_ADDRESS: Final = re.compile(r"(?:http://)?([\w.-]+):(\d{1,5})/?")


class OptionError(ValueError):
    """An option that is missing or cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Drawn:
    """All that is known of a run before it begins."""

    schedule: Schedule | TraceSchedule
    spans: list[tuple[str, float, float]]
    """(phase, start_s, end_s)."""
    match_ids: list[str]

    @property
    def duration_s(self) -> float:
        """When the last phase ends."""
        return max(end_s for _, _, end_s in self.spans)


def drawn(
    profile: Profile,
    *,
    seed: int,
    rate_factor: float,
    time_factor: float,
    rate: float | None,
    grpc: bool,
    world: str,
    trace: Path | None,
    breathe: Callable[[], None] = lambda: None,
) -> Drawn:
    """Draw a run of a profile, or read that of a trace; the same arguments give the same one in every process.

    Without gRPC its bets go over HTTP, under the name of bets. Raises ValueError (also ProfileError) if it
    cannot be drawn, or OSError. `breathe` is called now and then while a trace is read.
    """
    if trace is not None:
        try:
            traced = read_trace(trace, time_factor=time_factor, breathe=breathe)
        except TraceError as error:
            raise ValueError(str(error)) from error
        return Drawn(traced, traced.spans(), traced.match_ids(world))
    stages = stages_of(profile, rate_factor=rate_factor, time_factor=time_factor, rate=rate, grpc=grpc)
    return Drawn(profile.schedule(seed, stages), phase_spans(stages), match_ids(world, profile.matches))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the options say."""

    profile_name: str
    profile: Profile
    seed: int
    run: str
    """Empty: named by the seed and the time of the start."""
    world: str
    """Empty: the run's own."""
    targets: list[tuple[str, int]]
    grpc_targets: list[str]
    token: str
    first_wallet: int
    prepare: bool
    rate_factor: float
    time_factor: float
    rate: float | None
    trace: Path | None
    timeout_s: float
    lag_limit_ms: float
    result: Path | None
    history: Path | None
    history_socket: str
    history_origin_s: float | None

    def drawn(self, world: str, breathe: Callable[[], None] = lambda: None) -> Drawn:
        """Draw the run, calling `breathe` now and then. Raises ValueError or OSError if it cannot be drawn."""
        return drawn(
            self.profile,
            seed=self.seed,
            rate_factor=self.rate_factor,
            time_factor=self.time_factor,
            rate=self.rate,
            grpc=bool(self.grpc_targets),
            world=world,
            trace=self.trace,
            breathe=breathe,
        )

    def worker_plan(
        self, schedule: Schedule | TraceSchedule, *, index: int, count: int, run: str, **more: Any
    ) -> WorkerPlan:
        """Return what worker `index` of `count` is told of a schedule."""
        # A worker opens the wallets that the whole schedule names, its part of them.
        ranks = np.unique(schedule.wallet).tolist() if self.prepare else []
        return WorkerPlan(
            index=index,
            count=count,
            profile=self.profile_name,
            seed=self.seed,
            rate_factor=self.rate_factor,
            time_factor=self.time_factor,
            rate=self.rate,
            trace=None if self.trace is None else str(self.trace),
            digest=schedule.digest(),
            run=run,
            world=self.world or run,
            first_wallet=self.first_wallet,
            targets=self.targets,
            grpc_targets=self.grpc_targets,
            token=self.token,
            timeout_s=self.timeout_s,
            prepare=self.prepare,
            wallet_ranks=ranks[index::count],
            **more,
        )


def stages_of(
    profile: Profile, *, rate_factor: float, time_factor: float, rate: float | None, grpc: bool
) -> list[Stage]:
    """Return the stages that a run of a profile plays. Raises ValueError for a rate where there is no knee."""
    if rate is not None:
        stages = profile.at_rate(rate)
    else:
        stages = profile.drawn_stages(rate_factor=rate_factor, time_factor=time_factor)
    return stages if grpc else [_without_grpc(stage) for stage in stages]


def _without_grpc(stage: Stage) -> Stage:
    mix = dict(stage.mix)
    weight = mix.pop("grpc_bet", 0.0)
    if weight:
        mix["bet"] = mix.get("bet", 0.0) + weight
    return replace(stage, mix=mix)


def add_options(parser: Any) -> None:
    """Add our options to Locust's parser."""
    add = parser.add_argument
    add("--load-profile", default="smoke", help="Which profile of the profiles file to play")
    add("--load-profiles", default=str(PROFILES), help="The profiles file (TOML)")
    add("--seed", type=int, default=1, help="Draws the schedule; the same seed draws the same one")
    add("--run-name", default="", help="Begins every idempotency key; by default the seed and the time of the start")
    add("--world", default="", help="Names the matches and the opening of wallets, for several runs to share them")
    add("--targets", default="", help="host:port of each API process, comma-separated; by default that of --host")
    add("--grpc-targets", default="", help="host:port of each gRPC door; without it all bets go over HTTP")
    add(
        "--token",
        default="",
        env_var="LEDGERPROOF_TOKEN",
        include_in_web_ui=False,
        help="Bearer token with the scopes service and admin",
    )
    add("--first-wallet", type=int, default=500_001, help="User id of the first wallet of the load")
    add(
        "--prepare",
        action="store_true",
        help="Before the load, open the wallets with a deposit each and create the matches",
    )
    add("--rate-factor", type=float, default=1.0, help="Multiplies all rates")
    add("--time-factor", type=float, default=1.0, help="Multiplies all durations")
    add("--rate", type=float, default=0.0, help="Of a profile with a knee: the rate of this window")
    add(
        "--trace",
        default="",
        help="Play the arrivals of this CSV or Parquet file; the profile then gives the limits only",
    )
    add("--request-timeout", type=float, default=10.0, help="Seconds after which an arrival has no answer")
    add("--lag-limit-ms", type=float, default=LAG_P99_MS, help="The run is INVALID if arrivals leave later at p99")
    add("--result", default="", help="Write the result here (JSON)")
    add("--history", default="", help="Write the history of all attempts below this folder")
    add("--history-socket", default="", help="Send the records of all attempts to this Unix socket instead")
    add(
        "--until-input-ends",
        action="store_true",
        help="End when standard input does, as it does when whoever started this is gone",
    )
    add("--history-origin", type=float, default=-1.0, help="Reading of the monotonic clock that the history calls 0")


def settings_of(options: Any) -> Settings:
    """Return what the parsed options say. Raises OptionError."""
    try:
        profile = read_profile(options.load_profile, Path(options.load_profiles))
    except (ProfileError, OSError) as error:
        raise OptionError(str(error)) from error
    targets = [_address(part) for part in (options.targets or options.host or "").split(",") if part.strip()]
    if not targets:
        raise OptionError("no service to load: give --targets host:port,… or --host")
    settings = Settings(
        profile_name=options.load_profile,
        profile=profile,
        seed=options.seed,
        run=options.run_name,
        world=options.world,
        targets=targets,
        grpc_targets=[
            f"{host}:{port}"
            for host, port in (_address(part) for part in options.grpc_targets.split(",") if part.strip())
        ],
        token=options.token,
        first_wallet=options.first_wallet,
        prepare=bool(options.prepare),
        rate_factor=options.rate_factor,
        time_factor=options.time_factor,
        rate=options.rate or None,
        trace=Path(options.trace).resolve() if options.trace else None,
        timeout_s=options.request_timeout,
        lag_limit_ms=options.lag_limit_ms,
        result=Path(options.result) if options.result else None,
        history=Path(options.history) if options.history else None,
        history_socket=options.history_socket,
        history_origin_s=options.history_origin if options.history_origin >= 0 else None,
    )
    if settings.timeout_s <= 0 or settings.rate_factor <= 0 or settings.time_factor <= 0 or settings.first_wallet < 0:
        raise OptionError("--request-timeout, --rate-factor and --time-factor are above zero, --first-wallet not below")
    if settings.trace is not None and (settings.rate_factor != 1 or settings.rate is not None):
        raise OptionError("a trace has its own rates: leave out --rate-factor and --rate; --time-factor stretches it")
    if settings.rate is not None and profile.knee is None:
        raise OptionError(f"--rate is for profiles with a knee, and {options.load_profile!r} has none")
    return settings


def _address(text: str) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"not an address: {text.strip()!r}; it is host:port")
    return match[1], int(match[2])
