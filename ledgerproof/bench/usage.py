"""What the processes of the stack used: CPU by group over a window, and the peak of memory of each process."""

from pathlib import Path
from typing import Final

from compose import nodes
from compose.service import role_of
from compose.stack import Stack

GROUP_OF: Final = {"pg": "postgres"}
"""Nodes are named by their sort and a number; only Postgres has a shorter name than its group."""


def group_of(node: str) -> str:
    """Return the group of a node: postgres, kafka, redis, api, relay, matcher, settler, projector or reconciler."""
    sort = role_of(node)
    return GROUP_OF.get(sort, sort)


def cpu_seconds(stack: Stack) -> dict[str, float]:
    """Return the CPU seconds that each group's live processes have used so far."""
    total: dict[str, float] = {}
    for node in stack.status(memory=False):
        group = group_of(node.name)
        total[group] = total.get(group, 0.0) + node.cpu_s
    return total


def spent(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return the seconds between two readings; a group whose process was replaced counts from its beginning."""
    used = {}
    for group, value in after.items():
        earlier = before.get(group, 0.0)
        used[group] = value - earlier if value >= earlier else value
    return used


def per_operation_ms(used_s: dict[str, float], operations: int) -> dict[str, float]:
    """Return CPU milliseconds for one operation by group."""
    return {group: round(1000 * value / operations, 4) for group, value in sorted(used_s.items())} if operations else {}


class PeakMemory:
    """The highest resident memory that each node's main process ever had, in MB, over restarts of the node.

    Of Postgres it is the proportional memory of all its processes at the moments of `note`, for its shared buffers
    are in each of them.
    """

    def __init__(self) -> None:
        self.peak_mb: dict[str, float] = {}

    def note(self, stack: Stack) -> None:
        """Read every node; call it before one is stopped, and at the end."""
        for node in stack.status(memory=False):
            if node.pid is None:
                continue
            if node.kind == "postgres":
                found = nodes.status(nodes.named(stack.state, node.name)).memory_bytes / 1e6
            else:
                found = _high_water_mb(node.pid)
            self.peak_mb[node.name] = round(max(found, self.peak_mb.get(node.name, 0.0)), 1)


def _high_water_mb(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0
