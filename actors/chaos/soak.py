"""Steady load on a cluster that is well: nothing may grow, neither memory nor open files of a process, nor Redis' keys,
nor the KV blocks in use.

What grows is looked for in the second half of a run, when caches are full, pools of threads there and code compiled: a
line is laid through that half's samples (least squares), and what it rises from end to end, less twice the standard
error of that, must be no more than is allowed.
"""

import asyncio
import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import fmean, linear_regression
from time import monotonic
from typing import Any, Literal, NamedTuple

import grpc
import httpx
import psutil

from joinwise.actors.chaos.load import Load, Question
from joinwise.actors.chaos.run import TIMEOUT_S, Figures, Say, Settings, left_behind, reference, started
from joinwise.actors.chaos.site import MODEL, Site
from joinwise.cluster.client import AsyncClient

What = Literal["rss_mb", "fds", "keys", "kv_blocks"]
#: Figures that must be 0.
MUST_BE_ZERO = ("lost", "wrong", "stream_faults", "leaked", "errors", "grown")
#: What a series may rise by: so much, and such a share of its mean.
ALLOWED: Mapping[What, tuple[float, float]] = {
    "rss_mb": (8.0, 0.02),
    "fds": (2.0, 0.0),
    "keys": (5.0, 0.05),
    "kv_blocks": (4.0, 0.05),
}
_EVERY_S = 1.0
_LEAST = 8  # samples in half a run
_ANSWERS = (8, 32)
_SURE = 2.0  # standard errors


class Series(NamedTuple):
    """What was measured, of whom."""

    who: str
    what: What


Samples = Mapping[Series, Sequence[tuple[float, float]]]  # seconds and value


def soak(settings: Settings, say: Say) -> tuple[Figures, list[dict[str, Any]]]:
    """Figures, and a row for each series. Of the settings faults and seeds are not used.

    Raises:
        JoinwiseError: something could not be started.
    """
    with tempfile.TemporaryDirectory(prefix="joinwise-soak-") as name, ExitStack() as stack:
        folder = Path(name)
        asked, expected = reference(settings, folder, say, answers=_ANSWERS)
        site = started(settings, folder, stack, say)
        return asyncio.run(_loaded(settings, site, asked, expected, say))


async def _loaded(
    settings: Settings, site: Site, asked: Sequence[Question], expected: Sequence[Sequence[int]], say: Say
) -> tuple[Figures, list[dict[str, Any]]]:
    samples: defaultdict[Series, list[tuple[float, float]]] = defaultdict(list)
    async with httpx.AsyncClient(base_url=site.http, timeout=TIMEOUT_S) as http, AsyncClient(site.grpc) as client:
        load = Load(http, client, MODEL, asked, expected, rate=settings.rate)
        over = asyncio.Event()
        over.set()
        begin = monotonic()
        watching = asyncio.create_task(_watch(site, samples, begin, load, say))
        try:
            await load.run(settings.requests, over)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching  # a process that is gone is an error
        seconds = monotonic() - begin
    left = await left_behind(site)
    rows = judged(samples)
    outcomes = load.outcomes
    figures: Figures = {
        "requests": len(outcomes),
        "right": sum(each.right for each in outcomes),
        "lost": sum(each.lost for each in outcomes),
        "wrong": sum(each.wrong for each in outcomes),
        "stream_faults": sum(each.torn for each in outcomes),
        "errors": sum(len(each.errors) for each in outcomes),
        "leaked": len(left),
        "grown": sum(not row["flat"] for row in rows),
        "series": len(rows),
        "seconds": round(seconds, 1),
        "tokens": sum(each.received for each in outcomes),
    }
    return figures, [*rows, *({"leaked": line} for line in left)]


def judged(samples: Samples) -> list[dict[str, Any]]:
    """A row for each series: how it is in the second half, by how much it rises there, and whether that is flat."""
    return [{"who": each.who, "what": each.what, **judge(found, ALLOWED[each.what])} for each, found in samples.items()]


def judge(found: Sequence[tuple[float, float]], allowed: tuple[float, float]) -> dict[str, Any]:
    """One series' second half.

    Args:
        found: seconds and values, by time; of fewer than 16 nothing is said to be flat.
        allowed: what it may rise by there, and what share of its mean more.

    Returns:
        `first` and `mean` (of all samples the first, of the half the mean), `rise` over the half, its standard error
        `noise`, the `most` that it may be, and `flat`.
    """
    half = [each for each in found if each[0] >= (found[0][0] + found[-1][0]) / 2]
    times, values = zip(*half, strict=True)
    mean = fmean(values)
    most = allowed[0] + allowed[1] * mean
    rise = noise = 0.0
    if len(half) >= _LEAST:
        span = times[-1] - times[0]
        slope, start = linear_regression(times, values)
        spread = sum((each - fmean(times)) ** 2 for each in times)
        rest = sum((value - start - slope * at) ** 2 for at, value in half)
        rise, noise = slope * span, span * math.sqrt(rest / (len(half) - 2) / spread)
    flat = len(half) >= _LEAST and rise - _SURE * noise <= most
    numbers = {"first": found[0][1], "mean": mean, "rise": rise, "noise": noise, "most": most}
    return {**{name: round(value, 2) for name, value in numbers.items()}, "samples": len(half), "flat": flat}


async def _watch(
    site: Site, samples: defaultdict[Series, list[tuple[float, float]]], begin: float, load: Load, say: Say
) -> None:
    """Take a sample of everything each second."""
    processes = await _processes(site)
    workers = await site.workers()
    told = 0.0
    while True:
        now = monotonic() - begin
        for who, process in processes.items():
            samples[Series(who, "rss_mb")].append((now, process.memory_info().rss / 1e6))
            samples[Series(who, "fds")].append((now, process.num_fds()))
        keys = await asyncio.to_thread(site.redis.keys)
        samples[Series("redis", "keys")].append((now, keys or 0))
        for worker in workers:
            try:
                used = (await site.idle(worker)).blocks_used
            except grpc.aio.AioRpcError:  # busy: a sample less
                continue
            samples[Series(worker.worker_id, "kv_blocks")].append((now, used))
        if now - told > 30:
            told = now
            say(f"{now:.0f} s: {len(load.outcomes)} requests")
        await asyncio.sleep(_EVERY_S)


async def _processes(site: Site) -> dict[str, psutil.Process]:
    """Every process of the cluster that lasts, by what it is."""
    found = {worker.worker_id: site.process_at(worker.engine_address) for worker in await site.workers()}
    found |= {"gateway": site.process_at(site.grpc), "redis": psutil.Process(site.redis.pid)}
    return {**found, **site.nodes.processes, "launcher": site.kept.process}
