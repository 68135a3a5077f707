"""Records during the run what the service reports of itself and what its processes use, about once a second.

It runs in a thread and asks one process after another with a short timeout; a process that does not answer
(because it was killed or paused) simply has no sample for that moment. Samples are for the lag and resource
curves and for the lag objective; nothing about correctness is decided by them.
"""

import http.client
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from compose.errors import StackError
from compose.nodes import NodeStatus
from invariants.timeline import Series

SCRAPE_EVERY_S: Final = 1.0
USAGE_EVERY_S: Final = 5.0
SCRAPE_TIMEOUT_S: Final = 0.5
STOP_TIMEOUT_S: Final = 10.0

_WANTED: Final = re.compile(rb"^(kafka_consumer_lag|outbox_unpublished)\{([^}]*)\} ([0-9.eE+-]+)$", re.MULTILINE)
_COUNTED: Final = re.compile(
    rb"^(cache_fills_lost_total|events_repeated_total|kafka_assignments_total)(?:\{[^}]*\})? ([0-9.eE+-]+)$",
    re.MULTILINE,
)
"""Counters of one process; they begin anew with it, so they are kept by process."""
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
_NODE_LABEL: Final = {"kafka_consumer_lag": "group", "outbox_unpublished": "server"}


class Sampler:
    """Samples until `stop`. `ports` are the metrics ports by node, `usage` measures every node."""

    def __init__(
        self,
        series: Series,
        clock: Callable[[], float],
        ports: Mapping[str, int],
        usage: Callable[[], Sequence[NodeStatus]],
    ) -> None:
        self._series = series
        self._clock = clock
        self._ports = dict(ports)
        self._usage = usage
        self._gauges: dict[str, Callable[[], float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self.failure: Exception | None = None
        """What ended the sampling early, if anything did."""
        self.latest_lag: dict[str, float] = {}
        """Newest lag of each consumer group, for the progress display."""

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """Also record `read()` under `name` with every sample. It is called from the sampler's thread."""
        self._gauges[name] = read

    def start(self) -> None:
        """Start sampling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling and wait for the thread; a second call does nothing."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        usage_due = 0.0
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                for name, read in list(self._gauges.items()):
                    self._series.add(name, read())
                for process, port in self._ports.items():
                    self._scrape(process, port)
                if started >= usage_due:
                    usage_due = started + USAGE_EVERY_S
                    self._measure_usage()
                self._stop.wait(max(0.05, SCRAPE_EVERY_S - (time.monotonic() - started)))
        except (OSError, StackError) as error:
            # The series could not be written: the run goes on, and says that its curves are incomplete.
            self.failure = error

    def _scrape(self, process: str, port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SCRAPE_TIMEOUT_S)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return  # Killed or paused: its absence shows as a gap in the curve.
        finally:
            connection.close()
        now = self._clock()
        for (name, node), value in parse_metrics(text).items():
            self._series.add(name, value, node=node, t=now)
            if name == "kafka_consumer_lag":
                self.latest_lag[node] = value
        for name, value in parse_counters(text).items():
            self._series.add(name, value, node=process, t=now)

    def _measure_usage(self) -> None:
        now = self._clock()
        for node in self._usage():
            if node.pid is not None:
                self._series.add("rss_mb", node.memory_bytes / 1e6, node=node.name, t=now)
                self._series.add("cpu_seconds", node.cpu_s, node=node.name, t=now)


def parse_metrics(text: bytes) -> dict[tuple[str, str], float]:
    """Return the wanted gauges of a Prometheus text by (name, node); lag is summed over a group's topics."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for name_bytes, labels, value in _WANTED.findall(text):
        name = name_bytes.decode()
        node = dict(_LABEL.findall(labels.decode())).get(_NODE_LABEL[name], "")
        found[name, node] += float(value)
    return dict(found)


def parse_counters(text: bytes) -> dict[str, float]:
    """Return the wanted counters of a Prometheus text by name, summed over their labels."""
    found: dict[str, float] = defaultdict(float)
    for name, value in _COUNTED.findall(text):
        found[name.decode()] += float(value)
    return dict(found)
