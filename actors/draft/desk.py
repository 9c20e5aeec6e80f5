"""Where rounds are answered: one thread, which takes whatever rounds there are and drafts for all of them at once.

Owns the sequences of all engines. A round changes them first (its tokens are appended, in the order in which rounds
came), so that nothing is lost of one that is answered too late to be of use. What a drafter puts off is done while
nobody asks.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from joinwise.actors.draft.drafter import Ask, Drafter
from joinwise.actors.draft.hidden import HiddenTail, unpacked
from joinwise.actors.draft.wire import MAX_K, MAX_TOKENS, prefix_hash
from joinwise.proto import draft_pb2

logger = logging.getLogger(__name__)

_MAX_SEQUENCES = 4096
_LATELY = 0.05
"""Weight of the latest rounds in what one takes."""
_NO_TOKENS = np.empty(0, np.int32)


@dataclass
class _Sequence:
    tokens: np.ndarray
    used: float
    hidden: HiddenTail


@dataclass(eq=False)
class Engine:
    """One engine that asks.

    Attributes:
        answer: gets each answer; called on the desk's thread.
    """

    answer: Callable[[draft_pb2.DraftAnswer], None]
    sequences: dict[int, _Sequence] = field(default_factory=dict)


@dataclass(frozen=True)
class _Waiting:
    engine: Engine
    round: draft_pb2.DraftRound
    since: float


@dataclass
class DeskFigures:
    """What a desk holds and has done.

    Attributes:
        sequences: of all engines.
        rounds, drafted: rounds that were answered, and ids in the answers.
        late: rounds that nobody waited for any more when their turn came.
        unknown: asks for sequences that were not known.
        busy_s: seconds spent on drafting.
        round_s: of those, for a round, lately; 0 before the first.
    """

    sequences: int = 0
    rounds: int = 0
    drafted: int = 0
    late: int = 0
    unknown: int = 0
    busy_s: float = 0.0
    round_s: float = 0.0


class Desk:
    """Answers rounds with one drafter.

    Args:
        drafter: used on the desk's thread only.
        hidden_size: numbers in a hidden state that the drafter takes; 0 if it takes none.
        idle_s: seconds after which a sequence that nobody asked for is forgotten.
        on_dead: called once with what the drafter raised; nothing is answered from then on.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        hidden_size: int = 0,
        idle_s: float = 5.0,
        on_dead: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.hidden_size = hidden_size
        self._drafter = drafter
        self._idle_s = idle_s
        self._on_dead = on_dead
        self._work: queue.SimpleQueue[_Waiting | Engine | None] = queue.SimpleQueue()
        self._engines: set[Engine] = set()
        self._swept = time.monotonic()
        self.figures = DeskFigures()
        self._thread = threading.Thread(target=self._run, name="draft-desk", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer nothing more; waits for the drafter."""
        self._work.put(None)
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        """Whether rounds are answered."""
        return self._thread.is_alive()

    # Called from any thread.

    def submit(self, engine: Engine, asked: draft_pb2.DraftRound) -> None:
        """Queue a round; its answer goes to `engine.answer`."""
        self._work.put(_Waiting(engine, asked, time.monotonic()))

    def leave(self, engine: Engine) -> None:
        """An engine has gone: forget its sequences."""
        self._work.put(engine)

    # On the desk's thread.

    def _run(self) -> None:
        try:
            self._drafter.begin()
            behind = False
            while True:
                rounds = self._take(behind)
                if rounds is None:
                    return
                if rounds:
                    self._answer(rounds)
                behind = self._drafter.catch_up()
                self._sweep()
        except BaseException as error:
            logger.exception("the drafter has failed")
            self._on_dead(error)

    def _take(self, behind: bool) -> list[_Waiting] | None:
        """All rounds that there are; waits for one unless there is other work. None: stop."""
        rounds: list[_Waiting] = []
        wait = not behind
        while True:
            try:
                item = self._work.get(timeout=self._idle_s) if wait else self._work.get_nowait()
            except queue.Empty:
                return rounds
            wait = False
            if item is None:
                return None
            if isinstance(item, _Waiting):
                rounds.append(item)
                continue
            self._engines.discard(item)
            rounds = [each for each in rounds if each.engine is not item]
            for sequence in list(item.sequences):
                self._forget(item, sequence)

    def _answer(self, rounds: list[_Waiting]) -> None:
        begin = time.monotonic()
        asks: list[Ask] = []
        answers: list[tuple[Engine, draft_pb2.DraftAnswer]] = []
        wanted: list[draft_pb2.DraftTokens] = []
        for each in rounds:
            self._engines.add(each.engine)
            answer = draft_pb2.DraftAnswer(number=each.round.number)
            answers.append((each.engine, answer))
            late = begin - each.since > each.round.patience_us / 1e6
            self.figures.late += late
            for ended in each.round.ended:
                self._forget(each.engine, ended)
            for ask in each.round.asks:
                sequence = self._absorb(each.engine, ask, begin)
                if sequence is None:
                    self.figures.unknown += 1
                    answer.drafts.add(sequence=ask.sequence, unknown=True)
                elif ask.k and not late:
                    tokens, hidden = sequence.tokens, sequence.hidden.take(len(sequence.tokens))
                    asks.append(Ask((each.engine, ask.sequence), tokens, min(ask.k, MAX_K), hidden))
                    wanted.append(answer.drafts.add(sequence=ask.sequence, prefix_hash=ask.prefix_hash))
        for draft, ids in zip(wanted, self._drafter.draft(asks) if asks else [], strict=True):
            draft.token_ids.extend(ids)
            self.figures.drafted += len(ids)
        spent = time.monotonic() - begin
        self.figures.busy_s += spent
        self.figures.rounds += len(answers)
        if asks:
            weight = _LATELY if self.figures.round_s else 1.0
            self.figures.round_s += weight * (spent / len(answers) - self.figures.round_s)
        self.figures.sequences = sum(len(engine.sequences) for engine in self._engines)
        for engine, answer in answers:
            answer.draft_us = int(spent * 1e6)
            engine.answer(answer)

    def _absorb(self, engine: Engine, ask: draft_pb2.DraftAsk, now: float) -> _Sequence | None:
        """Bring a sequence up to date; None (and forgotten) when its earlier tokens are not those that were meant."""
        held = engine.sequences.pop(ask.sequence, None)
        before = held.tokens if held is not None else _NO_TOKENS
        if ask.start <= len(before) and ask.start + len(ask.token_ids) <= MAX_TOKENS:
            fresh = np.fromiter(ask.token_ids, np.uint32, len(ask.token_ids)).astype(np.int32)
            tokens = np.concatenate([before[: ask.start], fresh])
            if len(tokens) and prefix_hash(tokens) == ask.prefix_hash:
                tail = held.hidden if held is not None and ask.start == len(before) else HiddenTail()
                sequence = _Sequence(tokens, now, tail)
                sequence.hidden.add(unpacked(ask.hidden, self.hidden_size, len(tokens)), len(tokens))
                engine.sequences[ask.sequence] = sequence  # at the end: the first is the oldest
                if len(engine.sequences) > _MAX_SEQUENCES:
                    self._forget(engine, next(iter(engine.sequences)))
                return sequence
        self._drafter.forget((engine, ask.sequence))
        return None

    def _forget(self, engine: Engine, sequence: int) -> None:
        if engine.sequences.pop(sequence, None) is not None:
            self._drafter.forget((engine, sequence))

    def _sweep(self) -> None:
        """Forget what nobody has asked for in a while: an engine that has become idle says nothing."""
        now = time.monotonic()
        if now - self._swept < self._idle_s / 2:
            return
        self._swept = now
        for engine in self._engines:
            for number, sequence in list(engine.sequences.items()):
                if now - sequence.used < self._idle_s:
                    break
                self._forget(engine, number)
        self.figures.sequences = sum(len(engine.sequences) for engine in self._engines)
