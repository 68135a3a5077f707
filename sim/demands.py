"""What one unit of work costs (CPU, bytes, memory) and how much one process does, read from results of the benchmark.

`read_bench` takes the JSON of `ledgerproof bench` (one result or several) and gives every figure with its interval,
its unit and its source, and a refusal with its reason for each figure that those results cannot support.
`write_demands` and `read_demands` keep them as TOML.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from sim.tables import read_toml

DEMANDS: Final = Path(__file__).with_name("demands.toml")
REPEATABILITY: Final = 1 / 3
"""Figures of one machine move by a third from hour to hour (README, "How fast it is"): with fewer observations than
OBSERVATIONS_MIN an interval is at least this wide to either side."""
OBSERVATIONS_MIN: Final = 3
BETS: Final = ("http_single_bets_sustained", "http_single_bets_accepted")
WORKERS: Final = {
    "relay": "relay_events",
    "projector": "projector_events",
    "matcher": "matcher_bets",
    "settler": "settler_bets",
}
"""Each worker and the row that measures it alone."""
READS: Final = {"redis": "reads_redis", "projection": "reads_projection", "ledger": "reads_ledger"}
GROUPS: Final = ("api", "relay", "matcher", "settler", "projector", "reconciler", "pg", "kafka", "redis")
LEDGER: Final = "wallet_ledger"
OUTBOX: Final = "events"
DIRTY: Final = "-dirty"


class Demand(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One figure: what it is of, its value between two bounds, and where it comes from."""

    of: str
    value: float
    low: float
    high: float
    unit: str
    source: str

    def __post_init__(self) -> None:
        """Refuse a value that is negative or not between its bounds."""
        if self.low < 0:
            raise ValueError(f"low must be at least 0, not {self.low:g}")
        if self.value < self.low:
            raise ValueError(f"value must be at least low, {self.low:g}, not {self.value:g}")
        if self.high < self.value:
            raise ValueError(f"value must be at most high, {self.high:g}, not {self.value:g}")


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A figure that the data do not support, and why."""

    what: str
    reason: str


class Demands(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every figure by name, what was refused, and where all of it was measured."""

    command: str
    """What wrote the file."""
    commit: str
    machine: str
    measured_at: str
    cores: int
    """Cores of the machine that everything ran on together."""
    demand: dict[str, Demand]
    refusal: list[Refusal] = []


class BenchRow(msgspec.Struct, kw_only=True):
    """What is read of one row of the benchmark; see ledgerproof/bench/row.py."""

    name: str
    variant: str = ""
    rate: float | None = None
    valid: bool = True
    reason: str = ""
    batch_size: int | None = None
    data_age: int = 0
    samples: int = 0
    cpu_ms_per_op: dict[str, float] = {}
    details: dict[str, Any] = {}


class BenchFile(msgspec.Struct, kw_only=True):
    """What is read of a result of `ledgerproof bench --json`; other fields of it are of no matter here."""

    commit: str
    machine: dict[str, Any]
    started_at: str
    quick: bool
    servers: int
    apis: int
    rows: list[BenchRow]
    checked: bool | None
    peak_rss_mb: dict[str, float] = {}


class BenchRefused(ValueError):
    """Results from which nothing may be taken; the message says why and what to do."""


def decode_bench(data: bytes, name: str) -> BenchFile:
    """Return one result of the benchmark. Raises BenchRefused if it is none, or if its ledger was found wrong."""
    try:
        bench = msgspec.json.decode(data, type=BenchFile)
    except msgspec.DecodeError as error:
        raise BenchRefused(
            f"{name} is not a result of the benchmark ({error}): `ledgerproof bench --json {name}`"
        ) from error
    if bench.checked is False:
        raise BenchRefused(f"{name}: the ledger of this run was not found consistent, so none of its figures counts")
    return bench


def read_bench(benches: Sequence[BenchFile], *, wallets: int, command: str) -> Demands:
    """Return every figure that the results support, and the refusals.

    `wallets` is the number of wallets of the benchmark's workload, whose values Redis held. Raises BenchRefused if
    there is no result, or if they come from different machines.
    """
    if not benches:
        raise BenchRefused("at least one result of the benchmark is needed")
    machines = sorted({_machine(bench) for bench in benches})
    if len(machines) > 1:
        raise BenchRefused(f"the results come from different machines, take those of one: {'; '.join(machines)}")
    found = _Found(benches)
    for gather in (_bets, _posting, _workers, _reads, _bytes, _memory):
        gather(found)
    _redis_values(found, wallets)
    _always_refused(found)
    return Demands(
        command=command,
        commit=", ".join(sorted({bench.commit for bench in benches})),
        machine=machines[0],
        measured_at=", ".join(bench.started_at for bench in benches),
        cores=int(benches[0].machine.get("cores", 1)),
        demand=found.demands,
        refusal=found.refusals,
    )


