"""Packing and unpacking on a CUDA device. Imported for tensors there only.

One program moves a tile of tokens of one head and part; the places come from the same numbers as everywhere else. The
work goes to the current stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from joinwise.kernels.kv_pack.interior import extent
from joinwise.kernels.kv_pack.job import Job

_TILE = 16  # tokens a program
# What is not converted is moved as integers, so that every bit stays.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(job: Job, wire: torch.Tensor) -> None:
    """See `reference.pack`."""
    aligned = wire if _is_aligned(job, wire) else torch.empty_like(wire)
    _launch(job, aligned, to_wire=True)
    if aligned is not wire:
        wire.copy_(aligned)


def unpack(job: Job, wire: torch.Tensor) -> None:
    """See `reference.unpack`."""
    _launch(job, wire if _is_aligned(job, wire) else wire.clone(), to_wire=False)


def _is_aligned(job: Job, wire: torch.Tensor) -> bool:
    return wire.data_ptr() % job.wire_dtype.itemsize == 0 and wire.storage_offset() % job.wire_dtype.itemsize == 0


def _launch(job: Job, wire: torch.Tensor, *, to_wire: bool) -> None:
    cache = job.cache.as_strided((extent(job.cache),), (1,))
    if job.wire_dtype == cache.dtype:
        kind = _INTEGERS[cache.element_size()]
        cache, rows = cache.view(kind), wire.view(kind)
    else:
        rows = wire.view(job.wire_dtype)
    interior = job.interior
    ids = torch.tensor(job.ids, dtype=torch.int64, device=cache.device)
    grid = (triton.cdiv(job.num_tokens, _TILE), len(job.heads))
    with torch.cuda.device_of(cache):
        for index, part in enumerate(interior.parts):
            _move[grid](
                cache,
                rows,
                ids,
                job.first_token,
                job.num_tokens,
                job.heads.start,
                interior.block_size,
                interior.head_dim,
                interior.block_stride,
                index,
                len(interior.parts),
                *part.numbers,
                tile=_TILE,
                dims=triton.next_power_of_2(interior.head_dim),
                to_wire=to_wire,
            )


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    cache,
    wire,
    ids,
    first_token,
    num_tokens,
    first_head,
    block_size,
    head_dim,
    block_stride,
    part,
    parts,
    offset,
    head_stride,
    token_tile,
    token_outer,
    token_inner,
    dim_tile,
    dim_outer,
    dim_inner,
    tile: tl.constexpr,
    dims: tl.constexpr,
    to_wire: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    dim = tl.arange(0, dims).to(tl.int64)
    there = row < num_tokens
    token = first_token + row
    block = tl.load(ids + token // block_size, mask=there, other=0)
    inside = token % block_size
    start = block * block_stride + offset + (first_head + head) * head_stride
    start += inside // token_tile * token_outer + inside % token_tile * token_inner
    place = start[:, None] + (dim // dim_tile * dim_outer + dim % dim_tile * dim_inner)[None, :]
    outside = (((head * num_tokens + row) * parts + part) * head_dim)[:, None] + dim[None, :]
    mask = there[:, None] & (dim < head_dim)[None, :]
    if to_wire:
        tl.store(wire + outside, tl.load(cache + place, mask=mask).to(wire.dtype.element_ty), mask=mask)
    else:
        tl.store(cache + place, tl.load(wire + outside, mask=mask).to(cache.dtype.element_ty), mask=mask)
