"""KV blocks of any backend, block size and tensor-parallel width to one canonical wire layout, and back.

The wire of one layer is `[kv head][token][part][head_dim]`: parts are keys and values, or one latent. So a range of
heads is one piece of it, whichever block sizes and interiors the two ends have. Two ends with equal interiors need none
of this and ship whole blocks (`gather_blocks`, `scatter_blocks`).

Every entry point checks all indices and sizes before it touches a byte, then picks: native code for a cache on a CPU,
Triton on a CUDA device, else the reference. Native code runs without the GIL; several calls may run at once.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch

from joinwise.kernels.kv_pack import native_calls, reference
from joinwise.kernels.kv_pack.buffers import Buffer, Bytes
from joinwise.kernels.kv_pack.interior import Axis, BlockInterior, InteriorError, Part, interior_from_views
from joinwise.kernels.kv_pack.job import Job, check_distinct, check_heads, checked_ids
from joinwise.kernels.kv_pack.learn import learn_interior

__all__ = [
    "Axis",
    "BlockInterior",
    "Buffer",
    "InteriorError",
    "Part",
    "gather_blocks",
    "interior_from_views",
    "learn_interior",
    "pack",
    "scatter_blocks",
    "unpack",
    "wire_bytes",
]


def wire_bytes(interior: BlockInterior, num_tokens: int, num_heads: int, dtype: torch.dtype) -> int:
    """Bytes of `num_tokens` tokens of `num_heads` heads on the wire."""
    return num_heads * num_tokens * len(interior.parts) * interior.head_dim * dtype.itemsize


def pack(
    cache: torch.Tensor,
    interior: BlockInterior,
    block_ids: Sequence[int],
    *,
    first_token: int,
    num_tokens: int,
    heads: range,
    out: Buffer,
    wire_dtype: torch.dtype | None = None,
    threads: int = 1,
) -> None:
    """Read tokens of some heads from the blocks into `out`.

    Args:
        cache: the layer's cache; `interior` counts from its first element.
        interior: of the cache.
        block_ids: the blocks of a sequence, in order.
        first_token: counted from the first token of the first of `block_ids`; need not begin a block.
        num_tokens: may end inside a block.
        heads: of the cache, consecutive.
        out: of `wire_bytes` bytes. With a cache and an `out` on a CUDA device the work is only given to the current
            stream; in every other case it is done on return.
        wire_dtype: element type on the wire (default: the cache's). float32, bfloat16 and float16 are converted into
            each other, rounded to nearest even, NaN to NaN; of any type not converted, every bit stays.
        threads: CPU threads to use at most.

    Raises:
        IndexError: a block, token or head that is not there; nothing is written.
        ValueError: a buffer of another size or kind, or element types that are not converted; nothing is written.
    """
    job = Job.checked(cache, interior, block_ids, first_token, num_tokens, heads, wire_dtype, threads)
    wire = Bytes(out, writable=True)
    wire.check(cache.device, wire_bytes(interior, num_tokens, len(heads), job.wire_dtype))
    if num_tokens == 0:
        return
    if lib := _native(cache):
        native_calls.move(lib, job, wire.address, pack=True)
    else:
        wire.fill(cache.device, lambda there: _path(cache).pack(job, there))


def unpack(
    payload: Buffer,
    interior: BlockInterior,
    cache: torch.Tensor,
    block_ids: Sequence[int],
    *,
    first_token: int,
    heads: range,
    wire_dtype: torch.dtype | None = None,
    threads: int = 1,
) -> int:
    """Write a payload into the blocks; nothing else in them changes. The counterpart of `pack`.

    Args:
        payload: wire bytes of `len(heads)` heads; their number tells how many tokens.
        interior: of the cache.
        cache: the layer's cache. On a CUDA device the work is only given to the current stream.
        block_ids: the blocks of a sequence, in order, none twice.
        first_token: the payload's first token, counted from the first of `block_ids`.
        heads: of the cache, consecutive.
        wire_dtype: element type on the wire (default: the cache's).
        threads: CPU threads to use at most.

    Returns:
        The number of tokens written.

    Raises:
        IndexError: a block, token or head that is not there; nothing is written.
        ValueError: no whole number of tokens, a buffer of another kind, element types that are not converted, or a
            block named twice; nothing is written.
    """
    check_heads(interior, heads)
    wire = Bytes(payload, writable=False)
    token_bytes = wire_bytes(interior, 1, len(heads), wire_dtype or cache.dtype)
    num_tokens = wire.size // token_bytes
    wire.check(cache.device, num_tokens * token_bytes)
    job = Job.checked(cache, interior, block_ids, first_token, num_tokens, heads, wire_dtype, threads)
    check_distinct(job.ids)
    if num_tokens == 0:
        return 0
    if lib := _native(cache):
        native_calls.move(lib, job, wire.address, pack=False)
    else:
        _path(cache).unpack(job, wire.tensor().to(cache.device))
    return num_tokens


def gather_blocks(cache: torch.Tensor, block_ids: Sequence[int], out: Buffer) -> None:
    """Copy whole blocks, one after the other, into `out`.

    Args:
        cache: uint8[blocks, bytes of a block]; the bytes of a block are contiguous.
        block_ids: rows of it.
        out: of `len(block_ids)` blocks.

    Raises:
        IndexError: a block that is not there; nothing is written.
        ValueError: a buffer of another size or kind, or another cache; nothing is written.
    """
    ids = checked_ids(block_ids, _check_matrix(cache))
    wire = Bytes(out, writable=True)
    wire.check(cache.device, len(ids) * cache.shape[1])
    if lib := _native(cache):
        native_calls.copy_blocks(lib, cache, ids, wire.address, gather=True)
    elif ids:
        wire.fill(cache.device, lambda there: reference.gather_blocks(cache, ids, there))


def scatter_blocks(payload: Buffer, cache: torch.Tensor, block_ids: Sequence[int]) -> None:
    """Copy a payload of whole blocks into the rows of `cache`. The counterpart of `gather_blocks`.

    Raises:
        IndexError: a block that is not there; nothing is written.
        ValueError: a buffer of another size or kind, another cache, or a block named twice; nothing is written.
    """
    ids = checked_ids(block_ids, _check_matrix(cache))
    check_distinct(ids)
    wire = Bytes(payload, writable=False)
    wire.check(cache.device, len(ids) * cache.shape[1])
    if lib := _native(cache):
        native_calls.copy_blocks(lib, cache, ids, wire.address, gather=False)
    elif ids:
        reference.scatter_blocks(cache, ids, wire.tensor().to(cache.device))


def _check_matrix(cache: torch.Tensor) -> int:
    """The number of blocks of a uint8 matrix with contiguous rows."""
    if cache.dtype != torch.uint8 or cache.dim() != 2 or cache.stride(1) != 1:
        raise ValueError(f"{cache.dtype} of {tuple(cache.shape)}: a uint8 matrix with contiguous rows is needed")
    return cache.shape[0]


def _native(cache: torch.Tensor) -> ctypes.CDLL | None:
    """The native library, where it can reach the cache."""
    return native_calls.library() if cache.device.type == "cpu" else None


def _path(cache: torch.Tensor) -> ModuleType:
    """The module whose `pack` and `unpack` stand in for native code."""
    return _triton() if cache.device.type == "cuda" else reference


@functools.cache
def _triton() -> ModuleType:
    if importlib.util.find_spec("triton") is None:
        return reference
    from joinwise.kernels.kv_pack import triton_kernels

    return triton_kernels
