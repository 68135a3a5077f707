"""`ledgerproof checklist` on the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec
from rich.console import Console

from ledgerproof.attach import running_stack
from ledgerproof.output import check_writable, json_path_option, print_json
from ledgerproof.progress import Progress, print_error

if TYPE_CHECKING:
    from ledgerproof.checklist.run import Checked

FAILED_EXIT: Final = 10
UNSEEN_EXIT: Final = 30
RESIDUE_EXIT: Final = 50
COLOURS: Final = {"ok": "green", "failed": "red", "cannot be run here": "yellow"}

EXIT_CODES: Final = """\b
Exit codes:
   0  no item failed; items that cannot be run here are named and are not ok
   2  usage: wrong arguments, no such stack, or none can be started (message says why)
  10  an item failed
  30  with --strict: none failed, but at least one could not be run here
  40  stopped (Ctrl-C); what was killed for a check is started again
  50  everything else is fine, but something was left behind
"""


@click.command("checklist", epilog=EXIT_CODES)
@click.option("--stack", "stack_name", default=None, help="Check this running stack instead of starting one.")
@click.option(
    "--break",
    "may_break",
    is_flag=True,
    help="With --stack: also kill its processes and make a balance wrong, and undo it, where an item asks for it.",
)
@click.option("--only", multiple=True, metavar="ITEM", help="Only this item (repeat it for more).")
@click.option("--strict", is_flag=True, help="Exit code 30 if an item could not be run here.")
@json_path_option("Write the result as JSON to PATH; without a PATH, to standard output instead of the list.")
def checklist_command(
    *, stack_name: str | None, may_break: bool, only: tuple[str, ...], strict: bool, json_path: str | None
) -> int:
    """Go through the architecture's deployment checklist and look at each item.

    Starts a small stack with the architecture's partitions, or looks at the one that --stack names: there it
    posts small deposits into wallets of its own, and kills nothing unless --break is given. Items that wait until
    every event has been consumed fail on a stack under load, which does not come to rest.
    """
    from ledgerproof.checklist.catalogue import NAMES  # noqa: PLC0415 - slow to import
    from ledgerproof.checklist.run import check  # noqa: PLC0415 - slow to import

    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise click.UsageError(f"no such item: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if may_break and stack_name is None:
        raise click.UsageError("--break needs --stack; a stack that is started for the checklist is broken anyway")
    if json_path not in (None, "-"):
        check_writable(Path(json_path))
    stack = None if stack_name is None else running_stack(stack_name)
    checked = check(only or NAMES, stack, Progress(), may_break=may_break)
    code = exit_code(checked, strict=strict)
    found = {**msgspec.to_builtins(checked), "exit_code": code}
    if json_path == "-":
        print_json(found)
    else:
        if json_path is not None:
            Path(json_path).write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
        print_answers(checked)
    for line in checked.residue:
        print_error(f"left behind: {line}")
    return code


def exit_code(checked: "Checked", *, strict: bool) -> int:
    """Return what the command ends with."""
    if checked.count("failed"):
        return FAILED_EXIT
    if strict and checked.count("cannot be run here"):
        return UNSEEN_EXIT
    return RESIDUE_EXIT if checked.residue else 0


def print_answers(checked: "Checked") -> None:
    """Print every item with its result, and its evidence on the line below."""
    console = Console(highlight=False, soft_wrap=True)
    section = ""
    for answer in checked.answers:
        if answer.section != section:
            section = answer.section
            console.print(f"\n{section}", markup=False)
        colour = COLOURS[answer.result]
        mark = f"[{colour}]{answer.result:<19}[/{colour}]"
        console.print(f"  {mark}", end="")
        console.print(f"{answer.title} ({answer.id})", markup=False)
        console.print(f"{'':<21}{answer.evidence}", markup=False)
    counts = ", ".join(f"{checked.count(result)} {result}" for result in COLOURS)
    console.print(f"\n{len(checked.answers)} items: {counts}; stack {checked.stack}: {checked.shape}", markup=False)
