"""The native kernels of `codec.cpp`. They get checked arguments only, and run without the GIL."""

from __future__ import annotations

import ctypes
import functools

import torch

from joinwise.kernels import native

# As `codec.cpp` counts them.
_CODES = {"int8": 0, "fp8": 1}
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def library() -> ctypes.CDLL | None:
    """The native library with this package's functions declared, or None."""
    found = native.library()
    return None if found is None else _declared(found)


@functools.cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    code = found.joinwise_kv_code
    code.restype, code.argtypes = None, [number, number, number, address, address, address, size, size, size]
    for halve in (found.joinwise_kv_split, found.joinwise_kv_join):
        halve.restype, halve.argtypes = None, [address, address, address, size]
    return found


def code(
    lib: ctypes.CDLL,
    codec: str,
    dtype: torch.dtype,
    payload: int,
    encoded: int,
    rows: int,
    head_dim: int,
    threads: int,
    *,
    encode: bool,
) -> None:
    """Encode the numbers at address `payload` into the scales and codes at `encoded`, or decode them."""
    scales, codes = encoded, encoded + 4 * rows
    lib.joinwise_kv_code(encode, _CODES[codec], _NUMBERS[dtype], payload, scales, codes, rows, head_dim, threads)


def split(lib: ctypes.CDLL, numbers: int, high: int, low: int, count: int) -> None:
    """See `reference.split`; arguments are addresses."""
    lib.joinwise_kv_split(numbers, high, low, count)


def join(lib: ctypes.CDLL, numbers: int, high: int, low: int, count: int) -> None:
    """See `reference.join`; arguments are addresses."""
    lib.joinwise_kv_join(numbers, high, low, count)
