"""KV codecs: the native kernels against the reference, errors within their bounds, and hostile bytes."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backports import zstd
from helpers import gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from joinwise.kernels import native
from joinwise.kernels.kv_codec import LOSSY, decode, encode, max_encoded_bytes, native_calls, pays, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
INTEGERS = {2: torch.int16, 4: torch.int32}
OUTLIER = 30.0
# More than a chunk of the lossless codec, and enough rows to share among threads.
MANY = (9000, 64)


@pytest.fixture(scope="module")
def plain_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same sources without this processor's vector instructions."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    target = tmp_path_factory.mktemp("plain") / "plain.so"
    sources = [str(file) for file in native.sources() if file.parent.name == "kv_codec"]
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-DJOINWISE_PLAIN"]
    subprocess.run(["g++", *options, *sources, "-o", str(target)], check=True, timeout=100)
    return native_calls._declared(ctypes.CDLL(str(target)))


@pytest.fixture(params=["vectors", "plain", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way on a CPU: the native kernels as built and in their portable form, and plain torch."""
    if request.param == "plain":
        plain = request.getfixturevalue("plain_library")
        monkeypatch.setattr(native_calls, "library", lambda: plain)
    elif request.param == "reference":
        monkeypatch.setattr(native_calls, "library", lambda: None)
    elif native_calls.library() is None:
        pytest.skip("the native kernels were not built (no g++?)")
    return request.param


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


