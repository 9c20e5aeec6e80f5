"""A router and a registry on one virtual clock and a real Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis

from joinwise.cluster.config import RouterConfig
from joinwise.cluster.router.registry import Registry, WorkerInfo, WorkerLoad
from joinwise.cluster.router.router import Assignment, Demand, Router
from joinwise.cluster.store.keys import Keys

Make = Callable[..., WorkerInfo]


def demand(prompt: int = 100, new: int = 10, **changes: object) -> Demand:
    return Demand(**{"request_id": "r", "model": "m", "prompt_tokens": prompt, "max_new_tokens": new, **changes})  # type: ignore[arg-type]


class Bench:
    """One gateway's view of one cluster; `changes` are router settings, and `wakes` of the router.

    A neighbour's delay counts as one's own, so that costs are whole numbers.
    """

    def __init__(
        self,
        client: Redis,
        cluster: str,
        clock: Callable[[], int],
        make: Make,
        *,
        wakes: dict[str, float] | None = None,
        **changes: Any,
    ) -> None:
        base = {"max_pending_tokens": 1000, "lease_s": 10, "worker_ttl_s": 5, "split": "always", "gap_weight": 1.0}
        self.settings = RouterConfig(**{**base, **changes})  # type: ignore[arg-type]
        self.client, self.cluster, self.clock, self._make = client, cluster, clock, make
        self.registry = Registry(client, cluster, self.settings, clock)
        self.router = Router(client, cluster, self.settings, clock, wakes=wakes)
        self.epochs: dict[str, int] = {}

    async def join(self, worker_id: str, role: str = "mixed", **changes: object) -> int:
        epoch = self.epochs[worker_id] = await self.registry.register(self._make(worker_id, role, **changes))
        return epoch

    async def pending(self) -> dict[str, tuple[int, int]]:
        """Worker -> pending tokens of prefill and decode; the sets must say the same, and hold each worker once."""
        states = await self.registry.states()
        base = Keys(self.cluster).base
        for kind in ("room", "queue"):
            places: dict[str, list[tuple[str, float]]] = {state.info.worker_id: [] for state in states}
            async for key in self.client.scan_iter(match=f"{base}{kind}:*".replace("[", "\\[")):
                for worker_id, score in await self.client.zrange(key, 0, -1, withscores=True):
                    places[worker_id].append((key.removeprefix(base).split(":")[1], score))
            for state in states:
                found = places[state.info.worker_id]
                assert [role for role, _ in found] == [state.info.role] * (state.info.role != "draining")
                assert kind == "queue" or [score for _, score in found] == [state.pending_tokens] * len(found)
        return {state.info.worker_id: (state.pending_prefill, state.pending_decode) for state in states}

    async def assert_zero(self) -> None:
        assert await self.router.leftovers() == []

    async def measured(self, worker_id: str, *, tokens_per_s: float, step_ms: float) -> None:
        """Heartbeat of a worker that has measured its speeds."""
        load = WorkerLoad(prefill_tokens_per_s=tokens_per_s, decode_step_ms=step_ms)
        assert await self.registry.heartbeat(worker_id, self.epochs[worker_id], load)

    def with_(self, **changes: Any) -> Bench:
        """The same cluster from a gateway with other settings."""
        other = Bench(self.client, self.cluster, self.clock, self._make, **{**self.settings.model_dump(), **changes})
        other.epochs = self.epochs
        return other

    async def roles(self) -> dict[str, str]:
        """Worker -> its role now."""
        return {state.info.worker_id: state.info.role for state in await self.registry.states()}


def chosen(assignment: Assignment) -> tuple[str | None, str]:
    """Ids of the prefill and the decode worker."""
    return assignment.prefill.worker_id if assignment.prefill else None, assignment.decode.worker_id
