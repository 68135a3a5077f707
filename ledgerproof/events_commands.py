"""`ledgerproof dlq`, `projection` and `events`: look after the events of a running service.

Each command works on the stack that `ledgerproof up` started, or on the service of a configuration file.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from ledgerproof.attach import service_config, service_options
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import print_json, print_table
from ledgerproof.progress import Progress
from reference.commands import TOPIC_OF
from reference.config import ServiceConfig
from reference.errors import LedgerError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from reference.dlq import Letter

EXIT_CODES: Final = """\b
Exit codes:
   0  done
   2  usage   wrong arguments, no stack, or the service could not be reached (message says why)
  40  stopped by Ctrl-C; what was done until then stays done
"""
ALL_TOPICS: Final = tuple(sorted(set(TOPIC_OF.values())))


def _run(work: "Coroutine[Any, Any, Any]") -> Any:
    """Run it to its end; what the service cannot do now becomes one message."""
    from confluent_kafka import KafkaException  # noqa: PLC0415 - slow to import

    from reference.dlq import NotReplayed, UnknownLetter  # noqa: PLC0415 - slow to import

    try:
        return asyncio.run(work)
    except UnknownLetter as error:
        raise EnvironmentProblem(f"there is no letter {error}: `ledgerproof dlq list` names them") from error
    except (LedgerError, NotReplayed, TimeoutError) as error:
        raise EnvironmentProblem(f"{error}") from error
    except KafkaException as error:
        raise EnvironmentProblem(f"Kafka does not answer: {error}. Is the stack up?") from error


# -- dlq -----------------------------------------------------------------------------------------------


@click.group("dlq", epilog=EXIT_CODES)
def dlq_group() -> None:
    """Look at events that could not be applied, and replay them once their cause is repaired."""


@dlq_group.command("list", epilog=EXIT_CODES)
@click.option("--all", "everything", is_flag=True, help="Also letters that were replayed or dropped.")
@service_options
def list_command(*, everything: bool, stack_name: str | None, config_path: Path | None, as_json: bool) -> int:
    """List dead letters: which event, from where, of which consumer, and why."""
    found = _letters(service_config(stack_name, config_path))
    shown = [letter for letter in found if everything or letter.resolution is None]
    if as_json:
        print_json([msgspec.to_builtins(letter) for letter in shown])
        return 0
    if shown:
        print_table(
            "",
            ["letter", "buried", "group", "origin", "event", "state", "cause"],
            [
                [
                    letter.id,
                    _clock(letter.buried_at_ms),
                    letter.group,
                    letter.origin,
                    f"{letter.event_type} {letter.event_id}".strip() or "-",
                    _state(letter),
                    letter.cause[:80],
                ]
                for letter in shown
            ],
        )
    waiting = sum(letter.resolution is None for letter in found)
    click.echo(f"{waiting} waiting, {len(found) - waiting} replayed or dropped")
    return 0


@dlq_group.command("show", epilog=EXIT_CODES)
@click.argument("letter")
@service_options
def show_command(*, letter: str, stack_name: str | None, config_path: Path | None, as_json: bool) -> int:
    """Show one dead letter whole: cause, headers and content."""
    from reference.dlq import open_letter  # noqa: PLC0415 - slow to import

    config = service_config(stack_name, config_path)

    async def work() -> Any:
        return await asyncio.to_thread(open_letter, config, letter)

    opened = _run(work())
    if as_json:
        print_json(msgspec.to_builtins(opened))
        return 0
    told = opened.letter
    click.echo(f"letter {told.id}, {_state(told)}\ncause:  {told.cause}\ngroup:  {told.group}\norigin: {told.origin}")
    click.echo(f"buried: {_clock(told.buried_at_ms)}\nkey:    {told.key}")
    for name, value in opened.headers:
        click.echo(f"header: {name}: {value}")
    click.echo(f"value ({opened.value_bytes} bytes):\n{opened.value}")
    return 0


@dlq_group.command("replay", epilog=EXIT_CODES)
@click.argument("letters", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every letter that waits.")
@click.option("--again", is_flag=True, help="Also those that were replayed or dropped before.")
@service_options
def replay_command(
    *,
    letters: tuple[str, ...],
    everything: bool,
    again: bool,
    stack_name: str | None,
    config_path: Path | None,
    as_json: bool,
) -> int:
    """Send dead letters to the topics they came from, under their own key and event id.

    Consumers apply an event once, so this repeats no effect. A letter whose cause is not repaired comes back as a
    new one. What was replayed before is named and left alone.
    """
    from reference.dlq import replay  # noqa: PLC0415 - slow to import

    config = service_config(stack_name, config_path)
    return _resolve("replayed", replay, config, letters, everything=everything, again=again, as_json=as_json)


@dlq_group.command("drop", epilog=EXIT_CODES)
@click.argument("letters", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every letter that waits.")
@service_options
def drop_command(
    *, letters: tuple[str, ...], everything: bool, stack_name: str | None, config_path: Path | None, as_json: bool
) -> int:
    """Record that dead letters need not be replayed; they stay in the topic, and can still be replayed --again."""
    from reference.dlq import drop  # noqa: PLC0415 - slow to import

    config = service_config(stack_name, config_path)
    return _resolve("dropped", drop, config, letters, everything=everything, again=False, as_json=as_json)


def _resolve(
    verb: str,
    action: "Callable[[ServiceConfig, list[str]], Coroutine[Any, Any, int]]",
    config: ServiceConfig,
    ids: tuple[str, ...],
    *,
    everything: bool,
    again: bool,
    as_json: bool,
) -> int:
    if bool(ids) == everything:
        raise click.UsageError("name letters, or say --all")
    known = {letter.id: letter for letter in _letters(config)}
    for name in ids:
        if name not in known:
            raise EnvironmentProblem(f"there is no letter {name}: `ledgerproof dlq list --all` names them")
    asked = [known[name] for name in dict.fromkeys(ids)] if ids else list(known.values())
    before = [letter for letter in asked if letter.resolution is not None and not again]
    wanted = [letter.id for letter in asked if letter.resolution is None or again]
    if everything:
        before = []
    done = _run(action(config, wanted)) if wanted else 0
    if as_json:
        earlier = {letter.id: letter.resolution for letter in before}
        print_json({verb: wanted if done else [], "left_alone": earlier})
        return 0
    for letter in before:
        click.echo(f"{letter.id} was {_state(letter)}; left alone")
    click.echo(f"{done} {verb}")
    return 0


def _letters(config: ServiceConfig) -> "list[Letter]":
    from reference.dlq import letters  # noqa: PLC0415 - slow to import

    async def work() -> "list[Letter]":
        return await asyncio.to_thread(letters, config)

    found: list[Letter] = _run(work())
    return found


def _state(letter: "Letter") -> str:
    if letter.resolution is None or letter.resolved_at_ms is None:
        return "waiting"
    times = f" ({letter.replays} times)" if letter.replays > 1 else ""
    return f"{letter.resolution} {_clock(letter.resolved_at_ms)}{times}"


def _clock(unix_ms: int) -> str:
    return f"{datetime.fromtimestamp(unix_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}Z"


# -- projection ----------------------------------------------------------------------------------------


@click.group("projection", epilog=EXIT_CODES)
def projection_group() -> None:
    """Look after the read model of the balances."""


@projection_group.command("rebuild", epilog=EXIT_CODES)
@click.option("--server", "server_name", default=None, help="Only this server; all of them if left out.")
@click.option("--from-zero", is_flag=True, help="Write every row anew instead of only those that are wrong or missing.")
@click.option("--restart", is_flag=True, help="Begin again instead of going on where a killed rebuild was.")
@service_options
def rebuild_command(
    *,
    server_name: str | None,
    from_zero: bool,
    restart: bool,
    stack_name: str | None,
    config_path: Path | None,
    as_json: bool,
) -> int:
    """Rebuild the projection from the ledger while the service runs.

    Readers see each balance as it was or as it is, never none and never an older one. It may be killed at any
    moment; the next one goes on from there.
    """
    from reference.rebuild import rebuild  # noqa: PLC0415 - slow to import

    config = service_config(stack_name, config_path)
    names = [server.name for server in config.servers]
    if server_name is not None and server_name not in names:
        raise EnvironmentProblem(f"there is no server {server_name!r}; there are {', '.join(names)}")
    chosen = [index for index, name in enumerate(names) if server_name in (None, name)]
    with Progress().step("Rebuilding the projection") as step:
        done = _run(rebuild(config, chosen, from_zero=from_zero, restart=restart, show=step.show))
        step.detail = f"{sum(item.wallets for item in done)} wallets"
    rates = [round(item.wallets / item.seconds) if item.seconds else 0 for item in done]
    if as_json:
        print_json(
            [
                {
                    "server": item.server,
                    "wallets": item.wallets,
                    "wrong": item.wrong,
                    "resumed": item.resumed,
                    "seconds": round(item.seconds, 3),
                    "wallets_per_s": rate,
                }
                for item, rate in zip(done, rates, strict=True)
            ]
        )
        return 0
    print_table(
        "",
        ["server", "wallets", "were wrong", "seconds", "wallets/s", ""],
        [
            [
                item.server,
                str(item.wallets),
                str(item.wrong),
                f"{item.seconds:.1f}",
                str(rate),
                "went on where an earlier one ended" if item.resumed else "",
            ]
            for item, rate in zip(done, rates, strict=True)
        ],
    )
    return 0


# -- events --------------------------------------------------------------------------------------------


@click.group("events", epilog=EXIT_CODES)
def events_group() -> None:
    """Look after the events between ledger and consumers."""


@events_group.command("replay", epilog=EXIT_CODES)
@click.option(
    "--from",
    "since",
    required=True,
    metavar="TIME",
    help="When the first event to send was written: 2026-01-31T12:00:00Z, or as 90s, 15m, 2h before now.",
)
@click.option("--topic", "topics", multiple=True, type=click.Choice(ALL_TOPICS), help="Only these; all if left out.")
@service_options
def replay_events_command(
    *, since: str, topics: tuple[str, ...], stack_name: str | None, config_path: Path | None, as_json: bool
) -> int:
    """Send the events of the outboxes since a time to Kafka again, each under its own event id.

    For consumers that lost their place, or a broker that lost its disk. Consumers apply an event once, so this
    repeats no effect.
    """
    from reference.rebuild import replay  # noqa: PLC0415 - slow to import

    moment = parse_time(since, datetime.now(UTC))
    config = service_config(stack_name, config_path)
    with Progress().step(f"Replaying events since {moment:%Y-%m-%d %H:%M:%S}Z") as step:
        done = _run(replay(config, moment, topics or ALL_TOPICS, show=step.show))
        step.detail = f"{done.events.total()} events"
    if as_json:
        print_json(
            {
                "since": moment.isoformat(),
                "events": dict(done.events),
                "last_ids": done.last_ids,
                "seconds": round(done.seconds, 3),
            }
        )
        return 0
    for topic, count in sorted(done.events.items()):
        click.echo(f"{topic}: {count}")
    click.echo(f"{done.events.total()} events in {done.seconds:.1f} s")
    return 0


def parse_time(text: str, now: datetime) -> datetime:
    """Return the moment that a user typed. Raises UsageError if it is none, or has no time zone."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if text[-1:] in units and text[:-1].isdigit():
        return now - timedelta(seconds=int(text[:-1]) * units[text[-1]])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise click.UsageError(f"--from {text!r} is no time with a zone: write 2026-01-31T12:00:00Z, or 15m")
    return moment
