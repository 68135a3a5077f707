"""Bearer tokens: who a caller is and what the token allows. JWT signed with HS256, one key per environment.

A token names its scopes in the claim `scope`, separated by blanks:

    wallet    commands and reads of the one wallet that `sub` names
    service   commands and reads of every wallet: a game provider, a back office, a load generator
    admin     match commands: create, close, settle, void

`exp`, `nbf`, `iat`, `aud` and `iss` are checked, and the algorithm is never taken from the token.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import jwt

from reference.commands import MAX_USER_ID
from reference.config import ConfigError, ServiceConfig
from reference.errors import Forbidden, Unauthenticated

ISSUER: Final = "ledgerproof"
AUDIENCE: Final = "ledgerproof-api"
ALGORITHM: Final = "HS256"
LEEWAY_S: Final = 5
"""Clocks of issuer and service may differ by this much."""
TOKEN_MAX_CHARACTERS: Final = 2048
REMEMBERED_MAX: Final = 10_000
"""Verified tokens kept; the one verified longest ago goes first, and costs one verification when it returns."""


class Scope(StrEnum):
    """What a token allows."""

    WALLET = "wallet"
    SERVICE = "service"
    ADMIN = "admin"


@dataclass(slots=True, frozen=True)
class Caller:
    """A verified caller. `subject` is the wallet's number in decimal, empty without the scope `wallet`."""

    subject: str
    service: bool
    admin: bool
    expires_s: float
    """Unix seconds."""


TRUSTED: Final = Caller("", service=True, admin=True, expires_s=float("inf"))
"""Every caller of a service that was configured to trust every caller."""


class Gate:
    """Verifies tokens, and remembers those it verified so that a repeated one costs a dictionary look-up."""

    def __init__(self, key: str | None, *, trust_every_caller: bool = False) -> None:
        if key is None and not trust_every_caller:
            raise ConfigError("the API needs token_key in its configuration (or trust_every_caller on one machine)")
        self._key = key
        self._known: dict[str, Caller] = {}

    def caller(self, authorization: str | None) -> Caller:
        """Return who sends this Authorization header. Raises Unauthenticated."""
        if self._key is None:
            return TRUSTED
        if authorization is None:
            raise Unauthenticated("a bearer token is required")
        caller = self._known.get(authorization)
        if caller is None:
            caller = self._verified(authorization, self._key)
            if len(self._known) >= REMEMBERED_MAX:
                self._known.pop(next(iter(self._known)))
            self._known[authorization] = caller
        if caller.expires_s < time.time():
            self._known.pop(authorization, None)
            raise Unauthenticated("the token has expired")
        return caller

    @staticmethod
    def _verified(authorization: str, key: str) -> Caller:
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or not 0 < len(token) <= TOKEN_MAX_CHARACTERS:
            raise Unauthenticated("the Authorization header must be: Bearer <token>")
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iat", "aud", "iss", "scope"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise Unauthenticated("the token has expired") from error
        except (jwt.PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
            # What exactly is wrong helps only those who forge tokens.
            raise Unauthenticated("the token is not valid") from error
        scopes = claims["scope"].split(" ") if isinstance(claims["scope"], str) else []
        subject = claims.get("sub")
        wallet = Scope.WALLET in scopes and isinstance(subject, str) and _is_user(subject)
        return Caller(
            subject if wallet and isinstance(subject, str) else "",
            service=Scope.SERVICE in scopes,
            admin=Scope.ADMIN in scopes,
            expires_s=float(claims["exp"]) + LEEWAY_S,
        )


def _is_user(text: str) -> bool:
    return text.isascii() and text.isdigit() and text[0] != "0" and len(text) <= 19 and int(text) <= MAX_USER_ID


def check_wallet(caller: Caller, user: str) -> None:
    """Raise Forbidden unless the caller may act for the wallet whose number is written as `user`."""
    if not caller.service and (not caller.subject or caller.subject != user):
        raise Forbidden("the token does not allow this wallet", Scope.WALLET)


def check_admin(caller: Caller) -> None:
    """Raise Forbidden unless the caller may command matches."""
    if not caller.admin:
        raise Forbidden("the token does not allow match commands", Scope.ADMIN)


def issue(
    config: ServiceConfig,
    scopes: Sequence[Scope],
    *,
    user_id: int | None = None,
    ttl_s: int,
    now_s: float | None = None,
) -> str:
    """Return a new token, valid for `ttl_s` seconds from `now_s` (Unix seconds; now if None).

    Raises ConfigError without a key, ValueError for a `wallet` scope without a user.
    """
    if config.token_key is None:
        raise ConfigError("this service has no token_key: its callers need no token")
    if Scope.WALLET in scopes and user_id is None:
        raise ValueError("a token with the scope wallet needs a user")
    issued_at = int(time.time() if now_s is None else now_s)
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": issued_at,
        "nbf": issued_at,
        "exp": issued_at + ttl_s,
        "scope": " ".join(scopes),
    }
    if user_id is not None:
        claims["sub"] = str(user_id)
    return jwt.encode(claims, config.token_key, algorithm=ALGORITHM)
