"""What a plan is: a JSON or TOML file that says what clients do, what is broken, and what the run must show.

A file that names an unknown field, an impossible value, or a wallet, match, node or key that it does not have is
refused with the place of the mistake. docs/plans.md shows the format. Amounts are minor units, odds hundredths, times
are in their names.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from compose.errors import SpecError
from compose.state import StackSpec
from invariants.sometimes import COUNTERS
from reference.commands import DEFAULT_OUTCOMES, MAX_ODDS, MIN_ODDS, Outcome, Side
from reference.failpoints import Action
from reference.failpoints import Arm as ArmOrder

CLIENTS_MAX: Final = 64
STEPS_MAX: Final = 2_000
"""Steps of one client."""
TIMES_MAX: Final = 20_000
WAIT_S: Final = 30.0
WAIT_MAX_S: Final = 300.0
RUN_MAX_S: Final = 600.0
FAST_SETTINGS: Final[dict[str, Any]] = {
    "command_deadline_ms": 1000,
    "statement_timeout_ms": 2000,
    "reconcile_every_s": 15.0,
}
"""Settings of a plan's stack unless the plan names others: a run waits out these times before it believes its end."""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]*$", max_length=60)]
Amount = Annotated[int, Meta(ge=1, le=10**9)]
Odds = Annotated[int, Meta(ge=MIN_ODDS, le=MAX_ODDS)]
Index = Annotated[int, Meta(ge=0, le=15)]
Seconds = Annotated[float, Meta(gt=0, le=WAIT_MAX_S)]
Times = Annotated[int, Meta(ge=1, le=TIMES_MAX)]
Key = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]*$", max_length=100)]


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a plan: what it does not know it refuses."""


class _Step(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="do"):
    """One step of a client; `do` says which."""


class _Command(_Step, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What every command may say."""

    key: Key | None = None
    """Its idempotency key and the name by which later steps refer to it; <client>-<number of the step> if left out."""
    api: Index | None = None
    """The API process that is asked; drawn from the seed if left out."""
    expect: str | None = None
    """ok, replayed, refused, rejected, unknown, or an outcome as INSUFFICIENT_FUNDS: anything else makes the run
    INVALID, for it did not go as planned."""
    persist: bool = False
    """Repeat it (same key) until it is answered for good; a match command gets a new key after an unknown outcome."""


class Deposit(_Command, frozen=True, kw_only=True, tag="deposit"):
    """Money from outside into a wallet."""

    wallet: Name
    amount_minor: Amount


class Withdraw(_Command, frozen=True, kw_only=True, tag="withdraw"):
    """Money out of a wallet."""

    wallet: Name
    amount_minor: Amount


class Bet(_Command, frozen=True, kw_only=True, tag="bet"):
    """A bet; with `patience_ms` its client hangs up after that long."""

    wallet: Name
    match: Name
    side: Side
    odds: Odds
    stake_minor: Amount
    outcome: str = DEFAULT_OUTCOMES[0]
    grpc: bool = False
    patience_ms: Annotated[int, Meta(ge=1, le=10_000)] | None = None


class Cancel(_Command, frozen=True, kw_only=True, tag="cancel"):
    """Cancel the unmatched part of the bet with the key `bet`; left out while its answer is not known."""

    bet: Key


class Rollback(_Command, frozen=True, kw_only=True, tag="rollback"):
    """Take back the bet that was, or will be, placed under the key `bet`."""

    wallet: Name
    bet: Key


class CreateMatch(_Command, frozen=True, kw_only=True, tag="create_match"):
    """Open a match that is listed with `opened = false`."""

    match: Name


class CloseMatch(_Command, frozen=True, kw_only=True, tag="close_match"):
    """Take no more bets on a match."""

    match: Name


class SettleMatch(_Command, frozen=True, kw_only=True, tag="settle_match"):
    """Settle a closed match."""

    match: Name
    result: str = DEFAULT_OUTCOMES[0]


