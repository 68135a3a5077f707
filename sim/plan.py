"""How many pods, consumers, servers, brokers and nodes a number of users needs, what binds each, and what it costs.

Every figure is arithmetic on the demands (`sim/demands.py`), on stated assumptions and on prices, by the utilisation
law U = X·D (Denning and Buzen, "The operational analysis of queueing network models", ACM Computing Surveys 10 (1978)):
cores = rate × CPU for one operation ÷ the utilisation that is aimed at. Batches follow the gated batch server of
sim/queueing.py. Nothing here is a latency.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import msgspec

from reference.commands import TOPIC_OF
from reference.routing import SHARDS
from sim.tables import override, read_toml

PLANS: Final = Path(__file__).with_name("plans")
PRICES: Final = Path(__file__).with_name("prices.toml")
DAY_S: Final = 86_400
MONTH_S: Final = 30 * DAY_S
BATCH_MAX: Final = 256
"""The service's largest batch, at which a writer carries most."""
TOPICS: Final = len(set(TOPIC_OF.values())) + 2
"""Topics of the service: those of the outbox, the balance updates, and the dead letters."""
GROUPS: Final = ("projector", "matcher", "settler")
"""Consumer groups that scale by partitions."""
COMMAND_LINE: Final = "command line"
KINDS: Final = ("seed", "measured", "chosen", COMMAND_LINE)

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Some = Annotated[int, msgspec.Meta(ge=0, le=1_000)]
Size = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Busy = Annotated[float, msgspec.Meta(ge=0.05, le=0.99)]
AtLeastOne = Annotated[float, msgspec.Meta(ge=1, le=1_000)]


class Assumptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the plan takes for granted; the units are in the names, shares are 0 to 1."""

    users: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
    requests_per_user_per_s: Size
    peak_factor: AtLeastOne
    mean_share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    """Mean of a day as a share of the planned rate: what storage and traffic grow with."""
    read_share: Share
    cache_hit_share: Share
    strong_read_share: Share
    bet_share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    events_per_bet: AtLeastOne
    entries_per_bet: AtLeastOne
    entries_per_user: Size
    """Ledger entries that are kept on the servers."""
    outbox_days: Amount
    retention_days: Amount
    archive_days: Amount
    backups: Some
    standbys: Some
    replication_factor: Annotated[int, msgspec.Meta(ge=1, le=9)]
    zones: Annotated[int, msgspec.Meta(ge=1, le=9)]
    target_utilisation: Busy
    zone_lost_utilisation: Busy
    outage_s: Amount
    drain_s: Size
    pod_cores: Count
    pod_memory_gb: Size
    worker_cores: Count
    relay_copies: Count
    server_cores: Count
    server_memory_gb: Size
    server_disk_gb: Size
    disk_fill_share: Busy
    max_connections: Count
    writer_connections: Count
    pool_size: Count
    worker_connections: Some
    broker_cores: Count
    broker_memory_gb: Size
    broker_disk_gb: Size
    broker_network_mb_per_s: Size
    broker_partitions: Count
    partition_headroom: AtLeastOne
    redis_memory_gb: Size
    redis_copies: Count
    single_server_cores: Count
    """The largest server that levels 1 and 2 may have, of which there is one."""
    single_server_disk_gb: Size
    queue_jobs_per_s: Size
    """What the queue of levels 1 and 2 carries."""
    overhead_share: Amount


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A plan's assumptions, each with its source, which begins with its kind."""

    name: str
    assume: Assumptions
    source: dict[str, str]

    def __post_init__(self) -> None:
        """Refuse an assumption without a source, and a source of none."""
        for name in Assumptions.__struct_fields__:
            if name not in self.source:
                raise ValueError(f"source must say where {name} comes from")
        for name, text in self.source.items():
            if name not in Assumptions.__struct_fields__:
                raise ValueError(f"source names {name}, which is no assumption")
            if not text.startswith(KINDS):
                raise ValueError(f"source of {name} must begin with {', '.join(KINDS[:3])}, not {text!r}")


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One price between two bounds."""

    value: Amount
    low: Amount
    high: Amount
    unit: str
    source: str

    def __post_init__(self) -> None:
        """Refuse bounds that do not hold the value."""
        if not self.low <= self.value <= self.high:
            raise ValueError(f"value must be from low, {self.low:g}, to high, {self.high:g}, not {self.value:g}")


class PriceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The prices that a plan needs."""

    core_month: Price
    memory_gb_month: Price
    disk_gb_month: Price
    object_gb_month: Price
    zone_gb: Price


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A version of the prices."""

    version: str
    date: str
    currency: str
    price: PriceTable


def read_plan(path: Path, changes: tuple[str, ...] = ()) -> Plan:
    """Read a plan and change assumptions, as in "users=2e6". Raises TableError with file, line and field, or --set."""
    plan = read_toml(path, Plan)
    for change in changes:
        name = change.partition("=")[0].strip()
        assume = override(plan.assume, change)
        source = {**plan.source, name: COMMAND_LINE}
        plan = msgspec.structs.replace(plan, assume=assume, source=source)
    return plan


def read_prices(path: Path = PRICES) -> Prices:
    """Read a version of the prices. Raises TableError."""
    return read_toml(path, Prices)


@dataclass(frozen=True)
class Figures:
    """One outcome: numbers by name (units in the names), what binds each component, and what does not work."""

    numbers: dict[str, float]
    binding: dict[str, str]
    constraints: dict[str, dict[str, float]] = field(default_factory=dict)
    """What each constraint of a component alone would need."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rates:
    """Operations per second of the planned moment."""

    requests: float
    reads: float
    writes: float
    bets: float
    events: float
    entries: float


