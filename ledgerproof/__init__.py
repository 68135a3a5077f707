"""The command line and the main job: stack up, load, faults, drain, check, verdict, report."""

__version__ = "0.1.0"
