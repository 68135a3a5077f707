"""When passes are due, what an outcome of one means for the verdict, and how the command says so."""

import base64
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from invariants.verdict import Judgement, Verdict
from ledgerproof.assess import ReconciliationFacts, _add_reconciliation
from ledgerproof.cli import cli
from ledgerproof.operate_command import exit_code_of
from reference import reconciliation
from reference.config import ConfigError, ServiceConfig
from reference.install import scram_verifier
from reference.reconciler import Schedule
from reference.reconciliation import CODES, Kind, Pass, Report, ServerReport
from reference.sql import load_sql

BASE = {
    "servers": [{"name": "pg0", "host": "localhost", "port": 1}],
    "routing": [0] * 100,
    "passwords": {},
    "kafka_bootstrap": "localhost:1",
    "redis_host": "localhost",
    "redis_port": 1,
}
EVENING = datetime(2026, 3, 4, 22, 0, tzinfo=UTC)


def config(**changes: object) -> ServiceConfig:
    return msgspec.convert({**BASE, **changes}, ServiceConfig)


def test_the_full_pass_is_due_at_two_each_night_utc_and_the_incremental_each_minute() -> None:
    schedule = Schedule(config(), EVENING, 1_000.0)
    assert schedule.due(EVENING, 1_059.9) is None
    assert schedule.due(EVENING, 1_060.0) is Kind.INCREMENTAL
    assert schedule.due(EVENING, 1_060.1) is None
    night = datetime(2026, 3, 5, 2, 0, tzinfo=UTC)
    assert schedule.due(night - timedelta(seconds=1), 1_100.0) is None
    assert schedule.due(night, 1_100.5) is Kind.FULL
    assert schedule.due(night + timedelta(minutes=1), 1_110.0) is None
    assert schedule.due(night + timedelta(days=1), 1_111.0) is Kind.FULL


def test_passes_that_were_missed_are_made_up_once() -> None:
    schedule = Schedule(config(), EVENING, 0.0)
    assert schedule.due(EVENING, 1_000.0) is Kind.INCREMENTAL
    assert schedule.due(EVENING, 1_000.5) is None
    assert schedule.missed(EVENING, datetime(2026, 3, 4, 1, 0, tzinfo=UTC))
    assert not schedule.missed(EVENING, datetime(2026, 3, 4, 2, 0, 1, tzinfo=UTC))
    assert not schedule.missed(EVENING, None), "a new server has nothing to make up"
    schedule.make_up(EVENING)
    assert schedule.due(EVENING, 1_001.0) is Kind.FULL
    assert schedule.due(EVENING, 1_001.5) is None


def test_a_schedule_can_be_switched_off() -> None:
    schedule = Schedule(config(reconcile_every_s=0.0, reconcile_full_at=""), EVENING, 0.0)
    assert schedule.due(EVENING + timedelta(days=9), 10**6) is None
    assert not schedule.missed(EVENING, EVENING - timedelta(days=9))


@pytest.mark.parametrize(
    "wrong", [{"reconcile_every_s": -1.0}, {"reconcile_overlap_s": 4.0}, {"reconcile_overlap_s": 5.0}]
)
def test_settings_that_would_see_a_late_commit_as_a_gap_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError, match="reconcile_"):
        config(**wrong)


def test_every_code_that_a_pass_can_give_is_explained_and_every_explained_one_can_be_given() -> None:
    source = Path(reconciliation.__file__).read_text() + "".join(load_sql("reconciler").values())
    prefixes = "LEDGER|BET|ESCROW|MONEY|PROJECTION|REDIS|EVENT|ENTRY|TOPIC"
    given = set(re.findall(rf"['\"]((?:{prefixes})_[A-Z_]+)['\"](?!:)", source))
    assert given == set(CODES)


def test_a_line_that_is_no_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a cron line"):
        Schedule(config(reconcile_full_at="at two"), EVENING, 0.0)


def test_a_pass_over_a_server_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no server pg7"):
        Pass(config(), Kind.FULL, "test", ["pg7"])


@pytest.mark.parametrize(("total", "problems", "code"), [(0, [], 0), (0, ["away"], 30), (3, ["away"], 20), (3, [], 20)])
def test_findings_outweigh_gaps_in_the_exit_code(total: int, problems: list[str], code: int) -> None:
    report = Report("id", "FULL", "me", "now", 1.0, [ServerReport("pg0", total=total, problems=problems)])
    assert exit_code_of(report) == code


def judgement(verdict: Verdict) -> Judgement:
    return Judgement({}, {}, [], {}, 0, 0, [verdict])


def test_a_finding_of_the_reconciler_alone_is_a_violation_and_a_disagreement() -> None:
    parts: list[Verdict] = []
    reasons: list[str] = []
    said = ReconciliationFacts(passes=3, findings={"LEDGER_CHAIN": 2}, examples=["LEDGER_CHAIN on pg0"])
    _add_reconciliation(said, judgement(Verdict.PASS), parts, reasons)
    assert parts == [Verdict.INVARIANT_VIOLATED]
    assert reasons[0] == "the reconciler found LEDGER_CHAIN 2 times, and no check agrees with it"
    assert reasons[1:] == ["reconciler: LEDGER_CHAIN on pg0"]


def test_a_reconciler_that_saw_nothing_wrong_adds_nothing_and_one_that_saw_too_little_proves_nothing() -> None:
    parts: list[Verdict] = []
    reasons: list[str] = []
    _add_reconciliation(ReconciliationFacts(passes=3), judgement(Verdict.PASS), parts, reasons)
    assert (parts, reasons) == ([], [])
    _add_reconciliation(ReconciliationFacts(problems=["pg0: away"]), None, parts, reasons)
    assert parts == [Verdict.INVALID]
    assert reasons == ["the reconciler could not see everything: pg0: away"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["reconcile", "run"],
        ["reconcile", "status"],
        ["reconcile", "findings"],
        ["payouts", "status"],
        ["payouts", "pause", "--server", "pg0", "--reason", "why"],
        ["payouts", "resume", "--server", "pg0", "--reason", "why"],
    ],
)
def test_without_a_stack_the_commands_say_how_to_start_one(
    arguments: list[str], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    result = CliRunner().invoke(cli, arguments)
    assert "`ledgerproof up`" in str(result.exception)


@pytest.mark.parametrize("arguments", [["--server", "pg0"], ["--reason", "why"], ["--server", "pg0", "--reason", " "]])
def test_pausing_needs_a_server_and_a_reason(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, ["payouts", "pause", *arguments])
    assert result.exit_code == 2


def test_a_password_becomes_the_verifier_that_the_standard_gives() -> None:
    # The example of RFC 7677: user "user", password "pencil".
    salt = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    assert scram_verifier("pencil", salt) == (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:"
        "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )
    with pytest.raises(ValueError, match="ASCII"):
        scram_verifier("pässword")
