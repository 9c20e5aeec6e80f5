"""Utility calls that must hold on every worker: all succeed, or the call fails and says where."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import msgspec
from vllm.lora.request import LoRARequest

from joinwise.actors.gateway.links import Links
from joinwise.cluster.errors import InvalidRequestError, JoinwiseError, NoWorkerError, WorkerLostError
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.proto import engine_pb2, engine_pb2_grpc

_TIMEOUT_S = 60.0


class Utilities:
    """Calls every live worker of one model.

    Adapters are written to the registry, so that a worker that joins later loads them before it
    takes requests.
    """

    def __init__(self, registry: Registry, links: Links, model: str) -> None:
        self._registry = registry
        self._links = links
        self._model = model

    async def add_lora(self, lora: LoRARequest) -> bool:
        """Record an adapter and load it on every worker; on a failure it is unloaded and forgotten again.

        It is recorded first: a worker that joins meanwhile registers only with it loaded.
        """
        await self._registry.add_adapter(self._model, lora.lora_name, lora.lora_path, lora.lora_int_id)
        try:
            await self._all("add_lora", [msgspec.to_builtins(lora)])
        except JoinwiseError:
            await self._registry.remove_adapter(self._model, lora.lora_name)
            await self._all("remove_lora", [lora.lora_int_id], tolerate=True)
            raise
        for worker in await self._workers():
            await self._registry.set_adapters(worker, worker.adapters | {lora.lora_name})
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        """Unload an adapter everywhere and forget it."""
        for adapter in await self._registry.adapters(self._model):
            if adapter.lora_id == lora_id:
                await self._registry.remove_adapter(self._model, adapter.name)
                for worker in await self._workers():
                    await self._registry.set_adapters(worker, worker.adapters - {adapter.name})
        return all(await self._all("remove_lora", [lora_id]))

    async def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter loaded everywhere."""
        return all(await self._all("pin_lora", [lora_id]))

    async def list_loras(self) -> set[int]:
        """Adapters that every worker holds."""
        held = [set(each) for each in await self._all("list_loras", [])]
        return set.intersection(*held) if held else set()

    async def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        """Forget cached prefixes everywhere: where no worker is, there are none."""
        return not await self._workers() or all(await self._all("reset_prefix_cache", [reset_running_requests]))

    async def _workers(self) -> list[WorkerInfo]:
        return [info for info in await self._registry.list() if info.model == self._model]

    async def _all(self, method: str, arguments: Sequence[Any], *, tolerate: bool = False) -> list[Any]:
        workers = await self._workers()
        if not workers:
            raise NoWorkerError(f"{method}: no worker serves {self._model!r} now", retry_after_s=5.0)
        answers = await asyncio.gather(
            *(self._one(worker, method, arguments) for worker in workers), return_exceptions=True
        )
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures and not tolerate:
            raise failures[0]
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _one(self, worker: WorkerInfo, method: str, arguments: Sequence[Any]) -> Any:
        channel = self._links.channel(worker.engine_address)
        try:
            response = await engine_pb2_grpc.EngineServiceStub(channel).Utility(
                engine_pb2.UtilityRequest(method=method, arguments=msgspec.msgpack.encode(list(arguments))),
                timeout=_TIMEOUT_S,
                metadata=self._links.metadata,
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:  # the engine lives, and says why not
                raise InvalidRequestError(f"worker {worker.worker_id} refuses: {error.details()}") from error
            raise WorkerLostError(f"{method} failed on worker {worker.worker_id}: {error.details()}") from error
        finally:
            await channel.close()
        return msgspec.msgpack.decode(response.result)
