"""The SDK against a real gRPC server with a scripted servicer, faults included."""

import asyncio
import json
import threading
import time

import grpc
import pytest

from joinwise.cluster.client import (
    AsyncClient,
    Client,
    ClientClosedError,
    Delta,
    Finished,
    SequenceGapError,
    Started,
    ToolCall,
    UnreachableError,
    Usage,
)
from joinwise.cluster.client.wire import build_request
from joinwise.cluster.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestCancelledError,
    RequestTooLargeError,
)
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc

LEDGER = {"version": 1, "queued_s": 0.001}
TRAILER = (("joinwise-ledger-bin", json.dumps(LEDGER).encode()),)


def script(*events, first=0):
    return [pb.GenerateResponse(sequence=first + i, **e) for i, e in enumerate(events)]


def started(request_id="r1"):
    return {"started": pb.Started(request_id=request_id, model="m", created=7)}


def delta(text, index=0, **more):
    return {"delta": pb.Delta(index=index, text=text, **more)}


def finished(index=0, reason="stop", stop=""):
    return {"finished": pb.Finished(index=index, finish_reason=reason, stop_reason=stop)}


USAGE = {"usage": pb.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)}
ANSWER = [started(), delta("Hel", token_ids=[1]), delta("lo", token_ids=[2]), finished(stop="."), USAGE]


class Scripted(inference_pb2_grpc.InferenceServiceServicer):
    """Plays the script that the prompt names."""

    def __init__(self):
        self.requests = []
        self.metadata = []
        self.ended = threading.Event()
        self.cancelled = []

    async def Generate(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            await getattr(self, request.text or "answer")(request, context)
        finally:
            self.ended.set()

    async def answer(self, request, context):
        for response in script(*ANSWER):
            await context.write(response)
        context.set_trailing_metadata(TRAILER)

    async def gap(self, request, context):
        events = script(*ANSWER)
        for response in events[:2] + events[3:]:
            await context.write(response)

    async def repeat(self, request, context):
        events = script(*ANSWER)
        for response in events[:2] + events[1:]:
            await context.write(response)

    async def truncated(self, request, context):
        for response in script(*ANSWER[:3]):
            await context.write(response)

    async def unknown_event(self, request, context):
        for response in script(ANSWER[0], {}, *ANSWER[1:]):
            await context.write(response)

    async def breaks(self, request, context):
        for response in script(*ANSWER[:2]):
            await context.write(response)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "worker went away")

    async def overloaded(self, request, context):
        trailer = (("joinwise-error", "overloaded"), ("retry-after", "1.500"), *TRAILER)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many tokens wait", trailer)

    async def no_model(self, request, context):
        await context.abort(grpc.StatusCode.NOT_FOUND, "no model x")

    async def crash(self, request, context):
        raise RuntimeError("boom")

    async def hang(self, request, context):
        for response in script(*ANSWER[:2]):
            await context.write(response)
        await asyncio.sleep(60)

    async def Cancel(self, request, context):
        self.cancelled.append(request.request_id)
        return pb.CancelGenerateResponse(found=request.request_id == "r1")

    async def ListModels(self, request, context):
        return pb.ListModelsResponse(models=[pb.Model(name="m", max_model_len=2048), pb.Model(name="a", parent="m")])

    async def ClusterStatus(self, request, context):
        worker = pb.Worker(worker_id="w0", pool="p", role="prefill", model="m", epoch=3, kv_blocks_total=9)
        return pb.ClusterStatusResponse(cluster="c", workers=[worker], leases=2)


@pytest.fixture(scope="module")
def server():
    """The scripted servicer and its address; it runs in a loop of its own, as a gateway would in a process."""
    servicer, ready, stop, box = Scripted(), threading.Event(), None, {}

    async def serve():
        nonlocal stop
        stop = asyncio.Event()
        grpc_server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1 << 20)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, grpc_server)
        box["port"] = grpc_server.add_insecure_port("127.0.0.1:0")
        await grpc_server.start()
        box["loop"] = asyncio.get_running_loop()
        ready.set()
        await stop.wait()
        await grpc_server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    yield servicer, f"127.0.0.1:{box['port']}"
    box["loop"].call_soon_threadsafe(stop.set)
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def servicer(server):
    servicer = server[0]
    servicer.ended.clear()
    servicer.requests.clear()
    return servicer


