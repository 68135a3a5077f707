"""Changes the rules and the folds in small ways and counts how often the tests notice: the mutation score.

The mutants are mutmut's. How they are run is our own (decision 0036): a mutated module is never written to disk but
served by an import hook in a forked process, in a seeded random order, so that a run can stop at any time and what
it has tried is a fair sample. A mutant is killed if a test fails or the process uses too much processor time.

    tools/mutation.py [--group rules|folds] [--minutes 40] [--limit N] [--file PART] [--again]

writes `reports/mutation.json` and `docs/mutation.md`; exit code 0 if every group tried reaches its goal, 20 if not,
2 for wrong usage.
`--again` tries the stored survivors once more and leaves the rest as it was.
"""

import argparse
import difflib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import re
import resource
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper
from mutmut.mutation.file_mutation import Mutation, MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "tools" / "mutation.toml"
REASONS = ROOT / "tools" / "mutation-survivors.toml"
REPORT = ROOT / "reports" / "mutation.json"
PAGE = ROOT / "docs" / "mutation.md"
SEED = 36
MINUTES = 40.0
CPU_S = 300
"""Processor time after which a mutant counts as one that never ends; all tests of a group take a third of it. By the
clock a busy machine would kill them."""
WALL_S = 1800.0
"""A child that takes longer by the clock is ended, and its mutant counts as not tried."""
PAGE_HEAD = """# Mutation score

Written by `make mutation` (`tools/mutation.py`); the figures are in `reports/mutation.json`, how it is done in
[decision 36](decisions/0036-mutants-of-mutmut-run-in-forks.md). A survivor is a change that no test noticed.
"""
OTHERS = "not test_planted_bug_is_named_by_its_code"
SHOWN = ("file", "line", "function", "change")
PLUGINS = ("_hypothesis_pytestplugin", "pytest_asyncio.plugin", "pytest_timeout")
_CODE = re.compile(r"^([av]\d\d)_")
_TESTS_FAILED, _NO_TESTS = 1, 5


@dataclass(frozen=True)
class Mutant:
    """One small change of one file."""

    file: str
    line: int
    function: str
    change: str
    """The removed and the added lines of the source."""
    code: str
    """The whole mutated module."""
    first: str
    """An expression of pytest's -k for the tests to ask first; empty: none."""
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is, for the report and for the list of reasons."""
        return f"{self.file}:{self.function}: {self.change}"


class _Visitor(MutationVisitor):
    """mutmut's visitor; it leaves decorated functions out because its trampolines cannot hold them, ours can."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            names = [item.decorator.value for item in node.decorators if isinstance(item.decorator, cst.Name)]
            if names == ["property"]:
                return False
        return super()._skip_node_and_children(node)


@dataclass(frozen=True)
class Candidate:
    """A mutant that is not built yet: building takes a walk over its whole file."""

    file: str
    function: str
    module: cst.Module
    mutation: Mutation
    tests: tuple[str, ...]

    def build(self) -> Mutant:
        """Return the mutant."""
        changed = deep_replace(self.module, self.mutation.original_node, self.mutation.mutated_node)
        assert isinstance(changed, cst.Module)
        code = changed.code
        lines = list(difflib.unified_diff(self.module.code.splitlines(), code.splitlines(), lineterm="", n=0))
        line = int(re.findall(r"-(\d+)", lines[2])[0])
        change = " | ".join(" ".join(each.split()) for each in lines[3:] if not each.startswith("@@"))
        return Mutant(self.file, line, self.function, change, code, self.first, self.tests)

    @property
    def first(self) -> str:
        """The tests that are named after the codes of this function, or of those that call it."""
        callers = re.split(r"^def ", self.module.code, flags=re.MULTILINE)[1:]
        codes = {each[:3].upper() for each in callers if _CODE.match(each) and f"{self.function}(" in each}
        return " or ".join(sorted(codes))


def candidates_of(path: Path, tests: Sequence[str]) -> Iterator[Candidate]:
    """Yield every mutant of a file's functions; the changes of a module's constants are left out."""
    file = str(path.relative_to(ROOT))
    wrapper = MetadataWrapper(cst.parse_module(path.read_text()))
    visitor = _Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    module = wrapper.visit(visitor)
    for mutation in visitor.mutations:
        owner = mutation.contained_by_top_level_function
        if isinstance(owner, cst.FunctionDef):
            yield Candidate(file, owner.name.value, module, mutation, tuple(tests))


class _Served(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another source."""

    def __init__(self, mutant: Mutant) -> None:
        self._name = mutant.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self._path = ROOT / mutant.file
        self._code = mutant.code

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Answer for the mutated module only."""
        if fullname != self._name:
            return None
        package = self._path.name == "__init__.py"
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=str(self._path), is_package=package)
        spec.has_location = True
        if package:
            spec.submodule_search_locations = [str(self._path.parent)]
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """Run the mutated source as the module."""
        exec(compile(self._code, str(self._path), "exec"), module.__dict__)  # noqa: S102 - that is what it is for


