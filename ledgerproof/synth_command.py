"""`ledgerproof synth` and `bench-judge`: runs of any size without a service, and what judging them costs."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from ledgerproof.attach import json_flag
from ledgerproof.judge_cost import Cost, growth
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import check_writable, json_path_option, print_json, print_table
from ledgerproof.progress import Progress

VIOLATED_EXIT: Final = 20
INVALID_EXIT: Final = 30
MIXES: Final = ("site", "prove")
SIZES: Final = (100_000, 1_000_000, 10_000_000)
TIMEOUT_S: Final = 3 * 3600.0
"""A generator or a judge that takes longer than this is ended."""


class _Rows(click.ParamType[int]):
    """A number of rows, also as 1e6 or 12e6."""

    name = "ROWS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of rows.", param, ctx)
        if not number.is_integer():
            self.fail(f"{value!r} is not a whole number of rows.", param, ctx)
        return int(number)


_mix_option = click.option(
    "--mix",
    type=click.Choice(MIXES),
    default="site",
    show_default=True,
    help="site: three reads for a bet. prove: about what `prove` sends, more bets than reads.",
)
_seed_option = click.option("--seed", type=click.IntRange(0, 2**53), default=1, show_default=True)


@click.command("synth")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rows", type=_Rows(), default="1e6", show_default=True, help="History records: two for an attempt.")
@_mix_option
@_seed_option
@click.option("--plant", metavar="CODE", default=None, help="Plant one violation of this code (A01, A02, …).")
@json_flag
def synth_command(*, folder: Path, rows: int, mix: str, seed: int, plant: str | None, as_json: bool) -> int:
    """Write a synthetic run to FOLDER, which must not be there: honest, complete, and judged PASS by `check`.

    Nothing is started: bets, fills, settlements and everything else are made up, consistently, by a program that
    shares no rule with the service or the checks. The same arguments make the same run.
    """
    from ledgerproof.synth.run import write_run  # noqa: PLC0415 - slow to import
    from ledgerproof.synth.shape import Shape  # noqa: PLC0415

    if folder.exists():
        raise click.UsageError(f"{folder} is there already: name a folder that is not")
    try:
        with Progress().step(f"Writing {rows:,} history rows to {folder}") as step:
            written = write_run(Shape(rows, seed, mix, plant), folder, step.show)
            step.detail = f"{sum(written.sizes.values()):,} rows in all"
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        print_json({"folder": str(folder), "rows": written.sizes, "planted": written.planted})
        return 0
    print_table("", ["table", "rows"], [[name, f"{count:,}"] for name, count in written.sizes.items()])
    if written.planted is not None:
        click.echo(f"planted: {written.planted.code} in the wallet of user {written.planted.user}")
    return 0


@click.command("bench-judge")
@click.option(
    "--rows", "sizes", type=_Rows(), multiple=True, help="Size to judge (repeat it); 1e5, 1e6 and 1e7 if left out."
)
@click.option(
    "--run",
    "runs",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Judge this run folder instead of a new one (repeat it).",
)
@_mix_option
@_seed_option
@click.option("--slices", type=click.IntRange(1, 10_000), default=None, help="Cut each run into so many slices.")
@json_path_option("Write the result as JSON to PATH; without a PATH, to standard output instead of the table.")
def bench_judge_command(
    *,
    sizes: tuple[int, ...],
    runs: tuple[Path, ...],
    mix: str,
    seed: int,
    slices: int | None,
    json_path: str | None,
) -> int:
    """Measure time and memory of the column judge over synthetic runs of several sizes.

    Each run is written, judged in a process of its own, and removed. A run that is not judged PASS ends the command
    with 20 (a violation was found where none is) or 30.
    """
    if json_path not in {None, "-"}:
        check_writable(Path(str(json_path)))
    progress = Progress()
    costs: list[Cost] = []
    for folder in runs:
        costs.append(_judged(folder, slices, progress))
    for rows in sorted(sizes or (() if runs else SIZES)):
        with tempfile.TemporaryDirectory(prefix="ledgerproof-synth-") as place:
            folder = Path(place) / "run"
            with progress.step(f"Writing {rows:,} history rows"):
                _child(["-m", "ledgerproof", "synth", str(folder), f"--rows={rows}", f"--mix={mix}", f"--seed={seed}"])
            costs.append(_judged(folder, slices, progress))
    order = [cost.rows for cost in costs]
    result = {
        "mix": mix,
        "sizes": msgspec.to_builtins(costs),
        "growth_seconds": growth(order, [cost.seconds for cost in costs]),
        "growth_cpu": growth(order, [cost.cpu_s for cost in costs]),
        "growth_peak": growth(order, [cost.peak_mb for cost in costs]),
    }
    if json_path == "-":
        print_json(result)
    else:
        if json_path is not None:
            Path(json_path).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
        _print(costs, result)
    if any(cost.verdict == "INVARIANT_VIOLATED" for cost in costs):
        return VIOLATED_EXIT
    return 0 if all(cost.verdict == "PASS" for cost in costs) else INVALID_EXIT


def _judged(folder: Path, slices: int | None, progress: Progress) -> Cost:
    with progress.step(f"Judging {folder}") as step:
        answer = _child(["-m", "ledgerproof.judge_cost", str(folder), *([] if slices is None else [str(slices)])])
        cost = msgspec.json.decode(answer, type=Cost)
        step.detail = f"{cost.rows:,} rows, {cost.verdict}"
    return cost


def _child(arguments: list[str]) -> bytes:
    """Run Python on these arguments and return what it printed. Raises EnvironmentProblem if it fails."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"{' '.join(arguments)} took longer than {TIMEOUT_S:.0f} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"exit code {done.returncode}"
        raise EnvironmentProblem(f"{' '.join(arguments)} failed: {why}")
    return done.stdout


def _print(costs: list[Cost], result: dict[str, Any]) -> None:
    print_table(
        "",
        ["rows", "seconds", "CPU s", "peak MB", "verdict"],
        [
            [f"{cost.rows:,}", f"{cost.seconds:.1f}", f"{cost.cpu_s:.1f}", f"{cost.peak_mb:,.0f}", cost.verdict]
            for cost in costs
        ],
    )
    largest = max(costs, key=lambda cost: cost.rows)
    dearest = sorted(largest.seconds_of.items(), key=lambda item: -item[1])[:12]
    print_table(
        f"\nOf {largest.rows:,} rows (steps of two workers overlap)",
        ["step or check", "seconds"],
        [[name, f"{value:.1f}"] for name, value in dearest],
    )
    for name, what in (("growth_seconds", "time"), ("growth_cpu", "CPU"), ("growth_peak", "memory")):
        if result[name] is not None:
            click.echo(f"{what} grows as rows^{result[name]:.2f}")
