"""How many drafts to ask for: as many as bring the most tokens a second, which may be none.

Three things are measured while an engine works. A step that verifies M tokens costs a + b M seconds; drafting k deep
costs c + d k; and of each sequence it is known how often a draft was accepted when those before it were. With an
acceptance of p, k drafts yield 1 + p + ... + p^k tokens (Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", 2023, section 3.1), so the last of them adds p^k. For one depth of drafting drafts are handed out
by what they add, the best first, for as long as that pays for their share of the step; the best depth wins.

Nothing of this touches a clock: costs are told, and the choice depends on what was told alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Weight that an observation keeps from one to the next: of steps about the last fifty count, of acceptance the last
# twenty, of drafting the last ten, since a draft actor becomes slow as soon as others ask it too.
_VERIFY_MEMORY, _ACCEPT_MEMORY, _DRAFT_MEMORY = 0.98, 0.95, 0.9
_PRIOR_TRIALS, _PRIOR_RATE = 4.0, 0.6
"""What is assumed of a sequence that has just begun, beside what its engine has seen of others."""
_CALIBRATION = 12
"""Rounds at the beginning in which lengths vary, so that there is something to fit."""
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

    def choose(self, sequences: Sequence[int]) -> dict[int, int]:
        """Drafts to ask for, of each sequence of the next step."""
        if self._rounds < _CALIBRATION:
            self._rounds += 1
            depth = max(1, self._most * (self._rounds % 3 + 1) // 3)
            return dict.fromkeys(sequences, depth)
        rates = {sequence: self._of(sequence).rate for sequence in sequences}
        lengths = best_lengths(rates, self._most, self._verify.fit(), self._draft.fit())
        if any(lengths.values()):
            self._rested, self._rest = 0, _FIRST_REST
            return lengths
        self._rested += 1
        if self._rested < self._rest:
            return lengths
        if self._rested >= self._rest + _PROBES:
            self._rested, self._rest = 0, min(2 * self._rest, _LONGEST_REST)
            return lengths
        return dict.fromkeys(sequences, max(1, self._most // 2))

    def _of(self, sequence: int) -> Acceptance:
        if sequence not in self._sequences:
            self._sequences[sequence] = Acceptance(_PRIOR_TRIALS, _PRIOR_TRIALS * self._all.rate)
        return self._sequences[sequence]


def best_lengths(
    rates: Mapping[int, float], most: int, verify: tuple[float, float], draft: tuple[float, float]
) -> dict[int, int]:
    """Drafts of each sequence that bring the most tokens a second.

    Args:
        rates: of each sequence, how likely a draft is accepted when those before it were; below 1.
        most: drafts of one sequence.
        verify: seconds of a step, and of each token in it.
        draft: seconds of a round of drafts, and of each step of its depth. A round that is not asked costs nothing.

    Returns:
        A length for each sequence, 0 for all where drafts do not pay.
    """
    best = dict.fromkeys(rates, 0)
    if not rates:
        return best
    fixed, each = verify
    most_rate = _ratio(len(rates), fixed + each * len(rates))
    for depth in range(1, most + 1):
        lengths = dict.fromkeys(rates, 0)
        tokens, seconds = float(len(rates)), fixed + each * len(rates) + draft[0] + draft[1] * depth
        gains = [(-rate, sequence) for sequence, rate in rates.items()]
        heapq.heapify(gains)
        while gains and -gains[0][0] * seconds > each * tokens:
            gain, sequence = heapq.heappop(gains)
            tokens, seconds = tokens - gain, seconds + each
            lengths[sequence] += 1
            if lengths[sequence] < depth:
                heapq.heappush(gains, (gain * rates[sequence], sequence))
        if (rate := _ratio(tokens, seconds)) > most_rate:
            most_rate, best = rate, lengths
    return best


def _ratio(tokens: float, seconds: float) -> float:
    return tokens / max(seconds, 1e-9)
