"""Requests of a window as bytes, made before it begins, so that sending costs the generator next to nothing.

The workload: many wallets, drawn evenly; some tens of open matches; half BACK and half LAY with limits drawn from
the same range, so that in a book in balance about half of the bets trade and the others rest.
"""

import random
from collections.abc import Iterator

import msgspec

from ledgerproof.bench.plan import Plan
from ledgerproof.wire import get, post

ODDS_LOW, ODDS_HIGH = 150, 250
STAKE_LOW, STAKE_HIGH = 10, 200
OUTCOMES = ("HOME", "DRAW", "AWAY")
DEPOSIT_MINOR = 1_000_000_000
"""Enough for every bet a wallet can be asked to place in many runs: the bench measures bets, not refusals."""


class DrawnBet(msgspec.Struct, frozen=True):
    """One bet of the workload."""

    user_id: int
    match_id: str
    outcome: str
    side: str
    odds: int
    stake_minor: int


def draw_bets(plan: Plan, count: int) -> Iterator[DrawnBet]:
    """Draw `count` bets. The same plan draws the same bets."""
    draw = random.Random(plan.seed)  # noqa: S311 - a workload, not a secret
    pick, number, many = draw.choice, draw.random, draw.randrange
    for _ in range(count):
        yield DrawnBet(
            plan.first_user + many(plan.users),
            pick(plan.matches),
            pick(OUTCOMES),
            "BACK" if number() < 0.5 else "LAY",
            many(ODDS_LOW, ODDS_HIGH + 1),
            many(STAKE_LOW, STAKE_HIGH + 1),
        )


def draw_reads(plan: Plan, count: int) -> list[bool]:
    """Draw which of `count` mixed requests are reads. The same plan draws the same."""
    draw = random.Random(f"reads-{plan.seed}")  # noqa: S311 - a workload, not a secret
    return [draw.random() < plan.read_share for _ in range(count)]


def _mixed(plan: Plan, count: int) -> Iterator[bytes]:
    draw = random.Random(f"mixed-{plan.seed}")  # noqa: S311 - a workload, not a secret
    bets = draw_bets(plan, count)
    for number, reads in enumerate(draw_reads(plan, count)):
        if reads:
            user = plan.first_user + draw.randrange(plan.users)
            yield get(f"/v1/wallets/{user}/balance{plan.query}", plan.token)
            continue
        bet = next(bets)
        user = plan.first_user if draw.random() < plan.hot_share else bet.user_id
        yield post(f"/v1/wallets/{user}/bets", f"{plan.run}-{number}", _bet(bet), plan.token)


def build(plan: Plan, count: int) -> list[bytes]:
    """Return `count` requests of the plan's kind; deposits and reads are at most one a wallet."""
    match plan.kind:
        case "bets":
            return [
                post(f"/v1/wallets/{bet.user_id}/bets", f"{plan.run}-{number}", _bet(bet), plan.token)
                for number, bet in enumerate(draw_bets(plan, count))
            ]
        case "bulk":
            drawn = draw_bets(plan, count * plan.bulk)
            return [
                _bulk([next(drawn) for _ in range(plan.bulk)], f"{plan.run}-{number}", plan.token)
                for number in range(count)
            ]
        case "deposits":
            body = b'{"amount_minor":%d}' % DEPOSIT_MINOR
            first = plan.first_user
            return [
                post(f"/v1/wallets/{user}/deposits", f"{plan.run}-open", body, plan.token)
                for user in range(first, first + min(count, plan.users))
            ]
        case "balances":
            users = list(range(plan.first_user, plan.first_user + plan.users))
            random.Random(plan.seed).shuffle(users)  # noqa: S311 - a workload, not a secret
            return [get(f"/v1/wallets/{user}/balance{plan.query}", plan.token) for user in users[:count]]
        case "grpc_bets":
            raise ValueError("calls of gRPC are not bytes of HTTP: grpc_load makes them")
        case "mixed":
            return list(_mixed(plan, count))
        case "static":
            return [get("/", plan.token)] * count


def _bet(bet: DrawnBet) -> bytes:
    return (
        f'{{"match_id":"{bet.match_id}","outcome":"{bet.outcome}","side":"{bet.side}","odds":{bet.odds},'
        f'"stake_minor":{bet.stake_minor}}}'
    ).encode()


def _bulk(bets: list[DrawnBet], key: str, token: str) -> bytes:
    commands = [{"op": "bet", "key": f"{key}-{number}", **msgspec.to_builtins(bet)} for number, bet in enumerate(bets)]
    return post("/v1/commands", key, msgspec.json.encode({"commands": commands}), token)
