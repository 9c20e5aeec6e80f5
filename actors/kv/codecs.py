"""How payloads are coded on a link: as configured, or, for each transfer, by what link and coding are measured to do.

A codec pays where the wire is slower than coding. The wire is measured by `links.Link`; coding by both ends, on one
thread with packing included, for that is what stands between a cache and the wire. Codecs that lose precision are used
only where they are named in the configuration.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.layout import CODECS, PeerPlan, dtype_of
from joinwise.actors.kv.links import Link
from joinwise.kernels import kv_codec

AUTO = "auto"
_MARGIN = 1.25
"""A codec is taken up when it pays on a link that much faster than measured, and kept until it does not on one that
much slower: a measurement that wavers changes nothing."""
_LOOK_AGAIN = 32
"""Coded transfers over gRPC, where coding cannot be told from the wire, until one goes uncoded to measure it."""
_SAMPLE = 1 << 17
_TIMES = 3


class CodingSpeeds:
    """How many numbers this rank codes in a second, on one thread; measured when first asked for.

    Args:
        blocks: the cache that payloads are packed from.
    """

    def __init__(self, blocks: KvBlocks) -> None:
        self._blocks = blocks

    @functools.cached_property
    def encoding(self) -> dict[int, float]:
        """By `kv_pb2.Encoding`; empty where the inside of blocks is not known."""
        return {codec: times[0] for codec, times in self._measured.items()}

    @functools.cached_property
    def decoding(self) -> dict[int, float]:
        """The counterpart of `encoding`."""
        return {codec: times[1] for codec, times in self._measured.items()}

    @functools.cached_property
    def _measured(self) -> dict[int, tuple[float, float]]:
        mine = self._blocks.layout.layers[0]
        if not mine.num_heads:
            return {}
        heads = range(mine.first_head, mine.first_head + mine.num_heads)
        dtype = dtype_of(self._blocks.layout.dtype)
        numbers = mine.num_heads * self._blocks.block_size * mine.parts * mine.head_dim
        packing = _seconds(lambda: self._blocks.pack(0, [0], 0, self._blocks.block_size, heads, dtype)) / numbers
        rows = max(1, _SAMPLE // mine.head_dim)
        sample = torch.randn(rows, mine.head_dim, generator=torch.Generator().manual_seed(0))
        found = {}
        for encoding, codec in CODECS.items():
            if codec == "none":
                continue
            kind = torch.bfloat16 if codec == "lossless" else dtype
            there, back = _coding_seconds(codec, sample.to(kind))
            found[encoding] = 1 / (packing + there / sample.numel()), 1 / (packing + back / sample.numel())
        return found


class CodecChoice:
    """Picks the encoding of each transfer at its start.

    Args:
        blocks: the cache to write to.
        codec: a name of `kernels.kv_codec`, used wherever that can be, or "auto".
        lossy: a codec with loss that "auto" may take too; "none" for none.
    """

    def __init__(self, blocks: KvBlocks, codec: str, lossy: str = "none") -> None:
        self._layers = blocks.layout.layers
        self._speeds = CodingSpeeds(blocks)
        self.auto = codec == AUTO
        self._names = {"lossless", lossy} - {"none"} if self.auto else {codec} - {"none"}

    def apply(self, plan: PeerPlan, link: Link, encoding: Mapping[int, float]) -> PeerPlan:
        """The plan with the codec that its next transfer shall have; `link` says which, and why.

        Args:
            plan: of what to fetch.
            link: from whom.
            encoding: numbers that the sender encodes in a second, by encoding, as far as it has said.
        """
        chosen, link.codec_why = self._chosen(plan, link, encoding)
        link.codec = CODECS[chosen] if chosen is not None else "none"
        link.coded = link.coded + 1 if chosen is not None else 0
        return plan if chosen is None else replace(plan, encoding=chosen)

    def _chosen(self, plan: PeerPlan, link: Link, encoding: Mapping[int, float]) -> tuple[int | None, str]:
        if not self._names:
            return None, ""
        if not all(self._layers[ours].num_heads for _, ours in plan.layers):
            return None, "uncoded: the inside of blocks is not known"
        wide = plan.wire_dtype == torch.float32
        possible = [e for e, name in CODECS.items() if name in self._names and not (wide and name == "lossless")]
        if not possible:
            return None, "uncoded: nothing codes float32 without loss"
        if not self.auto:
            return possible[0], f"{CODECS[possible[0]]}: configured"
        if not link.bytes_per_s:
            return None, "uncoded: the wire is not measured yet"
        if not any(each in encoding for each in possible):
            return None, "uncoded: the sender does not say how fast it codes"
        if link.transport == "grpc" and link.coded >= _LOOK_AGAIN:
            return None, "uncoded: to measure the wire again"
        return self._fastest(plan, link, encoding, [each for each in possible if each in encoding])

    def _fastest(
        self, plan: PeerPlan, link: Link, encoding: Mapping[int, float], possible: list[int]
    ) -> tuple[int | None, str]:
        wire, size = link.bytes_per_s, plan.wire_dtype.itemsize
        best, pace, coding = None, 0.0, 0.0
        for each in possible:
            name = CODECS[each]
            there, back = encoding[each] * size, self._speeds.decoding[each] * size
            ratio = link.ratio if name == "lossless" else self._ratio(name, plan)
            assumed = wire / _MARGIN if link.codec == name else wire * _MARGIN
            coding = max(coding, min(there, back))
            if not kv_codec.pays(assumed, there, back, ratio):
                continue
            carried = min(there, back, wire / ratio)
            if carried > pace:
                best, pace = each, carried
        if best is None:
            return None, f"uncoded: the wire carries {wire / 1e6:.0f} MB/s, coding {coding / 1e6:.0f}"
        return best, f"{CODECS[best]}: the wire carries {wire / 1e6:.0f} MB/s, with it {pace / 1e6:.0f}"

    def _ratio(self, codec: str, plan: PeerPlan) -> float:
        head_dim = self._layers[plan.layers[0][1]].head_dim
        coded, plain = (kv_codec.max_encoded_bytes(name, 1, head_dim, plan.wire_dtype) for name in (codec, "none"))
        return coded / plain


def _coding_seconds(codec: str, sample: torch.Tensor) -> tuple[float, float]:
    """To encode a sample, and to decode it."""
    rows, head_dim = sample.shape
    plain = memoryview(sample.view(torch.uint8).numpy()).cast("B")
    coded = memoryview(bytearray(kv_codec.max_encoded_bytes(codec, rows, head_dim, sample.dtype)))
    size = kv_codec.encode(codec, plain, head_dim=head_dim, dtype=sample.dtype, out=coded)
    there = _seconds(lambda: kv_codec.encode(codec, plain, head_dim=head_dim, dtype=sample.dtype, out=coded))
    back = memoryview(bytearray(plain.nbytes))
    return there, _seconds(
        lambda: kv_codec.decode(codec, coded[:size], rows=rows, head_dim=head_dim, dtype=sample.dtype, out=back)
    )


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of some runs."""
    best = float("inf")
    for _ in range(_TIMES):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return max(best, 1e-9)
