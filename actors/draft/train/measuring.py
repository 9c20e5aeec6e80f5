"""What a drafter would have brought along answers that are known: rounds of drafts, verified greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from joinwise.actors.draft.drafter import Ask, Drafter
from joinwise.actors.draft.hidden import MAX_HIDDEN
from joinwise.actors.draft.lookup import Guess, repeated
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


AT_ONCE = 16
"""Answers that are drafted along at once: a drafter that reads its weights for many is quicker, and no other."""


@dataclass(eq=False)
class _Course:
    """How far a drafter has come along one answer: up to `at`, and it was told the features up to `told`."""

    number: int
    recording: Recording
    told: int
    at: int
    guess: Guess = field(default_factory=Guess)

    def looked_up(self, k: int) -> list[int]:
        text = self.recording.tokens[: self.at]
        self.guess.renew(text, repeated(text, min(k, len(self.recording.tokens) - self.at)))
        return self.guess.ids if self.guess.trusted else []

    def ask(self, k: int, *, tell: bool = True) -> Ask:
        text = self.recording.tokens
        hidden = self.recording.hidden[max(self.told, self.at - 1 - MAX_HIDDEN) : self.at - 1] if tell else None
        return Ask(self.number, text[: self.at], min(k, len(text) - self.at), hidden)


def measure(drafter: Drafter, recordings: Sequence[Recording], k: int, *, lookup: bool = False) -> Worth:
    """Let a drafter draft up to `k` tokens a round along each answer.

    It is told what an engine would tell it that computed no prompt but its last token: tokens, and the hidden states of
    those that the target has verified. What it puts off is waited for. With `lookup` it is asked only where what an
    engine looks up does not deserve trust.
    """
    worth = Worth(right=[0] * k)
    waiting = [
        _Course(number, each, each.prompt - 1, each.prompt + 1)
        for number, each in enumerate(recordings)
        if len(each.tokens) > each.prompt + 1
    ]
    live: list[_Course] = []
    while waiting or live:
        live, waiting = live + waiting[: AT_ONCE - len(live)], waiting[AT_ONCE - len(live) :]
        for course, drafted in zip(live, _drafts(drafter, live, k, lookup), strict=True):
            text, at = course.recording.tokens, course.at
            right = 0
            while right < len(drafted) and drafted[right] == text[at + right]:
                worth.right[right] += 1
                right += 1
            worth.rounds += 1
            worth.drafted += len(drafted)
            gained = min(right + 1, len(text) - at)
            worth.tokens += gained
            course.at += gained
        for course in live:
            if course.at >= len(course.recording.tokens):
                drafter.forget(course.number)
        live = [course for course in live if course.at < len(course.recording.tokens)]
    return worth


def _drafts(drafter: Drafter, courses: Sequence[_Course], k: int, lookup: bool) -> list[list[int]]:
    drafts = [course.looked_up(k) if lookup else [] for course in courses]
    asked = late = [at for at, ids in enumerate(drafts) if not ids]
    tell = True
    while late:
        for at, ids in zip(late, drafter.draft([courses[at].ask(k, tell=tell) for at in late]), strict=True):
            drafts[at] = ids
        late, tell = [at for at in late if not drafts[at]], False
        if not drafter.catch_up():
            break
    for at in asked:
        courses[at].told = courses[at].at - 1
    return drafts
