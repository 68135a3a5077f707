"""Times the hot functions, stores their medians, and compares a new run with the stored one.

    tools/benchmarks.py store            measure, and write tests/benchmarks/stored/medians.json
    tools/benchmarks.py compare          measure, and compare with it; nothing is written
    … [--select EXPRESSION] [--bound 1.5] [--json PATH] [--from PATH]

A function's figure is the median of its processor time divided by that of a fixed loop, timed just before and just
after it (tests/benchmarks/conftest.py): machines differ in speed, and so does one machine by the hour. What is
compared is that figure now over that figure then: 1.00 is as fast as it was. Polars has one thread here, because
threads that wait for each other use processor time too. `--from` takes a pytest-benchmark JSON file instead of
measuring.

Exit codes: 0 nothing is slower than the bound; 10 something is; 2 usage, nothing stored, or a benchmark failed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"
STORED = BENCHMARKS / "stored" / "medians.json"
BOUND = 1.5
"""Above the spread of one busy machine (about 1.2), below what a careless loop costs."""
SLOWER_EXIT = 10
USAGE_EXIT = 2


class Problem(Exception):
    """What keeps us from comparing; the message says what to do."""


@dataclass(frozen=True)
class Line:
    """One function: its figures then and now, None where it was not measured."""

    name: str
    then: float | None
    now: float | None

    @property
    def ratio(self) -> float | None:
        """Now over then, where both are known."""
        return None if self.then is None or self.now is None else self.now / self.then


def figures(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return medians by name from what `--benchmark-json` writes. Raises Problem for a file of another form."""
    found = {}
    try:
        for item in measured["benchmarks"]:
            median_s, yardstick_s = float(item["stats"]["median"]), float(item["extra_info"]["yardstick_s"])
            found[str(item["name"])] = {
                "median_us": round(median_s * 1e6, 3),
                "yardstick_us": round(yardstick_s * 1e6, 3),
                "relative": round(median_s / yardstick_s, 5),
                "rounds": int(item["stats"]["rounds"]),
            }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Problem(f"this is no result of tests/benchmarks ({type(error).__name__}: {error})") from error
    if not found:
        raise Problem("nothing was measured: does --select name any benchmark?")
    return found


def compared(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Line]:
    """Return a line for every function of either side, by name."""

    def relative(side: Mapping[str, Any], name: str) -> float | None:
        return float(side[name]["relative"]) if name in side else None

    return [Line(name, relative(then, name), relative(now, name)) for name in sorted({*then, *now})]


def slower(lines: Sequence[Line], bound: float) -> list[Line]:
    """Return those that take more than `bound` times what they took."""
    return [line for line in lines if line.ratio is not None and line.ratio > bound]


def measure(select: str | None) -> dict[str, Any]:
    """Run the benchmarks and return what pytest-benchmark wrote. Raises Problem if one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        command = [
            *(sys.executable, "-m", "pytest", str(BENCHMARKS), "--benchmark-only", f"--benchmark-json={path}"),
            *("--benchmark-columns=median,iqr,rounds", "--benchmark-time-unit=us", "--benchmark-disable-gc"),
            "--benchmark-timer=time.process_time",
            *("-q", "-p", "no:cacheprovider"),
        ]
        if select is not None:
            command += ["-k", select]
        # What pytest says is progress; our result alone goes to standard output.
        environment = {**os.environ, "POLARS_MAX_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)  # noqa: S603 - our tests
        code = done.returncode
        if code != 0:
            raise Problem(f"pytest ended with {code}: the lines above say which benchmark failed")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def read(path: Path, otherwise: str) -> dict[str, Any]:
    """Return the JSON object of a file. Raises Problem."""
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise Problem(f"cannot read {path}: {error}; {otherwise}") from error
    if not isinstance(found, dict):
        raise Problem(f"{path} is not a JSON object; {otherwise}")
    return found


def document(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is stored: where it was measured, and the figures."""
    cpu = measured.get("machine_info", {}).get("cpu", {}).get("brand_raw", platform.machine())
    return {
        "about": "written by tools/benchmarks.py store; relative = median / yardstick of the same moment",
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "commit": measured.get("commit_info", {}).get("id", "")[:12],
        "functions": figures(measured),
    }


def table(lines: Sequence[Line], bound: float) -> str:
    """Return the comparison as text."""
    width = max(len(line.name) for line in lines)

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = [f"{'function':<{width}}  {'then':>9}  {'now':>9}  {'ratio':>6}"]
    for line in lines:
        mark = ""
        if line.ratio is None:
            mark = "new" if line.then is None else "not measured"
        elif line.ratio > bound:
            mark = "SLOWER"
        figures_shown = f"{number(line.then, 4):>9}  {number(line.now, 4):>9}  {number(line.ratio, 2):>6}"
        rows.append(f"{line.name:<{width}}  {figures_shown}  {mark}".rstrip())
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then store or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("store", "compare"))
    parser.add_argument("--select", default=None, metavar="EXPRESSION", help="pytest's -k")
    parser.add_argument("--bound", type=float, default=BOUND, help=f"slower by more than this ends with 10 ({BOUND})")
    parser.add_argument("--json", type=Path, default=None, help="also write the comparison to this file")
    parser.add_argument("--from", dest="source", type=Path, default=None, help="a pytest-benchmark JSON file")
    given = parser.parse_args(arguments)
    if not 1.0 <= given.bound < float("inf"):
        parser.error("--bound is a number of 1 or more")
    if given.what == "store" and given.select is not None:
        parser.error("--select would store part of the functions and forget the others; leave it out")
    try:
        if given.what == "compare":
            stored = read(STORED, "`make benchmarks` stores one")
        source = given.source
        measured = measure(given.select) if source is None else read(source, "name a file of --benchmark-json")
        if given.what == "store":
            STORED.parent.mkdir(parents=True, exist_ok=True)
            found = document(measured)
            STORED.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
            print(f"{len(found['functions'])} medians stored in {STORED.relative_to(ROOT)}")
            return 0
        lines = compared(stored["functions"], figures(measured))
    except (Problem, KeyError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_EXIT
    if given.select is not None:
        lines = [line for line in lines if line.now is not None]
    late = slower(lines, given.bound)
    if given.json is not None:
        rows = [{"name": line.name, "then": line.then, "now": line.now, "ratio": line.ratio} for line in lines]
        given.json.write_text(json.dumps({"bound": given.bound, "functions": rows}, indent=2) + "\n")
    print(f"stored: commit {stored.get('commit')}, {stored.get('cpu')}, Python {stored.get('python')}")
    print(table(lines, given.bound))
    print(f"{len(late)} of {len(lines)} slower than {given.bound:g} times what they were")
    return SLOWER_EXIT if late else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(40)
