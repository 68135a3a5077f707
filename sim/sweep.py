"""Sweeps: thousands of configurations of the command path, on Dask, with results that survive a kill.

A grid names values for parameters of `Configuration`; the sweep is every combination. Each result is a line of
`results.jsonl`, written as soon as it is there and found again by the digest of all that determines it: the same sweep
goes on where it stopped, and a wider one computes only what is new.
"""

import contextlib
import hashlib
import itertools
import logging
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np

from sim.command_path import LIMITS, MODEL, Configuration, Outcome, check_limits, evaluate
from sim.statistics import MIN_REPLICATIONS
from sim.tables import TableError

RESULTS: Final = "results.jsonl"
PARQUET: Final = "results.parquet"
MAX_CONFIGURATIONS: Final = 100_000
MAX_STEPS: Final = 10_000
MAX_CUSTOMERS: Final = 5_000_000
MAX_REPLICATIONS: Final = 1_000
MAX_CUSTOMERS_IN_ALL: Final = 100_000_000_000
WRITTEN: Final = "write a number, numbers with commas, or FROM:TO:STEPS"
AHEAD: Final = 4
"""Configurations per process that are handed to Dask before the first is done: none waits, few are lost."""
CLOSE_S: Final = 20.0
"""How long an answer of the scheduler may take."""
SILENT: Final = logging.CRITICAL
"""Dask tells every interrupted worker as a warning."""

Whole = frozenset(field.name for field in msgspec.structs.fields(Configuration) if field.type is int)
"""Parameters that are whole numbers."""


class ClusterFailed(Exception):
    """No scheduler answers, its workers do not have this package, or they died; the message says which."""


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"first": "from", "last": "to"}):
    """Values from one to another, both included; whole parameters are rounded, and doubles left out."""

    first: float
    last: float
    steps: int
    scale: Literal["linear", "log"] = "linear"

    def __post_init__(self) -> None:
        """Refuse what has no values between."""
        if not 2 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps must be 2 to {MAX_STEPS:,}, not {self.steps:,}")
        if not self.first < self.last:
            raise ValueError(f"to must be above from, which is {self.first:g}")
        if self.scale == "log" and not self.first > 0:
            raise ValueError(f"from must be above 0 on a log scale, not {self.first:g}")

    def values(self) -> list[float]:
        """Return the values, in ascending order."""
        space = np.geomspace if self.scale == "log" else np.linspace
        return [float(f"{value:.12g}") for value in space(self.first, self.last, self.steps)]


Values = float | list[float] | Range


def _refuse_values(grid: Any) -> None:
    for name in Whole | LIMITS.keys():
        given = getattr(grid, name)
        if given is not None:
            expanded(name, given)


Grid = msgspec.defstruct(
    "Grid",
    [(field.name, Values | None, None) for field in msgspec.structs.fields(Configuration)],
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    namespace={
        "__post_init__": _refuse_values,
        "__doc__": "Values of each parameter; what is left out has its default.",
    },
)


