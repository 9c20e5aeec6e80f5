"""Links to workers, against a real engine service in this process: kept, reopened, lost once, refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
import vllm

from joinwise.actors.engine_service import PROTOCOL_VERSION, EngineService, WorkerIdentity
from joinwise.actors.gateway.links import Links
from joinwise.actors.kv.metrics import KvMetrics
from joinwise.cluster.errors import WorkerLostError
from joinwise.cluster.router.router import WorkerRef
from joinwise.proto import engine_pb2, engine_pb2_grpc

CLUSTER = "c"


@dataclass
class FakeLoop:
    """Remembers what the service asks of its engine."""

    dropped: list[int] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def drop(self, slot: int) -> None:
        self.dropped.append(slot)

    def abort(self, slot: int, request_ids: list[str]) -> None:
        self.aborted += request_ids


@dataclass
class Worker:
    """A worker's engine service on a port."""

    ref: WorkerRef
    service: EngineService
    loop: FakeLoop
    server: grpc.aio.Server

    def end_streams(self) -> None:
        self.service.on_dead(RuntimeError("the engine died"))


@contextlib.asynccontextmanager
async def worker(worker_id: str = "w0", epoch: int = 3, cluster: str = CLUSTER) -> AsyncIterator[Worker]:
    service, loop = EngineService(WorkerIdentity(cluster, worker_id, epoch), KvMetrics()), FakeLoop()
    service.bind(loop)  # type: ignore[arg-type]
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Worker(WorkerRef(worker_id, epoch, f"127.0.0.1:{port}", ""), service, loop, server)
    finally:
        await server.stop(0)


