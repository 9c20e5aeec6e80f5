"""The only file that calls `ray.*`, but for Serve and chaos: connect, start actors, watch them, stop them.

Nothing hot goes through here: actors answer `start`, `stop` and `failure`; requests, tokens and KV
never touch Ray. Actors belong to a launcher: they end when it does, or wait for the next one (`Keep`).
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
from ray._private import state  # noqa: E402
from ray._private.node import Node  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from joinwise.actors import cpu  # noqa: E402
from joinwise.actors.host import Account, Host, Keep  # noqa: E402
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
        through_client: by Ray's client (`ray://`), which knows nothing of jobs.
    """

    local: bool
    ours: bool
    node: psutil.Process | None = None
    through_client: bool = False

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
    through_client = address.startswith("ray://")
    return Connection(local, ours=True, node=_own_node() if local else None, through_client=through_client)


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


def myself() -> str:
    """This process, to actors that outlive it: the Serve replica, or else the Ray job, that it is."""
    context = ray.get_runtime_context()
    actor = context.get_actor_id()
    return f"actor {actor}" if actor else f"job {context.get_job_id()}"


def lives(owner: str) -> bool:
    """Whether what `myself` has named once still runs, as far as Ray knows."""
    kind, _, identity = owner.partition(" ")
    if kind == "actor":
        return bool(state.actors(identity).get("State") not in (None, "DEAD"))
    return any(job["JobID"] == identity and not job["IsDead"] for job in state.jobs())


class Actor:
    """A running actor, looked after by us.

    Args:
        name: for people.
        handle: Ray's.
        owner: what its host knows us by.
    """

    def __init__(self, name: str, handle: Any, owner: str = "") -> None:
        self.name = name
        self.phases: dict[str, float] = {}
        self._handle = handle
        self._owner = owner
        self._ours = True

    @classmethod
    def launch(
        cls,
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
        keep: Keep | None = None,
    ) -> "Actor":
        """Start the process of an actor.

        Args:
            target: `module:function` that gets the arguments, and returns an object with `start`, `stop`,
                `failure` and `phases`; it is called inside the actor.
            name: the actor's name; in Ray's namespace something random follows it.
            threads: compute threads of the actor's process.
            node: id of the node it must run on; None lets Ray spread actors over those that have room, so that few
                are lost with one.
            keep: that it outlives us, and for how long; None for one that ends with us.
        """
        options: dict[str, Any] = {"lifetime": "detached"} if keep is not None else {}
        where = NodeAffinitySchedulingStrategy(node, soft=False) if node else "SPREAD"
        handle = (
            ray.remote(Host)
            .options(
                # Two launchers of one cluster may overlap for a moment, when Serve replaces one.
                name=f"{name}.{secrets.token_hex(2)}",
                namespace=namespace,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=dict(resources or {}),
                max_restarts=0,
                scheduling_strategy=where,
                **options,
            )
            .remote(name, target, arguments, cpu.environment(threads, log_level), log_level, keep)
        )
        return cls(name, handle, keep.owner if keep is not None else "")

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
        """Why the actor is sick or gone; empty when it is well.

        Raises:
            InternalError: another launcher looks after it now.
        """
        try:
            async with asyncio.timeout(timeout_s):
                said = await self._handle.failure.remote(self._owner)
        except TimeoutError:
            return f"it has not answered for {timeout_s:.0f} s"
        except RayError as error:
            return f"it is gone: {type(error).__name__}"
        if said is None:
            self._ours = False
            raise InternalError(f"another launcher looks after {self.name} now: this one ends, and leaves all as it is")
        return str(said)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of what the actor hosts."""
        return await self._handle.call.remote(method, arguments)

    async def dismiss(self, timeout_s: float) -> None:
        """Tell it that it will be stopped, and need not wait for another launcher should we not come to that."""
        with contextlib.suppress(TimeoutError, RayError):
            async with asyncio.timeout(timeout_s):
                await self._handle.dismiss.remote(self._owner)

    async def stop(self, timeout_s: float, *arguments: Any) -> None:
        """Stop what the actor hosts, then the actor; it is killed when that takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                self._ours = bool(await self._handle.stop.remote(self._owner, *arguments))
        except (TimeoutError, RayError):
            pass
        self.kill()

    def kill(self) -> None:
        """End the actor's process at once; not that of one which another launcher has taken over."""
        if self._ours:
            ray.kill(self._handle, no_restart=True)

    async def take(self, before: str) -> bool:
        """Look after it from now on; False if it is gone, or another launcher was quicker.

        Args:
            before: who has looked after it.
        """
        try:
            self._owner = myself()
            self._ours = bool(await self._handle.take.remote(before, self._owner))
        except RayError:
            self._ours = False
        return self._ours


async def find(namespace: str, timeout_s: float) -> list[tuple[Actor, Account]]:
    """The actors in a namespace that outlive their launchers, and what they say of themselves.

    One that does not answer in time is left out: it has hardly begun to start.
    """

    async def ask(name: str) -> tuple[Actor, Account] | None:
        try:
            handle = ray.get_actor(name, namespace=namespace)
            async with asyncio.timeout(timeout_s):
                account = await handle.account.remote()
        except (ValueError, AttributeError, TimeoutError, RayError):  # gone meanwhile, or none of ours
            return None
        return (Actor(name.rpartition(".")[0], handle), account) if account is not None else None

    named = ray.util.list_named_actors(all_namespaces=True)
    found = await asyncio.gather(*(ask(each["name"]) for each in named if each["namespace"] == namespace))
    return [each for each in found if each is not None]
