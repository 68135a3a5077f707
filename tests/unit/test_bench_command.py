"""`ledgerproof bench` without a stack: arguments, exit codes, what is printed and written, and the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from compose.stack import Stack
from ledgerproof import cli
from ledgerproof.bench import run as bench_run
from ledgerproof.bench.context import Bench, BenchFailed
from ledgerproof.bench.lag import BACKLOGS, DONE, values
from ledgerproof.bench.options import FULL, QUICK, ROW_NAMES, BenchOptions
from ledgerproof.bench.read_rows import parse_wrk
from ledgerproof.bench.row import Row
from ledgerproof.bench.run import MEASURE, BenchResult
from ledgerproof.bench.sql import load
from ledgerproof.bench.usage import per_operation_ms, spent
from ledgerproof.progress import Progress
from reports.bench_page import render_bench


def result(**fields: Any) -> BenchResult:
    rows = [
        Row(name="floor_unnest", variant="batch 64", rate=10_000.0, p50_ms=6.0, p99_ms=9.0, samples=30_000),
        Row(
            name="http_single_bets_accepted",
            rate=4_600.0,
            p50_ms=20.0,
            p99_ms=80.0,
            ratio_to_floor=0.46,
            floor="floor_unnest",
            cpu_ms_per_op={"api": 0.21, "postgres": 0.13},
            details={"search": [{"rate": 4700.0, "held": "not held", "why": "p99 <b>120</b> ms", "confirming": False}]},
        ),
        Row(
            name="bytes_per_bet",
            unit="bytes/bet",
            details={
                "bytes_per_bet": {"accepted": 1000.0, "whole_life": 3000.0},
                "when_accepted": {"bets": 300.0, "WAL": 1200.0},
                "when_settled": {"bets": 300.0, "orders": 700.0, "WAL": 5000.0},
            },
        ),
    ]
    usual: dict[str, Any] = {
        "version": "0",
        "commit": "abc",
        "machine": {"cpu": "X", "cores": 2, "memory_gb": 4.0, "os": "Linux", "python": "3.11"},
        "started_at": "2026-01-01T00:00:00+00:00",
        "duration_s": 300.0,
        "quick": True,
        "servers": 1,
        "apis": 1,
        "rows": rows,
        "checked": True,
        "checks": {"broken_chain": 0},
        "unchecked": "",
        "peak_rss_mb": {"api0": 90.0},
        "residue": [],
    }
    return BenchResult(**(usual | fields))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[BenchOptions]:
    """Replace the measuring by a fixed result; return the options it was given."""
    monkeypatch.chdir(tmp_path)
    given: list[BenchOptions] = []

    def bench(options: BenchOptions, _: Progress) -> BenchResult:
        given.append(options)
        return answers[-1]

    answers = [result()]
    monkeypatch.setattr(bench_run, "bench", bench)
    return given


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.cli, ["bench", *arguments], standalone_mode=False)
    code = done.return_value if done.exception is None else getattr(done.exception, "exit_code", 99)
    return int(code), done.output


@pytest.mark.parametrize(
    "arguments",
    [["--only", "nonsense"], ["--servers", "0"], ["--apis", "99"], ["--rate", "0"], ["--aged", "-1"], ["extra"]],
)
def test_wrong_arguments_measure_nothing(arguments: list[str], asked: list[BenchOptions]) -> None:
    assert call(*arguments)[0] == 2
    assert asked == []


def test_options_reach_the_run_and_rows_keep_their_order(asked: list[BenchOptions]) -> None:
    call("--quick", "--only", "reads_redis", "--only", "floor_unnest", "--servers", "2", "--rate", "50", "--aged", "7")
    (options,) = asked
    assert options.only == ("floor_unnest", "reads_redis")
    assert (options.servers, options.apis, options.rate, options.quick) == (2, 1, 50.0, True)
    assert options.sizes == replace(QUICK, aged=7)
    call()
    assert asked[-1].only == ROW_NAMES
    assert asked[-1].sizes == FULL


def test_table_names_every_row_and_says_that_the_ledger_was_checked(asked: list[BenchOptions]) -> None:
    code, out = call()
    assert code == 0
    assert "floor_unnest (batch 64)" in out
    assert "4,600" in out
    assert "checked: true" in out


def test_json_and_page_are_written(asked: list[BenchOptions], tmp_path: Path) -> None:
    call("--json", "b.json", "--html", "b.html")
    stored = json.loads((tmp_path / "b.json").read_text())
    assert stored["checked"] is True
    assert {"name", "rate", "p50_ms", "p99_ms", "ratio_to_floor"} <= stored["rows"][0].keys()
    page = (tmp_path / "b.html").read_text()
    assert "VALID" in page
    assert "p99 &lt;b&gt;120&lt;/b&gt; ms" in page, "what a row says is text and never markup"
    assert "<script" not in page
    code, out = call("--json")
    assert json.loads(out)["rows"][1]["name"] == "http_single_bets_accepted"
    assert code == 0


def test_a_path_that_cannot_be_written_is_found_before_measuring(asked: list[BenchOptions]) -> None:
    done = CliRunner().invoke(cli.cli, ["bench", "--json", "/nonexistent/b.json"], standalone_mode=False)
    assert "/nonexistent/b.json" in str(done.exception)
    assert asked == []


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, 0),
        ({"checks": {"broken_chain": 2}, "checked": False}, 20),
        ({"rows": [Row(name="reads_redis", valid=False, reason="only 3 of 9 answers came from redis")]}, 30),
        ({"checked": False, "checks": {}, "unchecked": "NotDrained: 7 events"}, 30),
        ({"residue": ["pg0"]}, 50),
    ],
)
def test_exit_code_says_what_the_result_is_worth(fields: dict[str, Any], code: int) -> None:
    from ledgerproof.bench.command import exit_code

    assert exit_code(result(**fields)) == code


@pytest.mark.parametrize(
    ("fields", "title"),
    [
        ({}, "VALID"),
        ({"checks": {"broken_chain": 2}, "checked": False}, "LEDGER WRONG"),
        ({"rows": [Row(name="reads_redis", valid=False, reason="not from redis")], "checked": None}, "PARTLY VALID"),
        ({"rows": [], "checked": None, "checks": {}}, "NOTHING MEASURED"),
    ],
)
def test_page_never_praises_what_does_not_count(fields: dict[str, Any], title: str, tmp_path: Path) -> None:
    page = render_bench(msgspec.to_builtins(result(**fields)), tmp_path / "page.html").read_text()
    assert f'<h1 id="verdict-title">{title}</h1>' in page


def test_every_row_has_a_function_and_every_function_a_row() -> None:
    assert set(MEASURE) == set(ROW_NAMES)


def test_a_row_that_fails_is_invalid_with_its_reason_and_the_next_one_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Nothing:
        """A stack that was asked for and has nothing in it."""

        residue: list[str] = []  # noqa: RUF012
        downs = 0

        def down(self) -> list[str]:
            self.downs += 1
            return []

        def token(self) -> str:
            return "secret"

        def nodes_of(self, _prefix: str) -> list[str]:
            return []

        def status(self, *, memory: bool = True) -> list[Any]:
            return []

        config = type("Config", (), {"servers": ()})()

    stack = Nothing()

    def fail(_: Bench) -> None:
        raise BenchFailed("no such luck")

    def stop(_: Bench) -> None:
        raise KeyboardInterrupt

    def measure(run: Bench) -> None:
        run.add(run.row("floor_pgbench", rate=5.0, floor="floor_unnest"))

    monkeypatch.setattr(Stack, "start", lambda *_, **__: stack)
    monkeypatch.setitem(MEASURE, "floor_unnest", fail)
    monkeypatch.setitem(MEASURE, "floor_pgbench", measure)
    options = BenchOptions(only=("floor_unnest", "floor_pgbench"), root=tmp_path)
    found = bench_run.bench(options, Progress(quiet=True))
    assert [(row.name, row.valid) for row in found.rows] == [("floor_unnest", False), ("floor_pgbench", True)]
    assert "no such luck" in found.rows[0].reason
    assert found.rows[1].ratio_to_floor is None, "there is no valid floor to compare with"
    assert found.checked is None
    assert stack.downs == 1
    late = bench_run.bench(replace(options, sizes=replace(QUICK, begin_s=-1.0)), Progress(quiet=True))
    assert [row.valid for row in late.rows] == [False, False]
    assert "time of the whole benchmark ran out" in late.rows[1].reason
    assert stack.downs == 2
    monkeypatch.setitem(MEASURE, "floor_pgbench", stop)
    with pytest.raises(KeyboardInterrupt):
        bench_run.bench(options, Progress(quiet=True))
    assert stack.downs == 3, "Ctrl-C takes the stack down"


# --- small parts ------------------------------------------------------------------------------------------


def test_backlogs_are_summed_over_topics_and_counters_kept_apart() -> None:
    text = (
        'kafka_consumer_lag{group="matcher",topic="a"} 3.0\nkafka_consumer_lag{group="matcher",topic="b"} 4.0\n'
        'outbox_unpublished{server="pg0"} 1e+03\nworker_jobs_processed_total{group="matcher"} 9.0\n'
        'worker_jobs_processed_created{group="matcher"} 1.7e+09\n'
    )
    assert values(text, BACKLOGS) == {"matcher lag": 7.0, "outbox pg0": 1000.0}
    assert values(text, DONE) == {"matcher lag": 9.0}


def test_cpu_of_a_replaced_process_counts_from_its_beginning() -> None:
    assert spent({"api": 10.0, "relay": 8.0}, {"api": 12.5, "relay": 1.0}) == {"api": 2.5, "relay": 1.0}
    assert per_operation_ms({"api": 2.5}, 1000) == {"api": 2.5}
    assert per_operation_ms({"api": 2.5}, 0) == {}


def test_what_wrk_prints_is_read_in_every_unit() -> None:
    text = "  Latency Distribution\n     50%  812.00us\n     75%    2ms\n     99%    1.20s \nRequests/sec:   2163.17\n"
    assert parse_wrk(text) == {"rate": 2163.17, "p50_ms": pytest.approx(0.812), "p99_ms": 1200.0}
    with pytest.raises(BenchFailed):
        parse_wrk("unable to connect")


@pytest.mark.parametrize("file", ["consistency", "disk", "floor"])
def test_sql_blocks_are_named_and_not_empty(file: str) -> None:
    assert all(load(file).values())
