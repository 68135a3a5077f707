"""A campaign runs every plan once, goes on where it was stopped, keeps what is red and counts nothing twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from invariants.verdict import Verdict
from ledgerproof import campaign
from ledgerproof.campaign import Campaign, Workshop, draw_plan, kind_of
from ledgerproof.options import EnvironmentProblem, Options
from ledgerproof.progress import Progress

SATURATED = "saturated: held 20 of 40 bets/s; the generator fell too far behind its schedule and stopped"


def verdict_of(verdict: Verdict, reasons: list[str] | None = None, **anomalies: int) -> dict[str, Any]:
    return {
        "verdict": verdict.name,
        "exit_code": int(verdict),
        "reasons": reasons or [],
        "anomalies": {"A01": 0} | anomalies,
        "witnesses": [{"code": code, "text": "seen"} for code in anomalies],
        "acknowledged_bets": 10,
    }


class Service:
    """Stands in for the main job: says what it is told to and leaves a run folder as the main job does."""

    def __init__(self, answer: Callable[[int], dict[str, Any]]) -> None:
        self.answer = answer
        self.seen: list[Options] = []

    def __call__(self, options: Options, _: Progress) -> tuple[Path, dict[str, Any]]:
        self.seen.append(options)
        folder = options.out / f"run-{len(self.seen)}"
        folder.mkdir(parents=True)
        (folder / "verdict.json").write_text("{}")
        return folder, self.answer(len(self.seen))


def begun(plans: int) -> Campaign:
    return Campaign(seed=5, plans=plans, commit="abc", version="1", machine={})


def shop(tmp_path: Path, service: Service) -> Workshop:
    return Workshop(service, Progress(quiet=True), tmp_path / "runs", tmp_path / "state", audit=True)


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "runs").iterdir())


def test_silent_plans_are_counted_and_their_folders_removed(tmp_path: Path) -> None:
    service = Service(lambda call: verdict_of(Verdict.SLA_MISSED if call == 2 else Verdict.PASS))
    work, path = begun(3), tmp_path / "campaign.json"
    assert campaign.run(work, path, shop(tmp_path, service)) is Verdict.PASS
    assert (work.count("silent"), work.count("red")) == (3, 0)
    assert folders(tmp_path) == []
    assert [row["verdict"] for row in json.loads(path.read_text())["rows"]] == ["PASS", "SLA_MISSED", "PASS"]
    assert all(options.audit for options in service.seen)


def test_the_first_red_plan_ends_it_and_its_run_is_kept(tmp_path: Path) -> None:
    service = Service(
        lambda call: verdict_of(Verdict.INVARIANT_VIOLATED, A09=1) if call == 2 else verdict_of(Verdict.PASS)
    )
    work = begun(9)
    assert campaign.run(work, tmp_path / "c.json", shop(tmp_path, service)) is Verdict.INVARIANT_VIOLATED
    assert len(service.seen) == 2
    assert folders(tmp_path) == ["run-2"]
    assert work.rows[-1].anomalies == {"A09": 1}
    assert work.rows[-1].witnesses == [{"code": "A09", "text": "seen"}]
    # The same command again does not run past what is red.
    assert campaign.run(work, tmp_path / "c.json", shop(tmp_path, service)) is Verdict.INVARIANT_VIOLATED
    assert len(service.seen) == 2


def test_a_stopped_campaign_goes_on_with_the_plan_that_was_under_way(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    first = Service(lambda call: verdict_of(Verdict.ABORTED if call == 3 else Verdict.PASS))
    assert campaign.run(begun(5), path, shop(tmp_path, first)) is Verdict.ABORTED
    second = Service(lambda _: verdict_of(Verdict.PASS))
    work = campaign.load(path, begun(5))
    assert campaign.run(work, path, shop(tmp_path / "again", second)) is Verdict.PASS
    assert [row.plan.number for row in work.rows] == [1, 2, 3, 4, 5]
    assert [options.seed for options in second.seen] == [draw_plan(5, number).seed for number in (3, 4, 5)]


def test_plans_that_prove_nothing_stop_it_when_they_come_in_a_row_and_are_run_again_later(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    service = Service(lambda call: verdict_of(*((Verdict.PASS,) if call == 1 else (Verdict.INVALID, [SATURATED]))))
    work = begun(9)
    assert campaign.run(work, path, shop(tmp_path, service)) is Verdict.INVALID
    assert [row.kind for row in work.rows] == ["silent", "unproven", "unproven", "unproven"]
    well = Service(lambda _: verdict_of(Verdict.PASS))
    resumed = campaign.load(path, begun(5))
    assert campaign.run(resumed, path, shop(tmp_path / "again", well)) is Verdict.PASS
    assert [row.plan.number for row in resumed.rows] == [1, 2, 3, 4, 5]
    assert len(well.seen) == 4


def test_a_load_the_machine_cannot_carry_is_tried_twice_and_proves_nothing(tmp_path: Path) -> None:
    service = Service(lambda call: verdict_of(*((Verdict.PASS,) if call > 2 else (Verdict.INVALID, [SATURATED]))))
    work = begun(2)
    assert campaign.run(work, tmp_path / "c.json", shop(tmp_path, service)) is Verdict.INVALID
    assert [(row.kind, row.tries) for row in work.rows] == [("unproven", 2), ("silent", 1)]


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [
        (verdict_of(Verdict.PASS), "silent"),
        (verdict_of(Verdict.SLA_MISSED, ["service level missed: p99"]), "silent"),
        (verdict_of(Verdict.INVALID, [SATURATED, "service level missed: p99"]), "unproven"),
        (verdict_of(Verdict.INVALID, ["not drained within 60 s", "A26 skipped: 2 times (not at rest)"]), "unproven"),
        (verdict_of(Verdict.INVARIANT_VIOLATED, ["A01 lost: 1 time"]), "red"),
        (verdict_of(Verdict.RESIDUE, ["left behind: a process"]), "red"),
    ],
)
def test_only_what_found_nothing_is_silent(verdict: dict[str, Any], kind: str) -> None:
    assert kind_of(verdict) == kind


@pytest.mark.parametrize("other", [{"seed": 6}, {"commit": "def"}])
def test_rows_of_another_seed_or_commit_are_not_counted_with_these(tmp_path: Path, other: dict[str, Any]) -> None:
    path = tmp_path / "c.json"
    campaign.save(path, begun(2))
    with pytest.raises(EnvironmentProblem, match="--fresh"):
        campaign.load(path, msgspec.structs.replace(begun(2), **other))


def test_a_stack_that_does_not_come_up_is_tried_once_more(tmp_path: Path) -> None:
    def answer(call: int) -> dict[str, Any]:
        if call == 1 or call > 2:
            raise EnvironmentProblem("a server did not start")
        return verdict_of(Verdict.PASS)

    service, path, work = Service(answer), tmp_path / "c.json", begun(2)
    with pytest.raises(EnvironmentProblem, match="did not start"):
        campaign.run(work, path, shop(tmp_path, service))
    assert [(row.kind, row.tries) for row in work.rows] == [("silent", 2)]
    assert len(service.seen) == 4


def test_plans_follow_from_the_seed_and_differ() -> None:
    plans = [draw_plan(5, number) for number in range(1, 101)]
    assert plans == [draw_plan(5, number) for number in range(1, 101)]
    assert len({plan.seed for plan in plans}) == 100
    assert {plan.faults for plan in plans} == {"standard", "none"}
    assert {plan.servers for plan in plans} == {1, 2, 3, 4}
