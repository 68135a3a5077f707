"""`ledgerproof sim sweep`: thousands of configurations of the command path on Dask, with resumable results."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from ledgerproof.attach import json_flag
from ledgerproof.interrupts import terminate_as_interrupt
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import print_json, print_table
from ledgerproof.progress import Progress

if TYPE_CHECKING:
    from sim.statistics import Estimate
    from sim.sweep import Row, Sweep

SWEEPS_FOLDER: Final = Path("reports/sweeps")
SCRATCH: Final = ".scratch"
SHOWN_ROWS_MAX: Final = 40
TYPED: Final = (
    "Service times are those of the file or the command line; docs/capacity.md says where to get measured ones."
)
EPILOG: Final = """\b
A file:
   customers = 20000                     # of one replication
   replications = 5
   [grid]
   rate_per_s = {from = 200, to = 2000, steps = 10}
   batch_max = [1, 16, 256]
\b
Parameters:
   rate_per_s, gateway_ms, gateway_scv, gateway_servers, apis, api_ms, api_scv, servers, slots, fixed_ms,
   fixed_scv, per_command_ms, batch_max, queue_max, linger_ms
\b
Exit codes:
   0  every configuration was simulated
   2  usage: the grid names a field or a value that cannot be (file, line and field are said), or no cluster answers
  40  stopped; the same command goes on where it stopped
"""


@click.command("sweep", epilog=EPILOG)
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--grid",
    "assignments",
    multiple=True,
    metavar="NAME=VALUES",
    help="Values of a parameter: 5 or 1,2,4 or FROM:TO:STEPS. Repeat for more; goes before those of FILE.",
)
@click.option("--customers", type=click.IntRange(1_000), default=None, help="Commands of one replication.")
@click.option("--replications", type=click.IntRange(2), default=None, help="Independent runs of each configuration.")
@click.option("--seed", type=click.IntRange(0, 2**53), default=None, help="The same seed gives the same results.")
@click.option(
    "--workers", type=click.IntRange(1, 1_024), default=None, help="Local processes; as many as cores if left out."
)
@click.option("--scheduler", metavar="ADDRESS", default=None, help="Dask scheduler of a cluster, as tcp://host:8786.")
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help=f"Folder of the results, found again by a later sweep; {SWEEPS_FOLDER}/NAME if left out.",
)
@json_flag
def sweep_command(
    *,
    file: Path | None,
    assignments: tuple[str, ...],
    workers: int | None,
    scheduler: str | None,
    folder: Path | None,
    as_json: bool,
    **changed: int | None,
) -> int:
    """Simulate every combination of the values that FILE (TOML) and --grid name.

    Parameters that are not named keep their defaults. Results go to results.jsonl one by one, at the end also to
    results.parquet; killed or stopped, the same command goes on, and a wider grid computes only what is new.
    """
    from sim import sweep as sweeping  # noqa: PLC0415 - slow to import
    from sim.tables import TableError  # noqa: PLC0415

    if file is None and not assignments:
        raise click.UsageError("what is to be swept? Give a FILE, or --grid NAME=VALUES")
    try:
        sweep = _sweep(file, assignments, {name: value for name, value in changed.items() if value is not None})
    except TableError as error:
        raise click.UsageError(str(error)) from error
    place = folder or SWEEPS_FOLDER / (file.stem if file else "grid")
    progress = Progress()
    began = time.monotonic()
    compute = sweeping.on_dask(scheduler, workers or os.cpu_count() or 1, place / SCRATCH)
    with _alone_in(place), terminate_as_interrupt(), _bar(progress, sweep) as done:
        try:
            rows = sweeping.run(sweep, place, compute, done)
        except (sweeping.ClusterFailed, OSError) as error:
            raise EnvironmentProblem(f"the sweep stopped: {error}; what is done is kept in {place}") from error
    sweeping.write_parquet(rows, place / sweeping.PARQUET)
    if as_json:
        print_json({"folder": str(place), "rows": rows, "notes": [TYPED]})
        return 0
    _show(sweep, rows)
    click.echo(f"{len(rows):,} configurations in {time.monotonic() - began:.1f} s; all of them: {place}")
    click.echo(TYPED)
    return 0


def _sweep(file: Path | None, assignments: tuple[str, ...], changed: dict[str, int]) -> "Sweep":
    """Return the sweep of file and options. Raises TableError."""
    from sim.sweep import Grid, Sweep, with_values  # noqa: PLC0415 - slow to import
    from sim.tables import TableError, read_toml  # noqa: PLC0415

    sweep = read_toml(file, Sweep) if file else Sweep(grid=Grid())
    try:
        # msgspec checks bounds where it converts, not where it replaces.
        raw = {**msgspec.to_builtins(sweep), **changed}
        return with_values(msgspec.convert(raw, Sweep), assignments)
    except (ValueError, msgspec.ValidationError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"options: {error}") from error


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep the folder for this sweep. Raises EnvironmentProblem if another one writes there, or nobody can."""
    from filelock import FileLock, Timeout  # noqa: PLC0415

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise EnvironmentProblem(f"another sweep is writing to {folder}: wait, or give another --out") from error
    except PermissionError as error:
        raise EnvironmentProblem(f"cannot write to {folder}: {error.strerror}") from error


@contextlib.contextmanager
def _bar(progress: Progress, sweep: "Sweep") -> Iterator[Callable[[int, int], None]]:
    """Show how far the sweep is: a bar with the time left on a terminal, plain lines elsewhere."""
    title = f"Sweeping {sweep.size:,} × {sweep.replications} × {sweep.customers:,} commands"
    if not progress.console.is_terminal:
        with progress.step(title) as step:
            yield lambda finished, of: step.show(f"{finished:,} of {of:,}")
        return
    from rich import progress as bars  # noqa: PLC0415

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=progress.console) as shown:
        task = shown.add_task(title, total=sweep.size)
        yield lambda finished, of: shown.update(task, completed=finished, total=of)


def _show(sweep: "Sweep", rows: "list[Row]") -> None:
    varied = [name for name, values in sweep.axes.items() if len(values) > 1]
    columns = [*varied, "answered/s", "mean ms", "p50", "p95", "p99", "refused %", "saturates at", "first"]
    lines = [
        [
            *(f"{getattr(row.configuration, name):g}" for name in varied),
            _cell(row.outcome.throughput_per_s, 1),
            *(
                _cell(value, 2)
                for value in (row.outcome.mean_ms, row.outcome.p50_ms, row.outcome.p95_ms, row.outcome.p99_ms)
            ),
            _cell(row.outcome.refused_share, 2, 100),
            f"{row.outcome.saturation_per_s:,.0f}/s",
            row.outcome.bottleneck + ("" if row.outcome.settled else " (not settled)"),
        ]
        for row in rows[:SHOWN_ROWS_MAX]
    ]
    print_table("mean over replications ± half of the 95 % interval", columns, lines)
    if len(rows) > SHOWN_ROWS_MAX:
        click.echo(f"… and {len(rows) - SHOWN_ROWS_MAX:,} more")


def _cell(value: "Estimate | None", digits: int, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    return f"{value.mean * scale:,.{digits}f} ± {(value.high - value.low) / 2 * scale:,.{digits}f}"
