"""Cycles of dependencies between transactions, named as Adya's and Elle's classification names them.

- ww: appended just before; wr: appended what was read; rw: read what was there before an append; rt: was acknowledged
  before the other was asked.
- G0: a cycle of ww alone; G1c: of ww and wr; G-single: with exactly one rw; G2: with several.
- A name with `-realtime` needs rt too: the transactions are serialisable, but not in the order of real time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from invariants.foreign.graph import Graph, components, shortest_path
from invariants.foreign.history import Call, Kind
from invariants.foreign.report import Anomaly, Report

MAX_TRIED: Final = 500
"""Edges of one component through which a cycle of one name is looked for."""

LEVELS: Final = (
    ("G0", "ww", ("ww",)),
    ("G1c", "wr", ("ww", "wr")),
    ("G-single", "rw", ("ww", "wr")),
    ("G2", "rw", ("ww", "wr", "rw")),
)
"""Name, the kind of edge that such a cycle must have, and the kinds it may take besides; the worst first."""


@dataclass
class Dependencies:
    """What must come before what, with the reason in words."""

    calls: dict[int, Call]
    """The transactions that had an effect, by number."""
    graph: Graph = field(default_factory=Graph)

    def add(self, source: int, target: int, kind: str, reason: str) -> None:
        """Add a dependency between two transactions that had an effect; others are left out."""
        if source in self.calls and target in self.calls:
            self.graph.add(source, target, kind, reason)


def find_cycles(report: Report, dependencies: Dependencies, show: Callable[[str], None] | None = None) -> None:
    """Report the worst cycle of each component of transactions that depend on each other in a circle."""
    graph = dependencies.graph
    told: set[int] = set()
    for realtime in (False, True):
        if realtime:
            _add_real_time(dependencies)
        also = ("rt",) if realtime else ()
        every = graph.only(("ww", "wr", "rw", *also))
        found = components(every)
        for number, component in enumerate(found):
            if show is not None:
                show(f"{number} of {len(found)} circles of transactions")
            if realtime and told.intersection(component):
                continue  # It has a cycle that needs no clock.
            cycle = _worst(graph, set(component), also)
            if cycle is None:
                report.undecided.append(
                    f"{len(component)} transactions depend on each other in a circle, too many to find a short one"
                )
                continue
            told.update(component)
            name, nodes, kinds = cycle
            name += "-realtime" if realtime else ""
            report.add(_anomaly(dependencies, name, nodes, kinds, len(component)))


def _worst(graph: Graph, inside: set[int], also: tuple[str, ...]) -> tuple[str, list[int], tuple[str, ...]] | None:
    """Return name, nodes and allowed kinds of the worst cycle inside a component: through one edge and a way back."""
    for name, through, kinds in LEVELS:
        allowed = (*kinds, *also)
        back = graph.only(allowed)
        best: list[int] | None = None
        tried = 0
        for source in sorted(inside):
            for target, has in graph.edges.get(source, {}).items():
                if through not in has or target not in inside or tried > MAX_TRIED:
                    continue
                tried += 1
                path = shortest_path(back, target, source, inside.__contains__)
                if path is not None and (best is None or len(path) < len(best)):
                    best = path
        if best is not None:
            # The path leads from the target of the edge back to its source.
            return name, [best[-1], *best[:-1]], (through, *(kind for kind in allowed if kind != through))
    return None


def _anomaly(dependencies: Dependencies, name: str, nodes: list[int], kinds: tuple[str, ...], size: int) -> Anomaly:
    calls = [dependencies.calls[node] for node in nodes]
    parts = []
    for position, node in enumerate(nodes):
        following = nodes[(position + 1) % len(nodes)]
        has = dependencies.graph.edges[node][following]
        kind = _preferred(has, kinds, first=position == 0)
        parts.append(f"{calls[position].label} {has[kind]} {dependencies.calls[following].label} [{kind}]")
    circle = "" if size == len(nodes) else f" ({size} transactions are in this circle)"
    return Anomaly(name, f"{'; '.join(parts)}{circle}", tuple(call.line for call in calls))


def _preferred(has: dict[str, str], kinds: tuple[str, ...], *, first: bool) -> str:
    """Return the kind of an edge to tell: the one the cycle is looked for by at its first edge, else the strongest."""
    order = kinds if first else [kind for kind in ("ww", "wr", "rt", "rw") if kind in kinds]
    return next(kind for kind in order if kind in has)


def _add_real_time(dependencies: Dependencies) -> None:
    """Add rt edges from each acknowledged transaction to those asked after it, without edges that others imply."""
    moments: list[tuple[int, bool, int]] = []
    for number, call in dependencies.calls.items():
        moments.append((call.begin, False, number))
        if call.kind is Kind.OK:
            moments.append((call.end, True, number))
    # Acknowledged transactions that no later acknowledged one has yet begun after.
    newest: set[int] = set()
    before: dict[int, frozenset[int]] = {}
    for _, answered, number in sorted(moments):
        if answered:
            newest -= before.pop(number)
            newest.add(number)
            continue
        before[number] = frozenset(newest)
        for earlier in before[number]:
            dependencies.add(earlier, number, "rt", "was acknowledged before the asking of")
