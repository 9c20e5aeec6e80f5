"""LoRA adapters as clients see them: which there are of each model, and the routes that add and remove them.

The registry is the truth, so that several gateways agree: each follows it, and lists an adapter once every worker of
the model has it. Adding and removing go through `Utilities`, to all workers.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest

from joinwise.actors.gateway.utilities import Utilities
from joinwise.cluster.errors import InvalidRequestError, JoinwiseError, ModelNotFoundError, NotSupportedError
from joinwise.cluster.router.registry import Registry, adapter_id

_UNSUPPORTED = {
    "sleep": "POST",
    "wake_up": "POST",
    "is_sleeping": "GET",
    "pause": "POST",
    "resume": "POST",
    "collective_rpc": "POST",
    "start_profile": "POST",
    "stop_profile": "POST",
    "reset_mm_cache": "POST",
    "reset_encoder_cache": "POST",
}


class Adapters:
    """The adapters of one model in one gateway.

    Args:
        models: vLLM's list of models, whose adapters are ours to keep.
        enabled: the engines can take adapters.
    """

    def __init__(
        self, registry: Registry, utilities: Utilities, models: OpenAIServingModels, model: str, *, enabled: bool
    ) -> None:
        self._registry = registry
        self._utilities = utilities
        self._models = models
        self.model = model
        self._enabled = enabled
        self._changing = asyncio.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._models.lora_requests

    async def sync(self) -> None:
        """Take over what the registry says.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        async with self._changing:
            recorded = await self._registry.adapters(self.model)
            workers = [info for info in await self._registry.list() if info.model == self.model]
            everywhere = [each for each in recorded if all(each.name in info.adapters for info in workers)]
            held = self._models.lora_requests
            for name in held.keys() - {each.name for each in recorded}:
                del held[name]
            for each in everywhere:
                if each.name not in held or held[each.name].lora_path != each.path:
                    held[each.name] = LoRARequest(each.name, each.lora_id, each.path)

    async def follow(self, every_s: float) -> None:
        """Sync for ever; a Redis that does not answer is asked again."""
        while True:
            await asyncio.sleep(every_s)
            with contextlib.suppress(JoinwiseError):
                await self.sync()

    async def load(self, request: LoadLoRAAdapterRequest) -> str:
        """Load an adapter on every worker, or on none.

        Raises:
            NotSupportedError: the engines were started without adapters.
            InvalidRequestError: the name is taken, or a worker refuses the adapter's files.
        """
        name = request.lora_name
        if not self._enabled:
            raise NotSupportedError("the engines run without adapters: set enable_lora in the pools' engine arguments")
        if not name or not request.lora_path:
            raise InvalidRequestError("'lora_name' and 'lora_path' must be given")
        async with self._changing:
            if self._models.registry.is_base_model(name):
                raise InvalidRequestError(f"the name {name!r} is the model's: give the adapter another")
            if name in self._models.lora_requests:
                raise InvalidRequestError(
                    f"there is an adapter {name!r}: unload it first, or give this one another name"
                )
            lora = LoRARequest(name, adapter_id(name), request.lora_path)
            await self._utilities.add_lora(lora)
            self._models.lora_requests[name] = lora
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, request: UnloadLoRAAdapterRequest) -> str:
        """Unload an adapter everywhere.

        Raises:
            ModelNotFoundError: there is none of that name.
        """
        async with self._changing:
            lora = self._models.lora_requests.pop(request.lora_name, None)
            if lora is None:
                raise ModelNotFoundError(f"there is no adapter {request.lora_name!r}")
            await self._utilities.remove_lora(lora.lora_int_id)
        return f"Success: LoRA adapter '{request.lora_name}' removed successfully."

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes on every worker; false when one has a request that still uses its cache."""
        return await self._utilities.reset_prefix_cache(False)


class LoadRequest(LoadLoRAAdapterRequest):
    """vLLM's own, and the model that the adapter is for."""

    model: str | None = None
    """Needed where the cluster serves several."""


class AdapterRoutes:
    """Adapters of all models of a gateway, in one name space: clients ask for an adapter by its name alone."""

    def __init__(self, adapters: Sequence[Adapters]) -> None:
        self._by_model = {each.model: each for each in adapters}
        self._loading = asyncio.Lock()

    async def load(self, request: LoadRequest) -> str:
        """As `Adapters.load`, for the model that the request names.

        Raises:
            ModelNotFoundError: there is no such model.
            InvalidRequestError: no model is named, where there are several, or another one has the adapter's name.
        """
        chosen = self._named(request.model)
        async with self._loading:
            for other in self._by_model.values():
                if other is not chosen and (request.lora_name == other.model or request.lora_name in other):
                    raise InvalidRequestError(
                        f"the name {request.lora_name!r} belongs to {other.model!r}: give the adapter another"
                    )
            return await chosen.load(request)

    async def unload(self, request: UnloadLoRAAdapterRequest) -> str:
        """As `Adapters.unload`, for the model that the adapter belongs to."""
        everyone = list(self._by_model.values())
        holder = next((each for each in everyone if request.lora_name in each), everyone[0])
        return await holder.unload(request)

    async def reset_prefix_cache(self) -> dict[str, bool]:
        """Forget cached prefixes on every worker; false when one has a request that still uses its cache."""
        return {"reset": all([await each.reset_prefix_cache() for each in self._by_model.values()])}

    def _named(self, model: str | None) -> Adapters:
        if model is None and len(self._by_model) > 1:
            names = ", ".join(self._by_model)
            raise InvalidRequestError(f"which model is the adapter for? Set 'model' to one of {names}")
        found = next(iter(self._by_model.values())) if model is None else self._by_model.get(model)
        if found is None:
            raise ModelNotFoundError(f"there is no model {model!r}")
        return found


def adapter_routes(adapters: Sequence[Adapters], *, admin: bool) -> APIRouter:
    """vLLM's routes for adapters (with `admin`), and refusals in place of those that one engine would have."""
    router, ours = APIRouter(), AdapterRoutes(adapters)
    if admin:
        router.post("/v1/load_lora_adapter")(ours.load)
        router.post("/v1/unload_lora_adapter")(ours.unload)
        router.post("/v1/reset_prefix_cache")(ours.reset_prefix_cache)
    for name, method in _UNSUPPORTED.items():
        router.add_api_route(f"/{name}", _refusal(name), methods=[method], include_in_schema=False)
    return router


def _refusal(name: str) -> Any:
    async def refuse() -> None:
        raise NotSupportedError(f"{name!r} is a call to one engine; this is a cluster of them")

    return refuse
