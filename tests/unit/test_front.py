"""The ASGI layer: real statuses before streams, the ledger, limits, and nothing left of a call that dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry
from vllm.v1.engine import EngineCoreOutput

from joinwise.actors.gateway.failures import note_error
from joinwise.actors.gateway.front import Front, error_body, error_headers
from joinwise.actors.gateway.ledgers import LedgerBuilder, Ledgers
from joinwise.actors.gateway.tickets import Ticket, call_tickets
from joinwise.cluster.errors import InvalidRequestError, JoinwiseError, NoWorkerError, OverloadedError
from joinwise.cluster.router.router import Assignment, Demand, WorkerRef

LIMIT = 1000


class FakeRouter:
    """Refuses with `error`, or hands out leases."""

    def __init__(self) -> None:
        self.error: JoinwiseError | None = None
        self.held: list[str] = []

    async def route(self, demand: Demand) -> Assignment:
        if self.error is not None:
            raise self.error
        self.held += [f"{demand.request_id}{sample}" for sample in range(demand.samples)]
        return Assignment(demand.request_id, 1, None, WorkerRef("w", 1, "a:1", "a:2"), "whole", 0)

    async def settle(self, assignment: Assignment, generated: int | None = None) -> bool:
        self.held.remove(f"{assignment.lease_id}{assignment.sample}")
        return True


class World:
    """A front, and an application behind it that behaves like vLLM's."""

    def __init__(self) -> None:
        self.router = FakeRouter()
        self.ledgers = Ledgers(CollectorRegistry())
        self.generated = 0
        app = FastAPI()
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/messages", self.chat, methods=["POST"])
        app.add_api_route("/v1/responses", self.responses, methods=["POST"])
        app.add_api_route("/health", self.health, methods=["GET"])
        self.front = Front(app, self.ledgers, max_body_bytes=LIMIT)

    async def health(self) -> JSONResponse:
        return JSONResponse({})

    async def chat(self, request: Request) -> Any:
        """`generate` is called before the answer begins."""
        body = await request.json()
        try:
            if body.get("bad"):
                raise note_error(InvalidRequestError("that key belongs to the cluster"))
        except InvalidRequestError as error:
            return JSONResponse({"error": {"message": str(error), "code": 500}}, 500)  # as vLLM does it
        tokens = self.generate(body.get("n", 1))
        if body.get("stream"):
            return StreamingResponse(self.sse(tokens), media_type="text/event-stream")
        try:
            return JSONResponse({"tokens": [token async for token in tokens]})
        except JoinwiseError as error:
            return JSONResponse({"error": {"message": str(error), "code": 500}}, 500)

    async def responses(self, request: Request) -> Any:
        """`generate` is called after the stream has begun."""

        async def stream() -> Any:
            yield "event: response.created\n\n"
            yield "event: response.in_progress\n\n"
            async for token in self.generate(1):
                yield f"data: {token}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    def generate(self, samples: int) -> Any:
        ticket = Ticket("r", self.router, Demand("r", "m", 1, 1, samples=samples))  # type: ignore[arg-type]
        tickets = call_tickets.get()
        assert tickets is not None
        tickets.append(ticket)
        return self.run(ticket)

    async def run(self, ticket: Ticket) -> Any:
        await ticket.admit()
        self.generated += 1
        while assignment := ticket.take():
            request_id = f"{assignment.lease_id}{assignment.sample}"
            ticket.started.append(request_id)
            builder = LedgerBuilder(
                request_id=request_id, call_id=request_id, model="m", created=0.0, routed_s=0.0, prompt_tokens=3
            )
            builder.produced(EngineCoreOutput(request_id, [1]), 1.0)
            builder.finish("stop", 2.0)
            self.ledgers.add(request_id, builder)
            await self.router.settle(assignment)
            yield request_id

    async def sse(self, tokens: Any) -> Any:
        try:
            async for token in tokens:
                yield f"data: {token}\n\n"
        except JoinwiseError as error:
            yield f"data: {json.dumps({'error': str(error)})}\n\n"  # as vLLM does it
        yield "data: [DONE]\n\n"


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def http(world: World) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(world.front), base_url="http://test")


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "wait"),
    [(OverloadedError("full", retry_after_s=2.4), 429, "2"), (NoWorkerError("none", retry_after_s=0.1), 503, "1")],
)
async def test_a_refusal_is_a_real_status(
    world: World, http: httpx.AsyncClient, path: str, stream: bool, error: JoinwiseError, status: int, wait: str
) -> None:
    world.router.error = error
    answer = await http.post(path, json={"stream": stream})
    assert (answer.status_code, answer.headers["retry-after"]) == (status, wait)
    assert answer.json() == error_body(error, path)
    assert answer.headers["content-type"] == "application/json"
    assert world.generated == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_that_vllm_made_a_500_of_is_itself_again(http: httpx.AsyncClient, stream: bool) -> None:
    answer = await http.post(CHAT, json={"bad": True, "stream": stream})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
    answer = await http.post("/v1/messages", json={"bad": True, "stream": stream})
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["message"] == "that key belongs to the cluster"


