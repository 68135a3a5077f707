"""A miniature honest betting service: it produces every frame of a clean run, for tests to tamper with.

It is written for clarity, one wallet map and one book, and shares no rule with the service or the checker.
"""

import copy
import json
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from uuid import UUID

import polars as pl

from invariants.history import SCHEMA
from invariants.run import Run, RunConfig, run_of_frames
from invariants.snapshot import TABLES
from invariants.timeline import SERIES_SCHEMA, TIMELINE_SCHEMA

SERVERS = ["pg0", "pg1"]
ROUTING = [shard * 2 // 100 for shard in range(100)]
TOPICS = {
    "BetCreated": "bet.created",
    "EntryPosted": "wallet.posted",
    "BetMatched": "bet.matched",
    "BetCancelled": "bet.matched",
    "MatchSettled": "match.settled",
}
ORIGIN_UNIX_S = 1_700_000_000.0
Row = dict[str, Any]


def uuid_of(number: int) -> str:
    return str(UUID(int=(7 << 76) | number))


def server_of_user(user: int) -> str:
    return SERVERS[ROUTING[user % 100]]


def routes() -> list[Row]:
    return [
        {
            "server": server,
            "shard": shard,
            "server_name": SERVERS[holder],
            "epoch": 0,
            "here": server == SERVERS[holder],
        }
        for server in SERVERS
        for shard, holder in enumerate(ROUTING)
    ]


def server_of_match(match_id: str) -> str:
    return SERVERS[ROUTING[(UUID(match_id).int & (2**64 - 1)) % 100]]


@dataclass
class World:
    """Lists of rows, as the recorder and a snapshot would hold them."""

    tables: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in TABLES} | {"routes": routes()})
    history: list[Row] = field(default_factory=list)
    timeline: list[Row] = field(default_factory=list)
    series: list[Row] = field(default_factory=list)
    second: dict[str, list[Row]] | None = None
    commission_bps: int = 200
    t: float = 0.0
    attempts: int = 0
    ids: int = 0
    required_sometimes: list[str] = field(default_factory=list)
    evidence: int = 1

    # -- recording

    def tick(self) -> float:
        self.t = round(self.t + 0.01, 6)
        return self.t

    def new_id(self) -> str:
        self.ids += 1
        return uuid_of(self.ids)

    def invoke(self, op: str, **fields: Any) -> int:
        self.attempts += 1
        t = self.tick()
        row = {
            "record": "invoke",
            "attempt": self.attempts,
            "client": 1,
            "op": op,
            "api": "api0",
            "t": t,
            "intended": t,
        }
        body = {name: fields.get(name) for name in ("match_id", "bet_id", "selection", "side", "odds", "amount")}
        if "key" in fields:
            row["payload_hash"] = json.dumps([op, body])
        self.history.append(row | fields)
        return self.attempts

    def complete(self, attempt: int, record: str, **fields: Any) -> None:
        self.history.append({"record": record, "attempt": attempt, "client": 1, "t": self.tick()} | fields)

    def forget(self, **fields: Any) -> None:
        """Let the attempts whose invoke record has these values never have been: the others close the gaps."""
        gone = {
            r["attempt"]
            for r in self.history
            if r["record"] == "invoke" and all(r.get(name) == value for name, value in fields.items())
        }
        self.history = [r for r in self.history if r["attempt"] not in gone]
        numbers = {old: new for new, old in enumerate(sorted({r["attempt"] for r in self.history}), start=1)}
        for row in self.history:
            row["attempt"] = numbers[row["attempt"]]
        self.attempts = len(numbers)

    def invoke_of(self, attempt: int) -> Row:
        return next(r for r in self.history if r["record"] == "invoke" and r["attempt"] == attempt)

    def answers_to(self, key: str) -> list[Row]:
        mine = {r["attempt"] for r in self.history if r["record"] == "invoke" and r.get("key") == key}
        return [r for r in self.history if r["record"] != "invoke" and r["attempt"] in mine]

    # -- the ledger

    def balance(self, user: int) -> tuple[int, int]:
        rows = [r for r in self.tables["ledger"] if r["user_id"] == user]
        return (rows[-1]["seq"], rows[-1]["balance_snapshot"]) if rows else (0, 0)

    def post(self, user: int, kind: str, amount: int, contra: str, key: str, **fields: Any) -> Row:
        seq, balance = self.balance(user)
        row = {
            "server": server_of_user(user),
            "shard": user % 100,
            "user_id": user,
            "seq": seq + 1,
            "type": kind,
            "amount": amount,
            "contra": contra,
            "match_id": None,
            "bet_id": None,
            "settlement_version": None,
            "balance_snapshot": balance + amount,
            "idempotent_key": key,
            "created_at": ORIGIN_UNIX_S + self.t,
            "xact": len(self.tables["ledger"]) + 1,
        } | fields
        self.tables["ledger"].append(row)
        return row

    def entry(self, key: str) -> Row:
        return next(r for r in self.tables["ledger"] if r["idempotent_key"] == key)

    # -- commands

    def deposit(self, user: int, amount: int, key: str, *, record: str = "ok", **extra: Any) -> None:
        attempt = self.invoke("deposit", user=user, amount=amount, key=key, **extra)
        row = self.post(user, "CREDIT", amount, "EXTERNAL", key)
        self.answer(attempt, record, row)

    def withdraw(self, user: int, amount: int, key: str) -> None:
        attempt = self.invoke("withdraw", user=user, amount=amount, key=key)
        row = self.post(user, "DEBIT", -amount, "EXTERNAL", key)
        self.answer(attempt, "ok", row)

    def answer(self, attempt: int, record: str, row: Row, *, replayed: bool = False) -> None:
        if record == "ok":
            self.complete(
                attempt,
                "ok",
                status=202,
                outcome="ACCEPTED",
                replayed=replayed,
                seq=row["seq"],
                balance=row["balance_snapshot"],
                bet_id=row["bet_id"],
            )
        else:
            self.complete(attempt, "info", status=504)

    def replay(self, key: str, *, api: str = "api1") -> None:
        original = next(r for r in self.history if r["record"] == "invoke" and r.get("key") == key)
        fields = {k: v for k, v in original.items() if k not in {"record", "attempt", "client", "t", "intended", "op"}}
        attempt = self.invoke(original["op"], **fields | {"api": api, "tag": "retry"})
        self.answer(attempt, "ok", self.entry(key), replayed=True)

    def refuse(self, op: str, user: int, amount: int, key: str, outcome: str = "INSUFFICIENT_FUNDS") -> None:
        attempt = self.invoke(op, user=user, amount=amount, key=key)
        self.tables["refusals"].append(
            {
                "server": server_of_user(user),
                "shard": user % 100,
                "user_id": user,
                "idempotent_key": key,
                "outcome": outcome,
                "created_at": ORIGIN_UNIX_S + self.t,
            }
        )
        self.complete(attempt, "fail", status=422, outcome=outcome, replayed=False)

    def roll_back_unknown(self, user: int, key: str) -> None:
        """Take back a bet that never came, then let it come."""
        attempt = self.invoke("rollback", user=user, key=key)
        self.complete(attempt, "ok", status=202, outcome="ACCEPTED", replayed=False)
        self.refuse("bet", user, 100, key, "ROLLED_BACK")

    def other_body(self, user: int, amount: int, key: str) -> None:
        attempt = self.invoke("deposit", user=user, amount=amount, key=key, tag="other_body")
        self.complete(attempt, "fail", status=409, outcome="REPLAYED_DIFFERENTLY")

    def read(self, user: int, *, source: str = "redis", client: int = 1, **extra: Any) -> None:
        attempt = self.invoke("balance", user=user, client=client, strong=source == "ledger", **extra)
        seq, balance = self.balance(user)
        as_of = ORIGIN_UNIX_S + self.t
        self.complete(attempt, "ok", status=200, seq=seq, balance=balance, source=source, stale=False, as_of=as_of)

    def page(self, user: int, after_seq: int, *, limit: int = 20, client: int = 1) -> None:
        """Read the entries of a wallet behind a seq."""
        attempt = self.invoke("entries", user=user, client=client, after_seq=after_seq)
        rows = [r for r in self.tables["ledger"] if r["user_id"] == user and r["seq"] > after_seq]
        cut, rows = len(rows) > limit, rows[:limit]
        last = {"seq": rows[-1]["seq"], "balance": rows[-1]["balance_snapshot"]} if rows else {}
        self.complete(attempt, "ok", status=200, page_rows=len(rows), page_cut=cut, **last)

    def create_match(self, match_id: str) -> None:
        attempt = self.invoke("create_match", match_id=match_id, key=f"create-{match_id}")
        self.tables["matches"].append(
            {
                "server": server_of_match(match_id),
                "match_id": match_id,
                "state": "OPEN",
                "settlement_version": 0,
                "result": None,
                "closes_at": ORIGIN_UNIX_S + 9999,
                "outcomes": "HOME,DRAW,AWAY",
            }
        )
        self.step(match_id, "OPEN", 0, None)
        self.complete(attempt, "ok", status=202, outcome="ACCEPTED", replayed=False)

    def step(self, match_id: str, to: str, version: int, result: str | None) -> None:
        steps = [r for r in self.tables["transitions"] if r["match_id"] == match_id]
        self.tables["transitions"].append(
            {
                "server": server_of_match(match_id),
                "match_id": match_id,
                "transition_no": len(steps) + 1,
                "from_state": steps[-1]["to_state"] if steps else None,
                "to_state": to,
                "settlement_version": version,
                "result": result,
                "at": ORIGIN_UNIX_S + self.tick(),
            }
        )
        for match in self.tables["matches"]:
            if match["match_id"] == match_id:
                match |= {"state": to, "settlement_version": version, "result": result}

    def close(self, match_id: str) -> None:
        attempt = self.invoke("close_match", match_id=match_id, key=f"close-{match_id}")
        self.step(match_id, "CLOSED", 0, None)
        self.complete(attempt, "ok", status=202, outcome="ACCEPTED", replayed=False)

    def bet(
        self,
        user: int,
        match_id: str,
        selection: str,
        side: str,
        odds: int,
        stake: int,
        key: str,
        *,
        record: str = "ok",
        late: bool = False,
    ) -> str:
        attempt = self.invoke(
            "bet", user=user, match_id=match_id, selection=selection, side=side, odds=odds, amount=stake, key=key
        )
        bet_id = self.new_id()
        reserve = stake if side == "BACK" else ceil(stake * (odds - 100) / 100)
        row = self.post(user, "DEBIT", -reserve, "ESCROW", key, match_id=match_id, bet_id=bet_id)
        self.tables["bets"].append(
            {
                "server": server_of_user(user),
                "shard": user % 100,
                "user_id": user,
                "bet_id": bet_id,
                "seq": row["seq"],
                "match_id": match_id,
                "outcome": selection,
                "side": side,
                "odds": odds,
                "stake": stake,
                "reserve": reserve,
                "placed_at": row["created_at"],
            }
        )
        self.answer(attempt, record, row)
        self.arrive(self.tables["bets"][-1], late=late)
        return bet_id

    def arrive(self, bet: Row, *, late: bool) -> None:
        orders = self.tables["orders"]
        mine = [o for o in orders if o["match_id"] == bet["match_id"]]
        order = {
            "server": server_of_match(bet["match_id"]),
            **{k: bet[k] for k in ("bet_id", "match_id", "user_id", "outcome", "side", "odds", "stake", "reserve")},
            "arrival": len(mine) + 1,
            "state": "PENDING",
            "matched_stake": 0,
            "matched_liability": 0,
            "winnings": 0,
            "cancelled_stake": 0,
            "cancel_refund": 0,
            "cancel_reason": None,
            "event_id": f"created-{bet['bet_id']}",
            "arrived_at": ORIGIN_UNIX_S + self.tick(),
        }
        orders.append(order)
        if late:
            self.cancel_order(order, "LATE")
            return
        rests = [
            o
            for o in mine
            if o["outcome"] == order["outcome"]
            and o["side"] != order["side"]
            and o["user_id"] != order["user_id"]
            and open_stake(o) > 0
            and (o["odds"] >= order["odds"] if order["side"] == "BACK" else o["odds"] <= order["odds"])
        ]
        best_first = -1 if order["side"] == "BACK" else 1
        for rest in sorted(rests, key=lambda o: (best_first * o["odds"], o["arrival"])):
            stake = min(open_stake(rest), open_stake(order))
            if stake:
                self.fill(order, rest, stake)
        self.set_state(order)

    def fill(self, order: Row, rest: Row, stake: int) -> None:
        back, lay = (order, rest) if order["side"] == "BACK" else (rest, order)
        odds = rest["odds"]
        before = sum(f["stake"] * (f["odds"] - 100) for f in self.tables["fills"] if f["lay_bet_id"] == lay["bet_id"])
        liability = ceil((before + stake * (odds - 100)) / 100) - ceil(before / 100)
        winnings = stake * (odds - 100) // 100
        number = sum(f["match_id"] == order["match_id"] for f in self.tables["fills"]) + 1
        self.tables["fills"].append(
            {
                "server": order["server"],
                "match_id": order["match_id"],
                "fill_no": number,
                "outcome": order["outcome"],
                "back_bet_id": back["bet_id"],
                "back_user": back["user_id"],
                "lay_bet_id": lay["bet_id"],
                "lay_user": lay["user_id"],
                "odds": odds,
                "stake": stake,
                "liability": liability,
                "winnings": winnings,
                "filled_at": ORIGIN_UNIX_S + self.tick(),
            }
        )
        for o in (back, lay):
            o["matched_stake"] += stake
            o["matched_liability"] += liability
            o["winnings"] += winnings
        self.set_state(rest)

    def set_state(self, order: Row) -> None:
        matched = order["matched_stake"]
        if open_stake(order):
            order["state"] = "PART_MATCHED" if matched else "PENDING"
        else:
            order["state"] = "MATCHED" if matched else "CANCELLED"

    def cancel_order(self, order: Row, reason: str) -> None:
        order["cancelled_stake"] = open_stake(order)
        used = order["matched_stake"] if order["side"] == "BACK" else order["matched_liability"]
        order["cancel_refund"] = order["reserve"] - used
        order["cancel_reason"] = reason
        self.set_state(order)
        self.pay(order, "REFUND", order["cancel_refund"], 0)

    def pay(self, order: Row, kind: str, amount: int, version: int) -> None:
        if amount == 0:
            return
        entry_type, contra = {
            "COMMISSION": ("DEBIT", "HOUSE"),
            "COMMISSION_BACK": ("REFUND", "HOUSE"),
            "ADVANCE": ("CREDIT", "HOUSE"),
            "TAKE_BACK": ("DEBIT", "ESCROW"),
        }.get(kind, (kind, "ESCROW"))
        self.post(
            order["user_id"],
            entry_type,
            -amount if entry_type == "DEBIT" else amount,
            contra,
            f"ledger:{kind}:{order['bet_id']}:{version}",
            match_id=order["match_id"],
            bet_id=order["bet_id"],
            settlement_version=version,
        )

    def order(self, bet_id: str) -> Row:
        return next(o for o in self.tables["orders"] if o["bet_id"] == bet_id)

    def cancel(self, user: int, bet_id: str, key: str, *, record: str = "ok") -> None:
        order = self.order(bet_id)
        attempt = self.invoke("cancel", user=user, match_id=order["match_id"], bet_id=bet_id, key=key)
        self.cancel_order(order, "REQUESTED")
        self.tables["cancels"].append(
            {
                "server": order["server"],
                "user_id": user,
                "idempotent_key": key,
                "bet_id": bet_id,
                "match_id": order["match_id"],
                "outcome": "ACCEPTED",
                "cancelled_stake": order["cancelled_stake"],
                "refund": order["cancel_refund"],
                "waiting": False,
            }
        )
        self.complete(
            attempt, record, **({"status": 202, "outcome": "ACCEPTED", "bet_id": bet_id} if record == "ok" else {})
        )

    def settle(self, match_id: str, result: str | None) -> None:
        """Settle with a result, or void with None."""
        op, to, kind = ("void_match", "VOID", "VOID") if result is None else ("settle_match", "SETTLING", "SETTLE")
        attempt = self.invoke(op, match_id=match_id, selection=result, key=f"{op}-{match_id}")
        self.step(match_id, to, 1, result)
        self.tables["settlements"].append(
            {
                "server": server_of_match(match_id),
                "match_id": match_id,
                "settlement_version": 1,
                "kind": kind,
                "result": result,
                "state": "DONE",
            }
        )
        self.complete(attempt, "ok", status=202, outcome="ACCEPTED", replayed=False)
        for order in [o for o in self.tables["orders"] if o["match_id"] == match_id]:
            self.settle_order(order, result)
        if result is not None:
            self.step(match_id, "SETTLED", 1, result)

    def settle_order(self, order: Row, result: str | None) -> None:
        back = order["side"] == "BACK"
        if result is None:
            self.pay(order, "REFUND", order["reserve"] - order["cancel_refund"], 1)
        else:
            used = order["matched_stake"] if back else order["matched_liability"]
            self.pay(order, "REFUND", order["reserve"] - used - order["cancel_refund"], 1)
            if order["matched_stake"] and back == (order["outcome"] == result):
                self.pay(order, "PAYOUT", order["matched_stake"] + order["matched_liability"], 1)
                net = order["winnings"] if back else order["matched_stake"]
                residue = order["matched_liability"] - order["winnings"] if back else 0
                self.pay(order, "COMMISSION", ceil(net * self.commission_bps / 10_000) + residue, 1)
        if order["state"] != "CANCELLED":
            order["state"] = "VOID" if result is None else "SETTLED"

    def resettle(self, match_id: str, result: str | None, *, asked: bool = True) -> None:
        """Settle a match again, by what each bet has and what it should have."""
        settlements = [s for s in self.tables["settlements"] if s["match_id"] == match_id]
        version = len(settlements) + 1
        if asked:
            attempt = self.invoke(
                "resettle_match", match_id=match_id, selection=result, key=f"again-{version}-{match_id}"
            )
        self.step(match_id, "SETTLING", version, result)
        kind = "VOID" if result is None else "SETTLE"
        self.tables["settlements"].append(
            settlements[-1] | {"settlement_version": version, "kind": kind, "result": result}
        )
        if asked:
            self.complete(attempt, "ok", status=202, outcome="ACCEPTED", replayed=False)
        for order in [o for o in self.tables["orders"] if o["match_id"] == match_id]:
            self.resettle_order(order, result, version)
        self.step(match_id, "VOID" if result is None else "SETTLED", version, result)

    def resettle_order(self, order: Row, result: str | None, version: int) -> None:
        mine = [r for r in self.tables["ledger"] if r["bet_id"] == order["bet_id"] and r["settlement_version"]]
        has = sum(r["amount"] for r in mine if r["contra"] == "ESCROW")
        given = sum(r["amount"] for r in mine if r["contra"] == "HOUSE")
        owed = max(0, given)
        back = order["side"] == "BACK"
        used = order["matched_stake"] if back else order["matched_liability"]
        right, charge = order["reserve"] - order["cancel_refund"], 0
        if result is not None:
            right -= used
            if order["matched_stake"] and back == (order["outcome"] == result):
                right += order["matched_stake"] + order["matched_liability"]
                net = order["winnings"] if back else order["matched_stake"]
                residue = order["matched_liability"] - order["winnings"] if back else 0
                charge = ceil(net * self.commission_bps / 10_000) + residue
        more, charged = right - has, max(0, -given)
        self.pay(order, "COMMISSION_BACK", max(0, charged - charge), version)
        if more < 0:
            lacking = -more - self.balance(order["user_id"])[1]
            self.pay(order, "ADVANCE", max(0, lacking), version)
            self.pay(order, "TAKE_BACK", -more, version)
        self.pay(order, "REFUND" if result is None else "PAYOUT", max(0, more), version)
        extra = max(0, charge - charged)
        self.pay(order, "COMMISSION", extra + max(0, min(owed, more - extra)), version)
        if order["state"] != "CANCELLED":
            order["state"] = "VOID" if result is None else "SETTLED"

    # -- what follows from the ledger

    def rechain(self) -> None:
        """Recompute seqs and balances after a test changed amounts or rows, as a consistent bug would."""
        heads: dict[int, tuple[int, int]] = {}
        for number, row in enumerate(self.tables["ledger"], start=1):
            seq, balance = heads.get(row["user_id"], (0, 0))
            row["xact"] = number
            row["seq"], row["balance_snapshot"] = seq + 1, balance + row["amount"]
            heads[row["user_id"]] = (row["seq"], row["balance_snapshot"])
        for bet in self.tables["bets"]:
            for row in self.tables["ledger"]:
                if row["bet_id"] == bet["bet_id"] and row["settlement_version"] is None:
                    bet["seq"] = row["seq"]
        for row in self.tables["ledger"]:
            for answer in self.answers_to(row["idempotent_key"]):
                if answer["record"] == "ok":
                    answer |= {"seq": row["seq"], "balance": row["balance_snapshot"]}
        known = {(r["user_id"], r["seq"]): r["balance_snapshot"] for r in self.tables["ledger"]}
        for answer in self.history:
            if answer["record"] == "ok" and (answer.get("source") or answer.get("page_rows")):
                asked = self.invoke_of(answer["attempt"])
                user = asked["user"]
                answer["seq"] = min(answer["seq"], heads[user][0])
                answer["balance"] = known[user, answer["seq"]]
                if answer.get("page_rows"):
                    answer["page_rows"] = answer["seq"] - asked["after_seq"]

    def derive(self) -> "World":
        """Rebuild outbox, Kafka, projection and cache from the rest."""
        outbox: list[Row] = []

        def emit(server: str, event_id: str, kind: str, key: str, payload: Row) -> None:
            outbox.append(
                {
                    "server": server,
                    "id": len(outbox) + 1,
                    "event_id": event_id,
                    "event_type": kind,
                    "partition_key": key,
                    "payload": json.dumps(payload),
                    **{name: payload.get(name) for name in ("user_id", "seq", "amount", "balance")},
                    "published_to_kafka": True,
                    "created_at": ORIGIN_UNIX_S + self.t,
                }
            )

        bets = {b["bet_id"]: b for b in self.tables["bets"]}
        for r in self.tables["ledger"]:
            base = {
                "user_id": r["user_id"],
                "seq": r["seq"],
                "amount": r["amount"],
                "balance": r["balance_snapshot"],
                "match_id": r["match_id"],
                "bet_id": r["bet_id"],
            }
            bet = bets.get(r["bet_id"])
            if bet is not None and r["settlement_version"] is None and bet["seq"] == r["seq"]:
                order = {name: bet[name] for name in ("match_id", "outcome", "side", "odds", "stake", "reserve")}
                emit(r["server"], f"created-{r['bet_id']}", "BetCreated", str(r["user_id"]), base | order)
            else:
                more = {name: r[name] for name in ("type", "contra", "settlement_version")}
                emit(r["server"], f"posted-{r['user_id']}-{r['seq']}", "EntryPosted", str(r["user_id"]), base | more)
        for f in self.tables["fills"]:
            payload = {k: v for k, v in f.items() if k not in {"server", "filled_at"}}
            emit(f["server"], f"matched-{f['match_id']}-{f['fill_no']}", "BetMatched", f["match_id"], payload)
        for o in self.tables["orders"]:
            if o["cancelled_stake"]:
                payload = {name: o[name] for name in ("match_id", "bet_id", "user_id", "cancelled_stake")}
                payload |= {"refund": o["cancel_refund"], "reason": o["cancel_reason"]}
                emit(o["server"], f"cancelled-{o['bet_id']}", "BetCancelled", str(o["user_id"]), payload)
        for s in self.tables["settlements"]:
            payload = {name: s[name] for name in ("match_id", "settlement_version", "kind", "result")}
            emit(
                s["server"],
                f"settled-{s['match_id']}-{s['settlement_version']}",
                "MatchSettled",
                s["match_id"],
                payload,
            )
        self.tables["outbox"] = outbox
        self.tables["kafka"] = []
        for event in outbox:
            self.send(event)
        heads: dict[int, Row] = {}
        for r in self.tables["ledger"]:
            heads[r["user_id"]] = r
        self.tables["projection"] = [
            {k: r[k] for k in ("server", "shard", "user_id", "seq")} | {"balance": r["balance_snapshot"]}
            for r in heads.values()
        ]
        self.tables["redis"] = [
            {"user_id": r["user_id"], "seq": r["seq"], "balance": r["balance_snapshot"]} for r in heads.values()
        ]
        return self

    def send(self, event: Row) -> None:
        topic = TOPICS[event["event_type"]]
        partition = sum(event["partition_key"].encode()) % 3
        offset = sum(k["topic"] == topic and k["partition"] == partition for k in self.tables["kafka"])
        self.tables["kafka"].append(
            {
                "topic": topic,
                "partition": partition,
                "offset": offset,
                "key": event["partition_key"],
                **{k: event[k] for k in ("event_id", "event_type", "user_id", "seq", "amount", "balance", "payload")},
                "timestamp": event["created_at"],
            }
        )

    # -- as evidence

    def snapshot_again(self) -> None:
        """Take the second snapshot; rows changed later differ from the first."""
        self.second = copy.deepcopy(self.tables)

    def run(self) -> Run:
        config = RunConfig(
            servers=SERVERS,
            routing=ROUTING,
            commission_bps=self.commission_bps,
            required_sometimes=self.required_sometimes,
            origin_unix=ORIGIN_UNIX_S,
            evidence=self.evidence,
        )
        return run_of_frames(
            config=config,
            history_rows=frame(self.history, SCHEMA),
            timeline_rows=frame(self.timeline, TIMELINE_SCHEMA),
            series_rows=frame(self.series, SERIES_SCHEMA),
            first=frames(self.tables),
            second=frames(self.second) if self.second is not None else None,
        )


