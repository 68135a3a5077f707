"""What the live auditor says at the end: a finding outweighs what it could not see, and neither is ever a pass."""

import re
from typing import Any

import pytest
from click.testing import CliRunner

from invariants.anomalies.common import MAX_WITNESSES, Witness
from invariants.verdict import Verdict
from ledgerproof import cli
from ledgerproof.assess import _add_live_audit
from ledgerproof.live.findings import CODES, Findings
from ledgerproof.live.server import ROUND_POLLS, STRETCH_BLOCKS, Stretch


def witness(number: int = 1, code: str = "A11") -> Witness:
    return Witness(code, f"user {number} has another balance", user=number)


def test_nothing_found_and_everything_seen_passes() -> None:
    assert Findings().verdict is Verdict.PASS


def test_a_finding_is_counted_once_however_often_it_is_seen() -> None:
    findings = Findings()
    for _ in range(3):
        findings.add([witness(1), witness(2)])
    assert findings.counts == {"A11": 2}
    assert findings.verdict is Verdict.INVARIANT_VIOLATED
    assert findings.metrics.registry.get_sample_value("ledgerproof_audit_findings_total", {"code": "A11"}) == 2


def test_witnesses_are_kept_in_bounds_and_counted_beyond() -> None:
    findings = Findings()
    findings.add([witness(number) for number in range(100)])
    assert (findings.counts["A11"], len(findings.witnesses)) == (100, MAX_WITNESSES)


def test_a_store_that_cannot_be_read_is_no_pass_until_it_is_read_again() -> None:
    findings = Findings()
    unseen = lambda store: findings.metrics.registry.get_sample_value(  # noqa: E731
        "ledgerproof_audit_unseen", {"store": store}
    )
    findings.cannot_see("pg0", "refused")
    findings.cannot_see("pg1", "refused")
    findings.cannot_see("pg1", "refused")
    assert (findings.verdict, unseen("postgres"), unseen("kafka")) == (Verdict.INVALID, 1, 0)
    findings.sees("pg0")
    assert (findings.verdict, unseen("postgres")) == (Verdict.INVALID, 1)
    findings.sees("pg1")
    assert (findings.verdict, unseen("postgres")) == (Verdict.PASS, 0)
    assert findings.notes == [
        "pg0 cannot be read: refused",
        "pg1 cannot be read: refused",
        "pg0 is read again",
        "pg1 is read again",
    ]


def test_what_was_missed_for_good_stays_missed() -> None:
    findings = Findings()
    findings.missed("rows were too many")
    findings.sees("pg0")
    assert findings.verdict is Verdict.INVALID
    findings.add([witness()])
    assert findings.verdict is Verdict.INVARIANT_VIOLATED


def test_the_labels_of_the_metrics_are_bounded_and_there_from_the_start() -> None:
    text = Findings().metrics.exposition().decode()
    assert set(re.findall(r'findings_total\{code="(\w+)"\}', text)) == set(CODES)


def said(**parts: Any) -> dict[str, Any]:
    return {"findings": {}, "witnesses": [], "unseen": {}, "missed": []} | parts


@pytest.mark.parametrize(
    ("result", "verdicts", "word"),
    [
        (said(), [], ""),
        (
            said(findings={"A11": 1}, witnesses=[{"code": "A11", "text": "user 1 …"}]),
            [Verdict.INVARIANT_VIOLATED],
            "the live auditor found A11 1 times, and no check agrees with it",
        ),
        (said(unseen={"pg0": "refused"}), [Verdict.INVALID], "could not see everything: pg0: refused"),
        (said(missed=["no result"]), [Verdict.INVALID], "could not see everything: no result"),
    ],
)
def test_what_it_says_counts_in_the_verdict_of_a_run(
    result: dict[str, Any], verdicts: list[Verdict], word: str
) -> None:
    parts: list[Verdict] = []
    reasons: list[str] = []
    _add_live_audit(result, None, parts, reasons)
    assert parts == verdicts
    assert word in " ".join(reasons)


def test_a_round_looks_at_every_block_and_at_what_changed_since_the_round_before() -> None:
    stretch = Stretch(began="50")
    looks = [(*stretch.next(10, str(100 + number)), stretch.since) for number in range(8)]
    assert looks[:4] == [(0, 3, "50"), (3, 6, "50"), (6, 9, "50"), (9, 2**31, "50")]
    # What changed in block 0 after look 0 began is new to look 4, which begins where the round before it began.
    assert looks[4:] == [(0, 3, "100"), (3, 6, "100"), (6, 9, "100"), (9, 2**31, "100")]


def test_a_large_table_takes_a_longer_round_and_not_a_larger_look() -> None:
    stretch, blocks = Stretch(began="3"), 10 * STRETCH_BLOCKS
    looks = 0
    while not stretch.rounds:
        first, end = stretch.next(blocks, "9")
        assert end == 2**31 or end - first <= STRETCH_BLOCKS
        looks += 1
    assert looks == 10 > ROUND_POLLS


def test_the_command_says_what_it_needs() -> None:
    result = CliRunner().invoke(cli.cli, ["audit"])
    assert result.exit_code == 2
    assert "--live" in result.output
