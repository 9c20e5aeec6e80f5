"""Breaks one thing of a cluster, in the phase that is meant, and proves that it has.

Each fault waits for its moment, strikes, and looks at the process, the counter or the server that shows it: a fault
that did not fire would let a cluster pass that was never tried.
"""

import asyncio
import re
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from joinwise.actors.bench.link import shaped
from joinwise.actors.chaos.load import Load
from joinwise.actors.chaos.partition import cut, dropped
from joinwise.actors.chaos.schedule import Fault, Kind
from joinwise.actors.chaos.site import Site
from joinwise.cluster.errors import ConfigError, JoinwiseError
from joinwise.cluster.router.registry import WorkerInfo

_MOMENT_S = 60.0  # until the phase has come
_DIES_S = 5.0
_FINISH_S = 40.0  # Ray gives up a control store that is gone after 60 s
_APPLY_S = 240.0
_CHANGED = "prefill"  # the pool that `apply` changes
_LOOK_S = 0.005
_BURST = 12
_SLOW = "40mbit"
_PORT = re.compile(r":(\d+)")


class NotFiredError(JoinwiseError):
    """A fault that did not happen, or not in its phase."""


@dataclass(frozen=True)
class Fired:
    """A fault that has happened.

    Attributes:
        evidence: what proves it.
        gone: the worker that must be replaced; "" for none.
        pid: the process that must be gone in the end; 0 for none.
        mend: what those do now who run the machines, if they must: start a launcher again, bring another node.
        cut_short: streams that were midway, should have come to their end, and have not.
    """

    evidence: dict[str, Any]
    gone: str = ""
    pid: int = 0
    mend: Callable[[], object] | None = None
    cut_short: int = 0


async def strike(fault: Fault, site: Site, load: Load) -> Fired:
    """Break what a fault says once its phase has come.

    Raises:
        NotFiredError: the phase did not come within a minute, or nothing broke.
    """
    try:
        async with asyncio.timeout(_MOMENT_S):
            await load.wait_midway()
    except TimeoutError:
        raise NotFiredError(f"{fault.kind}: no stream was midway") from None
    return await _FAULTS[fault.kind](fault, site, load)


async def _victim(fault: Fault, site: Site, role: str) -> tuple[WorkerInfo, int]:
    """A worker of a role with requests in its engine, and how many."""
    try:
        async with asyncio.timeout(_MOMENT_S):
            while True:
                busy = await site.busy(role)
                worker = busy[int(fault.victim * len(busy))]
                if held := (await site.idle(worker)).scheduler_requests:
                    return worker, held
    except TimeoutError:
        raise NotFiredError(f"{fault.kind}: no {role} worker was busy") from None


async def _kill_worker(fault: Fault, site: Site, load: Load) -> Fired:
    worker, held = await _victim(fault, site, fault.kind.partition("-")[2])
    process = site.process_at(worker.engine_address)
    midway = load.midway
    await _end(process)
    return Fired({"requests_in_engine": held, "streams_midway": midway}, worker.worker_id, process.pid)


async def _freeze_worker(fault: Fault, site: Site, load: Load) -> Fired:
    worker, held = await _victim(fault, site, fault.kind.partition("-")[2])
    process = site.process_at(worker.engine_address)
    process.send_signal(signal.SIGSTOP)
    if not await asyncio.to_thread(_has_stopped, process):
        raise NotFiredError(f"{fault.kind}: process {process.pid} runs on after SIGSTOP")
    return Fired({"requests_in_engine": held, "process": process.status()}, worker.worker_id, process.pid)


async def _drain_worker(fault: Fault, site: Site, load: Load) -> Fired:
    """As before a pod ends: it drains, says so, and then its process ends."""
    worker, held = await _victim(fault, site, fault.kind.partition("-")[2])
    process = site.process_at(worker.engine_address)
    async with httpx.AsyncClient(timeout=site.config.gateway.drain_s + _MOMENT_S) as client:
        told = (await client.post(f"http://{worker.metrics_address}/drain")).text.strip()
    if "waited" not in told or "left behind" in told or "did not answer" in told:
        raise NotFiredError(f"{fault.kind}: {told}")
    await _end(process)
    return Fired({"requests_in_engine": held, "drain": told}, worker.worker_id, process.pid)


async def _kill_draft(fault: Fault, site: Site, load: Load) -> Fired:
    draft = await site.draft()
    if draft is None:
        raise NotFiredError(f"{fault.kind}: there is no draft actor")
    process = site.process_at(draft.address)
    midway = load.midway
    await _end(process)
    return Fired({"streams_midway": midway}, draft.draft_id, process.pid)


async def _kill_gateway(fault: Fault, site: Site, load: Load) -> Fired:
    process = site.process_at(site.grpc)
    midway = load.midway
    if not midway:
        raise NotFiredError(f"{fault.kind}: no stream was midway")
    await _end(process)
    return Fired({"streams_midway": midway}, pid=process.pid)


async def _cut_kv(fault: Fault, site: Site, load: Load) -> Fired:
    """For a while nothing gets to or from the port where a prefill worker gives KV away; gateways still reach it."""
    worker, held = await _victim(fault, site, "prefill")
    ports = [int(port) for port in _PORT.findall(worker.kv_address)]
    with cut(ports):
        await asyncio.sleep(fault.outage_s)
        lost = dropped()
    if not lost:
        raise NotFiredError(f"{fault.kind}: nobody has sent anything in {fault.outage_s:.1f} s")
    return Fired({"requests_in_engine": held, "packets_dropped": lost, "outage_s": round(fault.outage_s, 2)})


