"""The list-append workload: transactions that append unique elements to lists and read whole lists.

A list shows its own history: of two reads one must begin with the other, and the longest gives the order of all
appends to it. From these orders follow the dependencies of transactions (`invariants.foreign.append_cycles`); what a
single read shows wrong is judged here. The anomalies have the names of Adya's and Elle's classification.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from invariants.foreign.append_cycles import Dependencies, find_cycles
from invariants.foreign.edn import Value
from invariants.foreign.history import Call, HistoryError, Kind
from invariants.foreign.report import Anomaly, Report

Elements = tuple[Value, ...]

SHOWN: Final = 12
"""Elements of a list that a sentence shows at most."""


@dataclass(frozen=True)
class Step:
    """One operation of a transaction: an append of `element`, or a read that found `elements` (None: not known)."""

    key: Value
    element: Value = None
    elements: Elements | None = None
    is_append: bool = False


@dataclass(frozen=True)
class Txn:
    """A transaction and its operations in order."""

    call: Call
    steps: tuple[Step, ...]

    @property
    def number(self) -> int:
        """Its number among all calls of the history."""
        return self.call.number

    def appends(self, key: Value) -> list[Value]:
        """Return what it appends to a list, in order."""
        return [step.element for step in self.steps if step.is_append and step.key == key]


@dataclass
class Lists:
    """Everything the history says of its lists."""

    writer: dict[tuple[Value, Value], Txn] = field(default_factory=dict)
    """(list, element) → the transaction that appends it."""
    reads: dict[Value, list[tuple[Txn, Elements]]] = field(default_factory=lambda: defaultdict(list))
    """List → what acknowledged transactions read of it."""
    order: dict[Value, Elements] = field(default_factory=dict)
    """List → its longest read, each element once: the order of its appends."""


def judge_append(calls: list[Call], show: Callable[[str], None] | None = None) -> Report:
    """Judge a list-append history. Raises HistoryError for calls that are no such transactions."""
    txns = [Txn(call, tuple(_steps(call))) for call in calls]
    lists = _lists(txns)
    answered = sum(len(reads) for reads in lists.reads.values())
    report = Report("list-append", calls=len(calls), reads=answered)
    if not answered:
        report.undecided.append("no read was answered, so there is nothing to judge by")
        return report
    if show is not None:
        show(f"{len(txns)} transactions, {answered} reads of {len(lists.reads)} lists")
    for txn in txns:
        if txn.call.kind is Kind.OK:
            _internal(report, txn)
    for key in lists.reads:
        _judge_list(report, lists, key)
    lost = set(_lost(report, txns, lists))
    for key in lists.reads:
        _judge_writers(report, lists, key, lost)
    find_cycles(report, _dependencies(txns, lists, lost), show)
    return report


# -- reading


def _steps(call: Call) -> Iterator[Step]:
    if call.f not in ("txn", "transaction"):
        raise HistoryError(f"line {call.line}: a list-append history has :txn only, not :{call.f}")
    value = call.told if call.kind is Kind.OK else call.asked
    if not isinstance(value, tuple):
        raise HistoryError(f"line {call.line}: a transaction is a vector of operations, not {value!r}")
    for step in value:
        if not isinstance(step, tuple) or len(step) != 3:
            raise HistoryError(f"line {call.line}: an operation is [:append list element] or [:r list elements]")
        name, key, content = step
        if name == "append":
            if content is None or isinstance(content, dict):
                raise HistoryError(f"line {call.line}: {content!r} cannot be appended")
            yield Step(key, element=content, is_append=True)
        elif name == "r":
            if content is not None and not isinstance(content, tuple):
                raise HistoryError(f"line {call.line}: a read finds a vector of elements or nil, not {content!r}")
            # nil is what a list is before its first append; in a request it says nothing.
            yield Step(key, elements=(content or ()) if call.kind is Kind.OK else None)
        else:
            raise HistoryError(f"line {call.line}: an operation is :append or :r, not {name!r}")


def _lists(txns: list[Txn]) -> Lists:
    lists = Lists()
    for txn in txns:
        for step in txn.steps:
            if step.is_append:
                other = lists.writer.setdefault((step.key, step.element), txn)
                if other is not txn or txn.appends(step.key).count(step.element) > 1:
                    raise HistoryError(
                        f"line {txn.call.line}: {step.element!r} is appended to {step.key!r} twice (see line"
                        f" {other.call.line}); elements of a list must be unique to be judged"
                    )
            elif step.elements is not None:
                lists.reads[step.key].append((txn, step.elements))
    for key, reads in lists.reads.items():
        longest = max((elements for _, elements in reads), key=len)
        lists.order[key] = tuple(dict.fromkeys(longest))
    return lists


# -- what single reads show


def _internal(report: Report, txn: Txn) -> None:
    """Report reads that do not find again what the same transaction read and appended before."""
    known: dict[Value, Elements] = {}
    tail: dict[Value, Elements] = defaultdict(tuple)
    for step in txn.steps:
        if step.is_append:
            if step.key in known:
                known[step.key] = (*known[step.key], step.element)
            tail[step.key] = (*tail[step.key], step.element)
            continue
        found = step.elements or ()
        own = tail[step.key]
        expected = known.get(step.key)
        wrong = found != expected if expected is not None else found[len(found) - len(own) :] != own
        if wrong:
            due = _shown(expected) if expected is not None else f"a list that ends with {_shown(own)}"
            text = f"{txn.call.label} read {_shown(found)} in {step.key!r}; by its own steps before it is {due}"
            report.add(Anomaly("internal", text, (txn.call.line,)))
        known[step.key] = found
        tail[step.key] = ()


def _judge_list(report: Report, lists: Lists, key: Value) -> None:
    order = lists.order[key]
    for txn, elements in lists.reads[key]:
        reader = f"{txn.call.label} read {_shown(elements)} in {key!r}"
        lines = (txn.call.line,)
        if len(set(elements)) < len(elements):
            twice = sorted({str(e) for e in elements if elements.count(e) > 1})
            report.add(Anomaly("duplicate-append", f"{reader}, with {', '.join(twice)} twice", lines))
        elif elements != order[: len(elements)]:
            text = f"{reader}, which is no beginning of the longest read, {_shown(order)}"
            report.add(Anomaly("incompatible-order", text, lines))
        for element in dict.fromkeys(elements):
            writer = lists.writer.get((key, element))
            if writer is None:
                report.add(Anomaly("garbage-read", f"{reader}, and nobody ever appended {element!r}", lines))
            elif writer.call.kind is Kind.FAIL:
                text = f"{reader}; {element!r} was appended by {writer.call.label}, which failed"
                report.add(Anomaly("G1a", text, (*lines, writer.call.line)))
        _intermediate(report, lists, txn, key, elements)
    _dirty_updates(report, lists, key)


def _intermediate(report: Report, lists: Lists, txn: Txn, key: Value, elements: Elements) -> None:
    writer = lists.writer.get((key, elements[-1])) if elements else None
    if writer is None or writer is txn or writer.call.kind is Kind.FAIL:
        return
    final = writer.appends(key)[-1]
    if elements[-1] != final:
        text = (
            f"{txn.call.label} read {_shown(elements)} in {key!r}: the middle of {writer.call.label}, whose last append"
            f" there is {final!r}"
        )
        report.add(Anomaly("G1b", text, (txn.call.line, writer.call.line)))


def _dirty_updates(report: Report, lists: Lists, key: Value) -> None:
    aborted: tuple[Value, Txn] | None = None
    for element in lists.order[key]:
        writer = lists.writer.get((key, element))
        if writer is None:
            continue
        if writer.call.kind is Kind.FAIL:
            aborted = (element, writer)
        elif aborted is not None and writer.call.kind is Kind.OK:
            text = (
                f"{writer.call.label} appended {element!r} to {key!r} after {aborted[0]!r} of {aborted[1].call.label},"
                " which failed: it was built on what never was"
            )
            report.add(Anomaly("dirty-update", text, (writer.call.line, aborted[1].call.line)))
            return


def _lost(report: Report, txns: list[Txn], lists: Lists) -> Iterator[tuple[Value, Value]]:
    """Report and yield the acknowledged appends that no read shows although one began after the acknowledgement."""
    seen = {(key, element) for key, reads in lists.reads.items() for _, elements in reads for element in elements}
    latest: dict[Value, Txn] = {}
    for key, reads in lists.reads.items():
        latest[key] = max((txn for txn, _ in reads), key=lambda txn: txn.call.begin)
    for txn in txns:
        if txn.call.kind is not Kind.OK:
            continue
        for step in txn.steps:
            reader = latest.get(step.key)
            if not step.is_append or (step.key, step.element) in seen or reader is None:
                continue
            if reader.call.begin > txn.call.end:
                text = (
                    f"{txn.call.label} appended {step.element!r} to {step.key!r} and was acknowledged; no read shows"
                    f" it, not even that of {reader.call.label}, which began after that"
                )
                report.add(Anomaly("lost-append", text, (txn.call.line, reader.call.line)))
                yield step.key, step.element


def _judge_writers(report: Report, lists: Lists, key: Value, lost: set[tuple[Value, Value]]) -> None:
    """Report transactions of which a list shows a later append without an earlier one, or before it."""
    shown: dict[int, list[Value]] = defaultdict(list)
    writers: dict[int, Txn] = {}
    for element in lists.order[key]:
        writer = lists.writer.get((key, element))
        if writer is not None and writer.call.kind is not Kind.FAIL:
            writers[writer.number] = writer
            shown[writer.number].append(element)
    for number, seen in shown.items():
        appended = [element for element in writers[number].appends(key) if (key, element) not in lost]
        if seen == appended[: len(seen)]:
            continue
        label, line = writers[number].call.label, writers[number].call.line
        text = f"{label} appended {_shown(tuple(appended))} to {key!r}; the list shows {_shown(tuple(seen))} of that"
        name = "incompatible-order" if set(seen) == set(appended[: len(seen)]) else "lost-append"
        report.add(Anomaly(name, text, (line,)))


# -- dependencies


def _dependencies(txns: list[Txn], lists: Lists, lost: set[tuple[Value, Value]]) -> Dependencies:
    """Return what must come before what, of the transactions that were acknowledged or whose effect was read."""
    seen = {(key, element) for key, order in lists.order.items() for element in order}
    there = {
        txn.number
        for txn in txns
        if txn.call.kind is Kind.OK
        or (txn.call.kind is Kind.INFO and any(s.is_append and (s.key, s.element) in seen for s in txn.steps))
    }
    graph = Dependencies({txn.number: txn.call for txn in txns if txn.number in there})
    unseen: dict[Value, list[tuple[Value, Txn]]] = defaultdict(list)
    for (key, element), txn in lists.writer.items():
        if txn.number in there and (key, element) not in seen and (key, element) not in lost:
            unseen[key].append((element, txn))
    for key, order in lists.order.items():
        writers = [lists.writer.get((key, element)) for element in order]
        for before, after, left, right in zip(order, order[1:], writers, writers[1:], strict=False):
            if left is not None and right is not None:
                graph.add(left.number, right.number, "ww", f"appended {before!r} to {key!r} just before {after!r} by")
        for element, txn in unseen[key]:
            # What the longest read does not show came after all it does.
            if order and writers[-1] is not None:
                reason = f"appended {order[-1]!r} to {key!r}, the last that was read, before {element!r} by"
                graph.add(writers[-1].number, txn.number, "ww", reason)
        for read in lists.reads[key]:
            _of_read(graph, lists, key, read, unseen[key])
    return graph


def _of_read(
    graph: Dependencies, lists: Lists, key: Value, read: tuple[Txn, Elements], unseen: list[tuple[Value, Txn]]
) -> None:
    txn, elements = read
    order = lists.order[key]
    if elements != order[: len(elements)]:
        return  # It fits no order, which was reported.
    writer = lists.writer.get((key, elements[-1])) if elements else None
    if writer is not None:
        graph.add(writer.number, txn.number, "wr", f"appended {elements[-1]!r} to {key!r}, which was read by")
    if writer is txn:
        return  # It read its own append; what it found before that says the order of appends.
    if len(elements) < len(order):
        following = lists.writer.get((key, order[len(elements)]))
        # Where it is the same transaction again, this is the middle of it (G1b).
        if following is not None and following is not writer:
            reason = f"read {_shown(elements)} in {key!r} before {order[len(elements)]!r} was appended by"
            graph.add(txn.number, following.number, "rw", reason)
        return
    for element, following in unseen:
        if following is not writer:
            reason = f"read {_shown(elements)} in {key!r} before {element!r} was appended by"
            graph.add(txn.number, following.number, "rw", reason)


def _shown(elements: Elements) -> str:
    dots = "… " if len(elements) > SHOWN else ""
    return f"[{dots}{' '.join(map(repr, elements[-SHOWN:]))}]"
