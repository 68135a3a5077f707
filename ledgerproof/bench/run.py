"""Runs the benchmark: stack up, rows in order, checks, stack down. What fails makes its row invalid, not the run."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from compose.errors import StackError
from compose.stack import Stack
from compose.state import StackSpec, stacks_folder
from ledgerproof import __version__
from ledgerproof.bench import http_rows, read_rows, sql_rows, worker_rows
from ledgerproof.bench.check import check
from ledgerproof.bench.context import Bench, BenchFailed
from ledgerproof.bench.drive import GeneratorFailed
from ledgerproof.bench.loading import NotPosted
from ledgerproof.bench.options import ROW_NAMES, BenchOptions
from ledgerproof.bench.row import Row
from ledgerproof.collect import NotCollected, NotDrained
from ledgerproof.interrupts import terminate_as_interrupt
from ledgerproof.machine import commit, describe_machine
from ledgerproof.options import EnvironmentProblem
from ledgerproof.progress import Progress
from ledgerproof.wire import WireError
from reference.errors import LedgerError
from reference.store import DRIVER_ERRORS

MEASURE: Final[dict[str, Callable[[Bench], None]]] = {
    "generator_ceiling": read_rows.ceiling,
    **dict.fromkeys(sql_rows.NAMES, sql_rows.floor_and_function),
    "floor_pgbench": sql_rows.floor_pgbench,
    "growth_with_age": sql_rows.growth_with_age,
    "http_single_bets_sustained": http_rows.sustained,
    "http_single_bets_accepted": http_rows.accepted,
    "http_bulk_bets": http_rows.bulk,
    "grpc_single_bets": http_rows.over_grpc,
    "reads_redis": read_rows.from_redis,
    "reads_projection": read_rows.from_projection,
    "reads_ledger": read_rows.from_ledger,
    **dict.fromkeys(worker_rows.NAMES, worker_rows.pipeline),
}
"""The function that measures each row."""

FAILURES: Final = (
    BenchFailed,
    GeneratorFailed,
    NotCollected,
    NotDrained,
    NotPosted,
    LedgerError,
    StackError,
    WireError,
    *DRIVER_ERRORS,
)
"""What makes a row invalid; anything else is a bug and ends the run."""


class BenchResult(msgspec.Struct, kw_only=True):
    """What a benchmark found, as bench.json holds it."""

    version: str
    commit: str
    machine: dict[str, Any]
    started_at: str
    duration_s: float
    quick: bool
    servers: int
    apis: int
    rows: list[Row]
    checked: bool | None
    """Whether the ledger was found consistent after the load; None: nothing was posted through the service."""
    checks: dict[str, int]
    """Violations by rule."""
    unchecked: str
    """Why the ledger could not be judged, empty if it was or there was nothing to judge."""
    peak_rss_mb: dict[str, float]
    residue: list[str]


def bench(options: BenchOptions, progress: Progress) -> BenchResult:
    """Measure the rows that are asked for. Raises EnvironmentProblem if the stack cannot be had."""
    began = time.monotonic()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine()
    with terminate_as_interrupt():
        stack, ours = _stack(options, progress)
        try:
            run = Bench(
                options=options,
                stack=stack,
                config=stack.config,
                progress=progress,
                commit=commit(),
                machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:g} GB",
            )
            for name in ROW_NAMES:
                if name not in options.only:
                    continue
                if time.monotonic() - began > options.sizes.begin_s:
                    run.add(run.row(name, valid=False, reason="not measured: the time of the whole benchmark ran out"))
                else:
                    _measure(run, name)
            checks, unchecked = _checked(run)
            run.peak.note(stack)
            apis = len(run.api_ports)
        finally:
            if ours:
                with progress.step("Taking the stack down"):
                    stack.down()
    return BenchResult(
        version=__version__,
        commit=run.commit,
        machine=dict(machine),
        started_at=started_at,
        duration_s=round(time.monotonic() - began, 1),
        quick=options.quick,
        servers=len(run.config.servers),
        apis=apis,
        rows=run.rows,
        checked=not any(checks.values()) if checks else False if unchecked else None,
        checks=checks or {},
        unchecked=unchecked,
        peak_rss_mb=run.peak.peak_mb,
        residue=stack.residue,
    )


def _stack(options: BenchOptions, progress: Progress) -> tuple[Stack, bool]:
    """Return the stack to measure and whether it is ours to take down."""
    try:
        if options.stack is not None:
            return Stack.attach(stacks_folder(options.root.resolve()) / options.stack), False
        spec = StackSpec(servers=options.servers, apis=options.apis, base_port=options.base_port)
        title = f"Starting {options.servers} Postgres, Kafka, Redis and the service with {options.apis} API"
        with progress.step(title):
            return Stack.start(spec, options.root, progress=progress.show), True
    except StackError as error:
        raise EnvironmentProblem(str(error)) from error


def _measure(run: Bench, name: str) -> None:
    with run.progress.step(f"Measuring {name}"):
        known = len(run.rows)
        try:
            MEASURE[name](run)
        except FAILURES as error:
            run.add(run.row(name, valid=False, reason=f"{type(error).__name__}: {error}"))
        if all(row.name != name for row in run.rows):
            run.add(run.row(name, valid=False, reason="not measured: a row that it builds on failed"))
        for row in run.rows[known:]:
            _relate(run, row)
        run.peak.note(run.stack)


def _relate(run: Bench, row: Row) -> None:
    """Set the row's ratio to its floor, where that was measured in this run."""
    if not row.floor or row.rate is None:
        return
    floor = run.best(row.floor)
    if floor:
        row.ratio_to_floor = round(row.rate / floor, 3)


def _checked(run: Bench) -> tuple[dict[str, int] | None, str]:
    """Return the violations by rule, and why they are not known if they are not."""
    try:
        return _check(run), ""
    except FAILURES as error:
        run.progress.warn(f"the ledger could not be checked: {error}")
        return None, f"{type(error).__name__}: {error}"


def _check(run: Bench) -> dict[str, int] | None:
    """Wait for rest and judge the ledger that the load left; None if nothing was posted through the service."""
    if not run.opened:
        return None
    with run.progress.step("Checking the ledger that the load left") as step:
        found = check(run)
        broken = {rule: count for rule, count in found.items() if count}
        step.detail = f"{len(found)} rules, {broken or 'nothing broken'}"
    return found
