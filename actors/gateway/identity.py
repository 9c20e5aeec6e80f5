"""Who calls: API keys and JSON web tokens, for the HTTP and the gRPC front door alike.

`Authenticator.identify` turns a bearer token into an `Identity` (tenant, roles, and a name of the key that is fit for
logs), or raises. Files of keys and of the provider's public keys are read again when they change; one that has become
unreadable leaves what was read before in force. Nothing here writes a token anywhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
import jwt

from joinwise.actors.auth import OPEN_TO_ALL, in_shape_of
from joinwise.actors.gateway.failures import count_refusal, details_of, status_of, trailer_of
from joinwise.cluster import apikeys
from joinwise.cluster.config_model import GatewayConfig, JwtConfig
from joinwise.cluster.errors import ConfigError, ForbiddenError, JoinwiseError, UnauthorizedError
from joinwise.cluster.router.terms import Terms

logger = logging.getLogger(__name__)

_REFUSAL = "no token, or one that is not known: send `authorization: Bearer <token>`"
_LOOK_EVERY_S = 1.0
_FETCH_EVERY_S = 30.0
_FETCH_TIMEOUT_S = 5.0
_LARGEST_KEY_SET = 1 << 20
_LONGEST_TOKEN = 16 << 10
Value = TypeVar("Value")


@dataclass(frozen=True)
class Identity:
    """A caller.

    Attributes:
        tenant: whose limits and accounts the call goes to; empty where nobody is asked who they are.
        roles: what the caller may do; see `apikeys.ROLES`.
        key: names the credential in logs and audits, without being one.
    """

    tenant: str
    roles: frozenset[str]
    key: str

    def require(self, role: str) -> None:
        """Raises ForbiddenError unless the caller has a role; `admin` has all of them."""
        if role not in self.roles and "admin" not in self.roles:
            raise ForbiddenError(f"this credential lacks the role {role!r}")


#: With nobody asked who they are, everybody may do what the configuration opens.
ANYBODY = Identity("", frozenset(apikeys.ROLES), "anybody")
#: The caller of the call that runs now, for limits by tenant.
caller: ContextVar[Identity] = ContextVar("joinwise_caller", default=ANYBODY)


def bound(terms: Terms) -> Terms:
    """The terms of a call, with its caller's tenant in place of what the call says; an admin may speak for another."""
    identity = caller.get()
    if "admin" in identity.roles and terms.tenant:
        return terms
    return replace(terms, tenant=identity.tenant)


class Authenticator:
    """Knows the credentials of one gateway.

    Args:
        settings: where they are.

    Raises:
        ConfigError: a file of theirs cannot be read.
    """

    def __init__(self, settings: GatewayConfig) -> None:
        self._plain = [token.encode() for token in settings.api_keys]
        self._ring = _Watched(Path(settings.keys_file), apikeys.load) if settings.keys_file else None
        self._tokens = _Tokens(settings.jwt) if settings.jwt else None

    @property
    def asks(self) -> bool:
        """Whether callers must show something."""
        return bool(self._plain or self._ring or self._tokens)

    async def identify(self, authorization: str) -> Identity:
        """Whose an `authorization` header is.

        Raises:
            UnauthorizedError: nobody's.
        """
        if not self.asks:
            return ANYBODY
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > _LONGEST_TOKEN:
            raise UnauthorizedError(_REFUSAL)
        matches = [hmac.compare_digest(token.encode(), known) for known in self._plain]  # all: no early end
        if any(matches):
            name = hashlib.sha256(token.encode()).hexdigest()[:8]
            return Identity("default", frozenset(apikeys.ROLES), f"plain-{name}")
        if self._ring is not None and (entry := self._ring.value.find(token)) is not None:
            return Identity(entry.tenant, frozenset(entry.roles), entry.id)
        if self._tokens is not None and token.count(".") == 2:
            return await self._tokens.identify(token)
        raise UnauthorizedError(_REFUSAL)


