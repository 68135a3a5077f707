"""Plays a trace of a million rows from disk and says how much memory the load needed, at its beginning and at its end.

    .venv/bin/python tests/benchmarks/trace_play.py [--rows 1000000] [--rate 4000] [--format parquet]

Against the test server of `load.truth`, which answers at once: what is measured is the load, not the service. Memory is
the resident memory of Locust's master and of its workers, each second.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil

from load.launch import command
from load.result import Result
from load.trace import write_synthetic
from load.truth import server

WORKERS = 2
START_S = 120.0


def watch(process: "subprocess.Popen[bytes]", samples: dict[int, list[float]], stop: threading.Event) -> None:
    """Sample the resident memory of a process and its children, in MB, until `stop`."""
    root = psutil.Process(process.pid)
    while not stop.wait(1.0):
        try:
            for one in [root, *root.children(recursive=True)]:
                samples.setdefault(one.pid, []).append(one.memory_info().rss / 1e6)
        except psutil.NoSuchProcess:
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=4_000.0)
    parser.add_argument("--format", choices=("csv", "parquet"), default="parquet")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trace-play-") as name:
        folder = Path(name)
        trace = write_synthetic(folder / f"trace.{arguments.format}", rows=arguments.rows, seed=1, rate=arguments.rate)
        lasts_s = arguments.rows / arguments.rate
        with server("none", lasts_s, []) as port:
            options = [
                *("--targets", f"127.0.0.1:{port}", "--load-profile", "trace", "--trace", str(trace), "--seed", "1"),
                *("--first-wallet", "0", "--request-timeout", "60", "--result", str(folder / "result.json")),
            ]
            process = subprocess.Popen(
                command(options, workers=WORKERS), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            samples: dict[int, list[float]] = {}
            stop = threading.Event()
            watching = threading.Thread(target=watch, args=(process, samples, stop))
            watching.start()
            try:
                said = process.communicate(timeout=lasts_s + START_S)[1]
            finally:
                process.kill()
                stop.set()
                watching.join()
        if process.returncode not in {0, 10, 30}:
            print(said.decode(errors="replace")[-2000:], file=sys.stderr)
            return 1
        result = Result.from_json((folder / "result.json").read_bytes())
    print(
        f"{result.sent:,} of {result.scheduled:,} arrivals sent ({result.skipped:,} skipped), lag p99 "
        f"{result.lag_p99_ms:.2f} ms, {'INVALID: ' + '; '.join(result.invalid) if result.invalid else 'valid'}"
    )
    for values in sorted(samples.values(), key=max):
        third = max(1, len(values) // 3)
        first, last = max(values[:third]), max(values[-third:])
        print(f"a process: peak {max(values):.0f} MB; first third {first:.0f} MB, last {last:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
