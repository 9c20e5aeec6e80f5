"""joinwise as a Ray Serve application: `joinwise.actors.serve:app`.

    serve run --name joinwise joinwise.actors.serve:app config=joinwise.yaml

Two deployments. `engines` is one replica, the launcher: it starts Redis (where that is embedded) and the engines, and
replaces those that die. `gateway` is any number of replicas; each builds a gateway and opens its own HTTP and gRPC
listeners, so that no request goes through Serve (docs/decisions/0002-serve-listener.md). Serve starts, watches, drains
and replaces both. Engines belong to the launcher's replica: they end when Serve stops it; where Redis is not embedded
they serve on when it dies, and the next one takes them over (`adoption.py`).
"""

import asyncio
import contextlib
import os
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from joinwise.actors import cpu
from joinwise.actors.deployment import Cluster
from joinwise.actors.hosts import reachable
from joinwise.actors.scaling import RUNNING
from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.errors import InternalError, StoreUnavailableError

_BESIDE_DRAIN_S = 30.0  # for the rest of a stop
_ASK_S = 3.0


class Arguments(BaseModel):
    """Arguments of the application."""

    config: str | None = None
    """Path of joinwise.yaml; None takes $JOINWISE_CONFIG, and without that the demo's configuration."""


def app(arguments: Arguments) -> serve.Application:
    """Build the application; Serve calls this on a node of the cluster.

    Raises:
        ConfigError: the configuration cannot be read, or is wrong.
    """
    config = load_config(arguments.config or os.environ.get("JOINWISE_CONFIG"))
    stop_s = config.gateway.drain_s + _BESIDE_DRAIN_S
    common: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": stop_s}
    launcher = serve.deployment(name="engines", num_replicas=1, **common)(EnginesReplica)
    gateway = serve.deployment(name="gateway", num_replicas=config.gateway.replicas, **common)(GatewayReplica)
    return gateway.bind(config, launcher.bind(config))


class EnginesReplica:
    """The launcher of the cluster's engines, on Serve's terms."""

    async def __init__(self, config: JoinwiseConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._cluster = Cluster(config, _say, with_gateway=False)
        self._stopped = asyncio.Event()
        await self._cluster.start()
        self._job = asyncio.create_task(self._cluster.supervise(self._stopped))

    async def redis_url(self) -> str:
        """Address of the cluster's Redis, with the password."""
        return self._cluster.redis_url

    async def check_health(self) -> None:
        """Raise when the engines are no longer looked after; Serve then starts another launcher."""
        if self._job.done():
            raise self._job.exception() or InternalError("the launcher has stopped")

    async def __del__(self) -> None:
        """Serve awaits this when it stops the replica."""
        self._stopped.set()
        await self._cluster.stop()


class GatewayReplica:
    """One gateway with its own listeners, on Serve's terms."""

    async def __init__(self, config: JoinwiseConfig, engines: DeploymentHandle) -> None:  # type: ignore[misc]
        # Before torch is imported. Not Ray's runtime environment: a Serve configuration that sets actor options of its
        # own would drop it.
        os.environ.update(cpu.environment(1, config.log.level) | cpu.GATEWAY)
        from joinwise.actors.gateway.gateway import Gateway

        self._engines = engines
        self._redis_url = await engines.redis_url.remote()
        self._gateway = Gateway(config, self._redis_url)
        self._addresses = {name: reachable(each) for name, each in asdict(await self._gateway.start()).items()}
        _say(f"ready: {self._addresses['http']} (HTTP), {self._addresses['grpc']} (gRPC)")

    async def addresses(self) -> dict[str, str]:
        """Where this replica listens: `http` and `grpc`."""
        return self._addresses

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Running requests; Serve asks for them where its configuration says that it scales gateways."""
        return {RUNNING: float(len(self._gateway.running()))}

    async def check_health(self) -> None:
        """Raise when a new launcher has brought another Redis; a launcher that is away is no reason."""
        with contextlib.suppress(TimeoutError, RayServeException, RayError):
            async with asyncio.timeout(_ASK_S):
                if await self._engines.redis_url.remote() != self._redis_url:
                    raise StoreUnavailableError("the cluster has another Redis now: this gateway must start over")

    async def __del__(self) -> None:
        """Let running requests end; Serve awaits this when it stops the replica."""
        with contextlib.suppress(AttributeError):  # stopped before it was built
            await self._gateway.stop()


def _say(line: str) -> None:
    print(line, flush=True)
