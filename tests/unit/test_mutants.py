"""The planted bugs themselves: they apply, say what must happen, and cover service, harness and codes."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from invariants.anomalies import CHECKS
from ledgerproof.mutants import document, matrix, page, workshop
from ledgerproof.mutants.outcome import Alone, Outcome, Shown, complaint, row_of
from ledgerproof.mutants.patches import (
    FOLDER,
    LAYERS,
    Header,
    Hunk,
    Mutant,
    PatchError,
    apply,
    load_all,
    parse,
    patched,
)
from ledgerproof.mutants.runner import Runner
from ledgerproof.mutants.triggers import TRIGGERS
from ledgerproof.mutants.worlds import SELF_TEST, WORLDS

ROOT = workshop.SOURCE
MUTANTS = load_all(ROOT / FOLDER)
BY_ID = {mutant.header.id: mutant for mutant in MUTANTS}


@pytest.mark.parametrize("mutant", MUTANTS, ids=list(BY_ID))
def test_planted_bug_applies_to_the_tree_that_is_here(mutant: Mutant) -> None:
    files = {path: (ROOT / path).read_text(encoding="utf-8") for path in mutant.paths}
    for half in mutant.header.halves:
        patched([mutant.hunks[number] for number in half], files)
    changed = patched(mutant.hunks, files)
    assert set(changed) == set(files)
    for path, text in changed.items():
        assert text != files[path]
        if path.endswith(".py"):
            compile(text, path, "exec")


def test_there_are_enough_of_each_sort() -> None:
    harness = [mutant for mutant in MUTANTS if mutant.is_harness]
    pairs = [mutant for mutant in MUTANTS if mutant.is_pair]
    assert len(harness) >= 12
    assert len(pairs) >= 6
    assert len(MUTANTS) - len(harness) - len(pairs) >= 45
    assert {mutant.header.layer for mutant in MUTANTS} == set(LAYERS)


def test_headers_name_triggers_and_codes_that_exist() -> None:
    for mutant in MUTANTS:
        header = mutant.header
        assert header.trigger in (WORLDS if header.tier == "worlds" else TRIGGERS), header.id
        for code in [*header.must, *header.may]:
            assert code in CHECKS or (code == SELF_TEST and header.tier == "worlds"), (header.id, code)


def test_planted_bug_of_the_harness_is_in_the_harness_and_no_other_is() -> None:
    for mutant in MUTANTS:
        inside = [path for path in mutant.paths if not path.startswith("reference/")]
        assert mutant.paths == inside if mutant.is_harness else inside == [], mutant.header.id


def test_every_anomaly_code_has_a_planted_bug_that_is_to_be_its_own_or_a_reason() -> None:
    owned = {mutant.header.owns for mutant in MUTANTS}
    assert {code for code in CHECKS if code.startswith("A")} - owned == set(document.NOT_OWNED)
    named = {code for mutant in MUTANTS for code in mutant.header.must}
    assert set(document.NOT_OWNED) <= named


# -- reading and applying


HEADER = """\
id = "some-bug"
layer = "relay"
title = "It does something wrong."
trigger = "commands"
must = ["A21"]
"""
DIFF = """\
--- a/reference/relay.py
+++ b/reference/relay.py
@@ -1,3 +1,3 @@
 one
-two
+TWO
 three
