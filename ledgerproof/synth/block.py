"""Plays one block: its commands, the entries they leave, and what is asked again at the end of the run."""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from ledgerproof.synth import book
from ledgerproof.synth.book import Bets, Fate, Fills, Matches, Payments, Rulings
from ledgerproof.synth.shape import (
    ATTEMPTS_PER_WALLET,
    BETS_PER_MATCH,
    FINAL_S,
    LOAD_FROM_S,
    POPULARITY,
    ROUNDS,
    SEED_S,
    Flags,
    Floats,
    Ints,
    Shape,
    Texts,
    low_bits,
    uuids,
)

SEED_MINOR = 20_000
"""What a wallet is opened with, beyond what it will need."""
CANCEL_DENIED_SHARE = 0.1
ROLLBACK_SHARE = 0.2
"""Of the cancels: asked for as the rollback of the bet's key."""


@dataclass
class Transfers:
    """Deposits and withdrawals; the first of them open the wallets."""

    user: Ints
    amount: Ints
    """Signed."""
    invoke_s: Floats
    latency_s: Floats
    fate: Ints
    impatient: Flags
    commit_s: Floats
    seeds: int


@dataclass
class Cancels:
    """One row per cancel or rollback of a placed bet."""

    bet: Ints
    rollback: Flags
    denied: Flags
    invoke_s: Floats
    latency_s: Floats
    commit_s: Floats


@dataclass
class Entries:
    """The ledger of the block by wallet and seq; -1 where an entry has no such thing."""

    user: Ints
    at_s: Floats
    bet: Ints
    transfer: Ints
    payment: Ints
    amount: Ints
    seq: Ints
    balance: Ints
    match: Ints
    final: Flags
    """Posted by a retry after the first snapshot."""


@dataclass
class Retries:
    """Unknown keys sent again at the end: indices into bets and transfers, and when."""

    bets: Ints
    transfers: Ints
    bets_at_s: Floats
    transfers_at_s: Floats


@dataclass
class Block:
    """Everything that happened in one block."""

    shape: Shape
    number: int
    rng: np.random.Generator
    user_ids: Ints
    popularity: Floats
    edges: Floats
    matches: Matches
    rulings: Rulings
    bets: Bets
    bet_text: Texts
    fills: Fills
    cancels: Cancels
    payments: Payments
    transfers: Transfers
    retries: Retries
    entries: Entries
    drawn: dict[str, pl.DataFrame] = field(default_factory=dict)
    """Frames drawn once although several tables need them."""
    planted: tuple[int, str | None] = (-1, None)
    """Index of the wallet and key of a violation that was planted in the entries."""

    def amount_of(self, kind: str) -> int:
        """Return how many attempts of a kind the block gets."""
        return int(self.shape.attempts_of(self.number) * self.shape.shares[kind])

    def pick_users(self, count: int) -> Ints:
        """Return wallets by their popularity."""
        return np.searchsorted(self.popularity, self.rng.random(count)).astype(np.int64)


