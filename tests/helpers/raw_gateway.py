"""A gateway that does only what a test tells it to: it speaks to one worker over the engine service, by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from helpers.cluster import RunningCluster

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.cluster.store.client import connect
from joinwise.proto import engine_pb2, engine_pb2_grpc


async def workers(cluster: RunningCluster) -> dict[str, WorkerInfo]:
    """Live workers by role."""
    client = connect(cluster.redis_url)
    try:
        return {info.role: info for info in await Registry(client, cluster.name, RouterConfig()).list()}
    finally:
        await client.aclose()


def hello(cluster: str, worker: WorkerInfo, /, **changes: Any) -> engine_pb2.Hello:
    """What a gateway says first; `changes` make it wrong."""
    fields = {
        "protocol_version": worker.protocol_version,
        "vllm_version": worker.vllm_version,
        "cluster": cluster,
        "gateway_id": "by-hand",
        "worker_id": worker.worker_id,
        "worker_epoch": worker.epoch,
    }
    return engine_pb2.Hello(**{**fields, **changes})  # type: ignore[arg-type]


class RawGateway:
    """An open stream to a worker."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def add(
        self, request_id: str, prompt: list[int], *, handoff: Any = None, again: bool = False, **params: Any
    ) -> None:
        """Add a request, without any gateway's bookkeeping; `again` says that it has lost a worker."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackEncoder

        from joinwise.actors.vllm.handoff import KV_TRANSFER_KEY

        extra = {KV_TRANSFER_KEY: handoff.to_params()} if handoff is not None else None
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **params}, extra_args=extra),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        parts = [bytes(part) for part in MsgpackEncoder().encode(request)]
        await self.send(add=engine_pb2.AddRequest(request=parts, again=again))

    async def abort(self, *request_ids: str) -> None:
        """Abort requests."""
        await self.send(abort=engine_pb2.AbortRequests(request_ids=request_ids))

    async def send(self, **message: Any) -> None:
        """Send one message."""
        await self._call.write(engine_pb2.AttachRequest(**message))

    async def output(self, request_id: str) -> Any:
        """The next EngineCoreOutput of a request."""
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder

        while True:
            message = await self.read()
            if message.WhichOneof("message") != "frame":
                continue
            frame = MsgpackDecoder(EngineCoreOutputs).decode(list(message.frame.outputs))
            for output in frame.outputs:
                if output.request_id == request_id:
                    return output

    async def tokens(self, request_id: str) -> tuple[list[int], Any]:
        """All tokens of a request, and why it ended."""
        tokens: list[int] = []
        while True:
            output = await self.output(request_id)
            tokens += output.new_token_ids
            if output.finish_reason is not None:
                return tokens, output.finish_reason

    async def report(self, request_id: str) -> engine_pb2.TransferReport:
        """The report of a request's transfer; outputs before it are passed over."""
        while True:
            message = await self.read()
            if message.WhichOneof("message") == "transfer" and message.transfer.request_id == request_id:
                return message.transfer

    async def read(self) -> engine_pb2.AttachResponse:
        """The next message; grpc.aio.AioRpcError or AssertionError when the stream has ended."""
        async with asyncio.timeout(60):
            message = await self._call.read()
        assert message is not grpc.aio.EOF, "the worker ended the stream"
        return message


@asynccontextmanager
async def attached(cluster: str, worker: WorkerInfo, /, **changes: Any) -> AsyncIterator[RawGateway]:
    """Attach to a worker; leaving the context breaks the stream, as a gateway that dies does."""
    async with grpc.aio.insecure_channel(worker.engine_address) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).Attach()
        gateway = RawGateway(call)
        await gateway.send(hello=hello(cluster, worker, **changes))
        welcome = await gateway.read()
        assert welcome.WhichOneof("message") == "welcome"
        try:
            yield gateway
        finally:
            call.cancel()
