"""The composition root: starts a cluster as configured, supervises it, and stops it.

    python -m joinwise.actors.launch -f joinwise.yaml

is what `joinwise up` runs, and what `ray job submit` runs inside a Ray cluster. The process stays
while the cluster runs; SIGINT or SIGTERM ends both. It loads neither vLLM nor torch: on a small
machine that would cost as much as an engine's start.
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from joinwise.actors import logs, ray_api
from joinwise.actors.draft.vocabulary import check_vocabularies
from joinwise.actors.models import resolve_model
from joinwise.actors.runfile import RunFile
from joinwise.actors.spec import WorkerSpec
from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.errors import ConfigError, JoinwiseError, StoreUnavailableError
from joinwise.cluster.router.registry import Registry, adapter_id
from joinwise.cluster.store.client import connect, store_errors
from joinwise.cluster.store.embedded import EmbeddedRedis

if TYPE_CHECKING:
    from joinwise.actors.draft.worker import DraftWorker
    from joinwise.actors.engine import EngineWorker

logger = logging.getLogger(__name__)

#: What the last line begins with when the launcher fails.
FAILED = "joinwise: "
_HEALTH_EVERY_S = 2.0
_HEALTH_TIMEOUT_S = 20.0
_MAX_BACK_OFF_S = 60.0
Say = Callable[[str], None]


def engine_actor(config: JoinwiseConfig, spec: WorkerSpec, redis_url: str) -> "EngineWorker":
    """What an engine actor hosts; it listens where its own node is reached."""
    from joinwise.actors.engine import EngineWorker

    return EngineWorker(config, replace(spec, host=spec.host or ray_api.node_address()), redis_url)


def draft_actor(config: JoinwiseConfig, spec: WorkerSpec, redis_url: str) -> "DraftWorker":
    """What a draft actor hosts; it listens where its own node is reached."""
    from joinwise.actors.draft.worker import DraftWorker

    return DraftWorker(config, replace(spec, host=spec.host or ray_api.node_address()), redis_url)


def gateway_actor(config: JoinwiseConfig, redis_url: str) -> "GatewayHost":
    """What a gateway actor hosts."""
    return GatewayHost(config, redis_url)


class GatewayHost:
    """A gateway as an actor: `start`, `stop`, `failure`."""

    def __init__(self, config: JoinwiseConfig, redis_url: str) -> None:
        from joinwise.actors.gateway.gateway import Gateway

        self._gateway = Gateway(config, redis_url)

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


def _absolute(path: str) -> str:
    """A folder here by its full path, for processes that run elsewhere; a hub id as it is."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.exists() else path


def reachable(address: str) -> str:
    """An address with the node's own in place of "all interfaces"."""
    for anywhere in ("0.0.0.0:", "[::]:", ":::"):
        if anywhere in address:
            return address.replace(anywhere, f"{ray_api.node_address()}:", 1)
    return address


@dataclass
class _Slot:
    """One thing to keep running: the actor that fills it now, and how often it has been filled.

    Attributes:
        make: starts the actor of a generation, counted from 1.
        what: in the launcher's lines.
    """

    make: Callable[[int], ray_api.Actor]
    what: str
    generation: int = 0
    actor: ray_api.Actor | None = None
    facts: dict[str, str] = field(default_factory=dict)
    retry_at: float = 0.0
    starting: asyncio.Task[None] | None = None


