"""How many workers a pool should have, from the work that waits on them. Pure: clock and measurements come from
outside.

The work of a worker is the time that it needs for what is pending there: prompts one after another, answers at its full
batch, as the router counts it. A pool that has more than `target_s` of it for each worker all through `up_s` grows, and
one that would have had enough with fewer all through `down_s` shrinks: the least that was needed in the one window, and
the most in the other, as Kubernetes' autoscaler has it with its stabilization windows.

A pool that lends workers to another (the router has pulled them into that one's work) has none to spare meanwhile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from joinwise.cluster.config_model import AutoscaleConfig, PoolConfig
from joinwise.cluster.router.registry import WorkerState

# Of a worker that has not measured its own yet.
_PROMPT_TOKENS_PER_S = 1000.0
_STEP_MS = 30.0


def work_s(worker: WorkerState) -> float:
    """Seconds that a worker needs for what is pending on it."""
    prompts = worker.pending_prefill / (worker.load.prefill_tokens_per_s or _PROMPT_TOKENS_PER_S)
    steps = worker.pending_new / max(1, worker.info.max_num_seqs)
    return prompts + steps * (worker.load.decode_step_ms or _STEP_MS) / 1000


@dataclass
class _Pool:
    settings: AutoscaleConfig
    role: str
    workers: int
    needed: deque[tuple[float, int]] = field(default_factory=deque)
    """When, and how many workers would have been enough."""

    def note(self, now: float, needed: int) -> None:
        self.needed.append((now, needed))
        oldest = now - max(self.settings.up_s, self.settings.down_s)
        while len(self.needed) > 1 and self.needed[1][0] <= oldest:
            self.needed.popleft()

    def window(self, now: float, seconds: float) -> list[int]:
        """What was needed all through the last seconds; empty while less than that is known."""
        if not self.needed or self.needed[0][0] > now - seconds:
            return []
        begin = max(at for at, _ in self.needed if at <= now - seconds)
        return [needed for at, needed in self.needed if at >= begin]


class Autoscaler:
    """Decides for the pools of one cluster.

    Args:
        pools: those with `autoscale`; each begins with its `replicas`.
    """

    def __init__(self, pools: Iterable[PoolConfig]) -> None:
        self._pools: dict[str, _Pool] = {}
        self.configure(pools)

    def __bool__(self) -> bool:
        return bool(self._pools)

    @property
    def workers(self) -> Mapping[str, int]:
        """How many workers each pool should have."""
        return {name: pool.workers for name, pool in self._pools.items()}

    def configure(self, pools: Iterable[PoolConfig]) -> None:
        """Go on with another configuration; pools keep the workers that they have, as far as it lets them."""
        before = self.workers
        self._pools = {
            pool.name: _Pool(pool.autoscale, pool.role, _within(pool.autoscale, before.get(pool.name, pool.replicas)))
            for pool in pools
            if pool.autoscale is not None
        }

    def resume(self, workers: Mapping[str, int]) -> None:
        """Go on with as many workers of each pool as there are already."""
        for name, pool in self._pools.items():
            pool.workers = _within(pool.settings, workers.get(name, pool.workers))

    def look(self, workers: Iterable[WorkerState], waiting: int, now: float) -> dict[str, str]:
        """Take a measurement in.

        Args:
            workers: all that live.
            waiting: requests that found no room anywhere and wait for some.
            now: seconds, of a clock that never steps back.

        Returns:
            The pools whose number of workers should change now, each with the reason; `workers` has the numbers.
        """
        seen: dict[str, list[float]] = {name: [] for name in self._pools}
        lenders = set()
        for worker in workers:
            pool, role = worker.info.pool, worker.info.role
            if pool in seen and role != "draining":
                seen[pool].append(work_s(worker))
                lenders |= {pool} if role != self._pools[pool].role else set()
        crowded = max(seen, key=lambda name: _each(seen[name]), default="") if waiting else ""
        return {
            name: why
            for name, pool in self._pools.items()
            if (why := self._decide(pool, seen[name], waiting if name == crowded else 0, name in lenders, now))
        }

    def _decide(self, pool: _Pool, work: list[float], waiting: int, lends: bool, now: float) -> str:
        settings = pool.settings
        needed = math.ceil(sum(work) / settings.target_s)
        if waiting and len(work) == pool.workers:  # once those that were asked for are there
            needed = max(needed, pool.workers + 1)
        if lends:
            needed = max(needed, pool.workers)
        pool.note(now, needed)
        up = min(pool.window(now, settings.up_s), default=pool.workers)
        down = max(pool.window(now, settings.down_s), default=pool.workers)
        wanted = _within(settings, up if up > pool.workers else min(down, pool.workers))
        if wanted == pool.workers:
            return ""
        why = f"{sum(work):.1f} s of work" + (f" and {waiting} requests that wait" if waiting else "")
        pool.workers = wanted
        pool.needed.clear()  # what was needed of fewer, or more, says nothing yet of these
        return why


def _each(work: list[float]) -> float:
    return sum(work) / len(work) if work else 0.0


def _within(settings: AutoscaleConfig, workers: int) -> int:
    return max(settings.least, min(settings.most, workers))
