"""The judges agree on honest worlds and on random damage; where they do not, nothing is proved.

That they agree on every planted bug is asserted where the bugs are (test_anomalies).
"""

import json
from pathlib import Path
from random import Random
from typing import Any

import click
import polars as pl
import pytest
from click.testing import CliRunner
from honest_world import World, small_world
from hypothesis import given, settings
from hypothesis import strategies as st
from random_world import random_world, wound
from stored_world import store

from invariants import judges
from invariants.anomalies import CHECKS
from invariants.judges import COLUMNS, JUDGES, Disagreement, Judge, Opinion, disagreements, duck
from invariants.run import Run, load_run
from invariants.snapshot import Snapshot
from invariants.subjects import MAX_SUBJECTS, WHOLE_RUN, kept, subject_of, subjects_of
from invariants.verdict import DAMAGED_EVIDENCE, Verdict, judge
from ledgerproof.cli import cli
from reports import tables
from reports.folder import Disagreement as PageDisagreement
from reports.folder import JudgeRow
from reports.folder import Verdict as PageVerdict

BY_COLUMNS_ALONE = {"V04"}
"""Codes that only the columns decide: what a run must have shown is counted, not judged."""


def columns(run: Run) -> Opinion:
    return Opinion({code: check.find(run).subjects for code, check in CHECKS.items()})


def differences(run: Run) -> list[Disagreement]:
    mine, theirs = columns(run), duck.judge(run)
    assert theirs.undecided == {}
    damaged = any(mine.found[code] for code in DAMAGED_EVIDENCE)
    return disagreements({COLUMNS: mine, duck.NAME: theirs}, only=DAMAGED_EVIDENCE if damaged else None)


# -- the SQL judge


def test_sql_judge_decides_every_code_of_the_columns() -> None:
    assert set(duck.codes()) == set(CHECKS) - BY_COLUMNS_ALONE


@pytest.mark.parametrize("again", [False, True])
def test_honest_run_is_silent_in_sql(*, again: bool) -> None:
    world = small_world()
    if again:
        world.snapshot_again()
    opinion = duck.judge(world.run())
    assert opinion.undecided == {}
    assert {code for code, subjects in opinion.found.items() if subjects} == set()


@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_random_honest_world_is_silent_and_one_wound_is_judged_alike(random: Random) -> None:
    world = random_world(random)
    run = world.run()
    assert {code for code, subjects in columns(run).found.items() if subjects and code.startswith("A")} == set()
    assert differences(run) == []
    what = wound(world, random)
    assert differences(world.run()) == [], what


def test_subjects_are_said_alike_by_both() -> None:
    world = small_world()
    world.entry("out-1")["amount"] -= 1
    world.tables["projection"].pop()
    run = world.run()
    assert duck.judge(run).found["A09"] == CHECKS["A09"].find(run).subjects == {"user 99 seq 2"}
    assert duck.judge(run).found["A11"] == CHECKS["A11"].find(run).subjects != frozenset()


def test_code_without_its_table_is_undecided_and_says_which() -> None:
    run = small_world().run()
    tables = {name: run.first.table(name) for name in ("ledger", "refusals", "matches", "transitions")}
    run.first = Snapshot("snapshot-1", None, tables)
    opinion = duck.judge(run)
    assert "snapshot-1 has no table bets" in opinion.undecided["A28"]
    assert opinion.found["A10"] == frozenset()
    assert opinion.found["V05"] == {WHOLE_RUN}
    assert opinion.found.keys().isdisjoint(opinion.undecided)
    assert judge(run).verdict is Verdict.INVALID


def test_statement_that_fails_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(duck.blocks(), "A10", "SELECT nonsense AS subject FROM entries")
    opinion = duck.judge(small_world().run())
    assert set(opinion.undecided) == {"A10"}
    assert "nonsense" in opinion.undecided["A10"]


# -- a run on disk, and its files damaged


