"""Where the elements of a KV block lie: the one description that references, native and GPU kernels go by.

All numbers count elements of the cache's dtype from the first element of the cache tensor. Within a block an element is
at `offset + head * head_stride + token axis + dim axis`; each axis is affine in tiles, which covers every backend that
is known: rows (values on a CPU, FlashAttention's caches), transposed rows (keys on a CPU without AMX), and the pairs
and quads that AMX and BFMMLA tiles want.
"""

from __future__ import annotations

import functools
from array import array
from dataclasses import astuple, dataclass

import torch


class InteriorError(ValueError):
    """A block's inside that cannot be described; the message says what contradicts the description."""


@dataclass(frozen=True)
class Axis:
    """Index i lies at `i // tile * outer_stride + i % tile * inner_stride`. One run has a tile of its whole size."""

    tile: int
    outer_stride: int
    inner_stride: int

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """Offsets of an index tensor of int64."""
        return index // self.tile * self.outer_stride + index % self.tile * self.inner_stride

    def last(self, size: int) -> int:
        """The largest offset of `size` indices: that of the last, or of the last whole tile's last."""
        ends = (size - 1, max(0, (size - 1) // self.tile * self.tile - 1))
        return max(end // self.tile * self.outer_stride + end % self.tile * self.inner_stride for end in ends)


@dataclass(frozen=True)
class Part:
    """The keys, the values, or the one latent, of a block."""

    offset: int
    head_stride: int
    token: Axis
    dim: Axis

    @property
    def numbers(self) -> tuple[int, ...]:
        """offset, head stride, then tile, outer and inner stride of the tokens and of the dims."""
        return self.offset, self.head_stride, *astuple(self.token), *astuple(self.dim)


@dataclass(frozen=True)
class BlockInterior:
    """The inside of a layer's blocks, as one rank holds them.

    Args:
        heads: KV heads in the cache (1 for a latent).
        block_size: tokens a block.
        head_dim: elements of one head of one part.
        parts: keys and values, or one latent.
        block_stride: elements from one block to the next.

    Raises:
        InteriorError: a size or a stride that describes no block.
    """

    heads: int
    block_size: int
    head_dim: int
    parts: tuple[Part, ...]
    block_stride: int

    def __post_init__(self) -> None:
        if min(self.heads, self.block_size, self.head_dim, self.block_stride, len(self.parts)) < 1:
            raise InteriorError(f"a block of {self}")
        for part in self.parts:
            if min(part.numbers) < 0 or min(part.token.tile, part.dim.tile) < 1:
                raise InteriorError(f"negative strides or empty tiles: {part}")

    @functools.cached_property
    def span(self) -> int:
        """Elements from a block's first to its last, over all parts."""
        return 1 + max(
            part.offset
            + (self.heads - 1) * part.head_stride
            + part.token.last(self.block_size)
            + part.dim.last(self.head_dim)
            for part in self.parts
        )

    def blocks_in(self, cache: torch.Tensor) -> int:
        """How many whole blocks the tensor holds."""
        return max(0, (extent(cache) - self.span) // self.block_stride + 1)

    @functools.cached_property
    def numbers(self) -> array[int]:
        """For native code: block size, head dim, block stride, parts, then eight numbers for each part."""
        flat = array("q", (self.block_size, self.head_dim, self.block_stride, len(self.parts)))
        for part in self.parts:
            flat.extend(part.numbers)
        return flat

    def offsets(self, heads: range) -> torch.Tensor:
        """Offsets within a block, int64[len(heads), block_size, parts, head_dim]: the wire's order."""
        head = torch.arange(heads.start, heads.stop)[:, None, None]
        token = torch.arange(self.block_size)[:, None]
        dim = torch.arange(self.head_dim)
        return torch.stack(
            [part.offset + head * part.head_stride + part.token.at(token) + part.dim.at(dim) for part in self.parts],
            dim=2,
        )


def extent(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first to its last in memory, both included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def interior_from_views(cache: torch.Tensor, *parts: torch.Tensor) -> BlockInterior:
    """The interior of a cache whose parts can be written as strided views.

    Args:
        cache: the tensor that will be packed; the views share its memory.
        parts: keys and values, or one latent, each viewed as [blocks, block_size, heads, head_dim]. For
            FlashAttention's `(2, blocks, block_size, heads, head_dim)` that is `cache[0], cache[1]`, whatever the
            strides (NHD, HND); for `(blocks, 2, ...)` `cache[:, 0], cache[:, 1]`; for MLA's `(blocks, block_size,
            latent)` `cache[:, :, None]`.

    Raises:
        InteriorError: views of unequal shapes or block strides, of other memory, or before the cache's first element.
    """
    first = parts[0]
    if first.dim() != 4 or any(part.shape != first.shape for part in parts):
        raise InteriorError(f"parts of {[tuple(part.shape) for part in parts]}: one shape of four dimensions is needed")
    if any(part.untyped_storage().data_ptr() != cache.untyped_storage().data_ptr() for part in parts):
        raise InteriorError("a part is no view of the cache")
    if len({part.stride(0) for part in parts}) > 1:
        raise InteriorError(f"block strides of {[part.stride(0) for part in parts]} in one cache")
    _, block_size, heads, head_dim = first.shape
    return BlockInterior(
        heads=heads,
        block_size=block_size,
        head_dim=head_dim,
        parts=tuple(
            Part(
                offset=part.storage_offset() - cache.storage_offset(),
                head_stride=part.stride(2),
                token=Axis(block_size, 0, part.stride(1)),
                dim=Axis(head_dim, 0, part.stride(3)),
            )
            for part in parts
        ),
        block_stride=first.stride(0),
    )
