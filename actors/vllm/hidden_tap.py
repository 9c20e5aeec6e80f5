"""Listens in an engine's model runner for what a draft head wants: the hidden states that a step's logits are made of.

vLLM tells a `custom_class` proposer tokens only. Its runner computes logits for the last token of each row of the
batch, and for each of its drafts, in the batch's order; then one of its samplers is called, with the number of drafts
of each row where there are any. Both are watched from outside, and what does not fit together is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class HiddenTap:
    """Keeps the latest step's hidden states until they are asked for."""

    def __init__(self) -> None:
        self._computed: torch.Tensor | None = None
        self._step: tuple[torch.Tensor, Sequence[int] | None] | None = None

    def watch_model(self, model: Any) -> None:
        """See each call of the model's `compute_logits`: the last before a sampler's is the step's."""
        compute = model.compute_logits

        def watched(hidden_states: torch.Tensor, *arguments: Any, **more: Any) -> Any:
            self._computed = hidden_states
            return compute(hidden_states, *arguments, **more)

        model.compute_logits = watched

    def watch_samplers(self, plain: torch.nn.Module, rejecting: torch.nn.Module) -> None:
        """See each call of the runner's two samplers: of a step without drafts and of one with; that uses the other."""
        plain.register_forward_pre_hook(lambda *_: self._sampled(None))
        rejecting.register_forward_pre_hook(lambda _, given: self._sampled(list(given[0].num_draft_tokens)))

    def of_rows(self, sampled: Sequence[Sequence[int]]) -> dict[int, np.ndarray]:
        """Hidden states of the tokens before each row's last one, as many as ids were sampled.

        Args:
            sampled: ids that each row gained in the step, in the batch's order.

        Returns:
            By row, float32, (ids, size); none for rows that gained nothing, and none at all if the step was not seen.
        """
        step, self._step = self._step, None
        if step is None:
            return {}
        states, drafts = step
        rows = [1 + count for count in drafts] if drafts is not None else [1] * len(sampled)
        if len(rows) != len(sampled) or sum(rows) != len(states):
            return {}
        begins = np.cumsum([0, *rows])
        return {
            row: states[begins[row] : begins[row] + len(ids)].float().cpu().numpy()
            for row, ids in enumerate(sampled)
            if 0 < len(ids) <= rows[row]
        }

    def _sampled(self, drafts: Sequence[int] | None) -> None:
        if self._computed is not None:
            self._step, self._computed = (self._computed, drafts), None
