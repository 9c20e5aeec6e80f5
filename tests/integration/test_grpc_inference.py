"""The gRPC `InferenceService` over a plain vLLM engine: the same answers as HTTP, the right failures, nothing left."""

import asyncio
import contextlib
import json

import grpc
import pytest
import pytest_asyncio
from helpers.compare_front_ends import compare, compare_refusal
from helpers.front_end_cases import CASES, REFUSALS
from helpers.plain_vllm import plain_vllm

from joinwise.cluster.client import AsyncClient, ClusterStatus, Delta, Started, UnreachableError, WorkerStatus
from joinwise.cluster.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    RequestTooLargeError,
    UnauthorizedError,
    WorkerLostError,
)
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

MODEL = "smollm2-135m-instruct"
LONG = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 900, "ignore_eos": True}
STATUS = ClusterStatus("c", (WorkerStatus("w0", "p", "mixed", MODEL, 1, running=2, decode_step_ms=1.5),), 3)


class Hooks:
    """What the gateway injects, switchable by a test."""

    def __init__(self):
        self.refusal = None
        self.admitted = self.released = 0
        self.asked = []

    @contextlib.asynccontextmanager
    async def admission(self, request_id, request, metadata):
        if self.refusal is not None:
            raise self.refusal
        self.admitted += 1
        try:
            yield
        finally:
            self.released += 1

    async def ledger(self, request_id):
        self.asked.append(request_id)
        return json.dumps({"request_id": request_id}).encode()

    async def status(self):
        return STATUS


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm():
    from joinwise.actors.models import resolve_model

    async with plain_vllm(str(resolve_model(MODEL).path), MODEL) as vllm:
        yield vllm


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(vllm):
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc
    from joinwise.actors.gateway.inference import InferenceService

    hooks = Hooks()
    service = InferenceService(vllm.app.state, status=hooks.status, ledger=hooks.ledger, admission=hooks.admission)
    server = await serve_grpc(service, GrpcOptions(port=0, max_body_bytes=1 << 20))
    yield service, server, hooks
    await server.stop(0)


@pytest_asyncio.fixture(loop_scope="module")
async def client(vllm, gateway):
    _, server, hooks = gateway
    hooks.refusal = None
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout=120) as client:
        yield client
    await idle(vllm, gateway)


async def idle(vllm, gateway):
    """Nothing may run or be held any more: neither here nor in vLLM."""
    service, _, hooks = gateway
    for _ in range(200):
        if not service.running and not vllm.engine.output_processor.request_states and hooks.admitted == hooks.released:
            return
        await asyncio.sleep(0.05)
    states = list(vllm.engine.output_processor.request_states)
    raise AssertionError(f"left: {service.running} {states} {hooks.admitted - hooks.released} admitted")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
async def test_same_answer(vllm, client, case):
    await compare(vllm.http, client, case)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda c: c.name)
async def test_same_refusal(vllm, client, case):
    await compare_refusal(vllm.http, client, case)


async def test_events_and_identity(client, gateway):
    stream = client.generate("Hello", max_tokens=4, temperature=0, request_id="mine-1", stream=True)
    events = [e async for e in stream]
    assert events[0] == Started("mine-1", MODEL, events[0].created)
    assert sum(len(e.token_ids) for e in events if isinstance(e, Delta)) == 4
    assert stream.ledger == {"request_id": "mine-1"}
    assert gateway[2].asked[-1] == "mine-1"


async def test_cached_tokens_are_told(client):
    ids = [504 + i for i in range(300)]
    await client.generate(token_ids=ids, max_tokens=1)
    assert (await client.generate(token_ids=ids, max_tokens=1)).usage.cached_tokens > 0


