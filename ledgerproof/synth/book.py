"""The matches and the order books of one block: who bets on what, what trades, what is cancelled and what is paid.

Nothing is simulated step by step. In a book all resting orders stand at one price, so they trade in the order of
their arrival, and a fill is where an interval of the backers' running stake meets one of the layers'.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from ledgerproof.synth.shape import (
    COMMISSION_BPS,
    LATENCY_MAX_S,
    LOAD_FROM_S,
    OUTCOMES,
    ROUNDS,
    Flags,
    Floats,
    Ints,
    Shape,
    Texts,
    low_bits,
    uuids,
)

VOID_SHARE: Final = 0.12
OPEN_SHARE: Final = 0.7
"""Of the matches of the last round: still open when the run ends."""
RESETTLE_SHARE: Final = 0.2
IMPATIENT_SHARE: Final = 0.01
"""Commands whose client hung up before the answer."""
LOST_IN_FAULT: Final = 0.3
TURNED_AWAY_IN_FAULT: Final = 0.1
APPLIED_SHARE: Final = 0.7
"""Of the commands nobody had an answer for."""
CREATE, BETS, CANCELS, CLOSES, LATES, RULINGS = (
    (0.0, 0.01),
    (0.03, 0.78),
    (0.8, 0.86),
    (0.88, 0.9),
    (0.92, 0.94),
    (
        0.96,
        0.98,
    ),
)
"""Parts of a round in which each thing happens; what lies between is longer than any latency."""
SECOND, THIRD = (0.05, 0.3), (0.4, 0.6)
"""Parts of the next round in which a match is settled again."""


class Fate(IntEnum):
    """What became of a command."""

    DONE = 0
    LOST = 1
    """Applied; nobody got the answer."""
    GONE = 2
    """Never arrived; nobody got an answer."""
    TURNED_AWAY = 3


@dataclass
class Matches:
    """One row per match; infinite times never came."""

    low: "np.ndarray[tuple[int], np.dtype[np.uint64]]"
    text: Texts
    round: Ints
    odds: Ints
    """(matches, outcomes): the price of each book."""
    created_s: Floats
    closed_s: Floats
    """When the close command committed."""
    ends_s: Floats
    """When bets ceased to trade: at the close, or at the void of a match that was not closed."""


@dataclass
class Rulings:
    """One row per settlement, by match and version."""

    match: Ints
    version: Ints
    void: Flags
    result: Ints
    at_s: Floats


@dataclass
class Bets:
    """One row per bet command that could be accepted; the last columns are those of its order, if it was placed."""

    user: Ints
    match: Ints
    selection: Ints
    back: Flags
    odds: Ints
    stake: Ints
    late: Flags
    invoke_s: Floats
    latency_s: Floats
    fate: Ints
    impatient: Flags
    commit_s: Floats
    arrived_s: Floats
    reserve: Ints
    matched: Ints
    liability: Ints
    winnings: Ints
    cancelled: Ints
    refund: Ints
    cancelled_s: Floats

    @property
    def placed(self) -> Flags:
        """Return which of them have an entry and an order."""
        return self.fate <= Fate.LOST


@dataclass
class Fills:
    """One row per fill, by match and number."""

    match: Ints
    number: Ints
    back: Ints
    """Index of the bet."""
    lay: Ints
    odds: Ints
    stake: Ints
    liability: Ints
    winnings: Ints
    at_s: Floats


@dataclass
class Payments:
    """One row per entry that the settler posts."""

    bet: Ints
    kind: Ints
    """Index into KINDS."""
    amount: Ints
    version: Ints
    at_s: Floats


KINDS: Final = ("COMMISSION_BACK", "TAKE_BACK", "REFUND", "PAYOUT", "COMMISSION")
"""In the order in which they are posted."""
TYPES: Final = ("REFUND", "DEBIT", "REFUND", "PAYOUT", "DEBIT")
CONTRAS: Final = ("HOUSE", "ESCROW", "ESCROW", "ESCROW", "HOUSE")


def windows(rng: np.random.Generator, shape: Shape) -> Floats:
    """Return the edges of a block's rounds, in seconds: about even, and other ones in each block."""
    inner = (np.arange(1, ROUNDS) + rng.uniform(-0.2, 0.2, ROUNDS - 1)) / ROUNDS
    return LOAD_FROM_S + shape.load_s * np.concatenate([[0.0], inner, [1.0]])


def within(rng: np.random.Generator, edges: Floats, number: Ints, part: tuple[float, float]) -> Floats:
    """Return a random time in a part of each round `number`."""
    low, high = edges[number], edges[number + 1]
    return low + (high - low) * rng.uniform(*part, size=len(number))


