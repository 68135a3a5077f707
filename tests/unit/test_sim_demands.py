"""Demands are what the rows of a benchmark say, with intervals and sources; what they do not say is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ledgerproof import cli
from ledgerproof.bench.row import Row
from ledgerproof.bench.run import BenchResult
from sim.demands import (
    DEMANDS,
    REPEATABILITY,
    BenchFile,
    BenchRefused,
    Demands,
    decode_bench,
    fit_batch,
    interval,
    read_bench,
    read_demands,
    write_demands,
)
from sim.plan import PLANS, PriceTable, calculate, read_plan, read_prices
from sim.tables import TableError

WALLETS = 20_000


def row(name: str, rate: float | None = None, **fields: Any) -> dict[str, Any]:
    return {"name": name, "rate": rate, "samples": 1000, "cpu_ms_per_op": {}, **fields}


def posting(size: int) -> dict[str, Any]:
    """A batch takes 1 ms and 0.1 ms an entry, and 0.6 ms and 0.05 ms an entry of CPU: exact for every size."""
    rate = 1000 * size / (1 + 0.1 * size)
    cpu = {"client": 0.1, "postgres": 0.6 / size + 0.05}
    return row("sql_function", rate, variant=f"batch {size}", batch_size=size, cpu_ms_per_op=cpu)


def made() -> dict[str, Any]:
    """A result of the exact form, with figures by hand."""
    bets = {"api": 0.1, "kafka": 0.06, "postgres": 0.4, "redis": 0.01, "reconciler": 0.08, "generator": 0.05}
    accepted = {"WAL": 1000.0, "bets": 100.0, "bets (shard, user_id, bet_id)": 50.0, "events": 400.0,
                "events (id)": 40.0, "wallet_ledger": 200.0, "wallet_ledger (shard, user_id, seq)": 60.0}  # fmt: skip
    settled = {**accepted, "WAL": 5000.0, "events": 900.0, "fills": 80.0, "wallet_ledger": 300.0}
    return {
        "version": "0.1.0",
        "commit": "abc123",
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gb": 24.0, "os": "Linux", "python": "3.11"},
        "started_at": "2026-01-01T00:00:00+00:00",
        "duration_s": 300.0,
        "quick": True,
        "servers": 1,
        "apis": 1,
        "checked": True,
        "checks": {},
        "unchecked": "",
        "residue": [],
        "peak_rss_mb": {
            "pg0": 1400.0,
            "api0": 90.0,
            "redis": 10.0,
            "kafka": 250.0,
            "relay0": 60.0,
            "matcher0": 160.0,
            "settler0": 65.0,
            "projector0": 130.0,
            "reconciler0": 120.0,
        },
        "rows": [
            row("http_single_bets_sustained", 2000.0, cpu_ms_per_op=bets),
            row("http_single_bets_accepted", 3000.0, cpu_ms_per_op={**bets, "api": 0.08, "postgres": 0.3}),
            *(posting(size) for size in (1, 8, 64, 256)),
            row("relay_events", 30_000.0, cpu_ms_per_op={"relay": 0.01, "postgres": 0.04}),
            row("projector_events", 27_000.0, cpu_ms_per_op={"projector": 0.02, "postgres": 0.018}),
            row(
                "matcher_bets",
                15_000.0,
                cpu_ms_per_op={"matcher": 0.036, "postgres": 0.03},
                details={"backlog": 40_000, "bets_on_one_match": 20_000},
            ),
            row("settler_bets", 5_600.0, cpu_ms_per_op={"settler": 0.018, "postgres": 0.09}),
            row("reads_redis", 18_000.0, cpu_ms_per_op={"api": 0.05, "redis": 0.002, "postgres": 0.02}),
            row("reads_projection", 2_600.0, cpu_ms_per_op={"api": 0.3, "redis": 0.03, "postgres": 0.23}),
            row("reads_ledger", 4_000.0, cpu_ms_per_op={"api": 0.14, "redis": 0.001, "postgres": 0.2}),
            row("growth_with_age", 17_000.0, data_age=20_000, cpu_ms_per_op={"postgres": 0.05}),
            row("growth_with_age", 15_000.0, data_age=300_000, cpu_ms_per_op={"postgres": 0.06}),
            row("bytes_per_bet", None, details={"when_accepted": accepted, "when_settled": settled}),
        ],
    }


def demands_of(*results: dict[str, Any]) -> Demands:
    benches = [decode_bench(json.dumps(result).encode(), "bench.json") for result in results]
    return read_bench(benches, wallets=WALLETS, command="ledgerproof sim demands bench.json")


def without(name: str) -> dict[str, Any]:
    result = made()
    result["rows"] = [each for each in result["rows"] if each["name"] != name]
    return result


def test_the_result_of_this_version_of_the_benchmark_is_read() -> None:
    # The reader has its own small structs: this fails when the benchmark renames a field that it reads.
    assert set(BenchFile.__struct_fields__) <= set(BenchResult.__struct_fields__)
    names = {
        "name",
        "variant",
        "rate",
        "valid",
        "reason",
        "batch_size",
        "data_age",
        "samples",
        "cpu_ms_per_op",
        "details",
    }
    assert names <= set(Row.__struct_fields__)


def test_values_are_those_of_the_rows() -> None:
    demand = demands_of(made()).demand
    expected = {
        "bet_api_ms": 0.09,  # the median of 0.1 and 0.08
        "bet_postgres_ms": 0.4,  # of the sustained row alone: there the workers kept up
        "post_cpu_batch_ms": 0.6,
        "post_cpu_entry_ms": 0.05,
        "post_batch_ms": 1.0,
        "post_entry_ms": 0.1,
        "settler_per_s": 5600,
        "settler_postgres_ms": 0.09,
        "read_projection_api_ms": 0.3,
        "aging_factor": 1.2,
        "ledger_bytes_per_entry": 260,
        "outbox_bytes_per_event": 440,
        "api_mb": 90,
        # 100 bytes more a bet: 260 + 100 if all bets caused it, 260 + 200 if the settled half did; between them 410.
        "ledger_bytes_per_bet": 410,
        "outbox_bytes_per_bet": 1190,
        "wal_bytes_per_bet": 7000,
        "redis_bytes_per_wallet": 500,
    }
    assert {name: demand[name].value for name in expected} == pytest.approx(expected, rel=1e-3)
    assert (demand["ledger_bytes_per_bet"].low, demand["ledger_bytes_per_bet"].high) == (360, 460)


def test_every_value_names_its_rows_and_commit_and_lies_in_its_interval() -> None:
    for name, demand in demands_of(made()).demand.items():
        assert "abc123" in demand.source, name
        assert "bench" in demand.source, name
        assert demand.low <= demand.value <= demand.high, name


def test_few_observations_are_a_third_wide_and_many_as_wide_as_they_are() -> None:
    assert interval([9.0]) == pytest.approx((9.0, 9 * (1 - REPEATABILITY), 9 * (1 + REPEATABILITY)))
    assert interval([1.0, 9.0]) == pytest.approx((5.0, 1.0, 9.0))
    assert interval([8.0, 9.0, 9.5]) == (9.0, 8.0, 9.5)
    results = [made(), made(), made()]
    for result, rate in zip(results, (5000.0, 5600.0, 6000.0), strict=True):
        next(each for each in result["rows"] if each["name"] == "settler_bets")["rate"] = rate
    demand = demands_of(*results).demand["settler_per_s"]
    assert (demand.low, demand.value, demand.high) == (5000, 5600, 6000)
    assert "3 observations" in demand.source


def test_the_fit_of_batches_never_has_a_negative_part() -> None:
    sizes = np.array([1.0, 10.0, 100.0])
    assert fit_batch(sizes, 2 + 0.5 * sizes) == pytest.approx((2.0, 0.5))
    fixed, each = fit_batch(sizes, np.array([1.0, 10.0, 101.0]))
    assert fixed >= 0
    assert each == pytest.approx(1.0, rel=0.02)
    fixed, each = fit_batch(sizes, np.array([5.0, 4.0, 4.0]))
    assert each == 0
    assert fixed == pytest.approx(4.3, rel=0.03)


@pytest.mark.parametrize(
    ("row_name", "what"),
    [
        ("sql_function", "post_*"),
        ("relay_events", "relay_*"),
        ("settler_bets", "settler_*"),
        ("reads_redis", "read_redis_*"),
        ("growth_with_age", "aging_factor"),
        ("bytes_per_bet", "bytes"),
        ("matcher_bets", "*_bytes_per_bet"),
    ],
)
def test_a_missing_row_is_a_refusal_with_its_reason_and_no_value(row_name: str, what: str) -> None:
    demands = demands_of(without(row_name))
    reasons = {refusal.what: refusal.reason for refusal in demands.refusal}
    assert row_name in reasons[what]
    # A pattern without its star is the beginning, or the end, of the names that are then missing.
    stem = what.replace("*", "")
    if what != "bytes":
        assert [name for name in demands.demand if name.startswith(stem) and not name.endswith("_mb")] == []


def test_an_invalid_row_is_refused_with_what_made_it_so() -> None:
    result = made()
    row = next(each for each in result["rows"] if each["name"] == "relay_events")
    row.update(valid=False, reason="BenchFailed: too slow")
    reasons = {refusal.what: refusal.reason for refusal in demands_of(result).refusal}
    assert "too slow" in reasons["relay_*"]


def test_what_no_benchmark_holds_is_always_refused() -> None:
    refused = {refusal.what for refusal in demands_of(made()).refusal}
    assert refused >= {"kafka_bytes_per_event", "deposit_*", "network", "usl_coherency", "replication", "tls"}


def test_a_wrong_ledger_or_another_machine_or_another_file_is_not_taken() -> None:
    with pytest.raises(BenchRefused, match="not found consistent"):
        demands_of({**made(), "checked": False})
    other = {**made(), "machine": {"cpu": "B CPU", "cores": 8, "memory_gb": 64.0}}
    with pytest.raises(BenchRefused, match=r"A CPU.*B CPU"):
        demands_of(made(), other)
    with pytest.raises(BenchRefused, match="rows"):
        demands_of({key: value for key, value in made().items() if key != "rows"})
    with pytest.raises(BenchRefused, match="at least one"):
        demands_of()


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    demands = demands_of(made())
    write_demands(demands, tmp_path / "demands.toml")
    assert read_demands(tmp_path / "demands.toml") == demands


def test_a_stored_value_out_of_its_interval_is_named_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "demands.toml"
    write_demands(demands_of(made()), path)
    lines = path.read_text().splitlines()
    at = lines.index("[demand.relay_per_s]")
    number = next(index for index in range(at, len(lines)) if lines[index].startswith("value"))
    lines[number] = "value = 1e9"
    path.write_text("\n".join(lines))
    with pytest.raises(TableError, match=rf"demands\.toml:{number + 1}: demand\.relay_per_s\.value: must be at most"):
        read_demands(path)


def test_the_stored_demands_are_enough_for_a_plan() -> None:
    stored = read_demands(DEMANDS)
    prices = read_prices()
    figures = calculate(
        read_plan(PLANS / "million.toml").assume,
        {name: each.value for name, each in stored.demand.items()},
        {name: getattr(prices.price, name).value for name in PriceTable.__struct_fields__},
    )
    assert figures.numbers["cost"] > 0
    assert stored.command.startswith("ledgerproof sim demands ")
    assert all("bench" in each.source for each in stored.demand.values())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["sim", "demands", *arguments])


def test_the_command_writes_the_file_and_says_what_it_refused(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(made()))
    out = tmp_path / "demands.toml"
    result = run(str(tmp_path / "bench.json"), "--out", str(out))
    assert result.exit_code == 0
    assert "post_cpu_batch_ms" in result.stdout
    assert "refused: usl_coherency" in result.stdout
    stored = read_demands(out)
    assert stored.command == "ledgerproof sim demands bench.json"
    assert stored.commit == "abc123"
    answer = run(str(tmp_path / "bench.json"), "--out", str(out), "--json")
    assert json.loads(answer.stdout)["demand"]["api_mb"]["value"] == 90


@pytest.mark.parametrize(("text", "words"), [("{}", "not a result of the benchmark"), (None, "cannot read")])
def test_the_command_refuses_other_files_with_2(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text)
    result = run(str(path), "--out", str(tmp_path / "demands.toml"))
    assert not (tmp_path / "demands.toml").exists()
    if result.exit_code == 2:
        assert words in result.output
    else:
        # EnvironmentProblem becomes exit code 2 in cli.main.
        assert words in str(result.exception)
