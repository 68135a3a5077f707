"""`ledgerproof sim demands`: what one unit of work costs, taken from results of the benchmark, with intervals."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from ledgerproof.attach import json_flag
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import check_writable, print_json, print_table

if TYPE_CHECKING:
    from sim.demands import Demands

EXIT_CODES: Final = """\b
Exit codes:
   0  the file is written
   2  usage: no such result, not one of the benchmark, or its ledger was wrong (message says which)
"""


@click.command("demands", epilog=EXIT_CODES)
@click.argument(
    "bench_paths", metavar="BENCH_JSON...", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path)
)
@click.option(
    "--out",
    "out_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("sim/demands.toml"),
    show_default=True,
    help="File that gets the figures.",
)
@json_flag
def demands_command(*, bench_paths: tuple[Path, ...], out_path: Path, as_json: bool) -> int:
    """Take the cost of one unit of work from results of `ledgerproof bench --json`, and write it for `sim plan`.

    CPU by group of processes, rates of each worker, bytes and memory, each with its interval, unit and source. With
    fewer than three results an interval is a third to either side, which is how far figures of one machine move from
    hour to hour. What the results cannot support is refused, with the reason.
    """
    from ledgerproof.bench.options import FULL, QUICK  # noqa: PLC0415 - with the rest
    from sim.demands import BenchRefused, decode_bench, read_bench, write_demands  # noqa: PLC0415 - loads numpy, scipy

    try:
        benches = [decode_bench(path.read_bytes(), path.name) for path in bench_paths]
        wallets = min((QUICK if bench.quick else FULL).wallets for bench in benches)
        names = " ".join(path.name for path in bench_paths)
        demands = read_bench(benches, wallets=wallets, command=f"ledgerproof sim demands {names}")
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot read {error.filename}: {error.strerror}; `ledgerproof bench --json PATH` makes it"
        ) from error
    except BenchRefused as error:
        raise click.UsageError(str(error)) from error
    check_writable(out_path)
    write_demands(demands, out_path)
    if as_json:
        print_json(msgspec.to_builtins(demands))
    else:
        _print(demands)
        click.echo(f"written: {out_path}")
    return 0


def _print(demands: "Demands") -> None:
    rows = [
        [name, f"{each.value:,.6g}", f"{each.low:,.6g} … {each.high:,.6g}", each.unit, each.of]
        for name, each in demands.demand.items()
    ]
    title = f"{demands.commit}, {demands.machine}, measured {demands.measured_at}"
    print_table(title, ["demand", "value", "interval", "unit", "of"], rows)
    if "-dirty" in demands.commit:
        click.echo("measured on a tree with uncommitted changes: measure a commit to publish these figures")
    for refusal in demands.refusal:
        click.echo(f"refused: {refusal.what}: {refusal.reason}")
