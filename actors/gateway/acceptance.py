"""How often drafts are accepted: vLLM's own counters, from the `/metrics` of each worker that speculates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from joinwise.cluster.router.registry import WorkerInfo

_DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
_STEPS = "vllm:spec_decode_num_drafts_total"


@dataclass(frozen=True)
class Acceptance:
    """One worker's, since it started.

    Attributes:
        drafted: tokens that it has verified.
        accepted: those of them that were right.
        steps: times that a sequence had drafts to verify.
    """

    worker_id: str
    drafted: int
    accepted: int
    steps: int


async def acceptance(workers: Sequence[WorkerInfo], ask: Callable[[WorkerInfo], str | None]) -> tuple[Acceptance, ...]:
    """Of those workers that speculate; one that is silent is left out.

    Args:
        workers: the live ones.
        ask: gives a worker's metrics; called on a thread.
    """
    speculating = [worker for worker in workers if "replay" not in worker.capabilities]  # vLLM allows only one of them
    found = await asyncio.gather(*(asyncio.to_thread(_of, worker, ask) for worker in speculating))
    return tuple(filter(None, found))


def _of(worker: WorkerInfo, ask: Callable[[WorkerInfo], str | None]) -> Acceptance | None:
    lines = [line for line in (ask(worker) or "").splitlines() if line.startswith((_DRAFTED, _ACCEPTED, _STEPS))]
    counts = {_DRAFTED: 0, _ACCEPTED: 0, _STEPS: 0}
    try:
        for family in text_string_to_metric_families("\n".join([*lines, ""])):
            for sample in family.samples:
                counts[sample.name] += int(sample.value)
    except (ValueError, KeyError, IndexError, OverflowError):
        return None
    return Acceptance(worker.worker_id, *counts.values()) if lines else None
