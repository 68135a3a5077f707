"""The forecast of a run: second by second, sealed, and read back only as it was."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ledgerproof.faults import PlannedFault
from ledgerproof.modelling import foretelling
from ledgerproof.modelling.foretelling import as_modelled, foretell
from ledgerproof.options import Options
from ledgerproof.workload import Kind, draw
from sim.faults import Fault
from sim.prediction import calibration_digest
from sim.run_forecast import FILE, RunForecast, read_run_forecast
from sim.system import Play, System
from tests.model_costs import BUSY, calibration_of, made_forecast

RATE, DURATION_S = 60.0, 8.0


@pytest.fixture(scope="module")
def said() -> RunForecast:
    return made_forecast(RATE, DURATION_S, faults=[Fault("pause", "matcher", 2.0, 3.0)])


def written(folder: Path, said: RunForecast) -> Path:
    path = folder / FILE
    path.write_bytes(msgspec.json.format(msgspec.json.encode(said), indent=1))
    return path


# --- what it says -----------------------------------------------------------------------------------------------------


def test_every_second_of_the_load_has_its_bands(said: RunForecast) -> None:
    assert [second.t for second in said.seconds] == list(range(8))
    for second in said.seconds:
        assert second.answered[0] <= second.answered[1]
        assert second.p50_ms is not None and second.p99_ms is not None
        assert second.p50_ms[0] <= second.p50_ms[1]
        assert second.p50_ms[0] <= second.p99_ms[0]
        assert set(second.backlog) == {"outbox", "matcher", "projector"}


def test_a_band_spans_the_replications(said: RunForecast) -> None:
    runs = [
        System(
            Play(
                shape=said.shape,
                costs=BUSY,
                rate_per_s=RATE,
                duration_s=DURATION_S,
                replication=number,
                warm_s=0.0,
                faults=tuple(said.faults),
            )
        ).run()
        for number in range(3)
    ]
    counts = [sum(int(((due >= 4) & (due < 5)).sum()) for due in run.due_s.values()) for run in runs]
    assert said.seconds[4].answered == [min(counts), max(counts)]
    peaks = [float(run.backlog["matcher"].max()) for run in runs]
    assert said.backlog_peak["matcher"].value == pytest.approx(np.mean(peaks))
    assert max(second.backlog["matcher"][1] for second in said.seconds) == max(peaks)


def test_what_is_paused_leaves_its_backlog_in_those_seconds(said: RunForecast) -> None:
    bets_per_s = RATE * (1 - said.shape.read_share)
    assert said.seconds[4].backlog["matcher"][0] > 1.5 * bets_per_s
    assert said.seconds[1].backlog["matcher"][1] < bets_per_s
    assert said.refused_share.value == 0
    assert said.answered_per_s.value == pytest.approx(RATE, rel=0.15)


def test_a_second_without_an_answer_has_no_percentiles() -> None:
    silent = made_forecast(1.0, 6.0)
    assert any(second.p50_ms is None for second in silent.seconds)
    assert all(second.answered[1] > 0 for second in silent.seconds if second.p50_ms is not None)


def test_the_same_seed_gives_the_same_seal(said: RunForecast) -> None:
    faults = [Fault("pause", "matcher", 2.0, 3.0)]
    assert made_forecast(RATE, DURATION_S, faults=faults).digest == said.digest
    assert made_forecast(RATE, DURATION_S, faults=faults, seed=2).digest != said.digest


# --- the seal ---------------------------------------------------------------------------------------------------------


def test_a_forecast_is_read_back_as_it_was_written(tmp_path: Path, said: RunForecast) -> None:
    assert read_run_forecast(written(tmp_path, said)) == said


@pytest.mark.parametrize("name", ["made_at", "commit", "calibration", "calibrated_on", "rate_per_s", "notes", "digest"])
def test_a_forecast_that_was_changed_is_refused(tmp_path: Path, said: RunForecast, name: str) -> None:
    path = written(tmp_path, said)
    raw = json.loads(path.read_text())
    raw[name] = {"rate_per_s": 61.0, "notes": []}.get(name, "x")
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"prediction\.json was changed after it was sealed"):
        read_run_forecast(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        read_run_forecast(tmp_path / FILE)
    (tmp_path / FILE).write_text('{"made_at": 1}')
    with pytest.raises(msgspec.ValidationError):
        read_run_forecast(tmp_path / FILE)


# --- of a main job ----------------------------------------------------------------------------------------------------

KNOWN = calibration_of(msgspec.structs.replace(BUSY, returns_s={"pg": 2.5, "relay": 0.5}))


@pytest.mark.parametrize(
    ("planned", "fault"),
    [
        (PlannedFault(1, "kill", "pg1", 10.0, 4.0), Fault("kill", "pg1", 10.0, 6.5)),
        (PlannedFault(2, "kill", "relay0", 3.0, 2.0), Fault("kill", "relay", 3.0, 2.5)),
        (PlannedFault(3, "pause", "redis", 3.0, 2.0), Fault("pause", "redis", 3.0, 2.0)),
        (PlannedFault(4, "hang", "matcher0", 1.0, 1.0), Fault("kill", "matcher", 1.0, 1.0)),
        (PlannedFault(5, "kill", "settler0", 1.0, 1.0), None),
    ],
)
def test_a_planned_fault_lasts_until_its_part_is_back(planned: PlannedFault, fault: Fault | None) -> None:
    assert as_modelled(planned, KNOWN) == fault


def test_a_main_job_is_forecast_from_its_schedule_and_sealed_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foretelling, "read_calibration", lambda: KNOWN)
    options = Options(seed=3, rate=40, duration_s=6, servers=2, apis=2)
    schedule = draw(options.seed, options.rate, options.duration_s, apis=options.apis)
    planned = [PlannedFault(1, "kill", "settler0", 1.0, 1.0), PlannedFault(2, "kill", "relay0", 2.0, 1.0)]
    found = foretell(tmp_path, options, schedule, planned)
    assert read_run_forecast(tmp_path / FILE) == found
    reads = sum(kind in (Kind.BALANCE, Kind.ENTRIES) for kind in schedule.kind.tolist())
    assert found.shape.read_share == pytest.approx(reads / len(schedule), abs=1e-4)
    assert found.rate_per_s == len(schedule) / 6
    assert found.faults == [Fault("kill", "relay", 2.0, 1.5)]
    assert found.calibration == calibration_digest(KNOWN)
    assert any("settler" in note for note in found.notes)
    # The machine of the made-up calibration is nobody's.
    assert any("another machine" in note for note in found.notes)
