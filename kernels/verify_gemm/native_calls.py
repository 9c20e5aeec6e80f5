"""The native kernel of `gemm.cpp`. It gets checked arguments only, and runs without the GIL."""

from __future__ import annotations

import ctypes
import functools

import torch

from joinwise.kernels import native
from joinwise.kernels.verify_gemm.packed import Packed

# As `gemm.cpp` counts them.
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Rows that are held in float32 at a time, and what their length is rounded up to.
_ROWS_AT_ONCE = 32
_STEP = 32


def library() -> ctypes.CDLL | None:
    """The native library with this package's functions declared, or None also where the processor lacks AVX2 or FMA."""
    found = native.library()
    return None if found is None else _declared(found)


@functools.cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL | None:
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.joinwise_linear_runs.restype, found.joinwise_linear_runs.argtypes = number, []
    found.joinwise_linear.restype = None
    found.joinwise_linear.argtypes = [number, number, *[address] * 6, *[size] * 5, address]
    found.joinwise_read.restype, found.joinwise_read.argtypes = None, [address, size, size, address]
    return found if found.joinwise_linear_runs() else None


@functools.cache
def _team() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP that torch runs on: its threads are awake and bound to their cores.

    None where torch runs on something else; then a call starts threads of its own.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def linear(lib: ctypes.CDLL, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, threads: int) -> torch.Tensor:
    """See `verify_gemm.linear`: [rows, inputs] to [rows, channels]."""
    (rows, inputs), (channels, _) = x.shape, packed.weight.shape
    y = torch.empty(rows, channels, dtype=x.dtype)
    stride = -(-inputs // _STEP) * _STEP
    wide = torch.empty(min(rows, _ROWS_AT_ONCE) * stride)
    lib.joinwise_linear(
        _NUMBERS[packed.weight.dtype],
        _NUMBERS[x.dtype],
        packed.weight.data_ptr(),
        None if packed.scale is None else packed.scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        wide.data_ptr(),
        y.data_ptr(),
        rows,
        stride,
        channels,
        inputs,
        threads,
        _team(),
    )
    return y


def read(lib: ctypes.CDLL, memory: torch.Tensor, threads: int) -> None:
    """Read a contiguous tensor once and do nothing with it: what a linear layer can be measured against."""
    lib.joinwise_read(memory.data_ptr(), memory.nbytes, threads, _team())
