"""Who calls: plain keys, hashed keys and JSON web tokens, with every way in which they can be wrong."""

from __future__ import annotations

import json
import logging
import os
import time
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from joinwise.actors.gateway import identity as module
from joinwise.actors.gateway.identity import ANYBODY, Authenticator, Identity, bound, caller
from joinwise.cluster import apikeys
from joinwise.cluster.config import GatewayConfig, JwtConfig
from joinwise.cluster.errors import ConfigError, ForbiddenError, UnauthorizedError
from joinwise.cluster.router.terms import Terms

PRIVATE = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(autouse=True)
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.0)


async def identify(authenticator: Authenticator, token: str) -> Identity:
    return await authenticator.identify(f"Bearer {token}")


async def refused(authenticator: Authenticator, header: str, sentence: str = ".") -> None:
    with pytest.raises(UnauthorizedError, match=sentence) as caught:
        await authenticator.identify(header)
    token = header.partition(" ")[2]
    assert len(token) < 8 or token not in str(caught.value)


async def test_nobody_is_asked() -> None:
    authenticator = Authenticator(GatewayConfig())
    assert not authenticator.asks
    assert await authenticator.identify("") is ANYBODY


async def test_plain_keys() -> None:
    authenticator = Authenticator(GatewayConfig(api_keys=["first-key", "second"]))
    for token in ("first-key", "second"):
        found = await identify(authenticator, token)
        assert found.tenant == "default" and "admin" in found.roles and token not in found.key
    for header in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer firs",
        "Basic first-key",
        "first-key",
        "Bearer first-key ",
        "Bearer ж",
    ):
        await refused(authenticator, header)
    await refused(authenticator, "Bearer " + "x" * 100_000)


async def test_hashed_keys_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.yaml"
    first, entry = apikeys.make("search", ("user",))
    apikeys.KeyRing((entry,)).save(path)
    authenticator = Authenticator(GatewayConfig(keys_file=str(path)))
    found = await identify(authenticator, first)
    assert found == Identity("search", frozenset({"user"}), entry.id)
    found.require("user")
    with pytest.raises(ForbiddenError, match="admin"):
        found.require("admin")
    second, other = apikeys.make("ads", ("admin",))
    apikeys.KeyRing((other,)).save(path)
    await refused(authenticator, f"Bearer {first}")  # revoked
    (await identify(authenticator, second)).require("metrics")  # an admin may do everything
    path.write_text("version: 1\nkeys: [{}]")
    assert (await identify(authenticator, second)).tenant == "ads"
    path.unlink()
    assert (await identify(authenticator, second)).tenant == "ads"
    assert caplog.text.count("stays in force") == 1


def test_files_that_are_missing_at_the_start(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot be read"):
        Authenticator(GatewayConfig(keys_file=missing))
    with pytest.raises(ConfigError, match="cannot be read"):
        Authenticator(GatewayConfig(jwt=JwtConfig(issuer="i", audience="a", jwks_file=missing)))


def test_nobody_speaks_for_another_tenant() -> None:
    said = Terms(tenant="rich", session="s")
    for who, tenant in (
        (Identity("search", frozenset({"user"}), "k"), "search"),
        (Identity("ops", frozenset({"admin"}), "k"), "rich"),  # a trusted front of several tenants
        (ANYBODY, "rich"),
    ):
        token = caller.set(who)
        try:
            assert bound(said) == Terms(tenant=tenant, session="s")
        finally:
            caller.reset(token)
    token = caller.set(Identity("ops", frozenset({"admin"}), "k"))
    try:
        assert bound(Terms()).tenant == "ops"
    finally:
        caller.reset(token)


# JSON web tokens.


def public(key: Any, kid: str) -> dict[str, Any]:
    algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "use": "sig"}


def write_keys(path: Path, *keys: dict[str, Any]) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"keys": list(keys)}))
    os.replace(fresh, path)


@pytest.fixture
def key_set(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    write_keys(path, public(PRIVATE, "one"))
    return path


@pytest.fixture
def tokens(key_set: Path) -> Authenticator:
    settings = JwtConfig(issuer="https://id.example", audience="joinwise", jwks_file=str(key_set), leeway_s=5)
    return Authenticator(GatewayConfig(jwt=settings))


def sign(key: Any = PRIVATE, algorithm: str = "ES256", kid: str | None = "one", **claims: Any) -> str:
    usual = {"iss": "https://id.example", "aud": "joinwise", "sub": "search", "exp": int(time.time()) + 60}
    given = {name: value for name, value in (usual | claims).items() if value is not None}
    return jwt.encode(given, key, algorithm=algorithm, headers={"kid": kid} if kid else None)


async def test_a_token_says_who_calls(tokens: Authenticator) -> None:
    assert await identify(tokens, sign()) == Identity("search", frozenset({"user"}), "jwt-search")
    found = await identify(tokens, sign(roles=["admin", "chef"]))
    assert found.roles == {"admin"}  # roles of others are not ours
    await identify(tokens, sign(exp=int(time.time()) - 2))  # within the leeway


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"exp": 1}, "expired"),
        ({"exp": None}, "lacks exp"),
        ({"nbf": 9_999_999_999}, "not valid yet"),
        ({"aud": "another"}, "somebody else"),
        ({"aud": None}, "lacks exp, iss or aud|somebody else"),
        ({"iss": "https://evil.example"}, "another issuer"),
        ({"sub": None}, "names no tenant"),
        ({"sub": ""}, "names no tenant"),
        ({"roles": "admin"}, "no list of roles"),
        ({"roles": [["admin"]]}, "no list of roles"),
        ({"kid": "two"}, "does not publish"),
        ({"kid": None}, "does not publish"),
    ],
)
async def test_tokens_that_are_refused(tokens: Authenticator, changes: dict[str, Any], sentence: str) -> None:
    await refused(tokens, f"Bearer {sign(**changes)}", sentence)


