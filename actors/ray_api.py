"""The only file that calls `ray.*`: connect, start actors, watch them, stop them.

Nothing hot goes through here: actors answer `start`, `stop` and `failure`; requests, tokens and KV
never touch Ray. Actors belong to the launcher: they end when it does, whatever ends it.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Ray reads these when it is imported. An actor's lines reach the log as they are: its name in front, none left out,
# no colours. Nobody is told that we run. Engines are what a machine is there for: they are not run at niceness 15.
for _name, _value in {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}.items():
    os.environ.setdefault(_name, _value)

import psutil  # noqa: E402
import ray  # noqa: E402
from ray._private.node import Node  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from joinwise.actors import cpu  # noqa: E402
from joinwise.actors.phases import Phases  # noqa: E402
from joinwise.cluster.config import JoinwiseConfig  # noqa: E402
from joinwise.cluster.errors import ConfigError, InternalError, JoinwiseError  # noqa: E402

LOCAL = "local"
_OBJECT_STORE_BYTES = 100 << 20  # nothing goes through it


@dataclass(frozen=True)
class Connection:
    """A Ray cluster that this process takes part in.

    Attributes:
        local: Ray runs on this machine alone and ends with us.
        ours: we have joined it, and leave it in `close`.
        node: process of the node that we have started; None in somebody else's Ray.
    """

    local: bool
    ours: bool
    node: psutil.Process | None = None

    @property
    def alive(self) -> bool:
        """Whether that node still runs: without it no actor does, and none will, however long one waits for it."""
        try:
            return self.node is None or self.node.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def close(self) -> None:
        """Leave the Ray cluster; a local one ends."""
        if self.ours:
            ray.shutdown()


def connect(config: JoinwiseConfig, *, cpus: float, actors: int) -> Connection:
    """Join the configured Ray cluster, or start one on this machine. To be called on the main thread; takes seconds.

    Inside a Ray job the job's own cluster is taken in place of `local`; a process that Ray runs already, such as a
    Serve replica, stays where it is.

    Args:
        config: the cluster's configuration.
        cpus: logical CPUs that a local Ray must offer, however few the machine has.
        actors: that will be started; a local Ray starts their processes ahead.

    Raises:
        ConfigError: no Ray answers at the address.
    """
    if ray.is_initialized():
        return Connection(local=False, ours=False)
    address = config.ray.address
    if address == LOCAL and os.environ.get("RAY_ADDRESS"):
        address = "auto"
    options: dict[str, Any] = {
        "namespace": namespace(config),
        "log_to_driver": True,
        "logging_level": "warning",
        "configure_logging": False,
    }
    if address == LOCAL:
        options |= {
            "num_cpus": max(cpus, actors),  # a process is started ahead for each, needed or not
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        with _own_signals(), _nothing_beside():
            ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(f"no Ray cluster at {address!r}: {error}") from error
    local = address == LOCAL
    return Connection(local=local, ours=True, node=_own_node() if local else None)


def _own_node() -> psutil.Process | None:
    return next((each for each in psutil.Process().children() if each.name() == "raylet"), None)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Put our signal handlers back: Ray's end a process three seconds after SIGTERM, whatever it still has to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _nothing_beside() -> Iterator[None]:
    """Start a Ray of our own without what serves nobody there: two processes, one of which is waited for.

    With `include_dashboard=False` the dashboard's process still starts, for reports of usage, which are off; and an
    autoscaler, which has no machines to start. No option leaves them out. Joining a Ray starts neither.
    """
    dashboard, monitor = Node.start_api_server, Node.start_monitor
    Node.start_api_server = lambda node, **_: setattr(node, "_webui_url", "")
    Node.start_monitor = lambda node: None
    try:
        yield
    finally:
        Node.start_api_server, Node.start_monitor = dashboard, monitor


def namespace(config: JoinwiseConfig) -> str:
    """Ray namespace of a cluster's actors."""
    return config.ray.namespace or f"joinwise-{config.cluster}"


