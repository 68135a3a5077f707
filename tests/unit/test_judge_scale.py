"""A large run is judged in slices and memory does not grow with it; what the slices say is what the whole says.

With the Hypothesis profile `nightly` (`make nightly`) also of every planted bug and every needle, not of one a code.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from honest_world import small_world
from hypothesis import settings
from stored_world import store
from test_anomalies import BUGS, Bug, name_of

from invariants import large
from invariants.anomalies.common import Part, Scope
from invariants.anomalies.parts import PARTS
from invariants.run import load_run
from invariants.verdict import Judgement, Verdict, judge
from ledgerproof.cli import cli
from ledgerproof.judge_cost import growth
from ledgerproof.synth.plant import ALSO
from ledgerproof.synth.run import write_run
from ledgerproof.synth.shape import Shape
from tests.depth import NIGHTLY

SMALL_ROWS = 10_000
SLICES = 3
DEEP = settings.get_current_profile_name() == NIGHTLY
ALL_NEEDLES = ("A01", "A02", "A06", "A09", "A11", "A12", "A14", "A21", "A27", "A28")
NEEDLES = ALL_NEEDLES if DEEP else ("A01", "A21", "A28")
FIRST_OF_CODE = {code: bug for code, bug, *_ in reversed(BUGS)}
TOGETHER = (
    "A01 A03 A05 A07 A09 A11 A19 A22",
    "A02 A04 A06 A08 A10 A17 A20 A23",
    "A12 A13 A14 A15 A16 A18 A21 A24",
    "A25 A26 A29",
    "A27 A28 A30 A31",
    "A32 A33 A34 A35",
)
"""Codes whose first bugs one world can have together, none hiding another: each world is judged twice from disk."""


def quiet(_: str) -> None:
    return


def fired(judgement: Judgement) -> dict[str, int]:
    return {code: count for code, count in judgement.anomalies.items() if count}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "run"
    write_run(Shape(100_000, seed=5), folder, quiet)
    return folder


def test_synthetic_run_passes_every_check_whole_and_in_slices(honest: Path) -> None:
    whole, sliced = judge(load_run(honest), judges=()), large.judge_folder(honest, SLICES, judges=())
    assert (whole.reasons, whole.verdict) == ([], Verdict.PASS)
    assert set(sliced.anomalies) == set(large.CHECKS)
    # Every field: counts of every code, sometimes, unresolved keys and duplicates too; only the time taken differs.
    assert replace(sliced, judges=[]) == replace(whole, judges=[])
    assert whole.sometimes["an info resolved as applied"]
    assert whole.sometimes["an info resolved as not applied"]
    assert whole.raw_duplicates


def test_check_of_a_synthetic_run_is_pass(honest: Path) -> None:
    result = CliRunner().invoke(cli, ["check", str(honest), "--judges", "columns", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["reasons"]) == (0, [])


def test_synthetic_run_has_everything_a_real_one_has(honest: Path) -> None:
    run = load_run(honest)
    assert run.recording.frame.height == 100_000
    tried = {(op, cls) for op, cls in run.attempts.select("op", "cls").unique().iter_rows()}
    assert {"deposit", "withdraw", "bet", "cancel", "rollback", "balance", "entries"} <= {op for op, _ in tried}
    assert {("bet", "ok"), ("bet", "fail"), ("bet", "info")} <= tried
    assert run.table("settlements")["settlement_version"].max() == 3
    assert {"VOID", "SETTLED", "OPEN"} <= set(run.table("matches")["state"])
    assert set(run.table("orders")["cancel_reason"].drop_nulls()) == {"REQUESTED", "LATE"}
    assert run.first.table("ledger").height < run.table("ledger").height
    assert run.table("kafka")["topic"].n_unique() == 5


def test_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_run(Shape(SMALL_ROWS, seed), tmp_path / name, quiet)
    first, again, other = (load_run(tmp_path / name).table("ledger") for name in "abc")
    assert first.equals(again)
    assert not first.equals(other)


@pytest.mark.parametrize("code", NEEDLES)
def test_needle_in_a_synthetic_run_is_found_by_its_code(code: str, tmp_path: Path) -> None:
    planted = write_run(Shape(SMALL_ROWS, seed=3, mix="prove", plant=code), tmp_path / "run", quiet).planted
    assert planted is not None
    judgement = large.judge_folder(tmp_path / "run", SLICES, judges=())
    assert code in fired(judgement)
    assert set(fired(judgement)) <= {code} | ALSO.get(code, frozenset())
    witnesses = [witness for witness in judgement.witnesses if witness.code == code]
    assert planted.user in {witness.user for witness in witnesses} or code in {"A12"}
    if planted.key is not None:
        assert planted.key in {witness.key for witness in witnesses}


def bugs_are_found_alike(codes: set[str], bugs: list[Bug], folder: Path) -> None:
    world = small_world()
    for bug in bugs:
        bug(world)
    store(world, folder, evidence=world.evidence)
    whole, sliced = judge(load_run(folder), judges=()), large.judge_folder(folder, SLICES, judges=())
    assert codes <= fired(sliced).keys()
    for name in ("anomalies", "unchecked", "undecided", "unresolved", "sometimes", "raw_duplicates", "verdict"):
        assert getattr(sliced, name) == getattr(whole, name), name

    def named(judgement: Judgement) -> set[tuple[str, str | None, int | None, int | None]]:
        return {(w.code, w.key, w.user, w.seq) for w in judgement.witnesses}

    assert named(sliced) == named(whole)


@pytest.mark.parametrize("codes", TOGETHER)
def test_planted_bugs_of_every_code_are_found_in_slices_as_in_the_whole(codes: str, tmp_path: Path) -> None:
    bugs_are_found_alike(set(codes.split()), [FIRST_OF_CODE[code] for code in codes.split()], tmp_path / "run")


def test_bugs_of_every_code_are_judged_in_slices() -> None:
    assert sorted(" ".join(TOGETHER).split()) == sorted(FIRST_OF_CODE)


if DEEP:

    @pytest.mark.parametrize(
        ("code", "bug"),
        [(code, bug) for code, bug, *_ in BUGS],
        ids=[f"{code}-{name_of(bug)}" for code, bug, *_ in BUGS],
    )
    def test_every_planted_bug_is_found_in_slices_as_in_the_whole(code: str, bug: Bug, tmp_path: Path) -> None:
        bugs_are_found_alike({code}, [bug], tmp_path / "run")


def test_number_left_out_between_slices_is_found(tmp_path: Path) -> None:
    world = small_world()
    gone = world.history[len(world.history) // 2]["attempt"]
    world.history = [row for row in world.history if row["attempt"] != gone]
    folder = store(world, tmp_path / "run")
    whole, sliced = judge(load_run(folder), judges=()), large.judge_folder(folder, SLICES, judges=())
    assert fired(sliced) == fired(whole)
    assert sliced.anomalies["V06"] == 1


def test_code_that_is_not_listed_makes_a_large_run_invalid(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(PARTS) == set(large.CHECKS)
    for code in set(PARTS) - {"A20"}:
        monkeypatch.delitem(PARTS, code)
    judgement = large.judge_folder(honest, SLICES, judges=())
    assert judgement.verdict is Verdict.INVALID
    assert set(judgement.anomalies) == {"A20"}
    assert set(judgement.unchecked) == set(large.CHECKS) - {"A20"}


def test_other_judges_are_asked_of_a_large_run_or_said_not_to_be(tmp_path: Path) -> None:
    judgement = large.judge_folder(store(small_world(), tmp_path / "run"), SLICES)
    assert judgement.verdict is Verdict.PASS
    judges = {judged.name: judged for judged in judgement.judges}
    assert judges["replay"].skipped
    assert set(judges) == {"columns", "sql", "replay"}
    assert set(judges["columns"].codes) - set(judges["sql"].codes) == {"V04"}


def test_missing_table_is_named_in_slices_too(tmp_path: Path) -> None:
    write_run(Shape(SMALL_ROWS, seed=1), tmp_path / "run", quiet)
    (tmp_path / "run" / "snapshot-1" / "orders.parquet").unlink()
    judgement = large.judge_folder(tmp_path / "run", SLICES, judges=())
    assert judgement.verdict is Verdict.INVALID
    assert "snapshot-1 has no table orders" in {witness.text for witness in judgement.witnesses}


def test_completion_without_its_invoke_is_judged_whole(tmp_path: Path) -> None:
    world = small_world()
    world.history.append({"record": "ok", "attempt": 9_999, "client": 1, "t": world.tick()})
    folder = store(world, tmp_path / "run")
    sliced = large.judge_folder(folder, SLICES, judges=())
    assert fired(sliced) == fired(judge(load_run(folder), judges=())) == {"V06": 1}


def test_check_that_raises_in_a_slice_makes_the_run_invalid(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(large.CHECKS["A06"], code="X01", find=lambda run: run.table("no such table"))
    monkeypatch.setitem(PARTS, "X01", (Part(Scope.WALLET, broken.find),))
    judgement = large.judge_folder(honest, SLICES, {"X01": broken})
    assert judgement.verdict is Verdict.INVALID
    assert "X01" in judgement.unchecked


def test_growth_is_the_exponent_of_a_power() -> None:
    assert growth([10, 100, 1_000], [5.0, 50.0, 500.0]) == pytest.approx(1.0)
    assert growth([10, 100], [3.0, 300.0]) == pytest.approx(2.0)
    assert growth([10], [3.0]) is None


def test_bench_judge_measures_a_run_in_a_process_of_its_own(honest: Path) -> None:
    result = CliRunner().invoke(cli, ["bench-judge", "--run", str(honest), "--json"])
    answer = json.loads(result.stdout)
    assert result.exit_code == 0
    (size,) = answer["sizes"]
    assert (size["rows"], size["verdict"], size["anomalies"]) == (100_000, "PASS", {})
    assert {"A01", "A28", "V06"} <= size["seconds_of"].keys()
    assert size["cpu_s"] > 0
    assert 50 < size["peak_mb"] < 3_000


def test_synth_refuses_a_code_that_it_cannot_plant(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["synth", str(tmp_path / "run"), "--rows", "1e4", "--plant", "A99"])
    assert result.exit_code == 2
    assert "no violation A99 can be planted" in result.stderr