class VoidMatch(_Command, frozen=True, kw_only=True, tag="void_match"):
    """Call a match off."""

    match: Name


class ResettleMatch(_Command, frozen=True, kw_only=True, tag="resettle_match"):
    """Settle a settled match again; without `result` it becomes void."""

    match: Name
    corrects_version: Annotated[int, Meta(ge=1, le=1000)]
    result: str | None = None


class Balance(_Command, frozen=True, kw_only=True, tag="balance"):
    """Read a balance; `min_seq` is a number, or "seen" for the newest that this run has seen of the wallet."""

    wallet: Name
    consistency: Literal["eventual", "strong"] = "eventual"
    min_seq: Annotated[int, Meta(ge=0)] | Literal["seen"] | None = None


class Entries(_Command, frozen=True, kw_only=True, tag="entries"):
    """Read a page of a wallet's history."""

    wallet: Name
    after_seq: Annotated[int, Meta(ge=0)] = 0


class Retry(_Command, frozen=True, kw_only=True, tag="retry"):
    """Send the command with the key `of` again, same key and same body."""

    of: Key


class OtherBody(_Command, frozen=True, kw_only=True, tag="other_body"):
    """Send the command with the key `of` again with a larger amount: it must be refused."""

    of: Key
    more_minor: Amount = 10


Posting = Deposit | Withdraw | Bet
Command = (
    Deposit | Withdraw | Bet | Cancel | Rollback | CreateMatch | CloseMatch | SettleMatch | VoidMatch | ResettleMatch
    | Balance | Entries | Retry | OtherBody
)  # fmt: skip


class Race(_Step, frozen=True, kw_only=True, tag="race"):
    """Send one command, under one key, to several API processes at the same moment."""

    of: Posting
    apis: Annotated[tuple[Index, ...], Meta(min_length=2, max_length=8)] = (0, 1)


class Bulk(_Step, frozen=True, kw_only=True, tag="bulk"):
    """Send several commands in one request; a key may come twice in it."""

    commands: Annotated[list[Posting], Meta(min_length=1, max_length=1000)]
    api: Index | None = None


class Repeat(_Step, frozen=True, kw_only=True, tag="repeat"):
    """Send a command many times under keys ending in -0, -1, … , `at_once` of them at a time."""

    of: Posting
    times: Times
    at_once: Annotated[int, Meta(ge=1, le=256)] = 1
    wallets: list[Name] = []
    """In turn, instead of the command's own."""


class Kill(_Step, frozen=True, kw_only=True, tag="kill"):
    """SIGKILL a node, and go on when that was measured from outside."""

    node: Name


class Pause(_Step, frozen=True, kw_only=True, tag="pause"):
    """SIGSTOP a node, and go on when that was measured from outside."""

    node: Name


class Resume(_Step, frozen=True, kw_only=True, tag="resume"):
    """Let a paused node run, and go on when it was seen to answer."""

    node: Name


class Heal(_Step, frozen=True, kw_only=True, tag="heal"):
    """Start a dead node or let a paused one run, and go on when it does its work; without a node: all of them."""

    node: Name | None = None


class Arm(_Step, frozen=True, kw_only=True, tag="arm"):
    """Arm a failpoint of a node. One that never does anything makes the run INVALID, unless it `may_miss`."""

    node: Name
    point: str
    action: Action
    times: int | None = 1
    skip: int = 0
    delay_ms: int | None = None
    may_miss: bool = False

    def order(self) -> ArmOrder:
        """Return what the node is told. Raises ValueError."""
        return ArmOrder(self.point, self.action, self.times, self.skip, self.delay_ms)


class Disarm(_Step, frozen=True, kw_only=True, tag="disarm"):
    """Disarm a failpoint of a node, or all of them; what hangs there goes on."""

    node: Name
    point: str | None = None


class Signal(_Step, frozen=True, kw_only=True, tag="signal"):
    """Let every client go on that waits for this name."""

    name: Name


