"""`ledgerproof reconcile` and `ledgerproof payouts`: what an operator asks of a running stack."""

import asyncio
import getpass
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from ledgerproof.attach import json_flag, running_stack, stack_option
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import print_json, print_table
from ledgerproof.progress import Progress
from reference.config import ServiceConfig
from reference.errors import LedgerError

if TYPE_CHECKING:
    from reference.reconciliation import Report

FINDINGS_EXIT: Final = 20
INCOMPLETE_EXIT: Final = 30
SHOWN_MAX: Final = 20
"""Findings that are printed; --json and `reconcile findings` have more."""

EXIT_CODES: Final = """\b
Exit codes:
   0  no findings, or the request was carried out
   2  usage: wrong arguments, no running stack, no such server
  20  there are findings: the ledger and another store disagree, payouts are paused
  30  incomplete: a server, Redis or Kafka could not be read, so that nothing is said of it
"""

_server_option = click.option("--server", default=None, help="Only this server, as pg0; all of them if left out.")
_limit_option = click.option(
    "--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="The newest so many of each server."
)


@click.group("reconcile", epilog=EXIT_CODES)
def reconcile_group() -> None:
    """Compare ledger, projection, Redis, outbox and topics of a running stack, and show what was found."""


@reconcile_group.command("run", epilog=EXIT_CODES)
@click.option(
    "--full/--incremental",
    "full",
    default=True,
    help="Look at everything (the default), or only at what is new since the last pass.",
)
@_server_option
@stack_option
@json_flag
def run_command(*, full: bool, server: str | None, stack_name: str | None, as_json: bool) -> int:
    """Run a pass now. Findings are stored, and pause the payouts of the servers concerned."""
    from reference.reconciliation import Kind, Pass  # noqa: PLC0415 - slow to import

    config = running_stack(stack_name).config
    _indexes(config, server)
    kind = Kind.FULL if full else Kind.INCREMENTAL
    with Progress().step(f"{kind.value} pass") as step:
        only = None if server is None else [server]
        report = asyncio.run(Pass(config, kind, _me(), only, step.show).run())
        assert report is not None, "a pass that waits for its turn gets it"
        step.detail = f"{report.findings} findings"
    if as_json:
        print_json({**msgspec.to_builtins(report), "findings": report.findings, "exit_code": exit_code_of(report)})
    else:
        _show_report(report)
    return exit_code_of(report)


def exit_code_of(report: "Report") -> int:
    """Return the exit code of a pass: findings outweigh what could not be seen."""
    return FINDINGS_EXIT if report.findings else INCOMPLETE_EXIT if report.problems else 0


@reconcile_group.command("status", epilog=EXIT_CODES)
@_limit_option
@_server_option
@stack_option
@json_flag
def status_command(*, limit: int, server: str | None, stack_name: str | None, as_json: bool) -> int:
    """Show the newest passes of every server. Exit code 20 while the payouts of one are paused."""
    from reference import operations  # noqa: PLC0415 - slow to import

    config = running_stack(stack_name).config
    shown: list[dict[str, Any]] = []
    for index in _indexes(config, server):
        gate = asyncio.run(operations.gate_of(config, index))
        runs = [] if gate.error else asyncio.run(operations.runs_of(config, index, limit))
        shown.append({"server": gate.server, "paused": gate.paused, "error": gate.error, "runs": runs})
    if as_json:
        print_json(shown)
    else:
        rows = [
            [
                item["server"],
                f"{run['started_at']:%Y-%m-%d %H:%M:%S}",
                run["kind"],
                run["state"],
                str(run["findings"]),
                str(run["entries"]),
                run["requested_by"],
            ]
            for item in shown
            for run in item["runs"]
        ]
        print_table("", ["server", "started (UTC)", "kind", "state", "findings", "entries", "by"], rows)
        for item in shown:
            if item["error"]:
                click.echo(f"{item['server']}: {item['error']}")
            elif item["paused"]:
                click.echo(f"{item['server']}: payouts are paused; `ledgerproof payouts status` says why")
    return _state_code([item["paused"] for item in shown])


@reconcile_group.command("findings", epilog=EXIT_CODES)
@click.option("--run", "run_id", default=None, help="Only those of the pass with this id.")
@_limit_option
@_server_option
@stack_option
@json_flag
def findings_command(
    *, run_id: str | None, limit: int, server: str | None, stack_name: str | None, as_json: bool
) -> int:
    """Show what passes found. Exit code 20 if there is anything."""
    from reference import operations  # noqa: PLC0415 - slow to import

    config = running_stack(stack_name).config
    shown: list[dict[str, Any]] = []
    for index in _indexes(config, server):
        try:
            rows = asyncio.run(operations.findings_of(config, index, run_id, limit))
        except LedgerError as error:
            raise EnvironmentProblem(f"{config.servers[index].name} cannot be asked: {error}") from error
        shown += [
            {"server": config.servers[index].name, **row, "means": meanings().get(row["code"], "")} for row in rows
        ]
    if as_json:
        print_json(shown)
    else:
        for row in shown:
            click.echo(f"{row['started_at']:%Y-%m-%d %H:%M:%S}  {_line(row)}")
        if not shown:
            click.echo("No findings.")
    return FINDINGS_EXIT if shown else 0


