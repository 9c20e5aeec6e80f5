"""A stream whose gateway dies goes on at another one: no event twice, none missing, and never a wrong one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from joinwise.cluster.client import AsyncClient, Client, Finished, SequenceGapError, UnreachableError, Usage
from joinwise.cluster.client.retry import Patience
from joinwise.cluster.errors import CannotResumeError, DeadlineExceededError, OverloadedError, RequestCancelledError
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc

WORDS = ["a", "ü", "c ", "d", "e", "f"]


def answer(request_id: str) -> list[pb.GenerateResponse]:
    """All events of the one answer that there is."""
    events: list[dict[str, Any]] = [{"started": pb.Started(request_id=request_id, model="m", created=7)}]
    events += [{"delta": pb.Delta(text=word, token_ids=[number])} for number, word in enumerate(WORDS)]
    events += [{"finished": pb.Finished(finish_reason="length")}, {"usage": pb.Usage(completion_tokens=len(WORDS))}]
    return [pb.GenerateResponse(sequence=number, **event) for number, event in enumerate(events)]


class Gateway(inference_pb2_grpc.InferenceServiceServicer):
    """Gives its answer, and dies before the event that each call's script names."""

    def __init__(self) -> None:
        self.dies: list[int] = []
        """Before which event, of one call after another; without any left it lives."""
        self.refusals: list[grpc.StatusCode | str] = []
        self.asked: list[pb.GenerateRequest] = []
        self.port = 0
        self.server: grpc.aio.Server | None = None

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        self.asked.append(request)
        if self.refusals:
            code = self.refusals.pop(0)
            trailer = () if isinstance(code, grpc.StatusCode) else (("joinwise-error", code),)
            status = code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.ABORTED
            await context.abort(status, "not now", trailer)
        events = answer(request.request_id or "given")
        begin = request.resume.next_sequence if request.HasField("resume") else 0
        self._check(request, events[:begin])
        end = self.dies.pop(0) if self.dies else len(events)
        for event in events[begin:end]:
            await context.write(event)
        if end < len(events):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "died")

    def _check(self, request: pb.GenerateRequest, told: list[pb.GenerateResponse]) -> None:
        """What the client says it has must be what was told."""
        if not told:
            assert not request.HasField("resume")
            return
        assert request.request_id
        deltas = [event.delta for event in told if event.HasField("delta")]
        assert list(request.resume.token_ids) == [token for delta in deltas for token in delta.token_ids]
        assert request.resume.characters == sum(len(delta.text) for delta in deltas)
        assert request.resume.finished == any(event.HasField("finished") for event in told)

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(name=str(self.port))])

    async def start(self) -> None:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.stop(0)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"


