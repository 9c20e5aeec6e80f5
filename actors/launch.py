"""The composition root: starts a cluster as configured, supervises it, and stops it.

    python -m joinwise.actors.launch -f joinwise.yaml

is what `joinwise up` runs, and what `ray job submit` runs inside a Ray cluster. The process stays
while the cluster runs; SIGINT or SIGTERM ends both.
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from joinwise.actors import ray_api
from joinwise.actors.engine import EngineWorker, WorkerSpec
from joinwise.actors.runfile import RunFile
from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.errors import ConfigError, JoinwiseError
from joinwise.cluster.store.embedded import EmbeddedRedis

logger = logging.getLogger(__name__)

_HEALTH_EVERY_S = 2.0
_HEALTH_TIMEOUT_S = 20.0
_MAX_BACK_OFF_S = 60.0
Say = Callable[[str], None]


def engine_actor(config: JoinwiseConfig, spec: WorkerSpec, redis_url: str) -> EngineWorker:
    """What an engine actor hosts."""
    return EngineWorker(config, spec, redis_url)


def gateway_actor(config: JoinwiseConfig, redis_url: str) -> "GatewayHost":
    """What a gateway actor hosts."""
    return GatewayHost(config, redis_url)


class GatewayHost:
    """A gateway as an actor: `start`, `stop`, `failure`."""

    def __init__(self, config: JoinwiseConfig, redis_url: str) -> None:
        from joinwise.actors.gateway.gateway import Gateway

        self._gateway = Gateway(config, redis_url)

    async def start(self) -> dict[str, str]:
        """Open the listeners; returns their addresses."""
        addresses = await self._gateway.start()
        return {"http": addresses.http, "grpc": addresses.grpc}

    async def stop(self) -> None:
        """See `Gateway.stop`."""
        await self._gateway.stop()

    async def running(self) -> list[str]:
        """Requests that have not ended."""
        return self._gateway.running()

    def failure(self) -> str:
        """A gateway that answers is well."""
        return ""


@dataclass
class _Slot:
    """One replica of a pool: the worker that fills it now, and how often it has failed."""

    pool: str
    cores: tuple[int, ...]
    generation: int = 0
    actor: ray_api.Actor | None = None
    facts: dict[str, object] = field(default_factory=dict)
    retry_at: float = 0.0
    starting: asyncio.Task[None] | None = None


class Cluster:
    """A running cluster, seen from its launcher.

    Args:
        config: what to run.
        say: gets one line for every step of the start.
    """

    def __init__(self, config: JoinwiseConfig, say: Say = lambda _: None) -> None:
        self.config = config
        self._say = say
        self._redis: EmbeddedRedis | None = None
        self.redis_url = config.redis.url
        self.slots: list[_Slot] = []
        self.gateway: ray_api.Actor | None = None
        self.addresses: dict[str, str] = {}
        self._host = "127.0.0.1"

    async def start(self) -> dict[str, str]:
        """Start everything; returns the gateway's addresses.

        Raises:
            JoinwiseError: whatever could not be started; what was started has been stopped.
        """
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> dict[str, str]:
        config = self.config
        if config.redis.url == "embedded":
            self._say("starting Redis")
            self._redis = EmbeddedRedis.start(config.redis)  # on this thread: the server dies with it
            self.redis_url = self._redis.url
        self._say("starting Ray")
        cpus = sum(pool.resources.num_cpus * pool.replicas for pool in config.pools)
        address = await asyncio.to_thread(ray_api.connect, config, cpus=cpus)
        local = address == ray_api.LOCAL
        self._host = "127.0.0.1" if local else ray_api.node_address()
        self.slots = list(_slots(config, local))
        self._say(f"starting {len(self.slots)} engines and the gateway")
        self.gateway = ray_api.Actor(
            "joinwise.actors.launch:gateway_actor",
            config,
            self.redis_url,
            name="gateway-0",
            num_cpus=0,
            log_level=config.log.level,
        )
        async with asyncio.timeout(config.ray.start_timeout_s), asyncio.TaskGroup() as group:
            gateway = group.create_task(self.gateway.start())
            for slot in self.slots:
                group.create_task(self._fill(slot))
        self.addresses = gateway.result()
        self._say(f"ready: {self.addresses['http']} (HTTP), {self.addresses['grpc']} (gRPC)")
        return self.addresses

    async def supervise(self, stopped: asyncio.Event) -> None:
        """Replace workers that die or fall sick, with back-off, until `stopped` is set.

        Raises:
            ConfigError: the gateway has died.
        """
        while not stopped.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_EVERY_S):
                    await stopped.wait()
                    return
            assert self.gateway is not None
            if reason := await self.gateway.failure(_HEALTH_TIMEOUT_S):
                raise ConfigError(f"the gateway has failed: {reason}")
            await asyncio.gather(*(self._check(slot) for slot in self.slots))

    async def stop(self) -> None:
        """Stop the gateway (requests may end), then engines, then Ray and Redis."""
        if self.gateway is not None:
            await self.gateway.stop(self.config.gateway.drain_s + 10)
        for slot in self.slots:
            if slot.starting is not None:
                slot.starting.cancel()
        await asyncio.gather(*(slot.actor.stop(20) for slot in self.slots if slot.actor is not None))
        self.slots, self.gateway = [], None
        await asyncio.to_thread(ray_api.disconnect)
        if self._redis is not None:
            await asyncio.to_thread(self._redis.stop)
            self._redis = None

    async def _fill(self, slot: _Slot) -> None:
        """Start a worker in a slot."""
        config = self.config
        pool = next(pool for pool in config.pools if pool.name == slot.pool)
        index = self.slots.index(slot)
        slot.generation += 1
        worker_id = f"{pool.name}-{index}-{slot.generation}"
        spec = WorkerSpec(pool=pool.name, worker_id=worker_id, cores=slot.cores, host=self._host)
        slot.actor = ray_api.Actor(
            "joinwise.actors.launch:engine_actor",
            config,
            spec,
            self.redis_url,
            name=worker_id,
            num_cpus=pool.resources.num_cpus,
            num_gpus=pool.resources.num_gpus,
            resources=pool.resources.custom,
            threads=pool.compute_threads,
            log_level=config.log.level,
        )
        slot.facts = await slot.actor.start()
        self._say(f"engine {worker_id} is ready ({pool.role})")

    async def _check(self, slot: _Slot) -> None:
        if slot.starting is not None:
            return
        if slot.actor is not None:
            reason = await slot.actor.failure(_HEALTH_TIMEOUT_S)
            if not reason:
                return
            back_off = min(_MAX_BACK_OFF_S, 2.0 ** min(slot.generation, 10) - 2)
            self._say(f"engine {slot.actor.name} has failed: {reason}; a new one starts in {back_off:.0f} s")
            slot.actor.kill()
            slot.actor, slot.retry_at = None, time.monotonic() + back_off
        if time.monotonic() >= slot.retry_at:
            slot.starting = asyncio.create_task(self._refill(slot))

    async def _refill(self, slot: _Slot) -> None:
        try:
            await self._fill(slot)
        except Exception as error:
            self._say(f"an engine of pool {slot.pool!r} could not start: {error}")
        finally:
            slot.starting = None


def _slots(config: JoinwiseConfig, local: bool) -> Iterator[_Slot]:
    """One slot a replica; on this machine each gets its own cores while there are enough."""
    machine = itertools.cycle(sorted(os.sched_getaffinity(0)))
    for pool in config.pools:
        own = itertools.cycle(pool.cores) if pool.cores else None
        for _ in range(pool.replicas):
            source = own if own is not None else machine if local else None
            cores = tuple(itertools.islice(source, pool.compute_threads)) if source is not None else ()
            yield _Slot(pool.name, cores)


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


def main() -> None:
    """Run from the command line, or as a Ray job; exit 1 with one clear line on failure."""
    parser = argparse.ArgumentParser(prog="python -m joinwise.actors.launch", description=__doc__)
    parser.add_argument("-f", "--file", type=Path, help="joinwise.yaml; the demo's configuration without it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    begin = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f} s] {line}", flush=True)

    try:
        asyncio.run(run(load_config(arguments.file), say))
    except JoinwiseError as error:
        sys.exit(f"joinwise: {error}")
    except BaseExceptionGroup as group:
        sys.exit(f"joinwise: {_first(group)}")


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


if __name__ == "__main__":
    main()
