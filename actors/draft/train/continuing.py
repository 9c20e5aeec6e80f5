"""Lets a target go on with many texts at once, token by token, on a CPU: what answers and prompts are made with.

A step of 32 rows reads the weights once, and each row's KV where it lies: KV is never moved, but for rows that go on
when others are over, and never repeated for the heads that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "joinwise_grouped"
"""What a model should be loaded with, as its `attn_implementation`; with another it is slower, and as right."""
_CLEARED = 0.8
"""Rows that are over are cleared away when fewer than this share of all go on."""

Pick = Callable[[torch.Tensor], torch.Tensor]
"""The next token of each row, (rows,), from its logits, (rows, ids)."""


@dataclass(frozen=True)
class Continued:
    """A text with what the target added to it; `hidden` is its last hidden state at each token but the last."""

    tokens: list[int]
    hidden: torch.Tensor


class _Rows:
    """The cache of a batch whose rows go on together: keys and values of shape (rows, heads, width, size)."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.filled = 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new KV, each (rows, heads, tokens, size); returns all there is."""
        if layer not in self._layers:
            shape = (*keys.shape[:2], self._width)
            self._layers[layer] = keys.new_empty(*shape, keys.shape[3]), values.new_empty(*shape, values.shape[3])
        end = self.filled + keys.shape[2]
        for stored, fresh in zip(self._layers[layer], (keys, values), strict=True):
            stored[:, :, self.filled : end] = fresh
        return self._layers[layer][0][:, :, :end], self._layers[layer][1][:, :, :end]

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all other rows."""
        self._layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self._layers.items()}


@torch.inference_mode()
def go_on(
    model: Any, texts: Sequence[Sequence[int]], pick: Pick, *, ends: Collection[int], most: int
) -> list[Continued]:
    """Add tokens to each text until one of `ends`, at most `most` of them.

    Args:
        model: a causal model of transformers with full attention, in evaluation mode.
    """
    width = max(map(len, texts))
    step = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):  # they are aligned at their last token
        step[row, width - len(text) :] = torch.tensor(text)
    begins = torch.tensor([width - len(text) for text in texts])
    cache, columns = _Rows(width + most), torch.arange(width + most)
    tokens = [list(text) for text in texts]
    hidden: list[list[torch.Tensor]] = [[] for _ in texts]
    live = list(range(len(texts)))
    over = [False] * len(texts)
    for _ in range(most):
        end = cache.filled + step.shape[1]
        here, seen = columns[cache.filled : end, None], columns[:end]
        mask = (seen <= here) & ((seen >= begins[:, None, None]) | (seen == here))  # padding sees itself
        states = model.base_model(
            input_ids=step,
            position_ids=(here[:, 0] - begins[:, None]).clamp(min=0),
            attention_mask=mask[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        cache.filled = end
        picked = pick(model.lm_head(states[:, -1]))
        step = picked[:, None]
        for at, (row, token) in enumerate(zip(live, picked.tolist(), strict=True)):
            if not over[row]:
                hidden[row].append(states[at, -1:] if hidden[row] else states[at, int(begins[at]) :])
                tokens[row].append(token)
                over[row] = token in ends
        on = [at for at, row in enumerate(live) if not over[row]]
        if not on:
            break
        if len(on) < _CLEARED * len(live):
            rows = torch.tensor(on)
            cache.keep(rows)
            step, begins, live = step[rows], begins[rows], [live[at] for at in on]
    return [Continued(text, torch.cat(states)) for text, states in zip(tokens, hidden, strict=True)]


def _grouped(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As transformers' own; but where each row has one new token, heads that share KV are told as rows of one head."""
    rows, heads, fresh, size = query.shape
    if fresh != 1:
        usual: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return usual
    grouped = query.reshape(rows, key.shape[1], -1, size)
    found = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(rows, 1, heads, size), None


AttentionInterface.register(ATTENTION, _grouped)
