"""The replay judge: silent on an honest run, and of one mind with the columns on every planted and random bug."""

from random import Random

import pytest
from honest_world import small_world
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutated
from test_anomalies import BUGS, Bug, name_of

from invariants.anomalies import CHECKS
from invariants.judges import COLUMNS, JUDGES, Disagreement, Opinion, disagreements, replay
from invariants.run import Run
from invariants.snapshot import Snapshot

PLANTED = [(code, bug) for code, bug, *_ in BUGS]


def columns(run: Run) -> Opinion:
    return Opinion({code: CHECKS[code].find(run).subjects for code in replay.RULES})


def differences(run: Run) -> list[Disagreement]:
    opinion = replay.judge(run)
    assert opinion.undecided == {}
    return disagreements({COLUMNS: columns(run), replay.NAME: opinion})


def test_replay_judge_decides_every_anomaly_the_columns_decide() -> None:
    assert set(replay.RULES) == {code for code in CHECKS if code.startswith("A")}
    assert JUDGES[replay.NAME].max_records == replay.MAX_RECORDS


def test_rule_docstring_begins_with_its_code() -> None:
    for code, rule in replay.RULES.items():
        assert (rule.__doc__ or "").startswith(f"{code}: ")


@pytest.mark.parametrize("again", [False, True])
def test_honest_run_is_silent(*, again: bool) -> None:
    world = small_world()
    if again:
        world.snapshot_again()
    opinion = replay.judge(world.run())
    assert opinion.undecided == {}
    assert {code for code, subjects in opinion.found.items() if subjects} == set()


@pytest.mark.parametrize(("code", "bug"), PLANTED, ids=[f"{code}-{name_of(bug)}" for code, bug in PLANTED])
def test_planted_bug_is_found_alike(code: str, bug: Bug) -> None:
    world = small_world()
    bug(world)
    run = world.run()
    found = replay.findings(run, code)
    assert found
    assert all(finding.code == code and finding.text for finding in found)
    assert differences(run) == []


@settings(max_examples=40)
@given(st.randoms(use_true_random=False))
def test_random_damage_is_judged_alike(random: Random) -> None:
    world, done = mutated(random.randrange)
    assert differences(world.run()) == [], done


def test_code_without_its_table_is_undecided_and_the_others_are_judged() -> None:
    run = small_world().run()
    tables = {name: run.first.table(name) for name in ("ledger", "refusals", "settlements", "matches", "transitions")}
    run.first = Snapshot("snapshot-1", None, tables)
    opinion = replay.judge(run)
    assert opinion.undecided["A28"] == "snapshot-1 has no table bets"
    assert opinion.found["A10"] == frozenset()
    assert opinion.found.keys().isdisjoint(opinion.undecided)


def test_rule_that_raises_is_undecided_and_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: object) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setitem(replay.RULES, "A10", broken)
    opinion = replay.judge(small_world().run())
    assert opinion.undecided == {"A10": "broken raised ZeroDivisionError: by design"}
    assert "A10" not in opinion.found
