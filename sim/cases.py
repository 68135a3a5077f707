"""What is measured of the service to calibrate the model and to hold it against, and the form of what was measured.

The file of cases is `sim/cases.toml`; `ledgerproof sim measure` plays one of them on a stack of its own.
"""

from pathlib import Path
from typing import Any, Final, Literal

import msgspec

CASES: Final = Path(__file__).with_name("cases.toml")


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A configuration of the service and what is asked of it. Raises ValueError if a value is out of range."""

    name: str
    why: str
    servers: int = 1
    apis: int = 1
    settings: dict[str, int] = {}
    """Fields of the service's configuration that differ from their defaults."""
    read_share: float = 0.0
    """Share of the requests that read a balance; the others place a bet."""
    hot_share: float = 0.0
    """Share of the bets that come from one wallet."""

    def __post_init__(self) -> None:
        """Refuse what cannot be started."""
        for name, value, high in (("servers", self.servers, 16), ("apis", self.apis, 16)):
            if not 1 <= value <= high:
                raise ValueError(f"{name} must be 1 to {high}, not {value}")
        for name, share in (("read_share", self.read_share), ("hot_share", self.hot_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be 0 to 1, not {share}")

    def setting(self, name: str, default: float) -> float:
        """Return a setting of the service."""
        return float(self.settings.get(name, default))


class Burst(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests of which `size` are due at the same moment."""

    rate_per_s: float
    size: int


class OutageCase(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the service that is taken away under a constant load of bets, and brought back."""

    name: str
    kind: Literal["kill", "pause"]
    node: str
    """As the stack calls it: pg0, relay0, matcher0, projector0, kafka, redis."""
    rate_per_s: float
    lasts_s: float
    """From the moment it is taken away until it is asked to come back."""
    servers: int = 1

    @property
    def part(self) -> str:
        """What the model calls it."""
        return self.node if self.node.startswith("pg") else self.node.rstrip("0123456789")

    @property
    def sort(self) -> str:
        """Parts of one sort take the same time to come back."""
        return self.node.rstrip("0123456789")


class Outage(msgspec.Struct, kw_only=True):
    """What one outage did."""

    case: OutageCase
    gone_s: float
    """From the moment the part was taken away until what it does went on."""
    recovered_s: float
    """From that moment until no backlog was higher than before, for good."""
    backlog_peak: dict[str, float]
    """Most that waited, by stage."""
    refused: int
    """Requests that were not accepted."""


class Cases(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The configuration that the model is calibrated on, and the others that it is scored on."""

    calibration: Shape
    calibration_rates_per_s: list[float]
    """Bets alone, at rates that leave most of the machine idle."""
    read_rates_per_s: list[float]
    """Reads alone."""
    bet_bursts: list[Burst]
    """Bets that come many at a time: large batches at a low rate, for what one of many costs."""
    read_bursts: list[Burst]
    window_s: float
    """Of a case at one rate."""
    calibration_window_s: float
    saturation_s: float
    connections: int
    """Requests under way at any time while saturation is measured."""
    shares: list[float]
    """Rates of a case, as shares of the saturation that was predicted for it."""
    cases: list[Shape]
    returns: list[OutageCase]
    """Outages at a low rate, from which the time that each part needs to come back is taken."""
    outages: list[OutageCase]
    """Outages that are forecast and scored."""


class Window(msgspec.Struct, kw_only=True):
    """What one window of load showed. `offered_per_s` is None where saturation was measured (a closed loop)."""

    offered_per_s: float | None
    read_share: float
    burst: int
    """Requests that were due at the same moment."""
    duration_s: float
    due: int
    accepted: int
    statuses: dict[str, int]
    curves_ms: dict[str, list[float | None]]
    """Latency at `percents` from the moment a request was due, by class (`bets`, `reads`)."""
    accepted_of: dict[str, int]
    percents: list[float]
    lag_p99_ms: float
    """How late the generator was."""
    cpu_s: dict[str, float]
    """CPU seconds of each process of the service, of the sessions of each server by role (`pg0 ledger_api`, which are
    in those of `pg0`), and of the `generator`."""
    busy_s: float
    """CPU seconds of the whole machine, whoever used them."""
    steal_s: float
    """CPU seconds that the machine itself did not get."""
    posts: int
    """Batches that the writers posted."""
    post_s: float
    """Seconds those took, as the writers saw it."""
    post_buckets: dict[str, float]
    """Batches that took no longer than so many seconds (cumulative)."""
    posted: int
    """Entries in those batches."""
    work: dict[str, float] = {}
    """What the workers did: `relay jobs`, `matcher jobs`, `matcher batches`, and so on."""

    @property
    def accepted_per_s(self) -> float:
        """Accepted requests per second."""
        return self.accepted / self.duration_s

    @property
    def proven(self) -> bool:
        """Whether the generator kept its schedule."""
        return self.offered_per_s is None or self.lag_p99_ms <= 5.0


class Measured(msgspec.Struct, kw_only=True):
    """One configuration, measured."""

    shape: Shape
    commit: str
    machine: dict[str, Any]
    started_at: str
    cores: int
    connections: int
    idle: Window | None
    """A window without any request."""
    windows: list[Window]
    """At given rates."""
    saturation: Window | None
    warm: float = 1.0
    """Share of its time that a piece of work takes if the core has not rested before."""
    timer_late_ms: float = 0.0
    """By how much timers of an event loop of this machine are late on average."""
    drain_s: float = 0.0
    """How long the service took, after the last window, to finish its backlog."""
    outages: list[Outage] = []


def read_cases(path: Path = CASES) -> Cases:
    """Read a file of cases. Raises msgspec.ValidationError for one that does not fit."""
    return msgspec.toml.decode(path.read_bytes(), type=Cases)


def read_measured(path: Path) -> Measured:
    """Read what `ledgerproof sim measure` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Measured)