async def test_a_token_that_is_replayed_is_good_until_it_expires(
    tokens: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gateways remember no token that they have seen, neither as used up nor as still good."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=70)

    overheard = sign()
    for _ in range(2):
        assert (await identify(tokens, overheard)).tenant == "search"
    monkeypatch.setattr("jwt.api_jwt.datetime", Later)
    await refused(tokens, f"Bearer {overheard}", "expired")


async def test_forged_tokens_are_refused(tokens: Authenticator) -> None:
    await refused(tokens, f"Bearer {sign(ec.generate_private_key(ec.SECP256R1()))}", "signature is wrong")
    head, body, signature = sign().split(".")
    await refused(tokens, f"Bearer {head}.{sign(roles=['admin']).split('.')[1]}.{signature}", "signature is wrong")
    unsigned = jwt.encode({"sub": "search"}, None, algorithm="none", headers={"kid": "one"})
    await refused(tokens, f"Bearer {unsigned}", "not accepted|cannot be read")
    for junk in ("a.b.c", "..", f"{head}..", "x" * 5000 + ".b.c", f"{head}.{body}.{signature}.more"):
        await refused(tokens, f"Bearer {junk}")


async def test_the_public_key_is_no_shared_secret(tokens: Authenticator, key_set: Path) -> None:
    """The old confusion: a token "signed" with HS256, whose secret is the public key that everybody can read."""
    pem = PRIVATE.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    import base64
    import hashlib
    import hmac

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    claims = {"iss": "https://id.example", "aud": "joinwise", "sub": "x", "exp": 9_999_999_999}
    signed = f"{part(json.dumps({'alg': 'HS256', 'kid': 'one'}).encode())}.{part(json.dumps(claims).encode())}"
    signature = part(hmac.new(pem, signed.encode(), hashlib.sha256).digest())
    await refused(tokens, f"Bearer {signed}.{signature}", "not accepted")
    # A symmetric key in the set is not used, whatever it says.
    write_keys(key_set, public(PRIVATE, "one"), {"kty": "oct", "k": part(b"k" * 32), "kid": "sym", "alg": "HS256"})
    await refused(tokens, f"Bearer {sign('k' * 32, 'HS256', 'sym')}", "does not publish|not accepted")


async def test_a_kind_of_signature_that_is_not_configured(tokens: Authenticator, key_set: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    write_keys(key_set, public(PRIVATE, "one"), public(key, "rsa"))
    assert (await identify(tokens, sign(key, "RS256", "rsa"))).tenant == "search"
    await refused(tokens, f"Bearer {sign(key, 'PS256', 'rsa')}", "not accepted")


async def test_rotated_signing_keys_are_followed(tokens: Authenticator, key_set: Path) -> None:
    fresh = ec.generate_private_key(ec.SECP256R1())
    write_keys(key_set, public(fresh, "two"))
    assert (await identify(tokens, sign(fresh, kid="two"))).tenant == "search"
    await refused(tokens, f"Bearer {sign()}", "does not publish")


async def test_an_issuer_is_asked_for_new_keys_but_not_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    keys = {"keys": [public(PRIVATE, "one")]}

    def fetch(url: str) -> Any:
        asked.append(url)
        if len(asked) == 1:
            raise OSError("no route")
        return module._parse_keys(json.dumps(keys).encode(), url)

    monkeypatch.setattr(module, "_fetch_keys", fetch)
    settings = JwtConfig(issuer="https://id.example", audience="joinwise", jwks_url="https://id.example/jwks")
    authenticator = Authenticator(GatewayConfig(jwt=settings))
    await refused(authenticator, f"Bearer {sign()}", "does not publish")
    assert "no route" in caplog.text
    await refused(authenticator, f"Bearer {sign()}", "does not publish")
    assert len(asked) == 1  # not again so soon
    monkeypatch.setattr(module, "_FETCH_EVERY_S", 0.0)
    assert (await identify(authenticator, sign())).tenant == "search"
    assert (await identify(authenticator, sign())).tenant == "search"
    assert len(asked) == 2  # a known key needs no question


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": []}', '{"keys": [{"kty": "EC"}]}', '{"keys": 1}', "\xff"])
def test_key_sets_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no JSON web key set"):
        Authenticator(GatewayConfig(jwt=JwtConfig(issuer="i", audience="a", jwks_file=str(path))))


async def test_no_token_reaches_the_log(tokens: Authenticator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = sign(exp=1)
    await refused(tokens, f"Bearer {token}")
    assert token not in caplog.text
