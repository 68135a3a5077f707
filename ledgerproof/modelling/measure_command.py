"""`ledgerproof sim measure`: one configuration of the service, measured for the capacity model."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ledgerproof.output import check_writable, print_table, write_json
from ledgerproof.progress import Progress, print_error

if TYPE_CHECKING:
    from sim.cases import Window

VIOLATED_EXIT: Final = 20
EXIT_CODES: Final = """\b
Exit codes:
   0  measured
   2  usage: there is no such case, or the machine cannot run it
  20  the ledger that the load left is wrong
  40  stopped (Ctrl-C); nothing is left running
"""


@click.command("measure", epilog=EXIT_CODES)
@click.argument("case")
@click.option("--out", "path", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Result (JSON).")
@click.option("--rate", "rates", type=click.FloatRange(1, 100_000), multiple=True, help="Rates to measure (repeat it).")
def measure_command(*, case: str, path: Path, rates: tuple[float, ...]) -> int:
    """Measure CASE of sim/cases.toml on a stack of its own; `calibration` is the one the model is fitted to."""
    from ledgerproof.modelling.measuring import LedgerWrong, measure  # noqa: PLC0415 - slow to import
    from sim.cases import read_cases  # noqa: PLC0415

    cases = read_cases()
    shapes = {shape.name: shape for shape in (cases.calibration, *cases.cases)}
    if case not in shapes:
        raise click.UsageError(f"there is no case {case!r}; there are {', '.join(shapes)}")
    check_writable(path)
    calibrates = case == cases.calibration.name
    asked = rates or (tuple(cases.calibration_rates_per_s) if calibrates else ())
    outages = cases.returns if calibrates else []
    try:
        found = measure(shapes[case], cases, asked, Progress(), idle=calibrates, outages=outages)
    except LedgerWrong as error:
        print_error(str(error))
        return VIOLATED_EXIT
    write_json(path, found)
    windows = [*found.windows, *([found.saturation] if found.saturation else [])]
    columns = ["offered/s", "accepted/s", "cores", "batch", "bets p50", "p99", "reads p50", "p99", "lag p99"]
    print_table(f"{case}; latencies in ms", columns, [_row(window) for window in windows])
    return 0


def _row(window: "Window") -> list[str]:
    return [
        "saturated" if window.offered_per_s is None else f"{window.offered_per_s:,.0f}",
        f"{window.accepted_per_s:,.0f}",
        f"{window.busy_s / window.duration_s:.2f}",
        f"{window.posted / window.posts:.1f}" if window.posts else "-",
        *(_latency(window, name, percent) for name in ("bets", "reads") for percent in (50.0, 99.0)),
        f"{window.lag_p99_ms:.2f}",
    ]


def _latency(window: "Window", name: str, percent: float) -> str:
    curve = window.curves_ms.get(name)
    value = curve[window.percents.index(percent)] if curve else None
    return "-" if value is None else f"{value:.2f}"
