"""The native kernel of `gemm.cpp`. It gets checked arguments only, and runs without the GIL."""

from __future__ import annotations

import ctypes
import functools

import torch

from joinwise.kernels import native
from joinwise.kernels.verify_gemm.packed import Packed

# As `linear.h` and `gemm.cpp` count them.
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_PATHS = ("avx2", "avx512", "amx")


def library() -> ctypes.CDLL | None:
    """The native library with this package's functions declared, or None also where the processor lacks AVX2 or FMA."""
    found = native.library()
    return None if found is None else _declared(found)


@functools.cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL | None:
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.joinwise_linear_paths.restype, found.joinwise_linear_paths.argtypes = number, []
    found.joinwise_linear.restype = number
    found.joinwise_linear.argtypes = [number, number, number, *[address] * 5, *[size] * 4, address]
    found.joinwise_read.restype, found.joinwise_read.argtypes = None, [address, size, size, address]
    return found if "avx2" in paths(found) else None


@functools.cache
def paths(lib: ctypes.CDLL) -> tuple[str, ...]:
    """What runs on this processor, the best first: `amx`, `avx512` (both with bfloat16), `avx2` (with FMA)."""
    found = lib.joinwise_linear_paths()
    return tuple(path for bit, path in reversed(list(enumerate(_PATHS))) if found >> bit & 1)


def path_of(lib: ctypes.CDLL, dtype: torch.dtype, weights: torch.dtype) -> str:
    """The path that computes rows of `dtype` with such weights: float32, of either, is AVX2's."""
    return "avx2" if torch.float32 in (dtype, weights) else paths(lib)[0]


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
    """See `verify_gemm.linear`: [rows, inputs] to [rows, channels].

    Raises:
        MemoryError: none is left to put `x` in order.
    """
    (rows, inputs), (channels, _) = x.shape, packed.weight.shape
    y = torch.empty(rows, channels, dtype=x.dtype)
    done = lib.joinwise_linear(
        _PATHS.index(path_of(lib, x.dtype, packed.weight.dtype)),
        _NUMBERS[packed.weight.dtype],
        _NUMBERS[x.dtype],
        packed.weight.data_ptr(),
        None if packed.scale is None else packed.scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        rows,
        channels,
        inputs,
        threads,
        _team(),
    )
    if not done:
        raise MemoryError(f"{rows} rows of {inputs} inputs in the order of a kernel")
    return y


def read(lib: ctypes.CDLL, memory: torch.Tensor, threads: int) -> None:
    """Read a contiguous tensor once and do nothing with it: what a linear layer can be measured against."""
    lib.joinwise_read(memory.data_ptr(), memory.nbytes, threads, _team())
