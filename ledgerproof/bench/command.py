"""`ledgerproof bench` on the command line."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from compose.stack import DEFAULT_ROOT
from ledgerproof.bench.options import FULL, QUICK, ROW_NAMES, BenchOptions
from ledgerproof.output import check_writable, json_path_option, print_table
from ledgerproof.progress import Progress, print_error

if TYPE_CHECKING:
    from ledgerproof.bench.row import Row
    from ledgerproof.bench.run import BenchResult

VIOLATED_EXIT = 20
INVALID_EXIT = 30
RESIDUE_EXIT = 50
BENCH_EXIT_CODES = """\b
Exit codes:
   0  every row that was asked for is valid, and the ledger is right
   2  usage               wrong arguments, or the machine cannot run it (message says why)
  20  INVARIANT_VIOLATED  the ledger that the load left is wrong
  30  INVALID             at least one row says nothing; its reason says why
  40  ABORTED             stopped (Ctrl-C); nothing is left running
  50  RESIDUE             everything else is fine, but something was left behind
"""


@click.command("bench", epilog=BENCH_EXIT_CODES)
@click.option("--quick", is_flag=True, help="At most 10 minutes: shorter windows, less aged data.")
@json_path_option("Write the result as JSON to PATH; without a PATH, to standard output instead of the table.")
@click.option("--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the page to PATH.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(ROW_NAMES),
    help="Measure this row (repeat it for more); all of them if left out.",
)
@click.option("--servers", type=click.IntRange(1, 16), default=1, show_default=True, help="Postgres servers.")
@click.option("--apis", type=click.IntRange(1, 8), default=1, show_default=True, help="API processes.")
@click.option(
    "--rate",
    type=click.FloatRange(1, 100_000),
    default=None,
    metavar="BETS/S",
    help="Measure the rows of single bets at this rate instead of searching for the highest.",
)
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(1, 3_600),
    default=None,
    metavar="SECONDS",
    help="Length of the window at --rate.",
)
@click.option("--aged", type=click.IntRange(0, 100_000_000), default=None, help="Entries of the aged database.")
@click.option("--stack", "stack", default=None, metavar="NAME", help="Measure this running stack and leave it running.")
@click.option("--base-port", type=click.IntRange(1024, 65_000), default=None, help="First of the stack's ports.")
def bench_command(
    *,
    quick: bool,
    json_path: str | None,
    html_path: Path | None,
    only: tuple[str, ...],
    servers: int,
    apis: int,
    rate: float | None,
    duration_s: float | None,
    aged: int | None,
    stack: str | None,
    base_port: int | None,
) -> int:
    """Measure what this machine can do: floors, the service's rates, and what explains them.

    Starts a stack of its own, loads it and takes it down. Everything is measured in one run, so that rows can be
    compared with each other; figures of two machines, or of a busy one, cannot.
    """
    # The command line answers at once; what measures is loaded when it is needed.
    from ledgerproof.bench.run import bench  # noqa: PLC0415

    for path in (Path(json_path) if json_path not in (None, "-") else None, html_path):
        if path is not None:
            check_writable(path)
    sizes = QUICK if quick else FULL
    options = BenchOptions(
        sizes=sizes if aged is None else replace(sizes, aged=aged),
        quick=quick,
        only=tuple(name for name in ROW_NAMES if not only or name in only),
        servers=servers,
        apis=apis,
        rate=rate,
        duration_s=duration_s,
        stack=stack,
        root=DEFAULT_ROOT,
        base_port=base_port,
    )
    result = bench(options, Progress())
    text = msgspec.json.format(msgspec.json.encode(result), indent=2)
    if html_path is not None:
        from reports.bench_page import render_bench  # noqa: PLC0415

        render_bench(msgspec.to_builtins(result), html_path)
    if json_path == "-":
        click.echo(text.decode())
    else:
        if json_path is not None:
            Path(json_path).write_bytes(text + b"\n")
        _print_result(result)
    return exit_code(result)


def exit_code(result: "BenchResult") -> int:
    """Return what the command ends with."""
    if any(result.checks.values()):
        return VIOLATED_EXIT
    if result.unchecked or not all(row.valid for row in result.rows):
        return INVALID_EXIT
    if result.residue:
        for line in result.residue:
            print_error(f"left behind: {line}")
        return RESIDUE_EXIT
    return 0


def _print_result(result: "BenchResult") -> None:
    title = (
        f"commit {result.commit}, {result.machine['cpu']}, {result.machine['cores']} cores, {result.servers} Postgres, "
        f"{result.apis} API, {result.duration_s:.0f} s in all"
    )
    columns = ["row", "rate", "unit", "p50 ms", "p99 ms", "of floor", "CPU ms/op", ""]
    print_table(title, columns, [_line(row) for row in result.rows])
    memory = ", ".join(f"{name} {value:.0f}" for name, value in result.peak_rss_mb.items())
    click.echo(f"peak memory, MB: {memory}")
    if result.checked is not None:
        broken = {rule: count for rule, count in result.checks.items() if count}
        said = "true" if result.checked else f"FALSE {broken or ''}"
        click.echo(f"checked: {said} ({len(result.checks)} rules) {result.unchecked}")


def _line(row: "Row") -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    cpu = " ".join(f"{group} {value:.2f}" for group, value in row.cpu_ms_per_op.items() if value >= 0.005)
    return [
        row.title,
        number(row.rate, 0),
        row.unit,
        number(row.p50_ms, 1),
        number(row.p99_ms, 1),
        number(row.ratio_to_floor, 2),
        cpu,
        row.reason if row.valid else f"INVALID: {row.reason}",
    ]
