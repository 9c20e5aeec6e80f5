"""Learning a backend's block interior by asking the backend itself.

The CPU backend's interior depends on the instruction set, the dtype and the head size, and no vLLM call tells it. So a
block is filled through the backend's own operation with numbers that name elements, and read back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from joinwise.kernels.kv_pack.interior import Axis, BlockInterior, InteriorError, Part

# An element's number is sent in digits of this base, one digit a round, each as 1..255: small integers are exact in
# every float of 16 bits, none is a NaN, and a place that is not written keeps its zero.
_BASE = 255


def learn_interior(
    write: Callable[..., torch.Tensor], heads: int, block_size: int, head_dim: int, dtype: torch.dtype, parts: int = 2
) -> BlockInterior:
    """Learn the interior of one block.

    Args:
        write: given keys and values (or one latent, for `parts` = 1), each [block_size, heads, head_dim] of `dtype`,
            writes them as the tokens of one block of zeros through the backend's own operation, and returns the
            elements of that block in the order of memory. It is called once for each digit: two or three times.
        heads: KV heads in the cache.
        block_size: tokens a block.
        head_dim: elements of a head.
        dtype: of the cache.
        parts: 2 for keys and values, 1 for a latent.

    Returns:
        The interior; its block stride is the number of elements that `write` returned.

    Raises:
        InteriorError: an element was lost, doubled or changed, or no tiles reproduce its place: the message names it.
    """
    shape = (parts, block_size, heads, head_dim)
    number = torch.arange(parts * block_size * heads * head_dim)
    seen = torch.zeros(0, dtype=torch.int64)
    written = torch.zeros(0, dtype=torch.bool)
    scale = 1
    while scale == 1 or scale <= int(number[-1]):
        digits = (number // scale % _BASE + 1).to(dtype).view(shape)
        block = write(*digits.unbind(0)).flatten().to(torch.float64)
        if scale == 1:
            seen, written = torch.zeros(block.numel(), dtype=torch.int64), block != 0
        digit = block.to(torch.int64)
        fits = (digit == block) & (digit >= 0) & (digit <= _BASE)
        if block.numel() != seen.numel() or not bool(fits.all()) or not torch.equal(digit > 0, written):
            raise InteriorError("the backend changes what it stores: blocks are no permutation of keys and values")
        seen += (digit - 1).clamp_min(0) * scale
        scale *= _BASE
    place = _places(seen, written, number.numel(), shape)
    fitted = tuple(_fit(place[part], f"part {part}") for part in range(parts))
    return BlockInterior(heads, block_size, head_dim, fitted, block_stride=seen.numel())


def _places(seen: torch.Tensor, written: torch.Tensor, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Invert "which element lies here" to "where does it lie": int64[parts, block_size, heads, head_dim]."""
    where = written.nonzero().flatten()
    found = seen[where]
    if found.numel() and int(found.max()) >= count:
        raise InteriorError(f"the backend stores element {int(found.max())} of {count}")
    times = torch.bincount(found, minlength=count)
    wrong = (times != 1).nonzero().flatten()
    if wrong.numel():
        raise InteriorError(f"element {_name(int(wrong[0]), shape)} lies in {int(times[wrong[0]])} places of a block")
    place = torch.empty(count, dtype=torch.int64)
    place[found] = where
    return place.view(shape)


def _fit(place: torch.Tensor, name: str) -> Part:
    """Describe the places [block_size, heads, head_dim] of one part, or say what contradicts."""
    block_size, heads, head_dim = place.shape
    offset = int(place[0, 0, 0])
    head_stride = int(place[0, 1, 0]) - offset if heads > 1 else 0
    token, dim = _axis(place[:, 0, 0] - offset), _axis(place[0, 0, :] - offset)
    head = torch.arange(heads)[:, None] * head_stride
    fitted = offset + token.at(torch.arange(block_size))[:, None, None] + head + dim.at(torch.arange(head_dim))
    wrong = (fitted != place).nonzero()
    if wrong.numel():
        at = tuple(wrong[0].tolist())
        element = f"token {at[0]}, head {at[1]}, dim {at[2]}"
        raise InteriorError(f"{name}: tiles put {element} at {int(fitted[at])}, the backend at {int(place[at])}")
    if min(head_stride, *_strides(token), *_strides(dim)) < 0:
        raise InteriorError(f"{name}: lies backwards in memory")
    return Part(offset, head_stride, token, dim)


def _axis(offsets: torch.Tensor) -> Axis:
    """The tiles of one dimension, from its indices' offsets; what they do not reproduce is found by the caller."""
    size = offsets.numel()
    inner = int(offsets[1]) if size > 1 else 0
    breaks = (offsets != torch.arange(size) * inner).nonzero()
    if not breaks.numel():
        return Axis(size, 0, inner)
    tile = int(breaks[0])
    return Axis(tile, int(offsets[tile]), inner)


def _strides(axis: Axis) -> tuple[int, int]:
    return axis.outer_stride, axis.inner_stride


def _name(number: int, shape: tuple[int, ...]) -> str:
    part, token, head, dim = (int(i) for i in torch.unravel_index(torch.tensor(number), shape))
    return f"(part {part}, token {token}, head {head}, dim {dim})"
