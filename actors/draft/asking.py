"""The asking end: what an engine's batch looks like in sequences, and which of a draft actor's answers may be used.

vLLM tells a proposer rows of its batch, not requests: a row may hold another request in the next step. So a row is
known by its tokens alone. A sequence is a row of earlier steps whose tokens the row still begins with; where there is
none, the row begins a new sequence. Which request it is does not matter: drafts depend on tokens only.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from joinwise.actors.draft.hidden import HiddenTail, packed
from joinwise.actors.draft.length import LengthChooser
from joinwise.actors.draft.link import Session
from joinwise.actors.draft.wire import MAX_K, prefix_hash
from joinwise.proto import draft_pb2

_FORGET_AFTER = 64
"""Rounds without a row after which a sequence is over: its request has ended, or waits for its turn."""
_LONGEST_PAUSE = 64
"""Steps for which nothing is asked after answers that came too late."""
_PATIENCE_STEPS, _FIRST_PATIENCE_S = 2.0, 0.1
"""Steps' time that drafts are waited for where no limit is set: two more tokens would be there by then. Until a step
has been seen, seconds."""
_STEP_MEMORY = 0.9


@dataclass(eq=False)
class Track:
    """One sequence.

    Attributes:
        number: its name towards the draft actor.
        tokens: all of it when it was last seen, shape (n,).
        seen: the round in which it was.
        hidden: the target's hidden states that no draft actor was told yet.
    """

    number: int
    tokens: np.ndarray
    seen: int
    hidden: HiddenTail = field(default_factory=HiddenTail)

    def begins(self, history: np.ndarray) -> bool:
        """Whether a row goes on from here."""
        return len(self.tokens) <= len(history) and np.array_equal(self.tokens, history[: len(self.tokens)])


class Tracks:
    """Finds each row's sequence."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._by_row: dict[int, Track] = {}
        self._others: list[Track] = []
        self._round = 0

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
            found[row] = match or Track(next(self._numbers), rows[row], self._round)
        for row, track in found.items():
            track.tokens, track.seen = rows[row].copy(), self._round
        self._by_row = found
        self._others = [each for each in free if self._round - each.seen <= _FORGET_AFTER]
        return found, [each.number for each in free if self._round - each.seen > _FORGET_AFTER]


@dataclass
class AskFigures:
    """What asking has brought.

    Attributes:
        asked: rounds that were sent.
        missed: of those, rounds whose answer did not come in time.
        skipped: steps in which there was nobody to ask, or nobody was asked after answers that came late.
        refused: drafts that were not used, by reason.
        drafted: ids that were handed to the engine.
        bytes: of rounds and their answers, as messages.
        waited_s: seconds that steps waited for answers.
        drafting_s: of those that came, seconds that the draft actor says it drafted.
    """

    asked: int = 0
    missed: int = 0
    skipped: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    drafted: int = 0
    bytes: int = 0
    waited_s: float = 0.0
    drafting_s: float = 0.0


@dataclass(frozen=True)
class _Given:
    """What a sequence was when a step began: its tokens, and the drafts that were handed to the engine for it."""

    tokens: int
    drafts: int


