"""The part of the page about a load: what it says, what it draws, and what it does with a torn load.json."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from load.histograms import Latencies
from load.result import PERCENTS
from reports.folder import read_run
from reports.gaps import Gap
from reports.load_part import with_interval
from reports.load_tallies import bins_of, curve_of, curves, load_clock, merged_phases, place, steps_of
from reports.loads import Load, Spread, read_load
from reports.render import render
from tests.load_files import MATCH_DAY, STEADY, Part, knee_of, made_load, write_load_run
from tests.unit.test_report_page import read, text_of

SHORT = (Part("warm_up", 2, 60), Part("steady", 6, 120))
FIGURES = ("load-arrivals", "load-heat", "load-percentiles", "load-lag")


def plain(page: Path) -> str:
    """Return the text of a page with numbers as they would be typed."""
    return " ".join(" ".join(read(page).text).replace("\u202f", "").split())


def load_of(folder: Path) -> Load:
    load = read_run(folder).load
    assert load is not None
    return load


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_load_run(tmp_path_factory.mktemp("loads") / "good", made_load(SHORT))


@pytest.fixture
def torn(good: Path, tmp_path: Path) -> Path:
    """Return a copy of the good run that a test may damage."""
    return Path(shutil.copytree(good, tmp_path / "run"))


def change(folder: Path, **fields: Any) -> None:
    path = folder / "load.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- what it says -----------------------------------------------------------------------------------------


def test_page_of_a_load_draws_and_counts_it(good: Path) -> None:
    page = render(good)
    text = plain(page)
    for name in FIGURES:
        assert f'id="fig-{name}"' in page.read_text()
    assert "The load may be believed" in text
    assert "No limit of the profile was missed" in text
    load = load_of(good)
    bets = next(cell for cell in load.told.cells if (cell.op, cell.phase) == ("bet", "steady"))
    assert f"Bets steady {bets.count} {bets.ok} 0" in text
    assert text.index("What became of the arrivals") < text.index("Latency heat map") < text.index("Percentiles")
    assert 'href="#load"' in page.read_text()


def test_every_id_of_the_page_is_there_once(good: Path) -> None:
    ids = read(render(good)).ids
    assert len(ids) == len(set(ids))


def test_command_repeats_the_load_and_not_the_main_job(good: Path) -> None:
    assert (
        "ledgerproof load steady --seed 5 --servers 2 --apis 2 --workers 2 --rate-factor 1 --time-factor 0.5 "
        "--lag-limit-ms 5" in text_of(render(good))
    )
    assert "ledgerproof prove" not in text_of(good / "report.html")


def test_factor_with_many_digits_is_repeated_exactly(torn: Path) -> None:
    write_load_run(torn, made_load(SHORT), rate_factor=1 / 3, profiles_file="my loads.toml")
    assert "--rate-factor 0.3333333333333333" in text_of(render(torn))
    assert "--profiles-file 'my loads.toml'" in text_of(render(torn))


def test_late_generator_is_named_and_its_gate_drawn(tmp_path: Path) -> None:
    text = plain(render(write_load_run(tmp_path / "late", made_load(SHORT, lag_ms=4))))
    assert "Nothing below may be quoted" in text
    assert "it measured itself" in text
    assert re.search(r"Lag of the generator, p99 [\d.]+ ms ≤ 5 ms not kept", text)
    assert re.search(r"lag at p99: [\d.]+ ms, too late", text)


def test_another_lag_limit_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    text = plain(render(write_load_run(tmp_path / "late", made_load(SHORT, lag_ms=0.4), lag_limit_ms=50.0)))
    assert "≤ 50 ms kept" in text
    assert "the limit is 50 ms" in (tmp_path / "late" / "report.html").read_text().replace("\u00a0", " ")


def test_missed_limit_is_in_the_figures_and_in_words(tmp_path: Path) -> None:
    result = made_load(SHORT)
    result.missed = ["bet in steady: p99 is 300 [200, 400] ms, the limit is 250 ms"]
    text = plain(render(write_load_run(tmp_path / "missed", result)))
    assert "1 missed see Load" in text
    assert "1 limit of the profile was not kept: bet in steady: p99 is 300" in text
    assert "The limits that were not kept stand under Load" in text


def test_percentiles_that_few_samples_refuse_say_so(good: Path) -> None:
    text = plain(render(good))
    assert "needs 3688 samples" in text
    assert "needs 368 samples" in text


def test_dropped_and_unanswered_arrivals_show_everywhere(tmp_path: Path) -> None:
    result = made_load(SHORT, lost=lambda t: 3 <= t < 4, dropped=lambda t: 5 <= t < 6)
    page = render(write_load_run(tmp_path / "lossy", result))
    text = plain(page)
    assert "Of these dropped or without an answer" in text
    assert "the rest has no answer" in text
    assert re.search(r"timeout \(\d+ times\)", text)
    assert re.search(r"Bets steady \d+ \(?[\d.]+ \([\d.]+ to [\d.]+\)|no answer", text)


def test_infinite_latencies_are_no_numbers() -> None:
    assert with_interval(None, None, None) == "no answer"
    assert with_interval(210.0, 180.4, None) == "210 (from 180)"
    assert with_interval(None, 180.4, None) == "no answer (from 180)"
    assert with_interval(9.876, 9.1, 12.34) == "9.88 (9.10 to 12.3)"


# --- the knee ---------------------------------------------------------------------------------------------


def test_search_for_the_knee_is_drawn_and_told(torn: Path) -> None:
    (torn / "knee.json").write_text(json.dumps(knee_of()))
    text = plain(render(torn))
    assert "The knee is at 786/s: 747/s holds, 827/s does not." in text
    assert "Knee 786/s 747/s held, 827/s did not" in text
    assert 'id="fig-load-knee"' in (torn / "report.html").read_text()
    assert "675/s proves nothing" in text
    assert re.search(r"101[23]/s did not hold no answer \(from 1900\)", text)
    assert "those of its last window alone" in text


def test_search_without_a_bracket_has_no_knee(torn: Path) -> None:
    found = knee_of() | {"holds": None, "fails": 200.0, "knee": None, "text": "not even the lowest rate held"}
    found["windows"] = [window | {"held": False} for window in found["windows"][:1]]
    (torn / "knee.json").write_text(json.dumps(found))
    text = plain(render(torn))
    assert "Not even the lowest rate held." in text
    assert "Knee not found" in text
    assert "between the highest rate that held" not in text


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"windows": [{"rate": "x"}]}', b'{"windows": [{"rate": 0, "p99_ms": NaN}], "holds": -1}'],
)
def test_torn_knee_is_a_gap_and_no_traceback(torn: Path, content: bytes) -> None:
    (torn / "knee.json").write_bytes(content)
    assert "knee.json" in text_of(render(torn))


def test_missing_files_of_a_load_are_gaps(torn: Path) -> None:
    write_load_run(torn, made_load(SHORT), profile="knee")
    (torn / "load.json").unlink()
    gaps = {gap.part for gap in read_run(torn).gaps}
    assert {"load.json", "knee.json"} <= gaps
    assert "there is no part about the load" in text_of(render(torn))


# --- damage, and sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\x00\xff", b"{}", b'{"profile": 3, "cells": 1, "lag": []}'])
def test_torn_load_is_a_gap_and_no_traceback(torn: Path, content: bytes) -> None:
    (torn / "load.json").write_bytes(content)
    text = text_of(render(torn))
    assert "load.json" in text
    assert "PASS" in text


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"seconds": [{"second": 1, "sent": 3, "latencies": [1, 2]}]}, "load.json: seconds"),
        ({"seconds": [{"second": -4}, {"second": 10**40}]}, "load.json: seconds"),
        ({"seconds": {"a": 1}}, "load.json: seconds"),
        ({"phases": [{"name": "x", "start_s": 9.0, "end_s": 1.0}]}, "load.json: phases"),
        ({"phases": [{"name": "x", "start_s": float("nan"), "end_s": float("inf")}]}, "load.json: phases"),
        ({"coarse_ms": [5, 5, 3]}, "load.json: coarse_ms"),
        ({"lag": {"histogram": "HISTFAAAA"}}, "load.json: lag"),
        ({"cells": [{"op": "bet", "phase": "a", "count": 3, "histogram": "nothing"}]}, "load.json: bet in a"),
        ({"workers": [{"index": "one"}]}, "load.json: workers"),
        ({"cells": [{"op": "bet", "phase": "a", "count": 10**400}]}, "load.json: cells"),
        ({"seconds": [{"second": 1, "sent": -3, "latencies": [0] * 22}]}, "load.json: seconds"),
        ({"coarse_ms": [1, 10**400]}, "load.json: coarse_ms"),
        ({"cells": [{"op": f"o{n}", "phase": "a", "histogram": "x"} for n in range(40)]}, "load.json"),
    ],
)
def test_odd_field_takes_nothing_else_with_it(torn: Path, fields: dict[str, Any], part: str) -> None:
    change(torn, **fields)
    assert part in {gap.part for gap in read_run(torn).gaps}
    assert "Did the generator keep its schedule?" in text_of(render(torn))


@pytest.mark.parametrize(
    "fields",
    [
        {"lag_p99_ms": float("nan"), "lag_max_ms": float("inf"), "sent": -(10**400)},
        {"invalid": None},
        {"seconds": []},
        {"phases": []},
        {"cells": [], "percentiles": []},
        {"percentiles": [{"op": "bet", "phase": "steady", "estimates": [{"percentile": 100, "ms": 1.0}]}]},
        {"percentiles": [{"op": "bet", "phase": "steady", "estimates": [{"percentile": 99, "ms": 1e308}]}]},
        {"cells": [{"op": "<b>", "phase": "<i>$x$", "count": 1, "statuses": {"<u>": 1}}]},
    ],
)
def test_load_with_less_in_it_gives_a_page(torn: Path, fields: dict[str, Any]) -> None:
    change(torn, **fields)
    assert "May it be believed?" in text_of(render(torn))


def test_load_of_one_second_gives_a_page(tmp_path: Path) -> None:
    result = made_load([Part("only", 1, 20)])
    assert "One column is 1 second." in plain(render(write_load_run(tmp_path / "one", result)))


def test_load_without_arrivals_gives_a_page(tmp_path: Path) -> None:
    assert "nothing was sent" in text_of(render(write_load_run(tmp_path / "none", made_load([]))))


def test_load_without_answers_says_so(tmp_path: Path) -> None:
    page = render(write_load_run(tmp_path / "mute", made_load(SHORT, lost=lambda _: True)))
    assert "not one arrival got an answer" in text_of(page)
    assert "there is no heat map and no curve" in text_of(page)
    assert "fig-load-heat" not in page.read_text()


def test_hour_is_binned_and_its_page_stays_small(tmp_path: Path) -> None:
    result = made_load([Part("soak", 3600, 3)], profile="soak")
    folder = write_load_run(tmp_path / "hour", result)
    page = render(folder)
    assert page.stat().st_size < 1_000_000
    assert "One column is 30 seconds." in plain(page)
    load = load_of(folder)
    clock = load_clock(load, [], 150)
    bins = bins_of(load, clock)
    assert len(bins.due) == 120
    assert bins.due.sum() == sum(second.due for second in load.told.seconds)
    assert bins.latencies.sum() == load.answered


# --- what the figures are made of -------------------------------------------------------------------------


def test_last_bin_counts_the_time_that_it_has(tmp_path: Path) -> None:
    load = load_of(write_load_run(tmp_path / "x", made_load([Part("a", 2.5, 100)])))
    bins = bins_of(load, load_clock(load, [], 150))
    assert bins.edges == [0, 1, 2, 2.5]
    assert bins.per_second(bins.due)[2] == bins.due[2] * 2


def test_neighbours_of_one_name_are_one_phase(tmp_path: Path) -> None:
    load = load_of(write_load_run(tmp_path / "x", made_load(MATCH_DAY[:3])))
    assert [(phase.name, phase.start, phase.end) for phase in merged_phases(load)] == [
        ("quiet", 0, 20),
        ("deposits", 20, 40),
    ]


def test_spread_reads_what_the_load_recorded() -> None:
    latencies, other = Latencies(), Latencies()
    values = np.random.default_rng(3).lognormal(8, 1.2, 4000).astype(int)
    for value in values.tolist():
        latencies.record_us(value)
        other.record_us(value * 3)
    spread = Spread.decode(latencies.encode())
    assert spread.total == 4000
    for percent in PERCENTS:
        assert spread.at_ms(int(np.ceil(4000 * percent / 100 - 1e-9))) == latencies.percentile(percent).ms
    summed = Spread.sum([spread, Spread.decode(other.encode())])
    latencies.add(other)
    assert summed.total == 8000
    assert summed.at_ms(7200) == latencies.percentile(90.0).ms


def test_curve_stands_at_the_percentiles_and_leaves_where_answers_end() -> None:
    spread = Spread(np.arange(1000, 901_000, 1000), np.ones(900, np.int64))
    curve = curve_of("x", spread, 100)
    assert curve is not None
    assert curve.samples == 1000
    assert curve.lost_at == pytest.approx(place(90.0))
    assert curve.ms[-1] == 900
    half = np.interp(place(50.0), curve.at, curve.ms)
    assert half == pytest.approx(500, abs=8)


def test_curve_is_sure_as_far_as_the_percentile_is_not_refused() -> None:
    for samples in (72, 368, 3688):
        curve = curve_of("x", Spread(np.array([1000]), np.array([samples])), 0)
        assert curve is not None
        percent = {72: 95.0, 368: 99.0, 3688: 99.9}[samples]
        # One sample fewer, and the load refuses this percentile.
        assert Latencies().percentile(percent, samples).refused is None
        assert Latencies().percentile(percent, samples - 1).refused is not None
        assert curve.at[curve.sure - 1] <= -np.log10(1 - 0.025 ** (1 / samples))
        assert -np.log10(1 - 0.025 ** (1 / samples)) == pytest.approx(place(percent), abs=0.01)


def test_nothing_answered_has_no_curve() -> None:
    assert curve_of("x", Spread(), 5) is None


def test_operation_keeps_its_name_in_every_panel_and_the_rest_is_summed(tmp_path: Path) -> None:
    load = load_of(write_load_run(tmp_path / "x", made_load(STEADY)))
    found = dict(curves(load))
    assert list(found) == ["warm_up", "steady"]
    names = [curve.name for curve in found["steady"]]
    assert len(names) == 6
    assert names[0] == "Bets"
    assert names[-1] == "the others"
    assert sum(curve.samples for curve in found["steady"]) == sum(
        cell.count - cell.skipped for cell in load.told.cells if cell.phase == "steady"
    )


@pytest.mark.parametrize(
    ("largest", "steps"),
    [
        (0, [1]),
        (1, [1]),
        (4, [1, 2]),
        (100, [1, 2, 5, 10, 20, 50, 100]),
        (999, [1, 3, 10, 30, 100, 300]),
        (10**6, [1, 10, 100, 1000, 10**4, 10**5, 10**6]),
    ],
)
def test_steps_of_colour_are_round_and_few(largest: float, steps: list[int]) -> None:
    assert steps_of(largest, 7) == steps


def test_steps_of_a_count_beyond_all_scales_are_few() -> None:
    assert len(steps_of(1e18, 7)) <= 7


def test_gaps_of_a_load_name_their_file(tmp_path: Path) -> None:
    gaps: list[Gap] = []
    assert read_load(tmp_path / "load.json", gaps) is None
    assert [gap.part for gap in gaps] == ["load.json"]
