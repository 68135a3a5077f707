"""A11: balances that another store tells, against the ledger at the very seq they name."""

from collections.abc import Iterable, Mapping

from invariants.anomalies.common import Witness
from invariants.live.ledger import Ledger
from invariants.live.rows import Told


def compare(ledger: Ledger, source: str, told: Iterable[Told]) -> tuple[list[Witness], list[Told]]:
    """Return what contradicts the ledger, and what can only be told by looking the named entry up.

    That is an entry older than those remembered, or one beyond the wallet's newest: it may have been missed.
    """
    found: list[Witness] = []
    unsure: list[Told] = []
    for row in told:
        wallet = ledger.wallets.get(row.user)
        if wallet is not None and row.seq == wallet.seq:
            if row.balance != wallet.balance:
                found.append(witness(source, row, wallet.balance))
        elif row.seq == 0 and row.balance == 0:
            continue
        elif (known := ledger.recent.get((row.user, row.seq))) is None:
            unsure.append(row)
        elif known[1] != row.balance:
            found.append(witness(source, row, known[1]))
    return found, unsure


def settle(source: str, unsure: Iterable[Told], balances: Mapping[tuple[int, int], int]) -> list[Witness]:
    """Return what contradicts the balances that were looked up, by (user, seq); none there: no such entry."""
    return [
        witness(source, row, right) for row in unsure if (right := balances.get((row.user, row.seq))) != row.balance
    ]


def witness(source: str, row: Told, right: int | None) -> Witness:
    """A11: say what the source says and what the ledger has at that seq (None: no such entry)."""
    has = "has no such seq" if right is None else f"says {right}"
    text = f"{source} says user {row.user} has {row.balance} at seq {row.seq}; the ledger {has}"
    return Witness("A11", text, None, row.user, row.seq)
