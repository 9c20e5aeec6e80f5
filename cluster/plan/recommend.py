"""From a cluster that was found to a configuration, and to what it bears when machines fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from joinwise.cluster.config_model import JoinwiseConfig
from joinwise.cluster.plan.search import Candidate, Search
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.report import missed

#: Figures of the trace on pools, at a rate over the trace's, while so many machines of the pool with that role die.
Failing = Callable[[Sequence[PoolSpec], float, str, int], Mapping[str, float]]
_DEVICES = 8
_MODEL = "planned"


def configuration(candidate: Candidate, llm: str) -> str:
    """A `joinwise.yaml` for a cluster, as far as a plan knows it: the model's path is to be filled in.

    Raises:
        pydantic.ValidationError: never, unless the configuration's tree has changed.
    """
    pools: list[dict[str, Any]] = [
        {
            "name": name,
            "model": _MODEL,
            "role": pool.home,
            "replicas": pool.size,
            "device": "gpu",
            "resources": {"num_cpus": 1, "num_gpus": _DEVICES, "custom": {pool.kind: 1}},
            "engine": {"tensor_parallel_size": _DEVICES},
        }
        for name, pool in zip(_names(candidate), candidate.pools, strict=True)
    ]
    tree = {"models": [{"name": _MODEL, "model": llm}], "pools": pools}
    JoinwiseConfig.model_validate(tree)
    return yaml.safe_dump(tree, sort_keys=False)


def helm_values(candidate: Candidate, llm: str) -> str:
    """Values of the Helm chart for a cluster: the model's path is to be filled in, and nodes to be labelled.

    Nodes of a kind need the label `joinwise.io/kind`, since no two clusters name their machines alike.
    """
    pools = [
        {
            "name": name,
            "model": _MODEL,
            "role": pool.home,
            "replicas": pool.size,
            "engine": {"tensor_parallel_size": _DEVICES},
            "resources": {
                "requests": {"cpu": "32", "memory": "256Gi"},
                "limits": {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": _DEVICES},
            },
            "sharedMemory": "64Gi",
            "nodeSelector": {"joinwise.io/kind": pool.kind},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        }
        for name, pool in zip(_names(candidate), candidate.pools, strict=True)
    ]
    return yaml.safe_dump({"config": {"models": [{"name": _MODEL, "model": llm}]}, "pools": pools}, sort_keys=False)


def _names(candidate: Candidate) -> list[str]:
    """Names of the pools: those that Kubernetes takes."""
    return [re.sub(r"[^a-z0-9]+", "-", f"{pool.home}-{pool.kind}").strip("-") for pool in candidate.pools]


def headroom(search: Search, candidate: Candidate, failing: Failing, most: int = 3) -> int:
    """Machines that any one pool may lose while the objectives are still met, up to `most`.

    Args:
        failing: figures of the trace on pools at a rate while so many machines of one die.
    """
    for lost in range(1, most + 1):
        for pool in candidate.pools:
            if pool.size <= lost:
                return lost - 1
            figures = failing(candidate.pools, candidate.rate, pool.home, lost)
            if figures["refused"] or missed(figures, search.slos):
                return lost - 1
    return most