class Cluster:
    """A running cluster, seen from its launcher.

    Args:
        config: what to run.
        say: gets one line for every step of the start.
        with_gateway: start a gateway too; Serve brings its own.
    """

    def __init__(self, config: JoinwiseConfig, say: Say = lambda _: None, *, with_gateway: bool = True) -> None:
        self.config = config
        self.redis_url = config.redis.url
        self.addresses: dict[str, str] = {}
        self._say = say
        self._with_gateway = with_gateway
        self._redis: EmbeddedRedis | None = None
        self._slots: list[_Slot] = []
        self._gateway: _Slot | None = None
        self._ray: ray_api.Connection | None = None

    def start_redis(self) -> str:
        """Start the embedded Redis, if that is configured; returns the address of the cluster's Redis.

        Raises:
            StoreStartError: it cannot be started.
        """
        if self.config.redis.url == "embedded" and self._redis is None:
            self._say("starting Redis")
            self._redis = EmbeddedRedis.start(self.config.redis)
            self.redis_url = self._redis.url
        return self.redis_url

    async def start(self) -> dict[str, str]:
        """Start everything; returns the gateway's addresses.

        Raises:
            JoinwiseError: whatever could not be started; what was started has been stopped.
        """
        try:
            return await self._start()
        except BaseException as error:
            await self.stop()
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None

    async def _start(self) -> dict[str, str]:
        config = self.config
        if self._with_gateway:  # known before engines have started for nothing
            _refuse_taken(config.gateway.host, config.gateway.http_port, "gateway.http_port")
            _refuse_taken(config.gateway.host, config.gateway.grpc_port, "gateway.grpc_port")
        self.start_redis()
        await self._reach_redis()
        self._say("starting Ray" if config.ray.address == ray_api.LOCAL else "joining Ray")
        models = asyncio.get_running_loop().run_in_executor(None, self._fetch_models)
        self._ray = ray_api.connect(config, cpus=self._demand()["CPU"])
        if lacking := await asyncio.to_thread(ray_api.missing, self._demand()):
            listed = ", ".join(f"{amount:g} {name}" for name, amount in lacking.items())
            self._say(f"warning: the pools ask for {listed}, which the Ray cluster does not have now; waiting for it")
        await models
        await self._record_adapters()
        self._slots = list(self._workers(self._ray.local))
        if self._with_gateway:
            self._gateway = _Slot(self._gateway_actor, "gateway")
            self._slots.append(self._gateway)
        parts = [(sum(pool.replicas for pool in config.pools if pool.role != "draft"), "engines")]
        parts += [(sum(pool.replicas for pool in config.pools if pool.role == "draft"), "draft actors")]
        listed = ", ".join(f"{count} {what}" for count, what in parts if count)
        self._say(f"starting {listed}{' and the gateway' if self._with_gateway else ''}")
        try:
            async with asyncio.timeout(config.ray.start_timeout_s), asyncio.TaskGroup() as group:
                for slot in self._slots:
                    group.create_task(self._fill(slot))
        except TimeoutError:
            late = ", ".join(slot.actor.name for slot in self._slots if slot.actor is not None and not slot.facts)
            raise ConfigError(
                f"not ready within {config.ray.start_timeout_s:.0f} s (ray.start_timeout_s): {late}; "
                "does the Ray cluster have what the pools' resources ask for?"
            ) from None
        if self._gateway is not None:
            self.addresses = self._gateway.facts
            self._say(f"ready: {self.addresses['http']} (HTTP), {self.addresses['grpc']} (gRPC)")
        return self.addresses

    async def supervise(self, stopped: asyncio.Event) -> None:
        """Replace engines and the gateway when they die or fall sick, with back-off, until `stopped` is set.

        Raises:
            StoreUnavailableError: the embedded Redis has died.
        """
        while not stopped.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_EVERY_S):
                    await stopped.wait()
                    return
            if self._redis is not None and not self._redis.alive:
                raise StoreUnavailableError("the embedded Redis has died, and all leases with it")
            await asyncio.gather(*(self._check(slot) for slot in self._slots))

    async def stop(self) -> None:
        """Stop the gateway (requests may end), then engines, then Ray and Redis. What is not ready yet is killed."""
        for slot in self._slots:
            if slot.starting is not None:
                slot.starting.cancel()
            if slot.actor is not None and not slot.facts:
                slot.actor.kill()
                slot.actor = None
        if self._gateway is not None and self._gateway.actor is not None:
            await self._gateway.actor.stop(self.config.gateway.drain_s + 10)
        engines = [slot.actor for slot in self._slots if slot is not self._gateway and slot.actor is not None]
        patience = self.config.gateway.drain_s
        await asyncio.gather(*(actor.stop(patience + 20, patience) for actor in engines))
        self._slots, self._gateway = [], None
        if self._ray is not None:
            await asyncio.to_thread(self._ray.close)
            self._ray = None
        if self._redis is not None:
            await asyncio.to_thread(self._redis.stop)
            self._redis = None

    # Inside.

    async def _reach_redis(self) -> None:
        client = connect(self.redis_url, self.config.redis)
        try:
            with store_errors("the cluster starts"):
                await client.ping()
        finally:
            await client.aclose()

    def _fetch_models(self) -> None:
        """Convert or download once, visibly, before several processes want it: where the gateway will run."""
        for model in self.config.models if self._with_gateway else ():
            resolve_model(model.model, revision=model.revision, progress=self._say)
        if self._with_gateway:
            check_vocabularies(self.config, self._say)

    async def _record_adapters(self) -> None:
        """Workers load what is recorded before they take requests."""
        adapters = [(model, adapter) for model in self.config.models for adapter in model.adapters]
        if not adapters:
            return
        client = connect(self.redis_url, self.config.redis)
        try:
            registry = Registry(client, self.config.cluster, self.config.router)
            for model, adapter in adapters:
                path = _absolute(adapter.path)
                await registry.add_adapter(model.public_name, adapter.name, path, adapter_id(adapter.name))
        finally:
            await client.aclose()

    def _demand(self) -> dict[str, float]:
        """What all pools ask Ray for."""
        demand = {"CPU": 0.0, "GPU": 0.0}
        for pool in self.config.pools:
            asked = {"CPU": pool.resources.num_cpus, "GPU": pool.resources.num_gpus, **pool.resources.custom}
            for name, amount in asked.items():
                demand[name] = demand.get(name, 0.0) + amount * pool.replicas
        return demand

    def _workers(self, local: bool) -> Iterator[_Slot]:
        """A slot for each engine and draft actor; on this machine each gets its own cores while there are enough."""
        machine = itertools.cycle(sorted(os.sched_getaffinity(0)))
        for pool in self.config.pools:
            own = itertools.cycle(pool.cores) if pool.cores else None
            for index in range(pool.replicas):
                source = own if own is not None else machine if local else None
                cores = tuple(itertools.islice(source, pool.compute_threads)) if source is not None else ()
                host = "127.0.0.1" if local else ""
                spec = WorkerSpec(pool.name, f"{pool.name}-{index}", cores, host)
                yield _Slot(partial(self._worker_actor, spec), "draft actor" if pool.role == "draft" else "engine")

    def _worker_actor(self, spec: WorkerSpec, generation: int) -> ray_api.Actor:
        pool = next(pool for pool in self.config.pools if pool.name == spec.pool)
        spec = replace(spec, worker_id=f"{spec.worker_id}-{generation}")
        return ray_api.Actor(
            f"joinwise.actors.launch:{'draft' if pool.role == 'draft' else 'engine'}_actor",
            self.config,
            spec,
            self.redis_url,
            name=spec.worker_id,
            namespace=ray_api.namespace(self.config),
            num_cpus=pool.resources.num_cpus,
            num_gpus=pool.resources.num_gpus,
            resources=pool.resources.custom,
            threads=pool.compute_threads,
            log_level=self.config.log.level,
        )

    def _gateway_actor(self, generation: int) -> ray_api.Actor:
        """A gateway on the launcher's own node; a later one takes over the ports of the first."""
        gateway = self.config.gateway
        if self.addresses:
            http, grpc = (int(self.addresses[name].rpartition(":")[2]) for name in ("http", "grpc"))
            gateway = gateway.model_copy(update={"http_port": http, "grpc_port": grpc})
        return ray_api.Actor(
            "joinwise.actors.launch:gateway_actor",
            self.config.model_copy(update={"gateway": gateway}),
            self.redis_url,
            name=f"gateway-0-{generation}",
            namespace=ray_api.namespace(self.config),
            num_cpus=0,
            node=ray_api.node_id(),
            log_level=self.config.log.level,
        )

    async def _fill(self, slot: _Slot) -> None:
        slot.generation += 1
        slot.facts = {}
        begin = time.monotonic()
        slot.actor = slot.make(slot.generation)
        slot.facts = await slot.actor.start()
        self._say(f"{slot.what} {slot.actor.name} is ready after {time.monotonic() - begin:.1f} s")

    async def _check(self, slot: _Slot) -> None:
        if slot.starting is not None:
            return
        if slot.actor is not None:
            reason = await slot.actor.failure(_HEALTH_TIMEOUT_S)
            if not reason:
                return
            back_off = min(_MAX_BACK_OFF_S, 2.0 ** min(slot.generation, 10) - 2)
            self._say(f"{slot.what} {slot.actor.name} has failed: {reason}; a new one starts in {back_off:.0f} s")
            slot.actor.kill()
            slot.actor, slot.retry_at = None, time.monotonic() + back_off
        if time.monotonic() >= slot.retry_at:
            slot.starting = asyncio.create_task(self._refill(slot))

    async def _refill(self, slot: _Slot) -> None:
        try:
            await self._fill(slot)
        except Exception as error:
            self._say(f"a new {slot.what} could not start: {error}")
        finally:
            slot.starting = None


