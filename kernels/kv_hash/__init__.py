"""xxh3-64 of memory in pieces, copied on the way where asked: one pass over the bytes instead of two.

A payload's pieces count as one: how it is cut does not change its hash. Native code hashes the very bytes that it
copies, whatever becomes of the source meanwhile, and runs without the GIL. Where it was not built, and for a few bytes,
the library `xxhash` hashes the copy.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import xxhash

from joinwise.kernels import native

# Contiguous bytes. An empty one has no address, so nothing is asked of it.
Bytes: TypeAlias = memoryview | bytearray | bytes

# xxh3 treats inputs of up to so many bytes in other ways, which the native code does not know.
_SHORT = 240
_BYTE = ctypes.c_char


def digest(pieces: Sequence[Bytes]) -> int:
    """xxh3-64 of all of them, in order."""
    sizes = array("q", map(len, pieces))
    if lib := _native(sum(sizes)):
        return _run(lib, _addresses(pieces), sizes)
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.intdigest()


def gather(pieces: Sequence[Bytes], into: memoryview) -> int:
    """Copy pieces, one after the other, to the beginning of `into`, which they do not overlap.

    Returns:
        xxh3-64 of what was copied.

    Raises:
        ValueError: it is smaller, or cannot be written; nothing is written.
    """
    sizes = array("q", map(len, pieces))
    total = _check(sizes, len(into), [into])
    if lib := _native(total):
        return _run(lib, _addresses(pieces), sizes, _places(into, sizes))
    for piece, place in zip(pieces, _cut(into, sizes), strict=True):
        place[:] = piece
    return digest([into[:total]])


def scatter(source: Bytes, into: Sequence[memoryview]) -> int:
    """Copy the beginning of `source` to pieces of memory, one after the other, which it does not overlap.

    They are written around the processor's caches, which a payload would only sweep clean.

    Returns:
        xxh3-64 of what was copied.

    Raises:
        ValueError: it is smaller than they are, or one cannot be written; nothing is written.
    """
    sizes = array("q", map(len, into))
    total = _check(sizes, len(source), into)
    if lib := _native(total):
        return _run(lib, _places(source, sizes), sizes, _addresses(into), around=True)
    for place, piece in zip(into, _cut(memoryview(source), sizes), strict=True):
        place[:] = piece
    return digest(into)


def _check(sizes: array[int], room: int, written: Sequence[memoryview]) -> int:
    """The bytes of all pieces, where they fit."""
    if (total := sum(sizes)) > room:
        raise ValueError(f"{total} bytes in pieces, {room} in one piece")
    if any(view.readonly for view in written):
        raise ValueError("memory that cannot be written")
    return total


def _cut(flat: memoryview, sizes: array[int]) -> Iterator[memoryview]:
    return (flat[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True))


def _places(flat: Bytes, sizes: array[int]) -> array[int]:
    """The addresses where pieces lie that follow one another."""
    return array("q", accumulate(sizes[:-1], initial=_addresses([flat])[0]))


def _addresses(pieces: Sequence[Bytes]) -> array[int]:
    address, byte = ctypes.addressof, _BYTE.from_buffer
    try:
        return array("q", [address(byte(piece)) for piece in pieces])  # the fastest way there is
    except (TypeError, ValueError):  # one cannot be written, or is empty
        return array("q", [np.frombuffer(piece, np.uint8).ctypes.data if len(piece) else 0 for piece in pieces])


def _run(
    lib: ctypes.CDLL, sources: array[int], sizes: array[int], targets: array[int] | None = None, *, around: bool = False
) -> int:
    there = None if targets is None else targets.buffer_info()[0]
    return int(lib.joinwise_kv_hash(sources.buffer_info()[0], sizes.buffer_info()[0], there, len(sizes), around))


def _native(total: int) -> ctypes.CDLL | None:
    """The native library, where it can hash so many bytes."""
    found = native.library() if total > _SHORT else None
    return None if found is None else _declared(found)


@functools.cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    address, size = ctypes.c_void_p, ctypes.c_int64
    found.joinwise_kv_hash.restype = ctypes.c_uint64
    found.joinwise_kv_hash.argtypes = [address, address, address, size, ctypes.c_int]
    return found
