"""A plan's whole answer: its figures with intervals, the seed's beside them, the levels, and what moves the result.

Intervals are the middle 90 % of `samples` plans whose demands and prices were drawn, each from a triangle between its
bounds with the top at its value, independently and by a seed. They hold what the figures of one machine leave open, and
nothing of what the assumptions leave open: for that there is the sensitivity.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from sim.demands import Demands
from sim.plan import GROUPS, Assumptions, Figures, Plan, Prices, PriceTable, batch_of, calculate
from sim.plan_levels import Level, levels
from sim.plan_seed import Verdict, judge

SAMPLES: Final = 2_000
SAMPLES_MAX: Final = 100_000
TAIL_PERCENT: Final = 5.0
STEP: Final = 0.2
"""The sensitivity moves each assumption by this share, whole numbers by one at least."""


class Missing(ValueError):
    """The demands lack figures that a plan needs; the message names them and what measures them."""


@dataclass(frozen=True)
class Move:
    """What one assumption, demand or price does to cost and pods, at two values of it."""

    name: str
    kind: str
    """assumption, demand or price."""
    at: tuple[float, float]
    cost: tuple[float, float]
    pods: tuple[float, float]
    cores: tuple[float, float]
    elasticity: float | None
    """Relative change of the cost for a relative change of the value; None where the value is zero or cannot move."""

    @property
    def swing(self) -> float:
        """How far apart the two costs are."""
        return abs(self.cost[1] - self.cost[0])


@dataclass(frozen=True)
class Answer:
    """Everything that the command prints."""

    plan: Plan
    demands: Demands
    prices: Prices
    seed: int
    samples: int
    figures: Figures
    intervals: dict[str, tuple[float, float]]
    verdicts: list[Verdict]
    levels: list[Level]
    moves: list[Move]
    """Largest swing of the cost first."""
    notes: list[str]


def answer(plan: Plan, demands: Demands, prices: Prices, *, samples: int = SAMPLES, seed: int = 1) -> Answer:
    """Return the answer. The same arguments give the same answer. Raises Missing and ValueError."""
    if not 2 <= samples <= SAMPLES_MAX:
        raise ValueError(f"samples must be 2 to {SAMPLES_MAX:,}, not {samples:,}")
    demand = {name: each.value for name, each in demands.demand.items()}
    price = {name: getattr(prices.price, name).value for name in PriceTable.__struct_fields__}
    try:
        figures = _with_more(calculate(plan.assume, demand, price), plan.assume, demand)
    except KeyError as error:
        raise Missing(
            f"the demands have no {error.args[0]}, which a plan needs: {_why_missing(demands, str(error.args[0]))}"
        ) from error
    intervals = _intervals(plan.assume, demands, prices, samples, seed)
    return Answer(
        plan=plan,
        demands=demands,
        prices=prices,
        seed=seed,
        samples=samples,
        figures=figures,
        intervals=intervals,
        verdicts=judge(figures.numbers, intervals),
        levels=levels(plan.assume, demand, price),
        moves=sensitivity(plan.assume, demands, prices),
        notes=notes_of(plan.assume, demands, figures),
    )


def _with_more(figures: Figures, assume: Assumptions, demand: Mapping[str, float]) -> Figures:
    """Add what only the comparison with the seed needs."""
    figures.numbers["slowest_worker_per_s"] = min(demand[f"{group}_per_s"] for group in GROUPS)
    figures.numbers["primary_cores"] = figures.numbers["servers"] * assume.server_cores
    return figures


def _why_missing(demands: Demands, name: str) -> str:
    for refusal in demands.refusal:
        stem = refusal.what.rstrip("*")
        if name == refusal.what or (refusal.what.endswith("*") and name.startswith(stem)):
            return refusal.reason
    return "measure it with `ledgerproof bench --json PATH` and `ledgerproof sim demands PATH`"


def _intervals(
    assume: Assumptions, demands: Demands, prices: Prices, samples: int, seed: int
) -> dict[str, tuple[float, float]]:
    rng = np.random.default_rng(seed)
    # One column a figure in a fixed order: a demand more does not change what the others draw.
    drawn = {name: _draw(rng, each.low, each.value, each.high, samples) for name, each in demands.demand.items()}
    paid = {}
    for name in PriceTable.__struct_fields__:
        each = getattr(prices.price, name)
        paid[name] = _draw(rng, each.low, each.value, each.high, samples)
    found: dict[str, list[float]] = {}
    for number in range(samples):
        demand = {name: float(values[number]) for name, values in drawn.items()}
        price = {name: float(values[number]) for name, values in paid.items()}
        figures = _with_more(calculate(assume, demand, price), assume, demand)
        for name, value in figures.numbers.items():
            found.setdefault(name, []).append(value)
    # Drawn values themselves and nothing between two of them: there is no half pod, and some values are infinite.
    return {
        name: (
            float(np.percentile(values, TAIL_PERCENT, method="lower")),
            float(np.percentile(values, 100 - TAIL_PERCENT, method="higher")),
        )
        for name, values in found.items()
    }


def _draw(rng: np.random.Generator, low: float, value: float, high: float, samples: int) -> np.ndarray[Any, Any]:
    return rng.triangular(low, value, high, samples) if high > low else np.full(samples, value)


def sensitivity(assume: Assumptions, demands: Demands, prices: Prices) -> list[Move]:
    """Return what each assumption does 20 % lower and higher, and each demand and price at its bounds."""
    demand = {name: each.value for name, each in demands.demand.items()}
    price = {name: getattr(prices.price, name).value for name in PriceTable.__struct_fields__}
    moves = []
    for name in Assumptions.__struct_fields__:
        down, up = moved(assume, name, 1 - STEP), moved(assume, name, 1 + STEP)
        at = (float(getattr(down, name)), float(getattr(up, name)))
        outcomes = (calculate(down, demand, price), calculate(up, demand, price))
        moves.append(_move(name, "assumption", at, outcomes, float(getattr(assume, name))))
    for name, each in demands.demand.items():
        outcomes = (
            calculate(assume, {**demand, name: each.low}, price),
            calculate(assume, {**demand, name: each.high}, price),
        )
        moves.append(_move(name, "demand", (each.low, each.high), outcomes, each.value))
    for name in PriceTable.__struct_fields__:
        bounds = getattr(prices.price, name)
        outcomes = (
            calculate(assume, demand, {**price, name: bounds.low}),
            calculate(assume, demand, {**price, name: bounds.high}),
        )
        moves.append(_move(name, "price", (bounds.low, bounds.high), outcomes, bounds.value))
    return sorted(moves, key=lambda move: -move.swing)


def _move(name: str, kind: str, at: tuple[float, float], outcomes: tuple[Figures, Figures], value: float) -> Move:
    low, high = (each.numbers for each in outcomes)
    elasticity = None
    if value and at[0] != at[1]:
        middle = (low["cost"] + high["cost"]) / 2
        elasticity = (high["cost"] - low["cost"]) / middle / ((at[1] - at[0]) / value)
    return Move(
        name=name,
        kind=kind,
        at=at,
        cost=(low["cost"], high["cost"]),
        pods=(low["api_pods"], high["api_pods"]),
        cores=(low["cores"], high["cores"]),
        elasticity=elasticity,
    )


def moved(assume: Assumptions, name: str, factor: float) -> Assumptions:
    """Return the assumptions with one of them multiplied; a bound of its range, or it itself, where that ends."""
    value = getattr(assume, name)
    wanted = value * factor
    if isinstance(value, int):
        wanted = min(value - 1, round(wanted)) if factor < 1 else max(value + 1, round(wanted))
    everything = msgspec.structs.asdict(assume)
    # A share ends at 1, a utilisation before it.
    for candidate in (wanted, min(wanted, 1), min(wanted, 0.99), max(wanted, 1), value):
        try:
            return msgspec.convert({**everything, name: candidate}, Assumptions)
        except msgspec.ValidationError:
            continue
    raise AssertionError("the value itself is within its range")


def postgres_ms_per_bet(demand: Mapping[str, float], events_per_bet: float) -> float:
    """Return the CPU in ms of Postgres for a bet up to the match, at the rate that was measured.

    The parts were measured alone; their sum beside `bet_postgres_ms`, measured of the whole, is a check of the
    formulas. The last event of a bet is that of its settlement, which is not in the measurement.
    """
    batch = batch_of(demand["measured_bets_per_s"], demand["post_batch_ms"], demand["post_entry_ms"])
    posting = demand["post_cpu_entry_ms"] + demand["post_cpu_batch_ms"] / batch
    events = max(1.0, events_per_bet - 1) * (demand["relay_postgres_ms"] + demand["projector_postgres_ms"])
    return posting + events + demand["matcher_postgres_ms"]


def notes_of(assume: Assumptions, demands: Demands, figures: Figures) -> list[str]:
    """Return what was measured, what is assumed to scale from it, and why that may fail."""
    numbers = figures.numbers
    demand = demands.demand
    factor = numbers["bets_per_s"] / demand["measured_bets_per_s"].value if "measured_bets_per_s" in demand else None
    notes = []
    if factor is not None:
        notes.append(
            f"Measured on {demands.cores} cores that ran everything at once: "
            f"{demand['measured_bets_per_s'].value:,.0f} bets/s without a growing backlog. The plan is for "
            f"{numbers['bets_per_s']:,.0f} bets/s, {factor:.3g} times as many: it is an extrapolation."
        )
    if factor is not None and "bet_postgres_ms" in demand:
        model = postgres_ms_per_bet({name: each.value for name, each in demand.items()}, assume.events_per_bet)
        notes.append(
            f"Check: at the measured rate, of one process and one server, the formulas give {model:.2g} ms of Postgres "
            f"for a bet that is not settled yet; measured were {demand['bet_postgres_ms'].value:.2g} ms."
        )
    notes += [
        "CPU for one operation is assumed to be the same on every core and at every size of the system. It may be "
        "higher: TLS and networks were not measured, a core in a cloud is often half of one, and caches are cold.",
        "Servers and pods are assumed to share nothing. The coherency term of the universal scalability law is "
        "refused: "
        + next((each.reason for each in demands.refusal if each.what == "usl_coherency"), "no data on it")
        + ".",
    ]
    if "aging_entries" in demand and numbers["entries_per_server"] > demand["aging_entries"].value:
        notes.append(
            f"A server would hold {numbers['entries_per_server']:,.0f} entries; ageing was measured to "
            f"{demand['aging_entries'].value:,.0f}, and its factor is kept beyond."
        )
    if numbers["cells"] > 1:
        notes.append(
            f"Every API process opens {assume.writer_connections + assume.pool_size} connections to each server "
            f"that it posts to: {numbers['api_processes']:.0f} processes are more than {assume.max_connections} "
            f"connections allow. The plan lets the gateway route users to {numbers['cells']:.0f} groups of pods by "
            "shard, which the service does not do itself."
        )
    notes.append(
        f"{numbers['writers']:,.0f} writers share the writes, so a batch holds {numbers['mean_batch']:.3g} commands on "
        f"average and Postgres pays {numbers['postgres_ms_per_write']:.2g} ms a write. Fuller batches are cheaper."
    )
    if numbers["entries_per_s"] > 0:
        notes.append(
            f"{assume.entries_per_user:,.0f} entries a user are reached after {numbers['ledger_days']:.2g} days at the "
            "planned mean rate; older entries have to be archived by then, which is not in the plan."
        )
    if assume.zones > 1:
        notes.append(
            "With a zone lost, a standby of the same size takes over for each primary there, so the servers keep their "
            "headroom; without a standby they would not."
            if assume.standbys
            else "Without a standby, the primaries of a lost zone are gone until they are restored from the archive."
        )
    return notes
