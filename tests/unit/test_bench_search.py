"""The search for the highest rate, the slope of a backlog, and what a window is judged by."""

from collections.abc import Callable

import numpy as np
import pytest

from ledgerproof.bench.arrivals import poisson
from ledgerproof.bench.http_rows import judge_accepted, judge_sustained
from ledgerproof.bench.plan import Window
from ledgerproof.bench.search import BACK_OFF, CLOSE_ENOUGH, STEPS_MAX, UP, Found, Held, Step, highest_rate
from ledgerproof.bench.slope import trend
from ledgerproof.bench.worker_rows import rate_of


def window(**fields: object) -> Window:
    """A window in which 1,000 bets in 10 s were accepted in time."""
    usual: dict[str, object] = {
        "loop": "open",
        "duration_s": 10.0,
        "due": 1000,
        "answered": 1000,
        "accepted": 1000,
        "statuses": {"202": 1000},
        "p50_ms": 5.0,
        "p99_ms": 40.0,
        "max_ms": 60.0,
        "accepted_p50_ms": 5.0,
        "accepted_p99_ms": 40.0,
        "lag_p99_ms": 1.0,
        "lag_max_ms": 2.0,
        "queued": 0,
        "connections": 10,
        "lost": 0,
        "unreadable": 0,
        "marks": {},
        "counted": 0,
        "cpu_s": 1.0,
        "priority": "nice 0",
    }
    return Window(**(usual | fields))  # type: ignore[arg-type]


Try = Callable[[float], Step]


def service(capacity: float, *, confirmed: float | None = None) -> tuple[Try, Try]:
    """A service that holds every rate up to its capacity; long windows may hold less."""

    def answer(limit: float) -> Try:
        return lambda rate: Step(rate, Held.YES if rate <= limit else Held.NO, "" if rate <= limit else "too fast")

    return answer(capacity), answer(capacity if confirmed is None else confirmed)


def search(
    capacity: float, first: float, *, confirmed: float | None = None, deadline: float = 1e9, until: float = 1e9
) -> Found:
    attempt, confirm = service(capacity, confirmed=confirmed)
    return highest_rate(attempt, confirm, first, deadline=deadline, confirm_until=until, clock=lambda: 0.0)


@pytest.mark.parametrize("capacity", [90.0, 500.0, 1234.0, 6000.0])
def test_search_ends_close_below_the_capacity(capacity: float) -> None:
    found = search(capacity, 400.0)
    assert found.rate is not None
    assert capacity / CLOSE_ENOUGH <= found.rate <= capacity
    assert found.limit == "too fast"
    assert len(found.steps) <= STEPS_MAX + 1


def test_search_backs_off_when_the_longer_window_does_not_confirm() -> None:
    found = search(1000.0, 400.0, confirmed=800.0)
    assert found.rate is not None
    assert 800.0 * BACK_OFF <= found.rate <= 800.0


def test_search_plays_one_confirming_window_and_no_more_when_time_is_over() -> None:
    found = search(1000.0, 400.0, confirmed=800.0, until=0.0)
    assert found.rate is None
    assert found.limit == "too fast"


def test_search_that_nothing_holds_finds_no_rate_and_says_why() -> None:
    found = search(1.0, 400.0)
    assert found.rate is None
    assert found.limit == "too fast"


def test_search_begins_no_step_after_its_deadline() -> None:
    times = iter(range(100))
    attempt, confirm = service(1e9)
    found = highest_rate(attempt, confirm, 100.0, deadline=3.0, confirm_until=3.0, clock=lambda: float(next(times)))
    assert len(found.steps) == 4  # three steps up, and the confirming window
    assert found.rate == pytest.approx(100.0 * UP**2)
    assert "ran out" in found.limit


def test_search_takes_an_invalid_window_as_a_bound_and_never_as_a_success() -> None:
    def attempt(rate: float) -> Step:
        return Step(rate, Held.YES, "") if rate < 1000 else Step(rate, Held.INVALID, "the generator was late")

    found = highest_rate(attempt, attempt, 400.0, deadline=1e9, confirm_until=1e9, clock=lambda: 0.0)
    assert found.rate is not None
    assert found.rate < 1000
    assert found.limit == "the generator was late"


def test_search_follows_a_hint_that_lies_between_its_bounds() -> None:
    asked: list[float] = []

    def attempt(rate: float) -> Step:
        asked.append(rate)
        return Step(rate, Held.YES, "") if rate <= 500 else Step(rate, Held.NO, "too fast", hint=490.0)

    highest_rate(attempt, attempt, 400.0, deadline=1e9, confirm_until=1e9, clock=lambda: 0.0)
    assert asked[:3] == [400.0, 560.0, 490.0]


