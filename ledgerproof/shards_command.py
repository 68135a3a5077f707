"""`ledgerproof shards`: where the logical shards of a running stack are, and moving one under load."""

import asyncio
from typing import Final

import click
import msgspec

from ledgerproof.attach import json_flag, running_stack, stack_option
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


@click.group("shards")
def shards_command() -> None:
    """Show and move the logical shards of wallets of a running stack."""


@shards_command.command("list", epilog=EXIT_CODES)
@stack_option
@json_flag
def list_command(*, stack_name: str | None, as_json: bool) -> int:
    """Show which server holds which shards, and every shard that needs attention."""
    from reference.shards import MoveRefused, list_shards  # noqa: PLC0415 - slow to import

    stack = running_stack(stack_name)
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
@stack_option
@json_flag
def move_command(*, shard: int, target: str, stack_name: str | None, as_json: bool) -> int:
    """Move a shard of wallets to another server while clients go on.

    Most of it is copied first; then its wallets wait for a moment while the rest is copied, verified and given
    over. Killed or failed at any point, the command can be repeated: it finishes the move or begins anew. Naming
    the server that holds the shard clears what an interrupted move left elsewhere.
    """
    from reference.shards import MoveRefused, MoveUnfinished, move_shard  # noqa: PLC0415 - slow to import

    stack = running_stack(stack_name)
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


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers in short: 0–24, 26."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("–".join(map(str, part)) for part in parts)