def rates_of(assume: Assumptions) -> Rates:
    """Return the planned rates; a deposit or withdrawal is one write, one entry and one event."""
    requests = assume.users * assume.requests_per_user_per_s * assume.peak_factor
    reads = requests * assume.read_share
    writes = requests - reads
    bets = writes * assume.bet_share
    moved = writes - bets
    return Rates(
        requests=requests,
        reads=reads,
        writes=writes,
        bets=bets,
        events=bets * assume.events_per_bet + moved,
        entries=bets * assume.entries_per_bet + moved,
    )


def batch_of(rate_per_s: float, batch_ms: float, entry_ms: float) -> float:
    """Return the mean batch of one writer that takes what gathered while it posted, 1 to BATCH_MAX.

    A batch of b takes batch_ms + b·entry_ms, in which λ times that arrive: b = λF/(1−λP) where that is above 1.
    """
    per_ms = rate_per_s / 1000
    left = 1 - per_ms * entry_ms
    return BATCH_MAX if left <= 0 else min(BATCH_MAX, max(1.0, per_ms * batch_ms / left))


def spread(needed: float, each: float, assume: Assumptions, minimum: int = 1) -> tuple[int, str, dict[str, float]]:
    """Return how many equal parts carry `needed` units of work at `each` units a part, also with a zone lost.

    The count is a whole multiple of the zones, so that each zone holds as many. What binds comes second.
    """
    zones = assume.zones
    wants = {"load": needed / (each * assume.target_utilisation), "minimum": float(minimum)}
    if zones > 1:
        wants["a zone lost"] = needed / (each * assume.zone_lost_utilisation) * zones / (zones - 1)
        wants["one a zone"] = float(zones)
    binding = max(wants, key=lambda name: wants[name])
    return math.ceil(_settled(wants[binding]) / zones) * zones, binding, wants


def _settled(value: float) -> float:
    """Take away the dust of binary fractions, which would make a whole number one more."""
    return round(value, 9)


def calculate(assume: Assumptions, demand: Mapping[str, float], price: Mapping[str, float]) -> Figures:
    """Return the plan for one value of every demand (see sim/demands.py) and price. Deterministic."""
    numbers: dict[str, float] = {}
    figures = Figures(numbers, {})
    rates = rates_of(assume)
    for name in Rates.__dataclass_fields__:
        numbers[f"{name}_per_s"] = getattr(rates, name)
    _api(assume, demand, rates, figures)
    _consumers(assume, demand, rates, figures)
    _storage(assume, demand, rates, figures)
    _servers(assume, demand, rates, figures)
    _brokers(assume, demand, rates, figures)
    _redis(assume, demand, rates, figures)
    _totals(assume, demand, rates, figures)
    _cost(assume, price, figures)
    return figures


def ratio(amount: float, per: float) -> float:
    """Return amount ÷ per, infinite where nothing is needed per unit."""
    return amount / per if per > 0 else math.inf


def _count(figures: Figures, name: str, made: tuple[int, str, dict[str, float]], what: str) -> None:
    figures.numbers[name], binding, figures.constraints[name] = made
    figures.binding[name] = f"{what}: {binding}" if what else binding


def read_ms(assume: Assumptions, demand: Mapping[str, float], group: str) -> float:
    """Return the CPU in ms that one read of the mix costs a group of processes."""
    weak = 1 - assume.strong_read_share
    mix = {
        "redis": weak * assume.cache_hit_share,
        "projection": weak * (1 - assume.cache_hit_share),
        "ledger": assume.strong_read_share,
    }
    return sum(share * demand.get(f"read_{source}_{group}_ms", 0.0) for source, share in mix.items())


