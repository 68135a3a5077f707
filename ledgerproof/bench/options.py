"""What a benchmark can be asked to be. Imports next to nothing, so that the command line answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from compose.stack import DEFAULT_ROOT

ROW_NAMES: Final = (
    "generator_ceiling",
    "floor_unnest",
    "sql_function",
    "floor_pgbench",
    "http_single_bets_sustained",
    "http_single_bets_accepted",
    "http_bulk_bets",
    "grpc_single_bets",
    "reads_redis",
    "reads_projection",
    "reads_ledger",
    "relay_events",
    "projector_events",
    "matcher_bets",
    "settler_bets",
    "bytes_per_bet",
    "growth_with_age",
)
"""Every row, in the order in which they are measured."""


@dataclass(frozen=True)
class Sizes:
    """How long and how much: what --quick and the full run differ in. Seconds where the name ends in _s."""

    wallets: int
    matches: int
    step_s: float
    """One window of the search for the accepted rate."""
    confirm_s: float
    search_s: float
    """The search begins no new step after this."""
    lag_step_s: float
    """One window of the search for the sustained rate: long enough to see a slope."""
    lag_confirm_s: float
    lag_search_s: float
    read_s: float
    sql_s: float
    """One window of a SQL row; floor and function take turns."""
    sql_rounds: int
    backlog_bets: int
    settle_bets: int
    """Part of the backlog that is on one match, which the settler then settles."""
    aged: int
    age_rounds: int
    begin_s: float
    """No row begins later than this after the start: on a slow machine the last rows are left out, and said to be."""


QUICK: Final = Sizes(
    wallets=20_000,
    matches=30,
    step_s=2.5,
    confirm_s=6.0,
    search_s=40.0,
    lag_step_s=8.0,
    lag_confirm_s=12.0,
    lag_search_s=70.0,
    read_s=4.0,
    sql_s=1.0,
    sql_rounds=3,
    backlog_bets=40_000,
    settle_bets=20_000,
    aged=300_000,
    age_rounds=4,
    begin_s=480.0,
)
FULL: Final = Sizes(
    wallets=20_000,
    matches=30,
    step_s=6.0,
    confirm_s=30.0,
    search_s=180.0,
    lag_step_s=20.0,
    lag_confirm_s=60.0,
    lag_search_s=400.0,
    read_s=10.0,
    sql_s=3.0,
    sql_rounds=5,
    backlog_bets=150_000,
    settle_bets=100_000,
    aged=20_000_000,
    age_rounds=10,
    begin_s=4 * 3600.0,
)


@dataclass(frozen=True)
class BenchOptions:
    """What one benchmark is asked to be."""

    sizes: Sizes = FULL
    quick: bool = False
    only: tuple[str, ...] = ROW_NAMES
    servers: int = 1
    apis: int = 1
    rate: float | None = None
    """Measure the HTTP bet rows at this rate instead of searching for the highest."""
    duration_s: float | None = None
    """Length of the window at `rate`."""
    stack: str | None = None
    """Name of a running stack to measure; it is left running."""
    root: Path = DEFAULT_ROOT
    base_port: int | None = None
