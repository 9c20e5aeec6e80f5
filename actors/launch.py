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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from redis.asyncio import Redis

from joinwise.actors import logs, ray_api, runfile
from joinwise.actors.adoption import Adopted, adopt
from joinwise.actors.controller import Controller, Post
from joinwise.actors.draft.vocabulary import check_vocabularies
from joinwise.actors.host import Keep, Label
from joinwise.actors.models import resolve_model
from joinwise.actors.phases import Phases, process_began, told
from joinwise.actors.runfile import RunFile
from joinwise.actors.spec import WorkerSpec
from joinwise.cluster.autoscale import Autoscaler
from joinwise.cluster.changes import gateway_build, refusals, worker_build
from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.config_model import PoolConfig
from joinwise.cluster.errors import ConfigError, InternalError, JoinwiseError, StoreUnavailableError
from joinwise.cluster.reconcile import Wanted
from joinwise.cluster.router.pulse import count_waiting, last_asked
from joinwise.cluster.router.registry import Registry, adapter_id
from joinwise.cluster.store.client import connect, store_errors
from joinwise.cluster.store.embedded import EmbeddedRedis

logger = logging.getLogger(__name__)

#: What the last line begins with when the launcher fails.
FAILED = "joinwise: "
_GATEWAY = "gateway"
_HEALTH_EVERY_S = 2.0
_CHANGE_EVERY_S = 0.2
_TOLD_S = 60
Say = Callable[[str], None]