class AsyncIdentity(grpc.aio.ServerInterceptor):
    """Lets in gRPC calls with a known credential, and says whose they are; health checks are open to all."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler_call_details.method.startswith(OPEN_TO_ALL):
            return handler
        metadata: Iterable[tuple[str, Any]] = handler_call_details.invocation_metadata or ()
        shown = [str(value) for name, value in metadata if name == "authorization"]
        try:
            if len(shown) > 1:
                raise UnauthorizedError("more than one credential: send one")
            identity = await self._authenticator.identify(shown[0] if shown else "")
            identity.require("user")
        except JoinwiseError as error:
            count_refusal(error)
            return in_shape_of(handler, _refusal_of(error))
        caller.set(identity)  # the call's own task
        return handler


def _refusal_of(error: JoinwiseError) -> Callable[..., Awaitable[None]]:
    async def refuse(request: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(status_of(error), details_of(error), trailer_of(error))

    return refuse


class _Watched(Generic[Value]):
    """A file's content, read again when the file has changed."""

    def __init__(self, path: Path, read: Callable[[Path], Value]) -> None:
        self._path, self._read = path, read
        self._value = read(path)
        self._mark = self._now()
        self._looked = time.monotonic()

    @property
    def value(self) -> Value:
        """What the file says, as of the last second."""
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return self._value
        self._looked = time.monotonic()
        mark = self._now()
        if mark is not None and mark != self._mark:
            self._mark = mark
            try:
                self._value = self._read(self._path)
                logger.info("%s has changed and is in use", self._path)
            except ConfigError as error:
                logger.error("what was read before stays in force: %s", error)
        return self._value

    def _now(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None  # between two renames; what was read before stays
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


class _Tokens:
    """JSON web tokens of one issuer."""

    def __init__(self, settings: JwtConfig) -> None:
        self._settings = settings
        self._file = _Watched(Path(settings.jwks_file), _read_keys) if settings.jwks_file else None
        self._fetched: dict[str, jwt.PyJWK] = {}
        self._fetched_at = -_FETCH_EVERY_S
        self._fetching = asyncio.Lock()

    async def identify(self, token: str) -> Identity:
        """Whose a token is. Raises UnauthorizedError, with the reason but nothing of the token."""
        settings = self._settings
        try:
            key = await self._key(str(jwt.get_unverified_header(token).get("kid", "")))
            claims = jwt.decode(
                token,
                key,
                algorithms=list(settings.algorithms),
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.PyJWTError as error:
            raise UnauthorizedError(f"the token is refused: {_reason(error)}") from None
        tenant, roles = claims.get(settings.tenant_claim), claims.get(settings.roles_claim, ["user"])
        if not isinstance(tenant, str) or not tenant or len(tenant) > 256:
            raise UnauthorizedError(f"the token names no tenant (claim {settings.tenant_claim!r})")
        if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
            raise UnauthorizedError(f"the token's claim {settings.roles_claim!r} is no list of roles")
        return Identity(tenant, frozenset(roles) & frozenset(apikeys.ROLES), f"jwt-{tenant}")

    async def _key(self, kid: str) -> jwt.PyJWK:
        known = self._file.value if self._file is not None else self._fetched
        if kid not in known and self._settings.jwks_url is not None:
            known = await self._fetch(kid)
        if kid not in known:
            raise jwt.InvalidKeyError("signed by a key that the issuer does not publish")
        return known[kid]

    async def _fetch(self, kid: str) -> dict[str, jwt.PyJWK]:
        """Ask the issuer, one at a time and not often: a token with an invented key id costs it nothing."""
        async with self._fetching:
            if kid not in self._fetched and time.monotonic() - self._fetched_at >= _FETCH_EVERY_S:
                self._fetched_at = time.monotonic()
                try:
                    self._fetched = await asyncio.to_thread(_fetch_keys, str(self._settings.jwks_url))
                except (OSError, ConfigError) as error:
                    logger.error("the issuer's keys cannot be had: %s", error)
            return self._fetched


def _read_keys(path: Path) -> dict[str, jwt.PyJWK]:
    try:
        return _parse_keys(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"the key set {path} cannot be read: {error.strerror}") from None


def _fetch_keys(url: str) -> dict[str, jwt.PyJWK]:
    with urllib.request.urlopen(url, timeout=_FETCH_TIMEOUT_S) as response:  # noqa: S310 - https only, by the schema
        return _parse_keys(response.read(_LARGEST_KEY_SET), url)


def _parse_keys(text: bytes, source: str) -> dict[str, jwt.PyJWK]:
    """Public keys by id. A symmetric key in the set would let anybody who can read it sign."""
    try:
        data: Any = json.loads(text)
        keys = jwt.PyJWKSet.from_dict(data).keys
    except (ValueError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise ConfigError(f"{source} is no JSON web key set: {type(error).__name__}") from None
    return {key.key_id or "": key for key in keys if key.key_type != "oct"}


def _reason(error: jwt.PyJWTError) -> str:
    """A sentence without the token's content."""
    reasons: dict[type[jwt.PyJWTError], str] = {
        jwt.ExpiredSignatureError: "it has expired",
        jwt.ImmatureSignatureError: "it is not valid yet",
        jwt.InvalidAudienceError: "it is for somebody else",
        jwt.InvalidIssuerError: "it comes from another issuer",
        jwt.InvalidSignatureError: "its signature is wrong",
        jwt.InvalidAlgorithmError: "its signature is of a kind that is not accepted",
        jwt.InvalidKeyError: "it is signed by a key that the issuer does not publish",
        jwt.MissingRequiredClaimError: "it lacks exp, iss or aud",
    }
    return next((text for kind, text in reasons.items() if isinstance(error, kind)), "it cannot be read")
