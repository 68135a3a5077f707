"""`ledgerproof sim fidelity`: forecasts sealed before each measurement, then scored, beside simple baselines."""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from ledgerproof.modelling.calibrate_command import STORED as CALIBRATION
from ledgerproof.modelling.calibrate_command import read_calibration
from ledgerproof.options import RUNS_FOLDER
from ledgerproof.output import check_writable, json_path_option, print_json, print_table, write_json
from ledgerproof.progress import Progress, print_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from sim.cases import Measured
    from sim.fidelity import Fidelity
    from sim.prediction import Prediction

STORED: Final = Path(__file__).resolve().parents[2] / "reports" / "fidelity.json"
VIOLATED_EXIT: Final = 20
EXIT_CODES: Final = """\b
Exit codes:
   0  scored; the table says what was missed
   2  usage: there is no such case, no calibration or no stored table
  20  the ledger that a load left is wrong
  40  stopped (Ctrl-C); cases that were measured are kept and not measured again
"""


@click.command("fidelity", epilog=EXIT_CODES)
@click.option("--stored", is_flag=True, help="Show the stored table and measure nothing.")
@click.option("--only", multiple=True, metavar="CASE", help="Measure this case (repeat it); all of them if left out.")
@click.option("--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=CALIBRATION)
@click.option(
    "--measurement",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="What was calibrated from; for the linear baseline.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=RUNS_FOLDER.parent / "fidelity",
    show_default=True,
    help="Gets forecasts and measurements; what is there is not measured again.",
)
@click.option("--write", is_flag=True, help="Store the table.")
@json_path_option("Write the table as JSON to PATH; without a PATH, to standard output instead of the table.")
def fidelity_command(
    *,
    stored: bool,
    only: tuple[str, ...],
    calibration: Path,
    measurement: Path | None,
    folder: Path,
    write: bool,
    json_path: str | None,
) -> int:
    """Forecast each case of sim/cases.toml, measure it on a stack of its own, and score the forecast."""
    from ledgerproof.modelling.measuring import LedgerWrong  # noqa: PLC0415 - slow to import
    from sim.fidelity import read_fidelity  # noqa: PLC0415 - slow to import

    if json_path not in (None, "-"):
        check_writable(Path(str(json_path)))
    if stored:
        if not STORED.exists():
            raise click.UsageError(f"{STORED} is not there; `ledgerproof sim fidelity --write` makes it")
        table = read_fidelity(STORED)
    else:
        try:
            table = _measured(only, calibration, measurement, folder)
        except LedgerWrong as error:
            print_error(str(error))
            return VIOLATED_EXIT
        if write:
            write_json(STORED, table)
    if json_path == "-":
        print_json(table)
    else:
        if json_path is not None:
            write_json(Path(json_path), table)
        _print(table)
    return 0


def _measured(only: tuple[str, ...], path: Path, measurement: Path | None, folder: Path) -> "Fidelity":
    from ledgerproof.machine import commit, describe_machine  # noqa: PLC0415
    from ledgerproof.modelling.measuring import measure  # noqa: PLC0415
    from sim.cases import OutageCase, Shape, read_cases, read_measured  # noqa: PLC0415
    from sim.fidelity import Fidelity, score, summarised  # noqa: PLC0415
    from sim.outages import score_outage  # noqa: PLC0415
    from sim.prediction import calibration_digest, predict, sealed  # noqa: PLC0415

    calibration = read_calibration(path)
    cases = read_cases()
    known = [*(case.name for case in cases.cases), *(case.name for case in cases.outages)]
    if unknown := set(only) - set(known):
        raise click.UsageError(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    lowest = read_measured(measurement or path.with_name("measurement.json")).windows[0]
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    sealing = partial(predict, calibration, commit=commit(), connections=cases.connections)

    def at_saturation_and_below(shape: Shape) -> "Prediction":
        with progress.step(f"{shape.name}: forecasting") as step:
            made = partial(sealing, made_at=datetime.now(UTC).isoformat(timespec="seconds"), progress=step.show)
            first = made([(shape, None, cases.saturation_s)])
            most = first.forecasts[0].throughput_per_s.value
            below = made([(shape, round(share * most, 1), cases.window_s) for share in cases.shares])
            return sealed(msgspec.structs.replace(below, forecasts=[*first.forecasts, *below.forecasts]))

    def at_its_rates(shape: Shape, said: "Prediction") -> "Measured":
        rates = [one.rate_per_s for one in said.forecasts if one.rate_per_s is not None]
        return measure(shape, cases, rates, progress)

    def without_a_part(case: OutageCase) -> "Measured":
        shape = Shape(name=case.name, why="", servers=case.servers)
        return measure(shape, cases, [], progress, outages=[case], saturate=False)

    scores, outages = [], []
    for shape in cases.cases:
        if not only or shape.name in only:
            said, seen = _kept(
                folder, shape.name, partial(at_saturation_and_below, shape), partial(at_its_rates, shape)
            )
            scores.append(score(seen, said.forecasts, calibration, lowest))
    for case in cases.outages:
        if not only or case.name in only:
            made_at = datetime.now(UTC).isoformat(timespec="seconds")
            said, seen = _kept(
                folder,
                case.name.replace(" ", "-"),
                partial(sealing, [], made_at=made_at, outages=[case]),
                lambda _, case=case: without_a_part(case),  # type: ignore[misc]
            )
            outages.append(score_outage(said.outages[0], seen.outages[0]))
    return Fidelity(
        commit=commit(),
        machine=dict(describe_machine()),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        calibration=calibration_digest(calibration),
        cases=scores,
        outages=outages,
        summary=summarised(scores, outages),
    )


def _kept(
    folder: Path, stem: str, forecast: "Callable[[], Prediction]", measured: "Callable[[Prediction], Measured]"
) -> "tuple[Prediction, Measured]":
    """Return forecast and measurement of a case; what the folder has of both is not made again.

    The forecast is on the disk before the run that it forecasts begins.
    """
    from sim.cases import read_measured  # noqa: PLC0415

    said_file, seen_file = folder / f"{stem}-prediction.json", folder / f"{stem}-measured.json"
    if not (said_file.exists() and seen_file.exists()):
        said = forecast()
        write_json(said_file, said)
        write_json(seen_file, measured(said))
    return _intact(said_file), read_measured(seen_file)


def _intact(path: Path) -> "Prediction":
    from sim.prediction import Prediction, intact  # noqa: PLC0415

    said = msgspec.json.decode(path.read_bytes(), type=Prediction)
    if not intact(said):
        raise click.UsageError(f"{path} was changed after it was sealed; remove it and measure again")
    return said


def _print(table: "Fidelity") -> None:
    rows = [
        [
            case.name,
            f"{case.throughput:,.0f}",
            _signed(case.throughput_error),
            " ".join(f"{rho:.2f}" for rho in case.rho),
            _signed(case.p50_error),
            _signed(case.p99_error),
            case.bottleneck,
            case.bottleneck_forecast + ("" if case.bottleneck_right else "  WRONG"),
            " ".join(_signed(case.baselines[name]["throughput_error"]) for name in ("mmc", "linear")),
            _signed(case.baselines["mmc"]["p99_error"]),
        ]
        for case in table.cases
    ]
    columns = [
        "case",
        "saturated/s",
        "error",
        "ρ",
        "p50",
        "p99",
        "bottleneck",
        "forecast",
        "M/M/c, linear",
        "M/M/c p99",
    ]
    print_table(f"forecast against measurement, commit {table.commit}", columns, rows)
    if table.outages:
        print_table(
            "outages: seconds until nothing waits any more, and the most that waited",
            ["outage", "recovered", "forecast", "stage", "waited", "forecast", "refused", "forecast"],
            [
                [
                    one.name,
                    f"{one.recovered_s:.1f}",
                    f"{one.recovered_forecast_s:.1f}{'' if one.recovered_right else '  WRONG'}",
                    one.stage,
                    f"{one.peak:,.0f}",
                    f"{one.peak_forecast:,.0f}{'' if one.peak_right else '  WRONG'}",
                    f"{one.refused:,}",
                    f"{one.refused_forecast:,.0f}",
                ]
                for one in table.outages
            ],
        )
    made = table.summary
    median = made["throughput_median"]
    click.echo(
        f"of {made['cases']} cases: throughput within 10 % in {made['throughput_within']} (median "
        f"{'-' if median is None else f'{median:.1%}'}), p50 within 15 % in {made['p50_within']}, p99 within 25 % in "
        f"{made['p99_within']}, bottleneck right in {made['bottlenecks_right']}"
    )


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.0%}"
