"""What a change of configuration touches: digests of what processes are made of, and what cannot be changed at all."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from joinwise.cluster.config_model import JoinwiseConfig, ModelConfig, PoolConfig

# What workers of one model must have alike while any of them lives, since any two may share a request.
_ALIKE = {"model": True, "revision": True, "tokenizer": True, "dtype": True}
# What only the launcher looks at.
_PLACING = {"replicas", "autoscale", "resources", "threads", "cores"}


def worker_build(config: JoinwiseConfig, pool: PoolConfig) -> str:
    """Digest of all that a worker of a pool is made of; workers whose digest changes are replaced."""
    model = config.model_named(pool.model)
    return _digest(
        cluster=config.cluster,
        pool=pool.model_dump(exclude={"replicas", "autoscale"}),
        # Adapters are loaded by running workers, and names of parsers and templates are the gateway's.
        model=model.model_dump(include={"name", "served_name", "max_model_len", *_ALIKE}),
        lora=bool(model.adapters),
        redis=config.redis.model_dump(),
        kv=config.kv.model_dump(),
        router=config.router.model_dump(exclude={"tenants"}),
        drain_s=config.gateway.drain_s,
        log=config.log.model_dump(),
        tls=config.tls and config.tls.model_dump(),
        tracing=config.tracing and config.tracing.model_dump(),
    )


def gateway_build(config: JoinwiseConfig) -> str:
    """The same of a gateway. Of the pools it knows names, roles, the engine arguments of those that decode, and for how
    long requests wait for those at zero."""
    pools = [
        pool.model_dump(exclude={*_PLACING, "ops_port", "engine", "draft", "speculation"}) for pool in config.pools
    ]
    decoding = [config.engine_arguments(pool) for pool in config.pools if pool.role in ("decode", "mixed")]
    rest = config.model_dump(exclude={"pools", "ray"})
    return _digest(pools=pools, decoding=decoding, wakes=config.wakes, **rest)


def refusals(old: JoinwiseConfig, new: JoinwiseConfig) -> list[str]:
    """Why a running cluster cannot become the new configuration, a sentence each; empty when it can."""
    found = [
        f"{section}: a running cluster keeps its own; stop it and start it anew to change that"
        for section, mine, theirs in (
            ("cluster", old.cluster, new.cluster),
            ("ray", old.ray, new.ray),
            ("redis", old.redis, new.redis),
            ("tls", old.tls, new.tls),
            ("gateway.http_port", old.gateway.http_port, new.gateway.http_port),
            ("gateway.grpc_port", old.gateway.grpc_port, new.gateway.grpc_port),
            ("gateway.host", old.gateway.host, new.gateway.host),
        )
        if mine != theirs
    ]
    before = {model.name: model for model in old.models}
    for model in new.models:
        if model.name in before and _alike(model) != _alike(before[model.name]):
            found.append(
                f"model {model.name!r}: its workers share requests, so its files and dtype stay while they run; "
                "serve the new ones under another name, or stop the cluster first"
            )
    return found


def _alike(model: ModelConfig) -> dict[str, Any]:
    return {**model.model_dump(include=set(_ALIKE)), "public_name": model.public_name}


def _digest(**parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
