"""Reads the backlogs, and what each process did, from the /metrics of the running processes."""

import http.client
import re
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

SCRAPE_EVERY_S: Final = 0.4
SCRAPE_TIMEOUT_S: Final = 1.0
STOP_TIMEOUT_S: Final = 5.0
_SAMPLE: Final = re.compile(r"^([a-z_]+)(?:\{([^}]*)\})? ([0-9.eE+-]+|NaN)$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
BACKLOGS: Final = {"outbox_unpublished": "server", "kafka_consumer_lag": "group"}
"""Gauges of work that waits, and the label that names who it waits for."""
DONE: Final = {"worker_jobs_processed_total": "group", "events_published_total": "server"}
"""Counters of work that is done."""


def scrape(port: int) -> str | None:
    """Return the metrics of one process, None if it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SCRAPE_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def values(text: str, names: Mapping[str, str]) -> dict[str, float]:
    """Return the wanted samples summed by the label that `names` gives them."""
    found: dict[str, float] = defaultdict(float)
    for name, labels, value in _SAMPLE.findall(text):
        if name in names:
            who = dict(_LABEL.findall(labels)).get(names[name], "")
            found[f"outbox {who}" if names[name] == "server" else f"{who} lag"] += float(value)
    return dict(found)


class LagSampler:
    """Samples every backlog in a thread until `stop`; a process that does not answer has no sample then."""

    def __init__(self, ports: Mapping[str, int]) -> None:
        self._ports = dict(ports)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lag", daemon=True)
        self._began = 0.0
        self.times_s: dict[str, list[float]] = defaultdict(list)
        self.values: dict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        """Begin; times count from here."""
        self._began = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait for the thread. Harmless to repeat."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            now: dict[str, float] = defaultdict(float)
            for port in self._ports.values():
                text = scrape(port)
                for name, value in values(text, BACKLOGS).items() if text else ():
                    now[name] += value
            at = time.monotonic() - self._began
            for name, value in now.items():
                self.times_s[name].append(at)
                self.values[name].append(value)
            self._stop.wait(max(0.05, SCRAPE_EVERY_S - (time.monotonic() - started)))
