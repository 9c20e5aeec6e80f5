"""Keeps an engine that speculates right, and alive, where vLLM's rejection sampler is not.

In a step for which nobody has drafted anything it applies top-k to no rows at all, and takes the largest of no numbers.
On CPUs the kernel that repeats a temperature or a limit for each draft of its request may leave its result unwritten.
"""

import functools
from typing import Any

import torch
from vllm.v1.sample import rejection_sampler


@functools.cache  # once for each process
def mend_rejection() -> None:
    """Leave what has no rows alone, and repeat by torch on a CPU."""
    apply, expand = rejection_sampler.apply_top_k_top_p, rejection_sampler.expand_batch_to_tokens

    def apply_to_rows(logits: torch.Tensor, *constraints: Any) -> torch.Tensor:
        return apply(logits, *constraints) if len(logits) else logits

    def repeated(x: torch.Tensor, ends: torch.Tensor, count: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        if x.device.type != "cpu":
            return expand(x, ends, count, replace_from, replace_to)
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts)

    rejection_sampler.apply_top_k_top_p = apply_to_rows
    rejection_sampler.expand_batch_to_tokens = repeated
