"""Machines that die and come back, and what becomes of their requests: as in the cluster that serves.

A machine that dies computes nothing more; for `notice_s` nobody knows, and it is still given requests. Then those that
it decoded go on elsewhere, whole, with the tokens that they have emitted; those whose prompt it computed go on where
their answer was to be made. What was lost is computed again. A machine that comes back has to start first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate.engine import Engine
from joinwise.cluster.simulate.job import Job, Stage
from joinwise.cluster.simulate.policy import Choice
from joinwise.cluster.simulate.pools import PoolSpec

if TYPE_CHECKING:
    from joinwise.cluster.simulate.simulator import Simulation

MOST_MOVES = 3  # a request that loses so many workers ends with an error, as `ClusterCore` has it
NOTICE_S = 1.0
START_S = 60.0


class Outage(NamedTuple):
    """One machine that dies.

    Attributes:
        at: seconds at which it does.
        place: its number among all machines, in the order of the pools.
        back: when it serves again; infinite if never.
        notice_s: seconds until the cluster knows.
    """

    at: float
    place: int
    back: float = math.inf
    notice_s: float = NOTICE_S


@dataclass(frozen=True)
class Failures:
    """Failures as a command names them: `at=30,pool=decode,machines=2,down=120`, or `mtbf=3600,down=120`.

    Attributes:
        at, pool, machines: so many machines of a pool die then, those with the highest numbers.
        mtbf_s: instead, each machine dies every so many seconds on average, independently.
        down_s: until there is a machine again in place of one that died; None: never.
        start_s: that its engine takes to start.
        notice_s: until the cluster knows that one has died.
    """

    at: float | None = None
    pool: str | None = None
    machines: int = 1
    mtbf_s: float | None = None
    down_s: float | None = None
    start_s: float = START_S
    notice_s: float = NOTICE_S

    def outages(self, pools: Sequence[PoolSpec], seconds: float, seed: int) -> list[Outage]:
        """Which machines die when, within so many seconds; the same seed draws the same.

        Raises:
            ConfigError: no such pool, or not so many machines in it.
        """
        back = math.inf if self.down_s is None else self.down_s + self.start_s
        if self.mtbf_s is not None:
            rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
            return sorted(
                Outage(at, place, at + back, self.notice_s)
                for place in range(sum(pool.size for pool in pools))
                for at in _deaths(rng, self.mtbf_s, seconds, max(back, self.notice_s))
            )
        assert self.at is not None
        homes = [pool.home for pool in pools for _ in range(pool.size)]
        mine = [place for place, home in enumerate(homes) if self.pool in (None, home)]
        if len(mine) < self.machines:
            raise ConfigError(f"{self.machines} machines cannot fail: the pool {self.pool or 'of all'} has {len(mine)}")
        return [Outage(self.at, place, self.at + back, self.notice_s) for place in mine[-self.machines :]]


def parse_failures(text: str) -> Failures:
    """Read failures; Splitwise's words "prompt" and "token" stand for prefill and decode.

    Raises:
        ConfigError: a word that is not one of `Failures`, a value that cannot be, or neither `at` nor `mtbf`.
    """
    words = {"at": "at", "mtbf": "mtbf_s", "down": "down_s", "start": "start_s", "notice": "notice_s"}
    homes = {"prompt": "prefill", "token": "decode", "prefill": "prefill", "decode": "decode", "mixed": "mixed"}
    given: dict[str, float | int | str] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            if name == "pool":
                given["pool"] = homes[value]
            elif name == "machines":
                given["machines"] = int(value)
            else:
                given[words[name]] = float(value)
        except (KeyError, ValueError):
            known = ", ".join((*words, "machines", "pool"))
            raise ConfigError(f"{part!r} in {text!r} is not one of {known}, with a value") from None
    if ("at" in given) == ("mtbf_s" in given) or ("mtbf_s" in given and given.keys() & {"pool", "machines"}):
        raise ConfigError(f"{text!r} needs either at=, with pool= and machines=, or mtbf=")
    numbers = [value for value in given.values() if not isinstance(value, str)]
    if not all(0 <= value < math.inf for value in numbers) or 0 in (given.get("mtbf_s"), given.get("machines")):
        raise ConfigError(f"{text!r} has a number that is not above zero")
    return Failures(**given)  # type: ignore[arg-type]


def _deaths(rng: random.Random, mtbf_s: float, seconds: float, gone_s: float) -> Iterator[float]:
    at = rng.expovariate(1 / mtbf_s)
    while at < seconds:
        yield at
        at += gone_s + rng.expovariate(1 / mtbf_s)


class Disruption:
    """What outages do to a simulation, event by event.

    Attributes:
        moved: requests that went on elsewhere, each time that one did.
        failed: requests that ended with an error.
        again_tokens: tokens that were computed again, of requests that had begun to answer.
        ever: whether there are any.
        next_at: when the next thing happens; infinite when nothing does any more.
    """

    def __init__(self, simulation: Simulation, outages: Sequence[Outage]) -> None:
        self._simulation = simulation
        self._events: list[tuple[float, int, int, Engine]] = []  # time, order, 0 dies 1 is missed 2 is back
        last: dict[int, float] = {}
        for outage in sorted(outages):
            if outage.at < last.get(outage.place, 0.0):
                raise ConfigError(f"machine {outage.place} fails at {outage.at:g} s, and is not back by then")
            last[outage.place] = max(outage.back, outage.at + outage.notice_s)
            engine = simulation.engines[outage.place]
            self._events.append((outage.at, len(self._events), 0, engine))
            self._events.append((outage.at + outage.notice_s, len(self._events), 1, engine))
            if outage.back < math.inf:
                self._events.append((last[outage.place], len(self._events), 2, engine))
        self._events.sort(key=lambda event: event[:2])
        self._next = 0
        self.ever = bool(self._events)
        self.next_at = self._events[0][0] if self._events else math.inf
        self._emitted: dict[Engine, dict[Job, int]] = {}
        self.moved = self.failed = self.again_tokens = 0

    def step(self) -> None:
        """Let the next thing happen: the clock is there."""
        now, _, what, engine = self._events[self._next]
        self._next += 1
        self.next_at = self._events[self._next][0] if self._next < len(self._events) else math.inf
        (self._die, self._miss, self._return)[what](engine, now)

    def _die(self, engine: Engine, now: float) -> None:
        self._emitted[engine] = engine.die(now)
        for job, choice in self._simulation.choices.items():
            if engine in choice and job.stage is Stage.SENDING:
                job.life += 1  # the rest of its cache never arrives

    def _miss(self, engine: Engine, now: float) -> None:
        """The cluster knows: go on without it."""
        engine.clear()
        emitted = self._emitted.pop(engine)
        simulation = self._simulation
        simulation.policy.lost(engine, now)
        if simulation.caches is not None:
            simulation.caches.forget(engine.worker_id)
        for job, choice in list(simulation.choices.items()):
            if choice.decode is engine:
                self._move(job, choice, emitted.get(job, 0), now)
            elif choice.prefill is engine and job.stage is not Stage.DECODING:
                self._without_prefill(job, choice, now)
        simulation.waiting[engine].clear()

    def _return(self, engine: Engine, now: float) -> None:
        engine.down = False
        self._simulation.policy.back(engine, now)

    def _move(self, job: Job, choice: Choice, emitted: int, now: float) -> None:
        """Go on elsewhere, whole, with what has been emitted (`ClusterCore._move`)."""
        simulation, policy, prefill = self._simulation, self._simulation.policy, choice.prefill
        prompted = job.stage is Stage.PREFILLING or (job.stage is Stage.WHOLE and not emitted)
        if prefill is not choice.decode:
            if job.stage is Stage.PREFILLING:
                prefill.abort(job, now)
                simulation.admit(prefill)
            elif job.stage is not Stage.DECODING:
                emitted = 1
                prefill.released(job, now)
                simulation.admit(prefill)
            if job.stage is not Stage.DECODING:
                policy.sent(job, choice)
        if prompted and job not in simulation.given_back:
            policy.first_token(job, choice, now)
        policy.ended(job, choice, now)
        simulation.given_back.discard(job)
        del simulation.choices[job]
        self._restart(job, emitted)
        job.moves += 1
        again = policy.again(job, now) if job.moves < MOST_MOVES else None
        if again is None:
            self.failed += 1
            return
        self.moved += 1
        simulation.choices[job] = Choice(again, again)
        again.submit(job, "whole", now)

    def _without_prefill(self, job: Job, choice: Choice, now: float) -> None:
        """Compute the prompt where the answer is to be made (`ClusterCore._without_prefill`)."""
        simulation, decode = self._simulation, choice.decode
        emitted = 0 if job.stage is Stage.PREFILLING else 1
        if job.stage is Stage.WAITING and job in simulation.waiting[decode]:  # else it is offered again by time
            simulation.waiting[decode].remove(job)
        elif job.stage is Stage.SENDING:
            decode.unexpect(job)
            simulation.admit(decode)
        if not emitted:
            simulation.policy.first_token(job, choice, now)
        simulation.policy.sent(job, choice)
        simulation.given_back.add(job)
        simulation.choices[job] = Choice(decode, decode)
        self._restart(job, emitted)
        self.moved += 1
        decode.submit(job, "whole", now)

    def _restart(self, job: Job, emitted: int) -> None:
        self.again_tokens += job.prompt + emitted if job.first >= 0 else 0
        job.prompt += emitted
        job.output -= emitted
        job.cached = job.there = job.kv = 0
        job.stage = Stage.WHOLE
        job.life += 1
        job.told = 0
