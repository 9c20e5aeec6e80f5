"""How many gateways there should be: Ray Serve asks this policy, and applies the deployment's bounds and delays to it.

Serve's own count of requests stays at zero here, since none passes through Serve; each gateway reports its running
requests instead (`GatewayReplica.record_autoscaling_stats`), which is what `joinwise:requests_running` shows too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

#: Name under which gateways report.
RUNNING = "running_requests"


class Settings(Protocol):
    """The part of Serve's AutoscalingConfig that is used."""

    target_ongoing_requests: float


class Context(Protocol):
    """The part of Serve's AutoscalingContext that is used."""

    current_num_replicas: int
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None
    policy_state: dict[str, Any]
    config: Settings


def gateways(context: Context) -> tuple[float, dict[str, Any]]:
    """Gateways wanted: enough that each runs `target_ongoing_requests` requests.

    Returns:
        The number, before Serve's smoothing, delays and bounds, and the policy's state, which it leaves alone.
    """
    reports = (context.aggregated_metrics or {}).get(RUNNING)
    if not reports:  # nobody has reported yet: no reason to change anything
        return context.current_num_replicas, context.policy_state
    # A gateway that has not reported is taken for an average one.
    running = sum(reports.values()) * max(1.0, context.current_num_replicas / len(reports))
    return running / context.config.target_ongoing_requests, context.policy_state
