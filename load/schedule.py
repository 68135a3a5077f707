"""When every arrival of a load is due and what it does: drawn from a seed before the load begins.

The schedule never looks at an answer, so a slow service meets the same arrivals as a fast one. It does not depend on
how many workers play it: worker k of n plays the arrivals i with i % n == k. Everything is drawn from one stream per
purpose, so that a change of the operations leaves the times as they were.

Units: times are seconds since the start of the load, rates are arrivals per second, amounts are minor units, odds
are hundredths.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from reference.commands import DEFAULT_OUTCOMES, MIN_ODDS

OPERATIONS: Final = ("bet", "grpc_bet", "deposit", "withdraw", "balance", "strong_balance", "entries", "cancel")
"""What an arrival drawn by weight may do; the column `op` holds the place in this list or in MATCH_OPERATIONS."""
MATCH_OPERATIONS: Final = ("close", "settle")
"""What `Stage.settle_share` adds: matches that end within a stage."""
ALL_OPERATIONS: Final = (*OPERATIONS, *MATCH_OPERATIONS)
POPULARITY_EXPONENT: Final = 0.8
"""The wallet of rank r is drawn with weight r^-0.8, as in the main job's own workload."""
CLOSE_BEFORE_SETTLE_S: Final = 0.5
"""A match is closed this long before it is settled, so that a slow close is not an illegal settle."""
SETTLE_WITHIN: Final = 0.5
"""Matches that end in a stage do so within this first part of it, so that their payouts fall into it too."""
ROWS_A_CHUNK: Final = 4096
"""Rows turned into Python values at a time."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of the load: a rate that is constant or moves in a straight line, and a mix of operations."""

    phase: str
    """What the results of this stage are counted under; several stages may share one."""
    duration_s: float
    rate_from: float
    rate_to: float
    mix: Mapping[str, float]
    """Weight of each operation; they need not sum to one."""
    settle_share: float = 0.0
    """Share of all matches that are closed and settled in this stage, beside the arrivals of the mix."""


@dataclass(frozen=True, slots=True)
class Traced:
    """What a trace says of an arrival and a drawn one does not have."""

    key: str | None
    """The key as it was recorded; the run's name is put before it."""
    bet: str | None
    """Of a cancel: the recorded key of the bet."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One arrival, in Python values."""

    number: int
    """Place in the whole schedule, whoever plays it; names the arrival's key."""
    due_s: float
    op: str
    phase: str
    wallet: int
    """Rank of the wallet, 0 first."""
    match: int
    selection: str
    side: str
    odds: int
    amount_minor: int
    target: int
    """A number that chooses among several things known only while the load runs: API process, bet to cancel."""
    traced: Traced | None = None


@dataclass(frozen=True)
class Schedule:
    """All arrivals, or one worker's share of them, by time; row i of every column is one arrival."""

    phases: tuple[str, ...]
    number: NDArray[np.int64]
    t: Floats
    phase: NDArray[np.int8]
    op: NDArray[np.int8]
    wallet: NDArray[np.int64]
    match: NDArray[np.int32]
    selection: NDArray[np.int8]
    side: NDArray[np.int8]
    odds: NDArray[np.int32]
    amount: NDArray[np.int64]
    target: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.t)

    def share(self, index: int, count: int) -> "Schedule":
        """Return what worker `index` (from 0) of `count` plays. Raises ValueError if there is no such worker."""
        if not 0 <= index < count:
            raise ValueError(f"there is no worker {index} of {count}")
        return self._of(lambda column: column[index::count])

    def of_operations(self, ops: Sequence[str]) -> "Schedule":
        """Return only the arrivals of these operations."""
        wanted = np.isin(self.op, [ALL_OPERATIONS.index(op) for op in ops])
        return self._of(lambda column: column[wanted])

    def _of(self, choose: Any) -> "Schedule":
        columns = {name: choose(getattr(self, name)) for name in _COLUMNS}
        return Schedule(phases=self.phases, **columns)

    def digest(self) -> str:
        """Return a hash of everything drawn: equal digests mean equal schedules."""
        digest = hashlib.sha256(repr(self.phases).encode())
        for name in _COLUMNS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return digest.hexdigest()

    def count_of(self, op: str) -> int:
        """Return how many arrivals do this operation."""
        return int((self.op == ALL_OPERATIONS.index(op)).sum())

    def operations(self) -> set[str]:
        """Return what the arrivals do."""
        return {ALL_OPERATIONS[place] for place in np.unique(self.op)}

    def arrivals(self) -> Iterator[Arrival]:
        """Yield the arrivals by time; only a chunk of them is held as Python values at any moment."""
        sides = ("BACK", "LAY")
        for start in range(0, len(self), ROWS_A_CHUNK):
            chunk = slice(start, start + ROWS_A_CHUNK)
            columns = [getattr(self, name)[chunk].tolist() for name in _COLUMNS]
            for number, t, phase, op, wallet, match, selection, side, odds, amount, target in zip(
                *columns, strict=True
            ):
                yield Arrival(
                    number,
                    t,
                    ALL_OPERATIONS[op],
                    self.phases[phase],
                    wallet,
                    match,
                    DEFAULT_OUTCOMES[selection],
                    sides[side],
                    odds,
                    amount,
                    target,
                )


