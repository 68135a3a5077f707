"""Tokens: what is accepted, what is forged, what a token allows, and what a repeated one costs."""

import base64
import json
import time

import jwt
import msgspec
import pytest

from reference import auth
from reference.auth import Caller, Gate, Scope, check_admin, check_wallet, issue
from reference.config import ROLES, ConfigError, ServiceConfig
from reference.errors import Forbidden, Unauthenticated
from reference.routing import SHARDS

KEY = "k" * 64


def config(**changes) -> ServiceConfig:
    fields = {
        "servers": [{"name": "pg0", "host": "127.0.0.1", "port": 1}],
        "routing": [0] * SHARDS,
        "passwords": dict.fromkeys(ROLES, "secret"),
        "kafka_bootstrap": "127.0.0.1:2",
        "redis_host": "127.0.0.1",
        "redis_port": 3,
        "token_key": KEY,
    }
    return msgspec.convert(fields | changes, ServiceConfig)


def claims(**changes) -> dict:
    now = int(time.time())
    fields = {"iss": auth.ISSUER, "aud": auth.AUDIENCE, "iat": now, "nbf": now, "exp": now + 86_400, "scope": "service"}
    return {name: value for name, value in (fields | changes).items() if value is not None}


def bearer(said: dict, key: str = KEY, algorithm: str = "HS256") -> str:
    return f"Bearer {jwt.encode(said, key, algorithm=algorithm)}"


def unsigned(header: dict, said: dict, signature: str = "") -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, said)]
    return f"Bearer {'.'.join([*parts, signature])}"


def test_an_issued_token_says_who_calls() -> None:
    gate = Gate(KEY)
    own = gate.caller(f"Bearer {issue(config(), [Scope.WALLET], user_id=7, ttl_s=60)}")
    assert (own.subject, own.service, own.admin) == ("7", False, False)
    both = gate.caller(f"bearer {issue(config(), [Scope.SERVICE, Scope.ADMIN], ttl_s=60)}")
    assert (both.subject, both.service, both.admin) == ("", True, True)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic dXNlcjpwYXNz",
        "Bearer x.y.z",
        "Bearer " + "a" * 5000,
        "Bearer " + "[" * 1500,
        bearer(claims(), "another key, which is long enough....."),
        bearer(claims(), KEY, "HS512"),
        bearer(claims(exp=int(time.time()) - 3600)),
        bearer(claims(nbf=int(time.time()) + 3600)),
        bearer(claims(iat=int(time.time()) + 3600)),
        bearer(claims(exp=None)),
        bearer(claims(iat=None)),
        bearer(claims(scope=None)),
        bearer(claims(aud="another-api")),
        bearer(claims(aud=None)),
        bearer(claims(iss="another")),
        unsigned({"alg": "none", "typ": "JWT"}, claims()),
        unsigned({"alg": "None"}, claims(), "x"),
        unsigned({"alg": "HS256", "jwk": {"kty": "oct", "k": "eA"}}, claims(), "eA"),
        unsigned({"alg": "RS256", "kid": "../../etc/passwd"}, claims(), "eA"),
        unsigned({"alg": ["HS256"]}, claims(), "eA"),
        unsigned({}, claims()),
    ],
)
def test_what_is_no_valid_token_is_refused(header) -> None:
    with pytest.raises(Unauthenticated) as raised:
        Gate(KEY).caller(header)
    assert KEY not in str(raised.value)


def test_a_signed_token_that_was_changed_is_refused() -> None:
    head, body, signature = bearer(claims(scope="wallet", sub="7")).split(".")
    said = json.loads(base64.urlsafe_b64decode(body + "=="))
    forged = base64.urlsafe_b64encode(json.dumps(said | {"sub": "8"}).encode()).decode().rstrip("=")
    with pytest.raises(Unauthenticated):
        Gate(KEY).caller(f"{head}.{forged}.{signature}")


def test_a_remembered_token_still_expires(monkeypatch) -> None:
    gate = Gate(KEY)
    header = bearer(claims())
    gate.caller(header)
    monkeypatch.setattr(auth.time, "time", lambda now=time.time: now() + 2 * 86_400)
    with pytest.raises(Unauthenticated, match="expired"):
        gate.caller(header)


def test_the_memory_of_tokens_is_bounded_and_forged_ones_do_not_enter_it(monkeypatch) -> None:
    monkeypatch.setattr(auth, "REMEMBERED_MAX", 3)
    gate = Gate(KEY)
    headers = [bearer(claims(sub=str(n), scope="wallet")) for n in range(1, 6)]
    for header in headers:
        gate.caller(header)
    for n in range(5):
        with pytest.raises(Unauthenticated):
            gate.caller(f"Bearer forged{n}")
    assert list(gate._known) == headers[-3:]


def test_a_repeated_token_is_not_verified_again(monkeypatch) -> None:
    gate, header = Gate(KEY), bearer(claims())
    first = gate.caller(header)
    monkeypatch.setattr(auth.jwt, "decode", None)
    assert gate.caller(header) is first


@pytest.mark.parametrize("subject", ["", "0", "07", "-7", "7 ", "٧", "1e3", str(2**63), "7' OR '1'='1"])
def test_a_subject_that_is_no_wallet_allows_none(subject) -> None:
    caller = Gate(KEY).caller(bearer(claims(scope="wallet", sub=subject)))
    with pytest.raises(Forbidden):
        check_wallet(caller, subject)


def test_scopes_allow_what_they_say_and_nothing_else() -> None:
    far = time.time() + 60
    own = Caller("7", service=False, admin=False, expires_s=far)
    check_wallet(own, "7")
    for user in ("8", "07", ""):
        with pytest.raises(Forbidden):
            check_wallet(own, user)
    with pytest.raises(Forbidden):
        check_admin(own)
    check_wallet(Caller("", service=True, admin=False, expires_s=far), "8")
    with pytest.raises(Forbidden):
        check_wallet(Caller("", service=False, admin=True, expires_s=far), "8")
    caller = Gate(KEY).caller(bearer(claims(scope="services admins wallets", sub="7")))
    assert (caller.subject, caller.service, caller.admin) == ("", False, False)


def test_an_api_without_a_key_must_be_told_to_trust_everybody() -> None:
    with pytest.raises(ConfigError, match="token_key"):
        Gate(None)
    assert Gate(None, trust_every_caller=True).caller(None).admin
    with pytest.raises(ValueError, match="32 characters"):
        config(token_key="short")
    with pytest.raises(ValueError, match="user"):
        issue(config(), [Scope.WALLET], ttl_s=60)
    with pytest.raises(ConfigError, match="token_key"):
        issue(config(token_key=None), [Scope.SERVICE], ttl_s=60)
