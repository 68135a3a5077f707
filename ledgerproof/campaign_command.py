"""`ledgerproof campaign`: the clean build must be silent over many short plans."""

import secrets
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from compose.stack import DEFAULT_ROOT
from ledgerproof import __version__
from ledgerproof.options import RUNS_FOLDER
from ledgerproof.output import check_writable, print_json, print_table
from ledgerproof.progress import Progress

CAMPAIGN_FILE: Final = Path("reports/campaign.json")
SHOWN_ROWS_MAX: Final = 20
EXIT_CODES: Final = """\b
Exit codes:
   0  every plan was silent: no anomaly (service levels missed are counted, and are none)
   2  usage: wrong arguments, or a file of another seed or commit
  20  a plan found an anomaly; its run folder is kept
  30  a plan proved nothing, or not all plans were run
  40  stopped; the same command goes on where it stopped
  50  a plan left something behind
"""


@click.command("campaign", epilog=EXIT_CODES)
@click.option(
    "--plans", type=click.IntRange(1, 100_000), default=200, show_default=True, help="How many plans there are."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**53),
    default=None,
    help="Draws every plan; random if left out, and printed.",
)
@click.option(
    "--out",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=CAMPAIGN_FILE,
    show_default=True,
    help="File with the result of every plan; an unfinished campaign of the same seed goes on.",
)
@click.option("--fresh", is_flag=True, help="Begin anew, whatever the file holds.")
@click.option("--audit/--no-audit", default=True, show_default=True, help="Run the live auditor beside every load.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def campaign_command(*, plans: int, seed: int | None, path: Path, fresh: bool, audit: bool, as_json: bool) -> int:
    """Run many short `prove` plans one after the other and stop at the first red one.

    Run folders of silent plans are removed. Killed or stopped, the same command goes on with the next plan.
    """
    from ledgerproof import campaign  # noqa: PLC0415 - slow to import
    from ledgerproof.machine import commit, describe_machine  # noqa: PLC0415
    from ledgerproof.prove import prove  # noqa: PLC0415 - slow to import

    progress = Progress()
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    if seed is None:
        seed = secrets.randbelow(2**31)
    # The file itself is part of the tree once it is committed: writing it must not look like another build.
    build = commit(apart_from=path)
    begun = campaign.Campaign(seed, plans, build, __version__, dict(describe_machine()))
    work = begun if fresh else campaign.load(path, begun)
    progress.say(f"ledgerproof {__version__}, campaign seed {seed}, {len(work.rows)} of {plans} plans done")
    verdict = campaign.run(work, path, campaign.Workshop(prove, progress, RUNS_FOLDER, DEFAULT_ROOT, audit))
    campaign.save(path, work)
    if as_json:
        print_json(msgspec.to_builtins(work) | {"verdict": verdict.name, "exit_code": int(verdict)})
    else:
        _show(work, path, verdict.name)
    return int(verdict)


def _show(work: Any, path: Path, verdict: str) -> None:
    rows = [
        [
            str(row.plan.number),
            row.verdict,
            row.kind,
            f"{row.plan.rate:g}",
            f"{row.plan.duration_s:g}",
            str(row.plan.servers),
            row.plan.faults,
            str(row.acknowledged_bets),
            str(sum(row.anomalies.values()) + sum(row.live.values())),
            f"{row.seconds:.0f}",
        ]
        for row in work.rows[-SHOWN_ROWS_MAX:]
    ]
    columns = ["plan", "verdict", "", "bets/s", "load s", "servers", "faults", "bets", "anomalies", "s"]
    print_table("", columns, rows)
    missed = sum(row.verdict == "SLA_MISSED" for row in work.rows)
    bets = sum(row.acknowledged_bets for row in work.rows)
    click.echo(
        f"{verdict}: {work.count('silent')} of {work.plans} plans silent ({missed} of them missed a service level), "
        f"{work.count('unproven')} proved nothing, {work.count('red')} red; {bets:,} bets. All rows: {path}"
    )
