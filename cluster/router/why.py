"""Why a request went where it did: the decisions that the router keeps for a while."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis

from joinwise.cluster.store.client import store_errors
from joinwise.cluster.store.keys import Keys

_BATCH = 500


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
    key, last = Keys(cluster).decisions, "+"
    with store_errors("reading decisions"):
        while True:
            entries: Any = await client.xrevrange(key, max=last, count=_BATCH)
            for _, entry in entries:
                if entry["request"] == request_id or entry["request"].endswith(f"-{request_id}"):
                    found.append(_decision(entry))
            if len(entries) < _BATCH:
                return found[::-1]
            last = f"({entries[-1][0]}"


def _decision(entry: dict[str, str]) -> Decision:
    return Decision(
        request_id=entry["request"],
        at_ms=int(entry["at"]),
        verdict=entry["verdict"],
        chosen=tuple(entry["chosen"].split()),
        cost_ms=float(entry["ms"]),
        candidates=tuple(_candidate(line) for line in entry["candidates"].splitlines()),
    )


def _candidate(line: str) -> Candidate:
    worker_id, role, *rest = line.rsplit(" ", 9)
    wait, prefill, harm, queue, stall, move = (int(value) / 1000 for value in rest[:6])
    return Candidate(worker_id, role, wait, prefill, harm, queue, stall, move, int(rest[6]), int(rest[7]))
