"""Bad input over HTTP and gRPC alike: one clear error with the right status, no engine reached, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from helpers.cluster import MODEL, RunningCluster
from helpers.idle import assert_idle

from joinwise.cluster.client import AsyncClient, JoinwiseError
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.model]

CHAT, COMPLETIONS, RESPONSES, MESSAGES, TOKENS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/inference/v1/generate",
)
_HELLO = [{"role": "user", "content": "hello"}]
_BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": _HELLO, "max_tokens": 4},
    COMPLETIONS: {"prompt": "hello", "max_tokens": 4},
    RESPONSES: {"input": "hello", "max_output_tokens": 4},
    MESSAGES: {"messages": _HELLO, "max_tokens": 4},
    TOKENS: {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 4}},
}
_TOO_LONG = "word " * 3000
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
_PIXEL_URL = f"data:image/png;base64,{_PIXEL}"
# Long enough to be prefilled in several chunks, and to be on the wire for a while.
_LONG = " ".join(f"{number} bottles of beer on the wall," for number in range(180))


@dataclass(frozen=True)
class Bad:
    """A request that must be refused.

    Attributes:
        changes: to a good body of that path.
        says: a part of the error's message.
    """

    path: str
    changes: dict[str, Any]
    says: str
    status: int = 400

    def __str__(self) -> str:
        return f"{self.path.rsplit('/v1/')[-1]}-{'-'.join(self.changes)}-{self.says.split(' ')[0]}"


def _content(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, *parts]}]}


def _bad() -> list[Bad]:
    cases = [Bad(path, {"model": "nonesuch"}, "`nonesuch` does not exist", 404) for path in _BODIES]
    cases += [
        Bad(COMPLETIONS, {"prompt": ""}, "non-empty"),
        Bad(COMPLETIONS, {"prompt": []}, "at least one prompt"),
        Bad(CHAT, {"messages": []}, "at least one message"),
        Bad(MESSAGES, {"messages": []}, "at least one message"),
        Bad(TOKENS, {"token_ids": []}, "at least 1 item"),
        Bad(COMPLETIONS, {"prompt": _TOO_LONG}, "maximum context length is 2048"),
        Bad(CHAT, {"messages": [{"role": "user", "content": _TOO_LONG}]}, "maximum context length is 2048"),
        Bad(MESSAGES, {"messages": [{"role": "user", "content": _TOO_LONG}]}, "maximum context length is 2048"),
        Bad(RESPONSES, {"input": _TOO_LONG}, "maximum context length is 2048"),
        Bad(TOKENS, {"token_ids": [5] * 3000}, "maximum model length of 2048"),
        Bad(CHAT, {"messages": "hello"}, "list"),
        Bad(COMPLETIONS, {"prompt": {"text": "hello"}}, "prompt"),
        Bad(COMPLETIONS, {"prompt": [999_999_999]}, "vocabulary"),
        Bad(RESPONSES, {"max_output_tokens": -1}, "-1"),
        Bad(MESSAGES, {"max_tokens": -1}, "-1"),
        Bad(
            CHAT, _content({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_PIXEL}"}}), "multimodal"
        ),
        Bad(CHAT, _content({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}), "multimodal"),
        Bad(
            MESSAGES,
            _content({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": _PIXEL}}),
            "multimodal",
        ),
        Bad(COMPLETIONS, {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ]
    for path in (CHAT, COMPLETIONS):
        cases += [
            Bad(path, {"max_tokens": -1}, "at least 1"),
            Bad(path, {"max_tokens": "many"}, "valid integer"),
            Bad(path, {"max_tokens": 5000}, "max_model_len"),
            Bad(path, {"temperature": "hot"}, "valid number"),
            Bad(path, {"temperature": -1}, "non-negative"),
            Bad(path, {"logit_bias": {"999999": 5}}, "out-of-vocab"),
            Bad(path, {"n": 0}, "at least 1"),
        ]
    theirs = "belongs to the cluster"
    for path in _BODIES:
        cases += [
            Bad(path, {"kv_transfer_params": {"do_remote_decode": True}}, theirs),
            Bad(path, {"ec_transfer_params": {"a": 1}}, theirs),
        ]
        if path == TOKENS:
            for extra in ({"joinwise_replay": [1]}, {"kv_transfer_params": {"joinwise": 1}}):
                cases.append(Bad(path, {"sampling_params": {"max_tokens": 4, "extra_args": extra}}, theirs))
            continue
        cases += [
            Bad(path, {"vllm_xargs": {"joinwise_replay": [1, 2]}}, theirs),
            Bad(path, {"vllm_xargs": {"joinwise_anything": "x"}}, theirs),
            Bad(path, {"vllm_xargs": {"kv_transfer_params": "x"}}, theirs),
        ]
    return cases


class Reached:
    """How many requests have been given to engines, by the gateway's own count."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.before = 0

    async def now(self) -> int:
        metrics = (await self._http.get("/metrics")).text
        # A request that runs shows in the gauge, one that has ended in the counter.
        names = ("joinwise:requests_total{", "joinwise:requests_running ")
        return int(sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(names)))


