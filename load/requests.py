"""What arrivals ask of the public API: request bytes for HTTP, messages for gRPC, and the row that the history keeps.

The bodies and the names of operations are those of the main job's own workload, so that the checker reads both alike.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from load.schedule import Arrival
from reference.commands import DEFAULT_OUTCOMES

OPENING_MINOR: Final = 10_000_000
"""What each wallet is opened with: far more than its bets of one run."""
MATCH_CLOSES_AT_MS: Final = 4_102_444_800_000
"""Matches close by command, so their clock is set to the year 2100."""
RECORDED_KEY_MAX: Final = 120
"""A longer key of a trace is hashed: with the run's name before it, it would be too long for the service."""
PAGE: Final = 20
"""Entries asked for in one page."""


@dataclass(slots=True)
class Command:
    """One request as the history records it, with its serialised body."""

    op: str
    path: str
    key: str | None = None
    body: bytes | None = None
    """None: a GET."""
    user: int | None = None
    match_id: str | None = None
    bet_id: str | None = None
    selection: str | None = None
    side: str | None = None
    odds: int | None = None
    amount: int | None = None
    min_seq: int | None = None
    strong: bool | None = None
    after_seq: int | None = None
    tag: str | None = None

    def payload_hash(self) -> str | None:
        """Return a hash that names path and body; None for a GET."""
        if self.body is None:
            return None
        digest = hashlib.blake2b(self.path.encode(), digest_size=8)
        digest.update(self.body)
        return digest.hexdigest()


class Answer(msgspec.Struct):
    """The fields of any answer that the load looks at; unknown ones are ignored."""

    outcome: str | None = None
    replayed: bool | None = None
    seq: int | None = None
    balance_minor: int | None = None
    bet_id: str | None = None
    source: str | None = None
    stale: bool | None = None
    as_of_ms: int | None = None
    title: str | None = None


class PageEntry(msgspec.Struct):
    """What is looked at of one entry."""

    seq: int
    balance_minor: int


class EntriesPage(msgspec.Struct):
    """A page of a wallet's entries."""

    entries: list[PageEntry]
    next_cursor: str | None = None


@dataclass(frozen=True)
class Names:
    """What the numbers of a schedule stand for in one run."""

    run: str
    """Begins every key of an arrival, so that two runs of one seed do not replay each other's commands."""
    world: str
    """Begins the keys that open wallets and create matches, so that runs can share those."""
    first_wallet: int
    """User id of the wallet of rank 0; the others follow."""
    match_ids: Sequence[str]
    outcomes: Sequence[list[str] | None] = ()
    """Outcomes of each match; None, or none at all: the usual ones."""

    def user(self, rank: int) -> int:
        """Return the user id of a wallet."""
        return self.first_wallet + rank

    def opening(self, rank: int) -> Command:
        """Return the deposit that opens a wallet."""
        return deposit(self.user(rank), OPENING_MINOR, f"{self.world}-open-{rank}", "seed")

    def key(self, arrival: Arrival) -> str:
        """Return the key of an arrival."""
        recorded = arrival.traced.key if arrival.traced is not None else None
        if recorded is None:
            return f"{self.run}-{arrival.number}"
        if len(recorded) > RECORDED_KEY_MAX:
            recorded = hashlib.blake2b(recorded.encode(), digest_size=16).hexdigest()
        return f"{self.run}-k-{recorded}"

    def create(self, match: int) -> Command:
        """Return the command that creates a match; the same for every run that shares it, so it can be repeated."""
        match_id = self.match_ids[match]
        told: dict[str, object] = {"match_id": match_id, "closes_at_ms": MATCH_CLOSES_AT_MS}
        if match < len(self.outcomes) and (outcomes := self.outcomes[match]) is not None:
            told["outcomes"] = outcomes
        body = msgspec.json.encode(told)
        return Command("create_match", "/v1/matches", f"{self.world}-m{match}-create", body, match_id=match_id)

    def command(self, arrival: Arrival) -> Command:
        """Build the command of an arrival that needs nothing but the schedule: all but reads and cancels.

        Raises ValueError for the others.
        """
        key = self.key(arrival)
        user = self.user(arrival.wallet)
        if arrival.op in {"bet", "grpc_bet"}:
            return bet(arrival, user, self.match_ids[arrival.match], key)
        if arrival.op == "deposit":
            # Deposits are few, so that each pays for several bets; those of a trace are what they were.
            return deposit(user, arrival.amount_minor * (1 if arrival.traced else 5), key)
        if arrival.op == "withdraw":
            body = b'{"amount_minor":%d}' % arrival.amount_minor
            path = f"/v1/wallets/{user}/withdrawals"
            return Command("withdraw", path, key, body, user=user, amount=arrival.amount_minor)
        match_id = self.match_ids[arrival.match]
        if arrival.traced is None:
            key = f"{self.run}-m{arrival.match}-{arrival.op}"
        if arrival.op == "create":
            return self.create(arrival.match)
        if arrival.op == "void":
            return Command("void_match", f"/v1/matches/{match_id}/void", key, b"{}", match_id=match_id)
        if arrival.op == "close":
            return Command("close_match", f"/v1/matches/{match_id}/close", key, b"{}", match_id=match_id)
        if arrival.op == "settle":
            body = msgspec.json.encode({"result": arrival.selection})
            path = f"/v1/matches/{match_id}/settle"
            return Command("settle_match", path, key, body, match_id=match_id, selection=arrival.selection)
        raise ValueError(f"{arrival.op} depends on what was answered before")


