"""The KV cache of one worker as bytes: layers in wire order, blocks by index.

Owns no memory: it is a view of vLLM's own cache tensors. A block's inside is opaque here (the CPU
backend's depends on the instruction set), so blocks are exchanged whole, between equal layouts only.
"""

import hashlib
from collections.abc import Sequence

import torch

from joinwise.actors.kv.frames import PROTOCOL_VERSION
from joinwise.actors.kv.layers import make_layer
from joinwise.proto import kv_pb2


class KvBlocks:
    """Reads and writes whole KV blocks of every layer.

    Args:
        caches: vLLM's cache tensors by layer name (see `layers.make_layer`).
        block_size: tokens per block.
        interior: who laid out the inside of a block (attention backend and instruction set).
        model_digest: digest of the model's files.
        num_blocks: blocks in each cache; needed for caches whose first dimension is another.

    Raises:
        UnsupportedKvCacheError: a tensor that is not laid out like this; the message names the layer.
    """

    def __init__(
        self,
        caches: dict[str, torch.Tensor],
        *,
        block_size: int,
        interior: str,
        model_digest: str,
        num_blocks: int | None = None,
    ) -> None:
        self.layer_names = list(caches)
        self._layers = [make_layer(name, cache, num_blocks) for name, cache in caches.items()]
        self.block_bytes = [layer.block_bytes for layer in self._layers]
        self.num_blocks = min(layer.num_blocks for layer in self._layers)
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
        return self._layers[layer].read(block_ids)

    def write(self, layer: int, block_ids: Sequence[int], payload: memoryview) -> None:
        """Copy a payload of `len(block_ids)` blocks into the cache.

        Raises:
            IndexError: a block that the cache does not have; nothing is written.
            ValueError: a payload of another size; nothing is written.
        """
        self._check(block_ids)
        if payload.nbytes != len(block_ids) * self.block_bytes[layer]:
            raise ValueError(f"{payload.nbytes} bytes for {len(block_ids)} blocks of {self.block_bytes[layer]}")
        self._layers[layer].write(block_ids, payload)

    def mark(self, layer: int) -> None:
        """The step's work on a layer has been given to the device; what is read later waits for it."""
        self._layers[layer].mark()

    def _check(self, block_ids: Sequence[int]) -> None:
        # A slice beyond the end would be cut short in silence.
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise IndexError(f"KV blocks {min(block_ids)} to {max(block_ids)} of {self.num_blocks}")


def layout_digest(layout: kv_pb2.KvLayout) -> str:
    """Digest of a layout: equal digests may exchange whole blocks."""
    return hashlib.sha256(layout.SerializeToString(deterministic=True)).hexdigest()[:32]
