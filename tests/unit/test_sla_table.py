"""`ledgerproof sla`: measured, extrapolated and not measured are three things, and only the first is ever met."""

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from click.testing import CliRunner
from test_bench_command import result as bench_result

from invariants.timeline import SERIES_SCHEMA, TIMELINE_SCHEMA
from ledgerproof import cli
from ledgerproof.bench.row import Row
from ledgerproof.checklist.item import Answer
from ledgerproof.checklist.run import Checked
from ledgerproof.sla_table import EXTRAPOLATED, MEASURED, NOT_MEASURED, Line, table
from reports.sla_page import build_sla, render_sla


def level(metric: str, target: object, measured: float | None, unit: str, met: bool | None) -> dict[str, Any]:
    return {
        "metric": metric,
        "target": target,
        "measured": measured,
        "interval": None,
        "unit": unit,
        "met": met,
        "method": f"how {metric} was measured",
    }


VERDICT: dict[str, Any] = {
    "verdict": "PASS",
    "reasons": [],
    "run": "r1",
    "commit": "abc",
    "version": "0",
    "machine": {"cpu": "X", "cores": 2, "memory_gb": 4.0, "os": "Linux", "python": "3.11"},
    "duration_s": 60.0,
    "config": {"rate": 200.0, "duration_s": 60.0, "servers": 4, "apis": 2},
    "anomalies": {"A02": 0, "A22": 0, "A27": 0},
    "faults": [{"kind": "kill", "target": "pg1"}, {"kind": "kill", "target": "relay0"}],
    "operations": [
        {"op": "bet", "phase": "before", "count": 4_800},
        {"op": "bet", "phase": "fault", "count": 1_000},
        {"op": "bet", "phase": "recovery", "count": 200},
    ],
    "residue": [],
    "sla": [
        level("Availability", ">= 99.99", 100.0, "%", True),
        level("Availability during faults", None, 90.0, "%", None),
        level("API p99", "< 500", 12.5, "ms", True),
        level("Consumer lag", "< 10000", 700.0, "records", True),
        level("Duplicate entries", 0, 0.0, "entries", True),
        level("Reconciliation match", "100", 100.0, "%", True),
        level("Recovery: kill pg1", "< 600", 4.2, "s", True),
        level("Recovery: kill relay0", "< 300", None, "s", False),
        level("Worker throughput", "> 100000", 640.0, "events/s", None),
    ],
}
BENCH: dict[str, Any] = {
    "commit": "abc",
    "started_at": "2026-01-01T00:00:00+00:00",
    "machine": {"cpu": "X"},
    "rows": [
        {
            "name": "projector_events",
            "valid": True,
            "rate": 4_000.0,
            "unit": "events/s",
            "samples": 40_000,
            "duration_s": 10,
        },
        {
            "name": "relay_events",
            "valid": True,
            "rate": 9_000.0,
            "unit": "events/s",
            "samples": 40_000,
            "duration_s": 4,
        },
        {"name": "settler_bets", "valid": False, "rate": 1.0, "unit": "bets/s", "samples": 0, "duration_s": 0},
        {
            "name": "http_single_bets_accepted",
            "valid": True,
            "rate": 800.0,
            "unit": "bets/s",
            "samples": 4_000,
            "duration_s": 6,
            "p99_ms": 70.0,
        },
    ],
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(VERDICT), **fields}


def without_level(metric: str) -> dict[str, Any]:
    return changed(sla=[row for row in VERDICT["sla"] if row["metric"] != metric])


def line(lines: list[Line], level: str, of: str = "") -> Line:
    (found,) = [line for line in lines if line.level == level and of in line.of]
    return found


def test_every_level_of_the_architecture_has_a_line() -> None:
    found = table(VERDICT)
    assert {line.level for line in found.lines} >= {
        "Availability",
        "API latency p99",
        "Worker throughput",
        "Consumer lag",
        "Duplicate entries",
        "Reconciliation match",
        "Recovery: API crash",
        "Recovery: worker crash",
        "Recovery: single database crash",
        "Recovery: entire region down",
        "Recovery: data corruption",
    }
    for one in found.lines:
        assert one.method, one
        assert one.kind in (MEASURED, EXTRAPOLATED, NOT_MEASURED)
        assert one.met is None or one.kind == MEASURED, "only what was measured is met or missed"


def test_the_month_is_calculated_from_what_the_faults_cost() -> None:
    month = line(table(VERDICT).lines, "Availability", "month")
    assert (month.kind, month.met) == (EXTRAPOLATED, None)
    # 120 of 1,200 requests at 100/s are 1.2 s of all; 0.01 % of 30 days are 259.2 s.
    assert "216 rounds of the same 2 faults" in month.says
    assert "259.2" in month.method
    assert "lost 120 requests at 100/s, that is 1.20 s" in month.method


