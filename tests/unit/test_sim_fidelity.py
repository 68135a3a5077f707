"""Scores of forecasts: by hand arithmetic, beside baselines that know the same calibration."""

import json
import math
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from ledgerproof import cli
from ledgerproof.modelling import fidelity_command
from sim.cases import Measured, Shape, Window
from sim.costs import Interval
from sim.fidelity import Fidelity, Score, measured_utilisation, mmc_ms, score, summarised
from sim.outages import OutageScore
from sim.prediction import Forecast
from tests.model_costs import BUSY, calibration_of

SHAPE = Shape(name="made_up", why="a case of a test")
KNOWN = calibration_of()
SERVICE_MS = (
    0.0 + 0.01 + 2 * 0.03 + 0.05 + 0.1 + 0.4 + 0.05  # generator, event loop, its batch, the session that posts
    + (0.02 + 0.02) + (0.03 + 0.03) + (0.02 + 0.01)  # relay, matcher, projector
    + 0.02  # the broker
)  # fmt: skip
"""CPU of one bet that comes alone, with the costs of tests/model_costs.py."""


def window(rate: float | None, p50: float, p99: float, *, accepted: float | None = None, lag: float = 1.0) -> Window:
    per_s = accepted or rate or 0.0
    return Window(
        offered_per_s=rate,
        read_share=0.0,
        burst=1,
        duration_s=10.0,
        due=int(per_s * 10),
        accepted=int(per_s * 10),
        statuses={},
        curves_ms={"bets": [p50, p99]},
        accepted_of={"bets": int(per_s * 10)},
        percents=[50.0, 99.0],
        lag_p99_ms=lag,
        cpu_s={"generator": 2.0, "api0": 9.0, "pg0": 8.0, "pg0 ledger_api": 7.0, "redis": 0.5},
        busy_s=19.5,
        steal_s=0.0,
        posts=100,
        post_s=12.0,
        post_buckets={},
        posted=1000,
    )


def measured(*windows: Window, saturated: Window | None) -> Measured:
    return Measured(
        shape=SHAPE,
        commit="f1932bd0c4f5",
        machine={},
        started_at="2026-01-01T00:00:00+00:00",
        cores=2,
        connections=128,
        idle=None,
        windows=list(windows),
        saturation=saturated,
    )


def said(rate: float | None, throughput: float, p50: float, p99: float, bottleneck: str = "api") -> Forecast:
    def at(value: float) -> Interval:
        return Interval(value, value, value)

    return Forecast(
        shape=SHAPE,
        rate_per_s=rate,
        duration_s=10.0,
        throughput_per_s=at(throughput),
        latency_ms={"bets": {"p50": at(p50), "p99": at(p99)}},
        utilisation={"cores": 0.9},
        bottleneck=bottleneck,
        backlog_peak={},
        refused_share=0.0,
    )


LOWEST = window(60.0, 2.0, 4.0)
SEEN = measured(
    window(300.0, 4.0, 10.0),
    window(800.0, 8.0, 20.0),
    window(950.0, 100.0, 400.0),
    saturated=window(None, 50, 90, accepted=1000),
)
SAID = [
    said(None, 1100.0, 50, 90),
    said(300.0, 300.0, 5.0, 8.0),
    said(800.0, 800.0, 7.0, 30.0),
    said(950.0, 950.0, 10.0, 40.0),
]


@pytest.fixture(scope="module")
def found() -> Score:
    return score(SEEN, SAID, KNOWN, LOWEST)


# --- one case ---------------------------------------------------------------------------------------------------------


def test_errors_are_forecast_minus_measured_by_measured(found: Score) -> None:
    assert found.throughput_error == pytest.approx(0.1)
    assert found.rho == pytest.approx([0.3, 0.8, 0.95])
    assert found.p50_errors == pytest.approx([0.25, -0.125, -0.9])
    assert found.p99_errors == pytest.approx([-0.2, 0.5, -0.9])


def test_the_largest_error_up_to_four_fifths_of_saturation_is_the_score(found: Score) -> None:
    # What was measured at 0.95 is in the table and not in the score.
    assert found.p50_error == pytest.approx(0.25)
    assert found.p99_error == pytest.approx(0.5)


def test_the_bottleneck_is_judged_by_what_was_measured(found: Score) -> None:
    # 19 CPU seconds of two cores in ten seconds; sessions are in their server's.
    assert found.utilisation == pytest.approx(
        {"cores": 0.975, "api": 0.9, "writer": 0.6, "redis": 0.05, "generator": 0.2}
    )
    assert found.bottleneck == "cores"
    assert not found.bottleneck_right
    right = score(SEEN, [said(None, 1100.0, 1, 1, "cores")], KNOWN, LOWEST)
    assert right.bottleneck_right


def test_windows_without_a_forecast_or_with_a_late_generator_are_not_scored() -> None:
    seen = measured(window(300.0, 4.0, 10.0, lag=9.0), window(500.0, 4.0, 10.0), saturated=SEEN.saturation)
    found = score(seen, SAID, KNOWN, LOWEST)
    assert found.rho == []
    assert found.p50_error is None
    assert found.p99_error is None


def test_a_case_without_saturation_is_refused() -> None:
    with pytest.raises(ValueError, match="no forecast or no measurement of saturation"):
        score(SEEN, SAID[1:], KNOWN, LOWEST)
    with pytest.raises(ValueError, match="no forecast or no measurement of saturation"):
        score(measured(saturated=None), SAID, KNOWN, LOWEST)
    with pytest.raises(ValueError, match="saturation was not measured"):
        measured_utilisation(measured(saturated=None))


# --- baselines --------------------------------------------------------------------------------------------------------