class Wait(_Step, frozen=True, kw_only=True, tag="wait"):
    """Wait until something is so; if it is not in time, the run is INVALID.

    drained; signal (name); running or dead (node); hit or fired (node, point, count); settled or closed (match);
    unknown (count): so many commands of this run have an unknown outcome.
    """

    until: Literal["drained", "signal", "running", "dead", "hit", "fired", "settled", "closed", "unknown"]
    node: Name | None = None
    point: str | None = None
    count: Times = 1
    match: Name | None = None
    name: Name | None = None
    timeout_s: Seconds = WAIT_S


class MoveShard(_Step, frozen=True, kw_only=True, tag="move_shard"):
    """Move the shard of a wallet to another server."""

    wallet: Name
    to: Index


Step = (
    Deposit | Withdraw | Bet | Cancel | Rollback | CreateMatch | CloseMatch | SettleMatch | VoidMatch | ResettleMatch
    | Balance | Entries | Retry | OtherBody | Race | Bulk | Repeat | Kill | Pause | Resume | Heal | Arm | Disarm
    | Signal | Wait | MoveShard
)  # fmt: skip


class Wallet(_Struct, frozen=True, kw_only=True):
    """A wallet of the plan; its first deposit is made before the clients begin."""

    name: Name
    deposit_minor: Annotated[int, Meta(ge=0, le=10**9)] = 100_000
    """0: none, the wallet begins empty."""
    server: Index | None = None
    """Index of the server that holds it; in turn if left out."""


class Match(_Struct, frozen=True, kw_only=True):
    """A match of the plan."""

    name: Name
    server: Index | None = None
    """Index of its home server; in turn if left out."""
    outcomes: Annotated[tuple[str, ...], Meta(min_length=2, max_length=64)] = DEFAULT_OUTCOMES
    opened: bool = True
    """Created before the clients begin."""
    ends: str = "leave"
    """What becomes of it after the clients if they did not settle it: leave, void, or the outcome that happened."""


class Client(_Struct, frozen=True, kw_only=True):
    """One client: its steps in order. Clients run at the same time."""

    name: Name
    steps: Annotated[list[Step], Meta(max_length=STEPS_MAX)]


class StackShape(_Struct, frozen=True, kw_only=True):
    """The stack that the plan needs."""

    servers: Annotated[int, Meta(ge=1, le=4)] = 1
    apis: Annotated[int, Meta(ge=1, le=4)] = 2
    relays: Annotated[int, Meta(ge=0, le=4)] = 1
    matchers: Annotated[int, Meta(ge=0, le=4)] = 1
    settlers: Annotated[int, Meta(ge=0, le=4)] = 1
    projectors: Annotated[int, Meta(ge=0, le=4)] = 1
    reconcilers: Annotated[int, Meta(ge=0, le=4)] = 1
    partitions: Annotated[int, Meta(ge=1, le=100)] = 4
    settings: dict[str, Any] = {}
    """Fields of the service's configuration."""

    def spec(self, *, keep: bool = False, base_port: int | None = None) -> StackSpec:
        """Return the stack to start."""
        shape = msgspec.structs.asdict(self) | {"settings": FAST_SETTINGS | self.settings}
        return StackSpec(**shape, keep=keep, base_port=base_port, failpoints=True)


class Requires(_Struct, frozen=True, kw_only=True):
    """What a run of the plan must show beyond that every rule holds; without it the run is INVALID."""

    operations: list[str] = []
    """Operations that must have succeeded; with `waive` of V01 these only, otherwise every one that was tried, and a
    deposit and a bet."""
    sometimes: list[str] = []
    waive: list[Literal["V01", "V02"]] = []
    """What only a campaign can be held to: that every operation succeeded, that faults left an outcome unknown."""


