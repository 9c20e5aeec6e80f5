"""The simulation: events in the order of a virtual clock, from the first arrival to the last token.

The same trace, cluster, policy and seed give the same result, to the last bit. No request is lost: each ends, or was
refused, and generates exactly its tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate.engine import Engine
from joinwise.cluster.simulate.job import Job, Stage
from joinwise.cluster.simulate.models import Model
from joinwise.cluster.simulate.outages import Disruption, Outage
from joinwise.cluster.simulate.policy import Choice, Policy
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.prefix import PrefixCaches
from joinwise.cluster.simulate.profile import Coverage, Profile
from joinwise.cluster.simulate.trace import Trace

_LOOK_EVERY, _MOST_RETRIES = 1000, 1_000_000


@dataclass
class Outcome:
    """What came of a simulation.

    Attributes:
        jobs: every request, by arrival.
        seconds: virtual time of the last event.
        events: how many there were.
        refused: requests that the policy turned away.
        failed, moved, again_tokens: requests that ended with an error, went on elsewhere, and tokens that were computed
            again, as machines died.
        sent_bytes: KV caches over links.
        busy_s: seconds in which each engine computed.
        beyond: what the profile was asked for beyond its measurements, and how often.
        prefix: figures of the prefix caches, where the trace names its blocks.
    """

    jobs: Sequence[Job]
    seconds: float
    events: int
    refused: int
    sent_bytes: float
    busy_s: dict[str, float]
    failed: int = 0
    moved: int = 0
    again_tokens: int = 0
    beyond: dict[str, int] = field(default_factory=dict)
    prefix: dict[str, float] = field(default_factory=dict)


class Simulation:
    """One run. `policy` is made from the engines; `run` may be called once.

    Args:
        outages: machines that die, and when.

    Attributes:
        choices: where the requests are that run.
        waiting: those whose KV cache waits for room, by the engine where.
        given_back: requests that count no longer as prompts to be computed, though their prompt is computed again.
    """

    def __init__(
        self,
        trace: Trace,
        pools: Sequence[PoolSpec],
        profile: Profile,
        model: Model,
        make_policy: Callable[[Simulation], Policy],
        outages: Sequence[Outage] = (),
    ) -> None:
        self.coverage = Coverage()
        self.engines = [
            model.engine(f"{pool.home}-{pool.kind}-{index}", profile.kind(pool.kind), pool.home, self)
            for pool in pools
            for index in range(pool.size)
        ]
        _check_lengths(trace, self.engines)
        self.jobs = [Job(index, arrival) for index, arrival in enumerate(trace.arrivals)]
        self.links = model.links()
        self.caches = PrefixCaches(self.engines, trace.block_tokens) if trace.block_tokens else None
        self.now = 0.0
        self.refused = 0
        self.events = 0
        self._next = 0
        self._order = 0
        #: Time, order, and an engine with its version; or a request whose cache is to be sent or there, with twice the
        #: request's life, and one more once it is there.
        self._heap: list[tuple[float, int, Engine | None, int, Job | None]] = []
        self.choices: dict[Job, Choice] = {}
        self.given_back: set[Job] = set()
        self._retry_s = model.retry_s
        self._retries = 0  # since an engine has last done anything
        self.waiting: dict[Engine, deque[Job]] = {engine: deque() for engine in self.engines}
        self.disruption = Disruption(self, outages)
        self.policy = make_policy(self)

    def run(self) -> Outcome:
        """Until nothing is left to happen."""
        jobs, heap, disruption = self.jobs, self._heap, self.disruption
        while True:
            if disruption.next_at < math.inf and disruption.next_at <= self._upcoming():
                if not self.choices and self._next == len(jobs):
                    break
                self.now = disruption.next_at
                disruption.step()
            elif self._next < len(jobs) and (not heap or jobs[self._next].at <= heap[0][0]):
                arriving = jobs[self._next]
                self._next += 1
                self.now = arriving.at
                self._arrive(arriving)
            elif heap:
                at, _, engine, version, job = heappop(heap)
                if engine is None:
                    assert job is not None
                    if job.life != version >> 1:
                        continue
                    self.now = at
                    self._transfer(job, version & 1)
                elif engine.version == version:
                    self.now = at
                    self._retries = 0
                    engine.finish(at)
                else:
                    continue
            elif not self._overcommit():
                break
            self.events += 1
        stuck = sum(job.end < 0 for job in jobs) - self.refused - disruption.failed
        if stuck:
            raise ConfigError(f"{stuck} requests never ended: no machine has room for them together; add machines")
        return Outcome(
            jobs=jobs,
            seconds=self.now,
            events=self.events,
            refused=self.refused,
            sent_bytes=self.links.sent_bytes,
            busy_s={engine.worker_id: engine.busy_s for engine in self.engines},
            failed=disruption.failed,
            moved=disruption.moved,
            again_tokens=disruption.again_tokens,
            beyond=dict(self.coverage.beyond),
            prefix=self.caches.figures() if self.caches is not None else {},
        )

    def _upcoming(self) -> float:
        """When the next request arrives, or the next step or transfer ends; infinite when neither will."""
        arrives = self.jobs[self._next].at if self._next < len(self.jobs) else math.inf
        return min(arrives, self._heap[0][0]) if self._heap else arrives

    def soon(self, since: float, until: float) -> Iterator[tuple[float, int, int, Job, int]]:
        """Arrivals, first tokens and ends from `since` up to, but not at, `until` that nothing can change any more if
        that is no further off than the shortest step: (time, 0 for an arrival, order, request, 0 arrival, 1 first
        token, 2 end)."""
        for index in range(self._next - 1, len(self.jobs)):
            job = self.jobs[index]
            if job.at >= until:
                break
            if job.at >= since:
                yield job.at, 0, job.index, job, 0
        stack = [0]
        while stack:  # a heap's children come no earlier than their parent
            place = stack.pop()
            if place >= len(self._heap) or self._heap[place][0] >= until:
                continue
            at, order, engine, version, _ = self._heap[place]
            stack += (2 * place + 1, 2 * place + 2)
            if at >= since and engine is not None and engine.version == version:
                for number, (job, last) in enumerate(engine.finishing()):
                    yield at, 1, (order << 12) + number, job, 2 if last else 1

    # --- what engines tell ---

    def wake(self, at: float, engine: Engine, version: int) -> None:
        """See World."""
        self._order += 1
        heappush(self._heap, (at, self._order, engine, version, None))

    def first_token(self, job: Job, engine: Engine, now: float) -> None:
        """See World."""
        choice = self.choices[job]
        if job.told == 0:  # else the policy has foreseen it
            self.stored(job)
        if job not in self.given_back:
            self.policy.first_token(job, choice, now)
        if choice.prefill is not choice.decode:
            if job.output > 1:
                self._transfer(job, 0)
            else:  # it ends here
                self.policy.sent(job, choice)

    def ended(self, job: Job, engine: Engine, now: float) -> None:
        """See World."""
        self.given_back.discard(job)
        self.policy.ended(job, self.choices.pop(job), now)
        self.admit(engine)

    def idle(self, engine: Engine, now: float) -> None:
        """See World."""
        self.policy.idle(engine, now)

    def stored(self, job: Job) -> None:
        """The prompt's blocks are in the caches of its workers from now on."""
        if self.caches is not None:
            for worker in self.choices[job]:
                self.caches.store(worker.worker_id, job.arrival.blocks)

    # --- events ---

    def _later(self, at: float, job: Job, done: int) -> None:
        self._order += 1
        heappush(self._heap, (at, self._order, None, 2 * job.life + done, job))

    def _arrive(self, job: Job) -> None:
        choice = self.policy.route(job, self.now)
        if choice is None:
            self.refused += 1
            return
        self.choices[job] = choice
        if self.caches is not None:
            held = self.policy.held(job)
            if held is None:
                held = self.caches.held(job)
            job.cached = held.get(choice.prefill.worker_id, 0)
            job.there = held.get(choice.decode.worker_id, 0)
            self.caches.count(job, job.cached)
        if choice.prefill is choice.decode:
            choice.prefill.submit(job, "whole", self.now)
        else:
            job.stage = Stage.PREFILLING
            choice.prefill.submit(job, "prefill", self.now)

    def _transfer(self, job: Job, done: int) -> None:
        """A prompt's KV: sent (0) as soon as there is room for it, and then (1) there."""
        choice = self.choices[job]
        if done:
            job.stage = Stage.DECODING
            job.landed = self.now
            choice.prefill.released(job, self.now)
            self.admit(choice.prefill)
            self.policy.sent(job, choice)
            choice.decode.submit(job, "decode", self.now)
        elif self.waiting[choice.decode] or not choice.decode.can_take(job):
            job.stage = Stage.WAITING
            if self._retry_s is None:
                self.waiting[choice.decode].append(job)
            else:
                self._retries += 1
                if self._retries > _MOST_RETRIES:  # something else goes on for ever beside them, such as an autoscaler
                    raise ConfigError(
                        f"caches wait for each other's room without end at {self.now:.0f} s; add machines"
                    )
                if self._retries % _LOOK_EVERY == 0 and self._only_retries() and not self._someone_goes():
                    self._send(job, choice)
                else:
                    self._later(self.now + self._retry_s, job, 0)
        else:
            self._send(job, choice)

    def admit(self, engine: Engine) -> None:
        """Room has come free: send what waits for it, in its order."""
        waiting = self.waiting[engine]
        while waiting and engine.can_take(waiting[0]):
            job = waiting.popleft()
            self._send(job, self.choices[job])

    def _overcommit(self) -> bool:
        """Nothing would happen any more, as some wait for room that others hold: the first goes all the same."""
        for waiting in self.waiting.values():
            if waiting:
                job = waiting.popleft()
                self._send(job, self.choices[job])
                return True
        return self._someone_goes()

    def _someone_goes(self) -> bool:
        """Whether an engine goes on, with more than it has room for."""
        return any(engine.overcommit(self.now) for engine in self.engines)

    def _only_retries(self) -> bool:
        """Whether all that is still to happen is to ask again for room."""
        if self._next < len(self.jobs) or self.disruption.next_at < math.inf:
            return False
        return not any(
            engine.version == version
            if engine is not None
            else version & 1 and job is not None and job.life == version >> 1
            for _, _, engine, version, job in self._heap
        )

    def _send(self, job: Job, choice: Choice) -> None:
        job.stage = Stage.SENDING
        choice.decode.expect(job)
        if not choice.prefill.down and not choice.decode.down:  # else it never arrives, and the cluster will know
            self._later(self.links.arrival(job, choice.prefill, choice.decode, self.now), job, 1)


def _check_lengths(trace: Trace, engines: Sequence[Engine]) -> None:
    """Every request must fit into the KV memory of any engine it could get."""
    least = min(engines, key=lambda engine: engine.kind.kv_tokens)
    for number, each in enumerate(trace.arrivals, 1):
        if each.prompt + each.output > least.kind.kv_tokens:
            raise ConfigError(
                f"request {number} of {trace.name} has {each.prompt} + {each.output} tokens, "
                f"and {least.worker_id} has room for {least.kind.kv_tokens} tokens of KV cache"
            )
