"""Why a request is not admitted, and when to try again."""

from __future__ import annotations

import math
from typing import Any

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import (
    InternalError,
    JoinwiseError,
    NoWorkerError,
    ObjectiveError,
    OverloadedError,
    RateLimitedError,
)
from joinwise.cluster.router.decision import Demand

_MAX_RETRY_AFTER_S = 60.0
_LIMITS = {
    "requests": "requests a minute",
    "tokens": "tokens a minute",
    "concurrent": "requests at once",
}


def refusal(demand: Demand, verdict: str, details: list[Any], settings: RouterConfig) -> JoinwiseError:
    """The error for a demand that `route.lua` did not serve, with `details` as the script gave them."""
    request_id = demand.request_id
    if verdict == "full":
        worker, pending, phase, wait_ms, waiting = details
        wait = retry_after_s(wait_ms)
        queued = f", and {waiting} requests wait" if waiting else ""
        return OverloadedError(
            f"every {phase} worker of {demand.model!r} is full: the least loaded, {worker}, has {pending} tokens "
            f"pending{queued}; try again in {wait:g} s",
            request_id=request_id,
            retry_after_s=wait,
        )
    if verdict == "limited":
        what, wait_ms = details
        wait = retry_after_s(wait_ms)
        who = f"the tenant {demand.terms.tenant!r}" if demand.terms.tenant else "this caller"
        return RateLimitedError(
            f"{who} has used up its {_LIMITS[what]}; try again in {wait:g} s", request_id=request_id, retry_after_s=wait
        )
    if verdict == "slo":
        first, gap, queue_ms = details
        terms = demand.terms
        wait = retry_after_s(queue_ms)
        return ObjectiveError(
            f"the objectives cannot be kept: a first token after {first} ms (asked: {_asked(terms.slo_ttft_ms)}) and "
            f"one every {gap} ms (asked: {_asked(terms.slo_tpot_ms)}) is the best there is now",
            request_id=request_id,
            retry_after_s=wait,
        )
    if verdict == "none":
        needs = f" with {', '.join(sorted(demand.needs))}" if demand.needs else ""
        spared = f" besides {', '.join(sorted(demand.exclude))}" if demand.exclude else ""
        return NoWorkerError(
            f"no live worker serves {demand.model!r}{needs}{spared}; see `joinwise status`",
            request_id=request_id,
            retry_after_s=settings.worker_ttl_s,
        )
    return InternalError(f"the route script answered {verdict!r}", request_id=request_id)


def retry_after_s(wait_ms: int | str) -> float:
    """Whole seconds, 1 to 60, for an estimate in milliseconds."""
    return float(min(_MAX_RETRY_AFTER_S, max(1, math.ceil(int(wait_ms) / 1000))))


def _asked(objective_ms: float) -> str:
    return f"{objective_ms:g} ms" if objective_ms else "any"
