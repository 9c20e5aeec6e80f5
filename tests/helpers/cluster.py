"""A real cluster for tests: the launcher in a process of its own, as `joinwise up --detach` starts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MODEL = "smol"
ENGINE = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 200_000_000,
    "block_size": 32,
    "max_num_seqs": 8,
}


@dataclass
class RunningCluster:
    """A cluster that is ready.

    Attributes:
        http: base URL without /v1.
        grpc: host:port of the client's service.
        redis_url: with the password.
        log: the launcher's output, with that of its actors.
        pid: the launcher.
    """

    name: str
    config: dict[str, Any]
    file: Path
    http: str
    grpc: str
    redis_url: str
    log: Path
    pid: int


def cluster_config(name: str, *, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """Two engines, one core each, ports chosen by the system; `changes` replace top-level sections."""
    pools = [{"name": role, "model": MODEL, "role": role, "engine": dict(ENGINE)} for role in ("prefill", "decode")]
    return {
        "cluster": name,
        "models": [
            {"name": MODEL, "model": "smollm2-135m-instruct", "dtype": dtype, "max_model_len": 2048},
        ],
        "pools": pools,
        "router": {
            "split": "always",
            "moves": False,
        },  # what is to be tested must happen, however short the prompt
        "gateway": {"http_port": 0, "grpc_port": 0, "enable_auto_tools": True, "tool_parser": "hermes", "drain_s": 2},
        **changes,
    }


def mixed_config(name: str) -> dict[str, Any]:
    """One engine for both phases: the cheapest cluster there is."""
    return cluster_config(name, pools=[{"name": "all", "model": MODEL, "role": "mixed", "engine": dict(ENGINE)}])


@contextmanager
def running_cluster(config: dict[str, Any], folder: Path, timeout_s: float = 300.0) -> Iterator[RunningCluster]:
    """Start a cluster and stop it afterwards; afterwards no process of it is left."""
    from joinwise.actors import runfile
    from joinwise.actors.launcher import launched

    name = config["cluster"]
    file, log = folder / f"{name}.yaml", folder / f"{name}.log"
    file.write_text(yaml.safe_dump(config))
    with launched(name, file, log, timeout_s) as (launcher, facts):
        addresses = facts["addresses"]
        yield RunningCluster(
            name, config, file, addresses["http"], addresses["grpc"], facts["redis_url"], log, launcher.pid
        )
    assert not runfile.running(name)
