"""Fate belongs to the key: every mix of attempts has one fate, and the final state resolves every unknown key."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import polars as pl
import pytest
from honest_world import ANN, BOB, CYD, DEE, M_OPEN, World, frames, server_of_user, small_world
from hypothesis import given, settings
from hypothesis import strategies as st

from invariants import fates, history
from invariants.fates import Fate, Resolution, choose_retries, described, late_effects, resolve
from invariants.history import FINAL_RETRY
from invariants.snapshot import Snapshot
from invariants.verdict import Verdict, judge

ROUTES = {shard: "pg0" if shard < 50 else "pg1" for shard in range(100)}

ANSWERS: dict[str, tuple[str, int | None, str | None]] = {
    "ok": ("ok", 202, "ACCEPTED"),
    "refused": ("fail", 422, "INSUFFICIENT_FUNDS"),
    "other_body": ("fail", 409, "REPLAYED_DIFFERENTLY"),
    "not_admitted": ("fail", 503, None),
    "rate_limited": ("fail", 429, None),
    "timeout": ("info", None, None),
    "gateway": ("info", 504, None),
}


@dataclass(frozen=True)
class Try:
    user: int
    key: str
    amount: int
    answer: str


def fates_of(tries: list[Try]) -> dict[tuple[int, str], str]:
    w = World()
    for one in tries:
        attempt = w.invoke("deposit", user=one.user, key=one.key, amount=one.amount)
        record, status, outcome = ANSWERS[one.answer]
        w.complete(attempt, record, status=status, outcome=outcome)
    rows = fates.fates(w.run().attempts)
    return {(row["user"], row["key"]): row["fate"] for row in rows.iter_rows(named=True)}


TRIES = st.lists(
    st.builds(
        Try, st.sampled_from([7, 8]), st.sampled_from("ab"), st.sampled_from([1, 2]), st.sampled_from([*ANSWERS])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(TRIES)
def test_fate_is_that_of_the_most_certain_attempt(tries: list[Try]) -> None:
    by_key: dict[tuple[int, str], list[str]] = defaultdict(list)
    for one in tries:
        by_key[one.user, one.key].append(one.answer)

    def fate(answers: list[str]) -> str:
        if "ok" in answers:
            return "MUST"
        if "refused" in answers:
            return "MUST_NOT"
        return "MAY" if {"timeout", "gateway"} & set(answers) else "MUST_NOT"

    assert fates_of(tries) == {key: fate(answers) for key, answers in by_key.items()}


@settings(max_examples=50, deadline=None)
@given(TRIES, st.randoms(use_true_random=False))
def test_fate_does_not_depend_on_the_order_of_attempts(tries: list[Try], random: Any) -> None:
    shuffled = list(tries)
    random.shuffle(shuffled)
    assert fates_of(tries) == fates_of(shuffled)


def test_unanswered_other_body_does_not_poison_an_acknowledged_key() -> None:
    w = World()
    w.deposit(ANN, 100, "k")
    attempt = w.invoke("deposit", user=ANN, key="k", amount=999, tag="other_body")
    w.complete(attempt, "info", status=504)
    row = fates.fates(w.run().attempts).row(0, named=True)
    assert (row["fate"], row["amount"], row["infos"], row["oks"]) == ("MUST", 100, 1, 1)


def test_same_key_of_two_users_is_two_keys() -> None:
    assert fates_of([Try(7, "k", 1, "ok"), Try(8, "k", 1, "refused")]) == {(7, "k"): "MUST", (8, "k"): "MUST_NOT"}


def test_cancel_and_bet_under_one_key_are_two_keys() -> None:
    w = World()
    w.complete(w.invoke("cancel", user=ANN, key="k", bet_id="b"), "ok", status=202)
    w.complete(w.invoke("deposit", user=ANN, key="k", amount=1), "info")
    rows = fates.fates(w.run().attempts)
    assert dict(zip(rows["family"], rows["fate"], strict=True)) == {"cancel": "MUST", "ledger": "MAY"}


def test_unknown_bet_binds_no_cancel_key() -> None:
    w = World()
    w.complete(w.invoke("cancel", user=ANN, key="k", bet_id="b"), "info")
    w.complete(w.invoke("cancel", user=ANN, key="k", bet_id="b"), "fail", status=422, outcome="UNKNOWN_BET")
    assert fates.fates(w.run().attempts)["fate"].to_list() == ["MAY"]


def test_match_commands_are_keyed_by_match_and_operation() -> None:
    w = World()
    w.complete(w.invoke("close_match", match_id=M_OPEN, key="k1"), "info")
    w.complete(w.invoke("close_match", match_id=M_OPEN, key="k2"), "ok", status=202)
    w.complete(w.invoke("void_match", match_id=M_OPEN, key="k3"), "fail", status=422, outcome="ILLEGAL_TRANSITION")
    rows = fates.fates(w.run().attempts)
    assert dict(zip(rows["key"], rows["fate"], strict=True)) == {
        f"close_match:{M_OPEN}": "MUST",
        f"void_match:{M_OPEN}": "MUST_NOT",
    }


def test_reads_have_no_fate() -> None:
    w = small_world()
    assert set(fates.fates(w.run().attempts)["op"]) & set(fates.READ_OPS) == set()


# -- resolution


def resolutions(w: World) -> dict[str, str]:
    rows = w.run().resolution
    return dict(zip(rows["key"], rows["resolution"], strict=True))


def test_unknown_keys_of_the_small_world_resolve() -> None:
    assert resolutions(small_world()) == {
        "lost-answer": "applied",
        "never-arrived": "not_applied",
        "o-lay": "applied",
    }


def test_stored_refusal_whose_answer_was_lost_resolves_as_refused() -> None:
    w = small_world()
    w.refuse("withdraw", DEE, 10**9, "lost-refusal")
    w.history[-1] = {k: w.history[-1][k] for k in ("attempt", "t")} | {"record": "info"}
    assert resolutions(w)["lost-refusal"] == "refused"
    assert judge(w.run()).verdict is Verdict.PASS


def test_entry_and_refusal_under_one_key_cannot_be_resolved() -> None:
    w = small_world()
    w.tables["refusals"].append(
        {"server": "pg0", "shard": ANN, "user_id": ANN, "idempotent_key": "lost-answer", "outcome": "MATCH_CLOSED"}
    )
    assert resolutions(w)["lost-answer"] == "unresolved"
    judgement = judge(w.run())
    # It is a fault of the ledger, whatever the client would have been told.
    assert (judgement.unresolved, judgement.verdict) == (1, Verdict.INVARIANT_VIOLATED)
    assert [(witness.code, witness.key) for witness in judgement.witnesses] == [("A04", "lost-answer")]


def test_key_of_a_server_nobody_read_cannot_be_resolved() -> None:
    w = small_world()
    only_pg0 = {name: [r for r in rows if r.get("server") != "pg1"] for name, rows in w.tables.items()}
    rows = resolve(w.run().fates, Snapshot("half", None, frames(only_pg0)), ROUTES)
    assert dict(zip(rows["key"], rows["resolution"], strict=True)) == {
        "lost-answer": "applied",
        "never-arrived": "unresolved",
        "o-lay": "unresolved",
    }


@pytest.mark.parametrize(
    ("outcome", "expected"), [("ACCEPTED", "applied"), ("NOTHING_TO_CANCEL", "refused"), (None, "not_applied")]
)
def test_unknown_cancel_is_resolved_by_its_row(outcome: str | None, expected: str) -> None:
    w = small_world()
    row = w.tables["cancels"].pop() | {"outcome": outcome}
    if outcome is not None:
        w.tables["cancels"].append(row)
    w.answers_to("cancel-1")[0].update(record="info", status=504, outcome=None)
    assert resolutions(w)["cancel-1"] == expected


def test_unknown_match_commands_are_resolved_by_transitions() -> None:
    w = small_world()
    for op in ("close_match", "void_match", "create_match"):
        w.complete(w.invoke(op, match_id=M_OPEN, key=op), "info")
    w.forget(key=f"create-{M_OPEN}")
    found = resolutions(w)
    assert found[f"create_match:{M_OPEN}"] == "applied"
    assert found[f"close_match:{M_OPEN}"] == "not_applied"
    assert found[f"void_match:{M_OPEN}"] == "not_applied"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 200), st.booleans(), st.booleans()), min_size=1, max_size=30, unique_by=lambda x: x[0]
    )
)
def test_every_unknown_key_is_classified_by_what_is_stored(plan: list[tuple[int, bool, bool]]) -> None:
    w = World()
    for server_user in (1, 99):
        w.deposit(server_user, 1, "seed")
    for user, applied, refused in plan:
        w.complete(w.invoke("deposit", user=user, key="k", amount=5), "info")
        if applied:
            w.post(user, "CREDIT", 5, "EXTERNAL", "k")
        elif refused:
            w.tables["refusals"].append(
                {
                    "server": server_of_user(user),
                    "shard": user % 100,
                    "user_id": user,
                    "idempotent_key": "k",
                    "outcome": "X",
                }
            )
    rows = w.run().resolution
    found = {(u, k): r for u, k, r in rows.select("user", "key", "resolution").iter_rows() if k == "k"}
    expected = {
        (user, "k"): "applied" if applied else "refused" if refused else "not_applied"
        for user, applied, refused in plan
    }
    assert found == expected


# -- retries and the second snapshot


def test_half_of_the_resolved_keys_is_chosen_by_the_seed() -> None:
    w = World()
    for number in range(40):
        w.complete(w.invoke("deposit", user=7, key=f"k{number}", amount=5), "info")
    w.deposit(7, 1, "seed")
    resolution = w.run().resolution
    chosen = choose_retries(resolution, seed=3)
    assert chosen.height == 20
    assert chosen.equals(choose_retries(resolution, seed=3))
    assert not chosen.equals(choose_retries(resolution, seed=4))
    assert set(chosen["key"]) <= set(resolution["key"])
    assert {"op", "user", "key", "amount", "match_id", "bet_id", "selection", "side", "odds", "resolution"} <= set(
        chosen.columns
    )


def test_unresolved_and_match_keys_are_not_sent_again() -> None:
    w = World()
    w.tables["routes"].clear()  # no server was read
    w.complete(w.invoke("close_match", match_id=M_OPEN, key="c"), "info")
    w.complete(w.invoke("deposit", user=7, key="k", amount=5), "info")
    assert w.run().resolution["resolution"].to_list().count(Resolution.UNRESOLVED.value) == 1
    assert choose_retries(w.run().resolution, seed=1).is_empty()


def retried(w: World, key: str, *, applied: bool) -> None:
    """Send a key again after the first snapshot, as an honest service answers it."""
    w.snapshot_again()
    assert w.second is not None
    first, w.tables = w.tables, w.second
    original = next(r for r in w.history if r["record"] == "invoke" and r.get("key") == key)
    if not applied:
        w.post(original["user"], "CREDIT", original["amount"], "EXTERNAL", key)
        w.derive()
    w.replay(key)
    w.history[-2]["tag"] = FINAL_RETRY
    w.history[-1]["replayed"] = applied
    w.tables, w.second = first, w.tables


@pytest.mark.parametrize(("key", "applied"), [("lost-answer", True), ("never-arrived", False)])
def test_honest_final_retry_is_silent(key: str, applied: bool) -> None:
    w = small_world()
    retried(w, key, applied=applied)
    judgement = judge(w.run())
    assert (judgement.reasons, judgement.verdict) == ([], Verdict.PASS)
    assert judgement.sometimes["an info resolved as applied"] == 2
    assert judgement.sometimes["an info resolved as not applied"] == 1
    assert judgement.sometimes["commit succeeded and the answer was lost"] == 2


def test_applied_key_whose_retry_is_not_called_a_replay_diverges() -> None:
    w = small_world()
    retried(w, "lost-answer", applied=True)
    w.history[-1]["replayed"] = False
    judgement = judge(w.run())
    assert {code for code, count in judgement.anomalies.items() if count} == {"A05"}
    assert judgement.witnesses[0].key == "lost-answer"


def test_applied_key_whose_retry_adds_a_row_is_a_duplicate() -> None:
    w = small_world()
    retried(w, "lost-answer", applied=False)
    judgement = judge(w.run())
    assert judgement.anomalies["A02"] == 1


def test_effect_that_appears_after_the_first_snapshot_unasked_is_unresolved() -> None:
    w = small_world()
    w.snapshot_again()
    assert w.second is not None
    first, w.tables = w.tables, w.second
    w.post(BOB, "CREDIT", 444, "EXTERNAL", "never-arrived")
    w.derive()
    w.tables, w.second = first, w.tables
    judgement = judge(w.run())
    assert (judgement.unresolved, judgement.verdict) == (1, Verdict.INVALID)
    run = w.run()
    late = late_effects(run.first_resolution, run.resolution, run.attempts.head(0))
    assert late["key"].to_list() == ["never-arrived"]


def test_described_names_the_request_without_a_hash() -> None:
    w = World()
    for amount in (5, 5, 6):
        w.complete(w.invoke("deposit", user=CYD, key="k", amount=amount), "info")
    for row in w.history:
        row["payload_hash"] = None
    bodies = described(history.attempts(w.run().recording.frame))["body"].to_list()
    assert bodies[0] == bodies[1] != bodies[2]


def test_fate_names_are_those_of_the_specification() -> None:
    assert [fate.value for fate in Fate] == ["MUST", "MAY", "MUST_NOT"]
    assert pl.Series([fate.value for fate in Fate]).is_unique().all()