_QUOTED: Final = {outcome: f'"{outcome}"' for outcome in DEFAULT_OUTCOMES}


def _quoted(selection: str) -> str:
    """Return a selection as JSON; a trace may name any."""
    return _QUOTED.get(selection) or msgspec.json.encode(selection).decode()


def bet(arrival: Arrival, user: int, match_id: str, key: str) -> Command:
    """Return a bet command."""
    body = (
        f'{{"match_id":"{match_id}","outcome":{_quoted(arrival.selection)},"side":"{arrival.side}",'
        f'"odds":{arrival.odds},"stake_minor":{arrival.amount_minor}}}'
    ).encode()
    return Command(
        "bet",
        f"/v1/wallets/{user}/bets",
        key,
        body,
        user=user,
        match_id=match_id,
        selection=arrival.selection,
        side=arrival.side,
        odds=arrival.odds,
        amount=arrival.amount_minor,
        tag="grpc" if arrival.op == "grpc_bet" else None,
    )


def deposit(user: int, amount_minor: int, key: str, tag: str | None = None) -> Command:
    """Return a deposit command."""
    body = b'{"amount_minor":%d}' % amount_minor
    return Command("deposit", f"/v1/wallets/{user}/deposits", key, body, user=user, amount=amount_minor, tag=tag)


def cancel(user: int, match_id: str, bet_id: str, key: str) -> Command:
    """Return a command that cancels the unmatched part of a bet."""
    path = f"/v1/wallets/{user}/bets/{bet_id}/cancel"
    return Command("cancel", path, key, b"{}", user=user, match_id=match_id, bet_id=bet_id)


def balance(user: int, *, strong: bool, min_seq: int | None) -> Command:
    """Return a read of one balance, with the `seq` its owner is known to have seen."""
    query = "consistency=strong" if strong else "consistency=eventual"
    if min_seq is not None:
        query += f"&min_seq={min_seq}"
    return Command("balance", f"/v1/wallets/{user}/balance?{query}", user=user, min_seq=min_seq, strong=strong)


def entries(user: int, after_seq: int) -> Command:
    """Return a read of a page of one wallet's history."""
    path = f"/v1/wallets/{user}/entries?after_seq={after_seq}&limit={PAGE}"
    return Command("entries", path, user=user, after_seq=after_seq)
