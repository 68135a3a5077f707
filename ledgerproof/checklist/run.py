"""Goes through the items, one after another; whatever a check runs into becomes its answer and ends no other."""

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec
from confluent_kafka import KafkaException
from redis.exceptions import RedisError

from compose.errors import StackError
from compose.stack import DEFAULT_ROOT, Stack
from compose.state import StackSpec
from ledgerproof.checklist.catalogue import ITEMS
from ledgerproof.checklist.item import CANNOT, FAILED, OK, Answer, CannotRun, Failed, Item, Seen
from ledgerproof.checklist.looking import SEED_PARTITIONS
from ledgerproof.checklist.site import Site
from ledgerproof.collect import NotCollected, NotDrained
from ledgerproof.interrupts import terminate_as_interrupt, undisturbed
from ledgerproof.machine import commit, describe_machine
from ledgerproof.options import EnvironmentProblem
from ledgerproof.progress import Progress
from ledgerproof.wire import WireError
from reference.errors import LedgerError
from reference.store import DRIVER_ERRORS

HEAL_TIMEOUT_S: Final = 60.0
OWN: Final = StackSpec(servers=2, apis=2, settings={"partitions": dict(SEED_PARTITIONS), "reconcile_every_s": 3.0})
"""The stack that is started where none was named: small, but with the architecture's partitions."""
TROUBLE: Final = (
    LedgerError,
    NotCollected,
    NotDrained,
    StackError,
    WireError,
    KafkaException,
    RedisError,
    TimeoutError,
    *DRIVER_ERRORS,
)
"""What a stack that is not in order answers a check with. Anything else is a bug and ends the command."""


class Checked(msgspec.Struct, kw_only=True):
    """The checklist of one stack."""

    stack: str
    own: bool
    """Whether the stack was started for this."""
    shape: str
    made_at: str
    commit: str
    machine: str
    answers: list[Answer]
    residue: list[str] = []

    def count(self, result: str) -> int:
        """Return how many items have a result."""
        return sum(answer.result == result for answer in self.answers)


def check(only: Sequence[str], stack: Stack | None, progress: Progress, *, may_break: bool) -> Checked:
    """Go through the items with these ids on a running stack, or on one that is started and taken down again.

    Raises EnvironmentProblem if no stack can be had.
    """
    with terminate_as_interrupt():
        own = stack is None
        subject = _started(progress) if stack is None else stack
        site: Site | None = None
        try:
            site = Site(subject, own or may_break, progress.show)
            shape = (
                f"{len(site.config.servers)} Postgres servers, {len(site.apis)} API processes, "
                f"{len(site.service_nodes())} processes of the service"
            )
            answers = asyncio.run(_all(site, [item for item in ITEMS if item.id in only], progress))
        finally:
            residue = _ended(subject, progress, own=own, broke=own or may_break)
    machine = describe_machine()
    return Checked(
        stack=subject.name,
        own=own,
        shape=shape,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:g} GB",
        answers=answers,
        residue=residue,
    )


def _started(progress: Progress) -> Stack:
    title = f"Starting {OWN.servers} Postgres servers, Kafka, Redis and the service"
    with progress.step(title) as step:
        try:
            stack = Stack.start(OWN, DEFAULT_ROOT, progress=step.show)
        except StackError as error:
            raise EnvironmentProblem(str(error)) from error
        step.detail = f"stack {stack.name}"
    return stack


def _ended(stack: Stack, progress: Progress, *, own: bool, broke: bool) -> list[str]:
    """Take our own stack down, and heal another's that we may have broken; return what is left of ours."""
    with undisturbed():
        if own:
            with progress.step("Taking the stack down"):
                return stack.down()
        if broke:
            with progress.step("Starting again what is still dead") as step:
                step.detail = ", ".join(stack.heal(HEAL_TIMEOUT_S)) or "nothing was"
    return []


async def _all(site: Site, items: Sequence[Item], progress: Progress) -> list[Answer]:
    try:
        if not site.apis:
            raise EnvironmentProblem(f"the stack {site.stack.name} has no API process: there is nothing to ask")
        with progress.step("Waiting for the consumers to join their groups") as step:
            try:
                await site.joined()
            except Failed as error:
                raise EnvironmentProblem(f"{error}: `ledgerproof status` shows what is dead") from error
            step.detail = ""
        answers = []
        for item in items:
            with progress.step(item.title) as step:
                answer = await ask(item, site, time.monotonic)
                step.detail = answer.result
            answers.append(answer)
        return answers
    finally:
        site.close()


async def ask(item: Item, site: Site, clock: Callable[[], float]) -> Answer:
    """Run one check and return its answer."""
    began, figures = clock(), dict[str, float]()
    try:
        said = await item.check(site)
        result, (evidence, figures) = OK, said if isinstance(said, Seen) else (said, {})
    except Failed as error:
        result, evidence = FAILED, str(error)
    except CannotRun as error:
        result, evidence = CANNOT, str(error)
    except TROUBLE as error:
        result, evidence = FAILED, f"the check ran into {type(error).__name__}: {error}"
    return Answer(item.id, item.section, item.title, result, evidence, round(clock() - began, 2), figures)
