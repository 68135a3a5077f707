"""Plans: what they may say, and that everything else is refused with its place."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from ledgerproof.plan import format as plans
from ledgerproof.plan.format import PlanError, decode, encode, load
from ledgerproof.plan.places import command_of, place
from reference.routing import even_routing, shard_of, shard_of_match

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "tests/plans").glob("*"))


def plan_of(*steps: dict[str, Any], **changes: Any) -> str:
    plan = {
        "title": "a test",
        "wallets": [{"name": "anna"}, {"name": "ben"}],
        "matches": [{"name": "final"}],
        "clients": [{"name": "a", "steps": list(steps)}],
    }
    return json.dumps(plan | changes)


BET = {"do": "bet", "wallet": "anna", "match": "final", "side": "BACK", "odds": 250, "stake_minor": 10}
DEPOSIT = {"do": "deposit", "wallet": "anna", "amount_minor": 10}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_the_plans_of_this_repository_are_plans(path: Path) -> None:
    plan = load(path)
    assert decode(encode(plan).decode()) == plan


def test_one_plan_takes_every_step_there_is() -> None:
    plan = load(ROOT / "tests/plans/every_step.json")
    taken = {type(step) for client in plan.clients for step in client.steps}
    assert taken == set(get_args(plans.Step))


def test_the_document_names_every_step_and_its_example_is_a_plan() -> None:
    text = (ROOT / "docs/plans.md").read_text()
    for step in get_args(plans.Step):
        assert f"`{step.__struct_config__.tag}`" in text, step
    for word in get_args(plans.Wait.__annotations__["until"]):
        assert f"`{word}`" in text, word
    example = text.split("```toml\n")[1].split("```")[0]
    assert len(decode(example, toml=True).clients[0].steps) == 6


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            plan_of({**DEPOSIT, "amount_minor": "10"}),
            r"Expected `int`, got `str` - at `.*steps\[0\].amount_minor`",
        ),
        (plan_of({**DEPOSIT, "amount_minor": 0}), r"`int` >= 1 - at `\$.clients\[0\].steps\[0\].amount_minor`"),
        (plan_of({**DEPOSIT, "amount": 1}), r"unknown field `amount` - at `\$.clients\[0\].steps\[0\]`"),
        (plan_of({**DEPOSIT, "do": "steal"}), r"Invalid value 'steal' - at `\$.clients\[0\].steps\[0\].do`"),
        (
            plan_of(DEPOSIT, {**DEPOSIT, "wallet": "bob"}),
            r"\$.clients\[0\].steps\[1\].wallet: 'bob' is not",
        ),
        (plan_of({**BET, "match": "cup"}), r"steps\[0\].match: 'cup' is not in the plan"),
        (plan_of({"do": "retry", "of": "a-7"}), r"steps\[0\].of: 'a-7' is not in the plan"),
        (plan_of({"do": "cancel", "bet": "x"}), r"steps\[0\].bet: 'x'"),
        (plan_of({"do": "race", "of": {**BET, "wallet": "bob"}}), r"steps\[0\].of.wallet: 'bob'"),
        (plan_of({"do": "bulk", "commands": [DEPOSIT, {**BET, "match": "m"}]}), r"steps\[0\].commands\[1\].match: 'm'"),
        (plan_of({"do": "repeat", "of": DEPOSIT, "times": 2, "wallets": ["x"]}), r"steps\[0\].wallets: 'x'"),
        (plan_of({**DEPOSIT, "api": 2}), "2 API processes"),
        (plan_of({"do": "race", "of": BET, "apis": [0, 3]}), "2 API processes"),
        (plan_of({**DEPOSIT, "expect": "fine"}), r"steps\[0\].expect: there is no 'fine'"),
        (plan_of({"do": "kill", "node": "pg1"}), r"steps\[0\].node: 'pg1'.*there are api0"),
        (plan_of({"do": "arm", "node": "pg0", "point": "cache.before_set", "action": "exit"}), r"node: 'pg0'"),
        (plan_of({"do": "arm", "node": "api0", "point": "nowhere", "action": "exit"}), "no failpoint 'nowhere'"),
        (plan_of({"do": "arm", "node": "api0", "point": "cache.before_set", "action": "delay"}), "delay_ms"),
        (plan_of({"do": "wait", "until": "hit", "node": "api0"}), "waiting until hit needs 'point'"),
        (plan_of({"do": "wait", "until": "drained", "node": "api0"}), "waiting until drained has no 'node'"),
        (plan_of({"do": "wait", "until": "signal", "name": "go"}), "'go' is not in the plan"),
        (plan_of({"do": "wait", "until": "dead", "node": "kafka", "timeout_s": 0}), "`float` > 0"),
        (plan_of({"do": "settle_match", "match": "final", "result": "NOBODY"}), "has the outcomes HOME, DRAW, AWAY"),
        (plan_of({"do": "move_shard", "wallet": "anna", "to": 1}), "the stack has 1 servers"),
        (plan_of(wallets=[{"name": "a"}, {"name": "a"}]), r"\$.wallets\[1\].name: 'a' is there already"),
        (plan_of(wallets=[{"name": "a", "server": 1}]), r"\$.wallets\[0\].server"),
        (plan_of(matches=[{"name": "final", "ends": "soon"}]), r"\$.matches\[0\].ends"),
        (plan_of(requires={"waive": ["V03"]}), r"V03.*requires.waive"),
        (plan_of(requires={"sometimes": ["pigs fly"]}), "there is no 'pigs fly'"),
        (plan_of(stack={"servers": 9}), r"\$.stack.servers"),
        (plan_of(clients=[]), r"\$.clients"),
        (plan_of(seeds=1), "unknown field `seeds`"),
        ('{"title": "x",\n\n "clients": [,]}', "line 3"),
    ],
)
def test_what_a_plan_may_not_say_is_refused_with_its_place(text: str, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        decode(text)


def test_a_mistake_in_toml_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('title = "x"\nseed = \n')
    with pytest.raises(PlanError, match="line 2") as raised:
        load(path)
    assert str(path) in str(raised.value)
    with pytest.raises(PlanError, match="cannot read"):
        load(tmp_path / "absent.toml")


def test_names_become_ids_on_the_servers_that_were_asked_for() -> None:
    text = plan_of(
        stack={"servers": 2},
        wallets=[{"name": name, "server": server} for name, server in (("a", 1), ("b", 1), ("c", 0))],
        matches=[{"name": "m", "server": 1}, {"name": "n", "server": 0}, {"name": "o"}, {"name": "p"}],
    )
    plan, routing = decode(text), even_routing(2)
    found = place(plan, routing, 1, "", 0.0)
    assert [routing[shard_of(found.users[name])] for name in "abc"] == [1, 1, 0]
    from uuid import UUID

    assert [routing[shard_of_match(UUID(found.matches[name]))] for name in "mnop"] == [1, 0, 0, 1]
    assert len(set(found.users.values())) == 3
    assert found == place(plan, routing, 1, "", 0.0), "the same arguments, the same ids"
    later = place(plan, routing, 50, "-x", 0.0)
    assert not set(later.users.values()) & set(found.users.values())
    assert not set(later.matches.values()) & set(found.matches.values())
    assert later.prefix != found.prefix


def test_match_commands_go_where_the_interface_has_them() -> None:
    plan = decode(plan_of())
    found = place(plan, even_routing(1), 1, "", 0.0)
    id_ = found.matches["final"]
    for step, path, body in (
        (plans.CloseMatch(match="final"), f"/v1/matches/{id_}/close", {}),
        (plans.VoidMatch(match="final"), f"/v1/matches/{id_}/void", {}),
        (plans.SettleMatch(match="final", result="DRAW"), f"/v1/matches/{id_}/settle", {"result": "DRAW"}),
        (
            plans.ResettleMatch(match="final", corrects_version=1),
            f"/v1/matches/{id_}/resettle",
            {"result": None, "corrects_version": 1},
        ),
    ):
        command = command_of(step, found, "key")
        assert (command.op, command.path) == (step.__struct_config__.tag, path)
        assert json.loads(command.body or b"") == body
