"""`ledgerproof judge`: the verdict on a history that another harness recorded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ledgerproof.attach import json_flag
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import print_json
from ledgerproof.progress import Progress

if TYPE_CHECKING:
    from invariants.foreign.report import Report

FORMATS: Final = ("bank", "list-append")

EXIT_CODES: Final = """\b
Exit codes:
   0  PASS                no anomaly, and everything was decided
   2  usage               wrong arguments, or the file is no history of this format (message says where)
  20  INVARIANT_VIOLATED  the history holds an anomaly; the witness names the lines
  30  INVALID             nothing is proved: no read was answered, or the order could not be decided
"""


@click.command("judge", epilog=EXIT_CODES)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    required=True,
    help="bank: Jepsen's transfers and reads of all accounts. list-append: Elle's transactions.",
)
@click.option(
    "--total", type=int, default=None, help="bank: what all accounts hold together; by most reads if left out."
)
@click.option("--allow-negative", is_flag=True, help="bank: accounts may go below zero.")
@json_flag
def judge_command(*, file: Path, form: str, total: int | None, allow_negative: bool, as_json: bool) -> int:
    """Judge FILE, a history in EDN that Jepsen or another harness recorded.

    Strict serialisability is judged: real time counts. What is known only as :info may have happened or not, at any
    time after it was asked.
    """
    if form != "bank" and (total is not None or allow_negative):
        raise click.UsageError("--total and --allow-negative belong to --format bank")
    from invariants.foreign.append import judge_append  # noqa: PLC0415 - slow to import
    from invariants.foreign.bank import BankOptions, judge_bank  # noqa: PLC0415 - slow to import
    from invariants.foreign.history import HistoryError, read_file  # noqa: PLC0415 - slow to import

    progress = Progress()
    try:
        with progress.step(f"Reading {file}") as step:
            calls = read_file(file, step.show)
            step.detail = f"{len(calls)} calls"
        with progress.step("Judging it") as step:
            if form == "bank":
                report = judge_bank(calls, BankOptions(total, allow_negative), step.show)
            else:
                report = judge_append(calls, step.show)
            step.detail = f"{report.reads} reads"
    except HistoryError as error:
        raise EnvironmentProblem(f"{file} cannot be judged as {form}: {error}") from error
    if as_json:
        print_json(_as_json(report, file))
    else:
        _print(report)
    return int(report.verdict)


def _as_json(report: "Report", file: Path) -> dict[str, Any]:
    return {
        "file": str(file),
        "format": report.format,
        "verdict": report.verdict.name,
        "exit_code": int(report.verdict),
        "calls": report.calls,
        "reads": report.reads,
        "counts": dict(report.counts),
        "anomalies": [
            {"name": found.name, "code": found.code, "lines": list(found.lines), "text": found.text}
            for found in report.anomalies
        ],
        "undecided": report.undecided,
    }


def _print(report: "Report") -> None:
    click.echo(f"{report.verdict.name}  {report.format}, {report.calls} calls, {report.reads} reads")
    for found in report.anomalies:
        click.echo(f"  {found.name} ({found.code}): {found.text}")
    for name, count in report.counts.items():
        kept = sum(found.name == name for found in report.anomalies)
        if count > kept:
            click.echo(f"  {name}: {count - kept} more")
    for sentence in report.undecided:
        click.echo(f"  undecided: {sentence}")
