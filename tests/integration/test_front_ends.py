"""The two doors of the cluster, HTTP and gRPC, give equal answers, field by field; and strangers find the latter."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from helpers.ask import Question, ask
from helpers.cluster import MODEL, RunningCluster
from helpers.compare_front_ends import compare, compare_refusal
from helpers.front_end_cases import CASES, REFUSALS, Case

from joinwise.cluster.client import AsyncClient, Delta, Finished, Started, Usage
from joinwise.cluster.errors import DeadlineExceededError, InvalidRequestError
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.model]

SERVICE = "joinwise.v1.InferenceService"
LONG = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture
async def http(cluster: RunningCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=cluster.http, timeout=300) as http:
        yield http


@pytest.fixture
async def client(cluster: RunningCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.grpc, timeout=300) as client:
        yield client


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_same_answer(http: httpx.AsyncClient, client: AsyncClient, case: Case) -> None:
    await compare(http, client, case)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
async def test_same_refusal(http: httpx.AsyncClient, client: AsyncClient, case: Case) -> None:
    await compare_refusal(http, client, case)


async def test_events_and_ledger(client: AsyncClient) -> None:
    stream = client.generate("Hello", max_tokens=4, temperature=0, request_id="mine-1", stream=True)
    events = [event async for event in stream]
    assert isinstance(events[0], Started)
    assert (events[0].request_id, events[0].model) == ("mine-1", MODEL)
    assert sum(len(event.token_ids) for event in events if isinstance(event, Delta)) == 4
    assert isinstance(events[-2], Finished)
    assert isinstance(events[-1], Usage)
    ledger = stream.ledger
    assert ledger is not None
    assert ledger["prefill_worker"] != ledger["decode_worker"]
    assert (ledger["wire_bytes"] > 0, ledger["output_tokens"], ledger["replayed_steps"]) == (True, 4, 1)


async def test_ledgers_agree(http: httpx.AsyncClient, client: AsyncClient) -> None:
    """What both doors say of the same request, but for its times and its name."""
    over_grpc = await client.generate(token_ids=list(range(5000, 5040)), max_tokens=3, temperature=0)
    over_http = await ask(
        http, Question("http", {"prompt": list(range(6000, 6040)), "max_tokens": 3, "temperature": 0})
    )
    assert over_grpc.ledger is not None
    for field, value in over_http.ledgers[0].items():
        if not field.endswith("_s") and "seconds" not in field and field not in ("request_id", "arrived"):
            assert over_grpc.ledger[field] == value, field


async def test_models_and_status(cluster: RunningCluster, client: AsyncClient) -> None:
    (model,) = await client.models()
    assert (model.name, model.parent, model.max_model_len) == (MODEL, "", 2048)
    status = await client.status()
    assert status.cluster == cluster.name
    assert sorted(worker.role for worker in status.workers) == ["decode", "prefill"]
    assert all(worker.kv_blocks_total > 0 for worker in status.workers)


async def test_tools_need_messages(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequestError, match="needs messages"):
        await client.generate("x", tools=[{"name": "f"}])


async def test_deadline(client: AsyncClient) -> None:
    with pytest.raises(DeadlineExceededError):
        await client.generate(**LONG, timeout=0.5)


async def test_a_client_that_does_not_read_can_be_cancelled(cluster: RunningCluster, client: AsyncClient) -> None:
    """Flow control holds the writes back; the request must still end, and the fixture sees that it has."""
    async with grpc.aio.insecure_channel(client.target, [("grpc.http2.lookahead_bytes", 0)]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        sampling = pb.SamplingOptions(max_tokens=1500, ignore_eos=True, n=4, logprobs=20)
        call = stub.Generate(pb.GenerateRequest(text="x", request_id="deaf", sampling=sampling))
        await asyncio.sleep(3)
        with pytest.raises(InvalidRequestError, match="is running"):
            await client.generate("x", request_id="deaf")
        assert await client.cancel("deaf")
        async with asyncio.timeout(15):
            while await client.cancel("deaf"):
                await asyncio.sleep(0.1)
        call.cancel()


async def test_health_and_reflection(cluster: RunningCluster) -> None:
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        names = {service.name async for reply in call for service in reply.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


# A foreign client, which has none of our stubs.


async def buf_curl(address: str, method: str, request: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Call a method through reflection; returns the replies."""
    command = [_buf(), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect"]
    command += ["--data", json.dumps(request or {}), f"http://{address}/{method}"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 60)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, err.decode()
    replies, text, decoder = [], out.decode().strip(), json.JSONDecoder()
    while text:
        reply, end = decoder.raw_decode(text)
        replies.append(reply)
        text = text[end:].lstrip()
    return replies


def _buf() -> str:
    beside = Path(sys.executable).with_name("buf")
    found = str(beside) if beside.exists() else shutil.which("buf")
    assert found, "buf is missing: install the development requirements"
    return found


async def test_a_foreign_client_lists_models(cluster: RunningCluster) -> None:
    (reply,) = await buf_curl(cluster.grpc, f"{SERVICE}/ListModels")
    assert reply == {"models": [{"name": MODEL, "maxModelLen": 2048}]}


async def test_a_foreign_client_generates(cluster: RunningCluster, http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    asked = {"messages": {"messages": messages}, "sampling": {"maxTokens": 8, "temperature": 0}}
    replies = await buf_curl(cluster.grpc, f"{SERVICE}/Generate", asked)
    assert [int(reply.get("sequence", 0)) for reply in replies] == list(range(len(replies)))
    assert "started" in replies[0]
    text = "".join(reply["delta"].get("text", "") for reply in replies if "delta" in reply)
    over_http = (await http.post("/v1/chat/completions", json={"model": MODEL, **body})).json()
    assert text == over_http["choices"][0]["message"]["content"]
    assert replies[-1]["usage"]["completionTokens"] == 8


async def test_a_foreign_client_asks_for_health(cluster: RunningCluster) -> None:
    (reply,) = await buf_curl(cluster.grpc, "grpc.health.v1.Health/Check", {"service": SERVICE})
    assert reply == {"status": "SERVING"}
