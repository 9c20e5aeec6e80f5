"""The receiving half of transfers: frames checked and copied into the KV blocks vLLM reserved.

A transfer is opened only when vLLM has allocated its blocks, and each frame goes from the wire into
them: straight, where a lane can write there and the layouts are equal, else through a landing
buffer. `LandingBudget` bounds the bytes in such buffers; beyond it a stream stops reading with one
frame in hand, so its sender stops (flow control), never the engine.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.frames import FLAG_END, FrameHeader, FrameRefusedError, SealedHeader, parse, split, transfer_tag
from joinwise.actors.kv.layout import CODECS, WHOLE, PeerPlan
from joinwise.kernels import kv_codec, kv_hash
from joinwise.proto import kv_pb2


class LandingBudget:
    """Bytes of KV that may be in memory between the wire and their blocks. `waits` counts what found no room."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self.used = self.waits = 0

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until `size` more bytes fit, and hold them; a payload larger than the limit goes alone."""
        with self._changed:
            if not self._fits(size):
                self.waits += 1
                self._changed.wait_for(lambda: self._fits(size))
            self.used += size
        try:
            yield
        finally:
            with self._changed:
                self.used -= size
                self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return self.used == 0 or self.used + size <= self._limit


@dataclass(frozen=True)
class FetchSpec:
    """What to fetch, from whom, into which blocks.

    `peers` are the KV addresses of all ranks of the sender. `first_token` counts from the prompt's
    first and begins a block here; `block_ids` are the local blocks, in prompt order, that start
    there. `timeout_s` bounds the wait for each frame after the first. The first may take as long as
    the sender's queue is, up to `start_s`: whether the sender still lives is told by its connection,
    not by a clock.
    """

    request_id: str
    transfer_id: str
    epoch: int
    peers: tuple[str, ...]
    first_token: int
    block_ids: tuple[int, ...]
    num_tokens: int
    timeout_s: float
    start_s: float = 600.0


@dataclass
class Importer:
    """Checks the frames of one stream and copies them into their blocks.

    `fence` may be called from any thread; once it has returned, nothing is written any more and
    `complete` says for good whether everything was.

    Args:
        spec: the transfer.
        blocks: the cache to write to.
        plan: what of it this stream brings.
        budget: bounds the payloads that are in memory and not yet in their blocks.
    """

    spec: FetchSpec
    blocks: KvBlocks
    plan: PeerPlan
    budget: LandingBudget
    complete: bool = False
    exposed_us: int = 0
    copying_s: float = 0.0
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _fenced: bool = False
    _sequence: int = 0
    _interrupt: Callable[[], None] | None = None
    _interrupting: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._tag = transfer_tag(self.spec.transfer_id)
        self._ours = dict(self.plan.layers)
        self.landed = dict.fromkeys(self._ours, self.spec.first_token)
        size = self.blocks.block_size
        whole = self.plan.encoding == WHOLE
        self._end = -(-self.spec.num_tokens // size) * size if whole else self.spec.num_tokens

    def accept(self, frame: bytes) -> int:
        """Use one frame that has arrived in one piece; a damaged payload as in `receive`.

        Returns:
            Payload bytes imported.

        Raises:
            FrameRefusedError: the frame is damaged, stale, misaddressed, out of order or of other tokens
                than asked for. The transfer cannot go on.
        """
        with self.budget.hold(len(frame)):
            sealed, payload = split(frame)
            if not self._is_payload(sealed):
                return 0
            if (views := self._place(sealed.header)) is not None:
                with self._unfenced():
                    begin = time.monotonic()
                    sealed.verify(kv_hash.scatter(payload, views))
                    self.copying_s += time.monotonic() - begin
            else:
                sealed.verify(kv_hash.digest([payload]))
                with self._unfenced():
                    self._write(sealed.header, payload)
            self._advance(sealed.header)
            return payload.nbytes

    def receive(self, raw: bytes, receive: Callable[[Sequence[memoryview]], int], *, direct: bool) -> int:
        """Use one frame whose payload has yet to be read.

        What a damaged payload leaves there is nobody's: the blocks are this transfer's, and it fails.

        Args:
            raw: its header.
            receive: fills views with the payload, in order, and tells its xxh3-64; interrupting the stream ends it.
            direct: let it fill the blocks themselves, where they are in main memory and of one layout.

        Returns:
            Payload bytes imported.

        Raises:
            FrameRefusedError: as for `accept`.
        """
        sealed = parse(raw)
        header, size = sealed.header, sealed.payload_bytes
        if not self._is_payload(sealed):
            return 0
        if direct and (views := self._place(header)) is not None:
            with self._unfenced():
                sealed.verify(receive(views))
        else:
            with self.budget.hold(size):
                payload = np.empty(size, np.uint8).data
                sealed.verify(receive([payload]))
                with self._unfenced():
                    self._write(header, payload)
        self._advance(header)
        return size

    @contextmanager
    def interrupted_by(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """While this lasts, `fence` calls `interrupt`: it must end a `receive` that waits for bytes."""
        with self._interrupting:
            self._interrupt = interrupt
        try:
            yield
        finally:
            with self._interrupting:
                self._interrupt = None

    @property
    def plain_bytes(self) -> int:
        """Bytes of everything it brings in the canonical layout, uncoded."""
        tokens, heads, size = self.spec.num_tokens - self.spec.first_token, self.plan.num_heads, self.plan.wire_dtype
        shapes = (self.blocks.rows(layer, tokens, heads) for _, layer in self.plan.layers)
        return sum(rows * head_dim * size.itemsize for rows, head_dim in shapes)

    def fence(self) -> None:
        """Write nothing from now on; ends and awaits a write that is under way."""
        self._fenced = True
        with self._interrupting:
            if self._interrupt is not None and not self.complete:
                self._interrupt()
        with self._writing:
            pass

    def _is_payload(self, sealed: SealedHeader) -> bool:
        """Whether a frame is the expected next one and has a payload; False for the end, which completes."""
        header = sealed.header
        if header.tag != self._tag:
            raise FrameRefusedError("misaddressed", f"frame of another transfer than {self.spec.transfer_id}")
        if header.epoch != self.spec.epoch:
            raise FrameRefusedError("stale_epoch", f"epoch {header.epoch}, expected {self.spec.epoch}")
        if header.sequence != self._sequence:
            raise FrameRefusedError("out_of_order", f"sequence {header.sequence}, expected {self._sequence}")
        self._sequence += 1
        if self.complete:
            raise FrameRefusedError("after_end", f"sequence {header.sequence} after the last frame")
        if header.flags & FLAG_END:
            self._finish(sealed)
            return False
        if header.layer not in self._ours:
            raise FrameRefusedError("layer", f"layer {header.layer} was not asked for")
        if header.encoding != self.plan.encoding:
            raise FrameRefusedError("encoding", f"encoding {header.encoding}, asked for {self.plan.encoding}")
        if (header.first_head, header.num_heads) != (self.plan.first_head, self.plan.num_heads):
            raise FrameRefusedError("range", f"layer {header.layer} brings other heads")
        after = header.first_token + header.num_tokens
        if header.first_token != self.landed[header.layer] or header.num_tokens < 1:
            raise FrameRefusedError("range", f"layer {header.layer} begins at token {header.first_token}")
        if after > self._end:
            raise FrameRefusedError("range", f"layer {header.layer} has {after - self._end} tokens too many")
        if self.plan.encoding == WHOLE and header.num_tokens % self.blocks.block_size:
            raise FrameRefusedError("range", f"layer {header.layer} brings {header.num_tokens} tokens: a broken block")
        low, high = self._expected_bytes(header)
        if not low <= sealed.payload_bytes <= high:
            raise FrameRefusedError("size", f"layer {header.layer} carries {sealed.payload_bytes} bytes")
        return True

    def _finish(self, sealed: SealedHeader) -> None:
        if sealed.payload_bytes or sealed.header.num_tokens:
            raise FrameRefusedError("size", f"the last frame carries {sealed.payload_bytes} bytes")
        missing = sum(landed != self._end for landed in self.landed.values())
        if missing:
            raise FrameRefusedError("incomplete", f"the end came with {missing} layers unfinished")
        with self._unfenced():
            self.exposed_us = sealed.header.exposed_us
            self.complete = True

    def _expected_bytes(self, header: FrameHeader) -> tuple[int, int]:
        """Fewest and most payload bytes that a frame of these tokens has."""
        layer = self._ours[header.layer]
        if self.plan.encoding == WHOLE:
            size = header.num_tokens // self.blocks.block_size * self.blocks.block_bytes[layer]
            return size, size
        rows, head_dim = self.blocks.rows(layer, header.num_tokens, header.num_heads)
        most = kv_codec.max_encoded_bytes(CODECS[self.plan.encoding], rows, head_dim, self.plan.wire_dtype)
        return (1 if self.plan.encoding == kv_pb2.ENCODING_LOSSLESS else most), most

    def _targets(self, header: FrameHeader) -> tuple[int, tuple[int, ...]]:
        """Our layer, and the blocks that a frame's tokens lie in."""
        size = self.blocks.block_size
        first = header.first_token - self.spec.first_token
        return self._ours[header.layer], self.spec.block_ids[first // size : -(-(first + header.num_tokens) // size)]

    def _place(self, header: FrameHeader) -> list[memoryview] | None:
        """The memory of a frame's blocks, where they are in main memory and of one layout."""
        return self.blocks.place(*self._targets(header)) if self.plan.encoding == WHOLE else None

    def _write(self, header: FrameHeader, payload: memoryview) -> None:
        begin = time.monotonic()
        layer, block_ids = self._targets(header)
        if self.plan.encoding == WHOLE:
            self.blocks.write(layer, block_ids, payload)
        else:
            heads = range(header.first_head, header.first_head + header.num_heads)
            first = (header.first_token - self.spec.first_token) % self.blocks.block_size
            self.blocks.unpack(
                layer, block_ids, first, heads, self._decode(layer, header, payload), self.plan.wire_dtype
            )
        self.copying_s += time.monotonic() - begin

    def _decode(self, layer: int, header: FrameHeader, payload: memoryview) -> memoryview:
        codec, dtype = CODECS[self.plan.encoding], self.plan.wire_dtype
        if codec == "none":
            return payload
        rows, head_dim = self.blocks.rows(layer, header.num_tokens, header.num_heads)
        plain = memoryview(bytearray(rows * head_dim * dtype.itemsize))
        try:
            kv_codec.decode(codec, payload, rows=rows, head_dim=head_dim, dtype=dtype, out=plain)
        except ValueError as error:
            raise FrameRefusedError("encoding", str(error)) from error
        return plain

    def _advance(self, header: FrameHeader) -> None:
        self.landed[header.layer] += header.num_tokens

    @contextmanager
    def _unfenced(self) -> Iterator[None]:
        with self._writing:
            if self._fenced:
                raise FrameRefusedError("fenced", "the transfer was cancelled")
            yield
