"""Which workers serve a request, decided and reserved in one atomic step in Redis.

A request's tokens are pending on its workers from `route` until `settle` (the prefill part until `prefill_done`). The
reservation is a lease: whoever holds it renews it, and a gateway that dies leaves leases that expire. Each call is one
Lua script and may be repeated safely: redis-py does so after a lost answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

from redis.asyncio import Redis

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import JoinwiseError, OverloadedError, StoreUnavailableError
from joinwise.cluster.router.admission import refusal
from joinwise.cluster.router.decision import Assignment, Demand, WorkerRef
from joinwise.cluster.router.registry import Registry, WorkerState
from joinwise.cluster.store.client import Scripts, StoreClock, store_errors
from joinwise.cluster.store.keys import Keys

__all__ = ["Assignment", "Demand", "Router", "WorkerRef"]

_QUEUE_POLL_S = 0.02
_EXPIRE_BATCH = 256


class Router:
    """The router of one cluster, as every gateway holds one; all state is in Redis.

    Every method raises StoreUnavailableError when Redis does not answer.

    Args:
        client: from `store.client.connect`.
        cluster: the cluster's name.
        settings: limits and times.
        clock: milliseconds since 1970, instead of Redis' own clock.
    """

    def __init__(
        self, client: Redis, cluster: str, settings: RouterConfig, clock: Callable[[], int] | None = None
    ) -> None:
        self._client = client
        self._keys = Keys(cluster)
        self._scripts = Scripts(client, self._keys.base)
        self._clock = StoreClock(client, clock)
        self._registry = Registry(client, cluster, settings, clock)
        self._settings = settings
        self._lease_ms = int(settings.lease_s * 1000)
        self._ttl_ms = int(settings.worker_ttl_s * 1000)
        self._waiting = 0
        self._abandoned: set[asyncio.Task[None]] = set()

    async def route(self, demand: Demand) -> Assignment:
        """Choose workers for a request and reserve its tokens on them.

        With `queue_timeout_s` a request waits here for room, at most `max_queue` of them in one gateway.

        Raises:
            NoWorkerError: no live worker serves the model with all that is needed.
            OverloadedError: no worker has room; `retry_after_s` is estimated from its pending tokens and speed.
        """
        deadline = time.monotonic() + self._settings.queue_timeout_s
        pause, queued = _QUEUE_POLL_S, False
        try:
            while True:
                try:
                    return await self._route_once(demand)
                except OverloadedError:
                    if time.monotonic() + pause >= deadline:
                        raise
                    if not queued and self._waiting >= self._settings.max_queue:
                        raise
                if not queued:
                    self._waiting, queued = self._waiting + 1, True
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.5)
        finally:
            self._waiting -= queued

    async def _route_once(self, demand: Demand) -> Assignment:
        lease_id = secrets.token_hex(12)
        now = await self._clock.now_ms()
        try:
            with store_errors("routing", demand.request_id):
                verdict, *details = await self._scripts.run(
                    "route",
                    lease_id,
                    demand.request_id,
                    demand.model,
                    demand.prompt_tokens,
                    demand.max_new_tokens,
                    int(demand.whole),
                    now,
                    self._lease_ms,
                    self._ttl_ms,
                    self._settings.max_pending_tokens,
                    json.dumps(sorted(demand.needs)),
                    json.dumps(sorted(demand.exclude)),
                    preludes=("common", "pick"),
                )
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError | StoreUnavailableError):
                self._abandon(lease_id)  # the script may have run: the answer is lost, not the reservation
            raise
        if verdict == "ok":
            return _assignment(lease_id, json.loads(details[0]))
        raise refusal(demand, verdict, details, self._settings)

    async def prefill_done(self, assignment: Assignment) -> bool:
        """Give the prefill worker its tokens back: the first token is out. False if that was done before."""
        with store_errors(f"releasing the prefill part of lease {assignment.lease_id}"):
            return bool(await self._scripts.run("prefill_done", assignment.lease_id, assignment.lease_epoch))

    async def renew(self, assignments: Iterable[Assignment]) -> list[str]:
        """Extend leases, all in one call. Returns the ids of those that have expired or were settled."""
        pairs = [part for lease in assignments for part in (lease.lease_id, lease.lease_epoch)]
        if not pairs:
            return []
        now = await self._clock.now_ms()
        with store_errors("renewing leases"):
            lost: list[str] = await self._scripts.run("renew", now, self._lease_ms, *pairs)
        return lost

    async def settle(self, assignment: Assignment) -> bool:
        """Give back all that the lease still holds. False if it was settled before or has expired."""
        with store_errors(f"settling lease {assignment.lease_id}"):
            return bool(await self._scripts.run("settle", assignment.lease_id, assignment.lease_epoch))

    async def expire(self) -> int:
        """End leases past their time, forget silent workers; returns how many leases. Any gateway, once a second."""
        ended = 0
        while True:
            now = await self._clock.now_ms()
            with store_errors("expiring leases"):
                leases, workers = await self._scripts.run("expire", now, self._ttl_ms, _EXPIRE_BATCH)
            ended += int(leases)
            if max(leases, workers) < _EXPIRE_BATCH:
                return ended

    async def snapshot(self) -> dict[str, Any]:
        """The cluster for `joinwise status`: {"workers": one dict per live worker, "leases": how many}."""
        states = await self._registry.states()
        with store_errors("counting leases"):
            leases = await self._client.zcard(self._keys.leases)
        return {"workers": [_status(state) for state in states], "leases": int(leases)}

    async def leftovers(self) -> list[str]:
        """What an idle cluster must not have: a line for each lease and for each worker with pending tokens."""
        found = []
        with store_errors("looking for leftovers"):
            async for key in self._client.scan_iter(match=_escape(self._keys.lease("")) + "*", count=1000):
                request = await self._client.hget(str(key), "request")
                found.append(f"lease {str(key).removeprefix(self._keys.lease(''))} of request {request!s}")
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

    def _abandon(self, lease_id: str) -> None:
        """Settle a lease whose answer was lost, in the background; if that fails too, it expires."""

        async def settle() -> None:
            try:
                with store_errors(f"abandoning lease {lease_id}"):
                    await self._scripts.run("settle", lease_id, "")
            except JoinwiseError:
                pass

        task = asyncio.get_running_loop().create_task(settle())
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)


def _assignment(lease_id: str, reply: dict[str, Any]) -> Assignment:
    def ref(parts: list[str]) -> WorkerRef:
        worker_id, epoch, engine, kv = parts
        return WorkerRef(worker_id, int(epoch), engine, kv)

    return Assignment(
        lease_id=lease_id,
        lease_epoch=int(reply["epoch"]),
        prefill=ref(reply["p"]) if reply["p"] else None,
        decode=ref(reply["d"]),
        reason=reply["reason"],
        expires_ms=int(reply["expires"]),
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
