"""What the plan machine draws can be run, saved and read again, and shrinks to what matters. No process is started."""

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, find, given, settings

from ledgerproof.plan import format as plans
from ledgerproof.plan.format import Plan, decode, encode
from tests.machine.plan_strategy import plans_drawn, steps_in

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def steps_of(plan: Plan) -> list[plans.Step]:
    return [step for client in plan.clients for step in client.steps]


@QUICK
@given(plans_drawn())
def test_a_drawn_plan_is_a_plan_and_survives_its_file(plan: Plan) -> None:
    assert decode(encode(plan).decode()) == plan


def shortest(violates: Callable[[Plan], bool]) -> Plan:
    return find(
        plans_drawn(),
        violates,
        settings=settings(
            max_examples=5_000,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_bug_in_replays_shrinks_to_a_command_and_its_retry() -> None:
    def violates(plan: Plan) -> bool:
        # As if a repeated deposit were posted again.
        for client in plan.clients:
            keys = plans.keys_of(client)
            deposits = {keys[i][0] for i, step in enumerate(client.steps) if isinstance(step, plans.Deposit)}
            if any(isinstance(step, plans.Retry) and step.of in deposits for step in client.steps):
                return True
        return False

    plan = shortest(violates)
    assert [type(step) for step in steps_of(plan)] == [plans.Deposit, plans.Retry]
    assert steps_of(plan)[0].amount_minor == 10  # type: ignore[union-attr] # it is a deposit


def test_a_bug_behind_a_failpoint_shrinks_to_that_failpoint_and_one_command() -> None:
    def violates(plan: Plan) -> bool:
        steps = steps_of(plan)
        dies = any(isinstance(s, plans.Arm) and s.node == "relay0" and s.action == "exit" for s in steps)
        return dies and any(isinstance(step, plans.Bet) for step in steps)

    plan = shortest(violates)
    assert [type(step) for step in steps_of(plan)] == [plans.Arm, plans.Bet]
    assert steps_of(plan)[0].skip == 0  # type: ignore[union-attr] # it is the arm


def test_a_bug_that_needs_two_clients_and_a_kill_keeps_just_those() -> None:
    def violates(plan: Plan) -> bool:
        names = {client.name for client in plan.clients if any(isinstance(s, plans.Race) for s in client.steps)}
        return names == {"a", "b"} and any(isinstance(s, plans.Kill) and s.node == "pg0" for s in steps_of(plan))

    plan = shortest(violates)
    assert sorted(type(step).__name__ for step in steps_of(plan)) == ["Heal", "Kill", "Race", "Race"]
    assert steps_in(plan) == 4
