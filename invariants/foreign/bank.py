"""The bank workload: transfers between accounts, and reads of all accounts at once.

What any single read shows is judged first: the total, negative balances, the accounts. What is left must then fit one
order of all transfers that keeps real time; that search is in `invariants.foreign.bank_order`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from invariants.foreign.bank_order import Read, Transfer, check_order
from invariants.foreign.edn import Value
from invariants.foreign.history import Call, HistoryError, Kind
from invariants.foreign.report import Anomaly, Report


@dataclass(frozen=True)
class BankOptions:
    """What a bank history does not say by itself."""

    total: int | None = None
    """What all accounts hold together; None: what most reads show."""
    allow_negative: bool = False
    """Whether an account may go below zero."""


def judge_bank(
    calls: list[Call], options: BankOptions | None = None, show: Callable[[str], None] | None = None
) -> Report:
    """Judge a bank history. Raises HistoryError for calls that are neither transfers nor reads of accounts."""
    options = options or BankOptions()
    transfers: list[tuple[Call, Value, Value, int]] = []
    reads: list[tuple[Call, dict[Value, Value]]] = []
    for call in calls:
        if call.f == "transfer":
            transfers.append((call, *_transfer(call)))
        elif call.f == "read":
            if call.kind is Kind.OK:
                reads.append((call, _balances(call)))
        else:
            raise HistoryError(f"line {call.line}: a bank history has :transfer and :read, not :{call.f}")
    report = Report("bank", calls=len(calls), reads=len(reads))
    if not reads:
        report.undecided.append("no read was answered, so there is nothing to judge by")
        return report
    accounts = Counter(frozenset(balances) for _, balances in reads).most_common(1)[0][0]
    sound = _sound_reads(report, reads, accounts, options)
    names = sorted(accounts, key=str)
    place = {name: index for index, name in enumerate(names)}
    moves: list[Transfer] = []
    for call, source, target, amount in transfers:
        for name in (source, target):
            if name not in place:
                raise HistoryError(f"line {call.line}: account {name!r} is in no read; accounts are {names}")
        delta = [0] * len(names)
        delta[place[source]] -= amount
        delta[place[target]] += amount
        moves.append(Transfer(call, tuple(delta)))
    looks = [Read(call, tuple(balances[name] for name in names)) for call, balances in sound]
    check_order(report, names, moves, looks, show)
    return report


def _transfer(call: Call) -> tuple[Value, Value, int]:
    value = call.asked
    if not isinstance(value, dict) or not {"from", "to", "amount"} <= value.keys():
        raise HistoryError(f"line {call.line}: a transfer needs {{:from … :to … :amount …}}, not {value!r}")
    amount = value["amount"]
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
        raise HistoryError(f"line {call.line}: the amount of a transfer is a whole number from 0, not {amount!r}")
    return value["from"], value["to"], amount


def _balances(call: Call) -> dict[Value, Value]:
    value = call.told
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        raise HistoryError(f"line {call.line}: a read is told a map of account to balance, not {value!r}")
    for name, balance in value.items():
        if balance is not None and (isinstance(balance, bool) or not isinstance(balance, int)):
            raise HistoryError(f"line {call.line}: the balance of account {name!r} is {balance!r}, not a whole number")
    return value


def _sound_reads(
    report: Report,
    reads: list[tuple[Call, dict[Value, Value]]],
    accounts: frozenset[Value],
    options: BankOptions,
) -> list[tuple[Call, dict[Value, Value]]]:
    """Report what single reads show wrong, and return the others."""
    whole = [
        (call, balances) for call, balances in reads if balances.keys() == accounts and None not in balances.values()
    ]
    totals = Counter(sum(balances.values()) for _, balances in whole)
    total = options.total
    if total is None and totals:
        total = totals.most_common(1)[0][0]
    sound: list[tuple[Call, dict[Value, Value]]] = []
    for call, balances in reads:
        wrong: list[tuple[str, str]] = []
        if balances.keys() != accounts:
            names = sorted(balances, key=str)
            wrong.append(("wrong-accounts", f"shows the accounts {names}, not {sorted(accounts, key=str)}"))
        elif None in balances.values():
            empty = [name for name, balance in balances.items() if balance is None]
            wrong.append(("nil-balance", f"shows no balance for the accounts {empty}"))
        elif sum(balances.values()) != total:
            held = sum(balances.values())
            wrong.append(
                ("wrong-total", f"shows {held} in all accounts together; it must be {total} ({_shown(balances)})")
            )
        below = {name: balance for name, balance in balances.items() if balance is not None and balance < 0}
        if below and not options.allow_negative:
            report.add(Anomaly("negative-balance", f"{call.label} shows {_shown(below)}", (call.line,)))
        for name, text in wrong:
            report.add(Anomaly(name, f"{call.label} {text}", (call.line,)))
        if not wrong:
            sound.append((call, balances))
    return sound


def _shown(balances: dict[Value, Value]) -> str:
    return ", ".join(
        f"account {name}: {balance}" for name, balance in sorted(balances.items(), key=lambda i: str(i[0]))
    )
