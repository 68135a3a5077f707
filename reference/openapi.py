"""The OpenAPI 3.1 document of the HTTP API: every route, parameter, answer and error, with examples.

Schemas come from the structs that decode and encode the messages, so they cannot drift; what JSON Schema cannot
say of a struct (ranges, lengths) is added here, next to the constants that the checks use.
"""

from typing import Any

import msgspec

from reference import answers, commands
from reference.desk import MAX_CLOSES_AT_MS, MAX_OUTCOME_LENGTH, MAX_OUTCOMES, MAX_SETTLEMENT_VERSION
from reference.reads import BETS_PAGE_MAX, BOOK_DEPTH_MAX, ENTRIES_PAGE_MAX, MATCHES_PAGE_MAX

Json = dict[str, Any]

_STRUCTS: list[type] = [
    commands.Deposit,
    commands.Withdraw,
    commands.PlaceBet,
    commands.Rollback,
    commands.Bulk,
    commands.CreateMatch,
    commands.SettleMatch,
    commands.ResettleMatch,
    answers.CommandAnswer,
    answers.CancelAnswer,
    answers.RollbackAnswer,
    answers.BulkAnswer,
    answers.MatchAnswer,
    answers.MatchView,
    answers.MatchesView,
    answers.BookView,
    answers.BetView,
    answers.BetsView,
    answers.BalanceView,
    answers.EntriesView,
    answers.StatsView,
    answers.BalanceEvent,
    answers.ResettleAnswer,
    answers.AdvancesView,
    answers.Problem,
]

USER, BET, MATCH = 7, "01928c1e-2f61-7cc2-9a7e-0d6d5f1f0c55", "01928c1e-1a2b-7f00-8000-6a8d3c5b9e10"

_INT64_MAX = 2**63 - 1
_USER: Json = {"type": "integer", "format": "int64", "minimum": 1, "maximum": _INT64_MAX}
_KEY: Json = {
    "type": "string",
    "minLength": 1,
    "maxLength": commands.MAX_KEY_LENGTH,
    "pattern": "^(?!ledger:)[ -~]+$",
}
_OUTCOME: Json = {"type": "string", "minLength": 1, "maxLength": MAX_OUTCOME_LENGTH}
_PATH: Json = {
    "user_id": (_USER, USER),
    "bet_id": ({"type": "string", "format": "uuid"}, BET),
    "match_id": ({"type": "string", "format": "uuid"}, MATCH),
}

DESCRIPTION = """
A ledger-first betting exchange. Amounts are whole minor units (cents), odds are hundredths (250 is 2.50), times are
Unix milliseconds.

**Keys.** Every command carries an `Idempotency-Key` (1 to 255 printable ASCII characters). The same key with the
same body repeats the original answer with `replayed: true`; with another body it is refused (409) and the field that
differs is named. A refusal (422) is stored under the key and final.

**Did it happen?** 202: yes, and durable. 4xx: no. 503 with `x-admitted: 0`: certainly not, try again. 504 or no
answer: perhaps; repeat the request with the same key to learn what became of it.

**Errors** are `application/problem+json` (RFC 9457). `type` is one of

| type | status | meaning |
|---|---|---|
| `urn:ledgerproof:invalid-request` | 400 | malformed; `field` names the part to correct |
| `urn:ledgerproof:unauthenticated` | 401 | no valid token |
| `urn:ledgerproof:forbidden` | 403 | the token does not allow this |
| `urn:ledgerproof:no-such-route`, `…:no-such-wallet`, `…:no-such-bet`, `…:no-such-match` | 404 | not here |
| `urn:ledgerproof:method-not-allowed` | 405 | `Allow` names the methods |
| `urn:ledgerproof:replayed-differently` | 409 | the key belongs to another command |
| `urn:ledgerproof:body-too-large` | 413 | see the limits of the route |
| `urn:ledgerproof:unsupported-media-type` | 415 | send application/json |
| `urn:ledgerproof:refusal:<OUTCOME>` | 422 | refused; the outcome says why |
| `urn:ledgerproof:rate-limited` | 429 | wait for `Retry-After` seconds |
| `urn:ledgerproof:not-admitted`, `…:not-posted` | 503 | certainly not done |
| `urn:ledgerproof:outcome-unknown` | 504 | perhaps done |

**Tokens** are JWT (HS256) with the claims `iss`, `aud`, `iat`, `exp` and `scope`: `wallet` (one wallet, named by
`sub`), `service` (every wallet), `admin` (matches). `ledgerproof token` prints one for a running stack. The rate
limit counts the requests of one `wallet` token's user; it is open while Redis is down.

**Pages** end with `next_cursor`: pass it back unread as `cursor`. A cursor does not expire and new items do not move
it.
""".strip()


