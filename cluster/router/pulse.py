"""A cluster at a glance, as Redis knows it: workers, queue, leases, and what was decided in the last seconds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.router.registry import AsleepPool, Registry, WorkerState
from joinwise.cluster.store.client import Scripts, StoreClock, store_errors
from joinwise.cluster.store.keys import Keys

_WINDOW_MS = 10_000
_MOST = 2000
_REFUSALS = frozenset({"full", "limited", "slo", "none"})


@dataclass(frozen=True)
class PoolPulse:
    """The workers of one pool together.

    Attributes:
        roles: current role -> how many workers have it.
        kv_blocks_total, kv_blocks_free: of the workers that have told of theirs.
    """

    pool: str
    model: str
    roles: Mapping[str, int]
    pending_prefill: int
    pending_decode: int
    pending_new: int
    sequences: int
    kv_blocks_total: int
    kv_blocks_free: int

    @classmethod
    def of(cls, pool: str, model: str, workers: Sequence[WorkerState]) -> PoolPulse:
        """Adds up what its workers have."""
        return cls(
            pool=pool,
            model=model,
            roles=dict(sorted(Counter(each.info.role for each in workers).items())),
            pending_prefill=sum(each.pending_prefill for each in workers),
            pending_decode=sum(each.pending_decode for each in workers),
            pending_new=sum(each.pending_new for each in workers),
            sequences=sum(each.sequences for each in workers),
            kv_blocks_total=sum(each.load.kv_blocks_total for each in workers),
            kv_blocks_free=sum(each.load.kv_blocks_free for each in workers),
        )


@dataclass(frozen=True)
class Pulse:
    """A moment of a cluster.

    Attributes:
        now_ms: when, milliseconds since 1970 on Redis' clock.
        leases: requests that are reserved for.
        waiting: requests in the queue.
        span_s: seconds that `verdicts` and `links` cover: ten, or fewer where so many decisions are not kept.
        verdicts: reason of an assignment or a refusal -> how often.
        links: (prefill worker, decode worker) -> requests handed over between them.
        asleep: pools at zero, which the next request wakes.
    """

    now_ms: int
    workers: tuple[WorkerState, ...]
    leases: int
    waiting: int
    span_s: float
    verdicts: Mapping[str, int]
    links: Mapping[tuple[str, str], int]
    asleep: tuple[AsleepPool, ...] = ()

    @property
    def pools(self) -> tuple[PoolPulse, ...]:
        """The same workers by pool, each pool's model beside it."""
        pools: defaultdict[tuple[str, str], list[WorkerState]] = defaultdict(list)
        for each in self.workers:
            pools[each.info.pool, each.info.model].append(each)
        return tuple(PoolPulse.of(*name, workers) for name, workers in sorted(pools.items()))

    @property
    def assigned_per_s(self) -> float:
        """Requests a second that were given workers."""
        return sum(count for verdict, count in self.verdicts.items() if verdict not in _REFUSALS) / self.span_s

    @property
    def refused_per_s(self) -> float:
        """Requests a second that were refused."""
        return sum(count for verdict, count in self.verdicts.items() if verdict in _REFUSALS) / self.span_s


async def take_pulse(client: Redis, cluster: str) -> Pulse:
    """Look at a cluster once. Raises StoreUnavailableError when Redis does not answer."""
    keys, now = Keys(cluster), await StoreClock(client).now_ms()
    registry = Registry(client, cluster, RouterConfig())
    workers = await registry.states(now)
    with store_errors("looking at the cluster"):
        leases = int(await client.zcard(keys.leases))
        answer: Any = await Scripts(client, keys.base).run(
            "pulse", now - _WINDOW_MS, _MOST, preludes=("common", "pick", "explain")
        )
    waiting = sum((await count_waiting(client, cluster, now)).values())
    oldest, verdicts, links = answer
    counts = dict(zip(verdicts[::2], verdicts[1::2], strict=True))
    cut = sum(counts.values()) == _MOST  # there were more: what is seen began at the oldest of them
    span = max(1, now - int(oldest)) if cut else _WINDOW_MS
    return Pulse(
        now_ms=now,
        workers=workers,
        leases=leases,
        waiting=waiting,
        span_s=span / 1000,
        verdicts=counts,
        links={_pair(chosen): count for chosen, count in zip(links[::2], links[1::2], strict=True)},
        asleep=await registry.asleep(),
    )


async def count_waiting(client: Redis, cluster: str, now_ms: int | None = None) -> dict[str, int]:
    """Requests in the queue, by class (`Ask.queue_name`). Raises StoreUnavailableError when Redis does not answer."""
    keys = Keys(cluster)
    now = await StoreClock(client).now_ms() if now_ms is None else now_ms
    with store_errors("counting what waits"):
        found = [str(key) async for key in client.scan_iter(match=keys.turns_pattern, count=1000)]
        classes = [key.removeprefix(keys.turns) for key in found]
        counts: Any = classes and await Scripts(client, keys.base).run(
            "waiting", now, *classes, preludes=("common", "queue")
        )
    return {name: count for name, count in zip(classes, map(int, counts), strict=True) if count}


async def last_asked(client: Redis, cluster: str) -> dict[str, int]:
    """Models whose pools may be at zero -> when one was last given a lease, in milliseconds since 1970.

    Raises StoreUnavailableError when Redis does not answer.
    """
    with store_errors("reading who was asked"):
        asked = await cast(Awaitable[dict[str, str]], client.hgetall(Keys(cluster).asked))
    return {model: int(at) for model, at in asked.items()}


def _pair(chosen: str) -> tuple[str, str]:
    prefill, _, decode = chosen.partition(" ")
    return prefill, decode
