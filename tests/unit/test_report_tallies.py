"""What the report counts and how it writes numbers."""

import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from reports import words
from reports.folder import Fault, RunFolder, Verdict, read_run
from reports.page import TEMPLATES
from reports.tallies import (
    Clock,
    availability,
    clock_of,
    fates,
    interruptions,
    kinds_over_time,
    latency,
    samples,
    throughput,
    unknown_count,
    usage,
)
from tests.report_runs import write_run


def attempts(*rows: tuple[str, float, float | None, str, int | None]) -> pl.DataFrame:
    """Return attempts of (op, due, done, result, status), each with a key of its own."""
    return pl.DataFrame(
        [
            {
                "attempt": number,
                "op": op,
                "key": f"k{number}",
                "user": number,
                "tag": None,
                "due": due,
                "sent": due,
                "done": done,
                "result": result,
                "status": status,
                "outcome": None,
            }
            for number, (op, due, done, result, status) in enumerate(rows)
        ],
        schema_overrides={"tag": pl.String, "done": pl.Float64, "status": pl.Int64, "outcome": pl.String},
    )


def folder(rows: pl.DataFrame, effects: pl.DataFrame | None = None) -> RunFolder:
    return RunFolder(
        path=Path(), verdict=Verdict(), attempts=rows, timeline=None, series=None, effects=effects, files=[]
    )


CLOCK = Clock(start=0, end=4, bin_s=1, phases=[], faults=[])


def test_throughput_counts_answers_when_they_came_and_arrivals_when_they_were_due() -> None:
    frame = throughput(
        attempts(
            ("bet", 0.1, 1.2, "ok", 202),
            ("deposit", 0.2, 0.3, "ok", 202),
            ("bet", 0.3, 0.4, "fail", 422),
            ("bet", 2.5, None, "info", None),
        ),
        CLOCK,
    )
    assert frame["due"].to_list() == [3, 0, 1, 0]
    assert frame["ok"].to_list() == [1, 1, 0, 0]
    assert frame["bets"].to_list() == [0, 1, 0, 0]


def test_latency_counts_from_the_due_time_and_leaves_out_what_was_not_served() -> None:
    frame = latency(
        attempts(
            ("bet", 0.5, 1.5, "ok", 202),
            ("bet", 0.6, 0.61, "fail", 503),
            ("bet", 1.5, 3.5, "info", 504),
            ("bet", 2.5, 2.502, "fail", 422),
        ),
        CLOCK,
    )["Bets"]
    assert frame["p50"].to_list() == pytest.approx([1000.0, None, 2.0, None])


def test_refusal_by_a_rule_is_an_answer_and_unavailability_is_not() -> None:
    frame = availability(
        attempts(
            ("bet", 0.1, 0.2, "ok", 202),
            ("bet", 0.1, 0.2, "fail", 422),
            ("bet", 0.1, 0.2, "fail", 503),
            ("bet", 0.1, None, "info", None),
            ("bet", 1.1, 1.2, "fail", None),
            ("balance", 1.1, 1.2, "fail", 404),
        ),
        CLOCK,
    )
    assert frame["percent"].to_list() == [50.0, 50.0, None, None]
    assert frame["unavailable"].to_list() == [1, 1, 0, 0]
    assert frame["unknown"].to_list() == [1, 0, 0, 0]


def test_fate_belongs_to_the_key() -> None:
    rows = attempts(
        ("bet", 0.1, None, "info", 504),
        ("bet", 0.2, None, "info", 504),
        ("deposit", 0.3, None, "info", None),
        ("withdraw", 0.4, None, "info", None),
        ("balance", 0.5, None, "info", None),
        ("cancel", 0.6, None, "info", None),
        ("bet", 1.0, 1.1, "ok", 202),
        ("bet", 3.0, 3.1, "ok", 202),
    )
    same_key = {6: ("k0", 0, "retry"), 7: ("k1", 1, "final_retry")}
    rows = rows.with_columns(
        key=pl.Series([same_key[n][0] if n in same_key else f"k{n}" for n in range(8)]),
        user=pl.Series([same_key[n][1] if n in same_key else n for n in range(8)]),
        tag=pl.Series([same_key[n][2] if n in same_key else None for n in range(8)]),
    )
    effects = pl.DataFrame({"user_id": [1, 3], "idempotent_key": ["k1", "k3"], "effect": ["applied", "refused"]})
    counted = {fate.name: fate.count for fate in fates(folder(rows, effects))}
    assert counted == {
        "Read": 1,
        "Answered on a retry": 1,
        "Applied": 1,
        "Refused": 1,
        "Not applied": 1,
        "On a bet or match": 1,
    }
    assert sum(counted.values()) == unknown_count(rows)
    without = {fate.name: fate.count for fate in fates(folder(rows))}
    assert without["Left to the checker"] == 3


def test_counter_that_restarts_is_no_negative_load() -> None:
    series = pl.DataFrame(
        {
            "t": [0.0, 1.0, 2.0, 3.0],
            "name": ["cpu_seconds"] * 4,
            "node": ["pg1"] * 4,
            "value": [5.0, 6.0, 0.5, 1.0],
        }
    )
    assert kinds_over_time(series, "cpu_seconds", CLOCK) == {"pg": [0.0, 1.0, 0.0, 0.5]}
    [used] = usage(series)
    assert used.cpu_seconds == pytest.approx(1.5)
    assert used.cpu_mean_cores == pytest.approx(0.5)


