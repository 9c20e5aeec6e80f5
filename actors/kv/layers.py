"""One layer's KV cache: whole blocks as bytes, or any tokens and heads in the canonical layout.

On a CPU blocks are read and written in place; on another device they pass through main memory, on a
stream of their own. A whole block's inside is opaque and keeps the order in which the tensor's own
dimensions are stored, so two layers with equal shapes and backends agree on it.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from joinwise.actors.kv.layout import LayerGeometry
from joinwise.kernels import kv_pack


class UnsupportedKvCacheError(RuntimeError):
    """A KV cache that this version cannot ship; the message names the layer."""


class KvLayer(Protocol):
    """What `KvBlocks` needs of a layer. `block_bytes` and `num_blocks` are fixed."""

    block_bytes: int
    num_blocks: int

    def mark(self) -> None:
        """Called on the stepping thread when the step's work on this layer has been given to the device."""

    def read(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The blocks' bytes in order."""

    def place(self, block_ids: Sequence[int]) -> list[memoryview] | None:
        """The blocks' memory, to be written in order; None where it cannot be written in place."""

    def write(self, block_ids: Sequence[int], payload: memoryview) -> None:
        """Copy a payload into the blocks; they hold it when this returns."""

    def pack(
        self, block_ids: Sequence[int], first_token: int, num_tokens: int, heads: range, dtype: torch.dtype
    ) -> memoryview:
        """Tokens of some heads in the canonical layout; tokens count from the first of `block_ids`."""

    def unpack(
        self, block_ids: Sequence[int], first_token: int, heads: range, payload: memoryview, dtype: torch.dtype
    ) -> None:
        """The inverse of `pack`; the blocks hold the payload when this returns."""


def make_layer(name: str, cache: torch.Tensor, num_blocks: int | None, geometry: LayerGeometry | None) -> KvLayer:
    """The layer for a cache tensor.

    Args:
        name: vLLM's name of the layer.
        cache: its cache; one dimension counts blocks (on a CPU it is the first).
        num_blocks: blocks in the cache; needed where the first dimension is another.
        geometry: what a block's elements are; without it only whole blocks are read and written.

    Raises:
        UnsupportedKvCacheError: not laid out like this.
    """
    if cache.device.type == "cpu":
        return HostLayer(name, cache, geometry)
    if not cache.is_cuda:
        raise UnsupportedKvCacheError(
            f"KV cache of layer {name!r} is on {cache.device}: only CPUs and CUDA devices ship KV"
        )
    return DeviceLayer(name, cache, num_blocks if num_blocks is not None else cache.shape[0], geometry)


class HostLayer:
    """A cache in main memory, read and written in place."""

    def __init__(self, name: str, cache: torch.Tensor, geometry: LayerGeometry | None = None) -> None:
        if not cache.is_contiguous():
            raise UnsupportedKvCacheError(f"KV cache of layer {name!r} is not contiguous (strides {cache.stride()})")
        self._cache = cache
        self._geometry = geometry
        self._data = cache.view(cache.shape[0], -1).view(torch.uint8).numpy()
        self.num_blocks, self.block_bytes = self._data.shape
        self._bytes = self._data.reshape(-1).data

    def mark(self) -> None:
        """A CPU's work is done when the call returns."""

    def read(self, block_ids: Sequence[int]) -> list[memoryview]:
        """Views; neighbours in the cache come as one piece."""
        return self.place(block_ids)

    def place(self, block_ids: Sequence[int]) -> list[memoryview]:
        """See `KvLayer.place`; neighbours in the cache come as one piece."""
        size = self.block_bytes
        return [self._bytes[start * size : (start + count) * size] for start, count in _runs(block_ids)]

    def write(self, block_ids: Sequence[int], payload: memoryview) -> None:
        """See `KvLayer.write`."""
        source = np.frombuffer(payload, dtype=np.uint8).reshape(len(block_ids), self.block_bytes)
        row = 0
        for start, count in _runs(block_ids):
            self._data[start : start + count] = source[row : row + count]
            row += count

    def pack(
        self, block_ids: Sequence[int], first_token: int, num_tokens: int, heads: range, dtype: torch.dtype
    ) -> memoryview:
        """See `KvLayer.pack`."""
        return _pack(self._cache, self._geometry, block_ids, first_token, num_tokens, heads, dtype)

    def unpack(
        self, block_ids: Sequence[int], first_token: int, heads: range, payload: memoryview, dtype: torch.dtype
    ) -> None:
        """See `KvLayer.unpack`."""
        interior = _interior(self._geometry)
        kv_pack.unpack(
            payload, interior, self._cache, block_ids, first_token=first_token, heads=heads, wire_dtype=dtype
        )


class DeviceLayer:
    """A cache in a device's memory: gathered there, copied through main memory, on a stream of its own."""

    def __init__(self, name: str, cache: torch.Tensor, num_blocks: int, geometry: LayerGeometry | None = None) -> None:
        dimensions = [dimension for dimension, size in enumerate(cache.shape) if size == num_blocks]
        if not dimensions:
            raise UnsupportedKvCacheError(
                f"KV cache of layer {name!r} has shape {tuple(cache.shape)}, and none of it counts {num_blocks} blocks"
            )
        self._cache = cache
        self._geometry = geometry
        self._blocks = cache.movedim(dimensions[0], 0)
        self._shape = self._blocks.shape[1:]
        self.num_blocks = num_blocks
        self.block_bytes = self._blocks[0].numel() * cache.element_size()
        self._stream = torch.cuda.Stream(cache.device) if cache.is_cuda else None
        self._final = torch.cuda.Event() if cache.is_cuda else None

    def mark(self) -> None:
        """See `KvLayer.mark`: later reads wait until the device has got here."""
        if self._final is not None:
            self._final.record(torch.cuda.current_stream(self._blocks.device))

    def read(self, block_ids: Sequence[int]) -> list[memoryview]:
        """One piece, in main memory."""
        with torch.cuda.stream(self._stream):
            self._wait()
            gathered = self._blocks[self._index(block_ids)].contiguous().to("cpu")
        return [gathered.view(-1).view(torch.uint8).numpy().data.cast("B")]

    def place(self, block_ids: Sequence[int]) -> None:
        """A device's memory is not written in place."""

    def write(self, block_ids: Sequence[int], payload: memoryview) -> None:
        """See `KvLayer.write`."""
        source = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy()).view(self._blocks.dtype)
        with torch.cuda.stream(self._stream):
            rows = source.view(len(block_ids), *self._shape).to(self._blocks.device)
            self._blocks[self._index(block_ids)] = rows
        self._finish()

    def pack(
        self, block_ids: Sequence[int], first_token: int, num_tokens: int, heads: range, dtype: torch.dtype
    ) -> memoryview:
        """See `KvLayer.pack`: packed on the device, then copied."""
        with torch.cuda.stream(self._stream):
            self._wait()
            return _pack(self._cache, self._geometry, block_ids, first_token, num_tokens, heads, dtype)

    def unpack(
        self, block_ids: Sequence[int], first_token: int, heads: range, payload: memoryview, dtype: torch.dtype
    ) -> None:
        """See `KvLayer.unpack`: copied, then unpacked on the device."""
        source = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())
        interior = _interior(self._geometry)
        with torch.cuda.stream(self._stream):
            kv_pack.unpack(
                source.to(self._cache.device),
                interior,
                self._cache,
                block_ids,
                first_token=first_token,
                heads=heads,
                wire_dtype=dtype,
            )
        self._finish()

    def _wait(self) -> None:
        if self._stream is not None and self._final is not None:
            self._stream.wait_event(self._final)

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.long, device=self._blocks.device)


def _interior(geometry: LayerGeometry | None) -> kv_pack.BlockInterior:
    assert geometry is not None and geometry.interior is not None, "a plan asks only for what the layout offers"
    return geometry.interior


def _pack(
    cache: torch.Tensor,
    geometry: LayerGeometry | None,
    block_ids: Sequence[int],
    first_token: int,
    num_tokens: int,
    heads: range,
    dtype: torch.dtype,
) -> memoryview:
    interior = _interior(geometry)
    assert geometry is not None
    size = len(heads) * num_tokens * geometry.parts * geometry.head_dim * dtype.itemsize
    out = torch.empty(size, dtype=torch.uint8, device=cache.device)
    kv_pack.pack(
        cache,
        interior,
        block_ids,
        first_token=first_token,
        num_tokens=num_tokens,
        heads=heads,
        out=out,
        wire_dtype=dtype,
    )
    return out.cpu().numpy().data.cast("B")


def _runs(block_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split block ids into (start, count) runs of neighbours."""
    start = previous = -2
    for block in block_ids:
        if block != previous + 1:
            if start >= 0:
                yield start, previous - start + 1
            start = block
        previous = block
    if start >= 0:
        yield start, previous - start + 1
