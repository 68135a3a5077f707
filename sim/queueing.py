"""Closed forms of queueing theory that the simulation is held against, each with its source.

Rates are per second, times in seconds. A wait is the time before service begins; a latency includes service. `scv` is
the squared coefficient of variation of a time, variance / mean². Networks of stations are in sim/networks.py.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAX_BATCH_STATES: Final = 512
"""`gated_batch_mean_latency_s` follows batches up to this size."""
LOST_MASS: Final = 1e-9
"""Probability of larger batches that it tolerates."""
MAX_STATES: Final = 1_000_000
"""Customers that a birth-death chain may hold before it is refused."""


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


def mm1_latency_quantile_s(rate_per_s: float, service_s: float, percent: float) -> float:
    """Return a percentile of the latency of M/M/1, which is exponential with mean S/(1−ρ).

    Source: Kleinrock, volume 1 (1975), section 3.2. Raises ValueError unless ρ < 1 and 0 < percent < 100.
    """
    load = _stable(utilisation(rate_per_s, service_s))
    return -math.log1p(-_share(percent)) * service_s / (1 - load)


def mmc_wait_quantile_s(rate_per_s: float, service_s: float, servers: int, percent: float) -> float:
    """Return a percentile of the wait of M/M/c: P(W > t) = C·exp(−(c/S − λ)·t), and 0 where fewer wait at all.

    Source: Kleinrock, volume 1 (1975), section 3.5; Cooper (1981), section 3.5. Raises ValueError unless ρ < 1 and
    0 < percent < 100.
    """
    waits = erlang_c(rate_per_s * service_s, servers)
    beyond = 1 - _share(percent)
    return math.log(waits / beyond) / (servers / service_s - rate_per_s) if waits > beyond else 0.0


def erlang_b(offered_erlangs: float, servers: int) -> float:
    """Return the share of arrivals that M/G/c without a queue loses; only the mean of the service time matters.

    By the recursion of `erlang_c`. Source: Erlang (1917); Cooper (1981), sections 3.3 and 5.10 (insensitivity).
    Raises ValueError for a negative load or no server.
    """
    if not (0 <= offered_erlangs < math.inf and servers >= 1):
        raise ValueError("Erlang B needs an offered load of 0 or more and a server")
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered_erlangs * blocked / (number + offered_erlangs * blocked)
    return blocked


@dataclass(frozen=True, slots=True)
class Bounded:
    """Steady state of a queue that loses some of what arrives."""

    lost: float
    """Share of arrivals that are refused or give up, 0 to 1."""
    throughput_per_s: float
    """Arrivals served per second."""
    number: float
    """Mean number in the system."""
    queued: float
    """Mean number that wait."""
    busy: float
    """Mean number of busy servers."""


def mmck(rate_per_s: float, service_s: float, servers: int, capacity: int) -> Bounded:
    """Return the steady state of M/M/c/K: K places, those of the c servers included; a full system refuses.

    Mean latency of those served is number / throughput (Little). Source: Kleinrock, volume 1 (1975), section 3.6 and
    problem 3.5 (birth-death chain). Raises ValueError unless rate and service are positive and 1 ≤ c ≤ K ≤ MAX_STATES.
    """
    if not (0 < rate_per_s < math.inf and 0 < service_s < math.inf and 1 <= servers <= capacity <= MAX_STATES):
        raise ValueError(f"M/M/c/K needs a positive rate and service time and 1 ≤ c ≤ K ≤ {MAX_STATES:,}")
    states = np.arange(1, capacity + 1)
    share = _birth_death(np.log(rate_per_s * service_s / np.minimum(states, servers)))
    lost = float(share[-1])
    return _bounded(share, servers, lost, rate_per_s * (1 - lost))


def erlang_a(rate_per_s: float, service_s: float, servers: int, patience_s: float) -> Bounded:
    """Return the steady state of M/M/c+M (Erlang A): whoever waits gives up after an exponential patience.

    A birth-death chain that falls with n/S up to c and with c/S + (n − c)/patience above; λ·lost = queued/patience.
    There is a steady state at every load. Source: Palm (1957); Garnett, Mandelbaum and Reiman, "Designing a call
    center with impatient customers", Manufacturing & Service Operations Management 4 (2002). Raises ValueError unless
    all are positive and the chain stays below MAX_STATES.
    """
    if not (all(0 < value < math.inf for value in (rate_per_s, service_s, patience_s)) and servers >= 1):
        raise ValueError("Erlang A needs a positive rate, service time and patience, and a server")
    # Beyond this state the chain falls at twice the rate at which it grows: 60 more states weigh less than 2^-60.
    last = servers + math.ceil(max(2 * rate_per_s - servers / service_s, 0) * patience_s) + 60
    if last > MAX_STATES:
        raise ValueError(f"more than {MAX_STATES:,} customers would wait: shorten the patience")
    states = np.arange(1, last + 1)
    falls = np.minimum(states, servers) / service_s + np.maximum(states - servers, 0) / patience_s
    share = _birth_death(np.log(rate_per_s / falls))
    queued = float(share @ np.maximum(np.arange(len(share)) - servers, 0))
    lost = queued / (rate_per_s * patience_s)
    return _bounded(share, servers, lost, rate_per_s * (1 - lost))


def mg1_mean_wait_s(rate_per_s: float, service_s: float, scv: float) -> float:
    """Return the mean wait of M/G/1, ρ·S·(1 + scv)/(2·(1−ρ)).

    Source: Pollaczek (1930), Khinchine (1932); Kleinrock, volume 1 (1975), section 5.6. Raises ValueError unless
    ρ < 1 and scv ≥ 0.
    """
    if not 0 <= scv < math.inf:
        raise ValueError(f"scv must be 0 or more, not {scv}")
    return mm1_mean_wait_s(rate_per_s, service_s) * (1 + scv) / 2


def mg1_ps_mean_latency_s(rate_per_s: float, service_s: float, alone_s: float | None = None) -> float:
    """Return the mean latency of M/G/1 with processor sharing: x/(1−ρ) for a customer who alone would take x.

    Over all customers x is the mean service time; its law does not matter. Source: Kleinrock, "Queueing Systems"
    volume 2 (1976), section 4.4. Raises ValueError unless ρ < 1.
    """
    return (service_s if alone_s is None else alone_s) / (1 - _stable(utilisation(rate_per_s, service_s)))


def mginf_number_probability(rate_per_s: float, service_s: float, number: int) -> float:
    """Return the probability that M/G/∞ holds `number` customers: Poisson with mean λ·S, whatever the law of service.

    Source: Takács, "Introduction to the Theory of Queues" (1962), chapter 3. Raises ValueError for negative values.
    """
    mean = rate_per_s * service_s
    if not (0 <= mean < math.inf and number >= 0):
        raise ValueError("M/G/∞ needs a load and a number of 0 or more")
    return math.exp(number * math.log(mean) - mean - math.lgamma(number + 1)) if mean else float(number == 0)


def mg1_breakdowns_mean_latency_s(
    rate_per_s: float, service_s: float, scv: float, *, up_s: float, down_s: float, down_scv: float
) -> float:
    """Return the mean latency of M/G/1 whose server fails at any time, idle or busy, and then resumes what it did.

    Up times are exponential with mean `up_s`, repairs have any law. With A = up/(up + down), work U seen by an
    arrival, ρ = λ·S and r = E[R²]/(2·E[R]), balance of E[U²] gives, for the part of E[U] while the server is up,
    u = (λ·E[S²]/2 + ρ²·(1−A)·r)/(1 − ρ/A), and while it is down d = u·down/up + ρ·(1−A)·r. A customer works off
    U + S at the speed A and meets a repair under way with probability 1 − A:
    latency = (u + d + S)/A + (1−A)·r.
    Sources: White and Christie, "Queuing with preemptive priorities or with breakdown", Operations Research 6 (1958),
    for exponential times; Gaver, "A waiting line with interrupted service, including priorities", Journal of the Royal
    Statistical Society B 24 (1962). Raises ValueError unless ρ < A and the times are positive.
    """
    if not (all(0 < value < math.inf for value in (service_s, up_s, down_s)) and scv >= 0 and down_scv >= 0):
        raise ValueError("breakdowns need positive times and an scv of 0 or more")
    available = up_s / (up_s + down_s)
    load = utilisation(rate_per_s, service_s)
    _stable(load / available)
    repair_left_s = down_s * (1 + down_scv) / 2
    work_up_s = (rate_per_s * service_s**2 * (1 + scv) / 2 + load**2 * (1 - available) * repair_left_s) / (
        1 - load / available
    )
    work_down_s = work_up_s * down_s / up_s + load * (1 - available) * repair_left_s
    return (work_up_s + work_down_s + service_s) / available + (1 - available) * repair_left_s


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


def _share(percent: float) -> float:
    if not 0 < percent < 100:
        raise ValueError(f"a percentile is above 0 and below 100, not {percent}")
    return percent / 100


def _birth_death(log_ratios: NDArray[Any]) -> NDArray[Any]:
    """Return the probabilities of states 0 … n from the logarithms of p(n)/p(n−1); logarithms do not overflow."""
    weights = np.concatenate(([0.0], np.cumsum(log_ratios)))
    share = np.exp(weights - weights.max())
    found: NDArray[Any] = share / share.sum()
    return found


def _bounded(share: NDArray[Any], servers: int, lost: float, throughput_per_s: float) -> Bounded:
    states = np.arange(len(share))
    queued = float(share @ np.maximum(states - servers, 0))
    busy = float(share @ np.minimum(states, servers))
    return Bounded(lost, throughput_per_s, queued + busy, queued, busy)
