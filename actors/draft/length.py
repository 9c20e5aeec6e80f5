"""How many drafts to have: as many as bring the most tokens a second, which may be none.

Three things are measured while an engine works. A step that verifies M tokens costs a + b M seconds; drafting k deep
costs c + d k; and of each sequence it is known how often a draft was accepted when those before it were. With an
acceptance of p, k drafts yield 1 + p + ... + p^k tokens (Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", 2023, section 3.1), so the last of them adds p^k. For one depth of drafting drafts are handed out
by what they add, the best first, for as long as that pays for their share of the step; the best depth wins. Drafts that
are there already, since they were looked up, cost their share of the step alone.

Nothing of this touches a clock: costs are told, and the choice depends on what was told alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

# Weight that an observation keeps from one to the next: of steps about the last fifty count, of acceptance the last
# twenty, of drafting the last ten, since a draft actor becomes slow as soon as others ask it too.
_VERIFY_MEMORY, _ACCEPT_MEMORY, _DRAFT_MEMORY = 0.98, 0.95, 0.9
_PRIOR_TRIALS, _PRIOR_RATE = 4.0, 0.6
"""What is assumed of a sequence that has just begun, beside what its engine has seen of others."""
_CALIBRATION = 12
"""Rounds at the beginning in which lengths vary, so that there is something to fit."""
_NONE: Mapping[int, float] = MappingProxyType({})
_FIRST_REST, _LONGEST_REST, _PROBES = 16, 256, 4
"""Steps without drafts after which some rounds are asked for all the same: costs and texts change."""


@dataclass
class Line:
    """A line through points of which older ones count less: least squares."""

    memory: float = _VERIFY_MEMORY
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Take note of a point."""
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, self.memory * getattr(self, name) + value)

    @property
    def known(self) -> bool:
        """Whether there are points."""
        return self.weight > 0

    def fit(self) -> tuple[float, float]:
        """Intercept and slope, neither of them negative: a cost that falls with the work is noise."""
        if not self.known:
            return 0.0, 0.0
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x * mean_x
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread > 1e-9 else 0.0
        slope = min(max(0.0, slope), mean_y / mean_x if mean_x > 0 else 0.0)
        return mean_y - slope * mean_x, slope


@dataclass
class Acceptance:
    """How often a draft was accepted when those before it were; older ones count less."""

    trials: float
    accepted: float
    memory: float = _ACCEPT_MEMORY

    def add(self, drafts: int, accepted: int) -> None:
        """Of so many drafts so many were accepted."""
        self.trials = self.memory * self.trials + min(accepted + 1, drafts)
        self.accepted = self.memory * self.accepted + accepted

    @property
    def rate(self) -> float:
        """The share, below 1."""
        return min(0.995, self.accepted / self.trials)


