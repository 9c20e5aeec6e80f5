"""A small causal model as drafter: greedy, batched, with a KV cache in static slots.

A slot holds the KV of one sequence, column by column. What the target did not accept is not undone: the slot's length
goes back to the tokens that still hold, and the columns after it are written anew. So a rollback costs nothing, and a
sequence whose tokens changed anywhere is computed from the first difference on.

A long prompt is not computed while engines wait for drafts of others: it is put off, and done in pieces by `catch_up`.

A sequence whose drafts were all right is drafted further while its engine verifies the latest ones: past their end,
over the token that the engine will add to them, to the end of the next round. If all of that is right as well, that
round is answered at once (PEARL, arXiv:2408.11850, calls it post-verify); if not it was computed while nobody waited.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.forward import SlotForward
from joinwise.actors.draft.linears import pack_linears
from joinwise.actors.draft.slots import Slots, Span

_AT_ONCE = 64
"""Tokens of one sequence that a draft may still have to compute."""
_PIECE = 32
"""Tokens of one sequence that are computed while nobody waits: whoever asks meanwhile waits for these."""
_EMPTY = np.empty(0, np.int32)


@dataclass(eq=False)
class _Slot:
    """One sequence's place in the cache.

    Attributes:
        index: of the slot.
        held: the tokens whose KV stands in its columns, in order.
        text: what it was told, and what was drafted after that: from `own` on.
        told, asked: tokens that it was told last, and drafts that were asked for.
        goal: length of `text` up to which it is drafted further while nobody waits; 0 for not at all.
    """

    index: int
    held: np.ndarray = field(default_factory=lambda: _EMPTY)
    text: np.ndarray = field(default_factory=lambda: _EMPTY)
    own: int = 0
    told: int = 0
    asked: int = 0
    goal: int = 0

    def drafted(self, tokens: np.ndarray) -> np.ndarray:
        """What has been drafted after these tokens already."""
        size = len(tokens)
        return self.text[size:] if size >= self.own and np.array_equal(self.text[:size], tokens) else _EMPTY

    def was_right(self, tokens: np.ndarray) -> bool:
        """Whether a sequence goes on with all the drafts that were asked for last."""
        size = self.told + self.asked
        return self.told > 0 and size < len(tokens) and np.array_equal(self.text[:size], tokens[:size])

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
        ahead: draft further while engines verify; for a device of its own: on shared cores that slows engines down.

    Raises:
        RuntimeError: the model's device has no room for the slots.
    """

    def __init__(
        self, model: Any, *, slots: int, max_tokens: int, name: str, threads: int, ahead: bool = False
    ) -> None:
        self.name = name
        self._ahead = ahead
        self._threads = threads
        self._ids = model.get_input_embeddings().weight.shape[0]
        self._max_tokens = min(max_tokens, int(model.config.max_position_embeddings))
        self._compute = SlotForward(model, slots, self._max_tokens)
        self._compute.warm_up()
        self._slots = Slots(slots, _Slot)
        self._behind: dict[Hashable, np.ndarray] = {}
        self._further: set[Hashable] = set()

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
        ahead: bool = False,
    ) -> CausalDrafter:
        """A drafter with the model in `folder`; `dtype` is one of torch, "auto" for the model's own, or "int8".

        Raises:
            ValueError: a model that this cannot cache (sliding windows, states instead of KV).
            RuntimeError: the device is not there, or has no room for it.
        """
        model = load_model(folder, dtype, device)
        return cls(model, slots=slots, max_tokens=max_tokens, name=name, threads=threads, ahead=ahead)

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
        drafts: list[list[int]] = [[] for _ in asks]
        for index, ask in enumerate(asks):
            if len(ask.tokens) + ask.k > self._max_tokens or not 0 <= ask.tokens.min() <= ask.tokens.max() < self._ids:
                continue
            slot = self._slot(ask.key, taken)
            if slot is None:
                continue
            taken.add(ask.key)
            self._aim(ask, slot)
            drafts[index] = slot.drafted(ask.tokens)[: ask.k].tolist()
            if not drafts[index]:
                slot.text, slot.own = ask.tokens, len(ask.tokens)
                if slot.keep(ask.tokens) > _AT_ONCE:
                    self._behind[ask.key] = ask.tokens
                    continue
            self._behind.pop(ask.key, None)
            rows[index] = ask, slot
        while lacking := [index for index, (ask, _) in rows.items() if len(drafts[index]) < ask.k]:
            for index, token in zip(lacking, self._extend([rows[index][1] for index in lacking]), strict=True):
                drafts[index].append(token)
        return drafts

    def catch_up(self) -> bool:
        """Compute a piece of a prompt that was put off; where there is none, draft a token further where that pays."""
        for key, tokens in self._behind.items():
            slot = self._slots[key]
            if (missing := slot.keep(tokens)) <= _AT_ONCE:
                del self._behind[key]
            else:
                at = len(slot.held)
                self._forward([(slot, tokens[at : at + min(_PIECE, missing - 1)])])
            return True
        slots = [self._slots[key] for key in self._further]
        self._extend([slot for slot in slots if len(slot.text) < slot.goal])
        self._further = {key for key in self._further if len(self._slots[key].text) < self._slots[key].goal}
        return bool(self._further)

    def forget(self, key: Hashable) -> None:
        """Free a sequence's slot."""
        self._behind.pop(key, None)
        self._further.discard(key)
        self._slots.free(key)

    def _slot(self, key: Hashable, taken: set[Hashable]) -> _Slot | None:
        """The sequence's slot; a new one takes the place of the one that rests longest, but of none in `taken`."""
        if (oldest := self._slots.evicted(key, taken)) is not None:
            self.forget(oldest)
        return self._slots.take(key)

    def _aim(self, ask: Ask, slot: _Slot) -> None:
        """Say how far a sequence shall be drafted: past the token that follows these drafts, and a round more."""
        right = self._ahead and slot.was_right(ask.tokens)
        slot.told, slot.asked = len(ask.tokens), ask.k
        slot.goal = min(slot.told + 2 * ask.k + 1, self._max_tokens) if right else 0
        if slot.goal:
            self._further.add(ask.key)
        else:
            self._further.discard(ask.key)

    def _extend(self, slots: Sequence[_Slot]) -> list[int]:
        """Draft a token more for each slot."""
        if not slots:
            return []
        drafted = self._forward([(slot, slot.text[len(slot.held) :]) for slot in slots])
        for slot, token in zip(slots, drafted, strict=True):
            slot.text = np.append(slot.text, np.int32(token))
        return drafted

    def _forward(self, rows: Sequence[tuple[_Slot, np.ndarray]]) -> list[int]:
        """Append tokens to slots, in one batch, and say which token each finds most likely next."""
        spans = [Span(slot.index, len(slot.held), new) for slot, new in rows]
        for slot, new in rows:
            slot.held = np.concatenate([slot.held, new])
        return self._compute(spans)


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