def test_peak_between_two_points_of_a_figure_is_kept() -> None:
    series = pl.DataFrame({"t": [0.1, 0.5, 0.9], "name": ["lag"] * 3, "node": ["g"] * 3, "value": [1.0, 900.0, 2.0]})
    assert samples(series, "lag", CLOCK)["g"]["value"].to_list() == [900.0]


def test_clock_holds_attempts_samples_and_faults_and_cuts_phases_to_them(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, rate_per_s=5))
    clock = clock_of(run)
    assert clock is not None
    assert (clock.start, clock.end, clock.bin_s) == (5, 74, 1)
    assert [phase.name for phase in clock.phases] == ["before", "fault", "recovery", "after", "drain", "resolve"]
    assert clock.phases[0].start == 5
    assert clock.phases[-1].end == 74


def timeline(*rows: tuple[float, str, str | None, str | None]) -> pl.DataFrame:
    """Return a timeline of (t, kind, node, detail)."""
    columns = {"t": pl.Float64, "kind": pl.String, "node": pl.String, "detail": pl.String}
    return pl.DataFrame(rows, schema=columns, orient="row")


def test_phase_that_ends_as_it_begins_is_not_shown() -> None:
    marks = timeline(
        (0.0, "phase", None, "before"),
        (10.0, "phase", None, "fault"),
        (20.0, "phase", None, "after"),
        (20.0, "phase", None, "recovery"),
        (30.0, "phase", None, "drain"),
    )
    run = replace(folder(attempts(("bet", 0.0, 40.0, "ok", 202))), timeline=marks)
    clock = clock_of(run)
    assert clock is not None
    assert [(phase.name, phase.start) for phase in clock.phases] == [
        ("before", 0.0),
        ("fault", 10.0),
        ("after", 20.0),
        ("drain", 30.0),
    ]


def test_interruption_is_told_apart_from_the_fault_that_was_asked_for() -> None:
    marks = timeline(
        (1.0, "process_death", "pg1", "killed"),
        (2.0, "process_death", "api0", "did not answer in time"),
        (3.0, "process_start", "pg1", None),
        (5.0, "process_start", "api0", None),
        (8.0, "process_death", "pg1", "Connection refused"),
    )
    verdict = Verdict(faults=[Fault(kind="kill", target="pg1", requested_at=0.9, recovered_at=4.0)])
    run = replace(folder(attempts(("bet", 0.0, 9.0, "ok", 202))), timeline=marks, verdict=verdict)
    found = [(item.node, item.start, item.until) for item in interruptions(run)]
    assert found == [("api0", 2.0, 5.0), ("pg1", 8.0, None)]


def test_retry_after_the_snapshot_is_no_load() -> None:
    rows = attempts(("bet", 0.0, 1.0, "ok", 202), ("bet", 90.0, 91.0, "ok", 202))
    rows = rows.with_columns(tag=pl.Series([None, "final_retry"]))
    clock = clock_of(folder(rows))
    assert clock is not None
    assert clock.end == 1


def test_clock_of_a_long_run_has_few_enough_bins() -> None:
    run = folder(attempts(("bet", 0.0, 0.1, "ok", 202), ("bet", 86_400.0, 86_400.1, "ok", 202)))
    clock = clock_of(run)
    assert clock is not None
    assert clock.bins <= 400


def test_clock_survives_faults_alone_and_nothing_at_all() -> None:
    run = folder(attempts(("bet", 0.0, 0.1, "ok", 202)))
    nothing = RunFolder(Path(), Verdict(), None, None, None, None, [])
    only = RunFolder(Path(), Verdict(faults=[Fault(measured_start=3.2)]), None, None, None, None, [])
    assert clock_of(run) is not None
    assert clock_of(nothing) is None
    clock = clock_of(only)
    assert clock is not None
    assert (clock.start, clock.end) == (3, 4)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0, "0"),
        (-1234.4, "−1 234"),
        (1234567.0, "1 234 567"),
        (99.986, "99.986"),
        (183.4, "183.4"),
        (41.73, "41.73"),
        (0.00421, "0.0042"),
        (4.0, "4"),
    ],
)
def test_numbers_are_written_with_the_digits_that_count(value: float | None, written: str) -> None:
    assert words.number(value).replace("\u202f", " ") == written


def test_sizes_and_quantities_carry_their_units() -> None:
    assert words.size(512) == "512\u00a0B"
    assert words.size(2_453_916) == "2.5\u00a0MB"
    assert words.quantity(500.0, "/s") == "500/s"
    assert words.quantity("< 100 ms", "ms") == "< 100 ms"
    assert words.plural(1, "anomaly", "anomalies") == "1\u00a0anomaly"


@pytest.mark.parametrize(
    ("target", "written"),
    [(">= 99.99", "≥ 99.99 %"), ("< 500", "< 500 %"), (100, "100 %"), ("540 asked", "540 asked"), (None, "–")],
)
def test_target_carries_its_sign_and_unit(target: float | str | None, written: str) -> None:
    assert words.bound(target, "%").replace("\u00a0", " ") == written


def _luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(char * 2 for char in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_the_contrast_that_text_and_figures_need() -> None:
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    assert len(schemes) == 3, "light, dark and print"
    for scheme in schemes:
        for name in ("ink", "muted", "link", "good", "bad", "warn-ink", "doubt", "fault-ink"):
            assert _contrast(scheme[f"--{name}"], scheme["--paper"]) >= 4.5, name
        for name in (*(f"{kind}{n}" for kind in "ca" for n in range(1, 7)), "fault-bar", "warn"):
            assert _contrast(scheme[f"--{name}"], scheme["--paper"]) >= 3.0, name