def document(max_amount_minor: int = 10**9) -> Json:
    """Return the OpenAPI document of a service with this limit of one command's amount."""
    _, schemas = msgspec.json.schema_components(_STRUCTS, ref_template="#/components/schemas/{name}")
    _add_limits(schemas, max_amount_minor)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ledgerproof reference service", "version": "1", "description": DESCRIPTION},
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "tags": [{"name": "wallets"}, {"name": "bulk"}, {"name": "matches"}],
        "paths": _paths(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _add_limits(schemas: Json, max_amount_minor: int) -> None:
    """Add the ranges and lengths that the service checks."""
    amount = {"minimum": 1, "maximum": max_amount_minor}
    odds = {"minimum": commands.MIN_ODDS, "maximum": commands.MAX_ODDS}
    for name in ("Deposit", "Withdraw", "BulkDeposit", "BulkWithdraw"):
        schemas[name]["properties"]["amount_minor"].update(amount)
    for name in ("PlaceBet", "BulkBet"):
        schemas[name]["properties"]["stake_minor"].update(amount)
        schemas[name]["properties"]["odds"].update(odds)
        schemas[name]["properties"]["outcome"].update(_OUTCOME)
    for name in ("BulkBet", "BulkDeposit", "BulkWithdraw", "BulkCancel"):
        schemas[name]["properties"]["user_id"].update(_USER)
        schemas[name]["properties"]["key"].update(_KEY)
    schemas["Rollback"]["properties"]["key"].update(_KEY)
    schemas["Bulk"]["properties"]["commands"].update(minItems=1, maxItems=commands.BULK_MAX)
    schemas["CreateMatch"]["properties"]["closes_at_ms"].update(minimum=1, maximum=MAX_CLOSES_AT_MS)
    schemas["CreateMatch"]["properties"]["outcomes"].update(
        minItems=2, maxItems=MAX_OUTCOMES, uniqueItems=True, items=_OUTCOME
    )
    schemas["SettleMatch"]["properties"]["result"].update(_OUTCOME)
    resettle = schemas["ResettleMatch"]["properties"]
    resettle["result"] = {"anyOf": [_OUTCOME, {"type": "null"}]}
    resettle["corrects_version"]["anyOf"] = [
        {"type": "integer", "minimum": 1, "maximum": MAX_SETTLEMENT_VERSION},
        {"type": "null"},
    ]


def _paths() -> Json:
    accepted = {"outcome": "ACCEPTED", "user_id": USER, "seq": 2, "balance_minor": 9_900, "replayed": False}
    bet = {"match_id": MATCH, "outcome": "HOME", "side": "BACK", "odds": 250, "stake_minor": 100}
    view = bet | {
        "bet_id": BET,
        "reserve_minor": 100,
        "state": "PART_MATCHED",
        "matched_stake_minor": 40,
        "cancelled_stake_minor": 0,
        "placed_at_ms": 1_767_225_600_000,
    }
    balance = {
        "user_id": USER,
        "balance_minor": 9_900,
        "seq": 2,
        "source": "redis",
        "stale": False,
        "updated_at_ms": 1_767_225_600_000,
        "as_of_ms": 1_767_225_600_120,
    }
    entry = {
        "seq": 2,
        "type": "DEBIT",
        "amount_minor": -100,
        "balance_minor": 9_900,
        "contra": "ESCROW",
        "match_id": MATCH,
        "bet_id": BET,
        "key": "bet-1",
        "created_at_ms": 1_767_225_600_000,
    }
    match = {
        "match_id": MATCH,
        "state": "OPEN",
        "outcomes": ["HOME", "DRAW", "AWAY"],
        "closes_at_ms": 1_767_229_200_000,
        "settlement_version": 0,
        "result": None,
        "settled": False,
    }
    stats = {
        "user_id": USER,
        "seq": 4,
        "complete": True,
        "deposits": 1,
        "deposited_minor": 10_000,
        "withdrawals": 0,
        "withdrawn_minor": 0,
        "bets": 1,
        "staked_minor": 100,
        "payouts": 1,
        "won_minor": 250,
        "refunds": 0,
        "refunded_minor": 0,
        "commission_minor": 3,
        "open_bets": 0,
        "open_bets_of": 1,
    }
    book = {
        "match_id": MATCH,
        "as_of_ms": 1_767_225_600_000,
        "outcomes": [{"outcome": "HOME", "back": [{"odds": 250, "stake_minor": 60, "bets": 1}], "lay": []}],
    }
    moved = {"outcome": "ACCEPTED", "replayed": False, "match_id": MATCH, "state": "CLOSED"}
    cancelled = {
        "outcome": "ACCEPTED",
        "replayed": False,
        "user_id": USER,
        "bet_id": BET,
        "cancelled_stake_minor": 60,
        "refund_minor": 60,
    }
    rolled_back = {
        "outcome": "ACCEPTED",
        "replayed": False,
        "user_id": USER,
        "key": "bet-1",
        "bet_id": None,
        "cancelled_stake_minor": 0,
        "refund_minor": 0,
    }
    wallet, one_bet, a_match = "/v1/wallets/{user_id}", "/v1/wallets/{user_id}/bets/{bet_id}", "/v1/matches/{match_id}"
    cursor = {"cursor": {"type": "string", "maxLength": 256}}
    transfer = {"amount_minor": 10_000}
    return {
        f"{wallet}/deposits": {
            "post": _command(
                "deposit",
                "Put money from outside into a wallet.",
                ("Deposit", transfer),
                ("CommandAnswer", accepted),
                ("user_id",),
            )
        },
        f"{wallet}/withdrawals": {
            "post": _command(
                "withdraw",
                "Take money out of a wallet; refused if it does not hold enough.",
                ("Withdraw", transfer),
                ("CommandAnswer", accepted),
                ("user_id",),
                refusal="INSUFFICIENT_FUNDS",
            )
        },
        f"{wallet}/bets": {
            "post": _command(
                "placeBet",
                "Place a limit order: it reserves the stake (BACK) or the liability (LAY).",
                ("PlaceBet", bet),
                ("CommandAnswer", accepted | {"bet_id": BET}),
                ("user_id",),
                refusal="INSUFFICIENT_FUNDS",
            ),
            "get": _query(
                "bets",
                "The wallet's bets, newest first, with their states in the order books.",
                ("BetsView", {"bets": [view], "next_cursor": None}),
                ("user_id",),
                query=cursor | {"limit": {"type": "integer", "minimum": 1, "maximum": BETS_PAGE_MAX, "default": 50}},
            ),
        },
        one_bet: {
            "get": _query("bet", "One bet and how far it got.", ("BetView", view), ("user_id", "bet_id"), missing="bet")
        },
        f"{one_bet}/cancel": {
            "post": _command(
                "cancelBet",
                "Cancel what of a bet is not matched yet; its refund follows as an entry.",
                None,
                ("CancelAnswer", cancelled),
                ("user_id", "bet_id"),
                refusal="NOTHING_TO_CANCEL",
            )
        },
        f"{wallet}/rollbacks": {
            "post": _command(
                "rollback",
                "Take back the bet placed under a key. If there is none yet, none will ever be: a bet that arrives "
                "later under that key is refused as ROLLED_BACK. The key of the bet identifies the rollback, so a "
                "second one gets the answer of the first; no Idempotency-Key is needed.",
                ("Rollback", {"key": "bet-1"}),
                ("RollbackAnswer", rolled_back),
                ("user_id",),
                refusal="NOTHING_TO_CANCEL",
                keyed=False,
            )
        },
        f"{wallet}/balance": {
            "get": _query(
                "balance",
                "The balance: from Redis, the projection or (`consistency=strong`) the ledger. `stale` is set when it "
                "may be behind, above all behind `min_seq`. With `as_of` it is the balance at that moment.",
                ("BalanceView", balance),
                ("user_id",),
                query={
                    "consistency": {"type": "string", "enum": ["eventual", "strong"], "default": "eventual"},
                    "min_seq": {"type": "integer", "format": "int64", "minimum": 0, "maximum": _INT64_MAX},
                    "as_of": {"type": "integer", "format": "int64", "minimum": 0, "maximum": MAX_CLOSES_AT_MS},
                },
                missing="wallet",
            )
        },
        f"{wallet}/advances": {
            "get": _query(
                "advances",
                "What the house advanced because the wallet had spent what a correction took back, by bet.",
                ("AdvancesView", {"owed_minor": 98, "bets": [{"match_id": MATCH, "bet_id": BET, "owed_minor": 98}]}),
                ("user_id",),
            )
        },
        f"{wallet}/stats": {
            "get": _query(
                "stats", "Sums over the wallet's entries.", ("StatsView", stats), ("user_id",), missing="wallet"
            )
        },
        f"{wallet}/entries": {
            "get": _query(
                "entries",
                "The wallet's entries in order of `seq`, from the first or from after `after_seq`.",
                ("EntriesView", {"entries": [entry], "next_cursor": None}),
                ("user_id",),
                query=cursor
                | {
                    "after_seq": {"type": "integer", "format": "int64", "minimum": 0, "maximum": _INT64_MAX},
                    "limit": {"type": "integer", "minimum": 1, "maximum": ENTRIES_PAGE_MAX, "default": 100},
                },
            )
        },
        f"{wallet}/transactions": {
            "get": _query(
                "transactions",
                "The wallet's entries, newest first.",
                ("EntriesView", {"entries": [entry], "next_cursor": None}),
                ("user_id",),
                query=cursor | {"limit": {"type": "integer", "minimum": 1, "maximum": ENTRIES_PAGE_MAX, "default": 20}},
            )
        },
        f"{wallet}/events": {"get": _stream()},
        "/v1/commands": {"post": _bulk(accepted | {"bet_id": BET}, bet)},
        "/v1/matches": {
            "post": _command(
                "createMatch",
                "Open a match. Scope admin.",
                ("CreateMatch", {"match_id": MATCH, "closes_at_ms": 1_767_229_200_000}),
                ("MatchAnswer", moved | {"state": "OPEN"}),
                (),
            ),
            "get": _query(
                "matches",
                "Matches, newest first.",
                ("MatchesView", {"matches": [match], "next_cursor": None}),
                (),
                query=cursor
                | {
                    "state": {"type": "string", "enum": [*commands.MatchState]},
                    "limit": {"type": "integer", "minimum": 1, "maximum": MATCHES_PAGE_MAX, "default": 50},
                },
            ),
        },
        a_match: {"get": _query("match", "One match.", ("MatchView", match), ("match_id",), missing="match")},
        f"{a_match}/book": {
            "get": _query(
                "book",
                "The best price levels of unmatched bets, per outcome and side.",
                ("BookView", book),
                ("match_id",),
                query={"depth": {"type": "integer", "minimum": 1, "maximum": BOOK_DEPTH_MAX, "default": 10}},
                missing="match",
            )
        },
        f"{a_match}/close": {
            "post": _command(
                "closeMatch",
                "Take no more bets. Scope admin.",
                None,
                ("MatchAnswer", moved),
                ("match_id",),
                refusal="UNKNOWN_MATCH",
            )
        },
        f"{a_match}/settle": {
            "post": _command(
                "settleMatch",
                "Settle a closed match by its result. Scope admin.",
                ("SettleMatch", {"result": "HOME"}),
                ("MatchAnswer", moved | {"state": "SETTLING"}),
                ("match_id",),
                refusal="ILLEGAL_TRANSITION",
            )
        },
        f"{a_match}/resettle": {
            "post": _command(
                "resettleMatch",
                "Settle a settled or void match again: another result, or null for void. Entries are added, none is "
                "changed. Scope admin.",
                ("ResettleMatch", {"result": "AWAY", "corrects_version": 1}),
                ("ResettleAnswer", moved | {"state": "SETTLING", "settlement_version": 2}),
                ("match_id",),
                refusal="ILLEGAL_TRANSITION",
            )
        },
        f"{a_match}/void": {
            "post": _command(
                "voidMatch",
                "Call a match off: every reserve goes back. Scope admin.",
                None,
                ("MatchAnswer", moved | {"state": "VOID"}),
                ("match_id",),
                refusal="ILLEGAL_TRANSITION",
            )
        },
        "/openapi.json": {
            "get": {
                "operationId": "openapi",
                "summary": "This document.",
                "security": [],
                "responses": {"200": {"description": "OpenAPI 3.1", "content": {"application/json": {"schema": {}}}}},
            }
        },
    }


def _content(schema: str, example: object, media: str = "application/json") -> Json:
    return {"content": {media: {"schema": {"$ref": f"#/components/schemas/{schema}"}, "example": example}}}


def problem(status: int, title: str, detail: str, **more: object) -> Json:
    """Return the body of a problem as an example."""
    kind = f"urn:ledgerproof:{title.replace(' ', '-')}"
    return {"type": kind, "title": title, "status": status, "detail": detail} | more


def _problem(description: str, example: Json, **headers: str) -> Json:
    said: Json = {"description": description, **_content("Problem", example, "application/problem+json")}
    if headers:
        said["headers"] = {
            name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        }
    return said


_MALFORMED = {
    "400": _problem(
        "Malformed; `field` names the part to correct",
        problem(400, "invalid request", "amount_minor: must be 1 to 1000000000", field="amount_minor"),
    )
}
_DOOR: Json = {
    "401": _problem(
        "No valid token",
        problem(401, "unauthenticated", "a bearer token is required"),
        WWW_Authenticate="RFC 6750",
    ),
    "403": _problem(
        "The token does not allow this",
        problem(403, "forbidden", "the token does not allow this wallet"),
        WWW_Authenticate="RFC 6750; `scope` names one that would",
    ),
    "429": _problem(
        "Too many requests of this user; nothing was done",
        problem(429, "rate limited", "too many requests of this user; try again after 0.2 s"),
        Retry_After="Seconds to wait",
    ),
}
_UNAVAILABLE: Json = {
    "503": _problem(
        "Certainly not done: try again",
        problem(503, "not admitted", "pg0 is not available; try again"),
        x_admitted="0",
        Retry_After="Seconds to wait",
    ),
    "504": _problem(
        "Perhaps done: repeat with the same key",
        problem(504, "outcome unknown", "the connection broke; repeat the request with the same key"),
    ),
}
_BODY: Json = {
    "413": _problem("The body is too large", problem(413, "body too large", "the body must be at most 16384 bytes")),
    "415": _problem("Not JSON", problem(415, "unsupported media type", "send application/json")),
}


def _refused(outcome: str) -> Json:
    example = {
        "type": f"urn:ledgerproof:refusal:{outcome}",
        "title": "refused",
        "status": 422,
        "detail": "…",
        "outcome": outcome,
        "replayed": False,
    }
    return _problem("Refused; the refusal is stored under the key and final", example)


_DIFFERS = _problem(
    "The key belongs to another command",
    problem(
        409, "key already used", "this key was used with another odds; use a new key for a new command", field="odds"
    )
    | {"type": "urn:ledgerproof:replayed-differently", "outcome": "REPLAYED_DIFFERENTLY", "replayed": True},
)


def _parameters(path: tuple[str, ...], query: Json | None = None, *, keyed: bool = False) -> list[Json]:
    found: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": _PATH[name][0], "example": _PATH[name][1]}
        for name in path
    ]
    if keyed:
        found.append({"name": "Idempotency-Key", "in": "header", "required": True, "schema": _KEY, "example": "bet-1"})
    found += [
        {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in (query or {}).items()
    ]
    return found


def _command(
    operation: str,
    summary: str,
    body: tuple[str, Json] | None,
    answer: tuple[str, Json],
    path: tuple[str, ...],
    *,
    refusal: str = "LIMIT_EXCEEDED",
    keyed: bool = True,
) -> Json:
    post: Json = {
        "operationId": operation,
        "summary": summary,
        "tags": ["wallets" if "user_id" in path else "matches"],
        "parameters": _parameters(path, keyed=keyed),
        "responses": {
            "202": {"description": "Accepted and durable", **_content(*answer)},
            **_MALFORMED,
            **_DOOR,
            "409": _DIFFERS,
            **_BODY,
            "422": _refused(refusal),
            **_UNAVAILABLE,
        },
    }
    if body is not None:
        post["requestBody"] = {"required": True, **_content(*body)}
    else:
        empty: Json = {"type": "object", "maxProperties": 0}
        post["requestBody"] = {"required": False, "content": {"application/json": {"schema": empty, "example": {}}}}
    return post


def _query(
    operation: str,
    summary: str,
    answer: tuple[str, Json],
    path: tuple[str, ...],
    *,
    query: Json | None = None,
    missing: str | None = None,
) -> Json:
    responses: Json = {"200": {"description": "Found", **_content(*answer)}, **_MALFORMED, **_DOOR, **_UNAVAILABLE}
    if missing is not None:
        example = problem(404, f"no such {missing}", f"there is no {missing} 7 here")
        responses["404"] = _problem(f"There is no such {missing}", example)
    return {
        "operationId": operation,
        "summary": summary,
        "tags": ["wallets" if "user_id" in path else "matches"],
        "parameters": _parameters(path, query),
        "responses": responses,
    }


def _bulk(accepted: Json, bet: Json) -> Json:
    items = [
        {"op": "bet", "user_id": USER, "key": "bet-1", **bet},
        {"op": "deposit", "user_id": 8, "key": "in-1", "amount_minor": 10_000},
    ]
    results = [
        {"status": 202, **{name: value for name, value in accepted.items() if name != "user_id"}},
        {"status": 422, "outcome": "MATCH_CLOSED", "replayed": False, "title": "refused", "detail": "…"},
    ]
    return {
        "operationId": "bulk",
        "summary": f"Up to {commands.BULK_MAX} wallet commands, each with its own key and outcome.",
        "description": "A command that fails fails no other. Each result has the status and the fields that the same "
        "command would get alone; `admitted: false` says that it certainly was not done. The commands of one wallet "
        "are done in order, and a key that comes twice behaves as if the commands were sent one after the other.",
        "tags": ["bulk"],
        "parameters": [],
        "requestBody": {"required": True, **_content("Bulk", {"commands": items})},
        "responses": {
            "200": {"description": "One result a command, in order", **_content("BulkAnswer", {"results": results})},
            **_MALFORMED,
            **_DOOR,
            **_BODY,
            **_UNAVAILABLE,
        },
    }


def _stream() -> Json:
    data = '{"user_id":7,"seq":2,"balance_minor":9900,"updated_at_ms":1767225600000}'
    example = f"id: 2\nevent: user.balance.updated\ndata: {data}\n\n"
    header = {"name": "Last-Event-ID", "in": "header", "required": False, "schema": {"type": "string", "maxLength": 19}}
    return {
        "operationId": "events",
        "summary": "The wallet's balance after every change, as server-sent events.",
        "description": "The first event is the newest balance, unless `Last-Event-ID` says that the client has it. "
        "`id` is the entry's `seq`. Balances that follow each other quickly may be merged into the newest. A comment "
        "is sent at least every 15 s.",
        "tags": ["wallets"],
        "parameters": [*_parameters(("user_id",)), header],
        "responses": {
            "200": {
                "description": "Events `user.balance.updated`; `data` is a BalanceEvent as JSON",
                "content": {"text/event-stream": {"schema": {"type": "string"}, "example": example}},
            },
            **_MALFORMED,
            **_DOOR,
            **_UNAVAILABLE,
        },
    }
