"""The composition root: a cluster as configured, started, supervised, changed and stopped.

It loads neither vLLM nor torch: on a small machine that would cost as much as an engine's start.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from redis.asyncio import Redis

from joinwise.actors import ray_api
from joinwise.actors.adoption import Adopted, adopt
from joinwise.actors.controller import Controller, Post
from joinwise.actors.draft.vocabulary import check_vocabularies
from joinwise.actors.models import resolve_model
from joinwise.actors.phases import Phases, told
from joinwise.actors.posts import GATEWAY, Posts, demand
from joinwise.cluster.autoscale import Autoscaler
from joinwise.cluster.changes import refusals
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.config_model import PoolConfig
from joinwise.cluster.errors import ConfigError, InternalError, StoreUnavailableError
from joinwise.cluster.reconcile import Wanted
from joinwise.cluster.router.pulse import count_waiting, last_asked
from joinwise.cluster.router.registry import Registry, adapter_id
from joinwise.cluster.store.client import connect, store_errors
from joinwise.cluster.store.embedded import EmbeddedRedis

logger = logging.getLogger(__name__)

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
        self._posts: Posts | None = None
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
        self._ray = ray_api.connect(config, cpus=demand(config)["CPU"], actors=actors)
        if lacking := await asyncio.to_thread(ray_api.missing, demand(config)):
            listed = ", ".join(f"{amount:g} {name}" for name, amount in lacking.items())
            self._say(f"warning: the pools ask for {listed}, which the Ray cluster does not have now; waiting for it")
        self._phases.done("Ray")
        await models
        await self._record_adapters()
        self._phases.done("models")
        adopted = await self._adopt()
        owner = ray_api.myself() if self._keeps else ""
        self._posts = Posts(self.redis_url, local=self._ray.local, with_gateway=self._with_gateway, owner=owner)
        if self._with_gateway and not any(each.account.label.slot == GATEWAY for each in adopted):
            _refuse_taken(config.gateway.host, config.gateway.http_port, "gateway.http_port")
            _refuse_taken(config.gateway.host, config.gateway.grpc_port, "gateway.grpc_port")
        self._scaler.resume(_workers_of(adopted, config.pools))
        self._controller = Controller(self._wanted(config), self._say, config.ray.start_timeout_s)
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
            self.addresses = self._posts.addresses = self._controller.facts(GATEWAY)
            self._say(f"ready: {self.addresses['http']} (HTTP), {self.addresses['grpc']} (gRPC)")
        return self.addresses

    async def _adopt(self) -> list[Adopted]:
        """What another launcher has left at work; nothing in a Ray, or with a Redis, that has ended with it."""
        if not self._keeps:
            return []
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
            while self._with_gateway and not self._controller.facts(GATEWAY):
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
            self._controller.want(self._wanted(config))
            while not await self._controller.look():
                if refused := self._controller.refused[tried:]:
                    raise ConfigError(refused[0])
                await asyncio.sleep(_CHANGE_EVERY_S)
        except BaseException:
            self.config = before
            self._scaler.configure(before.pools, before.served)
            self._controller.want(self._wanted(before))
            raise

    async def stop(self) -> None:
        """Stop the gateway (requests may end), then engines, then Ray and Redis. What is not ready yet is killed."""
        if self._controller is not None:
            await self._controller.stop(first=GATEWAY)
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

    def _wanted(self, config: JoinwiseConfig) -> list[Post]:
        assert self._posts is not None, "it has joined Ray"
        return self._posts.of(config, self._scaler.workers)

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
            self._controller.want(self._wanted(self.config))


def _workers_of(adopted: Sequence[Adopted], pools: Sequence[PoolConfig]) -> dict[str, int]:
    """How many workers each pool has, of those that were taken over; one that may be at zero is there without any."""
    asleep = {pool.name: 0 for pool in pools if adopted and pool.autoscale is not None and not pool.autoscale.least}
    slots = [each.account.label.slot.rpartition("-") for each in adopted if each.account.label.slot != GATEWAY]
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
