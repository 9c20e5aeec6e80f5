"""A demand and its place in the queue, in the words of `route.lua`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from joinwise.cluster.config_model import RouterConfig, TenantConfig
from joinwise.cluster.router.decision import Demand

#: Workers of `Demand.held` that are looked at, those with the longest prefixes.
MAX_HOLDERS = 4
ANYONE = "*"


def rules(settings: RouterConfig) -> str:
    """What holds for every request, as JSON."""
    return _json(
        {
            "auto": settings.split == "auto",
            "limit": settings.max_pending_tokens,
            "max_queue": settings.max_queue,
            "spill_ms": settings.spill_ms,
            "gap_weight": settings.gap_weight,
            "handoff_ms": settings.handoff_ms,
            "handoff_us": settings.handoff_us_per_token,
            "slack_ms": settings.session_slack_ms,
            "session_ms": int(settings.session_ttl_s * 1000),
            "kept": settings.decisions_kept,
        }
    )


@dataclass(frozen=True)
class Ask:
    """One request's ask, which stays what it is while it waits.

    Attributes:
        lease_id: of the lease that it will get.
        entry: its name in the queue, `<gateway>/<deadline ms>/<lease id>`.
        score: its place there: milliseconds, moved by its priority.
        patient: it may wait.
    """

    demand: Demand
    settings: RouterConfig
    lease_id: str
    entry: str
    score: int
    patient: bool

    @cached_property
    def queue_class(self) -> str:
        """Requests of one class are served in one order: those of a model that need the same."""
        return ",".join(sorted(self.demand.needs))

    @property
    def tenant(self) -> tuple[str, TenantConfig]:
        """The name that its limits go by, and the limits. Those without limits of their own share one name."""
        tenants, name = self.settings.tenants, self.demand.terms.tenant
        if name not in tenants:
            name = ANYONE
        return name, tenants.get(name) or TenantConfig()

    def text(self, *, queued: bool) -> str:
        """As JSON. `queued`: it waits already."""
        demand, terms = self.demand, self.demand.terms
        name, limits = self.tenant
        free = demand.urgent
        longest = sorted(demand.held.items(), key=lambda item: -item[1].tokens)[:MAX_HOLDERS]
        ask: dict[str, Any] = {
            "needs": sorted(demand.needs),
            "excluded": dict.fromkeys(demand.exclude, True),
            "spared": len(demand.exclude),
            "held": {worker: (str(held.epoch), held.tokens) for worker, held in longest},
            "class": self.queue_class,
            "whole": demand.whole,
            "urgent": free,
            "slo_ttft": 0 if free else terms.slo_ttft_ms,
            "slo_tpot": 0 if free else terms.slo_tpot_ms,
            "tenant": {
                "name": name,
                "rpm": 0 if free else limits.requests_per_min or 0,
                "tpm": 0 if free else limits.tokens_per_min or 0,
                "concurrent": 0 if free else limits.concurrent or 0,
                "weight": limits.weight,
            },
            "entry": self.entry,
            "patient": self.patient and not free,
            "queued": queued,
            "score": self.score,
        }
        if terms.session:
            ask["session"] = terms.session
        return _json(ask)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
