"""A13, A27, A28: stakes, fills and payments, worked out bet by bet with the rules of money stated once more."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from invariants.judges.replay.case import Case, Entry, Finding, Row, several
from invariants.judges.replay.plain import distinct, up


def a13_torn(case: Case) -> Iterator[Finding]:
    """A13: a bet without its stake, a stake without its bet, a fill without its orders, an order without its fills."""
    stakes: dict[tuple[int, str | None, int], list[Entry]] = {}
    for entry in case.client_entries:
        if entry.contra == "ESCROW":
            stakes.setdefault((entry.user, entry.bet_id, entry.seq), []).append(entry)
    placed = set()
    for bet in case.table("bets"):
        place = (bet["user_id"], bet["bet_id"], bet["seq"])
        placed.add(place)
        taken = [-entry.amount for entry in stakes.get(place, [])]
        if not taken or any(amount != bet["reserve"] for amount in taken):
            text = f"bet {place[1]} of user {place[0]} reserves {bet['reserve']} at seq {place[2]}; taken were {taken}"
            yield Finding("A13", text, {"bet_id": place[1], "user": place[0], "seq": place[2]})
    for place in stakes:
        if place not in placed:
            text = f"seq {place[2]} of user {place[0]} is the stake of bet {place[1]}, which is not there"
            yield Finding("A13", text, {"bet_id": place[1], "user": place[0], "seq": place[2]})
    yield from _torn_fills(case)


def _torn_fills(case: Case) -> Iterator[Finding]:
    there = {(o["bet_id"], o["match_id"], o["side"], o["user_id"], o["outcome"]) for o in case.table("orders")}
    for fill in case.table("fills"):
        for side, who in (("BACK", "back"), ("LAY", "lay")):
            bet_id, user = fill[f"{who}_bet_id"], fill[f"{who}_user"]
            if (bet_id, fill["match_id"], side, user, fill["outcome"]) not in there:
                text = f"fill {fill['fill_no']} of match {fill['match_id']} names {side} bet {bet_id} of user {user}"
                yield Finding("A13", f"{text}; there is no such order", {"bet_id": bet_id, "user": user})
    for order in case.table("orders"):
        sums = FillSums.of(case, order["bet_id"])
        if (order["matched_stake"], order["matched_liability"], order["winnings"]) != sums.as_tuple():
            text = f"order {order['bet_id']} says that other stakes were matched than its fills: {sums.as_tuple()}"
            yield Finding("A13", text, {"bet_id": order["bet_id"], "user": order["user_id"]})


@dataclass(frozen=True)
class FillSums:
    """What the fills of one bet come to, in minor units."""

    stake: int
    liability: int
    winnings: int

    @staticmethod
    def of(case: Case, bet_id: str) -> "FillSums":
        """Return the sums of a bet's fills."""
        fills = case.fills_of.get(bet_id, [])
        return FillSums(*(sum(fill[name] for fill in fills) for name in ("stake", "liability", "winnings")))

    def as_tuple(self) -> tuple[int, int, int]:
        """Return stake, liability and winnings."""
        return (self.stake, self.liability, self.winnings)


def a27_paid_twice(case: Case) -> Iterator[Finding]:
    """A27: two payouts, or two refunds, of one bet, account and version."""
    paid = [entry for entry in case.system_entries if entry.type in ("PAYOUT", "REFUND")]
    for payment, entries in several(paid, lambda e: (e.bet_id, e.type, e.contra, e.version)).items():
        bet_id, kind, contra, version = payment
        yield Finding(
            "A27",
            f"bet {bet_id} has {len(entries)} {kind} entries of version {version} against {contra}:"
            f" {[(entry.user, entry.seq) for entry in entries]}",
            {"bet_id": bet_id, "type": kind, "contra": contra, "settlement_version": version},
        )


def a28_paid_wrong(case: Case) -> Iterator[Finding]:
    """A28: a reserve, fill, cancel or payment that is not what the rules give, to the cent."""
    for bet in case.table("bets"):
        right = bet["stake"] if bet["side"] == "BACK" else up(bet["stake"] * (bet["odds"] - 100), 100)
        if bet["reserve"] != right:
            text = f"bet {bet['bet_id']} of user {bet['user_id']} reserves {bet['reserve']}; the rule says {right}"
            yield Finding("A28", text, {"bet_id": bet["bet_id"], "user": bet["user_id"], "seq": bet["seq"]})
    yield from _wrong_fills(case)
    yield from _passed_over(case)
    for bet in case.table("bets"):
        order = case.orders.get(bet["bet_id"])
        if order is not None:
            yield from _wrong_cancel(bet, order, FillSums.of(case, bet["bet_id"]))
    yield from _wrong_payments(case)


