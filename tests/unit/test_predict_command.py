"""`ledgerproof sim predict`: phases of a profile become sealed forecasts, and what cannot be forecast is refused."""

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from ledgerproof import cli
from ledgerproof.modelling.predict_command import phases_of, simulated_s
from ledgerproof.options import EnvironmentProblem
from load.profiles import read_profile
from sim.costs import Linear
from sim.prediction import Prediction, calibration_digest, intact
from tests.model_costs import BUSY, calibration_of

SLOW = calibration_of(msgspec.structs.replace(BUSY, post=Linear(2.0, 2.0)))
PROFILES = """
[two]
about = "two phases"
wallets = 10
matches = 2
hot_share = 0.1
stages = [
    { phase = "first", duration_s = 6, rate = [0, 40], mix = { bet = 1 } },
    { phase = "second", duration_s = 3, rate = 60, mix = { bet = 50, balance = 30, strong_balance = 15, entries = 5 } },
    { phase = "silent", duration_s = 3, rate = 0, mix = { bet = 1 } },
]

[much]
about = "more than can be computed"
wallets = 10
matches = 2
stages = [
    { phase = "short", duration_s = 4, rate = 10, mix = { bet = 1 } },
    { phase = "long", duration_s = 60, rate = 200000, mix = { bet = 1 } },
]

[none]
about = "nothing arrives"
wallets = 10
matches = 2
stages = [{ phase = "silent", duration_s = 3, rate = 0, mix = { bet = 1 } }]

[knee]
about = "the knee"
wallets = 10
matches = 2
knee = { low_rate = 200, high_rate = 2000, window_s = 3, tolerance = 0.5, p99_ms = 100 }
stages = [{ phase = "window", duration_s = 3, rate = 200, mix = { bet = 1 } }]

[beyond]
about = "a knee below its bounds"
wallets = 10
matches = 2
knee = { low_rate = 1500, high_rate = 2000, window_s = 3, tolerance = 0.5, p99_ms = 100 }
stages = [{ phase = "window", duration_s = 3, rate = 200, mix = { bet = 1 } }]

[trace]
about = "of a file"
wallets = 1
matches = 1
stages = [{ phase = "trace", duration_s = 1, rate = 1, mix = { balance = 1 } }]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "profiles.toml").write_text(PROFILES)
    (tmp_path / "calibration.json").write_bytes(msgspec.json.encode(SLOW))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(profile: str, *arguments: str) -> Result:
    files = ("--profiles-file", "profiles.toml", "--calibration", "calibration.json")
    return CliRunner().invoke(cli.cli, ["sim", "predict", profile, *files, *arguments])


def read(path: Path) -> Prediction:
    found = msgspec.json.decode(path.read_bytes(), type=Prediction)
    assert intact(found)
    return found


# --- phases -----------------------------------------------------------------------------------------------------------


def test_a_phase_has_the_mean_rate_and_the_mix_of_its_arrivals() -> None:
    profile = read_profile("match_day")
    phases = {
        shape.name: (shape, rate, lasts_s)
        for shape, rate, lasts_s in phases_of(profile.drawn_stages(), hot_share=0.01, servers=3, apis=2)
    }
    assert list(phases) == ["quiet", "deposits", "during", "payouts", "quiet_again"]
    shape, rate, lasts_s = phases["deposits"]
    # 5 s from 40 to 400/s and 15 s at 400/s.
    assert (rate, lasts_s) == ((5 * 220 + 15 * 400) / 20, 20)
    assert (shape.servers, shape.apis, shape.hot_share) == (3, 2, 0.01)
    assert shape.read_share == pytest.approx(0.15)
    assert phases["payouts"][0].read_share == pytest.approx(0.625)
    # 80 balances, 3 strong ones and 8 histories of a hundred arrivals.
    assert phases["during"][0].read_share == pytest.approx(0.91)


def test_factors_multiply_rates_and_durations() -> None:
    stages = read_profile("match_day").drawn_stages(rate_factor=0.5, time_factor=3)
    [(_, rate, lasts_s), *_] = phases_of(stages, hot_share=0, servers=1, apis=1)
    assert (rate, lasts_s) == (20, 60)


def test_no_more_than_half_a_minute_of_a_phase_is_simulated() -> None:
    assert [simulated_s(lasts_s) for lasts_s in (0.1, 5.0, 12.5, 30.0, 3600.0)] == [5.0, 5.0, 12.5, 30.0, 30.0]


# --- what is made -----------------------------------------------------------------------------------------------------


def test_each_phase_is_forecast_and_the_whole_is_sealed_where_it_says(folder: Path) -> None:
    result = run("two", "--servers", "1", "--seed", "4")
    assert result.exit_code == 0, result.output
    said = read(folder / "reports" / "predictions" / "two.json")
    assert said.digest in result.stdout
    assert said.calibration == calibration_digest(SLOW)
    assert [one.shape.name for one in said.forecasts] == ["first", "second"]
    first, second = said.forecasts
    assert (first.rate_per_s, first.duration_s) == (20.0, 6.0)
    assert (second.rate_per_s, second.shape.read_share, second.shape.hot_share) == (60.0, 0.5, 0.1)
    assert first.shape.servers == 1
    assert set(second.latency_ms) == {"bets", "reads"}
    for words in ("first", "second", "p95 ms", "refused", "0.00%", "none (cores"):
        assert words in result.stdout
    assert f"{second.throughput_per_s.value:,.0f} (" in result.stdout


def test_json_is_what_the_file_holds_and_the_seed_repeats_it(folder: Path) -> None:
    one = run("two", "--json", "--out", "one.json")
    assert json.loads(one.stdout[one.stdout.index("{") :]) == json.loads((folder / "one.json").read_text())
    run("two", "--out", "two.json")
    run("two", "--out", "three.json", "--seed", "2")
    first, second, third = (read(folder / name) for name in ("one.json", "two.json", "three.json"))
    assert first.forecasts == second.forecasts
    assert first.forecasts != third.forecasts


def test_the_knee_is_told_between_two_rates(folder: Path) -> None:
    result = run("knee")
    assert result.exit_code == 0, result.output
    best, worst = read(folder / "reports" / "predictions" / "knee.json").forecasts
    assert best.rate_per_s is not None and worst.rate_per_s is not None
    assert best.latency_ms["bets"]["p99"].value <= 100
    assert best.rate_per_s < worst.rate_per_s <= 1.5 * best.rate_per_s
    assert (
        f"between {best.rate_per_s:,.0f}/s, which keeps p99 of 100 ms, and {worst.rate_per_s:,.0f}/s" in result.stdout
    )


def test_bounds_without_a_knee_are_an_error_and_still_on_disk(folder: Path) -> None:
    result = run("beyond", "--out", "beyond.json")
    assert result.exit_code == 2
    assert "do not bracket the knee" in result.output
    assert "--rate-factor" in result.output
    [only] = read(folder / "beyond.json").forecasts
    assert only.rate_per_s == 1500


def test_a_trace_is_forecast_at_its_mean_rate(folder: Path) -> None:
    header = "time,operation,user,amount\n"
    rows = [f"{at / 10},{'balance' if at % 4 == 0 else 'deposit'},1,{'' if at % 4 == 0 else 5}" for at in range(41)]
    (folder / "day.csv").write_text(header + "\n".join(rows) + "\n")
    result = run("trace", "--trace", "day.csv")
    assert result.exit_code == 0, result.output
    [only] = read(folder / "reports" / "predictions" / "trace.json").forecasts
    assert only.rate_per_s == pytest.approx(41 / 4.0)
    assert only.shape.read_share == pytest.approx(11 / 41, abs=1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nobody",), "no profile 'nobody' in profiles.toml; there are two, much"),
        (("trace",), "--trace FILE"),
        (("two", "--trace", "day.csv"), "--trace FILE"),
        (("trace", "--trace", "day.csv"), "docs/load-traces.md"),
        (("trace", "--trace", "day.csv", "--rate-factor", "2"), "leave out --rate-factor"),
        (("much",), "6,000,000 requests is more than"),
        (("none",), "nothing arrives in profile 'none'"),
        (("two", "--calibration", "absent.json"), "`ledgerproof sim calibrate` makes one"),
        (("two", "--calibration", "profiles.toml"), "`ledgerproof sim calibrate` makes one"),
        (("two", "--profiles-file", "absent.toml"), "absent.toml"),
        (("two", "--rate-factor", "0"), "--rate-factor"),
        (("two", "--servers", "17"), "--servers"),
    ],
)
def test_what_cannot_be_forecast_is_refused_with_what_to_do(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
    assert not list(folder.glob("reports/predictions/*.json"))


def test_a_file_that_cannot_be_written_is_found_before_the_work(folder: Path) -> None:
    result = run("two", "--out", "absent/one.json")
    assert isinstance(result.exception, EnvironmentProblem)
    assert not (folder / "absent").exists()
