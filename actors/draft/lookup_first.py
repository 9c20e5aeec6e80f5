"""Drafts from the text itself where it repeats itself, and from a model elsewhere.

What prompt lookup finds costs nothing, and is right for long in code, quotations and lists; in other text it is a guess
at what is common. So each sequence's lookups are held against what came, whether they were used or not, and are used
for as long as most of their tokens are right. The model's KV falls behind meanwhile, and is computed when it is asked.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from joinwise.actors.draft.drafter import Ask, Drafter
from joinwise.actors.draft.hidden import HiddenTail
from joinwise.actors.draft.length import Acceptance
from joinwise.actors.draft.lookup import lookup

_SHORTEST = 3
"""Tokens that must match: two are often a coincidence, and here a model is at hand."""
_TRUSTED = 0.6
"""Share of right tokens from which on lookups are used: 2.5 tokens a step, for nothing."""
_MEMORY = 0.9
_PRIOR_TRIALS = 4.0


@dataclass
class _Trust:
    """What a sequence's lookups were worth lately; `guess` followed `at` tokens. The model lacks `hidden` yet."""

    worth: Acceptance = field(default_factory=lambda: Acceptance(_PRIOR_TRIALS, _PRIOR_TRIALS * _TRUSTED, _MEMORY))
    at: int = 0
    guess: list[int] = field(default_factory=list)
    hidden: HiddenTail = field(default_factory=HiddenTail)

    def learn(self, tokens: np.ndarray) -> None:
        """Hold the last guess against what came."""
        came = tokens[self.at : self.at + len(self.guess)]
        wrong = np.flatnonzero(came != np.array(self.guess[: len(came)], came.dtype))
        self.worth.add(len(came), int(wrong[0]) if len(wrong) else len(came))


class LookupFirst:
    """Asks a model only for sequences in which nothing is found that deserves trust."""

    def __init__(self, model: Drafter) -> None:
        self._model = model
        self._trusts: dict[Hashable, _Trust] = {}

    @property
    def name(self) -> str:
        """See `Drafter.name`."""
        return f"lookup, then {self._model.name}"

    @property
    def held(self) -> int:
        """Sequences of which the model keeps KV."""
        return self._model.held

    def begin(self) -> None:
        """See `Drafter.begin`."""
        self._model.begin()

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Lookups, and the model's drafts where there are none."""
        drafts = [self._looked_up(ask) for ask in asks]
        rest = [index for index, found in enumerate(drafts) if not found]
        modelled = [self._told(asks[index]) for index in rest]
        for index, ids in zip(rest, self._model.draft(modelled) if rest else [], strict=True):
            drafts[index] = ids
        return drafts

    def catch_up(self) -> bool:
        """See `Drafter.catch_up`."""
        return self._model.catch_up()

    def forget(self, key: Hashable) -> None:
        """See `Drafter.forget`."""
        self._trusts.pop(key, None)
        self._model.forget(key)

    def _looked_up(self, ask: Ask) -> list[int]:
        trust = self._trusts.setdefault(ask.key, _Trust())
        trust.learn(ask.tokens)
        trust.hidden.add(ask.hidden, len(ask.tokens))
        trust.at, trust.guess = len(ask.tokens), lookup(ask.tokens, ask.k, shortest=_SHORTEST)
        return trust.guess if trust.worth.rate >= _TRUSTED else []

    def _told(self, ask: Ask) -> Ask:
        """With all hidden states that the model does not know yet."""
        return replace(ask, hidden=self._trusts[ask.key].hidden.take(len(ask.tokens)))
