"""What a drafter would have brought along answers that are known: rounds of drafts, verified greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from joinwise.actors.draft.drafter import Ask, Drafter
from joinwise.actors.draft.train.recording import Recording


@dataclass
class Worth:
    """What drafts were worth.

    Attributes:
        rounds: steps that the target would have taken after each answer's first token.
        tokens: that these steps brought.
        drafted: ids that were drafted.
        right: by depth, how many rounds had at least so many right drafts; [0] of one at least.
    """

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    right: list[int] = field(default_factory=list)

    @property
    def accepted_length(self) -> float:
        """Right drafts of a round."""
        return sum(self.right) / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_round(self) -> float:
        """With the one that the target adds itself; less where an answer ended."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def accepted_share(self) -> float:
        """Of what was drafted."""
        return sum(self.right) / self.drafted if self.drafted else 0.0


def measure(drafter: Drafter, recordings: Sequence[Recording], k: int) -> Worth:
    """Let a drafter draft up to `k` tokens a round along each answer.

    It is told what an engine would tell it that computed no prompt but its last token: tokens, and the hidden states of
    those that the target has verified. What it puts off is waited for.
    """
    worth = Worth(right=[0] * k)
    for number, each in enumerate(recordings):
        text, told, at = each.tokens, each.prompt - 1, each.prompt + 1
        while at < len(text):
            most = min(k, len(text) - at)
            hidden = each.hidden[told : at - 1]
            drafted = drafter.draft([Ask(number, text[:at], most, hidden)])[0]
            while not drafted and drafter.catch_up():
                drafted = drafter.draft([Ask(number, text[:at], most)])[0]
            right = 0
            while right < len(drafted) and drafted[right] == text[at + right]:
                worth.right[right] += 1
                right += 1
            worth.rounds += 1
            worth.drafted += len(drafted)
            gained = min(right + 1, len(text) - at)
            worth.tokens += gained
            told, at = at - 1, at + gained
        drafter.forget(number)
    return worth
