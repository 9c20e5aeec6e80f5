"""A causal drafter's linear layers: by `verify_gemm` where that runs here, and with int8 weights where that is asked.

A drafter's step reads every weight for a handful of tokens, so that its time is that of reading them. int8, with a
scale for each output channel, is half of bfloat16. A draft may differ from that of the model as it was; whether it is
right, the target says.
"""

from __future__ import annotations

import torch

from joinwise.kernels.verify_gemm import is_native, linear, pack

_TYPES = (torch.float32, torch.bfloat16)


class PackedLinear(torch.nn.Module):
    """A linear layer, (..., inputs) to (..., outputs), that reads its weights once for all rows."""

    def __init__(self, layer: torch.nn.Linear, *, int8: bool) -> None:
        super().__init__()
        self._packed = pack(layer.weight.detach(), int8=int8)
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return linear(x, self._packed, self._bias)


def pack_linears(model: torch.nn.Module, *, int8: bool) -> None:
    """Replace every linear layer of a model; the original weights of int8 ones are let go, one after the other.

    Without int8 nothing is done where there is no native code, nor for element types that it does not take.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and (int8 or (is_native() and child.weight.dtype in _TYPES)):
                setattr(module, name, PackedLinear(child, int8=int8))