def test_a_small_sample_says_that_it_is_one() -> None:
    few = changed(
        sla=[dict(row, interval=[99.97, 100.0] if row["metric"] == "Availability" else None) for row in VERDICT["sla"]]
    )
    calm = line(table(few).lines, "Availability", "outside")
    assert calm.met is True
    assert "too few requests to exclude less" in calm.method
    assert "too few" not in line(table(VERDICT).lines, "Availability", "outside").method


def test_a_row_that_was_not_valid_says_why() -> None:
    bad = {"name": "http_single_bets_accepted", "valid": False, "reason": "the generator was late", "rate": None}
    api = line(table(VERDICT, {**BENCH, "rows": [bad]}).lines, "API latency p99", "100,000")
    assert (api.kind, api.method.split(": ")[1]) == (NOT_MEASURED, "the generator was late")


def test_without_faults_there_is_no_month_to_calculate() -> None:
    calm = without_level("Availability during faults") | {"faults": []}
    month = line(table(calm).lines, "Availability", "month")
    assert month.kind == NOT_MEASURED
    assert "no fault" in month.method


def test_rates_are_extrapolated_from_the_slowest_worker_only_with_a_benchmark() -> None:
    bare = line(table(VERDICT, no_bench="nobody measured").lines, "Worker throughput", "100 consumers")
    assert (bare.kind, bare.method) == (NOT_MEASURED, "nobody measured")
    found = table(VERDICT, BENCH).lines
    whole = line(found, "Worker throughput", "100 consumers")
    assert whole.kind == EXTRAPOLATED
    assert whole.says == "36 of the slowest worker"  # 100,000 / (0.7 × 4,000), rounded up
    assert "280,000 events/s" in whole.method
    assert line(found, "Worker throughput", "one projector").measured == 4_000
    assert not [one for one in found if "settler" in one.of], "an invalid row is no figure"
    api = line(found, "API latency p99", "100,000")
    assert (api.kind, api.says) == (EXTRAPOLATED, "125 machines like this one")


def test_a_missed_level_is_named_and_ends_with_10() -> None:
    found = table(VERDICT)
    worker = line(found.lines, "Recovery: worker crash")
    assert (worker.kind, worker.met, worker.result) == (MEASURED, False, "MISSED")
    assert worker.says == "not recovered"
    assert found.missed == ["Recovery: worker crash"]
    assert found.exit_code == 10


def test_what_was_not_proven_outweighs_what_was_missed() -> None:
    assert table(changed(verdict="INVALID", reasons=["not drained"])).unproven == ["the run ended INVALID: not drained"]
    assert table(changed(verdict="INVARIANT_VIOLATED")).exit_code == 30
    assert table(without_level("Consumer lag")).unproven == ["Consumer lag was not measured by the run"]
    unjudged = table(changed(anomalies={"A02": 0}))
    assert unjudged.exit_code == 30
    assert "A22, A27" in unjudged.unproven[0]


def test_the_crash_of_an_api_process_comes_from_a_checklist() -> None:
    assert line(table(VERDICT).lines, "Recovery: API crash").kind == NOT_MEASURED
    quick, slow = (line(table(VERDICT, api_ready_s=s).lines, "Recovery: API crash") for s in (2.3, 61.0))
    assert (quick.kind, quick.met, quick.says) == (MEASURED, True, "2.3 s")
    assert slow.met is False


def test_all_met_ends_with_0() -> None:
    good = changed(
        sla=[
            dict(row, measured=row["measured"] or 3.0, met=row["met"] in (True, False) or None)
            for row in VERDICT["sla"]
        ]
    )
    assert table(good).exit_code == 0


# -- command ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "verdict.json").write_text(json.dumps(VERDICT))
    pl.DataFrame(
        [{"t": 1.0, "name": "kafka_consumer_lag", "node": "matcher", "value": 900.0}], schema=SERIES_SCHEMA
    ).write_parquet(folder / "series.parquet")
    pl.DataFrame(
        [{"t": 5.0, "kind": "drift_planted"}, {"t": 12.5, "kind": "drift_repaired"}], schema=TIMELINE_SCHEMA
    ).write_parquet(folder / "timeline.parquet")
    return folder


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.cli, ["sla", *arguments], standalone_mode=False)
    code = done.return_value if done.exception is None else getattr(done.exception, "exit_code", 99)
    return int(code), done.output if done.exception is None else str(done.exception)


