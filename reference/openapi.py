"""The OpenAPI document of the HTTP API, built from the structs that decode and encode it."""

from typing import Any

import msgspec

from reference import answers, commands

_COMMANDS: list[type] = [
    commands.Deposit,
    commands.Withdraw,
    commands.PlaceBet,
    commands.CreateMatch,
    commands.SettleMatch,
    commands.ResettleMatch,
]
_ANSWERS: list[type] = [
    answers.CommandAnswer,
    answers.CancelAnswer,
    answers.MatchAnswer,
    answers.MatchView,
    answers.BetView,
    answers.BalanceView,
    answers.EntriesView,
    answers.ResettleAnswer,
    answers.AdvancesView,
    answers.Problem,
]


def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    _, components = msgspec.json.schema_components([*_COMMANDS, *_ANSWERS], ref_template="#/components/schemas/{name}")
    components["Deposit"]["properties"]["amount_minor"].update(minimum=1, maximum=10**9)
    components["Withdraw"]["properties"]["amount_minor"].update(minimum=1, maximum=10**9)
    components["PlaceBet"]["properties"]["stake_minor"].update(minimum=1, maximum=10**9)
    components["PlaceBet"]["properties"]["odds"].update(minimum=commands.MIN_ODDS, maximum=commands.MAX_ODDS)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ledgerproof reference service",
            "version": "1",
            "description": "A ledger-first betting exchange. Amounts are minor units, odds are hundredths. "
            "Every command carries an Idempotency-Key: the same key with the same body repeats the "
            "original answer, with another body it is refused (409).",
        },
        "paths": {
            "/v1/wallets/{user_id}/deposits": _command("deposit", "Deposit", "CommandAnswer", "user_id"),
            "/v1/wallets/{user_id}/withdrawals": _command("withdraw", "Withdraw", "CommandAnswer", "user_id"),
            "/v1/wallets/{user_id}/bets": _command("placeBet", "PlaceBet", "CommandAnswer", "user_id"),
            "/v1/wallets/{user_id}/bets/{bet_id}/cancel": _command(
                "cancelBet", None, "CancelAnswer", "user_id", "bet_id"
            ),
            "/v1/wallets/{user_id}/bets/{bet_id}": _query("bet", "BetView", "user_id", "bet_id"),
            "/v1/wallets/{user_id}/balance": _query(
                "balance",
                "BalanceView",
                "user_id",
                query={
                    "consistency": {"enum": ["eventual", "strong"]},
                    "min_seq": {"type": "integer", "minimum": 0},
                },
            ),
            "/v1/wallets/{user_id}/entries": _query(
                "entries",
                "EntriesView",
                "user_id",
                query={
                    "after_seq": {"type": "integer", "minimum": 0},
                    "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
                },
            ),
            "/v1/matches": _command("createMatch", "CreateMatch", "MatchAnswer"),
            "/v1/matches/{match_id}": _query("match", "MatchView", "match_id"),
            "/v1/matches/{match_id}/close": _command("closeMatch", None, "MatchAnswer", "match_id"),
            "/v1/matches/{match_id}/settle": _command("settleMatch", "SettleMatch", "MatchAnswer", "match_id"),
            "/v1/matches/{match_id}/resettle": _command("resettleMatch", "ResettleMatch", "ResettleAnswer", "match_id"),
            "/v1/wallets/{user_id}/advances": _query("advances", "AdvancesView", "user_id"),
            "/v1/matches/{match_id}/void": _command("voidMatch", None, "MatchAnswer", "match_id"),
        },
        "components": {"schemas": components},
    }


_PATH_SCHEMAS: dict[str, dict[str, Any]] = {
    "user_id": {"type": "integer", "format": "int64", "minimum": 1, "maximum": 2**63 - 1},
    "bet_id": {"type": "string", "format": "uuid"},
    "match_id": {"type": "string", "format": "uuid"},
}


def _content(schema: str, media: str = "application/json") -> dict[str, Any]:
    return {"content": {media: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _problem(description: str) -> dict[str, Any]:
    return {"description": description, **_content("Problem", "application/problem+json")}


def _path_parameters(names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"name": name, "in": "path", "required": True, "schema": _PATH_SCHEMAS[name]} for name in names]


_UNAVAILABLE = {
    "503": _problem("Certainly not done (header x-admitted: 0): try again"),
    "504": _problem("It may have been done: repeat with the same key"),
}


def _command(operation: str, body: str | None, answer: str, *path: str) -> dict[str, Any]:
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": commands.MAX_KEY_LENGTH},
    }
    post: dict[str, Any] = {
        "operationId": operation,
        "parameters": [*_path_parameters(path), key],
        "responses": {
            "202": {"description": "Accepted and durable", **_content(answer)},
            "400": _problem("Malformed; `field` names the part"),
            "409": _problem("The key was used with another body"),
            "422": _problem("Refused; the refusal is stored under the key and final"),
            **_UNAVAILABLE,
        },
    }
    if body is not None:
        post["requestBody"] = {"required": True, **_content(body)}
    return {"post": post}


def _query(operation: str, answer: str, *path: str, query: dict[str, Any] | None = None) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in (query or {}).items()
    ]
    return {
        "get": {
            "operationId": operation,
            "parameters": [*_path_parameters(path), *parameters],
            "responses": {
                "200": {"description": "Found", **_content(answer)},
                "400": _problem("Malformed; `field` names the part"),
                "404": _problem("No such thing"),
                **_UNAVAILABLE,
            },
        }
    }