def _absolute(path: str) -> str:
    """A folder here by its full path, for processes that run elsewhere; a hub id as it is."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.exists() else path


class Cluster:
    """A running cluster, seen from its launcher.

    Args:
        config: what to run.
        say: gets one line for every step of the start.
        with_gateway: start a gateway too; Serve brings its own.
        phases: what has gone before, to be told with the rest of the start.
    """

    def __init__(
        self,
        config: JoinwiseConfig,
        say: Say = lambda _: None,
        *,
        with_gateway: bool = True,
        phases: Phases | None = None,
    ) -> None:
        self.config = config
        self.redis_url = config.redis.url
        self.addresses: dict[str, str] = {}
        self._say = say
        self._with_gateway = with_gateway
        self._told: list[str] = []
        self._redis: EmbeddedRedis | None = None
        self._store: Redis | None = None
        self._controller: Controller | None = None
        self._scaler = Autoscaler(config.pools, config.served)
        self._ray: ray_api.Connection | None = None
        self._myself = ""
        self._phases = phases or Phases()

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
        self.start_redis()
        await self._reach_redis()
        self._phases.done("Redis")
        self._say("starting Ray" if config.ray.address == ray_api.LOCAL else "joining Ray")
        models = asyncio.get_running_loop().run_in_executor(None, self._fetch_models)
        actors = sum(pool.replicas for pool in config.pools) + self._with_gateway
        self._ray = ray_api.connect(config, cpus=self._demand()["CPU"], actors=actors)
        if lacking := await asyncio.to_thread(ray_api.missing, self._demand()):
            listed = ", ".join(f"{amount:g} {name}" for name, amount in lacking.items())
            self._say(f"warning: the pools ask for {listed}, which the Ray cluster does not have now; waiting for it")
        self._phases.done("Ray")
        await models
        await self._record_adapters()
        self._phases.done("models")
        adopted = await self._adopt()
        if self._with_gateway and not any(each.account.label.slot == _GATEWAY for each in adopted):
            _refuse_taken(config.gateway.host, config.gateway.http_port, "gateway.http_port")
            _refuse_taken(config.gateway.host, config.gateway.grpc_port, "gateway.grpc_port")
        self._scaler.resume(_workers_of(adopted, config.pools))
        self._controller = Controller(self._posts(config), self._say, config.ray.start_timeout_s)
        for each in adopted:
            label, facts = each.account.label, each.account.facts or {}
            post = Post(Wanted(label.slot, label.build), label.what, _never, label.patience_s, label.stop)
            self._controller.adopt(each.actor, post, label.number, facts)
        try:
            await (self._complete() if adopted else self._fill())
        except TimeoutError:
            raise ConfigError(
                f"not ready within {config.ray.start_timeout_s:.0f} s (ray.start_timeout_s): "
                f"{', '.join(self._controller.late())}; does the Ray cluster have what the pools' resources ask for?"
            ) from None
        self._phases.done("actors")
        self._say(f"started in {self._phases.total:.1f} s: {told(self._phases.seconds)}")
        if self._with_gateway:
            self.addresses = self._controller.facts(_GATEWAY)
            self._say(f"ready: {self.addresses['http']} (HTTP), {self.addresses['grpc']} (gRPC)")
        return self.addresses

    async def _adopt(self) -> list[Adopted]:
        """What another launcher has left at work; nothing in a Ray, or with a Redis, that has ended with it."""
        if not self._keeps:
            return []
        self._myself = ray_api.myself()
        return await adopt(self.config, self.redis_url, self._say, alone=self._with_gateway)

    @property
    def _keeps(self) -> bool:
        """Whether actors outlive this launcher."""
        assert self._ray is not None, "it is connected"
        elsewhere = not (self._ray.local or self._ray.through_client or self._redis is not None)
        return elsewhere and bool(self.config.ray.alone_s)

    async def _fill(self) -> None:
        assert self._controller is not None
        workers = [pool.role for pool in self.config.pools for _ in range(pool.replicas)]
        drafts = workers.count("draft")
        parts = [(len(workers) - drafts, "engines"), (drafts, "draft actors")]
        listed = ", ".join(f"{count} {what}" for count, what in parts if count) or "no engine"
        self._say(f"starting {listed}{' and the gateway' if self._with_gateway else ''}")
        await self._controller.fill()

    async def _complete(self) -> None:
        """What is missing is started while the rest serves: only without a gateway is there something to wait for."""
        assert self._controller is not None
        async with asyncio.timeout(self.config.ray.start_timeout_s):
            await self._controller.look()
            while self._with_gateway and not self._controller.facts(_GATEWAY):
                await asyncio.sleep(_CHANGE_EVERY_S)
                await self._controller.look()

    async def supervise(self, stopped: asyncio.Event) -> None:
        """Keep actors as they are wanted until `stopped` is set: those that die or fall sick are replaced.

        Raises:
            StoreUnavailableError: the embedded Redis has died.
            InternalError: the node of the launcher's own Ray has.
        """
        while not stopped.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_EVERY_S):
                    await stopped.wait()
                    return
            if self._redis is not None and not self._redis.alive:
                raise StoreUnavailableError("the embedded Redis has died, and all leases with it")
            if self._ray is not None and not self._ray.alive:
                raise InternalError("Ray's node has died, and all actors with it")
            assert self._controller is not None, "it has started"
            await self._scale()  # at once carried out: what is to go gets few requests in between
            await self._controller.look()
            await self._tell()

    async def apply(self, config: JoinwiseConfig) -> None:
        """Become another configuration: only what it touches is replaced, one by one, and drained first.

        Raises:
            ConfigError: it cannot; or the first actor that it touches does not start. The cluster goes on as it was.
        """
        assert self._controller is not None, "it has started"
        if found := refusals(self.config, config):
            raise ConfigError("\n".join(found), problems=tuple(found))
        before, tried = self.config, len(self._controller.refused)
        self.config = config
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._fetch_models)
            await self._record_adapters()
            self._scaler.configure(config.pools, config.served)
            self._controller.want(self._posts(config))
            while not await self._controller.look():
                if refused := self._controller.refused[tried:]:
                    raise ConfigError(refused[0])
                await asyncio.sleep(_CHANGE_EVERY_S)
        except BaseException:
            self.config = before
            self._scaler.configure(before.pools, before.served)
            self._controller.want(self._posts(before))
            raise

    async def stop(self) -> None:
        """Stop the gateway (requests may end), then engines, then Ray and Redis. What is not ready yet is killed."""
        if self._controller is not None:
            await self._controller.stop(first=_GATEWAY)
            self._controller = None
        if self._ray is not None:
            await asyncio.to_thread(self._ray.close)
            self._ray = None
        if self._store is not None:
            await self._store.aclose()
            self._store = None
        if self._redis is not None:
            await asyncio.to_thread(self._redis.stop)
            self._redis = None

    # Inside.

    async def _reach_redis(self) -> Redis:
        """The launcher's own client, which has been answered."""
        if self._store is None:
            store = connect(self.redis_url, self.config.redis)
            try:
                with store_errors("the cluster starts"):
                    await store.ping()
            except BaseException:
                await store.aclose()
                raise
            self._store = store
        return self._store

    async def _registry(self) -> Registry:
        return Registry(await self._reach_redis(), self.config.cluster, self.config.router)

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
        registry = await self._registry()
        for model, adapter in adapters:
            path = _absolute(adapter.path)
            await registry.add_adapter(model.public_name, adapter.name, path, adapter_id(adapter.name))

    def _demand(self) -> dict[str, float]:
        """What all pools ask Ray for."""
        demand = {"CPU": 0.0, "GPU": 0.0}
        for pool in self.config.pools:
            asked = {"CPU": pool.resources.num_cpus, "GPU": pool.resources.num_gpus, **pool.resources.custom}
            for name, amount in asked.items():
                demand[name] = demand.get(name, 0.0) + amount * pool.replicas
        return demand

    def _posts(self, config: JoinwiseConfig) -> list[Post]:
        """A slot for each worker, and for the gateway; on this machine workers get cores of their own while there are
        enough."""
        assert self._ray is not None, "it is connected"
        local, patience = self._ray.local, config.gateway.drain_s
        machine = itertools.cycle(sorted(os.sched_getaffinity(0)))
        posts = []
        for pool in config.pools:
            own = itertools.cycle(pool.cores) if pool.cores else None
            # Elsewhere a node may have no room for two, and a fixed port has none.
            build, surge = worker_build(config, pool), local and not pool.ops_port
            what = "draft actor" if pool.role == "draft" else "engine"
            for index in range(self._scaler.workers.get(pool.name, pool.replicas)):
                source = own if own is not None else machine if local else None
                cores = tuple(itertools.islice(source, pool.compute_threads)) if source is not None else ()
                slot = f"{pool.name}-{index}"
                spec = WorkerSpec(pool.name, slot, cores, "127.0.0.1" if local else "")
                make = partial(self._worker_actor, config, spec)
                posts.append(Post(Wanted(slot, build, surge), what, make, patience, (patience,)))
        if self._with_gateway:
            make = partial(self._gateway_actor, config)
            posts.append(Post(Wanted(_GATEWAY, gateway_build(config), surge=False), _GATEWAY, make, patience))
        return posts

    def _keep(self, post: Post, number: int) -> Keep | None:
        if not self._keeps:
            return None
        wanted = post.wanted
        label = Label(wanted.slot, number, wanted.build, post.what, post.patience_s, post.stop, self.redis_url)
        return Keep(label, self._myself, self.config.ray.alone_s)

    def _worker_actor(self, config: JoinwiseConfig, spec: WorkerSpec, post: Post, number: int) -> ray_api.Actor:
        pool = next(pool for pool in config.pools if pool.name == spec.pool)
        spec = replace(spec, worker_id=f"{spec.worker_id}-{number}")
        return ray_api.Actor.launch(
            f"joinwise.actors.hosts:{'draft' if pool.role == 'draft' else 'engine'}_actor",
            config,
            spec,
            self.redis_url,
            name=spec.worker_id,
            namespace=ray_api.namespace(config),
            keep=self._keep(post, number),
            # Our own Ray has no other node to send one to: CPUs are shared out by `cores`.
            num_cpus=0 if self._ray is not None and self._ray.local else pool.resources.num_cpus,
            num_gpus=pool.resources.num_gpus,
            resources=pool.resources.custom,
            threads=pool.compute_threads,
            log_level=config.log.level,
        )

    def _gateway_actor(self, config: JoinwiseConfig, post: Post, number: int) -> ray_api.Actor:
        """A gateway on the launcher's own node; a later one takes over the ports of the first."""
        gateway = config.gateway
        if self.addresses:
            http, grpc = (int(self.addresses[name].rpartition(":")[2]) for name in ("http", "grpc"))
            gateway = gateway.model_copy(update={"http_port": http, "grpc_port": grpc})
        return ray_api.Actor.launch(
            "joinwise.actors.hosts:gateway_actor",
            config.model_copy(update={"gateway": gateway}),
            self.redis_url,
            name=f"gateway-0-{number}",
            namespace=ray_api.namespace(config),
            keep=self._keep(post, number),
            num_cpus=0,
            node=ray_api.node_id(),
            log_level=config.log.level,
        )

    async def _tell(self) -> None:
        """Let `joinwise status` say which slots do not stay filled; without Redis the log still does."""
        assert self._controller is not None
        if (verdicts := self._controller.verdicts()) == self._told and not verdicts:
            return
        try:
            await (await self._registry()).set_troubles(verdicts, _TOLD_S)
            self._told = verdicts
        except StoreUnavailableError:
            logger.warning("nobody can be told: %s", "; ".join(verdicts))

    async def _scale(self) -> None:
        """Let pools with `autoscale` follow their work; while Redis is away they stay as they are."""
        assert self._controller is not None
        if not self._scaler:
            return
        try:
            store, registry, cluster = await self._reach_redis(), await self._registry(), self.config.cluster
            workers = await registry.states()
            waiting, asked = await count_waiting(store, cluster), await last_asked(store, cluster)
            await registry.set_asleep(self._scaler.asleep(workers), _TOLD_S)
        except StoreUnavailableError as error:
            logger.warning("no pool grows or shrinks now: %s", error)
            return
        before = self._scaler.workers
        for name, why in self._scaler.look(workers, waiting, time.monotonic(), asked).items():
            self._say(f"pool {name}: {before[name]} -> {self._scaler.workers[name]} workers, for {why}")
            self._controller.want(self._posts(self.config))


