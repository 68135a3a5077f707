"""Counts what became of arrivals while they are played; `WorkerResult` is what comes out."""

from bisect import bisect_left
from typing import Final

from load.histograms import Latencies
from load.result import COARSE_MS, LATE_AFTER_MS, Cell, Second, WorkerResult
from load.schedule import Arrival

_BOUNDS_US: Final = [bound * 1000 for bound in COARSE_MS]
_LATE_US: Final = round(LATE_AFTER_MS * 1000)


class Tally:
    """The counts of one worker. Latencies are in seconds and count from the intended time."""

    def __init__(self, result: WorkerResult) -> None:
        self._result = result
        self._cells: dict[tuple[str, str], tuple[Cell, Latencies]] = {}
        self._seconds: dict[int, Second] = {}
        self._lags = Latencies()

    def sent(self, arrival: Arrival, lag_s: float) -> None:
        """Count an arrival that leaves now, `lag_s` after its time."""
        lag_us = round(lag_s * 1e6)
        self._result.sent += 1
        self._lags.record_us(lag_us)
        if lag_us > _LATE_US:
            self._result.late += 1
        self._second(arrival).sent += 1

    def answered(self, arrival: Arrival, record: str, status: int, latency_s: float) -> None:
        """Count an arrival with a complete answer."""
        latency_us = round(latency_s * 1e6)
        cell, latencies = self._cell(arrival)
        latencies.record_us(latency_us)
        self._ended(arrival, cell, record, str(status))
        second = self._second(arrival)
        second.latencies[bisect_left(_BOUNDS_US, latency_us)] += 1

    def unanswered(self, arrival: Arrival, record: str, kind: str) -> None:
        """Count an arrival that ends without a complete answer, for a reason of this kind."""
        cell, _ = self._cell(arrival)
        cell.unanswered += 1
        self._ended(arrival, cell, record, kind)
        if record == "info":
            self._result.unresolved += 1

    def dropped(self, arrival: Arrival) -> None:
        """Count an arrival that was not sent because too many were under way."""
        cell, _ = self._cell(arrival)
        cell.count += 1
        cell.dropped += 1
        cell.unanswered += 1
        self._result.dropped += 1
        self._second(arrival).dropped += 1

    def skipped(self, arrival: Arrival) -> None:
        """Count an arrival that had nothing to act on."""
        cell, _ = self._cell(arrival)
        cell.count += 1
        cell.skipped += 1
        self._result.skipped += 1

    def fill(self) -> WorkerResult:
        """Write the counts into the result and return it."""
        for cell, latencies in self._cells.values():
            cell.histogram = latencies.encode()
        self._result.cells = [cell for cell, _ in self._cells.values()]
        self._result.seconds = [self._seconds[second] for second in sorted(self._seconds)]
        self._result.lag.histogram = self._lags.encode()
        return self._result

    def _ended(self, arrival: Arrival, cell: Cell, record: str, status: str) -> None:
        second = self._second(arrival)
        cell.count += 1
        cell.statuses[status] = cell.statuses.get(status, 0) + 1
        if record == "ok":
            cell.ok += 1
            second.ok += 1
        elif record == "fail":
            cell.fail += 1
            second.fail += 1
        else:
            cell.info += 1
            second.info += 1

    def _cell(self, arrival: Arrival) -> tuple[Cell, Latencies]:
        key = (arrival.op, arrival.phase)
        found = self._cells.get(key)
        if found is None:
            found = self._cells[key] = (Cell(*key), Latencies())
        return found

    def _second(self, arrival: Arrival) -> Second:
        number = int(arrival.due_s)
        found = self._seconds.get(number)
        if found is None:
            found = self._seconds[number] = Second(number, latencies=[0] * (len(COARSE_MS) + 1))
        return found
