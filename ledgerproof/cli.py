"""The command line: every command answers people on a terminal and programs with --json, and never with a traceback.

Results go to standard output, progress and errors to standard error. What takes long to import (data frames,
plots) is imported by the commands that need it, so that --help and --version answer at once.
"""

import contextlib
import logging
import math
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec
from rich.console import Console

from compose.errors import StackError, StackNotFound
from compose.nodes import NodeStatus
from compose.stack import DEFAULT_ROOT, DownReport, Stack, down_all, find_stacks
from compose.state import StackSpec, StackState, stacks_folder
from ledgerproof import __version__
from ledgerproof.attach import json_flag, running_stack, stack_option
from ledgerproof.bench.command import bench_command
from ledgerproof.campaign_command import campaign_command
from ledgerproof.cells_command import cells_command
from ledgerproof.checklist.command import checklist_command
from ledgerproof.events_commands import dlq_group, events_group, projection_group
from ledgerproof.explain_command import explain_command, sometimes_command
from ledgerproof.failpoints_command import failpoints_group
from ledgerproof.judge_command import judge_command
from ledgerproof.live.command import audit_command
from ledgerproof.loading.command import load_group
from ledgerproof.modelling.command import sim_group
from ledgerproof.mutants.command import mutants_command
from ledgerproof.notebooks_command import notebooks_group
from ledgerproof.operate_command import payouts_group, reconcile_group
from ledgerproof.options import (
    MAX_BETS,
    MIN_FAULTY_DURATION_S,
    EnvironmentProblem,
    NotARun,
    Options,
    run_folder,
)
from ledgerproof.output import check_writable, json_path_option, out_option, print_json, print_table
from ledgerproof.plan_command import replay_plan_command
from ledgerproof.progress import Progress, print_error
from ledgerproof.shards_command import shards_command
from ledgerproof.sla_command import sla_command
from ledgerproof.synth_command import bench_judge_command, synth_command
from ledgerproof.trace_command import trace_command
from reference.auth import Scope
from reference.commands import MAX_USER_ID

USAGE_EXIT: Final = 2
INVALID_EXIT: Final = 30
ABORTED_EXIT: Final = 40
RESIDUE_EXIT: Final = 50
COLOURS: Final = {"PASS": "green", "SLA_MISSED": "yellow"}
MAX_RATE: Final = 100_000.0
MAX_DURATION_S: Final = 86_400.0
MAX_SERVERS: Final = 16
TOKEN_TTL_MAX_S: Final = 30 * 86_400
REPORT_FILE: Final = "report.html"
DEFAULTS: Final = Options(seed=0)

EXIT_CODES: Final = """\b
Exit codes:
   0  PASS                every check is clean and every service level is met
   2  usage               wrong arguments, or the machine cannot run it (message says why)
  10  SLA_MISSED          the ledger is right, but a service level was missed
  20  INVARIANT_VIOLATED  the ledger is wrong; verdict.json and the report hold witnesses
  30  INVALID             nothing is proved: saturated, not drained, a gap in the evidence, …
  40  ABORTED             stopped after it had begun (Ctrl-C, disk full)
  50  RESIDUE             everything else is fine, but something was left behind
"""

_servers_option = click.option(
    "--servers",
    type=click.IntRange(1, MAX_SERVERS),
    default=DEFAULTS.servers,
    show_default=True,
    help="Postgres servers.",
)
_base_port_option = click.option(
    "--base-port",
    type=click.IntRange(1024, 65_000),
    default=None,
    help="First of the stack's ports; free ones if left out.",
)


