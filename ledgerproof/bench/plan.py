"""What one window of load is asked to be, and what came of it: the messages between the bench and its generator."""

from typing import Literal

import msgspec

Kind = Literal["bets", "grpc_bets", "bulk", "deposits", "balances", "mixed", "static"]
"""bets: one bet a request; grpc_bets: the same over gRPC, closed loop only; bulk: many; deposits: open the wallets;
balances: reads; mixed: bets and reads of balances; static: GET /."""
CURVE_PERCENTS = (1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9)
"""Percentiles of a window's curves."""


class Plan(msgspec.Struct, kw_only=True, frozen=True):
    """One window of load. Ports are of 127.0.0.1; connections are spread evenly over them."""

    ports: list[int]
    kind: Kind
    loop: Literal["open", "closed"]
    duration_s: float
    """Open: length of the schedule. Closed: no request begins after this."""
    rate: float = 0.0
    """Open only: requests per second that are due, on average."""
    burst: int = 1
    """Open only: so many requests are due at the same moment."""
    requests_max: int = 0
    """Closed only: requests prepared; the window ends early when they are used up, unless they repeat."""
    repeat: bool = False
    """Closed only: begin again with the first request after the last one (reads)."""
    connections: int = 128
    """Open: opened before the window. Closed: requests under way at any time."""
    connections_max: int = 768
    """Open only: more are opened while all are busy, up to this many."""
    grace_s: float = 4.0
    """After the window answers are awaited this long; longer than the service may hold a command."""
    seed: int = 1
    run: str = "bench"
    """Begins every idempotency key, so that no two windows share one."""
    first_user: int = 1_000_000
    users: int = 20_000
    matches: list[str] = []
    query: str = ""
    """Reads only: the query string, with its question mark."""
    bulk: int = 1_000
    """Commands in one bulk request."""
    read_share: float = 0.0
    """Mixed only: share of the requests that read a balance."""
    hot_share: float = 0.0
    """Mixed only: share of the bets that come from the first wallet."""
    warm_s: float = 0.0
    """Mixed only: what is due before is not in the curves."""
    token: str = ""
    """Bearer token of every request; empty for a service that asks for none."""
    count: str = ""
    """Text whose occurrences in the bodies of answers are counted (`"status":202` of a bulk)."""
    marker: str = ""
    """Text in an answer's body after which a word up to the next quotation mark is counted (`"source":"`)."""


class Window(msgspec.Struct, kw_only=True):
    """What one window measured.

    Latencies are milliseconds from the moment a request was DUE (open loop) or sent (closed loop) to its whole
    answer; None: so many got no answer that the quantile is not finite.
    """

    loop: str
    duration_s: float
    """From the start to the last moment a request was due (open) or answered (closed)."""
    due: int
    answered: int
    accepted: int
    """Answers of 200 to 299."""
    statuses: dict[str, int]
    """Answers by status."""
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    """Of all requests that were due; one without an answer counts as infinitely late."""
    accepted_p50_ms: float | None
    accepted_p99_ms: float | None
    lag_p99_ms: float
    """How late the generator itself was: from due to handed over. Above a few milliseconds it measures itself."""
    lag_max_ms: float
    queued: int
    """Requests that found every connection busy and waited for one; their latency counts from when they were due."""
    connections: int
    """Connections opened in all."""
    lost: int
    """Connections that ended with a request under way."""
    unreadable: int
    """Answers that are not HTTP/1.1 with a content-length."""
    marks: dict[str, int]
    """Answers by the word after the marker."""
    counted: int
    """Occurrences of the text to count."""
    cpu_s: float
    """CPU of the generator's process in the window."""
    priority: str
    """How the generator was scheduled: in real time or at a lower nice value where that was allowed."""
    first_problem: str = ""
    """The body of the first answer of 300 and above."""
    p99_by_second_ms: list[float | None] = []
    accepted_by_second: list[int] = []
    curves_ms: dict[str, list[float | None]] = {}
    """Latencies at CURVE_PERCENTS, of mixed requests by what they ask for (`bets`, `reads`)."""
    accepted_of: dict[str, int] = {}
    """Accepted answers by the same."""

    @property
    def accepted_per_s(self) -> float:
        """Accepted answers per second of the window."""
        return self.accepted / self.duration_s

    @property
    def cpu_share(self) -> float:
        """Share of one core that the generator used."""
        return self.cpu_s / self.duration_s