def _test(mutant: Mutant | None, arguments: Sequence[str]) -> int:
    """Run pytest in a forked process on the mutated module and return its exit code; -1 when it was ended."""
    pid = os.fork()
    if pid == 0:
        _child(mutant, arguments)
    deadline = time.monotonic() + WALL_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return -1 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError
        time.sleep(0.02)


def _child(mutant: Mutant | None, arguments: Sequence[str]) -> None:
    code = _TESTS_FAILED
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if mutant is not None:
            # Of a run without a mutant, which must pass, everything is shown.
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            sys.meta_path.insert(0, _Served(mutant))
        sys.path.insert(0, str(ROOT))
        import pytest  # noqa: PLC0415 - the parent has it loaded; its state stays in the child

        # Only the plugins that these tests need: some take longer to load than a mutant takes to be killed.
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        quiet = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants"]
        quiet += [option for plugin in PLUGINS for option in ("-p", plugin)]
        # What was loaded before is not rewritten by pytest, and need not be.
        quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = int(pytest.main([*quiet, *arguments]))
    finally:
        # Whatever happened in the child, nothing of the parent may run in it.
        os._exit(code)


def fate_of(mutant: Mutant) -> str:
    """Return killed, timeout or survived."""
    # The planted bugs of other codes say of this one only that it stays silent, as many other tests do.
    for choice in (["-k", mutant.first], ["-k", OTHERS]) if mutant.first else ([],):
        code = _test(mutant, [*choice, *mutant.tests])
        if code == -1:
            return "timeout"
        if code not in (0, _NO_TESTS):
            return "killed"
    return "survived"


def _warm_up() -> None:
    """Load what every child needs and what is not ours: it is then loaded once."""
    import hypothesis.stateful  # noqa: PLC0415
    import msgspec  # noqa: PLC0415
    import numpy  # noqa: PLC0415
    import polars  # noqa: PLC0415
    import pytest  # noqa: PLC0415

    for module in (hypothesis, msgspec, numpy, polars, pytest, *map(importlib.import_module, PLUGINS)):
        assert module.__name__ in sys.modules
    ours = [name for name in sys.modules if name.split(".")[0] in ("reference", "invariants", "tests")]
    assert not ours, f"a mutated module would not be loaded: {ours}"


