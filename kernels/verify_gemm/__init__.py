"""Linear layers for a few rows: what a CPU does all day when it decodes, or verifies drafts.

    packed = pack(weight)            # float32 or bfloat16, as they are; shares memory with a contiguous `weight`
    packed = pack(weight, int8=True) # a signed byte each, and a float32 scale for each output channel
    y = linear(x, packed, bias)      # x @ weight.T + bias

So few rows cost little more than reading the weights once; these are read in their own order, row after row. There is
no second copy, and any number of rows is served. Activations stay as they are, also with int8 weights (weight-only):
sums are float32, and the result is rounded once, to the type of `x`.

**A row's result depends on that row alone**: not on its neighbours, their number, or the threads. Paths differ from
each other by rounding. Of native code, picked when it runs, there is AMX-BF16 (`amx.cpp`), AVX512-BF16 (`avx512.cpp`)
and AVX2 with FMA (`avx2.cpp`); else `reference.py` computes. The first two are for `x` in bfloat16 with weights in
bfloat16 or int8, and take denormal numbers for zeros; whatever has float32 in it goes to AVX2, on every processor.
Native code runs without the GIL, on the threads that torch has; several calls may run at once.
"""

from __future__ import annotations

import torch

from joinwise.kernels.verify_gemm import native_calls, reference
from joinwise.kernels.verify_gemm.packed import Packed, pack

__all__ = ["Packed", "is_native", "linear", "pack"]

_TYPES = (torch.float32, torch.bfloat16)


def is_native() -> bool:
    """Whether `linear` runs native code on this machine; the reference is many times slower."""
    return native_calls.library() is not None


def linear(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, *, threads: int | None = None
) -> torch.Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [..., inputs], float32 or bfloat16, on the CPU.
        packed: of [channels, inputs].
        bias: [channels], of the type of `x`.
        threads: CPU threads to use at most (default: torch's number).

    Returns:
        [..., channels], of the type of `x`.

    Raises:
        ValueError: another shape, element type or device, or no thread.
    """
    channels, inputs = packed.weight.shape
    if x.dtype not in _TYPES or x.device.type != "cpu":
        raise ValueError(f"{x.dtype} on {x.device}: rows are float32 or bfloat16 on the CPU")
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"rows of shape {tuple(x.shape)} for weights of {inputs} inputs")
    if bias is not None:
        if bias.shape != (channels,):
            raise ValueError(f"a bias of shape {tuple(bias.shape)} for {channels} channels")
        if bias.dtype != x.dtype or bias.device.type != "cpu":
            raise ValueError(f"a bias of {bias.dtype} on {bias.device} for rows of {x.dtype} on the CPU")
        bias = bias.contiguous()
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"{threads} threads")
    rows = x.reshape(-1, inputs).contiguous()
    if lib := native_calls.library():
        y = native_calls.linear(lib, rows, packed, bias, threads)
    else:
        y = reference.linear(rows, packed, bias)
    return y.view(*x.shape[:-1], channels)
