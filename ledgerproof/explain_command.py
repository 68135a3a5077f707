"""`ledgerproof explain` and `ledgerproof sometimes`: what a stored run shows, told so that a person can follow it."""

from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console

from ledgerproof.attach import json_flag
from ledgerproof.options import RUNS_FOLDER, NotARun, run_folder
from ledgerproof.output import print_json, print_table
from ledgerproof.progress import Progress

NOT_PROVED_EXIT: Final = 30
EXIT_CODES: Final = """\b
Exit codes:
   0  explained; or nothing was found under this code
   2  usage: no such run, code or witness, or the run's files cannot be read
  30  the run does not hold what the code needs
"""
SOMETIMES_EXIT_CODES: Final = """\b
Exit codes:
   0  each of them happened in one of the runs at least
   2  usage: no such run, or one without a verdict
  30  one of them never happened: the runs together prove less than they seem to
"""


@click.command("explain", epilog=EXIT_CODES)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("code")
@click.option("--witness", "number", type=click.IntRange(min=1), default=1, show_default=True, help="Which of them.")
@json_flag
def explain_command(*, run: Path, code: str, number: int, as_json: bool) -> int:
    """Prove a witness of CODE in the stored run RUN: the rows, every attempt, the order, and the contradiction.

    The check of CODE is run again, as this version knows it.
    """
    import polars as pl  # noqa: PLC0415 - slow to import

    from invariants.anomalies import CHECKS  # noqa: PLC0415 - slow to import
    from invariants.explain import NoWitness, explain  # noqa: PLC0415 - slow to import
    from invariants.run import load_run  # noqa: PLC0415 - slow to import
    from invariants.snapshot import MissingEvidence  # noqa: PLC0415 - slow to import

    code = code.upper()
    if code not in CHECKS:
        raise click.UsageError(f"there is no code {code}; there are {', '.join(CHECKS)}")
    folder = run_folder(run)
    try:
        with Progress().step(f"Looking for {code} {CHECKS[code].name} in {folder}"):
            proof = explain(load_run(folder), code, number)
    except NoWitness as error:
        if number > 1:
            raise click.UsageError(str(error)) from error
        if as_json:
            print_json({"code": code, "witnesses": 0})
        else:
            click.echo(str(error))
        return 0
    except MissingEvidence as error:
        if as_json:
            print_json({"code": code, "witnesses": None, "undecided": str(error)})
        else:
            click.echo(f"{code} cannot be decided in {folder}: {error}")
        return NOT_PROVED_EXIT
    except (pl.exceptions.PolarsError, OSError) as error:
        raise NotARun(f"{folder} cannot be read: {error}") from error
    if as_json:
        print_json(msgspec.to_builtins(proof))
    else:
        _print(msgspec.to_builtins(proof))
    return 0


def _print(proof: dict[str, Any]) -> None:
    """Print a proof; bold and coloured on a terminal only."""
    console = Console(highlight=False, soft_wrap=True)
    of = f"witness {proof['number']} of {proof['witnesses']}"
    if proof["count"] > proof["witnesses"]:
        of += f" kept, {proof['count']} in all"
    console.print(f"{proof['code']} {proof['name']}, {of}", style="bold", markup=False)
    console.print(f"Rule: {proof['rule']}", markup=False)
    for section in proof["sections"]:
        console.print()
        console.print(section["title"], style="bold", markup=False)
        for line in section["lines"]:
            when = " " * 12 if line["at_s"] is None else f"{line['at_s']:10.3f} s"
            mark = ">" if line["marked"] else " "
            console.print(f"{mark} {when}  {line['text']}", style="red" if line["marked"] else None, markup=False)
        if section["left_out"]:
            console.print(f"  … and {section['left_out']} more", markup=False)
    console.print()
    console.print(f"Contradiction: {proof['contradiction']}", style="bold red", markup=False)


@click.command("sometimes", epilog=SOMETIMES_EXIT_CODES)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--require", "required", multiple=True, metavar="NAME", help="Only this one must have happened; may be repeated."
)
@json_flag
def sometimes_command(*, runs: tuple[Path, ...], required: tuple[str, ...], as_json: bool) -> int:
    """Add up what the runs RUNS (all stored ones if left out) have shown: each *sometimes* must have happened once.

    A run in which nothing ever raced or broke proves little. Counted from the verdicts of the runs.
    """
    from invariants.sometimes import COUNTERS, never  # noqa: PLC0415 - slow to import

    unknown = [name for name in required if name not in COUNTERS]
    if unknown:
        raise click.UsageError(f"there is no {unknown[0]!r}; there are: {'; '.join(COUNTERS)}")
    folders = [run_folder(run) for run in runs] or sorted(RUNS_FOLDER.glob("*/verdict.json"))
    if not folders:
        raise NotARun(f"there is no run in {RUNS_FOLDER}: start one with `ledgerproof prove`")
    counts = [_counts(folder if folder.is_dir() else folder.parent) for folder in folders]
    wanted = required or tuple(COUNTERS)
    missing = never(counts, wanted)
    totals = {name: sum(run.get(name, 0) for run in counts) for name in wanted}
    if as_json:
        print_json({"runs": len(counts), "sometimes": totals, "never": missing})
    else:
        in_runs = {name: sum(bool(run.get(name)) for run in counts) for name in wanted}
        print_table(
            "",
            ["sometimes", "times", f"in of {len(counts)} runs"],
            [[name, str(totals[name]), str(in_runs[name]) if totals[name] else "NEVER"] for name in wanted],
        )
    return NOT_PROVED_EXIT if missing else 0


def _counts(folder: Path) -> dict[str, int]:
    path = folder / "verdict.json"
    try:
        verdict = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        return msgspec.convert(verdict.get("sometimes", {}), dict[str, int])
    except OSError as error:
        raise NotARun(f"{folder} has no verdict: {error.strerror}; `ledgerproof check --write` makes one") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise NotARun(f"{path} cannot be read: {error}; `ledgerproof check --write` makes another") from error