class Older(Gateway):
    """Knows nothing of streams that go on: it begins anew."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        for event in answer("given"):
            await context.write(event)


async def running() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.start()
    yield gateway
    await gateway.stop()


one, other = pytest.fixture(running), pytest.fixture(running)


def sync(targets: list[str], call: Callable[[Client], Any], **options: Any) -> Any:
    """Use the blocking client, in a thread: the gateways are on this loop."""

    def use() -> Any:
        with Client(targets, timeout=20, **options) as client:
            return call(client)

    return asyncio.to_thread(use)


@pytest.mark.parametrize("breaks", range(len(WORDS) + 3))
async def test_it_goes_on_from_the_event_that_is_due(one: Gateway, other: Gateway, breaks: int) -> None:
    targets = [one.target, other.target]
    one.dies = [breaks]
    async with AsyncClient(targets, timeout=20) as client:
        stream = client.generate("x", stream=True)
        events = [event async for event in stream]
        assert client.target == other.target, "the next request does not look for the dead one first"
    assert stream.request_id == other.asked[0].request_id or not breaks
    assert events[-2:] == [Finished(0, "length"), Usage(0, len(WORDS), 0)]
    assert (await stream.result()).text == "".join(WORDS)
    one.dies = [breaks]
    whole = await sync(targets, lambda client: client.generate("x", request_id="mine"))
    assert whole.text == "".join(WORDS) and whole.choices[0].token_ids == tuple(range(len(WORDS)))
    assert other.asked[-1].request_id == "mine"


async def test_it_waits_for_the_successor_of_its_only_gateway(one: Gateway) -> None:
    async with AsyncClient(one.target, timeout=20) as client:
        one.dies = [3]
        stream = client.generate("x", stream=True)
        for _ in range(3):
            await anext(stream)
        await one.stop()
        rest = asyncio.create_task(stream.result())
        await asyncio.sleep(0.3)  # it has found nobody there by then
        await one.start()
        assert (await rest).text == "".join(WORDS)


async def test_it_breaks_again_and_again(one: Gateway, other: Gateway) -> None:
    one.dies, other.dies = [2, 4, 6], [3, 5, 7]
    async with AsyncClient([one.target, other.target], timeout=20) as client:
        assert (await client.generate("x")).text == "".join(WORDS)
    assert [request.resume.next_sequence for request in one.asked + other.asked] == [0, 3, 5, 7, 2, 4, 6]


async def test_what_nobody_can_resume_ends_with_its_error(one: Gateway, other: Gateway) -> None:
    targets = [one.target, other.target]
    one.dies = [2, 2, 2]
    async with AsyncClient(targets, timeout=20) as client:
        with pytest.raises(UnreachableError):
            await client.generate("x", n=2)
    async with AsyncClient(targets, timeout=20, resume=0) as client:
        with pytest.raises(UnreachableError):
            await client.generate("x")
    with pytest.raises(UnreachableError):
        await sync(targets, lambda client: client.generate("x"), resume=0)
    assert not other.asked


async def test_a_gateway_that_cannot_resume_yet_is_asked_again(one: Gateway) -> None:
    one.dies, one.refusals = [3], []
    async with AsyncClient(one.target, timeout=20) as client:
        stream = client.generate("x", stream=True)
        for _ in range(3):
            await anext(stream)
        one.refusals = ["cannot_resume", grpc.StatusCode.UNAVAILABLE]
        assert (await stream.result()).text == "".join(WORDS)
        one.dies, one.refusals = [3], []
        stream = client.generate("x", stream=True)
        for _ in range(3):
            await anext(stream)
        one.refusals = ["cannot_resume"] * 100
        with pytest.raises(CannotResumeError):
            await stream.result()
    assert len(one.refusals) > 90


async def test_other_errors_are_not_tried_again(one: Gateway, other: Gateway) -> None:
    one.dies, other.refusals = [3], ["overloaded"]
    async with AsyncClient([one.target, other.target], timeout=20) as client:
        with pytest.raises(OverloadedError):
            await client.generate("x")
    one.dies = [3]

    again = Older()
    await again.start()
    try:
        async with AsyncClient([one.target, again.target], timeout=20) as client:
            with pytest.raises(SequenceGapError):
                await client.generate("x")
    finally:
        await again.stop()


async def test_time_is_counted_for_the_whole_call(one: Gateway) -> None:
    one.dies = [2]
    async with AsyncClient(one.target, timeout=20) as client:
        stream = client.generate("x", stream=True, timeout=1.0)
        await anext(stream)
        await one.stop()
        begin = time.monotonic()
        with pytest.raises((DeadlineExceededError, UnreachableError)):
            await stream.result()
        assert time.monotonic() - begin < 5
    await one.start()


async def test_cancelling_ends_the_waiting(one: Gateway) -> None:
    one.dies = [2]
    async with AsyncClient(one.target, timeout=20) as client:
        stream = client.generate("x", stream=True)
        await anext(stream)
        await one.stop()
        asyncio.get_running_loop().call_later(0.3, stream.cancel)
        with pytest.raises((RequestCancelledError, UnreachableError)):
            await stream.result()
    await one.start()
    one.dies = [2]
    waiting = threading.Event()

    def use(client: Client) -> None:
        stream = client.generate("x", stream=True)
        next(stream)
        next(stream)
        threading.Timer(0.3, stream.cancel).start()
        waiting.set()
        with pytest.raises((RequestCancelledError, UnreachableError)):
            stream.result()

    using = asyncio.create_task(sync([one.target], use))
    await asyncio.to_thread(waiting.wait, 5)
    one.refusals = [grpc.StatusCode.UNAVAILABLE] * 1000
    await using


async def test_other_calls_ask_the_next_gateway(one: Gateway, other: Gateway) -> None:
    await one.stop()
    targets = [one.target, other.target]
    async with AsyncClient(targets, timeout=20) as client:
        assert [model.name for model in await client.models()] == [str(other.port)]
    assert [model.name for model in await sync(targets, lambda client: client.models())] == [str(other.port)]
    await other.stop()
    async with AsyncClient(targets, timeout=20) as client:
        with pytest.raises(UnreachableError):
            await client.models()
    await one.start()
    await other.start()


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    patience = Patience(10.0, 2, 60.0)
    gone = UnreachableError("gone")
    assert patience.pause_s(gone, begun=True) == 0.0, "the other one, at once"
    assert [patience.pause_s(gone, begun=True) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    now[0] = 105.0
    patience.moved()
    now[0] = 114.0
    assert patience.pause_s(gone, begun=True) == 0.0, "another break, counted anew"
    now[0] = 124.5
    assert patience.pause_s(gone, begun=True) is None
    assert patience.rest_s() == 60.0 - 24.5
    assert Patience(10.0, 2, None).rest_s() is None
    with pytest.raises(ValueError, match="no target"):
        Client([])
