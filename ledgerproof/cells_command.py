"""`ledgerproof cells`: which combinations of fault, operation and phase runs have hit, and which they have not."""

from pathlib import Path
from typing import Final

import click

from ledgerproof.attach import json_flag
from ledgerproof.options import NotARun, run_folder
from ledgerproof.output import print_json, print_table

EXIT_CODES: Final = """\b
Exit codes:
   0  done
   2  usage   no such run, or its evidence cannot be read (message says why)
"""


@click.command("cells", epilog=EXIT_CODES)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@json_flag
def cells_command(*, runs: tuple[Path, ...], as_json: bool) -> int:
    """Show the cells of the run folders RUNS together (the newest run if left out).

    A row is a fault and an operation that met it, a column a phase of the run; `none` are attempts that met no fault.
    """
    import msgspec  # noqa: PLC0415 - with the rest
    import polars as pl  # noqa: PLC0415 - slow to import

    from invariants.timeline import PHASES  # noqa: PLC0415 - slow to import
    from ledgerproof import cells  # noqa: PLC0415 - slow to import
    from reference.failpoints import CATALOGUE  # noqa: PLC0415 - with the rest

    folders = [run_folder(run) for run in runs] or [run_folder(None)]
    try:
        found = cells.together([cells.cells_of(folder) for folder in folders])
    except (OSError, msgspec.DecodeError, pl.exceptions.PolarsError) as error:
        raise NotARun(f"the cells of {', '.join(map(str, folders))} cannot be read: {error}") from error
    if as_json:
        print_json(cells.as_json(found))
        return 0
    phases = [phase for phase in PHASES if any(cell.phase == phase for cell in found.cells)]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for cell in found.cells:
        text = f"{cell.attempts} ({cell.unknown} unknown)" if cell.unknown else str(cell.attempts)
        rows.setdefault((cell.fault, cell.operation), {})[cell.phase] = text
    print_table(
        f"{len(found.cells)} cells in {found.runs} runs",
        ["fault", "operation", *phases],
        [[*pair, *(counts.get(phase, "") for phase in phases)] for pair, counts in rows.items()],
    )
    never = [f"{fault} with {operation}" for fault, operation in cells.empty_cells(found)]
    if never:
        click.echo(f"\nnever met: {', '.join(never)}")
    if found.hits:
        click.echo(f"\nfailpoints passed: {len(found.hits)} of {len(CATALOGUE)}")
        click.echo(f"never passed: {', '.join(found.never_hit) or 'none'}")
        click.echo(f"acted: {', '.join(f'{name} {times}x' for name, times in found.fired.items()) or 'none'}")
    return 0
