"""Who serves a request: the policies that are compared, each with a view of its own.

`LiveRouter` (live_router.py) asks the router that serves. The others are baselines from the literature; they see every
engine as it is at this moment, which no real router does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate.engine import Engine
from joinwise.cluster.simulate.job import Job


class Choice(NamedTuple):
    """Where a request goes: both the same engine when it runs whole."""

    prefill: Engine
    decode: Engine


class Policy(Protocol):
    """Chooses engines, and is told what becomes of its choices."""

    def route(self, job: Job, now: float) -> Choice | None:
        """The engines; None refuses the request."""

    def held(self, job: Job) -> Mapping[str, int] | None:
        """Prompt tokens that workers held when the request was routed; None: as they do now."""

    def first_token(self, job: Job, choice: Choice, now: float) -> None:
        """The prompt is computed."""

    def sent(self, job: Job, choice: Choice) -> None:
        """The prompt's KV cache has reached the decode engine."""

    def ended(self, job: Job, choice: Choice, now: float) -> None:
        """The last token is out."""

    def idle(self, engine: Engine, now: float) -> None:
        """An engine has nothing left to do."""

    def lost(self, engine: Engine, now: float) -> None:
        """An engine has died: no request may go there."""

    def back(self, engine: Engine, now: float) -> None:
        """An engine that was lost serves again."""

    def again(self, job: Job, now: float) -> Engine | None:
        """Who goes on with all of a request whose engine was lost; None if nobody can."""


class Pools:
    """A policy's engines by pool: whole requests go to mixed ones, else one of prefill and one of decode share it."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.mixed = [engine for engine in engines if engine.home == "mixed"]
        self.prefill = [engine for engine in engines if engine.home == "prefill"]
        self.decode = [engine for engine in engines if engine.home == "decode"]
        if not self.mixed and not (self.prefill and self.decode):
            raise ConfigError("a cluster needs machines for prefill and for decode, or mixed ones")

    def route(self, job: Job, now: float) -> Choice | None:
        """The engines; None while those that are left cannot serve a request."""
        return self.choose(job) if self.mixed or (self.prefill and self.decode) else None

    def choose(self, job: Job) -> Choice:
        """The engines, of those that are there."""
        raise NotImplementedError

    def held(self, job: Job) -> Mapping[str, int] | None:
        """As it is now: these policies decide when a request arrives."""
        return None

    def first_token(self, job: Job, choice: Choice, now: float) -> None:
        """Nothing to keep."""

    def sent(self, job: Job, choice: Choice) -> None:
        """Nothing to keep."""

    def ended(self, job: Job, choice: Choice, now: float) -> None:
        """Nothing to keep."""

    def idle(self, engine: Engine, now: float) -> None:
        """Nothing to keep."""

    def lost(self, engine: Engine, now: float) -> None:
        """Take it out of its pool, whichever it is in."""
        for pool in (self.mixed, self.prefill, self.decode):
            if engine in pool:
                pool.remove(engine)

    def back(self, engine: Engine, now: float) -> None:
        """Put it into the pool that it belongs to."""
        {"mixed": self.mixed, "prefill": self.prefill, "decode": self.decode}[engine.home].append(engine)

    def again(self, job: Job, now: float) -> Engine | None:
        """The next one that decodes."""
        able = self.mixed or self.decode
        return able[job.index % len(able)] if able else None


class RoundRobin(Pools):
    """The next one each time."""

    def __init__(self, engines: Sequence[Engine], seed: int) -> None:
        super().__init__(engines)
        self._turn = -1

    def choose(self, job: Job) -> Choice:
        self._turn += 1
        if self.mixed:
            both = self.mixed[self._turn % len(self.mixed)]
            return Choice(both, both)
        return Choice(self.prefill[self._turn % len(self.prefill)], self.decode[self._turn % len(self.decode)])


class Counted(Pools):
    """Keeps what each engine has been given and not yet done, in a unit of the subclass' own."""

    def __init__(self, engines: Sequence[Engine], seed: int) -> None:
        super().__init__(engines)
        self.pending = dict.fromkeys(engines, 0)

    def give(self, choice: Choice, prompt: int, answer: int) -> Choice:
        """Count a request."""
        self.pending[choice.prefill] += prompt
        self.pending[choice.decode] += answer
        return choice

    def again(self, job: Job, now: float) -> Engine | None:
        """The one with the least to do of those that decode."""
        best = min(self.mixed or self.decode, key=self.pending.__getitem__, default=None)
        if best is not None:
            self.take_whole(best, job)
        return best

    def take_whole(self, engine: Engine, job: Job) -> None:
        """Count all of a request at one engine."""
        self.give(Choice(engine, engine), 1, 1)


class TwoChoices(Counted):
    """The one with fewer requests of two at random (Mitzenmacher, 1996)."""

    def __init__(self, engines: Sequence[Engine], seed: int) -> None:
        super().__init__(engines, seed)
        self._rng = random.Random(seed)  # noqa: S311 - reproducible, not secret

    def _of(self, engines: Sequence[Engine]) -> Engine:
        pair = self._rng.sample(engines, 2) if len(engines) > 1 else engines
        return min(pair, key=self.pending.__getitem__)

    def choose(self, job: Job) -> Choice:
        prefill = self._of(self.mixed or self.prefill)
        return self.give(Choice(prefill, prefill if self.mixed else self._of(self.decode)), 1, 1)

    def first_token(self, job: Job, choice: Choice, now: float) -> None:
        self.pending[choice.prefill] -= 1

    def ended(self, job: Job, choice: Choice, now: float) -> None:
        self.pending[choice.decode] -= 1