class Sweep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a sweep file holds. Raises ValueError if it would be too much."""

    grid: Grid  # type: ignore[valid-type]
    customers: Annotated[int, msgspec.Meta(ge=1_000, le=MAX_CUSTOMERS)] = 20_000
    """Commands of one replication."""
    replications: Annotated[int, msgspec.Meta(ge=MIN_REPLICATIONS, le=MAX_REPLICATIONS)] = 5
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 1

    def __post_init__(self) -> None:
        """Refuse a sweep without an end."""
        count = self.size
        if count > MAX_CONFIGURATIONS:
            raise ValueError(f"grid has {count:,} combinations; {MAX_CONFIGURATIONS:,} can be swept at most")
        if count * self.customers * self.replications > MAX_CUSTOMERS_IN_ALL:
            raise ValueError(
                f"customers: {count:,} × {self.customers:,} × {self.replications:,} are more than "
                f"{MAX_CUSTOMERS_IN_ALL:,} in all"
            )

    @property
    def axes(self) -> dict[str, list[float]]:
        """The values of each parameter that the grid names."""
        given = {name: getattr(self.grid, name) for name in LIMITS}
        return {name: expanded(name, values) for name, values in given.items() if values is not None}

    @property
    def size(self) -> int:
        """Number of combinations."""
        return math.prod(len(values) for values in self.axes.values())

    def configurations(self) -> list[Configuration]:
        """Return every combination; the last parameter changes fastest."""
        axes = self.axes
        return [Configuration(**dict(zip(axes, each, strict=True))) for each in itertools.product(*axes.values())]  # type: ignore[arg-type]


class Row(msgspec.Struct, frozen=True):
    """One line of the results."""

    digest: str
    configuration: Configuration
    customers: int
    replications: int
    seed: int
    outcome: Outcome


def expanded(name: str, given: Values) -> list[float]:
    """Return the values of a parameter. Raises ValueError, which begins with its name, for one that cannot be."""
    values = given.values() if isinstance(given, Range) else given if isinstance(given, list) else [given]
    if not values:
        raise ValueError(f"{name} must have a value, not an empty list")
    found: dict[float, None] = {}
    for value in values:
        check_limits(name, value)
        if name in Whole:
            if not isinstance(given, Range) and value != int(value):
                raise ValueError(f"{name} must be a whole number, not {value:g}")
            found[round(value)] = None
        else:
            found[float(value)] = None
    return list(found)


def with_values(sweep: Sweep, assignments: tuple[str, ...]) -> Sweep:
    """Return the sweep with the values of NAME=V, NAME=V,V,… or NAME=FROM:TO:STEPS. Raises TableError."""
    given = {name: value for name in LIMITS if (value := getattr(sweep.grid, name)) is not None}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in LIMITS:
            raise TableError(f"--grid {assignment}: {name}: there is no such parameter; there are {', '.join(LIMITS)}")
        try:
            numbers = [float(part) for part in text.replace(":", ",").split(",")]
        except ValueError as error:
            raise TableError(f"--grid {assignment}: {name}: {WRITTEN}") from error
        if ":" in text and (text.count(":") != 2 or "," in text or not numbers[2].is_integer()):
            raise TableError(f"--grid {assignment}: {name}: {WRITTEN}")
        try:
            given[name] = Range(numbers[0], numbers[1], int(numbers[2])) if ":" in text else numbers
            expanded(name, given[name])
        except ValueError as error:
            raise TableError(f"--grid {assignment}: {name}: {str(error).removeprefix(name).strip()}") from error
    try:
        return msgspec.structs.replace(sweep, grid=Grid(**given))
    except ValueError as error:
        raise TableError(f"--grid: {error}") from error


def digest_of(sweep: Sweep, configuration: Configuration) -> str:
    """Return what identifies a result: the model, the configuration, the seed and how much is simulated."""
    identity = (MODEL, configuration, sweep.customers, sweep.replications, sweep.seed)
    return hashlib.blake2b(msgspec.json.encode(identity), digest_size=12).hexdigest()


def stored_rows(folder: Path) -> dict[str, Row]:
    """Return the results of a folder by their digests. A last line that a kill cut short is left out."""
    rows: dict[str, Row] = {}
    file = folder / RESULTS
    for line in file.read_bytes().splitlines() if file.exists() else []:
        with contextlib.suppress(msgspec.MsgspecError):
            row = msgspec.json.decode(line, type=Row)
            rows[row.digest] = row
    return rows


def run(
    sweep: Sweep,
    folder: Path,
    compute: "Compute",
    done: Callable[[int, int], None] = lambda _finished, _of: None,
    every: int = 1,
) -> list[Row]:
    """Compute what the folder does not hold yet, and return the rows of the sweep in the order of the grid.

    `done(finished, of)` is told about progress, first about what was there. With `every` above 1 only each n-th
    configuration is computed, as a sample. Whoever interrupts this loses only configurations under way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {digest_of(sweep, each): each for each in sweep.configurations()[::every]}
    rows = {digest: row for digest, row in stored_rows(folder).items() if digest in wanted}
    done(len(rows), len(wanted))
    missing = {digest: each for digest, each in wanted.items() if digest not in rows}
    if missing:
        # Closed at once, whatever happens between two answers: local workers end then.
        with _appended(folder / RESULTS) as append, contextlib.closing(compute(sweep, missing)) as answers:
            for digest, outcome in answers:
                row = Row(digest, wanted[digest], sweep.customers, sweep.replications, sweep.seed, outcome)
                append(row)
                rows[digest] = row
                done(len(rows), len(wanted))
    return [rows[digest] for digest in wanted]


