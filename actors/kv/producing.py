"""Turns what a prefill has computed into frames, as it is computed; knows no transport."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.frames import FLAG_END, MAX_EXPOSED_US, FrameHeader, seal, transfer_tag
from joinwise.actors.kv.layout import CODECS, WHOLE
from joinwise.actors.kv.sending import SendTransfer
from joinwise.kernels import kv_codec, kv_hash

Frame = tuple[bytes, list[memoryview]]
"""A sealed header and its payload, in pieces."""


class TransferEndedError(RuntimeError):
    """The transfer was closed, or its receiver went away, before everything was sent."""


@dataclass(frozen=True)
class Wanted:
    """What of a transfer a stream brings, and how; see `kv_pb2.FetchRequest`."""

    first_token: int
    encoding: int
    heads: range
    layers: tuple[int, ...]
    wire_dtype: torch.dtype


class FrameProducer:
    """Frames of transfers, for any transport.

    Args:
        blocks: the cache to read from.
        frame_bytes: payload bytes a frame aims at, before a codec.
    """

    def __init__(self, blocks: KvBlocks, frame_bytes: int) -> None:
        self._blocks = blocks
        self._frame_bytes = frame_bytes

    def frames(
        self,
        transfer: SendTransfer,
        wanted: Wanted,
        alive: Callable[[], bool],
        load: Callable[[list[memoryview]], int] = kv_hash.digest,
        most_bytes: int | None = None,
    ) -> Generator[Frame, None, int]:
        """All frames of one stream but the last, each as soon as it can be; waits for the prefill.

        Args:
            transfer: whose.
            wanted: what of it.
            alive: says whether the receiver still wants it.
            load: reads each payload once, and tells its xxh3-64; see `SendLane.load`.
            most_bytes: what a payload may have at most for this way of sending; see `SendLane.most_bytes`.

        Returns:
            Their number.

        Raises:
            TransferEndedError: before everything was sent.
        """
        tag = transfer_tag(transfer.transfer_id)
        size = self._blocks.block_size
        end = transfer.num_blocks * size if wanted.encoding == WHOLE else transfer.num_tokens
        sent = dict.fromkeys(wanted.layers, wanted.first_token)
        aim = min(self._frame_bytes, most_bytes or self._frame_bytes)
        sequence = 0
        while min(sent.values()) < end:
            for layer, ready in self._next_ready(transfer, sent, alive):
                upto = min(ready * size, end)
                for first, count in self._cut(layer, sent[layer], upto, wanted, aim):
                    payload = self._payload(transfer, layer, first, count, wanted)
                    heads = wanted.heads
                    header = FrameHeader(
                        tag,
                        transfer.epoch,
                        sequence,
                        layer,
                        first,
                        count,
                        heads.start,
                        len(heads),
                        wanted.encoding,
                    )
                    raw = seal(header, payload, load)
                    # Looked at after the last read: a checksum of foreign bytes is never sent.
                    if transfer.closed:
                        raise TransferEndedError(transfer.closed)
                    yield raw, payload
                    sequence += 1
                sent[layer] = upto
        return sequence

    @staticmethod
    def end(transfer: SendTransfer, sequence: int) -> bytes:
        """The last frame, after `sequence` others."""
        exposed_us = min(int((time.monotonic() - transfer.computed_at) * 1e6), MAX_EXPOSED_US)
        tag = transfer_tag(transfer.transfer_id)
        return seal(FrameHeader(tag, transfer.epoch, sequence, flags=FLAG_END, exposed_us=exposed_us))

    def _cut(self, layer: int, first: int, upto: int, wanted: Wanted, aim: int) -> list[tuple[int, int]]:
        """(first token, tokens) of frames that bring these; up to `aim` bytes, unless one block or token has more."""
        size = self._blocks.block_size
        if wanted.encoding == WHOLE:
            step = max(1, aim // self._blocks.block_bytes[layer]) * size
        else:
            rows, head_dim = self._blocks.rows(layer, 1, len(wanted.heads))
            step = max(1, aim // (rows * head_dim * wanted.wire_dtype.itemsize))
        return [(start, min(step, upto - start)) for start in range(first, upto, step)]

    def _payload(self, transfer: SendTransfer, layer: int, first: int, count: int, wanted: Wanted) -> list[memoryview]:
        size = self._blocks.block_size
        block_ids = transfer.block_ids[first // size : -(-(first + count) // size)]
        if wanted.encoding == WHOLE:
            return self._blocks.read(layer, block_ids)
        plain = self._blocks.pack(layer, block_ids, first % size, count, wanted.heads, wanted.wire_dtype)
        codec = CODECS[wanted.encoding]
        if codec == "none":
            return [plain]
        rows, head_dim = self._blocks.rows(layer, count, len(wanted.heads))
        out = memoryview(bytearray(kv_codec.max_encoded_bytes(codec, rows, head_dim, wanted.wire_dtype)))
        return [out[: kv_codec.encode(codec, plain, head_dim=head_dim, dtype=wanted.wire_dtype, out=out)]]

    @staticmethod
    def _next_ready(transfer: SendTransfer, sent: dict[int, int], alive: Callable[[], bool]) -> list[tuple[int, int]]:
        """Wait for blocks that are final and not yet sent: (layer, blocks ready) in layer order."""
        while True:
            with transfer.changed:
                ready = [(layer, transfer.ready[layer]) for layer in sent if transfer.ready_tokens(layer) > sent[layer]]
                if not ready and not transfer.closed and alive():
                    transfer.changed.wait(1.0)
                    continue
            if transfer.closed or not alive():
                raise TransferEndedError(transfer.closed or "the receiver went away")
            return ready
