"""What an engine's batch looks like in sequences.

vLLM tells a proposer rows of its batch, not requests: a row may hold another request in the next step. So a row is
known by its tokens alone. A sequence is a row of earlier steps whose tokens the row still begins with; where there is
none, the row begins a new sequence. Which request it is does not matter: drafts depend on tokens only.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from joinwise.actors.draft.hidden import HiddenTail
from joinwise.actors.draft.lookup import Guess
from joinwise.actors.draft.recall import Recall

_FORGET_AFTER = 64
"""Rounds without a row after which a sequence is over: its request has ended, or waits for its turn."""


@dataclass(eq=False)
class Track:
    """One sequence.

    Attributes:
        number: its name towards the draft actor.
        tokens: all of it when it was last seen, shape (n,).
        seen: the round in which it was.
        answer: where what it was answered begins, of which nothing is recalled yet.
        hidden: the target's hidden states that no draft actor was told yet.
        own: what it says itself.
        recalled: what other answers say.
    """

    number: int
    tokens: np.ndarray
    seen: int
    answer: int = 0
    hidden: HiddenTail = field(default_factory=HiddenTail)
    own: Guess = field(default_factory=Guess)
    recalled: Guess = field(default_factory=Guess)

    @property
    def guess(self) -> Guess:
        """The better one of those that say something."""
        return max((self.own, self.recalled), key=lambda each: (bool(each.ids), each.rate))

    def begins(self, history: np.ndarray) -> bool:
        """Whether a row goes on from here."""
        return len(self.tokens) <= len(history) and np.array_equal(self.tokens, history[: len(self.tokens)])


class Tracks:
    """Finds each row's sequence.

    Args:
        recall: is told what a sequence was answered as soon as no row has it; None for nobody.
    """

    def __init__(self, recall: Recall | None = None) -> None:
        self._numbers = itertools.count(1)
        self._by_row: dict[int, Track] = {}
        self._others: list[Track] = []
        self._round = 0
        self._recall = recall

    def follow(self, rows: Mapping[int, np.ndarray]) -> tuple[dict[int, Track], list[int]]:
        """Take note of a step.

        Args:
            rows: tokens of each row that is to be drafted for, shape (n,); they are copied.

        Returns:
            The sequence of each row, and the numbers of those that are over.
        """
        self._round += 1
        found = {row: each for row, each in self._by_row.items() if row in rows and each.begins(rows[row])}
        free = [each for row, each in self._by_row.items() if row not in found] + self._others
        free.sort(key=lambda each: -len(each.tokens))  # of several that fit, the one that knows most
        for row in rows.keys() - found.keys():
            match = next((each for each in free if each.begins(rows[row])), None)
            if match is not None:
                free.remove(match)
            found[row] = match or self._fresh(rows[row])
        for row, track in found.items():
            track.tokens, track.seen = rows[row].copy(), self._round
        if self._recall is not None:
            for track in free:
                self._recall.add(track.tokens, track.answer)
                track.answer = len(track.tokens)  # should it go on after all
        self._by_row = found
        self._others = [each for each in free if self._round - each.seen <= _FORGET_AFTER]
        return found, [each.number for each in free if self._round - each.seen > _FORGET_AFTER]

    def _fresh(self, tokens: np.ndarray) -> Track:
        """A new sequence, whose first token is the latest: engines draft from there on."""
        worth = self._recall.worth if self._recall is not None else None
        return Track(next(self._numbers), tokens, self._round, answer=len(tokens) - 1, recalled=Guess(worth))