def samples(*, slope: float, noise: float = 0.0, start: float = 0.0) -> tuple[list[float], list[float]]:
    times = [0.4 * number for number in range(25)]
    draw = np.random.default_rng(1)
    return times, [start + slope * at + noise * float(draw.standard_normal()) for at in times]


def test_backlog_that_grows_is_not_bounded_even_if_its_last_value_is_low() -> None:
    times, values = samples(slope=60.0)
    values[-1] = 0.0
    found = trend("matcher lag", times, values, rate=1000.0, duration_s=10.0)
    assert not found.bounded
    assert found.slope_per_s == pytest.approx(60.0, rel=0.1)
    assert "matcher lag grows" in found.why


def test_backlog_that_is_high_once_and_noisy_but_level_is_bounded() -> None:
    times, values = samples(slope=0.0, noise=100.0, start=500.0)
    values[12] = 50_000.0
    assert trend("outbox pg0", times, values, rate=1000.0, duration_s=10.0).bounded


def test_backlog_that_is_level_but_seconds_deep_is_not_bounded() -> None:
    times, values = samples(slope=0.0, start=5000.0)
    found = trend("outbox pg0", times, values, rate=1000.0, duration_s=10.0)
    assert not found.bounded
    assert "ends at 5,000" in found.why


def test_backlog_with_too_few_samples_is_not_called_bounded() -> None:
    assert not trend("x", [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], rate=10.0, duration_s=10.0).bounded


def test_window_counts_as_accepted_only_with_every_bet_in_time() -> None:
    assert judge_accepted(100.0, window()).held is Held.YES
    assert judge_accepted(100.0, window(p99_ms=100.0)).held is Held.NO
    assert judge_accepted(100.0, window(p99_ms=None)).held is Held.NO
    shed = judge_accepted(100.0, window(accepted=900, statuses={"202": 900, "503": 100}))
    assert shed.held is Held.NO
    assert shed.hint == pytest.approx(0.97 * 90.0)
    assert "503" in shed.why


def test_window_of_a_late_generator_says_nothing_whatever_it_measured() -> None:
    late = window(lag_p99_ms=8.0, p99_ms=400.0)
    assert judge_accepted(100.0, late).held is Held.INVALID
    assert judge_sustained(100.0, late, []).held is Held.INVALID


def test_sustained_needs_samples_and_every_backlog_level() -> None:
    level = trend("a", *samples(slope=0.0), rate=100.0, duration_s=10.0)
    growing = trend("b", *samples(slope=30.0), rate=100.0, duration_s=10.0)
    assert judge_sustained(100.0, window(), []).held is Held.INVALID
    assert judge_sustained(100.0, window(), [level]).held is Held.YES
    step = judge_sustained(100.0, window(), [level, growing])
    assert step.held is Held.NO
    assert "b grows" in step.why
    assert step.hint == pytest.approx(0.97 * 70.0, rel=0.05)


def test_rate_of_a_drain_leaves_out_the_start_and_the_look_that_came_late() -> None:
    # Nothing for two seconds (the process starts), then 1,000 a second, then a look five seconds late.
    progress = [(0.0, 0), (2.0, 500), (2.5, 1000), (3.0, 1500), (3.5, 2000), (9.0, 2500)]
    rate, count, seconds = rate_of(progress, goal=2500)
    assert rate == pytest.approx(1000.0)
    assert (count, seconds) == (1500, 1.5)


def test_rate_of_a_drain_seen_at_once_rests_on_the_whole_time() -> None:
    assert rate_of([(0.0, 0), (2.0, 100)], goal=100)[0] == pytest.approx(50.0)


def test_poisson_arrivals_have_the_rate_and_exponential_gaps() -> None:
    times = poisson(1000.0, 50.0, seed=3)
    assert len(times) == pytest.approx(50_000, rel=0.03)
    assert (np.diff(times) >= 0).all()
    assert times[-1] < 50.0
    gaps = np.diff(times)
    assert float(gaps.std() / gaps.mean()) == pytest.approx(1.0, rel=0.05)
    assert (poisson(1000.0, 50.0, seed=3) == times).all()


@pytest.mark.parametrize(("rate", "duration_s"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_impossible_schedules_are_refused(rate: float, duration_s: float) -> None:
    with pytest.raises(ValueError, match="above zero"):
        poisson(rate, duration_s, seed=1)
