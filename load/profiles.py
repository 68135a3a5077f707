"""Load profiles: what a run does, read from TOML and refused with the name of the profile if a key is wrong."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from load.result import Cell, Result
from load.schedule import OPERATIONS, Schedule, Stage, draw

PROFILES: Final = Path(__file__).with_name("profiles.toml")


class ProfileError(ValueError):
    """A profile that does not exist or cannot be used; the message names it and the key."""


class StageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stage as the file gives it: a rate, or the users and their think time that make it."""

    phase: str
    duration_s: float
    mix: dict[str, float]
    rate: float | tuple[float, float] | None = None
    """Arrivals per second, or the rates at its two ends."""
    users: int | None = None
    think_time_s: float | None = None
    """`users` people who each do something every `think_time_s` seconds: together users / think_time_s arrivals per
    second, as long as answers take much less than the think time. The sum of many such is nearly a Poisson process."""
    settle_share: float = 0.0

    def rates(self) -> tuple[float, float]:
        """Return the rates at the start and at the end of the stage. Raises ValueError if they are not given once."""
        if self.rate is not None and self.users is None and self.think_time_s is None:
            return self.rate if isinstance(self.rate, tuple) else (self.rate, self.rate)
        if self.rate is None and self.users is not None and self.think_time_s is not None and self.think_time_s > 0:
            return (self.users / self.think_time_s,) * 2
        raise ValueError("a stage has either a rate, or users and a think_time_s above zero")


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the arrivals of an operation in a phase must keep."""

    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    error_share: float | None = None
    """Arrivals without a success or a refusal by rule, as a share."""

    def missed(self, cell: Cell) -> list[str]:
        """Return one sentence for each limit that a cell does not keep, or that too few samples leave open."""
        where = f"{cell.op} in {cell.phase}"
        found = []
        for percent, limit in ((50.0, self.p50_ms), (95.0, self.p95_ms), (99.0, self.p99_ms)):
            if limit is None:
                continue
            estimate = cell.percentile(percent)
            if estimate.refused is not None:
                found.append(f"{where}: {estimate.refused}")
            elif estimate.ms is None or estimate.ms > limit:
                found.append(f"{where}: p{percent:g} is {estimate.text()} ms, the limit is {limit:g} ms")
        if self.error_share is not None and cell.error_share > self.error_share:
            found.append(f"{where}: {cell.error_share:.3%} errors, the limit is {self.error_share:.3%}")
        return found


class Knee(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the knee is sought: windows at rates between two bounds."""

    low_rate: float
    high_rate: float
    """The knee must lie between the two: a peak that data do not bracket is not told."""
    window_s: float
    tolerance: float
    """The search ends when the bounds differ by this share."""
    p99_ms: float
    """A window beyond this p99 is above the knee."""
    error_share: float = 0.01
    """So is one with more errors than this."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A load."""

    about: str
    wallets: int
    matches: int
    stages: list[StageSpec]
    hot_share: float = 0.0
    """Share of the wallet operations that name the first wallet."""
    limits: dict[str, dict[str, Limit]] = {}
    """Limits by phase and operation; the operation `all` is their sum."""
    knee: Knee | None = None

    def drawn_stages(self, *, rate_factor: float = 1.0, time_factor: float = 1.0) -> list[Stage]:
        """Return the stages with rates and durations multiplied."""
        stages = []
        for spec in self.stages:
            rate_from, rate_to = spec.rates()
            stages.append(
                Stage(
                    spec.phase,
                    spec.duration_s * time_factor,
                    rate_from * rate_factor,
                    rate_to * rate_factor,
                    spec.mix,
                    spec.settle_share,
                )
            )
        return stages

    def at_rate(self, rate: float) -> list[Stage]:
        """Return the stages of one window of the search for the knee. Raises ValueError if the profile has none."""
        if self.knee is None:
            raise ValueError("only a profile with a knee is played at a rate of choice")
        window_s = self.knee.window_s
        return [replace(stage, duration_s=window_s, rate_from=rate, rate_to=rate) for stage in self.drawn_stages()[:1]]

    def schedule(self, seed: int, stages: list[Stage]) -> Schedule:
        """Draw the arrivals of stages of this profile."""
        return draw(seed, stages, wallets=self.wallets, matches=self.matches, hot_share=self.hot_share)

    def missed(self, result: Result) -> list[str]:
        """Return one sentence for every limit that a result does not keep."""
        found = []
        for phase, limits in self.limits.items():
            for op, limit in limits.items():
                cell = result.total(phase=phase) if op == "all" else result.cell(op, phase)
                found += [f"{op} in {phase}: none was due"] if cell is None else limit.missed(cell)
        return found


def read_profiles(path: Path = PROFILES) -> dict[str, Profile]:
    """Read all profiles of a file. Raises ProfileError naming the profile and the key, or OSError."""
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{path}: {error}") from error
    return {name: _profile(name, table) for name, table in tables.items()}


def read_profile(name: str, path: Path = PROFILES) -> Profile:
    """Read one profile. Raises ProfileError, also if there is none of that name, or OSError."""
    profiles = read_profiles(path)
    if name not in profiles:
        raise ProfileError(f"no profile {name!r} in {path.name}; there are {', '.join(profiles)}")
    return profiles[name]


def _profile(name: str, table: object) -> Profile:
    try:
        profile = msgspec.convert(table, Profile)
    except msgspec.ValidationError as error:
        raise ProfileError(f"profile {name!r}: {error}") from error
    if not profile.stages or profile.wallets < 1 or profile.matches < 1:
        raise ProfileError(f"profile {name!r}: it needs stages, wallets and matches")
    if not 0 <= profile.hot_share <= 1:
        raise ProfileError(f"profile {name!r}: hot_share is a share from 0 to 1")
    for number, stage in enumerate(profile.stages):
        where = f"profile {name!r}, stage {number} ({stage.phase})"
        try:
            rates = stage.rates()
        except ValueError as error:
            raise ProfileError(f"{where}: {error}") from error
        if stage.duration_s <= 0 or min(rates) < 0 or not 0 <= stage.settle_share <= 1:
            raise ProfileError(f"{where}: duration_s is above zero, rates are not negative, settle_share is a share")
        unknown = sorted(set(stage.mix) - set(OPERATIONS))
        if unknown:
            raise ProfileError(f"{where}: mix: no operation {unknown[0]!r}; there are {', '.join(OPERATIONS)}")
        if not stage.mix or min(stage.mix.values()) < 0 or sum(stage.mix.values()) <= 0:
            raise ProfileError(f"{where}: mix: weights are not negative and their sum is above zero")
    phases = {stage.phase for stage in profile.stages}
    for phase in profile.limits:
        if phase not in phases:
            raise ProfileError(f"profile {name!r}: limits.{phase}: no stage has this phase")
    return profile
