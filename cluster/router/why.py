"""Why a request went where it did: the decisions that the router keeps for a while."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis

from joinwise.cluster.store.client import Scripts, store_errors
from joinwise.cluster.store.keys import Keys

_BATCH = 500
_PRELUDES = ("common", "pick", "explain")


@dataclass(frozen=True)
class Candidate:
    """A worker that was looked at, with its estimates in milliseconds (`scripts/pick.lua` says of what)."""

    worker_id: str
    role: str
    wait_ms: float
    prefill_ms: float
    harm_ms: float
    queue_ms: float
    stall_ms: float
    move_ms: float
    uncached_tokens: int
    pending_tokens: int


@dataclass(frozen=True)
class Decision:
    """One decision.

    Attributes:
        at_ms: milliseconds since 1970.
        verdict: the reason of an assignment, or why there was none: full, limited, slo, none.
        chosen: the workers taken, prefill before decode; or what was short.
        cost_ms: of the plan that was taken; of a refusal the wait.
        candidates: who was looked at.
    """

    request_id: str
    at_ms: int
    verdict: str
    chosen: tuple[str, ...]
    cost_ms: float
    candidates: tuple[Candidate, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


async def decisions_on(client: Redis, cluster: str, request_id: str) -> list[Decision]:
    """The kept decisions on a request, oldest first. vLLM puts a prefix before a client's id: an id's end is enough.

    Raises:
        StoreUnavailableError: Redis does not answer.
    """
    found: list[Decision] = []
    scripts, start = Scripts(client, Keys(cluster).base), "+"
    with store_errors("reading decisions"):
        while True:
            last, *entries = await scripts.run("why", request_id, start, _BATCH, preludes=_PRELUDES)
            found += [_decision(*entry) for entry in entries]
            if not last:
                return found[::-1]
            start = f"({last}"


async def latest_decisions(client: Redis, cluster: str, most: int) -> list[Decision]:
    """The last decisions of the cluster, on whatever request, oldest first.

    Raises:
        StoreUnavailableError: Redis does not answer.
    """
    with store_errors("reading decisions"):
        _, *entries = await Scripts(client, Keys(cluster).base).run("why", "", "+", most, preludes=_PRELUDES)
    return [_decision(*entry) for entry in reversed(entries)]


def _decision(request_id: str, at: str, verdict: str, chosen: str, ms: str, candidates: str) -> Decision:
    return Decision(
        request_id=request_id,
        at_ms=int(at),
        verdict=verdict,
        chosen=tuple(chosen.split()),
        cost_ms=float(ms),
        candidates=tuple(_candidate(line) for line in candidates.splitlines()),
    )


def _candidate(line: str) -> Candidate:
    worker_id, role, *rest = line.rsplit(" ", 9)
    wait, prefill, harm, queue, stall, move = map(float, rest[:6])
    return Candidate(worker_id, role, wait, prefill, harm, queue, stall, move, int(rest[6]), int(rest[7]))
