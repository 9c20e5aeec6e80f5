"""The KV frame: one header and the bytes of some KV blocks of one layer.

A frame is bound to its transfer, its epoch, its place in the stream, its layer and its blocks, and
carries a checksum over header and payload. A receiver that finds any of these different from what
it expects refuses the frame; nothing of a refused frame is ever used. docs/kv-protocol.md has the
table of fields, version by version.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

PROTOCOL_VERSION = 1
MAGIC = b"JWKV"

FLAG_END = 1
"""Last frame of a transfer; it has no payload and says how much was exposed."""
_KNOWN_FLAGS = FLAG_END
MAX_EXPOSED_US = (1 << 32) - 1

# magic, version, flags, transfer tag, epoch, sequence, layer, first block, blocks, payload bytes,
# exposed microseconds (END only), checksum.
_HEADER = struct.Struct("<4sHHQQIIIIIIQ")
HEADER_BYTES = _HEADER.size
_UNCHECKED = struct.Struct("<Q").size


class FrameRefusedError(ValueError):
    """A frame that must not be used; `reason` is a short word for the counter."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"KV frame refused ({reason}): {detail}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The fields of one frame. Blocks count from the first block of the prompt, not in either cache."""

    tag: int
    epoch: int
    sequence: int
    layer: int
    first_block: int
    num_blocks: int
    flags: int = 0
    exposed_us: int = 0


def transfer_tag(transfer_id: str) -> int:
    """64-bit tag of a transfer id, as it travels in every frame."""
    return xxhash.xxh3_64_intdigest(transfer_id.encode())


def encode(header: FrameHeader, payload: Sequence[memoryview | bytes] = ()) -> bytes:
    """Build one frame; the payload's pieces are copied exactly once."""
    digest = xxhash.xxh3_64()
    size = 0
    for piece in payload:
        digest.update(piece)
        size += memoryview(piece).nbytes
    unchecked = _pack(header, size, 0)[:-_UNCHECKED]
    digest.update(unchecked)
    return b"".join((unchecked, digest.intdigest().to_bytes(8, "little"), *payload))


def decode(frame: bytes) -> tuple[FrameHeader, memoryview]:
    """Check one frame and return its header and payload.

    Raises:
        FrameRefusedError: truncated, of another version, with a flag of another version, or its checksum
            does not match.
    """
    if len(frame) < HEADER_BYTES:
        raise FrameRefusedError("truncated", f"{len(frame)} bytes, a header has {HEADER_BYTES}")
    fields = _HEADER.unpack_from(frame)
    magic, version, flags, tag, epoch, sequence, layer, first, blocks, size, exposed, checksum = fields
    if magic != MAGIC or version != PROTOCOL_VERSION:
        raise FrameRefusedError("version", f"magic {magic!r} version {version}, this end speaks {PROTOCOL_VERSION}")
    payload = memoryview(frame)[HEADER_BYTES:]
    if payload.nbytes != size:
        raise FrameRefusedError("truncated", f"{payload.nbytes} payload bytes, the header says {size}")
    digest = xxhash.xxh3_64(payload)
    digest.update(memoryview(frame)[: HEADER_BYTES - _UNCHECKED])
    if digest.intdigest() != checksum:
        raise FrameRefusedError("checksum", f"layer {layer} sequence {sequence}")
    if flags & ~_KNOWN_FLAGS:
        raise FrameRefusedError("flags", f"flags {flags:#x}, this end knows {_KNOWN_FLAGS:#x}")
    return FrameHeader(tag, epoch, sequence, layer, first, blocks, flags, exposed), payload


def _pack(header: FrameHeader, size: int, checksum: int) -> bytes:
    return _HEADER.pack(
        MAGIC,
        PROTOCOL_VERSION,
        header.flags,
        header.tag,
        header.epoch,
        header.sequence,
        header.layer,
        header.first_block,
        header.num_blocks,
        size,
        header.exposed_us,
        checksum,
    )
