"""Which workers serve a request, decided and reserved in one atomic step in Redis.

A request's tokens are pending on its workers from `route` until `settle` (the prefill part until `prefill_done`). The
reservation is a lease: whoever holds it renews it, and a gateway that dies leaves leases that expire. Each call is one
Lua script and may be repeated safely: redis-py does so after a lost answer. How a choice is made: docs/routing.md.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import JoinwiseError, StoreUnavailableError
from joinwise.cluster.router.admission import refusal
from joinwise.cluster.router.ask import Ask, rules
from joinwise.cluster.router.decision import Assignment, Demand, Held, Running, WorkerRef
from joinwise.cluster.router.line import Lines
from joinwise.cluster.router.registry import Registry, WorkerState
from joinwise.cluster.router.terms import Terms
from joinwise.cluster.router.together import Together
from joinwise.cluster.store.client import Scripts, StoreClock, store_errors
from joinwise.cluster.store.keys import Keys

__all__ = ["Assignment", "Demand", "Held", "Router", "Running", "Terms", "WorkerRef", "samples_of"]

_EXPIRE_BATCH = 256
_WAKE_POLL_S = 0.2
_AT_ONCE = 32  # decisions, or endings, in one call: Redis answers nobody else meanwhile
_LINGER_S = 0.01  # first tokens come several in a step of an engine
_LEASE = ("common", "load", "lease")
_ENDING = (*_LEASE, "tenants", "leases")
_ROUTING = (*_LEASE, "tenants", "queue", "pick", "pools", "plan", "explain", "sessions")


class Router:
    """The router of one cluster, as every gateway holds one; all state is in Redis.

    Every method raises StoreUnavailableError when Redis does not answer.

    Args:
        client: from `store.client.connect`.
        cluster: the cluster's name.
        settings: limits and times.
        clock: milliseconds since 1970, instead of Redis' own clock.
        wakes: models whose pools may be at zero -> seconds that a request waits there for a worker.
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
        self._client = client
        self._keys = Keys(cluster)
        self._scripts = Scripts(client, self._keys.base)
        self._clock = StoreClock(client, clock)
        self._registry = Registry(client, cluster, settings, clock)
        self._settings = settings
        self._wakes = wakes or {}
        self._rules = rules(settings)
        self._lease_ms = int(settings.lease_s * 1000)
        self._ttl_ms = int(settings.worker_ttl_s * 1000)
        self._name = secrets.token_hex(6)
        self._lines = Lines()
        self._deciding = Together(self._decide, _AT_ONCE)
        self._settling = Together(self._settle, _AT_ONCE)
        self._computed = Together(self._give_back, _AT_ONCE, linger_s=_LINGER_S)
        self._abandoned: set[asyncio.Task[None]] = set()

    async def route(self, demand: Demand) -> Assignment:
        """Choose workers for a request and reserve its tokens on them.

        With `queue_timeout_s` a request waits here for room: its tenant's turn goes by weight, its own by priority
        and age, whichever gateways the others are at. One for a model whose pools are at zero waits so for a worker.

        Returns:
            The first sample's assignment; `samples_of` gives all of them.

        Raises:
            NoWorkerError: no live worker serves the model with all that is needed, or none has come in time.
            OverloadedError: no worker has room; `retry_after_s` is estimated from pending work and the queue.
            RateLimitedError: the tenant is over its limits.
            ObjectiveError: no worker can keep the request's objectives.
        """
        now = await self._clock.now_ms()
        timeout = self._settings.queue_timeout_s
        wake = 0.0 if demand.urgent else self._wakes.get(demand.model, 0.0)
        lease_id = secrets.token_hex(12)
        ask = Ask(
            demand,
            self._settings,
            lease_id,
            entry=f"{self._name}/{now + int(max(timeout, wake) * 1000)}/{lease_id}",
            score=now + int(demand.terms.priority * self._settings.ageing_s * 1000),
            patient=timeout > 0 and not demand.urgent,
            wakes=wake > 0,
        )
        try:
            verdict, *details = await self._ask(ask, queued=False)
            if verdict == "after":
                verdict, *details = await self._wait(ask, wake if details == ["none"] and wake else timeout)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError | StoreUnavailableError):
                self._abandon(ask)  # the script may have run: the answer is lost, not the reservation
            raise
        if verdict == "ok":
            return _assignment(lease_id, details[0])
        raise refusal(demand, verdict, details, self._settings)

    async def _wait(self, ask: Ask, seconds: float) -> list[Any]:
        """Ask again whenever it is this request's turn here, until it is served, refused or late."""
        try:
            async with (
                asyncio.timeout(seconds),
                self._lines.place((ask.demand.model, ask.queue_class, ask.tenant[0]), ask.score, ask.entry) as place,
            ):
                await place.first.wait()
                while (answer := await self._ask(ask, queued=True))[0] == "after":
                    await (self._lines.rest(_WAKE_POLL_S) if answer[1:] == ["none"] else self._lines.rest())
                return answer
        except TimeoutError:
            return await self._ask(replace(ask, patient=False, wakes=False), queued=False)

    async def _ask(self, ask: Ask, *, queued: bool) -> list[Any]:
        with store_errors("routing", ask.demand.request_id):
            return await self._deciding.ask((ask, ask.text(queued=queued)))

    async def _decide(self, asks: Sequence[tuple[Ask, str]]) -> list[list[Any]]:
        """Decide for several requests, in their order, in one call."""
        words: list[str | int] = []
        for ask, text in asks:
            demand = ask.demand
            words += (ask.lease_id, demand.request_id, demand.model)
            words += (demand.prompt_tokens, demand.max_new_tokens, demand.samples, text, ask.entry)
        now = await self._clock.now_ms()
        answers: list[list[Any]] = await self._scripts.run(
            "route", now, self._lease_ms, self._ttl_ms, self._rules, *words, preludes=_ROUTING
        )
        return answers

    async def prefill_done(self, assignment: Assignment) -> bool:
        """Give the prefill worker its tokens back: the first token is out. False if that was done before."""
        with store_errors(f"releasing the prefill part of lease {assignment.lease_id}"):
            done = await self._computed.ask(assignment)
        self._lines.room()
        return done

    async def _give_back(self, computed: Sequence[Assignment]) -> list[bool]:
        words = [part for each in computed for part in (each.lease_id, each.lease_epoch)]
        return list(map(bool, await self._scripts.run("prefill_done", *words, preludes=_LEASE)))

    async def renew(self, assignments: Iterable[Assignment]) -> list[str]:
        """Extend leases, all in one call. Returns the ids of those that have expired or were settled."""
        pairs = [part for lease in assignments for part in (lease.lease_id, lease.lease_epoch)]
        if not pairs:
            return []
        now = await self._clock.now_ms()
        with store_errors("renewing leases"):
            lost: list[str] = await self._scripts.run("renew", now, self._lease_ms, *pairs, preludes=_LEASE)
        return lost

    async def adopt(self, running: Iterable[Running]) -> int:
        """Write leases again that `renew` did not find, for samples that run on; returns how many.

        Redis may have lost its data, and workers have registered again. A lease whose workers have not yet, or that
        is there, is left alone: call again later, nothing is counted twice.
        """
        leases: dict[str, dict[str, Any]] = {}
        for each in running:
            lease, demand = each.assignment, each.demand
            known = leases.setdefault(
                lease.lease_id,
                {
                    "id": lease.lease_id,
                    "epoch": str(lease.lease_epoch),
                    "request": demand.request_id,
                    "p": _place(lease.prefill or lease.decode),
                    "d": _place(lease.decode),
                    "prompt": demand.prompt_tokens,
                    "held": demand.prompt_tokens,
                    "new": demand.max_new_tokens,
                    "left": 0,
                },
            )
            known["left"] += 1
            if each.prefill_done:
                known["prompt"] = 0
        if not leases:
            return 0
        now = await self._clock.now_ms()
        with store_errors("writing leases again"):
            texts = map(json.dumps, leases.values())
            return int(await self._scripts.run("adopt", now, self._lease_ms, *texts, preludes=_LEASE))

    async def settle(self, assignment: Assignment, generated: int | None = None) -> bool:
        """Give back what a sample still holds. False if it was settled before or has expired.

        Args:
            assignment: what `route` or `samples_of` gave.
            generated: tokens that were made; the tenant gets the rest of its reservation back. None: all of them.
        """
        used = (1 << 31) if generated is None else generated
        with store_errors(f"settling lease {assignment.lease_id}"):
            ended = await self._settling.ask((assignment, used))
        self._lines.room()
        return ended

    async def _settle(self, endings: Sequence[tuple[Assignment, int]]) -> list[bool]:
        """Settle several samples in one call; `used`: tokens that each has made."""
        words: list[str | int] = []
        for each, used in endings:
            words += (each.lease_id, each.lease_epoch, each.sample, used)
        return list(map(bool, await self._scripts.run("settle", *words, preludes=_ENDING)))

    async def expire(self) -> int:
        """End leases past their time, forget silent workers; returns how many leases. Any gateway, once a second."""
        ended = 0
        while True:
            now = await self._clock.now_ms()
            with store_errors("expiring leases"):
                leases, workers = await self._scripts.run(
                    "expire", now, self._ttl_ms, self._lease_ms, _EXPIRE_BATCH, preludes=(*_ENDING, "pick")
                )
            ended += int(leases)
            if max(leases, workers) < _EXPIRE_BATCH:
                return ended

    async def snapshot(self) -> dict[str, Any]:
        """The cluster for `joinwise status`: {"workers": one dict per live worker, "leases": how many}."""
        states = await self._registry.states()
        with store_errors("counting leases"):
            leases = await self._client.zcard(self._keys.leases)
        return {"workers": [_status(state) for state in states], "leases": int(leases)}

    async def registered(self, worker: WorkerRef) -> bool:
        """Whether this life of a worker is registered: one that left in good order is not, one that died still is."""
        states = await self._registry.states_of([worker.worker_id])
        return any(state.info.epoch == worker.epoch for state in states)

    async def leftovers(self) -> list[str]:
        """What an idle cluster must not have: a line for each lease and for each worker with pending tokens."""
        found = []
        with store_errors("looking for leftovers"):
            async for key in self._client.scan_iter(match=_escape(self._keys.lease("")) + "*", count=1000):
                lease_id = str(key).removeprefix(self._keys.lease(""))
                request = await self._scripts.run("leftover", lease_id, preludes=_LEASE)
                found.append(f"lease {lease_id} of request {request!s}")
            for lease_id in map(str, await self._client.zrange(self._keys.leases, 0, -1)):
                if not await self._client.exists(self._keys.lease(lease_id)):
                    found.append(f"expiry of lease {lease_id}, which is gone")
        for state in await self._registry.states():
            if state.pending_prefill or state.pending_decode:
                found.append(
                    f"worker {state.info.worker_id} has {state.pending_prefill} prefill and "
                    f"{state.pending_decode} decode tokens pending"
                )
        return sorted(found)

    def _abandon(self, ask: Ask) -> None:
        """Settle a lease whose answer was lost, in the background; if that fails too, it expires."""

        async def end() -> None:
            await self._deciding.past()
            with suppress(JoinwiseError):
                await self._end(ask)

        task = asyncio.get_running_loop().create_task(end())
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)

    async def _end(self, ask: Ask) -> None:
        with store_errors(f"abandoning lease {ask.lease_id}"):
            await self._scripts.run(
                "abandon",
                ask.lease_id,
                ask.queue_name,
                ask.tenant[0],
                ask.entry,
                preludes=(*_ENDING, "queue"),
            )


