"""`joinwise top` on a real Redis with registered workers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import pytest
from helpers.router_rig import Bench, Make, demand
from redis.asyncio import Redis
from rich.console import Console
from typer.testing import CliRunner

from joinwise.cluster.cli.main import app
from joinwise.cluster.cli.top_command import render_pulse
from joinwise.cluster.errors import OverloadedError
from joinwise.cluster.router.pulse import take_pulse
from joinwise.cluster.router.registry import AsleepPool, WorkerLoad
from joinwise.cluster.router.router import Router
from joinwise.cluster.store.client import StoreClock
from joinwise.cluster.store.embedded import EmbeddedRedis


@pytest.fixture
async def bench(redis_client: Redis, cluster_name: str, clock: Callable[[], int], make_worker: Make) -> Bench:
    clock.now_ms = await StoreClock(redis_client).now_ms()  # type: ignore[attr-defined]
    bench = Bench(redis_client, cluster_name, clock, make_worker)
    for name, role in (("p", "prefill"), ("d", "decode"), ("e", "decode")):
        await bench.join(name, role)
        load = WorkerLoad(kv_blocks_free=16, kv_blocks_total=64, decode_step_ms=12.5, prefill_tokens_per_s=4000)
        assert await bench.registry.heartbeat(name, bench.epochs[name], load)
    return bench


def frame(pulse: object, height: int | None = None, width: int = 140) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_pulse(pulse, "c", height))  # type: ignore[arg-type]
    return console.export_text().splitlines()


async def test_a_pulse_counts_what_is_there(bench: Bench) -> None:
    large = demand(2000, 10, whole=True, exclude=frozenset({"p", "d"}))
    await bench.router.route(demand(100, 10))
    await bench.router.route(large)
    with pytest.raises(OverloadedError):
        await bench.router.route(large)
    pulse = await take_pulse(bench.client, bench.cluster)
    assert pulse.leases == 2
    assert pulse.verdicts == {"split": 1, "whole": 1, "full": 1}
    assert pulse.links == {("p", "d"): 1}
    assert (pulse.span_s, pulse.refused_per_s) == (10, 0.1)
    assert {each.info.worker_id: each.sequences for each in pulse.workers}["d"] == 1
    text = "\n".join(frame(pulse))
    assert "p -> d   0.1 hand-offs/s" in text
    assert "0.1 refused/s" in text
    assert "75 %" in text
    decode = next(line.split() for line in frame(pulse) if line.startswith("decode"))
    assert decode[:8] == ["decode", "m", "2", "decode", "2,000", "2,120", "20", "2"]


async def test_requests_that_wait_are_counted(bench: Bench) -> None:
    patient = bench.with_(queue_timeout_s=5, max_pending_tokens=210)
    first = await patient.router.route(demand(100, 100, whole=True, exclude=frozenset({"p", "e"})))
    waits = asyncio.create_task(patient.router.route(demand(100, 100, whole=True, exclude=frozenset({"p", "e"}))))
    async with asyncio.timeout(4):
        while (pulse := await take_pulse(bench.client, bench.cluster)).waiting == 0:
            await asyncio.sleep(0.01)
    assert (pulse.waiting, pulse.leases) == (1, 1)
    await patient.router.settle(first)
    await patient.router.settle(await waits)


async def test_pools_at_zero_are_shown(bench: Bench) -> None:
    await bench.registry.set_asleep([AsleepPool("spare", "m", "decode")], 60)
    text = "\n".join(frame(await take_pulse(bench.client, bench.cluster)))
    assert re.search(r"spare +m +at zero", text)
    await bench.registry.set_asleep([], 60)
    assert (await take_pulse(bench.client, bench.cluster)).asleep == ()


async def test_a_frame_fits_its_terminal(bench: Bench) -> None:
    for number in range(40):
        await bench.join(f"x{number:02}", "mixed")
    await bench.router.route(demand(exclude=frozenset({"p"})))
    pulse = await take_pulse(bench.client, bench.cluster)
    assert len(frame(pulse)) > 43
    for height in (20, 30):
        lines = frame(pulse, height, width=200)
        assert len(lines) <= height
        assert any(line.startswith("and ") and line.endswith(" more") for line in lines)


async def test_an_empty_cluster_and_one_frame_of_the_command(bench: Bench, redis_server: EmbeddedRedis) -> None:
    nothing = await take_pulse(bench.client, bench.cluster + "-none")
    assert (nothing.workers, nothing.leases, nothing.assigned_per_s) == ((), 0, 0)
    options = ["top", "--once", "--redis", redis_server.url, "--cluster", bench.cluster]
    printed = await asyncio.to_thread(CliRunner().invoke, app, options, env={"COLUMNS": "140"})
    assert printed.exit_code == 0, printed.output
    assert "3 workers" in printed.output
    assert "no decision in the last seconds" in printed.output
    gone = ["top", "--once", "--redis", "redis://127.0.0.1:1/0"]
    assert (await asyncio.to_thread(CliRunner().invoke, app, gone)).exit_code != 0


async def test_clusters_do_not_see_each_other(bench: Bench) -> None:
    await Router(bench.client, bench.cluster, bench.settings, bench.clock).route(demand())
    other = await take_pulse(bench.client, "*")
    assert (other.leases, other.waiting, other.verdicts) == (0, 0, {})
