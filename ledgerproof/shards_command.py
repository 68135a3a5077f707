"""`ledgerproof shards`: where the logical shards of a running stack are, and moving one under load."""

import asyncio
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from compose.errors import StackNotFound
from compose.stack import DEFAULT_ROOT, Stack, find_stacks
from compose.state import stacks_folder
from ledgerproof.output import print_json, print_table
from ledgerproof.progress import Progress, print_error
from reference.routing import SHARDS

REFUSED_EXIT: Final = 60
UNFINISHED_EXIT: Final = 61
EXIT_CODES: Final = """\b
Exit codes:
   0  done
   2  usage        wrong arguments, or no such stack (message says why)
  60  REFUSED      nothing was moved, and the shard is where it was (message says why)
  61  UNFINISHED   the move stopped half way; no wallet is in danger, repeat the command
"""

_stack_option = click.option(
    "--stack", "named", default=None, help="Name or folder of the stack; not needed if there is one only."
)
_json_flag = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")


@click.group("shards")
def shards_command() -> None:
    """Show and move the logical shards of wallets of a running stack."""


@shards_command.command("list", epilog=EXIT_CODES)
@_stack_option
@_json_flag
def list_command(*, named: str | None, as_json: bool) -> int:
    """Show which server holds which shards, and every shard that needs attention."""
    from reference.shards import MoveRefused, list_shards  # noqa: PLC0415 - slow to import

    stack = _stack(named)
    try:
        views = asyncio.run(list_shards(stack.config, stack.superuser))
    except MoveRefused as error:
        print_error(str(error))
        return REFUSED_EXIT
    if as_json:
        print_json(msgspec.to_builtins(views))
        return 0
    rows = []
    for server in stack.config.servers:
        held = [view for view in views if view.server == server.name]
        numbers = _ranges([view.shard for view in held])
        entries, size = sum(view.entries for view in held), sum(view.bytes for view in held)
        rows.append([server.name, str(len(held)), f"{entries:,}", f"{size / 1e6:.1f}", numbers])
    print_table("", ["server", "shards", "entries (est.)", "MB", "which"], rows)
    for view in views:
        if view.problem:
            click.echo(f"shard {view.shard}: {view.problem}")
    return 0


@shards_command.command("move", epilog=EXIT_CODES)
@click.option("--shard", type=click.IntRange(0, SHARDS - 1), required=True, help="The shard: user_id % 100.")
@click.option("--to", "target", required=True, metavar="SERVER", help="Name of the server that gets it, as pg1.")
@_stack_option
@_json_flag
def move_command(*, shard: int, target: str, named: str | None, as_json: bool) -> int:
    """Move a shard of wallets to another server while clients go on.

    Most of it is copied first; then its wallets wait for a moment while the rest is copied, verified and given
    over. Killed or failed at any point, the command can be repeated: it finishes the move or begins anew. Naming
    the server that holds the shard clears what an interrupted move left elsewhere.
    """
    from reference.shards import MoveRefused, MoveUnfinished, move_shard  # noqa: PLC0415 - slow to import

    stack = _stack(named)
    config = stack.config
    names = [server.name for server in config.servers]
    if target not in names:
        raise click.UsageError(f"there is no server {target!r}; this stack has {', '.join(names)}")
    progress = Progress()
    try:
        with progress.step(f"Moving shard {shard} to {target}") as step:
            moved = asyncio.run(move_shard(config, stack.superuser, shard, names.index(target), step.show))
            step.detail = f"frozen for {moved.freeze_ms:.0f} ms" if moved.moved else "it is there"
    except MoveRefused as error:
        print_error(str(error))
        return REFUSED_EXIT
    except MoveUnfinished as error:
        print_error(str(error))
        return UNFINISHED_EXIT
    if as_json:
        print_json(msgspec.to_builtins(moved))
        return 0
    if not moved.moved:
        click.echo(f"shard {shard} is on {target}" + (": an interrupted move was cleared" if moved.resumed else ""))
        return 0
    click.echo(
        f"shard {shard}: {moved.source} -> {moved.target}, {moved.entries} entries, {moved.bets} bets, "
        f"{moved.refusals} refusals in {moved.total_ms:.0f} ms; it took no commands for {moved.freeze_ms:.0f} ms, in "
        f"which {moved.frozen_rows} rows were copied"
    )
    return 0


def _stack(named: str | None) -> Stack:
    """Return the stack that was named, by folder or name, or the only one. Raises StackNotFound, UsageError."""
    if named is not None:
        folder = Path(named)
        return Stack.attach(folder if folder.is_dir() else stacks_folder(DEFAULT_ROOT) / named)
    stacks = find_stacks(DEFAULT_ROOT)
    if not stacks:
        raise StackNotFound("there is no stack in this folder: `ledgerproof up` starts one")
    if len(stacks) > 1:
        raise click.UsageError(f"there is more than one stack; name one of them with --stack: {_names(stacks)}")
    return Stack.attach(stacks_folder(DEFAULT_ROOT) / stacks[0].name)


def _names(stacks: list[Any]) -> str:
    return ", ".join(state.name for state in stacks)


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers in short: 0–24, 26."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("–".join(map(str, part)) for part in parts)
