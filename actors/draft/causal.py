"""A small causal model as drafter: greedy, batched, with a KV cache in static slots.

A slot holds the KV of one sequence, column by column. What the target did not accept is not undone: the slot's length
goes back to the tokens that still hold, and the columns after it are written anew. So a rollback costs nothing, and a
sequence whose tokens changed anywhere is computed from the first difference on.

A long prompt is not computed while engines wait for drafts of others: it is put off, and done in pieces by `catch_up`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.linears import pack_linears
from joinwise.actors.draft.slots import SlotCache, Slots

_AT_ONCE = 64
"""Tokens of one sequence that a draft may still have to compute."""
_PIECE = 32
"""Tokens of one sequence that are computed while nobody waits: whoever asks meanwhile waits for these."""
_EMPTY = np.empty(0, np.int32)


@dataclass(eq=False)
class _Slot:
    """One sequence's place in the cache; `held` are the tokens whose KV stands in its columns, in order."""

    index: int
    held: np.ndarray = field(default_factory=lambda: _EMPTY)

    def keep(self, tokens: np.ndarray) -> int:
        """Go back to what these tokens begin with; at least the last of them remains to be computed. How many are."""
        size = min(len(self.held), len(tokens) - 1)
        differ = np.flatnonzero(self.held[:size] != tokens[:size])
        self.held = tokens[: int(differ[0]) if len(differ) else size]
        return len(tokens) - len(self.held)


class CausalDrafter:
    """Drafts what a causal model finds most likely.

    Args:
        model: of transformers, in evaluation mode, with full attention in every layer; it drafts where its weights are.
        slots: sequences of which it keeps KV; further ones are not drafted for until one is over or the oldest rests.
        max_tokens: of a sequence, drafts included.
        name: for messages.
        threads: compute threads.
    """

    def __init__(self, model: Any, *, slots: int, max_tokens: int, name: str, threads: int) -> None:
        self.name = name
        self._model = model
        self._threads = threads
        self._ids = model.get_input_embeddings().weight.shape[0]
        self._device = model.get_input_embeddings().weight.device
        self._max_tokens = min(max_tokens, int(model.config.max_position_embeddings))
        self._cache = SlotCache(slots, self._max_tokens)
        self._slots = Slots(slots, _Slot)
        self._behind: dict[Hashable, np.ndarray] = {}

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: str,
        *,
        slots: int,
        max_tokens: int,
        name: str,
        threads: int,
        device: str = "cpu",
    ) -> CausalDrafter:
        """A drafter with the model in `folder`; `dtype` is one of torch, "auto" for the model's own, or "int8".

        Raises:
            ValueError: a model that this cannot cache (sliding windows, states instead of KV).
            RuntimeError: the device is not there, or has no room for it.
        """
        model = load_model(folder, dtype, device)
        return cls(model, slots=slots, max_tokens=max_tokens, name=name, threads=threads)

    @property
    def held(self) -> int:
        """Slots in use."""
        return len(self._slots)

    def begin(self) -> None:
        """See `Drafter.begin`: OpenMP keeps the number of threads per thread."""
        torch.set_num_threads(self._threads)

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Greedy continuations; none for a sequence that is too long, too new or of foreign ids, or without a slot."""
        taken: set[Hashable] = set()
        rows: dict[int, tuple[Ask, _Slot]] = {}
        for index, ask in enumerate(asks):
            if len(ask.tokens) + ask.k > self._max_tokens or not 0 <= ask.tokens.min() <= ask.tokens.max() < self._ids:
                continue
            slot = self._slot(ask.key, taken)
            if slot is None:
                continue
            taken.add(ask.key)
            if slot.keep(ask.tokens) > _AT_ONCE:
                self._behind[ask.key] = ask.tokens
            else:
                self._behind.pop(ask.key, None)
                rows[index] = ask, slot
        drafts: list[list[int]] = [[] for _ in asks]
        fresh = {index: ask.tokens[len(slot.held) :] for index, (ask, slot) in rows.items()}
        while fresh:
            for index, token in zip(fresh, self._forward([(rows[i][1], new) for i, new in fresh.items()]), strict=True):
                drafts[index].append(token)
            fresh = {i: np.array(drafts[i][-1:], np.int32) for i in fresh if len(drafts[i]) < rows[i][0].k}
        return drafts

    def catch_up(self) -> bool:
        """Compute a piece of a prompt that was put off."""
        for key, tokens in self._behind.items():
            slot = self._slots[key]
            if (missing := slot.keep(tokens)) <= _AT_ONCE:
                del self._behind[key]
            else:
                at = len(slot.held)
                self._forward([(slot, tokens[at : at + min(_PIECE, missing - 1)])])
            return True
        return False

    def forget(self, key: Hashable) -> None:
        """Free a sequence's slot."""
        self._behind.pop(key, None)
        self._slots.free(key)

    def _slot(self, key: Hashable, taken: set[Hashable]) -> _Slot | None:
        """The sequence's slot; a new one takes the place of the one that rests longest, but of none in `taken`."""
        if (oldest := self._slots.evicted(key, taken)) is not None:
            self.forget(oldest)
        return self._slots.take(key)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[tuple[_Slot, np.ndarray]]) -> list[int]:
        """Append tokens to slots, in one batch, and say which token each finds most likely next.

        Rows are aligned at their last token; what a shorter row has before its first is computed for nobody.
        """
        count, longest = len(rows), max(len(new) for _, new in rows)
        ids = torch.zeros(count, longest, dtype=torch.long)
        positions = torch.zeros(count, longest, dtype=torch.long)
        columns = torch.full((count, longest), self._max_tokens)
        for row, (slot, new) in enumerate(rows):
            at = len(slot.held)
            ids[row, longest - len(new) :] = torch.from_numpy(new.astype(np.int64))
            positions[row, longest - len(new) :] = torch.arange(at, at + len(new))
            columns[row, longest - len(new) :] = torch.arange(at, at + len(new))
            slot.held = np.concatenate([slot.held, new])
        ids, positions, columns = ids.to(self._device), positions.to(self._device), columns.to(self._device)
        self._cache.rows = torch.tensor([slot.index for slot, _ in rows], device=self._device)
        self._cache.only = rows[0][0].index if count == 1 else None
        self._cache.columns = columns
        self._cache.width = max(len(slot.held) for slot, _ in rows)
        seen = torch.arange(self._cache.width, device=self._device)
        mask = seen <= positions[:, None, :, None]  # padding sees the first column
        logits = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        drafted: list[int] = logits[:, -1].argmax(-1).tolist()
        return drafted


def load_model(folder: Path, dtype: str, device: str = "cpu") -> Any:
    """The model in `folder`, as `CausalDrafter` takes it; arguments and errors as for `CausalDrafter.load`."""
    from transformers import AutoModelForCausalLM

    element = {"auto": "auto", "int8": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=element, attn_implementation="sdpa").eval()
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"its layers are of {', '.join(sorted(kinds))}; a drafter needs full attention in all")
    if device == "cpu":
        pack_linears(model, int8=dtype == "int8")
    return model.to(device)