def _place(worker: WorkerRef) -> tuple[str, str]:
    return worker.worker_id, worker.engine_address


def samples_of(assignment: Assignment, samples: int) -> list[Assignment]:
    """The parts of a lease that was routed for several samples; each is settled by itself."""
    return [replace(assignment, sample=index) for index in range(samples)]


def _assignment(lease_id: str, reply: str) -> Assignment:
    epoch, reason, expires, first_ms, gap_ms, *workers = reply.split("\n")
    refs = [WorkerRef(workers[i], int(workers[i + 1]), *workers[i + 2 : i + 4]) for i in range(0, len(workers), 4)]
    return Assignment(
        lease_id=lease_id,
        lease_epoch=int(epoch),
        prefill=refs[1] if len(refs) > 1 else None,
        decode=refs[0],
        reason=reason,
        expires_ms=int(expires),
        ttft_ms=float(first_ms),
        tpot_ms=float(gap_ms),
    )


def _status(state: WorkerState) -> dict[str, Any]:
    """The fields of `joinwise.cluster.client.types.WorkerStatus`."""
    info, load = state.info, state.load
    return {
        "worker_id": info.worker_id,
        "pool": info.pool,
        "role": info.role,
        "model": info.model,
        "epoch": info.epoch,
        "running": load.running,
        "waiting": load.waiting,
        "pending_tokens": state.pending_tokens,
        "kv_blocks_free": load.kv_blocks_free,
        "kv_blocks_total": load.kv_blocks_total,
        "address": info.engine_address,
        "decode_step_ms": load.decode_step_ms,
    }


def _escape(text: str) -> str:
    """Text for a SCAN pattern."""
    return "".join(f"\\{char}" if char in "*?[]\\" else char for char in text)
