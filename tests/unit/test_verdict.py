"""Nothing unproven is green: every kind of missing proof has its verdict and its reason."""

import itertools
from collections.abc import Callable

import pytest
from honest_world import ANN, BOB, M_SETTLED, M_VOID, World, frame, small_world

from invariants.anomalies import Check, Found
from invariants.history import SCHEMA, LoadReport
from invariants.run import Run
from invariants.sometimes import COUNTERS
from invariants.verdict import Judgement, Verdict, judge, worst


def fired(judgement: Judgement) -> set[str]:
    return {code for code, count in judgement.anomalies.items() if count}


# -- the lattice


def test_exit_codes_are_those_of_the_specification() -> None:
    assert {v.name: int(v) for v in Verdict} == {
        "PASS": 0,
        "SLA_MISSED": 10,
        "INVARIANT_VIOLATED": 20,
        "INVALID": 30,
        "ABORTED": 40,
        "RESIDUE": 50,
    }


def test_only_pass_and_nothing_else_is_green() -> None:
    for parts in itertools.product(Verdict, repeat=2):
        assert (worst(parts) is Verdict.PASS) == (set(parts) == {Verdict.PASS})


def test_witnessed_violation_is_never_hidden() -> None:
    for other in Verdict:
        assert worst([other, Verdict.INVARIANT_VIOLATED]) is Verdict.INVARIANT_VIOLATED


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], Verdict.PASS),
        ([Verdict.SLA_MISSED, Verdict.INVALID], Verdict.INVALID),
        ([Verdict.ABORTED, Verdict.INVALID], Verdict.ABORTED),
        ([Verdict.RESIDUE, Verdict.INVALID], Verdict.INVALID),
        ([Verdict.RESIDUE, Verdict.SLA_MISSED], Verdict.RESIDUE),
    ],
)
def test_worst_wins(parts: list[Verdict], expected: Verdict) -> None:
    assert worst(parts) is expected
    assert worst(reversed(parts)) is expected


# -- a checker that fails


def broken(run: Run) -> Found:
    raise ZeroDivisionError(f"no rows in {run.final.name}")


def test_checker_that_raises_makes_the_run_invalid_and_is_named() -> None:
    judgement = judge(small_world().run(), {"A99": Check("A99", "broken", broken, rests_on_absence=False)})
    assert judgement.verdict is Verdict.INVALID
    assert judgement.anomalies == {}
    assert judgement.unchecked == {"A99": "broken raised ZeroDivisionError: no rows in snapshot-1"}
    assert judgement.reasons == ["A99 could not be checked: broken raised ZeroDivisionError: no rows in snapshot-1"]


def test_missing_snapshot_is_invalid_and_never_raises() -> None:
    run = small_world().run()
    empty = Run(
        config=run.config,
        recording=run.recording,
        timeline_rows=run.timeline,
        series_rows=run.series,
        first=type(run.first)("snapshot-1", None),
        second=None,
    )
    judgement = judge(empty)
    assert judgement.verdict is Verdict.INVALID
    assert judgement.anomalies["V05"] > 0
    assert "A01" in judgement.unchecked


# -- V01 to V06


def operation_never_succeeded(w: World) -> None:
    w.complete(w.invoke("void_match", match_id=M_SETTLED, key="v"), "fail", status=422, outcome="ILLEGAL_TRANSITION")
    for row in w.history:
        if row["record"] == "ok" and w.invoke_of(row["attempt"])["op"] == "entries":
            row["record"] = "fail"
    w.complete(w.invoke("entries", user=ANN), "fail", status=404)


def nothing_was_attempted(w: World) -> None:
    w.history.clear()
    for rows in w.tables.values():
        rows.clear()


def no_unknown_outcome(w: World) -> None:
    w.forget(key="never-arrived")
    for row in w.history:
        if row["record"] == "info":
            entry = w.entry(w.invoke_of(row["attempt"])["key"])
            row |= {"record": "ok", "seq": entry["seq"], "balance": entry["balance_snapshot"], "replayed": False}


def only_unknown_outcomes_are_hang_ups(w: World) -> None:
    no_unknown_outcome(w)
    w.complete(w.invoke("deposit", user=BOB, amount=444, key="hung-up", tag="impatient"), "info", error="timeout")


