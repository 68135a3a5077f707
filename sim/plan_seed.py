"""The seed's capacity table beside ours: each of its figures confirmed, or corrected by how much."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

CONFIRMED: Final = "confirmed"
ABOUT: Final = 0.1
"""Figures that differ by less than this share agree: the seed rounds."""


@dataclass(frozen=True)
class SeedFigure:
    """A figure of the seed's capacity table, and the name of ours in `Figures.numbers`."""

    what: str
    says: str
    low: float
    high: float
    ours: str
    unit: str
    scale: float = 1.0
    """Ours is divided by this."""
    why: str = ""


SEED: Final = (
    SeedFigure("API pods", "50", 50, 50, "api_pods", "pods", why="2 ms of CPU a request were assumed"),
    SeedFigure("requests of one API pod", "2k RPS", 2e3, 2e3, "pod_requests_per_s", "1/s"),
    SeedFigure("API cores", "200", 200, 200, "api_cores", "cores"),
    SeedFigure("API memory", "100GB", 100, 100, "api_memory_gb", "GB"),
    SeedFigure("events", "100k/sec", 1e5, 1e5, "events_per_s", "1/s", why="read_share is chosen so that they agree"),
    SeedFigure("consumers", "100", 100, 100, "consumers", "processes", why="three groups together"),
    SeedFigure(
        "events of one consumer", "1000/sec", 1e3, 1e3, "slowest_worker_per_s", "1/s", why="the slowest of three"
    ),
    SeedFigure("worker cores", "200", 200, 200, "worker_cores", "cores", why="relays and reconcilers among ours"),
    SeedFigure("database servers", "100 shards", 100, 100, "servers", "primaries"),
    SeedFigure("10M ledger rows", "~1GB", 1, 1, "ten_million_entries_gb", "GB", why="with indexes"),
    SeedFigure(
        "all ledger rows", "400GB", 400, 400, "ledger_gb", "GB", why="one copy; it also says 100 × 1 GB, and 150"
    ),
    SeedFigure("database, one copy", "400GB", 400, 400, "database_gb", "GB", why="with bets, orders, a day of outbox"),
    SeedFigure("cores of the primaries", "100", 100, 100, "primary_cores", "cores", why="its own 100 × 4 is 400"),
    SeedFigure("brokers", "5", 5, 5, "brokers", "brokers"),
    SeedFigure("partitions", "500", 500, 500, "partitions", "partitions"),
    SeedFigure("Kafka, one copy", "60TB", 60, 60, "kafka_gb", "TB", 1000, why="1 kB an event were assumed"),
    SeedFigure(
        "Kafka storage", "60TB", 60, 60, "kafka_copies_gb", "TB", 1000, why="with the copies that it leaves out"
    ),
    SeedFigure("Redis size", "5GB", 5, 5, "redis_gb", "GB", why="ours is an upper bound"),
    SeedFigure("Redis nodes", "3", 3, 3, "redis_nodes", "nodes"),
    SeedFigure("cost of a month", "$50k-100k", 5e4, 1e5, "cost", "USD"),
)


@dataclass(frozen=True)
class Verdict:
    """A figure of the seed with ours and what follows."""

    figure: SeedFigure
    value: float
    low: float
    high: float
    verdict: str


def judge(
    numbers: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], figures: tuple[SeedFigure, ...] = SEED
) -> list[Verdict]:
    """Return a verdict for each figure: confirmed where the seed's lies within our interval, or nearly."""
    found = []
    for figure in figures:
        value = numbers[figure.ours] / figure.scale
        low, high = (bound / figure.scale for bound in intervals[figure.ours])
        found.append(Verdict(figure, value, low, high, _verdict(figure, value, low, high)))
    return found


def _verdict(figure: SeedFigure, value: float, low: float, high: float) -> str:
    if figure.low <= high * (1 + ABOUT) and figure.high >= low * (1 - ABOUT):
        return CONFIRMED
    if figure.low > high:
        return f"{figure.low / value:.3g} times too high" if value else "too high"
    return f"{value / figure.high:.3g} times too low"
