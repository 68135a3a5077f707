"""The part of the page about a forecast: what it says, what it draws, and what it makes of a changed prediction."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest

from reports.folder import RunFolder, read_run
from reports.forecast_part import forecast_part
from reports.forecast_tallies import band, seen
from reports.render import render
from sim.costs import Interval
from sim.faults import Fault
from sim.prediction import digest
from sim.run_forecast import FILE, RunForecast
from tests.model_costs import made_forecast
from tests.report_runs import LOAD_START_S, write_run
from tests.unit.test_report_load import plain
from tests.unit.test_report_page import read

FIGURES = ("forecast-latency", "forecast-answered", "forecast-backlogs")
RATE, DURATION_S = 60, 60.0


@pytest.fixture(scope="module")
def said() -> RunForecast:
    return made_forecast(30.0, DURATION_S, faults=[Fault("pause", "redis", 33.5, 7.5)])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, said: RunForecast) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs"), "pass", rate_per_s=RATE)
    return write_forecast(folder, said)


@pytest.fixture
def torn(good: Path, tmp_path: Path) -> Path:
    """Return a copy of the good run that a test may damage."""
    return Path(shutil.copytree(good, tmp_path / "run"))


def write_forecast(folder: Path, said: RunForecast, named: str | None = "") -> Path:
    """Put a forecast into a run folder and its seal (or another) into the verdict."""
    (folder / FILE).write_bytes(msgspec.json.encode(said))
    verdict = json.loads((folder / "verdict.json").read_text())
    verdict["config"]["prediction_digest"] = said.digest if named == "" else named
    (folder / "verdict.json").write_text(json.dumps(verdict))
    return folder


def resealed(said: RunForecast, **changes: Any) -> RunForecast:
    changed = msgspec.structs.replace(said, **changes, digest="")
    return msgspec.structs.replace(changed, digest=digest(changed))


def gaps(folder: Path) -> list[str]:
    return [gap.consequence for gap in read_run(folder).gaps if gap.part == FILE]


# --- what it says -----------------------------------------------------------------------------------------


def test_the_page_holds_figures_scores_and_where_the_forecast_is_from(good: Path, said: RunForecast) -> None:
    page = render(good)
    text = plain(page)
    for name in FIGURES:
        assert f'id="fig-{name}"' in page.read_text()
    assert 'href="#forecast"' in page.read_text()
    for words in (said.digest, said.made_at, said.calibration, said.calibrated_on, said.notes[0], "pause redis at"):
        assert words in text
    ids = read(page).ids
    assert len(ids) == len(set(ids))
    assert gaps(good) == []


def scores(run: RunFolder) -> dict[str, list[str]]:
    part = forecast_part(run, drawn=True)
    assert part is not None and part.scores is not None
    return {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in part.scores.rows}


def test_measured_errors_and_verdicts_are_those_of_the_run(torn: Path, said: RunForecast) -> None:
    run = read_run(torn)
    assert run.attempts is not None
    load = run.attempts.filter(pl.col("due").is_between(LOAD_START_S, LOAD_START_S + DURATION_S, closed="left"))
    got = load.filter((pl.col("result") == "ok") | (pl.col("status") == 422))
    lost = 1 - got.height / load.height
    bets = got.filter(~pl.col("op").is_in(["balance", "entries"]))
    p99 = ((bets["done"] - bets["due"]) * 1000).quantile(0.99, "linear")
    assert p99 is not None
    inside = resealed(
        said,
        refused_share=Interval(2 * lost, lost / 2, 3 * lost),
        latency_ms={"bets": {"p99": Interval(p99 / 2, p99 / 4, p99 * 0.9)}},
    )
    table = scores(read_run(write_forecast(torn, inside)))
    budget = next(row for what, row in table.items() if what.startswith("Not answered"))
    assert budget[1:] == [f"{100 * lost:.2f}", "+100\u00a0%", "inside"]
    assert table["Commands that write: p99, ms"][2:] == ["−50\u00a0%", "outside"]
    assert "Reads: p50, ms" not in table
    text = plain(render(torn))
    assert "figures that were measured" in text


def test_what_was_measured_as_nothing_has_no_relative_error(torn: Path, said: RunForecast) -> None:
    series = pl.read_parquet(torn / "series.parquet")
    nothing = pl.when(pl.col("name") == "outbox_unpublished").then(0.0).otherwise(pl.col("value"))
    series.with_columns(value=nothing).write_parquet(torn / "series.parquet")
    row = scores(read_run(torn))["Most that waited: outbox"]
    assert row[1:3] == ["0", "–"]


def test_backlogs_are_summed_over_servers_and_taken_while_the_load_was_on(good: Path, said: RunForecast) -> None:
    run = read_run(good)
    assert run.series is not None
    found = seen(run, said, 1)
    assert found is not None
    rows = run.series.filter(
        (pl.col("name") == "outbox_unpublished")
        & pl.col("t").is_between(LOAD_START_S, LOAD_START_S + DURATION_S, closed="left")
    )
    seconds = rows.group_by(((pl.col("t") - LOAD_START_S) // 1).alias("s"), "node").agg(pl.col("value").max())
    assert found.backlog_peak["outbox"] == seconds.group_by("s").agg(pl.col("value").sum())["value"].max()
    matcher = run.series.filter((pl.col("node") == "matcher") & (pl.col("t") < LOAD_START_S + DURATION_S))
    matcher = matcher.filter(pl.col("name") == "kafka_consumer_lag")
    assert found.backlog_peak["matcher"] == matcher["value"].max()


def test_bins_hold_all_that_was_answered(good: Path, said: RunForecast) -> None:
    run = read_run(good)
    one, seven = seen(run, said, 1), seen(run, said, 7)
    assert one is not None and one.bins is not None and seven is not None and seven.bins is not None
    # 60 seconds are eight bins of seven and one of four.
    widths = [7.0] * 8 + [4.0]
    whole = sum(one.bins["answered"])
    assert sum(rate * width for rate, width in zip(seven.bins["answered"], widths, strict=True)) == pytest.approx(whole)
    assert seven.bins["t"][-1] == LOAD_START_S + 58.0


def test_a_band_of_wide_bins_is_the_mean_or_of_peaks_the_highest() -> None:
    values = [[1.0, 3.0], [3.0, 5.0], None, [7.0, 9.0], None]
    assert band(values, 5.0, 2).low == [2.0, 7.0, None]
    assert band(values, 5.0, 2).high == [4.0, 9.0, None]
    assert band(values, 5.0, 2, peaks=True).high == [5.0, 9.0, None]
    assert band(values, 5.0, 2).edges == [5.0, 7.0, 9.0, 10.0]


# --- what is not there, or not as it was ------------------------------------------------------------------


def test_a_run_without_a_forecast_has_no_part_and_no_gap(torn: Path) -> None:
    (torn / FILE).unlink()
    verdict = json.loads((torn / "verdict.json").read_text())
    del verdict["config"]["prediction_digest"]
    (torn / "verdict.json").write_text(json.dumps(verdict))
    assert gaps(torn) == []
    assert 'id="forecast"' not in render(torn).read_text()


def test_a_forecast_that_is_named_and_missing_is_a_gap(torn: Path) -> None:
    (torn / FILE).unlink()
    assert gaps(torn) == ["missing: the forecast is not shown"]
    assert "the forecast is not shown" in plain(render(torn))


@pytest.mark.parametrize("bad", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"made_at": 5}'])
def test_a_damaged_forecast_is_a_gap(torn: Path, bad: bytes) -> None:
    (torn / FILE).write_bytes(bad)
    assert len(gaps(torn)) == 1
    assert read_run(torn).forecast is None


def test_a_torn_forecast_is_a_gap(torn: Path) -> None:
    whole = (torn / FILE).read_bytes()
    (torn / FILE).write_bytes(whole[: len(whole) // 2])
    assert len(gaps(torn)) == 1


def test_a_forecast_that_was_changed_is_a_gap(torn: Path) -> None:
    raw = json.loads((torn / FILE).read_text())
    raw["answered_per_s"][0 if isinstance(raw["answered_per_s"], list) else "value"] = 59.0
    (torn / FILE).write_text(json.dumps(raw))
    assert gaps(torn) == ["prediction.json was changed after it was sealed: the forecast is not shown"]


def test_a_forecast_with_another_seal_than_the_verdicts_is_a_gap(torn: Path, said: RunForecast) -> None:
    (torn / FILE).write_bytes(msgspec.json.encode(resealed(said, rate_per_s=31.0)))
    assert gaps(torn) == ["not the one whose seal the verdict holds: the forecast is not shown"]


def test_a_forecast_that_the_verdict_does_not_name_is_shown_with_doubt(torn: Path, said: RunForecast) -> None:
    write_forecast(torn, said, None)
    assert gaps(torn) == []
    assert "The verdict does not name this forecast" in plain(render(torn))


def test_a_band_of_one_bound_is_a_gap(torn: Path, said: RunForecast) -> None:
    odd = [msgspec.structs.replace(said.seconds[0], answered=[1.0]), *said.seconds[1:]]
    write_forecast(torn, resealed(said, seconds=odd))
    assert gaps(torn) == ["a band has not two bounds, or the load no length: the forecast is not shown"]


def test_a_run_without_history_and_series_still_says_what_was_forecast(torn: Path) -> None:
    shutil.rmtree(torn / "history")
    for name in ("series.parquet", "timeline.parquet"):
        (torn / name).unlink()
    text = plain(render(torn))
    assert "Nothing of it was measured in this run" in text
    assert "so nothing is drawn" in text
    assert "not measured" in text


def test_seconds_in_which_nothing_is_forecast_are_left_out_of_the_band(torn: Path, said: RunForecast) -> None:
    silent = [
        msgspec.structs.replace(second, p50_ms=None, p99_ms=None) if 20 <= second.t < 30 else second
        for second in said.seconds
    ]
    write_forecast(torn, resealed(said, seconds=silent))
    assert 'id="fig-forecast-latency"' in render(torn).read_text()
    everywhere = [msgspec.structs.replace(second, p50_ms=None, p99_ms=None) for second in said.seconds]
    write_forecast(torn, resealed(said, seconds=everywhere))
    assert 'id="fig-forecast-latency"' in render(torn).read_text()