@pytest.fixture
async def http(cluster: RunningCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=cluster.http, timeout=60) as client:
        yield client


@pytest.fixture
async def stub(cluster: RunningCluster) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
async def unreached(http: httpx.AsyncClient) -> AsyncIterator[None]:
    """No request may reach an engine during the test."""
    reached = Reached(http)
    before = await reached.now()
    yield
    assert await reached.now() == before, "a request reached an engine"


def _message(body: dict[str, Any]) -> str:
    """The one error of an answer, in OpenAI's or Anthropic's shape."""
    assert set(body) in ({"error"}, {"type", "error"}), body
    return str(body["error"]["message"])


@pytest.mark.usefixtures("unreached")
async def test_bad_bodies_are_refused_before_any_stream(http: httpx.AsyncClient) -> None:
    wrong = []
    for bad in _bad():
        for stream in ({}, {"stream": True}):
            answer = await http.post(bad.path, json={"model": MODEL, **_BODIES[bad.path], **bad.changes, **stream})
            said = _message(answer.json()) if answer.headers["content-type"] == "application/json" else answer.text
            if answer.status_code != bad.status or bad.says not in said:
                wrong.append(f"{bad} {stream}: {answer.status_code} {said[:200]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_what_is_no_json_object_is_refused(http: httpx.AsyncClient, path: str) -> None:
    headers = {"content-type": "application/json"}
    for content in (
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b"\xff\xfe\x00",
        b'{"a":' * 50_000,
        b'{"model": "smol", "n": 1e999}',
    ):
        answer = await http.post(path, content=content, headers=headers)
        assert answer.status_code == 400, (content[:20], answer.text)
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.usefixtures("unreached")
async def test_a_body_that_is_too_large_is_refused(http: httpx.AsyncClient) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a" * (10 << 20)}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    headers = {"content-type": "application/json"}
    for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES):
        for content in (body, pieces()):
            answer = await http.post(path, content=content, headers=headers)
            assert answer.status_code == 413, answer.text
            assert "larger than 8388608 bytes" in _message(answer.json())


@pytest.mark.usefixtures("unreached")
async def test_endpoints_that_are_not_served(http: httpx.AsyncClient) -> None:
    paths = ["/v1/embeddings", "/pooling", "/classify", "/score", "/rerank", "/v1/rerank", "/v1/audio/transcriptions"]
    paths += ["/sleep", "/wake_up", "/collective_rpc", "/start_profile", "/stop_profile", "/pause", "/nonesuch"]
    paths += ["/scale_elastic_ep"]
    for path in paths:
        answer = await http.post(path, json={"model": MODEL, "input": "x", "new_data_parallel_size": 2})
        assert answer.status_code in (404, 501), (path, answer.text)
    answer = await http.post(COMPLETIONS, json={"model": MODEL, "prompt": "still", "max_tokens": "served?"})
    assert answer.status_code == 400, answer.text


def _request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        **{"model": MODEL, "text": "hello", "sampling": pb.SamplingOptions(max_tokens=4), **fields}
    )