class Plan(_Struct, frozen=True, kw_only=True):
    """A whole plan."""

    title: str
    seed: Annotated[int, Meta(ge=0, le=2**53)] = 0
    stack: StackShape = StackShape()
    requires: Requires = Requires()
    wallets: Annotated[list[Wallet], Meta(max_length=1000)] = []
    matches: Annotated[list[Match], Meta(max_length=200)] = []
    clients: Annotated[list[Client], Meta(min_length=1, max_length=CLIENTS_MAX)]
    timeout_s: Annotated[float, Meta(gt=0, le=RUN_MAX_S)] = 120.0
    """All clients end within this, or the run is INVALID."""


class PlanError(Exception):
    """The file is no plan; the message says where and why."""


def load(path: Path) -> Plan:
    """Read a plan from a .toml or .json file. Raises PlanError, naming the file and the place of the mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plan {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return decode(text, toml=path.suffix == ".toml")
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def decode(text: str, *, toml: bool = False) -> Plan:
    """Read a plan from JSON or TOML. Raises PlanError."""
    try:
        plan = msgspec.convert(tomllib.loads(text) if toml else msgspec.json.decode(text), Plan)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(str(error)) from error
    except msgspec.ValidationError as error:
        raise PlanError(str(error)) from error
    except msgspec.DecodeError as error:
        raise PlanError(_with_line(str(error), text)) from error
    check(plan)
    return plan


def encode(plan: Plan) -> bytes:
    """Return a plan as JSON that people can read and `decode` reads back."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


def _with_line(message: str, text: str) -> str:
    """Say the line beside the byte that the decoder names."""
    _, sign, rest = message.partition("(byte ")
    if sign and rest.rstrip(")").isdecimal():
        line = text.encode()[: int(rest.rstrip(")"))].count(b"\n") + 1
        return f"{message}, line {line}"
    return message


# -- what the types cannot say ---------------------------------------------------------------------------


def keys_of(client: Client) -> list[list[str]]:
    """Return the keys under which each step of a client sends commands that others may refer to."""
    found: list[list[str]] = []
    for number, step in enumerate(client.steps):
        own = f"{client.name}-{number}"
        if isinstance(step, Repeat):
            found.append([f"{step.of.key or own}-{index}" for index in range(step.times)])
        elif isinstance(step, Race):
            found.append([step.of.key or own])
        elif isinstance(step, Bulk):
            found.append([command.key or f"{own}-{index}" for index, command in enumerate(step.commands)])
        elif isinstance(step, _Command):
            found.append([step.key or own])
        else:
            found.append([])
    return found


def check(plan: Plan) -> None:
    """Raise PlanError for what refers to nothing, and for what no run could do."""
    try:
        spec = plan.stack.spec()
    except SpecError as error:
        raise PlanError(f"$.stack: {error}") from error
    nodes = {name for name, _ in spec.nodes()}
    service = {name for name, kind in spec.nodes() if kind == "service"}
    known = _Known(
        plan=plan,
        wallets=_named("$.wallets", [wallet.name for wallet in plan.wallets]),
        matches=_named("$.matches", [match.name for match in plan.matches]),
        nodes=nodes,
        service=service,
        keys={key for client in plan.clients for keys in keys_of(client) for key in keys},
        signals={step.name for client in plan.clients for step in client.steps if isinstance(step, Signal)},
    )
    _named("$.clients", [client.name for client in plan.clients])
    for name in plan.requires.sometimes:
        if name not in COUNTERS:
            raise PlanError(f"$.requires.sometimes: there is no {name!r}; there are {', '.join(map(repr, COUNTERS))}")
    for index, wallet in enumerate(plan.wallets):
        _server(f"$.wallets[{index}].server", wallet.server, plan)
    for index, match in enumerate(plan.matches):
        _server(f"$.matches[{index}].server", match.server, plan)
        if match.ends not in {"leave", "void", *match.outcomes}:
            raise PlanError(f"$.matches[{index}].ends: leave, void or one of its outcomes, not {match.ends!r}")
    for number, client in enumerate(plan.clients):
        for index, step in enumerate(client.steps):
            known.check(f"$.clients[{number}].steps[{index}]", step)