def node_address() -> str:
    """Address of this node as other nodes reach it."""
    return str(ray.util.get_node_ip_address())


def node_id() -> str:
    """This node, for `Actor`'s `node`."""
    return str(ray.get_runtime_context().get_node_id())


def missing(demand: Mapping[str, float]) -> dict[str, float]:
    """What the Ray cluster's nodes together lack for a demand (an autoscaler may still bring it)."""
    offered = ray.cluster_resources()
    return {name: amount for name, amount in demand.items() if amount > offered.get(name, 0.0)}


class Actor:
    """A running actor.

    Args:
        target: `module:function` that gets the arguments, and returns an object with `start`, `stop`,
            `failure` and `phases`; it is called inside the actor.
        name: the actor's name; in Ray's namespace something random follows it.
        threads: compute threads of the actor's process.
        node: id of the node it must run on; None leaves that to Ray.
    """

    def __init__(
        self,
        target: str,
        *arguments: Any,
        name: str,
        namespace: str,
        num_cpus: float,
        num_gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
        threads: int = 1,
        log_level: str = "info",
        node: str | None = None,
    ) -> None:
        placed = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)} if node else {}
        self.name = name
        self.phases: dict[str, float] = {}
        self._handle = (
            ray.remote(_Host)
            .options(
                # Two launchers of one cluster may overlap for a moment, when Serve replaces one.
                name=f"{name}.{secrets.token_hex(2)}",
                namespace=namespace,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=dict(resources or {}),
                max_restarts=0,
                **placed,
            )
            .remote(name, target, arguments, cpu.environment(threads, log_level), log_level)
        )

    async def start(self) -> Any:
        """Start what the actor hosts; returns what it says. `phases` has the seconds since, by what they went to."""
        phases = Phases()
        try:
            facts, inside = await self._handle.start.remote()
        except RayTaskError as error:
            if isinstance(error.cause, JoinwiseError):
                raise error.cause from None
            raise InternalError(f"{self.name} could not start: {error.cause!r}; its log has the traceback") from error
        except RayError as error:
            raise InternalError(f"{self.name} died while it started: {error}") from error
        phases.done("process")  # all of it, less what has been measured inside: two machines' clocks never meet
        self.phases = {"process": phases.total - sum(inside.values()), **inside}
        return facts

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
    """Runs inside the actor's process, on its event loop.

    The environment is set here and not as Ray's runtime environment, so that a worker process that Ray has started
    ahead can be used; nothing that reads it (torch, OpenMP, vLLM) is imported before `start`.
    """

    def __init__(
        self, name: str, target: str, arguments: tuple[Any, ...], environment: dict[str, str], log_level: str
    ) -> None:
        os.environ.update(environment)
        self._name = name
        self._log_level = log_level
        self._target = target
        self._arguments = arguments
        self._hosted: Any = None

    def __repr__(self) -> str:
        return self._name  # in front of each of its lines in the log

    async def start(self) -> tuple[Any, dict[str, float]]:
        import gc
        import importlib
        import logging

        from joinwise.actors import logs

        for config in self._arguments:
            if isinstance(config, JoinwiseConfig):
                logs.setup(config, self._log_level)
        module, _, function = self._target.partition(":")
        phases = Phases()
        # A million objects come, and stay. Looking through them again and again took a quarter of the imports' time.
        gc.disable()
        try:
            self._hosted = getattr(importlib.import_module(module), function)(*self._arguments)
            phases.done("imports")
            facts = await self._hosted.start()
        except JoinwiseError:
            raise
        except Exception:
            logging.getLogger(__name__).exception("%s could not start", self._name)
            raise
        finally:
            gc.enable()
        gc.freeze()
        return facts, phases.seconds | self._hosted.phases.seconds

    async def stop(self, *arguments: Any) -> None:
        if self._hosted is not None:
            await self._hosted.stop(*arguments)

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return await getattr(self._hosted, method)(*arguments)

    async def failure(self) -> str:
        return str(self._hosted.failure()) if self._hosted is not None else "it has not started"