def play(shape: Shape, number: int) -> Block:
    """Return one block of a run; the same shape and number give the same block."""
    rng = shape.generator(number)
    attempts = shape.attempts_of(number)
    wallets = max(40, attempts // ATTEMPTS_PER_WALLET)
    weights = rng.permutation(np.arange(1, wallets + 1, dtype=np.float64) ** -POPULARITY)
    popularity = np.cumsum(weights / weights.sum())
    popularity[-1] = 1.0
    edges = book.windows(rng, shape)
    in_time, late = int(attempts * shape.shares["bet"]), int(attempts * shape.shares["late"])
    matches, rulings = book.draw_matches(rng, edges, max(4, round(in_time / BETS_PER_MATCH / ROUNDS)))
    users = np.searchsorted(popularity, rng.random(in_time + late)).astype(np.int64)
    bets = book.draw_bets(rng, shape, edges=edges, matches=matches, users=users, counts=(in_time, late))
    fills = book.trade(rng, bets)
    too_late = np.flatnonzero(bets.placed & bets.late)
    book.cancel(bets, too_late, bets.arrived_s[too_late])
    cancels = _draw_cancels(rng, edges, matches, bets, int(attempts * shape.shares["cancel"]))
    shortest_s = float(np.diff(edges).min())
    payments = book.pay(rng, bets, rulings, 0.02 * shortest_s)
    transfers = _draw_transfers(rng, shape, wallets, popularity, attempts)
    retries = _draw_retries(rng, shape, matches, bets, transfers)
    entries = _entries(bets, transfers, payments, retries)
    _open_wallets(entries, transfers)
    return Block(
        shape=shape,
        number=number,
        rng=rng,
        user_ids=1 + number + shape.blocks * np.arange(wallets),
        popularity=popularity,
        edges=edges,
        matches=matches,
        rulings=rulings,
        bets=bets,
        bet_text=uuids(rng, low_bits(rng, len(users)), bets.commit_s),
        fills=fills,
        cancels=cancels,
        payments=payments,
        transfers=transfers,
        retries=retries,
        entries=entries,
    )


def _draw_cancels(rng: np.random.Generator, edges: Floats, matches: Matches, bets: Bets, wanted: int) -> Cancels:
    """Cancel some of the bets that nobody took whole, and try it with some that were."""
    open_late = np.isfinite(matches.ends_s)[bets.match] | (matches.round[bets.match] == ROUNDS - 1)
    able = bets.placed & ~bets.late & open_late
    left = np.flatnonzero(able & (bets.matched < bets.stake))
    full = np.flatnonzero(able & (bets.matched == bets.stake))
    chosen = rng.permutation(left)[: int(wanted * (1 - CANCEL_DENIED_SHARE))]
    denied = rng.permutation(full)[: int(wanted * CANCEL_DENIED_SHARE)]
    bet = np.concatenate([chosen, denied])
    invoke_s = book.within(rng, edges, matches.round[bets.match[bet]], book.CANCELS)
    latency_s = book.latencies(rng, len(bet))
    commit_s = invoke_s + latency_s / 2
    book.cancel(bets, chosen, commit_s[: len(chosen)])
    is_denied = np.arange(len(bet)) >= len(chosen)
    rollback = ~is_denied & (rng.random(len(bet)) < ROLLBACK_SHARE)
    return Cancels(bet, rollback, is_denied, invoke_s, latency_s, commit_s)


def _draw_transfers(
    rng: np.random.Generator, shape: Shape, wallets: int, popularity: Floats, attempts: int
) -> Transfers:
    """Return the deposits that open the wallets, and deposits and withdrawals during the load."""
    counts = [int(attempts * shape.shares[kind]) for kind in ("deposit", "withdraw")]
    users = np.searchsorted(popularity, rng.random(sum(counts))).astype(np.int64)
    sign = np.repeat([1, -1], counts)
    amount = sign * rng.integers(1, 400, len(users)) * 50
    invoke_s = rng.uniform(LOAD_FROM_S, shape.load_to_s, len(users))
    fate, impatient = book.draw_fates(rng, shape, invoke_s)
    seed_s = rng.uniform(1.0, SEED_S, wallets)
    latency_s = book.latencies(rng, wallets + len(users))
    all_s = np.concatenate([seed_s, invoke_s])
    return Transfers(
        user=np.concatenate([np.arange(wallets), users]),
        amount=np.concatenate([np.full(wallets, SEED_MINOR), amount]),
        invoke_s=all_s,
        latency_s=latency_s,
        fate=np.concatenate([np.full(wallets, int(Fate.DONE)), fate]),
        impatient=np.concatenate([np.zeros(wallets, dtype=bool), impatient]),
        commit_s=all_s + latency_s / 2,
        seeds=wallets,
    )


def _draw_retries(
    rng: np.random.Generator, shape: Shape, matches: Matches, bets: Bets, transfers: Transfers
) -> Retries:
    """Choose half of the unknown keys; a bet that never arrived only if its match is over."""
    unknown = (bets.fate == Fate.LOST) | ((bets.fate == Fate.GONE) & np.isfinite(matches.ends_s)[bets.match])
    lost = np.flatnonzero((transfers.fate == Fate.LOST) | (transfers.fate == Fate.GONE))
    chosen = [rng.permutation(index)[: (len(index) + 1) // 2] for index in (np.flatnonzero(unknown), lost)]
    times = [shape.final_s + rng.uniform(0.0, FINAL_S, len(index)) for index in chosen]
    return Retries(chosen[0], chosen[1], times[0], times[1])


def _entries(bets: Bets, transfers: Transfers, payments: Payments, retries: Retries) -> Entries:
    """Return every entry of the block by wallet and time, with seqs and balances."""
    staked = np.flatnonzero(bets.placed)
    moved = np.flatnonzero(transfers.fate <= Fate.LOST)
    again = retries.transfers[transfers.fate[retries.transfers] == Fate.GONE]
    again_s = retries.transfers_at_s[transfers.fate[retries.transfers] == Fate.GONE] + 0.001
    counts = [len(staked), len(moved), len(again), len(payments.bet)]
    none = [np.full(count, -1, dtype=np.int64) for count in counts]
    user = np.concatenate([bets.user[staked], transfers.user[moved], transfers.user[again], bets.user[payments.bet]])
    at_s = np.concatenate([bets.commit_s[staked], transfers.commit_s[moved], again_s, payments.at_s])
    bet = np.concatenate([staked, none[1], none[2], payments.bet])
    kind = np.concatenate([none[0], none[1], none[2], payments.kind])
    entries = Entries(
        user=user,
        at_s=at_s,
        bet=bet,
        transfer=np.concatenate([none[0], moved, again, none[3]]),
        payment=np.concatenate([none[0], none[1], none[2], np.arange(counts[3])]),
        amount=np.concatenate(
            [-bets.reserve[staked], transfers.amount[moved], transfers.amount[again], payments.amount]
        ),
        seq=np.zeros(len(user), dtype=np.int64),
        balance=np.zeros(len(user), dtype=np.int64),
        match=np.where(bet >= 0, bets.match[np.maximum(bet, 0)], -1),
        final=np.repeat([False, False, True, False], counts),
    )
    return ordered(entries, np.lexsort([kind, at_s, user]))


def ordered(entries: Entries, order: Ints) -> Entries:
    """Return the entries in this order (by wallet) with seqs and balances to match."""
    names = ("user", "at_s", "bet", "transfer", "payment", "amount", "seq", "balance", "match", "final")
    moved = Entries(**{name: getattr(entries, name)[order] for name in names})
    starts = wallet_starts(moved.user)
    lengths = np.diff(np.append(starts, len(moved.user)))
    running = np.cumsum(moved.amount)
    moved.seq = np.arange(len(moved.user)) - np.repeat(starts, lengths) + 1
    moved.balance = running - np.repeat(running[starts] - moved.amount[starts], lengths)
    return moved


def wallet_starts(user: Ints) -> Ints:
    """Return where each wallet begins in a column that is ordered by wallet."""
    return np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))


def _open_wallets(entries: Entries, transfers: Transfers) -> None:
    """Make each wallet's first deposit large enough that its balance is never below zero."""
    starts = wallet_starts(entries.user)
    lowest = np.minimum.reduceat(entries.balance, starts)
    missing = np.maximum(-lowest, 0)
    entries.amount[starts] += missing
    entries.balance += np.repeat(missing, np.diff(np.append(starts, len(entries.user))))
    transfers.amount[: transfers.seeds] += missing
