"""A draft head as drafter: greedy, batched, with its KV and the features that it was told in static slots.

A sequence's drafts depend on its tokens and on the features that were told for them, and on nothing else: not on what
was drafted before, rolled back, evicted or put off. Columns that were computed from features of the head's own are
computed again once the target has said how it goes on. What no feature was told for is drafted without (see `head`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.head import DovetailHead, load_head
from joinwise.actors.draft.linears import pack_linears
from joinwise.actors.draft.slots import SlotCache, Slots, Span, packed, unpacked
from joinwise.actors.models import LocalModel

_AT_ONCE, _PIECE = 64, 32
"""Tokens that a draft may still have to compute, and those that are computed at once while nobody waits."""


@dataclass(eq=False)
class _Place:
    """One sequence: its tokens as they were told, and how many columns hold for good."""

    index: int
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    computed: int = 0


class HeadDrafter:
    """Drafts what a head finds most likely.

    Args:
        head: in evaluation mode; it drafts where its weights are.
        slots: sequences of which it keeps KV; further ones are not drafted for until one is over or the oldest rests.
        max_tokens: of a sequence, drafts included.
        name: for messages.
        threads: compute threads.
    """

    def __init__(self, head: DovetailHead, *, slots: int, max_tokens: int, name: str, threads: int) -> None:
        self.name = name
        self._head = head
        self._threads = threads
        self._max_tokens = min(max_tokens, head.shape.max_position_embeddings)
        self._device = head.absent.device
        self._cache = SlotCache(slots, self._max_tokens)
        self._slots = Slots(slots, self._fresh)
        columns = self._max_tokens + 1  # the last is for padding
        self._features = head.absent.detach().new_zeros(slots, columns, head.shape.hidden_size)
        self._known = torch.zeros(slots, columns, dtype=torch.bool, device=self._device)
        self._behind: set[Hashable] = set()

    @classmethod
    def load(
        cls,
        folder: Path,
        target: LocalModel,
        dtype: str,
        *,
        slots: int,
        max_tokens: int,
        threads: int,
        device: str = "cpu",
    ) -> HeadDrafter:
        """A drafter with the head in `folder`; `dtype` is one of torch, "int8", or "auto" for bfloat16.

        Raises:
            ConfigError: there is no head, or it is another target's.
            RuntimeError: the device is not there, or has no room for it.
        """
        element = {"auto": torch.bfloat16, "int8": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
        head = load_head(folder, target, element)
        if device == "cpu":
            pack_linears(head, int8=dtype == "int8")
        return cls(head.to(device), slots=slots, max_tokens=max_tokens, name=f"head of {target.name}", threads=threads)

    @property
    def held(self) -> int:
        """Slots in use."""
        return len(self._slots)

    @property
    def hidden_size(self) -> int:
        """Numbers of a feature."""
        return self._head.shape.hidden_size

    def begin(self) -> None:
        """See `Drafter.begin`: OpenMP keeps the number of threads per thread."""
        torch.set_num_threads(self._threads)

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Greedy continuations; none for a sequence that is too long, too new or of foreign ids, or without a slot."""
        taken: set[Hashable] = set()
        rows: dict[int, _Place] = {}
        for index, ask in enumerate(asks):
            ids = ask.tokens
            if len(ids) + ask.k > self._max_tokens or not 0 <= ids.min() <= ids.max() < self._head.ids:
                continue
            place = self._place(ask.key, taken)
            if place is None:
                continue
            taken.add(ask.key)
            self._learn(place, ask)
            if len(ids) - place.computed > _AT_ONCE:
                self._behind.add(ask.key)
            else:
                self._behind.discard(ask.key)
                rows[index] = place
        drafts: list[list[int]] = [[] for _ in asks]
        spans = {index: (place, place.computed, place.tokens) for index, place in rows.items()}
        while spans:
            guessed = self._forward(list(spans.values()))
            for (index, (place, _, tokens)), feature, token in zip(
                list(spans.items()), guessed, self._likeliest(guessed), strict=True
            ):
                drafts[index].append(token)
                if len(drafts[index]) == asks[index].k:
                    del spans[index]
                    continue
                at = len(tokens)
                self._features[place.index, at], self._known[place.index, at] = feature, True
                spans[index] = place, at, np.append(tokens, np.int32(token))
        for place in rows.values():
            place.computed = len(place.tokens)
            self._known[place.index, place.computed :] = False  # they were the head's own
        return drafts

    def catch_up(self) -> bool:
        """Compute a piece of a sequence that was put off."""
        key = next(iter(self._behind), None)
        if key is None:
            return False
        place = self._slots[key]
        if len(place.tokens) - place.computed <= _AT_ONCE:
            self._behind.discard(key)
        else:
            until = min(place.computed + _PIECE, len(place.tokens) - 1)
            self._forward([(place, place.computed, place.tokens[:until])])
            place.computed = until
        return True

    def forget(self, key: Hashable) -> None:
        """Free a sequence's slot."""
        self._behind.discard(key)
        self._slots.free(key)

    def _fresh(self, index: int) -> _Place:
        self._known[index] = False
        return _Place(index)

    def _place(self, key: Hashable, taken: set[Hashable]) -> _Place | None:
        """The sequence's slot; a new one takes the place of the one that rests longest, but of none in `taken`."""
        if (oldest := self._slots.evicted(key, taken)) is not None:
            self.forget(oldest)
        return self._slots.take(key)

    def _learn(self, place: _Place, ask: Ask) -> None:
        """Go back to what still holds, and take in what is new; at least the last token remains to be computed."""
        size = min(len(place.tokens), len(ask.tokens))
        differ = np.flatnonzero(place.tokens[:size] != ask.tokens[:size])
        common = int(differ[0]) if len(differ) else size
        self._known[place.index, common + 1 :] = False  # a column's feature is of the tokens before it
        place.computed = min(place.computed, common, len(ask.tokens) - 1)
        place.tokens = ask.tokens
        hidden, end = ask.hidden, len(ask.tokens)
        if hidden is None or not 0 < len(hidden) < end or hidden.shape[1:] != (self.hidden_size,):
            return
        if not np.isfinite(hidden).all():
            return
        told = slice(end - len(hidden), end)
        self._features[place.index, told] = torch.from_numpy(hidden.astype(np.float32)).to(self._features)
        self._known[place.index, told] = True
        place.computed = min(place.computed, told.start)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[tuple[_Place, int, np.ndarray]]) -> torch.Tensor:
        """Compute columns of slots in one batch: from the given one to the last of the tokens.

        Returns:
            The feature that the head guesses for each row's last token, (rows, size).
        """
        spans = [Span(place.index, start, tokens[start:]) for place, start, tokens in rows]
        longest = max(len(span.tokens) for span in spans)
        slots, ids, positions, columns = unpacked(packed(spans, len(spans), longest, self._max_tokens).to(self._device))
        self._cache.rows, self._cache.columns = slots, columns
        self._cache.only = spans[0].slot if len(spans) == 1 else None
        self._cache.width = max(span.end for span in spans)
        seen = torch.arange(self._cache.width, device=self._device)
        return self._head(
            ids,
            self._features[slots[:, None], columns],
            self._known[slots[:, None], columns],
            attention_mask=seen <= positions[:, None, :, None],  # padding sees the first column
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )[:, -1]

    @torch.inference_mode()
    def _likeliest(self, features: torch.Tensor) -> list[int]:
        """The token that each of some features, (rows, size), makes likeliest."""
        drafted: list[int] = self._head.output(features).argmax(-1).tolist()
        return drafted
