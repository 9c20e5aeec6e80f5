"""Static slots: where a drafter keeps what it computed of each sequence, what a pass is told, and their cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch


class Place(Protocol):
    """What stands in a slot; `index` is the slot's number."""

    index: int


P = TypeVar("P", bound=Place)


class Slots(Generic[P]):
    """Gives each sequence a slot of its own.

    Args:
        count: slots that there are.
        make: an empty place, by its slot's number.
    """

    def __init__(self, count: int, make: Callable[[int], P]) -> None:
        self._make = make
        self._free = list(range(count))
        self._used: dict[Hashable, P] = {}  # the first was used longest ago

    def __len__(self) -> int:
        return len(self._used)

    def __getitem__(self, key: Hashable) -> P:
        return self._used[key]

    def evicted(self, key: Hashable, taken: Collection[Hashable]) -> Hashable | None:
        """Whose slot `take` would give to this sequence: that of the one that rests longest, but of none in `taken`."""
        if key in self._used or self._free:
            return None
        return next((each for each in self._used if each not in taken), None)

    def take(self, key: Hashable) -> P | None:
        """The sequence's slot, from now on the one used last; a free one for a new sequence, None if there is none."""
        place = self._used.pop(key, None)
        if place is None:
            if not self._free:
                return None
            place = self._make(self._free.pop())
        self._used[key] = place
        return place

    def free(self, key: Hashable) -> None:
        """A sequence is over; one that is not known is ignored."""
        if (place := self._used.pop(key, None)) is not None:
            self._free.append(place.index)


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens to append to a slot: `tokens`, (n,), from column `at` on."""

    slot: int
    at: int
    tokens: np.ndarray

    @property
    def end(self) -> int:
        """The column after the last."""
        return self.at + len(self.tokens)


def packed(spans: Sequence[Span], rows: int, tokens: int, columns: int) -> torch.Tensor:
    """A pass' input, (rows, 1 + 3 x tokens): slots, then ids, positions and columns, as `unpacked` tells them apart.

    Rows are aligned at their last token. What is before a row's first token, and rows after the last span, is computed
    for nobody: it sees the first column of its slot and is written to the one after the last, which nobody reads.
    """
    whole = np.zeros((rows, 1 + 3 * tokens), np.int64)
    ids, positions, places = (whole[:, 1 + part * tokens : 1 + (part + 1) * tokens] for part in range(3))
    places[:] = columns
    for row, span in enumerate(spans):
        here = slice(tokens - len(span.tokens), tokens)
        whole[row, 0] = span.slot
        ids[row, here] = span.tokens
        positions[row, here] = places[row, here] = np.arange(span.at, span.end)
    return torch.from_numpy(whole)


def unpacked(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots, (rows,), and ids, positions and columns, each (rows, tokens)."""
    ids, positions, places = whole[:, 1:].unflatten(1, (3, -1)).unbind(1)
    return whole[:, 0], ids, positions, places


class SlotCache:
    """What the model takes for its cache: rows of a batch are slots, and each token has a column of its own.

    `only` is the slot of a batch of one. Keys and values are of shape (slots, heads, columns + 1, size); padding is
    written to the last column.
    """

    def __init__(self, slots: int, columns: int) -> None:
        self._slots, self._columns = slots, columns
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rows = torch.empty(0, dtype=torch.long)
        self.columns = torch.empty(0, 0, dtype=torch.long)
        self.only: int | None = None
        self.width = 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new KV, each (rows, heads, tokens, size); returns all that the rows hold, `width` columns."""
        if layer not in self._layers:
            shape = (self._slots, keys.shape[1], self._columns + 1)
            self._layers[layer] = keys.new_zeros(*shape, keys.shape[3]), values.new_zeros(*shape, values.shape[3])
        return self._put(self._layers[layer][0], keys), self._put(self._layers[layer][1], values)

    def _put(self, stored: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        stored[self.rows[:, None], :, self.columns] = fresh.transpose(1, 2)
        if self.only is not None:
            return stored[self.only : self.only + 1, :, : self.width]  # no copy
        return stored[self.rows, :, : self.width]
