"""The native kernels of `pack.cpp`. They get checked arguments only, and run without the GIL."""

from __future__ import annotations

import ctypes
import functools
import math
from array import array

import torch

from joinwise.kernels import native
from joinwise.kernels.kv_pack.job import Job

# Bytes written by one call that leave too little of the last cache for anything else: from here on they are written
# around it, as memcpy does. (What the system says of that cache's size may be the whole package's.)
STREAM_FROM = 12 << 20
# `Float` of leaves.h; other types are opaque.
_FLOATS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def library() -> ctypes.CDLL | None:
    """The native library with this package's functions declared, or None."""
    found = native.library()
    return None if found is None else _declared(found)


@functools.cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    move = found.joinwise_kv_move
    move.restype = None
    move.argtypes = [number, address, address, size, number, number, address, address, *[size] * 4, number, size]
    for copy in (found.joinwise_gather_blocks, found.joinwise_scatter_blocks):
        copy.restype, copy.argtypes = None, [address, size, size, address, size, address]
    return found


def move(lib: ctypes.CDLL, job: Job, wire: int, *, pack: bool) -> None:
    """Pack into, or unpack from, the bytes at address `wire`."""
    written = math.prod(job.shape) * (job.wire_dtype if pack else job.cache.dtype).itemsize
    lib.joinwise_kv_move(
        pack,
        job.interior.numbers.buffer_info()[0],
        job.cache.data_ptr(),
        job.cache.element_size(),
        _FLOATS.get(job.cache.dtype, 0),
        _FLOATS.get(job.wire_dtype, 0),
        wire,
        job.ids.buffer_info()[0],
        job.first_token,
        job.num_tokens,
        job.heads.start,
        len(job.heads),
        written >= STREAM_FROM,
        job.threads,
    )


def copy_blocks(lib: ctypes.CDLL, cache: torch.Tensor, ids: array[int], wire: int, *, gather: bool) -> None:
    """Copy rows of a uint8 matrix to, or from, the bytes at address `wire`."""
    copy = lib.joinwise_gather_blocks if gather else lib.joinwise_scatter_blocks
    copy(cache.data_ptr(), cache.stride(0), cache.shape[1], ids.buffer_info()[0], len(ids), wire)