async def _break_redis(fault: Fault, site: Site, load: Load) -> Fired:
    """It is down for a while, and comes back with what it has written to disk, or with nothing."""
    before, midway = site.redis.keys(), load.midway
    site.redis.kill()
    if await asyncio.to_thread(site.redis.answers):
        raise NotFiredError(f"{fault.kind}: it still answers")
    if fault.kind == "lose-redis":
        site.redis.forget()
    await asyncio.sleep(fault.outage_s)
    await asyncio.to_thread(site.redis.start)
    after = site.redis.keys()
    if fault.kind == "kill-redis" and not after:
        raise NotFiredError(f"{fault.kind}: {before} keys were not on disk")
    keys = {"keys_before": before, "keys_after": after}
    return Fired({"streams_midway": midway, **keys, "outage_s": round(fault.outage_s, 2)})


async def _apply(fault: Fault, site: Site, load: Load) -> Fired:
    """Another engine argument for one pool: its workers are replaced, one by one, under load."""
    midway, before, begun = load.midway, {each.worker_id for each in await site.workers(_CHANGED)}, time.monotonic()
    config = site.config.model_copy(deep=True)
    pool = next(each for each in config.pools if each.name == _CHANGED)
    pool.engine["max_num_seqs"] ^= 1  # 8 or 9
    try:
        await asyncio.to_thread(site.apply, config, _APPLY_S)
    except ConfigError as error:
        raise NotFiredError(f"{fault.kind}: {error}") from error
    now = {each.worker_id for each in await site.workers(_CHANGED)}
    if not now or before & now:
        raise NotFiredError(f"{fault.kind}: {sorted(before)} were there before, {sorted(now)} are now")
    took = round(time.monotonic() - begun, 1)
    return Fired({"streams_midway": midway, "replaced": sorted(before), "by": sorted(now), "took_s": took})


async def _fill_landing(fault: Fault, site: Site, load: Load) -> Fired:
    """A burst of prompts behind a slow network: their KV comes together, and takes long to land."""
    workers = await site.workers("decode")
    before = await site.landing_waits(workers)
    with shaped(_SLOW):
        load.burst(_BURST)
        waits = await site.wait_landing_full(workers, before, _MOMENT_S)
    if not waits:
        raise NotFiredError(f"{fault.kind}: all KV has found room in the landing buffer")
    return Fired({"requests_more": _BURST, "frames_that_waited": waits})


async def _kill_launcher(fault: Fault, site: Site, load: Load) -> Fired:
    """It is the controller too. Nobody needs it to be served, and the next one takes over what it finds."""
    launcher = site.kept.process
    await _end(launcher)
    midway, through = await load.see_through(_FINISH_S)
    if not midway:
        raise NotFiredError(f"{fault.kind}: no stream was midway")
    evidence = {"streams_midway": midway, "finished": through}
    return Fired(evidence, pid=launcher.pid, mend=site.kept.start, cut_short=midway - through)


async def _kill_raylet(fault: Fault, site: Site, load: Load) -> Fired:
    """With a node's raylet all actors on it end. Another node comes."""
    worker, held = await _victim(fault, site, "decode")
    process = site.process_at(worker.engine_address)
    raylet = process.parent()
    if raylet is None or raylet.name() != "raylet":
        raise NotFiredError(f"{fault.kind}: {worker.worker_id} is not a child of a raylet")
    lost = [each.worker_id for each in await site.workers() if raylet in site.process_at(each.engine_address).parents()]
    await asyncio.to_thread(site.nodes.lose, raylet)
    evidence = {"requests_in_engine": held, "workers_lost": sorted(lost)}
    return Fired(evidence, worker.worker_id, process.pid, mend=site.nodes.add)


async def _kill_head(fault: Fault, site: Site, load: Load) -> Fired:
    """Its control store, that is. What runs ends well meanwhile, and then it comes back with what it knew."""
    pid = await asyncio.to_thread(site.nodes.lose_control)
    if psutil.pid_exists(pid):
        raise NotFiredError(f"{fault.kind}: process {pid} lives on after SIGKILL")
    midway, through = await load.see_through(_FINISH_S)
    if not midway:
        await asyncio.to_thread(site.nodes.regain_control)
        raise NotFiredError(f"{fault.kind}: no stream was midway")
    evidence = {"streams_midway": midway, "finished": through}
    return Fired(evidence, mend=site.nodes.regain_control, cut_short=midway - through)


def _has_stopped(process: psutil.Process) -> bool:
    deadline = time.monotonic() + _DIES_S
    while process.status() != psutil.STATUS_STOPPED:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


async def _end(process: psutil.Process) -> None:
    process.kill()
    try:
        await asyncio.to_thread(process.wait, _DIES_S)
    except psutil.TimeoutExpired:
        if process.status() != psutil.STATUS_ZOMBIE:
            raise NotFiredError(f"process {process.pid} lives on after SIGKILL") from None


_FAULTS: dict[Kind, Callable[[Fault, Site, Load], Awaitable[Fired]]] = {
    "kill-prefill": _kill_worker,
    "kill-decode": _kill_worker,
    "freeze-prefill": _freeze_worker,
    "freeze-decode": _freeze_worker,
    "drain-decode": _drain_worker,
    "kill-gateway": _kill_gateway,
    "kill-redis": _break_redis,
    "lose-redis": _break_redis,
    "kill-draft": _kill_draft,
    "cut-kv": _cut_kv,
    "apply": _apply,
    "fill-landing": _fill_landing,
    "kill-launcher": _kill_launcher,
    "kill-raylet": _kill_raylet,
    "kill-head": _kill_head,
}
