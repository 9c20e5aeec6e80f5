"""Static slots: where a drafter keeps what it has computed of each sequence, and the cache that its layers write to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any, Generic, Protocol, TypeVar

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
