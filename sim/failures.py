"""How long the seed's failures last and what they lose: simulated timelines, and the lag of the copy in another region.

A scenario is a row of steps, one after the other, each drawn anew in each replication: something is noticed, restarted,
promoted, drained. Its recovery time (RTO) is their sum. What dominates is the step with the largest mean.
Times are seconds; arrays have one element a replication.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from sim.draws import Floats, lognormal, slow_factor
from sim.streams import stream

FAILURES_TOML: Final = Path(__file__).with_name("failures.toml")
REPLICATIONS_MAX: Final = 100_000
LAG_STEPS_MAX: Final = 2_000_000
PERCENTILES: Final = (50.0, 95.0, 99.0)
MB: Final = 1e6

Random = np.random.Generator
Positive = Annotated[float, Meta(gt=0, le=1e12)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Part = Annotated[float, Meta(ge=0, lt=1)]


class Draw(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One time or share that is drawn: fixed, even between two values, or lognormal by median and 95 % value."""

    source: Literal["seed", "measured", "public", "chosen"]
    note: str = ""
    fixed: Seconds | None = None
    between: tuple[Seconds, Seconds] | None = None
    median: Positive | None = None
    p95: Positive | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless exactly one of the three forms is given, and in order."""
        forms = [self.fixed is not None, self.between is not None, self.median is not None and self.p95 is not None]
        if sum(forms) != 1 or (self.median is None) != (self.p95 is None):
            raise ValueError("fixed, between, or median with p95: give one of the three")
        if self.between is not None and self.between[1] < self.between[0]:
            raise ValueError("between must name the smaller value first")
        if self.median is not None and self.p95 is not None and self.p95 < self.median:
            raise ValueError("p95 must not be below median")

    def draw(self, random: Random, number: int) -> Floats:
        """Return so many draws."""
        if self.between is not None:
            return random.uniform(*self.between, number)
        if self.median is not None and self.p95 is not None:
            return lognormal(random, number, self.median, self.p95)
        return np.full(number, self.fixed or 0.0)


class ApiCrash(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pod of the API ends, or hangs."""

    promise_s: Positive
    exit_seen: Draw
    probe_period_s: Positive
    probe_failures: Annotated[int, Meta(ge=1, le=100)]
    grace_s: Seconds
    back_off: Draw
    start: Draw
    readiness_period_s: Positive


