"""The contiguous side of a copy: a uint8 tensor or any buffer of bytes, as an address or as a tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

# A flat contiguous uint8 tensor, on the cache's device or on the host, or any contiguous buffer of bytes.
Buffer: TypeAlias = torch.Tensor | memoryview | bytearray | bytes


class Bytes:
    """A buffer that was checked: flat, contiguous and, where asked, writable. Keeps the buffer alive.

    Raises:
        ValueError: it is not.
    """

    def __init__(self, buffer: Buffer, *, writable: bool) -> None:
        self._owner = buffer
        if isinstance(buffer, torch.Tensor):
            if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
                raise ValueError(f"{buffer.dtype} of {tuple(buffer.shape)}: a flat contiguous uint8 tensor is needed")
            self.device, self.size, self.address = buffer.device, buffer.numel(), buffer.data_ptr()
            return
        try:
            view = np.frombuffer(buffer, np.uint8)
        except BufferError as error:
            raise ValueError(f"no contiguous buffer: {error}") from error
        if writable and not view.flags.writeable:
            raise ValueError("a buffer that cannot be written")
        self.device, self.size, self.address = torch.device("cpu"), view.size, view.ctypes.data

    def check(self, device: torch.device, size: int) -> None:
        """Raises ValueError unless it is of `size` bytes, on the cache's device or on the host."""
        if self.size != size:
            raise ValueError(f"a buffer of {self.size} bytes for {size}")
        if self.device not in (device, torch.device("cpu")):
            raise ValueError(f"a buffer on {self.device} for a cache on {device}")

    def fill(self, device: torch.device, write: Callable[[torch.Tensor], None]) -> None:
        """Have a tensor of these bytes on `device` written, and bring it here where that is elsewhere."""
        if self.device == device:
            write(self.tensor())
            return
        there = torch.empty(self.size, dtype=torch.uint8, device=device)
        write(there)
        self.tensor().copy_(there)

    def tensor(self) -> torch.Tensor:
        """The same bytes as a tensor; not to be written where the buffer cannot be."""
        if isinstance(self._owner, torch.Tensor):
            return self._owner
        # By address: torch would warn of a buffer that cannot be written.
        return torch.frombuffer((ctypes.c_ubyte * self.size).from_address(self.address), dtype=torch.uint8)
