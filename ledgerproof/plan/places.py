"""Where the wallets and matches of a plan are: names become ids, on the servers the plan asks for."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import msgspec

from ledgerproof import workload
from ledgerproof.plan import format as plans
from ledgerproof.workload import Command
from reference.routing import shard_of_match, shards_of_server

CLOSES_AFTER_S: Final = 86_400
"""Matches close by command, so their clock is set to the next day."""
DRAWS_MAX: Final = 10_000
"""Ids drawn for one match until one has its home on the wanted server."""


@dataclass(frozen=True)
class Places:
    """The ids of a plan's names in one run."""

    users: dict[str, int]
    matches: dict[str, str]
    prefix: str
    """Every idempotency key of the run begins with it."""
    closes_at_ms: int


def place(plan: plans.Plan, routing: Sequence[int], first_wallet: int, tag: str, now_s: float) -> Places:
    """Choose ids; the same arguments give the same ids.

    `routing[shard]` is the index of a server. Wallets are numbered from 100 × `first_wallet`, which is how runs on one
    stack stay apart; `tag` does that for matches and keys. `now_s` is Unix seconds.
    """
    count = plan.stack.servers
    users = {}
    for index, wallet in enumerate(plan.wallets):
        server = index % count if wallet.server is None else wallet.server
        shards = shards_of_server(routing, server)
        users[wallet.name] = 100 * (first_wallet + index) + shards[index * 7 % len(shards)]
    rng = random.Random(f"{plan.seed}/{tag}")  # noqa: S311 - ids must be reproducible, not secret
    matches = {}
    for index, match in enumerate(plan.matches):
        server = index % count if match.server is None else match.server
        drawn = (UUID(int=rng.getrandbits(128), version=4) for _ in range(DRAWS_MAX))
        matches[match.name] = str(next(each for each in drawn if routing[shard_of_match(each)] == server))
    return Places(users, matches, f"p{plan.seed}{tag}-", int((now_s + CLOSES_AFTER_S) * 1000))


def command_of(step: "plans.Command", places: Places, key: str, outcomes: Sequence[str] = ()) -> Command:
    """Build the command of a step that needs nothing but the plan; `outcomes` are those of a match to create.

    Raises TypeError for a step that refers to an earlier one.
    """
    match step:
        case plans.Deposit():
            return workload.deposit(places.users[step.wallet], step.amount_minor, key)
        case plans.Withdraw():
            return workload.withdraw(places.users[step.wallet], step.amount_minor, key)
        case plans.Bet():
            return workload.bet(
                user=places.users[step.wallet],
                match_id=places.matches[step.match],
                selection=step.outcome,
                side=step.side,
                odds=step.odds,
                stake_minor=step.stake_minor,
                key=key,
            )
        case plans.Entries():
            return workload.entries(places.users[step.wallet], step.after_seq)
        case plans.CreateMatch():
            body = {"match_id": places.matches[step.match], "closes_at_ms": places.closes_at_ms}
            return _match_command("create_match", places.matches[step.match], key, body | {"outcomes": list(outcomes)})
        case plans.CloseMatch() | plans.VoidMatch():
            return _match_command(step.__struct_config__.tag, places.matches[step.match], key, {})
        case plans.SettleMatch():
            return _match_command("settle_match", places.matches[step.match], key, {"result": step.result}, step.result)
        case plans.ResettleMatch():
            body = {"result": step.result, "corrects_version": step.corrects_version}
            return _match_command("resettle_match", places.matches[step.match], key, body, step.result)
    raise TypeError(f"{type(step).__name__} refers to an earlier command")


def _match_command(op: object, match_id: str, key: str, body: dict[str, Any], selection: str | None = None) -> Command:
    name = str(op)
    path = "/v1/matches" if name == "create_match" else f"/v1/matches/{match_id}/{name.removesuffix('_match')}"
    return Command(name, path, key, msgspec.json.encode(body), match_id=match_id, selection=selection)
