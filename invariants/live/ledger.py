"""A02, A06, A07, A09, A10, A12, A13, A22, A27, A30, A31, A33: entries replayed wallet by wallet as they come.

One pass over each entry and a bounded state: of a wallet its newest seq, balance, replayed sum, and the sum of the
digests of its rows (the prefix it must keep for ever); of a match its escrow; of keys and payments the newest
100,000 at least. Rows of a wallet must come in the order in which one snapshot after the other showed them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from invariants.anomalies.common import Witness
from invariants.live.rows import Entry, Seen
from invariants.run import SYSTEM_PREFIX
from reference.routing import SHARDS

WALLETS_MAX: Final = 2_000_000
MASK: Final = 2**64 - 1
"""Sums of digests count modulo 2⁶⁴."""


class TooManyWallets(Exception):
    """The state is full: wallets beyond WALLETS_MAX cannot be judged."""


@dataclass(slots=True)
class Wallet:
    """What is kept of one wallet."""

    seq: int = 0
    """Of its newest entry; 0: none."""
    balance: int = 0
    """What that entry says."""
    total: int = 0
    """The sum of its amounts."""
    rows: int = 0
    digest: int = 0
    """The sum of the digests of its rows."""


class Sums(NamedTuple):
    """What a server says of a wallet as a whole, or of its first entries."""

    user: int
    rows: int
    seq: int
    balance: int
    total: int
    digest: int
    broken: int
    """Rows that do not continue the one before them, or go below zero, or repeat a key."""


@dataclass
class Ledger:
    """The incremental replay; `feed` returns what the new rows prove."""

    wallets: dict[int, Wallet] = field(default_factory=dict)
    escrow: dict[str, int] = field(default_factory=dict)
    """By match: what its entries put in and did not take out."""
    contra: dict[str, int] = field(default_factory=dict)
    """By contra account: minus the sum of the amounts, so what the account holds."""
    held: int = 0
    """The sum of the newest balances of all wallets."""
    fresh: list[Entry] = field(default_factory=list)
    """Rows that were replayed since the feeder last took them away."""
    again: list[Entry] = field(default_factory=list)
    """Rows at or below their wallet's seq that are not known to be those read before; the feeder verifies them."""
    entries: int = 0
    recent: Seen[tuple[int, int], tuple[int, int]] = field(default_factory=lambda: Seen(200_000))
    """(user, seq) → digest and balance of the newest entries."""
    _keys: Seen[tuple[int, str], int] = field(default_factory=Seen)
    _charged: Seen[tuple[str, str, int | None], tuple[str, int]] = field(default_factory=Seen)
    _paid: Seen[tuple[str, str, str, int | None], int] = field(default_factory=Seen)

    def feed(self, entries: Iterable[Entry], server_of_shard: Sequence[str | None] | None = None) -> list[Witness]:
        """Replay new entries and return one witness for each violation. Raises TooManyWallets.

        `server_of_shard` says where each shard is by the routes of the same moment; None: not known, not judged.
        """
        found: list[Witness] = []
        together: set[tuple[int, int]] = set()
        for entry in sorted(entries, key=lambda row: (row.user, row.seq, row.key)):
            wallet = self.wallets.get(entry.user)
            if wallet is None:
                wallet = self._open(entry.user)
            known = self.recent.get((entry.user, entry.seq)) if entry.seq <= wallet.seq else None
            if known is not None and known[0] == entry.digest:
                continue  # The same row, seen by two snapshots.
            found += self._placed(entry, server_of_shard)
            if entry.seq <= wallet.seq and (entry.user, entry.seq) not in together:
                self.again.append(entry)
                continue
            # Two rows with one seq in one snapshot are both there: the second one breaks the order (A10).
            together.add((entry.user, entry.seq))
            found += self._replayed(entry, wallet)
            found += self._counted(entry)
            self.fresh.append(entry)
        return found

    def _open(self, user: int) -> Wallet:
        if len(self.wallets) >= WALLETS_MAX:
            raise TooManyWallets(f"more than {WALLETS_MAX:,} wallets: the live auditor cannot keep them all")
        wallet = self.wallets[user] = Wallet()
        return wallet

    def _replayed(self, entry: Entry, wallet: Wallet) -> list[Witness]:
        """Return what the entry contradicts in its wallet's chain, and make it the newest one."""
        found: list[Witness] = []
        user, seq, amount, key = entry.user, entry.seq, entry.amount, entry.key
        total = wallet.total + amount
        if amount < 0 and total < 0 and not key.startswith(SYSTEM_PREFIX):
            text = f"seq {seq} of user {user} takes {-amount} (key {key}) from a wallet that held {wallet.total}"
            found.append(Witness("A06", text, key, user, seq))
        if entry.balance < 0 or total < 0:
            text = f"after seq {seq} user {user} has {entry.balance} (replayed {total}), key {key}"
            found.append(Witness("A07", text, key, user, seq))
        if seq != wallet.seq + 1:
            text = f"user {user} has seq {seq} after seq {wallet.seq} (key {key})"
            found.append(Witness("A10", text, key, user, seq))
        elif entry.balance != wallet.balance + amount:
            text = (
                f"seq {seq} of user {user} says {entry.balance}, but the row before it says {wallet.balance} and it"
                f" moves {amount} (key {key})"
            )
            found.append(Witness("A09", text, key, user, seq))
        self.held += entry.balance - wallet.balance
        self.contra[entry.contra] = self.contra.get(entry.contra, 0) - amount
        if entry.contra == "ESCROW" and entry.match_id is not None:
            self.escrow[entry.match_id] = self.escrow.get(entry.match_id, 0) - amount
        wallet.seq, wallet.balance, wallet.total = seq, entry.balance, total
        wallet.rows += 1
        wallet.digest = (wallet.digest + entry.digest) & MASK
        self.recent[(user, seq)] = (entry.digest, entry.balance)
        self.entries += 1
        return found

    def _placed(self, entry: Entry, server_of_shard: Sequence[str | None] | None) -> list[Witness]:
        """A31: a row is where its wallet's shard is."""
        right = entry.user % SHARDS
        holder = None if server_of_shard is None else server_of_shard[right]
        if entry.shard == right and holder in (None, entry.server):
            return []
        text = (
            f"seq {entry.seq} of user {entry.user} is on {entry.server} shard {entry.shard}; it belongs on"
            f" {holder or entry.server} shard {right}"
        )
        return [Witness("A31", text, entry.key, entry.user, entry.seq)]

    def _counted(self, entry: Entry) -> list[Witness]:
        """A02, A22, A27 and A13: one effect for a key and for a business id, and a stake with its bet."""
        found: list[Witness] = []
        user, seq, key = entry.user, entry.seq, entry.key
        if not key.startswith(SYSTEM_PREFIX):
            before = self._keys.get((user, key))
            if before is not None:
                text = f"key {key} of user {user} has more than one entry: seqs {[before, seq]}"
                found.append(Witness("A02", text, key, user, seq))
            self._keys[(user, key)] = seq
            if entry.contra == "ESCROW":
                found += _torn(entry)
        if entry.bet_id is None:
            return found
        if entry.type == "DEBIT" and entry.contra in ("ESCROW", "HOUSE"):
            charge = (entry.bet_id, entry.contra, entry.version)
            earlier = self._charged.get(charge)
            if earlier is not None and (earlier[0] != key or entry.contra == "HOUSE"):
                text = (
                    f"bet {entry.bet_id} has more than one debit against {entry.contra} (version {entry.version}):"
                    f" seqs {[earlier[1], seq]} of user {user}"
                )
                found.append(Witness("A02", text, key, user, seq))
            self._charged[charge] = (key, seq)
        elif entry.type in ("PAYOUT", "REFUND") and key.startswith(SYSTEM_PREFIX):
            payment = (entry.bet_id, entry.type, entry.contra, entry.version)
            paid = self._paid.get(payment)
            if paid is not None:
                text = (
                    f"bet {entry.bet_id} got more than one {entry.type} against {entry.contra} (version"
                    f" {entry.version}): seqs {[paid, seq]} of user {user}"
                )
                found.append(Witness("A27", text, key, user, seq))
                if entry.type == "REFUND" and entry.version == 0:
                    text = f"the cancel of bet {entry.bet_id} was refunded more than once: seqs {[paid, seq]}"
                    found.append(Witness("A22", text, key, user, seq))
            self._paid[payment] = seq
        return found

    # -- wholes: what a server says of all entries of a wallet together

    def adopt(self, sums: Sums) -> bool:
        """Take over a wallet as a server has it; False: its rows, replayed one by one, will say what is wrong."""
        wallet = self.wallets.get(sums.user) or self._open(sums.user)
        self.held += sums.balance - wallet.balance
        wallet.seq, wallet.balance, wallet.total = sums.seq, sums.balance, sums.total
        wallet.rows, wallet.digest = sums.rows, sums.digest & MASK
        return not (sums.broken or sums.rows != sums.seq or sums.total != sums.balance)

    def adopt_account(self, contra: str, match_id: str | None, amount: int) -> None:
        """Take over the sum of the amounts of all entries against one account; goes with `adopt`."""
        self.contra[contra] = self.contra.get(contra, 0) - amount
        if contra == "ESCROW" and match_id is not None:
            self.escrow[match_id] = self.escrow.get(match_id, 0) - amount

    def rewritten(self, sums: Sums) -> Witness | None:
        """A33: compare what a server says of a wallet's first entries, up to the known seq, with what was read."""
        wallet = self.wallets.get(sums.user)
        if wallet is None or (sums.rows == wallet.rows and sums.digest & MASK == wallet.digest):
            return None
        what = (
            f"{wallet.rows} entries were read and {sums.rows} are there now"
            if sums.rows != wallet.rows
            else f"its {wallet.rows} entries are not those that were read before"
        )
        text = f"user {sums.user}, up to seq {wallet.seq}: {what}; balance now {sums.balance}, read {wallet.balance}"
        return Witness("A33", text, None, sums.user, wallet.seq)

    # -- money

    @property
    def off(self) -> int:
        """By how much what wallets, house and escrow hold differs from what came from outside; minor units."""
        return self.held + sum(self.contra.get(name, 0) for name in ("HOUSE", "ESCROW", "EXTERNAL"))

    def money(self) -> Witness:
        """A12: say by how much money is not conserved; true once every server was read as of now."""
        house, escrow, outside = (self.contra.get(name, 0) for name in ("HOUSE", "ESCROW", "EXTERNAL"))
        text = (
            f"wallets hold {self.held}, house {house}, escrow {escrow}: together {self.held + house + escrow}, but"
            f" {-outside} came from outside ({self.off:+d})"
        )
        return Witness("A12", text)


def _torn(entry: Entry) -> list[Witness]:
    """A13: a stake has the bet row that it pays for, with this reserve."""
    bet = entry.bet
    if bet is None or bet.seq != entry.seq:
        text = (
            f"entry seq {entry.seq} of user {entry.user} (key {entry.key}) staked {-entry.amount} for bet"
            f" {entry.bet_id}, which does not exist at that seq"
        )
    elif bet.reserve != -entry.amount:
        text = (
            f"bet {entry.bet_id} of user {entry.user} reserves {bet.reserve} at seq {entry.seq}; the ledger took"
            f" {-entry.amount} there"
        )
    else:
        return []
    return [Witness("A13", text, entry.key, entry.user, entry.seq)]
