"""Percentiles, slowdowns and verdicts of a simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from joinwise.cluster.simulate.job import Job
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.profile import Profile
from joinwise.cluster.simulate.simulator import Outcome

PERCENTILES = (50, 90, 99)
#: Most slowdown over an uncontended machine of the reference kind (Splitwise, table V).
SLOS: Mapping[str, tuple[float, float, float]] = {
    "ttft": (2.0, 3.0, 6.0),
    "tbt": (1.25, 1.5, 5.0),
    "e2e": (1.25, 1.5, 5.0),
}

_UNITS = {"ttft": (1, "_s"), "tbt": (1000, "_ms"), "e2e": (1, "_s"), "handoff": (1, "_s")}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in order, linear between two of them, as numpy has it; NaN of none."""
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def tbt(job: Job, over_all: bool) -> float | None:
    """Mean seconds between two tokens of an answer; None for an answer of one."""
    tokens = job.arrival.output
    return None if tokens == 1 else (job.end - job.first) / (tokens if over_all else tokens - 1)


def figures(outcome: Outcome, profile: Profile, over_all: bool = False) -> dict[str, float]:
    """The flat figures of a run: latencies, slowdowns, verdict, what was refused, throughput."""
    done = [job for job in outcome.jobs if job.end >= 0]
    gaps = [(job, gap) for job in done if (gap := tbt(job, over_all)) is not None]
    alone = profile.kind(profile.reference)
    values: dict[str, list[float]] = {
        "ttft": [job.ttft for job in done],
        "tbt": [gap for _, gap in gaps],
        "e2e": [job.e2e for job in done],
        "handoff": [job.landed - job.first for job in done if job.landed >= 0],
        "ttft_slowdown": [job.ttft / alone.prefill(job.arrival.prompt) for job in done],
        "tbt_slowdown": [gap / alone.tokens(job.arrival.prompt) for job, gap in gaps],
        "e2e_slowdown": [
            job.e2e / (alone.prefill(each.prompt) + alone.tokens(each.prompt) * (each.output - 1))
            for job, each in ((job, job.arrival) for job in done)
        ],
    }
    result: dict[str, float] = {}
    for name, measured in values.items():
        measured.sort()
        scale, unit = _UNITS.get(name, (1, ""))
        for percent in PERCENTILES if measured or name != "handoff" else ():
            result[f"{name}_p{percent}{unit}"] = percentile(measured, percent) * scale
    refused = outcome.refused + outcome.failed
    result["slo_all_nine"] = float(refused == 0 and not missed(result))
    tokens = sum(job.arrival.output for job in done)
    result |= {
        "requests": float(len(outcome.jobs)),
        "refused": float(refused),
        "moved": float(outcome.moved),
        "again_tokens": float(outcome.again_tokens),
        "preempted": float(sum(job.preempted for job in done)),
        "tokens_per_s": tokens / outcome.seconds if outcome.seconds else 0.0,
        "utilization": _mean(busy / outcome.seconds for busy in outcome.busy_s.values()) if outcome.seconds else 0.0,
        "kv_gb_sent": outcome.sent_bytes / 1e9,
        "extrapolated_steps": float(sum(outcome.beyond.values())),
        **outcome.prefix,
    }
    return result


def missed(found: Mapping[str, float], slos: Mapping[str, tuple[float, float, float]] = SLOS) -> dict[str, float]:
    """The limits that are not kept: name of the figure -> by which factor it is too high."""
    over = {}
    for name, limits in slos.items():
        for percent, limit in zip(PERCENTILES, limits, strict=True):
            slowdown = found[f"{name}_slowdown_p{percent}"]
            if not slowdown <= limit:
                over[f"{name}_slowdown_p{percent}"] = slowdown / limit
    return over


def rows(outcome: Outcome, pools: Sequence[PoolSpec]) -> list[dict[str, Any]]:
    """A row a pool: how busy it was."""
    found = []
    for pool in pools:
        busy = [s for name, s in outcome.busy_s.items() if name.rpartition("-")[0] == f"{pool.home}-{pool.kind}"]
        share = _mean(s / outcome.seconds for s in busy) if outcome.seconds else 0.0
        found.append({"pool": str(pool), "utilization": share})
    return found


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
