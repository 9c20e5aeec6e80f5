"""The ASGI layer in front of vLLM's HTTP application.

It does four things that vLLM's routes cannot: it refuses bodies that are too large before they are
read, it holds back a response's first bytes until the request has been routed (so that 429 and 503
are real statuses, also with stream=true), it adds the ledger where the client asks for one, and it
settles what a call that died early has left.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from joinwise.actors.gateway.failures import NotedErrors, count_refusal, note_error
from joinwise.actors.gateway.identity import bound
from joinwise.actors.gateway.ledgers import Ledgers
from joinwise.actors.gateway.tickets import Ticket, call_terms, call_tickets
from joinwise.cluster.errors import JoinwiseError, RequestTooLargeError
from joinwise.cluster.router.terms import PLAIN, Terms

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_DONE = b"data: [DONE]"


class Front:
    """Wraps an ASGI application; see the module's text."""

    def __init__(self, app: App, ledgers: Ledgers, *, max_body_bytes: int) -> None:
        self._app = app
        self._ledgers = ledgers
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        noted = NotedErrors()
        call = _Call(self._ledgers, receive, send, self._max_body_bytes, scope, noted)
        token, terms = call_tickets.set(call.tickets), call_terms.set(PLAIN)
        try:
            with noted:
                call.check_length()
                call_terms.set(bound(Terms.parse(call.headers)))
                await self._app(scope, call.receive, call.send)
        except JoinwiseError as error:
            await call.refuse(error)
        except Exception:
            if noted.last is None or call.started:
                raise
            await call.refuse(noted.last)  # the application has made something else of it
        finally:
            call_tickets.reset(token)
            call_terms.reset(terms)
            for ticket in call.tickets:
                await ticket.settle()


def error_body(error: JoinwiseError, path: str = "") -> dict[str, Any]:
    """An error as the clients of a path read it: Anthropic's below /v1/messages, else OpenAI's."""
    kind = "invalid_request_error" if error.http_status < 500 and error.http_status != 429 else error.code
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def error_headers(error: JoinwiseError) -> dict[str, str]:
    """Headers that go with an error."""
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, round(error.retry_after_s)))}


class _Call:
    """One call: what it has taken, and what of its answer has been sent."""

    def __init__(
        self,
        ledgers: Ledgers,
        receive: Receive,
        send: Send,
        max_body_bytes: int,
        scope: Scope,
        noted: NotedErrors,
    ) -> None:
        self.tickets: list[Ticket] = []
        self.started = False
        self._ledgers = ledgers
        self._receive = receive
        self._send = send
        self._limit = max_body_bytes
        self.headers = _headers(scope)
        self._path = str(scope.get("path", ""))
        self._noted = noted
        self._held: list[Message] = []
        self._received = 0
        self._replaced = False
        self._wants_ledger = self.headers.get("x-joinwise-ledger") == "1"
        self._streams = False

    def check_length(self) -> None:
        """Refuse a body whose length says that it is too large."""
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        """Pass a message on, counting the body."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self._limit:
                raise note_error(self._too_large())  # the application makes a 400 of it
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on, once the request has its workers.

        A stream that begins before vLLM's `generate` was called (/v1/responses) is held until then.
        """
        if self.started and not self._wants_ledger and not self._replaced:
            return self._send(message)  # a stream that goes on: this runs for every token, without a coroutine of ours
        return self._hold_or_pass(message)

    async def _hold_or_pass(self, message: Message) -> None:
        if self._replaced:
            return
        start = message["type"] == "http.response.start"
        if not self.tickets and ((start and _streams(message)) or (self._held and message.get("more_body"))):
            self._held.append(message)
            return
        held, self._held = self._held, []
        for each in (*held, message):
            await self._pass(each)

    async def refuse(self, error: JoinwiseError) -> None:
        """Answer with an error, if nothing has been sent."""
        self._replaced = True  # whatever the application still says is not heard
        count_refusal(error)
        if self.started:
            return
        self.started = True
        body = json.dumps(error_body(error, self._path)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": error.http_status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})

    async def _pass(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            try:
                if self._noted.last is not None and message["status"] >= 400:
                    raise self._noted.last  # as it was, before vLLM made its own answer of it
                for ticket in self.tickets:
                    await ticket.admit()
            except JoinwiseError as error:
                await self.refuse(error)
                return
            self.started = True
            self._start(message)
        elif message["type"] == "http.response.body" and self._wants_ledger and self._streams:
            message = self._with_ledger(message)
        await self._send(message)

    def _start(self, message: Message) -> None:
        self._streams = _streams(message)
        if self._wants_ledger and not self._streams and (ledger := self._ledger()):
            message["headers"] = [*message["headers"], (b"x-joinwise-ledger", ledger)]

    def _with_ledger(self, message: Message) -> Message:
        """Put the ledger, as an SSE comment that clients skip, before the stream's end."""
        body = message.get("body", b"")
        ending = _DONE in body or not message.get("more_body", False)
        if ending and (ledger := self._ledger()):
            self._wants_ledger = False
            head, done, tail = body.partition(_DONE)
            return {**message, "body": head + b": joinwise-ledger " + ledger + b"\n\n" + done + tail}
        return message

    def _ledger(self) -> bytes:
        started = [request_id for ticket in self.tickets for request_id in ticket.started]
        found = [ledger for request_id in started if (ledger := self._ledgers.get(request_id)) is not None]
        if not found:
            return b""
        parts = [json.loads(ledger.to_json()) for ledger in found]
        return json.dumps(parts[0] if len(parts) == 1 else parts, separators=(",", ":")).encode()

    def _too_large(self) -> RequestTooLargeError:
        return RequestTooLargeError(f"the request's body is larger than {self._limit} bytes: send less")


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _streams(message: Message) -> bool:
    headers = message.setdefault("headers", [])
    return bool(dict(headers).get(b"content-type", b"").startswith(b"text/event-stream"))
