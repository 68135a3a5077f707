"""`ledgerproof sim scaling` and `ledgerproof sim failures`: autoscaling policies and failures, simulated."""

from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import click

from ledgerproof.attach import json_flag
from ledgerproof.output import print_json, print_table
from ledgerproof.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from sim.failures import Failures, Found
    from sim.scaling import Candidate, Comparison, Line
    from sim.scaling_world import World
    from sim.statistics import Estimate

Struct = TypeVar("Struct")

ASSUMED: Final = (
    "Start times, pauses and link are assumptions with their sources in the file: change one with --set and see."
)
BROKEN_EXIT: Final = 10
SEEDS_SCENARIOS: Final = ("API crash", "worker crash", "single DB crash", "region down", "data corruption")
EXIT_CODES: Final = """\b
Exit codes: 0 simulated, 2 the file or an option cannot be used.
"""
FAILURE_EXIT_CODES: Final = """\b
Exit codes: 0 every promise of the seed's five failures holds in 99 of 100 replications, 10 one does not,
2 the file or an option cannot be used.
"""

_set_option: Final = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change one value, e.g. pods.scrape_s=30; repeatable.",
)


def _file_option(name: str) -> "Callable[[Callable[..., int]], Callable[..., int]]":
    return click.option(
        "--file",
        "file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        default=None,
        help=f"File with the parameters; sim/{name} if left out.",
    )


def _read(path: Path, kind: type[Struct], changes: "Sequence[str]") -> Struct:
    """Read a file and apply --set. Raises UsageError that says line and field."""
    from sim.tables import TableError, override, read_toml  # noqa: PLC0415 - slow to import

    try:
        value = read_toml(path, kind)
        for change in changes:
            value = override(value, change)
    except TableError as error:
        raise click.UsageError(str(error)) from error
    return value


@click.command("scaling", epilog=EXIT_CODES)
@_file_option("scaling.toml")
@_set_option
@click.option(
    "--policy", "policies", multiple=True, metavar="NAME", help="Only this policy (seed, keda, hpa, best); repeatable."
)
@click.option("--shape", "shapes", multiple=True, metavar="NAME", help="Only this load; repeatable.")
@click.option("--role", "role", type=click.Choice(["consumers", "api"]), default=None, help="Only this part.")
@click.option("--search", "searching", is_flag=True, help="Search the grid of the file for a better policy `best`.")
@json_flag
def scaling_command(
    *,
    file: Path | None,
    changes: tuple[str, ...],
    policies: tuple[str, ...],
    shapes: tuple[str, ...],
    role: str | None,
    searching: bool,
    as_json: bool,
) -> int:
    """Simulate scaling policies under betting loads: lag, stability and cost; starts nothing.

    A consumer group and the API's pods meet each load under each policy: the seed's (lag above 1 M adds 5, below
    100 k removes 1, at most 50; HPA on 70 % CPU and 80 % memory), KEDA's and Kubernetes' defaults, and the best found.
    """
    from sim.scaling import ROLES, compare, policies_of, search  # noqa: PLC0415 - slow to import
    from sim.scaling_world import SCALING_TOML, World  # noqa: PLC0415 - slow to import

    world = _read(file or SCALING_TOML, World, changes)
    roles = [each for each in ROLES if role in {None, each}]
    _known("--shape", shapes, world.shapes)
    _known("--policy", policies, {name for each in roles for name in policies_of(world, each)})
    progress = Progress(quiet=as_json)
    try:
        if searching:
            with progress.step("searching") as step:
                found = [candidate for each in roles for candidate in search(world, each, tell=step.show)]
            _tell_search(found, as_json=as_json)
            return 0
        with progress.step("simulating") as step:
            comparison = compare(world, roles=roles, policies=policies or None, shapes=shapes or None, tell=step.show)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        print_json({"comparison": comparison, "world": world, "notes": [ASSUMED]})
    else:
        _tell(comparison, world)
    return 0


def _known(option: str, given: "Sequence[str]", known: "Collection[str]") -> None:
    for name in given:
        if name not in known:
            raise click.UsageError(f"{option}: there is no {name!r}; there are {', '.join(sorted(known))}")