async def test_models_and_status(client):
    (model,) = await client.models()
    assert (model.name, model.parent, model.max_model_len) == (MODEL, "", 1024)
    assert await client.status() == STATUS


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.GenerateRequest(), "no prompt"),
        (pb.GenerateRequest(messages=pb.Messages()), "empty"),
        (pb.GenerateRequest(messages=pb.Messages(messages=[pb.Message(content="x")])), "no role"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "empty"),
        (pb.GenerateRequest(text="x", tools=[pb.Tool(name="f")]), "needs messages"),
        (pb.GenerateRequest(text="x", response_format=pb.ResponseFormat()), "response_format is empty"),
        (pb.GenerateRequest(text="x", response_format=pb.ResponseFormat(json_schema="{")), "not JSON"),
        (pb.GenerateRequest(text="x", response_format=pb.ResponseFormat(json_schema="[]")), "must be a JSON object"),
        (pb.GenerateRequest(text="x", request_id="a b"), "request_id"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
async def test_malformed_requests(client, gateway, message, text):
    async with grpc.aio.insecure_channel(client.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
            [_ async for _ in stub.Generate(message)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["joinwise-error"] == "invalid_request"


async def test_unknown_fields_are_ignored(client):
    raw = pb.GenerateRequest(text="Hello", sampling=pb.SamplingOptions(max_tokens=1)).SerializeToString()
    raw += b"\xba\x3e\x05hello"  # field 999, which no version knows
    async with grpc.aio.insecure_channel(client.target) as channel:
        call = channel.unary_stream("/joinwise.v1.InferenceService/Generate")
        assert len([_ async for _ in call(raw)]) == 4


async def test_a_huge_request_is_refused(client):
    with pytest.raises(RequestTooLargeError):
        await client.generate("x" * (2 << 20))


async def first_token(stream):
    async for event in stream:
        if isinstance(event, Delta):
            return


async def test_cancel_by_id(client):
    stream = client.generate(**LONG, request_id="to-cancel", stream=True)
    await first_token(stream)
    with pytest.raises(InvalidRequestError, match="is running"):
        await client.generate("x", request_id="to-cancel")
    assert await client.cancel("cmpl-to-cancel")
    with pytest.raises(RequestCancelledError):
        [_ async for _ in stream]
    assert stream.ledger == {"request_id": "to-cancel"}
    assert not await client.cancel("to-cancel")


async def test_cancel_of_a_client_that_does_not_read(client, gateway):
    """Flow control holds the writes back; the request must still end."""
    async with grpc.aio.insecure_channel(client.target, [("grpc.http2.lookahead_bytes", 0)]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        sampling = pb.SamplingOptions(max_tokens=900, ignore_eos=True, n=4, logprobs=20)
        call = stub.Generate(pb.GenerateRequest(text="x", request_id="deaf", sampling=sampling))
        await asyncio.sleep(3)
        await client.cancel("deaf")
        for _ in range(100):
            if not gateway[0].running:
                break
            await asyncio.sleep(0.05)
        assert not gateway[0].running
        call.cancel()


@pytest.mark.parametrize("events", [0, 1, 5])
async def test_a_client_that_goes_away(client, events):
    stream = client.generate(**LONG, stream=True)
    for _ in range(events):
        await anext(stream)
    stream.cancel()  # the fixture sees that nothing is left


async def test_deadline(client):
    with pytest.raises(DeadlineExceededError):
        await client.generate(**LONG, timeout=0.5)


async def test_admission_refuses_with_its_own_words(client, gateway):
    gateway[2].refusal = OverloadedError("the cluster is full", retry_after_s=2.5)
    with pytest.raises(OverloadedError, match="the cluster is full") as caught:
        await client.generate("x")
    assert caught.value.retry_after_s == 2.5


async def test_an_error_below_vllm_keeps_its_class(client, vllm, monkeypatch):
    from joinwise.actors.gateway.failures import note_error

    async def generate(*args, **kwargs):
        raise note_error(WorkerLostError("decode worker d0 is gone", retry_after_s=1))
        yield

    monkeypatch.setattr(vllm.engine, "generate", generate)
    with pytest.raises(WorkerLostError, match="d0 is gone") as caught:
        await client.generate("x")
    assert caught.value.retry_after_s == 1
    with pytest.raises(WorkerLostError):
        await client.generate(messages=[{"role": "user", "content": "x"}])


async def test_health_and_reflection(client):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with grpc.aio.insecure_channel(client.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="joinwise.v1.InferenceService"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        names = {s.name async for r in call for s in r.list_services_response.service}
    assert {"joinwise.v1.InferenceService", "grpc.health.v1.Health"} <= names


async def test_api_keys(gateway):
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc

    server = await serve_grpc(gateway[0], GrpcOptions(port=0, tokens=("right", "other")))
    target = f"127.0.0.1:{server.port}"
    async with AsyncClient(target, token="right") as right, AsyncClient(target, token="wrong") as wrong:
        assert await right.models()
        with pytest.raises(UnauthorizedError):
            await wrong.models()
        with pytest.raises(UnauthorizedError):
            await wrong.generate("x")
    await server.stop(0)


async def test_a_taken_port_and_a_stopped_server(gateway):
    from joinwise.actors.gateway.grpc_server import GrpcOptions, serve_grpc
    from joinwise.cluster.errors import ConfigError

    server = await serve_grpc(gateway[0], GrpcOptions(port=0))
    with pytest.raises(ConfigError, match="another cluster"):
        await serve_grpc(gateway[0], GrpcOptions(port=server.port))
    await server.stop(0)
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout=10) as client:
        with pytest.raises(UnreachableError):
            await client.models()
