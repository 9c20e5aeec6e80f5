"""`joinwise doctor --running`: what is wrong with a cluster that runs, and what to do about it.

`look` reads Redis and, where one answers, a gateway; `examine` is pure and says what follows from what was seen. Counts
of links are those since two workers first met: what has failed once may be well now.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from joinwise.cluster.cli.doctor import Finding
from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import JoinwiseError
from joinwise.cluster.router.pulse import Pulse, take_pulse
from joinwise.cluster.router.registry import Registry, WorkerState
from joinwise.cluster.router.router import Router
from joinwise.cluster.store.client import connect, store_errors
from joinwise.cluster.store.keys import Keys

if TYPE_CHECKING:
    from joinwise.cluster.client import ClusterStatus

_SILENT_MS = 3_000
_OVERDUE_MS = 5_000  # gateways look every second
_SKEW_MS = 1_000
_FULL = 0.02


@dataclass(frozen=True)
class Seen:
    """A look at a running cluster.

    Attributes:
        overdue: leases that ended more than five seconds ago and were not taken back.
        leftovers: what is pending although no request runs, a line each.
        skew_ms: this machine's clock less Redis'.
        eviction: Redis' policy when its memory is full.
        troubles: slots that do not stay filled, a sentence each.
        status: what a gateway says; None where none answered.
        no_gateway: why not.
    """

    pulse: Pulse
    overdue: int
    leftovers: Sequence[str]
    skew_ms: float
    eviction: str
    troubles: Sequence[str]
    status: ClusterStatus | None
    no_gateway: str = ""


async def look(url: str, cluster: str, ask: Callable[[], ClusterStatus]) -> Seen:
    """Look at a cluster once.

    Args:
        url: of its Redis.
        cluster: its name.
        ask: asks a gateway; raises JoinwiseError where none answers.

    Raises:
        StoreUnavailableError: Redis does not answer.
    """
    client = connect(url)
    try:
        pulse = await take_pulse(client, cluster)
        with store_errors("looking at Redis"):
            before = time.time()
            seconds, micros = await client.time()
            skew_ms = ((before + time.time()) / 2 - seconds - micros / 1e6) * 1000
            overdue = await client.zcount(Keys(cluster).leases, "-inf", pulse.now_ms - _OVERDUE_MS)
            eviction = str((await client.info("memory")).get("maxmemory_policy", ""))
        idle = not pulse.leases
        leftovers = await Router(client, cluster, RouterConfig()).leftovers() if idle else []
        troubles = await Registry(client, cluster, RouterConfig()).troubles()
    finally:
        await client.aclose()
    try:
        status, why = ask(), ""
    except JoinwiseError as error:
        status, why = None, str(error)
    return Seen(pulse, int(overdue), leftovers, skew_ms, eviction, troubles, status, why)


def examine(seen: Seen) -> list[Finding]:
    """What is to be said of a cluster: an `ok` line for each matter, or a line for each thing that is wrong with it."""
    checks: dict[str, Callable[[Seen], Iterator[Finding]]] = {
        "gateway": _gateway,
        "redis": _redis,
        "clock": _clock,
        "workers": _workers,
        "versions": _versions,
        "configuration": _configuration,
        "leases": _leases,
        "queue": _queue,
        "kv caches": _caches,
        "kv links": _links,
    }
    found = []
    for name, check in checks.items():
        found += list(check(seen)) or [Finding(name, "ok", _well(name, seen))]
    return found


def _well(name: str, seen: Seen) -> str:
    pulse = seen.pulse
    links = len(seen.status.kv_links) if seen.status is not None else 0
    return {
        "gateway": "answers",
        "redis": f"answers; {seen.eviction or 'no eviction policy'}",
        "clock": f"{seen.skew_ms:+.0f} ms against Redis",
        "workers": ", ".join([f"{len(pulse.workers)} live", *(f"{each.name} at zero" for each in pulse.asleep)]),
        "leases": f"{pulse.leases}",
        "queue": f"{pulse.waiting} waiting",
        "kv links": f"{links}",
    }.get(name, "alike" if name in ("versions", "configuration") else "room")


def _gateway(seen: Seen) -> Iterator[Finding]:
    if seen.status is None:
        fix = "name one with --target, --token and --ca; without it links between workers are not looked at"
        yield Finding("gateway", "warning", seen.no_gateway, fix)


def _redis(seen: Seen) -> Iterator[Finding]:
    if seen.eviction not in ("", "noeviction"):
        detail = f"with {seen.eviction} it may drop leases and workers when its memory is full"
        yield Finding("redis", "warning", detail, "redis-cli CONFIG SET maxmemory-policy noeviction")


def _clock(seen: Seen) -> Iterator[Finding]:
    if abs(seen.skew_ms) > _SKEW_MS:
        detail = f"this machine's is {seen.skew_ms / 1000:+.1f} s off Redis': ledgers and logs will not fit together"
        yield Finding("clock", "warning", detail, "let NTP set it: timedatectl set-ntp true")
    for each in seen.pulse.workers:
        if (ahead := each.info.started_ms - seen.pulse.now_ms) > _SKEW_MS:
            detail = f"worker {each.info.worker_id} started {ahead / 1000:.1f} s from now: its machine's clock is ahead"
            yield Finding("clock", "warning", detail, "let NTP set it there")


def _workers(seen: Seen) -> Iterator[Finding]:
    for trouble in seen.troubles:
        yield Finding("workers", "missing", trouble, "the worker's log says why; `joinwise apply` takes it back")
    for model, workers in _by(seen.pulse.workers, lambda each: each.info.model).items():
        roles = {each.info.role for each in workers}
        whole = roles | {each.role for each in seen.pulse.asleep if each.model == model}
        if "mixed" not in whole and not whole >= {"prefill", "decode"}:
            lacking = " and ".join(sorted({"prefill", "decode"} - whole))
            detail = f"no worker of {model} does {lacking}: " + (
                "requests run whole where they can" if roles - {"draining"} else "its requests get 503"
            )
            yield Finding("workers", "missing", detail, "joinwise status; then the launcher's log")
    if not seen.pulse.workers and not seen.pulse.asleep:
        yield Finding("workers", "missing", "none is registered: all requests get 503", "the launcher's log says why")
    for each in seen.pulse.workers:
        if (silent := seen.pulse.now_ms - each.beat_ms) > _SILENT_MS:
            detail = f"{each.info.worker_id} has said nothing for {silent / 1000:.1f} s"
            yield Finding(
                "workers", "warning", detail, f"is {each.info.engine_address} reachable, and not starved of CPU?"
            )


def _versions(seen: Seen) -> Iterator[Finding]:
    for what, of in (
        ("vLLM", lambda each: each.info.vllm_version),
        ("protocol", lambda each: str(each.info.protocol_version)),
    ):
        if len(found := _by(seen.pulse.workers, of)) > 1:
            detail = f"{what} " + "; ".join(f"{version}: {_names(some)}" for version, some in sorted(found.items()))
            yield Finding("versions", "warning", detail, "fine while a release is rolled out, not for longer")


def _configuration(seen: Seen) -> Iterator[Finding]:
    for pool, workers in _by(seen.pulse.workers, lambda each: each.info.pool).items():
        if len(found := _by(workers, lambda each: each.info.fingerprint)) > 1:
            detail = f"pool {pool} has workers of {len(found)} configurations: " + " | ".join(
                map(_names, found.values())
            )
            yield Finding("configuration", "warning", detail, "fine while `joinwise apply` is at work, not for longer")


def _leases(seen: Seen) -> Iterator[Finding]:
    if seen.overdue:
        detail = f"{seen.overdue} have ended, and hold room all the same: gateways take them back, and none does"
        yield Finding("leases", "missing", detail, "start a gateway; see /livez of those that run")
    for line in seen.leftovers if not seen.overdue else ():
        yield Finding(
            "leases", "warning", f"no request runs, but there is {line}", "look again; then restart that worker"
        )


def _queue(seen: Seen) -> Iterator[Finding]:
    if seen.pulse.waiting and not seen.pulse.assigned_per_s and seen.pulse.asleep:
        detail = f"{seen.pulse.waiting} wait for a worker of {', '.join(each.name for each in seen.pulse.asleep)}"
        yield Finding("queue", "warning", detail, "an engine takes a while to start: the launcher's log has the steps")
    elif seen.pulse.waiting and not seen.pulse.assigned_per_s:
        detail = f"{seen.pulse.waiting} wait, and none was given a worker for {seen.pulse.span_s:.0f} s"
        yield Finding(
            "queue", "missing", detail, "joinwise explain, joinwise top; more workers, or router.max_pending_tokens"
        )


def _caches(seen: Seen) -> Iterator[Finding]:
    for each in seen.pulse.workers:
        total, free = each.load.kv_blocks_total, each.load.kv_blocks_free
        if total and free / total < _FULL and each.load.waiting:
            detail = f"{each.info.worker_id}: {free} of {total} blocks free, {each.load.waiting} requests wait in it"
            yield Finding("kv caches", "warning", detail, "engine.kv_cache_memory_bytes, or another worker in its pool")


def _links(seen: Seen) -> Iterator[Finding]:
    for each in seen.status.kv_links if seen.status is not None else ():
        name = f"{each.sender} to {each.receiver} by {each.transport}"
        if refused := {reason: count for reason, count in each.refused.items() if count}:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
            detail = f"{name}: frames were refused ({listed}); those requests were computed again"
            yield Finding(
                "kv links", "warning", detail, "damaged frames mean a bad NIC, cable or memory between the two"
            )
        elif each.failed:
            detail = f"{name}: {each.failed} of {each.streams} transfers did not end, {each.retries} retries"
            yield Finding(
                "kv links",
                "warning",
                detail,
                "packet loss, a full landing buffer (kv.landing_bytes), or a peer that died",
            )


def _by(workers: Sequence[WorkerState], key: Callable[[WorkerState], str]) -> dict[str, list[WorkerState]]:
    found: defaultdict[str, list[WorkerState]] = defaultdict(list)
    for each in workers:
        found[key(each)].append(each)
    return dict(found)


def _names(workers: Sequence[WorkerState]) -> str:
    return ", ".join(each.info.worker_id for each in workers)
