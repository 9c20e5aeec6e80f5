"""The receiving half of transfers: frames checked and copied into the KV blocks vLLM reserved.

There is no landing copy: a transfer is opened only when vLLM has allocated its blocks, and each
frame goes from the wire into them. `LandingBudget` bounds the bytes being imported; beyond it a
stream stops reading with one frame in hand, so its sender stops (flow control), never the engine.
"""

import threading
from dataclasses import dataclass, field

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.frames import FLAG_END, FrameRefusedError, decode, transfer_tag


class LandingBudget:
    """Bytes of KV that may be in memory between the wire and their blocks."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self.used = 0

    def acquire(self, size: int) -> None:
        """Wait until `size` more bytes fit; one that is larger than the limit goes alone."""
        with self._changed:
            self._changed.wait_for(lambda: self.used == 0 or self.used + size <= self._limit)
            self.used += size

    def release(self, size: int) -> None:
        """Give bytes back."""
        with self._changed:
            self.used -= size
            self._changed.notify_all()


@dataclass(frozen=True)
class FetchSpec:
    """What to fetch, from whom, into which blocks.

    `first_block` counts from the prompt's first block; `block_ids` are the local blocks, in prompt
    order, that start there. `timeout_s` bounds the wait for
    each frame after the first. The first may take as long as the sender's queue is, up to `start_s`:
    whether the sender still lives is told by its connection, not by a clock.
    """

    request_id: str
    transfer_id: str
    epoch: int
    peer: str
    first_block: int
    block_ids: tuple[int, ...]
    num_tokens: int
    timeout_s: float
    start_s: float = 600.0


@dataclass
class FetchReport:
    """What one fetch did. Seconds of the receiver's clock; `exposed_seconds` as DESIGN defines it."""

    request_id: str
    bytes: int = 0
    wire_seconds: float = 0.0
    exposed_seconds: float = 0.0
    import_seconds: float = 0.0
    transport: str = "grpc"
    failure: str = ""
    local_hit_blocks: int = 0


@dataclass
class Importer:
    """Checks the frames of one transfer and copies them into their blocks.

    `fence` may be called from any thread; once it has returned, nothing is written any more and
    `complete` says for good whether everything was.
    """

    spec: FetchSpec
    blocks: KvBlocks
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _fenced: bool = False
    _sequence: int = 0
    _landed: list[int] = field(default_factory=list)
    complete: bool = False
    exposed_us: int = 0

    def __post_init__(self) -> None:
        self._tag = transfer_tag(self.spec.transfer_id)
        self._landed = [0] * len(self.blocks.layer_names)

    def accept(self, frame: bytes) -> int:
        """Use one frame.

        Returns:
            Payload bytes imported.

        Raises:
            FrameRefusedError: the frame is damaged, stale, misaddressed, out of order or of other blocks
                than asked for. The transfer cannot go on.
        """
        header, payload = decode(frame)
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
            if payload.nbytes or header.num_blocks:
                raise FrameRefusedError("size", f"the last frame carries {payload.nbytes} bytes")
            missing = sum(landed != len(self.spec.block_ids) for landed in self._landed)
            if missing:
                raise FrameRefusedError("incomplete", f"the end came with {missing} layers unfinished")
            with self._lock:
                if self._fenced:
                    raise FrameRefusedError("fenced", "the transfer was cancelled")
                self.exposed_us = header.exposed_us
                self.complete = True
            return 0
        if header.layer >= len(self._landed):
            raise FrameRefusedError("layer", f"layer {header.layer} of {len(self._landed)}")
        offset = header.first_block - self.spec.first_block
        if offset != self._landed[header.layer] or header.num_blocks < 1:
            raise FrameRefusedError("range", f"layer {header.layer} begins at block {header.first_block}")
        targets = self.spec.block_ids[offset : offset + header.num_blocks]
        if len(targets) != header.num_blocks:
            raise FrameRefusedError("range", f"layer {header.layer} has {header.num_blocks} blocks too many")
        if payload.nbytes != header.num_blocks * self.blocks.block_bytes[header.layer]:
            raise FrameRefusedError("size", f"layer {header.layer} carries {payload.nbytes} bytes")
        with self._lock:
            if self._fenced:
                raise FrameRefusedError("fenced", "the transfer was cancelled")
            self.blocks.write(header.layer, targets, payload)
        self._landed[header.layer] += header.num_blocks
        return payload.nbytes

    def fence(self) -> None:
        """Write nothing from now on; waits for a write that is under way."""
        with self._lock:
            self._fenced = True
