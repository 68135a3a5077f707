"""Runs one trigger in the tree it is imported from and writes what the harness says of it.

`python -m ledgerproof.mutants.probe --trigger NAME --stack FOLDER --out FILE`, started in a copy of the tree. All that
is measured (drain, snapshots, resolution, judging) is the copy's own.
"""

import argparse
import importlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from ledgerproof.mutants.outcome import Outcome, Shown

DRAIN_S: Final = 12.0
"""A planted bug may keep the service from coming to rest; the harness then gives up sooner than in a long run."""
IMPORTED: Final = ("reference", "invariants", "compose", "ledgerproof", "reports", "sim")


def imports() -> dict[str, str]:
    """Return from where each package of ours is imported in this process."""
    return {name: str(Path(str(importlib.import_module(name).__file__)).parent.parent) for name in IMPORTED}


async def _play(name: str, stack_folder: Path, folder: Path) -> None:
    from compose.stack import Stack  # noqa: PLC0415 - the cheapest tier needs none of this
    from ledgerproof import assess  # noqa: PLC0415
    from ledgerproof.mutants.floor import Floor  # noqa: PLC0415
    from ledgerproof.mutants.triggers import TRIGGERS  # noqa: PLC0415

    floor = Floor(Stack.attach(stack_folder), folder)
    try:
        await floor.open()
        await TRIGGERS[name](floor)
        await floor.rest()
        recording = floor.recording
        recording.recorder.close()
        recording.series.close()
        recording.facts.finished = True
        assess.write_facts(folder, recording.facts)
    finally:
        await floor.close()


def judge_folder(folder: Path) -> Outcome:
    """Judge a run folder as `prove` does, but for service levels: those say nothing about right or wrong."""
    from invariants.run import load_run  # noqa: PLC0415
    from invariants.verdict import Verdict, judge, worst  # noqa: PLC0415
    from ledgerproof import assess  # noqa: PLC0415

    facts = assess.read_facts(folder)
    judgement = judge(load_run(folder))
    parts = [Verdict[name] for name in facts.parts]
    reasons = list(facts.reasons)
    assess._add_judgement(judgement, facts, parts, reasons)
    if facts.reconciliation is not None:
        assess._add_reconciliation(facts.reconciliation, judgement, parts, reasons)
    first: dict[str, Shown] = {}
    for witness in judgement.witnesses:
        first.setdefault(witness.code, Shown(witness.code, witness.text, witness.key, witness.user, witness.seq))
    clean = [reason for reason in reasons if reason]
    return Outcome(
        verdict=worst(parts).name,
        codes={code: count for code, count in judgement.anomalies.items() if count},
        unchecked=judgement.unchecked,
        reasons=clean,
        witnesses=list(first.values()),
        disagreements=[difference.text for difference in judgement.disagreements],
    )


def run(trigger: str, stack_folder: Path | None, folder: Path) -> Outcome:
    """Play a trigger and judge what came of it; never raises."""
    began = time.monotonic()
    try:
        if stack_folder is None:
            from ledgerproof.mutants.worlds import judge_worlds  # noqa: PLC0415

            outcome = judge_worlds(trigger)
        else:
            from ledgerproof import ending  # noqa: PLC0415

            vars(ending)["DRAIN_TIMEOUT_S"] = DRAIN_S
            uvloop.run(_play(trigger, stack_folder, folder))
            outcome = judge_folder(folder)
    except Exception as error:  # a scenario that breaks off is no proof of anything, and its row must say so
        logging.getLogger("ledgerproof.mutants").exception("the trigger did not run to its end")
        outcome = Outcome("ABORTED", error=f"{type(error).__name__}: {error}"[:500])
    outcome.imports = imports()
    outcome.seconds = round(time.monotonic() - began, 2)
    return outcome


def main(arguments: list[str] | None = None) -> int:
    """Run one trigger; the result is in the file, the exit code only says whether there is one."""
    parser = argparse.ArgumentParser(prog="python -m ledgerproof.mutants.probe", description=__doc__)
    parser.add_argument("--trigger", required=True)
    parser.add_argument("--stack", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    asked: Any = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asked.folder.mkdir(parents=True, exist_ok=True)
    outcome = run(asked.trigger, asked.stack, asked.folder)
    temporary = asked.out.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(outcome))
    temporary.replace(asked.out)
    return 0


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries must not keep it.
    os._exit(code)
