"""Directed graphs with reasons on their edges: strongly connected components and short cycles."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Node = int
Kind = str
"""ww, wr, rw or rt."""


@dataclass
class Graph:
    """Edges between numbered nodes; each has one or more kinds, each kind with a reason in words."""

    edges: dict[Node, dict[Node, dict[Kind, str]]] = field(default_factory=dict)

    def add(self, source: Node, target: Node, kind: Kind, reason: str) -> None:
        """Add an edge; of several reasons of one kind the first is kept. An edge to itself is none."""
        if source != target:
            self.edges.setdefault(source, {}).setdefault(target, {}).setdefault(kind, reason)

    def only(self, kinds: Iterable[Kind]) -> dict[Node, list[Node]]:
        """Return the successors of each node over edges that have one of these kinds."""
        wanted = set(kinds)
        return {
            source: [target for target, has in targets.items() if wanted & has.keys()]
            for source, targets in self.edges.items()
        }


def components(successors: Mapping[Node, list[Node]]) -> list[list[Node]]:
    """Return the strongly connected components of two nodes or more (Tarjan's algorithm, without recursion)."""
    order: dict[Node, int] = {}
    low: dict[Node, int] = {}
    on_path: set[Node] = set()
    path: list[Node] = []
    found: list[list[Node]] = []
    for root in successors:
        if root in order:
            continue
        work = [(root, iter(successors.get(root, ())))]
        order[root] = low[root] = len(order)
        path.append(root)
        on_path.add(root)
        while work:
            node, rest = work[-1]
            following = next(rest, None)
            if following is None:
                work.pop()
                if work:
                    parent = work[-1][0]
                    low[parent] = min(low[parent], low[node])
                if low[node] == order[node]:
                    component = []
                    while True:
                        member = path.pop()
                        on_path.discard(member)
                        component.append(member)
                        if member == node:
                            break
                    if len(component) > 1:
                        found.append(component)
            elif following not in order:
                order[following] = low[following] = len(order)
                path.append(following)
                on_path.add(following)
                work.append((following, iter(successors.get(following, ()))))
            elif following in on_path:
                low[node] = min(low[node], order[following])
    return found


def shortest_path(
    successors: Mapping[Node, list[Node]], start: Node, goal: Node, inside: Callable[[Node], bool]
) -> list[Node] | None:
    """Return a shortest path from `start` to `goal` over nodes that are `inside`; None if there is none."""
    came: dict[Node, Node] = {start: start}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        if node == goal:
            path = [node]
            while node != start:
                node = came[node]
                path.append(node)
            return path[::-1]
        for following in successors.get(node, ()):
            if following not in came and inside(following):
                came[following] = node
                queue.append(following)
    return None