def latencies(rng: np.random.Generator, count: int) -> Floats:
    """Return latencies as the clients see them, in seconds."""
    return np.minimum(np.exp(rng.normal(np.log(0.006), 0.6, count)), LATENCY_MAX_S)


def draw_matches(rng: np.random.Generator, edges: Floats, count: int) -> tuple[Matches, Rulings]:
    """Return `count` matches of each round and what they were settled as."""
    number = np.repeat(np.arange(ROUNDS), count)
    total = len(number)
    created_s = within(rng, edges, number, CREATE)
    low = low_bits(rng, total)
    unfinished = (number == ROUNDS - 1) & (rng.random(total) < OPEN_SHARE)
    void = rng.random(total) < VOID_SHARE
    # The first match of each block is corrected: one that begins as a void would have been closed by nobody.
    void[0] = False
    closes = ~unfinished & ~(void & (rng.random(total) < 0.5))
    closed_s = np.where(closes, within(rng, edges, number, CLOSES), np.inf)
    ruled_s = np.where(unfinished, np.inf, within(rng, edges, number, RULINGS))
    matches = Matches(
        low=low,
        text=uuids(rng, low, created_s),
        round=number,
        odds=rng.integers(120, 600, size=(total, len(OUTCOMES))),
        created_s=created_s,
        closed_s=closed_s,
        ends_s=np.minimum(closed_s, ruled_s),
    )
    result = rng.integers(0, len(OUTCOMES), total)
    corrected = ~unfinished & (number < ROUNDS - 1) & (rng.random(total) < RESETTLE_SHARE)
    corrected[0] = True
    again = corrected & (rng.random(total) < 1 / 3)
    rows = [(np.flatnonzero(~unfinished), void, result, ruled_s)]
    stands_void, stands = void, result
    for chosen, part in ((corrected, SECOND), (again, THIRD)):
        turned_void = ~stands_void & (rng.random(total) < 0.15)
        stands = (stands + rng.integers(1, len(OUTCOMES), total)) % len(OUTCOMES)
        stands_void = turned_void
        at_s = within(rng, edges, np.minimum(number + 1, ROUNDS - 1), part)
        rows.append((np.flatnonzero(chosen), stands_void, stands, at_s))
    match = np.concatenate([index for index, *_ in rows])
    version = np.repeat(np.arange(1, len(rows) + 1), [len(index) for index, *_ in rows])
    columns = [np.concatenate([row[i][row[0]] for row in rows]) for i in (1, 2, 3)]
    order = np.lexsort([version, match])
    return matches, Rulings(match[order], version[order], *(column[order] for column in columns))


def draw_bets(
    rng: np.random.Generator,
    shape: Shape,
    *,
    edges: Floats,
    matches: Matches,
    users: Ints,
    counts: tuple[int, int],
) -> Bets:
    """Return the bets of a block, not matched yet; `counts`: in time, and after the close.

    `users` are the indices of the wallets that bet, as many as bets are wanted.
    """
    total = sum(counts)
    late = np.arange(total) >= counts[0]
    match = rng.integers(0, len(matches.round), total)
    closed = np.flatnonzero(np.isfinite(matches.closed_s))
    match[late] = rng.choice(closed, size=counts[1])
    number = matches.round[match]
    invoke_s = np.where(late, within(rng, edges, number, LATES), within(rng, edges, number, BETS))
    latency_s = latencies(rng, total)
    fate, impatient = draw_fates(rng, shape, invoke_s)
    commit_s = invoke_s + latency_s / 2
    selection = rng.integers(0, len(OUTCOMES), total)
    stake = np.clip(np.round(np.exp(rng.normal(np.log(600.0), 0.7, total)), -1), 50, 20_000).astype(np.int64)
    zeros = np.zeros(total, dtype=np.int64)
    return Bets(
        user=users,
        match=match,
        selection=selection,
        # A wallet takes one side of a match, so that nobody trades with themself.
        back=(users * 31 + match * 17) % 2 == 0,
        odds=matches.odds[match, selection],
        stake=stake,
        late=late,
        invoke_s=invoke_s,
        latency_s=latency_s,
        fate=fate,
        impatient=impatient,
        commit_s=commit_s,
        arrived_s=commit_s + rng.uniform(0.002, 0.02, total),
        reserve=zeros.copy(),
        matched=zeros.copy(),
        liability=zeros.copy(),
        winnings=zeros.copy(),
        cancelled=zeros.copy(),
        refund=zeros.copy(),
        cancelled_s=np.full(total, np.inf),
    )


