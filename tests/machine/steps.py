"""Counts what the state machines do, for the last lines of a test run."""

from collections import Counter

TAKEN: Counter[str] = Counter()
"""Steps taken in this process, by machine."""
