"""What every drafter is: guesses at the next tokens of some sequences, each told in full."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Ask:
    """One sequence to continue.

    Attributes:
        key: names the sequence; a drafter may keep what it has computed under it.
        tokens: all of it so far, shape (n,) with n at least 1; a later ask of the same key may tell other tokens.
        k: the most ids to draft, at least 1.
        hidden: the target's last hidden states of the tokens before the last one, as many as are new; shape (m, size),
            float16 or float32, the last row of the last token but one. None where there are none.
    """

    key: Hashable
    tokens: np.ndarray
    k: int
    hidden: np.ndarray | None = None


class Drafter(Protocol):
    """Used by one thread. Whatever it answers is verified: a bad guess costs time, never a token."""

    @property
    def name(self) -> str:
        """How it drafts, for messages and metrics."""
        ...

    @property
    def held(self) -> int:
        """Sequences for which it keeps something."""
        ...

    def begin(self) -> None:
        """Called once, on the thread that will call the rest."""
        ...

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """At most `k` ids for each ask, in the asks' order; an empty list where it has nothing to offer in time."""
        ...

    def catch_up(self) -> bool:
        """Do one piece of work that `draft` has put off; False when there is none."""
        ...

    def forget(self, key: Hashable) -> None:
        """A sequence is over; one that is not known is ignored."""
        ...
