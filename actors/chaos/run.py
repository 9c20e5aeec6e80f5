"""Runs it: right answers first, then a cluster, load, and one fault after the other; figures at the end."""

import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from joinwise.actors.bench.link import own_network
from joinwise.actors.bench.plain import plain_vllm
from joinwise.actors.chaos import schedule
from joinwise.actors.chaos.faults import NotFiredError, strike
from joinwise.actors.chaos.kept import Kept
from joinwise.actors.chaos.leaks import leftovers
from joinwise.actors.chaos.load import ANSWERS, Load, Outcome, Question, questions, stream_http
from joinwise.actors.chaos.nodes import Nodes
from joinwise.actors.chaos.redis_server import RedisServer, folder_in_memory
from joinwise.actors.chaos.schedule import Fault, Kind
from joinwise.actors.chaos.site import MODEL, PLAIN_ENGINE, Site, cluster_config
from joinwise.actors.models import resolve_model
from joinwise.cluster.client import AsyncClient
from joinwise.cluster.errors import JoinwiseError

#: Figures that must be 0.
MUST_BE_ZERO = (
    "lost", "wrong", "stream_faults", "leaked", "not_fired", "not_recovered", "cut_short", "noticed",
)  # fmt: skip
_NODES = 2  # beside the head's, where launcher and gateway are
_RECOVERS_S = 180.0
_IDLE_S = 30.0
_POLL_S = 0.2
TIMEOUT_S = 60.0
_REFERENCE_AT_ONCE = 4
Say = Callable[[str], None]
Figures = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        requests: at least, for each seed; load goes on while its faults last.
        seeds: each draws a schedule.
        kinds: of faults; each comes once in a schedule.
        most: of them in a schedule, drawn too; None for all.
        prefill, decode: engines.
        draft: one more engine, which verifies what a draft actor proposes.
        distinct: questions, asked in turn.
        rate: requests a second.
    """

    requests: int = 200
    seeds: Sequence[int] = (0,)
    kinds: Sequence[Kind] = schedule.KINDS
    most: int | None = None
    prefill: int = 1
    decode: int = 2
    draft: bool = False
    distinct: int = 24
    rate: float = 2.0


def run(settings: Settings, say: Say) -> tuple[Figures, list[dict[str, Any]]]:
    """Figures, and a row for each fault. The right answers come from plain vLLM, which is stopped before it begins.

    Raises:
        JoinwiseError: something could not be started.
    """
    with tempfile.TemporaryDirectory(prefix="joinwise-chaos-") as name:
        folder = Path(name)
        asked, expected = reference(settings, folder, say)
        return break_one(settings, asked, expected, folder, say)


def reference(
    settings: Settings, folder: Path, say: Say, *, answers: tuple[int, int] = ANSWERS
) -> tuple[list[Question], list[list[int]]]:
    """Questions, and what plain vLLM answers them. `answers`: least and most tokens of one."""
    asked = questions(settings.distinct, answers=answers)
    say("starting plain vLLM in float32 for the right answers")
    model = str(resolve_model(MODEL, progress=say).path)
    cores = sorted(os.sched_getaffinity(0))[:1]
    with plain_vllm(model, MODEL, cores, PLAIN_ENGINE, folder / "plain.log") as url:
        return asked, asyncio.run(right_answers(url, MODEL, asked))


async def right_answers(url: str, model: str, asked: Sequence[Question]) -> list[list[int]]:
    """What an undisturbed engine answers.

    Raises:
        JoinwiseError: it refuses.
    """
    room = asyncio.Semaphore(_REFERENCE_AT_ONCE)

    async def answer(question: Question) -> list[int]:
        async with room:
            return [each async for ids in stream_http(client, model, question) for each in ids]

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        return await asyncio.gather(*(answer(each) for each in asked))


def break_one(
    settings: Settings, asked: Sequence[Question], expected: Sequence[Sequence[int]], folder: Path, say: Say
) -> tuple[Figures, list[dict[str, Any]]]:
    """Start a cluster, break it by the schedule of every seed, stop it. Errors as for `Launcher.wait_ready`."""
    with ExitStack() as stack:
        if {"cut-kv", "fill-landing"} & set(settings.kinds):
            stack.enter_context(own_network())
        site = started(settings, folder, stack, say)
        rows: list[dict[str, Any]] = []
        outcomes: list[Outcome] = []
        leaked: list[str] = []
        for seed in settings.seeds:
            load_rows, ended, left = asyncio.run(_one_seed(settings, seed, site, asked, expected, say))
            rows, outcomes, leaked = rows + load_rows, outcomes + ended, leaked + left
            say(f"seed {seed}: {figures_of(1, load_rows, ended, left)}")
            if any(row["recover_s"] is None for row in load_rows):
                break
    return figures_of(len(settings.seeds), rows, outcomes, leaked), [*rows, *({"leaked": line} for line in leaked)]


def started(settings: Settings, folder: Path, stack: ExitStack, say: Say) -> Site:
    """A cluster with its Redis and its Ray, which stop with the stack. Errors as for `Launcher.wait_ready`."""
    name = f"chaos-{os.getpid()}"
    engines = settings.prefill + settings.decode + 2 * settings.draft
    nodes = stack.enter_context(Nodes(_NODES, engines, folder))
    redis = RedisServer(stack.enter_context(folder_in_memory()) / "data")
    redis.start()
    stack.callback(redis.kill)
    config = cluster_config(
        name, redis.url, nodes.address, prefill=settings.prefill, decode=settings.decode, draft=settings.draft
    )
    file = folder / f"{name}.yaml"
    site = Site(config, file, Kept(name, file, folder), redis, nodes)
    site.write(config)
    say("starting the cluster")
    stack.enter_context(site.kept)
    return site


def figures_of(
    seeds: int, rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], leaked: Sequence[str]
) -> Figures:
    """Counts over all seeds. `noticed`: errors that clients met, but for those around faults that they may notice."""
    errors = sum(len(each.errors) for each in outcomes)
    excused = sum(sum(row["errors"].values()) for row in rows if row["kind"] in schedule.NOTICED)
    recovered = [row["recover_s"] for row in rows if row["recover_s"] is not None]
    return {
        "seeds": seeds,
        "requests": len(outcomes),
        "right": sum(each.right for each in outcomes),
        "lost": sum(each.lost for each in outcomes),
        "wrong": sum(each.wrong for each in outcomes),
        "stream_faults": sum(each.torn for each in outcomes),
        "leaked": len(leaked),
        "errors": errors,
        "noticed": errors - excused,
        "faults": len(rows),
        "not_fired": sum(not row["fired"] for row in rows),
        "cut_short": sum(row.get("cut_short", 0) for row in rows),
        "not_recovered": sum(row["fired"] and row["recover_s"] is None for row in rows),
        "recover_s_max": round(max(recovered, default=0.0), 1),
        "tokens": sum(each.received for each in outcomes),
    }


def together(parts: Sequence[Figures]) -> Figures:
    """Figures of several runs as one: the longest recovery, and of the others the sums."""
    found = {name: sum(each.get(name, 0) for each in parts) for name in parts[-1]}
    return found | {"recover_s_max": max(each["recover_s_max"] for each in parts)}


async def _one_seed(
    settings: Settings,
    seed: int,
    site: Site,
    asked: Sequence[Question],
    expected: Sequence[Sequence[int]],
    say: Say,
) -> tuple[list[dict[str, Any]], list[Outcome], list[str]]:
    over = asyncio.Event()
    async with (
        httpx.AsyncClient(base_url=site.http, timeout=TIMEOUT_S) as http,
        AsyncClient(site.grpc) as grpc,
        asyncio.TaskGroup() as group,
    ):
        load = Load(http, grpc, MODEL, asked, expected, rate=settings.rate)
        asking = group.create_task(load.run(settings.requests, over))
        rows = []
        try:
            for fault in schedule.draw(seed, settings.kinds, settings.most):
                await asyncio.sleep(fault.pause_s)
                rows.append(row := {"seed": seed, **await _one_fault(fault, site, load)})
                say(f"seed {seed}: {row['kind']}, whole after {row['recover_s']} s: {row['evidence']}")
                if row["recover_s"] is None:
                    break
        finally:
            over.set()
        await asking
    for row in rows:
        row["errors"] = dict(_met(load.outcomes, row.pop("begun"), row.pop("ended")))
    whole = all(row["recover_s"] is not None for row in rows)  # else nobody may be there to be asked
    return rows, load.outcomes, await left_behind(site) if whole else []


async def _one_fault(fault: Fault, site: Site, load: Load) -> dict[str, Any]:
    """Strike and wait until the cluster is whole; a row without the errors that came of it."""
    begun = time.monotonic()
    row: dict[str, Any] = {"kind": fault.kind, "fired": False, "recover_s": None, "begun": begun, "ended": begun}
    try:
        fired = await strike(fault, site, load)
    except NotFiredError as error:
        return row | {"evidence": str(error), "recover_s": await site.wait_whole("", _RECOVERS_S)}
    row |= {"fired": True, "evidence": fired.evidence, "cut_short": fired.cut_short}
    struck = time.monotonic()
    try:
        if fired.mend is not None:
            await asyncio.to_thread(fired.mend)
    except JoinwiseError as error:
        return row | {"evidence": {**fired.evidence, "not_mended": str(error)}, "ended": time.monotonic()}
    whole = await site.wait_whole(fired.gone, _RECOVERS_S) is not None and await load.wait_reached(_RECOVERS_S)
    took = round(time.monotonic() - struck, 1)
    if fired.pid and psutil.pid_exists(fired.pid):
        whole = False
        row["evidence"] = {**fired.evidence, "still_there": fired.pid}
    return row | {"recover_s": took if whole else None, "ended": time.monotonic()}


def _met(outcomes: Sequence[Outcome], begun: float, ended: float) -> Counter[str]:
    """Errors that requests met between two times."""
    return Counter(code for each in outcomes for at, code in each.errors if begun <= at <= ended)


async def left_behind(site: Site) -> list[str]:
    """What is left of requests once they have ended; leases may take their time to expire."""
    deadline = time.monotonic() + _IDLE_S
    while found := await leftovers(site.config.cluster, site.redis.url, site.http):
        if time.monotonic() > deadline:
            return found
        await asyncio.sleep(_POLL_S)
    return []