Answers = Generator[tuple[str, Outcome], None, None]
Compute = Callable[[Sweep, dict[str, Configuration]], Answers]


def here(sweep: Sweep, missing: dict[str, Configuration]) -> Answers:
    """Compute in this process, one configuration after the other."""
    for digest, configuration in missing.items():
        yield digest, evaluate(configuration, sweep.customers, sweep.replications, sweep.seed)


def on_dask(scheduler: str | None, workers: int, scratch: Path) -> Compute:
    """Return what computes on a Dask cluster: that of the address, or `workers` local processes of its own.

    The workers of a cluster need this package. Local processes end with the sweep, whatever ends it; `scratch` is
    theirs, and is removed. What it returns raises ClusterFailed.
    """

    def compute(sweep: Sweep, missing: dict[str, Configuration]) -> Answers:
        from concurrent.futures import CancelledError  # noqa: PLC0415

        from distributed import KilledWorker, as_completed  # noqa: PLC0415 - slow to import

        todo = iter(missing.items())
        with _client(scheduler, workers, scratch) as client:

            def submit(count: int) -> list[Any]:
                return [
                    client.submit(_evaluated, digest, each, sweep.customers, sweep.replications, sweep.seed, pure=False)
                    for digest, each in itertools.islice(todo, count)
                ]

            processes = max(1, sum(client.nthreads().values()))
            under_way = as_completed(submit(AHEAD * processes))
            for future in under_way:
                try:
                    answer = future.result()
                except (KilledWorker, CancelledError, ImportError) as error:
                    raise ClusterFailed(f"{type(error).__name__}: {error}") from error
                yield answer
                future.release()
                for more in submit(1):
                    under_way.add(more)

    return compute


def _evaluated(
    digest: str, configuration: Configuration, customers: int, replications: int, seed: int
) -> tuple[str, Outcome]:
    return digest, evaluate(configuration, customers, replications, seed)


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int, scratch: Path) -> Iterator[Any]:
    from distributed import Client, LocalCluster  # noqa: PLC0415 - slow to import

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=CLOSE_S)
        except (OSError, ValueError) as error:
            # An address that is none is a ValueError.
            raise ClusterFailed(f"no scheduler at {scheduler}: {error}") from error
        with client:
            yield client
        return
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with (
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address=None,
                local_directory=str(scratch),
                silence_logs=SILENT,
            ) as cluster,
            Client(cluster, timeout=CLOSE_S) as client,
        ):
            yield client
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _appended(file: Path) -> Iterator[Callable[[Row], None]]:
    """Append rows to a file, each of them on the disk before the next; a line that a kill cut short is ended."""
    with file.open("ab") as out:
        if out.tell() and file.read_bytes()[-1:] != b"\n":
            out.write(b"\n")

        def append(row: Row) -> None:
            out.write(msgspec.json.encode(row) + b"\n")
            out.flush()
            os.fsync(out.fileno())

        yield append


def write_parquet(rows: list[Row], path: Path) -> None:
    """Write rows as one flat table: parameters, then name, name_low and name_high of each estimate."""
    import polars as pl  # noqa: PLC0415 - slow to import

    records = []
    for row in rows:
        record: dict[str, Any] = {"digest": row.digest, **msgspec.to_builtins(row.configuration)}
        record |= {"customers": row.customers, "replications": row.replications, "seed": row.seed}
        for name, value in msgspec.to_builtins(row.outcome).items():
            if isinstance(value, dict):
                record |= {name: value["mean"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            else:
                record[name] = value
        records.append(record)
    names = dict.fromkeys(name for record in records for name in record)
    table = pl.DataFrame([{name: record.get(name) for name in names} for record in records], infer_schema_length=None)
    temporary = path.with_suffix(".tmp")
    table.write_parquet(temporary)
    temporary.replace(path)
