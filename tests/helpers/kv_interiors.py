"""Interiors of the backends that are known, and any other that tiles can describe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from hypothesis import strategies as st

from joinwise.kernels.kv_pack import Axis, BlockInterior, Part, interior_from_views, native_calls


def cpu_vec(heads: int, block_size: int, head_dim: int) -> BlockInterior:
    """vLLM's CPU backend without tiles: [head][keys transposed, then values]."""
    half = block_size * head_dim
    keys = Part(0, 2 * half, Axis(block_size, 0, 1), Axis(head_dim, 0, block_size))
    values = Part(half, 2 * half, Axis(block_size, 0, head_dim), Axis(head_dim, 0, 1))
    return BlockInterior(heads, block_size, head_dim, (keys, values), heads * 2 * half)


def cpu_amx(heads: int, block_size: int, head_dim: int) -> BlockInterior:
    """The same for AMX and 16 bits: pairs of dims of 16 tokens; pairs of tokens of 16 dims."""
    half = block_size * head_dim
    keys = Part(0, 2 * half, Axis(16, 16 * head_dim, 2), Axis(2, 32, 1))
    values = Part(half, 2 * half, Axis(2, 32, 1), Axis(16, 16 * block_size, 2))
    return BlockInterior(heads, block_size, head_dim, (keys, values), heads * 2 * half)


def cpu_bfmmla(heads: int, block_size: int, head_dim: int) -> BlockInterior:
    """The same for ARM's BFMMLA: quads of dims of 8 tokens; quads of tokens of 2 dims."""
    half = block_size * head_dim
    keys = Part(0, 2 * half, Axis(8, 8 * head_dim, 4), Axis(4, 32, 1))
    values = Part(half, 2 * half, Axis(4, 8, 1), Axis(2, 2 * block_size, 4))
    return BlockInterior(heads, block_size, head_dim, (keys, values), heads * 2 * half)


def gpu(layout: str, blocks: int, heads: int, block_size: int, head_dim: int) -> BlockInterior:
    """FlashAttention-like caches: `nhd`, `nhd_by_block` (blocks first), `hnd` (strides permuted)."""
    if layout == "nhd":
        cache = torch.empty(2, blocks, block_size, heads, head_dim, dtype=torch.uint8)
        return interior_from_views(cache, cache[0], cache[1])
    if layout == "nhd_by_block":
        cache = torch.empty(blocks, 2, block_size, heads, head_dim, dtype=torch.uint8)
    else:
        cache = torch.empty(blocks, 2, heads, block_size, head_dim, dtype=torch.uint8).transpose(2, 3)
    return interior_from_views(cache, cache[:, 0], cache[:, 1])


def mla(blocks: int, block_size: int, latent: int) -> BlockInterior:
    """One latent a token."""
    cache = torch.empty(blocks, block_size, latent, dtype=torch.uint8)
    return interior_from_views(cache, cache[:, :, None])


def known(blocks: int, heads: int, block_size: int, head_dim: int) -> dict[str, BlockInterior]:
    """All of them by name; block sizes and head dims have to be multiples of 16."""
    layouts = ("nhd", "nhd_by_block", "hnd")
    return {
        "cpu_vec": cpu_vec(heads, block_size, head_dim),
        "cpu_amx": cpu_amx(heads, block_size, head_dim),
        "cpu_bfmmla": cpu_bfmmla(heads, block_size, head_dim),
        **{layout: gpu(layout, blocks, heads, block_size, head_dim) for layout in layouts},
    }


@st.composite
def any_interior(draw: st.DrawFn, heads: int | None = None, head_dim: int | None = None) -> BlockInterior:
    """Parts, heads and the tiles of tokens and dims nested in any order, with a gap after each block."""
    heads = heads or draw(st.integers(1, 4))
    block_size = draw(st.sampled_from([1, 3, 8, 16, 32, 48, 64]))
    head_dim = head_dim or draw(st.sampled_from([1, 5, 8, 16, 24, 32, 64, 80]))
    parts = draw(st.integers(1, 2))
    token_tile = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16, 32, block_size) if block_size % n == 0]))
    dim_tile = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16, head_dim) if head_dim % n == 0]))
    sizes = [parts, heads, block_size // token_tile, token_tile, head_dim // dim_tile, dim_tile]
    strides, stride = [0] * len(sizes), 1
    for axis in draw(st.permutations(range(len(sizes)))):
        strides[axis], stride = stride, stride * sizes[axis]
    token, dim = Axis(token_tile, strides[2], strides[3]), Axis(dim_tile, strides[4], strides[5])
    inside = tuple(Part(part * strides[0], strides[1], token, dim) for part in range(parts))
    return BlockInterior(heads, block_size, head_dim, inside, stride + draw(st.sampled_from([0, 1, 16])))


def cache_for(interior: BlockInterior, blocks: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A cache of random bits, NaNs of every kind among them."""
    generator = torch.Generator().manual_seed(seed)
    size = (math.prod((blocks - 1, interior.block_stride)) + interior.span) * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype)


@contextmanager
def without_native() -> Iterator[None]:
    """Have the reference do it."""
    with mock.patch.object(native_calls, "library", return_value=None):
        yield
