"""`ledgerproof sla`: the architecture's service levels, measured here, and what is only calculated marked as such."""

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from ledgerproof.options import MIN_FAULTY_DURATION_S, EnvironmentProblem, NotARun, Options, run_folder
from ledgerproof.output import check_writable, json_path_option, out_option, print_json, print_table
from ledgerproof.progress import Progress, print_error

if TYPE_CHECKING:
    from ledgerproof.sla_table import Table

ABORTED_EXIT: Final = 40
RESIDUE_EXIT: Final = 50
PAGE_FILE: Final = "sla.html"
SHORT_RUN_S: Final = 60.0
LONGEST_RUN_S: Final = 3_600.0
BENCH_ROWS: Final = (
    "http_single_bets_accepted",
    "relay_events",
    "projector_events",
    "matcher_bets",
    "settler_bets",
)
"""What the table takes from a benchmark."""

EXIT_CODES: Final = """\b
Exit codes:
   0  every level that was measured is met
   2  usage: wrong arguments, no such run or benchmark, or the machine cannot run it (message says why)
  10  a level that was measured is missed
  30  not proven: the run is not valid, or a level of the table was not measured
  40  stopped (Ctrl-C); nothing is left running
  50  everything else is fine, but something was left behind
"""


@click.command("sla", epilog=EXIT_CODES)
@click.option(
    "--run",
    "run",
    type=click.Path(path_type=Path),
    default=None,
    help="Take the figures of this run of `prove` (its folder or id) instead of running one.",
)
@click.option(
    "--bench",
    "bench_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Take the rates of this result of `bench --json` instead of measuring them.",
)
@click.option(
    "--checklist",
    "checklist_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Take the recovery of an API process from this result of `checklist --json`.",
)
@click.option("--no-bench", is_flag=True, help="Do without rates: what needs them is said not to be measured.")
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(MIN_FAULTY_DURATION_S, LONGEST_RUN_S),
    default=SHORT_RUN_S,
    show_default=True,
    metavar="SECONDS",
    help="Length of the load of the run.",
)
@click.option("--seed", type=click.IntRange(0, 2**53), default=None, help="Seed of the run; random if left out.")
@out_option
@click.option(
    "--html",
    "html_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help=f"Write the page to PATH instead of {PAGE_FILE} in the run's folder.",
)
@json_path_option("Write the table as JSON to PATH; without a PATH, to standard output instead of the table.")
def sla_command(
    *,
    run: Path | None,
    bench_path: Path | None,
    checklist_path: Path | None,
    no_bench: bool,
    duration_s: float,
    seed: int | None,
    out: Path,
    html_path: Path | None,
    json_path: str | None,
) -> int:
    """Show the architecture's service levels with what was measured for each, and how.

    Without --run a stack is started, loaded and broken as by `prove`, for a minute; without --bench the rates of
    the API and of each worker are measured after it. What one machine cannot show is calculated and marked as
    extrapolated, or said not to be measured; neither ever counts as met.
    """
    if no_bench and bench_path is not None:
        raise click.UsageError("--no-bench and --bench exclude each other")
    for path in (Path(json_path) if json_path not in (None, "-") else None, html_path):
        if path is not None:
            check_writable(path)
    progress = Progress()
    bench = None if bench_path is None else _stored_bench(bench_path)
    api_ready_s = None if checklist_path is None else _api_ready_s(checklist_path)
    folder = _new_run(duration_s, seed, out, progress) if run is None else run_folder(run)
    verdict = _verdict(folder)
    if verdict["verdict"] == "ABORTED" and run is None:
        raise KeyboardInterrupt
    residue = list(verdict.get("residue", []))
    if bench is None and not no_bench:
        bench = _new_bench(progress)
        residue += bench["residue"]
    table = _table(folder, verdict, bench, api_ready_s)
    page = _page(table, html_path if html_path is not None else folder / PAGE_FILE)
    if json_path == "-":
        print_json(_as_json(table))
    else:
        if json_path is not None:
            Path(json_path).write_bytes(msgspec.json.format(msgspec.json.encode(_as_json(table)), indent=2) + b"\n")
        print_levels(table)
        click.echo(f"page: {page}")
    for line in residue:
        print_error(f"left behind: {line}")
    return table.exit_code or (RESIDUE_EXIT if residue else 0)


def _new_run(duration_s: float, seed: int | None, out: Path, progress: Progress) -> Path:
    from ledgerproof.prove import prove  # noqa: PLC0415 - slow to import

    options = Options(seed=secrets.randbelow(2**31) if seed is None else seed, duration_s=duration_s, out=out)
    progress.say(f"a run of {duration_s:g} s with faults, seed {options.seed}")
    folder, _ = prove(options, progress)
    return folder


def _new_bench(progress: Progress) -> dict[str, Any]:
    from ledgerproof.bench.options import QUICK, BenchOptions  # noqa: PLC0415 - with the rest
    from ledgerproof.bench.run import bench  # noqa: PLC0415 - slow to import

    progress.say(f"a benchmark of {', '.join(BENCH_ROWS)}")
    result = bench(BenchOptions(sizes=QUICK, quick=True, only=BENCH_ROWS), progress)
    found: dict[str, Any] = msgspec.to_builtins(result)
    return found


