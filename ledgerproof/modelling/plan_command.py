"""`ledgerproof sim plan`: how much of everything a number of users needs, what binds it, and what it costs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import check_writable, json_path_option, print_json, print_table
from ledgerproof.progress import Progress

if TYPE_CHECKING:
    from sim.plan_answer import Answer

EXIT_CODES: Final = """\b
Exit codes:
   0  the plan is printed
   2  usage: a file or an assumption is wrong (message says file, line and field)
  10  the plan is printed, but does not work as it is assumed (the problems are named)
"""
PROBLEMS_EXIT: Final = 10
MOVES_SHOWN: Final = 16
"""Rows of the sensitivity that are printed; --json has all."""
QUIET_SAMPLES: Final = 20_000
"""So many draws take about two seconds: fewer need no progress."""
NEEDS: Final = (
    ("API pods", "api_pods", "", ("API pods",)),
    ("projectors", "projectors", "", ()),
    ("matchers", "matchers", "", ()),
    ("settlers", "settlers", "", ()),
    ("reconcilers", "reconcilers", "", ()),
    ("relays", "relays", "", ()),
    ("groups of pods and servers", "cells", "", ()),
    ("database servers (primaries)", "servers", "", ("database servers",)),
    ("database servers with standbys", "database_servers", "", ()),
    ("connections of a server", "connections_per_server", "", ()),
    ("partitions", "partitions", "", ("partitions",)),
    ("brokers", "brokers", "", ("brokers",)),
    ("Redis nodes", "redis_nodes", "", ("Redis nodes",)),
    ("database, one copy", "database_gb", "GB", ("database, one copy",)),
    ("database, all copies", "database_copies_gb", "GB", ()),
    ("Kafka, all copies", "kafka_copies_gb", "GB", ("Kafka storage",)),
    ("WAL archive", "wal_archive_gb", "GB", ()),
    ("backups", "backup_gb", "GB", ()),
    ("Redis", "redis_gb", "GB", ("Redis size",)),
    ("between zones, a month", "zone_gb_month", "GB", ()),
    ("cores", "cores", "", ()),
    ("memory", "memory_gb", "GB", ()),
    ("cost of a month", "cost", "USD", ("cost of a month",)),
)
"""Rows of the table: words, name in the figures, unit, and the seed's figure beside it."""


