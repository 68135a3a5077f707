"""`ledgerproof failpoints`: where a running stack can be made to fail, and making it."""

from typing import Final, get_args

import click
import msgspec

from compose import failpoints
from compose.errors import NoFailpoints
from compose.stack import Stack
from ledgerproof.attach import json_flag, running_stack, stack_option
from ledgerproof.output import print_json, print_table
from reference.failpoints import CATALOGUE, NAMES, Action, Arm, PointState

EXIT_CODES: Final = """\b
Exit codes:
   0  done
   2  usage   wrong arguments, no such stack, or one without failpoints (message says why)
"""

_node_option = click.option("--node", required=True, help="Node of the stack, as api0 or relay0.")
_point_argument = click.argument("point", type=click.Choice(NAMES), metavar="POINT")


@click.group("failpoints")
def failpoints_group() -> None:
    """Make a running stack fail at a named point; it must have been started with `up --failpoints`."""


@failpoints_group.command("list", epilog=EXIT_CODES)
@click.option("--catalogue", is_flag=True, help="Only name every point and what it stands for; needs no stack.")
@stack_option
@json_flag
def list_command(*, catalogue: bool, stack_name: str | None, as_json: bool) -> int:
    """Show every point that was hit or is armed, by node; with --catalogue what points there are."""
    if catalogue:
        if as_json:
            print_json(CATALOGUE)
        else:
            print_table("", ["point", "when it is hit"], [[name, CATALOGUE[name]] for name in NAMES])
        return 0
    stack = running_stack(stack_name)
    found: dict[str, list[PointState]] = {}
    for node in _nodes(stack):
        try:
            points = failpoints.states(stack, node)
        except NoFailpoints:
            # A dead or stopped node cannot say what is armed; what it counted is in its folder.
            counted = failpoints.counts(stack, node)
            points = [PointState(name, hits, fired) for name, (hits, fired) in counted.items()]
        found[node] = [point for point in points if point.hits or point.armed]
    if as_json:
        print_json(msgspec.to_builtins(found))
        return 0
    rows = [
        [node, point.name, f"{point.hits:,}", str(point.fired), _words(point)]
        for node, points in found.items()
        for point in points
    ]
    print_table("", ["node", "point", "hits", "fired", "armed"], rows)
    return 0


@failpoints_group.command("arm", epilog=EXIT_CODES)
@_node_option
@_point_argument
@click.argument("action", type=click.Choice(get_args(Action)))
@click.option("--times", type=click.IntRange(1), default=1, show_default=True, help="So many hits do it.")
@click.option("--every", is_flag=True, help="Every hit does it.")
@click.option("--skip", type=click.IntRange(0), default=0, show_default=True, help="So many hits pass before.")
@click.option("--delay-ms", type=click.IntRange(1), default=None, help="Of a delay.")
@stack_option
@json_flag
def arm_command(
    *,
    node: str,
    point: str,
    action: Action,
    times: int,
    every: bool,
    skip: int,
    delay_ms: int | None,
    stack_name: str | None,
    as_json: bool,
) -> int:
    """Let POINT of a node exit (as kill -9), raise, delay or hang at its next hit.

    A hang ends when the point is disarmed, or by itself after a minute.
    """
    try:
        arm = Arm(point, action, None if every else times, skip, delay_ms)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return _show(failpoints.arm(running_stack(stack_name), node, arm), point, as_json=as_json)


@failpoints_group.command("disarm", epilog=EXIT_CODES)
@_node_option
@click.argument("point", type=click.Choice(NAMES), required=False, metavar="[POINT]")
@stack_option
@json_flag
def disarm_command(*, node: str, point: str | None, stack_name: str | None, as_json: bool) -> int:
    """Disarm POINT of a node, or all its points; what hangs in them goes on."""
    return _show(failpoints.disarm(running_stack(stack_name), node, point), point, as_json=as_json)


def _nodes(stack: Stack) -> list[str]:
    nodes = failpoints.armed_nodes(stack)
    if not nodes:
        raise NoFailpoints(
            f"stack {stack.name} was started without failpoints: start one with `ledgerproof up --failpoints`"
        )
    return nodes


def _show(points: list[PointState], name: str | None, *, as_json: bool) -> int:
    chosen = [point for point in points if point.name == name or (name is None and point.hits)]
    if as_json:
        print_json(msgspec.to_builtins(chosen))
        return 0
    for point in chosen:
        click.echo(f"{point.name}: {_words(point) or 'not armed'}, hit {point.hits} times, fired {point.fired} times")
    return 0


def _words(point: PointState) -> str:
    """Return what a point is armed with, in short; empty if it is not."""
    if point.armed is None:
        return ""
    arm = point.armed
    how_often = "every hit" if arm.times is None else "once" if arm.times == 1 else f"{arm.times} times"
    text = f"{arm.action} {how_often}" if arm.delay_ms is None else f"{arm.action} {arm.delay_ms} ms {how_often}"
    text = f"{text} after {arm.skip}" if arm.skip else text
    return f"{text}, {point.hanging} hang" if point.hanging else text
