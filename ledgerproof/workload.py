"""Draws the whole betting workload before any of it runs: a seeded, open arrival schedule.

Open means that arrivals do not wait for answers: a slow service meets the same arrivals as a fast one, so
its outages show. Everything random is drawn here, from one seed; what an answer decides (which bet id a
cancel names, which `min_seq` a read asks for) is looked up when the arrival runs. The same arguments give
the same schedule on every machine (`Schedule.digest` says whether they did); the interleaving of a run is
not reproduced by its seed.

Units: times are seconds since the start of the load, amounts are minor units, odds are hundredths.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import cast
from uuid import UUID

import msgspec
import numpy as np
from numpy.typing import NDArray

from invariants.history import HUNG_UP
from reference.commands import DEFAULT_OUTCOMES, MIN_ODDS, Side

WALLETS = 2000
"""Wallets that bet. Popularity falls with rank, so a few are hot and most are quiet."""
CONTENDED_WALLETS = 50
"""Further wallets that only the CONTEND arrivals use, so that their outcome is known in advance."""
POPULARITY_EXPONENT = 0.8
"""Rank r has weight r^-0.8: the hottest of 2,000 wallets takes about 5 % of the bets."""
MATCH_SLOTS = 40
"""Matches open at any time; each slot plays one match after another."""
CREATE_LEAD_S = 1.5
"""A match is created this long before the first bet on it, so that a slow create is not an unknown match."""
TARGET_AGE_S = (0.7, 8.0)
"""A retry or a cancel names a command that was sent this long ago at least and at most."""
BEYOND_FUNDS_MINOR = 900_000_000
"""A stake that no wallet of the workload can pay, and below the service's limit of one command."""
CONTENDED_AMOUNT_MINOR = 5_000
TIGHT_SHARE = 0.02
"""Share of wallets (the least popular) that are seeded with almost nothing and run out of funds."""
RESETTLE_SHARE = 0.2
"""Share of settled matches that are settled again with another result; a third of those a second time."""
RESETTLE_TO_VOID_SHARE = 0.15
"""Share of those corrections that make the match void."""
SPENDERS_FROM = 10_000
"""Match number m that will be corrected has a wallet of its own, SPENDERS_FROM + m, which backs the first result and
withdraws all that it won by mistake before the correction: what is taken back then is not there any more."""
SPENDER_STAKE_MINOR = 2_000
VOID_SHARE = 0.12
"""Share of matches that are voided instead of settled; half of those without having been closed."""
BULK_BETS = 6
"""Bets in one BULK, beside a deposit and a withdrawal."""
PATIENCE_S = 0.012
"""An IMPATIENT client hangs up within this long after sending."""
FAR_FUTURE_S = 86_400
"""Matches close by command, so their clock is set to the next day."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Kind(IntEnum):
    """What an arrival does. Several kinds send more than one request, on purpose."""

    BET = 0
    DEPOSIT = 1
    WITHDRAW = 2
    CANCEL = 3
    BALANCE = 4
    ENTRIES = 5
    RETRY = 6
    """An earlier command again, same key and same body."""
    OTHER_BODY = 7
    """The key of an earlier bet with another stake."""
    RACE = 8
    """One bet sent to both API processes at the same moment under one key."""
    BEYOND = 9
    """A bet that its wallet cannot pay."""
    LATE = 10
    """A bet on a match that was closed before."""
    CONTEND = 11
    """A deposit, then two withdrawals of all of it at once through both API processes."""
    IMPATIENT = 12
    """A bet whose client hangs up after some milliseconds, as telephones in a tunnel do."""
    CREATE = 13
    CLOSE = 14
    SETTLE = 15
    VOID = 16
    RESETTLE = 17
    RESETTLE_TWICE = 18
    """The second correction of a match."""
    BULK = 19
    """Several wallet commands of several wallets in one request."""
    ROLLBACK = 20
    """A bet and the rollback of its key: before it, beside it, or after it."""
    GRPC = 21
    """A bet over gRPC."""


PER_BET: dict[Kind, float] = {
    Kind.BET: 0.988,
    Kind.RACE: 0.012,
    Kind.BEYOND: 0.010,
    Kind.LATE: 0.006,
    Kind.DEPOSIT: 0.030,
    Kind.WITHDRAW: 0.030,
    Kind.CANCEL: 0.050,
    Kind.BALANCE: 0.200,
    Kind.ENTRIES: 0.015,
    Kind.RETRY: 0.015,
    Kind.OTHER_BODY: 0.006,
    Kind.CONTEND: 0.002,
    Kind.IMPATIENT: 0.003,
    Kind.BULK: 0.004,
    Kind.ROLLBACK: 0.006,
    Kind.GRPC: 0.010,
}
"""Arrivals of each kind per bet. The first two sum to one: `rate` counts bets that ought to be accepted."""

BETTING = (Kind.BET, Kind.RACE, Kind.BEYOND, Kind.LATE, Kind.IMPATIENT, Kind.BULK, Kind.ROLLBACK, Kind.GRPC)
COMMANDS = (Kind.BET, Kind.DEPOSIT, Kind.WITHDRAW, Kind.BEYOND, Kind.LATE)
"""Kinds whose key a RETRY may send again."""
RESETTLES = (Kind.RESETTLE, Kind.RESETTLE_TWICE)
LIFECYCLE = (Kind.CREATE, Kind.CLOSE, Kind.SETTLE, Kind.VOID, *RESETTLES)


_SIDES = (Side.BACK, Side.LAY)
_TAGS = {
    Kind.RACE: "race",
    Kind.BEYOND: "beyond_funds",
    Kind.LATE: "late",
    Kind.IMPATIENT: HUNG_UP,
    Kind.BULK: "bulk",
    Kind.ROLLBACK: "rollback",
    Kind.GRPC: "grpc",
}


@dataclass(frozen=True, slots=True)
class MatchPlan:
    """The planned life of one match. A time beyond the load means: the end of the run does it."""

    match_id: UUID
    slot: int
    created_s: float
    """Before zero: created while seeding."""
    opens_s: float
    ends_s: float
    settles_s: float
    result: int
    """Index into DEFAULT_OUTCOMES."""
    void: bool
    closes_first: bool
    mid_odds: tuple[int, ...]
    """The price around which bets on each outcome are placed, in hundredths."""
    corrections: tuple[tuple[float, int | None], ...] = ()
    """(time, result) of each resettle: index into DEFAULT_OUTCOMES, or None for void."""


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
    """Of a balance: whether it is asked of the ledger."""
    after_seq: int | None = None
    """Of a page of entries: behind which seq it is to begin."""
    tag: str | None = None
    payload_hash: str | None = field(default=None)

    def __post_init__(self) -> None:
        """Name the payload by a hash of path and body, so that a changed body shows in the history."""
        if self.body is not None and self.payload_hash is None:
            digest = hashlib.blake2b(self.path.encode(), digest_size=8)
            digest.update(self.body)
            self.payload_hash = digest.hexdigest()


@dataclass(frozen=True)
class Schedule:
    """All arrivals of one run, by time; row i of every column is arrival i."""

    seed: int
    rate: float
    """Bets per second."""
    duration_s: float
    apis: int
    t: Floats
    kind: NDArray[np.int8]
    user: Ints
    match: NDArray[np.int32]
    """Index into `matches`, or -1."""
    selection: NDArray[np.int8]
    side: NDArray[np.int8]
    """0 is BACK, 1 is LAY."""
    odds: NDArray[np.int32]
    amount: Ints
    api: NDArray[np.int8]
    target: NDArray[np.int32]
    """The earlier arrival that a CANCEL, RETRY or OTHER_BODY is about, or -1."""
    matches: list[MatchPlan]
    seed_deposits: list[tuple[int, int]]
    """(user_id, amount_minor) of the deposits that open the wallets."""

    def __len__(self) -> int:
        return len(self.t)

    @property
    def bets(self) -> int:
        """Return how many arrivals are bets that ought to be accepted."""
        return int(np.isin(self.kind, (Kind.BET, Kind.RACE)).sum())

    def digest(self) -> str:
        """Return a hash of everything drawn: equal digests mean equal schedules."""
        digest = hashlib.sha256()
        columns = (
            self.t,
            self.kind,
            self.user,
            self.match,
            self.selection,
            self.side,
            self.odds,
            self.amount,
        )
        for column in (*columns, self.api, self.target):
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update(repr(self.matches).encode())
        digest.update(repr(self.seed_deposits).encode())
        return digest.hexdigest()

    def key_of(self, arrival: int) -> str:
        """Return the idempotency key of an arrival's command."""
        return f"w{self.seed}-{arrival}"

    def command(self, arrival: int) -> Command:
        """Build the command of an arrival that needs nothing but the schedule.

        The kinds of BETTING, DEPOSIT and WITHDRAW. Raises ValueError for the others.
        """
        number, user, match, selection, side, odds, amount = self._rows[arrival]
        kind = Kind(number)
        key = self.key_of(arrival)
        if kind is Kind.DEPOSIT:
            return deposit(user, amount, key)
        if kind is Kind.WITHDRAW:
            return withdraw(user, amount, key)
        if kind not in BETTING:
            raise ValueError(f"{kind.name} is not a command of its own")
        return bet(
            user=user,
            match_id=self._match_ids[match],
            selection=DEFAULT_OUTCOMES[selection],
            side=_SIDES[side],
            odds=odds,
            stake_minor=amount,
            key=key,
            tag=_TAGS.get(kind),
        )

    def bulk(self, arrival: int) -> list[Command]:
        """Build the commands of a BULK: bets of several wallets on one match, a deposit and a withdrawal.

        The last command repeats the first one, so that a key comes twice in one request.
        """
        number, _, match, selection, side, odds, amount = self._rows[arrival]
        if Kind(number) is not Kind.BULK:
            raise ValueError(f"{Kind(number).name} is not a bulk")
        key = self.key_of(arrival)
        wallets = [user for user, _ in self.seed_deposits]
        users = [wallets[(arrival * BULK_BETS + i) % len(wallets)] for i in range(BULK_BETS)]
        bets = [
            bet(
                user=user,
                match_id=self._match_ids[match],
                selection=DEFAULT_OUTCOMES[selection],
                side=_SIDES[(side + i) % 2],
                odds=odds,
                stake_minor=amount + 10 * i,
                key=f"{key}-{i}",
                tag="bulk",
            )
            for i, user in enumerate(users)
        ]
        transfers = [
            deposit(users[0], amount, f"{key}-in", "bulk"),
            withdraw(users[-1], amount, f"{key}-out", "bulk"),
        ]
        return [*bets, *transfers, bets[0]]

    @cached_property
    def _rows(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """What `command` needs of each arrival, as Python numbers: reading single array items is slow."""
        columns = (self.kind, self.user, self.match, self.selection, self.side, self.odds, self.amount)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    @cached_property
    def _match_ids(self) -> list[str]:
        return [str(plan.match_id) for plan in self.matches]

    def spender_commands(self, match: int) -> list[Command]:
        """Build what the spender of a match to be corrected does at its start: a deposit, then a bet of all of it.

        Nobody backs at lower odds, so the bet is the first to be taken.
        """
        user, key = SPENDERS_FROM + match, f"w{self.seed}-m{match}-spender"
        plan = self.matches[match]
        return [
            deposit(user, SPENDER_STAKE_MINOR, f"{key}-in", "spender"),
            bet(
                user=user,
                match_id=str(plan.match_id),
                selection=DEFAULT_OUTCOMES[plan.result],
                side=Side.BACK,
                odds=MIN_ODDS,
                stake_minor=SPENDER_STAKE_MINOR,
                key=f"{key}-bet",
                tag="spender",
            ),
        ]

    def patience_s(self, arrival: int) -> float:
        """Return how long the client of an IMPATIENT arrival waits for its answer."""
        return PATIENCE_S * (1 + int(self.odds[arrival]) % 12) / 12

    def lifecycle_command(self, kind: Kind, match: int, origin_unix_s: float, suffix: str = "") -> Command:
        """Build the command that creates, closes, settles, voids or resettles a match.

        `origin_unix_s` is the wall clock at the start of the load; only CREATE needs it.
        """
        plan = self.matches[match]
        match_id = str(plan.match_id)
        key = f"w{self.seed}-m{match}-{kind.name.lower()}{suffix}"
        if kind is Kind.CREATE:
            body = {
                "match_id": match_id,
                "closes_at_ms": int((origin_unix_s + max(plan.ends_s, 0.0) + FAR_FUTURE_S) * 1000),
                "outcomes": list(DEFAULT_OUTCOMES),
            }
            return Command("create_match", "/v1/matches", key, msgspec.json.encode(body), match_id=match_id)
        path = f"/v1/matches/{match_id}"
        if kind is Kind.CLOSE:
            return Command("close_match", f"{path}/close", key, b"{}", match_id=match_id)
        if kind is Kind.VOID:
            return Command("void_match", f"{path}/void", key, b"{}", match_id=match_id)
        if kind in RESETTLES:
            number = RESETTLES.index(kind)
            index = plan.corrections[number][1]
            corrected = None if index is None else DEFAULT_OUTCOMES[index]
            body_bytes = msgspec.json.encode({"result": corrected, "corrects_version": number + 1})
            return Command(
                "resettle_match", f"{path}/resettle", key, body_bytes, match_id=match_id, selection=corrected
            )
        result = DEFAULT_OUTCOMES[plan.result]
        body_bytes = msgspec.json.encode({"result": result})
        return Command("settle_match", f"{path}/settle", key, body_bytes, match_id=match_id, selection=result)


def deposit(user: int, amount_minor: int, key: str, tag: str | None = None) -> Command:
    """Return a deposit command."""
    body = b'{"amount_minor":%d}' % amount_minor
    return Command("deposit", f"/v1/wallets/{user}/deposits", key, body, user=user, amount=amount_minor, tag=tag)


def withdraw(user: int, amount_minor: int, key: str, tag: str | None = None) -> Command:
    """Return a withdrawal command."""
    body = b'{"amount_minor":%d}' % amount_minor
    return Command("withdraw", f"/v1/wallets/{user}/withdrawals", key, body, user=user, amount=amount_minor, tag=tag)


def bet(
    *,
    user: int,
    match_id: str,
    selection: str,
    side: Side,
    odds: int,
    stake_minor: int,
    key: str,
    tag: str | None = None,
) -> Command:
    """Return a bet command."""
    body = (
        f'{{"match_id":"{match_id}","outcome":"{selection}","side":"{side.value}",'
        f'"odds":{odds},"stake_minor":{stake_minor}}}'
    ).encode()
    return Command(
        "bet",
        f"/v1/wallets/{user}/bets",
        key,
        body,
        user=user,
        match_id=match_id,
        selection=selection,
        side=side.value,
        odds=odds,
        amount=stake_minor,
        tag=tag,
    )


def cancel(user: int, match_id: str, bet_id: str, key: str, tag: str | None = None) -> Command:
    """Return a command that cancels the unmatched part of a bet."""
    path = f"/v1/wallets/{user}/bets/{bet_id}/cancel"
    return Command("cancel", path, key, b"{}", user=user, match_id=match_id, bet_id=bet_id, tag=tag)


def rollback(user: int, key: str, tag: str | None = "rollback") -> Command:
    """Return a command that takes back the bet that was, or will be, placed under `key`."""
    body = msgspec.json.encode({"key": key})
    return Command("rollback", f"/v1/wallets/{user}/rollbacks", key, body, user=user, tag=tag)


def bulk_body(commands: Sequence[Command]) -> bytes:
    """Return the body of one request that holds these bets, deposits and withdrawals."""
    items = [
        {"op": command.op, "user_id": command.user, "key": command.key, **msgspec.json.decode(command.body or b"{}")}
        for command in commands
    ]
    return msgspec.json.encode({"commands": items})


def balance(user: int, *, strong: bool, min_seq: int | None) -> Command:
    """Return a read of one balance, with the `seq` its session is known to have seen."""
    query = "consistency=strong" if strong else "consistency=eventual"
    if min_seq is not None:
        query += f"&min_seq={min_seq}"
    return Command("balance", f"/v1/wallets/{user}/balance?{query}", user=user, min_seq=min_seq, strong=strong)


def entries(user: int, after_seq: int) -> Command:
    """Return a read of a page of one wallet's history."""
    path = f"/v1/wallets/{user}/entries?after_seq={after_seq}&limit=20"
    return Command("entries", path, user=user, after_seq=after_seq)


def popularity(wallets: int, exponent: float = POPULARITY_EXPONENT) -> Floats:
    """Return the probability of each popularity rank, most popular first; they sum to one."""
    weights = np.arange(1, wallets + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def draw(
    seed: int,
    rate: float,
    duration_s: float,
    *,
    apis: int = 2,
    wallets: int = WALLETS,
    slots: int = MATCH_SLOTS,
) -> Schedule:
    """Draw a schedule of `rate` bets per second, and what goes with them, over `duration_s` seconds.

    Raises ValueError if rate or duration are not positive, or there is no wallet, slot or API process.
    """
    if not (rate > 0 and duration_s > 0):
        raise ValueError("rate and duration must be positive")
    if wallets < 1 or slots < 1 or apis < 1:
        raise ValueError("at least one wallet, one match slot and one API process are needed")
    # One stream per purpose: a change in one of them leaves the others as they were.
    streams = [np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(5)]
    arrival_rng, match_rng, detail_rng, target_rng, correction_rng = streams

    matches = _draw_corrections(correction_rng, _draw_matches(match_rng, duration_s, slots))
    t, kind = _draw_arrivals(arrival_rng, rate, duration_s, matches)
    ranks = popularity(wallets)
    user_of_rank = detail_rng.permutation(wallets).astype(np.int64) + 1
    count = len(t)
    user = user_of_rank[detail_rng.choice(wallets, size=count, p=ranks)]
    contended = kind == Kind.CONTEND
    user[contended] = wallets + 1 + np.arange(int(contended.sum())) % CONTENDED_WALLETS

    match = _draw_match_of_bet(detail_rng, t, kind, matches, slots)
    lifecycle = np.isin(kind, LIFECYCLE)
    # A LATE bet needs a match that is over; where there is none yet, it is an ordinary bet.
    kind, match = _draw_late(detail_rng, t=t, kind=kind, match=match, matches=matches, slots=slots)
    selection = detail_rng.integers(0, len(DEFAULT_OUTCOMES), size=count).astype(np.int8)
    side = detail_rng.integers(0, 2, size=count).astype(np.int8)
    mids = np.array([plan.mid_odds for plan in matches], dtype=np.float64)
    mid = np.where(match >= 0, mids[np.maximum(match, 0), selection], 200.0)
    spread = np.round((mid - 100) * (1 + detail_rng.normal(0.0, 0.04, size=count)))
    odds = np.maximum(100 + spread, MIN_ODDS).astype(np.int32)
    amount = np.round(np.exp(detail_rng.normal(np.log(600.0), 0.7, size=count)), -1).astype(np.int64)
    amount = np.clip(amount, 50, 20_000)
    amount[kind == Kind.DEPOSIT] *= 5
    amount[kind == Kind.BALANCE] //= 10  # not money: the choice of which kind of read it is
    side[kind == Kind.BEYOND] = 0
    amount[kind == Kind.BEYOND] = BEYOND_FUNDS_MINOR
    amount[contended] = CONTENDED_AMOUNT_MINOR
    api = detail_rng.integers(0, apis, size=count).astype(np.int8)
    kind, target = _draw_targets(target_rng, t, kind)
    return Schedule(
        seed=seed,
        rate=rate,
        duration_s=duration_s,
        apis=apis,
        t=t,
        kind=kind,
        user=np.where(lifecycle, 0, user),
        match=match,
        selection=selection,
        side=side,
        odds=odds,
        amount=amount,
        api=api,
        target=target,
        matches=matches,
        seed_deposits=_seed_deposits(ranks, user_of_rank, rate * duration_s),
    )


def _draw_matches(rng: np.random.Generator, duration_s: float, slots: int) -> list[MatchPlan]:
    """Draw the matches of every slot, one after another until the load ends."""
    mean_life_s = float(np.clip(duration_s * 0.4, 5.0, 60.0))
    plans: list[MatchPlan] = []
    for slot in range(slots):
        opens_s = 0.0
        # The first matches end spread over a whole life, so that ends do not come in waves.
        life_s = float(rng.uniform(0.2, 1.2)) * mean_life_s
        while opens_s < duration_s:
            ends_s = opens_s + life_s
            closes_first = True
            void = bool(rng.random() < VOID_SHARE)
            if void:
                closes_first = bool(rng.random() < 0.5)
            home = float(rng.uniform(0.30, 0.55))
            draw_share = float(rng.uniform(0.2, 0.3))
            chances = (home, draw_share, 1.0 - home - draw_share)
            plans.append(
                MatchPlan(
                    match_id=_uuid(rng),
                    slot=slot,
                    created_s=opens_s - CREATE_LEAD_S,
                    opens_s=opens_s,
                    ends_s=ends_s,
                    settles_s=ends_s + (float(rng.uniform(0.3, 1.5)) if closes_first else 0.0),
                    result=int(rng.choice(3, p=np.array(chances) / sum(chances))),
                    void=void,
                    closes_first=closes_first,
                    mid_odds=tuple(round(100 / chance) for chance in chances),
                )
            )
            opens_s = ends_s
            life_s = float(rng.uniform(0.6, 1.4)) * mean_life_s
    return plans


def _draw_corrections(rng: np.random.Generator, plans: list[MatchPlan]) -> list[MatchPlan]:
    """Give some of the matches that are settled other results later; the first of them always."""
    first = next((plan.match_id for plan in plans if not plan.void), None)
    corrected = []
    for plan in plans:
        chosen = bool(rng.random() < RESETTLE_SHARE) or plan.match_id == first
        corrections: list[tuple[float, int | None]] = []
        if chosen and not plan.void:
            at_s, stands = plan.settles_s, cast("int | None", plan.result)
            for _ in range(2 if rng.random() < 1 / 3 else 1):
                at_s += float(rng.uniform(0.6, 2.5))
                others = [index for index in range(len(DEFAULT_OUTCOMES)) if index != stands]
                void = stands is not None and bool(rng.random() < RESETTLE_TO_VOID_SHARE)
                stands = None if void else int(rng.choice(others))
                corrections.append((at_s, stands))
        corrected.append(replace(plan, corrections=tuple(corrections)))
    return corrected


def _uuid(rng: np.random.Generator) -> UUID:
    """Return a version 4 UUID drawn from `rng`."""
    return UUID(bytes=rng.bytes(16), version=4)


def _draw_arrivals(
    rng: np.random.Generator, rate: float, duration_s: float, matches: list[MatchPlan]
) -> tuple[Floats, NDArray[np.int8]]:
    """Draw the times and kinds of a Poisson process, and merge the matches' lifecycle into it."""
    weights = np.array(list(PER_BET.values()))
    kinds = np.array(list(PER_BET), dtype=np.int8)
    total_rate = rate * float(weights.sum())
    # Given their number, the points of a Poisson process are independent and uniform.
    count = int(rng.poisson(total_rate * duration_s))
    t = rng.uniform(0.0, duration_s, size=count)
    kind = rng.choice(kinds, size=count, p=weights / weights.sum())
    lifecycle = sorted(
        (time_s, kind_of) for plan in matches for time_s, kind_of in _lifecycle_of(plan) if 0.0 <= time_s < duration_s
    )
    t = np.concatenate([t, np.array([time_s for time_s, _ in lifecycle], dtype=np.float64)])
    kind = np.concatenate([kind, np.array([kind_of for _, kind_of in lifecycle], dtype=np.int8)])
    order = np.argsort(t, kind="stable")
    return t[order], kind[order].astype(np.int8)


def _lifecycle_of(plan: MatchPlan) -> list[tuple[float, Kind]]:
    """Return the lifecycle arrivals of one match with their times."""
    steps = [(plan.created_s, Kind.CREATE)]
    if plan.closes_first:
        steps.append((plan.ends_s, Kind.CLOSE))
    steps.append((plan.settles_s, Kind.VOID if plan.void else Kind.SETTLE))
    steps += [(at_s, kind) for (at_s, _), kind in zip(plan.corrections, RESETTLES, strict=False)]
    return steps


def _draw_match_of_bet(
    rng: np.random.Generator, t: Floats, kind: NDArray[np.int8], matches: list[MatchPlan], slots: int
) -> NDArray[np.int32]:
    """Return for each bet a match that is open at its time, and for lifecycle arrivals their own match."""
    match = np.full(len(t), -1, dtype=np.int32)
    slot = rng.integers(0, slots, size=len(t))
    betting = np.isin(kind, BETTING)
    for number in range(slots):
        own = np.array([i for i, plan in enumerate(matches) if plan.slot == number], dtype=np.int32)
        ends = np.array([matches[i].ends_s for i in own])
        mine = betting & (slot == number)
        match[mine] = own[np.searchsorted(ends, t[mine], side="right")]
    planned: dict[tuple[float, int], int] = {
        (time_s, int(kind_of)): i for i, plan in enumerate(matches) for time_s, kind_of in _lifecycle_of(plan)
    }
    for arrival in np.flatnonzero(np.isin(kind, LIFECYCLE)):
        match[arrival] = planned[(float(t[arrival]), int(kind[arrival]))]
    return match


def _draw_late(
    rng: np.random.Generator,
    *,
    t: Floats,
    kind: NDArray[np.int8],
    match: NDArray[np.int32],
    matches: list[MatchPlan],
    slots: int,
) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """Point each LATE bet at a match whose planned end was a while ago."""
    kind, match = kind.copy(), match.copy()
    ends = np.array([plan.ends_s for plan in matches])
    order = np.argsort(ends, kind="stable")
    over = np.searchsorted(ends[order], t - 1.0, side="left")
    for arrival in np.flatnonzero(kind == Kind.LATE):
        available = int(over[arrival])
        if available == 0:
            kind[arrival] = Kind.BET
            continue
        recent = max(0, available - slots)
        match[arrival] = order[int(rng.integers(recent, available))]
    return kind, match


def _draw_targets(
    rng: np.random.Generator, t: Floats, kind: NDArray[np.int8]
) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """Choose for each CANCEL, RETRY and OTHER_BODY a recent arrival; without one it becomes a read."""
    kind = kind.copy()
    target = np.full(len(t), -1, dtype=np.int32)
    bets = np.flatnonzero(kind == Kind.BET)
    commands = np.flatnonzero(np.isin(kind, COMMANDS))
    for wanted, pool in ((Kind.CANCEL, bets), (Kind.OTHER_BODY, bets), (Kind.RETRY, commands)):
        times = t[pool]
        for arrival in np.flatnonzero(kind == wanted):
            oldest = int(np.searchsorted(times, t[arrival] - TARGET_AGE_S[1]))
            newest = int(np.searchsorted(times, t[arrival] - TARGET_AGE_S[0]))
            if newest > oldest:
                target[arrival] = pool[int(rng.integers(oldest, newest))]
            else:
                kind[arrival] = Kind.BALANCE
    return kind, target


def _seed_deposits(ranks: Floats, user_of_rank: Ints, bets: float) -> list[tuple[int, int]]:
    """Give every wallet what its share of the bets will probably need, and the last ones almost nothing."""
    mean_reserve_minor = 1_500.0
    amounts = 20_000 + np.round(ranks * bets * mean_reserve_minor, -2).astype(np.int64)
    tight = int(len(ranks) * TIGHT_SHARE)
    if tight:
        amounts[-tight:] = 500
    return [(int(user), int(amount)) for user, amount in zip(user_of_rank, amounts, strict=True)]