_COLUMNS: Final = ("number", "t", "phase", "op", "wallet", "match", "selection", "side", "odds", "amount", "target")


def arrival_times(rng: np.random.Generator, duration_s: float, rate_from: float, rate_to: float) -> Floats:
    """Return the times, ascending and below `duration_s`, of a Poisson process whose rate moves in a straight line.

    Given their number, the arrivals are independent with the density of the rate, which is how they are drawn.
    Raises ValueError if the duration is not positive, or a rate is negative or not a number.
    """
    if not (duration_s > 0 and rate_from >= 0 and rate_to >= 0 and np.isfinite(duration_s + rate_from + rate_to)):
        raise ValueError(f"no such stage: {duration_s:g} s from {rate_from:g}/s to {rate_to:g}/s")
    u = rng.random(int(rng.poisson(duration_s * (rate_from + rate_to) / 2)))
    if rate_from == rate_to:
        return np.sort(u) * duration_s
    # The inverse of the share of arrivals expected by t, a quadratic.
    root = np.sqrt(rate_from**2 + u * (rate_to**2 - rate_from**2))
    return np.sort(np.asarray((root - rate_from) / (rate_to - rate_from) * duration_s))


def expected_before(stage: Stage, t: Floats) -> Floats:
    """Return how many arrivals of a stage are expected before each time since the stage's start."""
    slope = (stage.rate_to - stage.rate_from) / stage.duration_s
    return np.asarray(stage.rate_from * t + slope * t**2 / 2)


def draw(seed: int, stages: Sequence[Stage], *, wallets: int, matches: int, hot_share: float = 0.0) -> Schedule:
    """Draw the arrivals of some stages, one after another.

    `hot_share` of the wallet operations name the first wallet; the rest fall on all by popularity.
    Raises ValueError for a stage that cannot be drawn, an unknown operation, or no wallet or match.
    """
    times_seed, _, settle_seed = np.random.SeedSequence(seed).spawn(3)
    streams = [np.random.Generator(np.random.PCG64(child)) for child in times_seed.spawn(len(stages))]
    times: list[Floats] = []
    start_s = 0.0
    for stage, rng in zip(stages, streams, strict=True):
        times.append(arrival_times(rng, stage.duration_s, stage.rate_from, stage.rate_to) + start_s)
        start_s += stage.duration_s
    drawn = _of_times(seed, stages, times, wallets=wallets, matches=matches, hot_share=hot_share)
    rng = np.random.Generator(np.random.PCG64(settle_seed))
    return _with_settles(rng, drawn, stages, matches)


def from_times(
    seed: int,
    times: Floats,
    mix: Mapping[str, float],
    *,
    phase: str = "trace",
    wallets: int = 1,
    matches: int = 1,
    hot_share: float = 0.0,
) -> Schedule:
    """Return a schedule of given times, in seconds and ascending; what each arrival does is drawn from the seed.

    Raises ValueError if the times are not ascending or begin before zero.
    """
    if len(times) and (times[0] < 0 or bool((np.diff(times) < 0).any())):
        raise ValueError("the times of a schedule ascend from zero")
    end_s = float(times[-1]) if len(times) else 0.0
    stage = Stage(phase, end_s, 0.0, 0.0, mix)
    return _of_times(seed, [stage], [times], wallets=wallets, matches=matches, hot_share=hot_share)


