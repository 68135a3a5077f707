"""The end of every run, once its clients have stopped and its faults are healed; the order is what makes it a proof.

wait out every timeout → drain → snapshot 1 → resolve the unknown keys and send a random half again → drain →
snapshot 2 → ask the service's own reconciler.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from invariants import fates
from invariants.run import FIRST_SNAPSHOT, SECOND_SNAPSHOT, load_run
from ledgerproof.assess import ReconciliationFacts
from ledgerproof.client import Client
from ledgerproof.collect import NotDrained, drain, snapshot
from ledgerproof.drift import FOLLOWS
from ledgerproof.progress import Progress, Step
from ledgerproof.recording import Recording, timed
from reference import operations
from reference.config import ServiceConfig
from reference.errors import LedgerError
from reference.reconciliation import Kind, Pass

DRAIN_TIMEOUT_S: Final = 60.0
SHORT_DRAIN_TIMEOUT_S: Final = 5.0
"""For the second drain, if the first one failed."""
PASSES_READ_MAX: Final = 2_000
FINDINGS_READ_MAX: Final = 2_000
EXAMPLES_MAX: Final = 5

Copy = Callable[[Path, Callable[[str], None], Path | None], Awaitable[dict[str, int]]]
"""(folder, show, folder of the snapshot before) → rows of each table; raises as `collect.snapshot` does."""


@dataclass
class Scene:
    """What the end of a run works with."""

    config: ServiceConfig
    recording: Recording
    progress: Progress
    client: Client
    copy: Copy
    """Takes a snapshot; `whole(config)` unless the run shares its stack with earlier ones."""
    planted: int | None = None
    """The wallet whose read balance the run made wrong, if it did."""


def whole(config: ServiceConfig) -> Copy:
    """Return what copies everything the service holds."""

    async def copy(folder: Path, show: Callable[[str], None], earlier: Path | None) -> dict[str, int]:
        return await snapshot(config, folder, show, earlier)

    return copy


async def _reconciled(config: ServiceConfig, step: Step, planted: int | None, *, at_rest: bool) -> ReconciliationFacts:
    """Run a full pass of the service's own reconciler and return what it and all earlier passes found.

    What follows from the drift in the wallet `planted` is counted apart: it is the checker's to judge (A35).

    Of a service that does not come to rest only the earlier passes are asked: they may say why, for findings pause
    payouts.
    """
    said = ReconciliationFacts()
    try:
        report = await Pass(config, Kind.FULL, "prove", show=step.show).run() if at_rest else None
        if report is not None:
            said.problems += report.problems
        for index, server in enumerate(config.servers):
            said.passes += len(await operations.runs_of(config, index, PASSES_READ_MAX))
            for row in await operations.findings_of(config, index, None, FINDINGS_READ_MAX):
                if planted is not None and row["user_id"] == planted and row["code"] in FOLLOWS:
                    said.planted += 1
                    continue
                said.findings[row["code"]] = said.findings.get(row["code"], 0) + 1
                if len(said.examples) < EXAMPLES_MAX:
                    where = (
                        f"wallet {row['user_id']}, seq {row['seq']}, match {row['match_id']}, event {row['event_id']}"
                    )
                    said.examples.append(
                        f"{row['code']} on {server.name}: {where}: expected {row['expected']}, found {row['found']}"
                    )
    except LedgerError as error:
        said.problems.append(str(error))
    step.detail = f"{sum(said.findings.values())} findings in {said.passes} passes"
    return said


async def drained(scene: Scene, timeout_s: float) -> bool:
    """Wait until every request's time is over and the service has finished its work; return whether it has."""
    config, recording, client = scene.config, scene.recording, scene.client
    with scene.progress.step("Draining outbox, topics, settlements and projection") as step:
        # A request whose answer was lost may still be in the service: in its queue until the deadline, then in
        # one statement until that one's timeout.
        longest_s = (config.command_deadline_ms + config.statement_timeout_ms) / 1000 + 1.0
        wait_s = client.last_unknown_sent_s + longest_s - recording.clock()
        if client.unknown_count and wait_s > 0:
            step.show("waiting until no request can be under way")
            await asyncio.sleep(wait_s)
        try:
            left = await drain(config, timeout_s, step.show)
        except NotDrained as error:
            recording.invalid(str(error))
            step.detail = "not drained"
            return False
        step.detail = left.text()
        return True


async def _resolve(scene: Scene) -> None:
    """Ask the ledger what became of the unknown keys and send a random half of them once more."""
    recording, client = scene.recording, scene.client
    await asyncio.to_thread(recording.recorder.flush)
    run = await asyncio.to_thread(load_run, recording.folder)
    resolved = run.first_resolution
    chosen = fates.choose_retries(resolved, recording.facts.seed)
    asked = zip(chosen["family"].to_list(), chosen["user"].to_list(), chosen["key"].to_list(), strict=True)
    identities = [identity for identity in asked if identity in client.unknown]
    with scene.progress.step(f"Resolving {resolved.height} unknown outcomes") as step:
        results = await client.retry_unknown(identities)
        replayed = sum(bool(result.answer.replayed) for _, result in results)
        step.detail = f"{len(results)} sent again, {replayed} of them replayed"


async def collect(scene: Scene) -> None:
    """Copy what the service holds, send half of the unknown keys again, and copy once more."""
    recording, progress = scene.recording, scene.progress
    facts = recording.facts
    with timed(facts, "snapshot_s"), progress.step("Reading everything the service holds") as step:
        first = recording.folder / FIRST_SNAPSHOT
        first.mkdir()
        sizes = await scene.copy(first, step.show, None)
        step.detail = f"{sizes['ledger']} ledger rows"
    recording.timeline.phase("resolve")
    with timed(facts, "resolve_s"):
        await _resolve(scene)
        timeout_s = DRAIN_TIMEOUT_S if facts.drained else SHORT_DRAIN_TIMEOUT_S
        facts.drained = await drained(scene, timeout_s) and facts.drained
    with timed(facts, "snapshot_s"), progress.step("Reading everything once more") as step:
        second = recording.folder / SECOND_SNAPSHOT
        second.mkdir()
        sizes = await scene.copy(second, step.show, first)
        step.detail = f"{sizes['ledger']} ledger rows"
    with timed(facts, "reconcile_s"), progress.step("Asking the reconciler") as step:
        facts.reconciliation = await _reconciled(scene.config, step, scene.planted, at_rest=facts.drained)
    facts.sizes = {f"{table}_rows": rows for table, rows in sizes.items()}
    facts.sizes["history_rows"] = recording.recorder.appended_rows
