"""A demand and its place in the queue, in the words of `route.lua`."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from joinwise.cluster.config_model import RouterConfig, TenantConfig
from joinwise.cluster.router.decision import Demand

#: Workers of `Demand.held` that are looked at, those with the longest prefixes.
MAX_HOLDERS = 4
ANYONE = "*"
_NO_LIMITS = TenantConfig()


def rules(settings: RouterConfig) -> bytes:
    """What holds for every request, packed in the order in which `route.lua` reads it."""
    return struct.pack(
        ">11d",
        settings.split == "auto",
        settings.moves,
        settings.max_pending_tokens,
        settings.max_queue,
        settings.spill_ms,
        settings.gap_weight,
        settings.handoff_ms,
        settings.handoff_us_per_token,
        settings.session_slack_ms,
        settings.session_ttl_s * 1000,
        settings.decisions_kept,
    )


@dataclass(frozen=True)
class Ask:
    """One request's ask, which stays what it is while it waits.

    Attributes:
        lease_id: of the lease that it will get.
        entry: its name in the queue, `<gateway>/<deadline ms>/<lease id>`.
        score: its place there: milliseconds, moved by its priority.
        patient: it may wait for room.
        wakes: it may wait for a worker where none is.
    """

    demand: Demand
    settings: RouterConfig
    lease_id: str
    entry: str
    score: int
    patient: bool
    wakes: bool = False

    @cached_property
    def queue_class(self) -> str:
        """Requests of one class are served in one order: those of a model that need the same."""
        return ",".join(sorted(self.demand.needs))

    @property
    def queue_name(self) -> str:
        """The class, as keys have it; `demand_of` reads it."""
        return f"{self.demand.model}:{self.queue_class}"

    @property
    def tenant(self) -> tuple[str, TenantConfig]:
        """The name that its limits go by, and the limits. Those without limits of their own share one name."""
        tenants, name = self.settings.tenants, self.demand.terms.tenant
        if name not in tenants:
            name = ANYONE
        return name, tenants.get(name, _NO_LIMITS)

    def text(self, *, queued: bool) -> str:
        """As JSON, without what is as usual; empty when all is. `queued`: it waits already."""
        demand, terms = self.demand, self.demand.terms
        ask: dict[str, Any] = {}
        if demand.needs:
            ask["needs"], ask["class"] = sorted(demand.needs), self.queue_class
        if demand.exclude:
            ask["excluded"], ask["spared"] = dict.fromkeys(demand.exclude, True), len(demand.exclude)
        if demand.held:
            longest = sorted(demand.held.items(), key=lambda item: -item[1].tokens)[:MAX_HOLDERS]
            ask["held"] = {worker: (str(held.epoch), held.tokens) for worker, held in longest}
        if demand.whole:
            ask["whole"] = True
        if terms.session:
            ask["session"] = terms.session
        if demand.urgent:
            return _json({**ask, "urgent": True})
        name, limits = self.tenant
        if limits != _NO_LIMITS:
            ask["tenant"] = {
                "name": name,
                "rpm": limits.requests_per_min or 0,
                "tpm": limits.tokens_per_min or 0,
                "concurrent": limits.concurrent or 0,
                "weight": limits.weight,
            }
        if terms.slo_ttft_ms or terms.slo_tpot_ms:
            ask["slo_ttft"], ask["slo_tpot"] = terms.slo_ttft_ms, terms.slo_tpot_ms
        if self.patient or self.wakes:
            ask |= {"patient": self.patient, "wakes": self.wakes, "queued": queued, "score": self.score}
        return _json(ask) if ask else ""


def demand_of(queue_name: str, models: Iterable[str]) -> tuple[str, frozenset[str]]:
    """Model and needs of a class of requests; the model is "" where it is none of these."""
    model = max((each for each in models if queue_name.startswith(f"{each}:")), key=len, default="")
    return model, frozenset(filter(None, queue_name[len(model) + 1 :].split(",")))


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