def _named(place: str, names: list[str]) -> set[str]:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise PlanError(f"{place}[{index}].name: {name!r} is there already")
    return set(names)


def _server(place: str, server: int | None, plan: Plan) -> None:
    if server is not None and server >= plan.stack.servers:
        raise PlanError(f"{place}: the stack has {plan.stack.servers} servers, the first is 0, not {server}")


class _Known(msgspec.Struct, frozen=True):
    """What steps may refer to."""

    plan: Plan
    wallets: set[str]
    matches: set[str]
    nodes: set[str]
    service: set[str]
    keys: set[str]
    signals: set[str]

    def check(self, place: str, step: Step) -> None:
        """Raise PlanError for a step that refers to nothing."""
        inner = [("of", step.of)] if isinstance(step, Race | Repeat) else []
        if isinstance(step, Bulk):
            inner = [(f"commands[{index}]", command) for index, command in enumerate(step.commands)]
        for field, command in inner:
            self.check(f"{place}.{field}", command)
        self._refers(place, step, "wallet", self.wallets)
        self._refers(place, step, "match", self.matches)
        if isinstance(step, Repeat):
            for name in step.wallets:
                self._one_of(f"{place}.wallets", name, self.wallets)
        for field in ("bet", "of") if not isinstance(step, Race | Repeat) else ():
            self._refers(place, step, field, self.keys)
        self._refers(place, step, "node", self.service if isinstance(step, Arm | Disarm) else self.nodes)
        apis = [*getattr(step, "apis", ()), getattr(step, "api", None)]
        if any(api is not None and api >= self.plan.stack.apis for api in apis):
            raise PlanError(f"{place}: the stack has {self.plan.stack.apis} API processes, the first is 0")
        if isinstance(step, _Command):
            self._outcomes(place, step)
        if isinstance(step, Arm):
            try:
                step.order()
            except ValueError as error:
                raise PlanError(f"{place}: {error}") from error
        if isinstance(step, MoveShard):
            _server(f"{place}.to", step.to, self.plan)
        if isinstance(step, Wait):
            self._wait(place, step)

    def _outcomes(self, place: str, step: "_Command") -> None:
        expected = {None, "ok", "replayed", "refused", "rejected", "unknown", *(outcome.value for outcome in Outcome)}
        if step.expect not in expected:
            raise PlanError(f"{place}.expect: there is no {step.expect!r}")
        match = next((match for match in self.plan.matches if match.name == getattr(step, "match", None)), None)
        if isinstance(step, SettleMatch | ResettleMatch) and match and step.result not in {None, *match.outcomes}:
            raise PlanError(f"{place}.result: {match.name} has the outcomes {', '.join(match.outcomes)}")

    def _wait(self, place: str, step: Wait) -> None:
        needs = {
            "signal": ("name",), "running": ("node",), "dead": ("node",), "hit": ("node", "point"),
            "fired": ("node", "point"), "settled": ("match",), "closed": ("match",),
        }.get(step.until, ())  # fmt: skip
        for field in ("name", "node", "point", "match"):
            if (getattr(step, field) is not None) != (field in needs):
                must = "needs" if field in needs else "has no"
                raise PlanError(f"{place}: waiting until {step.until} {must} {field!r}")
        if step.until == "signal":
            self._one_of(f"{place}.name", step.name or "", self.signals)
        if step.point is not None:
            try:
                ArmOrder(step.point, "exit")
            except ValueError as error:
                raise PlanError(f"{place}.point: {error}") from error
            self._one_of(f"{place}.node", step.node or "", self.service)

    def _refers(self, place: str, step: Step, field: str, to: set[str]) -> None:
        name = getattr(step, field, None)
        if name is not None:
            self._one_of(f"{place}.{field}", name, to)

    def _one_of(self, place: str, name: str, names: set[str]) -> None:
        if name not in names:
            some = ", ".join(sorted(names)[:12]) or "none"
            raise PlanError(f"{place}: {name!r} is not in the plan; there are {some}")
