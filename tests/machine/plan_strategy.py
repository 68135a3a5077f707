"""Draws plans for Hypothesis: small worlds with clients, faults and failpoints, built so that they shrink to few steps.

References to earlier commands are drawn as "how many commands back", so that leaving a step out leaves the others
meaningful; one that refers to nothing any more is left out too.
"""

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from ledgerproof.plan import format as plans
from reference.commands import Side

WALLETS = ("anna", "ben", "cleo")
MATCHES = ("final", "derby")
SHAPE = plans.StackShape(servers=2)
"""The stack that every drawn plan runs on."""

POINTS = {
    "api0": (
        "api.after_commit_before_ack",
        "api.after_admit_before_handle",
        "writer.before_post",
        "writer.after_commit_before_deliver",
        "writer.before_replay_answers",
        "desk.after_check_before_submit",
        "desk.after_transition_before_forget",
        "cache.before_get",
        "reads.before_fill",
    ),
    "relay0": (
        "relay.after_read_before_send",
        "relay.after_send_before_mark",
        "relay.after_mark_before_next",
        "publisher.before_send",
        "publisher.after_send_before_ack",
    ),
    "matcher0": (
        "consumer.before_effect",
        "consumer.after_effect_before_offset",
        "matcher.after_lock_before_write",
        "matcher.before_commit",
        "matcher.after_commit_before_cache",
    ),
    "settler0": (
        "consumer.after_effect_before_offset",
        "settler.before_page",
        "settler.between_bets",
        "settler.after_pay_before_mark",
        "settler.before_finish",
        "settler.before_refund",
    ),
    "projector0": (
        "consumer.after_effect_before_offset",
        "projector.after_apply_before_cache",
        "projector.after_cache_before_tell",
        "projector.before_report",
        "cache.before_set",
    ),
}
"""Where drawn plans make a process fail. A point that the steps of the plan do not reach does nothing."""
KILLED = ("pg0", "pg1", "api0", "relay0", "matcher0", "settler0", "projector0")

Draft = Callable[[list[str]], plans.Step | None]
"""A step once the keys of the client's earlier commands are known, oldest first; None if it refers to nothing."""

wallets = st.sampled_from(WALLETS)
matches = st.sampled_from(MATCHES)
amounts = st.integers(1, 400).map(lambda tens: 10 * tens)


def _plain(kind: Callable[..., plans.Step], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Draft]:
    def draft(values: dict[str, Any]) -> Draft:
        return lambda _keys: kind(**values)

    return st.fixed_dictionaries(fields).map(draft)


def _about(kind: Callable[..., plans.Step], field: str, **fixed: Any) -> st.SearchStrategy[Draft]:
    """A step about an earlier command of the same client."""

    def draft(back: int) -> Draft:
        return lambda keys: kind(**{field: keys[-back]}, **fixed) if len(keys) >= back else None

    return st.integers(1, 4).map(draft)


bets = st.fixed_dictionaries(
    {
        "wallet": wallets,
        "match": matches,
        "side": st.sampled_from(list(Side)),
        "odds": st.sampled_from((200, 150, 320)),
        "stake_minor": amounts,
    }
)
transfers = st.fixed_dictionaries({"wallet": wallets, "amount_minor": amounts})

ordinary: st.SearchStrategy[Draft] = st.one_of(
    _plain(plans.Deposit, wallet=wallets, amount_minor=amounts),
    bets.map(lambda values: lambda _keys: plans.Bet(**values)),
    _plain(plans.Withdraw, wallet=wallets, amount_minor=amounts),
    _about(plans.Retry, "of"),
    bets.map(lambda values: lambda _keys: plans.Race(of=plans.Bet(**values))),
    transfers.map(lambda values: lambda _keys: plans.Race(of=plans.Deposit(**values))),
    _about(plans.Cancel, "bet"),
    _plain(plans.Balance, wallet=wallets, consistency=st.sampled_from(("eventual", "strong")), min_seq=st.just("seen")),
    _plain(plans.Entries, wallet=wallets),
    st.lists(bets, min_size=1, max_size=4).map(
        lambda many: lambda _keys: plans.Bulk(commands=[plans.Bet(**values) for values in many])
    ),
    st.tuples(bets, st.integers(2, 12)).map(
        lambda drawn: lambda _keys: plans.Repeat(of=plans.Bet(**drawn[0]), times=drawn[1], at_once=4)
    ),
    _plain(plans.CloseMatch, match=matches),
    _plain(plans.SettleMatch, match=matches, result=st.sampled_from(("HOME", "DRAW"))),
    _plain(plans.VoidMatch, match=matches),
)
"""Steps of clients."""

points = st.one_of(*(st.tuples(st.just(node), st.sampled_from(names)) for node, names in POINTS.items()))


@st.composite
def _failpoint(draw: st.DrawFn) -> list[plans.Step]:
    """A failpoint, armed once, whether or not the plan gets there; a killed process is brought back at the end."""
    node, point = draw(points)
    action = draw(st.sampled_from(("exit", "raise", "delay")))
    delay_ms = draw(st.integers(1, 300)) if action == "delay" else None
    skip = draw(st.integers(0, 2))
    return [plans.Arm(node=node, point=point, action=action, skip=skip, delay_ms=delay_ms, may_miss=True)]


killed = st.sampled_from(KILLED).map(lambda node: [plans.Kill(node=node), plans.Heal(node=node)])
paused = st.sampled_from(("redis", "projector0", "api0")).map(
    lambda node: [plans.Pause(node=node), plans.Heal(node=node)]
)
troubles = st.lists(st.one_of(_failpoint(), killed, paused), max_size=2)


def client_of(name: str, drafts: Sequence[Draft]) -> plans.Client:
    """Return a client whose steps refer to those before them."""
    steps: list[plans.Step] = []
    for draft in drafts:
        keys = [key for each in plans.keys_of(plans.Client(name=name, steps=steps)) for key in each]
        step = draft(keys)
        if step is not None:
            steps.append(step)
    return plans.Client(name=name, steps=steps)


@st.composite
def plans_drawn(draw: st.DrawFn, steps_max: int = 8) -> plans.Plan:
    """A plan: two clients at most, trouble beside them, and what becomes of the matches after them."""
    clients = [client_of("a", draw(st.lists(ordinary, max_size=steps_max)))]
    second = client_of("b", draw(st.lists(ordinary, max_size=steps_max)))
    trouble = [step for group in draw(troubles) for step in group]
    if second.steps:
        clients.append(second)
    if trouble:
        # Armed points come first, so that they are there when the clients begin; the rest happens beside them.
        clients.insert(0, plans.Client(name="nemesis", steps=trouble))
    ends = draw(st.lists(st.sampled_from(("HOME", "void", "leave")), min_size=len(MATCHES), max_size=len(MATCHES)))
    plan = plans.Plan(
        title="drawn",
        seed=draw(st.integers(0, 9)),
        stack=SHAPE,
        requires=plans.Requires(waive=["V01", "V02"]),
        wallets=[plans.Wallet(name=name, deposit_minor=20_000) for name in WALLETS],
        matches=[plans.Match(name=name, ends=end) for name, end in zip(MATCHES, ends, strict=True)],
        clients=clients,
    )
    plans.check(plan)
    return plan


def steps_in(plan: plans.Plan) -> int:
    """Return how many steps the clients of a plan have."""
    return sum(len(client.steps) for client in plan.clients)
