"""`ledgerproof audit --live`: checks a running service while it works, and says within seconds what is wrong."""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
import time
from typing import Any, Final

import click

from ledgerproof.attach import service_config, service_options
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import print_json
from ledgerproof.progress import Progress, Step
from reference.config import ServiceConfig

DEFAULT_INTERVAL_S: Final = 1.0
REST_S: Final = 0.1
"""Between two looks at least, however long they take."""
LATE_POLLS: Final = 30
"""An audit whose last look ended this many intervals ago (or 30 s) is not alive."""
LAST_POLLS: Final = 5
"""Looks after the end was asked for: one whole round."""
SHOWN_MAX: Final = 10

EXIT_CODES: Final = """\b
Exit codes:
   0  nothing was found, and everything was seen
   2  usage: wrong arguments, no running stack
  20  an anomaly was found; the witnesses say which
  30  something could not be seen, so that nothing is said of it
"""


@click.command("audit", epilog=EXIT_CODES)
@click.option("--live", is_flag=True, help="Audit a service while it runs; stored runs are judged by `check`.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.2, 60.0),
    default=DEFAULT_INTERVAL_S,
    show_default=True,
    metavar="SECONDS",
    help="From one look to the next; drift is found within five to eight of them.",
)
@click.option(
    "--for",
    "duration_s",
    type=click.FloatRange(1.0, 30 * 86_400.0),
    default=None,
    metavar="SECONDS",
    help="End after this long; until Ctrl-C if left out.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65_535),
    default=None,
    help="Serve /metrics and /livez on this port of 127.0.0.1.",
)
@click.option(
    "--planted",
    "planted_user",
    type=click.IntRange(1),
    default=None,
    metavar="WALLET",
    help="The wallet whose balance in the read model is made wrong on purpose: its A11 is counted apart.",
)
@click.option("--until-input-ends", is_flag=True, help="End when standard input does: for programs that start it.")
@service_options
def audit_command(
    *,
    live: bool,
    interval_s: float,
    duration_s: float | None,
    metrics_port: int | None,
    planted_user: int | None,
    until_input_ends: bool,
    as_json: bool,
    **service: Any,
) -> int:
    """Check ledger, outbox, topics, projection and cache of a running service again and again, read-only.

    It looks at what is new since its last look, and in turn at what must not have changed.
    """
    if not live:
        raise click.UsageError("say --live; stored runs are judged by `ledgerproof check`")
    import uvloop  # noqa: PLC0415 - only where it is used: every command imports this module

    config = service_config(service["stack_name"], service["config_path"])
    progress = Progress()
    with progress.step("Auditing") as step:
        result = uvloop.run(_audit(config, interval_s, duration_s, metrics_port, planted_user, until_input_ends, step))
        step.detail = f"{sum(result['findings'].values())} findings in {result['polls']} looks"
    if as_json:
        print_json(result)
    else:
        _show(result)
    return int(result["exit_code"])


async def _audit(  # noqa: PLR0917 - one caller
    config: ServiceConfig,
    interval_s: float,
    duration_s: float | None,
    metrics_port: int | None,
    planted_user: int | None,
    until_input_ends: bool,
    step: Step,
) -> dict[str, Any]:
    """Look at everything once an interval until told to stop, and return what there is to say."""
    from ledgerproof.live.auditor import Auditor  # noqa: PLC0415 - slow to import
    from ledgerproof.live.others import Unseen  # noqa: PLC0415 - slow to import

    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    if until_input_ends:
        loop.add_reader(sys.stdin.fileno(), _input_ended, stopping)
    audit = Auditor(config)
    audit.findings.planted_user = planted_user
    began_s = time.monotonic()
    gc.set_threshold(100_000, 20, 100)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(audit.close)
        if metrics_port is not None:
            await _serve(stack, audit, metrics_port, interval_s)
        while not stopping.is_set():
            looked_s = time.monotonic()
            try:
                await audit.poll()
            except Unseen as error:
                step.show(f"waiting: {error}")
            else:
                step.show(_line(audit))
            left_s = looked_s + interval_s - time.monotonic()
            if duration_s is not None:
                left_s = min(left_s, began_s + duration_s - time.monotonic())
                if left_s <= 0 and time.monotonic() - began_s >= duration_s:
                    break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), max(left_s, REST_S))
        # What was written last is looked at as well, and what is looked through in stretches once more to its end.
        for _ in range(LAST_POLLS):
            with contextlib.suppress(Unseen):
                await audit.poll()
    return result_of(audit, time.monotonic() - began_s)