class TokenQueue(Counted):
    """The one with the fewest tokens: a prompt counts all of its own, an answer one (SplitwiseSim's token_jsq)."""

    def choose(self, job: Job) -> Choice:
        prefill = min(self.mixed or self.prefill, key=self.pending.__getitem__)
        decode = prefill if self.mixed else min(self.decode, key=self.pending.__getitem__)
        return self.give(Choice(prefill, decode), job.prompt, 1)

    def take_whole(self, engine: Engine, job: Job) -> None:
        self.give(Choice(engine, engine), job.prompt, 1)

    def first_token(self, job: Job, choice: Choice, now: float) -> None:
        self.pending[choice.prefill] -= job.prompt

    def ended(self, job: Job, choice: Choice, now: float) -> None:
        self.pending[choice.decode] -= 1


class Splitwise(TokenQueue):
    """Splitwise's cluster scheduler (arXiv 2311.18677, section 4.1) as SplitwiseSim's MixedPoolScheduler has it.

    A prompt goes to the engine with the fewest pending tokens of the prefill pool, else of the mixed pool, while that
    has at most `MOST_PENDING` of them; an answer to the one with the least memory promised, while it fits. Where none
    does, one of the other pool is pulled into mixed, and goes home when it is idle.
    """

    MOST_PENDING = 8192

    def __init__(self, engines: Sequence[Engine], seed: int) -> None:
        super().__init__(engines, seed)
        self.memory = dict.fromkeys(engines, 0)
        self._pulled: set[Engine] = set()

    def route(self, job: Job, now: float) -> Choice | None:
        return self.choose(job) if self.prefill or self.mixed or self.decode else None

    def choose(self, job: Job) -> Choice:
        prefill = self._for_prompt(self.prefill, job) or self._for_prompt(self.mixed, job)
        decode = self._for_answer(self.decode, job) or self._for_answer(self.mixed, job)
        if prefill is None and self.decode:
            prefill = self._pull(self.decode, self.pending)
        if decode is None and self.prefill:
            decode = self._pull(self.prefill, self.memory)
        if prefill is None or decode is None:
            prefill = decode = min((*self.prefill, *self.mixed, *self.decode), key=self.pending.__getitem__)
        if prefill is not decode:
            self.memory[prefill] += job.prompt + 1
        self.memory[decode] += job.prompt + job.output
        return self.give(Choice(prefill, decode), job.prompt, 1)

    def _for_prompt(self, engines: Sequence[Engine], job: Job) -> Engine | None:
        if not engines:
            return None
        best = min(engines, key=self.pending.__getitem__)
        return None if best.waiting() and self.pending[best] + job.prompt > self.MOST_PENDING else best

    def _for_answer(self, engines: Sequence[Engine], job: Job) -> Engine | None:
        if not engines:
            return None
        best = min(engines, key=self.memory.__getitem__)
        return None if self.memory[best] + job.prompt + job.output >= best.kind.kv_tokens else best

    def _pull(self, engines: list[Engine], load: Mapping[Engine, int]) -> Engine:
        best = min(engines, key=load.__getitem__)
        engines.remove(best)
        self.mixed.append(best)
        self._pulled.add(best)
        return best

    def take_whole(self, engine: Engine, job: Job) -> None:
        super().take_whole(engine, job)
        self.memory[engine] += job.prompt + job.output

    def lost(self, engine: Engine, now: float) -> None:
        super().lost(engine, now)
        self._pulled.discard(engine)

    def sent(self, job: Job, choice: Choice) -> None:
        """The prompt's KV has left the prefill engine."""
        self.memory[choice.prefill] -= job.prompt + 1

    def ended(self, job: Job, choice: Choice, now: float) -> None:
        super().ended(job, choice, now)
        self.memory[choice.decode] -= job.prompt + job.output

    def idle(self, engine: Engine, now: float) -> None:
        if engine in self._pulled:
            self._pulled.remove(engine)
            self.mixed.remove(engine)
            (self.prefill if engine.home == "prefill" else self.decode).append(engine)


class Radix(Counted):
    """What cache-aware routers do that hear of no evictions: where most of a prompt went before, else the least busy.

    It remembers what it has sent where (SGLang's router, 2024): a match of half the prompt decides, unless that engine
    has `MOST_AHEAD` requests more than the least busy one.
    """

    MATCH = 0.5
    MOST_AHEAD = 32

    def __init__(self, engines: Sequence[Engine], seed: int) -> None:
        super().__init__(engines, seed)
        self._sent: dict[int, set[Engine]] = {}

    def choose(self, job: Job) -> Choice:
        own = self.mixed or self.prefill
        prefill = min(own, key=self.pending.__getitem__)
        matches = dict.fromkeys(own, 0)
        for block in job.arrival.blocks:
            for engine in self._sent.get(block, ()):
                matches[engine] += 1
        best = max(own, key=matches.__getitem__)
        ahead = self.pending[best] - self.pending[prefill]
        if matches[best] > self.MATCH * len(job.arrival.blocks) and ahead <= self.MOST_AHEAD:
            prefill = best
        for block in job.arrival.blocks:
            self._sent.setdefault(block, set()).add(prefill)
        decode = prefill if self.mixed else min(self.decode, key=self.pending.__getitem__)
        return self.give(Choice(prefill, decode), 1, 1)

    def first_token(self, job: Job, choice: Choice, now: float) -> None:
        self.pending[choice.prefill] -= 1

    def ended(self, job: Job, choice: Choice, now: float) -> None:
        self.pending[choice.decode] -= 1


POLICIES: Mapping[str, type[RoundRobin | TwoChoices | TokenQueue | Splitwise | Radix]] = {
    "round_robin": RoundRobin,
    "p2c": TwoChoices,
    "token_jsq": TokenQueue,
    "splitwise": Splitwise,
    "radix": Radix,
}