def _try(mutants: Sequence[Candidate], minutes: float, jobs: int) -> list[dict[str, Any]]:
    """Try mutants in their order, `jobs` at a time, until all are tried or the time is over."""
    deadline = time.monotonic() + minutes * 60 if minutes else float("inf")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    waiting, rows = list(mutants), []
    running: dict[int, tuple[Mutant, int]] = {}
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < deadline:
            mutant = waiting.pop(0).build()
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.setpgrp()
                try:
                    os.write(writing, fate_of(mutant).encode())
                finally:
                    os._exit(0)
            os.close(writing)
            running[pid] = (mutant, reading)
        if time.monotonic() >= deadline:
            waiting.clear()
        if not running:
            break
        try:
            pid, _ = os.wait()
        except KeyboardInterrupt:
            # What is being tried is given up; what was tried counts.
            for child in running:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            break
        mutant, reading = running.pop(pid)
        fate = os.read(reading, 100).decode()
        os.close(reading)
        if not fate:
            continue  # Ended by the clock: not tried.
        row = {key: value for key, value in asdict(mutant).items() if key in SHOWN} | {"fate": fate}
        rows.append(row)
        alive = sum(row["fate"] == "survived" for row in rows)
        print(f"\r  {len(rows)} of {len(mutants)} tried, {alive} survived ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def _summary(group: dict[str, Any], rows: list[dict[str, Any]], total: int) -> dict[str, Any]:
    reasons = _reasons()
    fates = [row["fate"] for row in rows]
    survivors = [row for row in rows if row["fate"] == "survived"]
    for row in survivors:
        row["reason"] = reasons.get(f"{row['file']}:{row['function']}: {row['change']}", "")
    equivalent = sum(row["reason"].startswith("equivalent") for row in survivors)
    killed = fates.count("killed") + fates.count("timeout")
    return {
        "title": group["title"],
        "goal": group["goal"],
        "mutants": total,
        "tried": len(rows),
        "seed": SEED,
        "killed": killed,
        "of_them_never_ended": fates.count("timeout"),
        "survived": len(survivors),
        "of_them_equivalent": equivalent,
        "score": round(killed / len(rows), 4) if rows else 0.0,
        "score_without_equivalent": round(killed / (len(rows) - equivalent), 4) if len(rows) > equivalent else 0.0,
        "files": {
            file: {
                "tried": sum(row["file"] == file for row in rows),
                "survived": sum(row["file"] == file for row in survivors),
            }
            for file in sorted({row["file"] for row in rows})
        },
        "survivors": sorted(survivors, key=lambda row: (row["file"], row["line"], row["change"])),
    }


def page_of(report: dict[str, Any]) -> str:
    """Return docs/mutation.md for a report."""
    parts = [PAGE_HEAD]
    for name in sorted(report, reverse=True):
        group = report[name]
        tried = "all" if group["tried"] == group["mutants"] else f"{group['tried']} (seed {group['seed']})"
        parts.append(
            f"## {group['title']}\n\n"
            f"{group['mutants']} mutants, {tried} tried: {group['killed']} killed, {group['survived']} survived, of"
            f" them {group['of_them_equivalent']} equivalent to the original. Score {group['score']:.1%}, without the"
            f" equivalent ones {group['score_without_equivalent']:.1%}; the goal is {group['goal']:.0%}.\n\n"
            "| file | tried | survived |\n|---|---|---|\n"
            + "".join(f"| `{file}` | {n['tried']} | {n['survived']} |\n" for file, n in group["files"].items())
        )
        for row in group["survivors"]:
            change = row["change"].replace(" | +", "\n+").replace(" | -", "\n-")
            reason = row["reason"] or "no test yet"
            parts.append(f"`{row['file']}`, `{row['function']}`: {reason}\n\n```diff\n{change}\n```\n")
    return "\n".join(parts)


def _reasons() -> dict[str, str]:
    """Why a survivor is left alive, by its name."""
    if not REASONS.exists():
        return {}
    listed = tomllib.loads(REASONS.read_text())["survivor"]
    return {change: entry["reason"] for entry in listed for change in entry["changes"]}


def _run_group(name: str, group: dict[str, Any], options: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    paths = {path: tests for pattern, tests in group["tests"].items() for path in sorted(ROOT.glob(pattern))}
    mutants = [mutant for path, tests in paths.items() for mutant in candidates_of(path, tests)]
    random.Random(SEED).shuffle(mutants)  # noqa: S311 - a sample, not a secret
    chosen = [mutant for mutant in mutants if options.file in mutant.file]
    if options.again:
        left = {(row["file"], row["function"], row["change"]) for row in stored.get("survivors", [])}
        near = {name[:2] for name in left}
        built = [(each, each.build()) for each in chosen if (each.file, each.function) in near]
        chosen = [each for each, mutant in built if (mutant.file, mutant.function, mutant.change) in left]
    chosen = chosen[: options.limit or None]
    print(f"{group['title']}: {len(mutants)} mutants, {len(chosen)} to try", file=sys.stderr)
    every = sorted({test for mutant in chosen for test in mutant.tests})
    if every and not options.tests_pass and _test(None, every) != 0:
        sys.exit(f"{name}: the tests fail without any mutant: run pytest {' '.join(every)}")
    rows = _try(chosen, options.minutes, options.jobs)
    if options.again:
        return _merged(stored, rows, len(mutants), group)
    return _summary(group, rows, len(mutants))


def _merged(stored: dict[str, Any], rows: list[dict[str, Any]], total: int, group: dict[str, Any]) -> dict[str, Any]:
    """Return the stored result with its survivors as they are now."""
    again = {(row["file"], row["function"], row["change"]): row for row in rows}
    kept = [again.get((row["file"], row["function"], row["change"]), row) for row in stored["survivors"]]
    dead = [
        {"file": file, "fate": "killed"}
        for file, counts in stored["files"].items()
        for _ in range(counts["tried"] - counts["survived"])
    ]
    merged = _summary(group, kept + dead, total)
    merged["of_them_never_ended"] = stored["of_them_never_ended"]
    return merged


def main() -> int:
    """Run the groups asked for and write the report."""
    groups = tomllib.loads(CONFIG.read_text())
    parser = argparse.ArgumentParser(description="Mutation score of the rules and the folds.")
    parser.add_argument("--group", choices=sorted(groups), action="append", help="only this group (may be repeated)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of each group at most; 0: until all are tried")
    parser.add_argument("--limit", type=int, default=0, help="mutants of each group at most; 0: no limit")
    parser.add_argument("--file", default="", help="only files whose path contains this")
    parser.add_argument("--again", action="store_true", help="only the survivors of the stored report")
    parser.add_argument("--tests-pass", action="store_true", help="the tests were just run: not once more before")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants tried at the same time")
    options = parser.parse_args()
    os.nice(5)
    _warm_up()
    stored = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    reached = True
    for name in options.group or groups:
        result = _run_group(name, groups[name], options, stored.get(name, {}))
        # Another run may have written its group meanwhile.
        stored = (json.loads(REPORT.read_text()) if REPORT.exists() else {}) | {name: result}
        reached = reached and result["score_without_equivalent"] >= result["goal"]
        print(
            f"{result['title']}: score {result['score']:.1%} (goal {result['goal']:.0%}), {result['killed']} of"
            f" {result['tried']} tried were killed; of {result['mutants']} mutants"
        )
        REPORT.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
        PAGE.write_text(page_of(stored))
    return 0 if reached else 20


if __name__ == "__main__":
    sys.exit(main())
