"""From a cluster that was found to a configuration, and to what it bears when machines fail."""

from __future__ import annotations

from typing import Any

import yaml

from joinwise.cluster.config_model import JoinwiseConfig
from joinwise.cluster.plan.search import Candidate, Search

_DEVICES = 8


def configuration(candidate: Candidate, llm: str) -> str:
    """A `joinwise.yaml` for a cluster, as far as a plan knows it: the model's path is to be filled in.

    Raises:
        pydantic.ValidationError: never, unless the configuration's tree has changed.
    """
    pools: list[dict[str, Any]] = [
        {
            "name": f"{pool.home}-{pool.kind}",
            "model": "planned",
            "role": pool.home,
            "replicas": pool.size,
            "device": "gpu",
            "resources": {"num_cpus": 1, "num_gpus": _DEVICES, "custom": {pool.kind: 1}},
            "engine": {"tensor_parallel_size": _DEVICES},
        }
        for pool in candidate.pools
    ]
    tree = {"models": [{"name": "planned", "model": llm}], "pools": pools}
    JoinwiseConfig.model_validate(tree)
    return yaml.safe_dump(tree, sort_keys=False)


def headroom(search: Search, candidate: Candidate, most: int = 3) -> int:
    """Machines that any one pool may lose while the rest still meets the objectives, up to `most`."""
    sizes = [pool.size for pool in candidate.pools]
    for lost in range(1, most + 1):
        for index, size in enumerate(sizes):
            left = [each - lost if place == index else each for place, each in enumerate(sizes)]
            prefill, decode = (left[0], 0) if candidate.shape.mixed else (left[0], left[1])
            if size <= lost or not search.look(candidate.shape, prefill, decode, candidate.rate).meets:
                return lost - 1
    return most