def test_a_stored_run_gives_table_page_and_json(run: Path, tmp_path: Path) -> None:
    code, said = call("--run", str(run), "--no-bench", "--json", str(tmp_path / "sla.json"))
    assert code == 10
    assert "MISSED: Recovery: worker crash" in said
    stored = json.loads((tmp_path / "sla.json").read_text())
    assert stored["exit_code"] == 10
    assert {line["result"] for line in stored["lines"]} == {
        "met", "measured", "MISSED", "extrapolated", "not measured here",
    }  # fmt: skip
    assert [one["measured"] for one in stored["lines"] if one["of"] == "of this run, faults included"] == [900.0]
    (corruption,) = [one for one in stored["lines"] if one["level"] == "Recovery: data corruption"]
    assert corruption["says"] == "a wrong read balance was reported and repaired after 7.5 s"
    page = (run / "sla.html").read_text()
    assert "SLA MISSED" in page
    assert "<script" not in page
    code, said = call("--run", str(run), "--no-bench", "--json", "--html", str(tmp_path / "other.html"))
    assert json.loads(said)["missed"] == ["Recovery: worker crash"]
    assert (tmp_path / "other.html").exists()


def test_a_stored_benchmark_is_used(run: Path, tmp_path: Path) -> None:
    rows = [Row(name="projector_events", unit="events/s", rate=5_000.0, samples=9, duration_s=1.0)]
    path = tmp_path / "bench.json"
    path.write_bytes(msgspec.json.encode(bench_result(rows=rows)))
    _, said = call("--run", str(run), "--bench", str(path))
    assert "29 of the slowest worker" in said


def test_a_stored_checklist_is_used(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "checklist.json"
    chaos = Answer("chaos", "s", "t", "ok", "seen", 1.0, {"api_ready_s": 3.25})
    checked = Checked(stack="s", own=True, shape="", made_at="", commit="", machine="", answers=[chaos])
    path.write_bytes(msgspec.json.encode({**msgspec.to_builtins(checked), "exit_code": 0}))
    _, said = call("--run", str(run), "--no-bench", "--checklist", str(path), "--json")
    (found,) = [one for one in json.loads(said)["lines"] if one["level"] == "Recovery: API crash"]
    assert (found["result"], found["measured"]) == ("met", 3.25)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(checked, answers=[])))
    assert "does not hold the item chaos" in call("--run", str(run), "--checklist", str(path))[1]
    path.write_text("[]")
    assert "not a result of this version's checklist" in call("--run", str(run), "--checklist", str(path))[1]


def test_bad_input_is_told_with_what_to_do(run: Path, tmp_path: Path) -> None:
    def problem(*arguments: str) -> str:
        done = CliRunner().invoke(cli.cli, ["sla", *arguments], standalone_mode=False)
        assert done.exception is not None
        return str(done.exception)

    assert "is not a run folder" in problem("--run", str(tmp_path / "none"), "--no-bench")
    assert "exclude each other" in problem("--run", str(run), "--no-bench", "--bench", "b.json")
    assert "cannot read" in problem("--run", str(run), "--bench", str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    assert "ledgerproof bench --quick --json" in problem("--run", str(run), "--bench", str(tmp_path / "bad.json"))
    assert call("--run", str(run), "--no-bench", "--duration", "1")[0] == 2
    (run / "verdict.json").write_text(json.dumps(changed(plan={"title": "x"})))
    assert "is the run of a plan" in problem("--run", str(run), "--no-bench")
    (run / "verdict.json").write_text(json.dumps({"verdict": "PASS"}))
    assert "not of this version" in problem("--run", str(run), "--no-bench")
    (run / "verdict.json").write_text("{")
    assert "cannot be read" in problem("--run", str(run), "--no-bench")
    (run / "verdict.json").unlink()
    assert "ledgerproof check --write" in problem("--run", str(run), "--no-bench")


# -- page ------------------------------------------------------------------------------------------------


def page_of(verdict: dict[str, Any], path: Path) -> str:
    found = table(verdict, BENCH)
    lines = [{**msgspec.to_builtins(line), "result": line.result} for line in found.lines]
    result = {**msgspec.to_builtins(found), "lines": lines}
    assert build_sla(result).levels is not None
    return render_sla(result, path).read_text()


def test_the_page_says_which_of_the_three_a_line_is_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    text = page_of(changed(verdict="INVALID", reasons=["<b>not drained</b>"]), tmp_path / "a.html")
    assert "NOT PROVEN" in text
    assert "&lt;b&gt;not drained&lt;/b&gt;" in text
    assert text.count("extrapolated") >= 3
    assert "not measured here" in text