def test_both_baselines_let_the_cores_be_divided_by_the_cpu_of_a_request(found: Score) -> None:
    for name in ("mmc", "linear"):
        assert found.baselines[name]["throughput_error"] == pytest.approx(2 / SERVICE_MS * 1000 / 1000 - 1)


def test_the_linear_baseline_has_the_latencies_of_the_lowest_rate(found: Score) -> None:
    # 2 ms against 8 ms, and 4 ms against 20 ms.
    assert found.baselines["linear"]["p50_error"] == pytest.approx(2 / 8 - 1)
    assert found.baselines["linear"]["p99_error"] == pytest.approx(4 / 20 - 1)


def test_mmc_without_waiting_is_its_exponential_service() -> None:
    assert mmc_ms(1e-9, 2.0, 2, 0.5) == pytest.approx(2.0 * math.log(2))
    assert mmc_ms(1e-9, 2.0, 2, 0.99) == pytest.approx(2.0 * math.log(100))


def test_mmc_with_one_server_waits_by_the_tail_of_mm1() -> None:
    # M/M/1 at ρ = 0.5: P(W > t) = 0.5 · exp(−t / 4 ms) for a service of 2 ms.
    assert mmc_ms(250.0, 2.0, 1, 0.99) == pytest.approx(2 * math.log(100) + 4 * math.log(0.5 / 0.01))
    assert mmc_ms(250.0, 2.0, 1, 0.5) == pytest.approx(2 * math.log(2))


def test_mmc_beyond_its_servers_never_ends() -> None:
    assert mmc_ms(1000.0, 2.0, 2, 0.5) == math.inf


def test_reads_cost_what_reads_cost() -> None:
    reads = msgspec.structs.replace(SEEN, shape=Shape(name="reads", why="", read_share=1.0))
    found = score(reads, SAID, KNOWN, LOWEST)
    read_ms = 0.01 + 2 * 0.03 + 0.05 + 0.1 + 0.005
    assert found.baselines["mmc"]["throughput_error"] == pytest.approx(2 / read_ms - 1)


# --- all cases --------------------------------------------------------------------------------------------------------


def outage(recovered: bool, peak: bool) -> OutageScore:
    return OutageScore(
        name="kill it",
        recovered_s=6.0,
        recovered_forecast_s=5.0,
        recovered_right=recovered,
        stage="outbox",
        peak=450.0,
        peak_forecast=500.0,
        peak_right=peak,
        refused=4,
        refused_forecast=3.0,
    )


def test_the_summary_counts_what_is_within_the_goals(found: Score) -> None:
    def case(throughput: float, p50: float | None, p99: float | None, right: bool) -> Score:
        return msgspec.structs.replace(
            found, throughput_error=throughput, p50_error=p50, p99_error=p99, bottleneck_right=right
        )

    cases = [case(0.1, 0.15, -0.25, True), case(-0.11, -0.16, 0.26, True), case(0.02, None, None, False)]
    made = summarised(cases, [outage(True, False), outage(True, True)])
    assert (made["cases"], made["outages"]) == (3, 2)
    assert made["throughput_within"] == 2
    assert made["throughput_median"] == pytest.approx(0.1)
    assert (made["p50_within"], made["p99_within"]) == (1, 1)
    assert made["bottlenecks_right"] == 2
    assert (made["recoveries_right"], made["peaks_right"]) == (2, 1)


def test_the_summary_of_nothing_has_no_median() -> None:
    assert summarised([], [])["throughput_median"] is None


# --- the stored table -------------------------------------------------------------------------------------------------


def fidelity(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["sim", "fidelity", *arguments])


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Score) -> Fidelity:
    outages = [outage(True, False)]
    table = Fidelity(
        commit="f1932bd0c4f5",
        machine={},
        measured_at="2026-01-01T00:00:00+00:00",
        calibration="0" * 64,
        cases=[found],
        outages=outages,
        summary=summarised([found], outages),
    )
    path = tmp_path / "fidelity.json"
    path.write_bytes(msgspec.json.encode(table))
    monkeypatch.setattr(fidelity_command, "STORED", path)
    return table


def test_the_stored_table_is_printed_without_measuring(stored: Fidelity) -> None:
    result = fidelity("--stored")
    assert result.exit_code == 0, result.output
    for words in ("made_up", "1,000", "+10%", "0.30 0.80 0.95", "api  WRONG", "kill it", "500  WRONG",
                  "throughput within 10 % in"):  # fmt: skip
        assert words in result.stdout, words
    assert "5.0  WRONG" not in result.stdout


def test_the_stored_table_as_json_is_the_table(stored: Fidelity, tmp_path: Path) -> None:
    printed = fidelity("--stored", "--json")
    assert msgspec.json.decode(printed.stdout, type=Fidelity) == stored
    assert fidelity("--stored", "--json", str(tmp_path / "copy.json")).exit_code == 0
    assert json.loads((tmp_path / "copy.json").read_text())["commit"] == "f1932bd0c4f5"


def test_without_a_stored_table_it_is_said_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity_command, "STORED", tmp_path / "absent.json")
    result = fidelity("--stored")
    assert result.exit_code == 2
    assert "`ledgerproof sim fidelity --write` makes it" in " ".join(result.output.split())


def test_a_case_that_there_is_not_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(msgspec.json.encode(calibration_of(BUSY)))
    result = fidelity("--only", "nothing", "--calibration", str(path), "--folder", str(tmp_path / "folder"))
    assert result.exit_code == 2
    assert "there is no case nothing" in " ".join(result.output.split())
    assert not (tmp_path / "folder").exists()


def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text("{}")
    result = fidelity("--calibration", str(tmp_path / "calibration.json"))
    assert result.exit_code == 2
    assert "is no calibration" in " ".join(result.output.split())