"""


def test_patch_is_read_with_its_header_and_hunks() -> None:
    mutant = parse(f"{HEADER}=====\n{DIFF}", "some-bug.patch")
    assert mutant.header.must == ["A21"]
    assert mutant.hunks == (Hunk("reference/relay.py", 1, ("one", "two", "three"), ("one", "TWO", "three")),)


@pytest.mark.parametrize(
    ("header", "diff", "why"),
    [
        (HEADER, "", "no change"),
        (HEADER.replace('"relay"', '"cellar"'), DIFF, "layer"),
        (HEADER.replace('["A21"]', '["B21"]'), DIFF, "another form"),
        (HEADER + 'owns = "A22"\n', DIFF, "owns"),
        (HEADER + "halves = [[0]]\n", DIFF, "halves are two"),
        (HEADER + "halves = [[0], [1]]\n", DIFF, "each hunk once"),
        (HEADER + "surprise = 1\n", DIFF, "surprise"),
        (HEADER.replace("some-bug", "other-bug"), DIFF, "other-bug.patch"),
        (HEADER, "nonsense\n", "not a line of a diff"),
    ],
)
def test_patch_that_makes_no_sense_is_refused_with_the_reason(header: str, diff: str, why: str) -> None:
    with pytest.raises(PatchError, match=why):
        parse(f"{header}=====\n{diff}", "some-bug.patch")


def test_hunk_is_found_wherever_its_lines_stand() -> None:
    hunk = Hunk("a.py", 1, ("one", "two"), ("one", "TWO"))
    assert patched([hunk], {"a.py": "new\nlines\none\ntwo\n"}) == {"a.py": "new\nlines\none\nTWO\n"}


@pytest.mark.parametrize("text", ["one\nzwei\n", "one\ntwo\none\ntwo\n"])
def test_hunk_that_fits_nowhere_or_twice_is_an_error(text: str) -> None:
    with pytest.raises(PatchError, match="places"):
        patched([Hunk("a.py", 1, ("one", "two"), ("one", "TWO"))], {"a.py": text})


# -- copies


def test_process_of_a_copy_imports_the_copy_with_the_bug_in_it(tmp_path: Path) -> None:
    mutant = BY_ID["settler-commission-rounds-down"]
    ask = (
        "import reference.settlement, invariants, ledgerproof;"
        "print(reference.settlement.__file__, invariants.__file__, ledgerproof.__file__)"
    )
    with workshop.copy_of(tmp_path / "copy", mutant) as copy:
        done = subprocess.run(
            [sys.executable, "-c", ask],
            cwd=copy, env=workshop.environment(copy), capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert all(Path(name).is_relative_to(copy) for name in done.stdout.split())
        changed = (copy / "reference/settlement.py").read_text(encoding="utf-8")
        assert "return net * commission_bps // 10_000 + residue" in changed
    assert not (tmp_path / "copy").exists()


def test_probe_says_from_where_it_imported_and_another_place_than_its_copy_is_an_error(tmp_path: Path) -> None:
    with workshop.copy_of(tmp_path / "copy") as copy:
        process = workshop.start(
            copy,
            ["ledgerproof.mutants.probe", "--trigger", "recorded_world", "--out", str(tmp_path / "out"),
             "--folder", str(tmp_path / "run")],
            tmp_path / "log",
        )  # fmt: skip
        assert process.wait(120) == 0
        outcome = msgspec.json.decode((tmp_path / "out").read_bytes(), type=Outcome)
        assert outcome.silent, outcome
        assert {Path(place) for place in outcome.imports.values()} == {copy.resolve()}


def test_bug_whose_patch_does_not_fit_any_more_leaves_no_copy_behind(tmp_path: Path) -> None:
    mutant = parse(f"{HEADER}=====\n{DIFF}", "some-bug.patch")
    with pytest.raises(PatchError, match="some-bug"), workshop.copy_of(tmp_path / "copy", mutant):
        pass
    assert not (tmp_path / "copy").exists()


def test_applying_changes_only_the_named_hunks(tmp_path: Path) -> None:
    mutant = BY_ID["pair-self-match"]
    for path in mutant.paths:
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / path).read_text(encoding="utf-8"), encoding="utf-8")
    changed = apply(mutant, tmp_path, [mutant.hunks[number] for number in mutant.header.halves[1]])
    assert [path.name for path in changed] == ["schema.sql"]
    assert (tmp_path / "reference/orderbook.py").read_text() == (ROOT / "reference/orderbook.py").read_text()


# -- judging


SILENT = Outcome("PASS")
HIT = Outcome("INVARIANT_VIOLATED", codes={"A21": 3}, witnesses=[Shown("A21", "an event is lost")], seconds=9.0)
ASKED = Header("some-bug", "relay", "It loses events.", "commands", ["A21"], ["A26"])


def test_right_code_with_a_witness_over_a_silent_control_kills() -> None:
    row = row_of(ASKED, HIT, SILENT, [])
    assert (row.killed, row.why, row.witness) == (True, "", "A21: an event is lost")


@pytest.mark.parametrize(
    ("outcome", "control", "alone", "why"),
    [
        (HIT, HIT, [], "clean tree is not silent"),
        (SILENT, SILENT, [], "A21 did not fire"),
        (msgspec.structs.replace(HIT, codes={"A21": 1, "A01": 1}), SILENT, [], "A01 fired too"),
        (msgspec.structs.replace(HIT, witnesses=[]), SILENT, [], "without a witness"),
        (msgspec.structs.replace(HIT, verdict="INVALID"), SILENT, [], "called INVALID"),
        (msgspec.structs.replace(HIT, error="it fell over"), SILENT, [], "it fell over"),
        (msgspec.structs.replace(HIT, seconds=61.0), SILENT, [], "61 s"),
        (HIT, SILENT, [Alone([0], "INVARIANT_VIOLATED: A21", False, 5.0)], "one safeguard alone"),
    ],
)
def test_everything_else_does_not_kill(outcome: Outcome, control: Outcome, alone: list[Alone], why: str) -> None:
    assert why in complaint(ASKED, outcome, control, alone)


def test_further_codes_that_may_fire_do_not_save_a_bug() -> None:
    both = msgspec.structs.replace(HIT, codes={"A21": 1, "A26": 2})
    assert complaint(ASKED, both, SILENT, []) == ""


def test_reason_that_is_not_given_does_not_kill() -> None:
    asked = msgspec.structs.replace(ASKED, verdict="INVALID", reason="not drained")
    invalid = msgspec.structs.replace(HIT, verdict="INVALID", reasons=["something else"])
    assert "no reason says" in complaint(asked, invalid, SILENT, [])


def test_judge_with_a_hole_is_killed_by_its_self_test(tmp_path: Path) -> None:
    runner = Runner(tmp_path, lambda _: None)
    try:
        row = runner.row(BY_ID["harness-last-buffer-dropped"])
    finally:
        runner.close()
    assert row.killed, row.why
    assert row.control == "silent"
    assert list(tmp_path.rglob("copy*")) == []


# -- what is stored


def test_document_is_what_headers_and_stored_matrix_say() -> None:
    written = (ROOT / document.DOCUMENT).read_text(encoding="utf-8")
    assert written == document.text(MUTANTS, document.stored(ROOT)), "run `ledgerproof mutants --write`"


def test_stored_matrix_has_a_row_for_every_planted_bug() -> None:
    stored = matrix.load(ROOT / matrix.STORED)
    assert [row.id for row in stored.rows] == sorted(BY_ID)
    for row in stored.rows:
        header = BY_ID[row.id].header
        assert (row.layer, row.must, row.trigger, row.tier) == (header.layer, header.must, header.trigger, header.tier)


def test_page_shows_every_row_and_escapes_what_it_shows() -> None:
    row = row_of(ASKED, msgspec.structs.replace(HIT, witnesses=[Shown("A21", "<b>lost</b>")]), SILENT, [])
    text = page.render(matrix.Matrix("abc", {"cores": 2}, "today", [row]))
    assert "some-bug" in text
    assert "&lt;b&gt;lost" in text
    assert "<b>lost" not in text
    assert "1 of 1 killed" in text


def test_rows_of_bugs_that_were_not_run_again_are_kept() -> None:
    old = matrix.Matrix("a", {}, "then", [row_of(ASKED, HIT, SILENT, [])])
    other = msgspec.structs.replace(ASKED, id="other-bug")
    new = matrix.Matrix("b", {}, "now", [row_of(other, HIT, SILENT, [])])
    assert [row.id for row in matrix.merged(old, new).rows] == ["other-bug", "some-bug"]
    assert matrix.owners(new.rows)["A21"] == ["other-bug"]
