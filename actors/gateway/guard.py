"""The gateway's outermost ASGI layer: who may call, and how much one call may ask for.

Before anything of the application runs it bounds the headers and the number of calls, asks for a credential, and checks
the role that the path needs; then it bounds the time of the body and of the whole call. Calls of administration are
written to the audit log, refused ones too. `/health` and `/ping` are open to all, so that load balancers need no
credential, and take no room, and so are the files of the console where it is served; everything else needs one where
the configuration names any, `/metrics` and the documentation of the interface included.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager

from joinwise.actors import logs
from joinwise.actors.gateway import console
from joinwise.actors.gateway.audit import Audit
from joinwise.actors.gateway.failures import count_refusal, note_error
from joinwise.actors.gateway.front import App, Message, Receive, Scope, Send, error_body, error_headers
from joinwise.actors.gateway.identity import Authenticator, Identity, caller
from joinwise.actors.gateway.tracing import headers_of, trace_headers
from joinwise.cluster.config_model import LimitsConfig
from joinwise.cluster.errors import (
    DeadlineExceededError,
    HeadersTooLargeError,
    JoinwiseError,
    OverloadedError,
    RequestTimeoutError,
    UnauthorizedError,
)

OPEN_TO_ALL = frozenset({"/health", "/ping"})
ADMINISTRATION = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/reset_prefix_cache"})
METRICS = frozenset({"/metrics", "/federate", "/ledgers", console.EVENTS, console.REQUEST})
_LONGEST_ID = 128


class Guard:
    """Wraps an ASGI application; see the module's text.

    Args:
        app: what to guard.
        authenticator: knows who may call.
        limits: what one call may ask for.
        audit: where calls of administration are recorded.
        open_paths: further paths that are open to all.
    """

    def __init__(
        self,
        app: App,
        authenticator: Authenticator,
        limits: LimitsConfig,
        audit: Audit,
        open_paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._limits = limits
        self._audit = audit
        self._open = OPEN_TO_ALL.union(open_paths)
        self._calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope["path"])
        identity: Identity | None = None

        def told(status: int) -> None:
            if path in ADMINISTRATION:
                client = scope.get("client") or ("", 0)
                self._audit.record(f"{scope['method']} {path}", status, identity=identity, client=str(client[0]))

        answer = _Answer(send, told)
        try:
            self._check_head(scope)
            if path in self._open:
                await self._app(scope, receive, answer.send)
                return
            identity = await self._admit(scope, path)
            with self._room(), _serving(scope, identity):
                async with asyncio.timeout(self._limits.request_s):
                    await self._app(scope, _Body(receive, self._limits.body_s).receive, answer.send)
        except JoinwiseError as error:
            await answer.refuse(error, path)
        except TimeoutError:
            late = DeadlineExceededError(f"the call has run for {self._limits.request_s:g} s, the longest allowed")
            await answer.refuse(late, path)
        finally:
            if not answer.status:
                told(0)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The same door; a refusal is a handshake that fails."""
        try:
            self._check_head(scope)
            identity = await self._admit(scope, str(scope["path"]))
            with self._room(), _serving(scope, identity):
                await self._app(scope, receive, send)
        except JoinwiseError as error:
            count_refusal(error)
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})

    def _check_head(self, scope: Scope) -> None:
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._limits.headers or size > self._limits.header_bytes:
            raise HeadersTooLargeError(
                f"more than {self._limits.headers} headers or {self._limits.header_bytes} bytes of them: send less"
            )

    async def _admit(self, scope: Scope, path: str) -> Identity:
        """Whose the call is. Raises UnauthorizedError or ForbiddenError."""
        if scope.get("method") == "OPTIONS":  # a browser asks without credentials whether it may ask with them
            return Identity("", frozenset({"user"}), "preflight")
        shown = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        shown += [b"Bearer " + value for name, value in scope["headers"] if name.lower() == b"x-api-key"]  # Anthropic's
        if len(shown) > 1 and self._authenticator.asks:
            raise UnauthorizedError("more than one credential: send one")
        identity = await self._authenticator.identify(shown[0].decode("latin-1") if shown else "")
        identity.require("admin" if path in ADMINISTRATION else "metrics" if path in METRICS else "user")
        return identity

    @contextmanager
    def _room(self) -> Iterator[None]:
        if self._calls >= self._limits.concurrent:
            raise OverloadedError(f"{self._calls} calls are running, the most for one gateway", retry_after_s=1.0)
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1


@contextmanager
def _serving(scope: Scope, identity: Identity) -> Iterator[None]:
    """Tell limits by tenant and log lines whose call it is."""
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    given = headers.get("x-request-id", "")[:_LONGEST_ID]
    who, which = caller.set(identity), logs.request_id.set(given if given.isprintable() else "")
    trace = trace_headers.set(headers_of(headers))
    try:
        yield
    finally:
        caller.reset(who)
        logs.request_id.reset(which)
        trace_headers.reset(trace)


class _Body:
    """A body that must have arrived in time. What comes after it (a disconnect) may take as long as it likes."""

    def __init__(self, receive: Receive, patience_s: float) -> None:
        self._receive = receive
        self._patience_s = patience_s
        self._deadline = time.monotonic() + patience_s
        self._complete = False

    async def receive(self) -> Message:
        """The next message. Raises RequestTimeoutError when the body is late."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            error = RequestTimeoutError(f"the body did not arrive within {self._patience_s:g} s")
            raise note_error(error) from None  # the application may make something else of it
        self._complete = not message.get("more_body", False)
        return message


class _Answer:
    """What the caller has been told; `told` hears of the status before the caller does."""

    def __init__(self, send: Send, told: Callable[[int], None]) -> None:
        self._send = send
        self._told = told
        self.status = 0

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on. No coroutine of its own: this runs for every token."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            self._told(self.status)
        return self._send(message)

    async def refuse(self, error: JoinwiseError, path: str) -> None:
        """Answer with an error, if nothing has been said."""
        count_refusal(error)
        if self.status:
            return
        body = json.dumps(error_body(error, path)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
        if error.http_status == 401:
            headers["www-authenticate"] = "Bearer"
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.http_status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})
