"""Looks at how the parts of a configuration fit together. Pure: no file, socket or variable is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from joinwise.cluster.config_model import JoinwiseConfig, PoolConfig


def problems(config: JoinwiseConfig) -> list[str]:
    """Every way in which `config` cannot work, one sentence each; empty when it can."""
    return [*_models(config), *_pools(config), *_gateway(config), *_redis(config), *_kv(config), *_router(config)]


def _models(config: JoinwiseConfig) -> Iterator[str]:
    yield from _repeated("models", "name", [model.name for model in config.models])
    public = [model.public_name for model in config.models]
    public += [adapter.name for model in config.models for adapter in model.adapters]
    yield from _repeated("models", "served name", public)
    for model in config.models:
        pools = [pool for pool in config.pools if pool.model == model.name and pool.role != "draft"]
        roles = {pool.role for pool in pools if _serves(pool)}
        if not roles:
            yield f"model '{model.name}' has no pool with a replica; add a mixed pool, or a prefill and a decode pool"
        elif roles < {"prefill", "decode"}:
            yield f"model '{model.name}' has only {roles.pop()} pools; add the other role, or make one mixed"
        elif not any(_serves(pool) and pool.role != "prefill" and pool.speculation is None for pool in pools):
            yield (
                f"model '{model.name}' decodes in pools with speculation only, which serve plain requests; "
                "add a decode or mixed pool without, for requests with a seed, penalties or a grammar"
            )


def _serves(pool: PoolConfig) -> bool:
    """Whether a pool has workers, or gets some when it is needed."""
    return pool.replicas > 0 or pool.autoscale is not None


def _pools(config: JoinwiseConfig) -> Iterator[str]:
    yield from _repeated("pools", "name", [pool.name for pool in config.pools])
    known = [model.name for model in config.models]
    for index, pool in enumerate(config.pools):
        if pool.model not in known:
            yield f"pools[{index}] '{pool.name}' names the unknown model '{pool.model}'; known: {', '.join(known)}"
        if pool.device == "cpu" and pool.resources.num_gpus > 0:
            yield f"pools[{index}] '{pool.name}' runs on the CPU but reserves {pool.resources.num_gpus:g} GPUs"
        yield from _autoscale(index, pool)
        yield from _cores(index, pool)
        yield from _speculation(config, index, pool)


def _autoscale(index: int, pool: PoolConfig) -> Iterator[str]:
    bounds = pool.autoscale
    if bounds is None:
        return
    if not bounds.least <= pool.replicas <= bounds.most:
        yield (
            f"pools[{index}] '{pool.name}' begins with {pool.replicas} replicas, "
            f"but autoscale keeps {bounds.least} to {bounds.most}"
        )
    if pool.role == "draft":
        yield f"pools[{index}] '{pool.name}' drafts: nothing is pending on draft actors, so leave out `autoscale`"


def _speculation(config: JoinwiseConfig, index: int, pool: PoolConfig) -> Iterator[str]:
    what = f"pools[{index}] '{pool.name}'"
    if pool.role == "draft":
        if pool.engine or pool.speculation is not None:
            yield f"{what} drafts: it has no engine, so leave out `engine` and `speculation`"
        if pool.device == "gpu" and (pool.draft is None or (pool.draft.model or pool.draft.head) is None):
            yield f"{what} looks drafts up in the prompt: that needs no GPU, so leave out `device`"
        elif pool.device == "gpu" and pool.draft is not None and pool.draft.dtype == "int8":
            yield f"{what}: int8 weights of a draft model are for CPUs; a GPU drafts in bfloat16"
        if not any(each.speculation is not None and each.speculation.draft == pool.name for each in config.pools):
            yield f"{what} drafts for nobody: name it in `speculation` of a decode or mixed pool, or remove it"
    elif pool.draft is not None:
        yield f"{what} is a {pool.role} pool: `draft` belongs to pools with role: draft"
    if pool.speculation is None or pool.role == "draft":
        return
    if pool.role == "prefill":
        yield f"{what} prefills: `speculation` belongs to decode and mixed pools"
    draft = next((each for each in config.pools if each.name == pool.speculation.draft), None)
    if draft is None or draft.role != "draft":
        known = ", ".join(each.name for each in config.pools if each.role == "draft") or "there is none"
        yield f"{what}: speculation.draft '{pool.speculation.draft}' is no draft pool; draft pools: {known}"
    elif draft.model != pool.model:
        yield f"{what} serves '{pool.model}', but its draft pool '{draft.name}' drafts for '{draft.model}'"


def _cores(index: int, pool: PoolConfig) -> Iterator[str]:
    if pool.cores is None:
        return
    if len(set(pool.cores)) != len(pool.cores) or any(core < 0 for core in pool.cores):
        yield f"pools[{index}].cores must be different numbers from 0 on, not {pool.cores}"
    elif len(pool.cores) < pool.replicas:
        yield f"pools[{index}] '{pool.name}' has {pool.replicas} replicas but only {len(pool.cores)} cores to pin"


def _gateway(config: JoinwiseConfig) -> Iterator[str]:
    gateway = config.gateway
    ports = {"gateway.http_port": gateway.http_port, "gateway.grpc_port": gateway.grpc_port}
    if config.redis.url == "embedded":
        ports["redis.port"] = config.redis.port
    for port, uses in Counter(port for port in ports.values() if port).items():
        if uses > 1:
            names = " and ".join(name for name, value in ports.items() if value == port)
            yield f"{names} are both {port}; give each its own port"
    for model in config.models:
        if gateway.enable_auto_tools and not (model.tool_parser or gateway.tool_parser):
            yield f"gateway.enable_auto_tools needs gateway.tool_parser, or one of model '{model.name}'"
    if any(not key.strip() for key in gateway.api_keys):
        yield "gateway.api_keys holds an empty key; remove it"
    if gateway.jwt is not None and (gateway.jwt.jwks_file is None) == (gateway.jwt.jwks_url is None):
        yield "gateway.jwt needs one of jwks_file and jwks_url"


def _redis(config: JoinwiseConfig) -> Iterator[str]:
    tls = config.redis.tls
    if tls is not None and (tls.cert is None) != (tls.key is None):
        yield "redis.tls: a client certificate needs both cert and key"
    if tls is not None and config.redis.url.startswith(("redis://", "unix://")):
        yield "redis.tls is set, but redis.url does not speak TLS: write rediss://"


def _kv(config: JoinwiseConfig) -> Iterator[str]:
    kv = config.kv
    if kv.lossy != "none" and kv.codec != "auto":
        yield (
            f"kv.lossy ({kv.lossy}) is what kv.codec: auto may choose, but kv.codec is {kv.codec}; "
            f"write kv.codec: auto, or kv.codec: {kv.lossy} to code everything so"
        )
    if kv.transport == "nixl":
        if config.tls is not None:
            yield "kv.transport: nixl speaks no TLS, but tls is set: choose another transport"
        if kv.codec != "none":
            yield f"kv.transport: nixl codes nothing, but kv.codec is {kv.codec}: write kv.codec: none"
        if drafted := [pool.name for pool in config.pools if pool.speculation is not None]:
            yield f"kv.transport: nixl hands nothing to engines that speculate, as pool '{drafted[0]}' does"


def _router(config: JoinwiseConfig) -> Iterator[str]:
    router = config.router
    if router.worker_ttl_s < 2 * router.heartbeat_s:
        yield (
            f"router.worker_ttl_s ({router.worker_ttl_s:g}) must be at least twice router.heartbeat_s "
            f"({router.heartbeat_s:g}), or one late heartbeat loses a worker"
        )
    if router.lease_s < 2 * router.heartbeat_s:
        yield f"router.lease_s ({router.lease_s:g}) must be at least twice router.heartbeat_s ({router.heartbeat_s:g})"


def _repeated(section: str, what: str, names: list[str]) -> Iterator[str]:
    for name, uses in Counter(names).items():
        if uses > 1:
            yield f"{section}: the {what} '{name}' is used {uses} times; make each unique"
