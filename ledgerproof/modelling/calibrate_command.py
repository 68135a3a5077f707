"""`ledgerproof sim calibrate`: what each step of the service costs, from a measurement, with what cannot be told."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from ledgerproof.output import check_writable, json_path_option, print_json, print_table, write_json
from ledgerproof.progress import Progress

if TYPE_CHECKING:
    from sim.costs import Calibration

STORED: Final = Path(__file__).resolve().parents[2] / "sim" / "calibration.json"
"""The calibration that comes with the project; of the machine that it names."""
EXIT_CODES: Final = """\b
Exit codes:
   0  calibrated; what could not be told is listed
   2  usage: the file is no measurement, or it cannot be calibrated from; the message says what to measure
"""


@click.command("calibrate", epilog=EXIT_CODES)
@click.argument("measurement", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out", "path", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Calibration (JSON)."
)
@json_path_option("Write the calibration to PATH, too; without a PATH, to standard output instead of the table.")
def calibrate_command(*, measurement: Path, path: Path | None, json_path: str | None) -> int:
    """Fit the model to MEASUREMENT, which `ledgerproof sim measure calibration` writes.

    Only windows in which most of the machine was idle are used, so that waiting is not counted as work.
    """
    from sim.calibration import NotCalibrated, calibrate  # noqa: PLC0415 - slow to import
    from sim.cases import read_measured  # noqa: PLC0415

    files = [file for file in (path, None if json_path in (None, "-") else Path(str(json_path))) if file is not None]
    for file in files:
        check_writable(file)
    progress = Progress()
    with progress.step("Calibrating") as step:
        try:
            found = calibrate(read_measured(measurement), step.show)
        except (NotCalibrated, msgspec.MsgspecError) as error:
            raise click.UsageError(f"{measurement}: {error}") from error
    for file in files:
        write_json(file, found)
    if json_path == "-":
        print_json(found)
    else:
        _print(found)
    return 0


def read_calibration(path: Path = STORED) -> "Calibration":
    """Read a calibration. Raises click.UsageError if the file is none."""
    from sim.costs import Calibration  # noqa: PLC0415

    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (OSError, msgspec.MsgspecError) as error:
        raise click.UsageError(f"{path} is no calibration ({error}); `ledgerproof sim calibrate` makes one") from error


def _print(found: "Calibration") -> None:
    rows = [
        [
            fit.name,
            name,
            f"{one.value:.4f}",
            f"{one.low:.4f} … {one.high:.4f}",
            f"{fit.r_squared:.3f}",
            str(fit.windows),
        ]
        for fit in found.fits
        for name, one in fit.coefficients.items()
    ]
    title = f"CPU milliseconds, commit {found.commit}, at {found.utilisation_max:.0%} of the machine or less"
    print_table(title, ["of", "for each", "ms", "95 % interval", "R²"], rows)
    print_table(
        "latencies that the model was held against",
        ["window", "R² up to p99", "largest difference"],
        [[fit.name, f"{fit.r_squared:.3f}", f"{fit.worst_residual:.0%}"] for fit in found.fits if not fit.coefficients],
    )
    print_table("not told by these data", ["what", "reason"], [[one.what, one.reason] for one in found.refused])
