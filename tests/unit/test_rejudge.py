"""A stored run is judged again: by a later checker, from older or damaged evidence, and compared with before."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from honest_world import ANN, World, small_world
from stored_world import store, without

from invariants.anomalies import CHECKS
from invariants.files import fingerprint
from invariants.history import FINAL_RETRY
from invariants.run import load_run
from invariants.snapshot import EVIDENCE
from invariants.verdict import Verdict, judge
from ledgerproof import assess
from ledgerproof.cli import cli


def whole_world() -> World:
    """An honest world with everything that a run of this version records."""
    world = small_world()
    for key, fields in (
        ("lost-answer", {"user": ANN, "amount": 333}),
        ("o-lay", {k: v for k, v in world.invoke_of(attempt_of(world, "o-lay")).items() if k in BET}),
    ):
        original = world.invoke_of(attempt_of(world, key))
        attempt = world.invoke(
            original["op"], key=key, payload_hash=original["payload_hash"], tag=FINAL_RETRY, **fields
        )
        world.answer(attempt, "ok", world.entry(key), replayed=True)
    world.snapshot_again()
    return world


BET = ("user", "match_id", "selection", "side", "odds", "amount")


def attempt_of(world: World, key: str) -> int:
    return int(next(r["attempt"] for r in world.history if r["record"] == "invoke" and r.get("key") == key))


def check(folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(cli, ["check", str(folder), "--json", *more], standalone_mode=False)
    assert result.exception is None, result.exception
    return int(result.return_value), json.loads(result.stdout)


def test_run_of_this_version_is_judged_whole(tmp_path: Path) -> None:
    folder = store(whole_world(), tmp_path / "run", evidence=EVIDENCE)
    judgement = judge(load_run(folder))
    assert (judgement.reasons, judgement.unchecked, judgement.undecided) == ([], {}, {})
    assert judgement.verdict is Verdict.PASS


def test_older_run_is_judged_by_what_it_holds_and_says_what_it_is_too_old_for(tmp_path: Path) -> None:
    world = small_world()
    world.timeline.append(
        {
            "t": 1.0,
            "kind": "drift_planted",
            "node": "pg0",
            "detail": json.dumps({"user": 21, "code": "PROJECTION_DIFFERS", "within_s": 1.0}),
        }
    )
    folder = store(world, tmp_path / "run")
    without(folder, "ledger", "xact")
    without(folder, "routes", "changed_at")
    without(folder, "matches", "outcomes")
    without(folder, "reconciliations")
    judgement = judge(load_run(folder))
    assert judgement.unchecked == {}
    assert judgement.undecided.keys() >= {"A08", "A20", "A32", "A33", "A35"}
    assert "older than it" in judgement.undecided["A35"]
    assert "A35" not in judgement.anomalies
    assert judgement.undecided["A32"] == "in part: the run is older than routes.changed_at"
    assert judgement.verdict is Verdict.PASS


def test_history_without_the_later_columns_is_read_with_nulls(tmp_path: Path) -> None:
    folder = store(small_world(), tmp_path / "run")
    (part,) = (folder / "history").glob("part-*")
    pl.read_parquet(part).drop("strong", "after_seq", "as_of", "page_rows", "page_cut").write_parquet(part)
    lines = [json.loads(line) for line in (folder / "history" / "manifest.jsonl").read_text().splitlines()]
    lines[0]["sha256"] = __import__("hashlib").sha256(part.read_bytes()).hexdigest()
    (folder / "history" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load_run(folder)
    assert run.recording.problems() == []
    assert run.attempts["as_of"].is_null().all()
    judgement = judge(run)
    assert judgement.undecided["A17"] == "in part: the run is older than history.as_of"
    assert judgement.verdict is Verdict.PASS


@pytest.mark.parametrize(("table", "column"), [("ledger", "xact"), ("routes", "changed_at"), ("reconciliations", None)])
def test_what_a_run_of_this_version_lacks_is_damage(tmp_path: Path, table: str, column: str | None) -> None:
    folder = store(whole_world(), tmp_path / "run", evidence=EVIDENCE)
    without(folder, table, *([] if column is None else [column]))
    judgement = judge(load_run(folder))
    assert judgement.anomalies["V05"] == 1
    assert Verdict.INVALID in judgement.parts


def test_run_of_this_version_without_a_second_snapshot_proves_nothing(tmp_path: Path) -> None:
    world = whole_world()
    world.second = None
    judgement = judge(load_run(store(world, tmp_path / "run", evidence=EVIDENCE)))
    assert judgement.verdict is Verdict.INVALID
    assert "V05 incomplete reads: 1 time; the run proves nothing" in judgement.reasons


def test_run_whose_unknown_keys_were_not_sent_again_proves_nothing(tmp_path: Path) -> None:
    world = small_world()
    world.snapshot_again()
    judgement = judge(load_run(store(world, tmp_path / "run", evidence=EVIDENCE)))
    assert judgement.verdict is Verdict.INVALID
    assert any("0 of 3 keys with an unknown outcome were sent again" in w.text for w in judgement.witnesses)


# -- two judgements


def test_check_says_who_judged_before_and_what_is_different_now(tmp_path: Path) -> None:
    folder = store(small_world(), tmp_path / "run")
    code, verdict = check(folder, "--write")
    assert code == verdict["exit_code"]
    assert verdict["compared"] == {
        "before": None,
        "now": {"verdict": verdict["verdict"], "version": verdict["judged_by"], "checker": fingerprint()},
        "problem": "this run has no judgement of its own",
        "same_checker": None,
        "codes_added": [],
        "codes_removed": [],
        "counts": {},
        "sometimes": {},
        "undecided": verdict["undecided"],
    }
    _, again = check(folder)
    assert again["compared"]["same_checker"] is True
    assert again["compared"]["counts"] == {}

    stored = json.loads((folder / assess.VERDICT_FILE).read_text())
    stored["anomalies"] = {code: count for code, count in stored["anomalies"].items() if code != "A08"} | {
        "A01": 3,
        "A99": 0,
    }
    stored["sometimes"]["a retry replayed"] = 7
    stored |= {"judged_by": "0.0.9", "checker": "0123456789ab", "verdict": "INVARIANT_VIOLATED"}
    (folder / assess.VERDICT_FILE).write_text(json.dumps(stored))
    _, later = check(folder)
    compared = later["compared"]
    assert compared["before"] == {"verdict": "INVARIANT_VIOLATED", "version": "0.0.9", "checker": "0123456789ab"}
    assert (compared["same_checker"], compared["codes_added"], compared["codes_removed"]) == (False, ["A08"], ["A99"])
    assert compared["counts"] == {"A01": [3, 0]}
    assert compared["sometimes"] == {"a retry replayed": [7, 1]}
    result = CliRunner().invoke(cli, ["check", str(folder)], standalone_mode=False)
    for line in ("judged before by version 0.0.9, checks 0123456789ab: INVARIANT_VIOLATED; now by version",
                 "codes added since: A08", "codes not checked any more: A99", "A01: 3 before, 0 now"):  # fmt: skip
        assert line in result.stdout


def test_stored_verdict_that_cannot_be_read_is_said_and_replaced(tmp_path: Path) -> None:
    folder = store(small_world(), tmp_path / "run")
    (folder / assess.VERDICT_FILE).write_text("{")
    _, verdict = check(folder)
    assert "cannot be read" in verdict["compared"]["problem"]
    assert set(verdict["anomalies"]) == set(CHECKS)


# -- damage


def command_line(*arguments: str | Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "ledgerproof", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_folder_that_is_no_run_is_a_usage_error(tmp_path: Path) -> None:
    for command in (["check", tmp_path], ["explain", tmp_path / "nothing", "A01"]):
        code, _, err = command_line(*command)
        assert code == 2
        assert "is not a run folder" in err
        assert "Traceback" not in err


def test_run_that_was_cut_off_is_aborted_and_says_so(tmp_path: Path) -> None:
    folder = store(small_world(), tmp_path / "run")
    facts = json.loads((folder / "harness.json").read_text()) | {"finished": False}
    (folder / "harness.json").write_text(json.dumps(facts))
    code, verdict = check(folder)
    assert (code, verdict["verdict"]) == (40, "ABORTED")
    assert "the harness ended before the run did" in verdict["reasons"][0]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("timeline.parquet", "the recording of the run cannot be read"),
        ("series.parquet", "the recording of the run cannot be read"),
        ("snapshot-1/ledger.parquet", "table ledger cannot be read"),
        ("snapshot-1/servers.json", "could not be checked"),
        ("history/part-000000.parquet", "V06 recording"),
        ("history/manifest.jsonl", "V06 recording"),
        ("config.json", "the run cannot be judged: config.json of the run cannot be used"),
    ],
)
def test_damaged_file_makes_the_run_invalid_and_is_named(tmp_path: Path, file: str, said: str) -> None:
    folder = store(small_world(), tmp_path / "run")
    (folder / file).write_bytes(b"\x00\xff" * 100)
    code, verdict = check(folder)
    assert code == verdict["exit_code"] != 0
    assert any(said in reason for reason in verdict["reasons"]), verdict["reasons"]
    assert verdict["verdict"] == "INVALID"


def test_explaining_damaged_evidence_says_what_cannot_be_read(tmp_path: Path) -> None:
    folder = store(small_world(), tmp_path / "run")
    (folder / "snapshot-1" / "ledger.parquet").write_bytes(b"no parquet")
    code, out, err = command_line("explain", folder, "A01")
    assert code == 30
    assert out.startswith("A01 cannot be decided in ")
    (folder / "timeline.parquet").write_bytes(b"no parquet")
    code, _, err = command_line("explain", folder, "A01")
    assert code == 2
    assert "cannot be read" in err
    assert "Traceback" not in err


def test_fingerprint_of_the_checks_does_not_change_by_itself() -> None:
    assert fingerprint() == fingerprint()
    assert len(fingerprint()) == 12
