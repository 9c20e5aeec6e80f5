"""The lossy codecs on a CUDA device, with the bits of the reference. Imported for tensors there only.

One program codes a tile of rows; the work goes to the current stream. Divisions are the IEEE ones, no multiplication is
fused with an addition, and e4m3 is made with integers: what devices know of it differs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from joinwise.kernels.kv_codec.reference import TOP

_TILE = 4096  # numbers a program


def quantize(codec: str, values: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> None:
    """See `reference.quantize`."""
    rows, head_dim = values.shape
    tile_rows, width = _tile(head_dim)
    _encode[(triton.cdiv(rows, tile_rows),)](
        values,
        scales,
        codes,
        rows,
        head_dim,
        tile_rows,
        width,
        TOP[codec],
        codec == "fp8",
        enable_fp_fusion=False,
    )


def dequantize(codec: str, scales: torch.Tensor, codes: torch.Tensor, values: torch.Tensor) -> None:
    """See `reference.dequantize`."""
    rows, head_dim = values.shape
    tile_rows, width = _tile(head_dim)
    _decode[(triton.cdiv(rows, tile_rows),)](
        values, scales, codes, rows, head_dim, tile_rows, width, codec == "fp8", enable_fp_fusion=False
    )


def _tile(head_dim: int) -> tuple[int, int]:
    width = triton.next_power_of_2(head_dim)
    return max(1, _TILE // width), width


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    values,
    scales,
    codes,
    rows,
    head_dim,
    tile_rows: tl.constexpr,
    width: tl.constexpr,
    top: tl.constexpr,
    fp8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    column = tl.arange(0, width)
    place = row[:, None] * head_dim + column[None, :]
    inside = (row < rows)[:, None] & (column < head_dim)[None, :]
    value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    size = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # as integers: NaN is the largest
    usable = (size >= 0x0D800000) & (size < 0x7F000000)  # SMALLEST and LIMIT of the reference
    peak = tl.where(usable, size, 0x3F800000).to(tl.float32, bitcast=True)
    most = tl.full([tile_rows], top, tl.float32)
    scale = tl.where(
        usable, tl.div_rn(peak, most).to(tl.int32, bitcast=True), tl.where(size < 0x0D800000, 0, 0x7FC00000)
    )
    tl.store(scales + row, scale.to(tl.float32, bitcast=True), mask=row < rows)
    scaled = tl.where(usable[:, None], value, 0.0) * tl.div_rn(most, peak)[:, None]
    if fp8:
        bits = scaled.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        power = tl.maximum(magnitude & 0x7F800000, 121 << 23)  # see Fp8 in codec.cpp
        shift = power + (20 << 23)
        sum_ = magnitude.to(tl.float32, bitcast=True) + shift.to(tl.float32, bitcast=True)
        code = ((power >> 20) - (121 << 3) + sum_.to(tl.int32, bitcast=True) - shift) | ((bits >> 24) & 0x80)
    else:
        code = (scaled + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23: see Int8 in codec.cpp
    tl.store(codes + place, (code & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    values, scales, codes, rows, head_dim, tile_rows: tl.constexpr, width: tl.constexpr, fp8: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    column = tl.arange(0, width)
    place = row[:, None] * head_dim + column[None, :]
    inside = (row < rows)[:, None] & (column < head_dim)[None, :]
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    if fp8:
        wide = (code & 0x7F) << 20
        small = (code & 0x7F).to(tl.float32) * 0.001953125  # 2^-9
        normal = tl.where(wide == 0x7F00000, 0x7FC00000, wide + (120 << 23)).to(tl.float32, bitcast=True)
        magnitude = tl.where(wide < 1 << 23, small, normal)
        number = tl.where(code >= 0x80, -magnitude, magnitude)
    else:
        number = tl.where(code >= 0x80, code - 256, code).to(tl.float32)
    scale = tl.load(scales + row, mask=row < rows, other=0.0)
    tl.store(values + place, (number * scale[:, None]).to(values.dtype.element_ty), mask=inside)
