"""Who holds which part of a model's KV, and how two workers that hold different parts can meet.

A *layout* describes one rank's cache. A receiver compares its own with those of all ranks of a
sender and makes a *plan*: from which rank come which layers and heads, and in what form. Ranks of
equal layouts exchange whole blocks; others the canonical form, in which block size, backend and
tensor-parallel width play no part.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from joinwise.kernels.kv_pack import BlockInterior
from joinwise.proto import kv_pb2

WHOLE = kv_pb2.ENCODING_BLOCKS
PLAIN = kv_pb2.ENCODING_PLAIN
CODECS: dict[int, str] = {
    PLAIN: "none",
    kv_pb2.ENCODING_INT8: "int8",
    kv_pb2.ENCODING_FP8: "fp8",
    kv_pb2.ENCODING_LOSSLESS: "lossless",
}
"""The codec of each canonical encoding."""


class LayoutMismatchError(ValueError):
    """Two workers whose KV cannot meet; the message names the layer or the field."""


@dataclass(frozen=True)
class LayerGeometry:
    """What the elements of a layer's blocks are.

    Attributes:
        num_heads: KV heads on this rank.
        first_head: the first of them, counted in the whole model.
        total_heads: KV heads of the layer in the whole model.
        parts: vectors per head and token: 2 (key and value), or 1 (a latent).
        head_dim: elements of one vector.
        interior: where each element lies; None when that is not known.
    """

    num_heads: int
    first_head: int
    total_heads: int
    parts: int
    head_dim: int
    interior: BlockInterior | None


@dataclass(frozen=True)
class PeerPlan:
    """What to fetch from one rank of a sender.

    Attributes:
        peer: index of the rank.
        encoding: `WHOLE`, or a canonical `kv_pb2.Encoding`.
        first_head: first head wanted, counted in the whole model.
        num_heads: heads wanted; 0 where the heads are not known (whole blocks).
        layers: for each layer wanted, (its index in the sender's layout, its index in ours), ascending.
        wire_dtype: element type of canonical payloads.
        streams: streams that all ranks of the receiver open to that rank.
    """

    peer: int
    encoding: int
    first_head: int
    num_heads: int
    layers: tuple[tuple[int, int], ...]
    wire_dtype: torch.dtype
    streams: int = 1


def signature(layout: kv_pb2.KvLayout, ranks: int) -> str:
    """Digest of what all workers of a model must share to exchange KV.

    Where the insides of blocks are known that is the model; else everything, and the number of ranks.
    """
    shared = kv_pb2.KvLayout(protocol_version=layout.protocol_version, model_digest=layout.model_digest)
    if not all(layer.num_heads for layer in layout.layers):
        shared.CopyFrom(layout)
        shared.protocol_version = layout.protocol_version * 10_000 + ranks
    return digest(shared)


def digest(layout: kv_pb2.KvLayout) -> str:
    """Digest of a layout."""
    return hashlib.sha256(layout.SerializeToString(deterministic=True)).hexdigest()[:32]


@dataclass(frozen=True)
class RankPlan:
    """What one rank of a receiver fetches.

    Attributes:
        parts: what it fetches from whom.
        unneeded: ranks of the sender from which no rank fetches anything; the first rank tells them.
    """

    parts: tuple[PeerPlan, ...]
    unneeded: tuple[int, ...] = ()


def plan(ours: Sequence[kv_pb2.KvLayout], rank: int, theirs: Sequence[kv_pb2.KvLayout]) -> RankPlan:
    """What one of our ranks fetches from whom.

    Args:
        ours: all ranks of the receiver.
        rank: the one to plan for.
        theirs: all ranks of the sender.

    Raises:
        LayoutMismatchError: they cannot meet; the message names what differs.
    """
    plans = [_plan(each, theirs) for each in ours]
    streams = Counter(part.peer for each in plans for part in each)
    unneeded = tuple(peer for peer in range(len(theirs)) if not streams[peer]) if rank == 0 else ()
    return RankPlan(tuple(replace(part, streams=streams[part.peer]) for part in plans[rank]), unneeded)


def _plan(mine: kv_pb2.KvLayout, theirs: Sequence[kv_pb2.KvLayout]) -> list[PeerPlan]:
    """Cover every layer and head of mine with a part of one of theirs.

    Args:
        mine: the receiving rank.
        theirs: all ranks of the sender.

    Raises:
        LayoutMismatchError: they cannot meet; the message names what differs.
    """
    for each in theirs:
        for name in ("protocol_version", "model_digest"):
            if getattr(mine, name) != getattr(each, name):
                raise LayoutMismatchError(
                    f"KV layouts differ in {name}: {getattr(mine, name)!r} here, {getattr(each, name)!r} there"
                )
    wire_dtype = _wire_dtype(mine, theirs)
    wanted: dict[int, dict[int, tuple[int, int, int]]] = {}  # peer -> its layer -> (my layer, first head, heads)
    for index, layer in enumerate(mine.layers):
        for peer, their_index, first, heads in _cover(layer, theirs):
            wanted.setdefault(peer, {})[their_index] = (index, first, heads)
    return [_peer_plan(mine, theirs[peer], peer, layers, wire_dtype) for peer, layers in sorted(wanted.items())]


def _cover(layer: kv_pb2.KvLayer, theirs: Sequence[kv_pb2.KvLayout]) -> list[tuple[int, int, int, int]]:
    """Which (peer, its layer, first head, heads) make up one layer of mine."""
    holders = [
        (peer, index, each)
        for peer, layout in enumerate(theirs)
        for index, each in enumerate(layout.layers)
        if each.name == layer.name
    ]
    if not holders:
        raise LayoutMismatchError(f"KV layouts differ: the sender has no layer {layer.name!r}")
    for _, _, each in holders:
        for name in ("total_heads", "parts", "head_dim"):
            if layer.num_heads and each.num_heads and getattr(layer, name) != getattr(each, name):
                raise LayoutMismatchError(
                    f"KV layouts differ in layer {layer.name!r}: {name} {getattr(layer, name)} here, "
                    f"{getattr(each, name)} there"
                )
    for peer, index, each in holders:
        if (each.num_heads, each.first_head) == (layer.num_heads, layer.first_head):
            return [(peer, index, layer.first_head, layer.num_heads)]
    covered, position, end = [], layer.first_head, layer.first_head + layer.num_heads
    while position < end:
        found = next(
            (each for each in holders if each[2].first_head <= position < each[2].first_head + each[2].num_heads), None
        )
        if found is None:
            raise LayoutMismatchError(f"KV layouts differ in layer {layer.name!r}: nobody has its head {position}")
        peer, index, each = found
        upto = min(end, each.first_head + each.num_heads)
        covered.append((peer, index, position, upto - position))
        position = upto
    if not covered:
        raise LayoutMismatchError(f"KV of layer {layer.name!r} can only be exchanged whole, and the sender's differs")
    return covered


def _peer_plan(
    mine: kv_pb2.KvLayout,
    theirs: kv_pb2.KvLayout,
    peer: int,
    wanted: dict[int, tuple[int, int, int]],
    wire_dtype: torch.dtype,
) -> PeerPlan:
    _, first, heads = next(iter(wanted.values()))
    for my_index, other_first, other_heads in wanted.values():
        if (other_first, other_heads) != (first, heads):
            raise LayoutMismatchError(
                f"KV layouts differ: the heads of layer {mine.layers[my_index].name!r} are split differently"
            )
    layers = tuple((index, my_index) for index, (my_index, _, _) in sorted(wanted.items()))
    why = _why_not_whole(mine, theirs, layers)
    if why and not all(mine.layers[m].num_heads and theirs.layers[t].num_heads for t, m in layers):
        raise LayoutMismatchError(f"KV layouts differ in {why}, and the inside of their blocks is not known")
    return PeerPlan(peer, PLAIN if why else WHOLE, first, heads, layers, wire_dtype)


def _why_not_whole(mine: kv_pb2.KvLayout, theirs: kv_pb2.KvLayout, layers: Sequence[tuple[int, int]]) -> str:
    for name in ("dtype", "block_size", "interior"):
        if getattr(mine, name) != getattr(theirs, name):
            return f"{name}: {getattr(mine, name)!r} here, {getattr(theirs, name)!r} there"
    for their_index, my_index in layers:
        if mine.layers[my_index] != theirs.layers[their_index]:
            return (
                f"layer {mine.layers[my_index].name!r}: {mine.layers[my_index].block_bytes} bytes a block here, "
                f"{theirs.layers[their_index].block_bytes} there"
            )
    return ""


def _wire_dtype(mine: kv_pb2.KvLayout, theirs: Sequence[kv_pb2.KvLayout]) -> torch.dtype:
    """The narrower of the two element types: what is lost is lost on one side anyway.

    bfloat16 and float16 hold different numbers and are not turned into each other.
    """
    here = dtype_of(mine.dtype)
    for each in theirs:
        there = dtype_of(each.dtype)
        if here != there and torch.float32 not in (here, there):
            raise LayoutMismatchError(f"KV layouts differ in dtype: {mine.dtype!r} here, {each.dtype!r} there")
        here = min(here, there, key=lambda dtype: dtype.itemsize)
    return here


def dtype_of(name: str) -> torch.dtype:
    """The element type that a layout names, for example "torch.float32".

    Raises:
        LayoutMismatchError: not one that can be exchanged.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise LayoutMismatchError(f"KV of element type {name!r} cannot be exchanged")
    assert isinstance(dtype, torch.dtype)
    return dtype
