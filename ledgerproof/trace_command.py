"""`ledgerproof trace`: what became of one request, from the API through Postgres and Kafka to the payout."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from compose.service import TRACES_FOLDER
from ledgerproof.attach import json_flag, running_stack, stack_option
from ledgerproof.options import RUNS_FOLDER, EnvironmentProblem
from ledgerproof.output import print_json, print_table

if TYPE_CHECKING:
    from ledgerproof.traces import Trace

BAR_WIDTH: Final = 48
EXIT_CODES: Final = """\b
Exit codes:
   0  done
   2  usage: wrong arguments, no stack, no such trace (message says which there are)
"""


@click.command("trace", epilog=EXIT_CODES)
@click.argument("trace_id", required=False)
@stack_option
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    default=None,
    help="A run of `prove` instead of a stack.",
)
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Traces listed.")
@json_flag
def trace_command(*, trace_id: str | None, stack_name: str | None, run: Path | None, limit: int, as_json: bool) -> int:
    """Show the spans of TRACE_ID as a waterfall; without it list the newest traces.

    One request in a hundred is traced (`trace_sample` of the service's configuration), and every request whose
    `traceparent` header asks for it. A trace grows while its bet is matched, settled and paid.
    """
    traces = _traces(stack_name, run)
    if trace_id is None:
        return _list(traces[:limit], len(traces), as_json=as_json)
    found = [trace for trace in traces if trace.trace_id.startswith(trace_id.lower())]
    if len(found) != 1:
        many = f"{len(found)} of {len(traces)} traces begin" if found else f"none of {len(traces)} traces begins"
        raise EnvironmentProblem(f"{many} with {trace_id!r}: `ledgerproof trace` lists them")
    if as_json:
        print_json(msgspec.to_builtins(found[0]))
        return 0
    _show(found[0])
    return 0


def _traces(stack_name: str | None, run: Path | None) -> "list[Trace]":
    from ledgerproof.traces import read_traces  # noqa: PLC0415 - slow to import

    if run is not None:
        places = [place for place in (run, RUNS_FOLDER / run) if place.is_dir()]
        if not places:
            raise EnvironmentProblem(f"{run} is not a run folder: no such directory")
        folder = places[0] / TRACES_FOLDER
    else:
        named = running_stack(stack_name).config.trace_folder
        if named is None:
            raise EnvironmentProblem("this service sends its traces elsewhere: it has no trace_folder")
        folder = Path(named)
    return read_traces(folder)


def _list(traces: "list[Trace]", count: int, *, as_json: bool) -> int:
    if as_json:
        print_json(
            [
                {
                    "trace_id": trace.trace_id,
                    "name": trace.root.name,
                    "started_us": trace.root.started_us,
                    "took_us": trace.took_us,
                    "spans": len(trace.spans),
                    "processes": trace.processes,
                    "failed": any(span.failed for span in trace.spans),
                }
                for trace in traces
            ]
        )
        return 0
    rows = [
        [
            trace.trace_id,
            trace.root.name,
            f"{trace.took_us / 1000:,.1f} ms",
            str(len(trace.spans)),
            " → ".join(trace.processes),
            "failed" if any(span.failed for span in trace.spans) else "",
        ]
        for trace in traces
    ]
    title = f"{len(traces)} of {count} traces, newest first"
    print_table(title, ["trace", "request", "took", "spans", "went through", ""], rows)
    return 0


def _show(trace: "Trace") -> None:
    whole_us = max(1, trace.took_us)
    rows = []
    for span in trace.spans:
        before_us = span.started_us - trace.root.started_us
        left = min(BAR_WIDTH - 1, before_us * BAR_WIDTH // whole_us)
        width = max(1, min(BAR_WIDTH - left, (span.ended_us - span.started_us) * BAR_WIDTH // whole_us))
        rows.append(
            [
                span.process,
                "  " * trace.depth_of(span) + span.name + (" (failed)" if span.failed else ""),
                f"{before_us / 1000:,.1f}",
                f"{(span.ended_us - span.started_us) / 1000:,.1f}",
                " " * left + "█" * width,
            ]
        )
    print_table(
        f"trace {trace.trace_id}: {trace.took_us / 1000:,.1f} ms",
        ["process", "span", "after ms", "took ms", "│" + "─" * (BAR_WIDTH - 2) + "│"],
        rows,
    )
