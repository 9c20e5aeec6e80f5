"""A worker as the registry knows it."""

from __future__ import annotations

from typing import Any

from joinwise.cluster.router.registry import WorkerInfo


def worker(worker_id: str, role: str = "mixed", **changes: Any) -> WorkerInfo:
    """A registration; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "epoch": 0,
        "model": "m",
        "pool": role,
        "role": role,
        "fingerprint": "f",
        "model_digest": "digest",
        "engine_address": f"{worker_id}:1",
        "kv_address": f"{worker_id}:2",
        "metrics_address": f"{worker_id}:3",
        "capabilities": frozenset({"replay", "kv_grpc"}),
        "kv_layout": "layout",
        "max_model_len": 2048,
        "block_size": 128,
        "num_blocks": 64,
        "max_num_seqs": 16,
        "adapters": frozenset(),
        "vllm_version": "0.32.0",
        "protocol_version": 1,
        "started_ms": 0,
    }
    return WorkerInfo(**{**fields, **changes})