class LengthChooser:
    """Chooses for one engine.

    Args:
        most: drafts for a sequence in one step, at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._verify, self._draft = Line(), Line(_DRAFT_MEMORY)
        self._all = Acceptance(_PRIOR_TRIALS, _PRIOR_TRIALS * _PRIOR_RATE)
        self._sequences: dict[int, Acceptance] = {}
        self._rounds = 0
        self._rested = 0
        self._rest = _FIRST_REST

    def verified(self, tokens: int, seconds: float) -> None:
        """A step has run `tokens` tokens through the target, one of each sequence and the drafts."""
        self._verify.add(tokens, seconds)

    def drafted(self, depth: int, seconds: float) -> None:
        """A round of drafts of up to `depth` ids has come back after so many seconds."""
        self._draft.add(depth, seconds)

    def accepted(self, sequence: int, drafts: int, accepted: int) -> None:
        """Of a sequence's drafts, at least one, so many were accepted."""
        for each in (self._all, self._of(sequence)):
            each.add(drafts, accepted)

    def forget(self, sequence: int) -> None:
        """A sequence is over."""
        self._sequences.pop(sequence, None)

    def choose(
        self, asked: Sequence[int], guessed: Mapping[int, float] = _NONE, spare: Mapping[int, float] = _NONE
    ) -> tuple[dict[int, int], dict[int, int]]:
        """Choose for the sequences of the next step.

        Args:
            asked: those for which a draft actor would be asked.
            guessed: those whose drafts are there already, each with the chance that one of them is right.
            spare: the same of all that have such drafts, good or bad; taken where nobody is asked.

        Returns:
            Drafts to ask for, and how many to take of those that are there, by sequence.
        """
        if self._rounds < _CALIBRATION and (asked or guessed):
            self._rounds += 1
            depth = max(1, self._most * (self._rounds % 3 + 1) // 3)
            return dict.fromkeys(asked, depth), dict.fromkeys(guessed, depth)
        rates = {sequence: self._of(sequence).rate for sequence in asked}
        verify = self._verify.fit()
        lengths = best_lengths(rates, self._most, verify, self._draft.fit(), guessed)
        wanted, taken = ({each: lengths[each] for each in some} for some in (asked, guessed))
        if any(wanted.values()):
            self._rested, self._rest = 0, _FIRST_REST
        elif asked and self._probes():
            wanted = dict.fromkeys(asked, max(1, self._most // 2))
        else:
            wanted, taken = {}, best_lengths({}, self._most, verify, (0.0, 0.0), {**spare, **guessed})
        return wanted, taken

    def _probes(self) -> bool:
        """Whether to ask in a step in which nothing is to be gained by it."""
        self._rested += 1
        if self._rested < self._rest:
            return False
        if self._rested >= self._rest + _PROBES:
            self._rested, self._rest = 0, min(2 * self._rest, _LONGEST_REST)
            return False
        return True

    def _of(self, sequence: int) -> Acceptance:
        if sequence not in self._sequences:
            self._sequences[sequence] = Acceptance(_PRIOR_TRIALS, _PRIOR_TRIALS * self._all.rate)
        return self._sequences[sequence]


def best_lengths(
    rates: Mapping[int, float],
    most: int,
    verify: tuple[float, float],
    draft: tuple[float, float],
    guessed: Mapping[int, float] = _NONE,
) -> dict[int, int]:
    """Drafts of each sequence that bring the most tokens a second.

    Args:
        rates: of each sequence to ask for, how likely a draft is accepted when those before it were; below 1.
        most: drafts of one sequence.
        verify: seconds of a step, and of each token in it.
        draft: seconds of a round of drafts, and of each step of its depth. A round that is not asked costs nothing.
        guessed: as `rates`, of sequences whose drafts are there already.

    Returns:
        A length for each sequence, 0 for all where drafts do not pay.
    """
    every = {**rates, **guessed}
    best = dict.fromkeys(every, 0)
    if not every:
        return best
    fixed, each = verify
    most_rate = _ratio(len(every), fixed + each * len(every))
    for depth in range(most + 1 if rates else 1):
        lengths, rooms = dict.fromkeys(every, 0), dict.fromkeys(rates, depth) | dict.fromkeys(guessed, most)
        tokens, seconds = float(len(every)), fixed + each * len(every) + (draft[0] + draft[1] * depth if depth else 0.0)
        gains = [(-rate, sequence) for sequence, rate in every.items() if rooms[sequence]]
        heapq.heapify(gains)
        while gains and -gains[0][0] * seconds > each * tokens:
            gain, sequence = heapq.heappop(gains)
            tokens, seconds = tokens - gain, seconds + each
            lengths[sequence] += 1
            if lengths[sequence] < rooms[sequence]:
                heapq.heappush(gains, (gain * every[sequence], sequence))
        if (rate := _ratio(tokens, seconds)) > most_rate:
            most_rate, best = rate, lengths
    return best


def _ratio(tokens: float, seconds: float) -> float:
    return tokens / max(seconds, 1e-9)
