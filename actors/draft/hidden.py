"""The target's last hidden states on their way to a drafter that wants them (`head`).

They are told for the tokens before a sequence's last one, and only once each. So whoever holds a sequence and does not
hand on what it was told, since nobody is asked or somebody else drafts, keeps it in a `HiddenTail`. Lost ones are no
harm: the drafter does without.
"""

from __future__ import annotations

import numpy as np

MAX_HIDDEN = 64
"""Hidden states that are kept, and told at once, for one sequence."""
_WIRE = np.dtype("<f2")


class HiddenTail:
    """Hidden states of the tokens before a sequence's last one, without a gap, the latest `MAX_HIDDEN` of them."""

    def __init__(self) -> None:
        self._rows: np.ndarray | None = None
        self._size = 0

    def add(self, hidden: np.ndarray | None, size: int) -> None:
        """Take in what was told of a sequence that now has `size` tokens: (m, numbers), or nothing."""
        if hidden is None or not len(hidden):
            return
        if self._rows is not None and size - len(hidden) == self._size and hidden.shape[1] == self._rows.shape[1]:
            hidden = np.concatenate([self._rows, hidden])
        self._rows, self._size = hidden[-MAX_HIDDEN:], size

    def take(self, size: int) -> np.ndarray | None:
        """Hand on what there is for a sequence of `size` tokens; it is not kept."""
        rows, self._rows = self._rows, None
        return rows if self._size == size else None


def packed(hidden: np.ndarray) -> bytes:
    """For the wire: (m, numbers) of any float type as float16, what is too large for it as its largest."""
    most = np.finfo(_WIRE).max
    return np.clip(hidden, -most, most).astype(_WIRE).tobytes()


def unpacked(hidden: bytes, numbers: int, tokens: int) -> np.ndarray | None:
    """From the wire: (m, numbers) of float16; None for none, and for what cannot be of a sequence of `tokens`."""
    row = _WIRE.itemsize * numbers
    if not hidden or not numbers or len(hidden) % row or not len(hidden) // row <= min(MAX_HIDDEN, tokens - 1):
        return None
    return np.frombuffer(hidden, _WIRE).reshape(-1, numbers)
