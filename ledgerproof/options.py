"""What a run can be asked to be. Imports next to nothing, so that the command line answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from compose.stack import DEFAULT_ROOT

RUNS_FOLDER: Final = Path("reports/runs")
MIN_FAULTY_DURATION_S: Final = 15.0
"""A shorter load has no room for the standard faults and their recoveries."""

MAX_BETS: Final = 5_000_000
"""The schedule of a run is drawn before it begins and its ledger is read into memory at its end."""


class EnvironmentProblem(Exception):
    """The run could not begin; the message says what to do. Nothing is left behind."""


class NotARun(Exception):
    """The folder does not hold a run that can be judged; the message says what is missing."""


def run_folder(run: Path | None) -> Path:
    """Return the run folder that was named, by path or by id, or the newest one. Raises NotARun."""
    if run is None:
        runs = sorted(path for path in RUNS_FOLDER.glob("*") if path.is_dir())
        if not runs:
            raise NotARun(f"there is no run in {RUNS_FOLDER}: start one with `ledgerproof prove`")
        return runs[-1]
    for folder in (run, RUNS_FOLDER / run):
        if folder.is_dir():
            return folder
    raise NotARun(f"{run} is not a run folder: no such directory")


@dataclass(frozen=True)
class Options:
    """What a run is asked to be."""

    seed: int
    duration_s: float = 150.0
    rate: float = 200.0
    """Bets per second. Two cores hold it with room to spare, and 150 s of it are 30,000 bets."""
    servers: int = 4
    apis: int = 2
    faults: str = "standard"
    """standard or none."""
    out: Path = RUNS_FOLDER
    root: Path = DEFAULT_ROOT
    base_port: int | None = None
    keep: bool = False
    audit: bool = False
    """Whether the live auditor runs beside the load and its findings count."""
    predict: bool = False
    """Whether the run is forecast by the capacity model before it begins."""
