"""Judges of histories that other harnesses recorded: Jepsen's bank and Elle's list-append, in EDN."""