def fault_never_measured(w: World) -> None:
    w.timeline.append({"t": 1.0, "kind": "fault_requested", "node": "redis", "fault": "pause", "fault_id": 2})


def fault_that_never_ended(w: World) -> None:
    fault_never_measured(w)
    w.timeline.append({"t": 1.1, "kind": "fault_start", "node": "redis", "fault": "pause", "fault_id": 2})


def fault_measured_backwards(w: World) -> None:
    fault_that_never_ended(w)
    w.timeline.append({"t": 1.05, "kind": "fault_end", "node": "redis", "fault": "pause", "fault_id": 2})


def required_sometimes_never_happened(w: World) -> None:
    w.required_sometimes = ["two faults overlapped", "a retry replayed"]


def server_without_ledger_rows(w: World) -> None:
    w.tables["ledger"] = [r for r in w.tables["ledger"] if r["server"] != "pg1"]


def kafka_read_with_a_hole(w: World) -> None:
    crowded = next(k for k in w.tables["kafka"] if k["topic"] == "wallet.posted" and k["offset"] == 1)
    w.tables["kafka"].remove(crowded)


def kafka_retention_dropped_the_start(w: World) -> None:
    for record in w.tables["kafka"]:
        record["offset"] += 10


def completion_without_invoke(w: World) -> None:
    w.complete(10_000, "ok", status=200)


def attempt_completed_twice(w: World) -> None:
    w.history.append(dict(w.history[-1]))


def attempt_numbered_twice(w: World) -> None:
    w.history.append(dict(w.history[0]))


def clock_went_back(w: World) -> None:
    next(r for r in w.history if r["record"] == "ok" and r["attempt"] == 5)["t"] = 0.001


def wall_clock_instead_of_monotonic(w: World) -> None:
    for row in w.history:
        row["t"] += 1_700_000_000