def _refuse_taken(host: str, port: int, name: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{name}: cannot listen on {host}:{port}: {error.strerror}; is another cluster running there? "
                "Stop it with `joinwise down`, or set another port (0 picks a free one)"
            ) from None


async def run(config: JoinwiseConfig, say: Say) -> None:
    """Start a cluster and keep it until a signal says otherwise."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    with RunFile.claim(config.cluster) as run_file:
        cluster = Cluster(config, say)
        start = asyncio.create_task(cluster.start())
        stop = asyncio.create_task(stopped.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            say("stopping before the start was over")
            start.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await start
            return
        stop.cancel()
        addresses = await start
        run_file.ready(addresses, cluster.redis_url)
        try:
            await cluster.supervise(stopped)
        finally:
            say("stopping")
            await cluster.stop()
            say("stopped")


def main() -> None:
    """Run from the command line, or as a Ray job; exit 1 with one clear line on failure."""
    parser = argparse.ArgumentParser(prog="python -m joinwise.actors.launch", description=__doc__)
    parser.add_argument("-f", "--file", type=Path, help="joinwise.yaml; the demo's configuration without it")
    arguments = parser.parse_args()
    begin = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f} s] {line}", flush=True)

    try:
        config = load_config(arguments.file)
        logs.setup(config, "info")
        asyncio.run(run(config, say))
    except JoinwiseError as error:
        sys.exit(f"{FAILED}{error}")


if __name__ == "__main__":
    main()
