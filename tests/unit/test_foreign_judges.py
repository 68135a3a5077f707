"""The judges of foreign histories against exhaustive search: an anomaly is named exactly where no order fits."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations, product
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from invariants.foreign.append import judge_append
from invariants.foreign.bank import BankOptions, judge_bank
from invariants.foreign.edn import Keyword
from invariants.foreign.history import NEVER, Call, Kind

MAX_CALLS = 5
RANDOMS = st.randoms(use_true_random=False)


@dataclass
class Planned:
    """A call between two moments, with the moment in between at which it happens."""

    f: str
    asked: Any
    begin: float
    point: float
    end: float
    kind: Kind
    applied: bool
    told: Any = None
    number: int = 0
    rest: dict[str, Any] = field(default_factory=dict)


def times(random: Random) -> tuple[float, float, float]:
    begin, point, end = sorted(random.random() for _ in range(3))
    return begin, point, end


def fate(random: Random) -> tuple[Kind, bool]:
    return random.choice([(Kind.OK, True)] * 4 + [(Kind.INFO, True), (Kind.INFO, False), (Kind.FAIL, False)])


def as_calls(planned: list[Planned]) -> list[Call]:
    """Turn moments into positions, one process for each call."""
    moments = sorted([(p.begin, 0, i) for i, p in enumerate(planned)] + [(p.end, 1, i) for i, p in enumerate(planned)])
    position = {(index, edge): number for number, (_, edge, index) in enumerate(moments)}
    order = sorted(range(len(planned)), key=lambda index: position[index, 0])
    calls = []
    for number, index in enumerate(order):
        p = planned[index]
        calls.append(
            Call(
                number=number,
                process=index,
                f=p.f,
                kind=p.kind,
                asked=p.asked,
                told=p.told if p.kind is Kind.OK else p.asked,
                begin=position[index, 0],
                end=position[index, 1] if p.kind is not Kind.INFO else NEVER,
                line=position[index, 1] + 1,
            )
        )
    return calls


def orders(calls: list[Call]) -> Iterator[tuple[Call, ...]]:
    """Yield every order that keeps real time, with every choice of the unknown calls that happened."""
    certain = [c for c in calls if c.kind is Kind.OK]
    unknown = [c for c in calls if c.kind is Kind.INFO]
    for chosen in product((False, True), repeat=len(unknown)):
        there = certain + [c for c, yes in zip(unknown, chosen, strict=True) if yes]
        for order in permutations(there):
            if all(b.end > a.begin for i, a in enumerate(order) for b in order[i + 1 :]):
                yield order


# -- bank

ACCOUNTS = (0, 1, 2)


def bank_history(random: Random) -> list[Planned]:
    planned = []
    for _ in range(random.randint(2, MAX_CALLS)):
        begin, point, end = times(random)
        if random.random() < 0.5:
            planned.append(Planned("read", None, begin, point, end, Kind.OK, True))
        else:
            kind, applied = fate(random)
            source, target = random.sample(ACCOUNTS, 2)
            value = {"from": source, "to": target, "amount": random.randint(1, 3)}
            planned.append(Planned("transfer", value, begin, point, end, kind, applied))
    balances = dict.fromkeys(ACCOUNTS, 10)
    for p in sorted(planned, key=lambda p: p.point):
        if p.f == "read":
            p.told = dict(balances)
        elif p.applied:
            balances[p.asked["from"]] -= p.asked["amount"]
            balances[p.asked["to"]] += p.asked["amount"]
    return planned


def bank_fits(calls: list[Call]) -> bool:
    for order in orders(calls):
        moved = dict.fromkeys(ACCOUNTS, 0)
        bases = set()
        for call in order:
            if call.f == "read":
                bases.add(tuple(call.told[name] - moved[name] for name in ACCOUNTS))
            else:
                moved[call.asked["from"]] -= call.asked["amount"]
                moved[call.asked["to"]] += call.asked["amount"]
        if len(bases) <= 1:
            return True
    return False


@settings(max_examples=60)
@given(RANDOMS)
def test_honest_bank_has_no_anomaly(random: Random) -> None:
    report = judge_bank(as_calls(bank_history(random)), BankOptions(allow_negative=True))
    assert (report.anomalies, report.undecided[1:]) == ([], [])


@settings(max_examples=120)
@given(RANDOMS)
def test_bank_read_is_named_exactly_where_no_order_fits(random: Random) -> None:
    planned = bank_history(random)
    reads = [p for p in planned if p.f == "read"]
    for p in reads:
        if random.random() < 0.5:
            other, amount = random.choice(reads), random.choice([0, 0, 1, 2])
            p.told = dict(other.told)
            p.told[0] -= amount
            p.told[1] += amount
    calls = as_calls(planned)
    if not reads:
        return
    report = judge_bank(calls, BankOptions(allow_negative=True))
    assert not report.undecided
    assert bool(report.anomalies) != bank_fits(calls)


# -- list-append

LISTS = (Keyword("x"), Keyword("y"))
APPEND, READ = Keyword("append"), Keyword("r")


def append_history(random: Random) -> list[Planned]:
    planned = []
    elements = iter(range(1, 100))
    for _ in range(random.randint(2, MAX_CALLS - 1)):
        steps = []
        for _ in range(random.randint(1, 3)):
            key = random.choice(LISTS)
            steps.append((READ, key, None) if random.random() < 0.5 else (APPEND, key, next(elements)))
        planned.append(Planned("txn", tuple(steps), *times(random), *fate(random)))
    # At the end everything is read, so that the order of every list is known.
    planned.append(Planned("txn", tuple((READ, key, None) for key in LISTS), 2.0, 2.1, 2.2, Kind.OK, applied=True))
    lists: dict[Any, tuple[int, ...]] = dict.fromkeys(LISTS, ())
    for p in sorted(planned, key=lambda p: p.point):
        if p.applied:
            p.told = tuple(executed(p.asked, lists))
    return planned


def executed(steps: tuple[Any, ...], lists: dict[Any, tuple[int, ...]]) -> Iterator[tuple[Any, ...]]:
    for name, key, element in steps:
        if name == APPEND:
            lists[key] = (*lists[key], element)
            yield name, key, element
        else:
            yield name, key, lists[key]


def append_fits(calls: list[Call]) -> bool:
    for order in orders(calls):
        lists: dict[Any, tuple[int, ...]] = dict.fromkeys(LISTS, ())
        if all(
            tuple(executed(call.asked, lists)) == call.told or call.kind is Kind.INFO
            # An unknown transaction is carried out too; nobody knows what it read.
            for call in order
        ):
            return True
    return False


@settings(max_examples=60)
@given(RANDOMS)
def test_honest_lists_have_no_anomaly(random: Random) -> None:
    report = judge_append(as_calls(append_history(random)))
    assert (report.anomalies, report.undecided) == ([], [])


@settings(max_examples=120)
@given(RANDOMS)
def test_lists_are_anomalous_exactly_where_no_order_fits(random: Random) -> None:
    planned = append_history(random)
    told = [p for p in planned if p.kind is Kind.OK]
    for p in told:
        if random.random() < 0.3:
            p.told = tuple(damaged(step, random) for step in p.told)
    calls = as_calls(planned)
    report = judge_append(calls)
    assert not report.undecided
    assert bool(report.anomalies) != append_fits(calls)


def damaged(step: tuple[Any, ...], random: Random) -> tuple[Any, ...]:
    name, key, elements = step
    if name == APPEND or not elements or random.random() < 0.5:
        return step
    change = random.choice(["cut", "cut", "turn", "repeat", "drop"])
    if change == "cut":
        return name, key, elements[:-1]
    if change == "turn":
        return name, key, elements[::-1]
    if change == "repeat":
        return name, key, (*elements, elements[-1])
    return name, key, elements[1:]