def _of_times(
    seed: int,
    stages: Sequence[Stage],
    times: Sequence[Floats],
    *,
    wallets: int,
    matches: int,
    hot_share: float,
) -> Schedule:
    if wallets < 1 or matches < 1 or not 0 <= hot_share <= 1:
        raise ValueError("at least one wallet and one match are needed, and a hot share from 0 to 1")
    detail_seed = np.random.SeedSequence(seed).spawn(3)[1]
    op_seed, wallet_seed, bet_seed = detail_seed.spawn(3)
    op_rng, rng, bet_rng = (np.random.Generator(np.random.PCG64(child)) for child in (op_seed, wallet_seed, bet_seed))
    phases = tuple(dict.fromkeys(stage.phase for stage in stages))
    op_parts = [_draw_operations(op_rng, stage.mix, len(part)) for stage, part in zip(stages, times, strict=True)]
    phase_parts = [np.full(len(part), phases.index(s.phase), np.int8) for s, part in zip(stages, times, strict=True)]
    t = np.concatenate(times) if times else np.empty(0)
    count = len(t)
    weights = np.arange(1, wallets + 1, dtype=np.float64) ** -POPULARITY_EXPONENT
    wallet = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(count), side="right")
    wallet = np.minimum(wallet, wallets - 1)
    wallet[rng.random(count) < hot_share] = 0
    mids = bet_rng.integers(150, 500, size=(matches, len(DEFAULT_OUTCOMES)))
    match = bet_rng.integers(0, matches, size=count).astype(np.int32)
    selection = bet_rng.integers(0, len(DEFAULT_OUTCOMES), size=count).astype(np.int8)
    # Both sides are placed around one price, so that a good part of the bets find a counterpart.
    spread = np.round((mids[match, selection] - 100) * (1 + bet_rng.normal(0.0, 0.04, size=count)))
    amount = np.round(np.exp(bet_rng.normal(np.log(600.0), 0.7, size=count)), -1)
    return Schedule(
        phases=phases,
        number=np.arange(count, dtype=np.int64),
        t=t,
        phase=np.concatenate(phase_parts) if phase_parts else np.empty(0, np.int8),
        op=np.concatenate(op_parts) if op_parts else np.empty(0, np.int8),
        wallet=wallet.astype(np.int64),
        match=match,
        selection=selection,
        side=bet_rng.integers(0, 2, size=count).astype(np.int8),
        odds=np.maximum(100 + spread, MIN_ODDS).astype(np.int32),
        amount=np.clip(amount, 50, 20_000).astype(np.int64),
        target=bet_rng.integers(0, 2**31 - 1, size=count).astype(np.int32),
    )


def _draw_operations(rng: np.random.Generator, mix: Mapping[str, float], count: int) -> NDArray[np.int8]:
    unknown = sorted(set(mix) - set(OPERATIONS))
    if unknown:
        raise ValueError(f"no such operation: {', '.join(unknown)}; there are {', '.join(OPERATIONS)}")
    weights = np.array([mix.get(op, 0.0) for op in OPERATIONS])
    if bool((weights < 0).any()) or not weights.sum() > 0:
        raise ValueError("the weights of a mix are not negative and their sum is above zero")
    return np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(count), side="right").astype(np.int8)


def _with_settles(rng: np.random.Generator, drawn: Schedule, stages: Sequence[Stage], matches: int) -> Schedule:
    """Add the closing and settling of matches; each match ends once at most."""
    left = rng.permutation(matches)
    start_s = 0.0
    rows: list[tuple[float, int, int, int]] = []
    for stage in stages:
        ending, left = np.split(left, [min(len(left), round(stage.settle_share * matches))])
        for match in ending.tolist():
            settles_s = start_s + float(rng.random()) * stage.duration_s * SETTLE_WITHIN
            phase = drawn.phases.index(stage.phase)
            rows.append((max(settles_s - CLOSE_BEFORE_SETTLE_S, 0.0), ALL_OPERATIONS.index("close"), match, phase))
            rows.append((settles_s + 0.001, ALL_OPERATIONS.index("settle"), match, phase))
        start_s += stage.duration_s
    if not rows:
        return drawn
    added = dict(
        zip(("t", "op", "match", "phase"), (np.array(column) for column in zip(*rows, strict=True)), strict=True)
    )
    # The result is the match's own, whichever arrival tells it.
    added["selection"] = added["match"] % len(DEFAULT_OUTCOMES)
    count = len(rows)
    columns = {
        name: np.concatenate([column, np.asarray(added.get(name, np.zeros(count)), dtype=column.dtype)])
        for name in _COLUMNS
        for column in [getattr(drawn, name)]
    }
    order = np.argsort(columns["t"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    columns["number"] = np.arange(len(order), dtype=np.int64)
    return Schedule(phases=drawn.phases, **columns)


def phase_spans(stages: Sequence[Stage]) -> list[tuple[str, float, float]]:
    """Return (phase, start_s, end_s) of each stage in turn; neighbours of one phase are one span."""
    spans: list[tuple[str, float, float]] = []
    start_s = 0.0
    for stage in stages:
        end_s = start_s + stage.duration_s
        if spans and spans[-1][0] == stage.phase:
            spans[-1] = (stage.phase, spans[-1][1], end_s)
        else:
            spans.append((stage.phase, start_s, end_s))
        start_s = end_s
    return spans


def match_ids(world: str, matches: int) -> list[str]:
    """Return the ids of the matches of a world, the same for the same name."""
    digests = (hashlib.blake2b(f"{world}/{match}".encode(), digest_size=16).digest() for match in range(matches))
    return [str(UUID(bytes=digest, version=4)) for digest in digests]
