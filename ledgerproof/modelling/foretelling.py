"""Writes the forecast of a main job into its run folder, before the job begins."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from compose.service import role_of
from ledgerproof.faults import PlannedFault
from ledgerproof.machine import commit, describe_machine
from ledgerproof.modelling.calibrate_command import read_calibration
from ledgerproof.options import Options
from ledgerproof.output import write_json
from ledgerproof.workload import Kind, Schedule
from sim.cases import Shape
from sim.costs import Calibration
from sim.faults import Fault
from sim.run_forecast import FILE, RunForecast, forecast_run

READS: Final = (Kind.BALANCE, Kind.ENTRIES)
PARTS: Final = {"relay0": "relay", "matcher0": "matcher", "projector0": "projector", "redis": "redis", "kafka": "kafka"}


def foretell(folder: Path, options: Options, schedule: Schedule, planned: list[PlannedFault]) -> RunForecast:
    """Forecast a run from its options, its schedule and its planned faults; write and return the forecast.

    Raises click.UsageError if there is no calibration, OSError if it cannot be written.
    """
    calibration = read_calibration()
    reads = int(np.isin(schedule.kind, READS).sum())
    notes = ["Every command that writes is modelled as a bet; retries of clients are not modelled."]
    machine = describe_machine()
    if (machine["cpu"], machine["cores"]) != (calibration.machine.get("cpu"), calibration.machine.get("cores")):
        notes.append("The calibration is of another machine: read the forecast as a ratio, not as a figure.")
    faults = [fault for one in planned if (fault := as_modelled(one, calibration)) is not None]
    if len(faults) < len(planned):
        notes.append("A killed settler is not modelled: nothing that is forecast waits for it.")
    found = forecast_run(
        calibration,
        Shape(
            name="main job",
            why="",
            servers=options.servers,
            apis=options.apis,
            read_share=round(reads / max(1, len(schedule)), 4),
        ),
        len(schedule) / options.duration_s,
        options.duration_s,
        faults,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        seed=options.seed,
        notes=notes,
    )
    write_json(folder / FILE, found)
    return found


def as_modelled(planned: PlannedFault, calibration: Calibration) -> Fault | None:
    """Return what the model makes of a planned fault; None if nothing that it models waits for that node."""
    part = planned.node if planned.node.startswith("pg") else PARTS.get(planned.node)
    if part is None:
        return None
    lasts_s = planned.hold_s + calibration.costs.returns_s.get(role_of(planned.node), 0.0)
    return Fault("pause" if planned.kind == "pause" else "kill", part, planned.at_s, lasts_s)
