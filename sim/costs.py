"""What each step of the service costs, as `ledgerproof sim calibrate` finds it: the parameters of the system model."""

from typing import Any

import msgspec


class Linear(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of a batch: a fixed part and one that each item adds."""

    fixed_ms: float = 0.0
    each_ms: float = 0.0

    def seconds(self, items: float) -> float:
        """Return the seconds of a batch of so many items."""
        return (self.fixed_ms + self.each_ms * items) / 1000


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One worker: CPU of its own process and of its session of Postgres, for a batch."""

    process: Linear
    session: Linear


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """CPU milliseconds unless a name says otherwise. The processors are those of the machine that was measured."""

    cores: int
    generator: Linear
    """Requests that are sent together (`fixed`), and each of them with its answer."""
    tick_ms: float
    """The generator looks for what is due once in this time."""
    api_wake_ms: float
    """The event loop, each time it wakes to something, however much that is."""
    api_bet_ms: float
    """A bet in the event loop, with its answer."""
    api_batch_ms: float
    """A batch that is handed to Postgres."""
    api_read_ms: float
    """A read of a balance, with its answer."""
    api_question_ms: float
    """A question to Redis for all reads that wait."""
    received_share: float
    """Part of a request's time in the event loop that comes before it waits for a batch."""
    handed_share: float
    """Part of a bet's time in the event loop in which its batch is written to Postgres."""
    post: Linear
    """CPU of the session that posts a batch."""
    commit_ms: list[float]
    """What a batch waits for besides the processors (log and network), at equidistant quantiles from 0 to 1."""
    commit_each_ms: float
    """What each entry of a batch adds to that."""
    standby_ms: list[float] = []
    """What a commit waits for a synchronous standby to say that it has it, at equidistant quantiles; empty: there is
    none."""
    gateway: Linear = Linear()
    """CPU of a process in front of the API, for the requests that come to it together; nothing: there is none."""
    linger_slack_ms: float
    """By which timers of the event loop are late on average."""
    redis_read: Linear
    relay: Stage
    kafka: Linear
    """The broker, for the records of one batch of the relay and for handing them to all groups."""
    matcher: Stage
    projector: Stage
    projector_redis: Linear
    idle_cores: float
    """Cores that the service uses when nothing is asked of it."""
    unseen_bet_ms: float
    """CPU of a bet that no station above has: the settler's, log writer's and others'."""
    warm: float = 1.0
    """Share of its time that work takes where the cores never rest."""
    cold_at: float = 0.0
    """Busy share of the cores at which the times above were measured."""
    returns_s: dict[str, float] = {}
    """How long a part needs to be back at work from the moment it is asked to, by sort (pg, relay, kafka, …)."""
    stalls_per_s: float = 0.0
    """Moments in which the whole machine is late, however little it does."""
    stall_ms: list[float] = []
    """How long they last, at equidistant quantiles from 0 to 1."""


class Interval(msgspec.Struct, frozen=True):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


class Refusal(msgspec.Struct, frozen=True):
    """What the data do not support."""

    what: str
    reason: str


class Fit(msgspec.Struct, frozen=True):
    """How well one part of the measurements is described."""

    name: str
    unit: str
    windows: int
    coefficients: dict[str, Interval]
    r_squared: float
    worst_residual: float
    """Largest difference of a window, as share of what was measured."""


class Calibration(msgspec.Struct, kw_only=True):
    """Costs with where they are from and how far they can be trusted."""

    format: int = 1
    commit: str
    machine: dict[str, Any]
    measured_at: str
    command: str
    utilisation_max: float
    """Highest share of the machine that was busy in a window that was fitted."""
    costs: Costs
    fits: list[Fit]
    refused: list[Refusal]
