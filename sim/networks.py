"""Closed forms for networks of queues: Jackson's open networks and closed networks by mean value analysis.

Rates are per second, times in seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sim.queueing import mmc_mean_wait_s, number_in_system, utilisation

MAX_STATIONS: Final = 1_000
MAX_CUSTOMERS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Node:
    """Steady state of one station of an open network."""

    rate_per_s: float
    """Arrivals per second, from outside and from other stations."""
    utilisation: float
    latency_s: float
    """Mean time of one visit, service included."""
    number: float


def traffic_per_s(outside_per_s: Sequence[float], routing: Sequence[Sequence[float]]) -> NDArray[Any]:
    """Return the arrival rate of each station: λ = γ + λ·R, where R[i][j] is the share that goes from i to j.

    Source: Jackson, "Networks of waiting lines", Operations Research 5 (1957). Raises ValueError unless R is square,
    its rows are shares that add up to at most 1, and everybody leaves in the end.
    """
    outside = np.asarray(outside_per_s, dtype=float)
    shares = np.asarray(routing, dtype=float)
    count = len(outside)
    if not 1 <= count <= MAX_STATIONS or shares.shape != (count, count):
        raise ValueError(f"routing must be {count} × {count} for 1 to {MAX_STATIONS:,} stations")
    if not ((shares >= 0).all() and (shares.sum(axis=1) <= 1 + 1e-12).all() and (outside >= 0).all()):
        raise ValueError("rates must not be negative, and the shares of each row must add up to at most 1")
    if float(np.abs(np.linalg.eigvals(shares)).max()) > 1 - 1e-12:
        raise ValueError("somebody never leaves: the routing has a cycle without an exit")
    rates: NDArray[Any] = np.linalg.solve(np.eye(count) - shares.T, outside)
    return rates


def jackson(
    outside_per_s: Sequence[float],
    routing: Sequence[Sequence[float]],
    service_s: Sequence[float],
    servers: Sequence[int],
) -> list[Node]:
    """Return the steady state of every station of an open Jackson network: each is M/M/c by itself.

    Source: Jackson, "Jobshop-like queueing systems", Management Science 10 (1963). Raises ValueError as
    `traffic_per_s`, and unless every station has a utilisation below 1.
    """
    nodes = []
    rates = traffic_per_s(outside_per_s, routing).tolist()
    for rate, mean_s, count in zip(rates, service_s, servers, strict=True):
        latency_s = mmc_mean_wait_s(rate, mean_s, count) + mean_s
        nodes.append(Node(rate, utilisation(rate, mean_s, count), latency_s, number_in_system(rate, latency_s)))
    return nodes


def jackson_latency_s(nodes: Sequence[Node], outside_per_s: Sequence[float]) -> float:
    """Return the mean time from entering an open network to leaving it, by Little's law over the whole."""
    return sum(node.number for node in nodes) / sum(outside_per_s)


@dataclass(frozen=True, slots=True)
class Closed:
    """Steady state of a closed network."""

    throughput_per_s: float
    """Cycles per second of all customers together."""
    latency_s: float
    """Mean time of one cycle without thinking."""
    numbers: list[float]
    """Mean number of customers at each station."""


def closed_mva(demands_s: Sequence[float], customers: int, think_s: float = 0.0) -> Closed:
    """Return the steady state of a closed network of single servers with N customers, by exact mean value analysis.

    `demands_s` is the service each station gives in one cycle (visits × service time); `think_s` is spent without
    waiting between cycles. An arrival sees the network as it is with one customer less. Source: Reiser and
    Lavenberg, "Mean-value analysis of closed multichain queuing networks", Journal of the ACM 27 (1980); exact for
    FCFS stations with exponential service and for processor sharing with any. Raises ValueError unless there are 1
    to MAX_CUSTOMERS customers, demands are not negative and one is positive.
    """
    demands = np.asarray(demands_s, dtype=float)
    if not (1 <= customers <= MAX_CUSTOMERS and 0 <= think_s < math.inf):
        raise ValueError(f"a closed network needs 1 to {MAX_CUSTOMERS:,} customers and a think time of 0 or more")
    if not (len(demands) and np.isfinite(demands).all() and (demands >= 0).all() and demands.sum() + think_s > 0):
        raise ValueError("demands must not be negative, and not all 0")
    numbers = np.zeros(len(demands))
    throughput, latency_s = 0.0, 0.0
    for population in range(1, customers + 1):
        visits_s = demands * (1 + numbers)
        latency_s = float(visits_s.sum())
        throughput = population / (think_s + latency_s)
        numbers = throughput * visits_s
    return Closed(throughput, latency_s, numbers.tolist())
