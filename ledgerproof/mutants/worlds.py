"""Triggers of the cheapest tier: made-up evidence, judged by the copy's own judge.

The worlds are those of the unit tests: an honest afternoon, and the same with one bug planted in its evidence, whose
code is known. A judge that calls one of them otherwise is wrong itself, and this says about which code.
"""

import importlib
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from invariants import history
from invariants.anomalies import CHECKS
from invariants.history import HistoryRecord, Recorder
from invariants.run import Run
from invariants.verdict import Judgement, Verdict, judge, worst
from ledgerproof.mutants.outcome import Outcome, Shown

SELF_TEST: Final = "V00"
"""Stands for the judge itself where it is wrong about no code in particular."""


def judge_worlds(trigger: str) -> Outcome:
    """Run a trigger of this tier. Raises KeyError for an unknown one."""
    return WORLDS[trigger]()


def _modules() -> tuple[Any, Any]:
    """Return the honest world and the catalogue of planted ones; both are below tests/unit."""
    return importlib.import_module("honest_world"), importlib.import_module("test_anomalies")


def _fired(judgement: Judgement) -> set[str]:
    return {code for code, count in judgement.anomalies.items() if count}


def self_test() -> Outcome:
    """Judge the honest world, every planted one, and evidence with holes, and name what is called wrongly."""
    honest, planted = _modules()
    wrong: dict[str, list[str]] = {}

    def note(code: str, text: str) -> None:
        wrong.setdefault(code, []).append(text)

    calm = judge(honest.small_world().run(), judges=[])
    for code in _fired(calm):
        note(code, "the honest world is accused of it")
    if calm.verdict is not Verdict.PASS and not _fired(calm):
        note(SELF_TEST, f"the honest world is called {calm.verdict.name}: {'; '.join(calm.reasons)[:200]}")
    for code, bug, _, _ in planted.BUGS:
        world = honest.small_world()
        bug(world)
        # Only its own check: whether another one is wrong is asked of that one's worlds, and of the honest one.
        if not CHECKS[code].find(world.run()).count:
            note(code, f"the world in which {planted.name_of(bug)} is not named by it")
    for text in _holes(honest):
        note(SELF_TEST, text)
    return Outcome(
        verdict=Verdict.INVALID.name if wrong else Verdict.PASS.name,
        codes={code: len(texts) for code, texts in sorted(wrong.items())},
        reasons=[f"the judge is wrong about {code}: {texts[0].replace('_', ' ')}" for code, texts in wrong.items()],
        witnesses=[Shown(code, texts[0].replace("_", " ")) for code, texts in sorted(wrong.items())],
    )


def _holes(honest: Any) -> list[str]:
    """Return what is wrong with how evidence with holes, and several verdicts at once, are called."""
    found = []
    whole = honest.small_world()
    tables = {name: honest.frames(whole.tables)[name] for name in whole.tables if name != "orders"}
    damaged = honest.run_of_frames(
        config=whole.run().config,
        history_rows=honest.frame(whole.history, history.SCHEMA),
        timeline_rows=whole.run().timeline,
        series_rows=whole.run().series,
        first=tables,
    )
    judgement = judge(damaged, judges=[])
    if judgement.verdict is not Verdict.INVALID or not judgement.unchecked:
        found.append(f"a run without the table of orders is called {judgement.verdict.name}")
    accused = honest.small_world()
    accused.tables["ledger"].remove(accused.entry("out-1"))
    if (called := judge(accused.run(), judges=[]).verdict) is not Verdict.INVARIANT_VIOLATED:
        found.append(f"a run that lost an acknowledged withdrawal is called {called.name}")
    ranked = [Verdict.PASS, Verdict.SLA_MISSED, Verdict.RESIDUE, Verdict.INVALID, Verdict.ABORTED]
    ranked.append(Verdict.INVARIANT_VIOLATED)
    for mild, severe in itertools.combinations(ranked, 2):
        if worst([mild, severe]) is not severe or worst([severe, mild]) is not severe:
            found.append(f"{mild.name} and {severe.name} together are called {worst([mild, severe]).name}")
    return found


def recorded_world() -> Outcome:
    """Record the history of the honest world as a run does, read it again and judge it."""
    honest, _ = _modules()
    world = honest.small_world()
    world.snapshot_again()
    with tempfile.TemporaryDirectory() as name:
        recorder = Recorder(Path(name), "recorded", flush_interval_s=0.02)
        for record in world.history:
            kept = {key: value for key, value in record.items() if key in history.SCHEMA}
            recorder.append(cast("HistoryRecord", kept))
        recorder.close()
        whole = world.run()
        run = Run(
            config=whole.config,
            recording=history.load(Path(name)),
            timeline_rows=whole.timeline,
            series_rows=whole.series,
            first=whole.first,
            second=whole.second,
        )
        judgement = judge(run)
    first: dict[str, Shown] = {}
    for witness in judgement.witnesses:
        first.setdefault(witness.code, Shown(witness.code, witness.text, witness.key, witness.user, witness.seq))
    return Outcome(
        verdict=judgement.verdict.name,
        codes={code: count for code, count in judgement.anomalies.items() if count},
        unchecked=judgement.unchecked,
        reasons=judgement.reasons,
        witnesses=list(first.values()),
    )


WORLDS: Final[dict[str, Callable[[], Outcome]]] = {
    function.__name__: function for function in (self_test, recorded_world)
}
