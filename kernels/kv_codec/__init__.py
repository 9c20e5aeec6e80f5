"""Codecs for KV on its way between workers: fewer bytes on the wire, where the wire is what takes the time.

A payload is rows `[kv head][token][part]` of `head_dim` numbers, float32, bfloat16 or float16, one after the other, as
`kv_pack` makes them. Codecs:

    none      the payload itself
    int8      a scale per row, and a signed byte for each number
    fp8       a scale per row, and e4m3fn (four bits of exponent, three of fraction, no infinity) for each number
    lossless  bfloat16 and float16 only, bit for bit; of varying size, see `lossless.py`

Wire of int8 and fp8, little-endian:

    float32 [rows]             scales: the row's largest magnitude / 127 (int8) or / 448 (fp8)
    uint8   [rows][head_dim]   codes: number / scale, rounded to nearest even

Special rows: one with a NaN, an infinity or a magnitude of 2^127 or more has the scale NaN and decodes to NaN as a
whole, so that it never passes for numbers; one whose magnitudes are all under 2^-100 has the scale 0 and decodes to
zeros.
The bits are the same on every path (`reference.py` is the specification); only which NaN stands for NaN is not said.

Both entry points check every size before they touch a byte, then pick: native code on a CPU, Triton on a CUDA device,
else the reference. Native code runs without the GIL; several calls may run at once. Any bytes of the right number can
be decoded, to numbers or to a ValueError.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch

from joinwise.kernels.kv_codec import lossless, native_calls, reference
from joinwise.kernels.kv_codec.choose import pays
from joinwise.kernels.kv_pack.buffers import Buffer, Bytes

__all__ = ["CODECS", "LOSSY", "Buffer", "decode", "encode", "max_encoded_bytes", "pays"]

CODECS = ("none", "int8", "fp8", "lossless")
LOSSY = ("int8", "fp8")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")


def max_encoded_bytes(codec: str, rows: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of encoded rows: the exact number, for "lossless" the largest possible.

    Raises:
        ValueError: no such codec, or not for this dtype, or a size below zero (`head_dim`: below one).
    """
    if codec not in CODECS:
        raise ValueError(f"no codec {codec!r}; there are {', '.join(CODECS)}")
    if dtype not in _DTYPES or (codec == "lossless" and dtype == torch.float32):
        raise ValueError(f"{codec} does not encode {dtype}")
    if rows < 0 or head_dim < 1:
        raise ValueError(f"{rows} rows of {head_dim} numbers")
    if codec == "none":
        return rows * head_dim * dtype.itemsize
    return lossless.max_encoded_bytes(rows * head_dim) if codec == "lossless" else rows * (4 + head_dim)


def encode(codec: str, payload: Buffer, *, head_dim: int, dtype: torch.dtype, out: Buffer, threads: int = 1) -> int:
    """Encode a payload into the first bytes of `out`.

    Args:
        codec: one of `CODECS`.
        payload: whole rows. Their device is where the work is done; "lossless" needs a CPU.
        head_dim: numbers in a row.
        dtype: of the numbers.
        out: of `max_encoded_bytes` or more, on the payload's device or on the host, apart from the payload. With both
            on a CUDA device the work is only given to the current stream; in every other case it is done on return.
        threads: CPU threads to use at most.

    Returns:
        Bytes written.

    Raises:
        ValueError: see `max_encoded_bytes`; or no whole number of rows, or a buffer of another size, kind or place.
            Nothing is written.
    """
    source, target = Bytes(payload, writable=False), Bytes(out, writable=True)
    row_bytes = max_encoded_bytes("none", 1, head_dim, dtype)
    rows, rest = divmod(source.size, row_bytes)
    size = max_encoded_bytes(codec, rows, head_dim, dtype)
    if rest:
        raise ValueError(f"{source.size} bytes are no whole number of rows of {row_bytes}")
    if target.size < size:
        raise ValueError(f"{target.size} bytes to encode into, where {size} are needed")
    _check(codec, source, target, threads)
    if rows == 0:
        return 0
    if codec == "lossless":
        return lossless.encode(source.tensor(), target.tensor(), threads)
    if codec in LOSSY and source.device == target.device == _CPU and (lib := native_calls.library()):
        native_calls.code(lib, codec, dtype, source.address, target.address, rows, head_dim, threads, encode=True)
        return size
    encoded = target.tensor()[:size]
    if codec == "none":
        encoded.copy_(source.tensor())
        return size
    values = _aligned(source.tensor(), dtype).view(dtype).view(rows, head_dim)
    scales = torch.empty(rows, dtype=torch.float32, device=source.device)
    codes = encoded[4 * rows :].view(rows, head_dim)
    there = codes if target.device == source.device else torch.empty_like(codes, device=source.device)
    _path(source.device).quantize(codec, values, scales, there)
    encoded[: 4 * rows].copy_(scales.view(torch.uint8))
    if there is not codes:
        codes.copy_(there)
    return size


