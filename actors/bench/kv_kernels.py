"""Packing, unpacking and coding of KV against memcpy of the same bytes, in turns, on one thread."""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from joinwise.kernels import kv_codec, kv_pack
from joinwise.kernels.kv_pack import Axis, BlockInterior, Part

_MODELS = {"SmolLM2-135M": (3, 64), "Qwen2.5-Coder-0.5B": (2, 64)}
"""KV heads, and elements of one."""
_BLOCK_SIZE = 32
_DTYPES = (torch.float32, torch.bfloat16)


def interiors(heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, BlockInterior]:
    """vLLM's on a CPU, by name: for each head keys, then values.

    `vec`: keys transposed. `amx` (16 bits only): pairs of dims of 16 tokens, pairs of tokens of 16 dims.
    """
    half, stride = _BLOCK_SIZE * head_dim, 2 * _BLOCK_SIZE * head_dim
    keys = Part(0, stride, Axis(_BLOCK_SIZE, 0, 1), Axis(head_dim, 0, _BLOCK_SIZE))
    values = Part(half, stride, Axis(_BLOCK_SIZE, 0, head_dim), Axis(head_dim, 0, 1))
    parts = {"vec": (keys, values)}
    if dtype.itemsize == 2:
        keys = Part(0, stride, Axis(16, 16 * head_dim, 2), Axis(2, 32, 1))
        parts["amx"] = (keys, Part(half, stride, Axis(2, 32, 1), Axis(16, 16 * _BLOCK_SIZE, 2)))
    return {name: BlockInterior(heads, _BLOCK_SIZE, head_dim, each, heads * stride) for name, each in parts.items()}


def measure(size: int, repeats: int, say: Callable[[str], None]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Ratios to memcpy of about `size` bytes: the worst of all models, element types and interiors.

    Raises:
        RuntimeError: what was packed and unpacked again is not what it was.
    """
    rows = []
    for model, (heads, head_dim) in _MODELS.items():
        for dtype in _DTYPES:
            for name, inside in interiors(heads, head_dim, dtype).items():
                say(f"kernels: {model}, {dtype}, {name}")
                what = {"model": model, "dtype": str(dtype), "interior": name}
                rows += [{**what, **row} for row in _measure(inside, dtype, size, repeats)]

    def worst(*names: str) -> float:
        return min(row["ratio"] for row in rows if row["kernel"] in names)

    figures = {
        "pack_memcpy_ratio": worst("pack"),
        "unpack_memcpy_ratio": worst("unpack"),
        "int8_memcpy_ratio": worst("int8 encode", "int8 decode"),
    }
    return figures, rows


def _measure(inside: BlockInterior, dtype: torch.dtype, size: int, repeats: int) -> list[dict[str, Any]]:
    heads, head_dim = inside.heads, inside.head_dim
    block_bytes = inside.block_stride * dtype.itemsize
    blocks = max(1, size // block_bytes)
    tokens, total = blocks * _BLOCK_SIZE, blocks * block_bytes
    cache = torch.randn(blocks, inside.block_stride).to(dtype)
    target = torch.zeros_like(cache)
    wire, copy = torch.ones(total, dtype=torch.uint8), torch.ones(total, dtype=torch.uint8)
    encoded_bytes = kv_codec.max_encoded_bytes("int8", total // (head_dim * dtype.itemsize), head_dim, dtype)
    encoded = torch.ones(encoded_bytes, dtype=torch.uint8)
    ids, all_heads = torch.randperm(blocks).tolist(), range(heads)
    rows_of_wire = total // (head_dim * dtype.itemsize)

    def memcpy() -> None:
        ctypes.memmove(copy.data_ptr(), wire.data_ptr(), total)

    def pack() -> None:
        kv_pack.pack(cache, inside, ids, first_token=0, num_tokens=tokens, heads=all_heads, out=wire)

    def unpack() -> None:
        kv_pack.unpack(wire, inside, target, ids, first_token=0, heads=all_heads)

    def encode() -> None:
        kv_codec.encode("int8", wire, head_dim=head_dim, dtype=dtype, out=encoded)

    def decode() -> None:
        kv_codec.decode("int8", encoded, rows=rows_of_wire, head_dim=head_dim, dtype=dtype, out=copy)

    pack()
    unpack()
    if not torch.equal(cache, target):
        raise RuntimeError(f"{inside}, {dtype}: unpacking does not undo packing")
    kernels = {"pack": pack, "unpack": unpack, "int8 encode": encode, "int8 decode": decode}
    return [
        {
            "kernel": name,
            "bytes": total,
            **_compare(memcpy, kernel, total, repeats),
        }
        for name, kernel in kernels.items()
    ]


def _compare(baseline: Callable[[], None], measured: Callable[[], None], size: int, repeats: int) -> dict[str, float]:
    """GB/s of both, and the median of the ratios; they take turns."""
    times: list[Sequence[float]] = []
    for _ in range(repeats + 1):
        times.append([_seconds(baseline), _seconds(measured)])
    times = times[1:]  # the first touches memory that nobody has touched
    return {
        "gb_per_s": size / statistics.median(own for _, own in times) / 1e9,
        "memcpy_gb_per_s": size / statistics.median(base for base, _ in times) / 1e9,
        "ratio": statistics.median(base / own for base, own in times),
    }


def _seconds(function: Callable[[], None]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
