"""Whether the reads of a bank history fit one order of its transfers that keeps real time.

Transfers commute, so a state is the sum of the set of transfers done so far, and the search needs no order among them.
It walks the history once and keeps every set of unfinished transfers that may have been done by now:

- an acknowledged transfer is done when its acknowledgement comes; one of unknown outcome may be done at any time
  after it was asked, or never; a failed one never;
- a read must find, at some moment between its invocation and its answer, exactly the balances it shows.

The state before the first transfer is not known. The first read fixes it, in as many ways as there are sets of
transfers that may have been done before.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Final

from invariants.foreign.edn import Value
from invariants.foreign.history import Call, Kind
from invariants.foreign.report import Anomaly, Report

MAX_STATES: Final = 20_000
"""Possible states kept at one moment; more, and the rest of the order is left undecided."""

MAX_STEPS: Final = 500_000
"""Steps of one search for a set of transfers; more, and the rest of the order is left undecided."""

MAX_FIRST: Final = 14
"""Transfers under way at the first read, of which every subset is tried."""

BLAMED_SINGLY: Final = 400
"""The latest transfers of which each is tried alone as the reason of a read that does not fit."""

BLAMED_IN_PAIRS: Final = 30
"""The latest transfers of which each pair is tried."""

SHOW_EVERY: Final = 500

Vector = tuple[int, ...]
"""One number per account, in minor units of the foreign history."""


@dataclass(frozen=True)
class Transfer:
    """A transfer as what it adds to each account."""

    call: Call
    delta: Vector


@dataclass(frozen=True)
class Read:
    """An answered read and the balances it shows."""

    call: Call
    balances: Vector


@dataclass(frozen=True)
class State:
    """What may be true at one moment, besides the transfers that are done for certain."""

    base: Vector | None
    """The balances before the first transfer; None before any read has fixed them."""
    done: frozenset[int]
    """Transfers under way that are done already."""
    seen: frozenset[int]
    """Reads under way that have found their balances already."""


@dataclass(frozen=True)
class Blame:
    """What would have to be true of one transfer for a read to fit."""

    name: str
    """lost, twice, failed or early."""
    transfer: int


class GaveUp(Exception):
    """The search became larger than its bounds; the message says where."""


def check_order(
    report: Report,
    accounts: Sequence[Value],
    transfers: list[Transfer],
    reads: list[Read],
    show: Callable[[str], None] | None = None,
) -> None:
    """Add to the report the reads that fit no order, with the transfers that explain why where some do."""
    search = _Search(accounts, transfers, reads)
    moments: list[tuple[int, bool, Call]] = []
    for call in chain((t.call for t in transfers if t.call.kind is not Kind.FAIL), (r.call for r in reads)):
        moments.append((call.begin, False, call))
        if call.kind is Kind.OK:
            moments.append((call.end, True, call))
    moments.sort(key=lambda moment: moment[0])
    for number, (_, answered, call) in enumerate(moments):
        try:
            if not answered:
                search.begin(call)
            elif call.number in search.reads:
                search.read_answered(call)
            else:
                search.transfer_answered(call)
        except GaveUp as error:
            report.undecided.append(f"the order of transfers is not decided from line {call.line} on: {error}")
            break
        if show is not None and number % SHOW_EVERY == 0:
            show(f"{number} of {len(moments)} moments, {len(search.states)} possible states")
    search.tell(report)


class _Search:
    """The possible states at one moment of the walk."""

    def __init__(self, accounts: Sequence[Value], transfers: list[Transfer], reads: list[Read]) -> None:
        self.accounts = accounts
        self.transfers = {t.call.number: t for t in transfers}
        self.reads = {r.call.number: r for r in reads}
        self.settled: Vector = (0,) * len(accounts)
        """The sum of the transfers that are done for certain."""
        self.certain: list[int] = []
        """Those transfers, in the order of their acknowledgement."""
        self.open: list[int] = []
        """Transfers under way, or of unknown outcome."""
        self.looking: list[int] = []
        """Reads under way."""
        self.states: set[State] = {State(None, frozenset(), frozenset())}
        self.misfits: list[tuple[Read, tuple[Blame, ...]]] = []
        self.steps = 0

    # -- moments

    def begin(self, call: Call) -> None:
        """Note that a call begins."""
        (self.looking if call.number in self.reads else self.open).append(call.number)

    def transfer_answered(self, call: Call) -> None:
        """Note that a transfer is acknowledged: from now on it is done in every state."""
        states = self._reachable()
        self.open.remove(call.number)
        self.settled = _plus(self.settled, self.transfers[call.number].delta)
        self.certain.append(call.number)
        self.states = {State(s.base, s.done - {call.number}, s.seen) for s in states}

    def read_answered(self, call: Call) -> None:
        """Keep the states in which an answered read found its balances; if there is none, it is a misfit."""
        states = self._reachable()
        self.looking.remove(call.number)
        left = {s for s in states if call.number in s.seen}
        if not left:
            self.misfits.append((self.reads[call.number], self._blame(self.reads[call.number], states)))
            left = states
        self.states = {State(s.base, s.done, s.seen - {call.number}) for s in left}

    # -- search

    def _reachable(self) -> set[State]:
        """Return every state that reads under way may have seen by now, with what they have seen."""
        self.steps = 0
        found = set(self.states)
        work = list(found)
        while work:
            state = work.pop()
            for read in self.looking:
                if read in state.seen:
                    continue
                for following in self._seeing(state, self.reads[read]):
                    if following not in found:
                        found.add(following)
                        work.append(following)
                        if len(found) > MAX_STATES:
                            raise GaveUp(f"more than {MAX_STATES:,} states are possible")
        return found

    def _seeing(self, state: State, read: Read) -> Iterator[State]:
        """Yield the states after a read has found its balances, by as few further transfers as that takes."""
        free = [number for number in self.open if number not in state.done]
        seen = state.seen | {read.call.number}
        here = _plus(self.settled, self._sum(state.done))
        if state.base is None:
            if len(free) > MAX_FIRST:
                raise GaveUp(f"{len(free)} transfers were under way or unknown at the first read")
            for chosen in chain.from_iterable(combinations(free, size) for size in range(len(free) + 1)):
                base = _minus(read.balances, _plus(here, self._sum(chosen)))
                yield State(base, state.done | set(chosen), seen)
            return
        missing = _minus(read.balances, _plus(state.base, here))
        for more in self._sums_to(missing, free):
            yield State(state.base, state.done | more, seen)

    def _sums_to(self, missing: Vector, free: list[int]) -> set[frozenset[int]]:
        """Return the sets of these transfers that sum to `missing`, none with a part that sums to nothing first."""
        found: set[frozenset[int]] = set()
        tried: set[frozenset[int]] = set()
        work: list[tuple[Vector, frozenset[int]]] = [(missing, frozenset())]
        while work:
            rest, chosen = work.pop()
            place = next((index for index, amount in enumerate(rest) if amount), None)
            if place is None:
                found.add(chosen)
                continue
            # Whatever makes up the difference must touch the first account that differs.
            for number in free:
                delta = self.transfers[number].delta
                larger = chosen | {number}
                if delta[place] and number not in chosen and larger not in tried:
                    tried.add(larger)
                    work.append((_minus(rest, delta), larger))
                    self.steps += 1
                    if self.steps > MAX_STEPS:
                        raise GaveUp(f"{len(free)} transfers were under way or unknown, too many to try")
        return found

    def _sum(self, numbers: Sequence[int] | frozenset[int]) -> Vector:
        total: Vector = (0,) * len(self.accounts)
        for number in numbers:
            total = _plus(total, self.transfers[number].delta)
        return total

    # -- why a read does not fit

    def _blame(self, read: Read, states: set[State]) -> tuple[Blame, ...]:
        """Return the fewest transfers (one or two) whose being wrong explains the read; empty if none do."""
        state = min(states, key=lambda s: (len(s.done), sorted(s.done)))
        if state.base is None:
            return ()
        free = [number for number in self.open if number not in state.done]
        missing = _minus(read.balances, _plus(state.base, _plus(self.settled, self._sum(state.done))))
        began = [t for t in self.transfers.values() if t.call.begin < read.call.end]
        failed = [t.call.number for t in began if t.call.kind is Kind.FAIL]
        done = [*self.certain, *sorted(state.done)]
        suspects = [(Blame("lost", n), self.transfers[n].delta, -1) for n in reversed(done)]
        suspects += [(Blame("failed", n), self.transfers[n].delta, 1) for n in reversed(failed)]
        suspects += [(Blame("twice", n), self.transfers[n].delta, 1) for n in reversed(done)]
        suspects.sort(key=lambda suspect: -suspect[0].transfer)
        groups = chain(
            ((suspect,) for suspect in suspects[:BLAMED_SINGLY]), combinations(suspects[:BLAMED_IN_PAIRS], 2)
        )
        for group in groups:
            rest = missing
            for _, delta, sign in group:
                rest = _minus(rest, delta) if sign > 0 else _plus(rest, delta)
            self.steps = 0
            try:
                if self._sums_to(rest, free):
                    return tuple(blame for blame, _, _ in group)
            except GaveUp:
                continue
        return ()

    # -- words

    def tell(self, report: Report) -> None:
        """Add the misfits: one anomaly per blamed transfer where all later reads agree, else one per read."""
        blamed: dict[tuple[Blame, ...], list[Read]] = {}
        for read, blame in self.misfits:
            blamed.setdefault(blame if len(blame) == 1 else (), []).append(read)
        for blame, reads in blamed.items():
            if blame and blame[0].name == "lost" and self._never_seen(blame[0].transfer, reads):
                self._add(report, "lost-transfer", blame[0], reads, "was acknowledged, and no read after that shows it")
            elif blame and blame[0].name == "failed":
                self._add(report, "failed-transfer-seen", blame[0], reads, "failed, and reads show it as done")
            elif blame and blame[0].name == "twice":
                self._add(report, "repeated-transfer", blame[0], reads, "was done once, and reads show it twice")
        for read, blame in self.misfits:
            single = blame[0] if len(blame) == 1 else None
            told = single is not None and (
                single.name != "lost" or self._never_seen(single.transfer, blamed[(single,)])
            )
            if not told:
                self._tell_read(report, read, blame)

    def _never_seen(self, transfer: int, misfits: list[Read]) -> bool:
        call = self.transfers[transfer].call
        after = [read for read in self.reads.values() if read.call.begin > call.end]
        return (
            call.kind is Kind.OK and bool(after) and {r.call.number for r in after} <= {r.call.number for r in misfits}
        )

    def _add(self, report: Report, name: str, blame: Blame, reads: list[Read], text: str) -> None:
        call = self.transfers[blame.transfer].call
        first = reads[0].call
        report.add(
            Anomaly(
                name,
                f"{call.label} of {self._moves(blame.transfer)} {text}: {len(reads)} reads, the first is {first.label}",
                (call.line, *(read.call.line for read in reads[:3])),
            )
        )

    def _tell_read(self, report: Report, read: Read, blame: tuple[Blame, ...]) -> None:
        shown = ", ".join(f"{name}: {amount}" for name, amount in zip(self.accounts, read.balances, strict=True))
        calls = [self.transfers[b.transfer].call for b in blame]
        lost = [c for b, c in zip(blame, calls, strict=True) if b.name == "lost"]
        lines = (read.call.line, *(call.line for call in calls))
        names = " and ".join(f"{c.label} of {self._moves(c.number)}" for c in calls)
        if lost and len(lost) == len(calls):
            if all(call.end < read.call.begin for call in calls):
                text = f"{read.call.label} shows {shown}: without {names}, acknowledged before it was asked"
                report.add(Anomaly("stale-read", text, lines))
            else:
                text = (
                    f"{read.call.label} shows {shown}: without {names}, which comes before what else was seen by then"
                )
                report.add(Anomaly("fractured-reads", text, lines))
            return
        why = f"; it would fit if {names} had gone wrong" if calls else ""
        text = f"{read.call.label} shows {shown}: no set of transfers that may have been done by then gives that{why}"
        report.add(Anomaly("unexplained-read", text, lines))

    def _moves(self, transfer: int) -> str:
        delta = self.transfers[transfer].delta
        parts = [f"{amount:+d} on {name}" for name, amount in zip(self.accounts, delta, strict=True) if amount]
        return ", ".join(parts) or "nothing"


def _plus(left: Vector, right: Vector) -> Vector:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _minus(left: Vector, right: Vector) -> Vector:
    return tuple(a - b for a, b in zip(left, right, strict=True))
