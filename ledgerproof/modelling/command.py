"""`ledgerproof sim`: the commands of the capacity model, one module each."""

import click

from ledgerproof.modelling.calibrate_command import calibrate_command
from ledgerproof.modelling.fidelity_command import fidelity_command
from ledgerproof.modelling.measure_command import measure_command