class Asker:
    """Asks for one engine, a round a step.

    Args:
        vocabulary: ids below it exist in the target.
        max_tokens: of a sequence, prompt and answer together.
        patience_s: seconds that a step waits for drafts at most; None waits for as long as two steps take.
        lengths: chooses how many drafts to ask for; None asks for as many as may be.
        clock: seconds; tests bring their own.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        max_tokens: int,
        patience_s: float | None,
        lengths: LengthChooser | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vocabulary = vocabulary
        self._max_tokens = max_tokens
        self._patience_s = patience_s
        self._lengths = lengths
        self._clock = clock
        self._tracks = Tracks()
        self._ended: list[int] = []
        self._given: dict[int, _Given] = {}
        self._given_at = 0.0
        self._step_s = 0.0
        self._misses = 0
        self._pause = 0
        self._session: Session | None = None
        self.figures = AskFigures()

    def drafts(
        self,
        session: Session | None,
        rows: Mapping[int, np.ndarray],
        k: int,
        *,
        alone: bool = True,
        hidden: Mapping[int, np.ndarray] | None = None,
    ) -> dict[int, list[int]]:
        """Drafts for the next step, by row; none for a row means that it is not speculated for.

        Args:
            session: whom to ask; None when there is nobody who could answer.
            rows: tokens of each row, shape (n,).
            k: ids wanted for each, at most; 0 asks nothing.
            alone: the step that has ended did nothing else, such as computing prompts.
            hidden: the target's last hidden states of the tokens before each row's last one, as many as the step
                computed, (m, size).
        """
        begin = self._clock()
        tracks, over = self._tracks.follow(rows)
        for row, states in (hidden or {}).items():
            tracks[row].hidden.add(states, len(rows[row]))
        self._ended += over
        seconds = begin - self._given_at if alone and self._given else None
        if seconds is not None:
            self._step_s += (1 - _STEP_MEMORY if self._step_s else 1.0) * (seconds - self._step_s)
        if self._lengths is not None:
            self._learn(self._lengths, tracks.values(), over, seconds)
        drafts = self._asked_for(session, tracks, k)
        self.figures.drafted += sum(map(len, drafts.values()))
        self._given = {
            track.number: _Given(len(track.tokens), len(drafts.get(track.number, ()))) for track in tracks.values()
        }
        self._given_at = self._clock()
        return {row: drafts[track.number] for row, track in tracks.items() if drafts.get(track.number)}

    def _asked_for(self, session: Session | None, tracks: Mapping[int, Track], k: int) -> dict[int, list[int]]:
        """Drafts by sequence."""
        rooms = {row: min(k, MAX_K, self._max_tokens - len(track.tokens) - 1) for row, track in tracks.items()}
        wanted = {row: track for row, track in tracks.items() if rooms[row] > 0}
        if not wanted:
            return {}
        if session is None or self._rests(session):
            self.figures.skipped += 1
            return {}
        if self._lengths is not None:
            chosen = self._lengths.choose([track.number for track in wanted.values()])
            rooms = {row: min(rooms[row], chosen[track.number]) for row, track in wanted.items()}
            wanted = {row: track for row, track in wanted.items() if rooms[row] > 0}
            if not wanted:
                return {}
        asked = self._round(session, wanted, rooms)
        self.figures.asked += 1
        begin = self._clock()
        answer = session.ask(asked, self._patience())
        waited = self._clock() - begin
        drafts = self._usable(session, asked, answer) if answer is not None else {}
        self.figures.waited_s += waited
        self.figures.bytes += asked.ByteSize()
        if answer is None:
            self.figures.missed += 1
            self._misses += 1
            self._pause = min(2**self._misses - 1, _LONGEST_PAUSE)
        else:
            self.figures.bytes += answer.ByteSize()
            self.figures.drafting_s += answer.draft_us / 1e6
            self._misses = 0
        if self._lengths is not None and (answer is None or drafts):  # to have waited in vain is a cost as well
            self._lengths.drafted(max(ask.k for ask in asked.asks), waited)
        return drafts

    def _learn(
        self, lengths: LengthChooser, tracks: Collection[Track], over: Sequence[int], seconds: float | None
    ) -> None:
        """What the step that has ended tells of acceptance, and of its cost where it was an ordinary one."""
        for number in over:
            lengths.forget(number)
        usual = seconds is not None and self._given.keys() == {track.number for track in tracks}
        for track in tracks:
            given = self._given.get(track.number)
            gained = len(track.tokens) - given.tokens if given is not None else 0
            if given is None or not 1 <= gained <= given.drafts + 1:
                usual = False
            elif given.drafts:
                lengths.accepted(track.number, given.drafts, gained - 1)
        if usual and seconds is not None:
            lengths.verified(sum(given.drafts + 1 for given in self._given.values()), seconds)

    def _patience(self) -> float:
        """Seconds that this step waits for drafts at most."""
        if self._patience_s is not None:
            return self._patience_s
        return _PATIENCE_STEPS * self._step_s or _FIRST_PATIENCE_S

    def _rests(self, session: Session) -> bool:
        """Whether nothing is asked in this step: whoever was late lately is asked less often."""
        if session is not self._session:
            self._session, self._misses, self._pause = session, 0, 0
        self._pause -= 1
        return self._pause >= 0

    def _round(self, session: Session, tracks: Mapping[int, Track], limits: Mapping[int, int]) -> draft_pb2.DraftRound:
        """What the actor does not know yet, with what it shall draft. From here on the session counts it as told."""
        ended, self._ended = self._ended, []
        asked = draft_pb2.DraftRound(ended=[each for each in ended if session.told.pop(each, None) is not None])
        for row, track in tracks.items():
            start = session.told.get(track.number, 0)
            hidden = track.hidden.take(len(track.tokens)) if session.hidden_size else None
            if hidden is not None and hidden.shape[1] != session.hidden_size:
                hidden = None
            asked.asks.add(
                sequence=track.number,
                start=start,
                token_ids=track.tokens[start:].tolist(),
                prefix_hash=prefix_hash(track.tokens),
                k=limits[row],
                hidden=packed(hidden) if hidden is not None else b"",
            )
            session.told[track.number] = len(track.tokens)
        return asked

    def _usable(
        self, session: Session, asked: draft_pb2.DraftRound, answer: draft_pb2.DraftAnswer
    ) -> dict[int, list[int]]:
        """Ids by sequence. What does not fit the question is left out as a whole: who sent it may be wrong in more."""
        asks = {ask.sequence: ask for ask in asked.asks}
        usable: dict[int, list[int]] = {}
        for draft in answer.drafts:
            ask = asks.pop(draft.sequence, None)
            if ask is None:
                self.figures.refused["nobody asked for the sequence"] += 1
            elif draft.unknown:
                session.told.pop(draft.sequence, None)
                self.figures.refused["the actor does not know the sequence"] += 1
            elif draft.prefix_hash != ask.prefix_hash:
                self.figures.refused["it continues other tokens"] += 1
            elif len(draft.token_ids) > ask.k:
                self.figures.refused["more ids than asked for"] += 1
            elif any(token >= self._vocabulary for token in draft.token_ids):
                self.figures.refused["ids out of range"] += 1
            else:
                usable[draft.sequence] = list(draft.token_ids)
        return usable
