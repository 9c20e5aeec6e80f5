"""bfloat16 and float16 in fewer bytes, bit for bit: what varies little is set apart, and coded by zstd.

Exponents of keys and values take few values, signs and fractions nearly all. So each number is turned left by one bit
and split: the high byte (exponent; for float16 also the first bits of the fraction) is entropy-coded, the low byte (the
rest, and the sign) travels as it is. DFloat11 does so for weights (Zhang et al. 2025, arXiv 2504.11651).

Wire, little-endian, of `n` numbers in chunks of 262,144:

    uint32 [chunks]   bytes of each chunk's high bytes; as many as the chunk has numbers: stored raw
    uint8  [n]        low bytes
    uint8  [...]      high bytes, chunk after chunk, each a zstd frame or raw
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from backports import zstd

from joinwise.kernels.kv_codec import native_calls, reference
from joinwise.kernels.kv_pack.buffers import Bytes

_CHUNK = 1 << 18
# Huffman coding is all that helps here. zstd's own levels lose most of their time to a search for matches, and those
# that it finds cost more than they save; with a table of 64 entries it finds next to none.
_ENCODE: dict[int, int] = {
    zstd.CompressionParameter.compression_level: 1,
    zstd.CompressionParameter.window_log: 17,
    zstd.CompressionParameter.hash_log: 6,
    zstd.CompressionParameter.min_match: 7,
}
# The memory that a hostile frame can claim.
_DECODE: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 18}

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def max_encoded_bytes(numbers: int) -> int:
    """Bytes of so many numbers where nothing can be saved."""
    return 4 * len(_chunks(numbers)) + 2 * numbers


def encode(payload: torch.Tensor, out: torch.Tensor, threads: int) -> int:
    """Encode numbers.

    Args:
        payload: uint8 [2 * n] on a CPU.
        out: uint8 [at least `max_encoded_bytes(n)`] on a CPU.
        threads: to use at most.

    Returns:
        Bytes written.
    """
    numbers = payload.numel() // 2
    chunks = _chunks(numbers)
    end = 4 * len(chunks) + numbers
    low, wire, lengths = out[end - numbers : end], memoryview(out.numpy()), []
    for coded in _each(functools.partial(_encode_chunk, payload, low), chunks, threads):
        wire[end : end + len(coded)] = coded
        end += len(coded)
        lengths.append(len(coded))
    struct.pack_into(f"<{len(chunks)}I", wire, 0, *lengths)
    return end


def decode(encoded: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """Decode numbers.

    Args:
        encoded: uint8, any bytes, on a CPU.
        out: uint8 [2 * n] on a CPU.
        threads: to use at most.

    Raises:
        ValueError: those bytes are not n numbers; `out` then holds anything.
    """
    numbers = out.numel() // 2
    chunks = _chunks(numbers)
    end = 4 * len(chunks) + numbers
    if encoded.numel() < end:
        raise ValueError(f"{encoded.numel()} bytes for {numbers} numbers, which take more than {end}")
    low, wire, pieces = encoded[end - numbers : end], memoryview(encoded.numpy()), []
    for chunk, length in zip(chunks, struct.unpack_from(f"<{len(chunks)}I", wire), strict=True):
        if length > len(chunk):
            raise ValueError(f"a chunk of {len(chunk)} numbers in {length} bytes")
        pieces.append((chunk, wire[end : end + length]))
        end += length
    if encoded.numel() != end:
        raise ValueError(f"{encoded.numel()} bytes, where the lengths of the chunks say {end}")
    for _ in _each(functools.partial(_decode_chunk, low, out), pieces, threads):
        pass


def _chunks(numbers: int) -> list[range]:
    return [range(at, min(at + _CHUNK, numbers)) for at in range(0, numbers, _CHUNK)]


def _each(work: Callable[[_Job], _Result], jobs: Iterable[_Job], threads: int) -> Iterator[_Result]:
    """The results in the order of the jobs."""
    if threads == 1:
        yield from map(work, jobs)
        return
    with ThreadPoolExecutor(threads, "kv-codec") as pool:
        yield from pool.map(work, jobs)


def _encode_chunk(payload: torch.Tensor, low: torch.Tensor, chunk: range) -> bytes | memoryview:
    """Write the chunk's low bytes; returns its high bytes, coded or raw."""
    numbers, low = payload[2 * chunk.start : 2 * chunk.stop], low[chunk.start : chunk.stop]
    high = torch.empty_like(low)
    if lib := native_calls.library():
        native_calls.split(lib, numbers.data_ptr(), high.data_ptr(), low.data_ptr(), len(chunk))
    else:
        reference.split(numbers.clone().view(torch.int16), high, low)
    raw = memoryview(high.numpy())
    coded = zstd.compress(raw, options=_ENCODE)
    return coded if len(coded) < len(raw) else raw


def _decode_chunk(low: torch.Tensor, out: torch.Tensor, piece: tuple[range, memoryview]) -> None:
    chunk, coded = piece
    raw = Bytes(coded if len(coded) == len(chunk) else _decompressed(coded, len(chunk)), writable=False)
    numbers, low = out[2 * chunk.start : 2 * chunk.stop], low[chunk.start : chunk.stop]
    if lib := native_calls.library():
        native_calls.join(lib, numbers.data_ptr(), raw.address, low.data_ptr(), len(chunk))
    else:
        values = torch.empty(len(chunk), dtype=torch.int16)
        reference.join(raw.tensor(), low, values)
        numbers.copy_(values.view(torch.uint8))


def _decompressed(coded: memoryview, size: int) -> bytes:
    """Exactly one frame of exactly `size` bytes; no more than that is ever made of it."""
    frame = zstd.ZstdDecompressor(options=_DECODE)
    try:
        raw = frame.decompress(coded, max_length=size + 1)
    except zstd.ZstdError as error:
        raise ValueError(f"a chunk is no zstd frame: {error}") from error
    if len(raw) != size or not frame.eof or frame.unused_data:
        raise ValueError(f"a chunk is not one zstd frame of {size} bytes")
    return raw
