"""The only file that calls `ray.*`: connect, start actors, watch them, stop them.

Nothing hot goes through here: actors answer `start`, `stop` and `failure`; requests, tokens and KV
never touch Ray. Actors belong to the launcher: they end when it does, whatever ends it.
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from joinwise.actors import cpu
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.errors import ConfigError, InternalError, JoinwiseError

LOCAL = "local"


def connect(config: JoinwiseConfig, *, cpus: float) -> str:
    """Join the configured Ray cluster, or start one on this machine.

    Inside a Ray job the job's own cluster is taken in place of `local`.

    Args:
        config: the cluster's configuration.
        cpus: logical CPUs that a local Ray must offer, however few the machine has.

    Returns:
        `local`, or the address that was joined.

    Raises:
        ConfigError: no Ray answers at the address.
    """
    address = config.ray.address
    if address == LOCAL and os.environ.get("RAY_ADDRESS"):
        address = "auto"
    options: dict[str, Any] = {
        "namespace": config.ray.namespace or f"joinwise-{config.cluster}",
        "log_to_driver": True,
        "logging_level": "warning",
        "configure_logging": False,
    }
    if address == LOCAL:
        options |= {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise ConfigError(f"no Ray cluster at {address!r}: {error}") from error
    return address


def disconnect() -> None:
    """Leave the Ray cluster; one that `connect` started ends."""
    ray.shutdown()


def node_address() -> str:
    """Address of this node as other nodes reach it."""
    return str(ray.util.get_node_ip_address())


class Actor:
    """A running actor.

    Args:
        target: `module:function` that gets the arguments, and returns an object with `start`, `stop`
            and `failure`; it is called inside the actor.
        name: the actor's name in the cluster.
    """

    def __init__(
        self,
        target: str,
        *arguments: Any,
        name: str,
        num_cpus: float,
        num_gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
        threads: int = 1,
        log_level: str = "info",
    ) -> None:
        environment = cpu.environment(threads) | {
            "VLLM_LOGGING_LEVEL": "DEBUG" if log_level == "debug" else "WARNING",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.name = name
        self._handle = (
            ray.remote(_Host)
            .options(
                name=name,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=dict(resources or {}),
                max_restarts=0,
                runtime_env={"env_vars": environment},
            )
            .remote(target, arguments, log_level)
        )

    async def start(self) -> Any:
        """Start what the actor hosts; returns what it says."""
        try:
            return await self._handle.start.remote()
        except RayTaskError as error:
            if isinstance(error.cause, JoinwiseError):
                raise error.cause from None
            raise InternalError(f"{self.name} could not start: {error.cause!r}; its log has the traceback") from error
        except RayError as error:
            raise InternalError(f"{self.name} died while it started: {error}") from error

    async def failure(self, timeout_s: float) -> str:
        """Why the actor is sick or gone; empty when it is well."""
        try:
            async with asyncio.timeout(timeout_s):
                return str(await self._handle.failure.remote())
        except TimeoutError:
            return f"it has not answered for {timeout_s:.0f} s"
        except RayError as error:
            return f"it is gone: {type(error).__name__}"

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of what the actor hosts."""
        return await self._handle.call.remote(method, arguments)

    async def stop(self, timeout_s: float, *arguments: Any) -> None:
        """Stop what the actor hosts, then the actor; it is killed when that takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._handle.stop.remote(*arguments)
        except (TimeoutError, RayError):
            pass
        self.kill()

    def kill(self) -> None:
        """End the actor's process at once."""
        ray.kill(self._handle, no_restart=True)


class _Host:
    """Runs inside the actor's process, on its event loop."""

    def __init__(self, target: str, arguments: tuple[Any, ...], log_level: str) -> None:
        self._log_level = log_level
        self._target = target
        self._arguments = arguments
        self._hosted: Any = None

    async def start(self) -> Any:
        import importlib
        import logging

        logging.basicConfig(level=self._log_level.upper(), format="%(name)s: %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        module, _, function = self._target.partition(":")
        self._hosted = getattr(importlib.import_module(module), function)(*self._arguments)
        return await self._hosted.start()

    async def stop(self, *arguments: Any) -> None:
        if self._hosted is not None:
            await self._hosted.stop(*arguments)

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return await getattr(self._hosted, method)(*arguments)

    async def failure(self) -> str:
        return str(self._hosted.failure()) if self._hosted is not None else "it has not started"
