"""Arms and disarms the failpoints of a running stack's nodes, and says how often each was hit.

Works on stacks that were started with `StackSpec(failpoints=True)`. Arming asks the process, over its admin socket;
counts are read from its folder, so that they can be had of a node that is dead, stopped or hanging as well.
"""

import socket
from pathlib import Path
from typing import Final

import msgspec

from compose import nodes
from compose.errors import NoFailpoints
from compose.stack import Stack
from reference.failpoint_socket import SOCKET_FILE, Answer, Request, short_path
from reference.failpoints import Arm, Fired, PointState, read_counts, read_fired

TIMEOUT_S: Final = 5.0
ANSWER_MAX_BYTES: Final = 1 << 20


def arm(stack: Stack, node: str, what: Arm) -> list[PointState]:
    """Arm a point of a node's process until that process ends or it is disarmed; return how all its points are.

    Raises NoFailpoints if the node does not answer, UnknownNode.
    """
    return _ask(stack, node, Request(arm=what)).points


def disarm(stack: Stack, node: str, name: str | None = None) -> list[PointState]:
    """Disarm one point of a node, or all of them, and release what hangs in it. Raises as `arm`."""
    return _ask(stack, node, Request(disarm=name or "")).points


def states(stack: Stack, node: str) -> list[PointState]:
    """Return how every point of a node's process is. Raises as `arm`."""
    return _ask(stack, node, Request()).points


def counts(stack: Stack, node: str) -> dict[str, tuple[int, int]]:
    """Return (hits, fired) of every point over all processes that the node has had; empty without failpoints."""
    return read_counts(_folder(stack, node))


def fired(stack: Stack, node: str) -> list[Fired]:
    """Return what the points of a node have done, oldest first."""
    return read_fired(_folder(stack, node))


def armed_nodes(stack: Stack) -> list[str]:
    """Return the nodes that can have failpoints: the service's processes, if the stack was started with them."""
    found = stack.state
    return [node.name for node in found.nodes if node.kind == "service"] if found.spec.failpoints else []


def _folder(stack: Stack, node: str) -> Path:
    return Path(nodes.named(stack.state, node).folder)


def _ask(stack: Stack, node: str, request: Request) -> Answer:
    folder = _folder(stack, node)
    if not stack.state.spec.failpoints:
        raise NoFailpoints(
            f"stack {stack.name} was started without failpoints: start one with `ledgerproof up --failpoints`"
        )
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door, short_path(folder, SOCKET_FILE) as path:
            door.settimeout(TIMEOUT_S)
            door.connect(path)
            door.sendall(msgspec.json.encode(request) + b"\n")
            answer = msgspec.json.decode(_line(door), type=Answer)
    except (OSError, msgspec.DecodeError) as error:
        state = nodes.status(nodes.named(stack.state, node), memory=False).state
        raise NoFailpoints(
            f"the failpoints of {node} do not answer ({error or type(error).__name__}); it is {state}"
        ) from error
    if answer.error is not None:
        raise NoFailpoints(f"{node} refused: {answer.error}")
    return answer


def _line(door: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n") and len(text) <= ANSWER_MAX_BYTES:
        more = door.recv(65_536)
        if not more:
            raise ConnectionResetError("the connection ended before the answer")
        text += more
    return text
