"""What the lossy codecs mean, in plain torch, on any device: the specification that the fast paths are compared with.

Every step is one IEEE float32 operation, rounded to nearest even, so that all paths give the same bits. Values under
`SMALLEST` are cut off well above the subnormal numbers: whether a thread flushes those makes no difference.
"""

from __future__ import annotations

import torch

# The largest code of each codec: a row's largest magnitude is mapped onto it.
TOP = {"int8": 127.0, "fp8": 448.0}
# A row whose largest magnitude is smaller is encoded as zeros: the scale is 0.
SMALLEST = 2.0**-100
# A row with a NaN, an infinity or any magnitude from here on has NaN for a scale and decodes to NaN as a whole.
LIMIT = 2.0**127


def quantize(codec: str, values: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> None:
    """Encode rows.

    Args:
        codec: "int8" or "fp8".
        values: float32, bfloat16 or float16 [rows, head_dim].
        scales: float32 [rows], to be written: the largest magnitude of the row over the largest code.
        codes: uint8 [rows, head_dim], to be written: int8 in two's complement (-127 to 127), or e4m3fn.
    """
    values = values.float()
    # Not amax of the floats: whether that finds a NaN depends on the device.
    peak = values.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(1).view(torch.float32)
    usable = (peak >= SMALLEST) & (peak < LIMIT)
    divisor = peak.where(usable, torch.ones_like(peak))
    # By tensors: torch divides a tensor by a number, and a number by a tensor, through a rounded reciprocal.
    top = torch.full_like(peak, TOP[codec])
    empty = torch.zeros_like(peak).where(peak < SMALLEST, torch.full_like(peak, torch.nan))
    scales.copy_((divisor / top).where(usable, empty))
    scaled = values.where(usable[:, None], torch.zeros_like(values)) * (top / divisor)[:, None]
    if codec == "int8":
        codes.copy_(scaled.round().to(torch.int8).view(torch.uint8))
    else:
        codes.copy_(scaled.clamp(-TOP[codec], TOP[codec]).to(torch.float8_e4m3fn).view(torch.uint8))


def dequantize(codec: str, scales: torch.Tensor, codes: torch.Tensor, values: torch.Tensor) -> None:
    """Decode rows, whatever their bytes: scale times code in float32, rounded to the type of `values`.

    Args:
        codec: "int8" or "fp8".
        scales: float32 [rows].
        codes: uint8 [rows, head_dim].
        values: float32, bfloat16 or float16 [rows, head_dim], to be written. Which NaN stands for NaN is not specified.
    """
    numbers = codes.view(torch.int8 if codec == "int8" else torch.float8_e4m3fn).float()
    values.copy_(numbers * scales[:, None])


def split(values: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Split 16-bit numbers, turned left by one bit, into bytes: the sign goes from the top to the bottom.

    Args:
        values: int16 [n], the bits of bfloat16 or float16.
        high: uint8 [n], to be written: the exponent (and for float16 the first three bits of the fraction).
        low: uint8 [n], to be written: the rest, and the sign in bit 0.
    """
    wide = values.int()
    high.copy_(wide.bitwise_right_shift(7).bitwise_and(0xFF))
    low.copy_(wide.bitwise_left_shift(1).bitwise_or(wide.bitwise_right_shift(15).bitwise_and(1)).bitwise_and(0xFF))


def join(high: torch.Tensor, low: torch.Tensor, values: torch.Tensor) -> None:
    """The counterpart of `split`."""
    low = low.int()
    bits = high.int().bitwise_left_shift(7) | low.bitwise_right_shift(1) | low.bitwise_and(1).bitwise_left_shift(15)
    values.copy_(bits)
