"""What the elements of vLLM's KV blocks are: heads of the model, and where each element lies.

A GPU cache is described by its own strides: vLLM's tensors are logically
`[block][KV head][token][K | V]` (`vllm.v1.kv_cache_layout`). The CPU backend's blocks are opaque and
depend on the instruction set, so its interior is learnt: its own operator writes keys and values
that we can recognise, and where they are found is where they lie.
"""

import platform
from collections.abc import Mapping
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from joinwise.actors.kv.layers import UnsupportedKvCacheError
from joinwise.actors.kv.layout import LayerGeometry
from joinwise.kernels.kv_pack import BlockInterior, InteriorError, interior_from_views, learn_interior


def describe(worker: Any, caches: Mapping[str, torch.Tensor]) -> tuple[dict[str, LayerGeometry], str]:
    """Geometry of every layer of a vLLM worker, and a name for who laid out its blocks.

    Args:
        worker: vLLM's worker.
        caches: its cache tensors by layer name.

    Raises:
        UnsupportedKvCacheError: a layer whose KV cannot be shipped; the message names it.
    """
    runner = worker.model_runner
    specs = _specs(runner.kv_cache_config)
    parallel, model = worker.vllm_config.parallel_config, worker.vllm_config.model_config
    tp, total = parallel.tensor_parallel_size, model.get_total_num_kv_heads()
    rank = worker.rank % tp
    on_cpu = runner.device.type == "cpu"
    learnt: dict[AttentionSpec, BlockInterior | None] = {}
    geometry = {}
    for name, spec in specs.items():
        _refuse(name, spec)
        latent = isinstance(spec, MLAAttentionSpec)
        if on_cpu:
            if spec not in learnt:
                learnt[spec] = _learn(spec)
            interior = learnt[spec]
        else:
            interior = _from_views(caches[name], latent)
        geometry[name] = LayerGeometry(
            num_heads=spec.num_kv_heads,
            first_head=0 if latent else rank * total // tp,
            total_heads=1 if latent else total,
            parts=1 if latent else 2,
            head_dim=spec.head_size,
            interior=interior,
        )
    kind = platform.machine() if on_cpu else torch.cuda.get_device_name(runner.device)
    interiors = {repr(each.interior) for each in geometry.values()}
    return geometry, f"{kind}:{'/'.join(sorted(interiors))}"


def _specs(config: Any) -> dict[str, Any]:
    specs = {}
    for group in config.kv_cache_groups:
        each = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        for name in group.layer_names:
            specs[name] = each[name] if each else group.kv_cache_spec
    return specs


def _refuse(name: str, spec: Any) -> None:
    if not isinstance(spec, AttentionSpec):
        raise UnsupportedKvCacheError(f"the state of layer {name!r} ({type(spec).__name__}) cannot be shipped")
    if isinstance(spec, SlidingWindowSpec | ChunkedLocalAttentionSpec):
        raise UnsupportedKvCacheError(f"layer {name!r} keeps a window of its KV only: this version cannot ship that")
    if spec.kv_quant_mode is not KVQuantMode.NONE:
        raise UnsupportedKvCacheError(
            f"the KV cache of layer {name!r} has scales of its own ({spec.kv_quant_mode.name})"
        )


def _learn(spec: AttentionSpec) -> BlockInterior | None:
    """The CPU backend's interior; None where it follows no rule that we know: whole blocks only then."""
    heads, size, head_dim = spec.num_kv_heads, spec.block_size, spec.head_size
    isa = cpu_attn._get_attn_isa(spec.dtype, size, head_dim, "auto")
    slots = torch.arange(size)

    def write(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        cache = torch.zeros(1, heads, 2 * size, head_dim, dtype=spec.dtype)
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            keys, values, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
        return cache.view(-1)

    try:
        return learn_interior(write, heads=heads, block_size=size, head_dim=head_dim, dtype=spec.dtype)
    except InteriorError:
        return None


def _from_views(cache: torch.Tensor, latent: bool) -> BlockInterior | None:
    """A GPU cache's interior, of vLLM's logical `[block, KV head, token, K | V]`; None for any other shape."""
    try:
        if latent:
            return interior_from_views(cache, cache.view(cache.shape[0], -1, 1, cache.shape[-1]))
        tokens_first = cache.transpose(1, 2)
        return interior_from_views(cache, *tokens_first.chunk(2, dim=-1))
    except (InteriorError, IndexError, RuntimeError):
        return None
