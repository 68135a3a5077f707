"""Outages: when a backlog has gone for good, when a part is back, and how a forecast of it is scored."""

import msgspec
import pytest

from ledgerproof.modelling.outages import Row, _back
from sim.cases import Outage, OutageCase
from sim.outages import OutageForecast, recovered_s, score_outage

CASE = OutageCase(name="kill it", kind="kill", node="relay0", rate_per_s=100, lasts_s=2.0)
SAID = OutageForecast(
    case=CASE, gone_s=2.5, recovered_s=5.0, backlog_peak={"outbox": 500.0, "matcher": 80.0}, refused=3.0
)
SEEN = Outage(
    case=CASE,
    gone_s=2.4,
    recovered_s=6.0,
    backlog_peak={"outbox": 450.0, "matcher": 900.0, "projector": 0.0},
    refused=4,
)


def said(**changes: object) -> OutageForecast:
    return msgspec.structs.replace(
        SAID, **{"backlog_peak": {"outbox": 500.0, "matcher": 80.0, "projector": 1.0}, **changes}
    )


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_a_backlog_has_recovered_when_it_is_low_for_good() -> None:
    # Before it was 10 at most: up to 2 · 10 + 50 is nothing.
    samples: list[tuple[float, float | None]] = [
        (-1.0, 10.0), (0.0, 60.0), (1.0, 300.0), (2.0, 50.0), (3.0, 71.0), (4.0, 70.0), (5.0, 0.0)
    ]  # fmt: skip
    assert recovered_s(samples) == 3.0


def test_what_never_rose_has_recovered_at_once() -> None:
    assert recovered_s([(-1.0, 30.0), (0.0, 100.0), (1.0, 110.0)]) == 0.0
    assert recovered_s([]) == 0.0


def test_samples_that_could_not_be_read_are_left_out() -> None:
    samples: list[tuple[float, float | None]] = [(-1.0, None), (0.5, 200.0), (1.0, None), (2.0, None)]
    assert recovered_s(samples) == 0.5


def test_what_was_high_before_is_not_held_against_the_outage() -> None:
    assert recovered_s([(-1.0, 500.0), (1.0, 900.0), (2.0, 1051.0), (3.0, 1050.0)]) == 2.0


# --- being back -------------------------------------------------------------------------------------------------------


def rows(*counted: tuple[float, float]) -> list[Row]:
    return [(at, done, {}) for at, done in counted]


def test_a_part_is_back_when_its_counter_grows_after_it_was_asked_to() -> None:
    assert _back(rows((0.0, 5.0), (1.0, 9.0), (2.0, 9.0), (2.5, 9.0), (3.0, 10.0), (3.5, 12.0)), 2.0) == 3.0


def test_a_counter_that_begins_anew_counts_from_its_first_growth() -> None:
    assert _back(rows((1.0, 900.0), (2.0, 900.0), (2.5, 0.0), (3.0, 0.0), (3.5, 40.0)), 2.0) == 3.5


def test_growth_before_the_part_was_asked_back_does_not_count() -> None:
    with pytest.raises(RuntimeError, match="did not come back"):
        _back(rows((0.0, 5.0), (1.0, 9.0), (2.0, 9.0), (9.0, 9.0)), 2.0)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_score_is_of_the_stage_in_which_most_waits_by_the_forecast() -> None:
    found = score_outage(said(), SEEN)
    assert (found.stage, found.peak, found.peak_forecast) == ("outbox", 450.0, 500.0)
    assert (found.recovered_s, found.recovered_forecast_s) == (6.0, 5.0)
    assert (found.refused, found.refused_forecast) == (4, 3.0)
    assert found.recovered_right
    assert found.peak_right


@pytest.mark.parametrize(
    ("forecast_s", "measured_s", "right"),
    [(3.9, 6.0, False), (4.0, 6.0, True), (14.0, 20.0, True), (13.9, 20.0, False), (8.1, 6.0, False)],
)
def test_a_recovery_is_right_within_two_seconds_or_thirty_percent(
    forecast_s: float, measured_s: float, right: bool
) -> None:
    seen = msgspec.structs.replace(SEEN, recovered_s=measured_s)
    assert score_outage(said(recovered_s=forecast_s), seen).recovered_right is right


@pytest.mark.parametrize(
    ("forecast", "measured", "right"),
    [(500.0, 700.0, True), (489.0, 700.0, False), (911.0, 700.0, False), (199.0, 1.0, True), (201.0, 1.0, False)],
)
def test_a_peak_is_right_within_thirty_percent_or_where_both_are_small(
    forecast: float, measured: float, right: bool
) -> None:
    peaks = {"outbox": forecast, "matcher": 0.0, "projector": 0.0}
    seen = msgspec.structs.replace(SEEN, backlog_peak={"outbox": measured, "matcher": 0.0, "projector": 0.0})
    assert score_outage(said(backlog_peak=peaks), seen).peak_right is right
