"""A29: the life of each match and order, step by step."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from invariants.judges.replay.case import Case, Finding, Row

NEXT: Final[dict[str | None, set[str]]] = {
    None: {"OPEN"},
    "OPEN": {"CLOSED", "VOID"},
    "CLOSED": {"SETTLING", "VOID"},
    "SETTLING": {"SETTLED", "VOID"},
    "SETTLED": {"SETTLING"},
    "VOID": {"SETTLING"},
}
"""State of a match → the states it may go to; from SETTLING to VOID only when it is settled again."""


def a29_illegal_transition(case: Case) -> Iterator[Finding]:
    """A29: a step, a state, a settlement or a trade that the life of a match does not allow."""
    steps: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(case.table("transitions"), key=lambda t: (t["match_id"], t["transition_no"])):
        steps[row["match_id"]].append(row)
    for match_id, mine in steps.items():
        yield from _walk(match_id, mine)
    for match in case.table("matches"):
        last = steps[match["match_id"]][-1]["to_state"] if steps[match["match_id"]] else None
        if match["state"] != last:
            text = f"match {match['match_id']} is {match['state']}; its last step led to {last}"
            yield Finding("A29", text, {"match_id": match["match_id"]})
    yield from _settlements(case)
    state_of = {match["match_id"]: match["state"] for match in case.table("matches")}
    for order in case.table("orders"):
        if not _state_fits(order, state_of.get(order["match_id"])):
            text = (
                f"order {order['bet_id']} is {order['state']} with {order['matched_stake']} matched and"
                f" {order['cancelled_stake']} cancelled of {order['stake']}; its match is"
                f" {state_of.get(order['match_id'])}"
            )
            yield Finding("A29", text, {"bet_id": order["bet_id"], "user": order["user_id"]})
    yield from _trades(case, steps)


def _walk(match_id: str, steps: list[Row]) -> Iterator[Finding]:
    stands: str | None = None
    number: int | None = None
    version = 0
    for row in steps:
        came, went = row["from_state"], row["to_state"]
        # A settlement begins where a match leaves for SETTLING, or for VOID without having been settled.
        version += went == "SETTLING" or (went == "VOID" and came != "SETTLING")
        wrong = []
        if went not in NEXT.get(came, set()):
            wrong.append("there is no such step")
        if came == "SETTLING" and went == "VOID" and row["settlement_version"] < 2:
            wrong.append("the first settlement does not end as void")
        if came != stands:
            wrong.append(f"it stood in {stands}")
        if number is not None and row["transition_no"] != number + 1:
            wrong.append(f"the step before had number {number}")
        if row["settlement_version"] != version:
            wrong.append(f"it is the settlement {version}")
        if wrong:
            text = f"match {match_id} went {came} → {went} (step {row['transition_no']}): {'; '.join(wrong)}"
            yield Finding("A29", text, {"match_id": match_id})
        stands, number, version = went, row["transition_no"], row["settlement_version"]


def _settlements(case: Case) -> Iterator[Finding]:
    for match_id, rulings in case.rulings.items():
        before: Row | None = None
        for row in rulings:
            next_version = 1 if before is None else before["settlement_version"] + 1
            same = before is not None and (row["kind"], row["result"]) == (before["kind"], before["result"])
            if same or row["settlement_version"] != next_version:
                text = (
                    f"match {match_id} was settled as {row['result'] or row['kind']} under version"
                    f" {row['settlement_version']}: not the next version, or no change"
                )
                yield Finding("A29", text, {"match_id": match_id})
            before = row


def _state_fits(order: Row, match_state: str | None) -> bool:
    matched, cancelled, stake = order["matched_stake"], order["cancelled_stake"], order["stake"]
    rules: dict[str, bool] = {
        "PENDING": matched == 0 and cancelled == 0,
        "PART_MATCHED": 0 < matched < stake and cancelled == 0,
        "MATCHED": matched > 0 and matched + cancelled == stake,
        "CANCELLED": cancelled > 0 and matched + cancelled == stake,
        "SETTLED": match_state in ("SETTLING", "SETTLED"),
        "VOID": match_state in ("VOID", "SETTLING"),
    }
    return rules.get(order["state"], False)


def _trades(case: Case, steps: dict[str, list[Row]]) -> Iterator[Finding]:
    closed = {
        match_id: min(times)
        for match_id, rows in steps.items()
        if (times := [row["at"] for row in rows if row["to_state"] in ("CLOSED", "VOID")])
    }
    for fill in case.table("fills"):
        place = {"match_id": fill["match_id"], "fill_no": fill["fill_no"], "user": fill["back_user"]}
        name = f"fill {fill['fill_no']} of match {fill['match_id']}"
        if fill["match_id"] in closed and fill["filled_at"] > closed[fill["match_id"]]:
            yield Finding("A29", f"{name} is younger than the close of its match", place)
        if fill["back_user"] == fill["lay_user"]:
            yield Finding("A29", f"{name} has user {fill['back_user']} on both sides", place)
    for order in case.table("orders"):
        late = order["match_id"] in closed and order["arrived_at"] > closed[order["match_id"]]
        if late and order["cancelled_stake"] == 0:
            text = f"order {order['bet_id']} arrived after its match closed and was kept"
            yield Finding("A29", text, {"bet_id": order["bet_id"], "user": order["user_id"]})