class _Finite(click.FloatRange):
    """A range of floats that refuses nan and infinity, which compare as if they were inside."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number of this range.", param, ctx)
        return number


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EXIT_CODES)
@click.version_option(__version__, "--version", prog_name="ledgerproof")
def cli() -> None:
    """Prove a sharded betting ledger: run it for real, break it under load, and check every entry."""


@cli.command("prove", epilog=EXIT_CODES)
@click.option(
    "--duration",
    "duration_s",
    type=_Finite(1.0, MAX_DURATION_S),
    default=DEFAULTS.duration_s,
    show_default=True,
    metavar="SECONDS",
    help=f"Length of the load; the standard faults need {MIN_FAULTY_DURATION_S:g} s.",
)
@click.option(
    "--rate",
    type=_Finite(0.1, MAX_RATE),
    default=DEFAULTS.rate,
    show_default=True,
    metavar="BETS/S",
    help="Bets per second that arrive, whether the service keeps up or not.",
)
@_servers_option
@click.option(
    "--seed",
    type=click.IntRange(0, 2**53),
    default=None,
    help="Draws the workload and the faults; random if left out, and printed.",
)
@click.option(
    "--faults",
    type=click.Choice(["standard", "none"]),
    default=DEFAULTS.faults,
    show_default=True,
    help="standard: kill a server, kill a worker, pause Redis.",
)
@out_option
@json_path_option("Also write verdict.json to PATH; without a PATH, to standard output instead of the summary.")
@_base_port_option
@click.option("--keep", is_flag=True, help="Leave the stack running for a look; `ledgerproof down` ends it.")
@click.option(
    "--audit/--no-audit",
    default=DEFAULTS.audit,
    show_default=True,
    help="Run the live auditor beside the load; what it finds counts.",
)
@click.option(
    "--predict/--no-predict",
    default=DEFAULTS.predict,
    show_default=True,
    help="Forecast the run by the capacity model before it begins; the report draws the forecast beside the run.",
)
def prove_command(
    *,
    duration_s: float,
    rate: float,
    servers: int,
    seed: int | None,
    faults: str,
    out: Path,
    json_path: str | None,
    base_port: int | None,
    keep: bool,
    audit: bool,
    predict: bool,
) -> int:
    """Start a stack, load it, break it, let it recover, and check every entry it holds.

    Ends with a verdict, a report and an exit code. Ctrl-C stops it and takes the stack down.
    """
    if faults == "standard" and duration_s < MIN_FAULTY_DURATION_S:
        raise click.UsageError(
            f"the standard faults need --duration {MIN_FAULTY_DURATION_S:g} at least; shorter runs need --faults none"
        )
    if rate * duration_s > MAX_BETS:
        raise click.UsageError(
            f"--rate times --duration is {rate * duration_s:,.0f} bets; one run holds {MAX_BETS:,} at most"
        )
    if json_path not in (None, "-"):
        check_writable(Path(json_path))
    progress = Progress()
    options = Options(
        seed=secrets.randbelow(2**31) if seed is None else seed,
        duration_s=duration_s,
        rate=rate,
        servers=servers,
        faults=faults,
        out=out,
        base_port=base_port,
        keep=keep,
        audit=audit,
        predict=predict,
    )
    progress.say(f"ledgerproof {__version__}, seed {options.seed}")
    from ledgerproof.prove import prove  # noqa: PLC0415 - slow to import

    folder, verdict = prove(options, progress)
    return tell_verdict(verdict, folder, json_path)


@cli.command("up", epilog=EXIT_CODES)
@_servers_option
@click.option("--apis", type=click.IntRange(1, 8), default=DEFAULTS.apis, show_default=True, help="API processes.")
@click.option("--name", default=None, help="Name of the stack; the time of day if left out.")
@_base_port_option
@click.option(
    "--failpoints", is_flag=True, help="Let `ledgerproof failpoints` make its processes fail at named points."
)
@json_flag
def up_command(
    *, servers: int, apis: int, name: str | None, base_port: int | None, failpoints: bool, as_json: bool
) -> int:
    """Start a stack with the service and leave it running."""
    progress = Progress()
    spec = StackSpec(servers=servers, apis=apis, base_port=base_port, keep=True, failpoints=failpoints)
    title = f"Starting {servers} Postgres servers, Kafka, Redis and the service"
    with progress.step(title) as step:
        stack = Stack.start(spec, DEFAULT_ROOT, name, step.show)
        step.detail = f"stack {stack.name}"
    nodes = stack.state.nodes
    addresses = {node.name: f"127.0.0.1:{node.port}" for node in nodes}
    addresses |= {f"{node.name} gRPC": f"127.0.0.1:{node.grpc_port}" for node in nodes if node.grpc_port is not None}
    api = f"http://{addresses['api0']}"
    example = (
        f"curl -X POST {api}/v1/wallets/7/deposits "
        f'-H "Authorization: Bearer $(ledgerproof token --stack {stack.name})" '
        "-H 'Idempotency-Key: first' -H 'Content-Type: application/json' -d '{\"amount_minor\": 10000}'"
    )
    if as_json:
        print_json({"name": stack.name, "folder": str(stack.folder), "addresses": addresses, "example": example})
        return 0
    print_table("", ["node", "address"], [[name, address] for name, address in addresses.items()])
    click.echo(f"\nInterface: {api}/openapi.json\nTry:       {example}\nEnd it:    ledgerproof down")
    return 0


@cli.command("token", epilog=EXIT_CODES)
@click.option("--user", type=click.IntRange(1, MAX_USER_ID), default=None, help="The wallet of the scope wallet.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice([scope.value for scope in Scope]),
    multiple=True,
    help="What the token allows; wallet with --user, otherwise service and admin, if left out.",
)
@click.option(
    "--ttl",
    "ttl_s",
    type=click.IntRange(1, TOKEN_TTL_MAX_S),
    default=3600,
    show_default=True,
    metavar="SECONDS",
    help="How long it is valid.",
)
@stack_option
@json_flag
def token_command(
    *, user: int | None, scopes: tuple[str, ...], ttl_s: int, stack_name: str | None, as_json: bool
) -> int:
    """Print a bearer token for the API of a running stack."""
    asked = [Scope(scope) for scope in scopes] or ([Scope.WALLET] if user else [Scope.SERVICE, Scope.ADMIN])
    if (Scope.WALLET in asked) != (user is not None):
        raise click.UsageError("the scope wallet needs --user, and only that scope does")
    stack = running_stack(stack_name)
    token = stack.token(*asked, user_id=user, ttl_s=ttl_s)
    if as_json:
        print_json({"token": token, "scopes": asked, "user_id": user, "ttl_s": ttl_s, "stack": stack.name})
    else:
        click.echo(token)
    return 0


@cli.command("down", epilog=EXIT_CODES)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also stacks that were started to be kept (the default without a kept stack in use).",
)
@json_flag
def down_command(*, everything: bool, as_json: bool) -> int:
    """End stacks of this folder: those kept by `up`, and what a killed run left behind.

    Only processes that provably belong to a stack are ended, and without --all no stack whose owner is at work.
    """
    progress = Progress()
    with progress.step("Taking stacks down") as step:
        report = down_all(DEFAULT_ROOT, step.show)
        if everything:
            report = _down_also_used(report, step.show)
        step.detail = ", ".join(report.stopped) or "none was running"
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        for line in report.skipped:
            click.echo(f"left alone: {line}")
        for line in report.residue:
            print_error(f"left behind: {line}")
    return RESIDUE_EXIT if report.residue else 0


def _down_also_used(report: DownReport, show: Callable[[str], None]) -> DownReport:
    """Take down what `down_all` left alone because its owner is at work."""
    stopped, residue = list(report.stopped), list(report.residue)
    for state in find_stacks(DEFAULT_ROOT):
        if state.place == "elsewhere":
            continue
        with contextlib.suppress(StackNotFound):  # its owner took it down meanwhile
            residue += Stack.attach(stacks_folder(DEFAULT_ROOT) / state.name, show).down()
            stopped.append(state.name)
    skipped = [line for line in report.skipped if line.split(":", 1)[0] not in stopped]
    return DownReport(stopped, skipped, residue)


@cli.command("status", epilog=EXIT_CODES)
@json_flag
def status_command(*, as_json: bool) -> int:
    """Show the stacks of this folder and how each of their nodes is."""
    stacks = find_stacks(DEFAULT_ROOT)
    found: list[tuple[StackState, list[NodeStatus]]] = []
    for state in stacks:
        with contextlib.suppress(StackError):  # taken down while we looked
            found.append((state, Stack.attach(stacks_folder(DEFAULT_ROOT) / state.name).status()))
    if as_json:
        print_json(
            [
                {"name": state.name, "kept": state.spec.keep, "ready": state.ready, "nodes": msgspec.to_builtins(nodes)}
                for state, nodes in found
            ]
        )
        return 0
    if not found:
        click.echo("No stack in this folder. `ledgerproof up` starts one.")
    for state, nodes in found:
        owner = "kept" if state.spec.keep else f"owned by process {state.owner.pid}"
        if not state.owner_is_alive and not state.spec.keep:
            owner = "its owner is gone: `ledgerproof down` cleans up"
        print_table(
            f"{state.name} ({owner})",
            ["node", "state", "port", "pid", "processes", "memory MB", "CPU s"],
            [
                [
                    node.name,
                    node.state,
                    str(node.port),
                    "" if node.pid is None else str(node.pid),
                    str(node.processes),
                    f"{node.memory_bytes / 1e6:.0f}",
                    f"{node.cpu_s:.1f}",
                ]
                for node in nodes
            ],
        )
    return 0


@cli.command("report", epilog=EXIT_CODES)
@click.argument("run", required=False, type=click.Path(path_type=Path))
@json_flag
def report_command(*, run: Path | None, as_json: bool) -> int:
    """Write report.html of the run folder RUN again (the newest run if left out) and say where it is."""
    from ledgerproof.assess import VERDICT_FILE  # noqa: PLC0415 - slow to import
    from reports.render import render  # noqa: PLC0415 - slow to import

    folder = run_folder(run)
    with Progress().step(f"Rendering {folder}"):
        page = render(folder)
    try:
        verdict: dict[str, Any] = msgspec.json.decode((folder / VERDICT_FILE).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        verdict = {}
    said = verdict.get("verdict")
    if as_json:
        print_json({"run": str(folder), "report": str(page), "verdict": said})
    else:
        click.echo(f"{said or 'no verdict'}  {page}")
    return 0


@cli.command("check", epilog=EXIT_CODES)
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--write", is_flag=True, help="Replace the folder's verdict.json and report.html by the new judgement.")
@click.option(
    "--judges",
    "judges",
    metavar="NAMES",
    help="Judges that must agree, separated by commas: columns and any of sql and replay. All of them if left out.",
)
@json_flag
def check_command(*, run: Path | None, write: bool, judges: str | None, as_json: bool) -> int:
    """Judge the stored run folder RUN (the newest run if left out) again, from its evidence alone.

    Says which version judged it before, and what is different now. Runs of older versions are judged by what they
    hold; codes that they are too old for are named.
    """
    from ledgerproof.assess import assess, read_facts, write_verdict  # noqa: PLC0415 - slow to import
    from ledgerproof.rejudge import compare  # noqa: PLC0415 - slow to import
    from reports.render import render  # noqa: PLC0415 - slow to import

    asked = None if judges is None else _other_judges(judges)
    folder = run_folder(run)
    progress = Progress()
    with progress.step(f"Checking {folder}") as step:
        verdict = assess(folder, read_facts(folder), asked)
        compared = compare(folder, verdict)
        step.detail = f"{len(verdict['anomalies'])} rules"
    if write:
        write_verdict(folder, verdict)
        render(folder)
    if as_json:
        print_json({**verdict, "compared": msgspec.to_builtins(compared)})
    else:
        print_summary(verdict, folder)
        for line in compared.lines():
            click.echo(f"  {line}")
    return int(verdict["exit_code"])


def _other_judges(text: str) -> list[str]:
    """Return the judges of a list of names besides the columns. Raises click.UsageError for names there are not."""
    from invariants.judges import COLUMNS, JUDGES  # noqa: PLC0415 - slow to import

    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name != COLUMNS and name not in JUDGES]
    if unknown:
        raise click.UsageError(f"no such judge: {', '.join(unknown)}; there are {', '.join([COLUMNS, *JUDGES])}")
    if COLUMNS not in names:
        raise click.UsageError(f"--judges must name {COLUMNS}: it gives the counts and witnesses")
    return [name for name in names if name != COLUMNS]


cli.add_command(judge_command)
cli.add_command(sim_group)
cli.add_command(explain_command)
cli.add_command(sometimes_command)
cli.add_command(shards_command)
cli.add_command(reconcile_group)
cli.add_command(payouts_group)
cli.add_command(audit_command)
cli.add_command(bench_command)
cli.add_command(load_group)
cli.add_command(campaign_command)
cli.add_command(trace_command)
cli.add_command(mutants_command)
cli.add_command(dlq_group)
cli.add_command(projection_group)
cli.add_command(events_group)
cli.add_command(synth_command)
cli.add_command(bench_judge_command)
cli.add_command(failpoints_group)
cli.add_command(cells_command)
cli.add_command(sla_command)
cli.add_command(notebooks_group)
cli.add_command(checklist_command)
replay_plan_command.epilog = EXIT_CODES
cli.add_command(replay_plan_command)


# -- output --------------------------------------------------------------------------------------------


def tell_verdict(verdict: dict[str, Any], folder: Path, json_path: str | None) -> int:
    """Print or write the verdict of a run as `json_path_option` says, and return its exit code."""
    if json_path == "-":
        print_json(verdict)
    else:
        if json_path is not None:
            Path(json_path).write_bytes(msgspec.json.format(msgspec.json.encode(verdict), indent=2) + b"\n")
        print_summary(verdict, folder)
    return int(verdict["exit_code"])


def print_summary(verdict: dict[str, Any], folder: Path) -> None:
    """Print verdict, reasons, key numbers and where the report is."""
    console = Console(highlight=False, soft_wrap=True)
    name = str(verdict["verdict"])
    colour = COLOURS.get(name, "red")
    console.print(f"\n[bold {colour}]{name}[/bold {colour}]  seed {verdict['seed']}  commit {verdict['commit']}")
    for reason in verdict["reasons"]:
        console.print(f"  {reason}", markup=False)
    for witness in verdict["witnesses"][:5]:
        console.print(f"  {witness['code']}: {witness['text']}", markup=False)
    duration_s = verdict["duration_s"]
    if duration_s:
        console.print(
            f"  {verdict['acknowledged_bets']} bets acknowledged in {duration_s:.0f} s "
            f"({verdict['bets_per_s']:.0f}/s), "
            f"{sum(verdict['anomalies'].values())} anomalies in {len(verdict['anomalies'])} checks, "
            f"{verdict['unresolved'] or 0} outcomes unresolved"
        )
        for line in _judge_lines(verdict):
            console.print(f"  {line}", markup=False)
        for fault in verdict["faults"]:
            console.print(f"  {_fault_line(fault)}", markup=False)
        for move in verdict.get("shard_moves", []):
            console.print(
                f"  shard {move['shard']} moved from {move['source']} to {move['target']} under load: "
                f"{move['entries']} entries, frozen for {move['freeze_ms']:.0f} ms",
                markup=False,
            )
    met = {True: "met", False: "MISSED", None: ""}
    if verdict["sla"]:
        rows = [
            [
                row["metric"],
                "" if row["target"] is None else str(row["target"]),
                _number(row["measured"], row["unit"]),
                met[row["met"]],
            ]
            for row in verdict["sla"]
        ]
        print_table("", ["service level", "target", "measured", ""], rows)
    page = folder / REPORT_FILE
    console.print(f"report: {page if page.exists() else folder}", markup=False)


def _judge_lines(verdict: dict[str, Any]) -> list[str]:
    """Say who judged and whether they agreed, and who was not asked."""
    asked = [judge for judge in verdict.get("judges", []) if judge["skipped"] is None]
    lines = [
        f"judge {judge['name']} not asked: {judge['skipped']}"
        for judge in verdict.get("judges", [])
        if judge["skipped"]
    ]
    if asked:
        who = ", ".join(f"{judge['name']} ({len(judge['codes'])} codes)" for judge in asked)
        differ = {item["code"] for item in verdict.get("disagreements", [])}
        agreed = f"DISAGREE on {', '.join(sorted(differ))}" if differ else "agree" if len(asked) > 1 else "alone"
        lines.insert(0, f"judges {agreed}: {who}")
    return lines


def _fault_line(fault: dict[str, Any]) -> str:
    what = f"{fault['kind']} {fault['target']}"
    start, end, recovered = fault["measured_start"], fault["measured_end"], fault["recovered_at"]
    if start is None or end is None:
        return f"{what}: its effect was not measured"
    text = f"{what}: down {end - start:.1f} s"
    return f"{text}, not recovered" if recovered is None else f"{text}, recovered after {recovered - start:.1f} s"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    digits = 4 if unit == "%" else 1
    text = f"{value:.{digits}f}" if value != int(value) else f"{value:.0f}"
    return f"{text} {unit}"


# -- errors --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Turn what a user can run into into one message and an exit code; keep a traceback for the rest in a file."""
    try:
        yield
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code if isinstance(error, click.UsageError) else USAGE_EXIT)
    except (EnvironmentProblem, StackError, NotARun) as error:
        _fail(str(error), USAGE_EXIT)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped", ABORTED_EXIT)
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody left to tell.
        sys.stderr.close()
        sys.exit(USAGE_EXIT)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", USAGE_EXIT)
    except Exception as error:  # noqa: BLE001 - a user gets a message, a developer the file it names
        _fail(f"{type(error).__name__}: {error}{_kept_traceback(error)}", INVALID_EXIT)


def _kept_traceback(error: BaseException) -> str:
    """Write the traceback to a file and return where, or nothing if that fails too."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="ledgerproof-", suffix=".log", delete=False) as file:
            handler = logging.StreamHandler(file)
            record = logging.LogRecord(
                "ledgerproof", logging.ERROR, __file__, 0, "unexpected", (), (type(error), error, error.__traceback__)
            )
            handler.emit(record)
            return f"\nThis is a bug of ledgerproof; the details are in {file.name}"
    except OSError:
        return ""


def _fail(message: str, exit_code: int) -> NoReturn:
    print_error(message)
    sys.exit(int(exit_code))


def main(run: Callable[..., Any] = cli) -> NoReturn:
    """Run the command line of this process and end it with the command's exit code."""
    # What a library has to say goes to the run's log file, never between our lines.
    logging.getLogger().addHandler(logging.NullHandler())
    logging.raiseExceptions = False
    with _errors_as_messages():
        sys.exit(run(standalone_mode=False) or 0)
    raise AssertionError("unreachable: every path above ends the process")