def _options(**options: Any) -> dict[str, Any]:
    return {"sampling": pb.SamplingOptions(**{"max_tokens": 4, **options})}


def _said(**message: Any) -> dict[str, Any]:
    return {"text": None, "messages": pb.Messages(messages=[pb.Message(**message)] if message else [])}


_GRPC_BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "nonesuch"}, "NOT_FOUND", "`nonesuch` does not exist"),
    ({"model": "nonesuch", **_said(role="user", content="hello")}, "NOT_FOUND", "`nonesuch` does not exist"),
    ({"text": ""}, "INVALID_ARGUMENT", "prompt is empty"),
    ({"text": None}, "INVALID_ARGUMENT", "no prompt"),
    ({"text": None, "token_ids": pb.TokenIds()}, "INVALID_ARGUMENT", "prompt is empty"),
    (_said(), "INVALID_ARGUMENT", "prompt is empty"),
    (_said(content="hello"), "INVALID_ARGUMENT", "has no role"),
    ({"text": _TOO_LONG}, "INVALID_ARGUMENT", "maximum context length is 2048"),
    (_said(role="user", content=_TOO_LONG), "INVALID_ARGUMENT", "maximum context length is 2048"),
    ({"text": None, "token_ids": pb.TokenIds(ids=[4_000_000_000])}, "INVALID_ARGUMENT", "vocabulary"),
    (_options(max_tokens=0), "INVALID_ARGUMENT", "at least 1"),
    (_options(max_tokens=5000), "INVALID_ARGUMENT", "max_model_len"),
    (_options(temperature=-1), "INVALID_ARGUMENT", "non-negative"),
    (_options(temperature=float("nan")), "INVALID_ARGUMENT", "temperature"),
    (_options(n=0), "INVALID_ARGUMENT", "at least 1"),
    (_options(logit_bias={999_999: 5}), "INVALID_ARGUMENT", "out-of-vocab"),
    ({"response_format": pb.ResponseFormat()}, "INVALID_ARGUMENT", "response_format is empty"),
    ({"response_format": pb.ResponseFormat(json_schema="{")}, "INVALID_ARGUMENT", "is not JSON"),
    ({"request_id": "a b"}, "INVALID_ARGUMENT", "printable ASCII"),
    ({"text": "a" * (10 << 20)}, "RESOURCE_EXHAUSTED", "larger than max"),
]


