"""What packing means, in plain torch, on any device: the specification that the fast paths are compared with.

`wire` is a flat uint8 tensor on the cache's device: `[kv head][token][part][head_dim]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from joinwise.kernels.kv_pack.interior import extent
from joinwise.kernels.kv_pack.job import Job


def pack(job: Job, wire: torch.Tensor) -> None:
    """Read the job's tokens from the cache into the wire."""
    flat = _flat(job.cache)
    rows = torch.empty(job.shape, dtype=job.wire_dtype, device=job.cache.device)
    for places, tokens in _blocks(job):
        rows[:, tokens] = flat[places].to(job.wire_dtype)
    wire.copy_(rows.flatten().view(torch.uint8))


def unpack(job: Job, wire: torch.Tensor) -> None:
    """Write the wire's tokens into the cache."""
    flat = _flat(job.cache)
    # A copy: the bytes of a frame lie anywhere, numbers have to be aligned.
    rows = wire.clone().view(job.wire_dtype).view(job.shape)
    for places, tokens in _blocks(job):
        flat[places] = rows[:, tokens].to(job.cache.dtype)


def gather_blocks(cache: torch.Tensor, block_ids: Sequence[int], wire: torch.Tensor) -> None:
    """Copy rows of a uint8 matrix, one after the other, into the wire."""
    wire.view(len(block_ids), -1).copy_(cache[_index(block_ids, cache)])


def scatter_blocks(cache: torch.Tensor, block_ids: Sequence[int], wire: torch.Tensor) -> None:
    """Copy the wire into rows of a uint8 matrix."""
    cache[_index(block_ids, cache)] = wire.view(len(block_ids), -1)


def _flat(cache: torch.Tensor) -> torch.Tensor:
    return cache.as_strided((extent(cache),), (1,))


def _blocks(job: Job) -> Iterator[tuple[torch.Tensor, slice]]:
    """For each block: places in the cache [heads, tokens, parts, head_dim], and which of the tokens those are."""
    inside = job.interior.offsets(job.heads).to(job.cache.device)
    size, end = job.interior.block_size, job.first_token + job.num_tokens
    for block in range(job.first_token // size, -(-end // size)):
        begin, stop = max(job.first_token, block * size), min(end, (block + 1) * size)
        here = inside[:, begin - block * size : stop - block * size]
        start = begin - job.first_token
        yield job.ids[block] * job.interior.block_stride + here, slice(start, start + stop - begin)


def _index(block_ids: Sequence[int], cache: torch.Tensor) -> torch.Tensor:
    return torch.tensor(block_ids, dtype=torch.int64, device=cache.device)
