"""`ledgerproof sim`: the commands of the capacity model, one module each."""

import click

from ledgerproof.modelling.calibrate_command import calibrate_command
from ledgerproof.modelling.demands_command import demands_command
from ledgerproof.modelling.fidelity_command import fidelity_command
from ledgerproof.modelling.measure_command import measure_command
from ledgerproof.modelling.plan_command import plan_command
from ledgerproof.modelling.predict_command import predict_command
from ledgerproof.modelling.scaling_command import failures_command, scaling_command
from ledgerproof.modelling.sweep_command import sweep_command
from ledgerproof.modelling.writer_command import writer_command


@click.group("sim")
def sim_group() -> None:
    """Predict what the service can carry, from a model that is held against theory and measurements."""


sim_group.add_command(calibrate_command)
sim_group.add_command(fidelity_command)
sim_group.add_command(measure_command)
sim_group.add_command(predict_command)
sim_group.add_command(sweep_command)
sim_group.add_command(writer_command)
sim_group.add_command(demands_command)
sim_group.add_command(plan_command)
sim_group.add_command(scaling_command)
sim_group.add_command(failures_command)
