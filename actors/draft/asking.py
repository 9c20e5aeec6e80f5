"""The asking end: what the next step of an engine verifies, and which of a draft actor's answers may be used.

Where a sequence repeats itself, or what others were answered, and has lately gone on as that did, its drafts are looked
up there, here and now. A draft actor is asked for the others, in one round; where that would not pay, or nobody can be
asked, they have what is looked up as well.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from joinwise.actors.draft.hidden import packed
from joinwise.actors.draft.length import LengthChooser
from joinwise.actors.draft.link import Session
from joinwise.actors.draft.lookup import repeated
from joinwise.actors.draft.recall import Recall
from joinwise.actors.draft.tracks import Track, Tracks
from joinwise.actors.draft.wire import MAX_K, prefix_hash
from joinwise.proto import draft_pb2

_LONGEST_PAUSE = 64
"""Steps for which nothing is asked after answers that came too late."""
_PATIENCE_STEPS, _FIRST_PATIENCE_S = 2.0, 0.1
"""Steps' time that drafts are waited for where no limit is set: two more tokens would be there by then. Until a step
has been seen, seconds."""
_STEP_MEMORY = 0.9


@dataclass
class AskFigures:
    """What asking has brought.

    Attributes:
        asked: rounds that were sent.
        missed: of those, rounds whose answer did not come in time.
        skipped: steps in which there was nobody to ask, or nobody was asked after answers that came late.
        looked_up: of the ids that were handed to the engine, those that stood in the text, or in another answer.
        refused: drafts that were not used, by reason.
        drafted: ids that were handed to the engine.
        bytes: of rounds and their answers, as messages.
        waited_s: seconds that steps waited for answers.
        drafting_s: of those that came, seconds that the draft actor says it drafted.
    """

    asked: int = 0
    missed: int = 0
    skipped: int = 0
    looked_up: int = 0
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
    asked: bool


class Asker:
    """Asks for one engine, a round a step.

    Args:
        vocabulary: ids below it exist in the target.
        max_tokens: of a sequence, prompt and answer together.
        patience_s: seconds that a step waits for drafts at most; None waits for as long as two steps take.
        lookup: draft from a sequence's own text where it repeats itself.
        recall: tokens of the latest answers to keep, and to draft from where a sequence goes on like one; 0 for none.
        lengths: chooses how many drafts to have; None has as many as may be.
        clock: seconds; tests bring their own.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        max_tokens: int,
        patience_s: float | None,
        lookup: bool = False,
        recall: int = 0,
        lengths: LengthChooser | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vocabulary = vocabulary
        self._max_tokens = max_tokens
        self._patience_s = patience_s
        self._lookup = lookup
        self._recall = Recall(recall) if recall else None
        self._lengths = lengths
        self._clock = clock
        self._tracks = Tracks(self._recall)
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
        by_number = {track.number: track for track in tracks.values()}
        guessed, asked = self._drafted(session, by_number, k)
        drafts = guessed | asked
        self.figures.drafted += sum(map(len, drafts.values()))
        self.figures.looked_up += sum(map(len, guessed.values()))
        self._given = {
            number: _Given(len(track.tokens), len(drafts.get(number, ())), number in asked)
            for number, track in by_number.items()
        }
        self._given_at = self._clock()
        return {row: drafts[track.number] for row, track in tracks.items() if drafts.get(track.number)}

    def _drafted(
        self, session: Session | None, tracks: Mapping[int, Track], k: int
    ) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Drafts by sequence: those that were looked up, and those that were asked for."""
        rooms = {number: min(k, MAX_K, self._max_tokens - len(each.tokens) - 1) for number, each in tracks.items()}
        open_ = {number: track for number, track in tracks.items() if rooms[number] > 0}
        for number, track in open_.items():
            if self._lookup:
                track.own.renew(track.tokens, repeated(track.tokens, rooms[number]))
            if self._recall is not None:
                track.recalled.renew(track.tokens, self._recall.continued(track.tokens, rooms[number]))
        trusted = {number: track.guess.rate for number, track in open_.items() if track.guess.trusted}
        asked = [number for number in open_ if number not in trusted]
        if asked and (session is None or self._rests(session)):
            self.figures.skipped += 1
            asked = []
        if self._lengths is not None:
            rates = {number: track.guess.rate for number, track in open_.items() if track.guess.ids}
            wanted, guessed = self._lengths.choose(asked, trusted, rates)
        else:
            wanted, guessed = dict.fromkeys(asked, k), dict.fromkeys(trusted, k)
        looked_up = {number: open_[number].guess.ids[:length] for number, length in guessed.items() if length > 0}
        limits = {number: min(rooms[number], length) for number, length in wanted.items() if length > 0}
        if session is None or not limits:
            return looked_up, {}
        return looked_up, self._answered(session, {number: open_[number] for number in limits}, limits)

    def _answered(
        self, session: Session, tracks: Mapping[int, Track], limits: Mapping[int, int]
    ) -> dict[int, list[int]]:
        """What a draft actor answers in time, by sequence."""
        asked = self._round(session, tracks, limits)
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
            self._lengths.drafted(max(limits.values()), waited)
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
            elif given.drafts and given.asked:
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
        for number, track in tracks.items():
            start = session.told.get(number, 0)
            hidden = track.hidden.take(len(track.tokens)) if session.hidden_size else None
            if hidden is not None and hidden.shape[1] != session.hidden_size:
                hidden = None
            asked.asks.add(
                sequence=number,
                start=start,
                token_ids=track.tokens[start:].tolist(),
                prefix_hash=prefix_hash(track.tokens),
                k=limits[number],
                hidden=packed(hidden) if hidden is not None else b"",
            )
            session.told[number] = len(track.tokens)
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
