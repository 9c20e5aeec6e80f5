import struct

import pytest
from golden.make import FILES, HERE, TRANSFER, kv_frame, kv_frame_end
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.actors.kv.frames import (
    FLAG_END,
    HEADER_BYTES,
    MAX_EXPOSED_US,
    PROTOCOL_VERSION,
    FrameHeader,
    FrameRefusedError,
    decode,
    encode,
    transfer_tag,
)

_U32 = st.integers(0, (1 << 32) - 1)
_U64 = st.integers(0, (1 << 64) - 1)
_HEADERS = st.builds(
    FrameHeader,
    tag=_U64,
    epoch=_U64,
    sequence=_U32,
    layer=_U32,
    first_block=_U32,
    num_blocks=_U32,
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
    assert refused.value.reason in {"version", "truncated", "checksum"}


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
    assert reasons == {"version", "truncated", "checksum"}


@pytest.mark.parametrize("make", [kv_frame, kv_frame_end])
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


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, 0xFFFF])
def test_another_version_is_refused_and_named(version: int) -> None:
    frame = bytearray(kv_frame())
    struct.pack_into("<H", frame, 4, version)
    with pytest.raises(FrameRefusedError, match=f"version {version}, this end speaks {PROTOCOL_VERSION}") as refused:
        decode(bytes(frame))
    assert refused.value.reason == "version"


def test_a_flag_of_another_version_is_refused() -> None:
    with pytest.raises(FrameRefusedError) as refused:
        decode(encode(FrameHeader(1, 1, 0, 0, 0, 1, flags=2), [b"x"]))
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
    frame = (HERE / "kv_frame_v1.bin").read_bytes()
    assert HEADER_BYTES == 56
    assert frame[0:4] == b"JWKV"
    assert struct.unpack_from("<HH", frame, 4) == (1, 0)
    assert struct.unpack_from("<QQ", frame, 8) == (transfer_tag(TRANSFER), 42)
    assert struct.unpack_from("<IIII", frame, 24) == (5, 7, 3, 2)
    assert struct.unpack_from("<II", frame, 40) == (64, 0)
    assert frame[56:] == bytes(range(64))
    end = (HERE / "kv_frame_v1_end.bin").read_bytes()
    assert len(end) == 56
    assert struct.unpack_from("<HH", end, 4) == (1, FLAG_END)
    assert struct.unpack_from("<II", end, 40) == (0, 1234)