def kv(rows: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers with a few channels far out, as keys have them."""
    numbers = torch.randn(rows, head_dim, generator=torch.Generator().manual_seed(seed))
    numbers[:, 1::29] *= OUTLIER
    return numbers.to(dtype)


def odd_rows(dtype: torch.dtype) -> torch.Tensor:
    """Rows of 19 numbers of any bits; and special ones, each alone and with an ordinary number beside it."""
    limits = torch.finfo(dtype)
    bits = torch.randint(-(2 ** (limits.bits - 1)), 2 ** (limits.bits - 1), (3000, 19), dtype=torch.int64)
    wild = bits.to(INTEGERS[dtype.itemsize]).view(dtype)
    edges = [2.0**e * f for e in (-126, -101, -100, -99, -24, 0, 15, 126, 127) for f in (1.0, 1.0 - 2**-8, 1.0 + 2**-7)]
    edges += [0.0, float("inf"), float("nan"), limits.max, limits.tiny, limits.smallest_normal / 2, 65504.0, 1e-44]
    special = torch.zeros(4 * len(edges), 19)
    for i, edge in enumerate(edges):
        special[4 * i : 4 * i + 4, i % 19] = torch.tensor([edge, -edge, edge, -edge])
        special[4 * i + 2 : 4 * i + 4, (i + 1) % 19] = 1.0
    calm = torch.randn(1000, 19) * torch.logspace(-6, 4, 1000)[:, None]  # any bits are mostly NaN or far too large
    return torch.cat([wild, special.to(dtype), calm.to(dtype)])


def ties(codec: str) -> torch.Tensor:
    """Rows whose scale is 1 (and so exact), of every number halfway between two codes, and its two neighbours."""
    if codec == "int8":
        codes = torch.arange(-127, 128).float()
    else:
        codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = torch.cat([-codes.flip(0), codes])
    middles = (codes[1:] + codes[:-1]) / 2
    near = [middles, torch.nextafter(middles, middles + 1), torch.nextafter(middles, middles - 1), codes]
    numbers = torch.cat(near)
    return torch.cat([numbers, torch.tensor([reference.TOP[codec]])])[None]


def encoded_by_reference(codec: str, numbers: torch.Tensor) -> torch.Tensor:
    scales, codes = torch.empty(len(numbers)), torch.empty(numbers.shape, dtype=torch.uint8)
    reference.quantize(codec, numbers, scales, codes)
    return torch.cat([flat(scales), codes.flatten()])


def encoded(codec: str, numbers: torch.Tensor, **options: Any) -> torch.Tensor:
    """Encoded between two guards, which must survive."""
    size = max_encoded_bytes(codec, *numbers.shape, numbers.dtype)
    room = torch.full((size + 64,), 0xA5, dtype=torch.uint8)
    out = room[32 : 32 + size]
    written = encode(codec, flat(numbers), head_dim=numbers.shape[1], dtype=numbers.dtype, out=out, **options)
    assert (room[:32] == 0xA5).all() and (room[32 + written :] == 0xA5).all()
    return out[:written]


def decoded(codec: str, data: torch.Tensor, like: torch.Tensor, **options: Any) -> torch.Tensor:
    """Decoded between two guards, which must survive."""
    size = like.numel() * like.dtype.itemsize
    room = torch.full((size + 64,), 0xA5, dtype=torch.uint8)
    rows, head_dim = like.shape
    try:
        decode(codec, data, rows=rows, head_dim=head_dim, dtype=like.dtype, out=room[32 : 32 + size], **options)
    finally:
        assert (room[:32] == 0xA5).all() and (room[32 + size :] == 0xA5).all()
    return room[32 : 32 + size].clone().view(like.dtype).view(like.shape)


def same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits, but any NaN equals any other."""
    kind = INTEGERS[one.dtype.itemsize]
    return bool(((one.view(kind) == other.view(kind)) | (one.isnan() & other.isnan())).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", LOSSY)
def test_encodes_every_bit_as_the_reference_does(path: str, codec: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for numbers in (odd_rows(dtype), ties(codec).to(dtype), kv(33, 128, dtype), kv(5, 576, dtype), kv(7, 1, dtype)):
        assert torch.equal(encoded(codec, numbers), encoded_by_reference(codec, numbers))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", LOSSY)
def test_decodes_any_bytes_as_the_reference_does(path: str, codec: str, dtype: torch.dtype) -> None:
    """Every code at scales of any bits: NaN, infinite, subnormal, negative."""
    torch.manual_seed(2)
    scales = torch.cat([torch.randint(-(2**31), 2**31, (2000,)).int().view(torch.float32), torch.logspace(-12, 6, 500)])
    codes = torch.arange(256).to(torch.uint8).repeat(len(scales), 1)
    wanted = torch.empty(codes.shape, dtype=dtype)
    reference.dequantize(codec, scales, codes, wanted)
    assert same_numbers(decoded(codec, torch.cat([flat(scales), codes.flatten()]), wanted), wanted)


def test_the_reference_rounds_ties_to_even() -> None:
    """By hand: a row with the scale 1."""
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert encoded_by_reference("int8", row)[4:].view(torch.int8).tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    row = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 1.0625, 432.0]])
    codes = encoded_by_reference("fp8", row)[4:].view(torch.float8_e4m3fn).float()
    assert codes.tolist() == [448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8, 1.0, 448.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("codec", "share_of_peak", "share_of_number"), [("int8", 0.5 / 127, 0), ("fp8", 2**-10 / 448, 2**-4)], ids=LOSSY
)
def test_error_is_at_most_half_a_code(
    path: str, codec: str, share_of_peak: float, share_of_number: float, dtype: torch.dtype
) -> None:
    numbers = kv(500, 128, dtype)
    found = decoded(codec, encoded(codec, numbers), numbers).double()
    wanted = numbers.double()
    rounding = 1e-6 + torch.finfo(dtype).eps / 2  # scaling, and the result's own type
    allowed = torch.maximum(share_of_peak * wanted.abs().amax(1, keepdim=True), share_of_number * wanted.abs())
    assert ((found - wanted).abs() <= allowed + rounding * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**127])
def test_a_row_that_is_not_finite_is_nan_as_a_whole(path: str, codec: str, bad: float) -> None:
    numbers = kv(3, 16, torch.float32)
    numbers[1, 5] = bad
    found = decoded(codec, encoded(codec, numbers), numbers)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("codec", LOSSY)
