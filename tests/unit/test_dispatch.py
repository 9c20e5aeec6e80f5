"""Several models behind one gateway: each call reaches the model that it names, and no other one."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry
from starlette.datastructures import State
from starlette.requests import ClientDisconnect
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList

from joinwise.actors.gateway.dispatch import Dispatch, model_named
from joinwise.actors.gateway.front import Front
from joinwise.actors.gateway.ledgers import Ledgers
from joinwise.actors.gateway.models import Models
from joinwise.cluster.errors import InvalidRequestError

LIMIT = 100_000
CHAT = "/v1/chat/completions"
PATHS = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize"]


class Listing:
    """vLLM's list of one model and its adapters."""

    def __init__(self, name: str, *adapters: str) -> None:
        self.name, self.lora_requests = name, dict.fromkeys(adapters)

    async def show_available_models(self) -> ModelList:
        adapters = [ModelCard(id=each, parent=self.name) for each in self.lora_requests]
        return ModelList(data=[ModelCard(id=self.name, max_model_len=64), *adapters])


def state_of(name: str, *adapters: str) -> State:
    """As vLLM leaves it, as far as it is looked at here."""
    responses = SimpleNamespace(response_store={f"resp_of_{name}": 1})
    return State(
        {
            "openai_serving_models": Listing(name, *adapters),
            "openai_serving_responses": responses,
            "gate": asyncio.Event(),
        }
    )


class World:
    """Two models, `a` with the adapter `a-law` and `b` with `b-med`, behind a front."""

    def __init__(self) -> None:
        self.served: list[tuple[str, str]] = []
        app = FastAPI()
        for path in PATHS:
            app.add_api_route(path, self.answer, methods=["POST"])
        app.add_api_route("/v1/reset_prefix_cache", self.whoever, methods=["POST"])
        app.add_api_route("/v1/responses/{name}", self.whoever, methods=["GET"])
        app.add_api_route("/v1/responses/{name}/cancel", self.whoever, methods=["POST"])
        for path in ("/health", "/tokenizer_info"):
            app.add_api_route(path, self.whoever, methods=["GET"])
        app.state = state_of("a", "a-law")
        other = copy.copy(app)
        other.state = state_of("b", "b-med")
        self.a, self.b = app, other
        self.models = Models({"a": app, "b": other})
        self.front = Front(Dispatch(self.models), Ledgers(CollectorRegistry()), max_body_bytes=LIMIT)

    async def whoever(self, request: Request) -> dict[str, str]:
        return {"by": request.app.state.openai_serving_models.name}

    async def answer(self, request: Request) -> Any:
        """As vLLM's front end: reads the body, refuses what it does not serve."""
        listing = request.app.state.openai_serving_models
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            return JSONResponse({"error": {"message": "not JSON", "by": listing.name}}, 400)
        if not isinstance(body, dict) or not isinstance(body.get("model"), str | None):
            return JSONResponse({"error": {"message": "not a request", "by": listing.name}}, 422)
        name = body.get("model")
        if name and name != listing.name and name not in listing.lora_requests:
            return JSONResponse({"error": {"message": f"The model `{name}` does not exist.", "code": 404}}, 404)
        self.served.append((listing.name, request.url.path))
        if body.get("stream"):
            return StreamingResponse(self.tokens(request), media_type="text/event-stream")
        return {"by": listing.name, "model": name, "text": body.get("text", "")}

    async def tokens(self, request: Request) -> AsyncIterator[str]:
        for index in range(3):
            if index == 2:
                await request.app.state.gate.wait()
            yield f"data: {request.app.state.openai_serving_models.name}{index}\n\n"


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def http(world: World) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(world.front), base_url="http://test")


@pytest.mark.parametrize("path", PATHS)
async def test_the_body_says_which_model(world: World, http: httpx.AsyncClient, path: str) -> None:
    for model, by in (("a", "a"), ("b", "b"), ("b-med", "b"), ("a-law", "a")):
        answer = await http.post(path, json={"text": "x" * 50, "model": model})
        assert (answer.status_code, answer.json()) == (200, {"by": by, "model": model, "text": "x" * 50})
    assert [by for by, _ in world.served] == ["a", "b", "b", "a"]


@pytest.mark.parametrize("path", PATHS)
async def test_an_unknown_model_is_refused_as_by_vllm(world: World, http: httpx.AsyncClient, path: str) -> None:
    answer = await http.post(path, json={"model": "c"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "The model `c` does not exist.")
    assert world.served == []


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": ""}])
async def test_several_models_and_none_named(world: World, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await http.post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
    assert "one of a, b" in answer.json()["error"]["message"]
    answer = await http.post("/v1/messages", json=body)
    assert (answer.status_code, answer.json()["type"]) == (400, "error")
    assert world.served == []


_DEEP = b'{"model": "b", "text": ' + b"[" * 40_000


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"model": "b"', 400),
        (b'{"model": "b"} {}', 400),
        (b"\xff\xfe\x00", 400),
        (_DEEP, 400),
        (b"[1]", 422),
        (b'"b"', 422),
        (b"null", 422),
        (b'{"model": 3}', 422),
        (b'{"model": ["b"]}', 422),
    ],
)
async def test_what_is_no_request_is_refused_as_by_vllm(
    world: World, http: httpx.AsyncClient, body: bytes, status: int
) -> None:
    answer = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["by"]) == (status, "a")
    assert world.served == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a", "model": "b"}',  # the last one counts
        b'{"text": NaN, "model": "b"}',
        b'{"text": Infinity, "model": "b"}',
        b'{"text": "\\ud800", "model": "b"}',
        b'{"messages": {"model": "a"}, "model": "b"}',
        b'{"mod\\u0065l": "\\u0062"}',
        b'\n\t {"model": "b"} \r\n',
        '{"model": "b"}'.encode("utf-16"),
        '{"model": "b"}'.encode("utf-8-sig"),
        '{"model": "b"}'.encode("utf-32-be"),
    ],
)
def test_a_model_is_read_as_vllm_reads_it(body: bytes) -> None:
    assert model_named(body) == json.loads(body)["model"] == "b"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"null", b'{"model": 1}', _DEEP, b"[" * 100_000, b"\xff"])
