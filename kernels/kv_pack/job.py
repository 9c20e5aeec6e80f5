"""One checked call of `pack` or `unpack`: what every path, reference, native or Triton, is handed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from joinwise.kernels.kv_pack.interior import BlockInterior

CONVERTIBLE = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Job:
    """Some tokens of some heads of a layer. Every index is inside the cache, every type is known; see `pack`."""

    cache: torch.Tensor
    interior: BlockInterior
    ids: array[int]
    first_token: int
    num_tokens: int
    heads: range
    wire_dtype: torch.dtype
    threads: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the wire: [heads, tokens, parts, head_dim]."""
        return len(self.heads), self.num_tokens, len(self.interior.parts), self.interior.head_dim

    @classmethod
    def checked(
        cls,
        cache: torch.Tensor,
        interior: BlockInterior,
        block_ids: Sequence[int],
        first_token: int,
        num_tokens: int,
        heads: range,
        wire_dtype: torch.dtype | None,
        threads: int,
    ) -> Job:
        """Raises IndexError for what is not in the cache, ValueError for what cannot be done."""
        check_heads(interior, heads)
        ids = checked_ids(block_ids, interior.blocks_in(cache))
        room = len(ids) * interior.block_size
        if first_token < 0 or num_tokens < 0 or first_token + num_tokens > room:
            raise IndexError(f"tokens {first_token} to {first_token + num_tokens} of {len(ids)} blocks, {room} tokens")
        dtype = wire_dtype or cache.dtype
        if dtype != cache.dtype and not {dtype, cache.dtype} <= CONVERTIBLE:
            raise ValueError(f"{cache.dtype} in the cache and {dtype} on the wire: not converted into each other")
        if cache.element_size() not in (1, 2, 4, 8):
            raise ValueError(f"elements of {cache.element_size()} bytes ({cache.dtype})")
        if threads < 1:
            raise ValueError(f"{threads} threads")
        return cls(cache, interior, ids, first_token, num_tokens, heads, dtype, threads)


def check_heads(interior: BlockInterior, heads: range) -> None:
    """Raises ValueError for a range that skips or is empty, IndexError for heads that are not there."""
    if heads.step != 1 or not heads:
        raise ValueError(f"heads {heads}: at least one, without a gap")
    if heads.start < 0 or heads.stop > interior.heads:
        raise IndexError(f"heads {heads.start} to {heads.stop} of {interior.heads}")


def checked_ids(block_ids: Sequence[int], blocks: int) -> array[int]:
    """As 64-bit integers; raises IndexError for one that is not below `blocks`."""
    ids = array("q", block_ids)
    if ids and not 0 <= min(ids) <= max(ids) < blocks:
        raise IndexError(f"KV blocks {min(ids)} to {max(ids)} of {blocks}")
    return ids


def check_distinct(ids: array[int]) -> None:
    """Raises ValueError for a block that is named twice: which of its contents would stay?"""
    if len(set(ids)) != len(ids):
        raise ValueError(f"a block twice among {len(ids)}")
