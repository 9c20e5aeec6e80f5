"""How many workers a pool should have, from the work that waits on them. Pure: clock and measurements come from
outside.

The work of a worker is the time that it needs for what is pending there: prompts one after another, answers at its full
batch, as the router counts it. A pool that has more than `target_s` of it for each worker all through `up_s` grows, and
one that would have had enough with fewer all through `down_s` shrinks: the least that was needed in the one window, and
the most in the other, as Kubernetes' autoscaler has it with its stabilization windows.

A pool that lends workers to another (the router has pulled them into that one's work) has none to spare meanwhile. One
that may be at zero keeps a worker while its model is asked for and no other pool stands in for it; and from zero, where
a request may wait, it gets one at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from joinwise.cluster.config_model import AutoscaleConfig, PoolConfig
from joinwise.cluster.router.ask import demand_of
from joinwise.cluster.router.registry import ALL_SAMPLING, AsleepPool, WorkerState

# Of a worker that has not measured its own yet.
_PROMPT_TOKENS_PER_S = 1000.0
_STEP_MS = 30.0
# Who does the work of a role as well: whole requests run on mixed and decode workers.
_STANDS_IN = {"prefill": ("prefill", "mixed"), "decode": ("decode", "mixed"), "mixed": ("mixed", "decode")}
_NO_NEEDS: frozenset[str] = frozenset()


def work_s(worker: WorkerState) -> float:
    """Seconds that a worker needs for what is pending on it."""
    prompts = worker.pending_prefill / (worker.load.prefill_tokens_per_s or _PROMPT_TOKENS_PER_S)
    steps = worker.pending_new / max(1, worker.info.max_num_seqs)
    return prompts + steps * (worker.load.decode_step_ms or _STEP_MS) / 1000


@dataclass
class _Pool:
    config: PoolConfig
    settings: AutoscaleConfig
    model: str
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
        pools: all of them; those with `autoscale` begin with their `replicas`.
        served: names of models in `pools` -> names that clients ask for, where they differ.
    """

    def __init__(self, pools: Iterable[PoolConfig], served: Mapping[str, str] | None = None) -> None:
        self._pools: dict[str, _Pool] = {}
        self._asked: Mapping[str, int] | None = None
        self.configure(pools, served)

    def __bool__(self) -> bool:
        return bool(self._pools)

    @property
    def workers(self) -> Mapping[str, int]:
        """How many workers each pool should have."""
        return {name: pool.workers for name, pool in self._pools.items()}

    def configure(self, pools: Iterable[PoolConfig], served: Mapping[str, str] | None = None) -> None:
        """Go on with another configuration; pools keep the workers that they have, as far as it lets them."""
        before, names = self.workers, served or {}
        self._all = [(pool, names.get(pool.model, pool.model)) for pool in pools]
        self._pools = {
            pool.name: _Pool(pool, pool.autoscale, model, _within(pool.autoscale, before.get(pool.name, pool.replicas)))
            for pool, model in self._all
            if pool.autoscale is not None
        }

    def resume(self, workers: Mapping[str, int]) -> None:
        """Go on with as many workers of each pool as there are already."""
        for name, pool in self._pools.items():
            pool.workers = _within(pool.settings, workers.get(name, pool.workers))

    def asleep(self, workers: Iterable[WorkerState]) -> list[AsleepPool]:
        """Pools that may be at zero, and are, or have no worker yet again."""
        there = {worker.info.pool for worker in workers if worker.info.role != "draining"}
        return [
            AsleepPool(name, pool.model, pool.config.role)
            for name, pool in self._pools.items()
            if not pool.settings.least and name not in there
        ]

    def look(
        self,
        workers: Iterable[WorkerState],
        waiting: Mapping[str, int],
        now: float,
        asked: Mapping[str, int] | None = None,
    ) -> dict[str, str]:
        """Take a measurement in.

        Args:
            workers: all that live.
            waiting: requests that found no room or no worker, and wait for some, by class (`Ask.queue_name`).
            now: seconds, of a clock that never steps back.
            asked: models whose pools may be at zero -> when one was last given a lease, on any clock: a request may
                come and go between two looks.

        Returns:
            The pools whose number of workers should change now, each with the reason; `workers` has the numbers.
        """
        asks = self._asks(asked or {})
        seen: dict[str, list[float]] = {name: [] for name in self._pools}
        lenders = set()
        for worker in workers:
            work, pool, role = work_s(worker), worker.info.pool, worker.info.role
            if work:
                asks.setdefault(worker.info.model, {}).setdefault(_NO_NEEDS, 0)
            if pool in seen and role != "draining":
                seen[pool].append(work)
                lenders |= {pool} if role != self._pools[pool].config.role else set()
        models = {model for _, model in self._all}
        for name, count in waiting.items():
            model, needs = demand_of(name, models)
            asks.setdefault(model, {})[needs] = count + asks.get(model, {}).get(needs, 0)
        crowded = {self._crowded(model, wanted, seen): sum(wanted.values()) for model, wanted in asks.items()}
        return {
            name: why
            for name, pool in self._pools.items()
            if (
                why := self._decide(
                    pool,
                    seen[name],
                    crowded.get(name, 0),
                    needed=any(self._needs(pool, needs) for needs in asks.get(pool.model, ())),
                    lends=name in lenders,
                    now=now,
                )
            )
        }

    def _asks(self, asked: Mapping[str, int]) -> dict[str, dict[frozenset[str], int]]:
        """Models that were asked for since the last look, as classes of requests of which none waits."""
        before, self._asked = self._asked, dict(asked)
        if before is None:
            return {}
        return {model: {_NO_NEEDS: 0} for model, at in asked.items() if before.get(model) != at}

    def _needs(self, pool: _Pool, needs: Collection[str]) -> bool:
        """Whether requests of a class could go to a pool, and to no other one with workers that does its work."""
        return _able(pool.config, needs) and not any(
            other is not pool.config
            and model == pool.model
            and other.role in _STANDS_IN[pool.config.role]
            and _able(other, needs)
            and (self._pools[other.name].workers if other.name in self._pools else other.replicas)
            for other, model in self._all
        )

    def _crowded(self, model: str, wanted: Mapping[frozenset[str], int], seen: Mapping[str, list[float]]) -> str:
        """The pool that is short of a worker for those of a model that wait: the busiest, or one that stands in for it
        when it may not grow; "" if none waits."""
        waits = [needs for needs, count in wanted.items() if count]
        mine = {
            name: pool
            for name, pool in self._pools.items()
            if pool.model == model and any(_able(pool.config, needs) for needs in waits)
        }
        busiest = max(mine, key=lambda name: _each(seen[name]), default="")
        if not busiest or mine[busiest].workers < mine[busiest].settings.most:
            return busiest
        roles = _STANDS_IN[mine[busiest].config.role]
        spare = [name for name, pool in mine.items() if pool.workers < pool.settings.most and pool.config.role in roles]
        return max(spare, key=lambda name: _each(seen[name]), default=busiest)

    def _decide(self, pool: _Pool, work: list[float], waiting: int, *, needed: bool, lends: bool, now: float) -> str:
        settings = pool.settings
        enough = math.ceil(sum(work) / settings.target_s)
        if waiting and len(work) == pool.workers:  # once those that were asked for are there
            enough = max(enough, pool.workers + 1)
        if lends:
            enough = max(enough, pool.workers)
        if needed:
            enough = max(enough, 1)
        pool.note(now, enough)
        up = min(pool.window(now, settings.up_s), default=pool.workers)
        if needed and not pool.workers:  # nobody is there to be too busy
            up = enough
        down = max(pool.window(now, settings.down_s), default=pool.workers)
        wanted = _within(settings, up if up > pool.workers else min(down, pool.workers))
        if wanted == pool.workers:
            return ""
        why = f"{sum(work):.1f} s of work" + (f" and {waiting} requests that wait" if waiting else "")
        if not pool.workers:
            why = f"those who ask for {pool.model}"
        pool.workers = wanted
        pool.needed.clear()  # what was needed of fewer, or more, says nothing yet of these
        return why


def _able(pool: PoolConfig, needs: Collection[str]) -> bool:
    """Whether a pool's workers could serve requests with these needs; adapters are loaded by all of a model's."""
    return pool.role != "draft" and (pool.speculation is None or ALL_SAMPLING not in needs)


def _each(work: list[float]) -> float:
    return sum(work) / len(work) if work else 0.0


def _within(settings: AutoscaleConfig, workers: int) -> int:
    return max(settings.least, min(settings.most, workers))