def _wrong_fills(case: Case) -> Iterator[Finding]:
    exact: dict[str, int] = {}
    """Lay bet → its liability so far in hundredths of a minor unit, not rounded."""
    fills = distinct(case.table("fills"), ("match_id", "fill_no"))
    for fill in sorted(fills, key=lambda f: (f["match_id"], f["fill_no"])):
        back, lay = case.orders.get(fill["back_bet_id"]), case.orders.get(fill["lay_bet_id"])
        if back is None or lay is None:
            continue  # A13.
        before = exact.get(lay["bet_id"], 0)
        step = fill["stake"] * (fill["odds"] - 100)
        exact[lay["bet_id"]] = before + step
        resting = back if back["arrival"] < lay["arrival"] else lay
        right = (up(before + step, 100) - up(before, 100), step // 100, resting["odds"])
        if (fill["liability"], fill["winnings"], fill["odds"]) != right or back["odds"] > lay["odds"]:
            yield Finding(
                "A28",
                f"fill {fill['fill_no']} of match {fill['match_id']} has liability, winnings and odds"
                f" {(fill['liability'], fill['winnings'], fill['odds'])}; the rules say {right}, limits {back['odds']}"
                f" and {lay['odds']}",
                {"match_id": fill["match_id"], "fill_no": fill["fill_no"], "user": fill["back_user"]},
            )


def _passed_over(case: Case) -> Iterator[Finding]:
    """Find the fills that passed over an order of another wallet that rested at the same odds for longer."""
    fills = distinct(case.table("fills"), ("match_id", "fill_no"))
    last: dict[str, int] = {}
    for fill in fills:
        for bet_id in (fill["back_bet_id"], fill["lay_bet_id"]):
            last[bet_id] = max(last.get(bet_id, 0), fill["fill_no"])
    levels: dict[tuple[Any, ...], list[tuple[Row, float]]] = defaultdict(list)
    for order in case.orders.values():
        left = order["stake"] > order["matched_stake"] + order["cancelled_stake"]
        level = (order["match_id"], order["outcome"], order["side"], order["odds"])
        levels[level].append((order, inf if left else last.get(order["bet_id"], 0)))
    for fill in fills:
        back, lay = case.orders.get(fill["back_bet_id"]), case.orders.get(fill["lay_bet_id"])
        if back is None or lay is None:
            continue  # A13.
        resting, incoming = (back, lay) if back["arrival"] < lay["arrival"] else (lay, back)
        for order, until in levels[resting["match_id"], resting["outcome"], resting["side"], resting["odds"]]:
            earlier = order["arrival"] < resting["arrival"] and order["user_id"] != incoming["user_id"]
            if earlier and until > fill["fill_no"]:
                yield Finding(
                    "A28",
                    f"fill {fill['fill_no']} of match {fill['match_id']} took bet {resting['bet_id']}, and bet"
                    f" {order['bet_id']} had waited longer at the same odds",
                    {"match_id": fill["match_id"], "fill_no": fill["fill_no"], "user": fill["back_user"]},
                )
                break


def right_refund(bet: Row, order: Row, sums: FillSums) -> int:
    """Return what the cancel of an order gives back: what its fills do not use; nothing where it was not cancelled."""
    if order["cancelled_stake"] <= 0:
        return 0
    return int(bet["stake"] - sums.stake if bet["side"] == "BACK" else bet["reserve"] - sums.liability)


def _wrong_cancel(bet: Row, order: Row, sums: FillSums) -> Iterator[Finding]:
    right = right_refund(bet, order, sums)
    whole = order["cancelled_stake"] <= 0 or order["cancelled_stake"] == bet["stake"] - sums.stake
    if order["cancel_refund"] != right or not whole:
        yield Finding(
            "A28",
            f"order {bet['bet_id']} of user {bet['user_id']} cancelled {order['cancelled_stake']} of {bet['stake']}"
            f" ({sums.stake} matched) for {order['cancel_refund']}; the rule says {right}",
            {"bet_id": bet["bet_id"], "user": bet["user_id"], "seq": bet["seq"]},
        )


@dataclass(frozen=True)
class Share:
    """What one ruling gives a bet: out of escrow, and of that to the house."""

    escrow: int
    house: int


def won(bet: Row, sums: FillSums, ruling: Row) -> bool:
    """Return whether the matched part of a bet wins by a ruling."""
    if ruling["kind"] == "VOID" or ruling["result"] is None or sums.stake <= 0:
        return False
    return bool((bet["side"] == "BACK") == (bet["outcome"] == ruling["result"]))


def share(bet: Row, sums: FillSums, refund: int, ruling: Row, commission_bps: int) -> Share:
    """Return what a bet gets by a ruling, besides what its cancel returned."""
    if ruling["kind"] == "VOID":
        return Share(bet["reserve"] - refund, 0)
    back = bet["side"] == "BACK"
    left_over = (bet["stake"] - sums.stake if back else bet["reserve"] - sums.liability) - refund
    if not won(bet, sums, ruling):
        return Share(left_over, 0)
    net = sums.winnings if back else sums.stake
    residue = sums.liability - sums.winnings if back else 0
    return Share(left_over + sums.stake + sums.liability, up(net * commission_bps, 10_000) + residue)


Payments = dict[tuple[str, str, int], int]
"""(type, account, version) → signed amount."""


def right_payments(case: Case, bet: Row, order: Row) -> Payments:
    """Return every payment the rules demand for a bet, in minor units."""
    sums = FillSums.of(case, bet["bet_id"])
    refund = right_refund(bet, order, sums)
    due: Payments = {("REFUND", "ESCROW", 0): refund}
    before: Share | None = None
    for ruling in distinct(case.rulings.get(bet["match_id"], []), ("settlement_version",)):
        version = ruling["settlement_version"]
        now = share(bet, sums, refund, ruling, case.commission_bps)
        if before is None:
            payout = sums.stake + sums.liability if won(bet, sums, ruling) else 0
            due["REFUND", "ESCROW", version] = now.escrow - payout
            due["PAYOUT", "ESCROW", version] = payout
            due["DEBIT", "HOUSE", version] = -now.house
        else:
            due.update(_correction(case, bet, ruling, now.escrow - before.escrow, now.house - before.house))
        before = now
    return {payment: amount for payment, amount in due.items() if amount}


def _correction(case: Case, bet: Row, ruling: Row, more: int, charge: int) -> Payments:
    """Return the payments of a version that corrects another: `more` out of escrow, `charge` more for the house."""
    version = ruling["settlement_version"]
    if not more and not charge:
        return {}
    house = [e for e in case.system_entries if e.bet_id == bet["bet_id"] and e.contra == "HOUSE"]
    # What the house has advanced on this bet and not got back.
    owed = max(0, sum(e.amount for e in house if e.version is not None and e.version < version))
    taken = max(0, charge)
    repaid = min(owed, max(0, more - taken))
    due: Payments = {("DEBIT", "HOUSE", version): -(taken + repaid), ("REFUND", "HOUSE", version): max(0, -charge)}
    if more > 0:
        due["REFUND" if ruling["kind"] == "VOID" else "PAYOUT", "ESCROW", version] = more
    else:
        due["DEBIT", "ESCROW", version] = more
    advances = [e for e in house if e.type == "CREDIT" and e.version == version]
    if advances:
        # What the wallet lacks when it must give back; where nothing was advanced, the wallet went below zero (A07).
        held = advances[0].snapshot - advances[0].amount
        due["CREDIT", "HOUSE", version] = max(0, -more - held)
    return due


def _wrong_payments(case: Case) -> Iterator[Finding]:
    paid: dict[tuple[int, str], dict[tuple[str, str, int], Entry]] = {}
    cancelled = {order["bet_id"] for order in case.table("orders") if order["cancelled_stake"] > 0}
    for entry in case.system_entries:
        if entry.version is None or entry.bet_id not in case.orders:
            continue
        # Payments that follow from nothing are phantoms (A03).
        versions = [row["settlement_version"] for row in case.rulings.get(entry.match_id or "", [])]
        founded = entry.bet_id in cancelled if entry.version == 0 else entry.version > 0 and entry.version in versions
        if founded:
            # A second payment of one kind is A27 or A02; the first is the one that is judged.
            mine = paid.setdefault((entry.user, entry.bet_id), {})
            mine.setdefault((entry.type, entry.contra, entry.version), entry)
    due: dict[tuple[int, str], Payments] = {}
    for bet in case.table("bets"):
        order = case.orders.get(bet["bet_id"])
        if order is not None:
            due[bet["user_id"], bet["bet_id"]] = right_payments(case, bet, order)
    for name in {**due, **paid}:
        user, bet_id = name
        for payment in {**due.get(name, {}), **paid.get(name, {})}:
            kind, contra, version = payment
            right, entry_paid = due.get(name, {}).get(payment), paid.get(name, {}).get(payment)
            if right != (entry_paid.amount if entry_paid is not None else None):
                got = entry_paid.amount if entry_paid is not None else 0
                yield Finding(
                    "A28",
                    f"bet {bet_id} of user {user} got {kind} {got} against {contra} (version {version}); the rule says"
                    f" {right or 0}",
                    {"user": user, "bet_id": bet_id, "type": kind, "contra": contra, "settlement_version": version},
                )
