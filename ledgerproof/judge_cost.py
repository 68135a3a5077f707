"""Measures what judging a run folder costs: time, time per check and peak memory, in a process of its own.

    python -m ledgerproof.judge_cost RUN [SLICES]

prints one line of JSON. `ledgerproof bench-judge` starts it once for each size.
"""

import math
import re
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

STATUS: Final = Path("/proc/self/status")


class Cost(msgspec.Struct):
    """What one judgement cost."""

    rows: int
    """Records of the history."""
    seconds: float
    cpu_s: float
    """CPU seconds of the process, user and system, imports left out."""
    peak_mb: float
    """Largest resident memory of the process, in 10^6 bytes."""
    verdict: str
    anomalies: dict[str, int]
    seconds_of: dict[str, float]
    """Seconds of each step and check; steps of several workers overlap."""
    unresolved: int
    reasons: list[str]


def peak_bytes() -> int:
    """Return the largest resident memory this program has had. Raises OSError, ValueError without /proc."""
    match = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if match is None:
        raise ValueError(f"{STATUS} does not say VmHWM")
    return int(match.group(1)) * 1024


def measure(folder: Path, slices: int | None = None) -> Cost:
    """Judge the run in `folder` by the columns and return what that cost. Raises what `judge_folder` raises.

    The other judges are not asked: what they cost is in decision 33.
    """
    from invariants.large import Costs, judge_folder  # noqa: PLC0415 - not part of what is measured
    from invariants.slices import rows_recorded  # noqa: PLC0415

    costs = Costs()
    began, cpu_began = time.perf_counter(), time.process_time()
    judgement = judge_folder(folder, slices, costs=costs, judges=())
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    return Cost(
        rows=rows_recorded(folder),
        seconds=round(seconds, 3),
        cpu_s=round(cpu_s, 3),
        peak_mb=round(peak_bytes() / 1e6, 1),
        verdict=judgement.verdict.name,
        anomalies={code: count for code, count in judgement.anomalies.items() if count},
        seconds_of={name: round(value, 3) for name, value in costs.seconds.items()},
        unresolved=judgement.unresolved,
        reasons=judgement.reasons,
    )


def growth(rows: list[int], values: list[float]) -> float | None:
    """Return the exponent k of values ~ rows^k by least squares of the logarithms; None for fewer than two sizes."""
    points = [(math.log(size), math.log(value)) for size, value in zip(rows, values, strict=True) if value > 0]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(point[i] for point in points) / len(points) for i in (0, 1))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


if __name__ == "__main__":
    result = measure(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