def _workers_of(adopted: Sequence[Adopted], pools: Sequence[PoolConfig]) -> dict[str, int]:
    """How many workers each pool has, of those that were taken over; one that may be at zero is there without any."""
    asleep = {pool.name: 0 for pool in pools if adopted and pool.autoscale is not None and not pool.autoscale.least}
    slots = [each.account.label.slot.rpartition("-") for each in adopted if each.account.label.slot != _GATEWAY]
    return asleep | {pool: max(int(index) for name, _, index in slots if name == pool) + 1 for pool, _, _ in slots}


def _never(post: Post, number: int) -> ray_api.Actor:
    raise AssertionError(f"{post.wanted.slot} is filled: what follows is made by the post that is wanted")


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


class _Changes:
    """Answers `joinwise apply`, one at a time; a signal says that a wish lies beside the run file."""

    def __init__(self, cluster: Cluster, run_file: RunFile, say: Say) -> None:
        self._cluster, self._run_file, self._say = cluster, run_file, say
        self._task: asyncio.Task[None] | None = None

    def asked(self) -> None:
        """The signal's handler; the one who asks has seen that no change is under way."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer())

    async def end(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _answer(self) -> None:
        wish = self._run_file.take_wish()
        if wish is None:
            return
        self._run_file.answer(wish, done=False)
        try:
            self._say(f"changing to {wish.file}")
            await self._cluster.apply(load_config(wish.file))
        except Exception as error:
            self._say(f"the change has failed: {error}; the cluster goes on as it was")
            self._run_file.answer(wish, error=str(error) or repr(error))
            return
        self._say("changed")
        self._run_file.answer(wish)


async def run(config: JoinwiseConfig, say: Say) -> None:
    """Start a cluster and keep it until a signal says otherwise."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    with RunFile.claim(config.cluster) as run_file:
        phases = Phases(process_began())
        phases.done("imports")
        cluster = Cluster(config, say, phases=phases)
        changes = _Changes(cluster, run_file, say)
        loop.add_signal_handler(runfile.CHANGE, changes.asked)
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
            await changes.end()
            say("stopping")
            await cluster.stop()
            say("stopped")


def main() -> None:
    """Run from the command line, or as a Ray job; exit 1 with one clear line on failure."""
    parser = argparse.ArgumentParser(prog="python -m joinwise.actors.launch", description=__doc__)
    parser.add_argument("-f", "--file", type=Path, help="joinwise.yaml; the demo's configuration without it")
    arguments = parser.parse_args()
    begin = process_began()

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
