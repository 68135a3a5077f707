"""Streams a trace of a million rows from disk and says how long it took and how much memory it needed.

    .venv/bin/python tests/benchmarks/trace_memory.py [--rows 1000000] [--folder DIR]

Each format is written, then checked and read in a process of its own, so that its peak is its own. "Growth" is the
peak of that process above its peak after a trace of a thousand rows.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load.trace import read_trace, write_synthetic


def peak_mb() -> float:
    """Peak resident memory of this process alone: ru_maxrss would count that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def read(small: Path, path: Path) -> None:
    sum(map(len, read_trace(small).batches()))
    before_mb = peak_mb()
    began = time.perf_counter()
    trace = read_trace(path)
    checked_s = time.perf_counter() - began
    rows = sum(map(len, trace.batches()))
    read_s = time.perf_counter() - began - checked_s
    print(
        f"{path.suffix[1:]}: {rows:,} rows, {path.stat().st_size / 1e6:.1f} MB on disk; checked in {checked_s:.1f} s "
        f"({rows / checked_s:,.0f} rows/s), read in {read_s:.1f} s ({rows / read_s:,.0f} rows/s);"
        f" peak {peak_mb():.0f} MB, growth {peak_mb() - before_mb:.1f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="Where the traces are written.")
    parser.add_argument("--read", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        read(*arguments.read)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for suffix in (".csv", ".parquet"):
            small = write_synthetic(Path(folder) / f"small{suffix}", rows=1_000, seed=1)
            path = write_synthetic(Path(folder) / f"trace{suffix}", rows=arguments.rows, seed=1)
            subprocess.run([sys.executable, __file__, "--read", str(small), str(path)], check=True)


if __name__ == "__main__":
    main()