def test_errors_as_clients_read_them() -> None:
    assert error_body(OverloadedError("full"))["error"]["type"] == "overloaded"
    assert error_body(InvalidRequestError("no"))["error"]["type"] == "invalid_request_error"
    assert error_headers(InvalidRequestError("no")) == {}
    assert error_headers(OverloadedError("full", retry_after_s=3.2)) == {"retry-after": "3"}


async def test_a_stream_that_is_routed_comes_as_it_is(world: World, http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, json={"stream": True, "n": 2})
    assert answer.text == "data: r0\n\ndata: r1\n\ndata: [DONE]\n\n"
    answer = await http.post("/v1/responses", json={"stream": True})
    assert answer.status_code == 200
    assert answer.text == "event: response.created\n\nevent: response.in_progress\n\ndata: r0\n\n"
    assert (await http.get("/health")).status_code == 200
    assert world.router.held == []


async def test_the_ledger_comes_in_a_header_or_as_a_comment(http: httpx.AsyncClient) -> None:
    wanted = {"x-joinwise-ledger": "1"}
    assert "x-joinwise-ledger" not in (await http.post(CHAT, json={})).headers
    assert "joinwise" not in (await http.post(CHAT, json={"stream": True})).text
    answer = await http.post(CHAT, json={}, headers=wanted)
    assert json.loads(answer.headers["x-joinwise-ledger"])["request_id"] == "r0"
    answer = await http.post(CHAT, json={"n": 2}, headers=wanted)
    assert [each["request_id"] for each in json.loads(answer.headers["x-joinwise-ledger"])] == ["r0", "r1"]
    answer = await http.post(CHAT, json={"stream": True}, headers=wanted)
    comment, done = answer.text.split("\n\n")[-3:-1]
    assert json.loads(comment.removeprefix(": joinwise-ledger "))["prompt_tokens"] == 3
    assert done == "data: [DONE]"
    assert answer.text.count("joinwise-ledger") == 1


async def test_a_body_that_is_too_large(world: World, http: httpx.AsyncClient) -> None:
    async def pieces() -> Any:
        for _ in range(LIMIT // 100 + 1):
            yield b"x" * 100

    exact = json.dumps({"pad": ""}).encode()
    exact = json.dumps({"pad": "x" * (LIMIT - len(exact))}).encode()
    assert len(exact) == LIMIT
    assert (await http.post(CHAT, content=exact)).status_code == 200
    world.generated = 0
    for content in (exact + b" ", pieces()):
        answer = await http.post(CHAT, content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert world.generated == 0


async def _serve(front: Front, send: Callable[[Any], Awaitable[None]], **body: Any) -> None:
    """One call over bare ASGI; the client stays until the call is cancelled."""
    content = json.dumps(body).encode()
    messages = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> Any:
        if (message := next(messages, None)) is None:
            await asyncio.Event().wait()
        return message

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "headers": headers}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "client": ("c", 1), "server": ("s", 1)}
    await front(scope, receive, send)


async def test_a_client_that_leaves_before_the_first_token_leaves_no_lease(world: World) -> None:
    reached = asyncio.Event()

    async def send(message: Any) -> None:
        reached.set()
        await asyncio.Event().wait()  # the connection takes nothing

    call = asyncio.create_task(_serve(world.front, send, stream=True, n=3))
    await reached.wait()
    assert world.router.held == ["r0", "r1", "r2"]
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert world.router.held == []


async def test_an_application_that_fails_leaves_no_lease_and_no_ticket(world: World) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        tickets = call_tickets.get()
        assert tickets == []
        world.generate(2)
        await tickets[0].admit()
        assert len(world.router.held) == 2
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        await _serve(Front(broken, world.ledgers, max_body_bytes=LIMIT), lambda message: asyncio.sleep(0))
    assert world.router.held == []
    assert call_tickets.get() is None


async def test_what_is_not_http_passes(world: World) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await Front(app, world.ledgers, max_body_bytes=LIMIT)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]
