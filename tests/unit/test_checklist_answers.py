"""The checklist without a stack: what becomes of an answer, exit codes, and the arithmetic of its metrics."""

import asyncio
import json
import math
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from compose.errors import NodeDied
from ledgerproof import cli
from ledgerproof.checklist import run as checklist_run
from ledgerproof.checklist.breaking import on_call
from ledgerproof.checklist.catalogue import BEFORE, IN, ITEMS, NAMES
from ledgerproof.checklist.command import exit_code
from ledgerproof.checklist.item import CANNOT, FAILED, OK, Answer, CannotRun, Failed, Item, Seen
from ledgerproof.checklist.looking import statuses
from ledgerproof.checklist.run import Checked, ask
from ledgerproof.checklist.site import Site, answered, quantile_bound, samples_of
from ledgerproof.wire import Lost, Reply

NOWHERE = cast(Site, None)
"""For checks that look at nothing."""


def checked(*results: str, residue: list[str] | None = None) -> Checked:
    answers = [Answer(f"i{n}", BEFORE, f"Item {n}", result, "seen", 0.1) for n, result in enumerate(results)]
    return Checked(
        stack="s",
        own=True,
        shape="2 servers",
        made_at="now",
        commit="abc",
        machine="X",
        answers=answers,
        residue=residue or [],
    )


def test_every_item_of_the_architecture_is_there_in_its_order() -> None:
    said = [item.title for item in ITEMS if item.section == BEFORE]
    assert said[0] == "Schema with all partitions created"
    assert said[-1] == "Chaos test: kill 20% of pods, verify recovery"
    assert (len(said), sum(item.section == IN for item in ITEMS)) == (8, 6)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(
    ("raised", "result", "evidence"),
    [
        (None, OK, "looked"),
        (Failed("3 are missing"), FAILED, "3 are missing"),
        (CannotRun("one machine"), CANNOT, "one machine"),
        (Lost("reset"), FAILED, "the check ran into Lost: reset"),
        (NodeDied("pg0 is gone"), FAILED, "the check ran into NodeDied: pg0 is gone"),
        (ConnectionRefusedError("no"), FAILED, "the check ran into ConnectionRefusedError: no"),
    ],
)
def test_an_item_is_ok_only_if_its_check_came_to_its_end(raised: Exception | None, result: str, evidence: str) -> None:
    async def check(_site: Site) -> str:
        if raised is not None:
            raise raised
        return "looked"

    ticks = count()
    answer = asyncio.run(ask(Item("x", BEFORE, "An item", check), NOWHERE, lambda: float(next(ticks))))
    assert (answer.result, answer.evidence, answer.took_s) == (result, evidence, 1.0)


def test_figures_of_a_check_are_kept() -> None:
    async def check(_site: Site) -> Seen:
        return Seen("killed", {"api_ready_s": 2.5})

    answer = asyncio.run(ask(Item("x", BEFORE, "An item", check), NOWHERE, lambda: 0.0))
    assert (answer.result, answer.evidence, answer.figures) == (OK, "killed", {"api_ready_s": 2.5})


def test_a_bug_of_a_check_is_not_an_answer() -> None:
    async def check(_site: Site) -> str:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(ask(Item("x", BEFORE, "An item", check), NOWHERE, lambda: 0.0))


def test_people_are_not_checked() -> None:
    assert asyncio.run(ask(Item("x", IN, "On call", on_call), NOWHERE, lambda: 0.0)).result == CANNOT


def test_exit_codes() -> None:
    assert exit_code(checked(OK, CANNOT), strict=False) == 0
    assert exit_code(checked(OK, CANNOT), strict=True) == 30
    assert exit_code(checked(OK, CANNOT, FAILED), strict=True) == 10
    assert exit_code(checked(OK, residue=["a process"]), strict=True) == 50


def test_a_quantile_of_a_histogram_is_the_edge_of_its_bucket() -> None:
    text = "".join(
        f'h_bucket{{le="{edge}",route="{route}"}} {value}\n'
        for route, values in (("a", (90, 100, 100)), ("b", (80, 95, 100)))
        for edge, value in zip(("0.1", "0.5", "+Inf"), values, strict=True)
    )
    buckets = list(samples_of(f"# TYPE h histogram\n{text}", "h_bucket"))
    assert quantile_bound(buckets, 0.5) == (0.1, 200)
    assert quantile_bound(buckets, 0.97) == (0.5, 200)
    assert quantile_bound(buckets, 0.99) == (math.inf, 200)
    assert math.isnan(quantile_bound([], 0.99)[0])


def test_answers_are_counted_by_status_and_must_be_json() -> None:
    replies = [Reply(202, False, b"{}"), Reply(503, True, b"no"), Reply(202, False, b"{}")]
    assert statuses(replies) == "202 2 times, 503 1 times"
    assert answered(replies[0]) == {}
    with pytest.raises(Failed, match="not JSON"):
        answered(replies[1])


# -- command ---------------------------------------------------------------------------------------------


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.cli, ["checklist", *arguments], standalone_mode=False)
    code = done.return_value if done.exception is None else getattr(done.exception, "exit_code", 99)
    return int(code), done.output if done.exception is None else str(done.exception)


def test_wrong_arguments_start_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checklist_run, "check", lambda *_a, **_k: pytest.fail("it began"))
    monkeypatch.chdir(tmp_path)
    code, said = call("--only", "nonsense")
    assert code == 2
    assert "there are partitions, indexes" in said
    assert "--break needs --stack" in call("--break")[1]
    assert "no stack 'none'" in call("--stack", "none")[1]


def test_items_are_printed_with_their_evidence_and_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def check(only: Any, stack: Any, _progress: Any, *, may_break: bool) -> Checked:
        asked.append((tuple(only), stack, may_break))
        return checked(OK, CANNOT)

    monkeypatch.setattr(checklist_run, "check", check)
    code, said = call("--json", str(tmp_path / "c.json"))
    assert (code, asked) == (0, [(NAMES, None, False)])
    assert "1 ok, 0 failed, 1 cannot be run here" in said
    assert said.count("seen") == 2
    stored = json.loads((tmp_path / "c.json").read_text())
    assert [answer["result"] for answer in stored["answers"]] == [OK, CANNOT]
    assert call("--strict")[0] == 30