def read_demands(path: Path = DEMANDS) -> Demands:
    """Read the stored figures. Raises TableError naming the file, the line and the field."""
    return read_toml(path, Demands)


def write_demands(demands: Demands, path: Path) -> None:
    """Write the figures as TOML. Raises OSError."""
    lines = [
        "# What one unit of work costs, for `ledgerproof sim plan`. Written by `ledgerproof sim demands`: do not edit,",
        "# measure again. Each value stands between two bounds and names the rows of the benchmark it comes from.",
        "",
    ]
    lines += [f"{name} = {_toml(getattr(demands, name))}" for name in Demands.__struct_fields__[:5]]
    for name, demand in demands.demand.items():
        lines += [
            "",
            f"[demand.{name}]",
            *(f"{key} = {_toml(getattr(demand, key))}" for key in Demand.__struct_fields__),
        ]
    for refusal in demands.refusal:
        lines += ["", "[[refusal]]", f"what = {_toml(refusal.what)}", f"reason = {_toml(refusal.reason)}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: str | float) -> str:
    # A JSON string without escaped slashes is a TOML string, and so is a number.
    return json.dumps(value, ensure_ascii=False)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, lowest and highest of observations; few of them are given REPEATABILITY to either side."""
    middle = float(np.median(values))
    low, high = min(values), max(values)
    if len(values) < OBSERVATIONS_MIN:
        low, high = min(low, middle * (1 - REPEATABILITY)), max(high, middle * (1 + REPEATABILITY))
    return middle, low, high


class _Found:
    """What was taken from the results so far."""

    def __init__(self, benches: Sequence[BenchFile]) -> None:
        self.benches = benches
        self.demands: dict[str, Demand] = {}
        self.refusals: list[Refusal] = []

    def rows(self, *names: str) -> list[tuple[BenchFile, BenchRow]]:
        """Return the valid rows of these names."""
        return [(bench, row) for bench in self.benches for row in bench.rows if row.name in names and row.valid]

    def refuse(self, what: str, reason: str) -> None:
        """Note that a figure cannot be had."""
        self.refusals.append(Refusal(what=what, reason=reason))

    def why_not(self, *names: str) -> str:
        """Return why there is no valid row of these names."""
        said = [f"{row.name}: {row.reason}" for bench in self.benches for row in bench.rows if row.name in names]
        return "; ".join(said) if said else f"no row {' or '.join(names)} in the results"

    def add(self, name: str, of: str, unit: str, values: Sequence[float], source: str) -> None:
        """Note a figure as observed once or several times."""
        middle, low, high = interval(values)
        few = len(values) < OBSERVATIONS_MIN
        width = f"at least ±{REPEATABILITY:.0%}" if few else "lowest and highest"
        text = f"{source}; {len(values)} observation{'s' if len(values) != 1 else ''}, {width}"
        self.demands[name] = Demand(
            of=of, value=_short(middle), low=_short(low), high=_short(high), unit=unit, source=text
        )


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _machine(bench: BenchFile) -> str:
    machine = bench.machine
    return f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores, {machine.get('memory_gb', '?')} GB"


def _source(rows: Sequence[tuple[BenchFile, BenchRow]]) -> str:
    names = ", ".join(sorted({row.name for _, row in rows}))
    commits = ", ".join(sorted({bench.commit for bench, _ in rows}))
    samples = sum(row.samples for _, row in rows)
    return f"bench {names} at {commits}, {samples:,} operations"


def _cpu(found: _Found, name: str, of: str, rows: Sequence[tuple[BenchFile, BenchRow]], group: str) -> None:
    values = [row.cpu_ms_per_op[group] for _, row in rows if group in row.cpu_ms_per_op]
    if values:
        found.add(name, of, "ms", values, f"{_source(rows)}: CPU of {group}")
    else:
        found.refuse(name, f"no CPU of {group} in {', '.join(sorted({row.name for _, row in rows}))}")


def _bets(found: _Found) -> None:
    rows = found.rows(*BETS)
    if not rows:
        found.refuse("bet_*", found.why_not(*BETS))
        return
    for group in ("api", "kafka", "redis", "reconciler"):
        _cpu(found, f"bet_{group}_ms", f"{group} for one single bet over HTTP", rows, group)
    kept = found.rows("http_single_bets_sustained") or rows
    _cpu(found, "bet_postgres_ms", "Postgres for one bet up to the match, at the measured rate", kept, "postgres")
    rates = [row.rate for _, row in kept if row.rate]
    if rates:
        found.add(
            "measured_bets_per_s", "bets per second of the machine that was measured", "1/s", rates, _source(kept)
        )


def _posting(found: _Found) -> None:
    """Fit what a batch and what each entry of it cost; the interval is that of leaving one batch size out."""
    rows = [(bench, row) for bench, row in found.rows("sql_function") if row.batch_size and row.rate]
    if len({row.batch_size for _, row in rows}) < OBSERVATIONS_MIN:
        found.refuse("post_*", f"three batch sizes of sql_function are needed: {found.why_not('sql_function')}")
        return
    sizes = np.array([float(row.batch_size or 1) for _, row in rows])
    cpu_ms = np.array([row.cpu_ms_per_op.get("postgres", 0.0) for _, row in rows]) * sizes
    wall_ms = np.array([1000 / (row.rate or 1.0) for _, row in rows]) * sizes
    for prefix, times, what in (
        ("post_cpu", cpu_ms, "CPU of Postgres for"),
        ("post", wall_ms, "duration of the transaction for"),
    ):
        whole = fit_batch(sizes, times)
        parts = [fit_batch(sizes[sizes != left], times[sizes != left]) for left in sorted(set(sizes))]
        for at, (name, of) in enumerate((("batch", "a batch, whatever its size"), ("entry", "each entry of a batch"))):
            values = [whole[at], *(part[at] for part in parts)]
            found.demands[f"{prefix}_{name}_ms"] = Demand(
                of=f"{what} {of}",
                value=_short(whole[at]),
                low=_short(min(values)),
                high=_short(max(values)),
                unit="ms",
                source=f"{_source(rows)}: least squares over batch sizes, interval from leaving one size out",
            )


def fit_batch(sizes: np.ndarray[Any, Any], times_ms: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the fixed and the per-entry part of a batch's time in ms, not negative, by relative least squares.

    `sizes` and `times_ms` are one-dimensional and equally long: entries of a batch and its whole time.
    """
    design = np.column_stack((np.ones_like(sizes), sizes)) / times_ms[:, None]
    wanted = np.ones_like(sizes)
    fixed, each = np.linalg.lstsq(design, wanted)[0]
    if min(fixed, each) < 0:
        # A part that would be negative is none, and the other is fitted alone.
        kept = 0 if each < 0 else 1
        alone = float(np.linalg.lstsq(design[:, [kept]], wanted)[0][0])
        return (alone, 0.0) if kept == 0 else (0.0, alone)
    return float(fixed), float(each)


def _workers(found: _Found) -> None:
    for worker, name in WORKERS.items():
        rows = found.rows(name)
        if not rows:
            found.refuse(f"{worker}_*", found.why_not(name))
            continue
        unit = "events" if name.endswith("events") else "bets"
        rates = [row.rate for _, row in rows if row.rate]
        found.add(
            f"{worker}_per_s", f"{unit} per second of one {worker} alone on a backlog", "1/s", rates, _source(rows)
        )
        _cpu(found, f"{worker}_ms", f"{worker} for one of its {unit}", rows, worker)
        _cpu(found, f"{worker}_postgres_ms", f"Postgres for one of the {worker}'s {unit}", rows, "postgres")


def _reads(found: _Found) -> None:
    for source, name in READS.items():
        rows = found.rows(name)
        if not rows:
            found.refuse(f"read_{source}_*", found.why_not(name))
            continue
        for group in ("api", "redis", "postgres"):
            if (source, group) not in (("redis", "postgres"), ("ledger", "redis")):
                _cpu(found, f"read_{source}_{group}_ms", f"{group} for a balance from {source}", rows, group)
    rows = found.rows("growth_with_age")
    ages = sorted({row.data_age for _, row in rows})
    if len(ages) < 2:
        found.refuse("aging_factor", found.why_not("growth_with_age"))
        return
    young, old = (
        [row.cpu_ms_per_op.get("postgres", 0.0) for _, row in rows if row.data_age == age]
        for age in (ages[0], ages[-1])
    )
    of = f"CPU of a posting on {ages[-1]:,} entries against {ages[0]:,}"
    ratios = [after / before for before in young for after in old if before]
    found.add("aging_factor", of, "ratio", ratios, _source(rows))
    found.demands["aging_entries"] = Demand(
        of="entries on one server up to which ageing was measured",
        value=ages[-1],
        low=ages[-1],
        high=ages[-1],
        unit="entries",
        source=_source(rows),
    )


def _bytes(found: _Found) -> None:
    rows = found.rows("bytes_per_bet")
    if not rows:
        found.refuse("bytes", found.why_not("bytes_per_bet"))
        return
    accepted = [_families(row.details["when_accepted"]) for _, row in rows]
    source = _source(rows)
    found.add(
        "ledger_bytes_per_entry",
        "one ledger entry with its indexes",
        "bytes",
        [part[LEDGER] for part in accepted],
        source,
    )
    found.add(
        "outbox_bytes_per_event",
        "one outbox event with its index",
        "bytes",
        [part[OUTBOX] for part in accepted],
        source,
    )
    walled = [row.details["when_accepted"]["WAL"] for _, row in rows]
    found.add("wal_bytes_per_bet_accepted", "WAL until a bet is answered", "bytes", walled, source)
    shares = {id(bench): _settled_share(bench) for bench, _ in rows}
    if not all(shares.values()):
        found.refuse("*_bytes_per_bet", "the results do not say which share of the bets was settled (row matcher_bets)")
        return
    for name, of, family in (
        ("ledger_bytes_per_bet", "all ledger entries of one bet, with indexes", LEDGER),
        ("outbox_bytes_per_bet", "all outbox events of one bet, with indexes", OUTBOX),
        ("other_bytes_per_bet", "bet, order and fills of one bet, with indexes", ""),
        ("wal_bytes_per_bet", "WAL of the whole life of one bet", "WAL"),
    ):
        values, lows = [], []
        for bench, row in rows:
            first = _families(row.details["when_accepted"])[family]
            last = _families(row.details["when_settled"])[family]
            lows.append(last)
            # Orders and fills are written for every bet, the rest of the growth by the part that was settled.
            values.append(last if family == "" else first + (last - first) / shares[id(bench)])
        low, high = min(lows), max(values)
        found.demands[name] = Demand(
            of=of,
            value=_short((low + high) / 2),
            low=_short(low),
            high=_short(high),
            unit="bytes",
            source=f"{source}: low puts the growth after acceptance down to all bets, high to the settled ones alone",
        )


def _families(grown: Mapping[str, float]) -> dict[str, float]:
    """Return bytes per bet of the ledger, of the outbox, of WAL, and of everything else (under the empty name)."""
    found = {LEDGER: 0.0, OUTBOX: 0.0, "WAL": 0.0, "": 0.0}
    for relation, size in grown.items():
        table = relation.split(" ", 1)[0]
        found[table if table in found else ""] += size
    return found


def _settled_share(bench: BenchFile) -> float:
    for row in bench.rows:
        if row.name == "matcher_bets" and row.valid and row.details.get("backlog"):
            return float(row.details.get("bets_on_one_match", 0)) / float(row.details["backlog"])
    return 0.0


def _memory(found: _Found) -> None:
    for group in GROUPS:
        peaks = [
            max(size for node, size in bench.peak_rss_mb.items() if node.rstrip("0123456789") == group)
            for bench in found.benches
            if any(node.rstrip("0123456789") == group for node in bench.peak_rss_mb)
        ]
        name = "postgres" if group == "pg" else group
        if peaks:
            commits = ", ".join(sorted({bench.commit for bench in found.benches}))
            found.add(
                f"{name}_mb", f"peak resident memory of one {name}", "MB", peaks, f"bench peak_rss_mb at {commits}"
            )
        else:
            found.refuse(f"{name}_mb", "the results have no peak of memory of it")


def _redis_values(found: _Found, wallets: int) -> None:
    memory = found.demands.get("redis_mb")
    if memory is None or not found.rows(READS["redis"]):
        found.refuse("redis_bytes_per_wallet", "no row reads_redis with a peak of Redis's memory")
        return
    bound = _short(memory.value * 1e6 / wallets)
    found.demands["redis_bytes_per_wallet"] = Demand(
        of="one wallet's balance in Redis, at most",
        value=bound,
        low=bound,
        high=bound,
        unit="bytes",
        source=f"{memory.source}: divided by {wallets:,} wallets; Redis's own memory is in it, so an upper bound",
    )


def _always_refused(found: _Found) -> None:
    """Say what no result of the benchmark holds, and what stands in for it."""
    said: list[tuple[str, str, Callable[[], bool]]] = [
        (
            "kafka_bytes_per_event",
            "the benchmark measures no bytes of topics; the plan takes the outbox row, which holds the same payload "
            "beside its other columns",
            lambda: True,
        ),
        ("deposit_*", "no row measures deposits alone; the plan takes a bet's cost for them", lambda: True),
        ("network", "no row counts bytes on the wire; the plan states its network from WAL and events", lambda: True),
        ("usl_coherency", _scales(found.benches), lambda: True),
        (
            "replication",
            "one broker and no standby were running: what copies cost in CPU is assumed, not measured",
            lambda: all(bench.servers == 1 for bench in found.benches),
        ),
        (
            "tls",
            "connections were plain on one machine: TLS and a network's round trips are not in any figure",
            lambda: True,
        ),
    ]
    for what, reason, holds in said:
        if holds():
            found.refuse(what, reason)


def _scales(benches: Sequence[BenchFile]) -> str:
    counts = sorted({(bench.servers, bench.apis) for bench in benches})
    text = ", ".join(f"{servers} Postgres and {apis} API" for servers, apis in counts)
    return (
        f"measured with {text} on one machine: contention and coherency of the universal scalability law need at "
        "least three sizes on hardware that grows with them, so linear scaling is an assumption here"
    )