def edited(folder: Path, table: str, **columns: pl.Expr) -> None:
    """Change columns of one table of both snapshots on disk."""
    for snapshot in ("snapshot-1", "snapshot-2"):
        path = folder / snapshot / f"{table}.parquet"
        if path.exists():
            pl.read_parquet(path).with_columns(**columns).write_parquet(path)


def first_row(column: str, value: pl.Expr) -> pl.Expr:
    return pl.when(pl.int_range(pl.len()) == 0).then(value).otherwise(pl.col(column))


@pytest.mark.parametrize(
    ("code", "table", "column", "change"),
    [
        ("A09", "ledger", "balance_snapshot", pl.col("balance_snapshot") + 1),
        ("A03", "ledger", "idempotent_key", pl.lit("from-nowhere")),
        ("A11", "projection", "balance", pl.col("balance") - 1),
        ("A24", "kafka", "event_id", pl.lit("stranger")),
        ("A28", "bets", "reserve", pl.col("reserve") + 1),
        ("A29", "transitions", "to_state", pl.lit("VOID")),
        ("A31", "orders", "server", pl.lit("pg9")),
    ],
)
def test_damage_to_the_files_of_a_run_is_named_by_both(
    tmp_path: Path, code: str, table: str, column: str, change: pl.Expr
) -> None:
    folder = store(small_world(), tmp_path / "run")
    assert differences(load_run(folder)) == []
    edited(folder, table, **{column: first_row(column, change)})
    run = load_run(folder)
    assert duck.judge(run).found[code]
    assert CHECKS[code].find(run).subjects
    assert differences(run) == []


def test_history_that_is_cut_is_seen_by_both(tmp_path: Path) -> None:
    folder = store(small_world(), tmp_path / "run")
    part = next(iter(sorted((folder / "history").glob("part-*.parquet"))))
    pl.read_parquet(part).head(-1).write_parquet(part)
    run = load_run(folder)
    assert duck.judge(run).found["V06"] == CHECKS["V06"].find(run).subjects == {WHOLE_RUN}


# -- what it means that they agree


def test_all_judges_are_asked_and_said(honest: Run) -> None:
    judgement = judge(honest)
    assert [judged.name for judged in judgement.judges] == [COLUMNS, *JUDGES]
    assert all(judged.codes and judged.seconds is not None for judged in judgement.judges)
    assert (judgement.disagreements, judgement.verdict) == ([], Verdict.PASS)


