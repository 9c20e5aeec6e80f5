"""`joinwise bench simulate`: how fast the simulator is, with the router that serves, and whether it repeats itself.

Each run is a process of its own, so that its memory is what it alone has needed: Python's peak plus the Redis server's.
The rows have the CPU seconds of both too, which other work on the machine changes less than wall-clock time.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from joinwise.cluster.simulate import profile
from joinwise.cluster.simulate.pools import parse_pools
from joinwise.cluster.simulate.run import simulate
from joinwise.cluster.simulate.trace import poisson
from joinwise.cluster.store.embedded import EmbeddedRedis

#: Requests a second for each machine: most of what five eighths of H100s for prompts, the rest for tokens, can do.
RATE_PER_MACHINE = 1.4
_SEED = 7


def one(machines: int, requests: int) -> dict[str, Any]:
    """Simulate so many requests over so many machines; returns a row."""
    prefill = machines * 5 // 8
    pools = parse_pools(f"prefill={prefill}xh100,decode={machines - prefill}xh100")
    rate = machines * RATE_PER_MACHINE
    trace = poisson(rate, requests * 1.02 / rate + 1, _SEED, prompt=800, output=100).scaled(limit=requests)
    server = EmbeddedRedis.start()
    try:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        result = simulate(trace, pools, profile.shipped(), server=server)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        redis_kib, redis_cpu = _peak_kib(server.pid), sum(psutil.Process(server.pid).cpu_times()[:2])
    finally:
        server.stop()
    digest = hashlib.sha256(json.dumps(result.figures, sort_keys=True).encode())
    for job in result.outcome.jobs:
        digest.update(f"{job.first!r} {job.end!r}".encode())
    return {
        "machines": machines,
        "requests": len(trace.arrivals),
        "wall_s": seconds,
        "requests_per_s": len(trace.arrivals) / seconds,
        "cpu_s": cpu,
        "redis_cpu_s": redis_cpu,
        "gib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + redis_kib) / 2**20,
        "events": result.outcome.events,
        "virtual_s": result.outcome.seconds,
        "refused": result.outcome.refused,
        "digest": digest.hexdigest(),
    }


def run(requests: int, say: Callable[[str], None]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """All of it; `requests` is how many the largest run has. Returns figures and rows."""
    plan = [(40, 10_000), (40, 10_000), (1000, requests)]
    rows = []
    for machines, count in plan:
        say(f"{machines} machines, {count} requests")
        rows.append(_alone(machines, count))
    first, again, large = rows
    figures = {
        "requests_per_s_40": max(first["requests_per_s"], again["requests_per_s"]),
        "requests_per_s_1000": large["requests_per_s"],
        "deterministic": float(first["digest"] == again["digest"]),
    }
    if requests >= 1_000_000:
        figures |= {"wall_s_1m_1000": large["wall_s"], "gib_1m_1000": large["gib"]}
    return figures, rows


def _alone(machines: int, requests: int) -> dict[str, Any]:
    """`one`, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        row: dict[str, Any] = pool.apply(one, (machines, requests))
    return row


def _peak_kib(pid: int) -> int:
    """A process' largest resident set."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0