@pytest.fixture
def client(server, servicer):
    with Client(server[1], token="secret", timeout=20) as client:
        yield client


@pytest.fixture
async def aclient(server, servicer):
    async with AsyncClient(server[1], timeout=20) as client:
        yield client


def test_whole_answer(client, servicer):
    answer = client.generate("answer", max_tokens=2, stop=".")
    assert answer.text == "Hello"
    assert (answer.request_id, answer.model, answer.created) == ("r1", "m", 7)
    (choice,) = answer.choices
    assert choice.token_ids == (1, 2)
    assert (choice.finish_reason, choice.stop_reason) == ("stop", ".")
    assert answer.usage == Usage(3, 2, 1)
    assert answer.ledger == LEDGER
    assert servicer.requests[0].sampling.max_tokens == 2
    assert servicer.metadata[-1]["authorization"] == "Bearer secret"


def test_stream_gives_every_event_and_the_ledger(client):
    with client.generate("answer", stream=True) as stream:
        events = list(stream)
        assert stream.ledger == LEDGER
        assert stream.request_id == "r1"
    assert [type(e) for e in events] == [Started, Delta, Delta, Finished, Usage]
    assert stream.result().text == "Hello"


async def test_async_answer_and_stream(aclient):
    assert (await aclient.generate("answer")).text == "Hello"
    async with aclient.generate("answer", stream=True) as stream:
        events = [e async for e in stream]
    assert [type(e) for e in events] == [Started, Delta, Delta, Finished, Usage]
    assert stream.ledger == LEDGER


@pytest.mark.parametrize("fault", ["gap", "repeat", "truncated"])
async def test_missing_events_are_an_error(client, aclient, fault):
    with pytest.raises(SequenceGapError):
        client.generate(fault)
    with pytest.raises(SequenceGapError):
        await aclient.generate(fault)


async def test_unknown_events_are_skipped(client, aclient):
    assert client.generate("unknown_event").text == "Hello"
    assert (await aclient.generate("unknown_event")).text == "Hello"


def test_break_in_the_middle_keeps_what_came(server, servicer):
    with Client(server[1], timeout=20, resume=0) as client:
        stream = client.generate("breaks", stream=True)
        assert isinstance(next(stream), Started)
        assert next(stream) == Delta(0, "Hel", token_ids=(1,))
        with pytest.raises(UnreachableError, match="worker went away") as caught:
            next(stream)
        assert caught.value.request_id == "r1"
        with pytest.raises(UnreachableError):
            next(stream)  # it stays failed


async def test_errors_keep_their_class_and_retry_after(client, aclient):
    with pytest.raises(OverloadedError, match="too many tokens wait") as caught:
        client.generate("overloaded")
    assert caught.value.retry_after_s == 1.5
    stream = aclient.generate("overloaded", stream=True)
    with pytest.raises(OverloadedError) as caught:
        await anext(stream)
    assert caught.value.retry_after_s == 1.5
    assert stream.ledger == LEDGER
    with pytest.raises(ModelNotFoundError):
        client.generate("no_model")
    with pytest.raises(InternalError):
        client.generate("crash")


async def test_deadline(client, aclient):
    begin = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        client.generate("hang", timeout=0.3)
    with pytest.raises(DeadlineExceededError):
        await aclient.generate("hang", timeout=0.3)
    assert time.monotonic() - begin < 5


def test_cancel_reaches_the_server(client, servicer):
    stream = client.generate("hang", stream=True)
    next(stream)
    threading.Timer(0.2, stream.cancel).start()
    with pytest.raises(RequestCancelledError):
        list(stream)
    assert servicer.ended.wait(5)


def test_leaving_the_context_cancels(client, servicer):
    with client.generate("hang", stream=True) as stream:
        next(stream)
    assert servicer.ended.wait(5)


async def test_async_cancel(aclient, servicer):
    async with aclient.generate("hang", stream=True) as stream:
        await anext(stream)
        await anext(stream)
        asyncio.get_running_loop().call_later(0.1, stream.cancel)
        with pytest.raises(RequestCancelledError):
            await anext(stream)
    assert await asyncio.to_thread(servicer.ended.wait, 5)


async def test_cancelling_the_task_is_no_error_of_the_request(aclient, servicer):
    task = asyncio.create_task(aclient.generate("hang"))
    while not servicer.requests:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(servicer.ended.wait, 5)