def test_disagreement_makes_the_run_invalid_and_names_code_and_judges(
    honest: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Judge("contrary", lambda _: Opinion({"A10": frozenset({"user 7 seq 1"}), "A09": frozenset()}))
    monkeypatch.setitem(judges.JUDGES, "contrary", alone)
    judgement = judge(honest, judges=["contrary"])
    assert judgement.verdict is Verdict.INVALID
    assert judgement.reasons == [
        "the judges columns and contrary disagree on A10: only contrary finds 1 (user 7 seq 1)"
    ]
    assert [(item.code, item.judges) for item in judgement.disagreements] == [("A10", (COLUMNS, "contrary"))]


def test_judge_that_raises_makes_the_run_invalid(honest: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Run) -> Opinion:
        raise ZeroDivisionError("by design")

    monkeypatch.setitem(judges.JUDGES, "broken", Judge("broken", broken))
    judgement = judge(honest, judges=["broken"])
    assert judgement.verdict is Verdict.INVALID
    assert judgement.reasons == ["the judge broken could not judge: broken raised ZeroDivisionError: by design"]


def test_judge_that_leaves_a_code_undecided_makes_the_run_invalid(honest: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(judges.JUDGES, "unsure", Judge("unsure", lambda _: Opinion({}, {"A01": "no idea"})))
    judgement = judge(honest, judges=["unsure"])
    assert judgement.verdict is Verdict.INVALID
    assert judgement.reasons == ["the judge unsure could not decide A01: no idea"]


def test_run_beyond_a_judges_bound_is_left_out_and_said(honest: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(judges.JUDGES, "small", Judge("small", lambda _: Opinion(), max_records=1))
    judgement = judge(honest, judges=["small"])
    assert judgement.verdict is Verdict.PASS
    assert "reads up to 1" in (judgement.judges[1].skipped or "")


def test_where_the_evidence_has_holes_only_the_holes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    world = small_world()
    world.tables["kafka"][0]["offset"] = 10**6
    contrary = Judge("contrary", lambda _: Opinion({"A10": frozenset({"user 7 seq 1"}), "V05": frozenset({WHOLE_RUN})}))
    monkeypatch.setitem(judges.JUDGES, "contrary", contrary)
    judgement = judge(world.run(), judges=["contrary"])
    assert judgement.anomalies["V05"] > 0
    assert judgement.disagreements == []


@pytest.fixture
def honest() -> Run:
    return small_world().run()


# -- at the command line and on the page


def check(folder: Path, *more: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["check", str(folder), "--json", *more], standalone_mode=False)
    assert result.exception is None, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_check_asks_the_judges_that_are_named(tmp_path: Path) -> None:
    folder = store(small_world(), tmp_path / "run")
    verdict = check(folder, "--judges", "columns,sql")
    assert [row["name"] for row in verdict["judges"]] == ["columns", "sql"]
    assert set(verdict["judges"][1]["codes"]) == set(duck.codes())
    assert verdict["disagreements"] == []
    assert [row["name"] for row in check(folder, "--judges", "columns")["judges"]] == ["columns"]


@pytest.mark.parametrize("names", ["sql", "columns,nobody"])
def test_check_refuses_judges_it_cannot_use(tmp_path: Path, names: str) -> None:
    folder = store(small_world(), tmp_path / "run")
    result = CliRunner().invoke(cli, ["check", str(folder), "--judges", names], standalone_mode=False)
    assert isinstance(result.exception, click.UsageError)


def test_page_shows_who_judged_and_who_disagreed() -> None:
    verdict = PageVerdict(
        judges=[
            JudgeRow("columns", ["A01", "A02"], 0.4),
            JudgeRow("sql", ["A01", "A02"], 1.2),
            JudgeRow("replay", skipped="too many records"),
        ],
        disagreements=[PageDisagreement("A02", ["columns", "sql"], "they differ")],
    )
    table = tables.judges(verdict)
    assert table is not None
    rows = [[cell.text for cell in row.cells] for row in table.rows]
    assert [row[:3] for row in rows] == [["columns", "2", "1"], ["sql", "2", "1"], ["replay", tables.NONE, tables.NONE]]
    assert rows[2][4] == "too many records"
    assert tables.judges(PageVerdict()) is None


# -- subjects


def test_subject_of_a_row_and_of_a_frame_are_the_same() -> None:
    row: dict[str, Any] = {"user": 7, "seq": None, "key": "k"}
    assert subject_of("A09", row) == "user 7 seq none"
    assert subjects_of("A09", pl.DataFrame([row], schema={"user": pl.Int64, "seq": pl.Int64, "key": pl.String})) == {
        subject_of("A09", row)
    }
    assert subject_of("V01", row) == WHOLE_RUN


def test_of_too_many_subjects_every_judge_keeps_the_same() -> None:
    many = [f"user {number} seq 1" for number in range(MAX_SUBJECTS + 5)]
    frame = pl.DataFrame({"user": range(MAX_SUBJECTS + 5), "seq": 1})
    assert kept(many) == kept(reversed(many)) == subjects_of("A09", frame)
    assert len(kept(many)) == MAX_SUBJECTS


def test_sql_keeps_the_same_of_too_many_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    for number in range(30):
        world.post(7, "CREDIT", 1, "EXTERNAL", f"phantom-{number}")
    monkeypatch.setattr(duck, "MAX_SUBJECTS", 5)
    found = duck.judge(world.derive().run()).found["A03"]
    assert found == set(sorted(f"user 7 seq {number}" for number in range(1, 31))[:5])