def test_a_model_that_cannot_be_read(body: bytes) -> None:
    with pytest.raises(ValueError):
        model_named(body)


async def test_two_streams_at_once(world: World, http: httpx.AsyncClient) -> None:
    calls = {
        name: asyncio.create_task(http.post(CHAT, json={"model": name, "stream": True})) for name in ("a", "b-med")
    }
    while len(world.served) < 2:
        await asyncio.sleep(0)
    world.b.state.gate.set()  # the later one ends first
    assert (await calls["b-med"]).text == "data: b0\n\ndata: b1\n\ndata: b2\n\n"
    assert not calls["a"].done()
    world.a.state.gate.set()
    assert (await calls["a"]).text == "data: a0\n\ndata: a1\n\ndata: a2\n\n"


async def test_many_at_once_are_not_mixed_up(http: httpx.AsyncClient) -> None:
    names = ["a", "b", "b-med", "a-law"] * 25
    answers = await asyncio.gather(*(http.post(CHAT, json={"model": name, "text": name}) for name in names))
    assert [(each.json()["by"], each.json()["text"]) for each in answers] == [(name[0], name) for name in names]


async def test_a_body_in_pieces(http: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in b'{"text": "piecemeal", "model": "b"}':
            yield bytes([byte])

    answer = await http.post(CHAT, content=pieces())
    assert answer.json() == {"by": "b", "model": "b", "text": "piecemeal"}


async def test_a_body_that_is_too_large_reaches_no_model(world: World, http: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 10_000

    answer = await http.post(CHAT, content=endless())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert world.served == []


async def test_a_client_that_leaves_in_the_middle_of_its_body(world: World) -> None:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b'{"model": ', "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "headers": []}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "client": ("c", 1), "server": ("s", 1)}
    async with asyncio.timeout(10):
        with pytest.raises(ClientDisconnect):  # nobody is there to be told
            await world.front(scope, receive, send)
    assert world.served == []


async def test_what_is_about_no_model(world: World, http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).json() == {"by": "a"}
    assert (await http.post("/v1/reset_prefix_cache")).json() == {"by": "a"}
    assert (await http.post("/v1/reset_prefix_cache", json={})).json() == {"by": "a"}
    assert (await http.get("/nowhere")).status_code == 404
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [(card["id"], card["parent"]) for card in listed["data"]] == [
        ("a", None),
        ("a-law", "a"),
        ("b", None),
        ("b-med", "b"),
    ]


async def test_what_a_model_has_stored(http: httpx.AsyncClient) -> None:
    for name, by in (("resp_of_a", "a"), ("resp_of_b", "b"), ("resp_of_nobody", "a")):
        assert (await http.get(f"/v1/responses/{name}")).json() == {"by": by}
        assert (await http.post(f"/v1/responses/{name}/cancel")).json() == {"by": by}


async def test_a_question_without_a_body(http: httpx.AsyncClient) -> None:
    assert (await http.get("/tokenizer_info?model=b")).json() == {"by": "b"}
    assert (await http.get("/tokenizer_info?model=a&model=b-med")).json() == {"by": "b"}
    assert (await http.get("/tokenizer_info")).status_code == 400


async def test_an_adapter_that_comes_and_goes(world: World, http: httpx.AsyncClient) -> None:
    assert (await http.post(CHAT, json={"model": "new"})).status_code == 404
    world.b.state.openai_serving_models.lora_requests["new"] = None
    assert (await http.post(CHAT, json={"model": "new"})).json()["by"] == "b"
    del world.b.state.openai_serving_models.lora_requests["new"]
    assert (await http.post(CHAT, json={"model": "new"})).status_code == 404


async def test_one_model_takes_whatever_name(world: World) -> None:
    """vLLM says what it thinks of it."""
    models = Models({"a": world.a})
    assert {models.choose(name) for name in ("a", "b", "", None)} == {world.a}
    with pytest.raises(InvalidRequestError, match="one of a, b"):
        world.models.choose(None)


async def test_what_is_not_http_is_the_first_ones(world: World) -> None:
    seen: list[str] = []

    async def first(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await Dispatch(Models({"a": first, "b": world.b}))({"type": "lifespan"}, None, None)  # type: ignore[arg-type,dict-item]
    assert seen == ["lifespan"]
