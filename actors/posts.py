"""What actors a configuration asks for: a post for each worker, and for the gateway, with how its actor is started."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from joinwise.actors import ray_api
from joinwise.actors.controller import Post
from joinwise.actors.host import Keep, Label
from joinwise.actors.spec import WorkerSpec
from joinwise.cluster.changes import gateway_build, worker_build
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.reconcile import Wanted

#: The gateway's slot.
GATEWAY = "gateway"


def demand(config: JoinwiseConfig) -> dict[str, float]:
    """What all pools ask Ray for."""
    found = {"CPU": 0.0, "GPU": 0.0}
    for pool in config.pools:
        asked = {"CPU": pool.resources.num_cpus, "GPU": pool.resources.num_gpus, **pool.resources.custom}
        for name, amount in asked.items():
            found[name] = found.get(name, 0.0) + amount * pool.replicas
    return found


class Posts:
    """Makes the posts of one cluster.

    Args:
        redis_url: of its Redis.
        local: Ray runs on this machine alone.
        with_gateway: there is a post for a gateway too.
        owner: us, to actors that outlive us; "" for those that end with us.

    Attributes:
        addresses: of the first gateway, once it is there: a later one takes over its ports.
    """

    def __init__(self, redis_url: str, *, local: bool, with_gateway: bool, owner: str) -> None:
        self._redis_url, self._local, self._with_gateway, self._owner = redis_url, local, with_gateway, owner
        self.addresses: Mapping[str, str] = {}

    def of(self, config: JoinwiseConfig, workers: Mapping[str, int]) -> list[Post]:
        """All posts of a configuration.

        On this machine workers get cores of their own while there are enough.

        Args:
            config: the configuration.
            workers: how many each pool should have; those that are not named have their `replicas`.
        """
        local, patience = self._local, config.gateway.drain_s
        machine = itertools.cycle(sorted(os.sched_getaffinity(0)))
        posts = []
        for pool in config.pools:
            own = itertools.cycle(pool.cores) if pool.cores else None
            # Elsewhere a node may have no room for two, and a fixed port has none.
            build, surge = worker_build(config, pool), local and not pool.ops_port
            what = "draft actor" if pool.role == "draft" else "engine"
            for index in range(workers.get(pool.name, pool.replicas)):
                source = own if own is not None else machine if local else None
                cores = tuple(itertools.islice(source, pool.compute_threads)) if source is not None else ()
                slot = f"{pool.name}-{index}"
                spec = WorkerSpec(pool.name, slot, cores, "127.0.0.1" if local else "")
                make = partial(self._worker_actor, config, spec)
                posts.append(Post(Wanted(slot, build, surge), what, make, patience, (patience,)))
        if self._with_gateway:
            make = partial(self._gateway_actor, config)
            posts.append(Post(Wanted(GATEWAY, gateway_build(config), surge=False), GATEWAY, make, patience))
        return posts

    def _keep(self, config: JoinwiseConfig, post: Post, number: int) -> Keep | None:
        if not self._owner:
            return None
        wanted = post.wanted
        label = Label(wanted.slot, number, wanted.build, post.what, post.patience_s, post.stop, self._redis_url)
        return Keep(label, self._owner, config.ray.alone_s)

    def _worker_actor(self, config: JoinwiseConfig, spec: WorkerSpec, post: Post, number: int) -> ray_api.Actor:
        pool = next(pool for pool in config.pools if pool.name == spec.pool)
        spec = replace(spec, worker_id=f"{spec.worker_id}-{number}")
        return ray_api.Actor.launch(
            f"joinwise.actors.hosts:{'draft' if pool.role == 'draft' else 'engine'}_actor",
            config,
            spec,
            self._redis_url,
            name=spec.worker_id,
            namespace=ray_api.namespace(config),
            keep=self._keep(config, post, number),
            # Our own Ray has no other node to send one to: CPUs are shared out by `cores`.
            num_cpus=0 if self._local else pool.resources.num_cpus,
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
            self._redis_url,
            name=f"gateway-0-{number}",
            namespace=ray_api.namespace(config),
            keep=self._keep(config, post, number),
            num_cpus=0,
            node=ray_api.node_id(),
            log_level=config.log.level,
        )
