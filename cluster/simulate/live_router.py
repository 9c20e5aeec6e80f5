"""The router that serves, on a virtual clock: the same Python, the same Lua, on an embedded Redis.

Calls to Redis go ahead of the virtual clock, many at a time. Two decisions need not wait for each other while nothing
that the first one causes can happen before the second is made: the shortest step of an engine bounds that from below
(conservative lookahead, Chandy and Misra 1979). A reply is read when its request arrives, so Redis decides while the
engines go on. The result is, to the bit, that of one call after another; a test compares them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from redis.asyncio import Redis

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import NoWorkerError
from joinwise.cluster.router.ask import MAX_HOLDERS
from joinwise.cluster.router.decision import Held
from joinwise.cluster.router.registry import Registry, WorkerInfo, WorkerLoad, WorkerState
from joinwise.cluster.router.router import Assignment, Demand, Router
from joinwise.cluster.router.together import Together
from joinwise.cluster.simulate.engine import Engine
from joinwise.cluster.simulate.job import Job
from joinwise.cluster.simulate.pipeline import Pipeline, Recorder, VirtualClock
from joinwise.cluster.simulate.policy import Choice
from joinwise.cluster.simulate.simulator import Simulation
from joinwise.cluster.store.embedded import EmbeddedRedis

_MODEL = "m"
_NUMBERS = itertools.count()
_DAY_S = 86_400.0
_TYPICAL_PROMPT = 1024
_TYPICAL_BATCH = 32
_ARRIVAL, _FIRST, _END = 0, 1, 2

#: When, for whom the answer is (None: for nobody), and what makes the call.
_Call = tuple[float, Job | None, Callable[[], Coroutine[Any, Any, Any]]]


class _Separately(Together[Any, Any]):
    """Asks for each by itself, without an event loop: what would gather there is gathered in the pipeline here."""

    @classmethod
    def like(cls, other: Together[Any, Any]) -> _Separately:
        """What asks as another one does."""
        return cls(other._call, 1)

    async def ask(self, item: Any) -> Any:
        (answer,) = await self._call([item])
        return answer


class _Alone(Router):
    """The router, where nobody else is there to ask together with."""

    def __init__(self, client: Redis, cluster: str, settings: RouterConfig, clock: VirtualClock) -> None:
        super().__init__(client, cluster, settings, clock)
        for name, each in list(vars(self).items()):
            if isinstance(each, Together):
                setattr(self, name, _Separately.like(each))


class LiveRouter:
    """A policy that asks the router. Close it: it holds a connection.

    Args:
        simulation: whose engines register.
        settings: the cluster's `router` section.
        ahead: ask before it is time, where that is certain; False asks one at a time.

    Attributes:
        calls, rounds: calls to the router, and times that some were sent.
    """

    def __init__(
        self, simulation: Simulation, settings: RouterConfig, server: EmbeddedRedis, *, ahead: bool = True
    ) -> None:
        self._simulation = simulation
        self._engines = {engine.worker_id: engine for engine in simulation.engines}
        self._clock = VirtualClock()
        settings = settings.model_copy(
            update={"worker_ttl_s": _DAY_S, "lease_s": _DAY_S, "queue_timeout_s": 0.0, "decisions_kept": 0}
        )
        recorder = Recorder()
        self.cluster = cluster = f"simulated-{next(_NUMBERS)}"
        self._router = _Alone(recorder, cluster, settings, self._clock)
        self._registry = Registry(recorder, cluster, settings, self._clock)
        self._pipeline = Pipeline(server.url)
        self._least_s = min(engine.kind.least_s for engine in simulation.engines) if ahead else 0.0
        self._until = 0.0  # all that happens before has been told
        self._answers: dict[Job, Assignment | Exception] = {}
        self._leases: dict[Job, Assignment] = {}
        self._held: dict[Job, Mapping[str, int]] = {}
        self._epochs: dict[str, int] = {}
        self._owed: list[_Call] = []
        self.calls = self.rounds = 0
        for engine in simulation.engines:
            self._join(engine)
        self._warm_up()

    def close(self) -> None:
        """Disconnect."""
        self._pipeline.close()

    def flush(self) -> None:
        """Tell the router of all that has happened, so that it holds nothing once every request has ended."""
        self._tell([])
        self._drain()

    # --- Policy ---

    def route(self, job: Job, now: float) -> Choice | None:
        """The router's choice, asked for together with all that is certain to happen in the next moment."""
        if not self._least_s:
            self._tell([self._ahead(now, job, _ARRIVAL)])
        elif now >= self._until - self._least_s / 2:  # ask on before Redis has nothing left to do
            until = min(now + self._least_s, self._simulation.disruption.next_at)
            soon = sorted(self._simulation.soon(self._until, until))
            self._tell([self._ahead(at, each, what) for at, _, _, each, what in soon])
            self._until = until
        return self._answer(job)

    def held(self, job: Job) -> Mapping[str, int] | None:
        """What workers held at the moment of the decision, which may have been made ahead."""
        return self._held.pop(job, None)

    def first_token(self, job: Job, choice: Choice, now: float) -> None:
        """Give the prompt's tokens back, unless that was foreseen."""
        if job.told < _FIRST:
            job.told = _FIRST
            self._owed.append((now, None, partial(self._router.prefill_done, self._leases[job])))

    def sent(self, job: Job, choice: Choice) -> None:
        """Nothing: the router counts no transfers."""

    def ended(self, job: Job, choice: Choice, now: float) -> None:
        """Settle the lease, unless that was foreseen."""
        if job.told < _END:
            job.told = _END
            self._owed.append((now, None, partial(self._router.settle, self._leases.pop(job), job.output)))

    def idle(self, engine: Engine, now: float) -> None:
        """Nothing: the router sends workers home by itself."""

    def lost(self, engine: Engine, now: float) -> None:
        """Take its registration away, as silence would."""
        self.flush()
        self._clock.now = now
        self._pipeline.one(self._registry.deregister(engine.worker_id, self._epochs[engine.worker_id]))

    def back(self, engine: Engine, now: float) -> None:
        """Register it anew."""
        self.flush()
        self._clock.now = now
        self._join(engine)

    def leave(self, engine: Engine, now: float) -> None:
        """Route nothing more to it; it goes on with what it has."""
        self.flush()
        self._clock.now = now
        self._pipeline.one(self._registry.drain(engine.worker_id, self._epochs[engine.worker_id]))

    def states(self, now: float) -> tuple[WorkerState, ...]:
        """The workers as the registry sees them."""
        self.flush()
        self._clock.now = now
        found: tuple[WorkerState, ...] = self._pipeline.one(self._registry.states())
        return found

    def again(self, job: Job, now: float) -> Engine | None:
        """Ask for a worker for all of it, as a gateway does that has lost one."""
        demand = Demand(str(job.index), _MODEL, job.prompt, job.output, whole=True, urgent=True)
        self._tell([(now, job, partial(self._router.route, demand))])
        choice = self._answer(job)
        return choice.decode if choice is not None else None

    # --- Redis ---

    def _tell(self, calls: list[_Call]) -> None:
        """Send what is owed, then these."""
        todo = [*self._owed, *calls]
        self._owed.clear()
        if todo:
            self.calls += len(todo)
            self.rounds += 1
            self._pipeline.begin(((now, name, call()) for now, name, call in todo), self._clock)

    def _drain(self) -> None:
        """Wait for all that was sent."""
        while len(self._pipeline):
            self._finish()

    def _finish(self) -> None:
        asked, answer = self._pipeline.finish()
        if asked is not None:
            self._answers[asked] = answer

    def _answer(self, job: Job) -> Choice | None:
        """Wait for the answer to a request's demand; None when it is refused."""
        while job not in self._answers:
            self._finish()
        answer = self._answers.pop(job)
        if isinstance(answer, Exception):
            if isinstance(answer, NoWorkerError) and not self._simulation.disruption.ever:
                raise answer
            return None
        self._leases[job] = answer
        decode = self._engines[answer.decode.worker_id]
        return Choice(self._engines[answer.prefill.worker_id] if answer.prefill else decode, decode)

    def _ahead(self, now: float, job: Job, what: int) -> _Call:
        return now, job if what == _ARRIVAL else None, partial(self._call, job, what)

    def _call(self, job: Job, what: int) -> Coroutine[Any, Any, Any]:
        """What to ask of the router; called in the order of time, also for what is still to happen."""
        if what > job.told:
            if job.told == 0:
                self._simulation.stored(job)
            job.told = what
        if what == _ARRIVAL:
            return self._router.route(self._demand(job))
        if what == _FIRST:
            return self._router.prefill_done(self._leases[job])
        return self._router.settle(self._leases.pop(job), job.output)

    def _demand(self, job: Job) -> Demand:
        """With what workers hold of the prompt, where the trace says; of the many only those with the most."""
        caches = self._simulation.caches
        if caches is None:
            return Demand(str(job.index), _MODEL, job.prompt, job.output)
        held = self._held[job] = caches.held(job)
        most = sorted(held, key=lambda worker: (-held[worker], worker))[:MAX_HOLDERS]
        known = {worker: Held(self._epochs[worker], held[worker]) for worker in most}
        return Demand(str(job.index), _MODEL, job.prompt, job.output, held=known)

    def _join(self, engine: Engine) -> None:
        kind = engine.kind
        info = WorkerInfo(
            worker_id=engine.worker_id,
            epoch=0,
            model=_MODEL,
            pool=engine.home,
            role=engine.home,
            fingerprint=kind.name,
            model_digest="",
            engine_address=engine.worker_id,
            kv_address="",
            metrics_address="",
            capabilities=frozenset(),
            kv_layout="",
            max_model_len=kind.kv_tokens,
            block_size=1,
            num_blocks=kind.kv_tokens,
            max_num_seqs=256,
            adapters=frozenset(),
            vllm_version="",
            protocol_version=1,
            started_ms=0,
        )
        load = WorkerLoad(
            prefill_tokens_per_s=_TYPICAL_PROMPT / kind.prefill(_TYPICAL_PROMPT),
            decode_step_ms=kind.batch(_TYPICAL_BATCH) * 1000,
        )
        epoch = self._epochs[engine.worker_id] = self._pipeline.one(self._registry.register(info))
        self._pipeline.one(self._registry.heartbeat(engine.worker_id, epoch, load))

    def _warm_up(self) -> None:
        """Teach Redis the scripts, so that nothing is sent twice later on."""
        lease = self._pipeline.one(self._router.route(Demand("warm-up", _MODEL, 1, 1)))
        self._pipeline.one(self._router.prefill_done(lease))
        self._pipeline.one(self._router.settle(lease, 1))