async def test_models_status_cancel(client, aclient):
    models = client.models()
    assert [(m.name, m.parent, m.max_model_len) for m in models] == [("m", "", 2048), ("a", "m", 0)]
    status = client.status()
    assert (status.cluster, status.leases, status.workers[0].worker_id) == ("c", 2, "w0")
    assert client.cancel("r1")
    assert not client.cancel("nobody")
    assert await aclient.models() == models
    assert await aclient.status() == status
    assert await aclient.cancel("r1")


async def test_unreachable():
    with Client("127.0.0.1:9", timeout=5) as client, pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9"):
        client.models()
    async with AsyncClient("127.0.0.1:9", timeout=5) as aclient:
        with pytest.raises(UnreachableError):
            await aclient.generate("x")


async def test_closed_clients_say_so(server):
    client = Client(server[1])
    client.close()
    client.close()
    with pytest.raises(ClientClosedError):
        client.generate("answer")
    aclient = AsyncClient(server[1])
    await aclient.close()
    with pytest.raises(ClientClosedError):
        await aclient.generate("answer")


def test_close_ends_running_streams(server, servicer):
    client = Client(server[1])
    stream = client.generate("hang", stream=True)
    next(stream)
    threading.Timer(0.2, client.close).start()
    with pytest.raises(RequestCancelledError):
        list(stream)
    assert servicer.ended.wait(5)


def test_a_request_larger_than_the_gateway_takes(client):
    with pytest.raises(RequestTooLargeError):
        client.generate("x" * (2 << 20))


def test_one_client_many_threads(client):
    texts, errors = [], []

    def work():
        try:
            texts.extend(client.generate("answer").text for _ in range(10))
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert texts == ["Hello"] * 160


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "exactly one"),
        ({"prompt": "a", "token_ids": [1]}, "exactly one"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens=-1"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "temprature": 1}, "no such option"),
        ({"prompt": "a", "regex": "a", "grammar": "b"}, "only one of"),
        ({"prompt": "a", "choice": "yes"}, "list of strings"),
        ({"prompt": 3}, "prompt"),
        ({"token_ids": [-1]}, "prompt"),
        ({"messages": [{"content": "no role"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not supported"),
        ({"prompt": "a", "json_schema": {"x": {1, 2}}}, "json_schema"),
    ],
)
def test_wrong_arguments_never_leave_the_client(client, servicer, arguments, text):
    with pytest.raises(InvalidRequestError, match=text):
        client.generate(**arguments)
    assert not servicer.requests


def test_every_option_reaches_the_wire():
    options = {
        "model": "m",
        "temperature": 0.7,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "logit_bias": {7: -1.5},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}],
        "tool_choice": "f",
        "json_schema": {"properties": {"z": {}, "a": {}}},
        "request_id": "mine",
        "session_id": "s",
        "priority": -2,
        "chat_template_kwargs": {"enable_thinking": False},
        "seed": 0,
    }
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [ToolCall("c1", "f", "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    request = build_request(None, messages, None, options)
    assert request.sampling.temperature == 0.7
    assert request.sampling.HasField("seed")
    assert request.sampling.logit_bias == {7: -1.5}
    assert list(request.sampling.stop) == ["a", "b"]
    assert request.tools[0].parameters == '{"z": 1, "a": 2}'  # keys keep their order
    assert request.response_format.json_schema == '{"properties": {"z": {}, "a": {}}}'
    assert request.messages.messages[1].tool_calls[0].name == "f"
    assert request.messages.messages[2].tool_call_id == "c1"
    assert (request.request_id, request.session_id, request.priority) == ("mine", "s", -2)


def test_pieces_of_tool_calls_are_joined(client, servicer, monkeypatch):
    async def tools(request, context):
        pieces = [
            pb.ToolCall(id="c0", name="f", arguments='{"a"', index=0),
            pb.ToolCall(arguments=": 1}", index=0),
            pb.ToolCall(id="c1", name="g", arguments="{}", index=1),
        ]
        events = [started(), *(delta("", tool_calls=[p]) for p in pieces), finished(reason="tool_calls"), USAGE]
        for response in script(*events):
            await context.write(response)

    monkeypatch.setattr(servicer, "tools", tools, raising=False)
    (choice,) = client.generate("tools").choices
    assert choice.tool_calls == (ToolCall("c0", "f", '{"a": 1}', 0), ToolCall("c1", "g", "{}", 1))
