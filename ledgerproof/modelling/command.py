"""`ledgerproof sim`: the commands of the capacity model, one module each."""

import click

from ledgerproof.modelling.scaling_command import failures_command, scaling_command
from ledgerproof.modelling.writer_command import writer_command


@click.group("sim")
def sim_group() -> None:
    """Predict what the service can carry, from a model that is held against theory and measurements."""


sim_group.add_command(writer_command)
sim_group.add_command(scaling_command)
sim_group.add_command(failures_command)