def draw_fates(rng: np.random.Generator, shape: Shape, invoke_s: Floats) -> tuple[Ints, Flags]:
    """Return the fate of commands sent at these times, and whose client hung up on purpose."""
    total = len(invoke_s)
    start_s, end_s = shape.fault_s
    inside = (invoke_s > start_s) & (invoke_s < end_s)
    draw = rng.random(total)
    impatient = ~inside & (draw < IMPATIENT_SHARE)
    lost = impatient | (inside & (draw < LOST_IN_FAULT))
    away = inside & ~lost & (draw < LOST_IN_FAULT + TURNED_AWAY_IN_FAULT)
    applied = rng.random(total) < APPLIED_SHARE
    fate = np.where(lost, np.where(applied, Fate.LOST, Fate.GONE), np.where(away, Fate.TURNED_AWAY, Fate.DONE))
    return fate.astype(np.int64), impatient


def trade(rng: np.random.Generator, bets: Bets) -> Fills:
    """Match the orders of every book, set what each has traded and reserved, and return the fills."""
    placed = np.flatnonzero(bets.placed & ~bets.late)
    book = bets.match[placed] * len(OUTCOMES) + bets.selection[placed]
    placed = placed[np.lexsort([bets.arrived_s[placed], book])]
    sides = [placed[bets.back[placed]], placed[~bets.back[placed]]]
    back, lay, stake = _meet(bets, *sides)
    later_s = np.maximum(bets.arrived_s[back], bets.arrived_s[lay])
    order = np.lexsort([np.arange(len(back)), later_s, bets.match[back]])
    back, lay, stake, later_s = back[order], lay[order], stake[order], later_s[order]
    match, odds = bets.match[back], bets.odds[back].copy()

    # Only an order that was never the earlier one of a fill may name a better price than that of its book.
    rested = np.zeros(len(bets.user), dtype=bool)
    rested[np.where(bets.arrived_s[back] < bets.arrived_s[lay], back, lay)] = True
    traded = np.zeros(len(bets.user), dtype=bool)
    traded[back] = traded[lay] = True
    takers = np.flatnonzero(traded & ~rested)
    slack = (rng.random(len(takers)) * (bets.odds[takers] - 101) * 0.3).astype(np.int64)
    bets.odds[takers] += np.where(bets.back[takers], -slack, slack)
    bets.reserve[:] = np.where(bets.back, bets.stake, -((-bets.stake * (bets.odds - 100)) // 100))

    step = stake * (odds - 100)
    liability = _rounded_up_once(lay, step)
    winnings = step // 100
    for mine in (back, lay):
        np.add.at(bets.matched, mine, stake)
        np.add.at(bets.liability, mine, liability)
        np.add.at(bets.winnings, mine, winnings)
    return Fills(match, _numbered(match), back, lay, odds, stake, liability, winnings, later_s)


def _meet(bets: Bets, backs: Ints, lays: Ints) -> tuple[Ints, Ints, Ints]:
    """Return (back, lay, stake) of every piece where the running stakes of both sides of a book meet."""
    books = int(bets.match.max(initial=0) + 1) * len(OUTCOMES)
    ends, starts, totals = [], [], []
    for side in (backs, lays):
        book = bets.match[side] * len(OUTCOMES) + bets.selection[side]
        totals.append(np.bincount(book, weights=bets.stake[side], minlength=books).astype(np.int64))
    # Each book has a stretch of the number line for itself, as long as its longer side.
    length = np.maximum(*totals)
    base = np.cumsum(length) - length
    for side, total in zip((backs, lays), totals, strict=True):
        book = bets.match[side] * len(OUTCOMES) + bets.selection[side]
        running = np.cumsum(bets.stake[side]) - (np.cumsum(total) - total)[book]
        ends.append(base[book] + running)
        starts.append(base[book] + running - bets.stake[side])
    cuts = np.unique(np.concatenate([*ends, base, [int(length.sum())]]))
    left, right = cuts[:-1], cuts[1:]
    index = [np.searchsorted(end, left, side="right") for end in ends]
    inside = [number < len(end) for number, end in zip(index, ends, strict=True)]
    met = inside[0] & inside[1]
    for number, start in zip(index, starts, strict=True):
        met[met] &= start[number[met]] <= left[met]
    return backs[index[0][met]], lays[index[1][met]], (right - left)[met]


def _rounded_up_once(lay: Ints, step: Ints) -> Ints:
    """Return the liability of each fill: what the exact sum so far of its LAY order, rounded up, grew by."""
    order = np.argsort(lay, kind="stable")
    mine, steps = lay[order], step[order]
    total = np.cumsum(steps)
    first = np.concatenate([[True], mine[1:] != mine[:-1]]) if len(mine) else np.zeros(0, dtype=bool)
    before = (total - steps)[first]
    exact = total - np.repeat(before, np.diff(np.append(np.flatnonzero(first), len(mine))))
    grown = -((-exact) // 100) + ((-(exact - steps)) // 100)
    liability = np.empty_like(step)
    liability[order] = grown
    return liability


def _numbered(group: Ints) -> Ints:
    """Return 1, 2, 3, … within runs of equal values."""
    if not len(group):
        return group
    first = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    return np.arange(len(group)) - np.repeat(first, np.diff(np.append(first, len(group)))) + 1


def cancel(bets: Bets, chosen: Ints, at_s: Floats) -> None:
    """Cancel what is left of these bets at these times."""
    bets.cancelled[chosen] = (bets.stake - bets.matched)[chosen]
    used = np.where(bets.back, bets.matched, bets.liability)
    bets.refund[chosen] = (bets.reserve - used)[chosen]
    bets.cancelled_s[chosen] = at_s


def pay(rng: np.random.Generator, bets: Bets, rulings: Rulings, span_s: float) -> Payments:
    """Return everything the settler posts: refunds of cancels, and what each ruling and each correction moves."""
    cancelled = np.flatnonzero(bets.refund > 0)
    delay_s = rng.uniform(0.001, 0.015, len(cancelled))
    parts = [
        (cancelled, "REFUND", bets.refund[cancelled], np.zeros_like(cancelled), bets.cancelled_s[cancelled] + delay_s)
    ]
    placed = np.flatnonzero(bets.placed)
    last_version = int(rulings.version.max(initial=0))
    shape = (last_version + 1, int(bets.match.max(initial=0)) + 1)
    known, void, result, at_s = (np.zeros(shape, dtype=kind) for kind in (bool, bool, np.int64, np.float64))
    for table, column in ((known, np.True_), (void, rulings.void), (result, rulings.result), (at_s, rulings.at_s)):
        table[rulings.version, rulings.match] = column
    for version in range(1, last_version + 1):
        mine = placed[known[version, bets.match[placed]]]
        match = bets.match[mine]
        when_s = at_s[version, match] + rng.uniform(0.001, span_s, len(mine))
        number = np.full(len(mine), version)
        out, charge = _ruled(bets, mine, void[version, match], result[version, match])
        if version == 1:
            won = _won(bets, mine, result[1, match]) & ~void[1, match]
            prize = np.where(won, (bets.matched + bets.liability)[mine], 0)
            parts += [
                (mine, "REFUND", out - prize, number, when_s),
                (mine, "PAYOUT", prize, number, when_s),
                (mine, "COMMISSION", -charge, number, when_s),
            ]
            continue
        before, charged = _ruled(bets, mine, void[version - 1, match], result[version - 1, match])
        escrow, house = out - before, charge - charged
        more = np.maximum(escrow, 0)
        parts += [
            (mine, "COMMISSION_BACK", np.maximum(-house, 0), number, when_s),
            (mine, "TAKE_BACK", np.minimum(escrow, 0), number, when_s),
            (mine, "REFUND", np.where(void[version, match], more, 0), number, when_s),
            (mine, "PAYOUT", np.where(void[version, match], 0, more), number, when_s),
            (mine, "COMMISSION", -np.maximum(house, 0), number, when_s),
        ]
    kept = [(bet, kind, amount, number, when) for bet, kind, amount, number, when in parts]
    kind_of = np.concatenate([np.full(len(bet), KINDS.index(kind)) for bet, kind, *_ in kept])
    bet, amount, number, when = (np.concatenate([part[i] for part in kept]) for i in (0, 2, 3, 4))
    moved = amount != 0
    return Payments(bet[moved], kind_of[moved], amount[moved], number[moved], when[moved])


def _won(bets: Bets, mine: Ints, result: Ints) -> Flags:
    won: Flags = bets.back[mine] == (bets.selection[mine] == result)
    return won & (bets.matched[mine] > 0)


def _ruled(bets: Bets, mine: Ints, void: Flags, result: Ints) -> tuple[Ints, Ints]:
    """Return what these bets get out of escrow, beyond a cancel's refund, and what the house charges them."""
    back = bets.back[mine]
    unused = (
        np.where(back, (bets.stake - bets.matched)[mine], (bets.reserve - bets.liability)[mine]) - bets.refund[mine]
    )
    won = _won(bets, mine, result) & ~void
    net = np.where(back, bets.winnings[mine], bets.matched[mine])
    residue = np.where(back, (bets.liability - bets.winnings)[mine], 0)
    charge = np.where(won, -((-net * COMMISSION_BPS) // 10_000) + residue, 0)
    prize = np.where(won, (bets.matched + bets.liability)[mine], 0)
    return np.where(void, (bets.reserve - bets.refund)[mine], unused + prize), charge
