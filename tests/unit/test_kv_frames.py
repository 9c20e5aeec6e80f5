import struct

import pytest
import xxhash
from golden.make import FILES, HERE, TRANSFER, kv_frame, kv_frame_end, kv_frame_plain
from helpers.kv_rig import decode
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.actors.kv.frames import (
    FLAG_END,
    HEADER_BYTES,
    MAX_EXPOSED_US,
    PROTOCOL_VERSION,
    FrameHeader,
    FrameRefusedError,
    encode,
    transfer_tag,
)
from joinwise.proto import kv_pb2

_U8 = st.integers(0, 255)
_U16 = st.integers(0, (1 << 16) - 1)
_U32 = st.integers(0, (1 << 32) - 1)
_U64 = st.integers(0, (1 << 64) - 1)
_HEADERS = st.builds(
    FrameHeader,
    tag=_U64,
    epoch=_U64,
    sequence=_U32,
    layer=_U32,
    first_token=_U32,
    num_tokens=_U32,
    first_head=_U16,
    num_heads=_U16,
    encoding=_U8,
    flags=st.sampled_from((0, FLAG_END)),
    exposed_us=st.integers(0, MAX_EXPOSED_US),
)
_PIECES = st.lists(st.binary(max_size=300), max_size=4)


@settings(deadline=None)
@given(_HEADERS, _PIECES)
def test_round_trip(header: FrameHeader, pieces: list[bytes]) -> None:
    frame = encode(header, [memoryview(piece) for piece in pieces])
    assert len(frame) == HEADER_BYTES + sum(map(len, pieces))
    decoded, payload = decode(frame)
    assert decoded == header
    assert payload == b"".join(pieces)


@settings(deadline=None)
@given(_HEADERS, st.binary(max_size=200), st.data())
def test_a_flipped_byte_anywhere_is_refused(header: FrameHeader, payload: bytes, data: st.DataObject) -> None:
    frame = bytearray(encode(header, [payload]))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameRefusedError) as refused:
        decode(bytes(frame))
    assert refused.value.reason in {"version", "checksum"}


def test_every_single_byte_of_a_frame_is_covered() -> None:
    frame = kv_frame()
    reasons = set()
    for place in range(len(frame)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(frame)
            damaged[place] ^= flip
            with pytest.raises(FrameRefusedError) as refused:
                decode(bytes(damaged))
            reasons.add(refused.value.reason)
    assert reasons == {"version", "checksum"}


@pytest.mark.parametrize("make", [kv_frame, kv_frame_plain, kv_frame_end])
def test_every_truncation_and_extension_is_refused(make) -> None:
    frame = make()
    for length in range(len(frame)):
        with pytest.raises(FrameRefusedError) as refused:
            decode(frame[:length])
        assert refused.value.reason == "truncated"
    with pytest.raises(FrameRefusedError) as refused:
        decode(frame + b"\0")
    assert refused.value.reason == "truncated"


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(FrameRefusedError):
        decode(noise)


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, 0xFF])
def test_another_version_is_refused_and_named(version: int) -> None:
    frame = bytearray(kv_frame())
    frame[4] = version
    with pytest.raises(FrameRefusedError, match=f"version {version}, this end speaks {PROTOCOL_VERSION}") as refused:
        decode(bytes(frame))
    assert refused.value.reason == "version"


def test_a_flag_of_another_version_is_refused() -> None:
    with pytest.raises(FrameRefusedError) as refused:
        decode(encode(FrameHeader(1, 1, 0, flags=2), [b"x"]))
    assert refused.value.reason == "flags"


def test_tags_tell_transfers_apart() -> None:
    names = [f"{request}.{attempt}" for request in range(1000) for attempt in range(3)]
    assert len({transfer_tag(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", FILES)
def test_the_wire_is_what_it_was(name: str, golden) -> None:
    """Differs? Then released workers cannot read it: raise PROTOCOL_VERSION, then `make golden`."""
    golden(name, FILES[name]())


def test_golden_frame_field_by_field() -> None:
    """The table of docs/kv-protocol.md, independent of the code's own struct."""
    frame = (HERE / "kv_frame_v2.bin").read_bytes()
    assert HEADER_BYTES == 64
    assert frame[0:4] == b"JWKV"
    assert tuple(frame[4:8]) == (2, 0, kv_pb2.ENCODING_BLOCKS, 0)
    assert struct.unpack_from("<QQ", frame, 8) == (transfer_tag(TRANSFER), 42)
    assert struct.unpack_from("<IIII", frame, 24) == (5, 7, 96, 64)
    assert struct.unpack_from("<HHII", frame, 40) == (0, 0, 64, 0)
    assert struct.unpack_from("<QI", frame, 52) == (
        xxhash.xxh3_64_intdigest(bytes(range(64))),
        xxhash.xxh3_64_intdigest(frame[:60]) & 0xFFFFFFFF,
    )
    assert frame[64:] == bytes(range(64))
    plain = (HERE / "kv_frame_v2_plain.bin").read_bytes()
    assert tuple(plain[4:8]) == (2, 0, kv_pb2.ENCODING_PLAIN, 0)
    assert struct.unpack_from("<IIIIHHI", plain, 24) == (0, 1, 5, 2, 2, 3, 24)
    end = (HERE / "kv_frame_v2_end.bin").read_bytes()
    assert len(end) == 64
    assert tuple(end[4:8]) == (2, FLAG_END, 0, 0)
    assert struct.unpack_from("<II", end, 44) == (0, 1234)
