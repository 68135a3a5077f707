"""Every planted bug is explained with its key facts: the rule, the attempts, the rows, the order, the contradiction."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from honest_world import ANN, World, frame, small_world
from stored_world import store
from test_anomalies import BUGS, Bug, name_of

from invariants.anomalies import CHECKS
from invariants.evidence import LINES_MAX, NOTHING_THERE
from invariants.explain import PROOFS, Explanation, NoWitness, explain, rule_of
from invariants.run import Run
from ledgerproof.cli import cli


def said(proof: Explanation) -> str:
    return "\n".join(line.text for section in proof.sections for line in section.lines)


def section_of(proof: Explanation, title: str) -> list[str]:
    return [line.text for section in proof.sections if section.title.startswith(title) for line in section.lines]


def test_every_code_has_a_proof() -> None:
    assert PROOFS.keys() == CHECKS.keys()


def key_facts(run: Run, proof: Explanation) -> None:
    """What a proof must hold, whatever its code: all that the run records about the places its witness names."""
    witness = proof.witness
    assert proof.contradiction == witness.text
    assert proof.rule.endswith((".", ":"))
    assert 1 <= proof.number <= proof.witnesses <= proof.count
    facts = [line for section in proof.sections[:-1] for line in section.lines if line.text != NOTHING_THERE]
    assert facts, "there is evidence besides the timeline"
    assert proof.sections[-1].title.startswith("Timeline")
    assert all(len(section.lines) <= LINES_MAX for section in proof.sections)
    text = said(proof)
    if witness.seq is not None and section_of(proof, f"Ledger of user {witness.user}"):
        rows = run.entries.filter((pl.col("user_id") == witness.user) & (pl.col("seq") == witness.seq))
        assert text.count(f"seq {witness.seq} on ") >= rows.height
        if rows.is_empty():
            assert f"there is no row with seq {witness.seq}" in text
    if witness.attempt is not None and section_of(proof, "What clients were told"):
        assert any(line.marked and line.text.startswith(f"#{witness.attempt} ") for line in facts)
    if witness.key is not None and section_of(proof, f"Attempts of key {witness.key}"):
        mine = run.attempts.filter((pl.col("key") == witness.key) & (pl.col("user").eq_missing(witness.user)))
        shown = [line.split(" ")[0] for line in section_of(proof, "Attempts of key") if line.startswith("#")]
        assert [f"#{number}" for number in mine.sort("t_invoke")["attempt"]] == [
            number for number in shown if int(number[1:]) in set(mine["attempt"])
        ]


@pytest.mark.parametrize(
    ("code", "bug"), [(code, bug) for code, bug, *_ in BUGS], ids=[f"{code}-{name_of(bug)}" for code, bug, *_ in BUGS]
)
def test_planted_bug_is_explained(code: str, bug: Bug) -> None:
    world = small_world()
    bug(world)
    run = world.run()
    proof = explain(run, code)
    key_facts(run, proof)
    for number in range(2, min(proof.witnesses, 4) + 1):
        key_facts(run, explain(run, code, number))


def planted(code: str, name: str) -> World:
    world = small_world()
    next(bug for item, bug, *_ in BUGS if item == code and name_of(bug) == name)(world)
    return world


def test_lost_entry_is_proved_by_its_acknowledgement_and_the_rows_where_it_should_be() -> None:
    proof = explain(planted("A01", "acknowledged_withdrawal_is_lost").run(), "A01")
    attempts = section_of(proof, "Attempts of key out-1")
    assert len(attempts) == 3
    assert "withdraw of user 99 (amount 5000): acknowledged after" in attempts[0]
    assert "status 202, outcome ACCEPTED, seq 2" in attempts[0]
    assert "status 409" in attempts[2]
    assert any(line.startswith("seq 2 on pg1: DEBIT -100") for line in section_of(proof, "Ledger of user 99"))


def test_wrong_refusal_is_proved_by_the_balances_of_its_window() -> None:
    proof = explain(planted("A08", "withdrawal_refused_though_the_funds_were_there").run(), "A08")
    assert "status 422, outcome INSUFFICIENT_FUNDS" in section_of(proof, "Attempts of key rich")[0]
    assert any("stored refusal on pg0: INSUFFICIENT_FUNDS" in line for line in section_of(proof, "Attempts"))
    assert "the wallet held at least" in proof.contradiction


def test_wrong_money_is_proved_by_order_fills_and_entries() -> None:
    text = said(explain(planted("A28", "payout_is_a_cent_too_much").run(), "A28"))
    assert "order on pg" in text
    assert "fill 1 on pg" in text
    assert "PAYOUT +" in text
    assert "settlement version 1: SETTLE HOME, DONE" in text or "Match" not in text


def test_rewritten_row_is_shown_as_it_was_and_as_it_is() -> None:
    proof = explain(planted("A33", "entry_is_rewritten_between_snapshots").run(), "A33")
    rows = [line for line in section_of(proof, "The row in both snapshots") if f"key seed-{ANN}" in line]
    assert [row.split(":")[0] for row in rows] == ["snapshot-1", "snapshot-2"]


def test_zombie_write_is_proved_by_route_and_event() -> None:
    proof = explain(planted("A32", "event_is_written_by_the_old_server").run(), "A32")
    assert any("route on pg0: shard 7 is on pg1, epoch 1" in line for line in section_of(proof, "Shard 7"))
    assert any(" on pg0: " in line for line in section_of(proof, "Events of user 7"))


def test_missing_recovery_is_proved_by_the_backlog_after_the_heal() -> None:
    proof = explain(planted("A34", "backlog_stays_after_the_heal").run(), "A34")
    assert any("fault 1: kill pg0" in line for line in section_of(proof, "Faults"))
    assert any("outbox_unpublished of pg0 at least 20000" in line for line in section_of(proof, "After the heal"))


def test_blind_reconciliation_is_proved_by_its_passes() -> None:
    proof = explain(planted("A35", "drift_is_reported_too_late").run(), "A35")
    lines = section_of(proof, "Planted drift and reconciliation")
    assert "not reported" in lines[0]
    assert "PROJECTION_DIFFERS of user 21" in lines[1]


def test_witness_that_is_not_there_is_refused() -> None:
    with pytest.raises(NoWitness, match="nothing was found"):
        explain(small_world().run(), "A01")
    with pytest.raises(NoWitness, match="has 1 witnesses here; there is no number 7"):
        explain(planted("A01", "acknowledged_withdrawal_is_lost").run(), "A01", 7)


def test_rule_is_the_first_sentence_of_the_specification() -> None:
    assert rule_of("A01") == "a key was acknowledged and its effect is not there."


# -- on the command line


def run_of(place: Path, world: World) -> Path:
    return store(world, place / "run")


def call(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(item) for item in arguments], standalone_mode=False)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return int(result.return_value or 0), result.stdout


def test_proof_is_printed_without_colours_where_there_is_no_terminal(tmp_path: Path) -> None:
    folder = run_of(tmp_path, planted("A01", "acknowledged_withdrawal_is_lost"))
    code, out = call("explain", folder, "a01")
    assert code == 0
    assert out.startswith("A01 lost, witness 1 of 1\nRule: a key was acknowledged and its effect is not there.\n")
    assert "Attempts of key out-1\n" in out
    assert out.rstrip().splitlines()[-1].startswith("Contradiction: withdraw of 5000 was acknowledged at ")
    assert "\x1b" not in out


def test_proof_as_json_holds_the_witness_and_its_sections(tmp_path: Path) -> None:
    folder = run_of(tmp_path, planted("A01", "acknowledged_withdrawal_is_lost"))
    code, out = call("explain", folder, "A01", "--json")
    proof: dict[str, Any] = json.loads(out)
    assert code == 0
    assert proof["witness"]["key"] == "out-1"
    assert proof["sections"][0]["title"] == "Attempts of key out-1"


def test_code_without_a_witness_says_so(tmp_path: Path) -> None:
    folder = run_of(tmp_path, small_world())
    assert call("explain", folder, "A02") == (0, "A02 duplicate: nothing was found in this run\n")


def test_frame_helper_of_the_worlds_keeps_every_column() -> None:
    assert frame([{"t": 1.0}], {"t": pl.Float64()}).rows() == [(1.0,)]