class Owner:
    """Who owns the links, and what it was told."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str | None]] = []
        self.lost: list[tuple[str, str]] = []
        self.links = Links(CLUSTER, "g0", on_message=self._on_message, on_lost=self._on_lost)

    def _on_message(self, worker: WorkerRef, message: engine_pb2.AttachResponse) -> None:
        self.messages.append((worker.worker_id, message.WhichOneof("message")))

    async def _on_lost(self, worker: WorkerRef, reason: str) -> None:
        self.lost.append((worker.worker_id, reason))


@pytest.fixture
async def owner() -> AsyncIterator[Owner]:
    owner = Owner()
    yield owner
    await owner.links.close()


async def until(condition: Callable[[], Any], what: str) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


def abort(*ids: str) -> engine_pb2.AttachRequest:
    return engine_pb2.AttachRequest(abort=engine_pb2.AbortRequests(request_ids=ids))


async def test_one_link_serves_all_and_keeps_the_order(owner: Owner) -> None:
    async with worker() as w:
        assert owner.links.find(w.ref) is None
        links = await asyncio.gather(*(owner.links.get(w.ref) for _ in range(20)))
        assert len(set(map(id, links))) == 1
        assert owner.links.find(w.ref) is links[0]
        for number in range(200):
            links[0].send(abort(str(number)))
        await until(lambda: len(w.loop.aborted) == 200, "all messages")
        assert w.loop.aborted == [str(number) for number in range(200)]
        (slot,) = w.service._gateways
        w.service._send(slot, engine_pb2.AttachResponse(frame=engine_pb2.Frame()), [])
        await until(lambda: owner.messages, "a frame")
        assert owner.messages == [("w0", "frame")]
        await owner.links.close()
        await until(lambda: w.loop.dropped == [slot], "the worker sees the gateway go")
    assert owner.lost == []  # we went, nobody was lost


async def test_a_stream_that_ends_is_told_once_and_opened_again(owner: Owner) -> None:
    async with worker() as w:
        first = await owner.links.get(w.ref)
        w.end_streams()
        await until(lambda: owner.lost, "the loss")
        assert first.broken
        first.send(abort("dropped"))  # nobody is there: no error
        second = await owner.links.get(w.ref)
        assert second is not first
        second.send(abort("arrives"))
        await until(lambda: w.loop.aborted, "the message")
        assert w.loop.aborted == ["arrives"]
        assert owner.lost == [("w0", "the worker ended the stream")]


async def test_a_worker_that_dies_is_lost_once(owner: Owner) -> None:
    async with worker() as w:
        link = await owner.links.get(w.ref)
    link.send(abort("late"))
    await until(lambda: owner.lost, "the loss")
    await asyncio.sleep(0.1)
    assert len(owner.lost) == 1
    assert owner.links.find(w.ref) is None
    with pytest.raises(WorkerLostError, match="w0 does not accept this gateway"):
        await owner.links.get(w.ref)
    assert len(owner.lost) == 1  # an error of `get` is its caller's, nobody is told twice


async def test_a_restarted_worker_is_another_one(owner: Owner) -> None:
    async with worker(epoch=3) as old, worker(epoch=4) as new:
        first, second = await owner.links.get(old.ref), await owner.links.get(new.ref)
        assert first is not second
        old.end_streams()
        await until(lambda: owner.lost, "the loss")
        assert owner.links.find(old.ref) is None
        assert owner.links.find(new.ref) is second


@pytest.mark.parametrize(
    ("ref", "says"),
    [({"worker_id": "w1"}, "worker id"), ({"epoch": 2}, "worker epoch"), ({"epoch": 0}, "worker epoch")],
)
async def test_another_worker_at_the_address_is_refused(owner: Owner, ref: dict[str, Any], says: str) -> None:
    async with worker() as w:
        wrong = WorkerRef(**{"worker_id": "w0", "epoch": 3, **ref}, engine_address=w.ref.engine_address, kv_address="")
        with pytest.raises(WorkerLostError, match=f"{says}: the gateway says"):
            await owner.links.get(wrong)
        assert w.service._gateways == {}
    assert owner.lost == []


async def test_a_worker_of_another_cluster_is_refused(owner: Owner) -> None:
    async with worker(cluster="another") as w:
        with pytest.raises(WorkerLostError, match="cluster: the gateway says 'c', this worker is 'another'"):
            await owner.links.get(w.ref)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, "protocol version"),
        ({"vllm_version": "0.1"}, "vLLM version"),
        (None, "protocol version"),
    ],
)
async def test_a_hello_that_does_not_fit_is_refused(changes: dict[str, Any] | None, says: str) -> None:
    fits = {"protocol_version": PROTOCOL_VERSION, "vllm_version": vllm.__version__, "cluster": CLUSTER}
    fits |= {"gateway_id": "g", "worker_id": "w0", "worker_epoch": 3}
    first = abort("no hello") if changes is None else engine_pb2.AttachRequest(hello={**fits, **changes})  # type: ignore[arg-type]
    async with worker() as w, grpc.aio.insecure_channel(w.ref.engine_address) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).Attach()
        await call.write(first)
        with pytest.raises(grpc.aio.AioRpcError, match=says) as raised:
            assert await call.read() is grpc.aio.EOF
            raise AssertionError(await call.code())
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert w.service._gateways == {}
        assert w.loop.aborted == []


async def test_a_gateway_that_says_nothing_harms_nobody(owner: Owner) -> None:
    async with worker() as w:
        async with grpc.aio.insecure_channel(w.ref.engine_address) as channel:
            call = engine_pb2_grpc.EngineServiceStub(channel).Attach()
            await call.done_writing()
            assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
            hanging = engine_pb2_grpc.EngineServiceStub(channel).Attach()
            await asyncio.sleep(0.05)
            hanging.cancel()
        await owner.links.get(w.ref)
        assert len(w.service._gateways) == 1


async def test_a_worker_that_does_not_answer_is_given_up(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joinwise.actors.gateway.links._CONNECT_TIMEOUT_S", 0.2)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(WorkerLostError, match="does not accept"):
            await owner.links.get(WorkerRef("w0", 3, f"127.0.0.1:{port}", ""))
        await owner.links.close()


async def test_a_gateway_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joinwise.actors.engine_service._MAX_QUEUED_FRAMES", 10)
    owner = Owner()
    async with worker() as w:
        await owner.links.get(w.ref)
        (slot,) = w.service._gateways
        for _ in range(30):  # faster than anybody could read
            w.service._send(slot, engine_pb2.AttachResponse(frame=engine_pb2.Frame()), [])
        await until(lambda: owner.lost, "the loss")
        await until(lambda: w.loop.dropped == [slot], "its requests are dropped")
        await owner.links.close()


async def test_a_worker_that_had_to_register_again_is_known_by_its_former_epochs(owner: Owner) -> None:
    async with worker(epoch=3) as w:
        w.service.identity = w.service.identity.again(5).again(8)
        for epoch in (3, 5, 8):
            assert not (await owner.links.get(replace(w.ref, epoch=epoch))).broken
        for epoch in (0, 4, 9):
            with pytest.raises(WorkerLostError, match="worker epoch"):
                await owner.links.get(replace(w.ref, epoch=epoch))


def test_an_epoch_before_the_first_registration_is_none() -> None:
    assert WorkerIdentity(CLUSTER, "w0", 0).again(3).former == frozenset()
