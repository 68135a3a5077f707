"""Measures a sweep: configurations of the command path per minute on this machine, as `ledgerproof sim sweep` does it.

    .venv/bin/python tests/benchmarks/sweep_speed.py [--every 1] [--customers 100000] [--workers N] [--json PATH]

The grid has 1,000 configurations: rates up to and above saturation, batch sizes, lingers, transaction times, numbers of
APIs. `--every 20` takes every twentieth and says how long all of them would take at the same speed, after the start of
Dask as measured. `--customers` is the number of commands of a configuration over its five replications.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from measuring import machine

from sim import sweep
from sim.tables import parse_toml

REPLICATIONS = 5
GRID = """\
replications = 5
[grid]
rate_per_s = {from = 200, to = 6000, steps = 10}
apis = [1, 2, 4, 8]
fixed_ms = [1, 2, 4, 8, 16]
batch_max = 256
linger_ms = {from = 0, to = 16, steps = 5}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--customers", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    whole = parse_toml(f"customers = {given.customers // REPLICATIONS}\n{GRID}", sweep.Sweep, "the benchmark's grid")
    began = time.perf_counter()
    moments: list[float] = []

    def done(finished: int, of: int) -> None:
        moments.append(time.perf_counter() - began)
        print(f"\r{finished} of {of}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = sweep.run(whole, place, sweep.on_dask(None, given.workers, place / "scratch"), done, given.every)
    took_s = time.perf_counter() - began
    print(file=sys.stderr)
    # Processor time of this process and of its ended workers: what a machine that does other things would need alone.
    cpu_s = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # The first call says that nothing is done yet, the second that Dask has started and one configuration is there.
    each_s = (moments[-1] - moments[1]) / (len(rows) - 1)
    result = {
        **machine(),
        "workers": given.workers,
        "configurations": len(rows),
        "customers_of_each": whole.customers * whole.replications,
        "took_s": round(took_s, 1),
        "start_s": round(moments[1] + took_s - moments[-1], 1),
        "each_s": round(each_s, 4),
        "cpu_s": round(cpu_s, 1),
        "all": whole.size,
        "all_would_take_s": round(took_s - moments[-1] + moments[1] + each_s * (whole.size - 1), 1),
        "settled": sum(row.outcome.settled for row in rows),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
