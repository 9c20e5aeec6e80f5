"""Keeps an engine that speculates alive in a step for which nobody has drafted anything.

vLLM then applies top-k to no rows at all, and takes the largest of no numbers: the engine dies.
"""

import functools
from typing import Any

import torch
from vllm.v1.sample import rejection_sampler


@functools.cache  # once for each process
def spare_empty_steps() -> None:
    """Leave what has no rows alone."""
    apply = rejection_sampler.apply_top_k_top_p

    def apply_to_rows(logits: torch.Tensor, *constraints: Any) -> torch.Tensor:
        return apply(logits, *constraints) if len(logits) else logits

    rejection_sampler.apply_top_k_top_p = apply_to_rows