@pytest.mark.usefixtures("unreached")
async def test_bad_calls_are_refused_over_grpc(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    wrong = []
    for fields, code, says in _GRPC_BAD:
        events = []
        try:
            async for event in stub.Generate(_request(**fields), timeout=60):
                events.append(event)
        except grpc.aio.AioRpcError as error:
            if events or error.code().name != code or says not in (error.details() or ""):
                wrong.append(f"{str(fields)[:80]}: {len(events)} events, {error.code().name} {error.details()}")
        else:
            wrong.append(f"{str(fields)[:80]}: {len(events)} events and no error")
    assert not wrong, "\n".join(wrong)


async def test_unknown_proto_fields_are_ignored(cluster: RunningCluster) -> None:
    # Field 1000, length-delimited: what a newer client may send; the second one looks like a hand-off.
    unknown = b"\xc2\x3e\x05hello" + b"\xca\x3e\x12kv_transfer_params"
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        generate = channel.unary_stream("/joinwise.v1.InferenceService/Generate", None, pb.GenerateResponse.FromString)
        events = [event async for event in generate(_request().SerializeToString() + unknown, timeout=60)]
    assert events[0].WhichOneof("event") == "started"
    assert events[-1].WhichOneof("event") == "usage"
    assert events[-1].usage.completion_tokens == 4


@dataclass
class Leaver:
    """A client that goes away, at a given moment, by a given door."""

    cluster: RunningCluster
    http: httpx.AsyncClient
    client: AsyncClient
    outcomes: list[str] = field(default_factory=list)

    async def over_http(self, prompt: str, *, after_s: float | None = None, after_chunks: int = 0, **body: Any) -> None:
        """Leave after some seconds, or after some chunks."""
        request = {"model": MODEL, "prompt": prompt, "max_tokens": 1024, "ignore_eos": True, "stream": True, **body}
        if len(prompt) > 500:
            request["max_tokens"] = 256
        try:
            async with asyncio.timeout(after_s), self.http.stream("POST", COMPLETIONS, json=request) as answer:
                seen = 0
                async for line in answer.aiter_lines():
                    seen += line.startswith("data: ")
                    if after_chunks and seen >= after_chunks:
                        return
        except TimeoutError:
            pass

    async def over_grpc(self, prompt: str, *, after_s: float | None = None, after_events: int = 0) -> None:
        """Cancel the call after some seconds, or after some events."""
        limit = 256 if len(prompt) > 500 else 1024
        stream = self.client.generate(prompt, max_tokens=limit, ignore_eos=True, stream=True)
        try:
            async with asyncio.timeout(after_s), stream:
                seen = 0
                async for _ in stream:
                    seen += 1
                    if after_events and seen >= after_events:
                        return
        except TimeoutError:
            pass


@pytest.fixture
async def leaver(cluster: RunningCluster, http: httpx.AsyncClient) -> AsyncIterator[Leaver]:
    async with AsyncClient(cluster.grpc) as client:
        yield Leaver(cluster, http, client)


@pytest.mark.parametrize("door", ["http", "http-whole", "grpc"])
@pytest.mark.parametrize("moment", ["at once", "mid-prefill", "mid-transfer", "mid-decode"])
async def test_a_client_that_leaves(cluster: RunningCluster, leaver: Leaver, moment: str, door: str) -> None:
    prompt = f"{moment} {door}: {_LONG if moment in ('mid-prefill', 'mid-transfer') else 'Once upon a time'}"
    if door == "http-whole":  # not streamed: the connection is cut while nothing has been answered yet
        after_s = {"at once": 0.02, "mid-prefill": 0.2, "mid-transfer": 0.5, "mid-decode": 1.5}[moment]
        await leaver.over_http(prompt, after_s=after_s, stream=False)
    else:
        leave = leaver.over_http if door == "http" else leaver.over_grpc
        if moment in ("at once", "mid-prefill"):
            await leave(prompt, after_s=0.02 if moment == "at once" else 0.2)
        elif door == "http":
            await leaver.over_http(prompt, after_chunks=1 if moment == "mid-transfer" else 5)
        else:
            await leaver.over_grpc(prompt, after_events=2 if moment == "mid-transfer" else 6)
    await assert_idle(cluster, within_s=8)


async def test_many_clients_that_leave(cluster: RunningCluster, leaver: Leaver) -> None:
    chance = random.Random(7)

    async def one(number: int) -> None:
        prompt = f"{number} {_LONG[: chance.choice((20, 600, 4000))]}"
        after_s = chance.choice((0.001, 0.05, 0.3, 1.0)) * (1 + chance.random())
        await asyncio.sleep(chance.random())
        if number % 2:
            await leaver.over_http(prompt, after_s=after_s, stream=bool(number % 3))
        else:
            await leaver.over_grpc(prompt, after_s=after_s)

    await asyncio.gather(*(one(number) for number in range(40)))
    await assert_idle(cluster, within_s=20)
    # And nobody who stays is harmed.
    answer = await leaver.http.post(COMPLETIONS, json={"model": MODEL, "prompt": "The sky is", "max_tokens": 8})
    assert answer.json()["usage"]["completion_tokens"] == 8


async def test_cancel(cluster: RunningCluster, leaver: Leaver) -> None:
    async def read() -> list[Any]:
        options = {"max_tokens": 1500, "ignore_eos": True, "request_id": "to-be-cancelled"}
        return [event async for event in leaver.client.generate("Count: 1, 2,", stream=True, **options)]  # type: ignore[call-overload]

    reading = asyncio.create_task(read())
    while not await leaver.client.cancel("to-be-cancelled"):
        await asyncio.sleep(0.05)
        assert not reading.done()
    with pytest.raises(JoinwiseError) as raised:
        await reading
    assert raised.value.code == "cancelled"
    assert not await leaver.client.cancel("to-be-cancelled")
    await assert_idle(cluster, within_s=5)