def _api(assume: Assumptions, demand: Mapping[str, float], rates: Rates, figures: Figures) -> None:
    cores = (rates.writes * demand["bet_api_ms"] + rates.reads * read_ms(assume, demand, "api")) / 1000
    fitting = int(assume.pod_memory_gb * 1000 / demand["api_mb"])
    processes = min(assume.pod_cores, fitting)
    if processes < 1:
        figures.problems.append(f"a pod of {assume.pod_memory_gb:g} GB does not hold one API process")
        processes = 1
    _count(figures, "api_pods", spread(cores, processes, assume), "memory" if fitting < assume.pod_cores else "CPU")
    figures.numbers["api_busy_cores"] = cores
    figures.numbers["api_processes"] = figures.numbers["api_pods"] * processes
    # What one pod carries at the utilisation that is aimed at, of this mix.
    figures.numbers["pod_requests_per_s"] = ratio(rates.requests, cores) * processes * assume.target_utilisation


def _consumers(assume: Assumptions, demand: Mapping[str, float], rates: Rates, figures: Figures) -> None:
    for group, rate in zip(GROUPS, (rates.events, rates.bets, rates.bets), strict=True):
        count, binding, wants = spread(rate, demand[f"{group}_per_s"], assume)
        # What gathered in an outage comes on top of what goes on coming.
        wants["drain"] = rate * (1 + assume.outage_s / assume.drain_s) / demand[f"{group}_per_s"]
        drained = math.ceil(_settled(wants["drain"]) / assume.zones) * assume.zones
        if drained > count or wants["drain"] > wants[binding]:
            count, binding = max(count, drained), "drain"
        _count(figures, f"{group}s", (count, binding, wants), "rate")
    _count(figures, "reconcilers", spread(rates.bets * demand["bet_reconciler_ms"] / 1000, 1, assume), "CPU")
    figures.numbers["consumers"] = sum(figures.numbers[f"{group}s"] for group in GROUPS)
    partitions = math.ceil(max(figures.numbers[f"{group}s"] for group in GROUPS) * assume.partition_headroom)
    figures.numbers["partitions_per_topic"] = partitions
    figures.numbers["partitions"] = partitions * TOPICS
    figures.binding["partitions"] = "the largest consumer group, with headroom"


def _storage(assume: Assumptions, demand: Mapping[str, float], rates: Rates, figures: Figures) -> None:
    numbers = figures.numbers
    kept = assume.users * assume.entries_per_user
    numbers["ledger_entries"] = kept
    numbers["ledger_gb"] = kept * demand["ledger_bytes_per_entry"] / 1e9
    numbers["other_gb"] = kept / assume.entries_per_bet * demand["other_bytes_per_bet"] / 1e9
    events = rates.events * assume.mean_share * DAY_S
    numbers["outbox_gb"] = events * assume.outbox_days * demand["outbox_bytes_per_event"] / 1e9
    numbers["database_gb"] = numbers["ledger_gb"] + numbers["other_gb"] + numbers["outbox_gb"]
    numbers["database_copies_gb"] = numbers["database_gb"] * (1 + assume.standbys)
    numbers["ten_million_entries_gb"] = 1e7 * demand["ledger_bytes_per_entry"] / 1e9
    numbers["ledger_days"] = kept / (rates.entries * assume.mean_share * DAY_S) if rates.entries else math.inf
    numbers["kafka_gb"] = events * assume.retention_days * demand["outbox_bytes_per_event"] / 1e9
    numbers["kafka_copies_gb"] = numbers["kafka_gb"] * assume.replication_factor
    wal = rates.bets * demand["wal_bytes_per_bet"]
    wal += (rates.writes - rates.bets) * demand["wal_bytes_per_bet_accepted"]
    numbers["wal_mb_per_s"] = wal * assume.mean_share / 1e6
    numbers["wal_archive_gb"] = wal * assume.mean_share * DAY_S * assume.archive_days / 1e9
    numbers["backup_gb"] = (numbers["ledger_gb"] + numbers["other_gb"]) * assume.backups


