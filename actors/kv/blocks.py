"""The KV cache of one rank: layers in wire order, blocks by index, tokens by position.

Owns no memory: it is a view of vLLM's own cache tensors.
"""

from collections.abc import Mapping, Sequence

import torch

from joinwise.actors.kv.frames import PROTOCOL_VERSION
from joinwise.actors.kv.layers import make_layer
from joinwise.actors.kv.layout import LayerGeometry
from joinwise.proto import kv_pb2


class KvBlocks:
    """Reads and writes the KV of every layer.

    Args:
        caches: vLLM's cache tensors by layer name (see `layers.make_layer`).
        block_size: tokens per block.
        interior: who laid out the inside of a block (attention backend and instruction set).
        model_digest: digest of the model's files.
        num_blocks: blocks in each cache; needed for caches whose first dimension is another.
        geometry: what the elements of each layer's blocks are; layers that are not in it are exchanged
            in whole blocks only.

    Raises:
        UnsupportedKvCacheError: a tensor that is not laid out like this; the message names the layer.
    """

    def __init__(
        self,
        caches: Mapping[str, torch.Tensor],
        *,
        block_size: int,
        interior: str,
        model_digest: str,
        num_blocks: int | None = None,
        geometry: Mapping[str, LayerGeometry] | None = None,
    ) -> None:
        geometry = geometry or {}
        self.layer_names = list(caches)
        self.block_size = block_size
        self._layers = [make_layer(name, cache, num_blocks, geometry.get(name)) for name, cache in caches.items()]
        self._geometry = [geometry.get(name) for name in self.layer_names]
        self.block_bytes = [layer.block_bytes for layer in self._layers]
        self.num_blocks = min(layer.num_blocks for layer in self._layers)
        dtypes = {str(cache.dtype) for cache in caches.values()}
        self.layout = kv_pb2.KvLayout(
            protocol_version=PROTOCOL_VERSION,
            dtype=",".join(sorted(dtypes)),
            block_size=block_size,
            layers=[
                _describe(name, size, geometry.get(name))
                for name, size in zip(self.layer_names, self.block_bytes, strict=True)
            ],
            interior=interior,
            model_digest=model_digest,
        )

    def read(self, layer: int, block_ids: Sequence[int]) -> list[memoryview]:
        """The blocks' bytes in order, as views where they are in main memory.

        Raises:
            IndexError: a block that the cache does not have.
        """
        self._check(block_ids)
        return self._layers[layer].read(block_ids)

    def place(self, layer: int, block_ids: Sequence[int]) -> list[memoryview] | None:
        """The blocks' own memory, to be written in order; None where that is on a device.

        Raises:
            IndexError: a block that the cache does not have.
        """
        self._check(block_ids)
        return self._layers[layer].place(block_ids)

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

    def rows(self, layer: int, num_tokens: int, num_heads: int) -> tuple[int, int]:
        """Vectors that some tokens of some heads are in the canonical layout, and the elements of one."""
        geometry = self._geometry[layer]
        assert geometry is not None
        return num_tokens * num_heads * geometry.parts, geometry.head_dim

    def pack(
        self, layer: int, block_ids: Sequence[int], first_token: int, num_tokens: int, heads: range, dtype: torch.dtype
    ) -> memoryview:
        """Tokens of some heads in the canonical layout, copied.

        Args:
            layer: index of the layer.
            block_ids: the blocks that hold the tokens.
            first_token: the first token, counted from the first of `block_ids`.
            num_tokens: how many.
            heads: counted in the whole model.
            dtype: element type of the result.

        Raises:
            IndexError: a block, token or head that is not here.
        """
        self._check(block_ids)
        return self._layers[layer].pack(block_ids, first_token, num_tokens, self._local(layer, heads), dtype)

    def unpack(
        self,
        layer: int,
        block_ids: Sequence[int],
        first_token: int,
        heads: range,
        payload: memoryview,
        dtype: torch.dtype,
    ) -> None:
        """Copy tokens of some heads from the canonical layout into the cache; arguments as for `pack`.

        Raises:
            IndexError: a block, token or head that is not here; nothing is written.
            ValueError: a payload of another size; nothing is written.
        """
        self._check(block_ids)
        self._layers[layer].unpack(block_ids, first_token, self._local(layer, heads), payload, dtype)

    def mark(self, layer: int) -> None:
        """The step's work on a layer has been given to the device; what is read later waits for it."""
        self._layers[layer].mark()

    def _local(self, layer: int, heads: range) -> range:
        geometry = self._geometry[layer]
        if geometry is None:
            raise IndexError(f"the heads of layer {self.layer_names[layer]!r} are not known")
        return range(heads.start - geometry.first_head, heads.stop - geometry.first_head)

    def _check(self, block_ids: Sequence[int]) -> None:
        # A slice beyond the end would be cut short in silence.
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise IndexError(f"KV blocks {min(block_ids)} to {max(block_ids)} of {self.num_blocks}")


def _describe(name: str, block_bytes: int, geometry: LayerGeometry | None) -> kv_pb2.KvLayer:
    if geometry is None or geometry.interior is None:
        return kv_pb2.KvLayer(name=name, block_bytes=block_bytes)
    return kv_pb2.KvLayer(
        name=name,
        block_bytes=block_bytes,
        num_heads=geometry.num_heads,
        first_head=geometry.first_head,
        total_heads=geometry.total_heads,
        parts=geometry.parts,
        head_dim=geometry.head_dim,
    )
