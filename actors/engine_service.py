"""The worker's end of the engine service: gateways attach, their requests go to the engine loop.

One stream per gateway. Each stream has a slot (vLLM's `client_index`); the outputs of a step go to
the slots they belong to. A stream that ends, for whatever reason, aborts every request that came
over it. A gateway that does not read its outputs is cut off, so that it cannot fill our memory.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import grpc
import msgspec
import vllm
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from joinwise.actors.kv.fetching import FetchReport
from joinwise.actors.kv.metrics import KvMetrics
from joinwise.actors.vllm import connector
from joinwise.actors.vllm.connector import ports
from joinwise.actors.vllm.engine_loop import UTILITIES, EngineLoop
from joinwise.proto import engine_pb2, engine_pb2_grpc

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
_MAX_QUEUED_FRAMES = 20_000


@dataclass(frozen=True)
class WorkerIdentity:
    """Who this worker is, as it registered.

    Attributes:
        epoch: 0 before it has.
        former: epochs of this process before; it registers again with a Redis that has lost its data.
    """

    cluster: str
    worker_id: str
    epoch: int
    former: frozenset[int] = frozenset()

    def again(self, epoch: int) -> "WorkerIdentity":
        """The same process, registered anew."""
        return replace(self, epoch=epoch, former=self.former | ({self.epoch} if self.epoch else frozenset()))


@dataclass
class _Gateway:
    gateway_id: str
    frames: "asyncio.Queue[engine_pb2.AttachResponse | None]" = field(
        default_factory=lambda: asyncio.Queue(_MAX_QUEUED_FRAMES)
    )


class EngineService(engine_pb2_grpc.EngineServiceServicer):
    """Serves gateways from one engine loop. Lives on one asyncio loop.

    Args:
        identity: who this worker is.
        kv: what its KV links look like.
    """

    def __init__(self, identity: WorkerIdentity, kv: KvMetrics) -> None:
        self.identity = identity
        self._kv = kv
        self._asyncio = asyncio.get_running_loop()
        self._engine: EngineLoop | None = None
        self._gateways: dict[int, _Gateway] = {}
        self._slots = itertools.count()
        self._slot_of: dict[str, int] = {}
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreRequest)

    def bind(self, engine: EngineLoop) -> None:
        """Give the service its engine."""
        self._engine = engine

    # Called on the engine's threads.

    def on_outputs(self, slot: int, outputs: EngineCoreOutputs) -> None:
        """Encode a step's outputs where they were made, and hand them to the stream."""
        buffers = [bytes(buffer) for buffer in self._encoder.encode(outputs)]
        finished = [each.request_id for each in outputs.outputs if each.finish_reason is not None]
        message = engine_pb2.AttachResponse(frame=engine_pb2.Frame(outputs=buffers))
        self._asyncio.call_soon_threadsafe(self._send, slot, message, finished)

    def on_report(self, report: FetchReport) -> None:
        """Tell the gateway what a KV import cost."""
        message = engine_pb2.AttachResponse(
            transfer=engine_pb2.TransferReport(
                request_id=report.request_id,
                bytes=report.bytes,
                wire_seconds=report.wire_seconds,
                exposed_seconds=report.exposed_seconds,
                import_seconds=report.import_seconds,
                transport=report.transport,
                recomputed=bool(report.failure),
                failure=report.failure,
                local_hit_tokens=report.local_hit_tokens,
            )
        )
        self._asyncio.call_soon_threadsafe(self._send_report, report.request_id, message)

    def on_dead(self, error: BaseException) -> None:
        """The engine has died: end every stream, so that gateways recover their requests."""
        self._asyncio.call_soon_threadsafe(self._end_all)

    # The service.

    async def Attach(  # noqa: N802 - gRPC's name
        self, requests: AsyncIterator[engine_pb2.AttachRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.AttachResponse]:
        """See engine.proto."""
        hello = (await anext(aiter(requests), engine_pb2.AttachRequest())).hello
        await self._check(hello, context)
        slot = next(self._slots)
        gateway = self._gateways[slot] = _Gateway(hello.gateway_id)
        reader = asyncio.create_task(self._read(slot, requests))
        reader.add_done_callback(lambda _: self._end(gateway))
        logger.info("gateway %s attached", hello.gateway_id)
        try:
            yield engine_pb2.AttachResponse(
                welcome=engine_pb2.Welcome(
                    protocol_version=PROTOCOL_VERSION,
                    worker_epoch=self.identity.epoch,
                    vllm_version=vllm.__version__,
                )
            )
            while (message := await gateway.frames.get()) is not None:
                yield message
        finally:
            reader.cancel()
            del self._gateways[slot]
            self._slot_of = {name: owner for name, owner in self._slot_of.items() if owner != slot}
            self._loop.drop(slot)
            logger.info("gateway %s detached", hello.gateway_id)

    async def Utility(  # noqa: N802
        self, request: engine_pb2.UtilityRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.UtilityResponse:
        """See engine.proto."""
        if request.method not in UTILITIES:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no utility {request.method!r}")
        arguments = msgspec.msgpack.decode(request.arguments)
        if request.method == "add_lora":
            arguments = [msgspec.convert(arguments[0], LoRARequest)]
        try:
            result = await asyncio.wrap_future(self._loop.utility(request.method, arguments))
        except Exception as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{request.method}: {error}")
        if isinstance(result, set):
            result = sorted(result)
        return engine_pb2.UtilityResponse(result=msgspec.msgpack.encode(result))

    async def Idle(  # noqa: N802
        self, request: engine_pb2.IdleRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.IdleResponse:
        """See engine.proto."""
        return await asyncio.wrap_future(self._loop.between_steps(self._idle))

    async def KvLinks(  # noqa: N802
        self, request: engine_pb2.KvLinksRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.KvLinksResponse:
        """See engine.proto."""
        return engine_pb2.KvLinksResponse(
            links=[
                engine_pb2.KvLinkReport(
                    peer=link.peer,
                    transport=link.transport,
                    why=link.why,
                    codec=link.codec,
                    codec_why=link.codec_why,
                    bytes_per_s=link.bytes_per_s,
                    bytes=int(link.total("bytes")),
                    streams=int(link.total("streams")),
                    failed=int(link.total("failed")),
                    retries=link.retries,
                    refused=link.refused(),
                )
                for link in self._kv.figures.links
            ]
        )

    # Inside.

    @property
    def _loop(self) -> EngineLoop:
        assert self._engine is not None, "bind() comes before serving"
        return self._engine

    async def _check(self, hello: engine_pb2.Hello, context: grpc.aio.ServicerContext) -> None:
        mine = self.identity
        checks = (
            ("protocol version", hello.protocol_version, PROTOCOL_VERSION),
            ("vLLM version", hello.vllm_version, vllm.__version__),
            ("cluster", hello.cluster, mine.cluster),
            ("worker id", hello.worker_id, mine.worker_id),
            # A gateway that rides out Redis' loss knows this process by the epoch that it had.
            (
                "worker epoch",
                hello.worker_epoch,
                hello.worker_epoch if hello.worker_epoch in mine.former else mine.epoch,
            ),
        )
        for what, theirs, ours in checks:
            if theirs != ours:
                await context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION, f"{what}: the gateway says {theirs!r}, this worker is {ours!r}"
                )

    async def _read(self, slot: int, requests: AsyncIterator[engine_pb2.AttachRequest]) -> None:
        async for message in requests:
            kind = message.WhichOneof("message")
            if kind == "add":
                request = self._decoder.decode(list(message.add.request))
                self._slot_of.setdefault(request.request_id, slot)
                if message.add.again:
                    self._send_begun(slot, request.request_id)
                self._loop.add(slot, request)
            elif kind == "abort":
                for request_id in message.abort.request_ids:
                    self._forget(slot, request_id)
                self._loop.abort(slot, list(message.abort.request_ids))
            elif kind == "continue_request":
                each = message.continue_request
                if each.recompute:
                    self._send_begun(slot, each.request_id)
                self._loop.continue_(each.request_id, each.epoch, list(each.replay_token_ids), each.recompute)

    def _send(self, slot: int, message: engine_pb2.AttachResponse, finished: list[str]) -> None:
        for request_id in finished:
            self._forget(slot, request_id)
        gateway = self._gateways.get(slot)
        if gateway is None:
            return
        try:
            gateway.frames.put_nowait(message)
        except asyncio.QueueFull:
            logger.error("gateway %s does not read its outputs; cutting it off", gateway.gateway_id)
            self._end(gateway)

    def _send_begun(self, slot: int, request_id: str) -> None:
        self._send(slot, engine_pb2.AttachResponse(begun=engine_pb2.Begun(request_id=request_id)), [])

    def _forget(self, slot: int, request_id: str) -> None:
        if self._slot_of.get(request_id) == slot:  # a duplicate's end is not its namesake's
            del self._slot_of[request_id]

    def _send_report(self, request_id: str, message: engine_pb2.AttachResponse) -> None:
        slot = self._slot_of.get(request_id)
        if slot is not None:
            self._send(slot, message, [])

    def _end(self, gateway: _Gateway) -> None:
        while gateway.frames.full():
            gateway.frames.get_nowait()
        gateway.frames.put_nowait(None)

    def _end_all(self) -> None:
        for gateway in self._gateways.values():
            self._end(gateway)

    def _idle(self) -> engine_pb2.IdleResponse:
        core, scheduler = self._loop.core, connector.host.scheduler
        ours = scheduler.entries() if scheduler is not None else []
        kv = ports.status(core.model_executor)
        pool = core.scheduler.kv_cache_manager.block_pool
        total = pool.num_gpu_blocks - 1
        held = [*ours, *kv.entries, *(f"waits for its token {name}" for name in self._loop.held)]
        return engine_pb2.IdleResponse(
            scheduler_requests=len(core.scheduler.requests),
            blocks_used=total - pool.get_num_free_blocks(),
            blocks_total=total,
            connector_entries=len(held),
            kv_streams=kv.streams,
            landing_bytes=kv.landing_bytes,
            held=held[:16],
            failure_reasons={k: v for k, v in kv.counters.items() if k not in ("completed", "failed")},
            transfers_completed=kv.counters["completed"],
            transfers_failed=kv.counters["failed"],
        )
