"""Keeps memory of the size of frames in the process when it is freed.

glibc gives what is large back to the system at once, which then has to fill every page of the next frame with zeros:
that took half of the CPU of a transfer over gRPC, which makes several copies of each frame.
"""

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 32 << 20  # bytes; the most that glibc takes
_KEPT = 128 << 20  # bytes free at the end of a heap before it shrinks


@functools.cache  # once for each process
def keep_freed() -> None:
    """Tell the allocator so; where it is another than glibc's, nothing is done."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGEST)
        set_option(_M_TRIM_THRESHOLD, _KEPT)
