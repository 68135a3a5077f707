"""Closed forms of queueing theory that the simulation is held against, each with its source.

Rates are per second, times in seconds. A wait is the time before service begins; a latency includes service.
"""

import math
from typing import Final

import numpy as np

MAX_BATCH_STATES: Final = 512
"""`gated_batch_mean_latency_s` follows batches up to this size."""
LOST_MASS: Final = 1e-9
"""Probability of larger batches that it tolerates."""


def utilisation(rate_per_s: float, service_s: float, servers: int = 1) -> float:
    """Return the busy share of each server, X·D/c (the utilisation law).

    Source: Denning and Buzen, "The operational analysis of queueing network models", ACM Computing Surveys 10 (1978).
    """
    return rate_per_s * service_s / servers


def number_in_system(rate_per_s: float, latency_s: float) -> float:
    """Return the mean number in the system, L = λ·W.

    Source: Little, "A proof for the queuing formula L = λW", Operations Research 9 (1961).
    """
    return rate_per_s * latency_s


def mm1_mean_wait_s(rate_per_s: float, service_s: float) -> float:
    """Return the mean wait of M/M/1, ρ·S/(1−ρ).

    Source: Kleinrock, "Queueing Systems" volume 1 (1975), section 3.2. Raises ValueError unless ρ < 1.
    """
    load = _stable(utilisation(rate_per_s, service_s))
    return load * service_s / (1 - load)


def md1_mean_wait_s(rate_per_s: float, service_s: float) -> float:
    """Return the mean wait of M/D/1, ρ·S/(2·(1−ρ)): half that of M/M/1.

    Source: Pollaczek–Khinchine with constant service; Kleinrock, volume 1 (1975), section 5.7.
    Raises ValueError unless ρ < 1.
    """
    return mm1_mean_wait_s(rate_per_s, service_s) / 2


def erlang_c(offered_erlangs: float, servers: int) -> float:
    """Return the probability that an arrival at M/M/c has to wait.

    By the recursion of Erlang B, which neither overflows nor cancels: B(0) = 1, B(n) = a·B(n−1)/(n + a·B(n−1)),
    C = B/(1 − ρ·(1−B)). Source: Erlang (1917); Cooper, "Introduction to Queueing Theory" (1981), sections 3.4
    and 3.5. Raises ValueError unless ρ < 1.
    """
    load = _stable(offered_erlangs / servers)
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered_erlangs * blocked / (number + offered_erlangs * blocked)
    return blocked / (1 - load * (1 - blocked))


def mmc_mean_wait_s(rate_per_s: float, service_s: float, servers: int) -> float:
    """Return the mean wait of M/M/c, C·S/(c·(1−ρ)) with Erlang's C.

    Source: Kleinrock, volume 1 (1975), section 3.5. Raises ValueError unless ρ < 1.
    """
    waits = erlang_c(rate_per_s * service_s, servers)
    return waits * service_s / (servers * (1 - utilisation(rate_per_s, service_s, servers)))


def batch_saturation_per_s(fixed_s: float, per_command_s: float, batch_max: int) -> float:
    """Return the most commands per second of one batching writer: full batches, back to back.

    A batch of n takes fixed + n·per_command, so it is batch_max / (fixed + per_command·batch_max).
    """
    return batch_max / (fixed_s + per_command_s * batch_max)


def gated_batch_mean_latency_s(rate_per_s: float, fixed_s: float, per_command_s: float) -> float:
    """Return the mean latency of gated batch service without a largest batch: while one is served the next gathers.

    Exact but for truncation. Batch sizes form a Markov chain: the batch after one of n is Poisson(λ·s(n)) with
    s(n) = fixed + n·per_command, or, where nothing arrived, the single command that arrives next. A command that
    arrives during a service waits for its rest, s(n)/2 on average, and then for the batch it is in; averaging
    over the chain's stationary distribution gives the mean per command. The chain is that of Bailey, "On
    queueing processes with bulk service", Journal of the Royal Statistical Society B 16 (1954), with a service
    time that grows with the batch. Raises ValueError unless λ > 0, λ·per_command < 1, and batches stay below
    MAX_BATCH_STATES.
    """
    if not (rate_per_s > 0 and fixed_s + per_command_s > 0):
        raise ValueError("rate and service time must be positive")
    _stable(utilisation(rate_per_s, per_command_s))
    sizes = np.arange(1, MAX_BATCH_STATES + 1)
    service_s = fixed_s + sizes * per_command_s
    arrivals = rate_per_s * service_s
    log_factorial = np.cumsum(np.log(sizes))
    step = np.exp(np.outer(np.log(arrivals), sizes) - arrivals[:, None] - log_factorial)
    step[:, 0] += np.exp(-arrivals)
    # Larger batches than we follow count as the largest, and must be rare where the chain is.
    lost = np.maximum(1 - step.sum(axis=1), 0)
    step[:, -1] += lost
    balance = step.T - np.eye(MAX_BATCH_STATES)
    balance[-1] = 1.0
    share = np.linalg.solve(balance, np.eye(MAX_BATCH_STATES)[-1])
    if float(share @ lost) > LOST_MASS:
        raise ValueError(f"batches of more than {MAX_BATCH_STATES} commands are too frequent for this formula")
    idle = np.exp(-arrivals)
    # E[A·(fixed + A·per_command)] of a Poisson A, whose second moment is a + a².
    in_next_s = fixed_s * arrivals + per_command_s * (arrivals + arrivals**2)
    spent_s = arrivals * service_s / 2 + in_next_s + idle * (fixed_s + per_command_s)
    return float(share @ spent_s / (share @ (arrivals + idle)))


def _stable(load: float) -> float:
    if not (math.isfinite(load) and 0 <= load < 1):
        raise ValueError(f"no steady state: the load is {load:.3g} of what can be served")
    return load