class WorkerCrash(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A consumer ends without leaving its group."""

    promise_s: Positive
    session_s: Positive
    heartbeat_s: Positive
    rebalance: Draw
    members: Annotated[int, Meta(ge=2, le=10_000)]
    utilisation: Draw

    def __post_init__(self) -> None:
        """Raise ValueError if a member is taken for dead between two heartbeats."""
        if self.heartbeat_s >= self.session_s:
            raise ValueError("heartbeat_s must be below session_s")


class DatabaseCrash(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The primary of one server ends; Patroni promotes its standby."""

    promise_s: Positive
    ttl_s: Positive
    loop_wait_s: Positive
    promotion: Draw
    reconnect: Draw
    utilisation: Draw
    retried_share: Annotated[float, Meta(ge=0, le=1)]
    async_lag: Draw

    def __post_init__(self) -> None:
        """Raise ValueError if the key of the leader would expire between two of its own renewals."""
        if self.loop_wait_s >= self.ttl_s:
            raise ValueError("loop_wait_s must be below ttl_s")


class RegionDown(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The region is given up and the standby region takes over."""

    promise_s: Positive
    probe_period_s: Positive
    probe_failures: Annotated[int, Meta(ge=1, le=100)]
    decide: Draw
    promote: Draw
    servers: Annotated[int, Meta(ge=1, le=1000)]
    pods: Draw
    dns: Draw
    events_per_s: Positive
    archive_every_s: Positive
    replay_per_s: Positive
    replay_workers: Annotated[int, Meta(ge=1, le=10_000)]


class Corruption(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Entries of one server are wrong; it goes back to a moment before."""

    promise_s: Positive
    found_every_s: Positive
    seed_found_every_s: Positive
    judge: Draw
    data_gb: Positive
    fetch_mb_per_s: Positive
    backup_every_s: Positive
    mean_share: Annotated[float, Meta(gt=0, le=1)]
    """Mean log rate of a day as a share of that at the peak."""
    wal_replay_mb_per_s: Positive
    start: Draw
    reconcile_rows_per_s: Positive
    rows: Positive


class RegionLag(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The asynchronous copy of one server in another region."""

    bets_per_s: Positive
    wal_bytes_per_bet: Positive
    full_pages_mb: Annotated[float, Meta(ge=0)]
    checkpoint_s: Positive
    full_pages_s: Positive
    noise: Part
    noise_s: Positive
    link_mbit_per_s: Positive
    window_mb: Positive
    rtt_ms: Positive
    outages_per_day: Annotated[float, Meta(ge=0, le=1000)]
    outage: Draw
    days: Annotated[int, Meta(ge=1, le=20)]
    promise_rpo_s: Positive

    @property
    def link_bytes_per_s(self) -> float:
        """What one stream carries: the link's rate, or a window in each round trip, whichever is less."""
        return min(self.link_mbit_per_s * MB / 8, self.window_mb * MB / (self.rtt_ms / 1000))


class Failures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    seed: Annotated[int, Meta(ge=0)]
    replications: Annotated[int, Meta(ge=100, le=REPLICATIONS_MAX)]
    api: ApiCrash
    worker: WorkerCrash
    database: DatabaseCrash
    region: RegionDown
    corruption: Corruption
    lag: RegionLag


@dataclass(frozen=True, slots=True)
class Timeline:
    """What one scenario drew: its steps in their order, and what is lost."""

    name: str
    steps: dict[str, Floats]
    """Seconds of each step, by replication."""
    lost_s: Floats
    """RPO: the last seconds before the failure whose acknowledged commands are gone."""
    promise_s: float

    @property
    def total_s(self) -> Floats:
        """RTO by replication."""
        return np.asarray(np.sum(list(self.steps.values()), axis=0))


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a scenario comes to."""

    name: str
    promise_s: float
    rto_s: dict[str, float]
    """Percentiles by name: p50, p95, p99."""
    mean_s: float
    rpo_s: dict[str, float]
    kept_share: float
    """Share of the replications within the promise."""
    holds: bool
    """Whether 99 of 100 are."""
    steps: dict[str, float]
    """Mean seconds of each step."""
    dominates: str


@dataclass(frozen=True, slots=True)
class LagFound:
    """Lag of the copy in the other region, over the simulated days."""

    wal_mb_per_s: float
    link_mb_per_s: float
    utilisation: float
    lag_s: dict[str, float]
    """Percentiles by name (p50, p95, p99, p99.9), and `max`."""
    within_promise: float
    """Share of the moments at which a lost region would lose less than the promise."""


KEPT_SHARE: Final = 0.99


def percentiles(values: Floats) -> dict[str, float]:
    """Return p50, p95 and p99 of an array."""
    return {
        f"p{rank:g}": float(value) for rank, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }


def api_crash(table: ApiCrash, random: Random, number: int) -> Timeline:
    """Return the timeline of a process that ends: seen by the kubelet, restarted, ready at its next probe.

    The other pods answer meanwhile.
    """
    steps = {
        "noticed": table.exit_seen.draw(random, number),
        "back-off": table.back_off.draw(random, number),
        "start": table.start.draw(random, number),
        "readiness probe": random.uniform(0, table.readiness_period_s, number),
    }
    return Timeline("API crash", steps, np.zeros(number), table.promise_s)


def api_hang(table: ApiCrash, random: Random, number: int) -> Timeline:
    """Return the timeline of a process that hangs: some probes must fail, then it uses up the grace of its end."""
    first = random.uniform(0, table.probe_period_s, number)
    steps = {
        "noticed": first + (table.probe_failures - 1) * table.probe_period_s,
        "grace": np.full(number, table.grace_s),
        "start": table.start.draw(random, number),
        "readiness probe": random.uniform(0, table.readiness_period_s, number),
    }
    return Timeline("API hang", steps, np.zeros(number), table.promise_s)


def worker_crash(table: WorkerCrash, random: Random, number: int) -> Timeline:
    """Return the timeline of a consumer that ends: its session runs out, the group rebalances, the others drain.

    Its partitions gather λ/m of the events for the time T of both; then m − 1 members have the surplus μ(m−1) − λ. With
    the utilisation ρ = λ/(mμ) that takes T·ρ/(m − 1 − ρm). A restarted consumer joins earlier but the group waits for
    the dead one until its session ends, so the restart shortens nothing.
    """
    lost = random.uniform(table.session_s - table.heartbeat_s, table.session_s, number)
    paused = table.rebalance.draw(random, number)
    load = np.minimum(table.utilisation.draw(random, number), 0.999)
    spare = table.members * (1 - load) - 1
    # Without a surplus the backlog never drains; the restarted member is then what drains it.
    spare = np.where(spare > 0, spare, table.members * (1 - load))
    steps = {"session": lost, "rebalance": paused, "drain": (lost + paused) * load / spare}
    return Timeline("worker crash", steps, np.zeros(number), table.promise_s)


def database_crash(table: DatabaseCrash, random: Random, number: int, *, asynchronous: bool = False) -> Timeline:
    """Return the timeline of a primary that ends: its key runs out, a standby is promoted, pools reconnect, drain.

    The leader renewed its key at most `loop_wait` before it died, so what is left of the ttl lies between ttl −
    loop_wait and ttl (Patroni, "Dynamic configuration settings"). A synchronous standby loses nothing that was
    acknowledged; an asynchronous one, which the seed allows, loses its lag.
    """
    expiry = random.uniform(table.ttl_s - table.loop_wait_s, table.ttl_s, number)
    promoted = table.promotion.draw(random, number)
    found = table.reconnect.draw(random, number)
    load = np.minimum(table.utilisation.draw(random, number), 0.999)
    away = expiry + promoted + found
    steps = {
        "key expires": expiry,
        "promotion": promoted,
        "reconnect": found,
        "drain": away * table.retried_share * load / (1 - load),
    }
    lost = table.async_lag.draw(random, number) if asynchronous else np.zeros(number)
    name = "single DB crash, asynchronous standby" if asynchronous else "single DB crash"
    return Timeline(name, steps, lost, table.promise_s)


def region_down(table: RegionDown, lag: Floats, random: Random, number: int) -> Timeline:
    """Return the timeline of a region that is given up: probes fail, a person decides, servers and pods start.

    Then names change, and the read models of the standby region take in what Kafka's archive lacks:
    the events since its last copy. What is lost is the lag of the ledger's copy at a random moment of `lag`.
    """
    first = random.uniform(0, table.probe_period_s, number)
    servers = np.max([table.promote.draw(random, number) for _ in range(table.servers)], axis=0)
    missing = random.uniform(0, table.archive_every_s, number) * table.events_per_s
    steps = {
        "noticed": first + (table.probe_failures - 1) * table.probe_period_s,
        "decision": table.decide.draw(random, number),
        "servers and pods": np.maximum(servers, table.pods.draw(random, number)),
        "names": table.dns.draw(random, number),
        "replay": missing / (table.replay_per_s * table.replay_workers),
    }
    return Timeline("region down", steps, random.choice(lag, number), table.promise_s)


def corruption(
    table: Corruption, wal_mb_per_s: float, random: Random, number: int, *, found_every_s: float, name: str
) -> Timeline:
    """Return the timeline of a server that goes back: found, judged, restored, its log replayed, and reconciled.

    `wal_mb_per_s` is the log rate at the peak. Nothing acknowledged is lost while the log up to the damage is
    archived; the clock begins with the damage.
    """
    since_backup = random.uniform(0, table.backup_every_s, number)
    steps = {
        "found": random.uniform(0, found_every_s, number),
        "decision": table.judge.draw(random, number),
        "restore": np.full(number, table.data_gb * 1000 / table.fetch_mb_per_s),
        "log replay": since_backup * wal_mb_per_s * table.mean_share / table.wal_replay_mb_per_s,
        "start": table.start.draw(random, number),
        "reconcile": np.full(number, table.rows / table.reconcile_rows_per_s),
    }
    return Timeline(name, steps, np.zeros(number), table.promise_s)


def produced_bytes(table: RegionLag, random: Random) -> Floats:
    """Return the log written in each second of the simulated days.

    Bets with a slow random factor, and after each checkpoint the pages that are written whole, fewer and fewer.
    """
    steps = table.days * 86_400
    if steps > LAG_STEPS_MAX:
        raise ValueError(f"days must be at most {LAG_STEPS_MAX // 86_400}")
    since_s = np.arange(steps) % table.checkpoint_s
    # Mean over a period is full_pages_mb / checkpoint_s, whatever the decay.
    decay = np.exp(-since_s / table.full_pages_s)
    pages = table.full_pages_mb * MB * decay / decay[: int(table.checkpoint_s)].sum()
    steady = table.bets_per_s * table.wal_bytes_per_bet
    return np.asarray(steady * slow_factor(random, steps, table.noise, table.noise_s) + pages)


def lag_over_time(produced: Floats, carried: Floats, rtt_s: float) -> Floats:
    """Return the age of the copy at the end of each second: what waits, at the rate that is carried, and half a trip.

    The backlog is that of a fluid queue, B = S − min(0, min S) with S the sum of what came less what could go
    (Lindley's recursion unrolled). Its age is how long ago the last byte that went was written, read
    off the two sums.
    """
    net = np.cumsum(produced - carried)
    backlog = net - np.minimum(np.minimum.accumulate(net), 0.0)
    written = np.cumsum(produced)
    gone = written - np.maximum(backlog, 0.0)
    steps = np.arange(1, len(produced) + 1, dtype=float)
    at = np.interp(gone, np.concatenate([[0.0], written]), np.concatenate([[0.0], steps]))
    return np.asarray(np.maximum(steps - at, 0.0) + rtt_s / 2)


def region_lag(table: RegionLag, random: Random) -> tuple[LagFound, Floats]:
    """Return what the lag of the copy is, and its value in each second."""
    produced = produced_bytes(table, random)
    carried = np.full(len(produced), table.link_bytes_per_s)
    number = int(random.poisson(table.outages_per_day * table.days))
    begins = random.integers(0, len(produced), number)
    lengths = table.outage.draw(random, number)
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        carried[begin : begin + max(round(length), 1)] = 0.0
    lag = lag_over_time(produced, carried, table.rtt_ms / 1000)
    found = LagFound(
        wal_mb_per_s=float(produced.mean()) / MB,
        link_mb_per_s=table.link_bytes_per_s / MB,
        utilisation=float(produced.mean()) / table.link_bytes_per_s,
        lag_s={**percentiles(lag), "p99.9": float(np.percentile(lag, 99.9)), "max": float(lag.max())},
        within_promise=float((lag <= table.promise_rpo_s).mean()),
    )
    return found, lag


@dataclass(frozen=True, slots=True)
class Found:
    """What the whole file comes to."""

    recoveries: list[Recovery]
    lag: LagFound


def recovery(timeline: Timeline) -> Recovery:
    """Return percentiles, verdict and the step that dominates."""
    total = timeline.total_s
    means = {name: float(values.mean()) for name, values in timeline.steps.items()}
    kept = float((total <= timeline.promise_s).mean())
    return Recovery(
        name=timeline.name,
        promise_s=timeline.promise_s,
        rto_s=percentiles(total),
        mean_s=float(total.mean()),
        rpo_s=percentiles(timeline.lost_s),
        kept_share=kept,
        holds=kept >= KEPT_SHARE,
        steps=means,
        dominates=max(means, key=lambda name: means[name]),
    )


def timelines(failures: Failures) -> tuple[list[Timeline], LagFound]:
    """Draw every scenario, each from a stream of its own, so that a change in one moves none of the others."""
    number = failures.replications
    damage = failures.corruption

    def random(purpose: str) -> Random:
        return stream(failures.seed, 0, purpose)

    found, lag = region_lag(failures.lag, random("region lag"))
    drawn = [
        api_crash(failures.api, random("API crash"), number),
        api_hang(failures.api, random("API hang"), number),
        worker_crash(failures.worker, random("worker crash"), number),
        database_crash(failures.database, random("database crash"), number),
        database_crash(failures.database, random("database crash, asynchronous"), number, asynchronous=True),
        region_down(failures.region, lag, random("region down"), number),
        corruption(
            damage,
            found.wal_mb_per_s,
            random("corruption"),
            number,
            found_every_s=damage.found_every_s,
            name="data corruption",
        ),
        corruption(
            damage,
            found.wal_mb_per_s,
            random("corruption, found once a day"),
            number,
            found_every_s=damage.seed_found_every_s,
            name="data corruption, found once a day",
        ),
    ]
    return drawn, found


def simulate(failures: Failures, tell: Callable[[str], None] = lambda _: None) -> Found:
    """Return recovery times, losses and verdicts of all scenarios, and the lag of the other region."""
    tell(f"{failures.replications} replications of each failure")
    drawn, lag = timelines(failures)
    return Found([recovery(timeline) for timeline in drawn], lag)
