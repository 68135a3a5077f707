"""Reads of a wallet that are more than one query: its balance as of a time."""

from dataclasses import dataclass

from reference.errors import InvalidCommand, LedgerError
from reference.store import Store


@dataclass(slots=True, frozen=True)
class BalanceAsOf:
    """A wallet's balance at a time that has passed; it never changes afterwards."""

    user_id: int
    balance: int
    """Minor units."""
    seq: int
    """The last entry that counts; 0 before the wallet's first."""
    at_ms: int
    updated_at_ms: int | None
    """When that entry was written, Unix milliseconds; None before the wallet's first."""


async def balance_as_of(store: Store, user_id: int, at_ms: int) -> BalanceAsOf | None:
    """Return the balance after the last entry whose `created_at_ms` is at most `at_ms` (Unix milliseconds).

    A wallet had balance 0 before its first entry. None: the wallet has no entry at all. Raises InvalidCommand
    for a time that has not come yet by the wallet's server, whose answer would still change, and LedgerError.
    """
    row = await store.wallet_row(user_id, "as_of", at_ms)
    if row is None:
        raise LedgerError("as_of returned no row")
    if at_ms > row["now_ms"]:
        raise InvalidCommand("as_of", f"{at_ms} is in the future; it is {row['now_ms']} on the wallet's server")
    if row["first_seq"] is None:
        return None
    return BalanceAsOf(user_id, row["balance"], row["seq"], at_ms, row["updated_at_ms"])
