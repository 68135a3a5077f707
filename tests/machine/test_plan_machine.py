"""The plan machine: drawn plans executed on a real stack, which stays up from plan to plan.

Every plan has wallets and matches of its own and is judged like any run. A plan that breaks a rule is shrunk, and the
shortest is left as a file for `ledgerproof replay-plan`. In `ci` a few plans, always the same; in `nightly` many.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from compose.stack import Stack
from ledgerproof.plan import format as plans
from ledgerproof.plan.runner import PlanOptions, run_plan
from ledgerproof.progress import Progress
from tests.machine.plan_strategy import SHAPE, plans_drawn

ROOT = Path(__file__).parents[2]
CI_PLANS = 4
NIGHTLY_PLANS = 150
NIGHTLY = "nightly"


class Stage:
    """A stack that plans use in turn; one that a plan broke for good is replaced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._stack: Stack | None = None
        self.verdicts: list[str] = []
        self.smallest = root / "smallest-plan.json"
        """The newest plan that broke a rule: in the end the shortest that was found."""

    def play(self, plan: plans.Plan) -> dict[str, Any]:
        """Run a plan and return its verdict; of a plan that broke a rule the file and the run folder are kept."""
        if self._stack is None:
            self._stack = Stack.start(SHAPE.spec(), self.root)
        options = PlanOptions(out=self.root / "runs", stack=self._stack, report=False)
        folder, verdict = run_plan(plan, options, Progress())
        self.verdicts.append(verdict["verdict"])
        if verdict["verdict"] == "INVARIANT_VIOLATED":
            self.smallest.write_bytes(plans.encode(plan))
        else:
            shutil.rmtree(folder)
        found = verdict["reconciliation"] is None or verdict["reconciliation"]["findings"]
        if verdict["verdict"] not in {"PASS", "INVARIANT_VIOLATED"} or found:
            # What is late, or paused because of a finding, must not meet the next plan; what is merely wrong is left
            # out of its evidence.
            self.close()
        return verdict

    def close(self) -> None:
        """Take the stack down."""
        if self._stack is not None:
            stack, self._stack = self._stack, None
            assert stack.down() == []


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    # Not below a temporary folder: that may be memory, and fsync must be real.
    root = ROOT / ".ledgerproof" / "tests" / f"plans-{os.getpid()}"
    root.mkdir(parents=True)
    made = Stage(root)
    try:
        yield made
    finally:
        made.close()
        if not made.smallest.exists():
            shutil.rmtree(root)


def search(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=settings.get_current_profile_name() != NIGHTLY,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        # Explaining runs each part of the shortest plan again many times over: not with real processes.
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.mark.timeout(6 * 3600)
def test_no_plan_breaks_a_rule(stage: Stage) -> None:
    examples = NIGHTLY_PLANS if settings.get_current_profile_name() == NIGHTLY else CI_PLANS

    @search(examples)
    @given(plans_drawn())
    def play(plan: plans.Plan) -> None:
        verdict = stage.play(plan)
        assert verdict["verdict"] != "INVARIANT_VIOLATED", (
            f"{verdict['reasons']}: run `ledgerproof replay-plan {stage.smallest}`"
        )

    play()
    # On a machine that does other work a plan may prove nothing (not drained in time, say); all of them must not.
    assert stage.verdicts.count("PASS") > len(stage.verdicts) // 2, stage.verdicts
