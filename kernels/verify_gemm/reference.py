"""What `linear` means, in plain torch: the specification that the fast path is compared with."""

from __future__ import annotations

import torch

from joinwise.kernels.verify_gemm.packed import Packed, slices


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """See `verify_gemm.linear`: [rows, inputs] to [rows, channels].

    Row by row, so that none depends on its neighbours; slice by slice, so that the widened weights stay few.
    """
    y = torch.empty(x.shape[0], packed.weight.shape[0])
    for at in slices(packed.weight):
        wide = packed.weight[at].float()
        for row, out in zip(x.float(), y, strict=True):
            out[at] = torch.mv(wide, row)
    if packed.scale is not None:
        y *= packed.scale
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)
