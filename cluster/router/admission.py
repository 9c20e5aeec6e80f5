"""Why a request is not admitted, and when to try again."""

from __future__ import annotations

import math
from typing import Any

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import InternalError, JoinwiseError, NoWorkerError, OverloadedError
from joinwise.cluster.router.decision import Demand
from joinwise.cluster.router.registry import parse_load

_MAX_RETRY_AFTER_S = 60.0


def refusal(demand: Demand, verdict: str, details: list[Any], settings: RouterConfig) -> JoinwiseError:
    """The error for a demand that `route.lua` did not serve, with `details` as the script gave them."""
    if verdict == "full":
        worker, pending, needed, phase, load = details
        wait = retry_after_s(int(pending) + int(needed) - settings.max_pending_tokens, str(phase), str(load))
        return OverloadedError(
            f"every {phase} worker of {demand.model!r} is full: the least loaded, {worker}, has {pending} tokens "
            f"pending; try again in {wait:g} s",
            request_id=demand.request_id,
            retry_after_s=wait,
        )
    if verdict == "none":
        needs = f" with {', '.join(sorted(demand.needs))}" if demand.needs else ""
        spared = f" besides {', '.join(sorted(demand.exclude))}" if demand.exclude else ""
        return NoWorkerError(
            f"no live worker serves {demand.model!r}{needs}{spared}; see `joinwise status`",
            request_id=demand.request_id,
            retry_after_s=settings.worker_ttl_s,
        )
    return InternalError(f"the route script answered {verdict!r}", request_id=demand.request_id)


def retry_after_s(excess_tokens: int, phase: str, load: str) -> float:
    """Whole seconds, 1 to 60, until a worker has worked off `excess_tokens` at the speed that it has measured."""
    measured = parse_load(load)
    if phase == "prefill":
        speed = measured.prefill_tokens_per_s
    else:
        speed = max(1, measured.running) * 1000 / measured.decode_step_ms if measured.decode_step_ms > 0 else 0.0
    seconds = excess_tokens / speed if speed > 0 else 1.0
    return float(min(_MAX_RETRY_AFTER_S, max(1, math.ceil(seconds))))
