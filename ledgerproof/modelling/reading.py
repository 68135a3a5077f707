"""Reads what processes of the service say of their work, from the text of their metrics."""

import re
from collections import defaultdict
from typing import Final

_WORK: Final = re.compile(
    r"^(worker_jobs_processed_total|worker_job_duration_seconds_count|events_published_total)"
    r'\{(?:group|server)="([^"]+)"\} ([0-9.eE+-]+)$',
    re.MULTILINE,
)
_ENTRIES: Final = re.compile(r"^ledger_entries_total ([0-9.eE+]+)$", re.MULTILINE)
_KIND: Final = {"worker_jobs_processed_total": "jobs", "worker_job_duration_seconds_count": "batches"}


def counted(node: str, text: str) -> dict[str, float]:
    """Return what a node has done: `entries` of an API, `relay jobs`, and `jobs` and `batches` of each consumer."""
    found: dict[str, float] = defaultdict(float)
    if node.startswith("api"):
        found["entries"] = sum(float(value) for value in _ENTRIES.findall(text))
        return found
    for what, who, value in _WORK.findall(text):
        if what == "events_published_total":
            found["relay jobs"] += float(value)
        elif not node.startswith("relay"):
            found[f"{who} {_KIND[what]}"] += float(value)
    return found