def test_zeros_and_tiny_rows_are_zeros(path: str, codec: str) -> None:
    numbers = torch.zeros(3, 16)
    numbers[1, 3], numbers[2, 3] = 2.0**-101, 2.0**-100
    data = encoded(codec, numbers)
    assert not data[: 2 * 4].any() and not data[12 : 12 + 32].any()
    found = decoded(codec, data, numbers)
    assert not found[:2].any() and found[2, 3] == pytest.approx(2.0**-100)


@pytest.mark.parametrize("dtype", HALVES)
def test_lossless_is(path: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    torch.manual_seed(3)
    noise = torch.randint(-(2**15), 2**15, MANY).to(torch.int16).view(dtype)
    for numbers in (every, noise, kv(*MANY, dtype), torch.zeros(MANY, dtype=dtype), kv(1, 1, dtype)):
        found = decoded("lossless", encoded("lossless", numbers), numbers)
        assert torch.equal(found.view(torch.int16), numbers.view(torch.int16))


def test_lossless_halves_exponents_and_stores_noise_raw() -> None:
    numbers = kv(*MANY, torch.bfloat16)
    assert len(encoded("lossless", numbers)) < 0.72 * 2 * numbers.numel()
    assert len(encoded("lossless", kv(*MANY, torch.float16))) < 0.92 * 2 * numbers.numel()
    noise = torch.randint(-(2**15), 2**15, MANY).to(torch.int16).view(torch.bfloat16)
    assert len(encoded("lossless", noise)) == max_encoded_bytes("lossless", *MANY, torch.bfloat16)


def test_native_and_reference_read_each_others_lossless_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    if native_calls.library() is None:
        pytest.skip("the native kernels were not built (no g++?)")
    numbers = kv(*MANY, torch.bfloat16)
    data = encoded("lossless", numbers)
    monkeypatch.setattr(native_calls, "library", lambda: None)
    assert torch.equal(encoded("lossless", numbers), data)
    assert torch.equal(decoded("lossless", data, numbers), numbers)


@pytest.mark.parametrize("codec", ["none", "int8", "fp8", "lossless"])
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(codec: str, threads: int) -> None:
    numbers = kv(20011, 64, torch.bfloat16)
    data = encoded(codec, numbers)
    assert torch.equal(encoded(codec, numbers, threads=threads), data)
    assert torch.equal(decoded(codec, data, numbers, threads=threads), decoded(codec, data, numbers))


@pytest.mark.parametrize("codec", ["none", "int8", "fp8", "lossless"])
@pytest.mark.parametrize("offset", [0, 1])
def test_any_buffer_at_any_address(path: str, codec: str, offset: int) -> None:
    numbers = kv(50, 24, torch.bfloat16)
    payload = bytearray(offset) + bytearray(flat(numbers).numpy())
    size = max_encoded_bytes(codec, 50, 24, torch.bfloat16)
    wire, landed = bytearray(offset + size), bytearray(len(payload))
    shape: Any = {"head_dim": 24, "dtype": torch.bfloat16}
    written = encode(codec, memoryview(bytes(payload))[offset:], out=memoryview(wire)[offset:], **shape)
    assert bytes(wire[offset : offset + written]) == encoded(codec, numbers).numpy().tobytes()
    read_only = memoryview(bytes(wire))[offset : offset + written]
    decode(codec, read_only, rows=50, out=memoryview(landed)[offset:], **shape)
    assert bytes(landed[offset:]) == flat(decoded(codec, encoded(codec, numbers), numbers)).numpy().tobytes()


@pytest.mark.parametrize("codec", ["none", "int8", "fp8", "lossless"])
def test_no_rows_are_no_bytes(codec: str) -> None:
    nothing = torch.empty(0, 8, dtype=torch.bfloat16)
    assert len(encoded(codec, nothing)) == 0
    assert decoded(codec, torch.empty(0, dtype=torch.uint8), nothing).numel() == 0


@pytest.mark.parametrize(
    ("codec", "dtype", "size"),
    [
        ("none", torch.bfloat16, 3 * 8 * 2),
        ("int8", torch.float32, 3 * 12),
        ("fp8", torch.float16, 3 * 12),
        ("lossless", torch.float16, 3 * 8 * 2 + 4),
    ],
)
def test_sizes(codec: str, dtype: torch.dtype, size: int) -> None:
    assert max_encoded_bytes(codec, 3, 8, dtype) == size


BAD_ENCODE: dict[str, tuple[dict[str, Any], str]] = {
    "codec": ({"codec": "int4"}, "no codec 'int4'"),
    "dtype": ({"dtype": torch.float64}, "does not encode torch.float64"),
    "lossless float32": ({"codec": "lossless", "dtype": torch.float32}, "does not encode torch.float32"),
    "head_dim": ({"head_dim": 0}, "rows of 0 numbers"),
    "threads": ({"threads": 0}, "0 threads"),
    "no whole row": ({"payload": torch.zeros(65, dtype=torch.uint8)}, "no whole number of rows"),
    "small out": ({"out": torch.zeros(79, dtype=torch.uint8)}, "80 are needed"),
    "read-only out": ({"out": memoryview(bytes(80))}, "cannot be written"),
    "typed payload": ({"payload": torch.zeros(32)}, "flat contiguous uint8"),
    "strided payload": ({"payload": torch.zeros(256, dtype=torch.uint8)[::2]}, "flat contiguous uint8"),
}


@pytest.mark.parametrize("case", BAD_ENCODE)
def test_encode_refuses(case: str) -> None:
    change, message = BAD_ENCODE[case]
    arguments: dict[str, Any] = {
        "codec": "int8",
        "payload": torch.ones(128, dtype=torch.uint8),
        "head_dim": 16,
        "dtype": torch.bfloat16,
        "out": torch.zeros(80, dtype=torch.uint8),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        encode(**arguments)
    assert not bytes(arguments["out"]).strip(b"\0")


BAD_DECODE: dict[str, tuple[dict[str, Any], str]] = {
    "codec": ({"codec": ""}, "no codec ''"),
    "dtype": ({"dtype": torch.int8}, "does not encode torch.int8"),
    "short": ({"encoded": torch.ones(79, dtype=torch.uint8)}, "79 encoded bytes"),
    "long": ({"encoded": torch.ones(81, dtype=torch.uint8)}, "81 encoded bytes"),
    "long lossless": ({"codec": "lossless", "encoded": torch.ones(133, dtype=torch.uint8)}, "133 encoded bytes"),
    "rows": ({"rows": -4}, "-4 rows"),
    "huge": ({"rows": 2**62}, "80 encoded bytes"),
    "small out": ({"out": torch.zeros(127, dtype=torch.uint8)}, "128 are needed"),
    "large out": ({"out": torch.zeros(129, dtype=torch.uint8)}, "128 are needed"),
    "threads": ({"threads": -1}, "-1 threads"),
}


@pytest.mark.parametrize("case", BAD_DECODE)
def test_decode_refuses(case: str) -> None:
    change, message = BAD_DECODE[case]
    arguments: dict[str, Any] = {
        "codec": "int8",
        "encoded": torch.ones(80, dtype=torch.uint8),
        "rows": 4,
        "head_dim": 16,
        "dtype": torch.bfloat16,
        "out": torch.zeros(128, dtype=torch.uint8),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        decode(**arguments)
    assert not arguments["out"].any()


def test_buffers_that_overlap_are_refused() -> None:
    both = torch.ones(200, dtype=torch.uint8)
    with pytest.raises(ValueError, match="share bytes"):
        encode("int8", both[:128], head_dim=16, dtype=torch.bfloat16, out=both[120:])
    with pytest.raises(ValueError, match="share bytes"):
        decode("int8", both[:80], rows=4, head_dim=16, dtype=torch.bfloat16, out=both[72:])
    assert both.all()
    encode("int8", both[:64], head_dim=16, dtype=torch.bfloat16, out=both[64:104])  # neighbours do not


def of_chunk(high: bytes, low: int = 64) -> bytes:
    return struct.pack("<I", len(high)) + bytes(low) + high


HOSTILE = {
    "empty": b"",
    "lengths only": struct.pack("<I", 20),
    "no high bytes": of_chunk(b""),
    "length beyond the chunk": of_chunk(bytes(65)),
    "length beyond the bytes": struct.pack("<I", 64) + bytes(64) + bytes(10),
    "length short of the bytes": struct.pack("<I", 3) + bytes(64) + bytes(10),
    "largest length": struct.pack("<I", 2**32 - 1) + bytes(64) + bytes(10),
    "no zstd": of_chunk(b"\xff" * 20),
    "fewer numbers": of_chunk(zstd.compress(bytes(63))),
    "more numbers": of_chunk(zstd.compress(bytes(65))),
    "a bomb": of_chunk(zstd.compress(bytes(1 << 20))),
    "two frames": of_chunk(zstd.compress(bytes(64)) + zstd.compress(b"")),
    "a frame cut short": of_chunk(zstd.compress(bytes(64))[:-1]),
    "a window of 128 MiB": of_chunk(b"\x28\xb5\x2f\xfd\x00\x88\x01\x00\x00"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_lossless_bytes_are_refused(path: str, case: str) -> None:
    like = torch.empty(4, 16, dtype=torch.bfloat16)
    data = torch.frombuffer(bytearray(HOSTILE[case]), dtype=torch.uint8) if HOSTILE[case] else torch.empty(0).byte()
    with pytest.raises(ValueError, match=r"bytes|frame"):
        decoded("lossless", data, like)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_lossless_bytes_decode_or_raise_value_error(data: st.DataObject) -> None:
    """Bytes of a payload with some changed, cut or added."""
    numbers = kv(data.draw(st.integers(1, 40)), 8, torch.bfloat16)
    wire = bytearray(encoded("lossless", numbers).numpy())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire[at] = data.draw(st.integers(0, 255))
    wire = wire[: data.draw(st.integers(0, len(wire)))] if data.draw(st.booleans()) else wire
    wire += data.draw(st.binary(max_size=12))
    try:
        decoded("lossless", torch.tensor(list(wire), dtype=torch.uint8), numbers)
    except ValueError:
        assert bytes(wire) != encoded("lossless", numbers).numpy().tobytes()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(LOSSY),
    st.sampled_from(FLOATS),
    st.integers(0, 20),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
)
def test_native_is_the_reference_for_any_shape_and_bytes(
    codec: str, dtype: torch.dtype, rows: int, head_dim: int, seed: int
) -> None:
    some = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows * head_dim * dtype.itemsize,), dtype=torch.uint8, generator=some)
    numbers = raw.view(dtype).view(rows, head_dim)
    assert torch.equal(encoded(codec, numbers), encoded_by_reference(codec, numbers) if rows else raw)
    wire = torch.randint(0, 256, (rows * (4 + head_dim),), dtype=torch.uint8, generator=some)
    wanted = torch.empty_like(numbers)
    scales = wire[: 4 * rows].view(torch.float32)
    reference.dequantize(codec, scales, wire[4 * rows :].view(rows, head_dim), wanted)
    assert same_numbers(decoded(codec, wire, numbers), wanted)


@pytest.mark.parametrize(
    ("link", "encoder", "decoder", "ratio", "expected"),
    [
        (1e9, 8e9, 8e9, 0.5, True),
        (10e9, 8e9, 9e9, 0.5, False),  # encoding is slower than the link
        (8.5e9, 9e9, 8e9, 0.5, False),  # decoding is
        (7.9e9, 8e9, 8e9, 0.99, True),
        (8e9, 8e9, 8e9, 0.5, False),  # nothing gained
        (1e6, 8e9, 8e9, 1.0, False),
        (1e6, 8e9, 8e9, 1.1, False),
    ],
)
def test_a_codec_pays_where_the_link_is_what_is_slow(
    link: float, encoder: float, decoder: float, ratio: float, expected: bool
) -> None:
    assert pays(link, encoder, decoder, ratio) is expected


@given(*[st.floats(1e3, 1e12)] * 3, st.floats(0.01, 2.0))
def test_a_slower_link_never_makes_a_codec_worth_less(
    link: float, encoder: float, decoder: float, ratio: float
) -> None:
    assert pays(link / 2, encoder, decoder, ratio) or not pays(link, encoder, decoder, ratio)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_pays_refuses_what_is_no_speed(position: int, value: float) -> None:
    numbers = [1e9, 1e9, 1e9, 0.5]
    numbers[position] = value
    with pytest.raises(ValueError, match="above zero"):
        pays(*numbers)


def compare_triton(codec: str, dtype: torch.dtype, device: str) -> None:
    """Encode and decode with both, and find the same bytes and numbers."""
    from joinwise.kernels.kv_codec import triton_kernels

    torch.manual_seed(4)
    for numbers in (odd_rows(dtype), ties(codec).to(dtype), kv(33, 128, dtype)):
        there = numbers.to(device)
        scales, codes = torch.zeros(len(there), device=device), torch.zeros_like(there, dtype=torch.uint8)
        triton_kernels.quantize(codec, there, scales, codes)
        found = torch.cat([flat(scales), codes.flatten()]).cpu()
        assert torch.equal(found, encoded_by_reference(codec, numbers)), (codec, dtype)
    # Triton's interpreter cuts off what does not fit bfloat16.
    kinds = FLOATS if device == "cuda" else (torch.float32, torch.float16)
    codes = torch.arange(256, device=device).to(torch.uint8).repeat(40, 1)
    scales = torch.logspace(-7, 1, 40, device=device)
    for kind in kinds:
        found, wanted = torch.zeros(2, *codes.shape, dtype=kind, device=device).unbind()
        triton_kernels.dequantize(codec, scales, codes, found)
        reference.dequantize(codec, scales, codes, wanted)
        assert same_numbers(found, wanted), (codec, kind)


def test_triton_interpreted() -> None:
    """In a process of its own: whether kernels are interpreted is settled when Triton is imported."""
    pytest.importorskip("triton")
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["compared", str(len(LOSSY) * len(FLOATS))]


needs_cuda = gpu.needs_cuda("Triton kernels of the codecs")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", FLOATS)
def test_on_a_device(codec: str, dtype: torch.dtype) -> None:
    compare_triton(codec, dtype, "cuda")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("codec", ["none", "int8", "fp8"])
@pytest.mark.parametrize("wire", ["cpu", "cuda"])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_device_and_a_cpu_meet(codec: str, wire: str, offset: int) -> None:
    numbers = kv(300, 96, torch.bfloat16)
    size = max_encoded_bytes(codec, *numbers.shape, numbers.dtype)
    payload = torch.cat([torch.zeros(offset, dtype=torch.uint8), flat(numbers)]).cuda()[offset:]
    out = torch.zeros(offset + size, dtype=torch.uint8, device=wire)[offset:]
    assert encode(codec, payload, head_dim=96, dtype=numbers.dtype, out=out) == size
    assert torch.equal(out.cpu(), encoded(codec, numbers))
    landed = torch.zeros(offset + payload.numel(), dtype=torch.uint8, device="cuda")[offset:]
    decode(codec, out, rows=300, head_dim=96, dtype=numbers.dtype, out=landed)
    assert torch.equal(landed.cpu(), flat(decoded(codec, encoded(codec, numbers), numbers)))


@pytest.mark.gpu
@needs_cuda
def test_a_device_refuses_what_lies_elsewhere() -> None:
    host, device = torch.zeros(256, dtype=torch.uint8), torch.zeros(128, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match="encoded bytes on cuda"):
        encode("int8", host[:64], head_dim=16, dtype=torch.bfloat16, out=device)
    with pytest.raises(ValueError, match="lossless works on a CPU"):
        encode("lossless", device, head_dim=16, dtype=torch.bfloat16, out=host)


if __name__ == "__main__":
    for each in LOSSY:
        for kind in FLOATS:
            compare_triton(each, kind, "cpu")
    print("compared", len(LOSSY) * len(FLOATS))
