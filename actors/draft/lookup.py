"""Prompt lookup: what followed the last tokens when they stood in the sequence before will follow them again.

Source: Saxena, "Prompt Lookup Decoding" (2023); the same as vLLM's `ngram`.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from joinwise.actors.draft.drafter import Ask
from joinwise.actors.draft.length import Acceptance

_LONGEST, _SHORTEST = 4, 2
_SHORTEST_BESIDE_A_MODEL = 3
"""Two equal tokens are often a coincidence, and there a model is at hand."""
_TRUSTED = 0.6
"""Share of right tokens from which on guesses are used rather than a model: 2.5 tokens a step, for nothing."""
_MEMORY = 0.9
_PRIOR_TRIALS = 4.0


class PromptLookup:
    """Drafts in any vocabulary, and keeps nothing."""

    name = "lookup"
    held = 0

    def begin(self) -> None:
        """Nothing to prepare."""

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See `lookup`."""
        return [lookup(ask.tokens, ask.k) for ask in asks]

    def catch_up(self) -> bool:
        """Nothing is put off."""
        return False

    def forget(self, key: Hashable) -> None:
        """Nothing is kept."""


def lookup(tokens: np.ndarray, k: int, *, longest: int = _LONGEST, shortest: int = _SHORTEST) -> list[int]:
    """Continue a sequence as it went on after the latest of the longest earlier matches of its end.

    A match near the end is continued by what it predicts itself, so that a text that repeats is drafted `k` ids far.

    Args:
        tokens: shape (n,).
        k: ids to draft.
        longest: tokens at the end that are compared at most.
        shortest: tokens that must match at least.

    Returns:
        `k` ids, or none without a match.
    """
    size = len(tokens)
    ends = np.flatnonzero(tokens[: size - 1] == tokens[size - 1]) if size else np.empty(0, np.int64)
    best = -1
    for length in range(1, longest + 1):
        if length > 1:
            ends = ends[ends >= length - 1]
            ends = ends[tokens[ends - (length - 1)] == tokens[size - length]]
        if not len(ends):
            break
        if length >= shortest:
            best = int(ends[-1])
    if best < 0:
        return []
    drafted: list[int] = []
    for at in range(best + 1, best + 1 + k):
        drafted.append(int(tokens[at]) if at < size else drafted[at - size])
    return drafted


def repeated(tokens: np.ndarray, k: int) -> list[int]:
    """What a sequence says itself, where a model is at hand."""
    return lookup(tokens, k, shortest=_SHORTEST_BESIDE_A_MODEL)


class Guess:
    """What some text says comes next in one sequence, beside a model that could be asked.

    What is looked up costs nothing, and is right for long in code, quotations and lists; in other text it is a guess at
    what is common. So each is held against what came, whether it was used or not.

    Args:
        of: what such guesses were worth in all sequences, which is told as well; None for nothing known.
    """

    def __init__(self, of: Acceptance | None = None) -> None:
        self._of = of
        rate = of.rate if of is not None else _TRUSTED
        self._worth = Acceptance(_PRIOR_TRIALS, _PRIOR_TRIALS * rate, _MEMORY)
        self._at = 0
        self.ids: list[int] = []

    @property
    def rate(self) -> float:
        """How likely one of the ids is right when those before it are."""
        return self._worth.rate

    @property
    def trusted(self) -> bool:
        """Whether there is one, and most of the latest were right."""
        return bool(self.ids) and self.rate >= _TRUSTED

    def renew(self, tokens: np.ndarray, ids: list[int]) -> None:
        """Guess these ids after tokens of shape (n,), and learn from the tokens what the last guess was worth."""
        came = tokens[self._at : self._at + len(self.ids)]
        wrong = np.flatnonzero(came != np.array(self.ids[: len(came)], came.dtype))
        right = int(wrong[0]) if len(wrong) else len(came)
        for worth in (self._worth, self._of):
            if worth is not None and len(came):
                worth.add(len(came), right)
        self._at, self.ids = len(tokens), ids
