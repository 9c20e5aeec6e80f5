"""The ASGI layer that gives each call to its model's front end, where a gateway serves several models.

A call names its model in its body, as everywhere with OpenAI and Anthropic. What cannot be read goes to the first
model's front end, which refuses it as vLLM does; a body that leaves the model open is refused here. A gateway with one
model has no such layer, and reads no body twice.
"""

import json
import re
from urllib.parse import parse_qs

import msgspec
from fastapi import FastAPI
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ModelList

from joinwise.actors.gateway.front import Message, Receive, Scope, Send
from joinwise.actors.gateway.guard import ADMINISTRATION
from joinwise.actors.gateway.models import Models

_STORED = re.compile(r"/v1/responses/([^/]+)(?:/cancel)?")
_BY_QUERY = frozenset({"/tokenizer_info"})


class _Named(msgspec.Struct):
    model: str | None = None


_decoder = msgspec.json.Decoder(_Named)


class Dispatch:
    """Serves several models; see the module's text."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection.

        Raises:
            InvalidRequestError: the call does not say which model it is for.
        """
        if scope["type"] != "http":
            await self._models.first(scope, receive, send)
            return
        path, method = str(scope["path"]), scope["method"]
        if path == "/v1/models" and method == "GET":
            listed = ModelList(data=await self._models.cards())
            await JSONResponse(listed.model_dump())(scope, receive, send)
            return
        if stored := _STORED.fullmatch(path):
            app = self._models.holding(stored[1])
        elif path in _BY_QUERY:
            asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model", [""])
            app = self._models.choose(asked[-1])
        elif method == "POST" and path not in ADMINISTRATION:  # the routes of those choose by themselves
            received = await _all_of(receive)
            app, receive = self._by_body(received), _Again(received, receive)
        else:
            app = self._models.first
        await app(scope, receive, send)

    def _by_body(self, received: list[Message]) -> FastAPI:
        try:
            name = model_named(b"".join(message.get("body", b"") for message in received))
        except ValueError:
            return self._models.first
        return self._models.choose(name)


def model_named(body: bytes) -> str | None:
    """The `model` of a request, as vLLM's front end would read it.

    Raises:
        ValueError: the body is no JSON object, or its model is no text.
    """
    try:
        return _decoder.decode(body).model
    except (msgspec.DecodeError, RecursionError):
        pass  # Python's parser, which vLLM uses, takes more: NaN, other encodings than UTF-8
    try:
        value = json.loads(body)
    except RecursionError:
        raise ValueError("JSON that is too deep") from None
    name = value.get("model") if isinstance(value, dict) else 0
    if name is not None and not isinstance(name, str):
        raise ValueError("no JSON object with a model's name")
    return name


async def _all_of(receive: Receive) -> list[Message]:
    """The messages that bring a body, up to its end or to the client's."""
    received = [await receive()]
    while received[-1]["type"] == "http.request" and received[-1].get("more_body"):
        received.append(await receive())
    return received


class _Again:
    """Gives messages that were received before, then those that follow."""

    def __init__(self, received: list[Message], receive: Receive) -> None:
        self._received = received[::-1]
        self._receive = receive

    async def __call__(self) -> Message:
        return self._received.pop() if self._received else await self._receive()