def decode(
    codec: str, encoded: Buffer, *, rows: int, head_dim: int, dtype: torch.dtype, out: Buffer, threads: int = 1
) -> None:
    """Decode what `encode` has written, or any bytes. The counterpart of `encode`.

    Args:
        codec: one of `CODECS`.
        encoded: as many bytes as `encode` told.
        rows: of the payload.
        head_dim: numbers in a row.
        dtype: of the numbers.
        out: of the payload's size, apart from `encoded`. Its device is where the work is done, and `encoded` is there
            or on the host; "lossless" needs a CPU.
        threads: CPU threads to use at most.

    Raises:
        ValueError: see `max_encoded_bytes`; or a buffer of another size, kind or place: nothing is written. For
            "lossless" also bytes that are not those of the payload: `out` then holds anything.
    """
    source, target = Bytes(encoded, writable=False), Bytes(out, writable=True)
    size = max_encoded_bytes(codec, rows, head_dim, dtype)
    if source.size > size or (source.size < size and codec != "lossless"):
        raise ValueError(f"{source.size} encoded bytes, where {rows} rows of {head_dim} in {codec} have {size}")
    if target.size != (needed := max_encoded_bytes("none", rows, head_dim, dtype)):
        raise ValueError(f"{target.size} bytes to decode into, where {needed} are needed")
    _check(codec, target, source, threads)
    if rows == 0:
        return
    if codec == "lossless":
        lossless.decode(source.tensor(), target.tensor(), threads)
    elif codec == "none":
        target.tensor().copy_(source.tensor())
    elif source.device == target.device == _CPU and (lib := native_calls.library()):
        native_calls.code(lib, codec, dtype, target.address, source.address, rows, head_dim, threads, encode=False)
    else:
        there = source.tensor().to(target.device)
        scales = there[: 4 * rows].clone().view(torch.float32)
        payload = target.tensor()
        values = _aligned(payload, dtype)
        _path(target.device).dequantize(
            codec, scales, there[4 * rows :].view(rows, head_dim), values.view(dtype).view(rows, head_dim)
        )
        if values is not payload:
            payload.copy_(values)


def _check(codec: str, rows: Bytes, encoded: Bytes, threads: int) -> None:
    """Raises ValueError unless the work can be done where `rows` lie, on so many threads."""
    if threads < 1:
        raise ValueError(f"{threads} threads")
    if encoded.device not in (rows.device, _CPU):
        raise ValueError(f"encoded bytes on {encoded.device} for numbers on {rows.device}")
    if codec == "lossless" and rows.device != _CPU:
        raise ValueError(f"lossless works on a CPU, not on {rows.device}")
    begin, end = max(rows.address, encoded.address), min(rows.address + rows.size, encoded.address + encoded.size)
    if begin < end:
        raise ValueError("the two buffers share bytes")


def _aligned(payload: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bytes, or a copy of them where numbers could not be addressed."""
    odd = payload.data_ptr() % dtype.itemsize or payload.storage_offset() % dtype.itemsize
    return payload.clone() if odd else payload


def _path(device: torch.device) -> ModuleType:
    """The module that codes rows on a device."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from joinwise.kernels.kv_codec import triton_kernels

        return triton_kernels
    return reference
