"""The three levels of the seed on the same demands: at how many users each stops holding, why, and what it costs.

Levels 1 and 2 have one Postgres and post each command in a transaction of its own. Level 1 reads the ledger and has
no events; level 2 has an outbox, events and a cached projection; level 3 is the sharded service with batches, as
`sim/plan.py` calculates it. "Holds" is a matter of capacity: one server is one failure, whatever it carries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from reference.routing import SHARDS
from sim.plan import GROUPS, Assumptions, calculate, rates_of, ratio, read_ms, spread

COUNTS: Final = (500, 2_000, 10_000, 100_000, 1_000_000)
"""Users at which the seed's table changes its level, and those between."""
MAX_USERS: Final = 1_000_000_000
BISECTIONS: Final = 40
SERVER_CORES_MIN: Final = 2
MEMORY_PER_CORE_GB: Final = 2.0


@dataclass(frozen=True)
class Level:
    """One level: where it ends, what ends it, and its monthly cost at each of COUNTS that it carries."""

    name: str
    pattern: str
    users_max: float
    binding: str
    limits: dict[str, float]
    """Users that each constraint alone would allow."""
    costs: dict[int, float | None]
    seed_users: str
    seed_cost: str


def levels(assume: Assumptions, demand: Mapping[str, float], price: Mapping[str, float]) -> list[Level]:
    """Return the three levels."""
    return [
        _single(assume, demand, price, events=False),
        _single(assume, demand, price, events=True),
        _sharded(assume, demand, price),
    ]


def single_postgres_cores(assume: Assumptions, demand: Mapping[str, float], *, events: bool) -> float:
    """Return the busy cores of the one Postgres of level 1, or with events of level 2; linear in the users."""
    rates = rates_of(assume)
    each = (demand["post_cpu_batch_ms"] + demand["post_cpu_entry_ms"]) * demand["aging_factor"]
    busy = rates.writes * each + rates.bets * (demand["matcher_postgres_ms"] + demand["settler_postgres_ms"])
    if events:
        busy += rates.events * (demand["relay_postgres_ms"] + demand["projector_postgres_ms"])
        busy += rates.reads * read_ms(assume, demand, "postgres")
    else:
        busy += rates.reads * demand["read_ledger_postgres_ms"]
    return busy / 1000


def _api_cores(assume: Assumptions, demand: Mapping[str, float], *, events: bool) -> float:
    rates = rates_of(assume)
    read = read_ms(assume, demand, "api") if events else demand["read_ledger_api_ms"]
    return (rates.writes * demand["bet_api_ms"] + rates.reads * read) / 1000


def _bytes_per_user(assume: Assumptions, demand: Mapping[str, float], *, events: bool) -> float:
    entry = demand["ledger_bytes_per_entry"] + demand["other_bytes_per_bet"] / assume.entries_per_bet
    size = assume.entries_per_user * entry
    if events:
        kept_s = assume.outbox_days * 86_400 * assume.mean_share
        size += rates_of(assume).events / assume.users * kept_s * demand["outbox_bytes_per_event"]
    return size


def _single(assume: Assumptions, demand: Mapping[str, float], price: Mapping[str, float], *, events: bool) -> Level:
    users = assume.users
    rates = rates_of(assume)
    busy = single_postgres_cores(assume, demand, events=events)
    processes = _api_cores(assume, demand, events=events) / assume.target_utilisation
    each = assume.writer_connections + assume.pool_size
    disk_bytes = assume.single_server_disk_gb * assume.disk_fill_share * 1e9
    limits = {
        "CPU of Postgres": ratio(assume.single_server_cores * assume.target_utilisation, busy) * users,
        "disk": ratio(disk_bytes, _bytes_per_user(assume, demand, events=events)),
        "connections": ratio(assume.max_connections, processes * each) * users,
        "queue": ratio(assume.queue_jobs_per_s, rates.writes) * users,
    }
    if events:
        limits["relay"] = ratio(demand["relay_per_s"] * assume.target_utilisation, rates.events) * users
    binding = min(limits, key=lambda name: limits[name])
    costs: dict[int, float | None] = {}
    for count in COUNTS:
        at = msgspec.structs.replace(assume, users=count)
        costs[count] = _single_cost(at, demand, price, events=events) if count <= limits[binding] else None
    return Level(
        name="Level 2" if events else "Level 1",
        pattern="one Postgres, outbox and events, cached projection" if events else "one Postgres, queue and worker",
        users_max=limits[binding],
        binding=binding,
        limits=limits,
        costs=costs,
        seed_users="2k-10k" if events else "500-2k",
        seed_cost="$15k/month" if events else "$5k/month",
    )


def _single_cost(
    assume: Assumptions, demand: Mapping[str, float], price: Mapping[str, float], *, events: bool
) -> float:
    """Return the monthly cost of level 1 or 2 by the prices of the plan, standbys and overhead as there."""
    rates = rates_of(assume)
    busy = single_postgres_cores(assume, demand, events=events)
    copies = 1 + assume.standbys
    cores = max(SERVER_CORES_MIN, busy / assume.target_utilisation) * copies
    pods, _, _ = spread(_api_cores(assume, demand, events=events), assume.pod_cores, assume)
    cores += pods * assume.pod_cores
    workers = [rates.bets / demand["settler_per_s"]]
    if events:
        workers = [
            rate / demand[f"{group}_per_s"]
            for group, rate in zip(GROUPS, (rates.events, rates.bets, rates.bets), strict=True)
        ]
    cores += sum(spread(each, 1, assume)[0] for each in workers) * assume.worker_cores + assume.redis_copies
    stored_gb = assume.users * _bytes_per_user(assume, demand, events=events) / 1e9
    wal_mb_per_s = rates.bets * demand["wal_bytes_per_bet"] * assume.mean_share / 1e6
    month_gb = wal_mb_per_s / 1000 * 86_400 * 30
    cost = cores * (price["core_month"] + MEMORY_PER_CORE_GB * price["memory_gb_month"])
    cost += stored_gb * copies * price["disk_gb_month"] / assume.disk_fill_share
    cost += stored_gb * assume.backups * price["object_gb_month"]
    cost += month_gb * assume.archive_days / 30 * price["object_gb_month"]
    cost += month_gb * (assume.standbys if assume.zones > 1 else 0) * price["zone_gb"]
    return cost * (1 + assume.overhead_share)


def _sharded(assume: Assumptions, demand: Mapping[str, float], price: Mapping[str, float]) -> Level:
    def servers(users: int) -> float:
        return calculate(msgspec.structs.replace(assume, users=users), demand, price).numbers["servers"]

    low, high = 1, MAX_USERS
    for _ in range(BISECTIONS):
        middle = (low + high) // 2
        if high - low <= 1:
            break
        low, high = (middle, high) if servers(middle) <= SHARDS else (low, middle)
    beyond = calculate(msgspec.structs.replace(assume, users=high), demand, price)
    return Level(
        name="Level 3",
        pattern=f"ledger-first, up to {SHARDS} servers",
        users_max=low,
        binding=f"{SHARDS} servers, by {beyond.binding['servers']}",
        limits={f"{SHARDS} servers": low},
        costs={
            count: calculate(msgspec.structs.replace(assume, users=count), demand, price).numbers["cost"]
            if count <= low
            else None
            for count in COUNTS
        },
        seed_users="10k-1M",
        seed_cost="$100k/month",
    )