@click.group("payouts", epilog=EXIT_CODES)
def payouts_group() -> None:
    """Pause the payouts of a server, resume them, and see who did and why."""


@payouts_group.command("status", epilog=EXIT_CODES)
@_server_option
@stack_option
@json_flag
def payouts_status_command(*, server: str | None, stack_name: str | None, as_json: bool) -> int:
    """Show whether payouts are paused, since when, by whom and why. Exit code 20 if any are."""
    from reference import operations  # noqa: PLC0415 - slow to import

    config = running_stack(stack_name).config
    gates = [asyncio.run(operations.gate_of(config, index)) for index in _indexes(config, server)]
    if as_json:
        print_json(gates)
    else:
        for gate in gates:
            if gate.error:
                click.echo(f"{gate.server}: {gate.error}")
            else:
                state = "PAUSED" if gate.paused else "running"
                click.echo(f"{gate.server}: {state} since {gate.changed_at:%Y-%m-%d %H:%M:%S} UTC by {gate.changed_by}")
                click.echo(f"     {gate.reason}")
    return _state_code([gate.paused for gate in gates])


def _change_command(command: str, text: str) -> None:
    @payouts_group.command(command, help=text, epilog=EXIT_CODES)
    @click.option("--server", required=True, help="The server, as pg0.")
    @click.option("--reason", required=True, help="Why; it is kept with your name.")
    @stack_option
    @json_flag
    def change(*, server: str, reason: str, stack_name: str | None, as_json: bool) -> int:
        from reference import operations  # noqa: PLC0415 - slow to import

        if not reason.strip() or len(reason) > operations.REASON_MAX:
            raise click.UsageError(f"--reason must have 1 to {operations.REASON_MAX} characters")
        config = running_stack(stack_name).config
        (index,) = _indexes(config, server)
        action = operations.pause if command == "pause" else operations.resume
        try:
            changed = asyncio.run(action(config, index, _me(), reason.strip()))
        except LedgerError as error:
            raise EnvironmentProblem(f"{server} cannot be asked: {error}; is it up? (`ledgerproof status`)") from error
        state = "paused" if command == "pause" else "running"
        if as_json:
            print_json({"server": server, "paused": command == "pause", "changed": changed})
        else:
            click.echo(f"{server}: payouts are {state}" + ("" if changed else " (they were already)"))
        return 0


_change_command("pause", "Pause the payouts of a server; when it returns, none is under way any more.")
_change_command("resume", "Resume the payouts of a server; what waited is posted now, once.")


# -- shared --------------------------------------------------------------------------------------------


def _indexes(config: ServiceConfig, server: str | None) -> list[int]:
    names = [item.name for item in config.servers]
    if server is None:
        return list(range(len(names)))
    if server not in names:
        raise click.UsageError(f"there is no server {server}; there are {', '.join(names)}")
    return [names.index(server)]


def _state_code(paused: list[bool | None]) -> int:
    if any(paused):
        return FINDINGS_EXIT
    return INCOMPLETE_EXIT if None in paused else 0


def meanings() -> dict[str, str]:
    """Return what each code of a finding means."""
    from reference.reconciliation import CODES  # noqa: PLC0415 - slow to import

    return CODES


def _me() -> str:
    """Return who asks: the user of the terminal."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _show_report(report: "Report") -> None:
    rows = [
        [item.server, item.state, str(item.total), str(item.entries), str(item.events), str(item.records)]
        for item in report.servers
    ]
    print_table("", ["server", "state", "findings", "entries", "events", "records"], rows)
    for item in report.servers:
        for finding in item.findings[:SHOWN_MAX]:
            click.echo(f"  {_line(msgspec.to_builtins(finding))}")
        if item.total > SHOWN_MAX:
            click.echo(f"  … {item.total} in all: `ledgerproof reconcile findings --run {report.run_id}`")
        if item.paused:
            click.echo(
                f"  payouts of {item.server} are paused now: find the cause, repair it, then "
                f"`ledgerproof payouts resume --server {item.server} --reason …`"
            )
    for problem in report.problems:
        click.echo(f"  not seen: {problem}")


def _line(finding: dict[str, Any]) -> str:
    places = [
        ("wallet", finding.get("user_id")),
        ("seq", finding.get("seq")),
        ("match", finding.get("match_id")),
        ("event", finding.get("event_id")),
        ("topic", finding.get("topic")),
    ]
    where = ", ".join(f"{word} {value}" for word, value in places if value is not None)
    return (
        f"{finding['code']} on {finding['server']}: {meanings().get(finding['code'], '')} ({where}): "
        f"expected {finding['expected']}; found {finding['found']}"
    )
