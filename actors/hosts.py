"""What the launcher's actors host: each function here runs in a process of its own."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from joinwise.actors import cpu, ray_api
from joinwise.actors.spec import WorkerSpec
from joinwise.cluster.config import JoinwiseConfig

if TYPE_CHECKING:
    from joinwise.actors.draft.worker import DraftWorker
    from joinwise.actors.engine import EngineWorker


def engine_actor(config: JoinwiseConfig, spec: WorkerSpec, redis_url: str) -> EngineWorker:
    """What an engine actor hosts; it listens where its own node is reached."""
    from joinwise.actors.engine import EngineWorker

    return EngineWorker(config, replace(spec, host=spec.host or ray_api.node_address()), redis_url)


def draft_actor(config: JoinwiseConfig, spec: WorkerSpec, redis_url: str) -> DraftWorker:
    """What a draft actor hosts; it listens where its own node is reached."""
    from joinwise.actors.draft.worker import DraftWorker

    return DraftWorker(config, replace(spec, host=spec.host or ray_api.node_address()), redis_url)


def gateway_actor(config: JoinwiseConfig, redis_url: str) -> GatewayHost:
    """What a gateway actor hosts."""
    return GatewayHost(config, redis_url)


class GatewayHost:
    """A gateway as an actor: `start`, `stop`, `failure`, `phases`."""

    def __init__(self, config: JoinwiseConfig, redis_url: str) -> None:
        os.environ.update(cpu.GATEWAY)
        from joinwise.actors.gateway.gateway import Gateway

        self._gateway = Gateway(config, redis_url)
        self.phases = self._gateway.phases

    async def start(self) -> dict[str, str]:
        """Open the listeners; returns their addresses, as clients reach them."""
        addresses = await self._gateway.start()
        return {name: reachable(address) for name, address in asdict(addresses).items()}

    async def stop(self) -> None:
        """See `Gateway.stop`."""
        await self._gateway.stop()

    async def running(self) -> list[str]:
        """Requests that have not ended."""
        return self._gateway.running()

    def failure(self) -> str:
        """A gateway that answers is well."""
        return ""


def reachable(address: str) -> str:
    """An address with the node's own in place of "all interfaces"."""
    for anywhere in ("0.0.0.0:", "[::]:", ":::"):
        if anywhere in address:
            return address.replace(anywhere, f"{ray_api.node_address()}:", 1)
    return address
