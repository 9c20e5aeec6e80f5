"""The KV frame: one header of 64 bytes, and the KV of some tokens of one layer.

A frame is bound to its transfer, its epoch, its place in the stream, its layer, heads and tokens,
and carries a checksum of its payload and one of the header itself, so that a header can be trusted
before its payload is read. A receiver that finds any of these different from what it expects refuses
the frame; nothing of a refused frame is ever used. docs/kv-protocol.md has
the table of fields, version by version.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from joinwise.kernels import kv_hash

PROTOCOL_VERSION = 2
MAGIC = b"JWKV"

FLAG_END = 1
"""Last frame of a transfer; it has no payload and says how much was exposed."""
_KNOWN_FLAGS = FLAG_END
MAX_EXPOSED_US = (1 << 32) - 1

# magic, version, flags, encoding, a reserved byte, transfer tag, epoch, sequence, layer, first token, tokens,
# first head, heads, payload bytes, exposed microseconds (END only), checksum of the payload; then the header's own.
_FIELDS = struct.Struct("<4sBBBxQQIIIIHHIIQ")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size


class FrameRefusedError(ValueError):
    """A frame that must not be used; `reason` is a short word for the counter."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"KV frame refused ({reason}): {detail}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The fields of one frame.

    Tokens count from the prompt's first; `layer` counts in the sender's layout, heads in the whole
    model (none in a frame of whole blocks). `encoding` is a value of `kv_pb2.Encoding`. A frame of
    whole blocks may end beyond the prompt: its last block is shipped whole.
    """

    tag: int
    epoch: int
    sequence: int
    layer: int = 0
    first_token: int = 0
    num_tokens: int = 0
    first_head: int = 0
    num_heads: int = 0
    encoding: int = 0
    flags: int = 0
    exposed_us: int = 0


@dataclass(frozen=True, slots=True)
class SealedHeader:
    """A header from the wire, its own checksum verified; the payload has yet to be."""

    header: FrameHeader
    payload_bytes: int
    payload_checksum: int

    def verify(self, checksum: int) -> None:
        """Compare the payload's checksum with that of what has arrived, see `kv_hash.digest`.

        Raises:
            FrameRefusedError: it does not match.
        """
        if checksum != self.payload_checksum:
            raise FrameRefusedError("checksum", f"layer {self.header.layer} sequence {self.header.sequence}")


def transfer_tag(transfer_id: str) -> int:
    """64-bit tag of a transfer id, as it travels in every frame."""
    return xxhash.xxh3_64_intdigest(transfer_id.encode())


def seal(
    header: FrameHeader, payload: Sequence[memoryview | bytes] = (), digest: Callable[[Any], int] = kv_hash.digest
) -> bytes:
    """The 64 bytes that go before a payload.

    Args:
        header: what they say.
        payload: contiguous pieces of bytes; not copied.
        digest: reads the payload, once, and tells its xxh3-64.
    """
    fields = _FIELDS.pack(
        MAGIC,
        PROTOCOL_VERSION,
        header.flags,
        header.encoding,
        header.tag,
        header.epoch,
        header.sequence,
        header.layer,
        header.first_token,
        header.num_tokens,
        header.first_head,
        header.num_heads,
        sum(map(len, payload)),
        header.exposed_us,
        digest(payload),
    )
    return fields + _CHECKSUM.pack(_own_checksum(fields))


def encode(header: FrameHeader, payload: Sequence[memoryview | bytes] = ()) -> bytes:
    """A whole frame in one piece; the payload's pieces are copied exactly once."""
    return b"".join((seal(header, payload), *payload))


def parse(raw: bytes) -> SealedHeader:
    """Check the 64 bytes of a header, whose payload may not have arrived yet.

    Raises:
        FrameRefusedError: truncated, of another version, with a flag of another version, or its own
            checksum does not match.
    """
    if len(raw) < HEADER_BYTES:
        raise FrameRefusedError("truncated", f"{len(raw)} bytes, a header has {HEADER_BYTES}")
    fields = _FIELDS.unpack_from(raw)
    magic, version, flags, encoding, tag, epoch, sequence, layer, first, tokens, head, heads = fields[:12]
    size, exposed, checksum = fields[12:]
    if magic != MAGIC or version != PROTOCOL_VERSION:
        raise FrameRefusedError("version", f"magic {magic!r} version {version}, this end speaks {PROTOCOL_VERSION}")
    if _own_checksum(raw[: _FIELDS.size]) != _CHECKSUM.unpack_from(raw, _FIELDS.size)[0]:
        raise FrameRefusedError("checksum", f"the header of sequence {sequence}")
    if flags & ~_KNOWN_FLAGS:
        raise FrameRefusedError("flags", f"flags {flags:#x}, this end knows {_KNOWN_FLAGS:#x}")
    header = FrameHeader(tag, epoch, sequence, layer, first, tokens, head, heads, encoding, flags, exposed)
    return SealedHeader(header, size, checksum)


def split(frame: bytes) -> tuple[SealedHeader, memoryview]:
    """Take a frame in one piece apart: its header, and its payload, which is not yet verified.

    Raises:
        FrameRefusedError: as for `parse`, or the payload is longer or shorter than the header says.
    """
    sealed = parse(frame[:HEADER_BYTES])
    payload = memoryview(frame)[HEADER_BYTES:]
    if payload.nbytes != sealed.payload_bytes:
        raise FrameRefusedError("truncated", f"{payload.nbytes} payload bytes, the header says {sealed.payload_bytes}")
    return sealed, payload


def _own_checksum(fields: bytes) -> int:
    return xxhash.xxh3_64_intdigest(fields) & 0xFFFFFFFF
