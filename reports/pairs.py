"""The lists of names and values on the page: machine, configuration, timings, amounts of data."""

from typing import Any

from reports.folder import Verdict
from reports.words import NONE, integer, number, quantity, seconds, sentence

MAX_CONFIG_ITEMS = 12
SECRET_WORDS = ("password", "secret", "token", "credential", "private")


def generator(verdict: Verdict) -> list[tuple[str, str]]:
    """Return how well the load generator kept its schedule."""
    own = verdict.generator
    if own is None:
        return []
    return [
        ("Requests scheduled", integer(own.scheduled)),
        ("Requests sent", integer(own.sent)),
        ("Dropped, never sent", integer(own.dropped)),
        ("Sent late", integer(own.late)),
        ("Lateness, 99th percentile", quantity(own.lag_p99_ms, "ms")),
        *([("Skipped, nothing to act on", integer(own.skipped))] if own.skipped is not None else []),
        *([("Gave up before the end", "yes" if own.gave_up else "no")] if own.gave_up is not None else []),
        *([("Processor time of the harness", seconds(own.cpu_s, 1))] if own.cpu_s is not None else []),
    ]


def machine(verdict: Verdict) -> list[tuple[str, str]]:
    """Return the machine and the code that ran on it."""
    own = dict(verdict.machine)
    memory = own.pop("memory_gb", None)
    rows = [(sentence(str(name)).capitalize(), _plain(value)) for name, value in own.items()]
    rows = [("CPU" if name == "Cpu" else "OS" if name == "Os" else name, value) for name, value in rows]
    if memory is not None:
        rows.append(("Memory", quantity(memory, "GB") if isinstance(memory, int | float) else str(memory)))
    rows.append(("Commit", verdict.commit or NONE))
    rows.append(("ledgerproof", verdict.version or NONE))
    return rows


def timings(verdict: Verdict) -> list[tuple[str, str]]:
    """Return how long each part of the run took."""
    names = {
        "stack_s": "Starting the stack",
        "seed_s": "Filling the wallets",
        "load_s": "Load and faults",
        "drain_s": "Draining",
        "snapshot_s": "Reading the snapshot",
        "resolve_s": "Resolving unknown outcomes",
        "down_s": "Stopping the stack",
        "check_s": "Checking",
        "total_s": "Whole run",
    }
    return [
        (names.get(name, sentence(name.removesuffix("_s")).capitalize()), seconds(value, 1))
        for name, value in verdict.timings.items()
        if isinstance(value, int | float)
    ]


def sizes(verdict: Verdict) -> list[tuple[str, str]]:
    """Return the amounts of data that the checker counted."""
    rows = [
        (sentence(name).capitalize(), integer(count) if isinstance(count, int | float) else _plain(count))
        for name, count in flatten(verdict.sizes)
    ]
    if verdict.raw_duplicates is not None:
        rows.append(("Duplicate Kafka records, harmless if A22 is 0", integer(verdict.raw_duplicates)))
    return rows


def pairs(value: dict[str, Any]) -> list[tuple[str, str]]:
    """Return settings as dotted names and their values, secrets replaced."""
    return [(name, _plain(item)) for name, item in flatten(value)]


def flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as dotted names, the values of secrets replaced."""
    rows: list[tuple[str, Any]] = []
    for name, item in value.items():
        dotted = f"{prefix}{name}"
        if any(word in str(name).lower() for word in SECRET_WORDS):
            rows.append((dotted, "not shown"))
        elif isinstance(item, dict) and item:
            rows += flatten(item, f"{dotted}.")
        else:
            rows.append((dotted, item))
    return rows


def _plain(value: object) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 100_000:
        # Ports and years are names more than amounts: no gap in them.
        return str(value)
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        between = "; " if any(isinstance(item, dict) for item in value) else ", "
        shown = between.join(_plain(item) for item in value[:MAX_CONFIG_ITEMS])
        return f"{shown} … ({len(value)} values)" if len(value) > MAX_CONFIG_ITEMS else shown or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in flatten(value)) or "none"
    return str(value)