def _servers(assume: Assumptions, demand: Mapping[str, float], rates: Rates, figures: Figures) -> None:
    numbers = figures.numbers
    writer_ms, entry_ms = demand["post_batch_ms"], demand["post_entry_ms"]
    batch_cpu, entry_cpu = demand["post_cpu_batch_ms"], demand["post_cpu_entry_ms"]
    aged = demand["aging_factor"]
    workers = numbers["consumers"] + numbers["reconcilers"] + assume.relay_copies
    taken = workers * assume.worker_connections
    each = assume.writer_connections + assume.pool_size
    left = (assume.max_connections - taken) // each
    cells = max(1, math.ceil(numbers["api_processes"] / left)) if left > 0 else numbers["api_processes"]
    if left <= 0:
        figures.problems.append(
            f"workers alone hold {taken:.0f} of the {assume.max_connections} connections of a server: "
            "raise max_connections or put a pooler between"
        )
    numbers["cells"] = cells
    figures.binding["cells"] = "connections"
    per_server = math.ceil(numbers["api_processes"] / cells)
    numbers["connections_per_server"] = per_server * each + taken
    # Cores that a write costs whatever its batch, and what the workers and the reads cost.
    behind = rates.events * (demand["relay_postgres_ms"] + demand["projector_postgres_ms"])
    behind += rates.bets * (demand["matcher_postgres_ms"] + demand["settler_postgres_ms"])
    behind += rates.reads * read_ms(assume, demand, "postgres")
    fixed = (behind + rates.writes * entry_cpu * aged) / 1000
    cap = assume.server_cores * assume.target_utilisation
    alone = (fixed + rates.writes * batch_cpu * aged / 1000) / cap
    # Where batches form, every writer is busy all the time and costs batch_cpu of each writer_ms.
    slope = ratio(batch_cpu * aged, writer_ms)
    together = math.inf
    if cap > slope * per_server:
        together = (fixed - slope * rates.writes * entry_ms / 1000) / (cap - slope * per_server)
    wants = {
        "CPU": min(alone, max(together, 0.0)),
        "posting": rates.writes * (writer_ms / BATCH_MAX + entry_ms) / 1000 / per_server / assume.target_utilisation,
        "storage": numbers["database_gb"] / (assume.server_disk_gb * assume.disk_fill_share),
        "relay": rates.events / (demand["relay_per_s"] * assume.target_utilisation),
        "cells": float(cells),
    }
    binding = max(wants, key=lambda name: wants[name])
    servers = math.ceil(_settled(wants[binding]))
    _count(figures, "servers", (servers, binding, wants), "")
    batch = batch_of(rates.writes / (per_server * servers), writer_ms, entry_ms)
    numbers["mean_batch"] = batch
    numbers["writers"] = per_server * servers
    posting_ms = (entry_cpu + batch_cpu / batch) * aged
    numbers["postgres_busy_cores"] = (behind + rates.writes * posting_ms) / 1000
    numbers["postgres_ms_per_write"] = posting_ms
    numbers["entries_per_server"] = numbers["ledger_entries"] / servers
    numbers["relays"] = servers * assume.relay_copies
    numbers["database_servers"] = servers * (1 + assume.standbys)
    if servers > SHARDS:
        figures.problems.append(
            f"{servers} servers are more than the {SHARDS} logical shards: give each server more cores or disk"
        )
    if demand["postgres_mb"] > assume.server_memory_gb * 1000:
        figures.problems.append(
            f"a server of {assume.server_memory_gb:g} GB is smaller than what Postgres held when measured"
        )


def _brokers(assume: Assumptions, demand: Mapping[str, float], rates: Rates, figures: Figures) -> None:
    copies = assume.replication_factor
    busy = rates.bets * demand["bet_kafka_ms"] / 1000 * copies
    stream = rates.events * demand["outbox_bytes_per_event"] / 1e6
    # In once, to and from each further copy, and out to each group.
    network = stream * (1 + 2 * (copies - 1) + len(GROUPS))
    by_cpu, by_network = (
        spread(needed, each, assume)[2]
        for needed, each in ((busy, assume.broker_cores), (network, assume.broker_network_mb_per_s))
    )
    wants = {
        **{f"CPU: {name}": value for name, value in by_cpu.items()},
        **{f"network: {name}": value for name, value in by_network.items()},
        "storage": figures.numbers["kafka_copies_gb"] / (assume.broker_disk_gb * assume.disk_fill_share),
        "partitions": figures.numbers["partitions"] * copies / assume.broker_partitions,
        "copies": float(copies),
    }
    binding = max(wants, key=lambda name: wants[name])
    brokers = math.ceil(_settled(wants[binding]) / assume.zones) * assume.zones
    _count(figures, "brokers", (brokers, binding, wants), "")
    figures.numbers["kafka_busy_cores"] = busy
    figures.numbers["kafka_network_mb_per_s"] = network
    figures.numbers["kafka_stream_mb_per_s"] = stream


