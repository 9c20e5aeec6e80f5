"""Which draft actors there are, and which of them each engine asks: in Redis, so that engines share a pool by cost.

A draft actor says every heartbeat where it is; an engine asks as often for its own, and so keeps it. One that falls
silent is forgotten, and so are the engines that were bound to it. Nothing here decides what is served: an engine
without a draft actor only works more slowly.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from redis.asyncio import Redis

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.store.client import Scripts, StoreClock, store_errors
from joinwise.cluster.store.keys import Keys


@dataclass(frozen=True)
class DraftInfo:
    """A draft actor.

    Attributes:
        draft_id: unique in the cluster.
        address: of its gRPC port.
        metrics_address: of its operator's port.
        drafter: how it drafts.
        vocabulary_model, vocabulary_size, vocabulary_digest: what its token ids mean; empty when it drafts in any.
        round_ms: what a round has lately taken it; 0 before the first.
    """

    draft_id: str
    address: str
    metrics_address: str
    drafter: str
    vocabulary_model: str = ""
    vocabulary_size: int = 0
    vocabulary_digest: str = ""
    round_ms: float = 0.0


class Drafts:
    """The draft actors of one cluster, and who is bound to them.

    Every method raises StoreUnavailableError when Redis does not answer.

    Args:
        client: from `store.client.connect`.
        cluster: the cluster's name.
        settings: `worker_ttl_s` decides how long silence is tolerated.
        clock: milliseconds since 1970, instead of Redis' own clock.
    """

    def __init__(
        self, client: Redis, cluster: str, settings: RouterConfig, clock: Callable[[], int] | None = None
    ) -> None:
        self._client = client
        self._keys = Keys(cluster)
        self._scripts = Scripts(client, self._keys.base)
        self._clock = StoreClock(client, clock)
        self._ttl_ms = int(settings.worker_ttl_s * 1000)

    async def beat(self, pool: str, info: DraftInfo) -> None:
        """A draft actor lives."""
        now = await self._clock.now_ms()
        with store_errors(f"sending the heartbeat of draft actor {info.draft_id}"):
            await self._client.hset(self._keys.drafts(pool), info.draft_id, f"{now} {json.dumps(asdict(info))}")

    async def leave(self, pool: str, draft_id: str) -> None:
        """A draft actor is gone; its engines are bound to others when they next ask."""
        with store_errors(f"removing draft actor {draft_id}"):
            await self._client.hdel(self._keys.drafts(pool), draft_id)

    async def of(self, pool: str) -> list[DraftInfo]:
        """Those of a pool that have not left, the silent ones included until somebody binds."""
        with store_errors(f"reading the draft actors of pool {pool}"):
            entries: Any = await self._client.hvals(self._keys.drafts(pool))
        found = []
        for entry in entries:
            with contextlib.suppress(ValueError):  # whatever it is, no draft actor wrote it
                found.append(_info(entry.partition(" ")[2]))
        return found

    async def bind(self, pool: str, worker_id: str, round_trips: Mapping[str, int] | None = None) -> DraftInfo | None:
        """The draft actor that an engine shall ask until it calls again, a heartbeat later; None when none lives.

        It stays the same, unless it is gone or another one would answer a good deal sooner.

        Args:
            pool: of draft actors.
            worker_id: the engine.
            round_trips: milliseconds from the engine to a draft actor and back, by its id; 0 where there is none.
        """
        now = await self._clock.now_ms()
        trips: list[str | int] = [each for trip in (round_trips or {}).items() for each in trip]
        with store_errors(f"binding worker {worker_id} to a draft actor"):
            facts: Any = await self._scripts.run("bind", pool, worker_id, now, self._ttl_ms, *trips)
        return _info(facts) if facts is not None else None

    async def unbind(self, pool: str, worker_id: str) -> None:
        """An engine is gone."""
        with store_errors(f"unbinding worker {worker_id}"):
            await self._client.hdel(self._keys.bound(pool), worker_id)


def _info(facts: str) -> DraftInfo:
    """Of what an actor said of itself, which may be of another release; ValueError for anything else."""
    told = json.loads(facts)
    if not isinstance(told, dict):
        raise ValueError("no draft actor wrote this")
    known = {each.name for each in fields(DraftInfo)}
    try:
        return DraftInfo(**{name: value for name, value in told.items() if name in known})
    except TypeError as error:
        raise ValueError("no draft actor wrote this") from error
