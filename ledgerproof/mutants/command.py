"""`ledgerproof mutants`: plant every known bug, one after another, and show that each is noticed."""

import contextlib
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from compose.errors import StackError
from compose.stack import DEFAULT_ROOT, Stack
from ledgerproof.machine import commit, describe_machine
from ledgerproof.mutants.patches import FOLDER, Mutant, PatchError, load_all
from ledgerproof.mutants.workshop import SOURCE
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import check_writable, print_json, print_table, write_json
from ledgerproof.progress import Progress

SURVIVED_EXIT: Final = 20
INVALID_EXIT: Final = 30
ABORTED_EXIT: Final = 40
EXIT_CODES: Final = """\b
Exit codes:
   0  every planted bug was noticed by the right codes, and the clean tree is silent
   2  usage: wrong arguments, a patch that does not fit the tree any more, no stored matrix
  20  a planted bug was not noticed, or not by the right codes
  30  a planted bug could not be run, or the clean tree is not silent under its trigger
  40  stopped
"""


@click.command("mutants", epilog=EXIT_CODES)
@click.option(
    "--only", multiple=True, metavar="ID", help="Run only this planted bug (again for more; a part is enough)."
)
@click.option("--tier", type=click.Choice(["worlds", "stack", "plan"]), default=None, help="Run only this tier.")
@click.option("--stored", is_flag=True, help="Show the matrix that is committed and run nothing.")
@click.option(
    "--json", "json_path", default=None, metavar="PATH", help="Also write the rows as JSON; - for the screen."
)
@click.option("--write", is_flag=True, help="Put the rows into the committed matrix, its page and docs/mutants.md.")
@click.option(
    "--on",
    "on",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FOLDER",
    help="Use the servers of the stack in FOLDER and leave them running, instead of starting some.",
)
@click.option("--keep", is_flag=True, help="Keep the logs and run folders below .ledgerproof/planted.")
def mutants_command(
    *,
    only: tuple[str, ...],
    tier: str | None,
    stored: bool,
    json_path: str | None,
    write: bool,
    on: Path | None,
    keep: bool,
) -> int:
    """Plant the known bugs of service and harness, one after another, and show that each is noticed.

    Each is a patch in tests/mutants. It is applied to a copy of the tree, its trigger is played there on real servers,
    and what the harness says is compared with the patch's header. The clean tree must be silent under the same trigger.
    """
    from ledgerproof.mutants import document, matrix, page  # noqa: PLC0415 - slow to import
    from ledgerproof.mutants.outcome import Row  # noqa: PLC0415
    from ledgerproof.mutants.runner import run_all, runner  # noqa: PLC0415

    if json_path not in {None, "-"}:
        check_writable(Path(str(json_path)))
    try:
        chosen = _chosen(load_all(SOURCE / FOLDER), only, tier)
        if stored:
            known = matrix.load(SOURCE / matrix.STORED)
            ids = {mutant.header.id for mutant in chosen}
            found = msgspec.structs.replace(known, rows=[row for row in known.rows if row.id in ids])
            return _tell(found, json_path)
    except (PatchError, matrix.NotStored) as error:
        raise EnvironmentProblem(str(error)) from error

    progress = Progress()
    rows: list[Row] = []
    began = time.monotonic()
    with _stop_on_signals() as stopped, progress.step(f"Planting {len(chosen)} bugs") as step:

        def told(row: Row) -> None:
            mark = "killed" if row.killed else "NOT KILLED"
            progress.say(f"  {len(rows) + 1}/{len(chosen)} {row.id}: {mark} in {row.seconds:.0f} s {row.why}")
            rows.append(row)

        try:
            servers = None if on is None else Stack.attach(on)
            with runner(DEFAULT_ROOT, step.show, keep=keep, servers=servers) as work:
                run_all(chosen, work, told, stop=lambda: bool(stopped))
        except StackError as error:
            raise EnvironmentProblem(str(error)) from error
        step.detail = f"{sum(row.killed for row in rows)} of {len(rows)} killed, {time.monotonic() - began:.0f} s"
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    found = matrix.Matrix(commit(), dict(describe_machine()), made, rows)
    if write:
        with contextlib.suppress(matrix.NotStored):
            found_all = matrix.merged(matrix.load(SOURCE / matrix.STORED), found)
            known_ids = {mutant.header.id for mutant in load_all(SOURCE / FOLDER)}
            found_all.rows = [row for row in found_all.rows if row.id in known_ids]
            found = found_all if only or tier else found
        matrix.store(found, SOURCE / matrix.STORED)
        (SOURCE / matrix.PAGE).write_text(page.render(found), encoding="utf-8")
        document.write(SOURCE)
    code = _tell(found if not only else msgspec.structs.replace(found, rows=rows), json_path)
    return ABORTED_EXIT if stopped else code


def _chosen(mutants: list[Mutant], only: tuple[str, ...], tier: str | None) -> list[Mutant]:
    """Return the planted bugs that were asked for. Raises PatchError for a name that is none."""
    for part in only:
        if not any(part in mutant.header.id for mutant in mutants):
            raise PatchError(f"there is no planted bug {part}; see {FOLDER}")
    exact = [mutant for mutant in mutants if mutant.header.id in only]
    named = exact or [mutant for mutant in mutants if not only or any(part in mutant.header.id for part in only)]
    return [mutant for mutant in named if tier is None or mutant.header.tier == tier]


def _tell(found: Any, json_path: str | None) -> int:
    """Print a matrix and return the exit code that it deserves."""
    rows = found.rows
    builtin = msgspec.to_builtins(found)
    if json_path == "-":
        print_json(builtin)
    else:
        if json_path is not None:
            write_json(Path(json_path), found)
        print_table(
            f"{found.killed} of {len(rows)} planted bugs killed; commit {found.commit}, {found.made_at}",
            ["id", "layer", "tier", "killed", "codes", "s", "control"],
            [
                [
                    row.id,
                    row.layer,
                    row.tier,
                    "yes" if row.killed else "NO",
                    " ".join(row.codes) or row.verdict,
                    f"{row.seconds:.0f}",
                    row.control[:40],
                ]
                for row in rows
            ],
        )
        for row in found.survivors:
            click.echo(f"not killed: {row.id}: {row.why}")
    if any(row.control != "silent" or row.verdict in {"not run", "ABORTED"} for row in found.survivors):
        return INVALID_EXIT
    return SURVIVED_EXIT if found.survivors else 0


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM, so that the bug under way is finished and the servers go down in order."""
    seen: list[int] = []

    def note(number: int, _frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