@pytest.mark.parametrize(
    ("code", "defect"),
    [
        ("V01", operation_never_succeeded),
        ("V01", nothing_was_attempted),
        ("V02", no_unknown_outcome),
        ("V02", only_unknown_outcomes_are_hang_ups),
        ("V03", fault_never_measured),
        ("V03", fault_that_never_ended),
        ("V03", fault_measured_backwards),
        ("V04", required_sometimes_never_happened),
        ("V05", server_without_ledger_rows),
        ("V05", kafka_read_with_a_hole),
        ("V05", kafka_retention_dropped_the_start),
        ("V06", completion_without_invoke),
        ("V06", attempt_completed_twice),
        ("V06", attempt_numbered_twice),
        ("V06", clock_went_back),
        ("V06", wall_clock_instead_of_monotonic),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_defect_of_the_proof_makes_the_run_invalid(code: str, defect: Callable[[World], None]) -> None:
    world = small_world()
    defect(world)
    judgement = judge(world.run())
    assert code in fired(judgement)
    assert judgement.verdict is not Verdict.PASS
    assert any(w.code == code and w.text for w in judgement.witnesses)
    assert any(reason.startswith(code) for reason in judgement.reasons)


@pytest.mark.parametrize(
    "defect", [fault_never_measured, no_unknown_outcome, required_sometimes_never_happened, operation_never_succeeded]
)
def test_clean_ledger_with_a_defect_of_the_proof_is_invalid_and_not_violated(defect: Callable[[World], None]) -> None:
    world = small_world()
    defect(world)
    assert judge(world.run()).verdict is Verdict.INVALID


def test_run_without_faults_needs_no_unknown_outcome() -> None:
    world = small_world()
    no_unknown_outcome(world)
    world.timeline.clear()
    assert judge(world.run()).verdict is Verdict.PASS


def damaged(world: World) -> Run:
    """Return the run with a history part missing."""
    run = world.run()
    return Run(
        config=run.config,
        recording=LoadReport(frame=frame(world.history, SCHEMA), missing=["part-000003.parquet"]),
        timeline_rows=run.timeline,
        series_rows=run.series,
        first=run.first,
        second=None,
    )


def test_phantom_in_a_damaged_recording_is_invalid_and_not_a_violation() -> None:
    world = small_world()
    world.forget(key="out-1")
    judgement = judge(damaged(world))
    assert {"A03", "V06"} <= fired(judgement)
    assert judgement.verdict is Verdict.INVALID


def test_duplicate_in_a_damaged_recording_is_still_a_violation() -> None:
    world = small_world()
    row = next(r for r in world.tables["ledger"] if r["type"] == "PAYOUT")
    world.tables["ledger"].append(row | {"idempotent_key": "ledger:again"})
    judgement = judge(damaged(world))
    assert {"A27", "V06"} <= fired(judgement)
    assert judgement.verdict is Verdict.INVARIANT_VIOLATED


# -- sometimes


def test_small_world_shows_its_sometimes() -> None:
    shown = judge(small_world().run()).sometimes
    assert set(shown) == set(COUNTERS)
    assert {name: count for name, count in shown.items() if count} == {
        "an info resolved as applied": 2,
        "an info resolved as not applied": 1,
        "a retry replayed": 1,
        "same key with another body refused": 1,
        "commit succeeded and the answer was lost": 2,
        "a bet arrived while its match closed": 1,
        "a settled match was settled again": 3,
        "a wallet had spent what a correction took back": 3,
    }


def test_same_key_raced_on_two_processes_is_counted_only_when_it_overlapped() -> None:
    world = small_world()
    attempts = {r["attempt"]: r for r in world.history if r["record"] == "invoke" and r.get("key") == "out-1"}
    _, second, _ = attempts
    attempts[second]["t"] -= 0.015
    assert judge(world.run()).sometimes["same key raced on two API processes"] == 1


def test_kill_between_commit_and_answer_is_counted() -> None:
    world = small_world()
    request = next(r for r in world.history if r.get("key") == "lost-answer")
    for row in world.timeline:
        if row["kind"] == "fault_start":
            row["t"] = request["t"] + 0.005
        elif row["kind"] == "fault_requested":
            row["t"] = request["t"] - 0.005
    assert judge(world.run()).sometimes["server killed between commit and answer"] == 1
    request["tag"] = "impatient"
    assert judge(world.run()).sometimes["server killed between commit and answer"] == 0


def test_overlapping_faults_settle_and_void_backlog_and_contention_are_counted() -> None:
    world = small_world()
    for kind, t in (("fault_requested", 0.55), ("fault_start", 0.7), ("fault_end", 1.0)):
        world.timeline.append({"t": t, "kind": kind, "node": "redis", "fault": "pause", "fault_id": 2})
    settle = world.invoke("settle_match", match_id=M_VOID, selection="HOME", key="race-1")
    void = world.invoke("void_match", match_id=M_VOID, key="race-2")
    world.complete(settle, "fail", status=422, outcome="ILLEGAL_TRANSITION")
    world.complete(void, "ok", status=202, outcome="ACCEPTED", replayed=True)
    first = world.invoke("withdraw", user=BOB, amount=10**9, key="c-1")
    world.refuse("withdraw", BOB, 10**9, "c-2")
    world.refuse("withdraw", BOB, 10**9, "c-1")
    world.forget(attempt=world.history[-1]["attempt"])
    world.complete(first, "fail", status=422, outcome="INSUFFICIENT_FUNDS", replayed=False)
    for t, value in ((1.0, 10_001.0), (2.0, 0.0)):
        world.series.append({"t": t, "name": "outbox_unpublished", "node": "pg0", "value": value})
    judgement = judge(world.run())
    assert judgement.verdict is Verdict.PASS
    assert judgement.sometimes["two faults overlapped"] == 1
    assert judgement.sometimes["settle and void raced"] == 1
    assert judgement.sometimes["funds refused under contention"] == 2
    assert judgement.sometimes["backlog over 10000 then drained"] == 1


def test_relay_death_counts_only_with_a_dead_relay() -> None:
    world = small_world()
    world.send(world.tables["outbox"][0])
    assert judge(world.run()).sometimes["relay died between send and mark"] == 0
    world.timeline.append({"t": 1.0, "kind": "process_death", "node": "relay0"})
    assert judge(world.run()).sometimes["relay died between send and mark"] == 1
