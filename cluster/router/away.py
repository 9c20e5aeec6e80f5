"""A gateway rides out a gap in which Redis does not answer: it decides on the workers that it last saw.

While Redis is away each gateway knows its own decisions only, so the choice is coarse (fewest pending tokens):
tenants' limits, the queue and objectives do not hold, and what other gateways do meanwhile is not seen. What should be
given back is kept in order and said when Redis is there again, and leases that were given out meanwhile are written
then: each once, for scripts may be repeated and a lease is known by its id.

A gap may be the workers' own: a machine that is short of time lets all heartbeats be late, and a Redis that came back
empty knows nobody for a moment. A request that finds no live worker then waits for the first that shows itself.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from redis.asyncio import Redis

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import JoinwiseError, NoWorkerError, OverloadedError, StoreUnavailableError
from joinwise.cluster.router.ask import Ask
from joinwise.cluster.router.decision import Assignment, Demand, Running, WorkerRef
from joinwise.cluster.router.registry import WorkerInfo, WorkerState, capabilities_of
from joinwise.cluster.router.router import Router, samples_of
from joinwise.cluster.store.client import store_errors

_Word = Callable[[], Awaitable[object]]  # something to say when Redis is there again

#: The reason of an assignment that was made without Redis.
REDIS_AWAY = "redis_away"
_PROBE_S = 0.25
_RETRY_AFTER_S = 2.0
_MAX_KEPT = 100_000


@dataclass
class _Lent:
    """A lease that Redis, or the last look at the workers, does not know of yet."""

    assignment: Assignment
    demand: Demand
    prefill_done: bool = False
    ended: set[int] = field(default_factory=set)

    def running(self) -> list[Running]:
        samples = samples_of(self.assignment, self.demand.samples)
        return [Running(each, self.demand, self.prefill_done) for each in samples if each.sample not in self.ended]

    def pending(self, worker_id: str) -> int:
        """Tokens that it holds on a worker."""
        prefills, demand = self.assignment.prefill or self.assignment.decode, self.demand
        tokens = demand.prompt_tokens if prefills.worker_id == worker_id and not self.prefill_done else 0
        if self.assignment.decode.worker_id == worker_id:
            tokens += demand.prompt_tokens + (demand.samples - len(self.ended)) * demand.max_new_tokens
        return tokens


class SteadyRouter(Router):
    """A router that goes on for `away_s` seconds with the workers that it saw last. Lives on one event loop.

    Beside what `Router` says: `settle` and `prefill_done` return True, and raise nothing, while Redis is away.
    """

    def __init__(
        self,
        client: Redis,
        cluster: str,
        settings: RouterConfig,
        clock: Callable[[], int] | None = None,
        *,
        wakes: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(client, cluster, settings, clock, wakes=wakes)
        self._seen: tuple[WorkerState, ...] = ()
        self._seen_at = float("-inf")
        self._lived: dict[str, float] = {}  # model -> when a worker of it was last known to live
        self._looked = asyncio.Event()  # of the next look at the workers
        self._lent: dict[str, _Lent] = {}
        self._given: dict[str, _Lent] = {}  # by Redis, since that look
        self._kept: deque[_Word] = deque(maxlen=_MAX_KEPT)  # of the oldest, should they be more, the leases expire
        self._returning: asyncio.Task[None] | None = None

    @property
    def away(self) -> bool:
        """Whether decisions are made without Redis now."""
        return self._returning is not None

    def observe(self, live: tuple[WorkerState, ...]) -> None:
        """Remember the live workers, for a gap that may come; once a heartbeat."""
        if not self.away:
            self._seen, self._seen_at = live, time.monotonic()
            self._given.clear()
            self._note_alive()
            self._looked.set()
            self._looked = asyncio.Event()

    async def route(self, demand: Demand) -> Assignment:
        """As `Router.route`; without Redis on the last snapshot, with the reason `redis_away`.

        Where no worker of the model lives, but one did a moment ago, a request waits up to `worker_ttl_s` from then on.
        """
        until: float | None = None
        while True:
            try:
                return await self._route(demand)
            except NoWorkerError:
                if until is None:
                    until = self._lived.get(demand.model, float("-inf")) + self._settings.worker_ttl_s
                if self.away or not await self._shows_itself(demand, until):
                    raise

    async def _route(self, demand: Demand) -> Assignment:
        if self.away and self._fresh():
            return self._lend(demand)
        try:
            given = await super().route(demand)
        except StoreUnavailableError:
            if not self._fresh():
                raise
            self._leave()
            return self._lend(demand)
        self._given[given.lease_id] = _Lent(given, demand)
        return given

    async def prefill_done(self, assignment: Assignment) -> bool:
        """As `Router.prefill_done`, now or later."""
        for book in (self._lent, self._given):
            if (held := book.get(assignment.lease_id)) is not None:
                held.prefill_done = True
        return await self._now_or_later(partial(super().prefill_done, assignment))

    async def settle(self, assignment: Assignment, generated: int | None = None) -> bool:
        """As `Router.settle`, now or later."""
        for book in (self._lent, self._given):
            if (held := book.get(assignment.lease_id)) is not None:
                held.ended.add(assignment.sample)
                if len(held.ended) == held.demand.samples:
                    del book[assignment.lease_id]
        return await self._now_or_later(partial(super().settle, assignment, generated))

    async def _now_or_later(self, word: Callable[[], Awaitable[bool]]) -> bool:
        """Say something to Redis; True, and said later, while it is away."""
        if not self.away:
            try:
                return await word()
            except StoreUnavailableError:
                if not self._fresh():
                    raise
                self._leave()
        self._kept.append(word)
        return True

    async def _end(self, ask: Ask) -> None:
        try:
            await super()._end(ask)
        except StoreUnavailableError:
            if not self.away:
                raise
            self._kept.append(partial(super()._end, ask))

    async def _shows_itself(self, demand: Demand, until: float) -> bool:
        """Wait for a worker that a demand could go to; False if there is none by then, or only others of its model."""
        while (left := until - time.monotonic()) > 0:
            live = [each.info for each in self._seen if each.info.model == demand.model]
            if live and not any(_suits(info, demand) for info in live):
                return False
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._looked.wait()
                    if any(_suits(each.info, demand) for each in self._seen):
                        return True
        return False

    def _note_alive(self) -> None:
        self._lived.update((each.info.model, time.monotonic()) for each in self._seen)

    def _fresh(self) -> bool:
        return bool(self._seen) and time.monotonic() - self._seen_at <= self._settings.away_s

    def _leave(self) -> None:
        if self._returning is None:
            self._returning = asyncio.get_running_loop().create_task(self._come_back())

    async def _come_back(self) -> None:
        """Wait for Redis and for the workers that were known; say what was kept, write the leases lent meanwhile."""
        answered: float | None = None
        while True:
            await asyncio.sleep(_PROBE_S)
            try:
                with store_errors("looking whether it is there again"):
                    await self._client.ping()
                answered = answered or time.monotonic()
                await self._say()
                # After a loss of its data workers come back one by one. Those that do not in time are dead.
                missing = {each.info.worker_id for each in self._seen}
                missing -= {each.info.worker_id for each in await self._registry.states()}
                if missing and time.monotonic() - answered < self._settings.worker_ttl_s:
                    continue
                await self.adopt(each for lent in self._lent.values() for each in lent.running())
                if not self._kept:  # nothing has ended in between
                    break
            except JoinwiseError:
                answered = None
        self._lent.clear()  # what could not be written yet, `adopt` of the gateway writes later
        self._note_alive()
        self._returning = None

    async def _say(self) -> None:
        while self._kept:
            word = self._kept.popleft()
            try:
                await word()
            except StoreUnavailableError:
                self._kept.appendleft(word)
                raise

    def _lend(self, demand: Demand) -> Assignment:
        """Choose among the workers seen last, by fewest pending tokens."""
        pending: Counter[str] = Counter()
        pools: dict[str, list[WorkerState]] = {"prefill": [], "decode": [], "mixed": []}
        for each in self._seen:
            info = each.info
            if _suits(info, demand) and info.role in pools:
                pools[info.role].append(each)
                pending[info.worker_id] = each.pending_tokens
        for lent in (*self._lent.values(), *self._given.values()):
            for worker_id in {ref.worker_id for ref in (lent.assignment.prefill, lent.assignment.decode) if ref}:
                pending[worker_id] += lent.pending(worker_id)

        def least(tokens: int, *roles: str) -> WorkerState | None:
            """The least loaded with room, of the first of these pools that has one."""
            for role in roles:
                fits = [
                    each
                    for each in pools[role]
                    if (held := pending[each.info.worker_id]) == 0 or held + tokens <= self._settings.max_pending_tokens
                ]
                if fits:
                    return min(fits, key=lambda each: pending[each.info.worker_id])
            return None

        if not any(pools.values()):
            raise NoWorkerError(
                f"Redis is away, and no worker of {demand.model!r} that could serve this was seen before",
                request_id=demand.request_id,
                retry_after_s=_RETRY_AFTER_S,
            )
        prompt, held = demand.prompt_tokens, demand.prompt_tokens + demand.samples * demand.max_new_tokens
        prefill, decode = least(prompt, "prefill", "mixed"), least(held, "decode", "mixed")
        if demand.whole or prefill is None or decode is None or prefill is decode:
            prefill, decode = None, least(prompt + held, "decode", "mixed", "prefill")
        if decode is None:
            raise OverloadedError(
                f"Redis is away, and every worker of {demand.model!r} was full when it was last seen",
                request_id=demand.request_id,
                retry_after_s=_RETRY_AFTER_S,
            )
        now = time.time_ns()
        assignment = Assignment(
            lease_id=secrets.token_hex(12),
            lease_epoch=now // 1000,
            prefill=_ref(prefill) if prefill else None,
            decode=_ref(decode),
            reason=REDIS_AWAY,
            expires_ms=now // 1_000_000 + self._lease_ms,
            tpot_ms=decode.load.decode_step_ms,
        )
        self._lent[assignment.lease_id] = _Lent(assignment, demand)
        return assignment


def _suits(info: WorkerInfo, demand: Demand) -> bool:
    """Whether a worker could serve a demand, by what it is."""
    able = info.model == demand.model and demand.needs <= capabilities_of(info)
    return able and info.worker_id not in demand.exclude


def _ref(state: WorkerState) -> WorkerRef:
    info = state.info
    return WorkerRef(info.worker_id, info.epoch, info.engine_address, info.kv_address)