def _tell(comparison: "Comparison", world: "World") -> None:
    target, alert = world.consumers.target_lag, world.consumers.alert_lag
    shown = {
        "consumers": (
            f"consumers: s beyond the target of {target:,.0f} and the alert of {alert:,.0f} events of lag",
            "peak lag",
        ),
        "api": (
            f"API: s in which a request waits more than {world.api.target_wait_s:g} s, and in which some are refused",
            "longest wait, s",
        ),
    }
    for role, (title, peak) in shown.items():
        lines = [line for line in comparison.lines if line.role == role]
        if lines:
            columns = [
                "load",
                "policy",
                "target, s",
                "alert, s",
                peak,
                "recovery, s",
                "turns/h",
                "swing",
                "pod-h",
                "score",
                "rests",
            ]
            print_table(title, columns, [_line(line) for line in lines])
            click.echo()
    for gap in comparison.differences:
        if gap.policy == "best":
            better = "better" if gap.score.high < 0 else "worse" if gap.score.low > 0 else "not decided"
            click.echo(f"best minus seed, {gap.role}, {gap.shape}: score {_estimate(gap.score)}: {better}")
    click.echo(f"{world.replications} replications, 95 % intervals, seed {world.seed}. {ASSUMED}")


def _line(line: "Line") -> list[str]:
    recovery = "-" if line.recovery_s is None else _estimate(line.recovery_s)
    rests = "-" if line.settles is None else "yes" if line.settles else "NO"
    late = f" ({line.unrecovered} never)" if line.unrecovered else ""
    return [
        line.shape,
        line.policy,
        _estimate(line.beyond_target_s),
        _estimate(line.beyond_alert_s),
        _estimate(line.peak),
        f"{recovery}{late}",
        f"{line.reversals_per_h.mean:.1f}",
        f"{line.amplitude.mean:.1f}",
        f"{line.pod_hours.mean:,.1f}",
        _estimate(line.score),
        rests,
    ]


def _estimate(value: "Estimate") -> str:
    half = (value.high - value.low) / 2
    if abs(value.mean) >= 1e5:
        return f"{value.mean / 1e6:.2f} M ± {half / 1e6:.2f} M"
    digits = 0 if abs(value.mean) >= 100 else 1
    return f"{value.mean:,.{digits}f} ± {half:,.{digits}f}"


def _tell_search(found: "list[Candidate]", *, as_json: bool) -> None:
    if as_json:
        print_json({"candidates": found, "notes": [ASSUMED]})
        return
    rows = [
        [
            candidate.role,
            ", ".join(f"{name} {value:g}" for name, value in candidate.settings.items()),
            _estimate(candidate.score),
            str(candidate.replications),
        ]
        for candidate in found
    ]
    print_table("the best of the grid, all loads together", ["part", "settings", "score, pod-h", "replications"], rows)


@click.command("failures", epilog=FAILURE_EXIT_CODES)
@_file_option("failures.toml")
@_set_option
@json_flag
def failures_command(*, file: Path | None, changes: tuple[str, ...], as_json: bool) -> int:
    """Simulate how long the seed's five failures last and what they lose, against its promises; starts nothing.

    Each failure is a row of steps (noticed, restarted, promoted, drained …) that are drawn anew in each replication.
    Also the lag of an asynchronous copy in another region: log bytes against the link.
    """
    from sim.failures import FAILURES_TOML, Failures, simulate  # noqa: PLC0415 - slow to import

    failures = _read(file or FAILURES_TOML, Failures, changes)
    progress = Progress(quiet=True)
    try:
        with progress.step("simulating") as step:
            found = simulate(failures, step.show)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        print_json({"found": found, "failures": failures, "notes": [ASSUMED]})
    else:
        _tell_failures(found, failures)
    kept = all(recovery.holds for recovery in found.recoveries if recovery.name in SEEDS_SCENARIOS)
    return 0 if kept else BROKEN_EXIT


def _tell_failures(found: "Found", failures: "Failures") -> None:
    rows = []
    for recovery in found.recoveries:
        share = recovery.steps[recovery.dominates] / recovery.mean_s
        rows.append(
            [
                recovery.name,
                f"{recovery.promise_s:,.0f}",
                *(f"{value:,.0f}" for value in recovery.rto_s.values()),
                f"{100 * recovery.kept_share:.1f} %",
                "yes" if recovery.holds else "NO",
                f"{recovery.dominates} {100 * share:.0f} %",
                f"{recovery.rpo_s['p50']:.1f} / {recovery.rpo_s['p99']:.1f}",
            ]
        )
    columns = ["failure", "promised, s", "p50, s", "p95, s", "p99, s", "kept", "holds", "mostly", "lost p50 / p99, s"]
    print_table(f"{failures.replications:,} replications, seed {failures.seed}", columns, rows)
    lag = found.lag
    told = ", ".join(f"{name} {value:,.2f}" for name, value in lag.lag_s.items())
    click.echo(
        f"\ncopy in the other region: {lag.wal_mb_per_s:.1f} MB/s of log on {lag.link_mb_per_s:.1f} MB/s "
        f"({100 * lag.utilisation:.0f} %); lag in s: {told}; "
        f"{100 * lag.within_promise:.2f} % of the time below {failures.lag.promise_rpo_s:,.0f} s"
    )
    click.echo(ASSUMED)