def _redis(assume: Assumptions, demand: Mapping[str, float], rates: Rates, figures: Figures) -> None:
    size_gb = assume.users * demand["redis_bytes_per_wallet"] / 1e9
    busy = (rates.reads * read_ms(assume, demand, "redis") + rates.bets * demand["bet_redis_ms"]) / 1000
    wants = {
        "memory": size_gb / (assume.redis_memory_gb * assume.disk_fill_share),
        # One thread of Redis answers.
        "CPU": busy / assume.target_utilisation,
        "minimum": 1.0,
    }
    binding = max(wants, key=lambda name: wants[name])
    parts = math.ceil(_settled(wants[binding]))
    _count(figures, "redis_nodes", (parts * assume.redis_copies, binding, wants), "")
    figures.numbers["redis_gb"] = size_gb
    figures.numbers["redis_busy_cores"] = busy


def _totals(assume: Assumptions, demand: Mapping[str, float], rates: Rates, figures: Figures) -> None:
    numbers = figures.numbers
    workers = numbers["consumers"] + numbers["reconcilers"] + numbers["relays"]
    numbers["workers"] = workers
    numbers["api_cores"] = numbers["api_pods"] * assume.pod_cores
    numbers["worker_cores"] = workers * assume.worker_cores
    numbers["database_cores"] = numbers["database_servers"] * assume.server_cores
    numbers["kafka_cores"] = numbers["brokers"] * assume.broker_cores
    numbers["redis_cores"] = numbers["redis_nodes"]
    parts = ("api", "worker", "database", "kafka", "redis")
    numbers["cores"] = sum(numbers[f"{part}_cores"] for part in parts)
    numbers["api_memory_gb"] = numbers["api_pods"] * assume.pod_memory_gb
    held_mb = sum(numbers[f"{group}s"] * demand[f"{group}_mb"] for group in (*GROUPS, "reconciler", "relay"))
    numbers["worker_memory_gb"] = held_mb / 1000 / assume.target_utilisation
    numbers["database_memory_gb"] = numbers["database_servers"] * assume.server_memory_gb
    numbers["kafka_memory_gb"] = numbers["brokers"] * assume.broker_memory_gb
    numbers["redis_memory_gb"] = numbers["redis_nodes"] * assume.redis_memory_gb
    numbers["memory_gb"] = sum(numbers[f"{part}_memory_gb"] for part in parts)
    far = (assume.zones - 1) / assume.zones
    # Copies lie in other zones; a consumer's or leader's partner is in another one as often as chance has it.
    sent = numbers["wal_mb_per_s"] * (assume.standbys if assume.zones > 1 else 0)
    stream = numbers["kafka_stream_mb_per_s"] * assume.mean_share
    copies = (assume.replication_factor - 1) if assume.zones > 1 else 0
    sent += stream * (copies + far * (1 + len(GROUPS)))
    numbers["zone_gb_month"] = sent / 1000 * MONTH_S
    if assume.zones > 1:
        rest = (assume.zones - 1) / assume.zones
        numbers["api_use_zone_lost"] = numbers["api_busy_cores"] / (numbers["api_processes"] * rest)
        numbers["kafka_use_zone_lost"] = numbers["kafka_busy_cores"] / (numbers["kafka_cores"] * rest)
        numbers["consumer_use_zone_lost"] = max(
            rate / (numbers[f"{group}s"] * rest * demand[f"{group}_per_s"])
            for group, rate in zip(GROUPS, (rates.events, rates.bets, rates.bets), strict=True)
        )


def _cost(assume: Assumptions, price: Mapping[str, float], figures: Figures) -> None:
    numbers = figures.numbers
    for part in ("api", "worker", "database", "kafka", "redis"):
        cost = numbers[f"{part}_cores"] * price["core_month"]
        cost += numbers[f"{part}_memory_gb"] * price["memory_gb_month"]
        numbers[f"{part}_cost"] = cost
    disk = price["disk_gb_month"] / assume.disk_fill_share
    numbers["database_cost"] += numbers["database_copies_gb"] * disk
    numbers["kafka_cost"] += numbers["kafka_copies_gb"] * disk
    numbers["archive_cost"] = (numbers["wal_archive_gb"] + numbers["backup_gb"]) * price["object_gb_month"]
    numbers["traffic_cost"] = numbers["zone_gb_month"] * price["zone_gb"]
    whole = sum(numbers[f"{part}_cost"] for part in COST_PARTS[:-1])
    numbers["overhead_cost"] = whole * assume.overhead_share
    numbers["cost"] = whole + numbers["overhead_cost"]


COST_PARTS: Final = ("api", "worker", "database", "kafka", "redis", "archive", "traffic", "overhead")
"""What the monthly cost is made of; the last is a share of the others."""
