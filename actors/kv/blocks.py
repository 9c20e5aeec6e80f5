"""The KV cache of one worker as bytes: layers in wire order, blocks by index.

Owns no memory: it is a view of vLLM's own cache tensors. A block's inside is opaque here (the CPU
backend's depends on the instruction set), so blocks are exchanged whole, between equal layouts only.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from joinwise.actors.kv.frames import PROTOCOL_VERSION
from joinwise.proto import kv_pb2


class UnsupportedKvCacheError(RuntimeError):
    """A KV cache that this version cannot ship; the message names the layer."""


class KvBlocks:
    """Reads and writes whole KV blocks of every layer.

    Args:
        caches: vLLM's cache tensors by layer name, each with the block index as its first dimension
            and contiguous within a block.
        block_size: tokens per block.
        interior: who laid out the inside of a block (attention backend and instruction set).
        model_digest: digest of the model's files.

    Raises:
        UnsupportedKvCacheError: a tensor that is not laid out like this; the message names the layer.
    """

    def __init__(self, caches: dict[str, torch.Tensor], *, block_size: int, interior: str, model_digest: str) -> None:
        self.layer_names = list(caches)
        self._layers = [_as_bytes(name, cache) for name, cache in caches.items()]
        self.block_bytes = [layer.shape[1] for layer in self._layers]
        self.num_blocks = min(layer.shape[0] for layer in self._layers)
        dtypes = {str(cache.dtype) for cache in caches.values()}
        self.layout = kv_pb2.KvLayout(
            protocol_version=PROTOCOL_VERSION,
            dtype=",".join(sorted(dtypes)),
            block_size=block_size,
            layers=[
                kv_pb2.KvLayer(name=name, block_bytes=size)
                for name, size in zip(self.layer_names, self.block_bytes, strict=True)
            ],
            interior=interior,
            model_digest=model_digest,
        )
        self.digest = layout_digest(self.layout)

    def read(self, layer: int, block_ids: Sequence[int]) -> list[memoryview]:
        """The blocks' bytes in order, as views; neighbours in the cache come as one piece.

        Raises:
            IndexError: a block that the cache does not have.
        """
        self._check(block_ids)
        data = self._layers[layer]
        return [data[start : start + count].data.cast("B") for start, count in _runs(block_ids)]

    def write(self, layer: int, block_ids: Sequence[int], payload: memoryview) -> None:
        """Copy a payload of `len(block_ids)` blocks into the cache.

        Raises:
            IndexError: a block that the cache does not have; nothing is written.
            ValueError: a payload of another size; nothing is written.
        """
        self._check(block_ids)
        data = self._layers[layer]
        source = np.frombuffer(payload, dtype=np.uint8).reshape(len(block_ids), self.block_bytes[layer])
        row = 0
        for start, count in _runs(block_ids):
            data[start : start + count] = source[row : row + count]
            row += count

    def _check(self, block_ids: Sequence[int]) -> None:
        # A slice beyond the end would be cut short in silence.
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise IndexError(f"KV blocks {min(block_ids)} to {max(block_ids)} of {self.num_blocks}")


def layout_digest(layout: kv_pb2.KvLayout) -> str:
    """Digest of a layout: equal digests may exchange whole blocks."""
    return hashlib.sha256(layout.SerializeToString(deterministic=True)).hexdigest()[:32]


def _as_bytes(name: str, cache: torch.Tensor) -> np.ndarray:
    if cache.device.type != "cpu":
        raise UnsupportedKvCacheError(
            f"KV cache of layer {name!r} is on {cache.device}; this version ships KV between CPU workers only"
        )
    if not cache.is_contiguous():
        raise UnsupportedKvCacheError(f"KV cache of layer {name!r} is not contiguous (strides {cache.stride()})")
    return cache.view(cache.shape[0], -1).view(torch.uint8).numpy()


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