def _input_ended(stopping: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stopping.set()


async def _serve(stack: contextlib.AsyncExitStack, audit: Any, port: int, interval_s: float) -> None:
    """Serve metrics and liveness until the stack unwinds. Raises EnvironmentProblem if the port cannot be had."""
    from reference.service import serve, stop_serving  # noqa: PLC0415 - slow to import

    text = [("content-type", "text/plain; version=0.0.4; charset=utf-8")]
    late_s = max(30.0, LATE_POLLS * interval_s)
    started_s = time.time()

    async def answer(scope: Any, proto: Any) -> None:
        metrics = audit.findings.metrics
        if scope.path == "/metrics":
            proto.response_bytes(200, text, metrics.exposition())
        elif scope.path == "/livez":
            last_s = max(
                started_s, metrics.registry.get_sample_value("ledgerproof_audit_last_poll_timestamp_seconds") or 0
            )
            alive = time.time() - last_s < late_s
            proto.response_str(200 if alive else 503, text, "alive\n" if alive else f"no look for {late_s:.0f} s\n")
        else:
            proto.response_str(404, text, "try /livez or /metrics\n")

    try:
        server = await serve(answer, port)
    except OSError as error:
        raise EnvironmentProblem(f"port {port} cannot be served on: {error.strerror or error}") from error
    stack.push_async_callback(stop_serving, server)


def result_of(audit: Any, seconds: float) -> dict[str, Any]:
    """Return what there is to say at the end, and how much work it was."""
    findings = audit.findings
    if audit.polls < 2 or not all(server.started for server in audit.servers):
        findings.missed("not every store was read twice: nothing was compared over time")
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **findings.result(),
        "polls": audit.polls,
        "entries": audit.ledger.entries,
        "events": audit.flow.events,
        "records": audit.flow.records,
        "repeated_records": audit.flow.repeated,
        "balances": audit.told,
        "wallets": len(audit.ledger.wallets),
        "verified_entries": audit.verified,
        "verified_rounds": audit.rounds,
        "seconds": round(seconds, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "peak_memory_mb": round(used.ru_maxrss / 1024, 1),
    }


def _line(audit: Any) -> str:
    found = sum(audit.findings.counts.values())
    text = (
        f"{audit.ledger.entries} entries, {audit.flow.events} events, {audit.flow.records} records, "
        f"{audit.told} balances, {found} findings"
    )
    unseen = ", ".join(audit.findings.unseen)
    return f"{text}, cannot see {unseen}" if unseen else text


def _show(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['verdict']}: {result['entries']:,} entries, {result['events']:,} events, {result['records']:,} "
        f"records and {result['balances']:,} balances judged in {result['polls']} looks; "
        f"{result['verified_entries']:,} entries verified again"
    )
    for code, count in sorted(result["findings"].items()):
        click.echo(f"  {code}: {count}")
    for witness in result["witnesses"][:SHOWN_MAX]:
        click.echo(f"  {witness['code']}: {witness['text']}")
    for what, why in result["unseen"].items():
        click.echo(f"  cannot see {what}: {why}")
    for text in result["missed"]:
        click.echo(f"  missed: {text}")
    for text in result["notes"]:
        click.echo(f"  {text}")