def open_stake(order: Row) -> int:
    return int(order["stake"] - order["matched_stake"] - order["cancelled_stake"])


def frame(rows: list[Row], schema: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema)


def frames(tables: dict[str, list[Row]]) -> dict[str, pl.DataFrame]:
    return {name: frame(rows, TABLES[name]) for name, rows in tables.items()}


M_OPEN, M_SETTLED, M_VOID, M_AGAIN = uuid_of(1001), uuid_of(1051), uuid_of(1077), uuid_of(1033)
ANN, BOB, CYD, DEE, EVE, FAY = 7, 62, 8, 99, 33, 88
"""Ann, Cyd and Eve live on pg0, Bob, Dee and Fay on pg1."""


def small_world() -> World:
    """Return an afternoon with everything in it: a settled, a void, a corrected and an open match, faults, unknowns."""
    w = World()
    w.timeline += [
        {"t": 0.0, "kind": "phase", "detail": "seed"},
        {"t": 0.5, "kind": "fault_requested", "node": "pg0", "fault": "kill", "fault_id": 1},
        {"t": 0.6, "kind": "fault_start", "node": "pg0", "fault": "kill", "fault_id": 1},
        {"t": 0.9, "kind": "fault_end", "node": "pg0", "fault": "kill", "fault_id": 1},
    ]
    for user in (ANN, BOB, CYD, DEE):
        w.deposit(user, 100_000, f"seed-{user}", tag="seed")
    for match_id in (M_OPEN, M_SETTLED, M_VOID):
        w.create_match(match_id)
    w.withdraw(DEE, 5_000, "out-1")
    w.replay("out-1")
    w.other_body(DEE, 777, "out-1")
    w.deposit(ANN, 333, "lost-answer", record="info")
    unknown = w.invoke("deposit", user=BOB, amount=444, key="never-arrived")
    w.complete(unknown, "info", status=504)
    w.refuse("withdraw", CYD, 10**9, "too-much")
    w.roll_back_unknown(CYD, "taken-back")
    refused = w.invoke("deposit", user=CYD, amount=5, key="not-admitted")
    w.complete(refused, "fail", status=503, error="x-admitted: 0")
    w.read(ANN)
    w.read(BOB, source="ledger", client=2)

    # A settled match: Ann backs against two layers with odd numbers, part is cancelled, one bet is late.
    w.bet(BOB, M_SETTLED, "HOME", "LAY", 233, 501, "lay-1")
    w.bet(CYD, M_SETTLED, "HOME", "LAY", 251, 777, "lay-2")
    w.bet(ANN, M_SETTLED, "HOME", "BACK", 220, 903, "back-1")
    w.bet(DEE, M_SETTLED, "HOME", "BACK", 251, 100, "back-2")
    w.bet(DEE, M_SETTLED, "DRAW", "LAY", 333, 91, "lay-3")
    w.bet(ANN, M_SETTLED, "DRAW", "BACK", 300, 50, "back-3")
    w.bet(BOB, M_SETTLED, "AWAY", "BACK", 400, 1_000, "back-4")
    unmatched = w.tables["orders"][-1]["bet_id"]
    w.cancel(BOB, unmatched, "cancel-1")
    w.close(M_SETTLED)
    w.bet(CYD, M_SETTLED, "HOME", "BACK", 200, 60, "late-1", late=True)
    w.settle(M_SETTLED, "HOME")

    w.bet(ANN, M_VOID, "HOME", "BACK", 200, 400, "v-back")
    w.bet(BOB, M_VOID, "HOME", "LAY", 210, 300, "v-lay")
    w.settle(M_VOID, None)

    # A match that is settled three times: Eve has spent what she won by mistake, wins a part of it again, and loses.
    w.deposit(EVE, 1_000, "seed-eve")
    w.deposit(FAY, 5_000, "seed-fay")
    w.create_match(M_AGAIN)
    w.bet(FAY, M_AGAIN, "HOME", "LAY", 233, 501, "a-lay")
    w.bet(EVE, M_AGAIN, "HOME", "BACK", 210, 701, "a-back")
    w.bet(EVE, M_AGAIN, "AWAY", "LAY", 300, 90, "a-lay-2")
    w.bet(FAY, M_AGAIN, "AWAY", "BACK", 290, 55, "a-back-2")
    w.close(M_AGAIN)
    w.settle(M_AGAIN, "HOME")
    w.withdraw(EVE, w.balance(EVE)[1] - 100, "spent")
    w.resettle(M_AGAIN, "AWAY")
    w.resettle(M_AGAIN, None)
    w.resettle(M_AGAIN, "DRAW")

    w.bet(ANN, M_OPEN, "HOME", "BACK", 200, 400, "o-back")
    w.bet(BOB, M_OPEN, "HOME", "LAY", 210, 150, "o-lay", record="info")
    w.bet(CYD, M_OPEN, "AWAY", "LAY", 310, 70, "o-lay-2")
    w.read(ANN)
    w.read(ANN, min_seq=1)
    w.page(ANN, 2)
    w.page(ANN, 0, limit=3)
    w.tables["orders"].sort(key=lambda o: (o["match_id"], o["arrival"]))
    return w.derive()
