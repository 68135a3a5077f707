"""Takes one part of the running service away, brings it back, and measures how far the rest fell behind meanwhile.

The same measurement serves twice: at a low rate it tells how long a part takes to come back (calibration), and at
others it is what forecasts of faults are scored against.
"""

import threading
import time
from itertools import pairwise
from typing import Final

from compose.stack import Stack
from ledgerproof.bench.context import Bench
from ledgerproof.bench.drive import play
from ledgerproof.bench.lag import BACKLOGS, scrape, values
from ledgerproof.modelling.reading import counted
from sim.cases import Outage, OutageCase
from sim.outages import AFTER_S, BEFORE_S, STAGES, recovered_s

SAMPLE_EVERY_S: Final = 0.1
WAITS: Final = {"pg": "entries", "kafka": "relay jobs", "redis": "projector jobs"}
"""What does not grow while a part of this kind is away; of a worker it is what the worker itself does."""


def measure_outage(bench: Bench, stack: Stack, case: OutageCase) -> Outage:
    """Measure one outage under a constant load of bets. The part is back when this returns, whatever happens."""
    watch = _Watch(bench, WAITS.get(case.sort, f"{case.sort} jobs"))
    plan = bench.plan("mixed", loop="open", rate=case.rate_per_s, duration_s=BEFORE_S + case.lasts_s + AFTER_S)
    breaking = threading.Thread(target=_break, args=(stack, case, watch), name="outage", daemon=True)

    def begin() -> None:
        watch.start()
        breaking.start()

    try:
        window = play(plan, begin)
    finally:
        breaking.join(BEFORE_S + case.lasts_s + 60.0)
        watch.stop()
        stack.heal()
    bench.acknowledged += window.accepted_of.get("bets", 0)
    bench.drain()
    if watch.problem is not None:
        raise watch.problem
    return watch.outage(case, window.due - window.accepted)


def _break(stack: Stack, case: OutageCase, watch: "_Watch") -> None:
    try:
        time.sleep(BEFORE_S)
        watch.note("away")
        if case.kind == "kill":
            stack.kill(case.node)
            time.sleep(case.lasts_s)
            stack.start_node(case.node)
        else:
            stack.pause(case.node)
            time.sleep(case.lasts_s)
            stack.resume(case.node)
        watch.note("asked back")
    except Exception as error:  # noqa: BLE001 - it is raised by the thread that waits for this one
        watch.problem = error


class _Watch:
    """Samples backlogs and one counter until it is stopped."""

    def __init__(self, bench: Bench, counter: str) -> None:
        self._bench, self._counter = bench, counter
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._marks: dict[str, float] = {}
        self._samples: list[tuple[float, float, dict[str, float]]] = []
        self.problem: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def note(self, what: str) -> None:
        self._marks[what] = time.monotonic()

    def _run(self) -> None:
        ports = self._bench.metrics_ports()
        while not self._stop.is_set():
            began = time.monotonic()
            backlog: dict[str, float] = {}
            done = 0.0
            for node, port in ports.items():
                text = scrape(port)
                if text is None:
                    continue
                for name, value in values(text, BACKLOGS).items():
                    stage = "outbox" if name.startswith("outbox") else name.split(" ")[0]
                    backlog[stage] = backlog.get(stage, 0.0) + value
                done += counted(node, text).get(self._counter, 0.0)
            self._samples.append((began, done, backlog))
            self._stop.wait(max(0.02, SAMPLE_EVERY_S - (time.monotonic() - began)))

    def outage(self, case: OutageCase, refused: int) -> Outage:
        """Return what was seen."""
        away = self._marks["away"]
        rows = [(at - away, done, backlog) for at, done, backlog in self._samples]
        # A counter that begins anew with its process is smaller than before, and grows again.
        gone_s = _back(rows, case.lasts_s)
        waited = {stage: [(at, backlog.get(stage)) for at, _, backlog in rows] for stage in STAGES}
        return Outage(
            case=case,
            gone_s=gone_s,
            recovered_s=max(
                gone_s, *(recovered_s([(at, backlog.get(stage)) for at, _, backlog in rows]) for stage in STAGES)
            ),
            backlog_peak={
                stage: max((value for at, value in rows_of if at >= 0 and value is not None), default=0.0)
                for stage, rows_of in waited.items()
            },
            refused=refused,
        )


Row = tuple[float, float, dict[str, float]]


def _back(rows: list[Row], lasts_s: float) -> float:
    """Return when the counter grew again, seconds after the part was taken away."""
    late = [(at, done) for at, done, _ in rows if at >= lasts_s]
    for (_, before), (at, done) in pairwise(late):
        if done > before > 0 or (before == 0 and done > 0):
            return at
    raise RuntimeError("the part did not come back while the load went on")