def _stored_bench(path: Path) -> dict[str, Any]:
    """Return a stored benchmark. Raises EnvironmentProblem if the file is none."""
    from ledgerproof.bench.run import BenchResult  # noqa: PLC0415 - slow to import

    try:
        result = msgspec.json.decode(path.read_bytes(), type=BenchResult)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot read {path}: {error.strerror}; `ledgerproof bench --json {path}` makes it"
        ) from (error)
    except msgspec.DecodeError as error:
        raise EnvironmentProblem(
            f"{path} is not a result of this version's benchmark ({error}): make one with "
            f"`ledgerproof bench --quick --json {path}`"
        ) from error
    found: dict[str, Any] = msgspec.to_builtins(result)
    return found


def _verdict(folder: Path) -> dict[str, Any]:
    """Return the verdict of a run that offered a load. Raises NotARun."""
    from ledgerproof.assess import VERDICT_FILE  # noqa: PLC0415 - slow to import

    path = folder / VERDICT_FILE
    try:
        verdict = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise NotARun(
            f"{folder} has no verdict ({error.strerror}): `ledgerproof check --write {folder}` judges it"
        ) from error
    except msgspec.DecodeError as error:
        raise NotARun(
            f"{path} cannot be read ({error}): `ledgerproof check --write {folder}` writes it again"
        ) from error
    if verdict.get("plan") is not None:
        raise NotARun(f"{folder} is the run of a plan: it offered no load, so it has no service levels")
    return verdict


def _api_ready_s(path: Path) -> float:
    """Return how long an API process was away in a stored checklist. Raises EnvironmentProblem."""
    from ledgerproof.checklist.run import Checked  # noqa: PLC0415 - slow to import

    try:
        checked = msgspec.json.decode(path.read_bytes(), type=Checked)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot read {path}: {error.strerror}; `ledgerproof checklist --json {path}` makes it"
        ) from (error)
    except msgspec.DecodeError as error:
        raise EnvironmentProblem(
            f"{path} is not a result of this version's checklist ({error}): make one with "
            f"`ledgerproof checklist --json {path}`"
        ) from error
    found = [answer.figures["api_ready_s"] for answer in checked.answers if "api_ready_s" in answer.figures]
    if not found:
        raise EnvironmentProblem(f"{path} does not hold the item chaos with an API process that was killed")
    return found[0]


def _table(folder: Path, verdict: dict[str, Any], bench: dict[str, Any] | None, api_ready_s: float | None) -> "Table":
    from ledgerproof import sla_table  # noqa: PLC0415 - with the rest

    lag, drift_s = _recorded(folder)
    try:
        table = sla_table.table(verdict, bench, lag_in_faults=lag, drift_s=drift_s, api_ready_s=api_ready_s)
    except (KeyError, TypeError, ValueError) as error:
        raise NotARun(
            f"the verdict of {folder} is not of this version ({type(error).__name__}: {error}): "
            f"`ledgerproof check --write {folder}` judges it again"
        ) from error
    table.made_at = datetime.now(UTC).isoformat(timespec="seconds")
    return table


def _recorded(folder: Path) -> tuple[float | None, float | None]:
    """Return the largest lag of the run, and the seconds until the planted drift was reported and repaired."""
    import polars as pl  # noqa: PLC0415 - slow to import

    from invariants.timeline import load_series, load_timeline  # noqa: PLC0415 - slow to import

    try:
        top = load_series(folder).filter(pl.col("name") == "kafka_consumer_lag")["value"].max()
        moments = load_timeline(folder)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise NotARun(f"the recording of {folder} cannot be read: {error}") from error
    planted = moments.filter(pl.col("kind") == "drift_planted")["t"].min()
    repaired = moments.filter(pl.col("kind") == "drift_repaired")["t"].min()
    drift_s = None if planted is None or repaired is None else float(str(repaired)) - float(str(planted))
    return None if top is None else float(str(top)), drift_s


def _page(table: "Table", path: Path) -> Path:
    from reports.sla_page import render_sla  # noqa: PLC0415 - with the rest

    return render_sla(_as_json(table), path)


def _as_json(table: "Table") -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(table)
    for line, item in zip(table.lines, found["lines"], strict=True):
        item["result"] = line.result
    return {**found, "exit_code": table.exit_code}


def print_levels(table: "Table") -> None:
    """Print the table, and under it what is calculated and what was not measured."""
    from ledgerproof.sla_table import MEASURED  # noqa: PLC0415 - with the rest

    source = table.source
    rows = [
        [f"{line.level}, {line.of}" if line.of else line.level, line.target, line.says, line.result]
        for line in table.lines
    ]
    print_table(f"run {source.run} ({source.verdict}): {source.scale}", ["service level", "target", "here", ""], rows)
    if source.bench:
        click.echo(f"rates: {source.bench}")
    for line in table.lines:
        if line.kind != MEASURED:
            click.echo(f"  {line.result}: {line.level}{', ' + line.of if line.of else ''}: {line.method}")
    for name in table.missed:
        click.echo(f"MISSED: {name}")
    for why in table.unproven:
        click.echo(f"NOT PROVEN: {why}")
