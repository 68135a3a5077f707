"""The committed mutation score is what its page says, reaches its goals, and explains every survivor."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutation_tool", ROOT / "tools" / "mutation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_one_of_the_report(tool: ModuleType) -> None:
    assert tool.PAGE.read_text() == tool.page_of(json.loads(tool.REPORT.read_text()))


def test_each_group_reaches_its_goal_and_each_survivor_has_a_reason(tool: ModuleType) -> None:
    report = json.loads(tool.REPORT.read_text())
    assert set(report) == {"rules", "folds"}
    for group in report.values():
        assert group["score_without_equivalent"] >= group["goal"]
        assert all(row["reason"] for row in group["survivors"])


@pytest.mark.parametrize("file", ["reference/orderbook.py", "invariants/verdict.py"])
def test_every_mutant_is_one_change_that_is_still_python(tool: ModuleType, file: str) -> None:
    source = (ROOT / file).read_text()
    candidates = list(tool.candidates_of(ROOT / file, ["tests/unit"]))
    assert len(candidates) > 50
    for candidate in candidates[::20]:
        mutant = candidate.build()
        assert mutant.code != source
        assert mutant.change
        compile(mutant.code, file, "exec")


def test_a_property_is_mutated_too(tool: ModuleType) -> None:
    functions = {each.function for each in tool.candidates_of(ROOT / "reference" / "orderbook.py", [])}
    assert {"remaining", "spent", "state", "place"} <= functions


def test_a_served_mutant_takes_the_place_of_its_module_and_a_failing_test_kills_it(tool: ModuleType) -> None:
    """In a process of its own, for the tool needs one in which nothing of ours is loaded."""
    script = """
import sys
sys.path.insert(0, "tools")
import mutation
mutation._warm_up()
sound = (mutation.ROOT / "reference/routing.py").read_text()
tests = ("tests/unit/test_vocabulary.py",)
mutant = lambda code: mutation.Mutant("reference/routing.py", 1, "shard_of", "", code, "", tests)
print(mutation.fate_of(mutant(sound)), mutation.fate_of(mutant(sound.replace("% SHARDS", "// SHARDS"))))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.split() == ["survived", "killed"]