@click.command("plan", epilog=EXIT_CODES)
@click.option("--users", type=float, default=None, metavar="NUMBER", help="Short for --set users=NUMBER, as in 1e6.")
@click.option(
    "--file",
    "plan_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Plan with its assumptions (TOML); the seed's plan for a million users if left out.",
)
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change an assumption; may be given several times."
)
@click.option(
    "--prices", "prices_path", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Prices (TOML)."
)
@click.option(
    "--demands",
    "demands_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="What one unit of work costs, as `sim demands` writes it (TOML).",
)
@click.option(
    "--samples", type=int, default=2_000, show_default=True, help="Draws of demands and prices for the intervals."
)
@click.option("--seed", type=click.IntRange(0, 2**53), default=1, show_default=True, help="Seed of the draws.")
@click.option(
    "--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Write the page too."
)
@json_path_option("Write the answer as JSON to PATH; without a PATH, to standard output instead of the tables.")
def plan_command(
    *,
    users: float | None,
    plan_path: Path | None,
    changes: tuple[str, ...],
    prices_path: Path | None,
    demands_path: Path | None,
    samples: int,
    seed: int,
    html_path: Path | None,
    json_path: str | None,
) -> int:
    """Calculate pods, consumers, servers, brokers, storage and cost for a number of users; starts nothing.

    From measured demands, stated assumptions and prices, with intervals, what binds each component, the figures of
    the seed's capacity table beside ours, the three levels of its comparison, and how each assumption moves the
    result. Prices are assumptions: put yours into a file of your own.
    """
    from sim.demands import DEMANDS, read_demands  # noqa: PLC0415 - loads numpy
    from sim.plan import PLANS, PRICES, read_plan, read_prices  # noqa: PLC0415 - with the rest
    from sim.plan_answer import Missing, answer  # noqa: PLC0415 - with the rest
    from sim.tables import TableError  # noqa: PLC0415 - with the rest

    for path in (Path(json_path) if json_path not in (None, "-") else None, html_path):
        if path is not None:
            check_writable(path)
    if users is not None:
        changes = (f"users={users!r}", *changes)
    try:
        plan = read_plan(plan_path or PLANS / "million.toml", changes)
        demands = read_demands(demands_path or DEMANDS)
        prices = read_prices(prices_path or PRICES)
        with Progress(quiet=samples <= QUIET_SAMPLES).step("Drawing demands and prices"):
            found = answer(plan, demands, prices, samples=samples, seed=seed)
    except (TableError, Missing, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if html_path is not None:
        from reports.plan_page import render_plan  # noqa: PLC0415 - loads matplotlib

        try:
            with Progress().step("Drawing the page"):
                render_plan(as_json(found), html_path)
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {html_path}: {error.strerror}") from error
    if json_path == "-":
        print_json(as_json(found))
    else:
        if json_path is not None:
            Path(json_path).write_bytes(msgspec.json.format(msgspec.json.encode(as_json(found)), indent=2) + b"\n")
        _print(found)
        if html_path is not None:
            click.echo(f"page: {html_path}")
    return PROBLEMS_EXIT if found.figures.problems else 0


def needs(found: "Answer") -> list[dict[str, Any]]:
    """Return the rows of the table of needs: what, value, interval, unit, what binds, the seed's figure and verdict."""
    rows = []
    judged = {each.figure.what: each for each in found.verdicts}
    for words, name, unit, seeds in NEEDS:
        low, high = found.intervals[name]
        verdict = judged.get(seeds[0]) if seeds else None
        rows.append(
            {
                "what": words,
                "name": name,
                "value": found.figures.numbers[name],
                "low": low,
                "high": high,
                "unit": unit,
                "binding": found.figures.binding.get(name, ""),
                "seed": verdict.figure.says if verdict else "",
                "verdict": verdict.verdict if verdict else "",
            }
        )
    return rows


def as_json(found: "Answer") -> dict[str, Any]:
    """Return the whole answer as JSON holds it."""
    made: dict[str, Any] = msgspec.to_builtins(found)
    for item, move in zip(made["moves"], found.moves, strict=True):
        item["swing"] = move.swing
    return {**made, "needs": needs(found), "assumptions": assumptions(found)}


def assumptions(found: "Answer") -> list[dict[str, Any]]:
    """Return each assumption with its value and source."""
    return [
        {"name": name, "value": getattr(found.plan.assume, name), "source": found.plan.source[name]}
        for name in found.plan.assume.__struct_fields__
    ]


def _print(found: "Answer") -> None:
    numbers = found.figures.numbers
    title = (
        f"{found.plan.name}: {found.plan.assume.users:,} users, {numbers['requests_per_s']:,.0f} requests/s, "
        f"{numbers['bets_per_s']:,.0f} bets/s, {numbers['events_per_s']:,.0f} events/s at the planned moment"
    )
    rows = [
        [
            str(row["what"]),
            _number(row["value"]),
            f"{_number(row['low'])} … {_number(row['high'])}",
            str(row["unit"]),
            str(row["binding"]),
            str(row["seed"]),
            str(row["verdict"]),
        ]
        for row in needs(found)
    ]
    print_table(title, ["", "needed", "90 % interval", "", "bound by", "seed says", "which is"], rows)
    _print_headroom(found)
    _print_costs(found)
    rows = [
        [each.figure.what, each.figure.says, _number(each.value), f"{_number(each.low)} … {_number(each.high)}",
         each.figure.unit, each.verdict, each.figure.why]
        for each in found.verdicts
    ]  # fmt: skip
    print_table("\nthe seed's figures", ["", "seed says", "ours", "90 % interval", "", "the seed's is", "note"], rows)
    _print_levels(found)
    rows = [
        [move.name, move.kind, f"{move.at[0]:,.4g} / {move.at[1]:,.4g}", f"{_number(move.cost[0])} / "
         f"{_number(move.cost[1])}", f"{move.pods[0]:.0f} / {move.pods[1]:.0f}",
         "-" if move.elasticity is None else f"{move.elasticity:+.2f}"]
        for move in found.moves[:MOVES_SHOWN]
    ]  # fmt: skip
    print_table(
        "\nwhat moves the result most: assumptions 20 % lower and higher, demands and prices at their bounds",
        ["", "", "at", "cost, USD", "API pods", "elasticity"],
        rows,
    )
    rows = [[row["name"], f"{row['value']:,}", row["source"]] for row in assumptions(found)]
    print_table("\nassumptions (change one with --set NAME=VALUE)", ["", "value", "source"], rows)
    demands, prices = found.demands, found.prices
    click.echo(f"\ndemands: {demands.command}, commit {demands.commit}, {demands.machine}, {demands.measured_at}")
    click.echo(f"prices: version {prices.version} of {prices.date}, {prices.currency}; assumptions, edit them")
    click.echo(f"intervals: {found.samples:,} draws, seed {found.seed}")
    for note in found.notes:
        click.echo(f"note: {note}")
    for refusal in demands.refusal:
        click.echo(f"refused: {refusal.what}: {refusal.reason}")
    for problem in found.figures.problems:
        click.echo(f"PROBLEM: {problem}")


def _print_headroom(found: "Answer") -> None:
    numbers = found.figures.numbers
    if found.plan.assume.zones == 1:
        click.echo("one zone: when it is lost, all is lost")
        return
    said = ", ".join(
        f"{words} {numbers[name]:.0%}"
        for words, name in (
            ("API", "api_use_zone_lost"),
            ("busiest consumers", "consumer_use_zone_lost"),
            ("brokers", "kafka_use_zone_lost"),
        )
    )
    click.echo(f"with one of {found.plan.assume.zones} zones lost the rest is used to: {said}")


def _print_costs(found: "Answer") -> None:
    from sim.plan import COST_PARTS  # noqa: PLC0415 - with the rest

    numbers = found.figures.numbers
    parts = ", ".join(f"{part} {numbers[f'{part}_cost']:,.0f}" for part in COST_PARTS)
    click.echo(f"of the cost: {parts}")


def _print_levels(found: "Answer") -> None:
    counts = list(found.levels[0].costs)
    rows = [
        [level.name, level.pattern, f"{level.users_max:,.0f}", level.binding, level.seed_users,
         *("-" if (cost := level.costs[count]) is None else _number(cost) for count in counts), level.seed_cost]
        for level in found.levels
    ]  # fmt: skip
    columns = ["", "", "holds to, users", "then", "seed says", *(f"{count:,}" for count in counts), "seed says"]
    print_table("\nlevels: users that the capacity suffices for, and USD a month at a number of users", columns, rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:,.3g}"
