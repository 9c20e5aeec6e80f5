"""Weights as `linear` takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packed:
    """Weights of a linear layer. Made by `pack`, or of tensors that obey the same rules."""

    weight: torch.Tensor
    """[channels, inputs], contiguous on the CPU: float32, bfloat16, or int8."""
    scale: torch.Tensor | None = None
    """float32 [channels], contiguous: what a step of an int8 weight is worth; None with other weights."""

    def __post_init__(self) -> None:
        """Raises ValueError where a field is not what it says."""
        weight, scale = self.weight, self.scale
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ValueError(f"weights of {weight.dtype}: float32, bfloat16 or int8 are needed")
        if weight.dim() != 2 or weight.shape[1] == 0 or not weight.is_contiguous() or weight.device.type != "cpu":
            raise ValueError(
                f"weights of shape {tuple(weight.shape)} and strides {weight.stride()} on {weight.device}: "
                "[channels, inputs] with at least one input, contiguous, on the CPU are needed"
            )
        if (scale is None) == (weight.dtype == torch.int8):
            raise ValueError(f"weights of {weight.dtype} {'without' if scale is None else 'with'} a scale")
        if scale is not None and (
            scale.shape != weight.shape[:1] or scale.dtype != torch.float32 or not scale.is_contiguous()
        ):
            raise ValueError(
                f"a scale of {scale.dtype} and shape {tuple(scale.shape)} for {weight.shape[0]} channels: "
                "one float32 each, contiguous, is needed"
            )


def pack(weight: torch.Tensor, *, int8: bool = False) -> Packed:
    """Pack [channels, inputs] of float32 or bfloat16, once; nothing is copied of what is contiguous.

    Args:
        weight: on the CPU.
        int8: as signed bytes: weight / scale rounded to nearest even, scale a 127th of the channel's largest magnitude.

    Raises:
        ValueError: another shape, type or device; int8 of weights that are not all finite.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"weights of {weight.dtype}: float32 or bfloat16 are packed")
    weight = weight.detach().contiguous()
    if not int8:
        return Packed(weight)
    Packed(weight)  # the same shapes and devices
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0])
    for at in slices(weight):
        wide = weight[at].float()
        largest = wide.abs().amax(dim=1)
        if not bool(largest.isfinite().all()):
            raise ValueError("int8 of weights with a NaN or an infinity")
        scale[at] = torch.where(largest > 0, largest / 127, 1.0)
        codes[at] = (wide / scale[at, None]).round().clamp(-127, 127).to(torch.int8)
    return Packed(codes, scale)


def slices(weight: torch.Tensor) -> list[slice]:
    """Cut channels so that a slice takes a few megabytes in float32."""
    step = max(1, (1 << 20) // weight.shape[1])
    return [slice(begin, begin + step) for begin in range(0, weight.shape[0], step)]
